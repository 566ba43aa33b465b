"""The training loop: it knows models, batches and an objective, not heads.

One loop for a CPU, a GPU and many (FSDP2 under torchrun). Batches depend on the step alone and dropout stays off,
so a run that was killed and resumed repeats the uninterrupted one bit for bit on one device (on a GPU if it is
`deterministic`).
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from headfuse.checkpoints.assembly import decoder_layers
from headfuse.checkpoints.loading import check_length
from headfuse.checkpoints.registry import adapter_of_converted
from headfuse.errors import ConfigError, TrainingError
from headfuse.models.compiled import calling, compiled_calls
from headfuse.precision import precision_context
from headfuse.progress import Stages, silent
from headfuse.training.arithmetic import arithmetic
from headfuse.training.batches import Batches
from headfuse.training.capture import gradients_function
from headfuse.training.metrics import MetricsLog, flops_per_token, peak_flops
from headfuse.training.objectives import Objective
from headfuse.training.optimizers import ParameterGroup, build_optimizers, model_groups, set_rates
from headfuse.training.options import TrainingOptions, rate_factor
from headfuse.training.processes import Processes, shard
from headfuse.training.run_folder import RunFolder
from headfuse.training.trackers import Trackers

# Steps between looks at the losses: each look waits for the device.
LOOK_EVERY = 10
NOWHERE = Trackers()
# A forward pass and its backward pass, in forward passes.
TRAINING_PASSES = 3


@dataclass(frozen=True)
class TrainingReport:
    """What a run did: steps and tokens in all (resumed ones too), speed of this process, the last losses.

    `mfu` is the share of the device's peak that went into the student's and the teacher's matrix products.
    """

    steps: int
    tokens: int
    tokens_per_second: float
    mfu: float | None
    losses: dict[str, float]
    metrics: list[dict[str, Any]] = field(default_factory=list, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, without the curve."""
        return {name: value for name, value in vars(self).items() if name != "metrics"}


@dataclass(frozen=True)
class Trained:
    """What is trained: a model, the module list of its blocks, and what is minimised.

    `own_groups` gives the parameters with a rate of their own; `weights` says whether all others are trained too.
    `before_step` is told the number of the step that comes (schedules live there), `after_step` runs behind every
    update (multipliers are kept above zero there); `finished`, asked now and then, ends the run early. An objective
    that is a module is stored with the model. `measure` gives further numbers for the log where it is looked at;
    `teacher` is named to count its work and to be compiled too.
    """

    model: PreTrainedModel
    blocks: nn.ModuleList
    objective: Objective
    own_groups: Callable[[], Sequence[ParameterGroup]] = tuple
    weights: bool = True
    before_step: Callable[[int], None] = lambda _: None
    after_step: Callable[[], None] = lambda: None
    finished: Callable[[], bool] = lambda: False
    measure: Callable[[], dict[str, float]] = dict
    teacher: PreTrainedModel | None = None

    def operations(self, length: int) -> float:
        """Operations that a token of a row of that length costs, the teacher's among them."""
        found = flops_per_token(self.model, length) * TRAINING_PASSES
        return found if self.teacher is None else found + flops_per_token(self.teacher, length)

    def all_blocks(self) -> list[nn.Module]:
        """The blocks of the model and of its teacher."""
        if self.teacher is None:
            return list(self.blocks)
        return [*self.blocks, *decoder_layers(self.teacher, adapter_of_converted(self.teacher.config))]

    def groups(self, options: TrainingOptions) -> list[ParameterGroup]:
        """Every parameter that moves, and nothing else made to want gradients."""
        own = list(self.own_groups())
        apart = [p for group in own for p in group.parameters]
        groups = [*model_groups(self.model, self.blocks, options, without=apart), *own] if self.weights else own
        self.model.requires_grad_(False)
        for group in groups:
            for parameter in group.parameters:
                parameter.requires_grad_(True)
        return groups


class _Step(nn.Module):
    """Model and objective as one module: the root of FSDP2, which gathers parameters around `forward` only."""

    def __init__(self, model: PreTrainedModel, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        losses = self.objective(self.model, tokens)
        # Copies, as FSDP2 warns of outputs that are views.
        return losses.total.clone(), {name: value.clone() for name, value in losses.logged.items()}


def train(
    trained: Trained,
    batches: Batches,
    options: TrainingOptions,
    here: Processes,
    *,
    run: RunFolder | None = None,
    name: str = "training",
    trackers: Trackers = NOWHERE,
    stages: Stages = silent,
) -> TrainingReport:
    """Train in place; with a `run` folder, resume from its last checkpoint and write new ones.

    The first process passes the figures of every step to the `trackers`.

    Raises TrainingError, naming the step and the last good checkpoint, if a loss is not finite; ConfigError if the run
    folder holds a run with another recipe, rows are longer than the model's positions, or steps cannot be captured.
    """
    model = trained.model
    check_length(model.config, options.length)
    _check_capture(options, here)
    with ExitStack() as undo:
        step_module = undo.enter_context(_prepared(trained, options, here))
        groups = trained.groups(options)
        optimizers = build_optimizers(groups, options)
        start = 0
        if run is not None:
            run.check_recipe(options.as_dict(), here)
            if options.save_every:
                run.check_space(sum(parameter.numel() for group in groups for parameter in group.parameters))
            start = run.restore(step_module, optimizers, here)
        following = (trackers if here.first else NOWHERE).following(name, options.as_dict(), first_step=start)
        follow = undo.enter_context(following)
        log = MetricsLog(run.metrics if run is not None and here.first else None, first_step=start, follow=follow)
        watch = _Watch(options, here, log, trained.operations(options.length), run)
        moved = [parameter for group in groups for parameter in group.parameters]
        undo.callback(_forget_gradients, moved)
        update = partial(_gradients, step_module, groups, options, here)
        gradients = gradients_function(update, moved, captured=options.captured)
        done = start
        with stages(name, (options.steps - start) * options.step_tokens, "tokens") as advance:
            while done < options.steps and not (done % LOOK_EVERY == 0 and trained.finished()):
                factor = rate_factor(done, options.steps, warmup=options.warmup, final=options.final)
                set_rates(optimizers, factor)
                trained.before_step(done)
                losses = gradients(_batch(batches, done, here))
                for optimizer in optimizers:
                    optimizer.step()
                trained.after_step()
                done += 1
                saves = run is not None and options.save_every and done % options.save_every == 0
                look = bool(saves) or done == options.steps or done % LOOK_EVERY == 0
                watch.see(done, losses, options.rate * factor, look=look, measure=trained.measure)
                if run is not None and saves:
                    run.save(done, step_module, optimizers, here)
                advance(options.step_tokens, watch.note)
        if run is not None and options.save_every and done > run.latest_step():
            run.save(done, step_module, optimizers, here)
    return watch.report(done)


def _check_capture(options: TrainingOptions, here: Processes) -> None:
    if options.captured and (here.device.type != "cuda" or here.mesh is not None):
        raise ConfigError(
            f"wanted one process on a GPU to capture its steps, got {here.world} on {here.device.type}; leave it out"
        )


def _forget_gradients(parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


@contextmanager
def _prepared(trained: Trained, options: TrainingOptions, here: Processes) -> Iterator[nn.Module]:
    """Within the context, model and objective as the module to train: dropout off, blocks made as the options say.

    Compiling, recomputing and the choice of algorithms are undone on leaving; sharding is not.
    """
    trained.model.eval()
    module = _Step(trained.model, trained.objective)
    compiled = trained.all_blocks() if options.compiled else []
    with ExitStack() as undo:
        if options.checkpoint_activations:
            for block in trained.blocks:
                # Dropout is off: nothing random has to be repeated.
                again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
                block.forward = partial(again, block.forward)
                undo.callback(vars(block).pop, "forward")
        undo.enter_context(calling(compiled, compiled_calls(compiled)))
        undo.enter_context(arithmetic(here.device, deterministic=options.deterministic))
        shard(module, trained.blocks, here)
        yield module


def _batch(batches: Batches, step: int, here: Processes) -> Tensor:
    """A process's share of a step's rows, on its device."""
    tokens = batches.batch(step, rank=here.rank, world=here.world)
    return tokens.pin_memory().to(here.device, non_blocking=True) if here.device.type == "cuda" else tokens


def _gradients(
    module: nn.Module, groups: Sequence[ParameterGroup], options: TrainingOptions, here: Processes, tokens: Tensor
) -> dict[str, Tensor]:
    """Clipped gradients of one step, summed over micro-batches; its mean losses, still on the device."""
    parts = tokens.split(min(options.micro_rows or len(tokens), len(tokens)))
    mean: dict[str, Tensor] = {}
    for index, part in enumerate(parts):
        if here.mesh is not None:
            module.set_requires_gradient_sync(index == len(parts) - 1)  # type: ignore[operator]
        share = len(part) / len(tokens)
        with precision_context(here.device, here.precision):
            total, logged = module(part)
        (total * share).backward()
        for key, value in ({"loss": total.detach()} | logged).items():
            mean[key] = mean.get(key, 0) + share * value
    return mean | _clip(groups, options.clip)


class _Watch:
    """Looks at the losses every few steps: log, speed, and the stop at the first that is not finite."""

    def __init__(
        self, options: TrainingOptions, here: Processes, log: MetricsLog, operations: float, run: RunFolder | None
    ) -> None:
        self.options, self.here, self.log, self.run = options, here, log, run
        self.operations, self.peak = operations, peak_flops(here.device)
        self.pending: list[tuple[int, dict[str, Tensor], float]] = []
        self.last_look = time.monotonic()
        self.speeds: list[float] = []
        self.note = ""

    def see(
        self,
        step: int,
        losses: dict[str, Tensor],
        rate: float,
        *,
        look: bool,
        measure: Callable[[], dict[str, float]],
    ) -> None:
        """Take a step's losses; on a `look`, read all that were taken since the last."""
        self.pending.append((step, losses, rate))
        if not look:
            return
        names = list(losses)
        table = torch.stack([torch.stack([taken[name].float() for name in names]) for _, taken, _ in self.pending])
        values = self.here.mean(table).tolist()
        seconds = time.monotonic() - self.last_look
        speed = len(self.pending) * self.options.step_tokens / max(seconds, 1e-9)
        for (number, _, used), row in zip(self.pending, values, strict=True):
            if not all(map(math.isfinite, row)):
                self._stop(number)
            line = {"step": number, "tokens": number * self.options.step_tokens, "rate": used}
            measured = measure() if number == step else {}
            self.log.add(line | dict(zip(names, row, strict=True)) | measured)
        self.speeds.append(speed)
        self.note = f"loss {values[-1][0]:.3f}" + (f", {self.mfu(speed):.0%} MFU" if self.peak else "")
        self.pending, self.last_look = [], time.monotonic()

    def report(self, steps: int) -> TrainingReport:
        """The run as a whole; speed is the median over looks, so that compiling does not count."""
        speed = sorted(self.speeds)[len(self.speeds) // 2] if self.speeds else 0.0
        last = self.log.rows[-1] if self.log.rows else {}
        losses = {name: value for name, value in last.items() if name not in ("step", "tokens", "rate")}
        return TrainingReport(
            steps, steps * self.options.step_tokens, speed, self.mfu(speed), losses, list(self.log.rows)
        )

    def mfu(self, speed: float) -> float | None:
        """The share of the devices' peak at a speed in tokens a second; None where the peak is not known."""
        return speed * self.operations / (self.peak * self.here.world) if self.peak else None

    def _stop(self, step: int) -> None:
        kept = self.run.latest_step() if self.run is not None else 0
        where = f"the checkpoint of step {kept} is kept in {self.run.root}" if self.run and kept else "nothing was kept"
        raise TrainingError(
            f"wanted a finite loss, got NaN or infinity at step {step}; {where}: lower the learning rate "
            f"({self.options.rate:g}) or look at the text there"
        )


def _clip(groups: Sequence[ParameterGroup], limit: float) -> dict[str, Tensor]:
    """Clip the gradients of every group by its own norm, and name the norms; a climbing group is left alone.

    A multiplier's gradient is the whole constraint and operators' are far from weights': one common norm would let
    one group decide how far the others go.
    """
    norms = {}
    for group in groups:
        if limit and not group.ascent:
            norms[f"gradient_norm/{group.name}"] = _whole(nn.utils.clip_grad_norm_(group.parameters, limit))
    return norms


def _whole(value: Tensor) -> Tensor:
    """A plain tensor, also of a sharded one."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value  # type: ignore[operator]
