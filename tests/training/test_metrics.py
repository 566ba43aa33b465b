"""What a run says of itself: operations counted by hand, and a log that survives a kill."""

import json

import pytest
import torch

from headfuse.training.metrics import MetricsLog, flops_per_token, peak_flops
from pico import VOCABULARY, pico

# Of the tiny models: hidden size 32, 4 heads of 8, 2 layers, 48 wide inside.
HIDDEN, WIDE, LAYERS, HEADS, WIDTH = 32, 48, 2, 4, 8
LENGTH = 20
OUTPUT = VOCABULARY * HIDDEN
# Scores and mixture of a query head over the tokens before it, half of them on average.
ATTENTION = LAYERS * HEADS * (2 * WIDTH + 2 * WIDTH) * LENGTH / 2


@pytest.mark.parametrize("tied", [False, True])
def test_a_llama_s_operations_are_those_of_its_matrices_and_its_attention(tied):
    model = pico("llama", tie_word_embeddings=tied)
    matrices = LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * WIDE) + OUTPUT
    assert flops_per_token(model, LENGTH) == 2 * matrices + ATTENTION


def test_keys_and_values_that_are_shared_cost_less_to_make_and_as_much_to_read():
    model = pico("llama", num_key_value_heads=1)
    matrices = LAYERS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * WIDTH + 3 * HIDDEN * WIDE) + OUTPUT
    assert flops_per_token(model, LENGTH) == 2 * matrices + ATTENTION


def test_gpt2_s_operations_leave_out_its_position_embeddings():
    matrices = LAYERS * (4 * HIDDEN * HIDDEN + 2 * HIDDEN * WIDE) + OUTPUT
    assert flops_per_token(pico("gpt2"), LENGTH) == 2 * matrices + ATTENTION


def test_a_width_of_its_own_counts():
    model = pico("qwen3")
    matrices = LAYERS * (4 * HIDDEN * HEADS * 16 + 3 * HIDDEN * WIDE) + OUTPUT
    assert flops_per_token(model, LENGTH) == 2 * matrices + 2 * ATTENTION


def test_a_processor_without_an_entry_has_no_peak():
    assert peak_flops(torch.device("cpu")) is None


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_log_goes_on_after_the_step_that_is_resumed_from(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    log = MetricsLog(path)
    for step in range(1, 8):
        log.add({"step": step, "loss": 1 / step})
    resumed = MetricsLog(path, first_step=5)
    assert [row["step"] for row in resumed.rows] == [1, 2, 3, 4, 5]
    resumed.add({"step": 6, "loss": 0.0})
    assert [row["step"] for row in lines(path)] == [1, 2, 3, 4, 5, 6]
    assert lines(path) == resumed.rows
    assert [file.name for file in path.parent.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("torn", ['{"step": 4, "lo', "{", ""])
def test_a_last_line_that_a_kill_cut_short_is_dropped(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n' + torn)
    log = MetricsLog(path, first_step=4)
    log.add({"step": 4})
    assert [row["step"] for row in lines(path)] == [1, 2, 3, 4]


def test_a_new_run_starts_a_new_log(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    assert MetricsLog(path).rows == []
    assert path.read_text() == ""


def test_a_log_without_a_file_keeps_its_rows():
    log = MetricsLog(None)
    log.add({"step": 1})
    assert log.rows == [{"step": 1}]
