"""From a loaded model and calibration rows to converted heads: statistics, plan, sharing, refit. Nothing is written."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Int64
from torch import Tensor

from headfuse.checkpoints.attention import attention_of, attention_replaced
from headfuse.checkpoints.heads import AttentionHeads
from headfuse.checkpoints.opened import LoadedModel
from headfuse.errors import ConfigError, PlanError
from headfuse.planning.budget import gqa_count, head_plan, knapsack, share_of, uniform_counts
from headfuse.planning.grouping import HeadGroups
from headfuse.planning.plan import HeadPlan, Target
from headfuse.precision import Precision, precision_context
from headfuse.progress import Stages, silent
from headfuse.sharing.methods import SharingMethod, SharingOptions, SourceLayer, group_layer, method_named
from headfuse.sharing.procrustes import Criterion, align, group_rotations, head_grams
from headfuse.sharing.refit import RefitOptions, RefitReport, refit
from headfuse.sharing.sensitivity import unit_costs
from headfuse.statistics.collect import collect, memory_needed
from headfuse.statistics.moments import LayerStatistics
from headfuse.statistics.stream import stream_layers

Counts = list[tuple[int, int]]
Spread = Literal["uniform", "adaptive"]
SEEDS = 2**63  # torch takes twice as many, and some seeds are counted on from
# Rows of the calibration text on which an adaptive budget measures divergence.
PROBE_ROWS = 4


@dataclass(frozen=True)
class Settings:
    """How to convert: method, shape of the result, budget, refit.

    `share` of the source's cached heads may stay, a number or text like "25%"; `key_heads` and `value_heads`, per
    layer, override it.
    """

    method: str = "closed-form"
    target: Target = "dha"
    share: Fraction = Fraction(1, 4)
    key_heads: int | None = None
    value_heads: int | None = None
    budget: Spread = "uniform"
    options: SharingOptions = field(default_factory=SharingOptions)
    refit: RefitOptions | None = field(default_factory=RefitOptions)
    seed: int = 0
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        """Read the share; PlanError for one that is none, ConfigError for anything else that means nothing."""
        method_named(self.method)
        for name, kind in (("target", Target), ("budget", Spread), ("precision", Precision)):
            if getattr(self, name) not in (known := get_args(kind)):
                raise ConfigError(f"wanted a {name}, got {getattr(self, name)!r}; choose one of {', '.join(known)}")
        if not 0 <= self.seed < SEEDS:
            raise ConfigError(f"wanted a seed from 0 to {SEEDS - 1}, got {self.seed}; choose a smaller one")
        object.__setattr__(self, "share", share_of(self.share))


@dataclass(frozen=True)
class Converted:
    """The result: one `AttentionHeads` a layer (fp32), the plan they obey, each layer's fit, seconds by stage."""

    heads: list[AttentionHeads]
    plan: HeadPlan
    refits: list[RefitReport]
    seconds: dict[str, float]


def convert_heads(
    loaded: LoadedModel,
    rows: Int64[Tensor, "N T"],
    settings: Settings,
    *,
    statistics: Sequence[LayerStatistics] | None = None,
    plan: HeadPlan | None = None,
    stages: Stages = silent,
) -> Converted:
    """Convert a model's heads; the model itself is left as it was.

    `statistics` of the same rows and `plan` are reused if given; the plan then decides target and groups, and the
    budget is not looked at. Raises PlanError if the budget cannot be met, ConfigError for an unknown method.
    """
    method = method_named(settings.method)
    if plan is not None:
        settings = replace(settings, target=plan.target, budget="uniform")
    check_reachable(loaded, settings, planned=plan is not None)
    seconds: dict[str, float] = {}
    started = time.monotonic()
    if statistics is None and reads_text(settings):
        statistics = gather_statistics(loaded, rows, settings, stages)
    seconds["statistics"] = time.monotonic() - started

    started = time.monotonic()
    entries = statistics or [None] * len(loaded.heads)
    layers = [SourceLayer.of(heads, entry) for heads, entry in zip(loaded.heads, entries, strict=True)]
    groups = _groups(loaded, layers, rows, method, settings, plan, stages)
    seconds["plan"] = time.monotonic() - started

    started = time.monotonic()
    device = loaded.heads[0].q.device
    heads = [
        method.share(layer, chosen, settings.options).on(device) for layer, chosen in zip(layers, groups, strict=True)
    ]
    if settings.target == "gqa":
        heads = [layer.reordered(sorted(range(len(layer.key_map)), key=layer.key_map.__getitem__)) for layer in heads]
    seconds["share"] = time.monotonic() - started

    reports: list[RefitReport] = []
    if settings.refit is not None and any(
        layer.counts != source.counts for layer, source in zip(heads, layers, strict=True)
    ):
        started = time.monotonic()
        heads, reports = _refit(loaded, heads, rows, settings, settings.refit, stages)
        seconds["refit"] = time.monotonic() - started
    # A plan speaks of the source's query heads, in their order, so that it can be used again.
    maps = [(layer.key_map, layer.value_map) for layer in loaded.heads]
    made = head_plan(settings.target, heads[0].head_dim, maps, groups)
    return Converted(heads, made, reports, seconds)


def gather_statistics(
    loaded: LoadedModel, rows: Int64[Tensor, "N T"], settings: Settings, stages: Stages = silent
) -> list[LayerStatistics]:
    """The one pass over the calibration text."""
    total, unit_rows = rows.numel() * len(loaded.layers), needs_unit_rows(loaded, settings)
    size = memory_needed(loaded.heads[0], len(loaded.layers), unit_rows=unit_rows)
    with stages(f"statistics ({size / 1e6:,.0f} MB)", total, "layer-tokens") as advance:
        return collect(
            loaded.model,
            loaded.layers,
            loaded.heads,
            rows,
            unit_rows=unit_rows,
            precision=settings.precision,
            advance=advance,
        )


def reads_text(settings: Settings) -> bool:
    """Whether sharing looks at statistics of the calibration text; a refit and an adaptive budget read the rows."""
    return method_named(settings.method).reads_text(settings.options)


def needs_unit_rows(loaded: LoadedModel, settings: Settings) -> bool:
    """Whether the statistics must hold the moments of unit-length rows: for norms over each head and criterion cos."""
    normed = loaded.heads[0].traits.qk_norm == "head"
    return normed or (settings.method == "procrustes" and settings.options.criterion == "cos")


def check_reachable(loaded: LoadedModel, settings: Settings, *, planned: bool = False) -> None:
    """Raise PlanError, before any work, if this model cannot have the target or, unless `planned`, the budget."""
    sources = [layer.counts for layer in loaded.heads]
    if settings.target == "gqa" and not loaded.adapter.stock_gqa:
        raise PlanError(
            f"{loaded.adapter.family}: its stock class has no grouped-query attention, so target gqa cannot be "
            "written; use --target dha"
        )
    if settings.target == "gqa" and settings.budget == "adaptive":
        raise PlanError("target gqa has one head count in all layers, so its budget is uniform; use --target dha")
    if not planned and settings.budget == "adaptive" and {settings.key_heads, settings.value_heads} != {None}:
        raise PlanError(
            "wanted a share of the cache for an adaptive budget, which chooses the heads of every layer, got numbers "
            "of heads; use --kv or --budget uniform"
        )
    if not planned:
        _uniform(sources, loaded.heads[0].num_query_heads, settings)


def _uniform(sources: Counts, query_heads: int, settings: Settings) -> Counts:
    if settings.key_heads is None and settings.value_heads is None:
        if settings.target == "gqa":
            count = gqa_count(sources, query_heads, settings.share)
            return [(count, count)] * len(sources)
        return uniform_counts(sources, settings.share)
    keys, values = settings.key_heads, settings.value_heads
    counts = [(source[0] if keys is None else keys, source[1] if values is None else values) for source in sources]
    for wanted, source in zip(counts, sources, strict=True):
        if not all(1 <= n <= most for n, most in zip(wanted, source, strict=True)):
            raise PlanError(
                f"wanted {wanted[0]} key and {wanted[1]} value heads a layer; the model has {source[0]} and "
                f"{source[1]}; ask for 1 up to that many"
            )
    if settings.target == "gqa":
        if counts[0][0] != counts[0][1]:
            raise PlanError("target gqa wants as many key heads as value heads; give both alike or use --target dha")
        gqa_count(sources, query_heads, Fraction(counts[0][0], sources[0][0]))
    return counts


def _groups(
    loaded: LoadedModel,
    layers: Sequence[SourceLayer],
    rows: Int64[Tensor, "N T"],
    method: SharingMethod,
    settings: Settings,
    plan: HeadPlan | None,
    stages: Stages,
) -> list[HeadGroups]:
    if plan is not None:
        return groups_of_plan(plan, loaded.heads)
    sources = [layer.counts for layer in layers]
    counts = _uniform(sources, loaded.heads[0].num_query_heads, settings)
    if settings.budget == "adaptive":
        counts = _adaptive(loaded, layers, rows, method, settings, sum(map(sum, counts)), stages)
    generator = torch.Generator().manual_seed(settings.seed)
    groups = []
    with stages("grouping", len(layers), "layers") as advance:
        for layer, count in zip(layers, counts, strict=True):
            groups.append(
                group_layer(layer, count, method, settings.options, target=settings.target, generator=generator)
            )
            advance(1)
    return groups


def aligned_heads(
    loaded: LoadedModel,
    statistics: Sequence[LayerStatistics],
    groups: Sequence[HeadGroups],
    *,
    criterion: Criterion = "dist",
) -> list[AttentionHeads]:
    """The model's heads with those of every group rotated onto each other (arXiv 2412.20677): the same function.

    Keys behind a q/k norm stay as they are.
    """
    found = []
    for heads, entry, group in zip(loaded.heads, statistics, groups, strict=True):
        layer = SourceLayer.of(heads, entry)
        grams = head_grams(layer.moments, entry, criterion)
        rotations = group_rotations(grams, group, keys=heads.traits.qk_norm == "none")
        found.append(align(layer.heads.to(torch.float64), rotations).to(heads.q.dtype).on(heads.q.device))
    return found


def groups_of_plan(plan: HeadPlan, layers: Sequence[AttentionHeads]) -> list[HeadGroups]:
    """The groups of source heads that a plan's maps imply; PlanError if the plan is not for these layers."""
    if len(plan.layers) != len(layers) or plan.num_query_heads != layers[0].num_query_heads:
        raise PlanError(
            f"the plan is for {len(plan.layers)} layers of {plan.num_query_heads} query heads, the model has "
            f"{len(layers)} of {layers[0].num_query_heads}; give a plan of this model"
        )
    groups = []
    for wanted, layer in zip(plan.layers, layers, strict=True):
        pairs = ((wanted.key_map, layer.key_map), (wanted.value_map, layer.value_map))
        groups.append(HeadGroups(*(_regrouped(new, old) for new, old in pairs)))
    return groups


def _regrouped(new: tuple[int, ...], old: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    target: dict[int, int] = {}
    for query, head in enumerate(old):
        if target.setdefault(head, new[query]) != new[query]:
            raise PlanError(
                f"the plan splits source head {head}, which its query heads share; give a plan of this model"
            )
    return tuple(tuple(h for h in sorted(target) if target[h] == g) for g in range(max(new) + 1))


def _adaptive(
    loaded: LoadedModel,
    layers: Sequence[SourceLayer],
    rows: Int64[Tensor, "N T"],
    method: SharingMethod,
    settings: Settings,
    total: int,
    stages: Stages,
) -> Counts:
    """Head counts by exact knapsack over measured unit costs; `total` heads in all."""
    probes = rows[:PROBE_ROWS].to(loaded.heads[0].q.device)
    with stages("sensitivity", 2 * len(layers), "units") as advance, torch.no_grad():
        with precision_context(probes.device, settings.precision):
            reference = F.log_softmax(loaded.model(probes, use_cache=False).logits.float(), dim=-1)

        def divergence(index: int, heads: AttentionHeads) -> float:
            replaced = {index: attention_of(heads.on(probes.device), index)}
            with attention_replaced(loaded.layers, replaced), precision_context(probes.device, settings.precision):
                found = F.log_softmax(loaded.model(probes, use_cache=False).logits.float(), dim=-1)
            advance(1)
            return F.kl_div(found, reference, log_target=True, reduction="sum").item() / probes.numel()

        costs = unit_costs(layers, method, settings.options, share_left=float(settings.share), divergence=divergence)
    chosen = knapsack(costs, total)
    return list(zip(chosen[::2], chosen[1::2], strict=True))


def _refit(
    loaded: LoadedModel,
    heads: list[AttentionHeads],
    rows: Int64[Tensor, "N T"],
    settings: Settings,
    options: RefitOptions,
    stages: Stages,
) -> tuple[list[AttentionHeads], list[RefitReport]]:
    """Refit every layer that shares heads, one at a time, on the original model's inputs."""
    fitted, reports = list(heads), []
    with stages("refit", options.all_steps * len(heads), "steps") as advance:
        for inputs in stream_layers(loaded.model, loaded.layers, rows, precision=settings.precision):
            index = inputs.layer
            new, source = heads[index], loaded.heads[index]
            if new.counts == source.counts:
                advance(options.all_steps)
                continue
            fitted[index], report = refit(
                source,
                heads[index],
                inputs,
                options,
                precision=settings.precision,
                seed=settings.seed,
                advance=advance,
            )
            reports.append(report)
    return fitted, reports
