"""The repository itself: nothing in it belongs to one machine, and what the package needs travels with it."""

import os
import re
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "headfuse"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
DEMO = PACKAGE / "assets" / "demo-mha"
MAX_DEMO_BYTES = 12_000_000

# Hidden folders, and those that .gitignore names.
IGNORED = re.compile(r"\.(?!ci$).*|__pycache__|.*\.egg-info|dist|build|site|out.*")
OF_ONE_MACHINE = {
    "an absolute path": re.compile(r"(?<![\w.])/(?:work|root|opt|srv|mnt)/\w"),
    "a file address": re.compile("file" + "://"),
    "an address without a name": re.compile(r"https?://(?!127\.|0\.0\.0\.0)\d+\.\d+\.\d+\.\d+"),
    "a package index": re.compile(r"(?:index[-_]url|find-links|trusted-host)[= ]+(?!https://download\.pytorch\.org)"),
}


def texts() -> Iterator[tuple[Path, str]]:
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if not IGNORED.fullmatch(name)]
        for file in (Path(folder, name) for name in names):
            data = file.read_bytes()
            if b"\0" not in data:
                yield file.relative_to(ROOT), data.decode("utf-8", "replace")


@pytest.mark.parametrize("what", OF_ONE_MACHINE)
def test_no_file_holds_what_is_true_on_one_machine_only(what):
    found = [
        f"{file}: {match[0]!r}" for file, text in texts() if (match := OF_ONE_MACHINE[what].search(text)) is not None
    ]
    assert not found


def test_every_file_that_is_not_code_is_package_data():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["headfuse"]
    shipped = {file for pattern in patterns for file in PACKAGE.glob(pattern) if file.is_file()}
    others = {file for file in PACKAGE.rglob("*") if file.is_file() and file.suffix not in {".py", ".pyc"}}
    assert others <= shipped
    assert {PACKAGE / "py.typed", DEMO / "config.json", DEMO / "model.safetensors", DEMO / "tokenizer.json"} <= shipped


def test_the_demo_model_is_small():
    assert sum(file.stat().st_size for file in DEMO.rglob("*")) <= MAX_DEMO_BYTES


def test_every_dependency_has_a_tested_version_within_its_range():
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = (line.split("==") for line in lines if not line.startswith("#"))
    tested = {canonicalize_name(name): version for name, version in pins}
    project = PROJECT["project"]
    for line in project["dependencies"] + project["optional-dependencies"]["dev"]:
        wanted = Requirement(line)
        assert wanted.specifier.contains(tested[canonicalize_name(wanted.name)]), line


def test_the_licence_is_there():
    assert "Version 2.0, January 2004" in (ROOT / PROJECT["project"]["license-files"][0]).read_text("utf-8")


def test_tables_are_those_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    tables = import_module("tables")
    for page in tables.PAGES:
        text = page.read_text("utf-8")
        assert "<!-- table" in text
        assert tables.render(text) == text
