"""The prefill kernel for Hopper: it compiles and fits without a GPU, and on one it is right."""

import pytest
import torch
from problems import random_map

pytest.importorskip("triton.experimental.gluon")

from hopper_builds import REGISTERS, built

from headfuse.ops.decoupled_attention import Rows, Scoring, head_maps, naive_attention
from headfuse.ops.decoupled_attention.decode import RESERVED_MEMORY, SHARED_MEMORY
from headfuse.ops.decoupled_attention.prefill import prefill_attention, suits_hopper
from headfuse.ops.decoupled_attention.scoring import PLAIN
from headfuse.ops.hopper import on_hopper

PREFILL = """
from triton.experimental.gluon import language as gl
from headfuse.ops.decoupled_attention.hopper_prefill_kernel import hopper_prefill_kernel
from headfuse.ops.decoupled_attention.prefill import HOPPER_BLOCK, HOPPER_STAGES

def tiles(lines):
    layout = gl.NVMMASharedLayout.get_default_for([1, 1, lines, dim], gl.bfloat16)
    return f"tensordesc<bf16[1, 1, {lines}, {dim}],{layout!r}>"

dim, softcap, padded = asked
constants = {"DIM": dim, "STAGES": HOPPER_STAGES, "SOFTCAP": softcap, "LENGTHS": padded}
constants |= {} if padded else {"starts": None, "lengths": None}
kinds = {"query": tiles(64), "key": tiles(HOPPER_BLOCK), "value": tiles(HOPPER_BLOCK), "out": "*bf16", "lse": "*fp32"}
kinds |= {"lengths": "*i32", "starts": "*i32", "key_map": "*i64", "value_map": "*i64"}
kinds |= {"scale": "fp32", "softcap": "fp32"}
report(hopper_prefill_kernel, kinds, constants, 4)
"""
# Some assemblers put a few of a masked tile's registers aside.
FEW_BYTES = 128

needs_hopper = pytest.mark.skipif(
    not (torch.cuda.is_available() and on_hopper(torch.device("cuda"))), reason="runs on Hopper alone"
)


@pytest.mark.parametrize("shape", [(128, False, False), (64, True, True)], ids=str)
def test_it_compiles_and_fits(shape, tmp_path):
    found = built(PREFILL, shape, tmp_path)
    assert found["products"] > 0
    assert found["copies"] > 0
    assert found["STACK"] <= FEW_BYTES
    assert found["LOCAL"] == 0
    assert found["shared"] + RESERVED_MEMORY <= SHARED_MEMORY
    assert found["threads"] * found["REG"] <= REGISTERS


@needs_hopper
@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "count", "total", "dim", "starts", "lengths", "scoring"),
    [
        ((8, 3, 5), 128, 128, 128, None, None, PLAIN),
        ((8, 3, 5), 1000, 1000, 128, None, None, PLAIN),
        ((4, 1, 2), 64, 64, 64, None, None, PLAIN),
        ((4, 4, 1), 333, 333, 64, None, None, PLAIN),
        ((5, 2, 5), 100, 777, 128, None, None, PLAIN),  # a chunk against what came before
        ((8, 3, 5), 500, 500, 128, (0, 130, 499), None, PLAIN),
        ((8, 3, 5), 300, 300, 64, (299, 7, 128), None, Scoring(softcap=5.0)),
        ((4, 2, 2), 200, 450, 128, (300, 0, 449), None, Scoring(scale=0.3)),
        ((8, 3, 5), 200, 700, 128, None, (700, 333, 200), PLAIN),
        ((4, 2, 2), 300, 512, 64, (0, 100, 17), (512, 384, 301), Scoring(softcap=5.0)),
        ((4, 2, 2), 150, 300, 128, (0, 5, 0), (90, 6, 0), PLAIN),  # rows shorter than their queries
        ((32, 6, 10), 2048, 2048, 128, None, None, PLAIN),
    ],
)
def test_it_is_right(heads, count, total, dim, starts, lengths, scoring, dtype):
    queries, keys, values = heads
    torch.manual_seed(0)
    maps = head_maps(random_map(keys, queries), random_map(values, queries), "cuda")
    shapes = ((queries, count), (keys, total), (values, total))
    query, key, value = (torch.randn(3, *shape, dim, device="cuda", dtype=dtype) for shape in shapes)
    clean = [x.double() for x in (query, key, value)]
    for row in range(3):
        begin, end = starts[row] if starts else 0, lengths[row] if lengths else total
        for cache, kept in zip((key, value), clean[1:], strict=True):
            for outside in (slice(0, begin), slice(end, total)):
                cache[row, :, outside], kept[row, :, outside] = float("nan"), 0
    first, length = (x and torch.tensor(x, dtype=torch.int32, device="cuda") for x in (starts, lengths))
    rows = Rows(length, first)
    assert suits_hopper(query, key, value, rows, scoring)
    expected, expected_lse = naive_attention(*clean, maps, lengths=length, starts=first, scoring=scoring)
    for layout in (lambda x: x, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)):
        out, lse = prefill_attention(*map(layout, (query, key, value)), maps, rows, scoring=scoring)
        assert (out.double() - expected).norm() / expected.norm() < 1e-2
        torch.testing.assert_close(lse.double(), expected_lse, atol=1e-2, rtol=1e-2)
