"""Parameter groups and the optimizers that move them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from headfuse.training.options import TrainingOptions, Update

# Scales an orthogonalised step to the size of AdamW's, so that one learning rate serves both.
MUON_SCALE = "match_rms_adamw"


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with a peak learning rate of their own.

    `ascent` climbs the loss instead of descending it: Lagrange multipliers (arXiv 2406.06567, Eq 8). Weight decay
    spares what is not `decayed`.
    """

    name: str
    parameters: Sequence[nn.Parameter]
    rate: float
    update: Update = "adamw"
    ascent: bool = False
    decayed: bool = True


def model_groups(
    model: nn.Module, blocks: nn.Module, options: TrainingOptions, *, without: Iterable[nn.Parameter] = ()
) -> list[ParameterGroup]:
    """All parameters of a model but those `without`: under "muon" the blocks' matrices apart from the rest."""
    left_out = {id(parameter) for parameter in without}
    parameters = [p for p in model.parameters() if id(p) not in left_out]
    if options.update == "adamw":
        return [ParameterGroup("model", parameters, options.rate)]
    inside = {id(p) for p in blocks.parameters() if p.dim() == 2}
    return [
        ParameterGroup("matrices", [p for p in parameters if id(p) in inside], options.rate, "muon"),
        ParameterGroup("rest", [p for p in parameters if id(p) not in inside], options.rate),
    ]


def build_optimizers(groups: Sequence[ParameterGroup], options: TrainingOptions) -> list[torch.optim.Optimizer]:
    """One optimizer per way of updating; `set_rates` gives them their learning rates."""
    built: list[torch.optim.Optimizer] = []
    for update in ("adamw", "muon"):
        chosen = [
            {
                "params": list(group.parameters),
                "lr": group.rate,
                "peak": group.rate,
                "weight_decay": options.weight_decay if group.decayed else 0.0,
                "maximize": group.ascent,
            }
            for group in groups
            if group.update == update and group.parameters
        ]
        if not chosen:
            continue
        if update == "muon":
            for group in chosen:
                del group["maximize"]
            built.append(torch.optim.Muon(chosen, adjust_lr_fn=MUON_SCALE))
        else:
            fused = all(p.device.type == "cuda" for group in chosen for p in group["params"])
            built.append(torch.optim.AdamW(chosen, betas=options.betas, fused=fused))
    return built


def set_rates(optimizers: Sequence[torch.optim.Optimizer], factor: float) -> None:
    """Every group's learning rate as `factor` of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
