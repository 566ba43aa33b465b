"""Zero-shot tasks: local task files scored here, named tasks through lm-evaluation-harness."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headfuse.evaluation.harness import run_harness, task_manager
from headfuse.evaluation.loglikelihood import Score, score_requests
from headfuse.evaluation.task_files import Question, Task, find_task_files, read_task
from headfuse.precision import Precision
from headfuse.progress import Stages, silent


@dataclass(frozen=True)
class FoundTasks:
    """Tasks that are ready to run: files that were read, and names with the harness's manager that knows them."""

    files: tuple[Task, ...] = ()
    names: tuple[str, ...] = ()
    manager: Any = None


def find_tasks(specs: Sequence[str]) -> FoundTasks:
    """Find and read everything before anything runs.

    A spec is a task file, a folder of `TASK/VARIANT/requests.jsonl.gz`, or the name of a task of the harness. Raises
    TextError for files that are not tasks, ConfigError for names that the harness does not know or if it is not
    installed.
    """
    files = {spec: find_task_files(spec) for spec in specs}
    names = tuple(spec for spec, paths in files.items() if not paths)
    read = tuple(read_task(path) for paths in files.values() for path in paths)
    return FoundTasks(read, names, task_manager(names) if names else None)


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: FoundTasks,
    *,
    precision: Precision = "fp32",
    batch_tokens: int = 8192,
    limit: int | None = None,
    progress: Stages = silent,
) -> dict[str, dict[str, Any]]:
    """Results by task name, JSON-ready. `limit` keeps the first questions of each task."""
    results: dict[str, dict[str, Any]] = {}
    if tasks.names:
        results |= run_harness(model, tokenizer, tasks.names, tasks.manager, precision=precision, limit=limit)
    for task in tasks.files:
        questions = task.questions[:limit]
        requests = [request for question in questions for request in question.requests]
        scores = score_requests(
            model, tokenizer, requests, precision=precision, batch_tokens=batch_tokens, progress=progress
        )
        results[task.name] = summarize(Task(task.name, questions), scores)
    return results


def summarize(task: Task, scores: Sequence[Score]) -> dict[str, Any]:
    """Accuracy of a task with its standard error, and how likely the right continuations are.

    With choices: `accuracy` picks the likeliest, `accuracy_per_byte` the likeliest per UTF-8 byte without leading
    spaces; the first wins a tie. Without: `accuracy` is the share that greedy decoding writes exactly. `nll` is the
    mean negative log-likelihood of a right continuation in nats, `bits_per_byte` the same text's mean over its bytes.
    """
    left = iter(scores)
    grouped = [[next(left) for _ in question.requests] for question in task.questions]
    pairs = list(zip(task.questions, grouped, strict=True))
    gold = [group[question.gold].loglikelihood for question, group in pairs]
    gold_bytes = sum(len(question.requests[question.gold].continuation.encode()) for question in task.questions)
    result: dict[str, Any] = {"questions": len(pairs)}
    if task.has_choices:
        result |= share("accuracy", [_best(question, group, per_byte=False) for question, group in pairs])
        result |= share("accuracy_per_byte", [_best(question, group, per_byte=True) for question, group in pairs])
    else:
        result |= share("accuracy", [group[0].is_greedy for _, group in pairs])
    return result | {"nll": -fmean(gold), "bits_per_byte": -sum(gold) / math.log(2) / gold_bytes}


def _best(question: Question, scores: Sequence[Score], *, per_byte: bool) -> bool:
    """Whether the right choice is the likeliest."""
    values = [
        score.loglikelihood / (max(1, len(request.continuation.lstrip().encode())) if per_byte else 1)
        for request, score in zip(question.requests, scores, strict=True)
    ]
    return values.index(max(values)) == question.gold


def share(name: str, hits: Sequence[bool]) -> dict[str, float]:
    """A share of hits by that name and its standard error, that of a mean of 0s and 1s."""
    share = fmean(hits)
    return {name: share, f"{name}_stderr": math.sqrt(share * (1 - share) / max(len(hits) - 1, 1))}
