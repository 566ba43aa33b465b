"""Healing: train a converted checkpoint on its original's distribution until what sharing cost is won back."""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import PreTrainedConfig, PreTrainedModel

from headfuse.checkpoints.assembly import decoder_layers
from headfuse.checkpoints.card import healed_card
from headfuse.checkpoints.loading import check_length, load_config, load_model, load_tokenizer, stored_dtype
from headfuse.checkpoints.registry import adapter_of_converted
from headfuse.checkpoints.source import Source, locate
from headfuse.checkpoints.validation import check_weights
from headfuse.checkpoints.write import write_checkpoint
from headfuse.errors import ConfigError
from headfuse.folder import OutputFolder, check_output, run_folder_of, writing
from headfuse.manifest import manifest, peak_memory
from headfuse.models.dha.decoupled_attention import DecoupledAttention
from headfuse.placement import Placement
from headfuse.progress import Stages, silent
from headfuse.teacher import load_teacher
from headfuse.text.examples import holds_examples
from headfuse.training.answers import objective_for
from headfuse.training.arithmetic import prepare_products
from headfuse.training.batches import Batches, TrainingRows, training_rows
from headfuse.training.loop import NOWHERE, Trained, TrainingReport, train
from headfuse.training.objectives import Objective, check_lm_weight
from headfuse.training.options import TrainingOptions
from headfuse.training.processes import Processes, processes
from headfuse.training.run_folder import TEACHER, RunFolder, run_root
from headfuse.training.teacher_cache import TopKDistillation, top_k_teacher
from headfuse.training.trackers import Trackers

HEALING = TrainingOptions()


@dataclass(frozen=True)
class Healing:
    """What `heal` did: the folder it wrote, the run, seconds by stage, peak memory in bytes."""

    out: Path
    training: TrainingReport
    seconds: dict[str, float]
    peak_memory_bytes: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "out": str(self.out),
            "training": self.training.as_dict(),
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
            "peak_memory_bytes": self.peak_memory_bytes,
        }


def heal_model(
    student: PreTrainedModel,
    minimised: Objective,
    batches: Batches,
    options: TrainingOptions,
    here: Processes,
    *,
    teacher: PreTrainedModel | None = None,
    run: RunFolder | None = None,
    trackers: Trackers = NOWHERE,
    stages: Stages = silent,
) -> TrainingReport:
    """Train all weights of `student` in place. `teacher` is the one in the objective. Raises what `train` raises."""
    for module in student.modules():
        if isinstance(module, DecoupledAttention):
            module.place_maps()
    blocks = decoder_layers(student, adapter_of_converted(student.config))
    trained = Trained(student, blocks, minimised, teacher=teacher)
    return train(trained, batches, options, here, run=run, name="healing", trackers=trackers, stages=stages)


def heal(
    converted: str | Path,
    out: str | Path,
    *,
    teacher: str | Path | None,
    data: str | None = None,
    options: TrainingOptions = HEALING,
    lm_weight: float = 0.0,
    teacher_top_k: int | None = None,
    run_folder: Path | None = None,
    placement: Placement | None = None,
    overwrite: bool = False,
    command: Sequence[str] = (),
    trackers: Trackers = NOWHERE,
    stages: Stages = silent,
) -> Healing | None:
    """Train the folder `converted` against `teacher` (None: on the text alone) into the new folder `out`.

    Where `data` has prompts and answers, only answers are learned without a teacher (supervised fine-tuning, of a
    converted model or of any other), and with one its predictions on prompts and answers (`AnswerDistillation`).
    With `teacher_top_k` the teacher runs over the text first, its likeliest tokens are kept on disk in the folder of
    the run, and it leaves the device before the student comes: for a teacher that does not fit beside it.
    The run lives in `run_folder` (by default OUT with `.run` behind it), from which the same command resumes after
    whatever ended it. It is removed at the end, and after an error that came before the first checkpoint. Under
    torchrun all processes share the work (FSDP2), and only the first returns a report.
    Raises a HeadfuseError, and leaves `out` as it was, for anything that a user can cause.
    """
    started = time.monotonic()
    out = Path(out).expanduser()
    root = run_folder or run_folder_of(out)
    device, precision = (placement or Placement()).resolve()
    prepare_products(deterministic=options.deterministic)
    _check_recordable(data, teacher_top_k, options)
    _check_mixture(teacher, lm_weight, teacher_top_k)
    source = locate(str(converted))
    check_weights(source.folder)
    space = {"needed_bytes": source.weight_bytes}
    with processes(device, precision) as here:
        if here.first:
            _check_folders(out, root, source, overwrite=overwrite, **space)
        with run_root(root, first=here.first):
            config, watching = load_config(source.folder), stages if here.first else silent
            check_length(config, options.length)
            guide, identity = _teacher(teacher, source, config, here)
            text = _text(source, data, options, config.vocab_size, root, here)
            batches = Batches.of(text, options)
            if guide is not None and teacher_top_k is not None:
                kept = {"k": teacher_top_k, "micro_rows": options.micro_rows or batches.rows // here.world}
                minimised = _recorded(guide, batches, root / TEACHER, here, kept, lm_weight, watching)
                guide = None
            else:
                minimised = objective_for(text, guide, lm_weight, compiled=options.compiled)
            student = load_model(source, dtype=torch.float32, device=here.device)
            recipe = {"teacher": identity, "text": text.digest, "lm_weight": lm_weight, "teacher_top_k": teacher_top_k}
            run = RunFolder(root, {"model": source.identity_of(student)} | recipe)
            seconds = {"load": time.monotonic() - started}
            report = heal_model(
                student,
                minimised,
                batches,
                options,
                here,
                teacher=guide,
                run=run,
                trackers=trackers,
                stages=watching,
            )
            seconds["training"] = time.monotonic() - started - seconds["load"]
            state = get_model_state_dict(student, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
            if here.first:
                with writing(out, overwrite=overwrite, source=source.folder, **space) as folder:
                    _write(folder, state, source, run, report, None if identity is None else identity["name"])
                    seconds["total"] = time.monotonic() - started
                    made = manifest(
                        list(command),
                        seed=options.seed,
                        source=source.identity(),
                        seconds=seconds,
                    )
                    made.save(folder.manifest)
            here.wait()
    return Healing(out, report, seconds, peak_memory()) if here.first else None


def _check_mixture(teacher: str | Path | None, lm_weight: float, teacher_top_k: int | None) -> None:
    check_lm_weight(lm_weight)
    if teacher is None and (teacher_top_k is not None or 0 < lm_weight < 1):
        raise ConfigError(
            "wanted a teacher to keep the tokens of or to mix in, got none; name one (--teacher), or leave out "
            "--teacher-top-k and --lm-weight"
        )


def _check_recordable(data: str | None, teacher_top_k: int | None, options: TrainingOptions) -> None:
    if teacher_top_k is None:
        return
    if options.captured:
        raise ConfigError(
            "wanted steps to capture, got a teacher whose tokens every step reads from disk; leave --capture or "
            "--teacher-top-k out"
        )
    if holds_examples(data):
        raise ConfigError(
            f"wanted plain text to keep a teacher's likeliest tokens of, got the examples of {data}; leave "
            "--teacher-top-k out"
        )


def _check_folders(out: Path, root: Path, source: Source, *, overwrite: bool, needed_bytes: int) -> None:
    """Refuse an output or a run folder that could not be used at the end; it is written only then."""
    check_output(out, overwrite=overwrite, needed_bytes=needed_bytes, source=source.folder)
    place = root.expanduser().resolve()
    for name, other in (("the output", out.expanduser().resolve()), ("the model", source.folder.resolve())):
        if place == other or other in place.parents or place in other.parents:
            raise ConfigError(f"{root}: the folder of the run and {name} {other} must be separate; choose another")


def _teacher(
    name: str | Path | None, source: Source, student: PreTrainedConfig, here: Processes
) -> tuple[PreTrainedModel | None, dict[str, Any] | None]:
    """The teacher and which one it is."""
    if name is None:
        return None, None
    found = load_teacher(name, student, load_tokenizer(source), device=here.device, precision=here.precision)
    return found.model, found.identity


def _recorded(
    teacher: PreTrainedModel,
    batches: Batches,
    folder: Path,
    here: Processes,
    kept: Mapping[str, Any],
    lm_weight: float,
    stages: Stages,
) -> TopKDistillation:
    """The objective of a teacher that has said all it has to say, and is gone from the device."""
    top_k_teacher(teacher, batches, folder, here, **kept, stages=stages)
    teacher.cpu()
    here.wait()
    return TopKDistillation(folder, lm_weight=lm_weight)


def _text(
    source: Source, data: str | None, options: TrainingOptions, vocabulary: int, root: Path, here: Processes
) -> TrainingRows:
    """The training text, packed by the first process and then read by all; examples are packed in memory by each."""

    def read() -> TrainingRows:
        return training_rows(data, load_tokenizer(source), options, vocab_size=vocabulary, cache=root)

    if holds_examples(data):
        return read()
    if here.first:
        root.mkdir(parents=True, exist_ok=True)
        read()
    here.wait()
    return read()


def _write(
    folder: OutputFolder,
    state: Mapping[str, Any],
    source: Source,
    run: RunFolder,
    report: TrainingReport,
    teacher: str | None,
) -> None:
    """The healed weights in the dtype of the converted ones, with everything else of that folder, and the curve."""
    config = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    write_checkpoint(folder.root, state, config, source=source.folder, dtype=stored_dtype(source.folder))
    for file in source.folder.glob("*.py"):
        shutil.copyfile(file, folder.root / file.name)
    before = OutputFolder(source.folder)
    if before.model_card.is_file():
        card = healed_card(before.model_card.read_text(encoding="utf-8"), tokens=report.tokens, teacher=teacher)
        folder.model_card.write_text(card, encoding="utf-8")
    if before.plan.is_file():
        shutil.copyfile(before.plan, folder.plan)
    shutil.copyfile(run.metrics, folder.metrics("healing"))
