"""A tiny model, a text, and the command line in this process."""

import shutil
import sys

import pytest
import torch

from command_line import Outcome
from headfuse import cli
from pico import pico
from tiny_tokenizer import VOCABULARY, tiny_tokenizer

# The same precision on every machine, and no refit unless a test is about it: later options win.
TINY = ("--calibration-tokens", "256", "--length", "32", "--refit-steps", "3", "--no-refit", "--precision", "fp32")


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory):
    """The model to convert (fp32, with tokenizer) and a text, made once."""
    folder = tmp_path_factory.mktemp("cli")
    pico("llama", vocab_size=VOCABULARY, bos_token_id=0).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    words = ["the", "cat", "that", "the", "hen", "met", "then", "went", "there", "with", "the", "other", "one"]
    order = torch.randint(len(words), (600,), generator=torch.Generator().manual_seed(0)).tolist()
    (folder / "text.txt").write_text(
        "\n\n".join(" ".join(words[i] for i in order[n : n + 60]) for n in range(0, 600, 60))
    )
    return folder


@pytest.fixture
def model(shared_folder):
    return shared_folder / "model"


@pytest.fixture
def text(shared_folder):
    return shared_folder / "text.txt"


@pytest.fixture
def damaged(model, tmp_path):
    """A copy of the model to damage."""
    return shutil.copytree(model, tmp_path / "damaged")


@pytest.fixture
def run(capsys, monkeypatch):
    """`headfuse ARGUMENTS` in this process: exit status, standard output, standard error."""
    hook = sys.excepthook

    def command(*arguments) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["headfuse", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        return Outcome(code, *capsys.readouterr())

    yield command
    sys.excepthook = hook  # typer sets its own


@pytest.fixture
def convert(run, model, text, tmp_path):
    """Convert the tiny model to `tmp_path/out` with tiny settings; more options come last and win."""

    def command(*options, source=model, out=tmp_path / "out") -> Outcome:
        return run("convert", source, out, "--calibration", text, *TINY, *options)

    return command
