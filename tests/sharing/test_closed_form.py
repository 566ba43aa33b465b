"""The closed form: lossless where sharing can be, never worse than rotating and averaging, and priced exactly."""

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.testing import assert_close

from headfuse.checkpoints.heads import AttentionHeads
from headfuse.planning.grouping import Group, HeadGroups
from headfuse.sharing.closed_form import closed_form, key_price, value_price
from headfuse.sharing.mean_pool import mean_pool
from headfuse.sharing.procrustes import head_grams, procrustes
from headfuse.statistics.moments import from_planes, planes
from strategies import (
    HeadCase,
    attention_output,
    cases_with_groups,
    head_cases,
    project,
    random_heads,
    random_input,
    seeded,
    with_copies,
)

EXACT = {"atol": 1e-8, "rtol": 1e-8}
SEEDS = st.integers(0, 2**16)


def singles(heads: AttentionHeads) -> HeadGroups:
    return HeadGroups(
        tuple((h,) for h in range(heads.num_key_heads)), tuple((h,) for h in range(heads.num_value_heads))
    )


def value_residual(old: AttentionHeads, new: AttentionHeads, x: torch.Tensor) -> float:
    """`E sum_h |W_O,h v - W_O,h' v'|^2`, on activations."""

    def written(heads):
        value = project(heads.v, heads.v_bias, x)[list(heads.value_map)]
        return torch.einsum("hDa,hTa->hTD", heads.o.double(), value)

    return (written(old) - written(new)).pow(2).sum((0, 2)).mean().item()


def key_residual(old: AttentionHeads, new: AttentionHeads, x: torch.Tensor) -> float:
    """Squared error of every query's product with every key, plane by plane, at independent tokens.

    What is folded into the queries leaves `E|q|^2 E|k - c k'|^2`: the metric of the price.
    """

    def products(heads):
        width = heads.traits.rotary_dim
        query = project(heads.q, heads.q_bias, x)
        key = project(heads.k, heads.k_bias, x)[list(heads.key_map)]
        half = width // 2
        turning = [torch.complex(rows[..., :half], rows[..., half:width]) for rows in (query, key)]
        rest = query[..., width:] @ key[..., width:].mT
        return torch.einsum("htf,hsf->htsf", turning[0].conj(), turning[1]), rest

    (planar, rest), (new_planar, new_rest) = products(old), products(new)
    return ((planar - new_planar).abs().pow(2).sum((0, 3)) + (rest - new_rest).pow(2).sum(0)).mean().item()


def scale(case: HeadCase) -> float:
    """The size of what the residuals are differences of."""
    nothing = replace(case.heads, v=case.heads.v * 0, k=case.heads.k * 0)
    nothing = replace(
        nothing,
        v_bias=None if nothing.v_bias is None else nothing.v_bias * 0,
        k_bias=None if nothing.k_bias is None else nothing.k_bias * 0,
    )
    return value_residual(case.heads, nothing, case.x) + key_residual(case.heads, nothing, case.x)


@given(cases_with_groups())
def test_no_method_leaves_a_smaller_residual_on_the_same_groups(drawn):
    case, groups = drawn
    ours = closed_form(case.heads, case.moments, groups)
    grams = head_grams(case.moments, case.statistics, "dist")
    others = [
        procrustes(case.heads, case.moments, grams, groups),
        procrustes(case.heads, case.moments, grams, groups, restore_norm=True),
        mean_pool(case.heads, case.moments, groups),
    ]
    rounding = 1e-9 * scale(case)
    for residual in (value_residual, key_residual):
        least = residual(case.heads, ours, case.x)
        for other in others:
            assert least <= residual(case.heads, other, case.x) + rounding


@given(cases_with_groups())
def test_a_price_is_the_residual_of_the_shared_head(drawn):
    case, groups = drawn
    shared = closed_form(case.heads, case.moments, groups)
    values, keys = value_price(case.moments), key_price(case.moments)
    tight = {"rel": 1e-6, "abs": 1e-9 * scale(case)}
    assert sum(map(values, groups.values)) == pytest.approx(value_residual(case.heads, shared, case.x), **tight)
    assert sum(map(keys, groups.keys)) == pytest.approx(key_residual(case.heads, shared, case.x), **tight)


@given(head_cases(), st.data())
def test_a_larger_group_never_costs_less(case, data):
    for price, count in (
        (value_price(case.moments), case.heads.num_value_heads),
        (key_price(case.moments), case.heads.num_key_heads),
    ):
        group = tuple(range(data.draw(st.integers(1, count))))
        assert price(group) <= price(tuple(range(count))) * (1 + 1e-9) + 1e-12
        assert price((count - 1,)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("qk_norm", ["none", "head", "all"])
@pytest.mark.parametrize("rotary_dim", [0, 4, 8])
def test_heads_alone_stay_bit_for_bit(dtype, qk_norm, rotary_dim):
    heads = random_heads(seeded(0), bias=True, qk_norm=qk_norm, rotary_dim=rotary_dim, dtype=dtype)
    case = HeadCase(heads, random_input(seeded(1), heads.hidden_size))
    shared = closed_form(heads, case.moments, singles(heads))
    for name, tensor in vars(heads).items():
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(getattr(shared, name), tensor), name
            assert getattr(shared, name).dtype == dtype
    assert (shared.key_map, shared.value_map) == (heads.key_map, heads.value_map)


def test_a_head_alone_beside_a_group_stays_bit_for_bit():
    heads = random_heads(seeded(0), bias=True, rotary_dim=4, dtype=torch.float32)
    case = HeadCase(heads, random_input(seeded(1), heads.hidden_size))
    groups = HeadGroups(((0, 3), (1,), (2,)), ((0,), (1, 2, 3)))
    shared = closed_form(heads, case.moments, groups)
    assert torch.equal(shared.k[1:], heads.k[1:3])
    assert torch.equal(shared.q[1:3], heads.q[1:3])
    assert torch.equal(shared.v[0], heads.v[0])
    assert torch.equal(shared.o[0], heads.o[0])


@given(cases_with_groups())
def test_merging_identical_heads_is_lossless(drawn):
    case, groups = drawn
    copies = HeadCase(with_copies(case.heads, groups), case.x)
    shared = closed_form(copies.heads, copies.moments, groups)
    assert_close(attention_output(shared, case.x), attention_output(copies.heads, case.x), **EXACT)


def disguised(heads: AttentionHeads, seed: int) -> AttentionHeads:
    """Every value head behind an invertible matrix, every key plane behind a complex factor, the rest as values."""
    generator, width = seeded(seed), heads.traits.rotary_dim

    def matrices(count: int, size: int) -> torch.Tensor:
        noise = torch.randn(count, size, size, generator=generator, dtype=torch.float64)
        return torch.eye(size, dtype=torch.float64) + 0.3 * noise / max(size, 1) ** 0.5

    def extended(weight, bias):
        return torch.cat([weight, (torch.zeros_like(weight[..., 0]) if bias is None else bias).unsqueeze(-1)], -1)

    key = extended(heads.k, heads.k_bias)
    factors = torch.randn(heads.num_key_heads, width // 2, 1, generator=generator, dtype=torch.complex128)
    key = from_planes(
        planes(key, width) * (factors + 0.5),
        matrices(heads.num_key_heads, heads.head_dim - width) @ key[:, width:],
    )
    value = matrices(heads.num_value_heads, heads.head_dim) @ extended(heads.v, heads.v_bias)
    return replace(
        heads,
        k=key[..., :-1],
        v=value[..., :-1],
        k_bias=None if heads.k_bias is None else key[..., -1],
        v_bias=None if heads.v_bias is None else value[..., -1],
    )


@given(cases_with_groups(), SEEDS)
def test_heads_that_differ_by_admissible_factors_merge_without_loss(drawn, seed):
    case, groups = drawn
    alike = HeadCase(disguised(with_copies(case.heads, groups), seed), case.x)
    shared = closed_form(alike.heads, alike.moments, groups)
    assert_close(attention_output(shared, case.x), attention_output(alike.heads, case.x), atol=1e-6, rtol=1e-6)


def unit_stand_in_costs(case: HeadCase, group: Group) -> list[float]:
    """For each member the squared distance of the group's unit keys from it, every reading query alike."""
    heads, members = case.heads, list(group)
    keys = project(heads.k, heads.k_bias, case.x)[members]
    keys = keys / keys.norm(dim=-1, keepdim=True) * heads.head_dim**0.5
    readers = torch.tensor([heads.key_map.count(member) for member in members])
    return [((keys - key).pow(2).sum(-1).mean(-1) * readers).sum().item() for key in keys]


@given(cases_with_groups(qk_norm="head"))
def test_keys_behind_a_norm_are_represented_by_the_member_that_costs_least(drawn):
    case, groups = drawn
    shared = closed_form(case.heads, case.moments, groups)
    assert torch.equal(shared.q, case.heads.q)
    for key, group in zip(shared.k, groups.keys, strict=True):
        costs = unit_stand_in_costs(case, group)
        chosen = [cost for member, cost in zip(group, costs, strict=True) if torch.equal(key, case.heads.k[member])]
        assert chosen == [pytest.approx(min(costs), rel=1e-6, abs=1e-9)]


@given(cases_with_groups(qk_norm="all"))
def test_gains_over_all_heads_go_with_the_chosen_key(drawn):
    case, groups = drawn
    shared = closed_form(case.heads, case.moments, groups)
    assert case.heads.k_norm is not None
    assert shared.k_norm is not None
    members = [next(i for i, source in enumerate(case.heads.k) if torch.equal(source, key)) for key in shared.k]
    ratio = shared.k_norm / case.heads.k_norm[members]
    assert_close(ratio, ratio[:1, :1].expand_as(ratio))


@given(head_cases(qk_norm="head"))
def test_the_price_behind_a_norm_is_that_of_the_best_stand_in_for_unit_keys(case):
    group = tuple(range(case.heads.num_key_heads))
    price = key_price(case.moments, movable=False)
    assert price(group) == pytest.approx(min(unit_stand_in_costs(case, group)), rel=1e-6, abs=1e-9)


def gained(heads: AttentionHeads, x: torch.Tensor) -> AttentionHeads:
    """Queries times their gains, keys too and over their size, all heads and tokens together."""
    assert heads.q_norm is not None
    assert heads.k_norm is not None
    size = project(heads.k, heads.k_bias, x).pow(2).mean().sqrt()
    gains = {"q": heads.q_norm, "k": heads.k_norm / size}
    biases = {
        f"{name}_bias": bias * gains[name] for name in gains if (bias := getattr(heads, f"{name}_bias")) is not None
    }
    return replace(heads, q=heads.q * gains["q"][..., None], k=heads.k * gains["k"][..., None], **biases)


@given(cases_with_groups(qk_norm="all"))
def test_the_price_behind_a_norm_over_all_heads_is_the_residual_of_the_chosen_keys(drawn):
    case, groups = drawn
    shared = closed_form(case.heads, case.moments, groups)
    price = sum(map(key_price(case.moments, movable=False), groups.keys))
    residual = key_residual(gained(case.heads, case.x), gained(shared, case.x), case.x)
    energy = project(case.heads.k, case.heads.k_bias, case.x).pow(2).mean().item()
    assert price == pytest.approx(residual * energy, rel=1e-6, abs=1e-9 * scale(case))


def test_copies_behind_a_norm_over_all_heads_are_shared_without_loss_whatever_their_size():
    heads = random_heads(seeded(0), qk_norm="all")
    turned = torch.linalg.qr(torch.randn(4, 8, 8, generator=seeded(1), dtype=torch.float64))[0] @ heads.k[0]
    sizes = torch.tensor([2.0, 2.0, 1.0, 0.5], dtype=torch.float64)[:, None, None]
    copies = with_copies(replace(heads, k=sizes * turned), HeadGroups(((0, 1), (2,), (3,)), singles(heads).values))
    case = HeadCase(copies, random_input(seeded(2), heads.hidden_size))
    shared = closed_form(copies, case.moments, HeadGroups(((0, 1), (2,), (3,)), singles(heads).values))
    assert_close(attention_output(shared, case.x), attention_output(copies, case.x), atol=1e-5, rtol=1e-5)


@given(cases_with_groups(), st.randoms(use_true_random=False))
def test_order_of_groups_and_members_does_not_matter(drawn, random):
    case, groups = drawn

    def shuffled(kind):
        return tuple(tuple(random.sample(group, len(group))) for group in random.sample(kind, len(kind)))

    other = HeadGroups(shuffled(groups.keys), shuffled(groups.values))
    outputs = [attention_output(closed_form(case.heads, case.moments, g), case.x) for g in (groups, other)]
    assert_close(outputs[0], outputs[1], atol=1e-6, rtol=1e-6)


@given(cases_with_groups())
def test_a_shared_key_keeps_its_members_mean_energy(drawn):
    case, groups = drawn
    width = case.heads.traits.rotary_dim
    shared = closed_form(case.heads, case.moments, groups)

    def energies(heads):
        key = project(heads.k, heads.k_bias, case.x)
        half = width // 2
        planar = key[..., :half].pow(2) + key[..., half:width].pow(2)
        return torch.cat([planar.mean(1), key[..., width:].pow(2).sum(-1).mean(1, keepdim=True)], dim=1)

    old = energies(case.heads)
    assert_close(energies(shared), torch.stack([old[list(group)].mean(0) for group in groups.keys]))


@given(head_cases(), SEEDS)
def test_the_scale_of_a_member_does_not_change_what_is_computed(case, seed):
    """Larger values behind smaller output columns, and larger keys behind smaller queries, are the same heads."""
    heads = case.heads
    assume(heads.num_key_heads == heads.num_value_heads == heads.num_query_heads)
    factors = torch.rand(heads.num_query_heads, generator=seeded(seed), dtype=torch.float64) * 4 + 0.2
    larger, smaller = factors[:, None, None], 1 / factors[:, None, None]
    scaled = replace(heads, v=heads.v * larger, o=heads.o * smaller, k=heads.k * larger, q=heads.q * smaller)
    for name, by in (("q_bias", smaller), ("k_bias", larger), ("v_bias", larger)):
        if (bias := getattr(heads, name)) is not None:
            scaled = replace(scaled, **{name: bias * by[..., 0]})
    everyone = tuple(range(heads.num_query_heads))
    groups = HeadGroups((everyone,), (everyone,))
    other = HeadCase(scaled, case.x)
    outputs = [attention_output(closed_form(c.heads, c.moments, groups), case.x) for c in (case, other)]
    assert_close(outputs[0], outputs[1], atol=1e-6, rtol=1e-6)


def test_dead_heads_are_shared_without_nan():
    heads = random_heads(seeded(0), rotary_dim=4)
    alive = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)[:, None, None]
    dead = replace(heads, k=heads.k * alive, q=heads.q * alive, v=heads.v * alive, o=heads.o * alive)
    case = HeadCase(dead, random_input(seeded(1), heads.hidden_size))
    for group in ((0, 1), (1, 3)):
        others = tuple((h,) for h in range(4) if h not in group)
        groups = HeadGroups((group, *others), (group, *others))
        shared = closed_form(dead, case.moments, groups)
        assert_close(attention_output(shared, case.x), attention_output(dead, case.x), **EXACT)
