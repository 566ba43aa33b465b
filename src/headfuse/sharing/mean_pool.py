"""Mean pooling of key and value heads: the baseline of the GQA paper (arXiv 2305.13245, section 2.1)."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from headfuse.checkpoints.heads import AttentionHeads, extended
from headfuse.planning.grouping import Group, HeadGroups, compose
from headfuse.statistics.moments import HeadMoments


def mean_pool(
    heads: AttentionHeads, moments: HeadMoments | None, groups: HeadGroups, *, restore_norm: bool = False
) -> AttentionHeads:
    """Replace every group by the mean of its members' rows and biases; heads alone stay bit for bit.

    A mean of unlike heads is short: with `restore_norm` it is scaled so that its activations have the members' mean
    energy `E|k|^2` under `moments`, which nothing else reads. (Activation energy, not the Frobenius norm of the rows:
    it is what the attention reads, and it counts biases.) q/k norm gains over all heads are averaged alike, a gain per
    channel is untouched.
    """
    keys, values = (extended(heads.k, heads.k_bias), extended(heads.v, heads.v_bias))
    key_scales = value_scales = None
    if restore_norm:
        assert moments is not None, "energies are those of a text"
        key_scales = _scales(_key_overlaps(moments), groups.keys)
        value_scales = _scales(torch.einsum("iaja->ij", moments.values), groups.values)
    key, value = _pooled(keys, groups.keys, key_scales), _pooled(values, groups.values, value_scales)
    gain = heads.k_norm
    if gain is not None and gain.dim() == 2:
        gain = _pooled(gain.double(), groups.keys).to(gain.dtype)
    return replace(
        heads,
        k=key[..., :-1].to(heads.k.dtype),
        v=value[..., :-1].to(heads.v.dtype),
        k_bias=None if heads.k_bias is None else key[..., -1].to(heads.k_bias.dtype),
        v_bias=None if heads.v_bias is None else value[..., -1].to(heads.v_bias.dtype),
        k_norm=gain,
        key_map=compose(heads.key_map, groups.keys),
        value_map=compose(heads.value_map, groups.values),
    )


def _pooled(
    rows: Float[Tensor, "n *size"], groups: Sequence[Group], scales: Sequence[float] | None = None
) -> Float[Tensor, "g *size"]:
    pooled = torch.stack([rows[list(group)].mean(0) for group in groups])
    if scales is None:
        return pooled
    return pooled * pooled.new_tensor(scales).view(-1, *[1] * (pooled.dim() - 1))


def _key_overlaps(moments: HeadMoments) -> Float[Tensor, "K K"]:
    """`E<k_i, k_j>` over all channels, rotated or not."""
    return moments.key_planes.real.sum(0) + torch.einsum("iaja->ij", moments.key_rest)


def _scales(overlaps: Float[Tensor, "n n"], groups: Sequence[Group]) -> list[float]:
    """Per group, the members' root mean energy over that of their mean; 1 for a head alone and for a vanishing mean."""
    scales = []
    for group in groups:
        members = overlaps[list(group)][:, list(group)]
        energy, pooled = members.diagonal().mean().item(), members.mean().item()
        usable = len(group) > 1 and pooled > torch.finfo(torch.float64).eps * energy
        scales.append((energy / pooled) ** 0.5 if usable else 1.0)
    return scales
