"""Times of launches on a GPU, through a graph or one by one, and the memory rates to hold them against."""

# Triton's types are those of plain Python calls, not of a kernel's.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import triton
import triton.language as tl

REPLAY_SECONDS = 0.02


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
