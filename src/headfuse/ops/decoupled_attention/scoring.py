"""What turns products of queries and keys into scores, and which keys a query sees."""

from dataclasses import dataclass

from headfuse.errors import ConfigError


@dataclass(frozen=True)
class Scoring:
    """Scores are `cap * tanh(scale * q.k / cap)`; a query sees itself and the `window - 1` keys before it.

    `scale` None is `head_dim ** -0.5`; `softcap` None leaves the scores as they are; `window` None is all keys.
    """

    scale: float | None = None
    softcap: float | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("softcap", self.softcap), ("window", self.window)):
            if value is not None and value <= 0:
                raise ConfigError(f"{name}: wanted more than 0, got {value}; leave it out for none")

    def scale_for(self, head_dim: int) -> float:
        """The factor of `q.k`."""
        return head_dim**-0.5 if self.scale is None else self.scale


PLAIN = Scoring()
