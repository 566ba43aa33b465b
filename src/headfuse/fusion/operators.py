"""DHA's fusion operators: projections whose heads are learned combinations of the source's (arXiv 2406.06567).

Every head h of a projection becomes `sum_j w_hj * W_j`, with w a delta at the start, so that nothing changes. Once all
the rows of a group agree, the group's heads are one head, and folding keeps the function. `n` counts source heads, `d`
is the head width, `D` the hidden size, `e` the free numbers of a pair of heads, `G` the groups.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, cast

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from headfuse.checkpoints.attention import heads_of
from headfuse.checkpoints.heads import AttentionHeads
from headfuse.errors import PlanError
from headfuse.models.dha.decoupled_attention import DecoupledAttention
from headfuse.planning.grouping import Group, HeadGroups, compose

# How many numbers a pair (head, source head) has: one; one per channel, those of a rotary plane (f, f + rotary_dim / 2)
# sharing theirs; one per channel.
Extent = Literal["scalar", "tied", "dimension"]


def check_fusable(heads: AttentionHeads) -> None:
    """Raise PlanError for heads that DHA cannot fold.

    A key norm over all heads has gains of its own for every head, behind the projection: keys that became equal would
    still be read through unequal gains, and no single head replaces them. Values could be fused all the same, but with
    every key head left in the cache that saves half of it at most, so such models are refused as a whole.
    """
    if heads.traits.qk_norm == "all":
        raise PlanError(
            "fusion wanted keys that no norm ties together, got a key norm over all heads (qk_norm 'all', as OLMo 2 "
            "has); use method mean-pool"
        )


def multi_head(heads: AttentionHeads) -> AttentionHeads:
    """The same function with a key and a value head of its own for every query head, copies where heads were shared.

    The paper fuses a grouped-query model after this step (arXiv 2406.06567, App. D). Without it the unit of fusion is
    the source's key or value head with all its query heads: cheaper, but query heads that share a head never part.
    """
    check_fusable(heads)
    keys, values = list(heads.key_map), list(heads.value_map)
    own = tuple(range(heads.num_query_heads))
    return replace(
        heads,
        k=heads.k[keys],
        v=heads.v[values],
        k_bias=None if heads.k_bias is None else heads.k_bias[keys],
        v_bias=None if heads.v_bias is None else heads.v_bias[values],
        key_map=own,
        value_map=own,
    )


def same_group(num_heads: int, groups: Sequence[Group] | None) -> Bool[Tensor, "n n"]:
    """Which heads may read which: members of one group; everyone (the operators of the search) without groups."""
    if groups is None:
        return torch.ones(num_heads, num_heads, dtype=torch.bool)
    assert sorted(head for group in groups for head in group) == list(range(num_heads)), "groups must be a partition"
    label = torch.tensor(compose(tuple(range(num_heads)), tuple(groups)))
    return label[:, None] == label[None, :]


def expand_operators(
    operators: Float[Tensor, "n n e"], extent: Extent, head_dim: int, rotary_dim: int
) -> Float[Tensor, "n n d"]:
    """One number per channel, whatever the extent. Tied: the planes' numbers come first, then the free channels'.

    Tying pairs channels as the half-split layout of transformers does, `(f, f + rotary_dim / 2)`.
    """
    if extent == "scalar":
        return operators.expand(-1, -1, head_dim)
    if extent == "dimension" or rotary_dim == 0:
        return operators
    planes, free = operators[..., : rotary_dim // 2], operators[..., rotary_dim // 2 :]
    return torch.cat([planes, planes, free], dim=-1)


def combine(
    operators: Float[Tensor, "m n d"], weight: Float[Tensor, "n d D"], bias: Float[Tensor, "n d"] | None
) -> tuple[Float[Tensor, "m d D"], Float[Tensor, "m d"] | None]:
    """`sum_j w_mj * W_j`, channel by channel, and the same of the biases (Eq 5); a matrix product per channel."""
    fused_bias = None if bias is None else torch.einsum("mjd,jd->md", operators, bias)
    return torch.einsum("mjd,jdD->mdD", operators, weight), fused_bias


Pairs = tuple[Int64[Tensor, " pairs"], Int64[Tensor, " pairs"]]


def pairs_within(allowed: Bool[Tensor, "n n"]) -> Pairs:
    """The two heads of every pair in a group, each pair once."""
    first, second = allowed.triu(1).nonzero(as_tuple=True)
    return first, second


def pair_losses(
    operators: Float[Tensor, "n n d"], allowed: Bool[Tensor, "n n"], pairs: Pairs | None = None
) -> Float[Tensor, " pairs"]:
    """L_head of every pair of heads in a group, each pair once: the mean square of `w_hj - w_h'j` over j and channels.

    Eq 6 for heads that are orthogonal, as the paper assumes: 2 / g at the delta. It does not say how the channels of
    vector operators count; here by their mean. `pairs` are those of `pairs_within(allowed)`, where they are known: to
    find them waits for the device.
    """
    first, second = pairs or pairs_within(allowed)
    operators = operators.masked_fill(~allowed.unsqueeze(-1), 0.0)
    squares = (operators[first] - operators[second]).pow(2).mean(-1).sum(-1)
    return squares / allowed.sum(-1)[first]


def head_losses(operators: Float[Tensor, "n n d"], allowed: Bool[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """`pair_losses` as a symmetric matrix, zero on the diagonal and between groups: the distances to group heads by."""
    first, second = pairs = pairs_within(allowed)
    losses = pair_losses(operators, allowed, pairs)
    upper = losses.new_zeros(allowed.shape).index_put((first, second), losses)
    return upper + upper.mT


class FusedProjection(nn.Module):
    """A key or value projection whose heads are combinations of its source heads (Eq 5); computes what it replaces.

    `weight` and `bias` are the replaced layer's own parameters under its own names; `operators` are in fp32 whatever
    the weights are in (a delta start and a threshold of 1e-3 do not survive bf16), so fuse after any cast of the model.

    Fuses the weights. The paper's algorithms fuse activations, which is the same before the rotation and needs g times
    the memory; after the rotation it would not fold. "tied" is ours, not the paper's "dimension": with it, fusing
    before and after the rotation coincide.
    """

    operators: nn.Parameter
    allowed: Tensor
    first: Tensor
    second: Tensor

    def __init__(
        self,
        source: "nn.Linear | FusedProjection",
        groups: Sequence[Group] | None,
        extent: Extent,
        *,
        head_dim: int,
        rotary_dim: int = 0,
    ) -> None:
        super().__init__()
        self.weight, self.bias = source.weight, source.bias
        self.extent: Extent = extent
        self.head_dim, self.rotary_dim = head_dim, rotary_dim
        free = {"scalar": 1, "tied": head_dim - rotary_dim // 2, "dimension": head_dim}[extent]
        device = self.weight.device
        delta = torch.eye(self.num_heads, device=device).unsqueeze(-1)
        self.operators = nn.Parameter(delta.repeat(1, 1, free))
        allowed = same_group(self.num_heads, groups)
        self.register_buffer("allowed", allowed.to(device), persistent=False)
        first, second = pairs_within(allowed)
        self.register_buffer("first", first.to(device), persistent=False)
        self.register_buffer("second", second.to(device), persistent=False)

    @property
    def num_heads(self) -> int:
        """Source heads, n."""
        return self.weight.shape[0] // self.head_dim

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch n*d"]:
        """The fused heads' activations, before any norm or rotation."""
        weight, bias = self.fused()
        return nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def expanded(self) -> Float[Tensor, "n n d"]:
        """The operators by channel: `[h, j]` is the share of source head j in head h, zero outside its group."""
        operators = expand_operators(self.operators, self.extent, self.head_dim, self.rotary_dim)
        return operators.masked_fill(~self.allowed.unsqueeze(-1), 0.0)

    def pair_losses(self) -> Float[Tensor, " pairs"]:
        """How far the heads of every pair in a group still disagree."""
        return pair_losses(self.expanded(), self.allowed, (self.first, self.second))

    def fused(self) -> tuple[Float[Tensor, "n*d D"], Float[Tensor, " n*d"] | None]:
        """Weight and bias of the fused heads, in fp32 (fp64 for such weights), also under autocast."""
        assert self.operators.dtype.itemsize >= 4, "the operators were cast down with the model"
        dtype = torch.promote_types(self.operators.dtype, self.weight.dtype)
        with torch.autocast(self.weight.device.type, enabled=False):
            weight, bias = combine(self.expanded().to(dtype), *self._heads(dtype))
        return weight.flatten(0, 1), None if bias is None else bias.flatten()

    def folded(self, groups: Sequence[Group]) -> tuple[Float[Tensor, "G d D"], Float[Tensor, "G d"] | None]:
        """The groups' shared heads in fp64: the mean of their members' operators, applied to the source (Sec B.2)."""
        return combine(self.group_means(groups), *self._heads(torch.float64))

    def group_means(self, groups: Sequence[Group]) -> Float[Tensor, "G n d"]:
        """The mean of the operators over each group's members, in fp64."""
        operators = self.expanded().double()
        return torch.stack([operators[list(group)].mean(0) for group in groups])

    def _heads(self, dtype: torch.dtype) -> tuple[Float[Tensor, "n d D"], Float[Tensor, "n d"] | None]:
        shape = (self.num_heads, self.head_dim)
        bias = None if self.bias is None else self.bias.to(dtype).unflatten(0, shape)
        return self.weight.to(dtype).unflatten(0, shape), bias


def fuse_attention(
    module: DecoupledAttention,
    groups: HeadGroups | None,
    *,
    key_extent: Extent = "tied",
    value_extent: Extent = "dimension",
) -> None:
    """Give a module fused key and value projections, at the delta: it computes what it did before.

    Without groups every head may read every other, as the search wants. A module that is fused already starts again at
    the delta, from its unfused weights. The paper's extent is "dimension" for both.
    """
    shape = module.shape
    assert shape.qk_norm != "all", "check_fusable comes first"
    kinds: list[tuple[str, Sequence[Group] | None, Extent, int]] = [
        ("k_proj", groups and groups.keys, key_extent, shape.rotary_dim),
        ("v_proj", groups and groups.values, value_extent, 0),  # values are not rotated: nothing to tie
    ]
    for name, members, extent, rotary_dim in kinds:
        source = getattr(module, name)
        fused = FusedProjection(source, members, extent, head_dim=shape.head_dim, rotary_dim=rotary_dim)
        setattr(module, name, fused)


def fused_projections(module: DecoupledAttention) -> tuple[FusedProjection, FusedProjection]:
    """The key and the value projection of a module that `fuse_attention` changed."""
    keys, values = cast(nn.Module, module.k_proj), cast(nn.Module, module.v_proj)
    assert isinstance(keys, FusedProjection)
    assert isinstance(values, FusedProjection)
    return keys, values


@torch.no_grad()
def fold_heads(module: DecoupledAttention, like: AttentionHeads, groups: HeadGroups) -> AttentionHeads:
    """The layer with one key and one value head per group; everything else as the module holds it now.

    `like` are the heads that the module was made of. Exact once the operators agree within every group.
    """
    keys, values = fused_projections(module)
    held = heads_of(module, like)
    (k, k_bias), (v, v_bias) = keys.folded(groups.keys), values.folded(groups.values)
    return replace(
        held,
        k=k.to(held.k.dtype),
        v=v.to(held.v.dtype),
        k_bias=None if k_bias is None else k_bias.to(held.k.dtype),
        v_bias=None if v_bias is None else v_bias.to(held.v.dtype),
        key_map=compose(held.key_map, groups.keys),
        value_map=compose(held.value_map, groups.values),
    )


@torch.no_grad()
def operator_health(projection: FusedProjection, groups: Sequence[Group]) -> dict[str, float]:
    """What tells a fusion that learned from one that became mean pooling, to be logged throughout.

    `mean_pool_distance` is the mean of |w - 1 / g| over the folded operators: zero for mean pooling, which is where the
    fusion loss alone leads, but also at the delta start, so read it beside the pair losses. `norm_ratio` is the norm of
    a folded head over its members' root mean square, averaged over groups: 1 / sqrt(g) for the mean of unrelated heads.
    """
    means = projection.group_means(groups)
    distances = [(means[index, list(group)] - 1 / len(group)).abs().mean() for index, group in enumerate(groups)]
    folded, _ = projection.folded(groups)
    energies = projection.weight.double().unflatten(0, (projection.num_heads, -1)).pow(2).sum((1, 2))
    members = torch.stack([energies[list(group)].mean() for group in groups])
    ratios = (folded.pow(2).sum((1, 2)) / members.clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
    return {"mean_pool_distance": torch.stack(distances).mean().item(), "norm_ratio": ratios.mean().item()}
