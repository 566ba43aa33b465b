"""Calibration and evaluation text: from files, a hub or the built-in offline text to rows of token ids."""
