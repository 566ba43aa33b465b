"""The folder of a run in progress: its recipe, its metrics, its checkpoints. What a killed run resumes from."""

import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from headfuse.claim import CLAIM, claimed, occupied
from headfuse.errors import ConfigError, TrainingError
from headfuse.folder import make_parents
from headfuse.training.processes import Processes

# Bytes of a parameter in a checkpoint: itself and the two moments of AdamW, in fp32.
CHECKPOINT_BYTES = 12
# The folder of a teacher's recorded tokens, in the root of a run.
TEACHER = "teacher"
# What a run writes: packed text, recipe, metrics, checkpoints, and the same once more in a folder for every stage.
OURS = re.compile(
    rf"(tokens|recipe|metrics|teacher)\..*|checkpoints|step-.*\.(safetensors|partial-\d+)|{CLAIM}(\.draft)?"
)
# What took long to make.
KEPT = ("checkpoints/step-*[0-9]", f"{TEACHER}/step-*.safetensors")


class DamagedRunError(ConfigError):
    """A run that cannot be resumed, since a file of it cannot be read."""


@contextmanager
def run_root(root: Path, *, first: bool = True) -> Iterator[None]:
    """Within the context, the folder of a run of one or more stages, which one command has for itself.

    It is removed at the end, and after an error, unless it holds checkpoints or a teacher's tokens to resume from. The
    `first` process does all that. Raises ConfigError if the folder cannot be made, holds anything but a run, or is in
    use.
    """
    _check_free(root, first=first)
    made: list[Path] = []
    try:
        with ExitStack() as undo:
            if first:
                made = _made(root)
                undo.enter_context(claimed(root))
            yield
    except BaseException as error:
        if any(next(root.rglob(pattern), None) for pattern in KEPT):
            if not isinstance(error, DamagedRunError):
                error.add_note(f"the run is kept in {root}, from where the same command resumes it")
        elif first:
            shutil.rmtree(root, ignore_errors=True)
            for parent in reversed(made):
                if not any(parent.iterdir()):
                    parent.rmdir()
        raise
    if first:
        shutil.rmtree(root)


def _check_free(root: Path, *, first: bool) -> None:
    if strange := sorted(path.name for path in root.glob("*") if not _is_ours(path)):
        raise ConfigError(
            f"{root}: wanted the folder of a run, or none, got one with {strange[0]}; move it, or choose another output"
        )
    if first and occupied(root):
        raise ConfigError(
            f"{root}: wanted the folder of a run, got one where another command is at work; wait for it, or stop it"
        )


def _is_ours(path: Path) -> bool:
    stage = path.is_dir() and all(OURS.fullmatch(inner.name) for inner in path.iterdir())
    return stage or OURS.fullmatch(path.name) is not None


def _made(root: Path) -> list[Path]:
    """Create the folder; returns the parents that were not there."""
    try:
        made = make_parents(root)
        root.mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{root}: cannot be written ({error.strerror}); choose an output you may write to") from error
    return made


class RunFolder:
    """`recipe.json`, `metrics.jsonl` and `checkpoints/step-NNNNNNNN`, each written whole or not at all."""

    def __init__(self, root: Path, recipe: Mapping[str, Any] | None = None) -> None:
        """`recipe` is what must be the same for a resumed run, beside the training options: model, text, objective."""
        self.root, self.recipe = root, dict(recipe or {})

    @property
    def metrics(self) -> Path:
        """One JSON line a step."""
        return self.root / "metrics.jsonl"

    def check_recipe(self, training: Mapping[str, Any], here: Processes) -> None:
        """Store the recipe of a new run; raise ConfigError with the difference if there are checkpoints of another."""
        path, content = self.root / "recipe.json", json.dumps({**self.recipe, **training}, indent=1, default=str)
        if path.is_file() and self.latest_step():
            found, wanted = _flat(self._stored_recipe(path)), _flat(json.loads(content))
            changed = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
            if changed:
                listed = ", ".join(f"{key}: {found.get(key)!r} -> {wanted.get(key)!r}" for key in changed)
                raise ConfigError(
                    f"{self.root}: holds a run with another recipe ({listed}); repeat its recipe to resume it, or "
                    "delete the folder to start anew"
                )
        here.wait()
        if here.first:
            self.root.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            partial.write_text(content + "\n", encoding="utf-8")
            partial.replace(path)
        here.wait()

    def _stored_recipe(self, path: Path) -> dict[str, Any]:
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self._damaged(path, error) from error

    def _damaged(self, path: Path, error: BaseException) -> DamagedRunError:
        return DamagedRunError(
            f"{path}: wanted a file of a run to resume, got one that cannot be read ({_first_line(error)}); delete "
            f"{self.root} to start anew"
        )

    def check_space(self, parameters: int) -> None:
        """Raise ConfigError if the disk has no room for two checkpoints, of which one replaces the other."""
        needed = CHECKPOINT_BYTES * parameters * (1 if self.latest_step() else 2)
        free = shutil.disk_usage(self.root).free
        if free < needed:
            raise ConfigError(
                f"{self.root}: wanted {needed / 1e9:.2f} GB of disk for checkpoints, {free / 1e9:.2f} GB are free; "
                "free some space, choose an output on another disk, or write none (--save-every 0)"
            )

    def latest_step(self) -> int:
        """Steps done at the last whole checkpoint; 0 without one."""
        return max((int(path.name.removeprefix("step-")) for path in self._checkpoints()), default=0)

    def save(self, step: int, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer], here: Processes) -> None:
        """Write a checkpoint after `step` steps and drop the older ones."""
        final = self.root / "checkpoints" / f"step-{step:08d}"
        partial = final.with_name(final.name + ".partial")
        if here.first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        here.wait()
        model_state, optimizer_state = get_state_dict(module, list(optimizers))
        state = {"model": model_state, "optimizer": optimizer_state}
        try:
            with _quiet_alone():
                save(state, checkpoint_id=partial, no_dist=here.world == 1)
        except (OSError, RuntimeError, CheckpointException) as error:
            shutil.rmtree(partial, ignore_errors=True)
            free = shutil.disk_usage(self.root).free / 1e9
            raise TrainingError(
                f"{self.root}: wanted to write the checkpoint of step {step}, got {_first_line(error)} with "
                f"{free:.2f} GB free; make room and give the same command again"
            ) from error
        here.wait()
        if here.first:
            partial.replace(final)
            for old in self._checkpoints():
                if old != final:
                    shutil.rmtree(old)
        here.wait()

    def restore(self, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer], here: Processes) -> int:
        """Load the last checkpoint into a module and its optimizers, if there is one; the steps it has done."""
        step = self.latest_step()
        if step:
            model_state, optimizer_state = get_state_dict(module, list(optimizers))
            state = {"model": model_state, "optimizer": optimizer_state}
            place = self.root / "checkpoints" / f"step-{step:08d}"
            try:
                with _quiet_alone():
                    load(state, checkpoint_id=place, no_dist=here.world == 1)
            except (Exception, CheckpointException) as error:  # unpickling raises whatever a damaged file says
                raise self._damaged(place, error) from error
            set_state_dict(
                module,
                list(optimizers),
                model_state_dict=state["model"],
                optim_state_dict=state["optimizer"],
            )
        return step

    def _checkpoints(self) -> list[Path]:
        return [path for path in self.root.glob("checkpoints/step-*") if not path.name.endswith(".partial")]


@contextmanager
def _quiet_alone() -> Iterator[None]:
    """Without the warning that one process saves alone, which is what `no_dist` asks for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)
        yield


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _flat(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested recipe with dotted names, so that a difference is named and not the whole around it."""
    flat: dict[str, Any] = {}
    for key, value in recipe.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
