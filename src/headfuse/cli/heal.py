"""`headfuse heal`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from headfuse.cli.options import (
    Captured,
    Compiled,
    Data,
    Deterministic,
    Device,
    Json,
    LmWeight,
    MicroRows,
    PrecisionOption,
    Rate,
    Recompute,
    Repeat,
    RowLength,
    Rows,
    SaveEvery,
    Seed,
    TensorBoard,
    TrainingTokens,
    Update,
    Wandb,
)
from headfuse.cli.recipe import Recipe
from headfuse.cli.training import training_options
from headfuse.cli.values import counted, show


def heal(
    converted: Annotated[str, typer.Argument(help="The folder of a conversion.")],
    out: Annotated[Path, typer.Argument(help="The folder to create.")],
    *,
    recipe: Recipe = None,  # noqa: ARG001  it fills the options below
    teacher: Annotated[
        str | None, typer.Option(help="The original model, to distil from; default: next-token loss alone.")
    ] = None,
    data: Data = None,
    tokens: TrainingTokens = "1M",
    lm_weight: LmWeight = 0.0,
    teacher_top_k: Annotated[
        int | None, typer.Option(help="Keep the teacher's likeliest tokens on disk: it need not fit beside.", min=1)
    ] = None,
    rate: Rate = None,
    update: Annotated[Update, typer.Option(help="How matrices are moved.")] = Update.adamw,
    rows: Rows = None,
    row_length: RowLength = 512,
    micro_rows: MicroRows = None,
    repeat: Repeat = False,
    compiled: Compiled = False,
    captured: Captured = False,
    deterministic: Deterministic = False,
    recompute: Recompute = False,
    save_every: SaveEvery = 200,
    tensorboard: TensorBoard = None,
    wandb: Wandb = None,
    run: Annotated[Path | None, typer.Option(help="Folder of the run in progress; default: OUT.run.")] = None,
    seed: Seed = 0,
    device: Device = None,
    precision: PrecisionOption = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a model folder that stands at OUT.")] = False,
    as_json: Json = False,
) -> None:
    """Train CONVERTED against its original into OUT; killed, the same command resumes. Many GPUs: under torchrun.

    With prompts and answers as --data and no --teacher, any model is fine-tuned on the answers.
    """
    from headfuse.healing import HEALING
    from headfuse.healing import heal as work
    from headfuse.placement import Placement
    from headfuse.progress import for_terminal
    from headfuse.report.tables import healing_table
    from headfuse.training.trackers import Trackers

    options = training_options(
        counted(tokens),
        rows,
        row_length,
        HEALING.rate if rate is None else rate,
        update,
        micro_rows=micro_rows,
        repeat=repeat,
        compiled=compiled,
        captured=captured,
        deterministic=deterministic,
        checkpoint_activations=recompute,
        save_every=save_every,
        seed=seed,
    )
    done = work(
        converted,
        out,
        teacher=teacher,
        data=data,
        options=options,
        lm_weight=lm_weight,
        teacher_top_k=teacher_top_k,
        run_folder=run,
        placement=Placement(device, precision),
        overwrite=overwrite,
        command=["headfuse", *sys.argv[1:]],
        trackers=Trackers(tensorboard, wandb),
        stages=for_terminal(),
    )
    if done is not None:
        show(done.as_dict(), healing_table(done), as_json=as_json)
