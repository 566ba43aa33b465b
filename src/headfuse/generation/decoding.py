"""The decode loop: prefill in blocks of rows, then one step a token; on a GPU the step is a CUDA graph.

Token, positions, mask and the count of written tokens live on the device. The host looks at them once in `CHECK_EVERY`
steps, to see whether every row has ended. B rows, T tokens of the prompts, N new ones.
"""

import gc
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from transformers import PreTrainedModel

from headfuse.errors import ConfigError
from headfuse.generation.blocks import CompiledBlocks
from headfuse.generation.cache import PreallocatedCache
from headfuse.generation.graph import record
from headfuse.generation.sampling import GREEDY, Sampling, choose, uniforms

# The room of a fixed cache is a multiple, so that prompts of about the same length replay the same graph.
ROOM_STEP = 256
# Tokens that the prefill computes at once; a longer row goes alone.
PREFILL_TOKENS = 16_384
# Steps between two looks at whether all rows have ended; a look waits for the device.
CHECK_EVERY = 16
# Attention whose masks are made without the host, in every version of transformers that we support.
CAPTURABLE_ATTENTION = ("sdpa", "headfuse")
# Rotations whose frequencies depend on the longest position so far, read by the host.
READING_ROTATIONS = ("dynamic", "longrope")


def can_capture(model: PreTrainedModel) -> bool:
    """Whether a decode step of the model can be recorded: on a GPU, with nothing that the host must read.

    Autocast counts among that: its copies of the weights end with its context, a graph would read them afterwards.
    """
    device = next(model.parameters()).device
    config = model.config.get_text_config(decoder=True)
    rotation = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    return (
        device.type == "cuda"
        and not torch.is_autocast_enabled("cuda")
        and config._attn_implementation in CAPTURABLE_ATTENTION
        and rotation not in READING_ROTATIONS
    )


@dataclass(frozen=True)
class Steps:
    """How steps are taken: `captured` replays a CUDA graph, `compiled` compiles the model's blocks.

    Both need `fixed` steps, which have the same shapes every time. Compiled blocks fuse the small work between products
    of matrices, and round less of it.
    """

    captured: bool = False
    compiled: bool = False
    fixed: bool = False

    def __post_init__(self) -> None:
        """What needs fixed steps has them."""
        object.__setattr__(self, "fixed", self.fixed or self.captured or self.compiled)


# Their shapes follow what the cache holds.
SLICED = Steps()


class Decoding:
    """A batch of one size being written: its cache, what it has written, and the step that writes one token more."""

    def __init__(
        self,
        model: PreTrainedModel,
        rows: int,
        room: int,
        *,
        sampling: Sampling = GREEDY,
        eos: Sequence[int] = (),
        pad: int = 0,
        steps: Steps = SLICED,
    ) -> None:
        self.model: Any = model
        self.rows, self.room, self.sampling, self.pad, self.steps = rows, room, sampling, pad, steps
        self.device = next(model.parameters()).device
        here: dict[str, Any] = {"device": self.device}
        self.cache = PreallocatedCache.for_model(model, rows, room, fixed=steps.fixed)
        self.length, self.padded = 0, False
        self.eos = torch.tensor(sorted(set(eos)), dtype=torch.int64, **here)
        self.token: Int64[Tensor, "B 1"] = torch.zeros(rows, 1, dtype=torch.int64, **here)
        self.positions: Int64[Tensor, "B 1"] = torch.zeros(rows, 1, dtype=torch.int64, **here)
        self.mask: Bool[Tensor, "B S"] = torch.ones(rows, room, dtype=torch.bool, **here)
        self.finished = torch.zeros(rows, dtype=torch.bool, **here)
        self.written: Int64[Tensor, "B S"] = torch.zeros(rows, room, dtype=torch.int64, **here)
        self.count = torch.zeros(1, dtype=torch.int64, **here)
        self.uniforms: Float[Tensor, "B S"] | None = None
        if not sampling.greedy:
            self.uniforms = torch.zeros(rows, room, dtype=torch.float64, **here)
        self.blocks: CompiledBlocks | None = None
        if steps.compiled:
            self.compute()  # makes what compiled code takes as inputs: the cache, and maps of heads
            self.blocks = CompiledBlocks(model, self.cache)
            self._advance()
            gc.collect()  # cycles that tracing left would hold the cache when nothing else does
        self.graph = record(self._advance, self.device) if steps.captured else None

    @torch.no_grad()
    def prefill(self, ids: Int64[Tensor, "B T"], mask: Bool[Tensor, "B T"], seed: int = 0) -> None:
        """Read prompts, padded on the left where `mask` is False, and write the first token behind each."""
        self.start(ids.shape[1], mask, seed)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        blocks = range(0, self.rows, prefill_rows(ids.shape[1]))
        logits = [
            self.model(
                input_ids=ids[rows],
                attention_mask=mask[rows],
                position_ids=positions[rows],
                past_key_values=self.cache.of_rows(rows),
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            for rows in (slice(first, first + blocks.step) for first in blocks)
        ]
        self._take(torch.cat(logits))

    def start(self, length: int, mask: Bool[Tensor, "B T"] | None = None, seed: int = 0) -> None:
        """Forget what was written and take `length` cached tokens a row for read, all of them if there is no mask."""
        self.cache.hold(length)
        self.length, self.padded = length, mask is not None and not bool(mask.all())
        self.mask.fill_(True)
        self.positions.fill_(length)
        if mask is not None:
            self.mask[:, :length] = mask
            self.positions.copy_(mask.sum(1, keepdim=True))
        self.finished.fill_(False)
        self.count.zero_()
        if self.uniforms is not None:
            self.uniforms.copy_(uniforms(self.rows, self.room, seed))

    def step(self) -> None:
        """Read the last token and write one more."""
        if self.graph is not None:
            self.graph.replay()
        else:
            self._advance()
        self.length += 1

    @torch.no_grad()
    def compute(self) -> None:
        """A step as it is: without a graph, and with nothing compiled."""
        if self.steps.fixed:
            self.cache.begin()
            mask = self.mask
        else:
            mask = self.mask[:, : self.length + 1] if self.padded else None
        out = self.model(
            input_ids=self.token,
            attention_mask=mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        self._take(out.logits[:, -1])
        self.positions.add_(1)
        if self.steps.fixed:
            self.cache.end()

    def _advance(self) -> None:
        with nullcontext() if self.blocks is None else self.blocks.at_work():
            self.compute()

    def result(self, count: int) -> Int64[Tensor, "B N"]:
        """The first `count` tokens that were written, up to the end of the longest row; padded behind an end."""
        written = self.written[:, :count]
        ends = (written[:, :, None] == self.eos).any(-1).long()
        running = (ends.cumsum(1) - ends) == 0
        return written[:, : int(running.any(0).sum())].clone()

    def _take(self, logits: Float[Tensor, "B V"]) -> None:
        """Choose every row's next token, note it, and see whether it ends the row."""
        uniform = None if self.uniforms is None else self.uniforms.index_select(1, self.count)[:, 0]
        chosen = choose(logits, self.sampling, uniform)
        chosen = chosen.masked_fill(self.finished, self.pad)[:, None]
        self.written.index_copy_(1, self.count, chosen)
        self.token.copy_(chosen)
        self.finished.logical_or_((chosen == self.eos).any(-1))
        self.count.add_(1)


class Decoder:
    """Writes behind prompts with one model, and keeps the last batch's cache and graph for one of the same size.

    The model must be in evaluation mode; its weights may change in place. `captured` None records steps where the model
    and its device allow it. `fixed` takes fixed steps without a graph, which is how to see a captured step's arithmetic
    on any device; `compiled` takes fixed steps whose blocks are compiled, recorded or not. `room` fixes the cache's
    tokens a row, so that prompts of any length share one graph.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        sampling: Sampling = GREEDY,
        eos: Sequence[int] = (),
        pad: int = 0,
        captured: bool | None = None,
        fixed: bool = False,
        compiled: bool = False,
        room: int | None = None,
    ) -> None:
        self.model, self.room = model, room
        self.steps = Steps(can_capture(model) if captured is None else captured, compiled, fixed)
        self.options: dict[str, Any] = {"sampling": sampling, "eos": eos, "pad": pad, "steps": self.steps}
        self.held: Decoding | None = None

    def write(
        self,
        ids: Int64[Tensor, "B T"],
        mask: Tensor | None = None,
        *,
        max_new_tokens: int,
        seed: int = 0,
    ) -> Int64[Tensor, "B N"]:
        """The tokens behind each prompt, at most `max_new_tokens`; behind a row's end there is padding.

        `mask` is 0 where a prompt is padded, on its left. Without chance these are the tokens of `model.generate`.
        Raises ConfigError for no new tokens, empty prompts, padding at a prompt's end, or more tokens than the room.
        """
        device = next(self.model.parameters()).device
        ids = ids.to(device)
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(device=device, dtype=torch.bool)
        if max_new_tokens < 1 or not ids.numel():
            raise ConfigError(
                f"wanted prompts and at least 1 new token, got prompts of shape {tuple(ids.shape)} and "
                f"{max_new_tokens}; raise them"
            )
        if not bool(mask[:, -1].all()):
            raise ConfigError("padding: wanted it on the left of a prompt, got it at an end; pad on the left")
        decoding = self.decoding(len(ids), ids.shape[1] + max_new_tokens)
        decoding.prefill(ids, mask, seed)
        check = CHECK_EVERY if device.type == "cuda" else 1
        for count in range(1, max_new_tokens):
            if count % check == 0 and bool(decoding.finished.all()):
                break
            decoding.step()
        return decoding.result(max_new_tokens)

    def decoding(self, rows: int, tokens: int) -> Decoding:
        """The state of a batch of rows with room for `tokens` tokens each, made anew unless the last one fits."""
        room = self._room(tokens)
        held = self.held
        if held is None or (held.rows, held.room) != (rows, room):
            self.held = None  # before the next one takes its memory
            del held
            self.held = held = Decoding(self.model, rows, room, **self.options)
        held.cache.clear()
        held.written.fill_(held.pad)
        return held

    def _room(self, tokens: int) -> int:
        if self.room is None:
            return cache_room(tokens, fixed=self.steps.fixed)
        if tokens > self.room:
            raise ConfigError(f"wanted room for {tokens} tokens a row, got {self.room}; raise it or write less")
        return self.room


def cache_room(tokens: int, *, fixed: bool) -> int:
    """Slots of a cache for `tokens` tokens a row."""
    return -(-tokens // ROOM_STEP) * ROOM_STEP if fixed else tokens


def prefill_rows(length: int) -> int:
    """How many prompts of `length` tokens the prefill reads at once."""
    return max(1, PREFILL_TOKENS // length)
