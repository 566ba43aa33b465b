"""The attention of one decode step by itself: its calls are noted while the model runs, then made again and timed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from headfuse.benchmark.timing import seconds_of_each
from headfuse.generation.graph import record
from headfuse.models.dha.decoupled_attention import DecoupledAttention

REPLAYS = 10
WARM_UP = 2


class Call(NamedTuple):
    """One layer's attention, from rotated queries and the cache to the heads' outputs."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def again(self) -> None:
        """Compute it once more."""
        self.function(*self.arguments, **self.options)


@contextmanager
def noting(model: PreTrainedModel) -> Iterator[list[Call]]:
    """Within the context the list gets every attention call of the model; tensors in it are held, not copied.

    A decoupled layer's call includes what brings its heads to the queries, a stock layer's is transformers' function.
    It stays empty for a stock model whose attention is no function of transformers' interface ("eager").
    """
    calls: list[Call] = []

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(Call(function, arguments, dict(options)))
            return function(*arguments, **options)

        return call

    layers: list[Any] = [module for module in model.modules() if isinstance(module, DecoupledAttention)]
    name = model.config._attn_implementation
    replaced = not layers and name in ALL_ATTENTION_FUNCTIONS
    for layer in layers:
        layer.attend = noted(layer.attend)
    if replaced:
        ALL_ATTENTION_FUNCTIONS[name] = noted(ALL_ATTENTION_FUNCTIONS[name])
    try:
        yield calls
    finally:
        for layer in layers:
            del layer.attend
        if replaced:
            del ALL_ATTENTION_FUNCTIONS[name]  # of this process's local names; the registered function remains


def seconds_per_step(calls: list[Call], device: torch.device, *, captured: bool) -> float:
    """Median seconds of all calls of a step together; captured as one graph, as the step that they come from."""

    def every() -> None:
        for call in calls:
            call.again()

    run = record(every, device).replay if captured else every
    for _ in range(WARM_UP):
        run()
    return median(seconds_of_each(run, device, REPLAYS))
