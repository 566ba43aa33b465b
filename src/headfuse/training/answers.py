"""What training on examples minimises: the loss of the answers, or the distance from a teacher on prompts and answers.

A batch is what `PackedRows` says. As in `objectives`, logits exist for one chunk of positions at a time. n is the
positions of a chunk, D the hidden size, V the vocabulary, k the tokens that are compared.
"""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int64
from torch import Tensor
from transformers import PreTrainedModel

from headfuse.errors import ConfigError
from headfuse.text.packing import PackedExamples, PackedRows
from headfuse.training.batches import TrainingRows
from headfuse.training.chunked_loss import OutputLayer, mean_over_chunks, project
from headfuse.training.objectives import Losses, Objective, check_lm_weight, last_hidden, objective


def bild(
    teacher: Float[Tensor, "n V"], student: Float[Tensor, "n V"], *, k: int = 16, temperature: float = 3.0
) -> Float[Tensor, "n"]:
    """The bi-directional logits difference loss of every position (arXiv 2406.13555): teacher-led plus student-led.

    The leader's k largest logits are taken from both models, divided by the temperature, and made into their k(k-1)/2
    differences z_i - z_j, i before j in the leader's order. The softmax over the differences is a distribution; the
    loss is KL(teacher's || student's), not multiplied by the temperature's square (as in the official code of arXiv
    2412.20677, whose k = 16 is our default; the paper of BiLD favours k = 8). A vocabulary smaller than k is taken
    whole.
    """
    with torch.no_grad():
        leaders = [logits.topk(min(k, logits.shape[-1]), dim=-1).indices for logits in (teacher, student)]
    return sum(_difference_kl(teacher, student, chosen, temperature) for chosen in leaders)  # type: ignore[return-value]


def _difference_kl(
    teacher: Float[Tensor, "n V"], student: Float[Tensor, "n V"], chosen: Int64[Tensor, "n k"], temperature: float
) -> Float[Tensor, "n"]:
    first, second = torch.triu_indices(chosen.shape[-1], chosen.shape[-1], 1, device=chosen.device)
    log_p = []
    for logits in (teacher, student):
        kept = logits.gather(-1, chosen) / temperature
        log_p.append(F.log_softmax(kept[:, first] - kept[:, second], dim=-1))
    return F.kl_div(log_p[1], log_p[0], reduction="none", log_target=True).sum(-1)


def answer_sums(
    targets: Int64[Tensor, "n"], weights: Float32[Tensor, "n"], hidden: Float[Tensor, "n D"], layer: OutputLayer
) -> Float32[Tensor, "1"]:
    """The weighted sum of a chunk's cross-entropies."""
    return (F.cross_entropy(project(hidden, layer), targets, reduction="none") * weights).sum()[None]


def answer_distillation_sums(
    targets: Int64[Tensor, "n"],
    prompt: Float32[Tensor, "n"],
    answer: Float32[Tensor, "n"],
    sample: Float32[Tensor, "n"],
    teacher_hidden: Float[Tensor, "n E"],
    hidden: Float[Tensor, "n D"],
    *rest: OutputLayer | float,
) -> Float32[Tensor, "3"]:
    """Cross-entropy, KL(teacher || student) over the vocabulary, and BiLD of a chunk, weighted and summed.

    `rest` is the student's and the teacher's output layer, BiLD's k and temperature, and whether the cross-entropy has
    a gradient.
    """
    layer, teacher_layer, k, temperature, learns_text = rest
    logits = project(hidden, layer)  # type: ignore[arg-type]
    with torch.no_grad():
        teacher_logits = project(teacher_hidden, teacher_layer)  # type: ignore[arg-type]
        log_teacher = F.log_softmax(teacher_logits, dim=-1)
    log_p = F.log_softmax(logits, dim=-1)
    kl = (F.kl_div(log_p, log_teacher, reduction="none", log_target=True).sum(-1) * prompt).sum()
    apart = (bild(teacher_logits, logits, k=int(k), temperature=float(temperature)) * sample).sum()  # type: ignore[arg-type]
    lm = (F.nll_loss(log_p if learns_text else log_p.detach(), targets, reduction="none") * answer).sum()
    return torch.stack([lm, kl, apart])


@dataclass(frozen=True)
class AnswerModelling:
    """Mean cross-entropy of the answers' tokens, the eos among them: supervised fine-tuning.

    `chunk_tokens` and `sums` (default `answer_sums`) are as in `LanguageModelling`.
    """

    _: KW_ONLY
    chunk_tokens: int | None = None
    sums: Callable[..., Tensor] = answer_sums

    def __call__(self, model: PreTrainedModel, tokens: Int64[Tensor, "B 5 T+1"]) -> Losses:
        """The loss on a batch."""
        rows = PackedRows.of(tokens)
        hidden, layer = last_hidden(model, rows.tokens, rows.positions)
        positions = (_targets(rows.tokens), _targets(rows.answer))
        found = mean_over_chunks(self.sums, positions, hidden, layer, shares=(1.0,), chunk_tokens=self.chunk_tokens)
        return Losses(found.total, {"lm": found.parts[0]})


@dataclass(frozen=True)
class AnswerDistillation:
    """Forward KL on prompts and BiLD on answers (arXiv 2412.20677), each with weight 1.

    The KL runs over the full vocabulary at temperature 1 and is a mean over the step's prompt tokens. (The official
    code sees one example at a time, so its mean is over the prompt tokens of each, then over examples.) BiLD is a mean
    over the answer tokens of each example, then over examples. The loss is `lm_weight * lm + (1 - lm_weight) * (kl +
    bild)`, where lm is the cross-entropy of the answers; the paper has none. The teacher lives on the student's device
    and computes at the student's precision, without gradients. `chunk_tokens` and `sums` (default
    `answer_distillation_sums`) are as in `LanguageModelling`.
    """

    teacher: PreTrainedModel
    _: KW_ONLY
    k: int = 16
    temperature: float = 3.0
    lm_weight: float = 0.0
    chunk_tokens: int | None = None
    sums: Callable[..., Tensor] = answer_distillation_sums

    def __post_init__(self) -> None:
        """Refuse what leaves nothing to compare: the softmax over the one difference of two logits is always 1."""
        check_lm_weight(self.lm_weight)
        if self.k < 3 or not self.temperature > 0:
            raise ConfigError(
                f"wanted k of at least 3 and a temperature above zero, got {self.k} and {self.temperature}; raise them"
            )

    def __call__(self, model: PreTrainedModel, tokens: Int64[Tensor, "B 5 T+1"]) -> Losses:
        """The loss on a batch."""
        rows = PackedRows.of(tokens)
        with torch.no_grad():
            teacher_hidden, teacher_layer = last_hidden(self.teacher, rows.tokens, rows.positions)
        hidden, layer = last_hidden(model, rows.tokens, rows.positions)
        weights = (_targets(each) for each in (rows.prompt, rows.answer, rows.sample))
        found = mean_over_chunks(
            self.sums,
            (_targets(rows.tokens), *weights, teacher_hidden),
            hidden,
            layer,
            teacher_layer,
            self.k,
            self.temperature,
            self.lm_weight > 0,
            shares=(self.lm_weight, 1 - self.lm_weight, 1 - self.lm_weight),
            chunk_tokens=self.chunk_tokens,
        )
        lm, kl, apart = found.parts
        return Losses(found.total, {"lm": lm, "kl": kl, "bild": apart})


def objective_for(
    rows: TrainingRows, teacher: PreTrainedModel | None, lm_weight: float, *, compiled: bool = False
) -> Objective:
    """What is minimised on these rows: `answers_objective` on examples, else `objective`."""
    kind = answers_objective if isinstance(rows, PackedExamples) else objective
    return kind(teacher, lm_weight, compiled=compiled)


def answers_objective(teacher: PreTrainedModel | None, lm_weight: float, *, compiled: bool = False) -> Objective:
    """Distillation with that share of the answers' cross-entropy; that alone without a teacher, or at a share of 1.

    Raises ConfigError for a share outside 0 to 1.
    """
    check_lm_weight(lm_weight)
    compiling = partial(torch.compile, dynamic=False) if compiled else (lambda sums: sums)
    if teacher is None or lm_weight == 1:
        return AnswerModelling(sums=compiling(answer_sums))
    return AnswerDistillation(teacher, lm_weight=lm_weight, sums=compiling(answer_distillation_sums))


def _targets(values: Tensor) -> Tensor:
    """What belongs to the predicted tokens, one after the other."""
    return values[:, 1:].flatten()
