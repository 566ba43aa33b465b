"""What a conversion costs: runs `headfuse convert` with and without refit and writes benchmarks/results/cost.json.

    python benchmarks/cost.py MODEL CALIBRATION

Each conversion is a process of its own, so that its peak memory is its own too.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from headfuse.manifest import git_commit, hardware, versions

RESULTS = Path(__file__).parent / "results" / "cost.json"


def main() -> None:
    """Measure both ways."""
    model, calibration = sys.argv[1:3]
    rows = [{"refit": refit} | measure(model, calibration, refit=refit) for refit in (False, True)]
    meta = {"command": "python benchmarks/cost.py", "seed": 0, "calibration_tokens": 65536}
    meta |= {"versions": versions(), "hardware": hardware().model_dump(), "commit": git_commit()}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps({"meta": meta, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        print(f"refit {row['refit']}: {row['seconds']}, peak memory {row['peak_memory_bytes']}")


def measure(model: str, calibration: str, *, refit: bool) -> dict[str, Any]:
    """Seconds by stage, peak memory and parity of one conversion to 25%."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "headfuse", "convert", model, f"{scratch}/out", "--calibration", calibration]
        command += ["--json", "--refit" if refit else "--no-refit"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout)
    return {key: found[key] for key in ("seconds", "peak_memory_bytes", "parity", "refit_error", "kv_bytes_per_token")}


if __name__ == "__main__":
    main()
