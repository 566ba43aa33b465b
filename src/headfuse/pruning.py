"""Align before merging, the learned part: gates close over the source's heads, and a stock GQA model is left.

arXiv 2412.20677, papers/align.md 1.8 to 1.13. The student starts at the (rotated) source itself; every head goes over
to its group's shared head when its gate closes; for the last fifth of the steps only the shared heads are left, and
they are what is kept. Nothing is written.
"""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from transformers import PreTrainedModel

from headfuse.checkpoints.assembly import decoder_layers
from headfuse.checkpoints.attention import attention_of, attention_replaced
from headfuse.checkpoints.heads import AttentionHeads
from headfuse.checkpoints.loading import check_length
from headfuse.checkpoints.opened import LoadedModel
from headfuse.conversion import Converted, Settings, aligned_heads, check_reachable, groups_of_plan
from headfuse.course import Course, Learned
from headfuse.errors import ConfigError
from headfuse.gating.controllers import CONTROLLERS
from headfuse.gating.gates import DISTRIBUTIONS, Gates
from headfuse.gating.merge import gate_attention, gated_parts, merged_heads, merged_parameters
from headfuse.gating.objective import GatedObjective
from headfuse.gating.schedule import Schedule
from headfuse.models.dha.decoupled_attention import DecoupledAttention
from headfuse.statistics.moments import LayerStatistics
from headfuse.training.answers import objective_for
from headfuse.training.batches import Batches, TrainingRows
from headfuse.training.loop import Trained
from headfuse.training.objectives import Objective, check_lm_weight
from headfuse.training.optimizers import ParameterGroup
from headfuse.training.options import TrainingOptions

Distribution = Literal["official", "classical"]
ControllerName = Literal["projection", "lagrangian", "ramp"]
# Where the shared heads may begin, and the sharing method that makes them: the mean of rotated heads is the paper's.
STARTS = {"mean-pool": "procrustes", "closed-form": "closed-form"}
# The peak learning rate of the model's weights, unless told.
GATED_RATE = 3e-4


@dataclass(frozen=True)
class Pruning:
    """How gates close and what is trained meanwhile; the defaults are those of the paper's code.

    `distribution` "classical" is the usual hard concrete; `controller` "lagrangian" has multipliers instead of the
    projection, "ramp" closes gates in a random order and learns none. Without `gates` the merged model is trained from
    its start, which is the arm to compare with. `warmup` and `hard` are the shares of the steps after which the target
    is to have all gates off, and after which they are. `gate_rate` moves logits (None: the distribution's own);
    `merged_rate` multiplies the model's rate for the shared key and value heads, which decay no weights.

    The paper distils with losses of its own on prompts and answers; on text that has neither, all of the teacher's
    distribution counts in every position. `lm_weight` is the share of language-model loss beside either.
    """

    training: TrainingOptions = field(default_factory=TrainingOptions)
    gates: bool = True
    distribution: Distribution = "official"
    controller: ControllerName = "projection"
    warmup: float = 0.3
    hard: float = 0.8
    gate_rate: float | None = None
    merged_rate: float = 2.0
    multiplier_rate: float = 1.0
    lm_weight: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what no run can obey."""
        check_lm_weight(self.lm_weight)
        for name, known in (("distribution", DISTRIBUTIONS), ("controller", CONTROLLERS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"wanted a {name}, got {getattr(self, name)!r}; choose one of {', '.join(known)}")
        if not 0 < self.warmup <= self.hard <= 1:
            raise ConfigError(
                f"wanted shares of the steps 0 < warmup <= hard <= 1, got {self.warmup:g} and {self.hard:g}; choose "
                "others"
            )
        for name in ("gate_rate", "merged_rate", "multiplier_rate"):
            rate = getattr(self, name)
            if rate is not None and not rate > 0:
                raise ConfigError(f"wanted {name} above zero, got {rate:g}; choose a larger one")

    @property
    def stage(self) -> str:
        """The name of the one stage there is."""
        return "pruning" if self.gates else "healing"


@dataclass(frozen=True)
class Lesson:
    """What the student learns from: an objective, the batches that it takes, and the teacher in it, if there is one."""

    minimised: Objective
    batches: Batches
    teacher: PreTrainedModel | None = None

    @classmethod
    def of(cls, rows: TrainingRows, pruning: Pruning, teacher: PreTrainedModel) -> "Lesson":
        """The teacher's whole distribution on plain text; on examples, the paper's losses of prompts and answers.

        Raises TextError if there is too little text.
        """
        training, lm_weight = pruning.training, pruning.lm_weight
        minimised = objective_for(rows, teacher, lm_weight, compiled=training.compiled)
        return cls(minimised, Batches.of(rows, training), None if lm_weight == 1 else teacher)


def sharing_method(init: str) -> str:
    """The sharing method of a start; ConfigError lists the known starts."""
    if init not in STARTS:
        raise ConfigError(f"wanted a start for method align, got {init!r}; choose one of {', '.join(STARTS)}")
    return STARTS[init]


def prune_heads(
    loaded: LoadedModel,
    settings: Settings,
    pruning: Pruning,
    course: Course,
    lesson: Lesson,
    *,
    converted: Converted,
    statistics: Sequence[LayerStatistics] | None = None,
) -> Learned:
    """Train from the source model to the stock GQA model that `converted` is the first draft of.

    `converted` is what `convert_heads` made with these settings: its groups are obeyed and its heads are where the
    shared ones begin. Behind method "procrustes" the source's heads are rotated by the `statistics` of that conversion
    first, so that heads and shared heads speak of the same channels. `loaded` stays as it was, a copy is trained.
    What `check_prunable` refuses must not come here. Raises what `train` raises.
    """
    assert converted.plan.target == "gqa", "check_prunable comes first"
    student = LoadedModel.of(copy.deepcopy(loaded.model), loaded.adapter)
    if pruning.gates:
        source = source_heads(loaded, settings, converted, statistics)
        modules = [attention_of(layer, index) for index, layer in enumerate(source)]
        for module, layer, merged in zip(modules, source, converted.heads, strict=True):
            gate_attention(module, layer, merged)
    else:
        modules = [attention_of(layer, index) for index, layer in enumerate(converted.heads)]
    with attention_replaced(student.layers, dict(enumerate(modules))):
        trained = _trained(student, modules, pruning, lesson, course.here.device)
        report = course.train(trained, lesson.batches, pruning.training, pruning.stage)
    heads = [merged_heads(module, layer) for module, layer in zip(modules, converted.heads, strict=True)]
    return Learned(student, replace(converted, heads=heads), {pruning.stage: report})


def check_prunable(loaded: LoadedModel, settings: Settings, pruning: Pruning, *, planned: bool = False) -> None:
    """Raise, before any work, if this model cannot be pruned to these settings.

    ConfigError for another target than gqa and for rows that are too long, PlanError for a number of heads that GQA
    cannot have. Warns where keys cannot be aligned.
    """
    check_length(loaded.model.config, pruning.training.length)
    if settings.target != "gqa":
        raise ConfigError(f"wanted target gqa to align and merge, got {settings.target!r}; use --target gqa")
    check_reachable(loaded, settings, planned=planned)
    aligns = settings.method == "closed-form" or (settings.method == "procrustes" and settings.options.align)
    if aligns and loaded.heads[0].traits.qk_norm != "none":
        warnings.warn(
            f"{loaded.adapter.family}: values are aligned, keys are not: a norm behind their projection does not turn "
            "with them",
            stacklevel=2,
        )


def source_heads(
    loaded: LoadedModel, settings: Settings, converted: Converted, statistics: Sequence[LayerStatistics] | None
) -> list[AttentionHeads]:
    """The source as the gates begin: rotated as the conversion rotated it, query heads in the conversion's order."""
    heads = loaded.heads
    if settings.method == "procrustes" and settings.options.align:
        assert statistics is not None, "those of the conversion"
        groups = groups_of_plan(converted.plan, loaded.heads)
        heads = aligned_heads(loaded, statistics, groups, criterion=settings.options.criterion)
    maps = [layer.key_map for layer in converted.plan.layers]
    return [
        layer.reordered(sorted(range(len(key_map)), key=key_map.__getitem__))
        for layer, key_map in zip(heads, maps, strict=True)
    ]


def _trained(
    student: LoadedModel,
    modules: Sequence[DecoupledAttention],
    pruning: Pruning,
    lesson: Lesson,
    device: torch.device,
) -> Trained:
    """The student with its shared heads, gates and multipliers as groups of their own."""
    model, blocks = student.model, decoder_layers(student.model, student.adapter)
    if not pruning.gates:
        return Trained(model, blocks, lesson.minimised, lambda: _shared(modules, pruning), teacher=lesson.teacher)
    training, kind = pruning.training, DISTRIBUTIONS[pruning.distribution]
    generator = torch.Generator().manual_seed(training.seed)
    gates = Gates(len(modules), student.heads[0].num_key_heads, kind, generator=generator)
    schedule = Schedule(training.steps, pruning.warmup, pruning.hard)
    controller = CONTROLLERS[pruning.controller](gates, schedule, seed=training.seed)
    minimised = GatedObjective(lesson.minimised, gates, controller, [gated_parts(module) for module in modules])
    minimised.to(device)

    def groups() -> list[ParameterGroup]:
        found = _shared(modules, pruning)
        if controller.learned:
            rate = kind.rate if pruning.gate_rate is None else pruning.gate_rate
            found.append(ParameterGroup("gates", [gates.logits], rate, decayed=False))
        if climbing := controller.multipliers():
            rate = pruning.multiplier_rate
            found.append(ParameterGroup("multipliers", climbing, rate, ascent=True, decayed=False))
        return found

    return Trained(
        model,
        blocks,
        minimised,
        own_groups=groups,
        before_step=controller.before_step,
        after_step=controller.after_step,
        teacher=lesson.teacher,
    )


def _shared(modules: Sequence[DecoupledAttention], pruning: Pruning) -> list[ParameterGroup]:
    """The shared key and value heads, matrices moved as the model's are."""
    parameters = [parameter for module in modules for parameter in merged_parameters(module)]
    rate = pruning.merged_rate * pruning.training.rate
    matrices = [parameter for parameter in parameters if parameter.dim() == 2]
    found = [ParameterGroup("merged", matrices, rate, pruning.training.update, decayed=False)]
    if biases := [parameter for parameter in parameters if parameter.dim() == 1]:
        found.append(ParameterGroup("merged_biases", biases, rate, decayed=False))
    return found
