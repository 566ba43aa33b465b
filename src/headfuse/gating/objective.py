"""What a gated model minimises: any objective, plus the price of the gates that are still open."""

from collections.abc import Sequence

from torch import Tensor, nn
from transformers import PreTrainedModel

from headfuse.gating.controllers import Controller
from headfuse.gating.gates import Gates
from headfuse.gating.merge import Gated
from headfuse.training.objectives import Losses, Objective


class GatedObjective(nn.Module):
    """Draws the gates of a step, hands every layer its own, and adds the controller's penalty to the loss.

    All of a step's micro-batches see the same gates; the paper's code draws anew for each. Gates
    and multipliers are stored with the model, so that a resumed run has them.
    """

    def __init__(
        self, base: Objective, gates: Gates, controller: Controller, layers: Sequence[Sequence[Gated]]
    ) -> None:
        """`layers` has the gated parts of every layer."""
        super().__init__()
        self.base, self.gates, self.controller = base, gates, controller
        self.layers = tuple(map(tuple, layers))

    def forward(self, model: PreTrainedModel, tokens: Tensor) -> Losses:
        """The loss with the penalty; logs how sparse the gates are and should be, their mean, and how many are off."""
        drawn = self.gates()
        for parts, values in zip(self.layers, drawn.values, strict=True):
            for part in parts:
                part.gates = values
        losses = self.base(model, tokens)
        penalty = self.controller.penalty(drawn.sparsity)
        values = drawn.values.detach()
        logged = {
            "penalty": penalty.detach(),
            "sparsity": drawn.sparsity.detach(),
            "target": self.gates.target.clone(),
            "mean_gate": values.mean(),
            "share_off": (values == 0).float().mean(),
        }
        for multipliers in self.controller.multipliers():
            logged |= {f"multiplier_{index + 1}": value for index, value in enumerate(multipliers.detach().unbind())}
        return Losses(losses.total + penalty, losses.logged | logged)
