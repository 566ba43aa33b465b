"""Mean pooling: plain means, lossless on copies, and at full energy when asked."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headfuse.planning.grouping import HeadGroups
from headfuse.sharing.mean_pool import mean_pool
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


def singles(case: HeadCase) -> HeadGroups:
    return HeadGroups(
        tuple((h,) for h in range(case.heads.num_key_heads)), tuple((h,) for h in range(case.heads.num_value_heads))
    )


@given(cases_with_groups())
def test_a_shared_head_is_the_mean_of_its_members(drawn):
    case, groups = drawn
    pooled = mean_pool(case.heads, case.moments, groups)
    key, value = project(pooled.k, pooled.k_bias, case.x), project(pooled.v, pooled.v_bias, case.x)
    source_key = project(case.heads.k, case.heads.k_bias, case.x)
    source_value = project(case.heads.v, case.heads.v_bias, case.x)
    for shared, group in enumerate(groups.keys):
        torch.testing.assert_close(key[shared], source_key[list(group)].mean(0))
    for shared, group in enumerate(groups.values):
        torch.testing.assert_close(value[shared], source_value[list(group)].mean(0))
    assert all(source in groups.keys[new] for source, new in zip(case.heads.key_map, pooled.key_map, strict=True))
    assert all(source in groups.values[new] for source, new in zip(case.heads.value_map, pooled.value_map, strict=True))


@pytest.mark.parametrize("restore_norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_alone_stay_bit_for_bit(restore_norm, dtype):
    heads = random_heads(seeded(0), bias=True, qk_norm="all", dtype=dtype)
    case = HeadCase(heads, random_input(seeded(1), heads.hidden_size))
    pooled = mean_pool(heads, case.moments, singles(case), restore_norm=restore_norm)
    for name, tensor in vars(heads).items():
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(getattr(pooled, name), tensor), name
            assert getattr(pooled, name).dtype == dtype
    assert (pooled.key_map, pooled.value_map) == (heads.key_map, heads.value_map)


@given(cases_with_groups(), st.booleans())
def test_merging_identical_heads_is_lossless(drawn, restore_norm):
    case, groups = drawn
    copies = HeadCase(with_copies(case.heads, groups), case.x)
    pooled = mean_pool(copies.heads, copies.moments, groups, restore_norm=restore_norm)
    torch.testing.assert_close(attention_output(pooled, case.x), attention_output(copies.heads, case.x))


@given(cases_with_groups())
def test_restored_heads_have_their_members_mean_energy(drawn):
    case, groups = drawn
    pooled = mean_pool(case.heads, case.moments, groups, restore_norm=True)

    def energies(heads) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = project(heads.k, heads.k_bias, case.x), project(heads.v, heads.v_bias, case.x)
        return key.pow(2).sum(-1).mean(-1), value.pow(2).sum(-1).mean(-1)

    for kind, new, old in zip((groups.keys, groups.values), energies(pooled), energies(case.heads), strict=True):
        expected = torch.stack([old[list(group)].mean() for group in kind])
        torch.testing.assert_close(new, expected)


def test_opposite_heads_are_not_divided_by_zero():
    heads = random_heads(seeded(0), num_query_heads=2)
    heads = replace(heads, k=torch.stack([heads.k[0], -heads.k[0]]))
    case = HeadCase(heads, random_input(seeded(1), heads.hidden_size))
    pooled = mean_pool(heads, case.moments, HeadGroups(((0, 1),), ((0,), (1,))), restore_norm=True)
    assert torch.equal(pooled.k, torch.zeros_like(pooled.k))


@given(cases_with_groups(), st.randoms(use_true_random=False))
def test_order_of_groups_and_members_does_not_matter(drawn, random):
    case, groups = drawn

    def shuffled(kind):
        return tuple(tuple(random.sample(group, len(group))) for group in random.sample(kind, len(kind)))

    other = HeadGroups(shuffled(groups.keys), shuffled(groups.values))
    outputs = [
        attention_output(mean_pool(case.heads, case.moments, g, restore_norm=True), case.x) for g in (groups, other)
    ]
    torch.testing.assert_close(outputs[0], outputs[1])


@given(head_cases(qk_norm="all"))
def test_gains_over_all_heads_are_pooled_with_their_heads(case):
    groups = HeadGroups((tuple(range(case.heads.num_key_heads)),), singles(case).values)
    pooled = mean_pool(case.heads, case.moments, groups)
    assert pooled.k_norm is not None
    torch.testing.assert_close(pooled.k_norm, case.heads.k_norm.mean(0, keepdim=True))
    assert torch.equal(pooled.q_norm, case.heads.q_norm)


@given(head_cases(qk_norm="head"))
def test_gains_per_channel_are_untouched(case):
    groups = HeadGroups((tuple(range(case.heads.num_key_heads)),), singles(case).values)
    pooled = mean_pool(case.heads, case.moments, groups, restore_norm=True)
    assert torch.equal(pooled.k_norm, case.heads.k_norm)
