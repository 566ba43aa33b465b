"""Several conversions of one model side by side: the table of `headfuse demo` and of the benchmarks."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel

from headfuse.checkpoints.opened import LoadedModel
from headfuse.conversion import Settings, convert_heads, gather_statistics, needs_unit_rows
from headfuse.evaluation.text_loss import measure_text_loss
from headfuse.progress import Stages, silent
from headfuse.statistics.moments import LayerStatistics
from headfuse.text.rows import TokenRows


@dataclass(frozen=True)
class Case:
    """One row to fill: `kv` is the budget as people write it."""

    kv: str
    settings: Settings


@dataclass(frozen=True)
class Result:
    """One row: what was asked, and what it cost and kept.

    `delta_ce` and `kl` are nats per token, against the unconverted model on the same text; `seconds` count grouping,
    sharing and refit, not the statistics, which the rows of a model share. `refit_error` is the layers' mean relative
    error after the refit, `refit_rates` the rate that each layer chose (None where the refit was refused); `tasks` are
    what `judge` found.
    """

    model: str
    kv: str
    method: str
    target: str
    budget: str
    refit: bool
    restore_norm: bool
    calibration_tokens: int
    seed: int
    key_heads: list[int]
    value_heads: list[int]
    ce: float
    delta_ce: float
    kl: float
    top1_agreement: float
    kv_bytes_per_token: int
    refit_error: float | None
    seconds: float
    tasks: dict[str, Any]
    refit_rates: list[float | None] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def no_tasks(model: PreTrainedModel) -> dict[str, Any]:  # noqa: ARG001  the signature of a judge
    """Judge nothing but the loss."""
    return {}


@dataclass(frozen=True)
class Comparison:
    """What all rows have in common: the model to convert, an untouched copy of it, the texts."""

    name: str
    loaded: LoadedModel
    reference: PreTrainedModel
    calibration: Int64[Tensor, "N T"]
    evaluation: TokenRows
    judge: Callable[[PreTrainedModel], dict[str, Any]] = no_tasks

    def run(self, cases: Sequence[Case], *, stages: Stages = silent) -> Iterator[Result]:
        """Fill the rows one by one; the statistics are gathered once for all."""
        statistics: dict[bool, list[LayerStatistics]] = {}
        for case in cases:
            unit_rows = needs_unit_rows(self.loaded, case.settings)
            if unit_rows not in statistics:
                statistics[unit_rows] = gather_statistics(self.loaded, self.calibration, case.settings, stages)
            yield self._row(case, statistics[unit_rows], stages)

    def _row(self, case: Case, statistics: list[LayerStatistics], stages: Stages) -> Result:
        settings, started = case.settings, time.monotonic()
        converted = convert_heads(self.loaded, self.calibration, settings, statistics=statistics, stages=stages)
        seconds = time.monotonic() - started
        with self.loaded.with_heads(converted.heads) as model:
            loss = measure_text_loss(
                model,
                self.evaluation,
                reference=self.reference,
                precision="bf16" if settings.precision == "bf16" else "fp32",
                progress=stages,
            ).overall
            tasks = self.judge(model)
        assert loss.reference_cross_entropy is not None
        assert loss.kl is not None
        assert loss.top1_agreement is not None
        errors = [report.after for report in converted.refits]
        return Result(
            model=self.name,
            kv=case.kv,
            method=settings.method,
            target=settings.target,
            budget=settings.budget,
            refit=settings.refit is not None,
            restore_norm=settings.options.restore_norm,
            calibration_tokens=self.calibration.numel(),
            seed=settings.seed,
            key_heads=[layer.num_key_heads for layer in converted.plan.layers],
            value_heads=[layer.num_value_heads for layer in converted.plan.layers],
            ce=loss.cross_entropy,
            delta_ce=loss.cross_entropy - loss.reference_cross_entropy,
            kl=loss.kl,
            top1_agreement=loss.top1_agreement,
            kv_bytes_per_token=converted.plan.kv_bytes_per_token(),
            refit_error=sum(errors) / len(errors) if errors else None,
            seconds=seconds,
            tasks=tasks,
            refit_rates=[report.rate for report in converted.refits],
        )
