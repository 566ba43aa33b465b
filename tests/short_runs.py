"""Short training runs of tiny models, and ways to stop them."""

from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from headfuse.checkpoints.assembly import decoder_layers
from headfuse.checkpoints.registry import adapter_for
from headfuse.progress import silent
from headfuse.training.batches import Batches, TrainingText, token_digest
from headfuse.training.loop import Trained, TrainingReport, train
from headfuse.training.objectives import LanguageModelling, Objective
from headfuse.training.options import TrainingOptions
from headfuse.training.processes import Processes
from headfuse.training.run_folder import RunFolder
from pico import VOCABULARY

HERE = Processes(torch.device("cpu"))
ROWS, LENGTH, STEPS = 4, 16, 25


class Stopped(Exception):
    """What the stages of `stopping` raise."""


def stopping(after: int, *, step_tokens: int = ROWS * LENGTH, name: str = "", error: type[BaseException] = Stopped):
    """Stages that raise once `after` steps of a stage are done."""

    @contextmanager
    def stages(stage, total, unit):
        done = 0

        def advance(amount, note=""):
            nonlocal done
            done += amount
            if stage.startswith(name) and unit == "tokens" and done >= after * step_tokens:
                raise error

        yield advance

    return stages


def learnable_tokens(size: int, vocabulary: int = VOCABULARY) -> np.ndarray:
    """Ids of which the next mostly follows from the last: there is something to learn."""
    draws = np.random.default_rng(5)
    ids = np.empty(size, np.uint16)
    ids[0] = 2
    for i, noise in enumerate(draws.integers(0, 3, size - 1)):
        ids[i + 1] = 2 + (int(ids[i]) * 3 + int(noise)) % (vocabulary - 2)
    return ids


def learnable_text(size: int = STEPS * ROWS * LENGTH + 1) -> TrainingText:
    """The same as a training text."""
    ids = learnable_tokens(size)
    return TrainingText(ids, "learnable", token_digest(ids))


def short(**changed) -> TrainingOptions:
    """A run of 25 steps."""
    fields = {"tokens": STEPS * ROWS * LENGTH, "rows": ROWS, "length": LENGTH, "rate": 3e-3, "save_every": 10}
    return TrainingOptions(**(fields | changed))


def batches_for(options: TrainingOptions, text: TrainingText | None = None) -> Batches:
    """The batches of a run."""
    sizes = {"rows": options.rows, "length": options.length, "steps": options.steps}
    return Batches(text or learnable_text(), **sizes, seed=options.seed, repeat=options.repeat)


def trained_of(model: PreTrainedModel, objective: Objective | None = None, **fields) -> Trained:
    """A stock model to train, by default on the next token."""
    blocks = decoder_layers(model, adapter_for(model.config))
    return Trained(model, blocks, objective or LanguageModelling(), **fields)


def run(
    trained: Trained,
    options: TrainingOptions | None = None,
    root: Path | None = None,
    *,
    stages=silent,
    here: Processes = HERE,
    recipe=None,
) -> TrainingReport:
    """Train for a few steps, with a run folder or without."""
    options = options or short()
    folder = None if root is None else RunFolder(root, recipe)
    return train(trained, batches_for(options), options, here, run=folder, stages=stages)


def curve(report: TrainingReport, name: str = "loss") -> list[float]:
    """A figure of every step."""
    return [row[name] for row in report.metrics]


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the weights."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
