"""Model code beside the weights: `trust_remote_code=True` then loads a decoupled checkpoint without headfuse."""

import shutil
from pathlib import Path
from typing import Any

from headfuse.errors import UnsupportedArchitectureError
from headfuse.models.dha import DHA_CLASSES

SHARED_FILES = ("decoupling.py", "decoupled_attention.py")


def export_code(family: str, folder: Path) -> dict[str, Any]:
    """Copy the code of a decoupled family into `folder`; the entries that config.json needs to find it.

    The files import each other as siblings here and there, so they are copied unchanged; transformers follows the
    relative imports of the first.
    """
    if family not in DHA_CLASSES:
        raise UnsupportedArchitectureError(
            f"{family}: wanted a family with a decoupled class, got none; use one of {', '.join(DHA_CLASSES)}"
        )
    source, module = Path(__file__).parent, f"modeling_dha_{family}"
    shutil.copyfile(source / f"{family}.py", folder / f"{module}.py")
    for name in SHARED_FILES:
        shutil.copyfile(source / name, folder / name)
    classes = DHA_CLASSES[family]
    return {
        "architectures": [classes.model.__name__],
        "auto_map": {
            "AutoConfig": f"{module}.{classes.config.__name__}",
            "AutoModelForCausalLM": f"{module}.{classes.model.__name__}",
        },
    }
