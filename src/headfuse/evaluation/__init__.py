"""Measurements of a finished model: loss on text, bytes of cache, tasks and samples; models are only read."""
