"""The parts of `decode_attention.py`: cases and their inputs, checks and times, and the processes that run them."""
