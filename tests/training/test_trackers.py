"""A run's figures in other people's tools; their packages are stood in for."""

import sys
from types import ModuleType

import pytest

from headfuse.errors import ConfigError
from headfuse.training.loop import train
from headfuse.training.processes import Processes
from headfuse.training.trackers import Trackers
from pico import pico
from short_runs import HERE, STEPS, batches_for, short, trained_of


class Events:
    """What both stand-ins were told."""

    def __init__(self, *args, **options):
        self.made, self.seen, self.closed = (args, options), [], False

    def add_scalar(self, name, value, step):
        self.seen.append((name, value, step))

    def log(self, figures, step):
        self.seen += [(name, value, step) for name, value in figures.items()]

    def close(self):
        self.closed = True

    finish = close


@pytest.fixture
def made(monkeypatch):
    """Stand-ins for both packages; the objects that were made of them."""
    found = []

    def make(*args, **options):
        found.append(Events(*args, **options))
        return found[-1]

    for name, entry in (("torch.utils.tensorboard", "SummaryWriter"), ("wandb", "init")):
        module = ModuleType(name)
        setattr(module, entry, make)
        monkeypatch.setitem(sys.modules, name, module)
    return found


def run(trackers, here=HERE, **fields):
    options = short(**fields)
    return train(trained_of(pico("llama")), batches_for(options), options, here, name="healing", trackers=trackers)


def test_every_step_reaches_both(tmp_path, made):
    report = run(Trackers(tmp_path, "cache"))
    events, project = made
    assert events.made[0] == (str(tmp_path / "healing"),)
    assert events.made[1] == {"purge_step": 1}
    assert project.made[1]["project"] == "cache"
    assert project.made[1]["config"]["rate"] == 3e-3
    for each in made:
        losses = {step: value for name, value, step in each.seen if name == "loss"}
        assert losses == {row["step"]: row["loss"] for row in report.metrics}
        assert len(losses) == STEPS
        assert each.closed


def test_only_the_first_process_reports(tmp_path, made):
    class Second(Processes):
        first = False

    run(Trackers(tmp_path, "cache"), Second(HERE.device))
    assert made == []


def test_they_are_closed_when_a_run_breaks(tmp_path, made):
    options = short()
    trained = trained_of(pico("llama"), after_step=lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(trained, batches_for(options), options, HERE, trackers=Trackers(tmp_path, "cache"))
    assert [each.closed for each in made] == [True, True]


@pytest.mark.parametrize(
    ("trackers", "module", "package"),
    [(Trackers(wandb="cache"), "wandb", "wandb"), (Trackers("events"), "torch.utils.tensorboard", "tensorboard")],
)
def test_a_package_that_is_not_there_is_named(monkeypatch, tmp_path, trackers, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    trackers = Trackers(trackers.tensorboard and tmp_path, trackers.wandb)
    with pytest.raises(ConfigError, match=f"wanted the package {package} to follow the run, got none"):
        run(trackers)
