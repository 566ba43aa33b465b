"""Draw docs/figures/*.svg from benchmarks/results/dha.json and similarity.json: `python benchmarks/figures.py`.

The same results give the same files, to the byte.
"""

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
FIGURES = ROOT / "docs" / "figures"
WIDTH = 7.3  # inches: 700 pixels

INK, QUIET, FAINT = "#24292f", "#6e7781", "#d8dee4"
KEYS, VALUES = "#0072b2", "#d55e00"
OURS, GQA, DHA = "closed form + refit", "gqa mean-pool", "dha"
# Colours that stay apart under every common colour blindness (Okabe and Ito), and what a reader should call the way.
WAYS = {
    OURS: ("#0072b2", "o", "closed form + refit"),
    "closed form + long refit": ("#56b4e9", "s", "closed form + long refit"),
    "closed form": ("#6e7781", "v", "closed form"),
    "dha of aligned heads": ("#000000", "*", "DHA of aligned heads"),
    "dha from closed form": ("#cc79a7", "P", "DHA from closed form"),
    DHA: ("#009e73", "D", "DHA: search, fusion, healing"),
    "gqa procrustes": ("#b8860b", "^", "GQA, Procrustes"),
    GQA: ("#d55e00", "X", "GQA, mean-pool"),
}
CURVES = (GQA, DHA, OURS)
STYLE = {
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.framealpha": 1.0,
    "legend.edgecolor": "white",
    "lines.linewidth": 1.8,
    "svg.fonttype": "path",
    "svg.hashsalt": "headfuse",
}
LINEAR_BELOW = 0.03  # nats; the axis of a loss that may fall below 0 is linear up to here
SMOOTH = 5  # points of a thinned curve averaged; one batch is noise
MAIN_KV = "25%"

Row = dict[str, Any]


def main() -> None:
    """Draw all figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FIGURES)
    parser.add_argument("--format", default="svg", choices=["svg", "png"])
    options = parser.parse_args()
    mpl.use("Agg")
    options.out.mkdir(parents=True, exist_ok=True)
    for name, (results, draw) in DRAWINGS.items():
        found = json.loads((RESULTS / results).read_text(encoding="utf-8"))
        path = options.out / f"{name}.{options.format}"
        with mpl.rc_context(STYLE):
            figure = draw(found)
            metadata = {"Date": None} if options.format == "svg" else None
            figure.savefig(path, metadata=metadata, dpi=150)
            plt.close(figure)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


def tokens(results: dict[str, Any]) -> Figure:
    """Loss above the original against all tokens that a way looked at."""
    rows = main_rows(results["rows"])
    series = by_tokens(rows)
    figure, axes = plt.subplots(figsize=(WIDTH, 4.5), layout="constrained")
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=LINEAR_BELOW, linscale=0.8)
    for way in in_order(series):
        colour, marker, _ = WAYS[way]
        points = sorted(series[way].items())
        width = 2.6 if way == OURS else 1.6
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=6.5, linewidth=width)
    largest = max(max(points) for points in series.values())
    smallest = min(min(points) for points in series.values())
    left = smallest / 1.35
    axes.set_xlim(left, largest * (largest / left) ** 0.38)  # the names stand to the right
    axes.axhline(0, color=INK, linewidth=0.9)
    axes.text(left * 1.03, -0.0012, "the original model", color=QUIET, fontsize=8.5, va="top")
    ends = {way: max(points.items()) for way, points in series.items()}
    label_ends(axes, {way: end for way, end in ends.items() if end[0] == largest})
    for way, end in ends.items():
        if end[0] < largest:
            name_early(axes, way, end, line=len(series[way]) > 1)
    alone = [row for row in rows if row["tokens"] == 0 and row["method"] == OURS]
    saving(axes, alone[0]["calibration_tokens"], series)
    ticks = [0, 0.01, 0.03, 0.1, 0.3, 1, 3]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"+{y:g}" if y else "0"))
    axes.xaxis.set_major_locator(FixedLocator(sorted({row["tokens"] for row in rows if row["tokens"]})))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
    axes.set_xlabel("tokens looked at, all stages together (log scale)")
    axes.set_ylabel(f"CE above the original, nats\n(log scale above {LINEAR_BELOW:g}, linear below)")
    axes.set_title(f"30M reference at {MAIN_KV} of its cache, every way distilled from the original")
    return figure


def by_tokens(rows: Iterable[Row]) -> dict[str, dict[int, float]]:
    """Mean loss over seeds by way and tokens; the conversion alone stands at its calibration tokens."""
    found: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if counted := row["tokens"] or row["calibration_tokens"]:
            found.setdefault(row["method"], {}).setdefault(counted, []).append(row["delta_ce"])
    return {way: {x: statistics.mean(ys) for x, ys in points.items()} for way, points in found.items()}


def main_rows(rows: Iterable[Row]) -> list[Row]:
    """The main table at a quarter of the cache, distilled only."""
    chosen = [row for row in rows if row["table"] == "main" and row["kv"] == MAIN_KV and row["lm_weight"] == 0]
    return [row for row in chosen if row["method"] in WAYS]


def saving(axes: Axes, start: int, series: dict[str, dict[int, float]]) -> None:
    """An arrow from the closed form's conversion alone to where mean-pooled GQA arrives at its loss."""
    level = series[OURS][start]
    reached = arrival(axes, sorted(series[GQA].items()), level)
    last = max(series[GQA])
    times = (reached or last) / start
    text = f"{'' if reached else 'more than '}{math.floor(times):d}x the tokens"
    end = reached or last
    arrow = {"arrowstyle": "<->", "color": INK, "linewidth": 1.0, "shrinkA": 6, "shrinkB": 6 if reached else 0}
    axes.annotate("", (end, level), (start, level), arrowprops=arrow)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
    spot = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center", "va": "bottom"}
    axes.annotate(text, (start * (end / start) ** 0.27, level), bbox=box, **spot)  # where no line crosses it


def arrival(axes: Axes, points: Sequence[tuple[int, float]], level: float) -> float | None:
    """Where a falling line, as it is drawn, first reaches a level; None if it never does."""
    wanted, *heights = axes.yaxis.get_transform().transform([level, *(y for _, y in points)])
    for ((x0, _), y0), ((x1, _), y1) in itertools.pairwise(zip(points, heights, strict=True)):
        if y1 <= wanted < y0:
            return x0 * (x1 / x0) ** ((y0 - wanted) / (y0 - y1))
    return None


def label_ends(axes: Axes, ends: dict[str, tuple[float, float]]) -> None:
    """Names beside the ends of lines, pushed apart where they would touch, none below the axes."""
    height = 15.0  # points
    scale = 72 / axes.figure.dpi
    axes.figure.canvas.draw()
    ways = sorted(ends, key=lambda way: -ends[way][1])
    wanted = [axes.transData.transform(ends[way])[1] * scale for way in ways]
    spots, lowest = [], math.inf
    for each in wanted:
        lowest = min(each, lowest - height)
        spots.append(lowest)
    room = axes.bbox.y0 * scale + height / 2
    for index in reversed(range(len(spots))):
        spots[index] = max(spots[index], room)
        room = spots[index] + height
    for way, spot, each in zip(ways, spots, wanted, strict=True):
        text = {"textcoords": "offset points", "va": "center", "color": WAYS[way][0], "fontweight": weight(way)}
        axes.annotate(WAYS[way][2], ends[way], (9, spot - each), **text)


def name_early(axes: Axes, way: str, end: tuple[float, float], *, line: bool) -> None:
    """A name at a line that ends before the others, on the side where it did not come from, or at a lone point."""
    text = {"textcoords": "offset points", "color": WAYS[way][0], "fontweight": weight(way)}
    spot = {"xytext": (-8, -3), "ha": "right", "va": "top"} if line else {"xytext": (7, 3), "va": "bottom"}
    axes.annotate(WAYS[way][2], end, **spot, **text)


def weight(way: str) -> str:
    """Ours is bold."""
    return "bold" if way == OURS else "normal"


def curves(results: dict[str, Any]) -> Figure:
    """KL to the original and next-token loss over the stages, seed 0, a million tokens."""
    runs = {row["method"]: row for row in main_rows(results["rows"]) if row["budget"] == "1.03M" and row["seed"] == 0}
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(WIDTH, 5.6), sharex=True, layout="constrained")
    for way in (way for way in CURVES if way in runs):
        for axes, name in ((top, "kl"), (bottom, "lm")):
            draw_stages(axes, runs[way], name, WAYS[way][0], 2.4 if way == OURS else 1.6)
    if DHA in runs:
        mark_stages((top, bottom), runs[DHA])
    top.set_yscale("log")
    top.yaxis.set_major_locator(FixedLocator([0.2, 0.5, 1, 2, 4]))
    top.yaxis.set_minor_locator(NullLocator())
    top.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    top.set_ylabel("KL to the original, nats\n(log scale)")
    top.set_title(f"Training at {MAIN_KV} of the cache, 1.03M tokens: KL while healing", pad=20)
    bottom.set_title("Next-token loss in every stage")
    bottom.set_ylabel("CE on the training batch, nats")
    bottom.set_xlabel("tokens looked at, all stages together")
    bottom.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
    bottom.set_xlim(0, max(row["tokens"] for row in runs.values()))
    handles = [plt.Line2D([], [], color=WAYS[way][0], linewidth=2.4) for way in CURVES if way in runs]
    top.legend(handles, [WAYS[way][2] for way in CURVES if way in runs], loc="upper right")
    return figure


def draw_stages(axes: Axes, row: Row, name: str, colour: str, width: float) -> None:
    """One loss of one run, stage after stage behind its calibration: batches faint, their running mean in front."""
    offset = row["calibration_tokens"]
    for stage in row["stages"].values():
        points = [(offset + point["tokens"], point[name]) for point in stage["curve"] if name in point]
        if points:
            x, y = (np.array(column, dtype=float) for column in zip(*points, strict=True))
            axes.plot(x, y, color=colour, linestyle="none", marker=".", markersize=3.5, alpha=0.4, markeredgewidth=0)
            axes.plot(x, smooth(y), color=colour, linewidth=width, solid_capstyle="butt")
        offset += stage["tokens"]


def smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over SMOOTH points; fewer at the start, where losses fall fast, and one-sided at the end."""
    half = [min(index, SMOOTH // 2) for index in range(len(values))]
    return np.array([values[i - h : i + h + 1].mean() for i, h in enumerate(half)])


def mark_stages(panels: Sequence[Axes], row: Row) -> None:
    """Where DHA's stages begin and end."""
    start = row["calibration_tokens"]
    where = {
        "xycoords": panels[0].get_xaxis_transform(),
        "textcoords": "offset points",
        "va": "bottom",
        "fontsize": 8.5,
    }
    for name, stage in row["stages"].items():
        end = start + stage["tokens"]
        if start:
            for axes in panels:
                axes.axvline(start, color=QUIET, linewidth=0.8, linestyle=(0, (2, 2)))
        # Names of short stages end where those do, as there may be no room above them.
        label, x, side = ("DHA: healing", (start + end) / 2, "center") if name == "healing" else (name, end, "right")
        panels[0].annotate(label, (x, 1), (0, 3), color=WAYS[DHA][0], ha=side, **where)
        start = end


def budget(results: dict[str, Any]) -> Figure:
    """Heads that DHA's search left every layer, by seed."""
    rows = [row for row in main_rows(results["rows"]) if row["method"] == DHA and row["budget"] == "1.03M"]
    rows.sort(key=lambda row: row["seed"])
    figure, panels = plt.subplots(1, 2, figsize=(WIDTH, 3.2), sharey=True, layout="constrained")
    for axes, kind, colour in zip(panels, ("key", "value"), (KEYS, VALUES), strict=True):
        layers = np.arange(len(rows[0][f"{kind}_heads"]))
        bar = 0.8 / len(rows)
        for index, row in enumerate(rows):
            x = layers + (index - (len(rows) - 1) / 2) * bar
            tint = mix(colour, index / max(1, len(rows)) * 0.75)
            axes.bar(x, row[f"{kind}_heads"], bar * 0.88, color=tint, label=f"seed {row['seed']}")
        axes.set_title(f"{kind} heads", fontweight="normal", pad=4)
        axes.set_xticks(layers)
        axes.tick_params(axis="x", length=0)
        axes.set_xlabel("layer")
        axes.legend(ncols=len(rows), loc="upper right", handlelength=0.9, columnspacing=1.0, fontsize=8.5)
    counts = sorted({count for row in rows for count in (*row["key_heads"], *row["value_heads"])})
    mean = statistics.mean(count for row in rows for count in (*row["key_heads"], *row["value_heads"]))
    for axes in panels:
        axes.set_yticks(counts)
        axes.set_ylim(0, max(counts) * 1.2)
        axes.axhline(mean, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
    panels[0].set_ylabel(f"heads kept (mean {mean:g}, dashed)")
    headline(figure, f"Heads per layer that DHA's search chose, at {MAIN_KV} of the cache")
    return figure


def headline(figure: FigureBase, text: str) -> None:
    """A title over several panels."""
    figure.suptitle(text, x=0.01, ha="left", fontsize=10.5, fontweight="bold")


def mix(colour: str, share: float) -> tuple[float, ...]:
    """A colour with that much white in it."""
    return tuple(1 - (1 - part) * (1 - share) for part in mpl.colors.to_rgb(colour))


def similarity(results: dict[str, Any]) -> Figure:
    """CKA of every pair of heads in three layers, and its mean in every layer."""
    layers = results["layers"]
    drawn = [row for row in layers if "key_cka" in row]
    others = [value for row in drawn for kind in ("key_cka", "value_cka") for value in without_diagonal(row[kind])]
    top = math.ceil(max(others) * 10) / 10
    figure = plt.figure(figsize=(WIDTH, 6.4), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.85, 1), hspace=0.03)
    grid = upper.subplots(2, len(drawn))
    shades = mpl.colormaps["GnBu"].with_extremes(bad=FAINT)
    for line, kind in zip(grid, ("key", "value"), strict=True):
        for axes, row in zip(line, drawn, strict=True):
            values = np.array(row[f"{kind}_cka"])
            np.fill_diagonal(values, np.nan)
            image = axes.imshow(values, cmap=shades, vmin=0, vmax=top, interpolation="none")
            axes.set(xticks=[], yticks=[])
            axes.grid(visible=False)
            for spine in axes.spines.values():
                spine.set(visible=True, color=FAINT)
        line[0].set_ylabel(f"{kind} heads")
    for axes, row in zip(grid[0], drawn, strict=True):
        axes.set_title(f"layer {row['layer']}", fontweight="normal", loc="center", pad=5)
    bar = upper.colorbar(image, ax=grid, shrink=0.7, aspect=25)
    bar.set_label("CKA of two heads")
    bar.outline.set_visible(False)
    headline(upper, "Similarity of heads' projection weights in three layers")
    redundancies(lower.subplots(), layers, results["unrelated"])
    return figure


def redundancies(axes: Axes, layers: Sequence[Row], unrelated: float) -> None:
    """Mean CKA of different heads by layer."""
    x = [row["layer"] for row in layers]
    for kind, colour, marker in (("key", KEYS, "o"), ("value", VALUES, "s")):
        y = [row[f"{kind}_redundancy"] for row in layers]
        axes.plot(x, y, color=colour, marker=marker, markersize=5.5)
        axes.annotate(
            f"{kind}s", (x[-1], y[-1]), (9, 0), textcoords="offset points", color=colour, va="center", fontweight="bold"
        )
    axes.axhline(unrelated, color=QUIET, linewidth=1.0, linestyle=(0, (4, 3)))
    axes.annotate("random weights", (x[0], unrelated), (0, -4), textcoords="offset points", va="top", color=QUIET)
    axes.set_xlim(x[0] - 0.3, x[-1] + 0.9)
    axes.set_ylim(0, None)
    axes.set_xticks(x)
    axes.set_xlabel("layer")
    axes.set_ylabel("mean CKA")
    axes.set_title("Redundancy: mean CKA of two different heads")


def without_diagonal(values: Sequence[Sequence[float]]) -> list[float]:
    """Similarities of different heads."""
    return [value for i, line in enumerate(values) for j, value in enumerate(line) if i != j]


def in_order(names: Iterable[str]) -> list[str]:
    """Ways as they lie upon each other: ours last."""
    return [way for way in reversed(WAYS) if way in set(names)]


def short(count: float) -> str:
    """'41k', '1.03M'."""
    return f"{count / 1e6:g}M" if count >= 1e6 else f"{count / 1e3:g}k" if count else "0"


DRAWINGS: dict[str, tuple[str, Callable[[dict[str, Any]], Figure]]] = {
    "tokens": ("dha.json", tokens),
    "curves": ("dha.json", curves),
    "budget": ("dha.json", budget),
    "similarity": ("similarity.json", similarity),
}

if __name__ == "__main__":
    main()
