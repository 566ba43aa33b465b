"""What the stages of DHA minimise, measure and remember."""

import pytest
import torch
from torch.testing import assert_close

from headfuse.fusion.lagrangian import margin
from headfuse.fusion.objective import FusionObjective, SearchObjective
from headfuse.fusion.operators import FusedProjection, head_losses
from headfuse.planning.grouping import contiguous_groups
from headfuse.training.objectives import LanguageModelling, Losses
from pico import pico, tokens

HEADS, LAYERS = 4, 2


def projections_with(groups):
    """Keys and values of two layers."""
    sources = [torch.nn.Linear(12, HEADS * 4, bias=False) for _ in range(2 * LAYERS)]
    made = [FusedProjection(each, groups, "dimension", head_dim=4, rotary_dim=4) for each in sources]
    return list(zip(made[::2], made[1::2], strict=True))


def nothing(model, batch):
    """A loss that says nothing of the text."""
    return Losses(torch.zeros(()), {"lm": torch.zeros(())})


def move(projections, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for projection in (each for pair in projections for each in pair):
            projection.operators.copy_(torch.randn(projection.operators.shape, generator=generator))


def agree(projections):
    with torch.no_grad():
        for projection in (each for pair in projections for each in pair):
            projection.operators.fill_(0.5)


def distances_of(projections):
    return [tuple(head_losses(each.expanded(), each.allowed).double() for each in pair) for pair in projections]


def searching(steps):
    projections = projections_with(None)
    return SearchObjective(nothing, projections, steps=steps), projections


@pytest.mark.parametrize(("steps", "measured"), [(1, 1), (3, 1), (8, 2), (10, 2), (12, 3)])
def test_the_search_averages_the_distances_of_its_last_quarter(steps, measured):
    objective, projections = searching(steps)
    seen = []
    for step in range(steps):
        objective.before_step(step)
        move(projections, step)
        objective.after_step()
        seen.append(distances_of(projections))
    for layer, found in enumerate(objective.distances()):
        for kind in (0, 1):
            wanted = torch.stack([each[layer][kind] for each in seen[-measured:]]).mean(0)
            assert_close(found[kind], wanted.detach(), rtol=1e-5, atol=1e-6)
            assert found[kind].shape == (HEADS, HEADS)


def test_the_distances_of_a_search_survive_a_checkpoint():
    whole, projections = searching(8)
    stopped, same_projections = searching(8)
    for step in range(8):
        whole.before_step(step)
        move(projections, step)
        whole.after_step()
    for step in range(7):
        stopped.before_step(step)
        move(same_projections, step)
        stopped.after_step()
    resumed, last = searching(8)
    resumed.load_state_dict(stopped.state_dict())
    resumed.before_step(7)
    move(last, 7)
    resumed.after_step()
    for wanted, found in zip(whole.distances(), resumed.distances(), strict=True):
        assert all(map(torch.equal, wanted, found))


def test_the_search_is_driven_by_the_loss_of_the_model_alone():
    model, batch = pico("llama"), tokens(2, 9)
    base = LanguageModelling()
    objective = SearchObjective(base, projections_with(None), steps=4)
    assert torch.equal(objective(model, batch).total, base(model, batch).total)
    assert not list(objective.parameters())


def fusing(groups=None, **changed):
    projections = projections_with(groups or contiguous_groups(HEADS, 2))
    options = {"warmup": 10, "decay": 0.25} | changed
    return FusionObjective(nothing, projections, **options), projections


def test_the_margin_closes_on_schedule_with_the_steps():
    objective, _ = fusing()
    seen = []
    for _ in range(12):
        seen.append(objective(None, None).logged["margin"].item())
        objective.after_step()
    base = 0.25 ** (1 / 10)
    assert seen == pytest.approx(margin(torch.arange(12), 10, base).tolist())
    assert seen[0] == 1.0
    assert seen[5] == pytest.approx(0.5 * 0.25**0.5)
    assert seen[10:] == [0.0, 0.0]


def test_the_constraint_is_the_multiplier_times_the_excess_of_every_pair():
    objective, _ = fusing()
    for _ in range(5):
        objective.after_step()
    with torch.no_grad():
        objective.multipliers.values.fill_(3.0)
    losses, now = objective(None, None), margin(torch.tensor(5), 10, 0.25 ** (1 / 10)).item()
    pairs = 2 * LAYERS * 2  # two groups of two in each projection, whose pairs start at 2 / 2
    assert losses.logged["fusion"].item() == pytest.approx(pairs * (1 - now))
    assert losses.total.item() == pytest.approx(3.0 * pairs * (1 - now))
    assert losses.logged["multiplier"].item() == 3.0
    assert losses.logged["pair_mse"].item() == pytest.approx(1.0)
    assert losses.logged["pair_mse_max"].item() == pytest.approx(1.0)


def test_the_margin_may_be_taken_off_the_sum_as_eq_8_prints_it():
    each, whole = fusing()[0], fusing(per_term=False)[0]
    assert each(None, None).logged["fusion"].item() == 0.0
    assert whole(None, None).logged["fusion"].item() == pytest.approx(2 * (LAYERS * 2 - 1))  # keys and values


@pytest.mark.parametrize("count", [1, 2])
def test_multipliers_grow_while_the_constraint_is_violated_and_never_fall_below_zero(count):
    objective, _ = fusing(warmup=1, multipliers=count)
    optimizer = torch.optim.AdamW(objective.multipliers.parameters(), lr=1e-2, maximize=True, weight_decay=0.0)
    seen = []
    for _ in range(5):
        objective(None, None).total.backward()
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step()
        seen.append(objective.multipliers.values.min().item())
    assert seen[0] == pytest.approx(1.0)  # the margin of the first step is above all pairs
    assert seen[1:] == sorted(set(seen[1:]))
    with torch.no_grad():
        objective.multipliers.values.fill_(-1.0)
    objective.after_step()
    assert objective.multipliers.values.tolist() == [0.0] * count


def test_the_fusion_is_finished_once_the_margin_is_closed_and_the_heads_agree():
    objective, projections = fusing(warmup=4)
    agree(projections)
    for _ in range(4):
        assert not objective.finished()
        objective.after_step()
    assert objective.finished()
    move(projections, 0)
    assert not objective.finished()


def test_heads_that_disagree_a_little_are_a_matter_of_the_threshold():
    (objective, projections), (strict, others) = fusing(warmup=1), fusing(warmup=1, threshold=1e-7)
    for each, pairs in ((objective, projections), (strict, others)):
        agree(pairs)
        with torch.no_grad():
            pairs[0][0].operators[0] += 0.02
        each.after_step()
    assert objective.finished()
    assert not strict.finished()


def test_the_number_of_steps_is_restored_with_the_rest():
    objective, _ = fusing()
    for _ in range(6):
        objective.after_step()
    with torch.no_grad():
        objective.multipliers.values.fill_(2.0)
    resumed, _ = fusing()
    resumed.load_state_dict(objective.state_dict())
    wanted, found = objective(None, None), resumed(None, None)
    assert found.logged["margin"] == wanted.logged["margin"] > 0
    assert found.total == wanted.total


def test_heads_that_stay_alone_are_finished_with_the_margin():
    objective, _ = fusing(contiguous_groups(HEADS, HEADS), warmup=1)
    assert objective(None, None).total.item() == 0.0
    objective.after_step()
    assert objective.finished()
