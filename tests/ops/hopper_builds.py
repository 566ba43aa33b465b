"""Compiling Gluon kernels for Hopper without a GPU, and what the machine code takes of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

# Of a multiprocessor.
REGISTERS = 65_536

REPORT = """
import json, subprocess, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

def report(kernel, kinds, constants, warps, unaligned=(), aligned=(), **facts):
    names = kernel.arg_names
    kinds = kinds | dict.fromkeys(constants, "constexpr")
    signature = {name: kinds.get(name, "i32") for name in names}
    strides = [name for name in names if name.endswith("stride") and name not in unaligned]
    wide = [*strides, *aligned] + [name for name in names if kinds.get(name, "").startswith("*")]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in wide}
    source = GluonASTSource(kernel, signature, {(names.index(k),): v for k, v in constants.items()}, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    open("kernel.cubin", "wb").write(compiled.asm["cubin"])
    usage = subprocess.check_output([triton.knobs.nvidia.cuobjdump.path, "-res-usage", "kernel.cubin"], text=True)
    found = dict(part.split(":")[:2] for part in usage.split() if part.startswith(("REG:", "STACK:", "LOCAL:")))
    print(json.dumps(facts | {name: int(value) for name, value in found.items()} | {
        "products": compiled.asm["ptx"].count("wgmma.mma_async"),
        "copies": compiled.asm["ptx"].count("cp.async.bulk.tensor"),
        "shared": compiled.metadata.shared,
        "threads": 32 * compiled.metadata.num_warps,
    }))

asked = json.loads(sys.argv[1])
"""


def built(script: str, asked: object, folder: Path) -> dict[str, int]:
    """What `script` reports of a kernel built as `asked`, in a process of its own, as this one may interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", REPORT + script, json.dumps(asked)],
        cwd=folder,
        env=environment | {"TRITON_CACHE_DIR": str(folder / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])
