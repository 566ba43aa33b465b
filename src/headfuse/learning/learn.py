"""DHA end to end on a loaded model: search, groups, fusion, fold, healing (arXiv 2406.06567); nothing is written.

Three routes share the stages. The paper's starts from the original heads (`start="original"`), so that fusion begins
at a model that is exactly the original. Ours start from heads that a sharing method made (`start="converted"`), which
already lost what sharing costs, with a fusion stage or, with `fusion_share=0`, without: then all tokens heal.
"""

import copy
from collections.abc import Sequence

from headfuse.checkpoints.opened import LoadedModel
from headfuse.conversion import Converted, Settings, aligned_heads, groups_of_plan
from headfuse.course import Course, Learned
from headfuse.fusion.operators import multi_head
from headfuse.learning.checks import check_learnable, check_text
from headfuse.learning.options import Learning
from headfuse.learning.stages import Stages
from headfuse.planning.budget import head_plan
from headfuse.planning.grouping import HeadGroups, contiguous_groups
from headfuse.statistics.moments import LayerStatistics


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
    run = Stages(student, loaded, settings, learning, course)
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


def _members(head_map: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """The query heads that read each head."""
    return tuple(tuple(q for q, head in enumerate(head_map) if head == h) for h in range(max(head_map) + 1))
