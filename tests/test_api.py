"""The public API: these names, each of them real, and none of them paid for before it is used."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import headfuse

NAMES = [
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


def test_the_public_names_are_these():
    assert headfuse.__all__ == NAMES
    assert dir(headfuse) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_resolves_and_says_what_it_is(name):
    value = getattr(headfuse, name)
    assert isinstance(value, str) or value.__doc__
    assert getattr(value, "__name__", name) == name


def test_a_star_import_gives_all_names():
    scope = {}
    exec("from headfuse import *", scope)
    assert set(NAMES) <= set(scope)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'fuse'"):
        _ = headfuse.fuse
    with pytest.raises(ImportError, match="fuse"):
        exec("from headfuse import fuse")


def test_every_public_error_is_a_headfuse_error():
    for name in NAMES:
        if name.endswith("Error"):
            assert issubclass(getattr(headfuse, name), headfuse.HeadfuseError)


def test_the_version_is_the_package_s():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))
    assert headfuse.__version__ == project["project"]["version"]


def test_importing_the_package_or_its_command_line_loads_no_framework():
    code = "import sys, headfuse, headfuse.cli; sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_model_can_be_inspected():
    assert headfuse.inspect("demo").key_heads
