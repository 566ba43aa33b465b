"""Who closes the gates, step by step."""

from itertools import pairwise

import pytest
import torch

from headfuse.gating.controllers import CONTROLLERS, Lagrangian, Projection, Ramp
from headfuse.gating.gates import CLASSICAL, OFFICIAL, Gates, noise_of, sparsity
from headfuse.gating.schedule import Schedule

STEPS = 200
every_controller = pytest.mark.parametrize("name", CONTROLLERS)


def made(name="projection", kind=OFFICIAL, steps=STEPS, seed=0):
    gates = Gates(4, 8, kind, generator=torch.Generator().manual_seed(0))
    return gates, CONTROLLERS[name](gates, Schedule(steps), seed=seed)


def run(gates, controller, first, last, rate=0.0):
    """Steps with a penalty and with a gradient that would rather keep gate 0; the gates drawn in each."""
    climbing = [{"params": list(controller.multipliers()), "maximize": True}] if controller.multipliers() else []
    descending = [{"params": [gates.logits]}] if controller.learned else []
    groups = [*descending, *climbing]
    optimizer = torch.optim.SGD(groups, lr=rate) if groups else None
    seen = []
    for step in range(first, last):
        controller.before_step(step)
        values, sparsity = gates()
        seen.append(values.detach().flatten())
        if optimizer is not None:
            (controller.penalty(sparsity) - 10 * values[0, 0]).backward()
            optimizer.step()
            optimizer.zero_grad()
        controller.after_step()
    return seen


@every_controller
@pytest.mark.parametrize("kind", [OFFICIAL, CLASSICAL], ids=["official", "classical"])
def test_gates_are_open_at_first_and_exactly_closed_for_the_last_fifth(name, kind):
    seen = run(*made(name, kind), 0, STEPS)
    assert seen[0].mean() > 0.95
    assert all(values.eq(0).all() for values in seen[160:])


@every_controller
def test_what_a_step_sees_depends_on_its_number_and_the_seed_alone(name):
    (gates, controller), (others, other) = made(name), made(name)
    controller.before_step(3)
    for step in range(4):
        other.before_step(step)
    for field in ("noise", "allowed", "target", "pressure"):
        assert torch.equal(getattr(gates, field), getattr(others, field))


def test_the_seed_decides_the_noise():
    for seed in (0, 1):
        gates, controller = made(seed=seed)
        controller.before_step(5)
        assert torch.equal(gates.noise, noise_of(32, OFFICIAL, seed=seed, step=5))


@every_controller
def test_step_dependent_values_stay_where_they_are(name):
    gates, controller = made(name)
    before = {field: getattr(gates, field).data_ptr() for field in ("logits", "noise", "allowed", "target", "pressure")}
    run(gates, controller, 0, 3)
    assert {field: getattr(gates, field).data_ptr() for field in before} == before


@every_controller
def test_a_resumed_run_repeats_the_uninterrupted_one(name):
    gates, controller = made(name)
    whole = run(gates, controller, 0, 60, rate=0.1)
    stopped, half = made(name)
    run(stopped, half, 0, 30, rate=0.1)
    resumed, rest = made(name)
    resumed.load_state_dict(stopped.state_dict())
    rest.load_state_dict(half.state_dict())
    for found, wanted in zip(run(resumed, rest, 30, 60, rate=0.1), whole[30:], strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", ["projection", "ramp"])
def test_more_and_more_gates_are_off(name):
    share = [values.eq(0).float().mean().item() for values in run(*made(name, steps=2000), 0, 1600)]
    assert share[300] == pytest.approx(0.5, abs=0.08)
    assert share[700] == pytest.approx(1.0, abs=0.05)
    assert share[150] < share[300] < share[450]


def test_the_loss_decides_which_gates_of_the_projection_close_last():
    gates, controller = made(steps=2000)
    seen = run(gates, controller, 0, 500, rate=1.0)
    assert seen[450][0] > 0.9
    assert seen[450].eq(0).float().mean() > 0.6


def test_the_projection_is_damped_towards_the_start_of_the_step():
    gates, controller = made()
    assert isinstance(controller, Projection)
    controller.before_step(100)
    before = gates.logits.detach().clone()
    with torch.no_grad():
        gates.logits.add_(1)
    controller.after_step()
    kept = (before + 1 - gates.logits).mean().item()
    gap = 1 - sparsity(before, OFFICIAL).item()  # the target is 1 by now
    assert gap > 0.5
    assert kept == pytest.approx(gap, abs=1e-3)


def test_multipliers_of_the_lagrangian_climb_while_too_few_gates_are_off():
    gates, controller = made("lagrangian", CLASSICAL)
    assert isinstance(controller, Lagrangian)
    run(gates, controller, 0, 60, rate=0.3)
    first, second = controller.values.tolist()
    assert first < 0 < second
    _, sparsity = gates()
    controller.penalty(sparsity).backward()
    assert gates.logits.grad is not None
    assert (gates.logits.grad > 0).all()  # descending closes them


def test_the_penalty_is_off_once_all_gates_are_closed():
    for name in ("projection", "lagrangian"):
        controller = made(name)[1]
        controller.before_step(STEPS - 1)
        assert controller.penalty(torch.tensor(0.2)).item() == 0.0


def test_the_ramp_closes_one_gate_after_the_other_in_the_order_of_its_seed():
    (gates, controller), (_, other) = made("ramp"), made("ramp", seed=1)
    assert isinstance(controller, Ramp)
    assert isinstance(other, Ramp)
    assert not torch.equal(controller.order, other.order)
    assert not gates.logits.requires_grad
    seen = run(gates, controller, 0, 70)
    for step, values in enumerate(seen):
        assert set(values.tolist()) <= {0.0, 1.0}
        assert values.eq(0).sum().item() == int(32 * min(1, step / 60))
    for before, after in pairwise(seen):
        assert (after <= before).all()
