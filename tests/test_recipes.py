"""Every recipe is a command line that parses."""

import re
from pathlib import Path

import pytest
from typer.main import get_command

from headfuse.cli import app
from headfuse.cli.budget import check_one_budget
from headfuse.cli.convert import sharing_of
from headfuse.cli.readers import READERS, check_read
from headfuse.errors import ConfigError

FOLDER = Path(__file__).parents[1] / "recipes"
HEALING = [FOLDER / "teacher-sft.yaml"]  # recipes of `heal`; all others are of `convert`
RECIPES = sorted(set(FOLDER.glob("*.yaml")) - set(HEALING))


def context(recipe, *arguments, command="convert"):
    found = get_command(app).commands[command]
    return found.make_context(command, ["MODEL", "OUT", "--recipe", str(recipe), *arguments])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_of_ours_parses_and_the_command_line_wins(recipe):
    assert context(recipe).params["kv"] == "25%"
    assert context(recipe, "--kv", "50%").params["kv"] == "50%"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_of_ours_gives_only_what_its_method_reads(recipe):
    found = context(recipe)
    method = found.params["method"]
    sharing, _ = sharing_of(method, found.params["init"])
    check_read(found, method, sharing)


def test_every_option_that_methods_read_is_one_of_convert(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("{}")
    assert context(recipe).params.keys() > READERS.keys()


@pytest.mark.parametrize("recipe", HEALING, ids=lambda path: path.stem)
def test_a_recipe_of_healing_parses_and_the_command_line_wins(recipe):
    assert context(recipe, command="heal").params["rate"] == 1e-5
    assert context(recipe, "--rate", "1e-4", command="heal").params["rate"] == 1e-4


@pytest.mark.parametrize("kept", [("--key-heads", "2"), ("--plan", "plan.json")], ids=str)
def test_what_overrides_the_budget_of_a_recipe_stands_on_the_command_line(tmp_path, kept):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("kv: 25%\n")
    check_one_budget(context(recipe, *kept))
    recipe.write_text(f"{kept[0].removeprefix('--')}: {kept[1]}\n")
    with pytest.raises(ConfigError, match=f"wanted --kv or {kept[0]}, got both"):
        check_one_budget(context(recipe, "--kv", "25%"))


def test_values_have_the_types_of_the_options(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("refit: false\ntarget: gqa\nrate: 1e-3\nrow-length: 64\ntokens: 206k\n")
    found = context(recipe).params
    assert (found["refit"], found["target"].value, found["rate"], found["row_length"]) == (False, "gqa", 1e-3, 64)
    assert found["tokens"] == "206k"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("kvv: 25%", "did you mean 'kv'"),
        ("zzzzzz: 1", "see --help"),
        ("- kv", "wanted options and their values, got list"),
        ("kv: [", "wanted a recipe, got"),
        ("recipe: other.yaml", "no option 'recipe'"),
        ("target: mha", "r.yaml: Invalid value for '--target': 'mha' is not one of 'gqa', 'dha'"),
        ("row-length: 1", "r.yaml: Invalid value for '--row-length'"),
    ],
)
def test_what_is_no_recipe_is_one_line(tmp_path, content, message):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(content)
    with pytest.raises(ConfigError, match=re.escape(message)):
        context(recipe)


def test_an_absent_recipe_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml: wanted a recipe"):
        context(tmp_path / "absent.yaml")
