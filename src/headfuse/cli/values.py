"""Values between the command line and the stages: numbers in, results out."""

import json
import sys
from typing import Any

from headfuse.errors import ConfigError


def counted(text: str, of: str = "tokens") -> int:
    """A number of tokens, or of something else: 65536, 64k (64 * 1024), 1M (10^6)."""
    units = {"k": 1024, "M": 10**6, "B": 10**9}
    digits, unit = (text[:-1], units[text[-1]]) if text and text[-1] in units else (text, 1)
    try:
        number = round(float(digits) * unit)
    except (ValueError, OverflowError):
        number = 0
    if number < 1:
        raise ConfigError(f"wanted a number of {of}, got {text!r}; write for example 65536, 64k or 1M")
    return number


def show(content: dict[str, Any], text: str, *, as_json: bool) -> None:
    """Write a result to standard output, as one JSON object or as text."""
    sys.stdout.write((json.dumps(content, indent=1, allow_nan=False) if as_json else text) + "\n")
