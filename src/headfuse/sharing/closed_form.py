"""The best shared heads in closed form: principal components in the metric that the layer's output sees.

Neither paper has this; see docs/closed_form.md. Attention leaves any invertible matrix free between a value head
and its output columns, and any complex scalar free per rotary plane between a key head and its queries, so the
best shared head of a group is a truncated eigen-decomposition, and the eigenvalues left out are its exact price.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from headfuse.checkpoints.heads import AttentionHeads, extended
from headfuse.planning.grouping import Group, HeadGroups, Price, compose
from headfuse.statistics.moments import HeadMoments, from_planes, planes

# Directions this far below the largest are noise of the moments: their inverse roots would amplify rounding.
RELATIVE_FLOOR = 1e-10


def root_and_inverse(gram: Float[Tensor, "*n d d"]) -> tuple[Tensor, Tensor]:
    """Symmetric square root of a positive semi-definite matrix, and its inverse on the range above the floor."""
    values, vectors = torch.linalg.eigh(gram)
    floor = RELATIVE_FLOOR * values[..., -1:].clamp_min(torch.finfo(values.dtype).tiny)
    root = values.clamp_min(0).maximum(floor).sqrt()
    return (vectors * root.unsqueeze(-2)) @ vectors.mT, (vectors / root.unsqueeze(-2)) @ vectors.mT


def weighted(gram: Float[Tensor, "n d n d"], root: Float[Tensor, "n d d"]) -> Float[Tensor, "n d n d"]:
    """`L S L` for block-diagonal L: the Gram in the metric whose roots are given."""
    return torch.einsum("hab,hbgc,gce->hage", root, gram, root)


def block(gram: Float[Tensor, "n d n d"], group: Sequence[int]) -> Float[Tensor, "gd gd"]:
    """The rows and columns of the group's heads as one symmetric matrix."""
    index = torch.tensor(list(group), device=gram.device)
    width = len(group) * gram.shape[1]
    chosen = gram[index][:, :, index].reshape(width, width)
    return (chosen + chosen.mT) / 2


def value_price(moments: HeadMoments) -> Price:
    """Price of a value group: `E sum_i |W_O,i (v_i - C_i B v)|^2` at its optimum, the eigenvalues left out."""
    gram = weighted(moments.values, root_and_inverse(moments.output_metric)[0])
    width = gram.shape[1]

    def price(group: Group) -> float:
        if len(group) == 1:
            return 0.0
        return torch.linalg.eigvalsh(block(gram, group))[:-width].clamp_min(0).sum().item()

    return price


def key_price(moments: HeadMoments, *, movable: bool = True) -> Price:
    """Price of a key group: `E sum_i E|q_i|^2 |k_i - c_i k|^2` over planes and unrotated channels at the optimum.

    With `movable` False (a norm between projection and rotation) no factor can be folded into the queries, and
    the price is that of the group's most central head standing for all.
    """
    if not movable:
        return lambda group: min(_stand_in_costs(moments, group))
    energy = moments.query_planes.clamp_min(0).sqrt()
    key_planes = energy[:, :, None] * moments.key_planes * energy[:, None, :]
    rest = weighted(moments.key_rest, root_and_inverse(moments.query_rest)[0]) if moments.key_rest.numel() else None

    def price(group: Group) -> float:
        if len(group) == 1:
            return 0.0
        index = torch.tensor(group, device=key_planes.device)
        cost = torch.linalg.eigvalsh(key_planes[:, index][:, :, index])[:, :-1].clamp_min(0).sum()
        if rest is not None:
            cost = cost + torch.linalg.eigvalsh(block(rest, group))[: -rest.shape[1]].clamp_min(0).sum()
        return cost.item()

    return price


def closed_form(heads: AttentionHeads, moments: HeadMoments, groups: HeadGroups) -> AttentionHeads:
    """Replace every group by its best shared head, folding what is left into the q rows and o columns.

    Heads alone in their group stay bit for bit. Keys behind a q/k norm cannot be combined exactly: their group is
    represented by its most central head.
    """
    shared = share_values(heads, moments, groups.values)
    if heads.traits.qk_norm == "none":
        return share_keys(shared, moments, groups.keys)
    return choose_keys(shared, moments, groups.keys)


def share_values(heads: AttentionHeads, moments: HeadMoments, groups: Sequence[Group]) -> AttentionHeads:
    """Shared head `B v` with `B = U^T L` and output columns `W_O C`, `C = L^-1 U` (U: top-d eigenvectors of L S L)."""
    root, inverse = root_and_inverse(moments.output_metric)
    gram = weighted(moments.values, root)
    rows, width = extended(heads.v, heads.v_bias), heads.head_dim
    output, new_rows = heads.o.double().clone(), []
    for group in groups:
        if len(group) == 1:
            new_rows.append(rows[group[0]])
            continue
        top = torch.linalg.eigh(block(gram, group))[1][:, -width:].unflatten(0, (len(group), width))
        new_rows.append(sum(top[i].mT @ root[head] @ rows[head] for i, head in enumerate(group)))
        for query, head in enumerate(heads.value_map):
            if head in group:
                output[query] = heads.o[query].double() @ inverse[head] @ top[group.index(head)]
    merged = torch.stack(new_rows)
    return replace(
        heads,
        v=merged[..., :-1].to(heads.v.dtype),
        v_bias=None if heads.v_bias is None else merged[..., -1].to(heads.v.dtype),
        o=output.to(heads.o.dtype),
        value_map=compose(heads.value_map, tuple(groups)),
    )


def share_keys(heads: AttentionHeads, moments: HeadMoments, groups: Sequence[Group]) -> AttentionHeads:
    """Shared key head plane by plane, `k = sum_i b_i k_i` with `k_i ~ c_i k` and conj(c_i) folded into the queries.

    b = conj(u) sqrt(w), c = u / sqrt(w) for the top eigenvector u of `diag(w)^1/2 K diag(w)^1/2`; the free scale of
    each plane keeps the shared head at its members' mean energy. Unrotated channels are shared as values are.
    """
    rotary_dim = heads.traits.rotary_dim
    rows, queries = extended(heads.k, heads.k_bias), extended(heads.q, heads.q_bias)
    row_planes, row_rest = planes(rows, rotary_dim), rows[:, rotary_dim:]
    query_planes, query_rest = planes(queries, rotary_dim).clone(), queries[:, rotary_dim:].clone()
    untouched = torch.tensor([len(group) == 1 for group in groups], device=rows.device)
    new_planes, new_rest = [], []
    for group in groups:
        combine, restore = _plane_factors(moments, group)
        mix, unmix = _rest_factors(moments, group)
        members = torch.tensor(group, device=rows.device)
        new_planes.append(torch.einsum("fi,ifD->fD", combine, row_planes[members]))
        new_rest.append(torch.einsum("iab,ibD->aD", mix, row_rest[members]))
        for query, head in enumerate(heads.key_map):
            if len(group) > 1 and head in group:
                i = group.index(head)
                query_planes[query] = query_planes[query] * restore[:, i, None].conj()
                query_rest[query] = unmix[i].mT @ query_rest[query]
    merged = from_planes(torch.stack(new_planes), torch.stack(new_rest))
    alone = torch.tensor([group[0] for group in groups], device=rows.device)
    merged = torch.where(untouched[:, None, None], rows[alone], merged)
    folded = from_planes(query_planes, query_rest)
    return replace(
        heads,
        k=merged[..., :-1].to(heads.k.dtype),
        k_bias=None if heads.k_bias is None else merged[..., -1].to(heads.k.dtype),
        q=folded[..., :-1].to(heads.q.dtype),
        q_bias=None if heads.q_bias is None else folded[..., -1].to(heads.q.dtype),
        key_map=compose(heads.key_map, tuple(groups)),
    )


def choose_keys(heads: AttentionHeads, moments: HeadMoments, groups: Sequence[Group]) -> AttentionHeads:
    """Let the most central key head of each group stand for all: what remains when a norm follows the projection.

    A norm over all heads divides by the size of the keys that are left; their gains make up for it, on average.
    """
    chosen = []
    for group in groups:
        costs = _stand_in_costs(moments, group)
        chosen.append(group[costs.index(min(costs))])
    index = torch.tensor(chosen, device=heads.k.device)
    gain = heads.k_norm
    if gain is not None and gain.dim() == 2:
        left, before = moments.key_energy[index].mean(), moments.key_energy.mean()
        gain = gain[index] * (left / before.clamp_min(1e-300)).sqrt()
    return replace(
        heads,
        k=heads.k[index],
        k_bias=None if heads.k_bias is None else heads.k_bias[index],
        k_norm=gain,
        key_map=compose(heads.key_map, tuple(groups)),
    )


def _plane_factors(moments: HeadMoments, group: Group) -> tuple[Complex[Tensor, "F g"], Complex[Tensor, "F g"]]:
    """The factors b (combine members) and c (restore a member) of every rotary plane."""
    index = torch.tensor(group, device=moments.key_planes.device)
    gram = moments.key_planes[:, index][:, :, index]
    energy = moments.query_planes[:, index].clamp_min(0)
    energy = energy.maximum(RELATIVE_FLOOR * energy.amax(1, keepdim=True).clamp_min(1e-300)).sqrt()
    top = torch.linalg.eigh(energy[:, :, None] * gram * energy[:, None, :])[1][..., -1]
    combine, restore = top.conj() * energy, top / energy
    shared_energy = torch.einsum("fi,fij,fj->f", combine, gram, combine.conj()).real
    member_energy = torch.diagonal(gram, dim1=1, dim2=2).real.mean(1)
    scale = (shared_energy / member_energy.clamp_min(1e-300)).clamp_min(1e-300).sqrt()[:, None]
    return combine / scale, restore * scale


def _rest_factors(moments: HeadMoments, group: Group) -> tuple[Float[Tensor, "g r r"], Float[Tensor, "g r r"]]:
    """The matrices that combine, and restore, the unrotated channels of a group's keys."""
    width = moments.key_rest.shape[1]
    if width == 0:
        empty = moments.key_rest.new_zeros(len(group), 0, 0)
        return empty, empty
    root, inverse = root_and_inverse(moments.query_rest)
    top = torch.linalg.eigh(block(weighted(moments.key_rest, root), group))[1][:, -width:].unflatten(0, (-1, width))
    index = torch.tensor(group, device=top.device)
    combine, restore = top.mT @ root[index], inverse[index] @ top
    # Any orthogonal-free scale keeps the product; this one gives the shared channels the members' mean energy.
    shared = torch.einsum("iab,ibjc,jac->", combine, moments.key_rest[index][:, :, index], combine)
    member = torch.einsum("iaia->", moments.key_rest[index][:, :, index]) / len(group)
    scale = (shared / member.clamp_min(1e-300)).clamp_min(1e-300).sqrt()
    return combine / scale, restore * scale


def _stand_in_costs(moments: HeadMoments, group: Group) -> list[float]:
    """For each member, `sum_i E|q_i|^2 E|k_i - k_member|^2`: the cost of letting it stand for the group."""
    index = torch.tensor(group, device=moments.key_planes.device)
    gram = moments.key_planes[:, index][:, :, index]
    own = torch.diagonal(gram, dim1=1, dim2=2).real  # F, g
    distance = own[:, :, None] + own[:, None, :] - 2 * gram.real  # |k_i - k_j|^2 per plane
    costs = torch.einsum("fi,fij->j", moments.query_planes[:, index], distance)
    if moments.key_rest.numel():
        rest = moments.key_rest[index][:, :, index]
        for j in range(len(group)):
            difference = rest[range(len(group)), :, range(len(group))] + rest[j, :, j] - 2 * _symmetric(rest[:, :, j])
            costs[j] += torch.einsum("iab,iab->", moments.query_rest[index], difference)
    return costs.tolist()


def _symmetric(matrices: Float[Tensor, "g r r"]) -> Float[Tensor, "g r r"]:
    return (matrices + matrices.mT) / 2
