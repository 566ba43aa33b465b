"""Whole decode steps of a model of LLaMA2-7B's shape, with all of its cache and with a quarter of it, on one GPU.

    python benchmarks/decode_step.py --budget 300
    python benchmarks/decode_step.py --small --out decode_step.json

Weights, maps, keys and values are random, in bf16; the models come from configurations, no file is read. A step is
generation's own, captured as a CUDA graph: one token a row against a cache of exactly `context` tokens, that one
counted. Before it is timed, the same graph runs against a short stretch of the cache, and its logits are held against
those of torch's attention without a graph. Every model is measured as it is and then with compiled blocks, as
`headfuse generate --compile` does. `--small` takes a tiny shape on the CPU, without graphs.

The roofline of a step reads all weights but the embedding table once (of that, a row a token) and the cache once. A
speedup is over the fastest multi-head step of the same case, compiled like it or not, whichever attention that used.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from headfuse.benchmark.timing import seconds_of_each
from headfuse.generation.decoding import Decoding, Steps, cache_room
from headfuse.models.dha import DHA_CLASSES
from training_free import provenance, write

RESULTS = Path(__file__).parent / "results" / "decode_step.json"
SHAPE: dict[str, Any] = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
SHAPE |= {"intermediate_size": 11008, "vocab_size": 32000, "max_position_embeddings": 32768}
# With the usual 0.02, 32 random layers amplify rounding until two right attentions differ by 5% in the logits.
SHAPE |= {"initializer_range": 0.005}
SMALL = SHAPE | {"hidden_size": 512, "num_hidden_layers": 2, "intermediate_size": 512, "vocab_size": 1000}
# Key heads, value heads and attentions: the multi-head model, then a quarter of its cache.
MODELS = {"mha": (32, 32, ("sdpa", "headfuse")), "dha": (6, 10, ("headfuse",)), "gqa": (8, 8, ("sdpa", "headfuse"))}
# Batch and context.
CASES = ((8, 4096), (16, 4096), (1, 4096), (1, 32768))
SMALL_CASES = ((2, 256), (1, 512))
# Tokens of the cache that logits are compared on: few, so that attention weighs in them.
CHECKED_TOKENS = 64
TOLERANCE = 3e-2
WARM_UP, STEPS = 5, 40
SEED = 0

Result = TypeVar("Result")


def main() -> None:
    """Measure every model with every attention at every size; what fails is noted and the rest goes on."""
    options = parse()
    if not options.small and not torch.cuda.is_available():
        sys.exit("decode_step: wanted a CUDA device, got none; run on one, or try the script with --small")
    shape, cases = (SMALL, SMALL_CASES) if options.small else (SHAPE, CASES)
    found = Found(options, shape)
    for name in MODELS:
        found.attempt({"model": name}, measure_model, name, cases, found)
    found.save()
    print(f"{len(found.rows)} rows, {len(found.failed)} failed, {time.monotonic() - found.started:.0f} s")


class Found:
    """Rows and failures so far, in a file that is written after each."""

    def __init__(self, options: argparse.Namespace, shape: dict[str, Any]) -> None:
        self.options, self.shape, self.started = options, shape, time.monotonic()
        self.device = torch.device("cpu" if options.small else "cuda")
        self.rows: list[dict[str, Any]] = []
        self.failed: list[dict[str, Any]] = []

    def attempt(self, what: dict[str, Any], function: Callable[..., Result], *arguments: Any) -> Result | None:
        """What the function returns. An error is noted instead, whatever it is, and a start too late counts as one."""
        try:
            if time.monotonic() - self.started > self.options.budget:
                raise TimeoutError(f"not started, {self.options.budget:g} seconds are over")
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            return function(*arguments)
        except Exception as error:
            self.failed.append(what | {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"})
            print("failed:", *self.failed[-1].values(), flush=True)
            self.save()
            return None

    def add(self, row: dict[str, Any]) -> None:
        """Take a row in and show it."""
        self.rows.append(row)
        self.save()
        row = compared(self.rows)[-1]
        kind = "compiled" if row["compiled"] else "as it is"
        ratio = f"{row['speedup']:.2f}x of {row['roofline_speedup']:.2f}x" if row["speedup"] else "no multi-head step"
        print(
            f"{time.monotonic() - self.started:6.1f} s  {row['model']} {row['attention']:<8} {kind} "
            f"{row['batch']:>2} x {row['context']:<6} {row['microseconds']:>9.1f} us {row['gb_s']:>7.1f} GB/s  "
            f"{ratio}  error {row['logit_error']:.1e}",
            flush=True,
        )

    def save(self) -> None:
        """Write everything known so far."""
        arguments = [*["--small"] * self.options.small, f"--budget {self.options.budget:g}"]
        seconds = time.monotonic() - self.started
        meta = provenance("decode_step.py", arguments, self.options.commit, seconds) | {
            "seed": SEED,
            "dtype": "bfloat16",
            "cuda_graphs": self.device.type == "cuda",
            "steps": STEPS,
            "shape": self.shape,
        }
        write(Path(self.options.out), {"meta": meta, "rows": compared(self.rows), "failed": self.failed})


def compared(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with their speedups, measured and by the bytes read; None where no multi-head step was measured."""
    fastest: dict[tuple[int, int, bool], dict[str, Any]] = {}
    for row in rows:
        case = row["batch"], row["context"], row["compiled"]
        if row["model"] == "mha":
            fastest[case] = min(fastest.get(case, row), row, key=lambda each: each["microseconds"])
    found = []
    for row in rows:
        base = fastest.get((row["batch"], row["context"], row["compiled"]))
        ratios = [None] * 3
        if base is not None:
            speedup, roofline = base["microseconds"] / row["microseconds"], base["bytes"] / row["bytes"]
            ratios = [round(value, 4) for value in (speedup, roofline, speedup / roofline)]
        found.append(row | dict(zip(("speedup", "roofline_speedup", "roofline_fraction"), ratios, strict=True)))
    return found


def measure_model(name: str, cases: Sequence[tuple[int, int]], found: Found) -> None:
    """Every row of one model."""
    keys, values, attentions = MODELS[name]
    config = configuration(found.shape, keys, values)
    torch.manual_seed(SEED)
    with found.device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    for compiled in (False, True):
        for (batch, context), attention in product(cases, attentions):
            row = {"model": name, "attention": attention, "key_heads": keys, "value_heads": values}
            row |= {"batch": batch, "context": context, "compiled": compiled}
            if measured := found.attempt(row, measure, model, attention, batch, context, compiled):
                found.add(row | measured)


def configuration(shape: dict[str, Any], keys: int, values: int) -> PreTrainedConfig:
    """Stock LLaMA for equal numbers of heads, else the decoupled one, with other random maps in every layer."""
    shape = shape | {"num_key_value_heads": max(keys, values)}
    if keys == values:
        return LlamaConfig(**shape)
    generator = torch.Generator().manual_seed(SEED)
    for name, heads in (("key_map", keys), ("value_map", values)):
        layers = range(shape["num_hidden_layers"])
        shape[name] = [random_map(heads, shape["num_attention_heads"], generator) for _ in layers]
    return DHA_CLASSES["llama"].config(**shape)


def random_map(heads: int, query_heads: int, generator: torch.Generator) -> list[int]:
    """The head that each query head reads; every head is read."""
    rest = torch.randint(heads, (query_heads - heads,), generator=generator)
    return torch.cat([torch.arange(heads), rest])[torch.randperm(query_heads, generator=generator)].tolist()


def measure(model: Any, attention: str, batch: int, context: int, compiled: bool) -> dict[str, Any]:
    """Time and bytes of a step whose logits are right. Raises ArithmeticError if they are not."""
    device, captured = model.device, model.device.type == "cuda"
    model.set_attn_implementation(attention)
    with noting_logits(model) as logits:
        decoding = Decoding(model, batch, cache_room(context, fixed=True), steps=Steps(captured, compiled, fixed=True))
        if not captured:
            decoding.compute()  # makes the cache, as a recording does
        decoding.cache.fill(context, torch.Generator(device).manual_seed(SEED))
        error = logit_error(decoding, logits)
    if not error <= TOLERANCE:
        raise ArithmeticError(f"wanted logits within {TOLERANCE:.0e} of torch's attention, got {error:.1e}")

    def step() -> None:
        decoding.cache.hold(context - 1)
        decoding.step()

    decoding.start(context - 1)
    seconds_of_each(step, device, WARM_UP)
    seconds = median(seconds_of_each(step, device, STEPS))
    read = step_bytes(model, decoding, context)
    return {
        "microseconds": round(seconds * 1e6, 2),
        "tokens_per_second": round(batch / seconds, 1),
        "bytes": read,
        "gb_s": round(read / seconds / 1e9, 1),
        "logit_error": error,
    }


@contextmanager
def noting_logits(model: Any) -> Iterator[list[Tensor]]:
    """Within the context the list gets the logits of every call; a captured call's are rewritten by every replay."""
    logits: list[Tensor] = []
    handle = model.register_forward_hook(lambda _module, _inputs, out: logits.append(out.logits))
    try:
        yield logits
    finally:
        handle.remove()


def logit_error(decoding: Decoding, logits: list[Tensor]) -> float:
    """Relative distance of a step's logits from those of torch's attention without a graph, on a few cached tokens."""
    model = decoding.model
    attention = model.config._attn_implementation
    generator = torch.Generator(decoding.device).manual_seed(SEED)
    token = torch.randint(model.config.vocab_size, decoding.token.shape, generator=generator, device=decoding.device)

    def after(step: Callable[[], None]) -> Tensor:
        decoding.start(CHECKED_TOKENS - 1)
        decoding.token.copy_(token)
        step()
        return logits[-1].double()

    got = after(decoding.step)
    model.set_attn_implementation("sdpa")
    expected = after(decoding.compute)
    model.set_attn_implementation(attention)
    return float((got - expected).norm() / expected.norm())


def step_bytes(model: Any, decoding: Decoding, context: int) -> int:
    """What a step must read at least: weights, and the tokens of the cache as it lies in memory."""
    table = model.get_input_embeddings().weight
    weights = sum(each.nbytes for each in model.parameters()) - table.nbytes + decoding.rows * table[0].nbytes
    return weights + sum(tensor[:, :, :context].nbytes for tensor in decoding.cache.tensors())


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=600, help="seconds after which nothing new starts")
    parser.add_argument("--small", action="store_true", help="a tiny shape on the CPU, to try the script")
    parser.add_argument("--commit", help="commit to record where the checkout is not a repository")
    parser.add_argument("--out", default=str(RESULTS))
    return parser.parse_args()


if __name__ == "__main__":
    main()
