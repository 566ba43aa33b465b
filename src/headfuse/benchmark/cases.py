"""One model at one batch size and context length: what it takes in time and in memory."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import TypeVar

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel

from headfuse.benchmark.attention import noting, seconds_per_step
from headfuse.benchmark.timing import median_seconds, seconds_of_each
from headfuse.errors import ConfigError
from headfuse.evaluation.cache_bytes import measured_cache_bytes
from headfuse.evaluation.inference import device_of
from headfuse.generation.decoding import Decoding, Steps, cache_room, can_capture, prefill_rows
from headfuse.manifest import hardware, peak_memory

# Steps before those that count: clocks rise, caches fill.
WARM_UP = 2

Result = TypeVar("Result")


@dataclass(frozen=True)
class Load:
    """What every model is measured with: batches of so many rows, contexts of so many tokens each.

    Without contexts there is one, of 4096 tokens or, if they are fewer, the models' positions.
    The last `new_tokens` tokens of a context are written once more, one by one, so that no step goes beyond it. Without
    `prefill` the cache gets random keys and values instead of reading one.
    """

    contexts: tuple[int, ...] = ()
    batches: tuple[int, ...] = (1, 8)
    new_tokens: int = 32
    prefill: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ConfigError for a context too short for the steps."""
        if self.contexts and min(self.contexts) <= self.new_tokens + WARM_UP:
            raise ConfigError(
                f"wanted contexts of more than {self.new_tokens + WARM_UP} tokens, as many as are timed, got "
                f"{min(self.contexts)}; lengthen --context or lower --new-tokens"
            )


@dataclass(frozen=True)
class Case:
    """What was measured; None where nothing was, everywhere if the case does not fit.

    `first_token_seconds` is for reading `batch` prompts of `context` tokens and choosing one token each,
    `step_seconds` the median step. `attention_microseconds` is a layer's, the mean over those of a step, and
    `attention_gb_s` the keys and values of its tokens, each read once, over that time. `cache_bytes` is the cache as
    allocated. `peak_bytes` is the device's, on a CPU the process's so far; `largest_batch` is computed.
    """

    model: str
    batch: int
    context: int
    cache_bytes: int
    captured: bool
    compiled: bool = False
    fits: bool = True
    first_token_seconds: float | None = None
    step_seconds: float | None = None
    tokens_per_second: float | None = None
    attention_microseconds: float | None = None
    attention_gb_s: float | None = None
    copy_fraction: float | None = None
    peak_bytes: int | None = None
    largest_batch: int | None = None


class Bench:
    """A loaded model, the memory beside it, and the device's copy rate in bytes a second.

    `compiled` measures steps whose blocks are compiled; the attention by itself is not.
    """

    def __init__(self, name: str, model: PreTrainedModel, copy_rate: float, *, compiled: bool = False) -> None:
        self.name, self.model, self.device, self.copy_rate = name, model, device_of(model), copy_rate
        self.on_gpu = self.device.type == "cuda"
        self.steps = Steps(captured=can_capture(model), compiled=compiled)
        self.bytes_per_token = measured_cache_bytes(model)
        self.base = torch.cuda.memory_allocated(self.device) if self.on_gpu else 0
        self.memory = memory_beside(self.device)

    @torch.no_grad()
    def measure(self, batch: int, context: int, load: Load) -> Case:
        """A case; one that does not fit into memory says so instead of failing."""
        room = cache_room(context, fixed=self.steps.fixed)
        kinds = {"captured": self.steps.captured, "compiled": self.steps.compiled}
        case = Case(self.name, batch, context, batch * room * self.bytes_per_token, **kinds)
        if self.memory is not None and case.cache_bytes > self.memory:
            return replace(case, fits=False)
        try:
            return self._measured(case, room, load)
        except torch.OutOfMemoryError:
            return replace(case, fits=False)
        finally:
            if self.on_gpu:
                torch.cuda.empty_cache()

    def _measured(self, case: Case, room: int, load: Load) -> Case:
        decoding, made = self._peak(lambda: Decoding(self.model, case.batch, room, steps=self.steps))
        first, reading = self._peak(lambda: self._read(decoding, case.context, load))
        steps, decoded = self._peak(lambda: self._decode(decoding, case.context, load.new_tokens))
        case = replace(
            case,
            first_token_seconds=first,
            step_seconds=steps,
            tokens_per_second=case.batch / steps,
            peak_bytes=self.base + max(made, reading, decoded) if self.on_gpu else peak_memory().get("process"),
        )
        if self.on_gpu and self.memory is not None:
            rests = max(made, decoded) - case.cache_bytes, reading - case.cache_bytes if load.prefill else 0
            case = replace(case, largest_batch=largest_batch(self.memory, case, *rests))
        return self._with_attention(case, decoding)

    def _read(self, decoding: Decoding, context: int, load: Load) -> float | None:
        """Fill the cache, by reading random prompts; seconds until each has its first token."""
        generator = torch.Generator(self.device).manual_seed(load.seed)
        size = self.model.config.get_text_config(decoder=True).vocab_size
        length = context if load.prefill else 1  # one token makes the cache
        ids: Int64[Tensor, "B T"] = torch.randint(
            size, (decoding.rows, length), generator=generator, device=self.device
        )
        mask = torch.ones_like(ids, dtype=torch.bool)
        if load.prefill:
            return median_seconds(lambda: decoding.prefill(ids, mask), self.device)
        decoding.prefill(ids, mask)
        decoding.cache.fill(context, generator)
        return None

    def _decode(self, decoding: Decoding, context: int, count: int) -> float:
        decoding.start(context - count - WARM_UP)
        seconds_of_each(decoding.step, self.device, WARM_UP)
        return median(seconds_of_each(decoding.step, self.device, count))

    def _with_attention(self, case: Case, decoding: Decoding) -> Case:
        decoding.start(case.context - 1)
        with noting(self.model) as calls:
            decoding.compute()
        if not calls:
            return case
        spent = seconds_per_step(calls, self.device, captured=self.steps.captured)
        rate = case.batch * case.context * self.bytes_per_token / spent
        return replace(
            case,
            attention_microseconds=spent / len(calls) * 1e6,
            attention_gb_s=rate / 1e9,
            copy_fraction=rate / self.copy_rate,
        )

    def _peak(self, function: Callable[[], Result]) -> tuple[Result, int]:
        """What the function returns, and the most bytes on the GPU meanwhile, the model's own left out."""
        if not self.on_gpu:
            return function(), 0
        torch.cuda.reset_peak_memory_stats(self.device)
        result = function()
        return result, torch.cuda.max_memory_allocated(self.device) - self.base


def memory_beside(device: torch.device) -> int | None:
    """Bytes that torch could still use on a GPU; the machine's memory on a CPU; None if unknown."""
    if device.type != "cuda":
        return hardware().memory_bytes
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def largest_batch(memory: int, case: Case, decoding: int, reading: int) -> int:
    """How many rows of this context fit into `memory` bytes beside the model.

    Every row costs its cache and its share of what `decoding` took beside the cache; a prefill reads one block at a
    time, so that what `reading` took beside the cache is needed once, for a whole block.
    """
    per_row = (case.cache_bytes + max(0, decoding)) / case.batch
    block = prefill_rows(case.context)
    once = max(0, reading) / min(block, case.batch) * block
    return max(0, int((memory - once) / per_row))
