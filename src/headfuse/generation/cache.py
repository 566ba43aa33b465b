"""A key/value cache whose memory is taken once; steps are either sliced by the host or fixed for a CUDA graph.

transformers' dynamic cache copies all it holds at every step. Its static cache does not, but attends the whole of its
room at every call, the prefill included, and counts its tokens anew in every layer. Here a *sliced* step attends a view
of what is filled, whose length the host knows; a *fixed* step has the same shapes and the same work every time, and
the position is one number on the device. B rows, S tokens, n heads, d head width; decoupled models hand their heads
folded, as one wide one.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin


@dataclass
class Position:
    """The slot of the next token of a fixed step and the one behind it: numbers on the device."""

    slot: Int64[Tensor, ""]
    following: Int64[Tensor, ""]

    @classmethod
    def at(cls, slot: int, device: torch.device) -> "Position":
        """A position."""
        return cls(torch.tensor(slot, device=device), torch.tensor(slot + 1, device=device))


@dataclass
class Buffers:
    """Keys and values of one layer, `[B, n, room, d]`; None until the first of them tell their shapes."""

    rows: int
    room: int
    keys: Float[Tensor, "B n S d"] | None = None
    values: Float[Tensor, "B m S d"] | None = None

    def allocate(self, key: Float[Tensor, "b n T d"], value: Float[Tensor, "b m T d"]) -> None:
        """Take the memory; zeros, since what a mask hides must still be finite."""
        self.keys, self.values = (
            part.new_zeros(self.rows, part.shape[1], self.room, part.shape[3]) for part in (key, value)
        )


class PreallocatedLayer(CacheLayerMixin):
    """Some rows of a layer's buffers, as a cache layer of transformers."""

    is_sliding = False

    def __init__(self, buffers: Buffers, rows: slice, position: Position, *, fixed: bool) -> None:
        super().__init__()
        self.buffers, self.rows, self.position = buffers, rows, position
        # Read by transformers: the mask of a compileable layer is made without reading the device.
        self.is_compileable = fixed
        self.length = 0
        self.written = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Look at the buffers, which are made now if these are their first keys and values."""
        if self.buffers.keys is None:
            self.buffers.allocate(key_states, value_states)
        assert self.buffers.keys is not None
        assert self.buffers.values is not None
        self.keys, self.values = self.buffers.keys[self.rows], self.buffers.values[self.rows]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG002  transformers' signature
        """Write behind what is there; a sliced step gets what is filled, a fixed one everything."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        if self.is_compileable:
            place = self.position.slot.view(1)
            self.keys.index_copy_(2, place, key_states)
            self.values.index_copy_(2, place, value_states)
            self.written = True
            return self.keys, self.values
        start, self.length = self.length, self.length + key_states.shape[2]
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that `update` will return."""
        return self.buffers.room if self.is_compileable else self.length + query_length, 0

    def get_seq_length(self) -> Any:
        """Tokens held: a number, or one on the device during a fixed step."""
        if self.is_compileable:
            return self.position.following if self.written else self.position.slot
        return self.length

    def get_max_length(self) -> int:
        """The room."""
        return self.buffers.room


class PreallocatedCache(Cache):
    """A cache of `room` tokens for each of `rows` rows, for steps of one kind."""

    layers: list[PreallocatedLayer]  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, num_layers: int, rows: int, room: int, device: torch.device, *, fixed: bool) -> None:
        self.room = room
        self.buffers = [Buffers(rows, room) for _ in range(num_layers)]
        self.position = Position.at(0, device)
        super().__init__(layers=self._layers(slice(None), fixed=fixed))

    @classmethod
    def for_model(cls, model: PreTrainedModel, rows: int, room: int, *, fixed: bool = False) -> "PreallocatedCache":
        """An empty cache on the model's device; sliced, `model.generate(..., past_key_values=cache)` takes it too."""
        layers = model.config.get_text_config(decoder=True).num_hidden_layers
        return cls(layers, rows, room, next(model.parameters()).device, fixed=fixed)

    def of_rows(self, rows: slice) -> Cache:
        """An empty cache of sliced steps that fills these rows of this one: for a prefill in blocks."""
        return Cache(layers=self._layers(rows, fixed=False))

    def of_layer(self, index: int) -> Cache:
        """The cache of one layer alone, as its only one."""
        return Cache(layers=[self.layers[index]])

    def hold(self, length: int) -> None:
        """Take the first `length` tokens for filled; the next one goes behind them."""
        for layer in self.layers:
            layer.length = length
        self.position.slot.fill_(length)

    def begin(self) -> None:
        """Start a fixed step."""
        torch.add(self.position.slot, 1, out=self.position.following)
        for layer in self.layers:
            layer.written = False

    def end(self) -> None:
        """End a fixed step: the next goes one slot further."""
        self.position.slot.copy_(self.position.following)

    def clear(self) -> None:
        """Hold nothing; what was there is overwritten by zeros, so that none of it can reach a later prompt."""
        for tensor in self.tensors():
            tensor.zero_()
        self.hold(0)

    def fill(self, length: int, generator: torch.Generator) -> None:
        """Random keys and values of unit variance in the first `length` slots: for measuring without a prefill."""
        for tensor in self.tensors():
            tensor[:, :, :length].normal_(generator=generator)
        self.hold(length)

    def _layers(self, rows: slice, *, fixed: bool) -> list[Any]:
        return [PreallocatedLayer(each, rows, self.position, fixed=fixed) for each in self.buffers]

    def tensors(self) -> list[Tensor]:
        """The buffers that exist."""
        found = [tensor for each in self.buffers for tensor in (each.keys, each.values)]
        return [tensor for tensor in found if tensor is not None]
