"""Fusion operators: nothing changes at the start or by folding, and what RoPE allows is what the maths says."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from headfuse.checkpoints.adapter import Adapter
from headfuse.checkpoints.assembly import (
    attention_module,
    decoder_layers,
    decoupled_config,
    decoupled_model_state,
    split_model,
)
from headfuse.checkpoints.attention import attention_of, heads_of
from headfuse.checkpoints.heads import AttentionHeads
from headfuse.checkpoints.registry import adapter_for
from headfuse.errors import PlanError
from headfuse.fusion.operators import (
    FusedProjection,
    check_fusable,
    expand_operators,
    fold_heads,
    fuse_attention,
    fused_projections,
    head_losses,
    multi_head,
    operator_health,
    pair_losses,
    same_group,
)
from headfuse.models.dha import DHA_CLASSES
from headfuse.models.dha.decoupled_attention import DecoupledAttention
from headfuse.planning.grouping import HeadGroups, contiguous_groups
from pico import CASES, case_name, logits_of, pico, tokens
from strategies import attention_output, cases_with_groups, positions, random_heads, random_input, rope, seeded

EXTENTS = ("scalar", "tied", "dimension")
GROUPS = HeadGroups(((0, 2), (1, 3)), ((0, 3), (1, 2)))

every_extent = pytest.mark.parametrize("extent", EXTENTS)
every_fusable_case = pytest.mark.parametrize(
    ("family", "overrides"), [case for case in CASES if case[0] != "olmo2"], ids=case_name
)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def projection(groups, extent="dimension", *, num_heads=4, head_dim=8, width=20, rotary_dim=0, bias=True):
    source = torch.nn.Linear(width, num_heads * head_dim, bias=bias)
    return FusedProjection(source, groups, extent, head_dim=head_dim, rotary_dim=rotary_dim), source


def randomise(fused: FusedProjection, seed: int = 0) -> None:
    with torch.no_grad():
        fused.operators.copy_(normal(seed, *fused.operators.shape))


def agree(fused: FusedProjection, groups, seed: int = 0) -> None:
    """Random operators, the same row for all the heads of a group."""
    randomise(fused, seed)
    with torch.no_grad():
        for group in groups:
            fused.operators[list(group)] = fused.operators[group[0]].clone()


def output_of(module: DecoupledAttention, x: torch.Tensor) -> torch.Tensor:
    """The module's causal attention of `x` `[T, D]`."""
    width = module.shape.rotary_dim
    turning = tuple(table.to(x.dtype).unsqueeze(0) for table in positions(width, len(x))) if width else None
    return module(x.unsqueeze(0), position_embeddings=turning)[0][0]


def fused_model(family: str, overrides, groups):
    """A decoupled tiny model before and after its attention is fused, with its adapter."""
    model = pico(family, **overrides)
    adapter = adapter_for(model.config)
    heads = split_model(model, adapter)
    converted = DHA_CLASSES[adapter.family].model(decoupled_config(model.config, adapter, heads)).eval()
    converted.load_state_dict(decoupled_model_state(model.state_dict(), adapter, heads))
    before = logits_of(converted, tokens(2, 11))
    for module in attention_modules(converted, adapter):
        fuse_attention(module, groups and HeadGroups(*(contiguous_groups(n, groups) for n in heads[0].counts)))
    return converted, before


def attention_modules(model, adapter: Adapter) -> list[DecoupledAttention]:
    layers = range(len(decoder_layers(model, adapter)))
    return [attention_module(model, adapter, layer) for layer in layers]  # type: ignore[misc]


@every_fusable_case
@pytest.mark.parametrize("groups", [None, 1])
def test_a_model_fused_at_the_delta_has_its_own_logits(family, overrides, groups):
    converted, before = fused_model(family, overrides, groups)
    assert_close(logits_of(converted, tokens(2, 11)), before, atol=1e-6, rtol=0.0)


@every_extent
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_delta_is_the_source_bit_for_bit(extent, dtype):
    source = torch.nn.Linear(20, 32).to(dtype)
    fused = FusedProjection(source, None, extent, head_dim=8, rotary_dim=4)
    x = normal(0, 3, 20).to(dtype)
    assert torch.equal(fused(x), source(x))
    assert fused.operators.dtype == torch.float32


@pytest.mark.parametrize(("extent", "free"), [("scalar", 1), ("tied", 6), ("dimension", 8)])
def test_a_pair_of_heads_has_as_many_numbers_as_its_extent_says(extent, free):
    fused, _ = projection(None, extent, rotary_dim=4)
    assert fused.operators.shape == (4, 4, free)
    assert fused.expanded().shape == (4, 4, 8)


def test_tied_operators_agree_on_the_two_channels_of_a_plane():
    expanded = expand_operators(torch.arange(6.0).view(1, 1, 6), "tied", 8, 4)
    assert expanded.flatten().tolist() == [0, 1, 0, 1, 2, 3, 4, 5]


@every_extent
def test_a_fused_head_is_the_combination_of_its_group_s_heads(extent):
    groups = ((0, 2, 3), (1,))
    fused, source = projection(groups, extent, rotary_dim=8)
    randomise(fused)
    x = normal(1, 5, 20)
    heads, expanded = source(x).unflatten(-1, (4, 8)), fused.expanded()
    expected = torch.stack(
        [sum(expanded[h, j] * heads[:, j] for j in group) for h in range(4) for group in groups if h in group], dim=1
    )
    assert_close(fused(x), expected.flatten(1), atol=1e-5, rtol=1e-5)


def test_fused_weights_are_in_fp32_under_autocast_and_the_output_is_not():
    fused, _ = projection(None)
    randomise(fused)
    plain, x = fused.fused()[0], normal(0, 3, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fused.fused()[0], plain)
        assert fused(x).dtype == torch.bfloat16


def test_weights_keep_their_names_and_stay_the_source_s_own():
    fused, source = projection(None)
    assert set(fused.state_dict()) == {"weight", "bias", "operators"}
    assert fused.weight is source.weight
    assert fused.bias is source.bias


def test_heads_of_a_fused_module_are_the_unfused_ones():
    heads = random_heads(seeded(0), bias=True, dtype=torch.float32)
    module = attention_of(heads, 0)
    fuse_attention(module, GROUPS)
    for each in fused_projections(module):
        randomise(each)
    held = heads_of(module, heads)
    for name in ("q", "k", "v", "o", "k_bias", "v_bias"):
        assert torch.equal(getattr(held, name), getattr(heads, name)), name


def test_a_module_fused_again_starts_at_the_delta():
    heads = random_heads(seeded(0), dtype=torch.float32)
    module, x = attention_of(heads, 0), random_input(seeded(1), heads.hidden_size).float()
    before = output_of(module, x)
    fuse_attention(module, None)
    for each in fused_projections(module):
        randomise(each)
    assert not torch.allclose(output_of(module, x), before, atol=1e-2)
    fuse_attention(module, GROUPS, key_extent="scalar")
    assert_close(output_of(module, x), before, atol=1e-6, rtol=0.0)
    assert [each.operators.shape[-1] for each in fused_projections(module)] == [1, heads.head_dim]


@given(cases_with_groups(), st.sampled_from(EXTENTS), st.sampled_from(EXTENTS))
def test_folding_operators_that_agree_keeps_the_function(drawn, key_extent, value_extent):
    case, groups = drawn
    module = attention_of(case.heads, 0)
    fuse_attention(module, groups, key_extent=key_extent, value_extent=value_extent)
    for each, members in zip(fused_projections(module), (groups.keys, groups.values), strict=True):
        agree(each, members)
    folded = fold_heads(module, case.heads, groups)
    assert folded.counts == (len(groups.keys), len(groups.values))
    expected = output_of(module, case.x).detach()
    assert_close(attention_output(folded, case.x), expected, atol=1e-8, rtol=1e-8)
    assert_close(output_of(attention_of(folded, 0), case.x), expected, atol=1e-8, rtol=1e-8)


@given(cases_with_groups(qk_norm="head"))
def test_folding_behind_a_norm_over_each_head_keeps_the_function_in_fp32(drawn):
    case, groups = drawn
    heads, x = case.heads.to(torch.float32), case.x.float()
    module = attention_of(heads, 0)
    fuse_attention(module, groups)
    for each, members in zip(fused_projections(module), (groups.keys, groups.values), strict=True):
        agree(each, members)
    folded = attention_of(fold_heads(module, heads, groups), 0)
    assert_close(output_of(folded, x), output_of(module, x).detach(), atol=1e-5, rtol=1e-5)


def test_folding_operators_that_differ_uses_their_mean():
    fused, source = projection(((0, 1, 2), (3,)))
    randomise(fused)
    weight, bias = fused.folded(((0, 1, 2), (3,)))
    mean = fused.expanded()[:3].mean(0)  # [source, channel]
    expected = sum(mean[j, :, None] * source.weight.unflatten(0, (4, 8))[j] for j in range(3))
    assert weight.dtype == torch.float64
    assert_close(weight[0].float(), expected)
    assert bias is not None
    assert_close(bias[0].float(), sum(mean[j] * source.bias.unflatten(0, (4, 8))[j] for j in range(3)))


def test_heads_alone_at_the_delta_fold_bit_for_bit():
    heads = random_heads(seeded(0), bias=True, dtype=torch.bfloat16)
    alone = HeadGroups(contiguous_groups(4, 4), contiguous_groups(4, 4))
    module = attention_of(heads, 0)
    fuse_attention(module, alone)
    folded = fold_heads(module, heads, alone)
    for name in ("q", "k", "v", "o", "q_bias", "k_bias", "v_bias", "o_bias"):
        assert torch.equal(getattr(folded, name), getattr(heads, name)), name


@given(cases_with_groups(rotary=True), st.integers(0, 99))
def test_fusing_weights_is_fusing_rotated_keys_only_if_planes_are_tied(drawn, seed):
    case, _ = drawn
    heads, x = case.heads, case.x
    keys = torch.einsum("ndD,TD->nTd", heads.k, x)

    def gap(extent: str) -> float:
        """Relative difference between fusing before and after the rotation."""
        source = torch.nn.Linear(heads.hidden_size, heads.k[:, :, 0].numel(), bias=False).double()
        source.weight.data = heads.k.flatten(0, 1)
        fused = FusedProjection(source, None, extent, head_dim=heads.head_dim, rotary_dim=heads.head_dim)
        randomise(fused, seed)
        weight = fused.fused()[0].detach().unflatten(0, (-1, heads.head_dim))
        before = rope(torch.einsum("ndD,TD->nTd", weight, x), heads.head_dim)
        operators = fused.expanded().detach().double()
        after = torch.einsum("hjd,jTd->hTd", operators, rope(keys, heads.head_dim))
        return ((before - after).norm() / before.norm()).item()

    assert gap("tied") < 1e-12
    assert gap("scalar") < 1e-12
    assert gap("dimension") > 0.1


@every_extent
def test_gradients_reach_the_allowed_operators_only(extent):
    groups = ((0, 2), (1, 3))
    fused, _ = projection(groups, extent, rotary_dim=4)
    randomise(fused)
    (fused(normal(0, 6, 20)).pow(2).sum() + pair_losses(fused.expanded(), fused.allowed).sum()).backward()
    assert fused.operators.grad is not None
    assert torch.equal(fused.operators.grad.abs().amin(-1) > 0, same_group(4, groups))
    assert torch.equal(fused.operators.grad.abs().amax(-1) > 0, same_group(4, groups))
    assert fused.weight.grad is not None


@pytest.mark.parametrize("size", [2, 4, 8, 32])
@every_extent
def test_pairs_start_at_two_over_g(size, extent):
    fused, _ = projection(contiguous_groups(32, 32 // size), extent, num_heads=32, width=4, rotary_dim=8)
    losses = pair_losses(fused.expanded(), fused.allowed)
    assert losses.shape == (32 // size * size * (size - 1) // 2,)
    assert_close(losses, torch.full_like(losses, 2 / size))


def test_head_losses_are_the_mean_square_over_the_group_and_the_channels():
    groups = ((0, 3, 4), (1, 2))
    allowed, operators = same_group(5, groups), normal(0, 5, 5, 6)
    losses = head_losses(operators, allowed)
    expected = torch.zeros(5, 5)
    for group in groups:
        for a in group:
            for b in group:
                expected[a, b] = (operators[a, list(group)] - operators[b, list(group)]).pow(2).mean()
    assert_close(losses, expected)
    assert torch.equal(losses > 0, allowed & ~torch.eye(5, dtype=torch.bool))


def test_the_mean_of_unrelated_heads_is_short_by_the_root_of_their_number():
    for size in (2, 4, 8):
        groups = contiguous_groups(8, 8 // size)
        fused, _ = projection(groups, num_heads=8, head_dim=16, width=2048, bias=False)
        health = operator_health(fused, groups)
        assert health["norm_ratio"] == pytest.approx(size**-0.5, rel=0.01)
        assert health["mean_pool_distance"] == 0.0


def test_operators_that_leave_the_mean_are_seen():
    groups = ((0, 1), (2, 3))
    fused, _ = projection(groups)
    with torch.no_grad():
        fused.operators.copy_(torch.ones_like(fused.operators))
    assert operator_health(fused, groups)["mean_pool_distance"] == pytest.approx(0.5)
    assert operator_health(fused, groups)["norm_ratio"] > 1.2


@given(cases_with_groups())
def test_heads_of_their_own_for_every_query_head_change_nothing(drawn):
    case, _ = drawn
    expanded = multi_head(case.heads)
    assert expanded.counts == (case.heads.num_query_heads,) * 2
    assert_close(attention_output(expanded, case.x), attention_output(case.heads, case.x))


@pytest.mark.parametrize("refuse", [check_fusable, multi_head])
def test_a_key_norm_over_all_heads_is_refused_in_one_line(refuse):
    heads: AttentionHeads = random_heads(seeded(0), qk_norm="all")
    with pytest.raises(PlanError, match="use method mean-pool") as caught:
        refuse(heads)
    assert "\n" not in str(caught.value)
    check_fusable(replace(heads, traits=replace(heads.traits, qk_norm="head")))
