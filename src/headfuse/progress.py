"""Progress of long work: a bar on a terminal, heartbeat lines elsewhere, nothing where nobody asked."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Advance(Protocol):
    """Tells how much more is done, and in a few words how it goes."""

    def __call__(self, amount: int, note: str = "", /) -> None:
        """`amount` more is done."""


# Opens a stage: name, total amount, unit of the amount ("tokens", "layers", ...).
Stages = Callable[[str, int, str], AbstractContextManager[Advance]]

HEARTBEAT_SECONDS = 10.0


def ignore(amount: int, note: str = "", /) -> None:
    """Tell nobody."""


@contextmanager
def silent(name: str, total: int, unit: str) -> Iterator[Advance]:  # noqa: ARG001  the signature of `Stages`
    """Report nothing: the default of the Python API."""
    yield ignore


@contextmanager
def heartbeat(name: str, total: int, unit: str) -> Iterator[Advance]:
    """Lines on standard error, one every ten seconds and one at the end: for logs and pipes."""
    started = last = time.monotonic()
    done = 0

    def advance(amount: int, note: str = "", /) -> None:
        nonlocal done, last
        done += amount
        now = time.monotonic()
        if now - last >= HEARTBEAT_SECONDS and done:
            last, rate = now, done / (now - started)
            eta = max(total - done, 0) / rate
            line = f"{name}: {done:,}/{total:,} {unit}, {rate:,.0f} {unit}/s, {eta:.0f} s left"
            sys.stderr.write(f"{line}, {note}\n" if note else f"{line}\n")
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
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(name, total=total, rate="", note="")

        def advance(amount: int, note: str = "", /) -> None:
            progress.advance(task, amount)
            speed = progress.tasks[0].speed
            progress.update(task, rate=f"{speed:,.0f} {unit}/s" if speed else "", note=note)

        yield advance


def for_terminal() -> Stages:
    """The bar if standard error is a terminal, heartbeat lines otherwise."""
    return bar if sys.stderr.isatty() else heartbeat
