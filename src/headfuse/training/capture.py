"""A step's gradients as one CUDA graph: small models train as fast as the GPU works, not as Python launches kernels."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

Losses = dict[str, Tensor]
Gradients = Callable[..., Losses]

# Calls with a shape of batch that run as they are before one is recorded: they compile, and allocate what lasts.
WARM_UP = 3


class _Recorded(NamedTuple):
    graph: torch.cuda.CUDAGraph
    batch: tuple[Tensor, ...]
    losses: Losses
    gradients: list[Tensor | None]


class CapturedGradients:
    """A function of a batch's tensors that leaves gradients in `.grad` and returns losses, recorded and replayed.

    It is recorded once for every shape of batch. It must depend on nothing of the host that changes between calls, and
    must find and leave `.grad` as this does: None before, the whole gradient after.
    """

    def __init__(self, function: Gradients, parameters: Sequence[nn.Parameter]) -> None:
        self.function, self.parameters = function, list(parameters)
        self.stream = torch.cuda.Stream()
        self.calls: dict[tuple[torch.Size, ...], int] = {}
        self.recorded: dict[tuple[torch.Size, ...], _Recorded] = {}

    def __call__(self, *batch: Tensor) -> Losses:
        """Gradients and losses of a batch on the device; the losses are the caller's to keep."""
        shapes = tuple(each.shape for each in batch)
        self.calls[shapes] = self.calls.get(shapes, 0) + 1
        if self.calls[shapes] <= WARM_UP:
            return self._aside(*batch)
        if shapes not in self.recorded:
            self.recorded[shapes] = self._record(*batch)
        recorded = self.recorded[shapes]
        for place, each in zip(recorded.batch, batch, strict=True):
            place.copy_(each)
        recorded.graph.replay()
        for parameter, gradient in zip(self.parameters, recorded.gradients, strict=True):
            parameter.grad = gradient
        return {name: value.clone() for name, value in recorded.losses.items()}

    def _aside(self, *batch: Tensor) -> Losses:
        """As it is, on a stream of its own, which recording asks for."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            losses = cleared(self.function, self.parameters)(*batch)
        current.wait_stream(self.stream)
        return losses

    def _record(self, *batch: Tensor) -> _Recorded:
        graph, places = torch.cuda.CUDAGraph(), tuple(each.clone() for each in batch)
        # Other threads (a progress bar's, a pinning allocator's) may talk to the device meanwhile.
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            losses = cleared(self.function, self.parameters)(*places)
        return _Recorded(graph, places, losses, [parameter.grad for parameter in self.parameters])


def cleared(function: Gradients, parameters: Sequence[nn.Parameter]) -> Gradients:
    """The function, with `.grad` of the parameters set to None before every call."""

    def from_none(*batch: Tensor) -> Losses:
        for parameter in parameters:
            parameter.grad = None
        return function(*batch)

    return from_none


def gradients_function(function: Gradients, parameters: Sequence[nn.Parameter], *, captured: bool) -> Gradients:
    """The function that starts from no gradients: captured, or as it is."""
    return CapturedGradients(function, parameters) if captured else cleared(function, parameters)
