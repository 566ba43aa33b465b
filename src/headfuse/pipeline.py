"""The whole story on one page: a checkpoint in, a smaller-cache checkpoint out."""

import json
import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel

from headfuse.checkpoints.assembly import decoupled_config, decoupled_model_state, stock_config, stock_model_state
from headfuse.checkpoints.card import ModelCard
from headfuse.checkpoints.heads import AttentionHeads
from headfuse.checkpoints.loading import load_config, load_model, load_tokenizer
from headfuse.checkpoints.opened import LoadedModel
from headfuse.checkpoints.registry import adapter_for
from headfuse.checkpoints.source import Source, locate
from headfuse.checkpoints.validation import check_checkpoint, check_weights
from headfuse.checkpoints.write import write_checkpoint
from headfuse.conversion import (
    Converted,
    Settings,
    check_reachable,
    convert_heads,
    gather_statistics,
    needs_unit_rows,
)
from headfuse.course import Course, Learned
from headfuse.errors import CheckpointError, ConfigError
from headfuse.evaluation.cache_bytes import cache_report
from headfuse.evaluation.exact_match import measure_exact_match
from headfuse.evaluation.report import EvaluationReport
from headfuse.evaluation.tasks import evaluate_tasks
from headfuse.evaluation.text_loss import measure_text_loss
from headfuse.folder import OutputFolder, check_output, writing
from headfuse.learning import Learning, check_learnable, learn_heads
from headfuse.manifest import fingerprint, identify, manifest, peak_memory
from headfuse.models.dha.export import export_code
from headfuse.placement import Placement
from headfuse.planning.plan import HeadPlan
from headfuse.precision import Precision
from headfuse.progress import Stages, silent
from headfuse.pruning import Lesson, Pruning, check_prunable, prune_heads
from headfuse.sharing.refit import RefitReport
from headfuse.statistics.collect import load_statistics, save_statistics
from headfuse.statistics.moments import LayerStatistics
from headfuse.teacher import Teacher, load_teacher
from headfuse.text.examples import load_examples
from headfuse.text.rows import TokenRows, count_row_bytes, load_tokens
from headfuse.training.batches import Batches, TrainingRows, training_rows, training_text
from headfuse.training.loop import NOWHERE, TrainingReport
from headfuse.training.processes import Processes, check_alone
from headfuse.training.run_folder import run_root
from headfuse.training.trackers import Trackers

# Logits of the split and of the written model may differ from their references by this, relative to the largest.
PARITY_TOLERANCE = 1e-4
PARITY_TOKENS = 64


@dataclass(frozen=True)
class Calibration:
    """The calibration text: a source as `load_tokens` takes it (None: built-in), cut into rows of `length` tokens."""

    source: str | None = None
    tokens: int = 65536
    length: int = 1024


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
    device, precision = (placement or Placement()).resolve()
    source = locate(str(model), allow_pickle=allow_pickle)
    check_checkpoint(source.folder, allow_pickle=allow_pickle)
    planned = None if plan is None else HeadPlan.load(plan)
    target = settings.target if planned is None else planned.target
    settings = replace(settings, precision=precision, target=target)
    run_folder = Path(out).with_name(Path(out).name + ".run")
    check_output(Path(out), overwrite=overwrite, needed_bytes=source.weight_bytes, source=source.folder)
    with (
        nullcontext() if learning is None else run_root(run_folder),
        writing(Path(out), overwrite=overwrite, needed_bytes=source.weight_bytes, source=source.folder) as folder,
    ):
        stock = load_model(source, dtype=torch.float32, device=device)
        loaded = LoadedModel.of(stock, adapter_for(stock.config))
        check_reachable(loaded, settings, planned=planned is not None)
        _check_trainable(loaded, settings, learning, teacher, planned=planned is not None)
        guide = None if teacher is None else _teacher(teacher, source, stock, precision)
        course = _course(source, data or calibration.source, settings, learning, stock, guide, run_folder)
        course = None if course is None else replace(course, trackers=trackers, stages=stages)
        rows = _rows(source, calibration, settings.seed, stock.config.vocab_size)
        parity = {"split": _parity(stock, loaded, loaded.heads, rows.tokens)}
        shared = statistics = None
        if not isinstance(learning, Learning) or learning.start == "converted" or learning.grouping == "closed-form":
            statistics = _statistics(loaded, rows, settings, source, statistics_folder, stages)
            seconds = {"load and statistics": time.monotonic() - started}
            shared = convert_heads(loaded, rows.tokens, settings, statistics=statistics, plan=planned, stages=stages)
        else:
            seconds = {"load": time.monotonic() - started}
        learned = _learned(loaded, settings, learning, course, guide, shared, statistics, folder)
        loaded, converted = learned.model, learned.converted
        seconds |= {name: value for name, value in converted.seconds.items() if name != "statistics"}
        writing_started = time.monotonic()
        dtype = _stored_dtype(source)
        kv_bytes = _kv_bytes(loaded, converted, dtype)
        _write(folder, loaded, converted, source, _method(settings, learning), dtype, kv_bytes)
        parity["written"] = _written_parity(folder, loaded, converted, dtype, rows.tokens, device)
        seconds["write"] = time.monotonic() - writing_started
        seconds["total"] = time.monotonic() - started
        _record(folder, converted, source, settings, parity, seconds, command)
    return Conversion(
        Path(out),
        converted.plan,
        *kv_bytes,
        _mean_error(converted.refits),
        parity,
        seconds,
        peak_memory(),
        learned.reports,
    )


def evaluate(
    model: str | Path,
    *,
    against: str | Path | None = None,
    text: str | None = None,
    tokens: int | None = 65536,
    length: int = 1024,
    tasks: Sequence[str] = (),
    examples: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    placement: Placement | None = None,
    stages: Stages = silent,
) -> EvaluationReport:
    """Measure a model, stock or converted: text loss, distance to `against`, cache bytes, tasks, exact match.

    `examples` is a source as `load_examples` takes it, of which the validation split is asked.
    """
    device, precision = (placement or Placement()).resolve()
    asked = [] if examples is None else load_examples(examples, "val")
    source = locate(str(model))
    check_weights(source.folder)
    judged = load_model(source, device=device)
    reference = None if against is None else load_model(locate(str(against)), device=device)
    tokenizer = load_tokenizer(source) or (load_tokenizer(locate(str(against))) if against is not None else None)
    longest = getattr(judged.config, "max_position_embeddings", None) or length
    rows = load_tokens(
        text,
        tokenizer,
        num_tokens=tokens,
        length=min(length, longest),
        seed=seed,
        part="evaluation",
        vocab_size=judged.config.vocab_size,
    )
    row_bytes = None if tokenizer is None else count_row_bytes(rows.tokens, tokenizer)
    loss = measure_text_loss(
        judged, rows, reference=reference, row_bytes=row_bytes, precision=precision, progress=stages
    )
    found: dict[str, dict[str, Any]] = {}
    matches: dict[str, dict[str, Any]] = {}
    if tasks or asked:
        if tokenizer is None:
            raise CheckpointError(
                f"{source.folder}: tasks want a tokenizer, the folder has none; copy it into the folder"
            )
        found = evaluate_tasks(judged, tokenizer, tasks, precision=precision, limit=limit, progress=stages)
        matches = measure_exact_match(judged, tokenizer, asked, precision=precision, limit=limit, progress=stages)
    cache = cache_report(judged.to(_stored_dtype(source)))  # type: ignore[arg-type]
    return EvaluationReport(source.public_name, loss.as_dict(), cache, found, matches)


def _rows(source: Source, calibration: Calibration, seed: int, vocab_size: int) -> TokenRows:
    config = load_config(source.folder)
    longest = getattr(config, "max_position_embeddings", None) or calibration.length
    return load_tokens(
        calibration.source,
        load_tokenizer(source),
        num_tokens=calibration.tokens,
        length=min(calibration.length, longest),
        seed=seed,
        vocab_size=vocab_size,
    )


def _method(settings: Settings, learning: Learning | Pruning | None) -> str:
    """The name of what was done, as `--method` has it."""
    if learning is None:
        return settings.method
    return "align" if isinstance(learning, Pruning) else "dha"


def _check_trainable(
    loaded: LoadedModel,
    settings: Settings,
    learning: Learning | Pruning | None,
    teacher: str | Path | None,
    *,
    planned: bool,
) -> None:
    if isinstance(learning, Pruning):
        check_prunable(loaded, settings, learning, planned=planned)
    elif teacher is not None:
        raise ConfigError("wanted no teacher but the original, unless method align trains; leave the teacher out")
    elif learning is not None:
        check_learnable(loaded, settings, learning, planned=planned)


def _teacher(name: str | Path, source: Source, stock: PreTrainedModel, precision: Precision) -> Teacher:
    return load_teacher(name, stock.config, load_tokenizer(source), device=stock.device, precision=precision)


def _course(
    source: Source,
    data: str | None,
    settings: Settings,
    learning: Learning | Pruning | None,
    stock: PreTrainedModel,
    teacher: Teacher | None,
    run_folder: Path,
) -> Course | None:
    """Where the trained stages run, on what text, and what must be the same for them to be resumed."""
    if learning is None:
        return None
    tokenizer, training, size = load_tokenizer(source), learning.training, stock.config.vocab_size
    text: TrainingRows
    if isinstance(learning, Pruning):
        text = training_rows(data, tokenizer, training, vocab_size=size, cache=run_folder)
    else:
        amount = {"num_tokens": training.tokens, "vocab_size": size, "seed": training.seed}
        text = training_text(data, tokenizer, **amount, cache=run_folder)
    Batches.of(text, training)  # too short a text is refused before any work
    recipe = {
        "model": identify(source.folder, name=source.public_name).model_dump() | {"sample": fingerprint(stock)},
        "text": text.digest,
        "settings": asdict(settings),
        "learning": asdict(learning),
        "teacher": None if teacher is None else teacher.identity,
    }
    return Course(text, Processes(stock.device, settings.precision), run_folder, recipe)


def _learned(
    loaded: LoadedModel,
    settings: Settings,
    learning: Learning | Pruning | None,
    course: Course | None,
    teacher: Teacher | None,
    shared: Converted | None,
    statistics: Sequence[LayerStatistics] | None,
    folder: OutputFolder,
) -> Learned:
    """The trained model, whose curves go into the folder; without training the one with the shared heads."""
    if learning is None or course is None:
        assert shared is not None
        return Learned(loaded, shared, {})
    started = time.monotonic()
    if isinstance(learning, Pruning):
        assert shared is not None
        lesson = Lesson.of(course.text, learning, loaded.model if teacher is None else teacher.model)
        made = {"converted": shared, "statistics": statistics}
        learned = prune_heads(loaded, settings, learning, course, lesson, **made)
    else:
        learned = learn_heads(loaded, settings, learning, course, converted=shared, statistics=statistics)
    for stage in learned.reports:
        run = course.run(stage)
        assert run is not None
        shutil.copyfile(run.metrics, folder.metrics(stage))
    seconds = learned.converted.seconds | {"training": time.monotonic() - started}
    return replace(learned, converted=replace(learned.converted, seconds=seconds))


def _statistics(
    loaded: LoadedModel,
    rows: TokenRows,
    settings: Settings,
    source: Source,
    folder: Path | None,
    stages: Stages,
) -> list[LayerStatistics]:
    """The statistics of these rows: read from `folder` if it holds them, else gathered and saved there."""
    unit_rows = needs_unit_rows(loaded, settings)
    identity = {
        "model": identify(source.folder, name=source.public_name).model_dump() | {"sample": fingerprint(loaded.model)},
        "text": rows.digest(),
        "unit_rows": unit_rows,
        "precision": settings.precision,
    }
    if folder is not None and (found := load_statistics(folder, identity)) is not None:
        return found
    statistics = gather_statistics(loaded, rows.tokens, settings, stages)
    if folder is not None:
        save_statistics(folder, statistics, identity)
    return statistics


@torch.no_grad()
def _parity(
    stock: PreTrainedModel, loaded: LoadedModel, heads: Sequence[AttentionHeads], tokens: Int64[Tensor, "N T"]
) -> float:
    """Largest relative logit difference between the stock model and the same model computed from `heads`, fp32.

    Raises CheckpointError if it is not small: then an adapter misreads this checkpoint, and nothing must be written.
    """
    sample = tokens[:1, :PARITY_TOKENS].to(stock.device)
    wanted = stock(sample, use_cache=False).logits
    with loaded.with_heads(heads):
        found = stock(sample, use_cache=False).logits
    return _difference("the checkpoint's heads", wanted, found)


@torch.no_grad()
def _written_parity(
    folder: OutputFolder,
    loaded: LoadedModel,
    converted: Converted,
    dtype: torch.dtype,
    tokens: Int64[Tensor, "N T"],
    device: torch.device,
) -> float:
    """The same between the converted model, rounded as stored (`loaded` too), and the folder as transformers loads it.

    Rounding changes nothing but the heads unless config.json names another dtype than the weights have.
    """
    sample = tokens[:1, :PARITY_TOKENS].to(device)
    rounded = [heads.to(dtype).to(torch.float32) for heads in converted.heads]
    for parameter in loaded.model.parameters():
        parameter.copy_(parameter.to(dtype))
    with loaded.with_heads(rounded):
        wanted = loaded.model(sample, use_cache=False).logits
    found = load_model(folder.root, device=device)(sample, use_cache=False).logits
    return _difference("the written folder", wanted, found)


def _difference(name: str, wanted: Tensor, found: Tensor) -> float:
    difference = ((wanted - found).abs().max() / wanted.abs().max().clamp_min(1e-30)).item()
    if not difference <= PARITY_TOLERANCE:
        raise CheckpointError(
            f"{name}: wanted the same logits to {PARITY_TOLERANCE:g}, got a relative difference of {difference:.2g}; "
            "nothing was written: please report this model's configuration"
        )
    return difference


def _stored_dtype(source: Source) -> torch.dtype:
    """The dtype of the source's weights, in which the result is stored too."""
    dtype = getattr(load_config(source.folder), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _kv_bytes(loaded: LoadedModel, converted: Converted, dtype: torch.dtype) -> tuple[int, int]:
    return loaded.kv_bytes_per_token(dtype.itemsize), converted.plan.kv_bytes_per_token(dtype.itemsize)


def _mean_error(refits: Sequence[RefitReport]) -> tuple[float, float] | None:
    """The layers' mean relative error before and after the refit; None without one."""
    if not refits:
        return None
    return sum(r.before for r in refits) / len(refits), sum(r.after for r in refits) / len(refits)


def _write(
    folder: OutputFolder,
    loaded: LoadedModel,
    converted: Converted,
    source: Source,
    method: str,
    dtype: torch.dtype,
    kv_bytes: tuple[int, int],
) -> None:
    """Weights, configuration, code, tokenizer and card."""
    state, adapter, stock = loaded.model.state_dict(), loaded.adapter, loaded.model.config
    target = converted.plan.target
    if target == "gqa":
        tensors = stock_model_state(state, adapter, converted.heads)
        config: dict[str, Any] = stock_config(stock, adapter, converted.heads).to_dict()
        config["architectures"] = [type(loaded.model).__name__]
    else:
        tensors = decoupled_model_state(state, adapter, converted.heads)
        config = decoupled_config(stock, adapter, converted.heads).to_dict()
        config |= export_code(adapter.family, folder.root)
    card = ModelCard.for_source(source, method=method, target=target, kv_bytes=kv_bytes)
    write_checkpoint(folder.root, tensors, config, source=source.folder, dtype=dtype, card=card)


def _record(
    folder: OutputFolder,
    converted: Converted,
    source: Source,
    settings: Settings,
    parity: dict[str, float],
    seconds: dict[str, float],
    command: Sequence[str],
) -> None:
    converted.plan.save(folder.plan)
    folder.parity.write_text(json.dumps(parity, indent=1) + "\n", encoding="utf-8")
    identity = identify(source.folder, name=source.public_name, revision=source.revision)
    record = manifest(list(command), seed=settings.seed, source=identity, seconds=seconds)
    folder.manifest.write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
