"""Where and how precisely to compute."""

from dataclasses import dataclass

import torch

from headfuse.errors import ConfigError
from headfuse.precision import Precision, best_precision


@dataclass(frozen=True)
class Placement:
    """Where and how precisely to compute; None chooses by the hardware."""

    device: str | None = None
    precision: Precision | None = None

    def resolve(self) -> tuple[torch.device, Precision]:
        """The device and the precision to use."""
        wanted = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(wanted)
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:  # unknown name, or no such hardware
            raise ConfigError(
                f"wanted a device of this machine, got {wanted!r}; use cpu, or cuda with a GPU"
            ) from error
        return device, self.precision or best_precision(device)
