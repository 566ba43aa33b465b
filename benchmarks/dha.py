"""How many tokens each way of training away the cost of shared heads needs: writes benchmarks/results/dha.json.

    python benchmarks/dha.py main --model DIR --training train.npy --evaluation val.npz --seeds 0,1,2
    python benchmarks/dha.py rates ...      the learning-rate search behind the main table
    python benchmarks/dha.py ablation|fusion-share|grouping ...
    python benchmarks/dha.py merge A.json B.json

Every token that a way looks at counts against its budget: calibration, search, fusion and healing read the same text.
The loss is measured on the first six blocks of 1024 tokens of every array in the evaluation file.
"""

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from headfuse.checkpoints.loading import load_model
from headfuse.checkpoints.opened import LoadedModel
from headfuse.checkpoints.registry import adapter_for
from headfuse.checkpoints.source import locate
from headfuse.conversion import Converted, Settings, convert_heads, gather_statistics
from headfuse.course import Course
from headfuse.evaluation.text_loss import measure_text_loss
from headfuse.learning.learn import learn_heads
from headfuse.learning.options import ALIGNED, PAPER, Learning
from headfuse.placement import Placement
from headfuse.planning.budget import parse_budget
from headfuse.sharing.methods import SharingOptions
from headfuse.sharing.refit import RefitOptions
from headfuse.statistics.moments import LayerStatistics
from headfuse.text.rows import load_tokens
from headfuse.training.batches import training_text
from headfuse.training.options import TrainingOptions, rows_for
from headfuse.training.processes import Processes
from training_free import blocks, merge, provenance, write

RESULTS = Path(__file__).parent / "results" / "dha.json"
CALIBRATION, LONG_CALIBRATION = 65_536, 524_288
BUDGETS = {"0": 0, "41k": 41_000, "206k": 206_000, "1.03M": 1_030_000, "4M": 4_000_000, "16M": 16_000_000}
LENGTH = 512
CURVE_POINTS = 30
SPEED_ROWS, SPEED_STEPS = 128, 60


@dataclass(frozen=True)
class Way:
    """One way from the original to few heads: what is shared without training, and what is trained."""

    settings: Settings
    learning: Learning
    calibration: int = CALIBRATION

    def spends(self, tokens: int) -> int:
        """Calibration tokens within a budget; a budget of 0 is the conversion alone, whatever it reads."""
        return min(self.calibration, tokens or self.calibration)


HEALED = Learning()
UNREFITTED = Settings(refit=None)
WAYS = {
    "gqa mean-pool": Way(Settings("mean-pool", "gqa", refit=None), HEALED, calibration=0),
    "gqa procrustes": Way(Settings("procrustes", "gqa", options=SharingOptions(restore_norm=True), refit=None), HEALED),
    "dha": Way(UNREFITTED, PAPER, calibration=0),
    "dha of aligned heads": Way(UNREFITTED, ALIGNED),
    "dha from closed form": Way(UNREFITTED, Learning(fusion_share=0.19, fusion_lm_weight=0.0)),
    "closed form": Way(UNREFITTED, HEALED),
    "closed form + refit": Way(Settings(), HEALED),
    "closed form + long refit": Way(Settings(refit=RefitOptions(steps=720)), HEALED, calibration=LONG_CALIBRATION),
    "original": Way(UNREFITTED, Learning(lm_weight=1.0), calibration=0),
}
# Rates to try; where the literature's baselines start far from the original they want larger ones.
RATE_GRIDS = {
    "gqa mean-pool": (5e-4, 1e-3, 2e-3),
    "gqa procrustes": (5e-4, 1e-3, 2e-3),
    "dha": (5e-4, 1e-3, 2e-3),
    "dha of aligned heads": (3e-4, 6e-4, 1.2e-3),
    "dha from closed form": (2e-4, 4e-4, 8e-4),
    "closed form + refit": (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3),
    "original": (2e-5, 1e-4, 4e-4),
}
SEARCHED_AS = {"closed form + long refit": "closed form + refit"}
MAIN = ("gqa mean-pool", "gqa procrustes", "dha", "dha of aligned heads", "dha from closed form", "closed form + refit")
PAPER_ABLATION = {
    "dha": PAPER,
    "without linear fusion": replace(PAPER, fusion_share=0.0),
    "without adaptive budget": replace(PAPER, layer_budget="uniform"),
    "with an exact knapsack": replace(PAPER, layer_budget="knapsack"),
    "progressive": replace(PAPER, levels=2),
}
GROUPINGS = {
    "annealed L_head": replace(PAPER, layer_budget="uniform"),
    "Algorithm 4 as printed": replace(PAPER, layer_budget="uniform", grouping="printed"),
    "CKA": replace(PAPER, layer_budget="uniform", grouping="cka"),
    "closed-form prices with aligned heads": replace(ALIGNED, lm_weight=1.0, fusion_lm_weight=1.0),
    "contiguous": replace(PAPER, layer_budget="uniform", grouping="contiguous", search_share=0.0, fusion_share=0.25),
}


@dataclass(frozen=True)
class Case:
    """A row to be: the way, the cache, the budget, and what differs from the defaults."""

    table: str
    name: str
    way: Way
    kv: str
    budget: str
    seed: int
    training: dict[str, Any] = field(default_factory=dict)
    lm_weight: float | None = None


class Bench:
    """The model, the text and the conversions that several rows share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        device, precision = Placement(options.device, options.precision).resolve()
        self.here, self.precision = Processes(device, precision), precision
        source = locate(options.model)
        model = load_model(source, device=device)
        self.loaded = LoadedModel.of(model, adapter_for(model.config))
        self.text = training_text(
            options.training, None, num_tokens=0, vocab_size=model.config.vocab_size, seed=0, cache=Path(options.cache)
        )
        self.evaluation = blocks(options.evaluation)
        self.base = self.loss(model)
        self.shared: dict[tuple[Any, ...], tuple[Converted, list[LayerStatistics]]] = {}

    def loss(self, model: Any) -> float:
        """Cross-entropy on the evaluation text."""
        return measure_text_loss(model, self.evaluation, precision=self.precision).overall.cross_entropy

    def run(self, case: Case) -> dict[str, Any]:
        """One row."""
        started = time.monotonic()
        calibrating, tokens = case.way.spends(BUDGETS[case.budget]), BUDGETS[case.budget]
        settings = replace(case.way.settings, share=parse_budget(case.kv), seed=case.seed, precision=self.precision)
        learned_from = case.way.learning
        needed = learned_from.start == "converted" or learned_from.grouping == "closed-form"
        converted, statistics = self.converted(settings, calibrating or CALIBRATION) if needed else (None, None)
        shared = time.monotonic()
        trained = max(0, tokens - calibrating)
        learning = self.learning(case, trained)
        if tokens and trained >= learning.training.step_tokens:
            course = Course(self.text, self.here)
            learned = learn_heads(self.loaded, settings, learning, course, converted=converted, statistics=statistics)
            context, reports, heads = learned.with_heads(), learned.reports, learned.converted.heads
        else:
            heads = (converted or self.converted(settings, CALIBRATION)[0]).heads
            context, reports = self.loaded.with_heads(heads), {}
        with context as model:
            loss = self.loss(model)
        return {
            "table": case.table,
            "model": self.options.name,
            "kv": case.kv,
            "method": case.name,
            "budget": case.budget,
            "tokens": tokens,
            "calibration_tokens": calibrating,
            "stage_tokens": {stage: report.tokens for stage, report in reports.items()},
            "seed": case.seed,
            "rate": learning.training.rate,
            "update": learning.training.update,
            "lm_weight": learning.lm_weight,
            "step_tokens": learning.training.step_tokens,
            "compiled": learning.training.compiled,
            "captured": learning.training.captured,
            "ce": loss,
            "delta_ce": loss - self.base,
            "key_heads": [layer.num_key_heads for layer in heads],
            "value_heads": [layer.num_value_heads for layer in heads],
            "seconds": {"share": round(shared - started, 2), "total": round(time.monotonic() - started, 2)},
            "stages": {stage: stage_record(report) for stage, report in reports.items()},
        }

    def training(self, tokens: int, seed: int) -> TrainingOptions:
        """A run of that many tokens, of one step at least."""
        rows = rows_for(tokens, LENGTH)
        return TrainingOptions(
            tokens=max(tokens, rows * LENGTH),
            rows=rows,
            length=LENGTH,
            repeat=True,
            captured=self.here.device.type == "cuda" and not self.options.eager,
            compiled=self.options.compile,
            seed=seed,
        )

    def learning(self, case: Case, tokens: int) -> Learning:
        """The stages of a case for that many tokens."""
        training = replace(self.training(tokens, case.seed), **case.training)
        learning = replace(case.way.learning, training=training)
        return learning if case.lm_weight is None else replace(learning, lm_weight=case.lm_weight)

    def converted(self, settings: Settings, calibrating: int) -> tuple[Converted, list[LayerStatistics]]:
        """Shared heads without training and their statistics; the same for all budgets that calibrate alike."""
        key = (str(settings), calibrating)
        if key not in self.shared:
            rows = load_tokens(
                self.options.training,
                None,
                num_tokens=calibrating or CALIBRATION,
                length=1024,
                seed=settings.seed,
                vocab_size=self.loaded.model.config.vocab_size,
            )
            statistics = gather_statistics(self.loaded, rows.tokens, settings)
            converted = convert_heads(self.loaded, rows.tokens, settings, statistics=statistics)
            self.shared[key] = converted, statistics
        return self.shared[key]


def compare_with_base(path: Path) -> None:
    """Add to every row its distance from the original trained on as many tokens with the same seed."""
    found = json.loads(path.read_text(encoding="utf-8"))
    base = {(row["budget"], row["seed"]): row["delta_ce"] for row in found["rows"] if row["table"] == "base"}
    for row in found["rows"]:
        trained = 0.0 if row["tokens"] == 0 else base.get((row["budget"], row["seed"]))
        row["delta_ce_same_tokens"] = None if trained is None else row["delta_ce"] - trained
    write(path, found)


def stage_record(report: Any) -> dict[str, Any]:
    """What a row keeps of a stage: speed, last losses, a thinned curve."""
    stride = -(-len(report.metrics) // CURVE_POINTS)
    kept = [row for index, row in enumerate(report.metrics) if index % stride == 0 or index == len(report.metrics) - 1]
    names = ("tokens", "lm", "kl", "pair_mse", "multiplier", "key_mean_pool_distance", "key_norm_ratio")
    curve = [{name: round(row[name], 5) for name in names if name in row} for row in kept]
    losses = {name: round(value, 5) for name, value in report.losses.items() if "norm/" not in name}
    return report.as_dict() | {"losses": losses, "curve": curve}


def main_cases(options: argparse.Namespace) -> Iterator[Case]:
    """Every way at every budget of tokens."""
    names = options.ways.split(",") if options.ways else MAIN
    for kv, name, budget in itertools.product(options.kv.split(","), names, options.budgets.split(",")):
        way, total = WAYS[name], BUDGETS[budget]
        fuses = way.learning.start != "converted" or way.learning.fusion_share
        if not fuses or total > way.spends(total):  # without tokens to train on, fusion has nothing to say
            for seed in seeds(options):
                changed = overrides(options, name, budget)
                yield Case("main", name, way, kv, budget, seed, changed, options.lm_weight)


def base_cases(options: argparse.Namespace) -> Iterator[Case]:
    """The unconverted model trained on as many tokens, which `delta_ce_same_tokens` compares with."""
    for budget in options.budgets.split(","):
        for seed in seeds(options):
            yield Case(
                "base", "original", WAYS["original"], "100%", budget, seed, overrides(options, "original", budget)
            )


def rate_cases(options: argparse.Namespace) -> Iterator[Case]:
    """Learning rates of every way."""
    for name in options.ways.split(",") if options.ways else RATE_GRIDS:
        kv = "100%" if name == "original" else "25%"
        for budget, rate in itertools.product(options.budgets.split(","), RATE_GRIDS[name]):
            changed = {"update": options.update or "adamw", "rate": rate}
            yield Case("rates", name, WAYS[name], kv, budget, 0, changed, options.lm_weight)


def variant_cases(table: str, variants: dict[str, Learning], options: argparse.Namespace) -> Iterator[Case]:
    """DHA as in the paper with one thing changed."""
    for name in options.ways.split(",") if options.ways else variants:
        learning = variants[name]
        for budget in options.budgets.split(","):
            for seed in seeds(options):
                way = Way(UNREFITTED, learning, calibration=0)
                changed = overrides(options, "dha", budget)
                yield Case(table, name, way, "25%", budget, seed, changed, options.lm_weight)


def fusion_shares() -> dict[str, Learning]:
    """How much of a fixed total goes to search and fusion."""
    shares = (0.025, 0.05, 0.1, 0.25, 0.5)
    return {f"{share:.1%}": replace(PAPER, search_share=0.24 * share, fusion_share=0.76 * share) for share in shares}


def speed_cases(options: argparse.Namespace) -> Iterator[Case]:
    """Tokens a second of healing, of the same without a teacher, and of the fusion stage beside its plain twin."""
    training = {"rows": SPEED_ROWS, "tokens": SPEED_STEPS * SPEED_ROWS * LENGTH}
    fusing = replace(PAPER, grouping="contiguous", layer_budget="uniform", search_share=0.0, fusion_share=1.0)
    ways = {
        "healing by KL": ("25%", WAYS["closed form"]),
        "healing by LM": ("25%", Way(UNREFITTED, Learning(lm_weight=1.0))),
        "original by LM": ("100%", WAYS["original"]),
        "fusion": ("25%", Way(UNREFITTED, replace(fusing, fusion_steps=SPEED_STEPS), calibration=0)),
    }
    for name in options.ways.split(",") if options.ways else ways:
        kv, way = ways[name]
        yield Case("speed", name, way, kv, "4M", 0, training)


def grouping_cases(options: argparse.Namespace) -> Iterator[Case]:
    """What decides which heads are fused."""
    yield from variant_cases("grouping", GROUPINGS, options)


TABLES = {
    "main": main_cases,
    "base": base_cases,
    "rates": rate_cases,
    "ablation": lambda options: variant_cases("ablation", PAPER_ABLATION, options),
    "fusion-share": lambda options: variant_cases("fusion-share", fusion_shares(), options),
    "grouping": grouping_cases,
    "speed": speed_cases,
}


def seeds(options: argparse.Namespace) -> list[int]:
    """The seeds asked for."""
    return [int(seed) for seed in options.seeds.split(",")]


def overrides(options: argparse.Namespace, way: str, budget: str) -> dict[str, Any]:
    """Update and rate: those given, else the best searched for this way at the nearest budget, else the defaults."""
    given = {name: getattr(options, name) for name in ("rate", "update") if getattr(options, name) is not None}
    if given or not options.rates:
        return given
    rows = json.loads(Path(options.rates).read_text(encoding="utf-8"))["rows"]
    tried = [row for row in rows if row["table"] == "rates" and row["method"] == SEARCHED_AS.get(way, way)]
    wanted = math.log(max(1, BUDGETS[budget]))
    best = min(tried, key=lambda row: (abs(math.log(row["tokens"]) - wanted), row["delta_ce"]))
    return {name: best[name] for name in ("rate", "update")}


def main() -> None:
    """Run one table, or merge the results of several runs."""
    options = parse()
    if options.table == "merge":
        merge([Path(path) for path in options.files], Path(options.out))
        compare_with_base(Path(options.out))
        return
    started, bench, rows = time.monotonic(), Bench(options), []
    torch.set_float32_matmul_precision("high")
    print(f"base {bench.base:.4f}", flush=True)
    for case in TABLES[options.table](options):
        row = bench.run(case)
        rows.append(row)
        stages = " ".join(f"{k}:{v['steps']}x{v['tokens_per_second']:,.0f}/s" for k, v in row["stages"].items())
        print(
            f"{row['kv']:>6} {row['budget']:>6} seed {row['seed']} {row['method']:<24} delta CE {row['delta_ce']:+.4f} "
            f"{row['update']} {row['rate']:g} lm {row['lm_weight']:g} {row['seconds']['total']:.1f} s {stages}",
            flush=True,
        )
        save(options, rows, time.monotonic() - started)


def save(options: argparse.Namespace, rows: Sequence[dict[str, Any]], seconds: float) -> None:
    """Write the rows so far, and how they came about."""
    meta = provenance("dha.py", [options.table, *arguments(options)], options.commit, seconds)
    write(Path(options.out), {"meta": {"runs": [meta]}, "rows": list(rows)})


def arguments(options: argparse.Namespace) -> Iterator[str]:
    """The options that choose rows, as they were given."""
    for name in ("kv", "ways", "budgets", "seeds", "rate", "update", "lm_weight"):
        value = getattr(options, name)
        if value not in (None, ""):
            yield f"--{name.replace('_', '-')} '{value}'"
    if options.compile:
        yield "--compile"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=[*TABLES, "merge"])
    add_shared_options(parser, WAYS, budgets=",".join(BUDGETS), out=RESULTS)
    parser.add_argument("--rates", help="results of the table `rates`, whose best each way then uses")
    parser.add_argument("--update", choices=["adamw", "muon"])
    parser.add_argument("--lm-weight", type=float, help="share of language-model loss in healing, for all ways")
    return parser.parse_args()


def add_shared_options(parser: argparse.ArgumentParser, ways: Iterable[str], *, budgets: str, out: Path) -> None:
    """What every script that trains the reference takes."""
    parser.add_argument("files", nargs="*", help="results to merge")
    parser.add_argument("--model", help="folder of the model")
    parser.add_argument("--name", default="reference", help="what the rows call it")
    parser.add_argument("--training", help=".npy of token ids")
    parser.add_argument("--evaluation", help=".npz of token ids, one array a domain")
    parser.add_argument("--cache", default=".run", help="where text is packed, if it is not packed already")
    parser.add_argument("--kv", default="25%")
    parser.add_argument("--ways", default="", help=f"by commas, of: {', '.join(ways)}")
    parser.add_argument("--budgets", default=budgets)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--rate", type=float)
    parser.add_argument("--eager", action="store_true", help="do not capture steps as CUDA graphs")
    parser.add_argument("--compile", action="store_true", help="compile blocks and losses")
    parser.add_argument("--device")
    parser.add_argument("--precision")
    parser.add_argument("--commit", help="commit to record where the checkout is not a repository")
    parser.add_argument("--out", default=str(out))


if __name__ == "__main__":
    main()
