"""The Gluon kernel compiles for Hopper, uses its matrix unit, and fits it as `hopper_config` says; no GPU is needed."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton.experimental.gluon")

# In a process of its own: where there is no GPU, this one's Triton interprets.
COMPILE = """
import json, subprocess, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from headfuse.ops.decoupled_attention.decode import hopper_config
from headfuse.ops.decoupled_attention.hopper_kernel import hopper_kernel

heads, dim, page, softcap, tokens = json.loads(sys.argv[1])
width = triton.next_power_of_2(dim)
config = hopper_config(heads, width, tokens)
names = hopper_kernel.arg_names
constants = {"DIM": dim, "PADDED_DIM": width, "QUERIES": 16 * config.warps, "BLOCK": config.block}
constants |= {"STAGES": config.stages, "PAGE": page, "SOFTCAP": softcap, "DEPENDENT": True, "starts": None}
constants |= {} if page else {"block_table": None}
pointers = {name: "*bf16" for name in ("query", "key", "value", "out")}
pointers |= {name: "*fp32" for name in ("lse", "partial_out", "partial_lse")}
pointers |= {"lengths": "*i32", "block_table": "*i32", "key_map": "*i64", "value_map": "*i64"}
kinds = pointers | {"scale": "fp32", "softcap": "fp32"} | dict.fromkeys(constants, "constexpr")
signature = {name: kinds.get(name, "i32") for name in names}
aligned = [name for name in names if name in pointers or name.endswith("stride") and name != "table_row_stride"]
attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned if name not in constants}
source = GluonASTSource(hopper_kernel, signature, {(names.index(k),): v for k, v in constants.items()}, attributes)
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": config.warps})
open("kernel.cubin", "wb").write(compiled.asm["cubin"])
usage = subprocess.check_output([triton.knobs.nvidia.cuobjdump.path, "-res-usage", "kernel.cubin"], text=True)
found = dict(part.split(":")[:2] for part in usage.split() if part.startswith(("REG:", "STACK:", "LOCAL:")))
print(json.dumps({name: int(value) for name, value in found.items()} | {
    "products": compiled.asm["ptx"].count("wgmma.mma_async"),
    "shared": compiled.metadata.shared,
    "programs": config.programs,
    "threads": 32 * config.warps,
}))
"""
REGISTERS, SHARED_MEMORY, RESERVED_MEMORY = 65_536, 228 * 1024, 1024


@pytest.mark.parametrize(
    "shape",
    [
        (32, 128, 0, False, 1000),
        (32, 64, 16, False, 1000),
        (40, 96, 64, True, 60),
        (8, 32, 0, False, 10),
        (128, 128, 24, False, 1000),
        (64, 256, 0, False, 1000),
    ],
    ids=str,
)
def test_it_compiles_and_fits(shape, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps(shape)],
        cwd=tmp_path,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["products"] > 0
    assert found["STACK"] == found["LOCAL"] == 0
    assert found["programs"] * (found["shared"] + RESERVED_MEMORY) <= SHARED_MEMORY
    assert found["programs"] * found["threads"] * found["REG"] <= REGISTERS
