"""What each unit (a layer's keys, or its values) costs at every head count: the input of the adaptive budget."""

from collections.abc import Callable, Sequence

from headfuse.checkpoints.heads import AttentionHeads
from headfuse.errors import ConfigError
from headfuse.planning.grouping import HeadGroups, contiguous_groups, ladder
from headfuse.sharing.methods import SharingMethod, SharingOptions, SourceLayer

Costs = dict[int, float]
# Divergence (nats per token) of the model in which one layer, given by its index, has other heads.
Divergence = Callable[[int, AttentionHeads], float]
# A price this far below that of sharing a single head is rounding, and says nothing about scale.
NEGLIGIBLE = 1e-9
# Least divergence that a measurement may show: rounding, and never so little that heads look free.
LEAST_DIVERGENCE = 1e-9


def unit_costs(
    layers: Sequence[SourceLayer],
    method: SharingMethod,
    options: SharingOptions,
    *,
    share_left: float,
    divergence: Divergence,
) -> list[Costs]:
    """Cost of every head count for each unit, in the order layer 0 keys, layer 0 values, layer 1 keys, ...

    The shape of a unit's curve is its price over the nested groupings, exact and free; its scale is one
    measurement, the model's divergence with `share_left` of this unit's heads (fewer if sharing them costs nothing)
    and everything else untouched.
    """
    costs = []
    for index, layer in enumerate(layers):
        prices = method.prices(layer, options)
        if prices is None:
            raise ConfigError("wanted a method that prices groups for an adaptive budget; use --budget uniform")
        for kind, (heads, price) in enumerate(zip(layer.counts, prices, strict=True)):
            groupings = ladder(heads, price)
            curve = {count: sum(price(group) for group in groups) for count, groups in groupings.items()}
            probed = min(max(1, round(share_left * heads)), heads)
            while probed > 1 and curve[probed] <= NEGLIGIBLE * curve[1]:
                probed -= 1
            untouched = [contiguous_groups(count, count) for count in layer.counts]
            untouched[kind] = groupings[probed]
            measured = divergence(index, method.share(layer, HeadGroups(*untouched), options))
            scale = max(measured, LEAST_DIVERGENCE) / curve[probed] if curve[probed] > 0 else 0.0
            costs.append({count: value * scale for count, value in curve.items()})
    return costs
