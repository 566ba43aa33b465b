"""Prompts and answers read from JSON lines: `{"prompt": str, "answer": str}`, and `"task": str` where it matters."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headfuse.errors import TextError

SUFFIX = ".jsonl"
FIELDS = ("prompt", "answer")


@dataclass(frozen=True)
class Example:
    """A prompt, what should follow it, and the task that it belongs to."""

    prompt: str
    answer: str
    task: str

    @property
    def text(self) -> str:
        """Both, with a space between them where neither has one."""
        return self.prompt + self.continuation

    @property
    def continuation(self) -> str:
        """The answer as it stands in the text."""
        return self.answer if self.prompt[-1:].isspace() or self.answer[:1].isspace() else f" {self.answer}"


def is_example_file(path: Path) -> bool:
    """Whether the first line of a `.jsonl` file has a prompt and an answer."""
    if path.suffix.lower() != SUFFIX or not path.is_file():
        return False
    try:
        _, row = next(_rows(path), (0, None))
    except TextError:
        return False
    return isinstance(row, dict) and all(name in row for name in FIELDS)


def read_examples(path: Path) -> list[Example]:
    """The examples of a `.jsonl` file in file order; a task without a name is called after the file.

    Raises TextError, with the number of the line, for anything that is no example, and for empty prompts and answers.
    """
    examples = [_example(f"{path}:{number}", row, path.stem) for number, row in _rows(path)]
    if not examples:
        raise TextError(f"{path}: wanted examples, got an empty file; write a prompt and an answer a line")
    return examples


def _example(where: str, row: Any, task: str) -> Example:
    if not isinstance(row, dict):
        raise TextError(f"{where}: wanted a JSON object a line, got {type(row).__name__}; repair the line")
    for name, value in ((name, row.get(name)) for name in (*FIELDS, "task")):
        if value is None and name == "task":
            continue
        if not isinstance(value, str):
            raise TextError(f"{where}: wanted a string field {name!r}, got {sorted(row)}; repair the line")
        if not value.strip():
            raise TextError(f"{where}: wanted some text in {name!r}, got an empty string; fill it or drop the line")
    return Example(row["prompt"], row["answer"], row.get("task") or task)


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Line numbers and what the lines hold; blank lines are skipped."""
    number = 0
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, json.loads(line)
    except (OSError, ValueError) as error:  # ValueError: bad JSON, bad UTF-8
        raise TextError(f"{path}:{number}: wanted lines of JSON, got {error}; repair the file") from error
