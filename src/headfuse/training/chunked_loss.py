"""Losses of logits that never exist whole: the output layer and the loss run over one chunk of positions at a time.

A loss of a chunk is a function of what belongs to its positions, of the hidden states there and of the output layer.
Its gradients are taken at once, chunk by chunk, while the logits are there: the backward pass only scales them, and no
logit is computed twice. n is the positions of a chunk, N of a batch, D the hidden size, V the vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor

# The fp32 logits of one chunk of positions stay below this; a loss keeps about six tensors of that size.
CHUNK_BYTES = 2**28


class OutputLayer(NamedTuple):
    """The projection from hidden states to logits, and the dtype in which it multiplies."""

    weight: Float[Tensor, "V D"]
    bias: Float[Tensor, "V"] | None
    dtype: torch.dtype


class ChunkedLoss(NamedTuple):
    """What is minimised, with gradients, and the single losses in it, without."""

    total: Float32[Tensor, ""]
    parts: Float32[Tensor, "losses"]


# Sums over the positions of a chunk: `sums(*positions, hidden, layer, *rest)`.
Sums = Callable[..., Float32[Tensor, "losses"]]


def project(hidden: Float[Tensor, "n D"], layer: OutputLayer) -> Float32[Tensor, "n V"]:
    """The logits of a chunk."""
    # Cast here and not by autocast, whose cache would outlive the chunk.
    bias = None if layer.bias is None else layer.bias.to(layer.dtype)
    return F.linear(hidden.to(layer.dtype), layer.weight.to(layer.dtype), bias).float()


def mean_over_chunks(
    sums: Sums,
    positions: Sequence[Tensor],
    hidden: Float[Tensor, "N D"],
    layer: OutputLayer,
    *rest: Any,
    shares: Sequence[float],
    chunk_tokens: int | None = None,
) -> ChunkedLoss:
    """Losses summed by `sums` over chunks and divided by N; the total counts each of them by its share.

    `positions` and `hidden` have N rows. A chunk has `chunk_tokens` positions, by default what makes its fp32 logits
    256 MiB; chunks are of equal size, or differ by one, so that a compiled function sees few shapes. The gradient of
    the layer is added up in fp32 at least. Can be differentiated once.
    """
    count, size = len(hidden), chunk_tokens or max(1, CHUNK_BYTES // (4 * len(layer.weight)))
    chunks = -(-count // size)

    def part(index: int, hidden: Tensor, layer: OutputLayer) -> Float32[Tensor, "losses"]:
        return sums(*(split[index] for split in splits), hidden, layer, *rest) / count

    splits = [torch.tensor_split(one, chunks) for one in positions]
    learning = torch.is_grad_enabled()
    total, parts = _Chunked.apply(part, chunks, tuple(shares), learning, layer.dtype, hidden, layer.weight, layer.bias)  # type: ignore[misc]
    return ChunkedLoss(total, parts)


class _Chunked(torch.autograd.Function):
    """The loop over chunks; `wanted` says which of hidden states, weight and bias have gradients."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        part, chunks, shares, learning, dtype, hidden, weight, bias = args
        wanted = [learning and needed for needed in ctx.needs_input_grad[5:]]
        hidden_gradients: list[Tensor] = []
        layer_gradients = [
            torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32)) if wants else None
            for wants, tensor in zip(wanted[1:], (weight, bias), strict=True)
        ]
        parts: Tensor | None = None
        for index, states in enumerate(torch.tensor_split(hidden, chunks)):
            leaves = [
                tensor.detach().requires_grad_(wants) for wants, tensor in zip(wanted, (states, weight), strict=False)
            ]
            leaf_bias = None if bias is None else bias.detach().requires_grad_(wanted[2])
            with torch.set_grad_enabled(any(wanted)):
                values = part(index, leaves[0], OutputLayer(leaves[1], leaf_bias, dtype))
                if any(wanted):
                    _take(_total(shares, values), [*leaves, leaf_bias], hidden_gradients, layer_gradients)
            parts = values.detach() if parts is None else parts + values.detach()
        assert parts is not None
        ctx.gradients = [torch.cat(hidden_gradients) if wanted[0] else None, *layer_gradients]
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        ctx.mark_non_differentiable(parts)
        return _total(shares, parts), parts

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            None if gradient is None else gradient.mul_(outer[0]).to(dtype)
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        ]
        del ctx.gradients
        return None, None, None, None, None, *scaled


def _total(shares: Sequence[float], values: Tensor) -> Tensor:
    """The weighted sum; the shares stay on the host, whence a CUDA graph can take nothing but numbers."""
    counted = [share * value for share, value in zip(shares, values.unbind(), strict=True) if share]
    return torch.stack(counted).sum()


def _take(
    total: Tensor,
    leaves: Sequence[Tensor | None],
    hidden_gradients: list[Tensor],
    layer_gradients: Sequence[Tensor | None],
) -> None:
    """Add a chunk's gradients to those of the layer, and append that of its hidden states."""
    differentiated = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    found = iter(torch.autograd.grad(total, differentiated))
    if leaves[0] is not None and leaves[0].requires_grad:
        hidden_gradients.append(next(found))
    for gathered in layer_gradients:
        if gathered is not None:
            gathered += next(found)
