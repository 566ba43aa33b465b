"""Layer-local refit: regress a converted layer's attention onto the original's, on the calibration text alone.

Each layer is fitted by itself: its inputs are the original model's, its targets the original attention's outputs,
the loss their squared difference relative to the residual stream. No gradient crosses a layer and no text loss is
seen. Three things make a few passes over 65k tokens enough (LOG.md has the measurements): the output projection
is first solved exactly (it is linear least squares given the rest), the updates are orthogonalised (Muon), and
the text is reshuffled in segments every pass. The last works because the original layer is at hand as a
function: any sequence of token states has an exact target, so new contexts cost one forward pass of one layer.
Most steps take short rows, which are cheap; without a long one now and then, attention over greater distances
than theirs would drift while nothing measures it.

How far a layer has to go is not known beforehand: steps that a deep cut needs undo what a mild one had kept (LOG.md).
So short fits try several rates first, and the one that leaves the least error on the rows kept out is taken.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from headfuse.checkpoints.attention import attention_of, heads_of
from headfuse.checkpoints.heads import AttentionHeads
from headfuse.models.dha.decoupled_attention import DecoupledAttention
from headfuse.precision import Precision, precision_context
from headfuse.progress import Advance, ignore
from headfuse.statistics.stream import LayerInputs
from headfuse.training.capture import gradients_function

# One row in sixteen is kept out of the fit, to measure it and to refuse it where it does harm.
HELD_OUT_SHARE = 16
EVALUATION_ROWS = 8
BIAS_RATE = 0.02  # Adam's rate for biases and gains, relative to theirs


@dataclass(frozen=True)
class RefitOptions:
    """Steps of `rows x length` tokens with a rate decaying linearly to 0.

    A rate is the size of a step relative to the norm of the matrix it changes. Of several `rates` each layer takes the
    one that does best in a `trial` of so large a share of the steps; they are tried in their order, the largest first,
    until the next does worse. `segment` tokens stay together when the text is
    reshuffled. Every `whole`th step takes its tokens in rows as long as the text's own, so that distances beyond
    `length` are fitted too; 0 never does.
    """

    steps: int = 240
    rows: int = 8
    length: int = 256
    segment: int = 64
    whole: int = 4
    rates: tuple[float, ...] = (0.05, 0.02, 0.01)
    trial: float = 0.25
    ridge: float = 1e-3

    @property
    def trial_steps(self) -> int:
        """Steps of each trial."""
        return max(1, round(self.trial * self.steps))

    @property
    def all_steps(self) -> int:
        """Steps of a layer at most, those of all trials among them."""
        return self.steps + (self.trial_steps * len(self.rates) if len(self.rates) > 1 else 0)


@dataclass(frozen=True)
class RefitReport:
    """Relative squared error of a layer's attention output on text kept out of the fit, before and after; the rate."""

    layer: int
    before: float
    after: float
    rate: float | None = None


def refit(
    original: AttentionHeads,
    converted: AttentionHeads,
    inputs: LayerInputs,
    options: RefitOptions,
    *,
    precision: Precision = "fp32",
    seed: int = 0,
    advance: Advance = ignore,
) -> tuple[AttentionHeads, RefitReport]:
    """Fit `converted` to `original` on one layer's inputs; never worse than `converted` on the rows kept out.

    `advance` is told of steps.
    """
    teacher, student = (attention_of(heads.to(torch.float32), inputs.layer) for heads in (original, converted))
    fit = _Fit(teacher, student, inputs, options, precision)
    with torch.no_grad():
        before = fit.error(fit.held_out)
        output = student.o_proj.weight.clone()
        fit.solve_output()
        if not fit.error(fit.held_out) < before:  # too little text for that many features
            student.o_proj.weight.copy_(output)
    start = {name: value.clone() for name, value in student.state_dict().items()}

    def error_after(steps: int, rate: float) -> float:
        student.load_state_dict(start)
        fit.descend(steps, rate, torch.Generator().manual_seed(seed + inputs.layer), advance)
        with torch.no_grad():
            found = fit.error(fit.held_out)
        return math.inf if math.isnan(found) else found

    rate, least = options.rates[0], math.inf
    for tried, each in enumerate(options.rates if len(options.rates) > 1 else (), start=1):
        found = error_after(options.trial_steps, each)
        if found > least:
            advance(options.trial_steps * (len(options.rates) - tried))
            break
        rate, least = each, found
    after = error_after(options.steps, rate)
    if not after < before:
        return converted, RefitReport(inputs.layer, before, before)
    return heads_of(student, converted.to(torch.float32)), RefitReport(inputs.layer, before, after, rate)


class _Fit:
    """One layer's regression: the two modules, the rows they see and the weights of the tokens."""

    def __init__(
        self,
        teacher: DecoupledAttention,
        student: DecoupledAttention,
        inputs: LayerInputs,
        options: RefitOptions,
        precision: Precision,
    ) -> None:
        self.teacher, self.student, self.options = teacher, student, options
        self.precision: Precision = precision
        self.hidden, self.positions = inputs.hidden, inputs.positions
        # The next norm divides by the stream's size, so an error counts relative to it.
        weight = inputs.stream_energy.clamp_min(1e-30).reciprocal()
        self.weight = weight / weight.mean()
        rows = len(self.hidden)
        kept = max(1, rows // HELD_OUT_SHARE) if rows > 1 else 0
        self.fitted, self.held_out = range(rows - kept), range(rows - kept if kept else 0, rows)

    def run(self, module: DecoupledAttention, hidden: Tensor) -> Tensor:
        """Attention output of `hidden` `[n, T, D]` in fp32."""
        positions = self.positions
        if positions is not None:
            positions = (positions[0][:, : hidden.shape[1]], positions[1][:, : hidden.shape[1]])
        with precision_context(hidden.device, self.precision):
            return module(hidden, position_embeddings=positions)[0].float()

    def error(self, rows: range) -> float:
        """Weighted squared error relative to the target's, over natural rows."""
        wrong = total = 0.0
        for hidden, weight in self._batches(rows):
            target = self.run(self.teacher, hidden)
            wrong += _energy(self.run(self.student, hidden) - target, weight).item()
            total += _energy(target, weight).item()
        return wrong / max(total, 1e-30)

    def solve_output(self) -> None:
        """Least squares for the output projection given everything else, ridged towards what it is."""
        layer = self.student.o_proj
        width = layer.in_features
        gram = torch.zeros(width, width, dtype=torch.float64, device=self.hidden.device)
        cross = torch.zeros(width, layer.out_features, dtype=torch.float64, device=self.hidden.device)
        features: list[Tensor] = []
        handle = layer.register_forward_pre_hook(lambda _, args: features.append(args[0]))
        try:
            for hidden, weight in self._batches(self.fitted):
                target = self.run(self.teacher, hidden)
                self.run(self.student, hidden)
                root = weight.flatten().sqrt().unsqueeze(-1)
                read = features.pop().float().flatten(0, 1) * root
                wanted = target.flatten(0, 1) if layer.bias is None else target.flatten(0, 1) - layer.bias
                gram += (read.mT @ read).double()
                cross += (read.mT @ (wanted * root)).double()
        finally:
            handle.remove()
        ridge = self.options.ridge * gram.diagonal().mean().clamp_min(1e-30)
        gram.diagonal().add_(ridge)
        layer.weight.copy_(torch.linalg.solve(gram, cross + ridge * layer.weight.double().mT).mT)

    def descend(self, steps: int, rate: float, generator: torch.Generator, advance: Advance) -> None:
        """Orthogonalised descent over all matrices at once, on freshly shuffled segments."""
        optimizers = _optimizers(self.student, rate)
        for module in (self.teacher, self.student):
            module.place_maps()
        # A layer's kernels are so short that launching them would take most of the time.
        captured = self.hidden.device.type == "cuda"
        gradients = gradients_function(self._gradients, list(self.student.parameters()), captured=captured)
        for step, (hidden, weight) in enumerate(self._shuffled(steps, generator)):
            gradients(hidden, weight)
            for optimizer, rates in optimizers:
                for group, first in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = first * (1 - step / steps)
                optimizer.step()
            advance(1)
        self.student.requires_grad_(False)
        self.student.zero_grad(set_to_none=True)

    def _gradients(self, hidden: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """Gradients of the relative error of a batch are left in `.grad`."""
        with torch.no_grad():
            target = self.run(self.teacher, hidden)
        loss = _energy(self.run(self.student, hidden) - target, weight) / _energy(target, weight)
        loss.backward()
        return {"loss": loss.detach()}

    def _batches(self, rows: range) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(rows.start, rows.stop, EVALUATION_ROWS):
            chosen = slice(start, min(start + EVALUATION_ROWS, rows.stop))
            yield self.hidden[chosen], self.weight[chosen]

    def _shuffled(self, steps: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """A batch `[rows, length, D]` for every step: segments from anywhere in the text, in a new order every pass."""
        options, longest = self.options, self.hidden.shape[1]
        length, segment = min(options.length, longest), min(options.segment, longest)
        pieces, tokens = longest // segment, options.rows * length
        hidden, weight = (
            table[: self.fitted.stop, : pieces * segment].unflatten(1, (pieces, segment)).flatten(0, 1)
            for table in (self.hidden, self.weight)
        )
        short, long = (max(1, n // segment) for n in (length, min(longest, tokens)))
        left = torch.empty(0, dtype=torch.int64)
        for step in range(1, steps + 1):
            per_row = long if options.whole and step % options.whole == 0 else short
            rows = min(max(1, tokens // (per_row * segment)), len(hidden) // per_row)
            if len(left) < rows * per_row:
                left = torch.randperm(len(hidden), generator=generator).to(hidden.device)
            chosen, left = left[: rows * per_row].view(rows, per_row), left[rows * per_row :]
            yield hidden[chosen].flatten(1, 2), weight[chosen].flatten(1, 2)


def _energy(output: Float[Tensor, "n T D"], weight: Float[Tensor, "n T"]) -> Tensor:
    return (output.pow(2).sum(-1) * weight).sum()


def _optimizers(module: DecoupledAttention, rate: float) -> list[tuple[torch.optim.Optimizer, list[float]]]:
    """Muon for the matrices, each step `rate` times the matrix's own norm; Adam for biases and gains."""
    module.requires_grad_(True)
    matrices = [p for p in module.parameters() if p.dim() == 2]
    vectors = [p for p in module.parameters() if p.dim() == 1]
    rates = []
    for matrix in matrices:
        rows, columns = matrix.shape
        # An orthogonalised update has norm sqrt(min side), and Muon multiplies it by sqrt(rows / columns) if > 1.
        unit = math.sqrt(min(rows, columns) * max(1.0, rows / columns))
        rates.append(rate * matrix.norm().item() / unit)
    muon = torch.optim.Muon([{"params": [m]} for m in matrices], momentum=0.9, weight_decay=0.0)
    found: list[tuple[torch.optim.Optimizer, list[float]]] = [(muon, rates)]
    if vectors:
        found.append((torch.optim.Adam(vectors), [rate * BIAS_RATE]))
    return found
