"""`headfuse convert`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headfuse.cli.budget import check_one_budget
from headfuse.cli.options import (
    Budget,
    Captured,
    Compiled,
    Criterion,
    Data,
    Deterministic,
    Device,
    Item,
    Json,
    LmWeight,
    MicroRows,
    Model,
    PrecisionOption,
    Rate,
    Recompute,
    Repeat,
    RowLength,
    Rows,
    SaveEvery,
    Seed,
    Target,
    TensorBoard,
    Tokens,
    TrainingTokens,
    Update,
    Wandb,
)
from headfuse.cli.readers import TRAINED, check_read
from headfuse.cli.recipe import Recipe
from headfuse.cli.training import training_options
from headfuse.cli.values import counted, show
from headfuse.errors import ConfigError

if TYPE_CHECKING:
    from headfuse.conversion import Settings
    from headfuse.learning.options import Learning
    from headfuse.pruning import Pruning
    from headfuse.training.options import TrainingOptions


def convert(
    context: typer.Context,
    model: Model,
    out: Annotated[Path, typer.Argument(help="The folder to create.")],
    *,
    recipe: Recipe = None,  # noqa: ARG001  it fills the options below
    method: Annotated[
        str,
        typer.Option(
            help="closed-form, procrustes or mean-pool; dha: closed-form, then trained; align: rotated, then pruned by "
            "gates to a stock checkpoint."
        ),
    ] = "closed-form",
    target: Annotated[
        Target | None, typer.Option(help="dha: decoupled heads (default); gqa: a stock checkpoint (align's default).")
    ] = None,
    kv: Annotated[str, typer.Option(help="Cache to keep: 25%, 4x (four times less) or 0.25.")] = "25%",
    key_heads: Annotated[int | None, typer.Option(help="Key heads per layer, instead of --kv.")] = None,
    value_heads: Annotated[int | None, typer.Option(help="Value heads per layer, instead of --kv.")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="Key heads and as many value heads per layer.")] = None,
    budget: Annotated[Budget, typer.Option(help="The same heads in every layer, or a knapsack.")] = Budget.uniform,
    calibration: Annotated[
        str | None, typer.Option(help=".txt, .jsonl, .parquet, token .npy/.npz, Hub data set; default: built-in text.")
    ] = None,
    calibration_tokens: Tokens = "65536",
    length: Annotated[
        int | None, typer.Option(help="Tokens per calibration row; default: 1024, or the model's positions if fewer.")
    ] = None,
    refit: Annotated[bool, typer.Option(help="Regress every layer onto the original's output.")] = True,
    refit_steps: Annotated[int, typer.Option(help="Steps of 2048 tokens per layer.", min=1)] = 240,
    criterion: Annotated[Criterion, typer.Option(help="procrustes: squared distance or cosine.")] = Criterion.dist,
    group_on: Annotated[Item, typer.Option(help="procrustes, target gqa: what decides the groups.")] = Item.values,
    restore_norm: Annotated[bool, typer.Option(help="Scale pooled heads to their members' energy.")] = False,
    data: Data = None,
    tokens: TrainingTokens = "1M",
    init: Annotated[
        str | None,
        typer.Option(
            help="dha: the sharing method to start from (closed-form); delta: fuse the original heads, as the paper; "
            "aligned: fuse them in the closed form's groups, aligned first. align: mean-pool of rotated heads, or "
            "closed-form."
        ),
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="align: the model to distil from; default: the original.")] = None,
    search_share: Annotated[
        float | None, typer.Option(help="dha: share of the tokens for the search; default 0.024 with delta.")
    ] = None,
    fusion_share: Annotated[
        float | None,
        typer.Option(help="dha: share of the tokens for the fusion; default 0.076 with delta, 0.25 with aligned."),
    ] = None,
    lm_weight: LmWeight = 0.0,
    rate: Rate = None,
    update: Annotated[Update, typer.Option(help="dha, align: how matrices are moved.")] = Update.adamw,
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
    statistics: Annotated[
        Path | None, typer.Option(help="Folder to save the statistics in and reuse them from.")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="plan.json whose groups to use instead of a search.")] = None,
    seed: Seed = 0,
    device: Device = None,
    precision: PrecisionOption = None,
    allow_pickle: Annotated[bool, typer.Option(help="Accept pickled weights (tensors only, no code).")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace a model folder that stands at OUT.")] = False,
    as_json: Json = False,
) -> None:
    """Convert MODEL into OUT: statistics, plan, shared heads, refit, exactness checks; methods dha and align train."""
    from headfuse.calibration import Calibration
    from headfuse.conversion import Settings
    from headfuse.pipeline import convert as run
    from headfuse.placement import Placement
    from headfuse.planning.budget import parse_budget
    from headfuse.progress import for_terminal
    from headfuse.report.tables import conversion_table
    from headfuse.sharing.methods import SharingOptions
    from headfuse.sharing.refit import RefitOptions
    from headfuse.training.trackers import Trackers

    sharing, refitted = sharing_of(method, init)
    check_read(context, method, sharing)
    check_one_budget(context)
    if kv_heads is not None:
        if key_heads is not None or value_heads is not None:
            raise ConfigError("wanted --kv-heads or --key-heads and --value-heads, got both; leave one out")
        key_heads = value_heads = kv_heads
    settings = Settings(
        method=sharing,
        target=target.value if target is not None else "gqa" if method == "align" else "dha",
        share=parse_budget(kv),
        key_heads=key_heads,
        value_heads=value_heads,
        budget=budget.value,
        options=SharingOptions(criterion.value, group_on.value, restore_norm),
        refit=RefitOptions(steps=refit_steps) if refit and refitted else None,
        seed=seed,
    )
    learning = None
    if method in TRAINED:
        training = training_options(
            counted(tokens),
            rows,
            row_length,
            _rate(method, init, settings) if rate is None else rate,
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
        learning = _learning(method, init, training, (search_share, fusion_share), lm_weight)
    done = run(
        model,
        out,
        settings,
        Calibration(calibration or (_text_of(data) if learning else None), counted(calibration_tokens), length),
        learning=learning,
        teacher=teacher,
        data=data,
        statistics_folder=statistics,
        plan=plan,
        placement=Placement(device, precision),
        allow_pickle=allow_pickle,
        overwrite=overwrite,
        command=["headfuse", *sys.argv[1:]],
        trackers=Trackers(tensorboard, wandb),
        stages=for_terminal(),
    )
    show(done.as_dict(), conversion_table(done), as_json=as_json)


def _text_of(data: str | None) -> str | None:
    """Training data that calibrates too: none of prompts and answers."""
    from headfuse.text.examples import holds_examples

    return None if holds_examples(data) else data


def sharing_of(method: str, init: str | None) -> tuple[str, bool]:
    """The sharing method behind a method and its --init, and whether a refit may follow it."""
    from headfuse.checkpoints.describe import METHODS, SHARING
    from headfuse.learning.options import FUSED_STARTS
    from headfuse.pruning import sharing_method

    if method not in METHODS:
        raise ConfigError(f"wanted a method, got {method!r}; choose one of {', '.join(METHODS)}")
    if method == "align":
        return sharing_method(init or "mean-pool"), init == "closed-form"
    if method == "dha":
        if init is not None and init not in (starts := (*SHARING, *FUSED_STARTS)):
            raise ConfigError(f"wanted a start for method dha, got {init!r}; choose one of {', '.join(starts)}")
        return ("closed-form", False) if init in FUSED_STARTS else (init or "closed-form", True)
    return method, True


def _rate(method: str, init: str | None, settings: "Settings") -> float:
    """The learning rate that suits where a training starts."""
    from headfuse.learning.options import FUSED_STARTS, rate_for
    from headfuse.pruning import GATED_RATE

    return GATED_RATE if method == "align" else rate_for(settings, fused=init if init in FUSED_STARTS else None)


def _learning(
    method: str,
    init: str | None,
    training: "TrainingOptions",
    shares: tuple[float | None, float | None],
    lm_weight: float,
) -> "Learning | Pruning":
    """The trained stages of a method; `shares` are those of the search and of the fusion."""
    if method == "align":
        from headfuse.pruning import Pruning

        return Pruning(training=training, lm_weight=lm_weight)
    from headfuse.learning.options import learning_for

    return learning_for(init or "closed-form", training, *shares, lm_weight)
