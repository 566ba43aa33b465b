"""Healing on one GPU and on two (FSDP2): writes benchmarks/results/two_gpus.json.

    python benchmarks/two_gpus.py --model DIR --training train.npy

The curve of two GPUs is compared with that of one on the same batches; how far two runs on one GPU differ that add the
same gradients up in another order (micro-batches) says what bf16 noise is. Speeds are medians over looks of ten steps.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from training_free import provenance, write

RESULTS = Path(__file__).parent / "results" / "two_gpus.json"
LENGTH = 512


def main() -> None:
    """Convert without training, heal on one GPU twice and on two twice, compare."""
    options = parse()
    rows, folder = options.rows, Path(tempfile.mkdtemp())
    run(["convert", options.model, str(folder / "converted"), "--method", "mean-pool", "--kv", "25%", "--no-refit"])
    with ThreadPoolExecutor(2) as pool:  # one GPU each
        one, noise = pool.map(
            lambda case: heal(options, folder / case[0], 1, rows, gpu=case[1], micro_rows=case[2]),
            [("one", 0, None), ("noise", 1, rows // 2)],
        )
    two = heal(options, folder / "two", 2, rows)
    wide = heal(options, folder / "wide", 2, 2 * rows)
    found = {"one GPU": one, "one GPU, micro-batches": noise, "two GPUs": two, "two GPUs, twice the rows": wide}
    result = {
        "noise": difference(one, noise),
        "two GPUs": difference(one, two),
        "efficiency, same rows": two["tokens_per_second"] / (2 * one["tokens_per_second"]),
        "efficiency, twice the rows": wide["tokens_per_second"] / (2 * one["tokens_per_second"]),
    }
    meta = provenance("two_gpus.py", ["--rows", str(rows), "--steps", str(options.steps)], options.commit, 0.0)
    write(Path(options.out), {"meta": meta, "result": result, "rows": [{"run": k} | v for k, v in found.items()]})
    print(json.dumps(result, indent=1))


def heal(
    options: argparse.Namespace,
    out: Path,
    world: int,
    rows: int,
    *,
    gpu: int | None = None,
    micro_rows: int | None = None,
) -> dict[str, Any]:
    """One run of `headfuse heal`: its report and its curve."""
    command = ["heal", str(out.parent / "converted"), str(out), "--teacher", options.model, "--data", options.training]
    command += ["--tokens", str(options.steps * rows * LENGTH), "--rows", str(rows), "--row-length", str(LENGTH)]
    command += ["--rate", "5e-4", "--repeat", "--save-every", "100000", "--json"]
    command += [] if micro_rows is None else ["--micro-rows", str(micro_rows)]
    report = run(command, world=world, gpu=gpu)["training"]
    curve = [json.loads(line)["loss"] for line in (out / "headfuse" / "healing.jsonl").read_text().splitlines()]
    return report | {"world": world, "rows": rows, "curve": curve}


def run(arguments: list[str], *, world: int = 1, gpu: int | None = None) -> dict[str, Any]:
    """A headfuse command, under torchrun for more than one process; what it printed as JSON."""
    start = [sys.executable, "-m", "headfuse"]
    if world > 1:
        start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world), "-m", "headfuse"]
    environment = os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)})
    done = subprocess.run([*start, *arguments], env=environment, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-4000:])
    return json.loads(done.stdout) if "--json" in arguments else {}


def difference(first: dict[str, Any], second: dict[str, Any]) -> dict[str, float]:
    """How far two curves are apart, in nats."""
    apart = [abs(a - b) for a, b in zip(first["curve"], second["curve"], strict=True)]
    return {"mean": statistics.mean(apart), "largest": max(apart), "first step": apart[0], "last step": apart[-1]}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--training", required=True, help=".npy of token ids")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--commit", help="commit to record where the checkout is not a repository")
    parser.add_argument("--out", default=str(RESULTS))
    return parser.parse_args()


if __name__ == "__main__":
    main()
