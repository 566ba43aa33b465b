"""The refit: nearer to the original on text that it has not seen, never further, and the same again by its seed."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from headfuse.checkpoints.heads import AttentionHeads
from headfuse.planning.grouping import HeadGroups
from headfuse.sharing.closed_form import closed_form
from headfuse.sharing.mean_pool import mean_pool
from headfuse.sharing.refit import RefitOptions, refit
from headfuse.statistics.moments import head_moments
from headfuse.statistics.stream import LayerInputs
from strategies import attention_output, positions, random_heads, random_input, seeded, statistics_of

PAIRS = HeadGroups(((0, 1), (2, 3)), ((0, 2), (1, 3)))
QUICK = RefitOptions(steps=8, rows=8, length=16, segment=8)


def inputs_of(heads: AttentionHeads, rows=48, length=16, seed=5) -> LayerInputs:
    generator = seeded(seed)
    hidden = random_input(generator, heads.hidden_size, rows * length).float().unflatten(0, (rows, length))
    width = heads.traits.rotary_dim
    turning = tuple(table.float().unsqueeze(0) for table in positions(width, length)) if width else None
    return LayerInputs(0, hidden, 0.5 + torch.rand(rows, length, generator=generator), turning)


def layer(inputs_like=None, *, how=closed_form, **options) -> tuple[AttentionHeads, AttentionHeads, LayerInputs]:
    """Random heads, the same heads shared in pairs, and the layer's inputs."""
    heads = random_heads(seeded(1), dtype=torch.float32, **options)
    inputs = inputs_of(heads, **(inputs_like or {}))
    moments = head_moments(heads, statistics_of(heads, inputs.hidden.flatten(0, 1)))
    return heads, how(heads, moments, PAIRS), inputs


def held_out_error(original, converted, inputs, rows) -> float:
    """The relative error by its definition, in fp64."""
    wrong = total = 0.0
    for row in rows:
        x, weight = inputs.hidden[row].double(), 1 / inputs.stream_energy[row].double()
        target = attention_output(original.to(torch.float64), x)
        found = attention_output(converted.to(torch.float64), x)
        wrong += ((found - target).pow(2).sum(-1) * weight).sum().item()
        total += (target.pow(2).sum(-1) * weight).sum().item()
    return wrong / total


@pytest.mark.parametrize("how", [closed_form, mean_pool])
def test_the_error_on_unseen_rows_falls_and_is_reported_as_it_is(how):
    original, converted, inputs = layer(how=how)
    fitted, report = refit(original, converted, inputs, QUICK)
    assert report.before == pytest.approx(held_out_error(original, converted, inputs, range(45, 48)), rel=1e-4)
    assert report.after == pytest.approx(held_out_error(original, fitted, inputs, range(45, 48)), rel=1e-4)
    assert report.after < report.before
    assert (fitted.key_map, fitted.value_map) == (converted.key_map, converted.value_map)


@pytest.mark.parametrize("options", [replace(QUICK, rates=(30.0,)), replace(QUICK, rates=(float("nan"),))])
def test_a_refit_that_does_harm_is_refused(options):
    original, converted, inputs = layer()
    fitted, report = refit(original, converted, inputs, options)
    assert fitted is converted
    assert report.after == report.before


def test_an_exact_solve_that_does_harm_is_undone_before_the_descent():
    original, converted, inputs = layer({"rows": 2, "length": 16})  # fewer tokens to fit than channels to fit them with
    solved, _ = refit(original, converted, inputs, replace(QUICK, steps=0))
    assert solved is converted
    _, report = refit(original, converted, inputs, replace(QUICK, rates=(0.005,)))
    assert report.after < report.before


def test_inputs_that_are_not_finite_change_nothing():
    original, converted, inputs = layer()
    inputs.hidden[3, 2, 1] = float("nan")
    fitted, _ = refit(original, converted, inputs, QUICK)
    assert fitted is converted


def test_a_layer_that_writes_nothing_changes_nothing():
    original, converted, inputs = layer()
    silent = [replace(heads, o=heads.o * 0) for heads in (original, converted)]
    fitted, report = refit(*silent, inputs, QUICK)
    assert fitted is silent[1]
    assert report.before == report.after == 0


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    original, converted, inputs = layer()
    first, again, other = (refit(original, converted, inputs, QUICK, seed=seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first.q, again.q)
    assert torch.equal(first.o, again.o)
    assert not torch.equal(first.q, other.q)


@pytest.mark.parametrize(
    "options",
    [
        {"bias": True},
        {"rotary_dim": 0},
        {"rotary_dim": 4, "bias": True},
        {"qk_norm": "head"},
        {"qk_norm": "all", "bias": True},
    ],
    ids=str,
)
def test_every_kind_of_attention_can_be_refitted(options):
    original, converted, inputs = layer(**options)
    fitted, report = refit(original, converted, inputs, QUICK)
    assert report.after < report.before
    for name, tensor in vars(converted).items():
        if isinstance(tensor, torch.Tensor):
            assert getattr(fitted, name).shape == tensor.shape, name
            assert getattr(fitted, name).isfinite().all(), name


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("length", [2, 5, 12])
def test_few_and_short_rows_are_enough(rows, length):
    original, converted, inputs = layer({"rows": rows, "length": length})
    fitted, report = refit(original, converted, inputs, replace(QUICK, segment=64, length=256))
    assert report.after <= report.before
    assert fitted.q.isfinite().all()


def test_rows_that_segments_do_not_divide_are_cut():
    original, converted, inputs = layer({"rows": 48, "length": 11})
    _, report = refit(original, converted, inputs, replace(QUICK, segment=4, length=10))
    assert report.after < report.before


def test_distances_beyond_the_short_rows_are_fitted_by_whole_steps():
    original, converted, inputs = layer({"rows": 48, "length": 32})
    short = replace(QUICK, steps=120, length=4, segment=4)
    without, with_whole = (refit(original, converted, inputs, replace(short, whole=every))[1].after for every in (0, 4))
    assert with_whole < 0.95 * without


@pytest.mark.parametrize("rows", [1, 3])
def test_whole_steps_take_no_more_tokens_than_others(rows):
    original, converted, inputs = layer({"rows": 4, "length": 64})
    fitted, report = refit(original, converted, inputs, replace(QUICK, rows=rows, length=8, whole=1))
    assert report.after <= report.before
    assert fitted.q.isfinite().all()


def test_no_steps_leave_the_exact_solve_alone():
    original, converted, inputs = layer()
    fitted, report = refit(original, converted, inputs, replace(QUICK, steps=0))
    assert report.after < report.before
    assert torch.equal(fitted.k, converted.k)
    assert not torch.equal(fitted.o, converted.o)


def test_lossless_heads_stay_lossless():
    original, _, inputs = layer()
    _, report = refit(original, original, inputs, QUICK)
    assert report.after <= report.before < 1e-9


def test_the_sources_are_not_touched():
    original, converted, inputs = layer(bias=True)
    before = [heads.to(torch.float64) for heads in (original, converted)]
    refit(original, converted, inputs, QUICK)
    for heads, copy in zip((original, converted), before, strict=True):
        for name, tensor in vars(heads).items():
            if isinstance(tensor, torch.Tensor):
                assert_close(tensor.double(), getattr(copy, name), atol=0, rtol=0)


def test_half_precision_heads_come_back_in_fp32():
    original, converted, inputs = layer()
    fitted, report = refit(original.to(torch.bfloat16), converted.to(torch.bfloat16), inputs, QUICK)
    assert report.after < report.before
    assert fitted.q.dtype == torch.float32


def test_bf16_autocast_fits_too():
    original, converted, inputs = layer()
    _, report = refit(original, converted, inputs, QUICK, precision="bf16")
    assert report.after < report.before


def test_the_rate_that_does_best_in_a_trial_is_taken():
    original, converted, inputs = layer()
    fitted, report = refit(original, converted, inputs, replace(QUICK, rates=(30.0, 0.05)))
    alone, _ = refit(original, converted, inputs, replace(QUICK, rates=(0.05,)))
    assert report.rate == 0.05
    assert torch.equal(fitted.k, alone.k)


def test_smaller_rates_are_tried_only_while_they_do_better():
    original, converted, inputs = layer()
    told = []
    options = replace(QUICK, rates=(0.05, 1e-9, 0.02), trial=0.5)
    _, report = refit(original, converted, inputs, options, advance=told.append)
    assert report.rate == 0.05
    assert told.count(options.trial_steps) == 1  # the last trial, left out


@pytest.mark.parametrize(("rates", "times"), [((0.05,), 1), ((0.05, 0.02), 2), ((0.05, 1e-9, 0.02), 2.5)])
def test_progress_counts_the_steps_of_trials_too(rates, times):
    original, converted, inputs = layer()
    told = []
    options = replace(QUICK, rates=rates, trial=0.5)
    refit(original, converted, inputs, options, advance=told.append)
    assert sum(told) == options.all_steps == QUICK.steps * times
