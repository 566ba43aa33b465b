"""The decoding kernels against the specification in fp64, in Triton's interpreter where there is no GPU."""

import pytest
import torch
from problems import decoding, folded, paged, shuffled_table
from torch.testing import assert_close

pytest.importorskip("triton")
import triton

from headfuse.errors import ConfigError
from headfuse.ops.decoupled_attention import Scoring, naive_attention
from headfuse.ops.decoupled_attention.decode import DecodeConfig, decode_attention, default_config
from headfuse.ops.decoupled_attention.rows import Rows
from headfuse.ops.decoupled_attention.scoring import PLAIN

FUSED = DecodeConfig(block=32, programs=2)
CONFIGS = {
    "fused": FUSED,
    "fused-one-split": DecodeConfig(block=64, programs=0),
    "passes": DecodeConfig("passes", block=32, warps=4, stages=3, programs=2),
}
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
# The interpreter multiplies the bit patterns of bf16 matrices.
DTYPES = TOLERANCE if torch.cuda.is_available() else [torch.float32, torch.float16]
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
pytestmark = pytest.mark.usefixtures("_poisoned")


def check(problem, config=FUSED, *, scoring=PLAIN, cache=None, table=None):
    key, value = cache or (problem.key, problem.value)
    out, lse = decode_attention(
        problem.query,
        key,
        value,
        problem.maps,
        Rows(problem.lengths, problem.starts, table),
        scoring=scoring,
        config=config,
    )
    options = {"lengths": problem.lengths, "starts": problem.starts, "scoring": scoring}
    expected, expected_lse = naive_attention(*problem.naive_inputs(), **options)
    tolerance = TOLERANCE[problem.query.dtype]
    error = (out.double() - expected[:, :, 0]).norm() / expected.norm().clamp(min=1e-30)
    assert error < tolerance, error
    assert_close(lse.double(), expected_lse[:, :, 0], atol=tolerance, rtol=tolerance)
    assert out.dtype == problem.query.dtype


@every_config
@pytest.mark.parametrize("dtype", DTYPES)
def test_ragged_rows(config, dtype, device):
    check(decoding(dtype=dtype, device=device), config)


@every_config
def test_rows_that_are_empty_or_one_token_long(config, device):
    check(decoding(lengths=(0, 1, 40), capacity=64, device=device), config)


@every_config
def test_rows_that_start_late(config, device):
    problem = decoding(lengths=(100, 90), device=device)
    problem.starts = torch.tensor([0, 67], dtype=torch.int32, device=device)
    problem.key[1, :, :67] = problem.value[1, :, :67] = float("nan")
    check(problem, config)


@every_config
@pytest.mark.parametrize(
    "scoring", [Scoring(softcap=2.0), Scoring(window=40), Scoring(scale=0.5, softcap=5.0, window=7)]
)
def test_soft_cap_and_window(config, scoring, device):
    check(decoding(device=device), config, scoring=scoring)


@every_config
@pytest.mark.parametrize("page", [16, 24, 32, 64])
@pytest.mark.parametrize("fold", [False, True], ids=["head-major", "folded"])
def test_pages_in_any_order(config, page, fold, device):
    problem = decoding(device=device)
    table = shuffled_table(2, -(-150 // page), device)
    cache = paged(problem.key, page, table, folded=fold), paged(problem.value, page, table, folded=fold)
    check(problem, config, cache=cache, table=table)


def test_pages_of_rows_that_start_late(device):
    problem = decoding(lengths=(150, 140), device=device)
    problem.starts = torch.tensor([5, 77], dtype=torch.int32, device=device)
    table = shuffled_table(2, 3, device)
    cache = paged(problem.key, 64, table, folded=True), paged(problem.value, 64, table, folded=True)
    check(problem, FUSED, cache=cache, table=table)


@every_config
def test_the_folded_cache_is_read_in_place(config, device):
    problem = decoding(device=device)
    check(problem, config, cache=(folded(problem.key), folded(problem.value)))


@every_config
@pytest.mark.parametrize("heads", [(1, 1, 1), (5, 2, 3), (20, 4, 1), (32, 2, 14), (8, 8, 8)])
def test_head_counts(config, heads, device):
    check(decoding(heads, lengths=(50,), dim=16, device=device), config)


@every_config
def test_grouped_queries(config, device):
    groups = [0, 0, 0, 1, 1, 1, 2, 2, 2]
    check(decoding((9, 3, 3), maps=(groups, groups), device=device), config)
    check(decoding((9, 3, 4), maps=(groups, [0, 0, 0, 1, 1, 2, 3, 3, 3]), device=device), config)


@every_config
@pytest.mark.parametrize("dim", [40, 96, 256])
def test_head_widths(config, dim, device):
    check(decoding((4, 2, 3), lengths=(40, 33), dim=dim, device=device), config)


def test_the_default_suits_every_size(device):
    for heads in ((8, 2, 3), (100, 3, 5)):
        for dtype in DTYPES:
            check(decoding(heads, lengths=(40,), dim=64, dtype=dtype, device=device), None)
    problem = decoding((128, 2, 3), dim=128)
    assert default_config(problem.query.bfloat16()).design == "passes"


def test_a_query_that_is_a_view(device):
    problem = decoding(device=device)
    wide = torch.randn(2, 3, 8, 32, device=device)
    wide[:, 1] = problem.query
    problem.query = wide[:, 1]
    check(problem)


def test_a_repeated_step_repeats_every_bit(device):
    problem = decoding(device=device)
    steps = [
        decode_attention(problem.query, problem.key, problem.value, problem.maps, Rows(problem.lengths)) for _ in "12"
    ]
    assert torch.equal(steps[0][0], steps[1][0])


def test_configurations_that_are_wrong_on_hopper_are_refused():
    with pytest.raises(ConfigError, match="wanted 8 warps, got 4"):
        DecodeConfig(warps=4)
    for dtype in (torch.bfloat16, torch.float32):
        for width in (16, 64, 96, 128, 256):
            config = default_config(torch.empty(1, 32, width, dtype=dtype))
            assert config.design == "passes" or (width > 64 and config.warps == 8)


def test_heads_that_the_maps_do_not_know_are_refused(device):
    problem = decoding(device=device)
    with pytest.raises(ConfigError, match="the maps want"):
        decode_attention(problem.query, problem.value, problem.key, problem.maps, Rows(problem.lengths))


def test_channels_apart_are_refused(device):
    problem = decoding(device=device)
    apart = problem.key.transpose(2, 3).contiguous().transpose(2, 3)
    with pytest.raises(ConfigError, match="side by side"):
        decode_attention(problem.query, apart, problem.value, problem.maps, Rows(problem.lengths))


def test_the_kernels_are_interpreted_where_there_is_no_gpu():
    assert torch.cuda.is_available() or triton.knobs.runtime.interpret
