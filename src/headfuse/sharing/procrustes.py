"""Align heads before merging them (arXiv 2412.20677): rotations that leave the model alone and bring heads together.

Everything follows from Grams (papers/align.md 1.7), never from stored keys and values. Value heads may turn by any
orthogonal matrix; under rotary positions a key head may turn only within its planes, which is a unit complex number
per plane, and by any orthogonal matrix in its unrotated channels. Row convention: `v' = v Q`, so `W' = Q^T W`.
"""

from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from headfuse.checkpoints.heads import AttentionHeads, extended
from headfuse.planning.grouping import Group, HeadGroups, Price
from headfuse.sharing.mean_pool import mean_pool
from headfuse.statistics.moments import HeadMoments, LayerStatistics, from_planes, planes

Criterion = Literal["dist", "cos"]
Item = Literal["key", "value", "none"]

TOLERANCE = 1e-5
MAX_ITERATIONS = 100


@dataclass(frozen=True)
class HeadGrams:
    """The Grams that alignment reads, per token: of raw rows ("dist") or of rows scaled to unit length ("cos")."""

    criterion: Criterion
    values: Float[Tensor, "V d V d"]
    key_planes: Complex[Tensor, "F K K"]
    key_rest: Float[Tensor, "K r K r"]


@dataclass(frozen=True)
class Rotations:
    """One admissible rotation a head: `v' = v Q` orthogonal, key planes `k' = c k` with |c| = 1, the rest as values."""

    values: Float[Tensor, "V d d"]
    key_planes: Complex[Tensor, "K F"]
    key_rest: Float[Tensor, "K r r"]

    @classmethod
    def random(cls, heads: AttentionHeads, generator: torch.Generator) -> "Rotations":
        """Any admissible rotation for every head, in fp64."""
        half = heads.traits.rotary_dim // 2
        rest = heads.head_dim - 2 * half

        def orthogonal(count: int, width: int) -> Tensor:
            square = torch.randn(count, width, width, generator=generator, dtype=torch.float64)
            return torch.linalg.qr(square)[0] if width else square

        angles = torch.rand(heads.num_key_heads, half, generator=generator, dtype=torch.float64) * 2 * torch.pi
        return cls(
            values=orthogonal(heads.num_value_heads, heads.head_dim),
            key_planes=torch.polar(torch.ones_like(angles), angles),
            key_rest=orthogonal(heads.num_key_heads, rest),
        )


def head_grams(moments: HeadMoments, statistics: LayerStatistics, criterion: Criterion) -> HeadGrams:
    """The Grams of `criterion`: those of `moments` for "dist", the unit-row ones of `statistics` for "cos".

    "cos" needs statistics that were collected with unit rows.
    """
    if criterion == "dist":
        return HeadGrams(criterion, moments.values, moments.key_planes, moments.key_rest)
    values, key_planes, key_rest = statistics.unit_values, statistics.unit_key_planes, statistics.unit_key_rest
    assert values is not None
    assert key_planes is not None
    assert key_rest is not None
    values, key_planes = values.to(moments.values), key_planes.to(moments.key_planes)
    return HeadGrams(criterion, values, key_planes, key_rest.to(moments.key_rest))


def similarity(grams: HeadGrams, item: Literal["key", "value"], *, movable: bool = True) -> Float[Tensor, "n n"]:
    """Pairwise similarity of heads after the best rotation of one onto the other; symmetric, diagonal 0 (1.4).

    "cos": the mean cosine of two heads' rows, at most 1. "dist": minus their mean squared distance, at most 0. The
    optimum of `tr(Q^T G_ij)` is the nuclear norm of the Gram block, and `|G_ij|` in a rotary plane (1.7). Heads that
    are not `movable` (keys behind a q/k norm) are compared as they are, by the trace of the block.
    """
    phases, matrices = (grams.key_planes, grams.key_rest) if item == "key" else (_none(grams), grams.values)
    num_heads = len(matrices)
    first, second = torch.triu_indices(num_heads, num_heads, 1, device=matrices.device)
    if movable:
        best = phases[:, first, second].abs().sum(0)
        if first.numel() and matrices.shape[1]:
            best = best + torch.linalg.svdvals(matrices.transpose(1, 2)[first, second]).sum(-1)
    else:
        best = (phases.real.sum(0) + torch.einsum("iaja->ij", matrices))[first, second]
    if grams.criterion == "dist":
        energy = torch.einsum("fii->i", phases).real + torch.einsum("iaia->i", matrices)
        best = 2 * best - energy[first] - energy[second]
    scores = matrices.new_zeros(num_heads, num_heads)
    scores[first, second] = scores[second, first] = best
    return scores


def procrustes_price(grams: HeadGrams, item: Item, *, movable: bool = True) -> Price:
    """Price of a group: minus the sum of its pairs' similarities (1.5). "none" is cheapest for neighbouring heads."""
    if item == "none":
        return lambda group: float(max(group) - min(group) + 1 - len(group))
    score = similarity(grams, item, movable=movable).tolist()
    return lambda group: -sum(score[i][j] for i, j in combinations(group, 2))


def group_rotations(grams: HeadGrams, groups: HeadGroups, *, keys: bool = True) -> Rotations:
    """Generalised Procrustes inside every group (1.6); heads alone, and keys unless `keys`, keep the identity."""
    num_planes, num_keys, _ = grams.key_planes.shape
    width, rest = grams.values.shape[1], grams.key_rest.shape[1]
    values = torch.eye(width).to(grams.values).repeat(len(grams.values), 1, 1)
    key_planes = torch.ones(num_keys, num_planes).to(grams.key_planes)
    key_rest = torch.eye(rest).to(grams.key_rest).repeat(num_keys, 1, 1)
    for group in groups.values:
        values[list(group)] = _generalised(_none(grams), grams.values, group)[1]
    for group in groups.keys if keys else ():
        key_planes[list(group)], key_rest[list(group)] = _generalised(grams.key_planes, grams.key_rest, group)
    return Rotations(values, key_planes, key_rest)


def align(heads: AttentionHeads, rotations: Rotations) -> AttentionHeads:
    """Fold the rotations into v and o, and into k and q, biases too (1.2); the function of the layer stays the same.

    All query heads that read a head turn with it. A q/k norm does not commute with a rotation, so behind one the
    keys stay as they are. Elementwise clipping commutes with none: then the fold is exact only for unclipped rows.
    """
    value = torch.einsum("nab,naD->nbD", rotations.values, extended(heads.v, heads.v_bias))
    output = torch.einsum("hDa,hab->hDb", heads.o.double(), rotations.values[list(heads.value_map)])
    heads = replace(
        heads,
        v=value[..., :-1].to(heads.v.dtype),
        v_bias=None if heads.v_bias is None else value[..., -1].to(heads.v_bias.dtype),
        o=output.to(heads.o.dtype),
    )
    if heads.traits.qk_norm != "none":
        return heads
    reading = list(heads.key_map)
    key = _turned(extended(heads.k, heads.k_bias), rotations.key_planes, rotations.key_rest)
    query = _turned(extended(heads.q, heads.q_bias), rotations.key_planes[reading], rotations.key_rest[reading])
    return replace(
        heads,
        k=key[..., :-1].to(heads.k.dtype),
        q=query[..., :-1].to(heads.q.dtype),
        k_bias=None if heads.k_bias is None else key[..., -1].to(heads.k_bias.dtype),
        q_bias=None if heads.q_bias is None else query[..., -1].to(heads.q_bias.dtype),
    )


def aligned_moments(moments: HeadMoments, rotations: Rotations) -> HeadMoments:
    """The moments of `align(heads, rotations)` from those of `heads`."""
    value, phase, rest = rotations.values, rotations.key_planes, rotations.key_rest
    return HeadMoments(
        values=torch.einsum("iab,iajc,jcd->ibjd", value, moments.values, value),
        key_planes=torch.einsum("if,fij,jf->fij", phase, moments.key_planes, phase.conj()),
        key_rest=torch.einsum("iab,iajc,jcd->ibjd", rest, moments.key_rest, rest),
        query_planes=moments.query_planes,
        query_rest=rest.mT @ moments.query_rest @ rest,
        output_metric=value.mT @ moments.output_metric @ value,
        key_energy=moments.key_energy,
    )


def procrustes(
    heads: AttentionHeads, moments: HeadMoments, grams: HeadGrams, groups: HeadGroups, *, restore_norm: bool = False
) -> AttentionHeads:
    """Rotate the members of every group onto each other, fold, then mean-pool them (1.6, 1.8).

    Deviations from the official code: biases are pooled too, and with `restore_norm` (off in the paper) a pooled head
    keeps its members' mean activation energy. Keys behind a q/k norm are pooled without rotation.
    """
    movable = heads.traits.qk_norm == "none"
    rotations = group_rotations(grams, groups, keys=movable)
    aligned = align(heads.to(torch.float64), rotations)
    pooled = mean_pool(aligned, aligned_moments(moments, rotations), groups, restore_norm=restore_norm)
    return pooled.to(heads.q.dtype)


def _none(grams: HeadGrams) -> Complex[Tensor, "0 V V"]:
    """The rotary planes of values: there are none."""
    return grams.key_planes.new_zeros(0, len(grams.values), len(grams.values))


def _turned(
    rows: Float[Tensor, "n d D"], phases: Complex[Tensor, "n F"], rest: Float[Tensor, "n r r"]
) -> Float[Tensor, "n d D"]:
    """Rotate every head's channels: its planes by their phases, its unrotated channels by `rest`."""
    rotary_dim = 2 * phases.shape[1]
    turned = planes(rows, rotary_dim) * phases.unsqueeze(-1)
    return from_planes(turned, torch.einsum("nab,naD->nbD", rest, rows[:, rotary_dim:]))


def _generalised(
    phase_grams: Complex[Tensor, "F n n"], matrix_grams: Float[Tensor, "n d n d"], group: Group
) -> tuple[Complex[Tensor, "g F"], Float[Tensor, "g d d"]]:
    """Rotations of the group's heads: first onto its first head, then from three heads on all onto their mean shape.

    Deviation (1.7): iteration stops on the growth of `sum_{i<j} tr(Q_i^T G_ij Q_j)`, in units of a head's mean
    energy, and not on the cosine, which raw Grams do not give; under "cos" the two are the same.
    """
    members, size = list(group), len(group)
    phase_gram = phase_grams[:, members][:, :, members]
    matrix_gram = matrix_grams[members][:, :, members]
    phases = _unit_phases(phase_gram[:, :, 0].mT)
    matrices = _polar(matrix_gram[:, :, 0])
    phases[0], matrices[0] = 1.0, torch.eye(matrices.shape[-1]).to(matrices)
    if size < 3:
        return phases, matrices
    energy = torch.einsum("fii->", phase_gram).real + torch.einsum("iaia->", matrix_gram)
    reached = -torch.inf
    for _ in range(MAX_ITERATIONS):
        pull_phase = torch.einsum("fij,jf->if", phase_gram, phases.conj())
        pull_matrix = torch.einsum("iajb,jbc->iac", matrix_gram, matrices)
        phases, matrices = _unit_phases(pull_phase), _polar(pull_matrix)
        objective = _agreement(phase_gram, matrix_gram, phases, matrices)
        growth, reached = objective - reached, objective
        if growth < TOLERANCE * energy.item() / size:
            break
    return phases, matrices


def _agreement(phase_gram: Tensor, matrix_gram: Tensor, phases: Tensor, matrices: Tensor) -> float:
    """`sum_{i<j} tr(Q_i^T G_ij Q_j)` up to a constant (the heads' own energies) and a factor of two removed."""
    planar = torch.einsum("if,fij,jf->", phases, phase_gram, phases.conj()).real
    return (planar + torch.einsum("iac,iajb,jbc->", matrices, matrix_gram, matrices)).item() / 2


def _unit_phases(pull: Complex[Tensor, "n F"]) -> Complex[Tensor, "n F"]:
    """The unit complex c with the greatest `Re(c z)`; 1 where z is 0."""
    return torch.where(pull == 0, torch.ones_like(pull), torch.exp(-1j * pull.angle()))


def _polar(matrices: Float[Tensor, "*n d d"]) -> Float[Tensor, "*n d d"]:
    """The orthogonal factor `U V^T`: the Q in O(d) with the greatest `tr(Q^T M)` (1.3)."""
    if matrices.numel() == 0:
        return matrices
    left, _, right = torch.linalg.svd(matrices)
    return left @ right
