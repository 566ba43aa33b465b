"""Every kernel on small inputs, to be run under a sanitizer.

    compute-sanitizer --tool memcheck  python benchmarks/sanitized_kernels.py
    compute-sanitizer --tool racecheck python benchmarks/sanitized_kernels.py

Run it once by itself before: then the kernels are compiled, and known to be right.
"""

import sys
from dataclasses import replace

import torch

from attention.cases import Case
from attention.checks import TOLERANCE, close, verify, verify_learned
from attention.inputs import Inputs, Learned
from headfuse.ops.decoupled_attention.decode import DecodeConfig
from headfuse.ops.decoupled_attention.naive import naive_attention
from headfuse.ops.decoupled_attention.prefill import prefill_attention
from headfuse.ops.decoupled_attention.rows import Rows
from headfuse.ops.hopper import on_hopper
from headfuse.ops.skinny_product.product import skinny_product_op

SMALL = Case(2, 320, 3, 5, query_heads=8, ragged=True)
DECODED = (SMALL, replace(SMALL, layout="tokens", page=16), replace(SMALL, head_dim=64, page=64, softcap=20.0))
HOPPER = (DecodeConfig("hopper", 64, 4, 4, 2), DecodeConfig("hopper", 128, 4, 3, 1))
# Rows, output channels and inputs: whole tiles and shared ones, all lines and some.
PRODUCTS = ((1, 1088, 1024), (5, 64 * 132, 512), (16, 1000, 2064))
LEARNED = replace(SMALL, context=150, ragged=False)


def main() -> None:
    """Run each kernel and say that its results are right."""
    if not torch.cuda.is_available():
        sys.exit("sanitized_kernels: wanted a CUDA device, got none; run it on a machine that has one")
    configs = (DecodeConfig(block=64), *(HOPPER if on_hopper(torch.device("cuda")) else ()))
    for case in DECODED:
        inputs = Inputs(case, sets=1)
        expected = inputs.reference()
        for config in configs:
            print(config, case, verify(inputs, config, expected))
    for case in (LEARNED, replace(LEARNED, ragged=True, window=40)):
        print(case, verify_learned(Learned(case)))
    print("prompts of their own lengths", verify_lengths(Learned(LEARNED)))
    for product in PRODUCTS if on_hopper(torch.device("cuda")) else ():
        print("product", product, verify_product(*product))


def verify_lengths(inputs: Learned) -> dict[str, float]:
    """Prompts that end before their rows do, against fp64."""
    lengths = torch.tensor([inputs.case.context - 60, 97], dtype=torch.int32, device="cuda")
    leaves = [x.detach() for x in inputs.leaves]
    got = prefill_attention(*leaves, inputs.maps, Rows(lengths))[0]
    expected = naive_attention(*(x.double() for x in leaves), inputs.maps, lengths=lengths)[0]
    return close((got,), (expected,), TOLERANCE[got.dtype])


def verify_product(rows: int, channels: int, inputs: int) -> dict[str, float]:
    """Few rows times weights, the sums of shared tiles added up, against fp64."""
    generator = torch.Generator("cuda").manual_seed(0)
    x, weight = (
        torch.randn(n, inputs, dtype=torch.bfloat16, device="cuda", generator=generator) for n in (rows, channels)
    )
    got = skinny_product_op(x, weight).sum(0, dtype=torch.float32)
    return close((got,), (x.double() @ weight.double().T,), TOLERANCE[x.dtype])


if __name__ == "__main__":
    main()
