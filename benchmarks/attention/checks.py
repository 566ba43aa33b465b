"""Whether a kernel is right: its results against fp64, and a second run against the first."""

import torch
from torch import Tensor

from attention.cases import DTYPES
from attention.inputs import Inputs, Learned
from headfuse.ops.decoupled_attention.decode import DecodeConfig

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 1e-2}
LSE_TOLERANCE = 2e-2


def errors(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Relative error of the output, largest error of the log-sum-exp."""
    out, lse = got[0].double(), got[1].double()
    return float((out - expected[0]).norm() / expected[0].norm()), float((lse - expected[1]).abs().max())


def verify(inputs: Inputs, config: DecodeConfig | None, expected: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Two runs on set 0, the second must repeat the first bit by bit. Raises AssertionError for a wrong result."""
    first, second = inputs.step(0, config), inputs.step(0, config)
    error, lse_error = errors(first, expected)
    assert error < TOLERANCE[inputs.dtype], f"wrong output, relative error {error:.2e}"
    assert lse_error < LSE_TOLERANCE, f"wrong log-sum-exp, error {lse_error:.2e}"
    assert torch.equal(first[0], second[0]), "two runs differ"
    return {"error": error, "lse_error": lse_error}


def close(got: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> dict[str, float]:
    """The largest relative error of a tensor. Raises AssertionError above the tolerance."""
    worst = max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(got, expected, strict=True))
    assert worst < tolerance, f"wrong result, relative error {worst:.2e}"
    return {"error": worst}


def verify_learned(inputs: Learned) -> dict[str, float]:
    """Output and gradients against fp64, and a second run against the first, bit by bit."""
    first, second = (inputs.triton() for _ in range(2))
    gradients, again = inputs.gradients(first), inputs.gradients(second)
    assert all(torch.equal(a, b) for a, b in zip((first, *gradients), (second, *again), strict=True)), "two runs differ"
    tolerance = 2 * TOLERANCE[DTYPES[inputs.case.dtype]]
    return close((first, *gradients), inputs.reference(), tolerance)
