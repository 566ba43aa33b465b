"""`headfuse generate` and `headfuse bench`: a model at work."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from headfuse.cli.options import Attention, Compiled, Device, Json, Model, PrecisionOption, Seed
from headfuse.cli.values import counted, show
from headfuse.errors import ConfigError


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
    show({"prompt": prompt, "text": text}, prompt + text, as_json=as_json)


def bench(
    model: Model,
    *,
    against: Annotated[str | None, typer.Option(help="A model to compare with, usually the original.")] = None,
    context: Annotated[
        str | None,
        typer.Option(help="Tokens in the cache, by commas: 4k,32k; default: 4k, or the model's positions if fewer."),
    ] = None,
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
    if save is not None and save.is_dir():
        raise ConfigError(f"{save}: wanted a file to write, got a folder; name a file, {save / 'bench.json'} say")
    found = benchmark(
        model,
        against=against,
        load=Load(
            contexts=() if context is None else tuple(counted(each) for each in context.split(",")),
            batches=tuple(counted(each, "rows") for each in batch.split(",")),
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
    show(found.as_dict(), benchmark_table(found), as_json=as_json)
