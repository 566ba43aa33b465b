"""How long and how fast to train: the numbers of one training run."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from headfuse.errors import ConfigError

Update = Literal["adamw", "muon"]

STEPS = 128
LARGEST_STEP = 32_768


@dataclass(frozen=True)
class TrainingOptions:
    """One run: `tokens` in steps of `rows x length`, the learning rate, and what makes it fit.

    `rate` is the peak learning rate of the model's weights, reached after `warmup` of all steps and left by a cosine
    for `final` of it; the default did best behind a refit on the 30M reference (LOG.md). `update` "muon" orthogonalises
    the steps of the blocks' matrices; embeddings, biases and gains always follow AdamW. `micro_rows` rows are in memory
    at once on each device (None: all of them). `save_every` steps a checkpoint is written, if there is a run folder; 0
    writes none. `compiled` compiles the blocks and the loss; `captured` replays a step as one CUDA graph, which small
    models gain most from (one process on a GPU). `deterministic` computes the same bits in every run on a GPU too, for
    some of the speed.
    """

    tokens: int = 1_000_000
    rows: int = 16
    length: int = 512
    rate: float = 2e-4
    warmup: float = 0.05
    final: float = 0.1
    update: Update = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip: float = 1.0
    micro_rows: int | None = None
    repeat: bool = False
    compiled: bool = False
    captured: bool = False
    deterministic: bool = False
    checkpoint_activations: bool = False
    save_every: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what no run can obey."""
        for name in ("rows", "length", "rate"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"wanted {name} above zero, got {getattr(self, name)}; choose a larger one")
        if self.tokens < self.rows * self.length:
            raise ConfigError(
                f"wanted at least one step of {self.rows} x {self.length} tokens, got a budget of {self.tokens}; "
                "raise the budget or take fewer rows"
            )
        for name in ("warmup", "final"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"wanted {name} from 0 to 1, got {getattr(self, name)}; choose a share")
        for name in ("weight_decay", "clip", "save_every"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"wanted {name} of at least zero, got {getattr(self, name)}; choose a larger one")
        if self.micro_rows is not None and (self.micro_rows < 1 or self.rows % self.micro_rows):
            raise ConfigError(
                f"wanted micro_rows to divide {self.rows} rows, got {self.micro_rows}; choose a divisor of the rows"
            )

    @property
    def step_tokens(self) -> int:
        """Tokens that one step predicts."""
        return self.rows * self.length

    @property
    def steps(self) -> int:
        """Whole steps within the budget."""
        return self.tokens // self.step_tokens

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"betas": list(self.betas)}


def rows_for(tokens: int, length: int, world: int = 1) -> int:
    """Rows of a step that fit a budget and that `world` processes share evenly: about 128 steps, of at most 32k tokens.

    Small budgets need steps more than they need large ones; large ones gain from a batch that keeps a GPU busy.
    """
    rows = min(tokens // STEPS, LARGEST_STEP) // length
    return -(-(1 << max(0, rows.bit_length() - 1)) // world) * world


def rate_factor(step: int, steps: int, *, warmup: float, final: float) -> float:
    """The learning rate of `step`, relative to its peak: linear up over `warmup * steps`, then a cosine to `final`."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    share = (step - rising) / max(1, steps - rising)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * share))
