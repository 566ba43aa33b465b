"""Attention of decoupled heads on a GPU: correctness, then time against a copy and torch's own attention.

    python benchmarks/decode_attention.py tune  --out tune.json --budget 150
    python benchmarks/decode_attention.py table --tuned tune.json --out decode_attention.json --budget 120
    python benchmarks/decode_attention.py prefill  --out prefill_attention.json --budget 90
    python benchmarks/decode_attention.py backward --out backward_attention.json --budget 90

`prefill` and `backward` compare the kernels with a gather of the heads and torch's attention, each call between two
events. Every decoding time is the median of CUDA-graph replays; one graph runs a kernel over several sets of inputs,
together far larger than the L2 cache, so that nothing is read from there and nothing dirty is left in it. What is timed
has been found right first, in the same process. A worker process does the measuring: when it crashes or hangs, what it
was at is recorded as failed and a new worker goes on with the rest.
"""

import argparse
import json
import os
import platform
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from headfuse.ops.decoupled_attention.decode import DecodeConfig, decode_attention, default_config, hopper_config
from headfuse.ops.decoupled_attention.head_maps import HeadMaps, head_maps, tile
from headfuse.ops.decoupled_attention.library import prefill_op
from headfuse.ops.decoupled_attention.naive import naive_attention
from headfuse.ops.decoupled_attention.rows import Rows
from headfuse.ops.decoupled_attention.scoring import PLAIN, Scoring
from headfuse.ops.decoupled_attention.sdpa import gather

ROTATED_BYTES = 2_000_000_000
STALL_SECONDS = 45
COMPILERS = 12
REPLAY_SECONDS = 0.02
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 1e-2}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LSE_TOLERANCE = 2e-2


@dataclass(frozen=True)
class Case:
    """One shape. `maps`: "grouped" is grouped-query attention, "random" any; `layout`: the outer axis of a cache.

    `page` 0 is a dense cache; `ragged` draws lengths between a quarter of `context` and all of it.
    """

    batch: int
    context: int
    key_heads: int
    value_heads: int
    query_heads: int = 32
    head_dim: int = 128
    dtype: str = "bf16"
    maps: str = "random"
    layout: str = "heads"
    page: int = 0
    ragged: bool = False
    softcap: float | None = None
    window: int | None = None

    @property
    def scoring(self) -> Scoring:
        """Its soft-cap and window."""
        return PLAIN if self.softcap is self.window is None else Scoring(softcap=self.softcap, window=self.window)


# Shapes of the table: each pair of head counts at each size.
SIZES = ((1, 131072), (8, 8192), (64, 2048), (1, 16384))
COUNTS = ((32, 32, "grouped"), (8, 8, "grouped"), (8, 8, "random"), (6, 10, "random"), (2, 14, "random"))
COUNTS += ((4, 4, "grouped"), (4, 4, "random"), (2, 6, "random"))


def table_cases() -> list[Case]:
    """The table, then other layouts, sizes and widths."""
    cases = [Case(b, t, k, v, maps=maps) for b, t in SIZES for k, v, maps in COUNTS]
    cases += [Case(b, t, k, v, layout="tokens") for b, t in SIZES for k, v in ((6, 10), (2, 6))]
    cases += [Case(b, t, 6, 10, layout="tokens", page=page) for b, t in SIZES[:2] for page in (16, 64)]
    cases += [Case(8, 8192, 6, 10, layout="heads", page=64), Case(8, 16384, 6, 10, ragged=True)]
    cases += [Case(1, 4096, 6, 10), Case(8, 4096, 6, 10), Case(16, 4096, 6, 10), Case(64, 4096, 6, 10)]
    cases += [Case(8, 8192, 6, 10, query_heads=64), Case(8, 8192, 12, 20, head_dim=64)]
    return cases


def tuned_cases() -> list[Case]:
    """What decides the choice of a configuration, the most telling first."""
    cases = [Case(b, t, k, v) for b, t in SIZES for k, v in ((6, 10), (2, 6))]
    cases += [Case(b, t, n, n, maps="grouped") for b, t in SIZES for n in (8, 4)]
    cases += [Case(b, t, 6, 10, layout="tokens") for b, t in SIZES]
    cases += [Case(1, 131072, 32, 32, maps="grouped"), Case(8, 8192, 32, 32), Case(1, 4096, 6, 10)]
    cases += [Case(8, 8192, 6, 10, layout="tokens", page=page) for page in (64, 16)]
    return [*cases, Case(8, 8192, 6, 10, query_heads=64), Case(8, 8192, 6, 10, query_heads=128)]


def checked_cases() -> list[Case]:
    """Small shapes that reach every branch of the kernels."""
    base = Case(3, 1000, 5, 11, ragged=True)
    cases = [replace(base, dtype=dtype) for dtype in DTYPES]
    cases += [replace(base, layout="tokens", page=page) for page in (0, 16, 64, 128)]
    cases += [replace(base, head_dim=dim) for dim in (32, 64, 96, 256)]
    cases += [replace(base, key_heads=8, value_heads=8, maps="grouped"), replace(base, batch=70, context=300)]
    cases += [replace(base, query_heads=count) for count in (11, 40, 64, 128)]
    cases += [replace(base, softcap=20.0), replace(base, window=300), replace(base, window=5, page=64, layout="tokens")]
    return [*cases, replace(base, batch=1, context=20000, ragged=False)]


def learned_cases() -> list[Case]:
    """What `prefill` and `backward` time: many queries a row."""
    cases = [Case(b, t, 6, 10) for b, t in ((8, 4096), (4, 8192), (2, 16384), (1, 32768))]
    cases += [Case(8, 4096, 8, 8, maps="grouped"), Case(8, 4096, 2, 6), Case(8, 4096, 12, 20, head_dim=64)]
    return [*cases, Case(8, 4096, 32, 32, maps="grouped")]


def learned_checks() -> list[Case]:
    """Small shapes that reach every branch of the prefill and backward kernels."""
    base = Case(2, 333, 5, 11, query_heads=16)
    cases = [replace(base, dtype=dtype) for dtype in DTYPES] + [
        replace(base, head_dim=dim) for dim in (32, 64, 96, 256)
    ]
    cases += [replace(base, ragged=True), replace(base, softcap=20.0), replace(base, window=100, ragged=True)]
    return [*cases, replace(base, context=9), replace(base, context=1100, key_heads=1, value_heads=16)]


def configs(case: Case) -> list[DecodeConfig]:
    """What to try for one shape."""
    tokens = case.batch * case.context / torch.cuda.get_device_properties(0).multi_processor_count
    default = hopper_config(case.query_heads, case.head_dim, tokens)
    found = [default, replace(default, programs=2 * default.programs), DecodeConfig("passes", 128, 4, 3, 2)]
    if case.query_heads <= 64 and case.head_dim == 128:
        shapes = [(128, 4, 6, 1), (64, 4, 5, 2), (64, 4, 12, 1), (32, 4, 6, 3)]
        found += [DecodeConfig("hopper", *shape) for shape in shapes]
    return list(dict.fromkeys(found))


def checked_configs(case: Case) -> list[DecodeConfig | None]:
    """The default, and each way of computing that suits the size."""
    passes = DecodeConfig("passes", 32 if case.dtype == "fp32" else 64, warps=4, stages=3, programs=2)
    return [None, passes]


class Inputs:
    """Several sets of random inputs of one case, and the reference output of the first."""

    def __init__(self, case: Case, sets: int | None = None) -> None:
        generator = torch.Generator(device="cuda").manual_seed(0)
        self.case, self.dtype = case, DTYPES[case.dtype]
        rows, total, dim = case.batch, case.context, case.head_dim
        self.lengths = torch.full((rows,), total, dtype=torch.int32, device="cuda")
        if case.ragged:
            drawn = torch.randint(total // 4, total + 1, (rows,), generator=generator, device="cuda")
            self.lengths = drawn.to(torch.int32)
        tokens = int(self.lengths.clamp(max=case.window or total).sum())
        self.bytes = tokens * (case.key_heads + case.value_heads) * dim * self.dtype.itemsize
        self.sets = sets or max(4, -(-ROTATED_BYTES // self.bytes))
        self.maps = maps_of(case)
        self.table = None
        if case.page:
            pages = -(-total // case.page)
            order = torch.randperm(rows * pages, generator=generator, device="cuda")
            self.table = order.reshape(rows, pages).to(torch.int32)
        self.query = self._random(generator, rows, case.query_heads, dim)
        self.key = self._cache(generator, case.key_heads)
        self.value = self._cache(generator, case.value_heads)

    def _random(self, generator: torch.Generator, *shape: int) -> Tensor:
        return torch.randn(self.sets, *shape, dtype=self.dtype, device="cuda", generator=generator)

    def _cache(self, generator: torch.Generator, heads: int) -> Tensor:
        """`[sets, pages, heads, tokens of a page, d]`, laid out as the case says."""
        case = self.case
        pages, page = (case.batch, case.context) if self.table is None else (self.table.numel(), case.page)
        if case.layout == "heads":
            return self._random(generator, pages, heads, page, case.head_dim)
        return self._random(generator, pages, page, heads, case.head_dim).transpose(2, 3)

    def launches(self, config: DecodeConfig | None) -> list[Callable[[], tuple[Tensor, Tensor]]]:
        """A decoding step on each set."""
        return [lambda index=index: self.step(index, config) for index in range(self.sets)]

    def step(self, index: int, config: DecodeConfig | None) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of set `index`."""
        return decode_attention(
            self.query[index],
            self.key[index],
            self.value[index],
            self.maps,
            Rows(self.lengths, block_table=self.table),
            scoring=self.case.scoring,
            config=config,
        )

    def dense(self, cache: Tensor) -> Tensor:
        """Set 0 of a cache as `[B, heads, S, d]`."""
        if self.table is None:
            return cache[0]
        return cache[0][self.table.long()].transpose(1, 2).flatten(2, 3)[:, :, : self.case.context]

    def reference(self) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of set 0 in fp64, one query head at a time."""
        keys, values, case = self.dense(self.key), self.dense(self.value), self.case
        positions = torch.arange(case.context, device="cuda")
        seen = positions < self.lengths[:, None]
        if case.window:
            seen &= positions >= self.lengths[:, None] - case.window
        outs, lses = [], []
        for head, (k, v) in enumerate(zip(self.maps.key.tolist(), self.maps.value.tolist(), strict=True)):
            query = self.query[0, :, head].double()
            scores = (keys[:, k].double() @ query[..., None])[..., 0] * case.head_dim**-0.5
            if case.softcap:
                scores = case.softcap * torch.tanh(scores / case.softcap)
            scores = scores.masked_fill(~seen, -torch.inf)
            lses.append(scores.logsumexp(-1))
            weights = torch.exp(scores - lses[-1][:, None])
            outs.append((weights[:, None] @ values[:, v].double())[:, 0])
        return torch.stack(outs, 1), torch.stack(lses, 1)

    def attention(self, backend: SDPBackend) -> list[Callable[[], Tensor]]:
        """Attention of torch on each set; for equal counts alone."""
        shared = self.case.key_heads != self.case.query_heads

        def launch(index: int) -> Tensor:
            with sdpa_kernel(backend):
                query = self.query[index, :, :, None]
                return F.scaled_dot_product_attention(query, self.key[index], self.value[index], enable_gqa=shared)

        return [lambda index=index: launch(index) for index in range(self.sets)]


class Learned:
    """Random inputs of many queries a row, the maps, and the gradient of the output; `ragged`: padding on the left."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator(device="cuda").manual_seed(0)
        self.case, self.maps = case, maps_of(case)
        heads = (case.query_heads, case.key_heads, case.value_heads, case.query_heads)
        made = [
            torch.randn(
                case.batch, case.context, n, case.head_dim, dtype=DTYPES[case.dtype], device="cuda", generator=generator
            ).transpose(1, 2)
            for n in heads
        ]
        self.leaves, self.upstream = [x.requires_grad_() for x in made[:3]], made[3]
        self.starts = None
        if case.ragged:
            first = torch.randint(case.context // 2, (case.batch,), generator=generator, device="cuda")
            self.starts = first.to(torch.int32)

    def triton(self) -> Tensor:
        """The kernels' output."""
        scoring = self.case.scoring
        numbers = scoring.scale_for(self.case.head_dim), scoring.softcap or 0.0, scoring.window or 0
        return prefill_op(*self.leaves, self.maps.tensors(), None, self.starts, None, *numbers)[0]

    def gathered(self, backend: SDPBackend) -> Tensor:
        """The heads gathered to the query heads, then torch's attention."""
        query, key, value = self.leaves
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                query, gather(key, self.maps.key), gather(value, self.maps.value), is_causal=True
            )

    def gradients(self, out: Tensor, upstream: Tensor | None = None) -> tuple[Tensor, ...]:
        """Of queries, keys and values."""
        return torch.autograd.grad(out, self.leaves, self.upstream if upstream is None else upstream, retain_graph=True)

    def reference(self) -> tuple[Tensor, ...]:
        """Output and gradients in fp64, for small shapes."""
        leaves = [x.detach().double().requires_grad_() for x in self.leaves]
        out = naive_attention(*leaves, self.maps, starts=self.starts, scoring=self.case.scoring)[0]
        return out, *torch.autograd.grad(out, leaves, self.upstream.double())


def close(got: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> dict[str, float]:
    """The largest relative error of a tensor. Raises AssertionError above the tolerance."""
    worst = max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(got, expected, strict=True))
    assert worst < tolerance, f"wrong result, relative error {worst:.2e}"
    return {"error": worst}


def verify_learned(inputs: Learned) -> dict[str, float]:
    """Output and gradients against fp64, and a second run against the first, bit by bit."""
    first, second = (inputs.triton() for _ in range(2))
    gradients, again = inputs.gradients(first), inputs.gradients(second)
    assert all(torch.equal(a, b) for a, b in zip((first, *gradients), (second, *again), strict=True)), "two runs differ"
    tolerance = 2 * TOLERANCE[DTYPES[inputs.case.dtype]]
    return close((first, *gradients), inputs.reference(), tolerance)


def eager_microseconds(launch: Callable[[], Any]) -> dict[str, float]:
    """Median of single calls, and the memory that one adds at its peak."""
    for _ in range(3):
        launch()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, times = torch.cuda.memory_allocated(), []
    for _ in range(12):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        launch()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000)
    return {"microseconds": median(times), "peak_mb": round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)}


def time_learned(name: str, case: Case, done: set[str], *, backward: bool) -> None:
    """The kernels and gather + torch's attention, forward or backward; each result is held against the next."""
    inputs = Learned(case)
    flops = (10 if backward else 4) * case.batch * case.query_heads * case.context**2 * case.head_dim / 2
    ways: dict[str, Callable[[], Tensor]] = {"triton": inputs.triton}
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        ways[f"gather+{backend.name.split('_')[0].lower()}"] = lambda backend=backend: inputs.gathered(backend)
    expected = inputs.gathered(SDPBackend.FLASH_ATTENTION)
    wanted = inputs.gradients(expected) if backward else (expected,)

    def timed(way: Callable[[], Tensor]) -> dict[str, float]:
        if not backward:
            with torch.no_grad():
                return close((way(),), wanted, 2e-2) | eager_microseconds(way)
        out = way()
        return close(inputs.gradients(out), wanted, 3e-2) | eager_microseconds(lambda: inputs.gradients(out))

    for label, way in ways.items():
        attempt(f"{name} {label}", case, label, done, lambda way=way: timed(way), flops=flops)


def maps_of(case: Case) -> HeadMaps:
    """Equal consecutive groups, or every head at least once in random order."""
    generator = torch.Generator().manual_seed(case.key_heads * 100 + case.value_heads)
    drawn = []
    for heads in (case.key_heads, case.value_heads):
        count = case.query_heads
        if case.maps == "grouped":
            drawn.append([query * heads // count for query in range(count)])
        else:
            rest = torch.randint(heads, (count - heads,), generator=generator)
            chosen = torch.cat([torch.arange(heads), rest])
            drawn.append(chosen[torch.randperm(count, generator=generator)].tolist())
    return head_maps(drawn[0], drawn[1], "cuda")


def errors(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Relative error of the output, largest error of the log-sum-exp."""
    out, lse = got[0].double(), got[1].double()
    return float((out - expected[0]).norm() / expected[0].norm()), float((lse - expected[1]).abs().max())


def verify(inputs: Inputs, config: DecodeConfig | None, expected: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Two runs on set 0, the second must repeat the first bit by bit. Raises AssertionError for a wrong result."""
    first, second = inputs.step(0, config), inputs.step(0, config)
    error, lse_error = errors(first, expected)
    assert error < TOLERANCE[inputs.dtype], f"wrong output, relative error {error:.2e}"
    assert lse_error < LSE_TOLERANCE, f"wrong log-sum-exp, error {lse_error:.2e}"
    assert torch.equal(first[0], second[0]), "two runs differ"
    return {"error": error, "lse_error": lse_error}


def microseconds(launches: list[Callable[[], Any]]) -> float:
    """Median over replays of one graph of all the launches, per launch."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for launch in launches[:2]:
            launch()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    graph.replay()
    first = replayed(graph)
    times = [replayed(graph) for _ in range(min(40, max(7, int(REPLAY_SECONDS * 1e6 / first))))]
    return median(times) / len(launches)


def replayed(graph: torch.cuda.CUDAGraph) -> float:
    """Microseconds of one replay."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1000


@triton.jit
def read_kernel(source, sink, count, BLOCK: tl.constexpr):  # noqa: ANN001, ANN201
    """Sum everything, so that all of it is read."""
    total = tl.zeros([BLOCK], tl.int32)
    for first in tl.range(tl.program_id(0) * BLOCK, count, tl.num_programs(0) * BLOCK, num_stages=4):
        total += tl.load(source + first.to(tl.int64) + tl.arange(0, BLOCK))
    tl.store(sink + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), total)


def memory_rates() -> dict[str, float]:
    """GB/s of a copy (bytes read plus bytes written), and of reading alone: the ceiling of decoding."""
    source = torch.randint(1 << 30, (1 << 29,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    copy = eager_microseconds(lambda: target.copy_(source))["microseconds"]  # a graph would leave it to the copy engine
    sink, best = torch.empty(1 << 23, dtype=torch.int32, device="cuda"), []
    for programs in (132 * 4, 132 * 8):
        best.append(microseconds([lambda n=programs: read_kernel[n,](source, sink, source.numel(), BLOCK=4096)] * 3))
    size = source.numel() * source.itemsize
    return {"copy_gb_s": round(2 * size / copy / 1e3, 1), "read_gb_s": round(size / min(best) / 1e3, 1)}


def facts() -> dict[str, Any]:
    """What the numbers were measured with."""
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "timing": "median of CUDA-graph replays, inputs rotating over at least "
        f"{ROTATED_BYTES / 1e9:g} GB and 4 sets; gb_s counts each cached key and value once",
    }


# --- the worker: prints one line for each thing begun and each result ---


def say(**line: Any) -> None:
    """One line for the driver."""
    print("@" + json.dumps(line), flush=True)


def work(options: argparse.Namespace) -> None:
    """Do the jobs that the driver has not seen the end of."""
    done = set(json.loads(Path(options.done).read_text()))
    deadline = options.deadline
    if "rates" not in done:
        say(begin="rates")
        say(end="rates", meta=facts() | memory_rates())
    for name, case in jobs(options.mode):
        if time.time() > deadline:
            say(note=f"out of time before {name}")
            return
        try:
            measure(options, name, case, done, deadline)
        except Exception as error:
            say(begin=name)
            say(end=name, failed=f"{type(error).__name__}: {str(error)[:300]}")
            if "CUDA error" in str(error) or "illegal" in str(error):
                raise
        torch.cuda.empty_cache()


def jobs(mode: str) -> Iterator[tuple[str, Case]]:
    """Names and cases of a mode, checks first."""
    if mode in ("prefill", "backward"):
        yield from ((f"learned check {index}", case) for index, case in enumerate(learned_checks()))
        yield from ((f"{mode} {index}", case) for index, case in enumerate(learned_cases()))
        return
    yield from ((f"check {index}", case) for index, case in enumerate(checked_cases()))
    if mode != "check":
        cases = tuned_cases() if mode == "tune" else table_cases()
        yield from ((f"{mode} {index}", case) for index, case in enumerate(cases))


def measure(options: argparse.Namespace, name: str, case: Case, done: set[str], deadline: float) -> None:
    """One case with every configuration."""
    if f"{name} whole" in done:
        return
    if name.startswith("check"):
        inputs = Inputs(case, sets=1)
        expected = inputs.reference()
        for index, config in enumerate(checked_configs(case)):
            attempt(f"{name} {index}", case, config, done, lambda config=config: verify(inputs, config, expected))
    elif name.startswith("learned"):
        inputs = Learned(case)
        attempt(name, case, "triton", done, lambda: verify_learned(inputs))
    elif name.startswith(("prefill", "backward")):
        time_learned(name, case, done, backward=name.startswith("backward"))
    elif name.startswith("tune"):
        tune(name, case, done, deadline)
    else:
        tabulate(name, case, done, tuned(options.tuned))
    say(end=f"{name} whole")


def tune(name: str, case: Case, done: set[str], deadline: float) -> None:
    """Time every configuration, and torch's attention where it can do the same."""
    inputs = Inputs(case)
    expected = inputs.reference()

    def timed(config: DecodeConfig) -> dict[str, float]:
        return verify(inputs, config, expected) | {"microseconds": microseconds(inputs.launches(config))}

    if case.key_heads == case.value_heads and case.maps == "grouped" and case.layout == "heads" and not case.page:
        baselines(name, case, done, inputs)
    for index, config in enumerate(configs(case)):
        if time.time() > deadline:
            return
        attempt(f"{name} {index}", case, config, done, lambda config=config: timed(config), inputs)


def tabulate(name: str, case: Case, done: set[str], best: dict[str, DecodeConfig]) -> None:
    """Time the default (or the tuned) configuration and torch's attention."""
    inputs = Inputs(case)
    expected = inputs.reference()
    config = best.get(key_of(case), default_config(inputs.query[0], inputs.key[0], inputs.value[0], inputs.table))

    def timed() -> dict[str, float]:
        return verify(inputs, config, expected) | {"microseconds": microseconds(inputs.launches(config))}

    attempt(f"{name} triton", case, config, done, timed, inputs)
    if case.key_heads == case.value_heads and case.maps == "grouped":
        baselines(name, case, done, inputs)


def baselines(name: str, case: Case, done: set[str], inputs: Inputs) -> None:
    """Attention of torch, through cuDNN and Flash."""
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        label = backend.name.split("_")[0].lower()
        launches = inputs.attention(backend)
        attempt(f"{name} {label}", case, label, done, lambda x=launches: {"microseconds": microseconds(x)}, inputs)


def attempt(
    name: str,
    case: Case,
    what: DecodeConfig | str | None,
    done: set[str],
    run: Callable[[], dict[str, float]],
    inputs: Inputs | None = None,
    flops: float | None = None,
) -> dict[str, float] | None:
    """Run one thing, tell the driver how it went, and go on whatever happens."""
    if name in done:
        return None
    say(begin=name)
    row: dict[str, Any] = {"backend": what if isinstance(what, str) else "triton", **asdict(case)}
    row["config"] = asdict(what) if isinstance(what, DecodeConfig) else None
    try:
        got = run()
    except Exception as error:
        say(end=name, row=row, failed=f"{type(error).__name__}: {str(error)[:300]}")
        if "CUDA error" in str(error) or "illegal" in str(error):
            raise
        return None
    if inputs is not None and "microseconds" in got:
        got["gb_s"] = round(inputs.bytes / got["microseconds"] / 1e3, 1)
    if flops is not None:
        got["tflop_s"] = round(flops / got["microseconds"] / 1e6, 1)
    if "microseconds" in got:
        got["microseconds"] = round(got["microseconds"], 2)
    say(end=name, row=row | got)
    return got


def key_of(case: Case) -> str:
    """A case as a key of a dictionary."""
    return json.dumps(asdict(case), sort_keys=True)


def tuned(path: str | None) -> dict[str, DecodeConfig]:
    """The best configuration of every case that `tune` measured."""
    if path is None:
        return {}
    best: dict[str, tuple[float, DecodeConfig]] = {}
    fields = Case.__dataclass_fields__
    for row in json.loads(Path(path).read_text())["rows"]:
        if row["backend"] == "triton" and "microseconds" in row:
            key = key_of(Case(**{name: row[name] for name in fields}))
            found = (row["microseconds"], DecodeConfig(**row["config"]))
            best[key] = min(best.get(key, found), found, key=lambda pair: pair[0])
    return {key: config for key, (_, config) in best.items()}


# --- compiling, in several processes at once ---


def compile_share(options: argparse.Namespace) -> None:
    """Compile every `of`-th kernel that the mode will need, by running it on a small input."""
    wanted = [] if options.mode in ("prefill", "backward") else list(kernels(options.mode, tuned(options.tuned)))
    for case, config in wanted[options.share :: options.of]:
        try:
            inputs = Inputs(case, sets=1)
            inputs.step(0, config)
            torch.cuda.synchronize()
        except Exception as error:
            say(note=f"compiling {config}: {type(error).__name__} {str(error)[:200]}")


def kernels(mode: str, best: dict[str, DecodeConfig]) -> Iterator[tuple[Case, DecodeConfig | None]]:
    """One small run for each kernel: the same constants and alignment as the real runs, no more of the rest."""
    seen = set()
    cases = [(case, checked_configs(case)) for case in checked_cases()]
    if mode == "tune":
        cases = [(case, [*configs(case)]) for case in tuned_cases()] + cases
    if mode == "table":
        cases = [(case, [best.get(key_of(case))]) for case in table_cases()] + cases
    for case, tried in cases:
        maps = maps_of(case)
        sizes = (tile(case.query_heads), maps.key_groups.shape[1], maps.value_groups.shape[1])
        for config in tried:
            # Combining has four kernels, by the number of splits; a small run has one for each block.
            for pieces in (1, 4, 16, 20, 80):
                key = (config, pieces, sizes, case.head_dim, case.dtype, case.page, case.softcap is None)
                if key not in seen:
                    seen.add(key)
                    tokens = (config.block if config else 128) * pieces
                    yield replace(case, batch=1, context=tokens, ragged=False), config


# --- the driver ---


def drive(options: argparse.Namespace) -> None:
    """Start workers until everything is done or the time is up; write what is known after every result."""
    started = time.time()
    deadline = started + options.budget
    state: dict[str, Any] = {"meta": {}, "rows": [], "checks": [], "failed": [], "notes": []}
    precompile(options, state, deadline)
    print(f"{time.time() - started:6.1f}s compiled", flush=True)
    done: list[str] = []
    for _ in range(12):
        if time.time() > deadline or one_worker(options, state, done, started, deadline):
            break
    save(options, state)
    summary(state)
    print(f"{time.time() - started:6.1f}s in all, {len(state['failed'])} failures", flush=True)


def child(options: argparse.Namespace, *more: str) -> subprocess.Popen[str]:
    """The script again, in another role."""
    command = [sys.executable, __file__, options.mode, "--budget", str(options.budget), "--out", options.out, *more]
    if options.tuned:
        command += ["--tuned", options.tuned]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1)


def precompile(options: argparse.Namespace, state: dict[str, Any], deadline: float) -> None:
    """Fill Triton's cache from several processes."""
    count = min(COMPILERS, max(1, (os.cpu_count() or 2) - 2))
    shares = [child(options, "--role", "compile", "--share", str(i), "--of", str(count)) for i in range(count)]
    for share in shares:
        try:
            out, _ = share.communicate(timeout=max(5, min(90, deadline - time.time())))
        except subprocess.TimeoutExpired:
            share.kill()
            out, _ = share.communicate()
            state["notes"].append("a compiling process ran out of time")
        if share.returncode:
            state["notes"].append(f"a compiling process ended with {share.returncode}: {out[-300:]}")
        state["notes"] += [json.loads(line[1:])["note"] for line in out.splitlines() if line.startswith("@")]


def one_worker(
    options: argparse.Namespace, state: dict[str, Any], done: list[str], started: float, deadline: float
) -> bool:
    """Follow one worker to its end; whether it came to it by itself."""
    listed = Path(options.out).with_suffix(".done")
    listed.write_text(json.dumps(done))
    worker = child(options, "--role", "work", "--done", str(listed), "--deadline", str(deadline))
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=pump, args=(worker, lines), daemon=True).start()
    at, tail = None, []
    while True:
        try:
            line = lines.get(timeout=STALL_SECONDS)
        except queue.Empty:
            line, stalled = None, True
        else:
            stalled = False
        if line is None:
            break
        if not line.startswith("@"):
            tail = [*tail[-15:], line.rstrip()]
            continue
        at = note(options, state, done, json.loads(line[1:]), at, started)
    if stalled:
        worker.kill()
    code = worker.wait()
    listed.unlink(missing_ok=True)
    if code == 0 and not stalled:
        return True
    why = "hung" if stalled else f"ended with {code}: " + " | ".join(tail)[-400:]
    state["failed"].append({"what": at or "starting", "failed": why})
    print(f"   !! worker {why} at {at}", flush=True)
    if at:
        done.append(at)
    return False


def pump(worker: subprocess.Popen[str], lines: "queue.Queue[str | None]") -> None:
    """Pass a worker's lines on, None at the end."""
    assert worker.stdout is not None
    for line in worker.stdout:
        lines.put(line)
    lines.put(None)


def note(
    options: argparse.Namespace,
    state: dict[str, Any],
    done: list[str],
    line: dict[str, Any],
    at: str | None,
    started: float,
) -> str | None:
    """Take in one line of the worker; what it is at now."""
    if "begin" in line:
        return line["begin"]
    if "note" in line:
        state["notes"].append(line["note"])
        print(f"{time.time() - started:6.1f}s {line['note']}", flush=True)
        return at
    done.append(line["end"])
    if "meta" in line:
        state["meta"] = line["meta"] | {"command": " ".join(sys.argv[1:])}
        print(f"{time.time() - started:6.1f}s {line['meta']}", flush=True)
    if "failed" in line:
        state["failed"].append({"what": line["end"], "failed": line["failed"], "row": line.get("row")})
        print(f"{time.time() - started:6.1f}s FAILED {line['end']} {line['failed']} {line.get('row')}", flush=True)
    elif "row" in line:
        row = line["row"]
        if "microseconds" in row:
            if "gb_s" in row:
                row["copy_fraction"] = round(row["gb_s"] / state["meta"]["copy_gb_s"], 4)
            state["rows"].append(row)
            if options.mode != "tune":
                print(f"{time.time() - started:6.1f}s {shown(row)}", flush=True)
        else:
            state["checks"].append(row)
        save(options, state)
    elif line["end"].endswith("whole") and options.mode == "tune":
        print(f"{time.time() - started:6.1f}s {line['end']}", flush=True)
    return at


def save(options: argparse.Namespace, state: dict[str, Any]) -> None:
    """Write everything known so far, never half of it."""
    path = Path(options.out)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(state, indent=1) + "\n")
    part.replace(path)


def shown(row: dict[str, Any]) -> str:
    """A row in one line."""
    config = row.get("config") or {}
    how = " ".join(str(value) for value in config.values())
    extra = f"{row['layout']} page {row['page']}" + (" ragged" if row["ragged"] else "")
    heads = f"{row['key_heads']:>2}/{row['value_heads']:<2}"
    rate = f"{row['tflop_s']:>7.1f} TFLOP/s {row['peak_mb']:>8.1f} MB" if "tflop_s" in row else ""
    rate = rate or f"{row['gb_s']:>7.1f} GB/s {100 * row['copy_fraction']:>5.1f}%"
    return (
        f"B={row['batch']:<3} T={row['context']:<6} H={row['query_heads']:<3} {heads} "
        f"d={row['head_dim']} {row['maps']:<7} {extra:<14} {row['backend']:<6} {row['microseconds']:>8.2f} us "
        f"{rate}  {how}"
    )


def summary(state: dict[str, Any]) -> None:
    """For each case the best of every backend and design."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in state["rows"]:
        groups.setdefault(json.dumps([row[name] for name in Case.__dataclass_fields__]), []).append(row)
    worst = max((check["error"] for check in state["checks"]), default=None)
    print(f"\n{len(state['checks'])} checks passed, worst relative error {worst}")
    for rows in groups.values():
        best: dict[str, dict[str, Any]] = {}
        for row in rows:
            config = row["config"] or {"design": ""}
            key = f"{row['backend']} {config['design']}"
            best[key] = min(best.get(key, row), row, key=lambda each: each["microseconds"])
        for row in sorted(best.values(), key=lambda each: each["microseconds"]):
            print(shown(row))
    for failure in state["failed"]:
        print("failed:", failure["what"], failure["failed"][:200])


def main() -> None:
    """Parse the command line and play the asked role."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("check", "tune", "table", "prefill", "backward"))
    parser.add_argument("--out", required=True, help="JSON, rewritten after every result")
    parser.add_argument("--budget", type=float, default=150, help="seconds")
    parser.add_argument("--tuned", help="the JSON of `tune`: use the best configuration it found for a case")
    for name in ("--role", "--done"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    for name in ("--share", "--of"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    {None: drive, "work": work, "compile": compile_share}[options.role](options)


if __name__ == "__main__":
    main()
