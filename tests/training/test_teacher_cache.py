"""A teacher's likeliest tokens on disk, and the distillation that reads them."""

import json

import numpy as np
import pytest
import torch

from headfuse.errors import ConfigError
from headfuse.precision import precision_context
from headfuse.training.batches import Batches, TrainingText, token_digest
from headfuse.training.objectives import Distillation
from headfuse.training.processes import Processes
from headfuse.training.teacher_cache import TopKDistillation, top_k_sums, top_k_teacher
from pico import VOCABULARY, pico

ROWS, LENGTH, STEPS = 4, 9, 5
HERE = Processes(torch.device("cpu"))


@pytest.fixture(scope="module")
def models():
    student, teacher = pico("llama"), pico("llama")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return student, teacher


def make_batches(*, seed=0, size=STEPS * ROWS * LENGTH + 1, **options):
    ids = np.random.default_rng(7).integers(2, VOCABULARY, size).astype(np.uint16)
    text = TrainingText(ids, "random", token_digest(ids))
    return Batches(text, **({"rows": ROWS, "length": LENGTH, "steps": STEPS, "seed": seed} | options))


def fill(teacher, batches, folder, here=HERE, **options):
    top_k_teacher(teacher, batches, folder, here, **options)


def files(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("step-*")}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("lm_weight", [0.0, 0.25])
def test_all_tokens_give_the_full_kl(tmp_path, models, lm_weight):
    student, teacher = models
    batches = make_batches()
    fill(teacher, batches, tmp_path, k=VOCABULARY, dtype=torch.float32)
    objective = TopKDistillation(tmp_path, lm_weight=lm_weight, chunk_tokens=7)
    for step in range(STEPS):
        batch = batches.batch(step)
        full, found = Distillation(teacher, lm_weight=lm_weight)(student, batch), objective(student, batch)
        torch.testing.assert_close(found.total, full.total, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found.logged["lm"], full.logged["lm"])
        torch.testing.assert_close(
            gradients(student, found.total), gradients(student, full.total), rtol=1e-5, atol=1e-6
        )


def test_fewer_tokens_bound_the_kl_from_below_and_more_of_them_better(tmp_path, models):
    student, teacher = models
    batches = make_batches()
    full = float(Distillation(teacher)(student, batches.batch(0)).logged["kl"])
    found = []
    for k in (1, 8, 32, VOCABULARY - 1):
        fill(teacher, batches, tmp_path / str(k), k=k)
        found.append(float(TopKDistillation(tmp_path / str(k))(student, batches.batch(0)).logged["kl_top_k"]))
    assert found == sorted(found)
    assert found[0] > 0
    assert found[-1] <= full * 1.001
    assert found[-1] == pytest.approx(full, rel=1e-2)


@pytest.mark.parametrize("k", [1, 8, VOCABULARY])
def test_a_student_like_its_teacher_has_no_loss(tmp_path, models, k):
    _, teacher = models
    batches = make_batches()
    fill(teacher, batches, tmp_path, k=k)
    total = TopKDistillation(tmp_path)(teacher, batches.batch(1)).total
    assert 0 <= total.detach() + 1e-6 < 1e-4
    assert gradients(teacher, total).isfinite().all()


def test_entries_are_found_for_any_share_and_order_of_rows(tmp_path, models):
    student, teacher = models
    batches = make_batches()
    fill(teacher, batches, tmp_path, k=8)
    objective = TopKDistillation(tmp_path)
    whole = objective(student, batches.batch(2)).total
    shares = [objective(student, batches.batch(2, rank=rank, world=2)).total for rank in (0, 1)]
    torch.testing.assert_close(torch.stack(shares).mean(), whole)
    mixed = torch.cat([batches.batch(0), batches.batch(3)])[torch.tensor([5, 0, 3, 6])]
    single = [objective(student, row[None]).total for row in mixed]
    torch.testing.assert_close(objective(student, mixed).total, torch.stack(single).mean())


def test_neither_micro_batches_nor_processes_change_the_entries(tmp_path, models):
    student, teacher = models
    batches = make_batches()
    fill(teacher, batches, tmp_path / "one", k=8)
    for rank in (0, 1):
        here = Processes(torch.device("cpu"), rank=rank, world=2)
        fill(teacher, batches, tmp_path / "two", here, k=8, micro_rows=3)
    assert files(tmp_path / "one").keys() == files(tmp_path / "two").keys()
    losses = [TopKDistillation(tmp_path / name)(student, batches.batch(1)).total for name in ("one", "two")]
    torch.testing.assert_close(*losses)


def test_a_stopped_pass_goes_on_and_does_nothing_twice(tmp_path, models):
    _, teacher = models
    fill(teacher, make_batches(steps=2), tmp_path, k=8)
    first = files(tmp_path)
    fill(teacher, make_batches(), tmp_path, k=8)
    assert len(files(tmp_path)) == STEPS
    assert first.items() <= files(tmp_path).items()


def test_rows_that_come_again_are_stored_once_and_another_text_is_added(tmp_path, models):
    student, teacher = models
    twice = make_batches(steps=2 * STEPS, repeat=True)
    fill(teacher, twice, tmp_path, k=8)
    assert len(files(tmp_path)) == STEPS
    other = make_batches(length=LENGTH - 1)
    fill(teacher, other, tmp_path, k=8)
    objective = TopKDistillation(tmp_path)
    for batches in (twice, other):
        for step in range(batches.steps):
            assert objective(student, batches.batch(step)).total > 0


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile looks at it, and hides that from users
def test_bf16_and_compiled_chunks_give_about_the_same(tmp_path, models):
    torch.compiler.reset()
    student, teacher = models
    batch = make_batches().batch(0)
    fill(teacher, make_batches(), tmp_path, k=8, dtype=torch.bfloat16)
    exact = TopKDistillation(tmp_path)(student, batch)
    compiled = torch.compile(top_k_sums, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(TopKDistillation(tmp_path, sums=compiled)(student, batch).total, exact.total)
    with precision_context(torch.device("cpu"), "bf16"):
        losses = TopKDistillation(tmp_path)(student, batch)
    assert losses.total.dtype == torch.float32
    torch.testing.assert_close(losses.total, exact.total, rtol=0.1, atol=0.05)
    assert gradients(student, losses.total).isfinite().all()


def test_what_is_missing_or_of_another_teacher_is_an_error(tmp_path, models):
    student, teacher = models
    with pytest.raises(ConfigError, match=r"wanted a teacher's entries, got no teacher\.json"):
        TopKDistillation(tmp_path)
    with pytest.raises(ConfigError, match="wanted k from 1 to the 96 tokens of the vocabulary, got 97"):
        fill(teacher, make_batches(), tmp_path, k=97)
    fill(teacher, make_batches(), tmp_path, k=8)
    objective = TopKDistillation(tmp_path)
    rows = torch.cat([make_batches().batch(0), torch.zeros(3, LENGTH + 1, dtype=torch.int64)])
    with pytest.raises(ConfigError, match="wanted the teacher's entries of every row, got none for 3 of 7"):
        objective(student, rows)
    with pytest.raises(ConfigError, match=r"got others \(teacher differ\)"):
        fill(student, make_batches(), tmp_path, k=8)
    with pytest.raises(ConfigError, match=r"got others \(k, dtype differ\)"):
        fill(teacher, make_batches(), tmp_path, k=9, dtype=torch.float32)
    with pytest.raises(ConfigError, match="wanted entries of a teacher with the student's 97 tokens, got 96"):
        objective(pico("llama", vocab_size=97), make_batches().batch(0))
    assert json.loads((tmp_path / "teacher.json").read_text())["k"] == 8


def test_a_teacher_in_bf16_is_recorded_and_read_in_bf16(tmp_path, models):
    student, teacher = models
    batches, here = make_batches(), Processes(torch.device("cpu"), "bf16")
    fill(teacher, batches, tmp_path, here, k=8, micro_rows=3)
    with precision_context(here.device, here.precision):
        found = TopKDistillation(tmp_path)(student, batches.batch(0))
    assert torch.isfinite(found.total)
