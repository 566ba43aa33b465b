"""Write the README's tables from benchmarks/results/*.json: `python benchmarks/tables.py [--check]`."""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headfuse.comparison import Result
from headfuse.demo import Demonstration
from headfuse.report.tables import demonstration_table, markdown

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = Path(__file__).parent / "results"

Row = dict[str, Any]


def main() -> None:
    """Rewrite the marked parts of the README, or with --check fail if they are stale."""
    text = README.read_text(encoding="utf-8")
    fresh = render(text)
    if "--check" in sys.argv:
        sys.exit("README.md: not what benchmarks/results say; run python benchmarks/tables.py" if fresh != text else 0)
    README.write_text(fresh, encoding="utf-8")


def render(text: str) -> str:
    """`text` with every part between `<!-- table NAME -->` and `<!-- end -->` made anew."""
    rows = json.loads((RESULTS / "training_free.json").read_text(encoding="utf-8"))["rows"]
    for name, table in TABLES.items():
        before, start, rest = text.partition(f"<!-- table {name} -->\n")
        if start:
            text = before + start + table(rows) + "\n" + rest[rest.index("<!-- end -->") :]
    return text


def reference(rows: Sequence[Row]) -> str:
    """Delta CE of the 30M model by way of converting and budget."""
    budgets = ["50%", "25%", "12.5%"]
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        if row["model"] == "reference" and row["kv"] in budgets:
            cells.setdefault(_way(row), {})[row["kv"]] = f"{row['delta_ce']:+.3f}"
    return markdown(
        ["cache left", *budgets], [[way, *(found.get(kv, "") for kv in budgets)] for way, found in cells.items()]
    )


def smollm2(rows: Sequence[Row]) -> str:
    """Perplexity and zero-shot accuracy of SmolLM2-135M by cut and way."""
    lines = []
    chosen = [row for row in rows if row["model"] == "smollm2"]
    tasks = list(dict.fromkeys(task for row in chosen for task in row.get("tasks", {})))
    order = {"100%": 0, "2/3": 1, "1/2": 2, "1/3": 3}
    for row in sorted(chosen, key=lambda row: order[row["kv"]]):
        accuracies = [f"{row['tasks'][task]['accuracy']:.1%}" if task in row["tasks"] else "" for task in tasks]
        way = "original" if row["method"] == "original" else _way(row)
        lines.append(
            [row["kv"], _heads(row), way, f"{math.exp(row['ce']):.1f}", f"{row['delta_ce']:+.3f}", *accuracies]
        )
    return markdown(
        ["cache left", "K + V heads", "way", "perplexity", "delta CE", *(task.split("/")[0] for task in tasks)], lines
    )


def _heads(row: Row) -> str:
    """Key and value heads of a layer, where all layers have the same."""
    pairs = set(zip(row.get("key_heads", []), row.get("value_heads", []), strict=True))
    if not pairs:
        return "all"
    return " + ".join(map(str, pairs.pop())) if len(pairs) == 1 else "by layer"


def demo(_rows: Sequence[Row]) -> str:
    """What `headfuse demo` printed, from its --json output."""
    found = json.loads((RESULTS / "demo.json").read_text(encoding="utf-8"))
    shown = Demonstration(
        found["kv_bytes_per_token"],
        [Result(**row) for row in found["rows"]],
        found["prompt"],
        found["before"],
        found["after"],
    )
    return f"```\n{demonstration_table(shown)}\n```"


def _way(row: Row) -> str:
    way = f"{row['method']}{', norm restored' if row.get('restore_norm') else ''} -> {row['target']}"
    return way + ", adaptive budget" * (row["budget"] == "adaptive") + ", **refit**" * row["refit"]


TABLES = {"reference": reference, "smollm2": smollm2, "demo": demo}

if __name__ == "__main__":
    main()
