"""A linear layer for few rows, and how its weights are dealt to the multiprocessors."""

# Triton adds launch options to a kernel's own arguments.
# pyright: reportCallIssue=false

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from headfuse.ops.hopper import on_hopper, processors

# Rows from which on cuBLAS is as fast, and the size of a matrix below which it is.
MOST_ROWS, LEAST_WEIGHTS = 16, 1 << 20
# Output channels and inputs of a tile, and how many tiles a program holds.
TILE, BLOCK, STAGES = 64, 256, 5
# Whole tiles are dealt to programs where that costs no more of the time: their sums need not be added up.
UNEVEN = 0.06


@dataclass(frozen=True)
class Cut:
    """How a matrix is dealt: `chunks` of it to each of `programs`; at most `sums` of them share a tile."""

    chunks: int
    programs: int
    sums: int


@lru_cache
def cut_for(channels: int, inputs: int, processors: int) -> Cut:
    """Equal stretches of chunks for each multiprocessor, or whole tiles where those are about equal too."""
    tiles, depth = -(-channels // TILE), -(-inputs // BLOCK)
    rounds = -(-tiles // processors)
    if rounds * processors <= tiles * (1 + UNEVEN):
        return Cut(rounds * depth, -(-tiles // rounds), 1)
    chunks = -(-tiles * depth // processors)
    sums = max(((tile + 1) * depth - 1) // chunks - tile * depth // chunks + 1 for tile in range(tiles))
    return Cut(chunks, -(-tiles * depth // chunks), sums)


def suits(weight: Tensor) -> bool:
    """Whether the kernel takes these weights: a large matrix of half precision with aligned lines, on Hopper."""
    return (
        weight.dtype in (torch.bfloat16, torch.float16)
        and weight.numel() >= LEAST_WEIGHTS
        and weight.shape[1] % 16 == weight.stride(0) % 16 == 0
        and weight.stride(1) == 1
        and on_hopper(weight.device)
    )


def few_rows(x: Tensor) -> bool:
    """Whether the kernel is the faster way for these rows."""
    return 0 < x.numel() <= MOST_ROWS * x.shape[-1]


def skinny_linear(
    x: Float[Tensor, "... D"], weight: Float[Tensor, "n D"], bias: Float[Tensor, "n"] | None = None
) -> Float[Tensor, "... n"]:
    """`torch.nn.functional.linear` for `few_rows` of the weights' type and weights that it `suits`, without gradients.

    The kernel's sums are added up here, so that a compiler can do it where they are used.
    """
    sums = skinny_product_op(x.reshape(-1, x.shape[-1]), weight)
    out = sums[0] if len(sums) == 1 else sums.sum(0)
    out = out if bias is None else out + bias
    return out.to(x.dtype).view(*x.shape[:-1], len(weight))


@torch.library.custom_op("headfuse::skinny_product", mutates_args=())
def skinny_product_op(x: Tensor, weight: Tensor) -> Tensor:
    """`x [m, D]` times `weight [n, D]` transposed, as sums `[s, m, n]` to be added up, in fp32 if there are several.

    Raises ValueError for more than `MOST_ROWS` rows.
    """
    if len(x) > MOST_ROWS:
        raise ValueError(f"wanted at most {MOST_ROWS} rows, got {len(x)}; multiply by torch.nn.functional.linear")
    from headfuse.ops.skinny_product.hopper_kernel import skinny_product_kernel  # Gluon is not in every Triton

    sums, cut = room_for(x, weight), cut_for(*weight.shape, processors(x.device))
    # Rows and addresses that are copied 16 bytes at once.
    x, weight = (each if each.data_ptr() % 16 == 0 else each.clone() for each in (x.contiguous(), weight))
    skinny_product_kernel[cut.programs,](
        x,
        weight,
        sums,
        len(x),
        *weight.shape,
        x.stride(0),
        weight.stride(0),
        cut.chunks,
        SUMS=cut.sums,
        LINES=8 if len(x) <= 8 else 16,
        ROWS=TILE,
        BLOCK=BLOCK,
        STAGES=STAGES,
        num_warps=4,
        launch_pdl=True,
    )
    return sums


@skinny_product_op.register_fake
def _made(x: Tensor, weight: Tensor) -> Tensor:
    return room_for(x, weight)


def room_for(x: Tensor, weight: Tensor) -> Tensor:
    """What the sums are written to."""
    cut = cut_for(*weight.shape, processors(x.device))
    dtype = x.dtype if cut.sums == 1 else torch.float32
    return x.new_empty(cut.sums, len(x), len(weight), dtype=dtype)
