"""Write the tables of README.md and docs/ from benchmarks/results: `python benchmarks/tables.py [--check]`."""

import json
import math
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from attention.cases import SIZES
from headfuse.comparison import Result
from headfuse.demo import Demonstration
from headfuse.report.tables import demonstration_table, markdown
from headfuse.sharing.refit import RefitOptions

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *(ROOT / "docs" / name for name in ("dha.md", "align.md", "kernels.md")))
RESULTS = Path(__file__).parent / "results"

BUDGETS = ["0", "41k", "206k", "1.03M", "4M", "16M"]
REFIT_STEPS = RefitOptions().steps

Row = dict[str, Any]


def main() -> None:
    """Rewrite the marked parts of the pages, or with --check fail if they are stale."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fresh = render(text)
        if "--check" not in sys.argv:
            page.write_text(fresh, encoding="utf-8")
        elif fresh != text:
            sys.exit(f"{page.name}: not what benchmarks/results says; run python benchmarks/tables.py")


def render(text: str) -> str:
    """`text` with every part between `<!-- table NAME -->` and `<!-- end -->` made anew."""
    for name, (results, table) in TABLES.items():
        before, start, rest = text.partition(f"<!-- table {name} -->\n")
        if start:
            found = json.loads((RESULTS / results).read_text(encoding="utf-8"))
            rows = found["rows"] if "rows" in found else found["cases"]
            text = before + start + table(rows) + "\n" + rest[rest.index("<!-- end -->") :]
    return text


def reference(rows: Sequence[Row]) -> str:
    """Delta CE of the 30M model by way of converting and budget."""
    budgets = ["50%", "25%", "12.5%"]
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        if row["model"] == "reference" and row["kv"] in budgets:
            cells.setdefault(_way(row), {})[row["kv"]] = f"{row['delta_ce']:+.3f}"
    return markdown(
        ["cache left", *budgets], [[way, *(found.get(kv, "") for kv in budgets)] for way, found in cells.items()]
    )


def smollm2(rows: Sequence[Row]) -> str:
    """Perplexity and zero-shot accuracy of SmolLM2-135M by cut and way."""
    lines = []
    chosen = [row for row in rows if row["model"] == "smollm2"]
    tasks = list(dict.fromkeys(task for row in chosen for task in row.get("tasks", {})))
    order = {"100%": 0, "2/3": 1, "1/2": 2, "1/3": 3}
    for row in sorted(chosen, key=lambda row: (order[row["kv"]], -row["delta_ce"])):
        accuracies = [f"{row['tasks'][task]['accuracy']:.1%}" if task in row["tasks"] else "" for task in tasks]
        way = "original" if row["method"] == "original" else _way(row)
        text = row.get("calibration", "") if row.get("method") == "closed-form" else ""
        loss = [f"{math.exp(row['ce']):.1f}", f"{row['delta_ce']:+.3f}"]
        lines.append([row["kv"], _heads(row), way, text, *loss, *accuracies])
    names = ["cache left", "K + V heads", "way", "calibration", "perplexity", "delta CE"]
    return markdown([*names, *(task.split("/")[0] for task in tasks)], lines)


def _heads(row: Row) -> str:
    """Key and value heads of a layer, where all layers have the same."""
    pairs = set(zip(row.get("key_heads", []), row.get("value_heads", []), strict=True))
    if not pairs:
        return "all"
    return " + ".join(map(str, pairs.pop())) if len(pairs) == 1 else "by layer"


def demo(rows: Sequence[Row]) -> str:
    """What `headfuse demo` printed, from its --json output."""
    found = json.loads((RESULTS / "demo.json").read_text(encoding="utf-8"))
    shown = Demonstration(
        found["kv_bytes_per_token"],
        [Result(**row) for row in rows],
        found["prompt"],
        found["before"],
        found["after"],
    )
    return f"```\n{demonstration_table(shown)}\n```"


def _way(row: Row) -> str:
    way = f"{row['method']}{', norm restored' if row.get('restore_norm') else ''} -> {row['target']}"
    way += ", adaptive budget" * (row["budget"] == "adaptive") + ", **refit**" * row["refit"]
    chosen = row.get("refit_options", {})
    steps = chosen.get("steps", REFIT_STEPS)
    way += f" of {steps} steps" * (steps != REFIT_STEPS)
    # Rows from before each layer chose its own.
    return f"{way} at a rate of {chosen['rate']:g}" if "rate" in chosen else way


def tokens(rows: Sequence[Row], kv: str = "25%") -> str:
    """Delta CE at a cut by way and by tokens looked at, all stages together; mean and spread over seeds."""
    chosen = [row for row in rows if row["table"] == "main" and row["kv"] == kv]
    budgets = sorted({(row["tokens"], row["budget"]) for row in chosen})
    found: dict[str, dict[str, list[float]]] = {}
    for row in chosen:
        found.setdefault(_trained_way(row), {}).setdefault(row["budget"], []).append(row["delta_ce"])
    return markdown(
        ["tokens", *("conversion alone" if name == "0" else name for _, name in budgets)],
        [[way, *(_mean(cells.get(name, [])) for _, name in budgets)] for way, cells in found.items()],
    )


def ablation(rows: Sequence[Row]) -> str:
    """DHA as in the paper with one thing changed, at 25% and 1.03M tokens."""
    chosen = [row for row in rows if row["table"] in ("ablation", "grouping", "fusion-share")]
    return markdown(
        ["table", "variant", "delta CE"], [[row["table"], row["method"], f"{row['delta_ce']:+.3f}"] for row in chosen]
    )


def speed(rows: Sequence[Row]) -> str:
    """Tokens a second of a stage, and the share of the device's peak."""
    lines = []
    for row in rows:
        if row["table"] == "speed":
            (stage,) = row["stages"].values()
            how = " and ".join(name for name in ("captured", "compiled") if row[name])
            lines.append([row["method"], how, f"{stage['tokens_per_second']:,.0f}", f"{stage['mfu']:.0%}"])
    return markdown(["stage", "steps", "tokens/s", "MFU"], lines)


def arms(rows: Sequence[Row], kv: str = "25%") -> str:
    """Delta CE at a cut of the arms of alignment by start, without gates and with them; mean and spread over seeds."""
    found: dict[str, dict[tuple[str, bool], list[float]]] = {}
    for row in rows:
        if row["kv"] == kv:
            cells = found.setdefault(row["method"].removesuffix(" + gates"), {})
            cells.setdefault((row["budget"], row["gates"]), []).append(row["delta_ce"])
    columns = sorted(
        {column for cells in found.values() for column in cells}, key=lambda c: (BUDGETS.index(c[0]), c[1])
    )
    lines = [[way, *(_mean(cells.get(column, [])) for column in columns)] for way, cells in found.items()]
    lines.sort(key=lambda line: next(float(cell.split()[0]) for cell in line[1:] if cell))
    return markdown(["start", *(f"{budget}{', gates' * gates}" for budget, gates in columns)], lines)


def tasks(rows: Sequence[Row]) -> str:
    """Eight tasks after 9 -> 3 heads: of each start the rate that ended nearest to the teacher in training."""
    best: dict[tuple[str, int, str], Row] = {}
    for row in rows:
        key = (row["heads"], row["tokens"], row["method"])
        if key not in best or _late_kl(row) < _late_kl(best[key]):
            best[key] = row
    lines = []
    for (heads, count, way), row in sorted(best.items(), key=lambda item: (item[0][:2], -_share(item[1]))):
        trained = f"{count / 1e6:g}M" if count else ""
        closed = "" if row.get("gap_closed") is None else f"{row['gap_closed']:.0%}"
        likelihood = f"{row['tasks']['average']['nll']:.2f}"
        distance = f"{_late_kl(row):.3f}" if count else ""
        lines.append([heads, trained, way, f"{_share(row):.1%}", likelihood, closed, distance])
    names = ["heads", "tokens", "start", "right", "nats an answer", "of the gap", "KL on prompts"]
    return markdown(names, lines)


def _late_kl(row: Row) -> float:
    """Of prompts, over the last third of the steps; all arms read the same batches. Zero without training."""
    curves = [stage["curve"] for stage in row.get("stages", {}).values()]
    return statistics.fmean([point["kl"] for curve in curves for point in curve[-len(curve) // 3 :]] or [0.0])


def _share(row: Row) -> float:
    return row["tasks"]["average"]["share"]


def decoding(rows: Sequence[Row]) -> str:
    """Microseconds of a decoding step's attention and share of the copy rate, beside torch's by equal bytes."""
    columns = [("triton", counts) for counts in ("8 + 8", "6 + 10", "2 + 14")]
    columns += [("cudnn", "8 + 8"), ("flash", "8 + 8"), ("triton", "4 + 4"), ("triton", "2 + 6"), ("cudnn", "4 + 4")]
    columns += [("cudnn", "32 + 32")]
    found: dict[str, dict[tuple[str, str], str]] = {}
    for row in rows:
        plain = row["layout"] == "heads" and not row["page"] and not row["ragged"]
        if plain and row["head_dim"] == 128 and row["query_heads"] == 32:
            cells = found.setdefault(f"{row['batch']} x {row['context']}", {})
            counts = (row["backend"], f"{row['key_heads']} + {row['value_heads']}")
            cells.setdefault(counts, f"{row['microseconds']:.0f} ({row['copy_fraction']:.0%})")
    names = [f"{'' if backend == 'triton' else backend + ' '}{counts}" for backend, counts in columns]
    return markdown(
        ["rows x tokens", *names],
        [[size, *(cells.get(column, "") for column in columns)] for size, cells in found.items() if len(cells) > 1],
    )


def peers(rows: Sequence[Row]) -> str:
    """Microseconds of a decoding step's attention beside that of libraries, for the equal groups that they know."""
    backends = {"triton": "ours", "cudnn": "cuDNN", "flash": "Flash", "flashinfer": "FlashInfer"}
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        heads = f"{row['key_heads']} + {row['value_heads']}"
        if row["maps"] == "grouped":
            found.setdefault((f"{row['batch']} x {row['context']}", heads), {})[row["backend"]] = row["microseconds"]
    lines = []
    for (size, heads), cells in found.items():
        ours = cells["triton"]
        others = [f"{cells[name]:.0f} ({cells[name] / ours:.2f}x)" for name in backends if name != "triton"]
        lines.append([size, heads, f"{ours:.0f}", *others])
    return markdown(["rows x tokens", "heads", *backends.values()], lines)


def serving(rows: Sequence[Row]) -> str:
    """What `headfuse bench` measured."""
    lines = []
    for row in rows:
        lines.append([f"{row['batch']} x {row['context']}", row["model"]])
        if not row["fits"]:
            lines[-1] += ["does not fit", "", "", f"{row['cache_bytes'] / 1e9:.1f}", "", ""]
            continue
        attention = f"{row['attention_microseconds']:.0f} ({row['copy_fraction']:.0%})"
        speed = [f"{row['first_token_seconds']:.2f}", f"{row['tokens_per_second']:,.0f}", attention]
        lines[-1] += [*speed, *(f"{row[name] / 1e9:.1f}" for name in ("cache_bytes", "peak_bytes"))]
        lines[-1].append(str(row["largest_batch"]))
    names = ["rows x tokens", "model", "first token, s", "tokens/s", "attention, µs", "cache, GB", "peak, GB"]
    return markdown([*names, "most rows"], lines)


def caches(rows: Sequence[Row]) -> str:
    """The same for 6 + 10 heads by how the cache lies, and other shapes."""
    lines = []
    for row in rows:
        plain = row["layout"] == "heads" and not row["page"] and not row["ragged"]
        usual = row["head_dim"] == 128 and row["query_heads"] == 32 and (row["batch"], row["context"]) in SIZES
        if row["backend"] == "triton" and not (plain and usual):
            cache = "tokens" if row["layout"] == "tokens" else "heads"
            cache += f", pages of {row['page']}" if row["page"] else ""
            heads = f"{row['query_heads']} on {row['key_heads']} + {row['value_heads']} of {row['head_dim']}"
            size = f"{row['batch']} x {row['context']}{', ragged' if row['ragged'] else ''}"
            lines.append([size, heads, cache, f"{row['microseconds']:.0f}", f"{row['copy_fraction']:.0%}"])
    return markdown(["rows x tokens", "heads", "cache by", "µs", "of the copy rate"], lines)


def steps(rows: Sequence[Row]) -> str:
    """Milliseconds of a whole decoding step, and its speed-up over multi-head attention beside the roofline's."""
    names = {"mha": "32 + 32", "gqa": "8 + 8", "dha": "6 + 10"}
    sizes = list(dict.fromkeys((row["batch"], row["context"]) for row in rows))
    found: dict[tuple[str, str, bool], dict[tuple[int, int], str]] = {}
    for row in rows:
        cell = f"{row['microseconds'] / 1000:.1f}"
        if row["model"] != "mha":
            cell += f" ({row['speedup']:.2f}x of {row['roofline_speedup']:.2f}x)"
        found.setdefault((row["model"], row["attention"], row["compiled"]), {})[row["batch"], row["context"]] = cell
    return markdown(
        ["heads", "attention", *(f"{batch} x {context}" for batch, context in sizes)],
        [
            [names[model], f"{attention}{', compiled' * compiled}", *(cells.get(size, "") for size in sizes)]
            for (model, attention, compiled), cells in found.items()
        ],
    )


def products(rows: Sequence[Row]) -> str:
    """Microseconds of a product of few rows and a weight, and the rate at which it reads, beside cuBLAS."""
    found: dict[str, dict[tuple[int, str], str]] = {}
    for row in rows:
        cells = found.setdefault(f"{row['channels']} x {row['inputs']}", {})
        for way in ("ours", "cublas"):
            cells[row["rows"], way] = f"{row[way]['microseconds']:.1f} ({row[way]['gb_s'] / 1000:.2f})"
    columns = list(dict.fromkeys(column for cells in found.values() for column in cells))
    names = {"ours": "ours", "cublas": "cuBLAS"}
    return markdown(
        ["weight", *(f"{count} row{'s' * (count > 1)}, {names[way]}" for count, way in columns)],
        [[shape, *(cells.get(column, "") for column in columns)] for shape, cells in found.items()],
    )


def whole_rows(rows: Sequence[Row]) -> str:
    """Milliseconds of many queries a row, and the memory that it takes on the way, beside a gather for torch's."""
    backends = {"triton": "ours", "gather+cudnn": "gather + cuDNN", "gather+flash": "gather + Flash"}
    if any(row["backend"] == "select+cudnn" for row in rows):
        backends["select+cudnn"] = "selection + cuDNN"
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        heads = f"{row['query_heads']} on {row['key_heads']} + {row['value_heads']} of {row['head_dim']}"
        found.setdefault((f"{row['batch']} x {row['context']}", heads), {})[row["backend"]] = row
    lines = []
    for (size, heads), cells in found.items():
        ours, best = cells["triton"], min(cells[name]["microseconds"] for name in backends if name != "triton")
        times = [f"{cells[name]['microseconds'] / 1000:.2f}" for name in backends]
        memory = " / ".join(f"{cells[name]['peak_mb']:.0f}" for name in ("triton", "gather+cudnn"))
        speed = f"{best / ours['microseconds']:.2f}x"
        lines.append([size, heads, *times, speed, f"{ours['tflop_s']:.0f}", memory])
    names = [*backends.values(), "ours is", "TFLOP/s", "MB, ours / cuDNN"]
    return markdown(["rows x tokens", "heads", *names], lines)


def _trained_way(row: Row) -> str:
    return f"{row['method']}{', next-token loss' if row['lm_weight'] == 1 else ''}"


def _mean(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):+.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


TABLES = {
    "reference": ("training_free.json", reference),
    "smollm2": ("training_free.json", smollm2),
    "demo": ("demo.json", demo),
    "tokens": ("dha.json", tokens),
    "tokens at 50%": ("dha.json", partial(tokens, kv="50%")),
    "tokens at 12.5%": ("dha.json", partial(tokens, kv="12.5%")),
    "ablation": ("dha.json", ablation),
    "speed": ("dha.json", speed),
    "arms": ("align.json", arms),
    "arms at 50%": ("align.json", partial(arms, kv="50%")),
    "arms at 12.5%": ("align.json", partial(arms, kv="12.5%")),
    "tasks": ("align_tasks.json", tasks),
    "decoding": ("decode_attention.json", decoding),
    "peers": ("decode_peers.json", peers),
    "serving": ("serving.json", serving),
    "caches": ("decode_attention.json", caches),
    "steps": ("decode_step.json", steps),
    "products": ("skinny_product.json", products),
    "prompts": ("prefill_attention.json", whole_rows),
    "gradients": ("backward_attention.json", whole_rows),
}

if __name__ == "__main__":
    main()
