"""The training loop: it learns, leaves alone what is not its own, and resumes as if nothing had happened."""

import math
import shutil

import pytest
import torch
from torch import nn

from headfuse.errors import ConfigError, TrainingError
from headfuse.progress import silent
from headfuse.training.batches import Batches
from headfuse.training.loop import train
from headfuse.training.objectives import Distillation, LanguageModelling, Losses
from headfuse.training.optimizers import ParameterGroup
from headfuse.training.run_folder import RunFolder
from pico import logits_of, pico, tokens
from short_runs import (
    HERE,
    LENGTH,
    ROWS,
    STEPS,
    Stopped,
    curve,
    learnable_text,
    run,
    short,
    stopping,
    trained_of,
    weights_of,
)

every_update = pytest.mark.parametrize("update", ["adamw", "muon"])


def checkpoints(root):
    return sorted(path.name for path in (root / "checkpoints").iterdir())


@every_update
@pytest.mark.parametrize(("family", "overrides"), [("llama", {"tie_word_embeddings": True}), ("gpt2", {}), ("opt", {})])
def test_training_lowers_the_loss_and_tells_how_it_went(family, overrides, update):
    report = run(trained_of(pico(family, **overrides)), short(update=update, rate=1e-2))
    losses = curve(report)
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    assert (report.steps, report.tokens) == (STEPS, STEPS * ROWS * LENGTH)
    assert report.tokens_per_second > 0
    assert report.mfu is None
    assert report.losses["loss"] == losses[-1] == report.losses["lm"]
    assert [row["step"] for row in report.metrics] == list(range(1, STEPS + 1))
    assert "metrics" not in report.as_dict()


def test_distillation_brings_a_student_nearer_to_its_teacher():
    model, teacher = pico("llama"), pico("llama", num_key_value_heads=2)
    before = weights_of(teacher)
    trained = trained_of(model, Distillation(teacher), teacher=teacher)
    report = run(trained, short(rate=1e-2))
    kl = curve(report, "kl")
    assert kl[-1] < 0.5 * kl[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_nothing_but_the_named_parameters_moves_without_the_weights():
    model = pico("llama")
    before, named = weights_of(model), model.model.layers[1].self_attn.k_proj.weight
    groups = [ParameterGroup("one", [named], 1e-2)]
    report = run(trained_of(model, own_groups=lambda: groups, weights=False))
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"model.layers.1.self_attn.k_proj.weight"}
    assert "gradient_norm/one" in report.losses
    assert not any("gradient_norm/model" in name for name in report.losses)


def test_parameters_with_a_rate_of_their_own_are_moved_once():
    model = pico("llama")
    embedding = model.model.embed_tokens.weight
    before = weights_of(model)
    run(trained_of(model, own_groups=lambda: [ParameterGroup("still", [embedding], 0.0)]))
    assert torch.equal(embedding, before["model.embed_tokens.weight"])
    assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])


@pytest.mark.parametrize("micro_rows", [1, 2])
def test_small_batches_in_turn_are_one_big_batch(micro_rows):
    whole, parts = pico("llama"), pico("llama")
    wanted, found = run(trained_of(whole)), run(trained_of(parts), short(micro_rows=micro_rows))
    # The same sums in another order, which AdamW magnifies where gradients vanish.
    assert curve(found)[:5] == pytest.approx(curve(wanted)[:5], abs=1e-6)
    assert curve(found) == pytest.approx(curve(wanted), abs=1e-4)
    names = "gradient_norm/model"
    assert curve(found, names)[0] == pytest.approx(curve(wanted, names)[0], rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_recomputing_activations_changes_no_loss_and_is_undone(family):
    plain, model = pico(family), pico(family)
    blocks = trained_of(model).blocks
    wanted = run(trained_of(plain))
    found = run(trained_of(model), short(checkpoint_activations=True))
    assert curve(found) == curve(wanted)
    assert all("forward" not in vars(block) for block in blocks)


def test_blocks_are_run_twice_a_step_where_activations_are_recomputed():
    model = pico("llama")
    counted = {"inside": 0}
    inner = model.model.layers[0].mlp

    def count(*_):
        counted["inside"] += 1

    inner.register_forward_pre_hook(count)
    run(trained_of(model), short(tokens=2 * ROWS * LENGTH, checkpoint_activations=True))
    assert counted["inside"] == 4


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU takes a C++ compiler")
@pytest.mark.slow
@pytest.mark.parametrize("checkpoint_activations", [False, True])
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile looks at it, and hides that from users
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # in what torch.compile imports
def test_compiled_blocks_give_the_same_losses_and_are_undone(checkpoint_activations):
    torch.compiler.reset()
    plain, model = pico("llama"), pico("llama")
    few = {"tokens": 6 * ROWS * LENGTH}
    wanted = run(trained_of(plain), short(**few))
    found = run(trained_of(model), short(**few, compiled=True, checkpoint_activations=checkpoint_activations))
    assert curve(found) == pytest.approx(curve(wanted), abs=1e-4)
    assert all(block._compiled_call_impl is None for block in model.model.layers)
    assert all("forward" not in vars(block) for block in model.model.layers)


@every_update
@pytest.mark.parametrize("stop", [3, 10, 17])
def test_a_run_that_was_stopped_and_resumed_is_the_uninterrupted_one(tmp_path, update, stop):
    options, whole = short(update=update), pico("llama", tie_word_embeddings=True)
    wanted = run(trained_of(whole), options, tmp_path / "whole")
    with pytest.raises(Stopped):
        run(trained_of(pico("llama", tie_word_embeddings=True)), options, tmp_path / "run", stages=stopping(stop))
    resumed = pico("llama", tie_word_embeddings=True)
    found = run(trained_of(resumed), options, tmp_path / "run")
    assert found.metrics == wanted.metrics
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in whole.state_dict().items())
    assert checkpoints(tmp_path / "run") == [f"step-{STEPS:08d}"]


def test_a_deterministic_run_has_the_same_losses_and_leaves_torch_as_it_was():
    told = []
    trained = trained_of(pico("llama"), before_step=lambda _: told.append(torch.are_deterministic_algorithms_enabled()))
    report = run(trained, short(deterministic=True))
    assert told == [True] * STEPS
    assert not torch.are_deterministic_algorithms_enabled()
    assert curve(report) == curve(run(trained_of(pico("llama")), short()))


def test_a_run_leaves_the_same_model_with_a_folder_and_without(tmp_path):
    kept, plain = pico("llama"), pico("llama")
    wanted = run(trained_of(plain))
    assert run(trained_of(kept), root=tmp_path / "run").metrics == wanted.metrics
    assert torch.equal(logits_of(kept, tokens(1, 9)), logits_of(plain, tokens(1, 9)))


class Exploding:
    """The next-token loss, which is not finite at one step."""

    def __init__(self, step: int) -> None:
        self.step, self.seen = step, 0

    def __call__(self, model, batch):
        self.seen += 1
        losses = LanguageModelling()(model, batch)
        bad = math.nan if self.seen == self.step else 1.0
        return Losses(losses.total * bad, losses.logged)


def test_a_loss_that_is_not_finite_names_its_step_and_keeps_the_last_good_checkpoint(tmp_path):
    with pytest.raises(
        TrainingError, match=r"at step 17; the checkpoint of step 10 is kept in .*run: lower the"
    ) as error:
        run(trained_of(pico("llama"), Exploding(17)), root=tmp_path / "run")
    assert "\n" not in str(error.value)
    assert checkpoints(tmp_path / "run") == ["step-00000010"]
    whole = run(trained_of(pico("llama")))
    assert run(trained_of(pico("llama")), root=tmp_path / "run").metrics == whole.metrics


def test_a_loss_that_is_not_finite_before_any_checkpoint_says_that_nothing_was_kept(tmp_path):
    for root in (None, tmp_path / "run"):
        with pytest.raises(TrainingError, match="NaN or infinity at step 2; nothing was kept"):
            run(trained_of(pico("llama"), Exploding(2)), root=root)


def test_a_checkpoint_never_holds_what_a_loss_that_is_not_finite_made(tmp_path):
    with pytest.raises(TrainingError, match="at step 10"):
        run(trained_of(pico("llama"), Exploding(10)), root=tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


class Patience:
    """Finished after some steps; counts them."""

    def __init__(self, steps: int) -> None:
        self.steps, self.done = steps, 0

    def after_step(self):
        self.done += 1

    def finished(self):
        return self.done >= self.steps


def test_a_run_that_is_finished_ends_early_and_does_no_more_when_resumed(tmp_path):
    patience = Patience(12)
    trained = trained_of(pico("llama"), after_step=patience.after_step, finished=patience.finished)
    first = run(trained, root=tmp_path / "run")
    assert (first.steps, patience.done) == (20, 20)  # asked every ten steps
    assert first.tokens == 20 * ROWS * LENGTH
    assert checkpoints(tmp_path / "run") == ["step-00000020"]
    again = pico("llama")
    trained = trained_of(again, after_step=patience.after_step, finished=patience.finished)
    second = run(trained, root=tmp_path / "run")
    assert (second.steps, patience.done) == (20, 20)
    assert second.metrics == first.metrics
    assert second.losses == first.losses
    assert torch.equal(logits_of(again, tokens(1, 9)), logits_of(trained.model, tokens(1, 9)))


class Converging(nn.Module):
    """Next-token loss that counts its steps in a buffer, which a checkpoint brings back."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = LanguageModelling()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, model, batch):
        return self.inner(model, batch)


def test_a_run_that_converged_ends_at_the_same_step_if_it_was_stopped_before(tmp_path):
    def train_to_the_end(name, stages=silent):
        objective = Converging()
        watched = {"after_step": lambda: objective.steps.add_(1), "finished": lambda: int(objective.steps) >= 13}
        return run(
            trained_of(pico("llama"), objective, **watched), short(save_every=15), tmp_path / name, stages=stages
        )

    with pytest.raises(Stopped):
        train_to_the_end("stopped", stopping(17))
    assert train_to_the_end("stopped").steps == train_to_the_end("whole").steps == 20


def test_a_run_that_reached_its_last_step_does_no_more_when_resumed(tmp_path):
    first_model, again = pico("llama"), pico("llama")
    first = run(trained_of(first_model), root=tmp_path / "run")
    second = run(trained_of(again), root=tmp_path / "run", stages=stopping(1))
    assert second.metrics == first.metrics
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in first_model.state_dict().items())


def test_measures_are_logged_where_the_losses_are_looked_at(tmp_path):
    trained = trained_of(pico("llama"), measure=lambda: {"height": 3.0})
    report = run(trained)
    assert [row["step"] for row in report.metrics if "height" in row] == [10, 20, STEPS]
    assert report.losses["height"] == 3.0


def test_gradients_are_clipped_group_by_group_and_a_climbing_group_is_not():
    model, height = pico("llama"), nn.Parameter(torch.tensor([1.0]))

    class Climbing:
        def __call__(self, model, batch):
            losses = LanguageModelling()(model, batch)
            return Losses(losses.total + 1000 * height.sum(), losses.logged)

    groups = [ParameterGroup("height", [height], 1e-2, ascent=True, decayed=False)]
    report = run(trained_of(model, Climbing(), own_groups=lambda: groups), short(tokens=3 * ROWS * LENGTH))
    assert height.item() > 1.0
    assert {name for name in report.losses if "norm" in name} == {"gradient_norm/model"}


def test_no_rate_falls_behind_the_schedule():
    report = run(trained_of(pico("llama")), short(warmup=0.2, final=0.1))
    rates = curve(report, "rate")
    assert rates[:5] == pytest.approx([3e-3 * n / 5 for n in (1, 2, 3, 4, 5)])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert 3e-4 <= rates[-1] < 4e-4


def test_rows_longer_than_the_models_positions_are_refused():
    text = learnable_text(1000)
    batches = Batches(text, rows=1, length=200, steps=2, seed=0)
    with pytest.raises(ConfigError, match="wanted rows of at most the model's 128 positions, got 200 tokens"):
        train(trained_of(pico("gpt2")), batches, short(rows=1, length=200), HERE)


def test_a_run_without_checkpoints_writes_none(tmp_path):
    run(trained_of(pico("llama")), short(save_every=0, tokens=3 * ROWS * LENGTH), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert RunFolder(tmp_path / "run").latest_step() == 0
