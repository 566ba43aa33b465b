"""A model's blocks compiled for fixed steps against one cache.

Compiled code is made anew for every number that it has read from a block, and a block reads its index, to find its
layer of the cache. Here it gets a cache of that layer alone, and index 0: equal blocks then share one graph, into which
weights, keys and values go as inputs. Linear layers, the model's last one too, are computed as suits few rows.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from headfuse.checkpoints.assembly import decoder_layers
from headfuse.checkpoints.registry import adapter_of_converted
from headfuse.generation.cache import PreallocatedCache
from headfuse.models.compiled import calling, compiled_calls
from headfuse.models.step_projections import StepProjections


class CompiledBlocks:
    """The blocks' compiled calls, beside the model; `cache` must be of fixed steps, and exist when they are made.

    Raises UnsupportedArchitectureError for a model whose blocks are not known.
    """

    def __init__(self, model: PreTrainedModel, cache: PreallocatedCache) -> None:
        self.blocks = list(decoder_layers(model, adapter_of_converted(model.config)))
        modules: list[Any] = [module for block in self.blocks for module in block.modules()]
        self.indexed = [module for module in modules if "layer_idx" in vars(module)]
        for maps in (vars(module).get("kernel_maps") for module in modules):
            if maps is not None:
                for slots in (maps.key_slots, maps.value_slots):
                    # As wide as the largest group, which differs between layers of equal numbers of heads.
                    torch._dynamo.maybe_mark_dynamic(slots, 1)
        self.projections = StepProjections([model, *modules])
        whole = compiled_calls(self.blocks, whole=True, small=True)
        self.calls = [_with_own(call, cache, cache.of_layer(index)) for index, call in enumerate(whole)]

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Within the context the model's blocks are these; afterwards they are as they were."""
        with ExitStack() as undo:
            undo.enter_context(calling(self.blocks, self.calls))
            undo.enter_context(self.projections.at_work())
            for module in self.indexed:
                undo.callback(setattr, module, "layer_idx", module.layer_idx)
                module.layer_idx = 0
            yield


def _with_own(call: Callable[..., Any], cache: Cache, own: Cache) -> Callable[..., Any]:
    """The call with `own` wherever it is given `cache`: families differ in that argument's name and place."""

    def called(*arguments: Any, **options: Any) -> Any:
        given = [*arguments, *options.values()]
        assert any(each is cache for each in given), "a block that gets another cache would write into a wrong layer"
        return call(
            *[own if each is cache else each for each in arguments],
            **{name: own if each is cache else each for name, each in options.items()},
        )

    return called
