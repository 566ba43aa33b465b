"""Where the figures of a run go beside its own log: TensorBoard, Weights & Biases."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from headfuse.errors import ConfigError

Row = Mapping[str, Any]
Follower = Callable[[Row], None]


@dataclass(frozen=True)
class Trackers:
    """A folder for TensorBoard's events, and a project of Weights & Biases; either may be None."""

    tensorboard: Path | None = None
    wandb: str | None = None

    @contextmanager
    def following(self, stage: str, settings: Row, *, first_step: int) -> Iterator[Follower]:
        """Within the context, a function that passes a step's figures on to both.

        A resumed run overwrites what came after `first_step` (TensorBoard); Weights & Biases has a run of its own for
        every call. Raises ConfigError if the package for it is not installed.
        """
        with ExitStack() as stack:
            followers: list[Follower] = []
            if self.tensorboard is not None:
                followers.append(stack.enter_context(_tensorboard(self.tensorboard / stage, first_step)))
            if self.wandb is not None:
                followers.append(stack.enter_context(_wandb(self.wandb, stage, settings)))

            def follow(row: Row) -> None:
                for each in followers:
                    each(row)

            yield follow


@contextmanager
def _tensorboard(folder: Path, first_step: int) -> Iterator[Follower]:
    writer = _module("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(folder), purge_step=first_step + 1)

    def follow(row: Row) -> None:
        for name, value in _figures(row).items():
            writer.add_scalar(name, value, row["step"])

    try:
        yield follow
    finally:
        writer.close()


@contextmanager
def _wandb(project: str, stage: str, settings: Row) -> Iterator[Follower]:
    run = _module("wandb", "wandb").init(project=project, name=stage, config=dict(settings))
    try:
        yield lambda row: run.log(_figures(row), step=row["step"])
    finally:
        run.finish()


def _figures(row: Row) -> dict[str, float]:
    return {name: value for name, value in row.items() if name != "step"}


def _module(name: str, package: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"wanted the package {package} to follow the run, got none; pip install {package}, or leave it out"
        ) from error
