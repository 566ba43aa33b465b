"""The loss of a gated model: any objective, the penalty, and the same gates for every micro-batch."""

import pytest
import torch

from headfuse.checkpoints.attention import attention_of, attention_replaced
from headfuse.checkpoints.opened import LoadedModel
from headfuse.checkpoints.registry import adapter_for
from headfuse.gating.controllers import CONTROLLERS
from headfuse.gating.gates import OFFICIAL, Gates
from headfuse.gating.merge import gate_attention, gated_parts
from headfuse.gating.objective import GatedObjective
from headfuse.gating.schedule import Schedule
from headfuse.training.objectives import LanguageModelling
from headfuse.training.optimizers import ParameterGroup
from pico import pico, shared, tokens
from short_runs import LENGTH, ROWS, curve, run, short, trained_of

STEPS = 10


class Gated:
    """A tiny model whose heads are gated towards its first two."""

    def __init__(self, name="projection", steps=STEPS):
        self.model = pico("llama").requires_grad_(False)
        self.loaded = LoadedModel.of(self.model, adapter_for(self.model.config))
        self.modules = [attention_of(layer, index) for index, layer in enumerate(self.loaded.heads)]
        for module, layer in zip(self.modules, self.loaded.heads, strict=True):
            gate_attention(module, layer, shared(layer, (0, 0, 1, 1), (0, 0, 1, 1)))
        self.gates = Gates(2, 4, OFFICIAL, generator=torch.Generator().manual_seed(0))
        self.controller = CONTROLLERS[name](self.gates, Schedule(steps), seed=0)
        parts = [gated_parts(module) for module in self.modules]
        self.objective = GatedObjective(LanguageModelling(), self.gates, self.controller, parts)

    def loss(self):
        with attention_replaced(self.loaded.layers, dict(enumerate(self.modules))):
            return self.objective(self.model, tokens(2, 9))

    def groups(self):
        found = [ParameterGroup("gates", [self.gates.logits], 0.03)] if self.controller.learned else []
        if climbing := self.controller.multipliers():
            found.append(ParameterGroup("multipliers", climbing, 0.1, ascent=True))
        return found

    def train(self, **changed):
        with attention_replaced(self.loaded.layers, dict(enumerate(self.modules))):
            trained = trained_of(
                self.model,
                self.objective,
                own_groups=self.groups,
                before_step=self.controller.before_step,
                after_step=self.controller.after_step,
            )
            options = short(tokens=STEPS * ROWS * LENGTH, save_every=3, rate=1e-3, **changed)
            return run(trained, options)


def test_the_penalty_comes_on_top_of_the_loss():
    gated = Gated()
    gated.controller.before_step(2)
    losses = gated.loss()
    logged = losses.logged
    assert losses.total.item() == pytest.approx(logged["lm"].item() + logged["penalty"].item())
    gap = abs(logged["sparsity"].item() - logged["target"].item())
    assert logged["target"].item() == pytest.approx(2 / 3)
    assert logged["penalty"].item() == pytest.approx(gap + (gap + 1e-6) ** 2)


def test_the_figures_are_those_of_the_gates():
    gated = Gated()
    gated.gates.logits.data.copy_(torch.tensor([10.0, -10, -10, 0, 10, 10, -10, -10]))
    logged = gated.loss().logged
    assert logged["share_off"].item() == 0.5
    assert logged["mean_gate"].item() == pytest.approx(3.5 / 8)
    assert not any(value.requires_grad for value in logged.values())


def test_every_layer_gets_its_own_gates():
    gated = Gated()
    gated.gates.logits.data.copy_(torch.tensor([10.0, -10, 10, -10, -10, -10, 10, 10]))
    gated.loss()
    found = [[part.gates.tolist() for part in gated_parts(module)] for module in gated.modules]
    assert all(values == [1.0, 0.0, 1.0, 0.0] for values in found[0])
    assert all(values == [0.0, 0.0, 1.0, 1.0] for values in found[1])


def test_the_loss_of_the_text_moves_the_gates():
    gated = Gated()
    gated.gates.pressure.zero_()
    gated.loss().total.backward()
    assert gated.gates.logits.grad is not None
    moved = gated.gates.logits.grad != 0
    assert moved.tolist() == 2 * [False, True, True, True]  # the first head is its group's


@pytest.mark.parametrize("name", CONTROLLERS)
def test_micro_batches_see_the_same_gates(name):
    whole, split = Gated(name).train(), Gated(name).train(micro_rows=1)
    for figure in ("share_off", "mean_gate", "target"):
        assert curve(whole, figure) == pytest.approx(curve(split, figure), abs=1e-4)
    assert curve(whole) == pytest.approx(curve(split), abs=1e-4)
