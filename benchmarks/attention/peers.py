"""Decoding of FlashInfer, where it is installed: its paged wrapper over its own kernels (fa2), planned beforehand."""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from attention.checks import TOLERANCE, close
from attention.inputs import Inputs
from attention.times import microseconds

# Tokens of a page; FlashInfer splits rows at whole pages.
PAGE = 16
WORKSPACE_BYTES = 512 * 2**20


def flashinfer_version() -> str | None:
    """The installed version, if there is one; nothing is imported, so that a broken one costs its own rows alone."""
    try:
        return version("flashinfer-python")
    except PackageNotFoundError:
        return None


def time_flashinfer(inputs: Inputs, expected: Tensor) -> dict[str, Any]:
    """The faster of its two kernels, for CUDA cores and for tensor cores, both found right.

    Every set of inputs is copied to pages first; `use_cuda_graph` stays off, so that the plan is made for this size
    alone, and what is timed is the plan's run in the same graph as the other libraries' calls.
    """
    pages = [paged(inputs, cache) for cache in (inputs.key, inputs.value)]
    found = []
    for tensor_cores in (False, True):
        run = planned(inputs, tensor_cores=tensor_cores)
        launches: list[Callable[[], Tensor]] = [
            lambda index=index, run=run: run(inputs.query[index], (pages[0][index], pages[1][index]))
            for index in range(inputs.sets)
        ]
        error = close((launches[0](),), (expected,), TOLERANCE[inputs.dtype])
        found.append(error | {"microseconds": microseconds(launches), "tensor_cores": tensor_cores})
    return min(found, key=lambda way: way["microseconds"])


def planned(inputs: Inputs, *, tensor_cores: bool) -> Callable[[Tensor, tuple[Tensor, Tensor]], Tensor]:
    """A step for rows of the case's context, of the pages in order."""
    from flashinfer.decode import BatchDecodeWithPagedKVCacheWrapper  # pyright: ignore[reportMissingImports]

    case, options = inputs.case, {"dtype": torch.int32, "device": "cuda"}
    count = case.context // PAGE
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda"),
        "HND",
        use_tensor_cores=tensor_cores,
        backend="fa2",
    )
    wrapper.plan(
        torch.arange(case.batch + 1, **options) * count,
        torch.arange(case.batch * count, **options),
        torch.full((case.batch,), PAGE, **options),
        case.query_heads,
        case.key_heads,
        case.head_dim,
        PAGE,
        q_data_type=inputs.dtype,
        kv_data_type=inputs.dtype,
    )
    return wrapper.run


def paged(inputs: Inputs, cache: Tensor) -> Tensor:
    """A dense cache `[sets, B, n, S, d]` as pages `[sets, B * S / PAGE, n, PAGE, d]`, row after row."""
    return cache.unflatten(3, (inputs.case.context // PAGE, PAGE)).transpose(2, 3).flatten(1, 2).contiguous()
