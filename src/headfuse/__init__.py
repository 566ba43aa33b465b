"""Turn a transformer checkpoint with many key/value heads into one with few.

The public API, imported on first use: `import headfuse` loads neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headfuse.calibration import Calibration
    from headfuse.checkpoints.describe import Description
    from headfuse.checkpoints.registry import adapter_for
    from headfuse.checkpoints.source import locate
    from headfuse.conversion import Settings
    from headfuse.errors import (
        CheckpointError,
        ConfigError,
        HeadfuseError,
        PlanError,
        TextError,
        TrainingError,
        UnsupportedArchitectureError,
    )
    from headfuse.evaluation.report import EvaluationReport
    from headfuse.evaluation.run import evaluate
    from headfuse.healing import Healing, heal
    from headfuse.learning.options import Learning
    from headfuse.pipeline import Conversion, convert
    from headfuse.placement import Placement
    from headfuse.planning.budget import parse_budget
    from headfuse.planning.plan import HeadPlan, LayerPlan
    from headfuse.pruning import Pruning
    from headfuse.sharing.methods import SharingOptions
    from headfuse.sharing.refit import RefitOptions
    from headfuse.training.options import TrainingOptions

__version__ = "0.1.0"

_MODULES = {
    "calibration": ("Calibration",),
    "checkpoints.describe": ("Description",),
    "checkpoints.registry": ("adapter_for",),
    "checkpoints.source": ("locate",),
    "conversion": ("Settings",),
    "errors": (
        "CheckpointError",
        "ConfigError",
        "HeadfuseError",
        "PlanError",
        "TextError",
        "TrainingError",
        "UnsupportedArchitectureError",
    ),
    "evaluation.report": ("EvaluationReport",),
    "evaluation.run": ("evaluate",),
    "healing": ("Healing", "heal"),
    "learning.options": ("Learning",),
    "pipeline": ("Conversion", "convert"),
    "placement": ("Placement",),
    "planning.budget": ("parse_budget",),
    "planning.plan": ("HeadPlan", "LayerPlan"),
    "pruning": ("Pruning",),
    "sharing.methods": ("SharingOptions",),
    "sharing.refit": ("RefitOptions",),
    "training.options": ("TrainingOptions",),
}
_HOMES = {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}

__all__ = [
    "Calibration",
    "CheckpointError",
    "ConfigError",
    "Conversion",
    "Description",
    "EvaluationReport",
    "HeadPlan",
    "HeadfuseError",
    "Healing",
    "LayerPlan",
    "Learning",
    "Placement",
    "PlanError",
    "Pruning",
    "RefitOptions",
    "Settings",
    "SharingOptions",
    "TextError",
    "TrainingError",
    "TrainingOptions",
    "UnsupportedArchitectureError",
    "__version__",
    "adapter_for",
    "convert",
    "evaluate",
    "heal",
    "inspect",
    "locate",
    "parse_budget",
]


def inspect(model: str, *, allow_pickle: bool = False) -> "Description":
    """Describe a model (a folder, a Hub id, `demo` or `smollm2`) without loading a weight."""
    from headfuse.checkpoints.describe import describe
    from headfuse.checkpoints.source import locate

    return describe(locate(model, allow_pickle=allow_pickle))


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
