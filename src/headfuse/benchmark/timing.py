"""Clocks: events on a GPU, the host's elsewhere. What is timed runs once before."""

import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median

import torch

# A measurement is repeated at most so often, and while its repetitions take less than so many seconds.
REPEATS = 5
ENOUGH_SECONDS = 1.0
# The block that the copy rate is measured with: larger than any cache of the processor.
COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}
COPIES = 20


def seconds_of_each(function: Callable[[], object], device: torch.device, count: int) -> list[float]:
    """Seconds of `count` calls in a row. On a GPU the device's own: the host may run ahead."""
    if device.type != "cuda":
        stops = [time.perf_counter()]
        for _ in range(count):
            function()
            stops.append(time.perf_counter())
        return [later - earlier for earlier, later in pairwise(stops)]
    with torch.cuda.device(device):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for event in events[1:]:
            function()
            event.record()
        torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]


def median_seconds(function: Callable[[], object], device: torch.device) -> float:
    """The median of a few calls, one of them at least, after one that warms up."""
    function()
    spent: list[float] = []
    while len(spent) < REPEATS and sum(spent) < ENOUGH_SECONDS:
        spent += seconds_of_each(function, device, 1)
    return median(spent)


def copy_rate(device: torch.device) -> float:
    """Bytes read and written a second by a plain copy: the most that anything bound by memory can hope for."""
    size = COPY_BYTES["cuda" if device.type == "cuda" else "cpu"]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    spent = seconds_of_each(lambda: target.copy_(source), device, COPIES)
    return 2 * size / median(spent)
