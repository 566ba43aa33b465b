"""The exceptions a user can cause.

Every message is one line that says what was wanted, what was found and what to do; the command line prints
it and exits with status 2. Anything else that escapes is a bug of ours and keeps its traceback.

    HeadfuseError
      ├ ConfigError                     an option or a recipe that cannot be obeyed
      ├ UnsupportedArchitectureError    a model family or feature outside the adapters
      ├ CheckpointError                 a folder that is not a sound checkpoint
      ├ PlanError                       a budget or plan that the model's shape cannot meet
      ├ TextError                       calibration, training or evaluation text that cannot be used
      └ TrainingError                   a run that cannot go on
"""


class HeadfuseError(Exception):
    """Base of every error that a user can cause and repair."""


class ConfigError(HeadfuseError):
    """An option that cannot be obeyed: unknown name, impossible combination, bad unit."""


class UnsupportedArchitectureError(HeadfuseError):
    """A model family, or a feature of one, that no adapter covers."""


class CheckpointError(HeadfuseError):
    """A checkpoint folder that is missing, incomplete, corrupt or contradicts itself."""


class PlanError(HeadfuseError):
    """A budget or head plan that the model's shape cannot meet."""


class TextError(HeadfuseError):
    """Text that cannot be read, or that is too short for what was asked."""


class TrainingError(HeadfuseError):
    """A training run that cannot go on: its loss is not finite."""
