"""One run of trained stages, whatever they train: what they share, and what comes of them."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headfuse.checkpoints.opened import LoadedModel
from headfuse.conversion import Converted
from headfuse.progress import Stages, silent
from headfuse.training.batches import Batches, TrainingRows
from headfuse.training.loop import NOWHERE, Trained, TrainingReport, train
from headfuse.training.options import TrainingOptions
from headfuse.training.processes import Processes
from headfuse.training.run_folder import RunFolder
from headfuse.training.trackers import Trackers


@dataclass(frozen=True)
class Learned:
    """A model with converted heads whose other weights were trained too; reports by stage."""

    model: LoadedModel
    converted: Converted
    reports: dict[str, TrainingReport]

    def with_heads(self) -> AbstractContextManager[Any]:
        """Within the context, `model.model` computes the converted heads."""
        return self.model.with_heads(self.converted.heads)


@dataclass(frozen=True)
class Course:
    """What every stage of one run shares: the text, where it runs, where it is kept, who watches."""

    text: TrainingRows
    here: Processes
    root: Path | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    trackers: Trackers = NOWHERE
    stages: Stages = silent

    def run(self, stage: str) -> RunFolder | None:
        """The run folder of a stage."""
        return None if self.root is None else RunFolder(self.root / stage, self.recipe)

    def train(self, trained: Trained, batches: Batches, options: TrainingOptions, stage: str) -> TrainingReport:
        """Train a stage in place. Raises what `train` raises."""
        watching = {"trackers": self.trackers, "stages": self.stages}
        return train(trained, batches, options, self.here, run=self.run(stage), name=stage, **watching)
