"""What DHA's stages cannot do, said before any work."""

from collections.abc import Sequence
from fractions import Fraction

from headfuse.checkpoints.loading import check_length
from headfuse.checkpoints.opened import LoadedModel
from headfuse.conversion import Settings
from headfuse.errors import ConfigError, PlanError
from headfuse.fusion.operators import check_fusable
from headfuse.learning.options import Learning
from headfuse.planning.budget import knapsack, uniform_counts
from headfuse.planning.layer_budget import allowed_counts, greedy_counts
from headfuse.training.batches import Batches, TrainingRows


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
