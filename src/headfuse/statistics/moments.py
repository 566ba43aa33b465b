"""Second moments of one layer's heads, all derived from the second moment of the layer's input.

Keys, values and queries are affine in the attention's input x, so `E[(x,1)(x,1)^T]`, `[D + 1, D + 1]`, holds every
Gram that planning and sharing need: one matrix per layer in fp64, whatever the number of heads, and no key or
value is ever stored. (closed_form.md streams the Grams themselves; this is the same, smaller and reusable.)
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from headfuse.checkpoints.heads import AttentionHeads, extended


@dataclass(frozen=True)
class LayerStatistics:
    """What one pass over the calibration text leaves of a layer (fp64).

    `moment` is `E[(x,1)(x,1)^T]` of the attention's input. The `unit_*` Grams are those of the same heads with
    every token's row scaled to unit length, which the `cos` criterion of Procrustes needs and no moment of x gives:
    values `[V, d, V, d]`, keys in their rotary planes `[F, K, K]` and in their unrotated channels `[K, r, K, r]`. They
    are collected only on demand.
    """

    moment: Float[Tensor, "D1 D1"]
    unit_values: Float[Tensor, "V d V d"] | None = None
    unit_key_planes: Complex[Tensor, "F K K"] | None = None
    unit_key_rest: Float[Tensor, "K r K r"] | None = None


@dataclass(frozen=True)
class HeadMoments:
    """Per-token second moments of a layer's key, value and query heads (fp64, complex128).

    Under rotary positions a key head is one complex number per plane f (channels f and f + F of the rotated part),
    and only complex scalars commute with the rotation; the `rest` are the r = d - 2F unrotated channels, which any
    matrix may mix. Query moments are summed over the query heads that read a key head, and `output_metric` is the
    sum of `W_O^T W_O` over the query heads that read a value head. `key_energy` is `E|k|^2` as a q/k norm finds it.
    """

    values: Float[Tensor, "V d V d"]
    key_planes: Complex[Tensor, "F K K"]
    key_rest: Float[Tensor, "K r K r"]
    query_planes: Float[Tensor, "F K"]
    query_rest: Float[Tensor, "K r r"]
    output_metric: Float[Tensor, "V d d"]
    key_energy: Float[Tensor, " K"]


def planes(rows: Float[Tensor, "n d D"], rotary_dim: int) -> Complex[Tensor, "n F D"]:
    """The rotated channels of `rows` as complex numbers, plane by plane: channel f + i * channel (f + F)."""
    half = rotary_dim // 2
    return torch.complex(rows[:, :half], rows[:, half:rotary_dim])


def from_planes(complex_rows: Complex[Tensor, "n F D"], rest: Float[Tensor, "n r D"]) -> Float[Tensor, "n d D"]:
    """Inverse of `planes`, with the unrotated channels appended."""
    return torch.cat([complex_rows.real, complex_rows.imag, rest], dim=1)


def head_moments(heads: AttentionHeads, statistics: LayerStatistics) -> HeadMoments:
    """Every Gram of `heads` from the input moment; exact up to fp64 rounding.

    Behind a norm over each head, keys have unit mean square whatever the projection's scale: their Grams are then those
    of the unit-length rows, if collected, and every reading query counts alike (the norm's gains are left out). A norm
    over all heads at once keeps their relative sizes: keys and queries are then times their gains, and the norm's
    factor, one a token for all heads, is taken as the same for every token.
    """
    moment, rotary_dim = statistics.moment, heads.traits.rotary_dim
    moment = moment.to(heads.q.device)
    query, key, value = (
        extended(w, b) for w, b in ((heads.q, heads.q_bias), (heads.k, heads.k_bias), (heads.v, heads.v_bias))
    )
    key_energy = torch.einsum("kaD,DE,kaE->k", key, moment, key)
    if heads.traits.qk_norm == "all":
        assert heads.q_norm is not None
        assert heads.k_norm is not None
        query, key = query * heads.q_norm.double()[..., None], key * heads.k_norm.double()[..., None]
    complex_moment = moment.to(torch.complex128)
    key_c, query_c = planes(key, rotary_dim), planes(query, rotary_dim)
    key_r, query_r = key[:, rotary_dim:], query[:, rotary_dim:]
    num_planes, num_keys = key_c.shape[1], heads.num_key_heads
    key_map = torch.tensor(heads.key_map, device=heads.q.device)
    energy = torch.einsum("hfD,DE,hfE->fh", query_c, complex_moment, query_c.conj()).real
    query_planes = energy.new_zeros(num_planes, num_keys).index_add_(1, key_map, energy)
    query_gram = torch.einsum("haD,DE,hbE->hab", query_r, moment, query_r)
    query_rest = query_gram.new_zeros(num_keys, *query_gram.shape[1:]).index_add_(0, key_map, query_gram)
    output = heads.o.double()
    metric = torch.einsum("hDa,hDb->hab", output, output)
    value_map = torch.tensor(heads.value_map, device=heads.q.device)
    found = HeadMoments(
        values=torch.einsum("iaD,DE,jbE->iajb", value, moment, value),
        key_planes=torch.einsum("hfD,DE,gfE->fhg", key_c, complex_moment, key_c.conj()),
        key_rest=torch.einsum("iaD,DE,jbE->iajb", key_r, moment, key_r),
        query_planes=query_planes,
        query_rest=query_rest,
        output_metric=metric.new_zeros(heads.num_value_heads, *metric.shape[1:]).index_add_(0, value_map, metric),
        key_energy=key_energy,
    )
    return _behind_norm(heads, found, statistics) if heads.traits.qk_norm == "head" else found


def _behind_norm(heads: AttentionHeads, moments: HeadMoments, statistics: LayerStatistics) -> HeadMoments:
    """`moments` with the keys and queries as a norm over each head leaves them."""
    if statistics.unit_key_planes is None or statistics.unit_key_rest is None:
        return moments
    readers = torch.tensor([heads.key_map.count(key) for key in range(heads.num_key_heads)]).to(moments.query_planes)
    return replace(
        moments,
        key_planes=statistics.unit_key_planes.to(moments.key_planes) * heads.head_dim,
        key_rest=statistics.unit_key_rest.to(moments.key_rest) * heads.head_dim,
        query_planes=torch.ones_like(moments.query_planes) * readers,
        query_rest=torch.eye(moments.query_rest.shape[-1]).to(moments.query_rest) * readers[:, None, None],
    )
