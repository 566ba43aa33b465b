"""What alignment, regrouping, gates and a better start earn on the way to stock GQA: benchmarks/results/align.json.

    python benchmarks/align.py --model DIR --training train.npy --evaluation val.npz
    python benchmarks/align.py A.json B.json --out C.json        merge results

Arms of arXiv 2412.20677 and ours, on plain text with the teacher's whole distribution; as in dha.py, all tokens count
(the conversions read 65,536 of them) and the loss is measured on the first six blocks of every evaluation text.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dha import BUDGETS, CALIBRATION, Bench, add_shared_options, arguments, stage_record
from headfuse.conversion import Settings
from headfuse.course import Course
from headfuse.planning.budget import parse_budget
from headfuse.pruning import Lesson, Pruning, prune_heads
from headfuse.sharing.methods import SharingOptions
from training_free import merge, provenance, write

RESULTS = Path(__file__).parent / "results" / "align.json"
# Learning rates by start, those of the search in dha.json.
MEAN_POOL, ALIGNED, CLOSED, REFITTED = 1e-3, 5e-4, 4e-4, 2e-4


@dataclass(frozen=True)
class Arm:
    """A start, whether gates lead to it, and its learning rate."""

    settings: Settings
    rate: float
    pruning: Pruning = Pruning(gates=False)  # noqa: RUF009  frozen

    @property
    def calibration(self) -> int:
        """Tokens that the conversion reads."""
        return 0 if self.settings.method == "mean-pool" else CALIBRATION


def shared(method: str, **options: Any) -> Settings:
    """Settings of a stock checkpoint without a refit."""
    return Settings(method, "gqa", options=SharingOptions(**options), refit=None)


def starts() -> dict[str, tuple[Settings, float]]:
    """Every way to the first draft of the merged heads."""
    found = {"mean-pool": (shared("mean-pool"), MEAN_POOL)}
    for criterion in ("dist", "cos"):
        found[f"align only ({criterion})"] = shared("procrustes", criterion=criterion, group_on="none"), ALIGNED
        for item in ("value", "key"):
            options = {"criterion": criterion, "group_on": item}
            found[f"align + regroup ({item} {criterion})"] = shared("procrustes", **options), ALIGNED
            found[f"regroup only ({item} {criterion})"] = shared("procrustes", **options, align=False), MEAN_POOL
    found["align + regroup (norm restored)"] = shared("procrustes", restore_norm=True), ALIGNED
    found["closed form"] = shared("closed-form"), CLOSED
    found["closed form + refit"] = Settings("closed-form", "gqa"), REFITTED
    return found


def arms() -> dict[str, Arm]:
    """Every start with gates and without, and other ways to close gates for the paper's own start."""
    found = {}
    for name, (settings, rate) in starts().items():
        found[name] = Arm(settings, rate)
        found[f"{name} + gates"] = Arm(settings, rate, Pruning())
    whole, rate = starts()["align + regroup (value dist)"]
    found["align + regroup (value dist) + ramp"] = Arm(whole, rate, Pruning(controller="ramp"))
    found["align + regroup (value dist) + Lagrangian"] = Arm(whole, rate, Pruning(controller="lagrangian"))
    found["align + regroup (value dist) + classical gates"] = Arm(whole, rate, Pruning(distribution="classical"))
    return found


def run(bench: Bench, name: str, arm: Arm, kv: str, budget: str, seed: int) -> dict[str, Any]:
    """One row."""
    started, options = time.monotonic(), bench.options
    settings = replace(arm.settings, share=parse_budget(kv), seed=seed, precision=bench.precision)
    calibrating, tokens = min(arm.calibration, BUDGETS[budget] or arm.calibration), BUDGETS[budget]
    converted, statistics = bench.converted(settings, calibrating or CALIBRATION)
    left = max(0, tokens - calibrating)
    rate = arm.rate if options.rate is None else options.rate
    training = replace(bench.training(left, seed), rate=rate)
    pruning = replace(arm.pruning, training=training)
    if left >= training.step_tokens:
        lesson, course = Lesson.of(bench.text, pruning, bench.loaded.model), Course(bench.text, bench.here)
        learned = prune_heads(
            bench.loaded, settings, pruning, course, lesson, converted=converted, statistics=statistics
        )
        context, reports = learned.with_heads(), learned.reports
    else:
        context, reports = bench.loaded.with_heads(converted.heads), {}
    with context as model:
        loss = bench.loss(model)
    chosen = settings.options
    return {
        "model": options.name,
        "kv": kv,
        "method": name,
        "start": settings.method,
        "align": settings.method == "procrustes" and chosen.align,
        "group_on": chosen.group_on if settings.method == "procrustes" else None,
        "criterion": chosen.criterion if settings.method == "procrustes" else None,
        "restore_norm": chosen.restore_norm,
        "refit": settings.refit is not None,
        "gates": pruning.gates,
        "controller": pruning.controller if pruning.gates else None,
        "distribution": pruning.distribution if pruning.gates else None,
        "budget": budget,
        "tokens": tokens,
        "calibration_tokens": calibrating,
        "seed": seed,
        "rate": rate,
        "step_tokens": training.step_tokens,
        "ce": loss,
        "delta_ce": loss - bench.base,
        "seconds": round(time.monotonic() - started, 2),
        "stages": {stage: stage_record(report) for stage, report in reports.items()},
    }


def cases(options: argparse.Namespace) -> Iterator[tuple[str, Arm, str, str, int]]:
    """The rows asked for, all arms of a cut and a budget together."""
    known = arms()
    for kv in options.kv.split(","):
        for budget in options.budgets.split(","):
            for seed in map(int, options.seeds.split(",")):
                for name in options.ways.split(",") if options.ways else known:
                    yield name, known[name], kv, budget, seed


def main() -> None:
    """Run rows, or merge the results of several runs."""
    options = parse()
    if options.files:
        merge([Path(path) for path in options.files], Path(options.out))
        return
    torch.set_float32_matmul_precision("high")
    started, bench, rows = time.monotonic(), Bench(options), []
    for case in cases(options):
        row = run(bench, *case)
        rows.append(row)
        print(
            f"{row['kv']:>6} {row['budget']:>6} seed {row['seed']} {row['method']:<48} delta CE {row['delta_ce']:+.4f} "
            f"rate {row['rate']:g} {row['seconds']:.1f} s",
            flush=True,
        )
        meta = provenance("align.py", arguments(options), options.commit, time.monotonic() - started)
        write(Path(options.out), {"meta": {"runs": [meta]}, "rows": rows})


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shared_options(parser, arms(), budgets="1.03M", out=RESULTS)
    parser.set_defaults(update=None, lm_weight=None)  # what dha.py records besides
    return parser.parse_args()


if __name__ == "__main__":
    main()
