"""The stages of DHA on one student: search, groups, fusion and fold, healing (arXiv 2406.06567, 3 and B.2)."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from headfuse.checkpoints.assembly import decoder_layers
from headfuse.checkpoints.attention import attention_of, attention_replaced, heads_of
from headfuse.checkpoints.heads import AttentionHeads
from headfuse.checkpoints.opened import LoadedModel
from headfuse.conversion import Settings
from headfuse.course import Course
from headfuse.fusion.objective import FusionObjective, Projections, SearchObjective
from headfuse.fusion.operators import fold_heads, fuse_attention, fused_projections, operator_health
from headfuse.learning.options import Learning
from headfuse.models.dha.decoupled_attention import DecoupledAttention
from headfuse.planning.annealing import anneal_groups
from headfuse.planning.budget import uniform_counts
from headfuse.planning.grouping import HeadGroups, contiguous_groups
from headfuse.planning.layer_budget import greedy_counts, knapsack_counts
from headfuse.statistics.similarity import cka
from headfuse.training.batches import Batches
from headfuse.training.loop import Trained, TrainingReport
from headfuse.training.objectives import Objective, objective
from headfuse.training.optimizers import ParameterGroup
from headfuse.training.options import TrainingOptions

Distances = list[tuple[Tensor, Tensor]]


class Stages:
    """The stages of one conversion, on one student; `reports` says what each that trained did."""

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
                # Adam's steps are noisier by the square root of what a batch has less.
                rate = options.rate * math.sqrt(min(1.0, options.step_tokens / learning.training.step_tokens))
                options = replace(options, rate=rate if learning.fusion_rate is None else learning.fusion_rate)
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
                    teacher=self._teacher(learning.fusion_lm_weight),
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
                teacher=self._teacher(learning.lm_weight),
            )
            self._train(trained, replace(training, tokens=self.tokens_left), "healing")
        return [heads_of(module, layer) for module, layer in zip(modules, heads, strict=True)]

    def _options(self, tokens: int, length: int, steps: int) -> TrainingOptions:
        """The run's options for a stage of that many tokens, in about `steps` steps or as many as have a row."""
        rows = max(1, min(round(tokens / (steps * length)), tokens // length))
        training = self.learning.training
        micro_rows = None if training.micro_rows is None else math.gcd(rows, training.micro_rows)
        return replace(training, tokens=tokens, rows=rows, length=length, micro_rows=micro_rows)

    def _objective(self, lm_weight: float) -> Objective:
        return objective(self._teacher(lm_weight), lm_weight, compiled=self.learning.training.compiled)

    def _teacher(self, lm_weight: float) -> PreTrainedModel | None:
        return None if lm_weight == 1 else self.original.model

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
