"""Alignment: rotations keep the model, agree with Procrustes on activations, and bring copies back together."""

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headfuse.planning.grouping import HeadGroups, contiguous_groups, group_heads
from headfuse.sharing.mean_pool import mean_pool
from headfuse.sharing.procrustes import (
    Rotations,
    align,
    aligned_moments,
    group_rotations,
    head_grams,
    procrustes,
    procrustes_price,
    similarity,
)
from headfuse.statistics.moments import from_planes, head_moments, planes
from strategies import (
    HeadCase,
    attention_output,
    cases_with_groups,
    head_cases,
    project,
    random_heads,
    random_input,
    rope,
    seeded,
    with_copies,
)

SEEDS = st.integers(0, 2**16)
CRITERIA = st.sampled_from(["dist", "cos"])


def grams_of(case: HeadCase, criterion="dist"):
    return head_grams(case.moments, case.statistics, criterion)


def together(case: HeadCase) -> HeadGroups:
    return HeadGroups((tuple(range(case.heads.num_key_heads)),), (tuple(range(case.heads.num_value_heads)),))


def activations(case: HeadCase, criterion: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `[n, T, d]` as the criterion sees them."""
    key = project(case.heads.k, case.heads.k_bias, case.x)
    value = project(case.heads.v, case.heads.v_bias, case.x)
    if criterion == "cos":
        key, value = (y / y.norm(dim=-1, keepdim=True) for y in (key, value))
    return key, value


def best_rotation(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Orthogonal Procrustes on the data: Q in O(d) with least |source Q - target|."""
    left, _, right = torch.linalg.svd(source.mT @ target)
    return left @ right


def best_key_rotation(source: torch.Tensor, target: torch.Tensor, rotary_dim: int) -> torch.Tensor:
    """As the official code: an SVD per plane with its determinant fixed, and a full one for the unrotated channels."""
    width = source.shape[1]
    rotation = torch.zeros(width, width, dtype=torch.float64)
    for f in range(rotary_dim // 2):
        pair = [f, f + rotary_dim // 2]
        left, _, right = torch.linalg.svd(source[:, pair].mT @ target[:, pair])
        if torch.linalg.det(left @ right) < 0:
            left[:, -1] *= -1
        rotation[pair[0], pair], rotation[pair[1], pair] = left @ right
    rest = list(range(rotary_dim, width))
    if rest:
        rotation[rotary_dim:, rotary_dim:] = best_rotation(source[:, rest], target[:, rest])
    return rotation


def generalised(rows: torch.Tensor, fit) -> torch.Tensor:
    """The official iteration on activations `[g, T, d]`, stopped on the trace objective per token."""
    rotations = torch.stack([torch.eye(rows.shape[-1], dtype=torch.float64), *(fit(r, rows[0]) for r in rows[1:])])
    if len(rows) == 2:
        return rotations
    energy, reached = rows.pow(2).sum().item(), -float("inf")
    for _ in range(100):
        mean = (rows @ rotations).mean(0)
        rotations = torch.stack([fit(r, mean) for r in rows])
        turned = rows @ rotations
        objective = sum((turned[i] * turned[j]).sum().item() for i, j in combinations(range(len(rows)), 2))
        if objective - reached < 1e-5 * energy / len(rows):
            break
        reached = objective
    return rotations


def key_matrices(rotations: Rotations) -> torch.Tensor:
    """Key rotations `[K, d, d]` in row form, read off by rotating the identity's rows."""
    num_planes, rest = rotations.key_planes.shape[1], rotations.key_rest.shape[1]
    width = 2 * num_planes + rest
    unit = torch.eye(width, dtype=torch.float64)
    turned = []
    for phases, matrix in zip(rotations.key_planes, rotations.key_rest, strict=True):
        plane = planes(unit.unsqueeze(0), 2 * num_planes) * phases.unsqueeze(-1)
        turned.append(from_planes(plane, (matrix.mT @ unit[2 * num_planes :]).unsqueeze(0))[0].mT)
    return torch.stack(turned)


@given(head_cases(), SEEDS)
def test_folding_rotations_keeps_the_attention_output(case, seed):
    rotations = Rotations.random(case.heads, seeded(seed))
    turned = align(case.heads, rotations)
    assert not torch.allclose(turned.v, case.heads.v)
    torch.testing.assert_close(
        attention_output(turned, case.x), attention_output(case.heads, case.x), rtol=1e-10, atol=1e-10
    )


@given(head_cases(), SEEDS)
def test_rotated_moments_are_the_moments_of_rotated_heads(case, seed):
    rotations = Rotations.random(case.heads, seeded(seed))
    expected = head_moments(align(case.heads, rotations), case.statistics)
    for name, tensor in vars(aligned_moments(case.moments, rotations)).items():
        torch.testing.assert_close(tensor, getattr(expected, name), msg=lambda text, name=name: f"{name}: {text}")


@given(head_cases(), SEEDS)
def test_key_rotations_commute_with_rope(case, seed):
    rotary_dim = case.heads.traits.rotary_dim
    key = project(case.heads.k, case.heads.k_bias, case.x)
    matrices = key_matrices(Rotations.random(case.heads, seeded(seed)))
    torch.testing.assert_close(rope(key @ matrices, rotary_dim), rope(key, rotary_dim) @ matrices)


def test_a_reflected_plane_does_not_commute_with_rope():
    key = torch.randn(1, 16, 4, generator=seeded(0), dtype=torch.float64)
    reflection = torch.diag(torch.tensor([1.0, 1.0, -1.0, 1.0], dtype=torch.float64))
    assert (rope(key @ reflection, 4) - rope(key, 4) @ reflection).abs().max() > 0.1


@given(head_cases(), CRITERIA, st.booleans())
def test_similarity_equals_procrustes_on_activations(case, criterion, movable):
    key, value = activations(case, criterion)
    rotary_dim = case.heads.traits.rotary_dim
    for item, rows, fit in (
        ("value", value, best_rotation),
        ("key", key, lambda a, b: best_key_rotation(a, b, rotary_dim)),
    ):
        found = similarity(grams_of(case, criterion), item, movable=movable)
        expected = torch.zeros_like(found)
        for i, j in combinations(range(len(rows)), 2):
            turned = rows[i] @ fit(rows[i], rows[j]) if movable else rows[i]
            if criterion == "cos":
                score = (turned * rows[j]).sum(-1).mean()
            else:
                score = -(turned - rows[j]).pow(2).sum(-1).mean()
            expected[i, j] = expected[j, i] = score
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


@given(cases_with_groups(), CRITERIA)
def test_rotations_equal_generalised_procrustes_on_activations(drawn, criterion):
    case, groups = drawn
    key, value = activations(case, criterion)
    rotary_dim = case.heads.traits.rotary_dim
    rotations = group_rotations(grams_of(case, criterion), groups)
    keys = key_matrices(rotations)
    for group in groups.values:
        expected = generalised(value[list(group)], best_rotation)
        torch.testing.assert_close(rotations.values[list(group)], expected, rtol=1e-6, atol=1e-6)
    for group in groups.keys:
        expected = generalised(key[list(group)], lambda a, b: best_key_rotation(a, b, rotary_dim))
        torch.testing.assert_close(keys[list(group)], expected, rtol=1e-6, atol=1e-6)


@given(cases_with_groups(), CRITERIA)
def test_rotations_are_orthogonal_and_single_heads_keep_the_identity(drawn, criterion):
    case, groups = drawn
    rotations = group_rotations(grams_of(case, criterion), groups)
    for matrices in (rotations.values, key_matrices(rotations)):
        torch.testing.assert_close(matrices @ matrices.mT, torch.eye(matrices.shape[-1]).double().expand_as(matrices))
    for group in groups.values:
        if len(group) < 3:
            assert torch.equal(rotations.values[group[0]], torch.eye(case.heads.head_dim).double())


@given(cases_with_groups(), SEEDS, CRITERIA, st.booleans())
def test_merging_rotated_copies_is_lossless(drawn, seed, criterion, restore_norm):
    case, groups = drawn
    copies = with_copies(case.heads, groups)
    turned = HeadCase(align(copies, Rotations.random(copies, seeded(seed))), case.x)
    merged = procrustes(turned.heads, turned.moments, grams_of(turned, criterion), groups, restore_norm=restore_norm)
    assert (merged.num_key_heads, merged.num_value_heads) == (len(groups.keys), len(groups.values))
    torch.testing.assert_close(attention_output(merged, case.x), attention_output(copies, case.x), rtol=1e-7, atol=1e-7)


@given(head_cases(), SEEDS)
def test_rotated_copies_are_as_similar_as_can_be(case, seed):
    copies = with_copies(case.heads, together(case))
    turned = HeadCase(align(copies, Rotations.random(copies, seeded(seed))), case.x)
    for item, count in (("key", case.heads.num_key_heads), ("value", case.heads.num_value_heads)):
        cosine = similarity(grams_of(turned, "cos"), item)
        torch.testing.assert_close(cosine, 1 - torch.eye(count, dtype=torch.float64))
        distance = similarity(grams_of(turned, "dist"), item)
        torch.testing.assert_close(distance, torch.zeros_like(distance), rtol=0, atol=1e-9)


@given(head_cases(), SEEDS, CRITERIA)
def test_similarity_does_not_see_rotations(case, seed, criterion):
    turned = HeadCase(align(case.heads, Rotations.random(case.heads, seeded(seed))), case.x)
    for item in ("key", "value"):
        scores = [similarity(grams_of(c, criterion), item) for c in (case, turned)]
        assert torch.equal(scores[0], scores[0].mT)
        torch.testing.assert_close(scores[0], scores[1])


@given(cases_with_groups(), CRITERIA)
def test_order_of_groups_does_not_matter(drawn, criterion):
    case, groups = drawn
    other = HeadGroups(groups.keys[::-1], groups.values[::-1])
    outputs = [
        attention_output(procrustes(case.heads, case.moments, grams_of(case, criterion), g), case.x)
        for g in (groups, other)
    ]
    torch.testing.assert_close(outputs[0], outputs[1])


@given(head_cases(), CRITERIA)
def test_order_within_a_pair_does_not_matter(case, criterion):
    pairs = [contiguous_groups(n, (n + 1) // 2) for n in (case.heads.num_key_heads, case.heads.num_value_heads)]
    groups = HeadGroups(*pairs)
    other = HeadGroups(*(tuple(group[::-1] for group in kind) for kind in pairs))
    outputs = [
        attention_output(procrustes(case.heads, case.moments, grams_of(case, criterion), g), case.x)
        for g in (groups, other)
    ]
    torch.testing.assert_close(outputs[0], outputs[1])


@given(cases_with_groups())
def test_restored_heads_have_their_members_mean_energy(drawn):
    case, groups = drawn
    merged = procrustes(case.heads, case.moments, grams_of(case), groups, restore_norm=True)
    key, value = activations(case, "dist")
    new = HeadCase(merged, case.x)
    for kind, source, shared in zip((groups.keys, groups.values), (key, value), activations(new, "dist"), strict=True):
        expected = [source[list(group)].pow(2).sum(-1).mean() for group in kind]
        torch.testing.assert_close(shared.pow(2).sum(-1).mean(-1), torch.stack(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_alone_stay_bit_for_bit(dtype):
    heads = random_heads(seeded(0), bias=True, rotary_dim=4, dtype=dtype)
    case = HeadCase(heads, random_input(seeded(1), heads.hidden_size))
    alone = contiguous_groups(4, 4)
    merged = procrustes(heads, case.moments, grams_of(case), HeadGroups(alone, alone), restore_norm=True)
    for name, tensor in vars(heads).items():
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(getattr(merged, name), tensor), name
            assert getattr(merged, name).dtype == dtype


@given(st.sampled_from(["head", "all"]).flatmap(lambda norm: cases_with_groups(qk_norm=norm)))
def test_keys_behind_a_norm_are_pooled_without_rotation(drawn):
    case, groups = drawn
    merged = procrustes(case.heads, case.moments, grams_of(case), groups)
    plain = mean_pool(case.heads, case.moments, groups)
    assert torch.equal(merged.k, plain.k)
    assert torch.equal(merged.q, case.heads.q)
    assert torch.equal(merged.k_norm, plain.k_norm)
    turned = align(case.heads, Rotations.random(case.heads, seeded(0)))
    torch.testing.assert_close(attention_output(turned, case.x), attention_output(case.heads, case.x))


@given(head_cases(), CRITERIA, st.sampled_from(["key", "value"]))
def test_price_is_minus_the_sum_of_pair_similarities(case, criterion, item):
    score = similarity(grams_of(case, criterion), item)
    price = procrustes_price(grams_of(case, criterion), item)
    group = tuple(range(len(score)))
    assert price(group) == pytest.approx(-score.triu(1).sum().item())
    assert price(group[:1]) == 0.0


def test_grouping_by_no_item_keeps_the_original_order():
    case = HeadCase(random_heads(seeded(0), num_query_heads=12), random_input(seeded(1), 20))
    price = procrustes_price(grams_of(case), "none")
    for count in (2, 4, 6):
        groups = group_heads(12, count, price, equal_sizes=True, generator=seeded(0))
        assert groups == contiguous_groups(12, count)


def test_dead_heads_do_not_break_alignment():
    heads = random_heads(seeded(0), rotary_dim=4)
    heads.k[1].zero_()
    heads.v[1].zero_()
    case = HeadCase(heads, random_input(seeded(1), heads.hidden_size))
    merged = procrustes(heads, case.moments, grams_of(case), together(case), restore_norm=True)
    assert torch.isfinite(attention_output(merged, case.x)).all()
