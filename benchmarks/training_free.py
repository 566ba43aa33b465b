"""What every training-free conversion keeps of a model: writes benchmarks/results/training_free.json.

    python benchmarks/training_free.py reference --model DIR --calibration train.npy --evaluation val.npz
    python benchmarks/training_free.py smollm2 --original --calibration text.npy --evaluation text.npz --tasks DIR
    python benchmarks/training_free.py merge A.json B.json

Calibration text is a source as `headfuse convert --calibration` takes it; the loss is measured on the first six
blocks of 1024 tokens of every array in the evaluation file.
"""

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from headfuse.checkpoints.loading import load_model, load_tokenizer
from headfuse.checkpoints.opened import LoadedModel
from headfuse.checkpoints.registry import adapter_for
from headfuse.checkpoints.source import locate
from headfuse.comparison import Case, Comparison, Result
from headfuse.conversion import Settings
from headfuse.evaluation.tasks import evaluate_tasks, find_tasks
from headfuse.evaluation.text_loss import measure_text_loss
from headfuse.manifest import git_commit, hardware, peak_memory, versions
from headfuse.placement import Placement
from headfuse.planning.budget import parse_budget
from headfuse.progress import for_terminal
from headfuse.sharing.methods import SharingOptions
from headfuse.text.rows import TokenRows, load_tokens

RESULTS = Path(__file__).parent / "results" / "training_free.json"
LENGTH, BLOCKS = 1024, 6


def main() -> None:
    """Run one table, or merge the results of several runs."""
    options = parse()
    if options.table == "merge":
        merge([Path(path) for path in options.files], Path(options.out))
        return
    device, options.precision = Placement(options.device, options.precision).resolve()
    source = locate(options.model or options.table)
    model, reference = (load_model(source, device=device) for _ in range(2))
    tokenizer = load_tokenizer(source)
    texts = [
        load_tokens(options.calibration, tokenizer, num_tokens=options.tokens, length=LENGTH, seed=options.seed),
        blocks(options.evaluation),
    ]
    tasks = find_tasks([spec for spec in options.tasks.split(",") if spec])

    def judge(judged: PreTrainedModel) -> dict[str, Any]:
        if tokenizer is None:
            return {}
        return evaluate_tasks(judged, tokenizer, tasks, precision=options.precision, progress=for_terminal())

    loaded = LoadedModel.of(model, adapter_for(model.config))
    comparison = Comparison(options.table, loaded, reference, texts[0].tokens, texts[1], judge)
    started = time.monotonic()
    rows: list[dict[str, Any]] = [original(options, comparison)] if options.original else []
    cases = [case for case in TABLES[options.table]() if wanted(case, options)]
    settings = {"seed": options.seed, "precision": options.precision}
    cases = [Case(case.kv, replace(refitted(case.settings, options.refit), **settings)) for case in cases]
    for case, result in zip(cases, comparison.run(cases, stages=for_terminal()), strict=True):
        fit = case.settings.refit
        text = {"calibration": Path(options.calibration).stem}
        rows.append(result.as_dict() | text | ({} if fit is None else {"refit_options": asdict(fit)}))
        show(result)
        save(options, rows, time.monotonic() - started)


def refitted(settings: Settings, changes: str) -> Settings:
    """Settings whose refit, if there is one, has other options: 'steps=480,rates=0.05/0.02'."""
    if settings.refit is None or not changes:
        return settings
    pairs = dict(part.split("=") for part in changes.split(","))
    rates = {"rates": tuple(map(float, pairs.pop("rates").split("/")))} if "rates" in pairs else {}
    values = rates | {name: type(getattr(settings.refit, name))(value) for name, value in pairs.items()}
    return replace(settings, refit=replace(settings.refit, **values))


def wanted(case: Case, options: argparse.Namespace) -> bool:
    """Whether the options leave this row in."""
    settings = case.settings
    way = f"{settings.method} {settings.target} {settings.budget}"
    way += " restore-norm" * settings.options.restore_norm + " refit" * (settings.refit is not None)
    return (not options.kv or case.kv in options.kv.split(",")) and (not options.way or way in options.way.split(","))


def reference_cases() -> list[Case]:
    """The 30M multi-head model: three budgets by every method, and what makes the difference."""
    bare, full = Settings(refit=None), Settings()
    cases = []
    for kv in ("50%", "25%", "12.5%"):
        share = parse_budget(kv)
        ways = [
            replace(bare, method="mean-pool", target="gqa"),
            replace(bare, method="procrustes", target="gqa"),
            replace(bare, method="procrustes", target="gqa", options=SharingOptions(restore_norm=True)),
            replace(bare, target="gqa"),
            bare,
            replace(bare, budget="adaptive"),
            full,
        ]
        if kv == "25%":
            ways += [replace(full, target="gqa"), replace(full, budget="adaptive")]
        cases += [Case(kv, replace(way, share=share)) for way in ways]
    for name, keys, values in (("K only", 4, None), ("V only", None, 4)):
        cases.append(Case(name, replace(bare, key_heads=keys or 16, value_heads=values or 16)))
    return cases


def smollm2_cases() -> list[Case]:
    """SmolLM2-135M, 9 query heads on 3 key/value heads: its cache cut to 2/3, 1/2 and 1/3."""
    ways = [Settings("mean-pool", "dha", refit=None), Settings(refit=None), Settings()]
    cuts = (("2/3", Fraction(2, 3)), ("1/2", Fraction(1, 2)), ("1/3", Fraction(1, 3)))
    cases = [Case(name, replace(way, share=share)) for name, share in cuts for way in ways]
    return [*cases, Case("1/3", Settings("procrustes", "gqa", share=Fraction(1, 3), refit=None))]


TABLES = {"reference": reference_cases, "smollm2": smollm2_cases}


def original(options: argparse.Namespace, comparison: Comparison) -> dict[str, Any]:
    """The unconverted model's row: loss on the evaluation text, tasks, cache."""
    loss = measure_text_loss(comparison.reference, comparison.evaluation, precision=options.precision).overall
    return {
        "model": options.table,
        "kv": "100%",
        "method": "original",
        "ce": loss.cross_entropy,
        "delta_ce": 0.0,
        "kl": 0.0,
        "kv_bytes_per_token": comparison.loaded.kv_bytes_per_token(),
        "tasks": comparison.judge(comparison.reference),
    }


def blocks(path: str) -> TokenRows:
    """The first blocks of every domain of an .npz."""
    arrays = np.load(path)
    rows, domain = [], []
    for index, name in enumerate(arrays.files):
        count = min(len(arrays[name]) // LENGTH, BLOCKS)
        rows.append(torch.from_numpy(arrays[name][: count * LENGTH].astype(np.int64)).view(count, LENGTH))
        domain += [index] * count
    return TokenRows(torch.cat(rows), tuple(arrays.files), torch.tensor(domain))


def save(options: argparse.Namespace, rows: Sequence[dict[str, Any]], seconds: float) -> None:
    """Write the rows so far, and how they came about."""
    named = (("--kv", options.kv), ("--way", options.way), ("--refit", options.refit))
    arguments = [
        options.table,
        *(part for pair in named if pair[1] for part in pair),
        *["--original"] * options.original,
    ]
    settings = {"seed": options.seed, "calibration_tokens": options.tokens, "precision": options.precision}
    meta = provenance("training_free.py", arguments, options.commit, seconds) | settings
    write(Path(options.out), {"meta": {"runs": [meta]}, "rows": list(rows)})


def provenance(script: str, arguments: Iterable[str], commit: str | None, seconds: float) -> dict[str, Any]:
    """How a script's results came about; `commit` where the checkout is not a repository."""
    return {
        "command": " ".join([f"python benchmarks/{script}", *arguments]),
        "versions": versions(),
        "hardware": hardware().model_dump(),
        "commit": commit or git_commit(),
        "seconds": round(seconds, 1),
        "peak_memory_bytes": peak_memory(),
    }


def merge(files: Sequence[Path], out: Path) -> None:
    """Put the rows of several runs into one file, in the order of the files."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    rows = [row for result in found for row in result["rows"]]
    write(out, {"meta": {"runs": [run for result in found for run in result["meta"]["runs"]]}, "rows": rows})


def write(path: Path, results: dict[str, Any]) -> None:
    """Write a results file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def show(result: Result) -> None:
    """One line per row while it runs."""
    print(
        f"{result.kv:>12} {result.method:>12} {result.target} {result.budget:>8} {'refit' if result.refit else '':5} "
        f"delta CE {result.delta_ce:+.4f}  KL {result.kl:.4f}  {result.seconds:.1f} s",
        flush=True,
    )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=[*TABLES, "merge"])
    parser.add_argument("files", nargs="*", help="results to merge")
    parser.add_argument("--model", help="folder of the model; default: the table's own name")
    parser.add_argument("--calibration")
    parser.add_argument("--evaluation", help=".npz of token ids, one array a domain")
    parser.add_argument("--tasks", default="")
    parser.add_argument("--kv", default="", help="only these budgets, by commas")
    parser.add_argument("--way", default="", help="only these ways, by commas: 'closed-form dha uniform refit'")
    parser.add_argument("--refit", default="", help="other options of the refit: 'steps=480,rows=8'")
    parser.add_argument("--original", action="store_true", help="a row for the unconverted model too")
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    parser.add_argument("--precision")
    parser.add_argument("--commit", help="commit to record where the checkout is not a repository")
    parser.add_argument("--out", default=str(RESULTS))
    return parser.parse_args()


if __name__ == "__main__":
    main()
