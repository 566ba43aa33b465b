"""The chunked losses against their definitions on whole logits, in value and in every gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from headfuse.errors import ConfigError
from headfuse.models.dha import DHA_CLASSES
from headfuse.precision import precision_context
from headfuse.training.objectives import (
    Distillation,
    LanguageModelling,
    check_teacher,
    distillation_sums,
    language_sums,
    last_hidden,
    project,
)
from pico import FAMILIES, VOCABULARY, every_case, every_family, logits_of, pico, pico_config, tokens
from same_losses import assert_same, gradients, teacher_for

ROWS, LENGTH = 3, 9
CPU = torch.device("cpu")
CHUNKS = [None, 1, 7, 27, 100]


def whole_lm(model, batch):
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def whole_kl(model, teacher, batch):
    log_p = model(input_ids=batch[:, :-1], use_cache=False).logits.log_softmax(-1)
    log_teacher = logits_of(teacher, batch[:, :-1]).log_softmax(-1)
    return (log_teacher.exp() * (log_teacher - log_p)).sum(-1).mean()


@every_case
def test_the_output_layer_on_the_last_hidden_states_gives_the_models_logits(family, overrides):
    model, batch = pico(family, **overrides), tokens(2, LENGTH + 1)
    with torch.no_grad():
        found = project(*last_hidden(model, batch))
    assert torch.equal(found.view(2, LENGTH, -1), logits_of(model, batch[:, :-1]))


@every_family
def test_decoupled_models_have_the_same_hidden_states_and_output_layer(family):
    classes, fields = DHA_CLASSES[family], FAMILIES[family][1]
    config = classes.config(**fields, key_map=[[0, 0, 1, 1]] * 2, value_map=[[0, 0, 0, 1]] * 2)
    model, batch = classes.model(config).eval(), tokens(2, LENGTH + 1)
    with torch.no_grad():
        found = project(*last_hidden(model, batch))
    assert torch.equal(found.view(2, LENGTH, -1), logits_of(model, batch[:, :-1]))


@every_family
def test_language_modelling_is_the_mean_cross_entropy(family):
    model, batch = pico(family), tokens(ROWS, LENGTH + 1)
    losses = LanguageModelling(chunk_tokens=7)(model, batch)
    assert losses.logged.keys() == {"lm"}
    assert_same(model, losses.total, whole_lm(model, batch))


@every_family
def test_distillation_is_the_mean_forward_kl(family):
    model, teacher, batch = pico(family), teacher_for(family), tokens(ROWS, LENGTH + 1)
    losses = Distillation(teacher, chunk_tokens=7)(model, batch)
    assert losses.logged.keys() == {"lm", "kl"}
    assert_same(model, losses.total, whole_kl(model, teacher, batch))
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_the_size_of_chunks_does_not_matter(tied, chunk):
    model, teacher = pico("llama", tie_word_embeddings=tied), teacher_for("llama")
    batch = tokens(ROWS, LENGTH + 1)
    losses = Distillation(teacher, lm_weight=0.25, chunk_tokens=chunk)(model, batch)
    assert_same(model, losses.total, 0.25 * whole_lm(model, batch) + 0.75 * whole_kl(model, teacher, batch))


def test_a_teacher_may_be_of_another_family_and_size():
    model, teacher = pico("llama"), teacher_for("phi", hidden_size=48)
    batch = tokens(ROWS, LENGTH + 1)
    assert_same(model, Distillation(teacher)(model, batch).total, whole_kl(model, teacher, batch))


def test_losses_are_logged_as_they_are_whatever_their_weight():
    model, teacher, batch = pico("llama"), teacher_for("llama"), tokens(ROWS, LENGTH + 1)
    for weight in (0.0, 0.5, 1.0):
        losses = Distillation(teacher, lm_weight=weight)(model, batch)
        torch.testing.assert_close(losses.logged["lm"], whole_lm(model, batch).detach())
        torch.testing.assert_close(losses.logged["kl"], whole_kl(model, teacher, batch).detach())
        assert not any(value.requires_grad for value in losses.logged.values())
        mixed = weight * losses.logged["lm"] + (1 - weight) * losses.logged["kl"]
        torch.testing.assert_close(losses.total.detach(), mixed)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_is_at_no_distance_from_itself(precision):
    model, teacher, batch = pico("qwen3"), pico("qwen3"), tokens(ROWS, LENGTH + 1)
    with precision_context(CPU, precision):
        losses = Distillation(teacher, chunk_tokens=5)(model, batch)
        alone = LanguageModelling(chunk_tokens=5)(model, batch)
    assert losses.total == 0
    torch.testing.assert_close(losses.logged["lm"], alone.logged["lm"])
    assert all(gradient.abs().max() < 1e-6 for gradient in gradients(model, losses.total).values())


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return made


@pytest.mark.parametrize("make", [LanguageModelling, lambda **options: Distillation(pico("llama"), **options)])
def test_the_logits_never_exist_whole(make):
    model, batch = pico("llama"), tokens(4, 65)
    with LargestTensor() as naive:
        whole_lm(model, batch).backward()
    assert naive.elements == 4 * 64 * VOCABULARY
    with LargestTensor() as seen:
        make(chunk_tokens=8)(model, batch).total.backward()
    assert seen.elements == 4 * 64 * 48  # the activations of the feed-forward layers


def test_the_default_chunk_follows_the_vocabulary(monkeypatch):
    sizes = []

    def noting(targets, *rest):
        sizes.append(len(targets))
        return language_sums(targets, *rest)

    monkeypatch.setattr("headfuse.training.chunked_loss.CHUNK_BYTES", 4 * VOCABULARY * 10)
    with torch.no_grad():
        LanguageModelling(sums=noting)(pico("llama"), tokens(ROWS, LENGTH + 1))
    assert sizes == [9, 9, 9]


@pytest.mark.parametrize("family", ["llama", "phi", "gpt2"])
def test_bf16_autocast_leaves_losses_in_fp32_and_close(family):
    model, teacher, batch = pico(family), teacher_for(family), tokens(ROWS, LENGTH + 1)
    objective = Distillation(teacher, lm_weight=0.5, chunk_tokens=7)
    with precision_context(CPU, "bf16"):
        losses = objective(model, batch)
    exact = objective(model, batch)
    assert losses.total.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in losses.logged.values())
    torch.testing.assert_close(losses.total, exact.total, rtol=0.1, atol=0.05)
    for gradient in gradients(model, losses.total).values():
        assert gradient.dtype == torch.float32
        assert gradient.isfinite().all()


def test_gradients_of_the_output_layer_are_summed_over_chunks_in_fp32():
    model, batch = pico("llama"), tokens(4, 65)
    with precision_context(CPU, "bf16"):
        total = LanguageModelling(chunk_tokens=2)(model, batch).total
    gradient = gradients(model, total)["lm_head.weight"]
    # A sum in bf16 would have only the values of bf16.
    assert not torch.equal(gradient, gradient.bfloat16().float())


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile looks at it, and hides that from users
def test_a_compiled_chunk_gives_the_same_loss():
    torch.compiler.reset()
    model, teacher, batch = pico("phi"), teacher_for("phi"), tokens(ROWS, LENGTH + 1)
    for objective, plain in (
        (LanguageModelling(sums=torch.compile(language_sums, backend="aot_eager", fullgraph=True)), whole_lm),
        (
            Distillation(teacher, sums=torch.compile(distillation_sums, backend="aot_eager", fullgraph=True)),
            lambda model, batch: whole_kl(model, teacher, batch),
        ),
    ):
        assert_same(model, objective(model, batch).total, plain(model, batch))


def test_only_a_share_is_a_weight():
    with pytest.raises(ConfigError, match=r"wanted an lm_weight from 0 to 1, got 1\.5"):
        Distillation(pico("llama"), lm_weight=1.5)


def test_a_teacher_with_another_vocabulary_or_with_rescaled_logits_is_refused():
    student = pico_config("llama")
    check_teacher(student, pico_config("gpt2"))
    with pytest.raises(ConfigError, match="wanted a teacher with the student's 96 tokens, got 97"):
        check_teacher(student, pico_config("llama", vocab_size=97))
    capped = pico_config("llama")
    capped.final_logit_softcapping = 30.0
    with pytest.raises(ConfigError, match=r"got final_logit_softcapping=30\.0 in a llama model"):
        check_teacher(student, capped)
