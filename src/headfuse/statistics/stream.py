"""Running a model one decoder layer at a time over calibration text, so that one layer's inputs are in memory.

The hidden states of all rows advance together; nothing is ever cached on disk. Works for every family whose
decoder layers map hidden states to hidden states, because the arguments of the first layer are captured, not
rebuilt.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headfuse.precision import Precision, precision_context
from headfuse.progress import Advance, ignore

# Tokens that run through a layer at once: large enough to fill a GPU, small enough for attention's memory.
TOKENS_PER_BATCH = 8192


@dataclass(frozen=True)
class LayerInputs:
    """What reaches one layer's attention: `hidden` `[N, T, D]`, and the size of the residual stream there.

    `stream_energy` `[N, T]` is the mean square of the layer's input per token; `positions` are the rotary cosines and
    sines `[1, T, r]` that the family passes, or None.
    """

    layer: int
    hidden: Float[Tensor, "N T D"]
    stream_energy: Float[Tensor, "N T"]
    positions: tuple[Tensor, Tensor] | None


class _FirstLayerReached(Exception):
    pass


@contextmanager
def _captured(module: nn.Module, calls: list[tuple[tuple, dict]], *, stop: bool) -> Iterator[None]:
    def hook(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        calls.append((args, kwargs))
        if stop:
            raise _FirstLayerReached

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _hidden(call: tuple[tuple, dict]) -> Tensor:
    args, kwargs = call
    return args[0] if args else kwargs["hidden_states"]


def stream_layers(
    model: nn.Module,
    layers: list[tuple[nn.Module, nn.Module]],
    rows: Int[Tensor, "N T"],
    *,
    precision: Precision = "fp32",
    advance: Advance = ignore,
) -> Iterator[LayerInputs]:
    """Yield every layer's attention inputs over `rows`, in order; `layers` pairs decoder layers with their attention.

    `advance` is told of tokens times layers: `rows.numel() * len(layers)` in all.
    """
    # No autocast or no_grad context may be open at a yield: the caller would run inside it.
    calls = _first_layer_calls(model, layers[0][0], rows, precision)
    streams = [_hidden(call) for call in calls]
    for index, (layer, attention) in enumerate(layers):
        hidden, energy, positions = [], [], None
        for i, (args, kwargs) in enumerate(calls):
            energy.append(streams[i].float().pow(2).mean(-1))
            options = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            streams[i], seen = _run_layer(layer, attention, (streams[i], *args[1:]), options, precision)
            hidden.append(_hidden(seen))
            positions = seen[1].get("position_embeddings", positions)
            advance(hidden[-1].shape[0] * hidden[-1].shape[1])
        yield LayerInputs(index, torch.cat(hidden), torch.cat(energy), _one_row(positions))


@torch.no_grad()
def _first_layer_calls(
    model: nn.Module, first: nn.Module, rows: Int[Tensor, "N T"], precision: Precision
) -> list[tuple[tuple, dict]]:
    """The arguments with which the model calls its first decoder layer, one call per batch of rows."""
    device = next(model.parameters()).device
    calls: list[tuple[tuple, dict]] = []
    with precision_context(device, precision), _captured(first, calls, stop=True):
        for batch in rows.split(max(1, TOKENS_PER_BATCH // rows.shape[1])):
            with suppress(_FirstLayerReached):
                model(input_ids=batch.to(device), use_cache=False)
    return calls


@torch.no_grad()
def _run_layer(
    layer: nn.Module, attention: nn.Module, args: tuple, kwargs: dict, precision: Precision
) -> tuple[Tensor, tuple[tuple, dict]]:
    """The layer's output, and the arguments that reached its attention."""
    seen: list[tuple[tuple, dict]] = []
    with precision_context(args[0].device, precision), _captured(attention, seen, stop=False):
        output = layer(*args, **kwargs)
    return output[0] if isinstance(output, tuple) else output, seen[0]


def _one_row(positions: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
    return None if positions is None else (positions[0][:1], positions[1][:1])
