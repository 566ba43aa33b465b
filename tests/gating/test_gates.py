"""The distribution of a gate, in the paper's parametrisation and in the usual one."""

import math

import pytest
import torch
from torch.testing import assert_close

from headfuse.gating.gates import (
    ALPHA,
    CLASSICAL,
    DISTRIBUTIONS,
    OFFICIAL,
    TEMPERATURE,
    Gates,
    keep_probability,
    noise_of,
    sample,
    sparsity,
)

every_kind = pytest.mark.parametrize("kind", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)


def gates(kind=OFFICIAL, layers=2, heads=4):
    return Gates(layers, heads, kind, generator=torch.Generator().manual_seed(0))


def one(value):
    return torch.tensor([float(value)])


def test_a_gate_of_the_paper_starts_open_at_logit_six():
    """papers/align.md 1.10, checked there numerically."""
    assert OFFICIAL.start == 6
    assert sample(one(6), one(0), OFFICIAL).item() == 1.0
    assert keep_probability(one(6), OFFICIAL).item() == pytest.approx(0.99958, abs=1e-5)
    assert sample(one(-10), one(0), OFFICIAL).item() == 0.0
    assert keep_probability(one(-10), OFFICIAL).item() == pytest.approx(2.6e-4, abs=1e-5)


def test_the_reparametrised_logit_is_the_paper_s():
    """a = l alpha T: same gates, same keep probability, same start and same rate."""
    a = torch.linspace(-10, 10, 41, dtype=torch.float64) * ALPHA * TEMPERATURE
    u = torch.full_like(a, 0.55)
    y = torch.sigmoid(torch.logit(u) + a / (ALPHA * TEMPERATURE))
    assert_close(sample(a / (ALPHA * TEMPERATURE), torch.logit(u), OFFICIAL), (1.005 * (y - 0.5) + 0.5).clamp(0, 1))
    shift = TEMPERATURE * math.log(0.995 / 0.005)
    wanted = torch.sigmoid(shift + a / (ALPHA * TEMPERATURE)).clamp(1e-6, 1 - 1e-6)
    assert_close(keep_probability(a / (ALPHA * TEMPERATURE), OFFICIAL), wanted)
    assert pytest.approx(6 * TEMPERATURE * ALPHA) == OFFICIAL.start * ALPHA * TEMPERATURE
    assert pytest.approx(ALPHA / 10) == OFFICIAL.spread * ALPHA * TEMPERATURE
    assert pytest.approx(1e-5) == OFFICIAL.rate * ALPHA * TEMPERATURE
    assert pytest.approx(0.03) == OFFICIAL.rate


def test_the_usual_hard_concrete_keeps_with_the_probability_that_its_samples_show():
    logits = torch.linspace(-4, 4, 9)
    draws = torch.stack([sample(logits, noise_of(9, CLASSICAL, seed=1, step=step), CLASSICAL) for step in range(20000)])
    assert_close((draws > 0).float().mean(0), keep_probability(logits, CLASSICAL), atol=0.015, rtol=0)


@every_kind
def test_gates_lie_in_the_unit_interval_and_open_with_their_logit(kind):
    logits = torch.linspace(-kind.wall, kind.wall, 101)
    values = sample(logits, torch.zeros(101), kind)
    assert values[0] == 0.0
    assert values[-1] == 1.0
    assert (values.diff() >= 0).all()
    assert (keep_probability(logits, kind).diff() >= 0).all()
    assert sparsity(logits, kind).item() == pytest.approx(1 - keep_probability(logits, kind).mean().item())


@every_kind
def test_noise_depends_on_seed_and_step_alone_and_stays_in_its_interval(kind):
    first = noise_of(1000, kind, seed=3, step=7)
    assert torch.equal(first, noise_of(1000, kind, seed=3, step=7))
    for other in ({"seed": 3, "step": 8}, {"seed": 4, "step": 7}, {"seed": 7, "step": 3}):
        assert not torch.equal(first, noise_of(1000, kind, **other))
    uniform = torch.sigmoid(first)
    assert uniform.min() >= kind.noise[0]
    assert uniform.max() <= kind.noise[1]
    assert abs(uniform.mean().item() - 0.5) < 0.03
    assert first.isfinite().all()


def test_the_paper_s_clip_passes_gradients_clipped_themselves():
    logits = torch.tensor([-9.0, 0.0, 9.0], requires_grad=True)
    sample(logits, torch.zeros(3), OFFICIAL).backward(torch.tensor([0.5, 5.0, -5.0]))
    slope = 1.005 * torch.sigmoid(logits) * (1 - torch.sigmoid(logits))
    assert_close(logits.grad, torch.tensor([0.5, 1.0, -1.0]) * slope.detach())


def test_the_usual_clip_stops_gradients_of_closed_and_open_gates():
    logits = torch.tensor([-4.0, 0.0, 4.0], requires_grad=True)
    sample(logits, torch.zeros(3), CLASSICAL).sum().backward()
    assert logits.grad is not None
    assert logits.grad[[0, 2]].tolist() == [0.0, 0.0]
    assert logits.grad[1] > 0


@every_kind
def test_all_gates_of_a_model_are_drawn_together_layer_by_layer(kind):
    made = gates(kind)
    drawn = made()
    assert drawn.values.shape == (2, 4)
    assert_close(drawn.values.flatten(), sample(made.logits, made.noise, kind))
    assert drawn.sparsity.item() == pytest.approx(sparsity(made.logits, kind).item())
    assert made.logits.mean().item() == pytest.approx(kind.start, abs=4 * kind.spread / 8**0.5)


def test_a_gate_that_is_not_allowed_is_exactly_zero_and_learns_nothing():
    made = gates()
    made.allowed.zero_()
    values, _ = made()
    assert values.eq(0).all()
    values.sum().backward()
    assert made.logits.grad is not None
    assert made.logits.grad.eq(0).all()


def test_only_the_logits_are_stored():
    assert list(gates().state_dict()) == ["logits"]
