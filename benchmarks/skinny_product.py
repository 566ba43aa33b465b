"""Products of few rows with the weights of a model of LLaMA2-7B's shape, and small ones: writes skinny_product.json.

    python benchmarks/skinny_product.py

Each is found right, then timed in CUDA graphs over matrices that together are larger than the L2 cache, beside cuBLAS.
The sums of tiles that programs share are left to be added up, as a compiled step leaves them to whoever reads them.
"""

import argparse
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear

from attention.times import memory_rates, microseconds
from headfuse.ops.skinny_product.product import skinny_product_op
from training_free import provenance, write

RESULTS = Path(__file__).parent / "results" / "skinny_product.json"
# Output channels and inputs: the layers of LLaMA2-7B with 6 + 10 and with all heads, then small ones.
SHAPES = ((6144, 4096), (12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008), (32000, 4096))
SHAPES += ((2048, 2048), (1024, 1024), (1536, 576))
ROWS = (1, 8, 16)
READ_BYTES, FEWEST = 500_000_000, 4
TOLERANCE = 3e-3


def main() -> None:
    """Every shape with every number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", help="commit to record where the checkout is not a repository")
    parser.add_argument("--out", default=str(RESULTS))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("skinny_product: wanted a Hopper GPU, got none; run it on a machine that has one")
    started, rates, rows = time.monotonic(), memory_rates(), []
    for shape, count in product(SHAPES, ROWS):
        rows.append(measure(*shape, count))
        shown = (f"{name} {rows[-1][name]['microseconds']:7.2f} us" for name in ("cublas", "ours"))
        print(f"{count:>2} rows {shape[0]:>5} x {shape[1]:<5}", *shown, flush=True)
        meta = provenance("skinny_product.py", [], options.commit, time.monotonic() - started)
        write(Path(options.out), {"meta": meta | rates | {"dtype": "bfloat16"}, "rows": rows})


def measure(channels: int, inputs: int, count: int) -> dict[str, Any]:
    """Microseconds and GB/s of weights, ours and cuBLAS's. Raises ArithmeticError for wrong results."""
    generator = torch.Generator("cuda").manual_seed(0)
    sets = max(FEWEST, READ_BYTES // (2 * channels * inputs))
    weights, x = (
        torch.randn(sets, n, inputs, dtype=torch.bfloat16, device="cuda", generator=generator)
        for n in (channels, count)
    )
    sums, expected = skinny_product_op(x[0], weights[0]), x[0].double() @ weights[0].double().T
    error = float((sums.double().sum(0) - expected).norm() / expected.norm())
    if not error < TOLERANCE:
        raise ArithmeticError(
            f"{count} rows, {channels} x {inputs}: wanted an error below {TOLERANCE}, got {error:.1e}"
        )
    row: dict[str, Any] = {"rows": count, "channels": channels, "inputs": inputs, "sums": len(sums), "error": error}
    for name, compute in (("cublas", linear), ("ours", skinny_product_op)):
        spent = microseconds([lambda index=index, f=compute: f(x[index], weights[index]) for index in range(sets)])
        row[name] = {"microseconds": round(spent, 2), "gb_s": round(2 * channels * inputs / spent / 1e3, 1)}
    return row


if __name__ == "__main__":
    main()
