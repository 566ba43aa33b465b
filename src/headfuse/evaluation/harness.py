"""Named tasks through lm-evaluation-harness, an optional package that fetches its own data."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headfuse.errors import ConfigError
from headfuse.evaluation.inference import measuring
from headfuse.precision import Precision

BATCH_SIZE = 16


def task_manager(names: Sequence[str]) -> Any:
    """The harness's manager of tasks, which knows all of these names.

    Raises ConfigError if the extra `eval` is not installed, or a name is unknown to the harness.
    """
    try:
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]  an optional package
    except ImportError as error:
        raise ConfigError(
            f"tasks: wanted {', '.join(names)} from lm-evaluation-harness, got {error}; give paths of task files, "
            "or run: pip install 'headfuse[eval]'"
        ) from error
    manager = TaskManager()
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        raise ConfigError(
            f"tasks: wanted tasks of lm-evaluation-harness or paths of task files, got {', '.join(unknown)}; "
            "list the names with: lm_eval ls tasks"
        )
    return manager


def run_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    manager: Any,
    *,
    precision: Precision = "fp32",
    limit: int | None = None,
) -> dict[str, dict[str, Any]]:
    """The harness's numbers by task (`acc`, `acc_stderr`, ...), JSON-ready; `manager` is that of `task_manager`."""
    from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    with measuring(model, precision=precision):
        found = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH_SIZE),
            tasks=list(names),
            limit=limit,
            log_samples=False,
            task_manager=manager,
        )
    return {name: _numbers(metrics) for name, metrics in found["results"].items()}


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Numeric metrics under their plain names: the harness writes `acc,none` for the metric without a filter."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
