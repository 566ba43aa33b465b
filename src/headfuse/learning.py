"""DHA end to end on a loaded model: search, groups, fusion, fold, healing (arXiv 2406.06567); nothing is written.

Three routes share the stages. The paper's starts from the original heads (`start="original"`), so that fusion begins
at a model that is exactly the original. Ours start from heads that a sharing method made (`start="converted"`), which
already lost what sharing costs, with a fusion stage or, with `fusion_share=0`, without: then all tokens heal.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from headfuse.checkpoints.assembly import decoder_layers
from headfuse.checkpoints.attention import attention_of, attention_replaced, heads_of
from headfuse.checkpoints.heads import AttentionHeads
from headfuse.checkpoints.opened import LoadedModel
from headfuse.conversion import Converted, Settings, aligned_heads, groups_of_plan
from headfuse.course import Course, Learned
from headfuse.errors import ConfigError, PlanError
from headfuse.fusion.objective import FusionObjective, Projections, SearchObjective
from headfuse.fusion.operators import (
    Extent,
    check_fusable,
    fold_heads,
    fuse_attention,
    fused_projections,
    multi_head,
    operator_health,
)
from headfuse.models.dha.decoupled_attention import DecoupledAttention
from headfuse.planning.annealing import anneal_groups
from headfuse.planning.budget import head_plan, knapsack, uniform_counts
from headfuse.planning.grouping import HeadGroups, contiguous_groups
from headfuse.planning.layer_budget import allowed_counts, greedy_counts, knapsack_counts
from headfuse.statistics.moments import LayerStatistics
from headfuse.statistics.similarity import cka
from headfuse.training.batches import Batches, TrainingRows
from headfuse.training.loop import Trained, TrainingReport, check_length
from headfuse.training.objectives import Objective, check_lm_weight, objective
from headfuse.training.optimizers import ParameterGroup
from headfuse.training.options import TrainingOptions

Start = Literal["original", "converted"]
Grouping = Literal["annealed", "printed", "cka", "contiguous", "closed-form"]
LayerBudget = Literal["uniform", "greedy", "knapsack"]
Distances = list[tuple[Tensor, Tensor]]

# Tokens in a row of the search, which moves operators alone: it needs many steps rather than long contexts.
SEARCH_LENGTH = 128


@dataclass(frozen=True)
class Learning:
    """How DHA's stages spend a budget of tokens. Shares are of all tokens; healing gets what they leave.

    `training` holds for fusion and healing; its `tokens` are the whole budget. `lm_weight` is the share of
    language-model loss in healing, the rest distils from the original; the search and the fusion see the
    language-model loss alone, as in the paper, unless `fusion_lm_weight` says otherwise. Both want many small steps
    (an operator has to travel from 1 to 1 / g at `operator_rate` a step), so their batches follow from their numbers
    of steps: the paper's, for the 1000 steps in which it spends 0.2B tokens. `grouping` "closed-form" fuses the
    original heads in the groups that a conversion chose by their prices, without a search; there the heads of a group
    are first rotated onto each other, which leaves the function as it is.
    """

    training: TrainingOptions = field(default_factory=TrainingOptions)
    start: Start = "converted"
    search_share: float = 0.0
    fusion_share: float = 0.0
    lm_weight: float = 0.0
    fusion_lm_weight: float = 1.0
    grouping: Grouping = "annealed"
    layer_budget: LayerBudget = "uniform"
    key_extent: Extent = "tied"
    value_extent: Extent = "dimension"
    operator_rate: float = 1e-2
    multiplier_rate: float = 1e-2
    search_steps: int = 240
    fusion_steps: int = 760
    margin_warmup: float = 0.7
    margin_decay: float = 0.25
    per_term_margin: bool = True
    levels: int = 1

    def __post_init__(self) -> None:
        """Refuse shares that leave nothing, a search without a use, and a use of distances without a search."""
        check_lm_weight(self.lm_weight)
        check_lm_weight(self.fusion_lm_weight)
        shares = (self.search_share, self.fusion_share)
        if min(shares) < 0 or sum(shares) > 1:
            raise ConfigError(
                f"wanted shares of search and fusion from 0 to 1 together, got {self.search_share:g} and "
                f"{self.fusion_share:g}; choose others"
            )
        for name in ("search_steps", "fusion_steps", "levels"):
            if getattr(self, name) < 1:
                raise ConfigError(f"wanted {name} of at least one, got {getattr(self, name)}; choose a larger one")
        if self.start == "converted" and (self.search_share or self.levels > 1):
            raise ConfigError(
                f"wanted no search and one level from converted heads, whose groups are chosen, got a search share of "
                f"{self.search_share:g} and {self.levels} levels; start from the original heads for those"
            )
        if self.grouping == "closed-form" and (self.levels > 1 or self.layer_budget != "uniform"):
            raise ConfigError(
                f"wanted one level and the conversion's own budget with its groups, got {self.levels} levels and layer "
                f"budget {self.layer_budget!r}; leave them out"
            )
        if self.start == "original" and self.searches and not self.search_share:
            raise ConfigError(
                f"wanted a search for the distances that grouping {self.grouping!r} and layer budget "
                f"{self.layer_budget!r} go by, got a search share of 0; give it a share of the tokens"
            )

    @property
    def searches(self) -> bool:
        """Whether the groups of the start "original" go by distances that only a search measures."""
        if self.grouping in ("cka", "closed-form"):
            return False
        return self.grouping != "contiguous" or self.layer_budget != "uniform"

    @property
    def search_tokens(self) -> int:
        """Tokens of the search of one level."""
        return int(self.search_share * self.training.tokens / self.levels)

    @property
    def search_length(self) -> int:
        """Tokens in a row of the search."""
        return min(SEARCH_LENGTH, self.training.length)

    @property
    def fusion_tokens(self) -> int:
        """Tokens of the fusion of one level."""
        return int(self.fusion_share * self.training.tokens / self.levels)


# The paper's own settings. It says neither the share of the stages in a small budget (0.2B of up to 5B tokens) nor
# the margin's decay; docs/dha.md has what was chosen and why.
PAPER = Learning(
    start="original",
    search_share=0.06,
    fusion_share=0.19,
    lm_weight=1.0,
    layer_budget="greedy",
    key_extent="tied",
)


# Ours: heads of the closed form's groups are aligned before they are fused, and the fusion distils too.
ALIGNED = Learning(start="original", grouping="closed-form", fusion_share=0.25, fusion_lm_weight=0.0)
# Names of the stages that fuse the original heads; any other start is a sharing method's.
FUSED_STARTS = {"delta": PAPER, "aligned": ALIGNED}


def rate_for(settings: Settings, *, start: Start) -> float:
    """The peak learning rate of the weights that did best on the 30M reference (LOG.md).

    The further from the original the training starts, the larger it is.
    """
    if start == "original":
        return 3e-4
    if settings.refit is not None:
        return 1e-4
    return {"mean-pool": 1e-3, "procrustes": 5e-4}.get(settings.method, 3e-4)


def learning_for(
    init: str,
    training: TrainingOptions,
    search_share: float | None = None,
    fusion_share: float | None = None,
    lm_weight: float = 0.0,
) -> Learning:
    """The stages that suit a start.

    "delta": the paper's; "aligned": fusion of aligned heads; a sharing method's name: healing of what it makes.
    """
    suited = FUSED_STARTS.get(init, Learning())
    return replace(
        suited,
        training=training,
        search_share=suited.search_share if search_share is None else search_share,
        fusion_share=suited.fusion_share if fusion_share is None else fusion_share,
        lm_weight=lm_weight,
    )


def learn_heads(
    loaded: LoadedModel,
    settings: Settings,
    learning: Learning,
    course: Course,
    *,
    converted: Converted | None = None,
    statistics: Sequence[LayerStatistics] | None = None,
) -> Learned:
    """Convert a model with training; `loaded` stays as it was, a copy is trained.

    `settings` say budget and seed. `converted`, from `convert_heads`, is what the start "converted" begins with, or
    whose groups the grouping "closed-form" takes; that one aligns by the `statistics`, if they are given.
    Raises what `train` and `check_learnable` raise.
    """
    check_learnable(loaded, settings, learning)
    check_text(course.text, learning)
    student = LoadedModel.of(copy.deepcopy(loaded.model), loaded.adapter)
    run = _Run(student, loaded, settings, learning, course)
    if learning.start == "original" and learning.grouping == "closed-form":
        assert converted is not None, "convert_heads comes first"
        groups = groups_of_plan(converted.plan, loaded.heads)
        heads = loaded.heads if statistics is None else aligned_heads(loaded, statistics, groups)
        heads = run.fuse(heads, groups, "fusion")
    elif learning.start == "original":
        heads = run.fuse_levels(loaded.heads)
    else:
        assert converted is not None, "convert_heads comes first"
        heads = converted.heads
        if learning.fusion_share:
            groups = [HeadGroups(*map(_members, (layer.key_map, layer.value_map))) for layer in heads]
            heads = run.fuse([multi_head(layer) for layer in heads], groups, "fusion")
    heads = run.heal(heads)
    maps = [(layer.key_map, layer.value_map) for layer in heads]
    kept = [HeadGroups(*(contiguous_groups(count, count) for count in layer.counts)) for layer in heads]
    plan = head_plan("dha", heads[0].head_dim, maps, kept) if converted is None else converted.plan
    done = Converted(heads, plan, *(([], {}) if converted is None else (converted.refits, converted.seconds)))
    return Learned(student, done, run.reports)


def check_learnable(loaded: LoadedModel, settings: Settings, learning: Learning, *, planned: bool = False) -> None:
    """Raise, before any work, if these stages cannot convert this model to these settings.

    PlanError for heads that DHA cannot fold and for counts that it cannot reach; ConfigError for stages with less than
    a row of tokens, and for what the start from the original heads cannot obey.
    """
    training, counts = learning.training, [count for layer in loaded.heads for count in layer.counts]
    check_length(loaded.model.config, training.length)
    stages = []
    if learning.start == "original":
        stages = [("search", learning.search_tokens, learning.search_length)] if learning.searches else []
        if settings.target != "dha" or settings.budget != "uniform" or planned:
            raise ConfigError(
                "wanted target dha and no plan or adaptive budget from the original heads, whose search finds groups "
                "for keys and values apart; leave them out, or start from converted heads"
            )
        if settings.key_heads is not None or settings.value_heads is not None:
            raise ConfigError(
                "wanted a share of the cache to start from the original heads, got numbers of heads; give the share"
            )
        if learning.grouping != "closed-form":
            _check_counts(counts, loaded, settings, learning)
    if learning.fusion_share:
        stages.append(("fusion", learning.fusion_tokens, training.length))
    for name, tokens, length in stages:
        if tokens < length:
            raise ConfigError(
                f"wanted at least one row of {length} tokens for the {name}, got {tokens}; raise its share or the "
                "budget, or choose shorter rows"
            )
    if learning.start == "original" or learning.fusion_share:
        for layer in loaded.heads:
            check_fusable(layer)


def _check_counts(counts: Sequence[int], loaded: LoadedModel, settings: Settings, learning: Learning) -> None:
    """Raise PlanError if the first level cannot have its total in equal groups."""
    share = settings.share if learning.levels == 1 else max(settings.share, Fraction(1, 2))
    total = int(share * sum(counts))
    if learning.layer_budget == "greedy":
        greedy_counts([0.0] * len(counts), counts, total)
    elif learning.layer_budget == "knapsack":
        knapsack([dict.fromkeys(allowed_counts(count), 0.0) for count in counts], total)
    else:
        wanted = uniform_counts([layer.counts for layer in loaded.heads], Fraction(total, sum(counts)))
        for count, heads in zip([n for pair in wanted for n in pair], counts, strict=True):
            if heads % count and learning.grouping != "contiguous":
                raise PlanError(
                    f"wanted equal groups of {heads} heads, got a budget of {count} of them; choose one that divides "
                    "them, or another layer budget"
                )


def check_text(text: TrainingRows, learning: Learning) -> None:
    """Raise TextError, before any work, if the text is shorter than the budget and may not repeat."""
    Batches.of(text, learning.training)


class _Run:
    """The stages of one conversion, on one student."""

    def __init__(
        self, student: LoadedModel, original: LoadedModel, settings: Settings, learning: Learning, course: Course
    ) -> None:
        self.student, self.original = student, original
        self.settings, self.learning, self.course = settings, learning, course
        self.reports: dict[str, TrainingReport] = {}
        self.tokens_left = learning.training.tokens
        self.generator = torch.Generator().manual_seed(settings.seed)

    def fuse_levels(self, heads: list[AttentionHeads]) -> list[AttentionHeads]:
        """Search, group, fuse and fold; in several levels if asked (B.2), each from the heads of the one before."""
        source = sum(sum(layer.counts) for layer in heads)
        levels = self.learning.levels
        for level in range(1, levels + 1):
            share = self.settings.share if level == levels else max(self.settings.share, Fraction(1, 2**level))
            mark = f"-{level}" if levels > 1 else ""
            distances = self.search(heads, "search" + mark)
            groups = self.group(heads, distances, int(share * source))
            heads = self.fuse(heads, groups, "fusion" + mark)
        return heads

    def search(self, heads: Sequence[AttentionHeads], stage: str) -> Distances:
        """How far apart heads end that may read all of their layer: operators alone are trained, by the LM loss."""
        learning = self.learning
        if learning.grouping == "cka":
            return [(1 - cka(layer.k), 1 - cka(layer.v)) for layer in heads]
        if not learning.searches:
            return []
        options = self._options(learning.search_tokens, learning.search_length, learning.search_steps)
        with self._fused(heads, None) as (projections, _):
            searching = SearchObjective(self._objective(1.0), projections, steps=options.steps)
            searching.to(self.course.here.device)
            steps = {"before_step": searching.before_step, "after_step": searching.after_step}
            trained = self._trained(searching, projections, weights=False, **steps)
            self._train(trained, options, stage)
            return searching.distances()

    def group(self, heads: Sequence[AttentionHeads], distances: Distances, total: int) -> list[HeadGroups]:
        """Groups of equal size for keys and for values of every layer, `total` heads in all."""
        learning, counts = self.learning, [count for layer in heads for count in layer.counts]
        flat = [each for pair in distances for each in pair]
        if learning.layer_budget == "knapsack":
            _, groups = knapsack_counts(flat, total, generator=self.generator)
        else:
            if learning.layer_budget == "greedy":
                scores = [each.triu(1).sum().item() for each in flat]
                wanted = greedy_counts(scores, counts, total)
            else:
                pairs = uniform_counts([layer.counts for layer in heads], Fraction(total, sum(counts)))
                wanted = [count for pair in pairs for count in pair]
            if learning.grouping == "contiguous":
                groups = [contiguous_groups(n, count) for n, count in zip(counts, wanted, strict=True)]
            else:
                form = "printed" if learning.grouping == "printed" else "repaired"
                groups = [
                    anneal_groups(each, count, form=form, generator=self.generator)
                    for each, count in zip(flat, wanted, strict=True)
                ]
        return [HeadGroups(*pair) for pair in zip(groups[::2], groups[1::2], strict=True)]

    def fuse(self, heads: Sequence[AttentionHeads], groups: Sequence[HeadGroups], stage: str) -> list[AttentionHeads]:
        """Train operators, multipliers and weights until the heads of a group agree, then fold them.

        Without tokens for it nothing is learned and the fold of the start is the mean of every group.
        """
        learning = self.learning
        with self._fused(heads, groups) as (projections, modules):
            if learning.fusion_share:
                options = self._options(learning.fusion_tokens, learning.training.length, learning.fusion_steps)
                fusing = FusionObjective(
                    self._objective(learning.fusion_lm_weight),
                    projections,
                    warmup=round(learning.margin_warmup * options.steps),
                    decay=learning.margin_decay,
                    per_term=learning.per_term_margin,
                )
                fusing.to(self.course.here.device)
                trained = self._trained(
                    fusing,
                    projections,
                    weights=True,
                    multipliers=fusing.multipliers,
                    after_step=fusing.after_step,
                    finished=fusing.finished,
                    measure=partial(_health, projections, groups),
                    **self._teaching(learning.fusion_lm_weight),
                )
                self._train(trained, options, stage)
            return [
                fold_heads(module, layer, group) for module, layer, group in zip(modules, heads, groups, strict=True)
            ]

    def heal(self, heads: Sequence[AttentionHeads]) -> list[AttentionHeads]:
        """Train everything with the tokens that are left; too few for one step train nothing."""
        learning, training = self.learning, self.learning.training
        if self.tokens_left < training.step_tokens:
            return list(heads)
        modules = [attention_of(layer, index) for index, layer in enumerate(heads)]
        with attention_replaced(self.student.layers, dict(enumerate(modules))):
            trained = Trained(
                self.student.model,
                self._blocks(),
                self._objective(learning.lm_weight),
                **self._teaching(learning.lm_weight),
            )
            self._train(trained, replace(training, tokens=self.tokens_left), "healing")
        return [heads_of(module, layer) for module, layer in zip(modules, heads, strict=True)]

    def _options(self, tokens: int, length: int, steps: int) -> TrainingOptions:
        """The run's options for a stage of that many tokens in `steps` steps, fewer where a row a step is too much."""
        rows = max(1, tokens // (steps * length))
        training = self.learning.training
        micro_rows = None if training.micro_rows is None else math.gcd(rows, training.micro_rows)
        return replace(training, tokens=tokens, rows=rows, length=length, micro_rows=micro_rows)

    def _objective(self, lm_weight: float) -> Objective:
        return objective(self._teacher(lm_weight), lm_weight, compiled=self.learning.training.compiled)

    def _teacher(self, lm_weight: float) -> PreTrainedModel | None:
        return None if lm_weight == 1 else self.original.model

    def _teaching(self, lm_weight: float) -> dict[str, Any]:
        """What `Trained` is told of the teacher."""
        if lm_weight == 1:
            return {}
        return {"teacher": self.original.model, "teacher_blocks": [block for block, _ in self.original.layers]}

    def _blocks(self) -> nn.ModuleList:
        return decoder_layers(self.student.model, self.student.adapter)

    @contextmanager
    def _fused(
        self, heads: Sequence[AttentionHeads], groups: Sequence[HeadGroups] | None
    ) -> Iterator[tuple[Projections, list[DecoupledAttention]]]:
        """Within the context, the student computes `heads` through fusion operators at the delta."""
        learning = self.learning
        modules = [attention_of(layer, index) for index, layer in enumerate(heads)]
        for index, module in enumerate(modules):
            group = None if groups is None else groups[index]
            fuse_attention(module, group, key_extent=learning.key_extent, value_extent=learning.value_extent)
        with attention_replaced(self.student.layers, dict(enumerate(modules))):
            yield [fused_projections(module) for module in modules], modules

    def _trained(
        self,
        minimised: Objective,
        projections: Projections,
        *,
        multipliers: nn.Module | None = None,
        **options: Any,
    ) -> Trained:
        """The student with its operators, and the multipliers that climb, as groups of their own."""
        learning = self.learning

        def groups() -> list[ParameterGroup]:
            operators = [projection.operators for pair in projections for projection in pair]
            found = [ParameterGroup("operators", operators, learning.operator_rate, decayed=False)]
            if multipliers is not None:
                climbing = list(multipliers.parameters())
                found.append(
                    ParameterGroup("multipliers", climbing, learning.multiplier_rate, ascent=True, decayed=False)
                )
            return found

        return Trained(self.student.model, self._blocks(), minimised, own_groups=groups, **options)

    def _train(self, trained: Trained, options: TrainingOptions, stage: str) -> None:
        course = self.course
        # No stage repeats another's order of the text.
        batches = Batches.of(course.text, replace(options, seed=options.seed + len(self.reports)))
        report = course.train(trained, batches, options, stage)
        self.reports[stage] = report
        self.tokens_left -= report.tokens


def _health(projections: Projections, groups: Sequence[HeadGroups]) -> dict[str, float]:
    """The figures that tell fusion from mean pooling (P2, P3): means over layers, of keys and of values."""
    found: dict[str, float] = {}
    for kind, name in enumerate(("key", "value")):
        layers = [
            operator_health(pair[kind], (group.keys, group.values)[kind])
            for pair, group in zip(projections, groups, strict=True)
        ]
        found |= {f"{name}_{figure}": sum(each[figure] for each in layers) / len(layers) for figure in layers[0]}
    return found


def _members(head_map: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """The query heads that read each head."""
    return tuple(tuple(q for q, head in enumerate(head_map) if head == h) for h in range(max(head_map) + 1))
