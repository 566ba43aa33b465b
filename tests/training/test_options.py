"""The numbers of a run: what is refused, how long a step is, how the rate rises and falls."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headfuse.errors import ConfigError
from headfuse.training.options import LARGEST_STEP, TrainingOptions, rate_factor, rows_for


@given(st.integers(1, 400), st.floats(0, 1), st.floats(0, 1))
def test_the_rate_rises_to_its_peak_and_falls_to_its_last_share(steps, warmup, final):
    factors = [rate_factor(step, steps, warmup=warmup, final=final) for step in range(steps)]
    top = factors.index(max(factors))
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    assert 0 < factors[0] <= 1
    assert max(factors) == pytest.approx(1.0)
    assert min(factors[top:]) >= final - 1e-12


def test_the_rate_rises_in_a_line_and_falls_as_a_cosine():
    factors = [rate_factor(step, 12, warmup=1 / 3, final=0.1) for step in range(12)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == pytest.approx(1.0)
    assert factors[8] == pytest.approx(0.55)  # half way down
    assert rate_factor(12, 12, warmup=1 / 3, final=0.1) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("tokens", "length", "rows"),
    [
        (1_000_000, 512, 8),
        (206_000, 512, 2),
        (41_000, 512, 1),
        (100, 512, 1),
        (10**9, 512, LARGEST_STEP // 512),
        (10**9, 4096, LARGEST_STEP // 4096),
    ],
)
def test_rows_make_about_128_steps_and_stay_below_the_largest_step(tokens, length, rows):
    assert rows_for(tokens, length) == rows
    assert rows * length <= max(LARGEST_STEP, length)


def test_rows_are_shared_evenly_by_processes():
    assert [rows_for(41_000, 512, world) for world in (1, 2, 3)] == [1, 2, 3]
    assert [rows_for(1_000_000, 512, world) for world in (1, 2, 3)] == [8, 8, 9]


def test_a_budget_is_spent_in_whole_steps():
    options = TrainingOptions(tokens=1000, rows=3, length=50)
    assert (options.step_tokens, options.steps) == (150, 6)


def test_options_survive_json():
    options = TrainingOptions(micro_rows=4, update="muon")
    found = json.loads(json.dumps(options.as_dict()))
    assert found == options.as_dict()
    assert TrainingOptions(**(found | {"betas": tuple(found["betas"])})) == options


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"rows": 0}, "wanted rows above zero, got 0"),
        ({"length": -1}, "wanted length above zero, got -1"),
        ({"rate": 0.0}, "wanted rate above zero, got 0.0"),
        ({"rate": float("nan")}, "wanted rate above zero, got nan"),
        ({"tokens": 8191}, "wanted at least one step of 16 x 512 tokens, got a budget of 8191"),
        ({"micro_rows": 3}, "wanted micro_rows to divide 16 rows, got 3"),
        ({"micro_rows": 0}, "wanted micro_rows to divide 16 rows, got 0"),
        ({"warmup": 1.5}, "wanted warmup from 0 to 1, got 1.5"),
        ({"final": -0.1}, "wanted final from 0 to 1, got -0.1"),
        ({"clip": -1.0}, "wanted clip of at least zero, got -1.0"),
        ({"weight_decay": -0.1}, "wanted weight_decay of at least zero"),
        ({"save_every": -1}, "wanted save_every of at least zero, got -1"),
    ],
    ids=str,
)
def test_what_no_run_can_obey_is_refused_in_one_line(changed, words):
    with pytest.raises(ConfigError) as error:
        TrainingOptions(**changed)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
