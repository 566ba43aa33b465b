"""The sharing methods by name: how each prices a group of heads, and how it makes one head of it."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import torch

from headfuse.checkpoints.describe import SharingName
from headfuse.checkpoints.heads import AttentionHeads
from headfuse.errors import ConfigError
from headfuse.planning.grouping import Group, HeadGroups, Price, contiguous_groups, group_heads, memoised
from headfuse.planning.plan import Target
from headfuse.sharing.closed_form import closed_form, key_price, value_price
from headfuse.sharing.mean_pool import mean_pool
from headfuse.sharing.procrustes import head_grams, procrustes, procrustes_price
from headfuse.statistics.moments import HeadMoments, LayerStatistics, head_moments

# Rows of a value Gram up to which planning runs on the CPU.
LARGEST_GRAM_ON_CPU = 1024


@dataclass(frozen=True)
class SharingOptions:
    """What the papers' methods leave open: align.md's `criterion` and grouping item, GQA's norm restoration.

    `restore_norm` scales a pooled head back to its members' mean energy (neither paper does). Without `align`,
    procrustes groups heads by their similarity after rotation and pools them as they are: what regrouping alone earns.
    """

    criterion: Literal["dist", "cos"] = "dist"
    group_on: Literal["value", "key", "none"] = "value"
    restore_norm: bool = False
    align: bool = True


@dataclass(frozen=True)
class SourceLayer:
    """One layer before sharing: its heads and what the calibration text says of them, for methods that read one."""

    heads: AttentionHeads
    gathered: LayerStatistics | None

    @classmethod
    def of(cls, heads: AttentionHeads, statistics: LayerStatistics | None) -> "SourceLayer":
        """The layer, on the CPU unless its Grams are large.

        The searches take thousands of small eigen-decompositions one by one, and a GPU is slower at each.
        """
        if heads.num_value_heads * heads.head_dim <= LARGEST_GRAM_ON_CPU:
            heads = heads.on(torch.device("cpu"))
        return cls(heads, statistics)

    @property
    def statistics(self) -> LayerStatistics:
        """The layer's statistics."""
        assert self.gathered is not None, "the method does not read the text"
        return self.gathered

    @cached_property
    def moments(self) -> HeadMoments:
        """The moments of its heads."""
        return head_moments(self.heads, self.statistics)

    @property
    def counts(self) -> tuple[int, int]:
        """Key heads, value heads."""
        return self.heads.counts


class SharingMethod(Protocol):
    """One way to group heads and to make a shared head of a group."""

    def reads_text(self, options: SharingOptions) -> bool:
        """Whether it looks at statistics of a calibration text."""
        ...

    def prices(self, layer: SourceLayer, options: SharingOptions) -> tuple[Price, Price] | None:
        """The price of a key group and of a value group, in units of their own; None: neighbours are grouped."""
        ...

    def joint_price(self, layer: SourceLayer, options: SharingOptions) -> Price | None:
        """The price of a group that keys and values must share, as plain grouped-query attention wants."""
        ...

    def share(self, layer: SourceLayer, groups: HeadGroups, options: SharingOptions) -> AttentionHeads:
        """The layer with one key head and one value head per group."""
        ...


class MeanPool:
    """Neighbours, averaged: the GQA paper's baseline."""

    def reads_text(self, options: SharingOptions) -> bool:  # noqa: D102
        return options.restore_norm

    def prices(self, layer: SourceLayer, options: SharingOptions) -> None:  # noqa: ARG002, D102
        return None

    def joint_price(self, layer: SourceLayer, options: SharingOptions) -> None:  # noqa: ARG002, D102
        return None

    def share(self, layer: SourceLayer, groups: HeadGroups, options: SharingOptions) -> AttentionHeads:  # noqa: D102
        moments = layer.moments if options.restore_norm else None
        return mean_pool(layer.heads, moments, groups, restore_norm=options.restore_norm)


class Procrustes:
    """Align before merging (arXiv 2412.20677): grouped by similarity after alignment, rotated, averaged."""

    def reads_text(self, options: SharingOptions) -> bool:  # noqa: ARG002, D102
        return True

    def prices(self, layer: SourceLayer, options: SharingOptions) -> tuple[Price, Price] | None:  # noqa: D102
        if options.group_on == "none":
            return None
        keys, values = (_alignment_price(layer, item, options) for item in ("key", "value"))
        return _per_member(keys, options), _per_member(values, options)

    def joint_price(self, layer: SourceLayer, options: SharingOptions) -> Price | None:  # noqa: D102
        if options.group_on == "none":
            return None
        return _alignment_price(layer, options.group_on, options)

    def share(self, layer: SourceLayer, groups: HeadGroups, options: SharingOptions) -> AttentionHeads:  # noqa: D102
        if not options.align:
            return mean_pool(layer.heads, layer.moments, groups, restore_norm=options.restore_norm)
        grams = head_grams(layer.moments, layer.statistics, options.criterion)
        return procrustes(layer.heads, layer.moments, grams, groups, restore_norm=options.restore_norm)


def _alignment_price(layer: SourceLayer, item: Literal["key", "value"], options: SharingOptions) -> Price:
    """The price of a group by its pairs, each rotated onto the other unless a q/k norm keeps its keys as they are."""
    grams = head_grams(layer.moments, layer.statistics, options.criterion)
    return procrustes_price(grams, item, movable=item == "value" or layer.heads.traits.qk_norm == "none")


def _per_member(price: Price, options: SharingOptions) -> Price:
    """A sum over pairs divided by the group's size: under "dist" the scatter about the mean, fair to unequal groups.

    Under "cos" a pair costs `1 - cos` here, not `-cos`: otherwise every further pair would be a gain.
    """
    if options.criterion == "dist":
        return lambda group: price(group) / len(group)
    return lambda group: (price(group) + math.comb(len(group), 2)) / len(group)


class ClosedForm:
    """Ours: grouped by the exact price, combined by principal components in the output's metric."""

    def reads_text(self, options: SharingOptions) -> bool:  # noqa: ARG002, D102
        return True

    def prices(self, layer: SourceLayer, options: SharingOptions) -> tuple[Price, Price]:  # noqa: ARG002, D102
        movable = layer.heads.traits.qk_norm == "none"
        return memoised(key_price(layer.moments, movable=movable)), memoised(value_price(layer.moments))

    def joint_price(self, layer: SourceLayer, options: SharingOptions) -> Price:
        """Both prices, each relative to that of sharing a single head."""
        keys, values = self.prices(layer, options)
        everyone = tuple(range(layer.heads.num_key_heads))
        key_scale, value_scale = (max(price(everyone), 1e-30) for price in (keys, values))

        def price(group: Group) -> float:
            return keys(group) / key_scale + values(group) / value_scale

        return price

    def share(self, layer: SourceLayer, groups: HeadGroups, options: SharingOptions) -> AttentionHeads:  # noqa: ARG002, D102
        return closed_form(layer.heads, layer.moments, groups)


METHODS: dict[SharingName, SharingMethod] = {
    "mean-pool": MeanPool(),
    "procrustes": Procrustes(),
    "closed-form": ClosedForm(),
}


def method_named(name: str) -> SharingMethod:
    """The method of that name; ConfigError lists the known ones."""
    if name not in METHODS:
        raise ConfigError(f"wanted a method, got {name!r}; choose one of {', '.join(METHODS)}")
    return METHODS[name]


def group_layer(
    layer: SourceLayer,
    counts: tuple[int, int],
    method: SharingMethod,
    options: SharingOptions,
    *,
    target: Target,
    generator: torch.Generator,
) -> HeadGroups:
    """Groups of a layer's key heads and of its value heads that leave `counts` (key heads, value heads).

    Target gqa wants one grouping, of equal sizes, for both. A kind that keeps all its heads keeps their order.
    """
    if target == "gqa":
        joint = method.joint_price(layer, options)
        if joint is None or counts == layer.counts:
            return HeadGroups(*(contiguous_groups(layer.counts[0], counts[0]),) * 2)
        groups = group_heads(layer.counts[0], counts[0], joint, equal_sizes=True, generator=generator)
        return HeadGroups(groups, groups)
    prices = method.prices(layer, options)
    groups = []
    for kind, (heads, count) in enumerate(zip(layer.counts, counts, strict=True)):
        if prices is None or count == heads:
            groups.append(contiguous_groups(heads, count))
        else:
            groups.append(group_heads(heads, count, prices[kind], equal_sizes=False, generator=generator))
    return HeadGroups(*groups)
