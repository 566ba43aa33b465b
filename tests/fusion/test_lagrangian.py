"""The constraint: off at first, closing in time, felt pair by pair, and by itself nothing but mean pooling."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from headfuse.fusion.lagrangian import FusionTerms, Multipliers, fusion_loss, margin
from headfuse.fusion.operators import FusedProjection, operator_health
from headfuse.planning.grouping import contiguous_groups


def fused(groups, extent="dimension", *, num_heads=8) -> FusedProjection:
    source = torch.nn.Linear(12, num_heads * 4, bias=False)
    return FusedProjection(source, groups, extent, head_dim=4, rotary_dim=4)


def terms(loss: float) -> FusionTerms:
    value = torch.tensor(loss)
    return FusionTerms(value, value, value)


@pytest.mark.parametrize(
    ("base", "first_steps"),
    [
        (1.0, (1, 501, 751)),
        (0.999, (1, 315, 562)),
        (0.998, (1, 222, 421)),
        (0.995, (1, 115, 226)),
        (0.99, (1, 63, 125)),
    ],
)
def test_the_constraint_begins_for_groups_of_two_four_and_eight_when_the_margin_passes_two_over_g(base, first_steps):
    margins = margin(torch.arange(1001), 1000, base)
    found = tuple(next(s for s in range(1001) if margins[s] < 2 / g) for g in (2, 4, 8))
    assert found == first_steps


@given(st.integers(0, 300), st.integers(0, 200), st.floats(0.9, 1.0))
def test_the_margin_falls_from_one_to_zero_and_stays_there(step, warmup, base):
    now, then, first, late = margin(torch.tensor([step, step + 1, 0, warmup + step]), warmup, base)
    assert 0.0 <= then <= now <= 1.0
    assert first == float(warmup > 0)
    assert late == 0.0


@pytest.mark.parametrize(("size", "total"), [(2, 1024), (4, 1536), (8, 1792)])
def test_the_sum_over_a_7b_model_starts_in_the_thousands(size, total):
    one = fused(contiguous_groups(32, 32 // size), num_heads=32)
    found = fusion_loss([one] * 64, 0.0)  # 32 layers, keys and values
    assert found.loss.item() == pytest.approx(total)
    assert found.mean_mse.item() == pytest.approx(2 / size)
    assert found.max_mse.item() == pytest.approx(2 / size)


def test_a_margin_on_each_pair_silences_the_start_and_one_on_the_sum_does_not():
    projections = [fused(((0, 1, 2, 3), (4, 5, 6, 7))) for _ in range(2)]
    quiet = fusion_loss(projections, 0.6)
    quiet.loss.backward()
    assert quiet.loss.item() == 0.0
    assert all(not each.operators.grad.any() for each in projections if each.operators.grad is not None)
    assert fusion_loss(projections, 0.4).loss.item() == pytest.approx(24 * 0.1)
    assert fusion_loss(projections, 0.6, per_term=False).loss.item() == pytest.approx(24 * 0.5 - 0.6)
    assert fusion_loss(projections, 12.1, per_term=False).loss.item() == 0.0


def test_pairs_of_all_projections_are_seen_in_mean_and_maximum():
    narrow, wide = fused(contiguous_groups(8, 4)), fused(contiguous_groups(8, 2))
    found = fusion_loss([narrow, wide], 0.25)
    assert found.mean_mse.item() == pytest.approx((4 * 1.0 + 12 * 0.5) / 16)
    assert found.max_mse.item() == pytest.approx(1.0)
    assert not found.mean_mse.requires_grad
    assert not found.converged()


def test_heads_alone_agree_from_the_start():
    found = fusion_loss([fused(contiguous_groups(8, 8))], 0.0)
    assert found.loss.item() == 0.0
    assert found.converged()
    found.loss.backward()


@pytest.mark.parametrize("extent", ["scalar", "tied", "dimension"])
def test_the_fusion_loss_alone_leads_to_mean_pooling(extent):
    groups = contiguous_groups(8, 2)
    projection = fused(groups, extent)
    optimizer = torch.optim.SGD([projection.operators], lr=0.2)
    for _ in range(100):
        optimizer.zero_grad()
        fusion_loss([projection], 0.0).loss.backward()
        optimizer.step()
    expected = projection.allowed.float().unsqueeze(-1).expand_as(projection.operators) / 4
    assert_close(projection.operators.detach(), expected, atol=1e-4, rtol=0.0)
    assert fusion_loss([projection], 0.0).converged()
    assert operator_health(projection, groups)["mean_pool_distance"] < 1e-4


def test_multipliers_climb_while_the_constraint_is_violated_and_rest_when_it_holds():
    multipliers = Multipliers(2)
    optimizer = torch.optim.AdamW([{"params": multipliers.parameters(), "maximize": True}], lr=1e-2, weight_decay=0.0)
    for _ in range(10):
        optimizer.zero_grad()
        multipliers([terms(3.0), terms(0.0)]).backward()
        optimizer.step()
        multipliers.clamp()
    assert_close(multipliers.values.detach(), torch.tensor([1.1, 1.0]), atol=1e-4, rtol=0.0)


def test_one_multiplier_serves_all_losses_and_two_serve_one_each():
    assert Multipliers()([terms(2.0), terms(3.0)]).item() == 5.0
    two = Multipliers(2, initial=0.5)
    with torch.no_grad():
        two.values[1] = 2.0
    assert two([terms(2.0), terms(3.0)]).item() == 7.0
    with pytest.raises(AssertionError, match="as many multipliers"):
        two([terms(1.0)] * 3)


def test_multipliers_never_stay_negative():
    multipliers = Multipliers(2, initial=-0.3)
    multipliers.clamp()
    assert multipliers.values.tolist() == [0.0, 0.0]


def test_the_constraint_overrules_a_text_that_wants_heads_apart_and_leaves_it_what_they_share():
    groups = ((0, 1), (2, 3))
    projection, multipliers = fused(groups, "scalar", num_heads=4), Multipliers()
    wanted = torch.tensor([[1.4, 0.2], [1.2, 0.4]])  # the shares of a group's two heads that either would like
    optimizer = torch.optim.Adam(
        [
            {"params": [projection.operators], "lr": 1e-2},
            {"params": multipliers.parameters(), "lr": 1e-2, "maximize": True},
        ],
        betas=(0.9, 0.95),
    )
    gaps = []
    for step in range(400):
        optimizer.zero_grad()
        found = fusion_loss([projection], margin(torch.tensor(step), 250, 0.998))
        rows = projection.expanded()[..., 0]
        text = sum((rows[list(group)][:, list(group)] - wanted).pow(2).sum() for group in groups)
        (text + multipliers([found])).backward()
        optimizer.step()
        multipliers.clamp()
        gaps.append(found.mean_mse.item())
    assert gaps[0] == pytest.approx(1.0)
    assert gaps[-1] < 0.25 * (wanted[0] - wanted[1]).pow(2).mean().item()
    assert multipliers.values.item() > 1.5
    assert operator_health(projection, groups)["mean_pool_distance"] == pytest.approx(0.5, abs=0.05)
