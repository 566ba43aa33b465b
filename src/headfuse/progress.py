"""Progress of long work: a bar on a terminal, heartbeat lines elsewhere, nothing where nobody asked."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Advance = Callable[[int], None]
# Opens a stage: name, total amount, unit of the amount ("tokens", "layers", ...).
Stages = Callable[[str, int, str], AbstractContextManager[Advance]]

HEARTBEAT_SECONDS = 10.0


@contextmanager
def silent(name: str, total: int, unit: str) -> Iterator[Advance]:  # noqa: ARG001  the signature of `Stages`
    """Report nothing: the default of the Python API."""
    yield lambda _: None


@contextmanager
def heartbeat(name: str, total: int, unit: str) -> Iterator[Advance]:
    """Lines on standard error, one every ten seconds and one at the end: for logs and pipes."""
    started = last = time.monotonic()
    done = 0

    def advance(amount: int) -> None:
        nonlocal done, last
        done += amount
        now = time.monotonic()
        if now - last >= HEARTBEAT_SECONDS and done:
            last, rate = now, done / (now - started)
            eta = max(total - done, 0) / rate
            sys.stderr.write(f"{name}: {done:,}/{total:,} {unit}, {rate:,.0f} {unit}/s, {eta:.0f} s left\n")
            sys.stderr.flush()

    yield advance
    seconds = time.monotonic() - started
    sys.stderr.write(f"{name}: {done:,} {unit} in {seconds:.1f} s\n")
    sys.stderr.flush()


@contextmanager
def bar(name: str, total: int, unit: str) -> Iterator[Advance]:
    """A rich progress bar on standard error with rate and time left."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(name, total=total, rate="")

        def advance(amount: int) -> None:
            progress.advance(task, amount)
            speed = progress.tasks[0].speed
            progress.update(task, rate=f"{speed:,.0f} {unit}/s" if speed else "")

        yield advance


def for_terminal() -> Stages:
    """The bar if standard error is a terminal, heartbeat lines otherwise."""
    return bar if sys.stderr.isatty() else heartbeat
