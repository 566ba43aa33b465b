"""Random attention heads with their statistics, and a reference attention in fp64 to judge what is done to them.

Hypothesis draws shapes and seeds; tensors come from a generator. Statistics follow their definition on an explicit
input x `[T, D]`, so tests can compare anything derived from Grams with the same thing done on activations.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from hypothesis import strategies as st
from torch import Tensor

from headfuse.checkpoints.heads import AttentionHeads, AttentionTraits, QkNorm
from headfuse.planning.grouping import Group, HeadGroups
from headfuse.statistics.moments import HeadMoments, LayerStatistics, head_moments


@dataclass(frozen=True)
class HeadCase:
    """Heads, an input `[T, D]` and the statistics that the input leaves."""

    heads: AttentionHeads
    x: Tensor

    @cached_property
    def statistics(self) -> LayerStatistics:
        return statistics_of(self.heads, self.x)

    @cached_property
    def moments(self) -> HeadMoments:
        return head_moments(self.heads, self.statistics)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_heads(
    generator: torch.Generator,
    *,
    num_query_heads: int = 4,
    num_key_heads: int | None = None,
    num_value_heads: int | None = None,
    head_dim: int = 8,
    hidden_size: int = 20,
    rotary_dim: int | None = None,
    bias: bool = False,
    qk_norm: QkNorm = "none",
    dtype: torch.dtype = torch.float64,
) -> AttentionHeads:
    """Random heads: multi-head unless fewer key or value heads are asked for, fully rotary unless `rotary_dim`."""
    H, d, D = num_query_heads, head_dim, hidden_size
    K = num_key_heads or H
    V = num_value_heads or K

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    def gain(count: int) -> Tensor | None:
        if qk_norm == "none":
            return None
        return 1 + normal(*((d,) if qk_norm == "head" else (count, d)), scale=0.2)

    return AttentionHeads(
        q=normal(H, d, D, scale=D**-0.5),
        k=normal(K, d, D, scale=D**-0.5),
        v=normal(V, d, D, scale=D**-0.5),
        o=normal(H, D, d, scale=(H * d) ** -0.5),
        key_map=tuple(h * K // H for h in range(H)),
        value_map=tuple(h * V // H for h in range(H)),
        traits=AttentionTraits(rotary_dim=d if rotary_dim is None else rotary_dim, scaling=d**-0.5, qk_norm=qk_norm),
        q_bias=normal(H, d, scale=0.5) if bias else None,
        k_bias=normal(K, d, scale=0.5) if bias else None,
        v_bias=normal(V, d, scale=0.5) if bias else None,
        o_bias=normal(D, scale=0.5) if bias else None,
        q_norm=gain(H),
        k_norm=gain(K),
    )


def random_input(generator: torch.Generator, hidden_size: int, num_tokens: int = 64) -> Tensor:
    """Correlated, uncentred rows `[T, D]` of full rank, as a residual stream has."""
    mix = torch.randn(hidden_size, hidden_size, generator=generator, dtype=torch.float64) * hidden_size**-0.5
    rows = torch.randn(num_tokens, hidden_size, generator=generator, dtype=torch.float64)
    return rows @ (mix + 0.5 * torch.eye(hidden_size, dtype=torch.float64)) + 0.3


@st.composite
def head_cases(draw: st.DrawFn, *, rotary: bool | None = None, qk_norm: QkNorm = "none") -> HeadCase:
    """MHA, GQA and unequal K and V; full, partial and no rotary positions; with and without biases."""
    queries, keys, values = draw(
        st.sampled_from([(4, 4, 4), (6, 6, 6), (8, 4, 4), (6, 3, 3), (4, 4, 2), (6, 2, 3), (3, 3, 3)])
    )
    head_dim = draw(st.sampled_from([4, 6, 8]))
    rotary_dims = {None: [0, 2, head_dim], True: [head_dim], False: [0]}[rotary]
    generator = seeded(draw(st.integers(0, 2**16)))
    heads = random_heads(
        generator,
        num_query_heads=queries,
        num_key_heads=keys,
        num_value_heads=values,
        head_dim=head_dim,
        rotary_dim=draw(st.sampled_from(rotary_dims)),
        bias=draw(st.booleans()),
        qk_norm=qk_norm,
    )
    return HeadCase(heads, random_input(generator, heads.hidden_size))


@st.composite
def group_tuples(draw: st.DrawFn, num_heads: int) -> tuple[Group, ...]:
    """Any partition of the heads into groups of any sizes, members ascending, groups by first member."""
    labels = draw(st.lists(st.integers(0, num_heads - 1), min_size=num_heads, max_size=num_heads))
    return tuple(sorted(tuple(h for h in range(num_heads) if labels[h] == label) for label in set(labels)))


@st.composite
def cases_with_groups(
    draw: st.DrawFn, *, rotary: bool | None = None, qk_norm: QkNorm = "none"
) -> tuple[HeadCase, HeadGroups]:
    """A case and a partition of its key heads and of its value heads."""
    case = draw(head_cases(rotary=rotary, qk_norm=qk_norm))
    keys = draw(group_tuples(case.heads.num_key_heads))
    return case, HeadGroups(keys, draw(group_tuples(case.heads.num_value_heads)))


def project(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Activations `[n, T, d]` in fp64."""
    rows = torch.einsum("ndD,TD->nTd", weight.double(), x.double())
    return rows if bias is None else rows + bias.double().unsqueeze(1)


def statistics_of(heads: AttentionHeads, x: Tensor) -> LayerStatistics:
    """The statistics of `heads` on the rows of `x`, token by token, by definition."""
    rows = torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    key, value = project(heads.k, heads.k_bias, x), project(heads.v, heads.v_bias, x)
    key, value = (y / y.norm(dim=-1, keepdim=True) for y in (key, value))
    half, num_tokens = heads.traits.rotary_dim // 2, len(x)
    key_planes = torch.complex(key[..., :half], key[..., half : 2 * half])
    rest = key[..., 2 * half :]
    return LayerStatistics(
        moment=rows.mT @ rows / num_tokens,
        unit_values=torch.einsum("iTa,jTb->iajb", value, value) / num_tokens,
        unit_key_planes=torch.einsum("iTf,jTf->fij", key_planes, key_planes.conj()) / num_tokens,
        unit_key_rest=torch.einsum("iTa,jTb->iajb", rest, rest) / num_tokens,
    )


def positions(rotary_dim: int, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Half-split RoPE: cos and sin `[T, rotary_dim]`."""
    frequencies = 100.0 ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float64) / max(rotary_dim, 1))
    angles = torch.arange(num_tokens, dtype=torch.float64)[:, None] * frequencies
    return torch.cat([angles, angles], dim=-1).cos(), torch.cat([angles, angles], dim=-1).sin()


def rope(rows: Tensor, rotary_dim: int) -> Tensor:
    """Rotate the leading channels of `[..., T, d]` by position, as transformers' Llama does."""
    cos, sin = positions(rotary_dim, rows.shape[-2])
    rotary, rest = rows[..., :rotary_dim], rows[..., rotary_dim:]
    first, second = rotary.chunk(2, dim=-1)
    return torch.cat([rotary * cos + torch.cat([-second, first], dim=-1) * sin, rest], dim=-1)


def attention_output(heads: AttentionHeads, x: Tensor) -> Tensor:
    """Causal attention of `x` `[T, D]` in fp64, spelled out."""
    query = _normed(project(heads.q, heads.q_bias, x), heads.q_norm, heads.traits)
    key = _normed(project(heads.k, heads.k_bias, x), heads.k_norm, heads.traits)
    value = project(heads.v, heads.v_bias, x)
    query, key = rope(query, heads.traits.rotary_dim), rope(key, heads.traits.rotary_dim)
    scores = query @ key[list(heads.key_map)].mT * heads.traits.scaling
    future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    read = weights @ value[list(heads.value_map)]
    output = torch.einsum("hTd,hDd->TD", read, heads.o.double())
    return output if heads.o_bias is None else output + heads.o_bias.double()


def _normed(rows: Tensor, gain: Tensor | None, traits: AttentionTraits) -> Tensor:
    if gain is None:
        return rows
    over = (-1,) if traits.qk_norm == "head" else (0, -1)
    scaled = rows * (rows.pow(2).mean(over, keepdim=True) + traits.norm_eps).rsqrt()
    return scaled * (gain if gain.dim() == 1 else gain.unsqueeze(1)).double()


def with_copies(heads: AttentionHeads, groups: HeadGroups) -> AttentionHeads:
    """The heads with every group's members made equal to its first."""
    key = {head: group[0] for group in groups.keys for head in group}
    value = {head: group[0] for group in groups.values for head in group}
    keys = [key[head] for head in range(heads.num_key_heads)]
    values = [value[head] for head in range(heads.num_value_heads)]
    return replace(
        heads,
        k=heads.k[keys],
        v=heads.v[values],
        k_bias=None if heads.k_bias is None else heads.k_bias[keys],
        v_bias=None if heads.v_bias is None else heads.v_bias[values],
        k_norm=heads.k_norm if heads.k_norm is None or heads.k_norm.dim() == 1 else heads.k_norm[keys],
    )
