"""The folder of a run in progress: its recipe, its metrics, its checkpoints. What a killed run resumes from."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from headfuse.errors import ConfigError
from headfuse.training.processes import Processes


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
        """Store the recipe of a new run; raise ConfigError with the difference if the folder holds another one's."""
        path, wanted = self.root / "recipe.json", json.loads(json.dumps({**self.recipe, **training}))
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
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
            partial.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")
            partial.replace(path)
        here.wait()

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
        save(state, checkpoint_id=partial, no_dist=here.world == 1)
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
            load(state, checkpoint_id=self.root / "checkpoints" / f"step-{step:08d}", no_dist=here.world == 1)
            set_state_dict(
                module,
                list(optimizers),
                model_state_dict=state["model"],
                optim_state_dict=state["optimizer"],
            )
        return step

    def _checkpoints(self) -> list[Path]:
        return [path for path in self.root.glob("checkpoints/step-*") if not path.name.endswith(".partial")]
