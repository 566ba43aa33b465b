"""The decoding kernels against the specification in fp64, in Triton's interpreter where there is no GPU."""

import pytest
import torch
from problems import decoding, folded, paged, shuffled_table
from torch.testing import assert_close

pytest.importorskip("triton")
import triton

from headfuse.errors import ConfigError
from headfuse.ops.decoupled_attention import Scoring, naive_attention
from headfuse.ops.decoupled_attention.decode import (
    RESERVED_MEMORY,
    SHARED_MEMORY,
    DecodeConfig,
    decode_attention,
    hopper_config,
    split_count,
)
from headfuse.ops.decoupled_attention.rows import Rows
from headfuse.ops.decoupled_attention.scoring import PLAIN
from headfuse.ops.hopper import on_hopper

PASSES = DecodeConfig(block=32)
CONFIGS = {"passes": PASSES, "passes-one-split": DecodeConfig(block=64, programs=0)}
if on_hopper(torch.device("cuda" if torch.cuda.is_available() else "cpu")):
    CONFIGS |= {
        "hopper": DecodeConfig("hopper", block=32, warps=4, stages=4, programs=3),
        "hopper-large": DecodeConfig("hopper", block=64, warps=8, stages=3, programs=1),
        "hopper-one-split": DecodeConfig("hopper", block=64, warps=4, stages=2, programs=0),
    }
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
# The interpreter multiplies the bit patterns of bf16 matrices.
DTYPES = TOLERANCE if torch.cuda.is_available() else [torch.float32, torch.float16]
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
pytestmark = pytest.mark.usefixtures("_poisoned")


def made(config, *args, **options):
    """A problem of the precision that the configuration is for."""
    return decoding(*args, **{"dtype": torch.float16 if config.design == "hopper" else torch.float32} | options)


def check(problem, config=PASSES, *, scoring=PLAIN, cache=None, table=None):
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
    if config.design == "hopper" and dtype == torch.float32:
        pytest.skip("Hopper's matrix unit has no fp32")
    check(made(config, dtype=dtype, device=device), config)


@every_config
def test_rows_that_are_empty_or_one_token_long(config, device):
    check(made(config, lengths=(0, 1, 40), capacity=64, device=device), config)


@every_config
def test_rows_that_start_late(config, device):
    problem = made(config, lengths=(100, 90), device=device)
    problem.starts = torch.tensor([0, 67], dtype=torch.int32, device=device)
    problem.key[1, :, :67] = problem.value[1, :, :67] = float("nan")
    check(problem, config)


@every_config
@pytest.mark.parametrize(
    "scoring", [Scoring(softcap=2.0), Scoring(window=40), Scoring(scale=0.5, softcap=5.0, window=7)]
)
def test_soft_cap_and_window(config, scoring, device):
    check(made(config, device=device), config, scoring=scoring)


@every_config
@pytest.mark.parametrize("page", [16, 24, 32, 64])
@pytest.mark.parametrize("fold", [False, True], ids=["head-major", "folded"])
def test_pages_in_any_order(config, page, fold, device):
    problem = made(config, device=device)
    table = shuffled_table(2, -(-150 // page), device)
    cache = paged(problem.key, page, table, folded=fold), paged(problem.value, page, table, folded=fold)
    check(problem, config, cache=cache, table=table)


@every_config
def test_pages_of_rows_that_start_late(config, device):
    problem = made(config, lengths=(150, 140), device=device)
    problem.starts = torch.tensor([5, 77], dtype=torch.int32, device=device)
    table = shuffled_table(2, 3, device)
    cache = paged(problem.key, 64, table, folded=True), paged(problem.value, 64, table, folded=True)
    check(problem, config, cache=cache, table=table)


@every_config
def test_the_folded_cache_is_read_in_place(config, device):
    problem = made(config, device=device)
    check(problem, config, cache=(folded(problem.key), folded(problem.value)))


@every_config
@pytest.mark.parametrize("heads", [(1, 1, 1), (5, 2, 3), (20, 4, 1), (32, 2, 14), (8, 8, 8)])
def test_head_counts(config, heads, device):
    check(made(config, heads, lengths=(50,), dim=16, device=device), config)


@every_config
def test_grouped_queries(config, device):
    groups = [0, 0, 0, 1, 1, 1, 2, 2, 2]
    check(made(config, (9, 3, 3), maps=(groups, groups), device=device), config)
    check(made(config, (9, 3, 4), maps=(groups, [0, 0, 0, 1, 1, 2, 3, 3, 3]), device=device), config)


@every_config
@pytest.mark.parametrize("dim", [40, 96, 256])
def test_head_widths(config, dim, device):
    if config.design == "hopper" and dim % 16:
        pytest.skip("tokens of 16 bytes are copied at once")
    check(made(config, (4, 2, 3), lengths=(40, 33), dim=dim, device=device), config)


def test_the_default_suits_every_size(device):
    for heads in ((8, 2, 3), (100, 3, 5)):
        for dtype in DTYPES:
            check(decoding(heads, lengths=(40,), dim=64, dtype=dtype, device=device), None)


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


def test_more_tokens_get_larger_tiles_and_every_choice_fits():
    for heads, width in ((32, 128), (32, 64), (128, 128), (64, 256), (8, 16)):
        few, some, many = (hopper_config(heads, width, tokens) for tokens in (10, 60, 1000))
        assert few.block <= some.block <= many.block
        for config in (few, some, many):
            assert 16 * config.warps >= heads
            assert config.stages >= 3
            shared = (16 * config.warps + config.stages * config.block) * width * 2
            assert config.programs * (shared + RESERVED_MEMORY) <= SHARED_MEMORY


def test_splits_fill_whole_waves_with_the_fewest():
    assert [split_count(rows, 8192, 128, 132) for rows in (1, 8, 64, 128, 132, 133, 1000)] == [64, 16, 2, 1, 1, 3, 1]
    assert split_count(1, 100, 128, 132) == 1


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
