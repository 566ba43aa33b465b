"""The trained stages of a conversion, whichever paper's: what they refuse, what they learn from, what comes of them.

DHA's are in `learning`, the one of "Align before merging" is in `pruning`.
"""

import hashlib
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from headfuse.checkpoints.opened import LoadedModel
from headfuse.checkpoints.original import Original
from headfuse.conversion import Converted, Settings
from headfuse.course import Course, Learned
from headfuse.errors import ConfigError
from headfuse.folder import OutputFolder
from headfuse.learning.checks import check_learnable
from headfuse.learning.learn import learn_heads
from headfuse.learning.options import Learning
from headfuse.progress import Stages, silent
from headfuse.pruning import Lesson, Pruning, check_prunable, prune_heads
from headfuse.statistics.moments import LayerStatistics
from headfuse.teacher import Teacher, load_teacher
from headfuse.text.rows import TokenRows
from headfuse.training.batches import Batches, TrainingRows, training_rows, training_text
from headfuse.training.loop import NOWHERE
from headfuse.training.processes import Processes
from headfuse.training.trackers import Trackers


def method_name(settings: Settings, learning: Learning | Pruning | None) -> str:
    """The name of what is done, as `--method` has it."""
    if learning is None:
        return settings.method
    return "align" if isinstance(learning, Pruning) else "dha"


def check_trainable(
    loaded: LoadedModel,
    settings: Settings,
    learning: Learning | Pruning | None,
    *,
    taught: bool = False,
    planned: bool = False,
) -> None:
    """Raise, before any work, what the stages' own checks do; ConfigError for a teacher where nothing follows it."""
    if isinstance(learning, Pruning):
        check_prunable(loaded, settings, learning, planned=planned)
    elif taught:
        raise ConfigError("wanted no teacher but the original, unless method align trains; leave the teacher out")
    elif learning is not None:
        check_learnable(loaded, settings, learning, planned=planned)


@dataclass(frozen=True)
class TrainedStages:
    """Stages that are ready to run: which, on what course, and after whom, if not after the original."""

    learning: Learning | Pruning
    course: Course
    teacher: Teacher | None = None

    @property
    def shares_first(self) -> bool:
        """Whether they want shared heads: as their start, or for the groups."""
        if isinstance(self.learning, Pruning):
            return True
        return self.learning.start == "converted" or self.learning.grouping == "closed-form"

    @classmethod
    def prepare(
        cls,
        learning: Learning | Pruning,
        original: Original,
        settings: Settings,
        root: Path,
        *,
        data: str | None = None,
        teacher: str | Path | None = None,
        trackers: Trackers = NOWHERE,
        stages: Stages = silent,
    ) -> "TrainedStages":
        """Load the text and the teacher of a run that lives in `root`; its recipe is what a resumed run must share.

        Raises TextError if the text is too short, and what `load_teacher` and `training_rows` raise.
        """
        here = Processes(original.loaded.model.device, settings.precision)
        place = {"device": here.device, "precision": here.precision}
        guide = None if teacher is None else load_teacher(teacher, original.config, original.tokenizer, **place)
        text = _text(learning, original, data, root)
        recipe = {
            "model": original.identity,
            "text": text.digest,
            "settings": asdict(settings),
            "learning": asdict(learning),
            "teacher": None if guide is None else guide.identity,
        }
        return cls(learning, Course(text, here, root, recipe, trackers, stages), guide)

    def train(
        self,
        loaded: LoadedModel,
        settings: Settings,
        shared: Converted | None = None,
        statistics: Sequence[LayerStatistics] | None = None,
        rows: TokenRows | None = None,
    ) -> Learned:
        """The trained model; `loaded` stays as it was.

        If `shares_first`, `shared` heads are there, with the `statistics` and calibration `rows` that they come from. A
        resumed run must have the same: its checkpoints hold weights, which mean nothing to other groups of heads.
        Raises what `train` raises.
        """
        started = time.monotonic()
        learning, course = self.learning, self.course
        if shared is not None and rows is not None:
            plan = hashlib.sha256(shared.plan.model_dump_json().encode()).hexdigest()
            course = replace(course, recipe=course.recipe | {"calibration": rows.digest(), "plan": plan})
        if isinstance(learning, Pruning):
            assert shared is not None, "convert_heads comes first"
            teacher = loaded.model if self.teacher is None else self.teacher.model
            lesson = Lesson.of(course.text, learning, teacher)
            learned = prune_heads(loaded, settings, learning, course, lesson, converted=shared, statistics=statistics)
        else:
            learned = learn_heads(loaded, settings, learning, course, converted=shared, statistics=statistics)
        seconds = learned.converted.seconds | {"training": time.monotonic() - started}
        return replace(learned, converted=replace(learned.converted, seconds=seconds))

    def keep_curves(self, learned: Learned, folder: OutputFolder) -> None:
        """Copy the curve of every stage out of the run, whose folder will be removed."""
        for stage in learned.reports:
            run = self.course.run(stage)
            assert run is not None
            shutil.copyfile(run.metrics, folder.metrics(stage))


def _text(learning: Learning | Pruning, original: Original, data: str | None, cache: Path) -> TrainingRows:
    """What the stages learn from: tokens, for a Pruning also prompts and answers. Too little is refused here."""
    training, tokenizer, size = learning.training, original.tokenizer, original.config.vocab_size
    text: TrainingRows
    if isinstance(learning, Pruning):
        text = training_rows(data, tokenizer, training, vocab_size=size, cache=cache)
    else:
        amount = {"num_tokens": training.tokens, "vocab_size": size, "seed": training.seed}
        text = training_text(data, tokenizer, **amount, cache=cache)
    Batches.of(text, training)
    return text
