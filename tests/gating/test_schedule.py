"""The target, the penalty, and what the projection of the paper's code does to gates by itself."""

import pytest
import torch
from torch.testing import assert_close

from headfuse.gating.gates import OFFICIAL, keep_probability, sample, sparsity
from headfuse.gating.schedule import Schedule, damping, penalty, projected


def test_the_target_rises_to_one_over_three_tenths_of_the_steps():
    schedule = Schedule(1000)
    assert [schedule.target(step) for step in (0, 150, 300, 900)] == [0.0, 0.5, 1.0, 1.0]


def test_gates_are_closed_for_the_last_fifth_of_the_steps():
    schedule = Schedule(1000)
    assert [schedule.closed(step) for step in (0, 799, 800, 999)] == [False, False, True, True]
    assert schedule.progress(800) == 1.0


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_runs_have_a_schedule(steps):
    schedule = Schedule(steps)
    assert schedule.target(0) == 0.0
    assert schedule.target(steps) == 1.0


def test_the_penalty_is_linear_and_quadratic_in_the_gap():
    found = penalty(torch.tensor(0.3), torch.tensor(0.5))
    assert found.item() == pytest.approx(0.2 + (0.2 + 1e-6) ** 2)


def test_the_penalty_pushes_towards_the_target_from_both_sides():
    for now, sign in ((0.3, -1), (0.7, 1)):
        value = torch.tensor(now, requires_grad=True)
        penalty(value, torch.tensor(0.5)).backward()
        assert value.grad is not None
        assert value.grad.sign().item() == sign


def test_the_projection_alone_follows_the_target_a_little_late():
    """papers/align.md 1.11: its simulation of 1024 gates over 11530 steps, without gradients, noise and damping."""
    steps, count = 11530, 1024
    schedule = Schedule(steps)
    logits = torch.randn(count, generator=torch.Generator().manual_seed(0)) * OFFICIAL.spread + OFFICIAL.start
    order, seen = logits.argsort(), {}
    for step in range(1, round(0.35 * steps)):
        now = sparsity(logits, OFFICIAL)
        logits = projected(
            logits, now, target=schedule.target(step), progress=schedule.progress(step), wall=OFFICIAL.wall
        )
        seen[step] = logits
    share = {place: seen[round(place * steps)] for place in (0.087, 0.15, 0.30, 0.312, 0.347)}

    def off(place):
        return (sample(share[place], torch.zeros(count), OFFICIAL) < 0.01).float().mean().item()

    def on(place):
        return (sample(share[place], torch.zeros(count), OFFICIAL) > 0.99).float().mean().item()

    assert sparsity(share[0.087], OFFICIAL).item() == pytest.approx(0.276, abs=2e-3)
    assert (off(0.15), on(0.15)) == pytest.approx((0.48, 0.50), abs=6e-3)
    assert off(0.30) == pytest.approx(0.984, abs=1e-3)
    assert off(0.312) == pytest.approx(0.996, abs=1e-3)
    assert off(0.347) == 1.0
    assert torch.equal(share[0.15].argsort(stable=True)[:400].sort().values, order[:400].sort().values)


def moved(logits, *, target, progress=0.25):
    now = 1 - keep_probability(logits, OFFICIAL).mean()
    return projected(logits, now, target=target, progress=progress, wall=OFFICIAL.wall)


def test_the_smallest_logits_sink_and_those_above_the_next_rank_rise():
    logits = torch.tensor([5.0, 1.0, 3.0, 6.0, 4.0, 2.0])
    found = moved(logits, target=0.4)  # three sink
    assert (found[[1, 5, 2]] < logits[[1, 5, 2]]).all()
    assert (found[[4, 0, 3]] > logits[[4, 0, 3]]).all()
    assert_close(found[[1, 5, 2]], -10 + 0.6 * (logits[[1, 5, 2]] + 10))  # as fast as it goes
    assert torch.equal(found.argsort(), logits.argsort())


def test_nothing_sinks_while_enough_is_off():
    logits = torch.tensor([-8.0, -8.0, 6.0, 6.1])
    found = moved(logits, target=0.25)
    assert torch.equal(found[:2], logits[:2])
    assert (found[2:] > logits[2:]).all()


def test_logits_stay_within_the_walls():
    logits = torch.tensor([-10.0, -9.99, 9.99, 10.0])
    for target in (0.0, 0.5, 1.0):
        assert moved(logits, target=target).abs().max() <= 10
    assert moved(torch.tensor([-12.0, 3.0, 4.0]), target=1.0).min() == -10


def test_damping_grows_with_the_steps_and_with_the_gap():
    def at(gap, progress):
        return damping(torch.tensor(gap), progress).item()

    assert at(0.0, 0.1) == pytest.approx(0.002)
    assert at(0.0, 1.0) == at(0.0, 1.2) == pytest.approx(0.5)
    assert at(0.3, 0.1) == pytest.approx(0.3)
    assert at(1.0, 1.0) == 1.0
