"""The `bench` stage: load one model after the other, measure every case, report."""

import gc
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from headfuse.benchmark.cases import Bench, Case, Load
from headfuse.benchmark.timing import copy_rate
from headfuse.checkpoints.loading import load_config, positions_of
from headfuse.checkpoints.source import Source, locate
from headfuse.checkpoints.validation import check_weights
from headfuse.errors import ConfigError
from headfuse.generation.serving import load_to_serve, resolve_to_serve
from headfuse.manifest import git_commit, hardware, versions
from headfuse.placement import Placement
from headfuse.precision import Precision
from headfuse.progress import Stages, silent

# Tokens, where nobody says how many.
CONTEXT = 4096


@dataclass(frozen=True)
class Benchmark:
    """What `bench` found. Every entry of `models` has its cases under its name in `cases`."""

    command: tuple[str, ...]
    device: str
    precision: Precision
    copy_gb_s: float
    load: Load
    models: tuple[dict[str, Any], ...]
    cases: tuple[Case, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, with versions, commit and hardware."""
        here = {"versions": versions(), "git_commit": git_commit(), "hardware": hardware().model_dump(mode="json")}
        return asdict(self) | {"seed": self.load.seed} | here

    def save(self, path: Path) -> None:
        """Write the result as JSON, whole or not at all."""
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(self.as_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        part.replace(path)


def benchmark(
    model: str | Path,
    *,
    against: str | Path | None = None,
    load: Load | None = None,
    attention: str | None = None,
    compiled: bool = False,
    placement: Placement | None = None,
    command: Sequence[str] = ("headfuse", "bench"),
    stages: Stages = silent,
) -> Benchmark:
    """Measure a model, and another to compare with, at every context and batch size.

    Weights are bf16 or fp32, by the placement's precision (None: fp32 on a CPU). `attention` is what `load_to_serve`
    takes, and `compiled` compiles the blocks for the steps, for both models.
    Raises ConfigError if a context exceeds a model's positions or is too short for the steps.
    """
    device, precision = resolve_to_serve(placement or Placement())
    load = load or Load()
    sources = [locate(str(name)) for name in (model, against) if name is not None]
    for source in sources:
        check_weights(source.folder)
    load = _within_positions(load, sources)
    rate = copy_rate(device)
    found: list[dict[str, Any]] = []
    cases: list[Case] = []
    for name, source in zip(_names(sources), sources, strict=True):
        bench = Bench(name, load_to_serve(source, device, precision, attention), rate, compiled=compiled)
        found.append({"name": name, **_facts(bench)})
        with stages(f"bench {name}", len(load.contexts) * len(load.batches), "cases") as advance:
            for context, batch in product(load.contexts, load.batches):
                cases.append(bench.measure(batch, context, load))
                advance(1)
        del bench
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return Benchmark(tuple(command), str(device), precision, rate / 1e9, load, tuple(found), tuple(cases))


def _facts(bench: Bench) -> dict[str, Any]:
    return {
        "attention": bench.model.config._attn_implementation,
        "weight_bytes": sum(parameter.nbytes for parameter in bench.model.parameters()),
        "cache_bytes_per_token": bench.bytes_per_token,
        "memory_beside_bytes": bench.memory if bench.on_gpu else None,
    }


def _names(sources: Sequence[Source]) -> list[str]:
    """Public names, told apart if they are the same."""
    names = [source.public_name for source in sources]
    return names if len(set(names)) == len(names) else [names[0], f"{names[1]} (against)"]


def _within_positions(load: Load, sources: Sequence[Source]) -> Load:
    """The load with contexts that every model has positions for; ConfigError if those asked for are not."""
    limits = [
        (name, positions_of(load_config(source.folder))) for name, source in zip(_names(sources), sources, strict=True)
    ]
    known = [(name, limit) for name, limit in limits if limit is not None]
    for name, limit in known:
        if load.contexts and max(load.contexts) > limit:
            raise ConfigError(
                f"{name}: wanted at most {limit} tokens, the model's positions, got {max(load.contexts)} of context; "
                "shorten --context"
            )
    return load if load.contexts else replace(load, contexts=(min(CONTEXT, *(limit for _, limit in known)),))
