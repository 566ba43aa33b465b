"""How the processes of the attention benchmarks report to their driver: lines of JSON, amid whatever else they print.

A line has `begin`, the name of what is begun, or `end`, the name of what is done, with `row`, `failed` or `meta` if
there is something to keep; or it is a `note`.
"""

import json
from typing import Any

MARK = "@"


def say(**line: Any) -> None:
    """Tell the driver."""
    print(MARK + json.dumps(line), flush=True)


def heard(printed: str) -> dict[str, Any] | None:
    """What a printed line tells the driver; None if it is other output."""
    return json.loads(printed.removeprefix(MARK)) if printed.startswith(MARK) else None
