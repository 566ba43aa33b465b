"""Products of few rows: all weights are dealt once, the kernel compiles and fits, and on Hopper it is right."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from headfuse.ops.hopper import on_hopper
from headfuse.ops.skinny_product.product import (
    BLOCK,
    MOST_ROWS,
    STAGES,
    TILE,
    cut_for,
    few_rows,
    skinny_linear,
    skinny_product_op,
    suits,
)

HOPPER_PROCESSORS = 132
needs_hopper = pytest.mark.skipif(
    not (torch.cuda.is_available() and on_hopper(torch.device("cuda"))), reason="needs a Hopper GPU"
)

SKINNY = """
from headfuse.ops.skinny_product.hopper_kernel import skinny_product_kernel

lines, sums, tile, block, stages = asked
constants = {"SUMS": sums, "LINES": lines, "ROWS": tile, "BLOCK": block, "STAGES": stages}
kinds = {"x": "*bf16", "weight": "*bf16", "out": "*fp32" if sums > 1 else "*bf16"}
report(skinny_product_kernel, kinds, constants, 4, aligned=("inputs",))
"""


@given(st.integers(1, 40_000), st.integers(1, 12_000), st.integers(1, 200))
def test_every_chunk_is_dealt_once_and_sums_suffice(channels, inputs, processors):
    cut = cut_for(channels, inputs, processors)
    tiles, depth = -(-channels // TILE), -(-inputs // BLOCK)
    assert cut.programs <= processors
    assert (cut.programs - 1) * cut.chunks < tiles * depth <= cut.programs * cut.chunks
    takers = [{chunk // cut.chunks for chunk in (tile * depth, (tile + 1) * depth - 1)} for tile in range(tiles)]
    assert max(max(each) - min(each) + 1 for each in takers) == cut.sums


@pytest.mark.parametrize(("channels", "inputs"), [(6144, 4096), (4096, 4096), (22016, 4096), (4096, 11008)])
def test_shapes_of_large_models_are_dealt_evenly(channels, inputs):
    cut = cut_for(channels, inputs, HOPPER_PROCESSORS)
    even = -(-channels // TILE) * -(-inputs // BLOCK) / HOPPER_PROCESSORS
    assert cut.chunks < even * 1.04
    assert cut.sums <= 3


def test_whole_tiles_are_dealt_where_that_is_even():
    assert cut_for(32_000, 4096, HOPPER_PROCESSORS).sums == 1


@pytest.mark.parametrize(("lines", "sums"), [(8, 1), (8, 2), (16, 3)])
def test_it_compiles_for_hopper_and_fits(lines, sums, tmp_path):
    pytest.importorskip("triton.experimental.gluon")
    from hopper_builds import REGISTERS, built

    from headfuse.ops.decoupled_attention.decode import RESERVED_MEMORY, SHARED_MEMORY

    found = built(SKINNY, (lines, sums, TILE, BLOCK, STAGES), tmp_path)
    assert found["shared"] <= SHARED_MEMORY - RESERVED_MEMORY
    assert found["STACK"] == found["LOCAL"] == 0
    assert found["threads"] * found["REG"] <= REGISTERS
    assert found["products"] == BLOCK // 16


def test_what_does_not_suit():
    wide = torch.empty(1024, 2048, dtype=torch.bfloat16, device="meta")
    assert not suits(wide)  # another device
    assert not few_rows(wide[:17])
    assert few_rows(wide[:16])


def test_more_rows_are_refused():
    x = torch.zeros(MOST_ROWS + 1, 32)
    with pytest.raises(ValueError, match="wanted at most 16 rows, got 17"):
        skinny_product_op(x, x)


@needs_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 5, 8, 9, 16])
@pytest.mark.parametrize(
    ("channels", "inputs"), [(4096, 1024), (1000, 2000), (1536, 4096), (576, 2304), (32_000, 128), (64, 40_000)]
)
def test_it_is_right(channels, inputs, rows, dtype):
    torch.manual_seed(0)
    weight = torch.randn(channels + 8, inputs, device="cuda", dtype=dtype)[8:]
    bias = torch.randn(channels, device="cuda", dtype=dtype)
    x = torch.randn(rows, 1, inputs, device="cuda", dtype=dtype)
    assert suits(weight)
    assert few_rows(x)
    with torch.no_grad():
        first, second = (skinny_linear(x, weight, bias) for _ in range(2))
    expected = nn.functional.linear(x.double(), weight.double(), bias.double())
    assert first.shape == expected.shape
    assert torch.equal(first, second)
    assert (first.double() - expected).norm() / expected.norm() < (3e-3 if dtype == torch.bfloat16 else 4e-4)


@needs_hopper
def test_a_compiler_knows_its_shape():
    x, weight = (torch.randn(n, 2048, device="cuda", dtype=torch.bfloat16) for n in (4, 1024))
    torch.library.opcheck(skinny_product_op, (x, weight), test_utils=("test_schema", "test_faketensor"))
