"""The Gluon kernel compiles for Hopper, uses its matrix unit, and fits it as `hopper_config` says; no GPU is needed."""

import pytest

pytest.importorskip("triton.experimental.gluon")

from hopper_builds import REGISTERS, built

from headfuse.ops.decoupled_attention.decode import RESERVED_MEMORY, SHARED_MEMORY

DECODE = """
from headfuse.ops.decoupled_attention.decode import hopper_config
from headfuse.ops.decoupled_attention.hopper_kernel import hopper_kernel

heads, dim, page, softcap, tokens = asked
width = triton.next_power_of_2(dim)
config = hopper_config(heads, width, tokens)
constants = {"DIM": dim, "PADDED_DIM": width, "QUERIES": 16 * config.warps, "BLOCK": config.block}
constants |= {"STAGES": config.stages, "PAGE": page, "SOFTCAP": softcap, "DEPENDENT": True, "starts": None}
constants |= {} if page else {"block_table": None}
kinds = {name: "*bf16" for name in ("query", "key", "value", "out")}
kinds |= {name: "*fp32" for name in ("lse", "partial_out", "partial_lse")}
kinds |= {"lengths": "*i32", "block_table": "*i32", "key_map": "*i64", "value_map": "*i64"}
kinds |= {"scale": "fp32", "softcap": "fp32"}
report(hopper_kernel, kinds, constants, config.warps, ["table_row_stride"], programs=config.programs)
"""


@pytest.mark.parametrize(
    "shape",
    [
        (32, 128, 0, False, 1000),
        (32, 64, 16, False, 1000),
        (40, 96, 64, True, 60),
        (8, 32, 0, False, 10),
        (128, 128, 24, False, 1000),
        (64, 256, 0, False, 1000),
        (16, 192, 0, False, 1000),
    ],
    ids=str,
)
def test_it_compiles_and_fits(shape, tmp_path):
    found = built(DECODE, shape, tmp_path)
    assert found["products"] > 0
    assert found["STACK"] == found["LOCAL"] == 0
    assert found["programs"] * (found["shared"] + RESERVED_MEMORY) <= SHARED_MEMORY
    assert found["programs"] * found["threads"] * found["REG"] <= REGISTERS
