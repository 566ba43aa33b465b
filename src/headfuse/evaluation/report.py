"""What an evaluation found, as one JSON file."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class EvaluationReport:
    """The parts that were measured; every value is JSON-ready."""

    model: str
    text: dict[str, Any] | None = None  # TextLoss.as_dict
    cache: dict[str, Any] | None = None  # cache_report
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)  # evaluate_tasks
    exact_match: dict[str, dict[str, Any]] = field(default_factory=dict)  # measure_exact_match
    samples: list[dict[str, str]] = field(default_factory=list)  # prompt and continuation

    def as_dict(self) -> dict[str, Any]:
        """The parts that are there."""
        return {name: value for name, value in asdict(self).items() if value not in (None, {}, [])}

    def save(self, path: Path) -> None:
        """Write the report; ValueError for a NaN, which is no JSON."""
        path.write_text(json.dumps(self.as_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
