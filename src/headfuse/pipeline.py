"""The whole story on one page: a checkpoint in, a smaller-cache checkpoint out."""

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from headfuse.calibration import Calibration, shared_statistics
from headfuse.checkpoints.loading import stored_dtype
from headfuse.checkpoints.original import Original
from headfuse.checkpoints.parity import split_parity, written_parity
from headfuse.checkpoints.source import locate
from headfuse.checkpoints.validation import check_checkpoint
from headfuse.conversion import Settings, check_reachable, convert_heads
from headfuse.converted_folder import write_converted, write_records
from headfuse.course import Learned
from headfuse.folder import check_output, run_folder_of, writing
from headfuse.learning.options import Learning
from headfuse.manifest import peak_memory
from headfuse.placement import Placement
from headfuse.planning.plan import HeadPlan
from headfuse.progress import Stages, silent
from headfuse.pruning import Pruning
from headfuse.sharing.refit import RefitReport
from headfuse.text.rows import TokenRows
from headfuse.trained_stages import TrainedStages, check_trainable, method_name
from headfuse.training.arithmetic import prepare_products
from headfuse.training.loop import NOWHERE, TrainingReport
from headfuse.training.processes import check_alone
from headfuse.training.run_folder import run_root
from headfuse.training.trackers import Trackers


@dataclass(frozen=True)
class Conversion:
    """What `convert` did. Bytes are of the cache per token, at the stored dtype."""

    out: Path
    plan: HeadPlan
    kv_bytes_before: int
    kv_bytes_after: int
    refit_error: tuple[float, float] | None  # mean relative error of the layers, before and after
    parity: dict[str, float]
    seconds: dict[str, float]
    peak_memory_bytes: dict[str, int] = field(default_factory=dict)
    training: dict[str, TrainingReport] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "out": str(self.out),
            "target": self.plan.target,
            "kv_bytes_per_token": {"before": self.kv_bytes_before, "after": self.kv_bytes_after},
            "key_heads": [layer.num_key_heads for layer in self.plan.layers],
            "value_heads": [layer.num_value_heads for layer in self.plan.layers],
            "refit_error": None
            if self.refit_error is None
            else dict(zip(("before", "after"), self.refit_error, strict=True)),
            "parity": self.parity,
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
            "peak_memory_bytes": self.peak_memory_bytes,
            "training": {stage: report.as_dict() for stage, report in self.training.items()},
        }


def convert(
    model: str | Path,
    out: str | Path,
    settings: Settings | None = None,
    calibration: Calibration | None = None,
    *,
    learning: Learning | Pruning | None = None,
    teacher: str | Path | None = None,
    data: str | None = None,
    statistics_folder: Path | None = None,
    plan: Path | None = None,
    placement: Placement | None = None,
    allow_pickle: bool = False,
    overwrite: bool = False,
    command: Sequence[str] = (),
    trackers: Trackers = NOWHERE,
    stages: Stages = silent,
) -> Conversion:
    """Convert `model` (a folder, a Hub id, `demo` or `smollm2`) into the new folder `out`.

    With `learning`, trained stages follow, DHA's or those of "Align before merging", on the tokens of `data` (a source
    as the calibration's, for the latter also of prompts and answers; None: the calibration's). They live in OUT with
    `.run` behind it, from which the same call resumes. It is removed at the end, and after an error that came before
    the first checkpoint. A Pruning may have another `teacher` than the original.

    Raises a HeadfuseError, and leaves `out` as it was, for anything that a user can cause.
    """
    started = time.monotonic()
    check_alone()
    settings, calibration = settings or Settings(), calibration or Calibration()
    prepare_products(deterministic=learning is not None and learning.training.deterministic)
    device, precision = (placement or Placement()).resolve()
    source = locate(str(model), allow_pickle=allow_pickle)
    check_checkpoint(source.folder, allow_pickle=allow_pickle)
    planned = None if plan is None else HeadPlan.load(plan)
    target = settings.target if planned is None else planned.target
    settings = replace(settings, precision=precision, target=target)
    out = Path(out).expanduser()
    run_folder = run_folder_of(out)
    check_output(out, overwrite=overwrite, needed_bytes=source.weight_bytes, source=source.folder)
    with (
        nullcontext() if learning is None else run_root(run_folder),
        writing(out, overwrite=overwrite, needed_bytes=source.weight_bytes, source=source.folder) as folder,
    ):
        original = Original.of(source, device)
        check_reachable(original.loaded, settings, planned=planned is not None)
        check_trainable(original.loaded, settings, learning, taught=teacher is not None, planned=planned is not None)
        trained = None
        if learning is not None:
            told = {"teacher": teacher, "data": data or calibration.source, "trackers": trackers, "stages": stages}
            trained = TrainedStages.prepare(learning, original, settings, run_folder, **told)
        rows = calibration.rows(original, seed=settings.seed)
        parity = {"split": split_parity(original.loaded, rows.tokens)}
        load = time.monotonic() - started
        learned = _learned(original, rows, settings, trained, planned, statistics_folder, stages)
        if trained is not None:
            trained.keep_curves(learned, folder)
        loaded, converted = learned.model, learned.converted
        seconds = _spent(load, converted.seconds)
        writing_started = time.monotonic()
        dtype = stored_dtype(source.folder)
        kv_bytes = loaded.kv_bytes_per_token(dtype.itemsize), converted.plan.kv_bytes_per_token(dtype.itemsize)
        method = method_name(settings, learning)
        write_converted(folder, loaded, converted, source, method=method, dtype=dtype, kv_bytes=kv_bytes)
        parity["written"] = written_parity(folder.root, loaded, converted.heads, rows.tokens, dtype=dtype)
        seconds["write"] = time.monotonic() - writing_started
        seconds["total"] = time.monotonic() - started
        about = {"parity": parity, "seconds": seconds, "seed": settings.seed, "command": command}
        write_records(folder, converted, source, **about)
    return Conversion(
        out,
        converted.plan,
        *kv_bytes,
        _mean_error(converted.refits),
        parity,
        seconds,
        peak_memory(),
        learned.reports,
    )


def _learned(
    original: Original,
    rows: TokenRows,
    settings: Settings,
    trained: TrainedStages | None,
    planned: HeadPlan | None,
    statistics_folder: Path | None,
    stages: Stages,
) -> Learned:
    """The model with its converted heads: shared, trained, or first the one and then the other."""
    loaded = original.loaded
    if trained is not None and not trained.shares_first:
        return trained.train(loaded, settings)
    started = time.monotonic()
    statistics = shared_statistics(original, rows, settings, statistics_folder, stages)
    seconds = {"statistics": time.monotonic() - started}
    shared = convert_heads(loaded, rows.tokens, settings, statistics=statistics, plan=planned, stages=stages)
    shared = replace(shared, seconds=shared.seconds | seconds)
    return Learned(loaded, shared, {}) if trained is None else trained.train(loaded, settings, shared, statistics, rows)


def _spent(load: float, seconds: Mapping[str, float]) -> dict[str, float]:
    """The seconds of a conversion by stage; `load` is what came before the statistics."""
    others = {name: value for name, value in seconds.items() if name != "statistics"}
    if "statistics" not in seconds:
        return {"load": load} | others
    return {"load and statistics": load + seconds["statistics"]} | others


def _mean_error(refits: Sequence[RefitReport]) -> tuple[float, float] | None:
    """The layers' mean relative error before and after the refit; None without one."""
    if not refits:
        return None
    return sum(r.before for r in refits) / len(refits), sum(r.after for r in refits) / len(refits)
