"""headfuse."""
