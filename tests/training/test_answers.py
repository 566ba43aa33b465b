"""BiLD and the objectives of examples against their definitions, pair by pair and example by example."""

import math

import pytest
import torch
import torch.nn.functional as F

from headfuse.errors import ConfigError
from headfuse.precision import precision_context
from headfuse.text.packing import pack
from headfuse.training.answers import (
    AnswerDistillation,
    AnswerModelling,
    answer_distillation_sums,
    answer_sums,
    answers_objective,
    bild,
)
from headfuse.training.batches import Batches
from headfuse.training.loop import train
from headfuse.training.options import TrainingOptions
from headfuse.training.processes import Processes
from headfuse.training.run_folder import RunFolder
from made_examples import encoded
from pico import every_family, logits_of, pico
from same_losses import assert_same, teacher_for
from short_runs import HERE, curve, trained_of, weights_of

LENGTH = 15


def examples():
    return pack("made up", encoded(), length=LENGTH, seed=0)


def batch_of(text):
    return text.rows(range(text.num_rows(LENGTH)), slice(None), LENGTH)


def brute_force_bild(teacher, student, k, temperature):
    """One position, from lists of numbers."""

    def softmax(values):
        top = max(values)
        total = sum(math.exp(value - top) for value in values)
        return [math.exp(value - top) / total for value in values]

    loss = 0.0
    for leader in (teacher, student):
        chosen = sorted(range(len(leader)), key=lambda token: -leader[token])[:k]
        pairs = [(a, b) for i, a in enumerate(chosen) for b in chosen[i + 1 :]]
        p = softmax([(teacher[a] - teacher[b]) / temperature for a, b in pairs])
        q = softmax([(student[a] - student[b]) / temperature for a, b in pairs])
        loss += sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
    return loss


@pytest.mark.parametrize(("k", "temperature"), [(16, 3.0), (8, 3.0), (3, 1.0), (40, 0.5)])
def test_bild_is_the_kl_of_all_pairs_of_differences_led_by_either_model(k, temperature):
    draws = torch.Generator().manual_seed(k)
    teacher, student = torch.randn(2, 5, 30, generator=draws, dtype=torch.float64) * 4
    wanted = [brute_force_bild(t, s, k, temperature) for t, s in zip(teacher.tolist(), student.tolist(), strict=True)]
    found = bild(teacher, student, k=k, temperature=temperature)
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64))
    assert (found > 0).all()
    assert not torch.allclose(found, bild(student, teacher, k=k, temperature=temperature))


def test_the_gradient_of_bild_is_that_of_its_values():
    draws = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, 3, 12, generator=draws, dtype=torch.float64) * 4
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: bild(teacher, logits, k=5), student)
    (gradient,) = torch.autograd.grad(bild(teacher, student, k=5).sum(), student)
    chosen = torch.zeros_like(gradient, dtype=torch.bool)
    for leader in (teacher, student):
        chosen.scatter_(1, leader.topk(5).indices, value=True)
    assert (gradient[chosen] != 0).all()
    assert not gradient[~chosen].any()


def test_bild_does_not_see_a_shift_of_the_logits_and_is_zero_between_equals():
    logits = torch.randn(4, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert bild(logits, logits + 7.0).abs().max() < 1e-12


def by_example(model, teacher, text):
    """Answers' cross-entropy, prompts' KL and answers' BiLD from each example alone."""
    lm, kl, apart = [], [], []
    for content in text.contents:
        for example in content:
            ids = torch.from_numpy(example.ids).long()[None]
            logits, lead = model(ids[:, :-1], use_cache=False).logits[0], logits_of(teacher, ids[:, :-1])[0]
            answer = slice(example.num_prompt - 1, None)
            lm.append(F.cross_entropy(logits[answer], ids[0, 1:][answer], reduction="none"))
            log_p, log_q = lead.log_softmax(-1), logits.log_softmax(-1)
            kl.append((log_p.exp() * (log_p - log_q)).sum(-1)[: example.num_prompt - 1])
            apart.append(bild(lead[answer], logits[answer]).mean())
    return torch.cat(lm).mean(), torch.cat(kl).mean(), torch.stack(apart).mean()


@every_family
def test_fine_tuning_is_the_mean_cross_entropy_of_the_answers_tokens(family):
    model, text = pico(family), examples()
    losses = AnswerModelling(chunk_tokens=7)(model, batch_of(text))
    assert losses.logged.keys() == {"lm"}
    assert_same(model, losses.total, by_example(model, model, text)[0])


@every_family
def test_distillation_is_kl_on_prompts_and_bild_on_answers(family):
    model, teacher, text = pico(family), teacher_for(family), examples()
    lm, kl, apart = by_example(model, teacher, text)
    losses = AnswerDistillation(teacher, chunk_tokens=7)(model, batch_of(text))
    for name, wanted in {"lm": lm, "kl": kl, "bild": apart}.items():
        torch.testing.assert_close(losses.logged[name], wanted.detach(), rtol=1e-4, atol=1e-6)
        assert not losses.logged[name].requires_grad
    assert_same(model, losses.total, kl + apart)
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("chunk", [None, 1, 1000])
def test_the_size_of_chunks_does_not_matter(chunk):
    model, teacher, text = pico("llama"), teacher_for("llama"), examples()
    lm, kl, apart = by_example(model, teacher, text)
    losses = AnswerDistillation(teacher, lm_weight=0.25, chunk_tokens=chunk)(model, batch_of(text))
    assert_same(model, losses.total, 0.25 * lm + 0.75 * (kl + apart))


def test_a_model_is_at_no_distance_from_itself_in_bf16_too():
    model, batch = pico("qwen3"), batch_of(examples())
    with precision_context(torch.device("cpu"), "bf16"):
        losses = AnswerDistillation(pico("qwen3"), chunk_tokens=5)(model, batch)
    assert losses.total == 0
    assert losses.total.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile looks at it, and hides that from users
def test_a_compiled_chunk_gives_the_same_loss():
    torch.compiler.reset()
    model, teacher, text = pico("phi"), teacher_for("phi"), examples()
    compiled = {"backend": "aot_eager", "fullgraph": True}
    tuning = AnswerModelling(sums=torch.compile(answer_sums, **compiled))
    assert_same(model, tuning(model, batch_of(text)).total, by_example(model, teacher, text)[0])
    distilling = AnswerDistillation(teacher, sums=torch.compile(answer_distillation_sums, **compiled))
    assert_same(model, distilling(model, batch_of(text)).total, sum(by_example(model, teacher, text)[1:]))


def test_a_teacher_makes_the_objective():
    teacher = pico("llama")
    assert answers_objective(None, 0.0) == AnswerModelling() == answers_objective(teacher, 1.0)
    assert answers_objective(teacher, 0.5) == AnswerDistillation(teacher, lm_weight=0.5)
    with pytest.raises(ConfigError, match=r"wanted an lm_weight from 0 to 1, got 1\.5"):
        answers_objective(None, 1.5)
    for wrong in ({"k": 2}, {"temperature": 0.0}):
        with pytest.raises(ConfigError, match="wanted k of at least 3 and a temperature above zero"):
            AnswerDistillation(teacher, **wrong)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("teaches", [False, True])
def test_captured_steps_give_the_same_curve_and_weights(family, teaches):
    here = Processes(torch.device("cuda"))
    found = []
    for captured in (False, True):
        model, teacher = pico(family).to("cuda"), teacher_for(family).to("cuda")
        minimised = AnswerDistillation(teacher) if teaches else AnswerModelling()
        settings = options(captured=captured, repeat=True, tokens=20 * 4 * LENGTH)
        batches = Batches.of(pack("made up", encoded(SIZES), length=LENGTH, seed=0), settings)
        report = train(trained_of(model, minimised), batches, settings, here)
        found.append((curve(report), weights_of(model)))
    (wanted, weights), (losses, same) = found
    assert losses == wanted
    assert all(torch.equal(weights[name], same[name]) for name in weights)


SIZES = [(p % 6 + 1, p % 5 + 1) for p in range(60)]


def options(**changed):
    return TrainingOptions(**({"tokens": 6 * 4 * LENGTH, "rows": 4, "length": LENGTH, "rate": 3e-3} | changed))


def trained(minimised, changed=None, root=None):
    settings, model = options(**changed or {}), pico("llama")
    text = pack("made up", encoded(SIZES), length=LENGTH, seed=0)
    batches = Batches.of(text, settings)
    folder = None if root is None else RunFolder(root, {})
    return train(trained_of(model, minimised), batches, settings, HERE, run=folder), weights_of(model)


@pytest.mark.parametrize("teaches", [False, True])
def test_micro_batches_do_not_change_a_step_though_answers_are_not_spread_evenly(teaches):
    minimised = AnswerDistillation(teacher_for("llama")) if teaches else AnswerModelling()
    (report, weights), (parted, same) = trained(minimised), trained(minimised, {"micro_rows": 1})
    torch.testing.assert_close(torch.tensor(curve(parted)), torch.tensor(curve(report)), rtol=1e-4, atol=1e-5)
    for name, tensor in weights.items():
        torch.testing.assert_close(same[name], tensor, rtol=0, atol=1e-4, msg=name)


def test_a_run_on_examples_goes_on_bit_for_bit(tmp_path):
    whole, weights = trained(AnswerModelling(), {"repeat": True})
    text = pack("made up", encoded(SIZES), length=LENGTH, seed=0)
    settings, stopped = options(repeat=True, save_every=3), pico("llama")

    def stop_after_four():
        done.append(None)
        if len(done) > 4:
            raise KeyboardInterrupt

    done = []
    first = trained_of(stopped, AnswerModelling(), after_step=stop_after_four)
    with pytest.raises(KeyboardInterrupt):
        train(first, Batches.of(text, settings), settings, HERE, run=RunFolder(tmp_path, {}))
    resumed = pico("llama")
    report = train(trained_of(resumed, AnswerModelling()), Batches.of(text, settings), settings, HERE,
                   run=RunFolder(tmp_path, {}))  # fmt: skip
    assert report.losses == whole.losses
    assert all(torch.equal(tensor, weights[name]) for name, tensor in weights_of(resumed).items())
