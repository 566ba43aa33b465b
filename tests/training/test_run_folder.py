"""The folder of a run: what may resume in it, and that a checkpoint brings everything back bit for bit."""

import json
import shutil
from collections import namedtuple

import pytest
import torch
from torch import nn

from headfuse.errors import ConfigError, TrainingError
from headfuse.training import run_folder
from headfuse.training.optimizers import ParameterGroup, build_optimizers
from headfuse.training.options import TrainingOptions
from headfuse.training.run_folder import TEACHER, RunFolder, run_root
from short_runs import HERE

KINDS = {"adamw": ("adamw",), "muon": ("muon",), "both": ("muon", "adamw")}


class Model(nn.Module):
    """A matrix for each way of updating, tied weights and a buffer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first, self.second = (nn.Linear(6, 6, bias=False) for _ in range(2))
        for layer in (self.first, self.second):
            layer.weight.data = torch.randn(6, 6, generator=generator)
        self.tied = self.second
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        return self.second(self.first(x)).pow(2).mean() + self.tied(x).sum()


def made(kind, seed=0):
    model = Model(seed)
    updates = KINDS[kind]
    layers = {updates[0]: [model.first.weight], updates[-1]: [model.second.weight]}
    if len(updates) == 1:
        layers = {updates[0]: [model.first.weight, model.second.weight]}
    groups = [ParameterGroup(update, parameters, 1e-2, update) for update, parameters in layers.items()]
    return model, build_optimizers(groups, TrainingOptions(weight_decay=0.1))


def step(model, optimizers, number):
    model(torch.randn(5, 6, generator=torch.Generator().manual_seed(number))).backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    model.count += 1


def same(one, other):
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            same(one[key], other[key])
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, list | tuple):
        for left, right in zip(one, other, strict=True):
            same(left, right)
    else:
        assert one == other


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_restored_is_bit_equal_and_goes_on_so(tmp_path, kind):
    folder, (model, optimizers) = RunFolder(tmp_path / "run"), made(kind)
    for number in range(3):
        step(model, optimizers, number)
    folder.save(3, model, optimizers, HERE)
    other, others = made(kind, seed=1)
    assert folder.restore(other, others, HERE) == 3
    for _ in range(2):
        same(dict(model.state_dict()), dict(other.state_dict()))
        for left, right in zip(optimizers, others, strict=True):
            same(left.state_dict(), right.state_dict())
        step(model, optimizers, 3)
        step(other, others, 3)


def test_a_folder_without_checkpoints_restores_nothing(tmp_path):
    model, optimizers = made("adamw")
    before = model.first.weight.detach().clone()
    assert RunFolder(tmp_path).restore(model, optimizers, HERE) == 0
    assert torch.equal(model.first.weight, before)
    assert not optimizers[0].state


def test_only_the_last_checkpoint_is_kept(tmp_path):
    folder, (model, optimizers) = RunFolder(tmp_path), made("adamw")
    for number in (2, 10):
        folder.save(number, model, optimizers, HERE)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000010"]
    assert folder.latest_step() == 10


def test_a_checkpoint_that_a_kill_cut_short_is_ignored_and_written_over(tmp_path):
    folder, (model, optimizers) = RunFolder(tmp_path), made("adamw")
    folder.save(2, model, optimizers, HERE)
    cut = tmp_path / "checkpoints" / "step-00000004.partial"
    cut.mkdir()
    (cut / "__0_0.distcp").write_bytes(b"half")
    assert folder.latest_step() == 2
    assert folder.restore(*made("adamw", seed=1), HERE) == 2
    folder.save(4, model, optimizers, HERE)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]
    assert folder.restore(*made("adamw", seed=1), HERE) == 4


def checkpointed(root, recipe, training):
    folder = RunFolder(root, recipe)
    folder.check_recipe(training, HERE)
    folder.save(1, *made("adamw"), HERE)


def test_another_recipe_is_refused_in_one_line_that_names_old_and_new(tmp_path):
    recipe = {"model": {"name": "a", "sha": "1"}, "text": "t"}
    checkpointed(tmp_path, recipe, {"rate": 0.1, "rows": 2})
    RunFolder(tmp_path, recipe).check_recipe({"rate": 0.1, "rows": 2}, HERE)
    other = {"model": {"name": "b", "sha": "1"}, "text": "t", "extra": 1}
    with pytest.raises(ConfigError) as error:
        RunFolder(tmp_path, other).check_recipe({"rate": 0.2, "rows": 2}, HERE)
    message = str(error.value)
    assert "(extra: None -> 1, model.name: 'a' -> 'b', rate: 0.1 -> 0.2)" in message
    assert "\n" not in message
    assert json.loads((tmp_path / "recipe.json").read_text())["rate"] == 0.1


def test_another_recipe_may_begin_where_no_checkpoint_is(tmp_path):
    RunFolder(tmp_path).check_recipe({"rate": 0.1}, HERE)
    RunFolder(tmp_path).check_recipe({"rate": 0.2}, HERE)
    assert json.loads((tmp_path / "recipe.json").read_text()) == {"rate": 0.2}


def test_a_recipe_may_hold_what_json_does_not_know(tmp_path):
    recipe = {"root": tmp_path, "betas": (0.9, 0.95)}
    checkpointed(tmp_path / "run", recipe, {})
    RunFolder(tmp_path / "run", recipe).check_recipe({}, HERE)


def test_the_root_of_a_run_is_removed_at_its_end_with_all_its_stages(tmp_path):
    root = tmp_path / "deep" / "run"
    with run_root(root):
        (root / "tokens.npy").touch()
        checkpointed(root / "search", {}, {})
    assert not root.exists()
    assert root.parent.is_dir()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_only_checkpoints_are_worth_keeping(tmp_path, error):
    root = tmp_path / "deep" / "run"
    with pytest.raises(error) as raised, run_root(root):
        (root / "tokens.npy").touch()
        RunFolder(root / "search").check_recipe({}, HERE)
        (root / "search" / "checkpoints" / "step-00000001.partial").mkdir(parents=True)
        raise error
    assert not hasattr(raised.value, "__notes__")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(error) as raised, run_root(root):
        checkpointed(root / "search", {}, {})
        raise error
    assert raised.value.__notes__ == [f"the run is kept in {root}, from where the same command resumes it"]
    assert RunFolder(root / "search").latest_step() == 1


def test_a_folder_that_holds_anything_else_is_left_alone(tmp_path):
    (tmp_path / "run" / "sub").mkdir(parents=True)
    (tmp_path / "run" / "sub" / "notes.txt").write_text("mine")
    with (
        pytest.raises(ConfigError, match="wanted the folder of a run, or none, got one with sub;"),
        run_root(tmp_path / "run"),
    ):
        pytest.fail("nothing may run here")
    assert (tmp_path / "run" / "sub" / "notes.txt").read_text() == "mine"


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"), run_root(tmp_path / "file" / "run"):
        pytest.fail("nothing may run here")


def test_a_teacher_s_tokens_are_worth_keeping(tmp_path):
    with pytest.raises(KeyboardInterrupt) as raised, run_root(tmp_path / "run"):
        (tmp_path / "run" / TEACHER).mkdir()
        (tmp_path / "run" / TEACHER / "step-00000000.safetensors").touch()
        raise KeyboardInterrupt
    assert "is kept in" in raised.value.__notes__[0]
    with run_root(tmp_path / "run"):
        assert (tmp_path / "run" / TEACHER / "step-00000000.safetensors").exists()


def test_one_command_at_a_time_has_a_run_and_a_stopped_one_leaves_it(tmp_path):
    root = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt), run_root(root):
        with pytest.raises(ConfigError, match="another command is at work"), run_root(root):
            pytest.fail("nothing may run here")
        with run_root(root / "inner", first=False):
            checkpointed(root / "search", {}, {})
        raise KeyboardInterrupt
    with run_root(root):
        assert RunFolder(root / "search").latest_step() == 1


@pytest.mark.parametrize("file", ["checkpoints/step-00000001/__0_0.distcp", "recipe.json"])
def test_a_damaged_run_is_refused_in_one_line_and_not_said_to_be_resumable(tmp_path, file):
    root = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt), run_root(root):
        checkpointed(root, {"text": "a long digest"}, {})
        raise KeyboardInterrupt
    (root / file).write_bytes((root / file).read_bytes()[:20])
    with pytest.raises(ConfigError, match="cannot be read") as raised, run_root(root):
        RunFolder(root, {"text": "a long digest"}).check_recipe({}, HERE)
        RunFolder(root).restore(*made("adamw"), HERE)
    assert f"delete {root} to start anew" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not hasattr(raised.value, "__notes__")


def test_a_disk_that_is_too_small_is_refused_before_and_said_after(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    free = namedtuple("Usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free(23))
    folder.check_space(0)
    with pytest.raises(ConfigError, match="GB of disk for checkpoints"):
        folder.check_space(1)
    folder.save(1, *made("adamw"), HERE)
    folder.check_space(1)  # one checkpoint is there already

    def full(*_, **__):
        raise RuntimeError("unexpected pos 704 vs 598\nand a long story")

    monkeypatch.setattr(run_folder, "save", full)
    with pytest.raises(TrainingError, match="checkpoint of step 2, got RuntimeError: unexpected pos 704 vs 598 with"):
        folder.save(2, *made("adamw"), HERE)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
