"""Gates with an L0 norm: one number in [0, 1] for every key/value head of every layer, all drawn together.

A gate at 1 leaves a head alone, at 0 its group's shared head stands for it (`gating.merge`). The logit of the paper's
code is `a`, which lives around 2e-3 and moves by 1e-5 a step; here it is `l = a / (alpha T)`, around 6, in fp32: the
same gates, bounds and speed, in numbers that rounding leaves alone (papers/align.md 1.10, pitfall 10).
`M` counts gates: layers times heads, layer by layer.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

# Keep probabilities stay away from 0 and 1 by this.
MARGIN = 1e-6
# The scale and the temperature of the paper's code, which only its own parametrisation shows.
ALPHA, TEMPERATURE = 1e-3, 1 / 3


@dataclass(frozen=True)
class HardConcrete:
    """How a logit becomes a gate: `clip(stretch * (sigmoid((noise + logit) / temperature) - 1/2) + 1/2, 0, 1)`.

    The noise is `logit u` with u uniform on `noise`. A gate is kept with probability `sigmoid(logit + keep_shift)`,
    which is what its L0 norm counts. Logits start at N(start, spread^2) and belong in `[-wall, wall]`. `rate` is the
    learning rate that the distribution's authors give a logit. With `straight_through` the clip passes gradients,
    themselves clipped to [-1, 1].
    """

    temperature: float
    stretch: float
    noise: tuple[float, float]
    keep_shift: float
    start: float
    spread: float
    wall: float
    rate: float
    straight_through: bool


# The paper's code, in our logits. AdamW takes the same steps but where a gradient is below its epsilon of 1e-8, which
# in `a` it would have to be below 3e-12 for: at the walls, where gates do not move anyway.
OFFICIAL = HardConcrete(
    temperature=1.0,
    stretch=1.005,
    noise=(0.4, 0.6),
    keep_shift=TEMPERATURE * math.log(0.995 / 0.005),
    start=6.0,
    spread=(ALPHA / 10) / (ALPHA * TEMPERATURE),
    wall=10.0,
    rate=1e-5 / (ALPHA * TEMPERATURE),
    straight_through=True,
)
# The usual hard concrete (arXiv 1712.01312), with the numbers of LLM-Shearing (arXiv 2310.06694).
CLASSICAL = HardConcrete(
    temperature=2 / 3,
    stretch=1.2,
    noise=(0.0, 1.0),
    keep_shift=2 / 3 * math.log(11),
    start=5.0,
    spread=0.01,
    wall=math.log(100),
    rate=1.0,
    straight_through=False,
)
DISTRIBUTIONS = {"official": OFFICIAL, "classical": CLASSICAL}


class _StraightThrough(torch.autograd.Function):
    """The clip to [0, 1], whose gradient is the incoming one clipped to [-1, 1]."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:  # noqa: ARG004  the signature of torch
        return value.clamp(0.0, 1.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ARG004
        return gradients[0].clamp(-1.0, 1.0)


def sample(logits: Float[Tensor, " M"], noise: Float[Tensor, " M"], kind: HardConcrete) -> Float[Tensor, " M"]:
    """The gates of some logits under some noise."""
    stretched = kind.stretch * (torch.sigmoid((logits + noise) / kind.temperature) - 0.5) + 0.5
    if not kind.straight_through:
        return stretched.clamp(0.0, 1.0)
    clipped = _StraightThrough.apply(stretched)
    assert isinstance(clipped, Tensor)
    return clipped


def keep_probability(logits: Float[Tensor, " M"], kind: HardConcrete) -> Float[Tensor, " M"]:
    """The probability that a gate is not 0, as the L0 norm counts it."""
    return torch.sigmoid(logits + kind.keep_shift).clamp(MARGIN, 1 - MARGIN)


def sparsity(logits: Float[Tensor, " M"], kind: HardConcrete) -> Float[Tensor, ""]:
    """The expected share of gates that are 0."""
    return 1 - keep_probability(logits, kind).mean()


def noise_of(count: int, kind: HardConcrete, *, seed: int, step: int) -> Float32[Tensor, " count"]:
    """`logit u` of every gate: a function of the seed and the step alone, on the CPU, so the same on every device."""
    # Hashed: neighbouring seeds must not be each other's steps.
    mixed = int.from_bytes(hashlib.sha256(f"gates {seed} {step}".encode()).digest()[:7], "big")
    low, high = kind.noise
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(mixed))
    return torch.logit(low + (high - low) * uniform, eps=MARGIN)


class DrawnGates(NamedTuple):
    """The gates of a step by layer, and the expected share of them that are 0; both with gradients."""

    values: Float[Tensor, "L n"]
    sparsity: Float[Tensor, ""]


class Gates(nn.Module):
    """The logits of all gates, and what a step sets before its first forward pass.

    `noise`, `allowed` (0 closes a gate whatever its logit), `target` and `pressure` (0 switches the penalty off) are
    filled in place, so that a forward pass is the same operations on the same tensors in every step.
    """

    logits: nn.Parameter
    noise: Tensor
    allowed: Tensor
    target: Tensor
    pressure: Tensor

    def __init__(self, layers: int, heads: int, kind: HardConcrete, *, generator: torch.Generator) -> None:
        super().__init__()
        self.shape, self.kind = (layers, heads), kind
        count = layers * heads
        self.logits = nn.Parameter(kind.start + kind.spread * torch.randn(count, generator=generator))
        fields = {"noise": torch.zeros(count), "allowed": torch.ones(count)}
        fields |= {"target": torch.zeros(()), "pressure": torch.ones(())}
        for name, value in fields.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self) -> DrawnGates:
        """Draw the gates of the step."""
        assert self.logits.dtype == torch.float32, "the logits were cast down with the model"
        values = sample(self.logits, self.noise, self.kind).view(self.shape)
        return DrawnGates(self.allowed.view(self.shape) * values, sparsity(self.logits, self.kind))
