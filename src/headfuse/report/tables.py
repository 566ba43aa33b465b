"""Results as plain text tables for the terminal and as Markdown for the README."""

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headfuse.benchmark.cases import Case
    from headfuse.benchmark.run import Benchmark
    from headfuse.checkpoints.describe import Description
    from headfuse.demo import Demonstration
    from headfuse.evaluation.report import EvaluationReport
    from headfuse.healing import Healing
    from headfuse.pipeline import Conversion


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned with spaces: text to the left, numbers to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    numeric = [all(_is_number(row[column]) for row in rows) for column in range(len(header))]

    def cell(text: str, column: int) -> str:
        return text.rjust(widths[column]) if numeric[column] else text.ljust(widths[column])

    return "\n".join("  ".join(cell(text, i) for i, text in enumerate(line)).rstrip() for line in lines)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def description_table(found: "Description") -> str:
    """What `inspect` prints."""
    rope = found.rope
    positions = "none" if rope.kind == "none" else f"{rope.kind}, {rope.channels} channels, theta {rope.theta:g}"
    facts = [
        ("family", found.family),
        ("parameters", f"{found.parameters:,} ({found.dtype}, {found.weight_bytes / 1e6:,.1f} MB)"),
        ("layers", str(found.layers)),
        ("query heads", f"{found.query_heads} of {found.head_dim}"),
        ("key heads", _counts(found.key_heads)),
        ("value heads", _counts(found.value_heads)),
        ("rotary positions", positions + (f", {rope.scaling} scaling" if rope.scaling else "")),
        ("biases", " ".join(found.biases) or "none"),
        ("q/k norm", found.qk_norm),
        ("KV cache", f"{found.kv_bytes_per_token:,} bytes per token"),
    ]
    width = max(len(name) for name, _ in facts)
    lines = [found.model, *(f"  {name:<{width}}  {value}" for name, value in facts), ""]
    sizes = [
        [
            f"{size.percent:g}%",
            "-" if size.bytes_per_token is None else f"{size.bytes_per_token:,}",
            " + ".join(
                f"{round(fmean(own) * size.percent / 100, 3):g}" for own in (found.key_heads, found.value_heads)
            ),
            "-" if size.gqa_heads is None else str(size.gqa_heads),
        ]
        for size in found.cache
    ]
    lines += [table(["cache left", "bytes/token", "K+V heads/layer", "gqa heads"], sizes), ""]
    methods = [[m.method, m.target, "yes" if m.applies else "no", m.note or ""] for m in found.methods]
    return "\n".join([*lines, table(["method", "target", "applies", "note"], methods)])


def healing_table(done: "Healing") -> str:
    """What `heal` prints."""
    run = done.training
    losses = ", ".join(f"{name} {value:.4f}" for name, value in run.losses.items() if "norm" not in name)
    mfu = "" if run.mfu is None else f", {run.mfu:.0%} of the device's peak"
    return "\n".join(
        [
            f"trained      {run.tokens:,} tokens in {run.steps:,} steps",
            f"last step    {losses}",
            f"speed        {run.tokens_per_second:,.0f} tokens/s{mfu}",
            f"time         {done.seconds['total']:.1f} s",
        ]
    )


def conversion_table(done: "Conversion") -> str:
    """What `convert` prints."""
    keys = [layer.num_key_heads for layer in done.plan.layers]
    values = [layer.num_value_heads for layer in done.plan.layers]
    lines = [
        f"KV cache     {done.kv_bytes_before:,} -> {done.kv_bytes_after:,} bytes per token "
        f"({done.kv_bytes_after / done.kv_bytes_before:.1%})",
        f"key heads    {_counts(keys)}",
        f"value heads  {_counts(values)}",
    ]
    if done.refit_error is not None:
        before, after = done.refit_error
        lines.append(f"layer error  {before:.3f} -> {after:.3f} by the refit (text kept out of it)")
    for stage, run in done.training.items():
        lines.append(
            f"{stage:<12} {run.tokens:,} tokens, loss {run.losses['loss']:.4f}, {run.tokens_per_second:,.0f}/s"
        )
    lines.append(f"exactness    {done.parity['split']:.1e} as read, {done.parity['written']:.1e} as written (logits)")
    spent = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in done.seconds.items() if name != "total")
    lines.append(f"time         {done.seconds['total']:.1f} s ({spent})")
    peak = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in done.peak_memory_bytes.items())
    lines.append(f"peak memory  {peak}")
    return "\n".join([*lines, f"written to   {done.out}"])


def evaluation_table(found: "EvaluationReport") -> str:
    """What `eval` prints."""
    text, cache = found.text or {}, found.cache or {}
    facts: list[tuple[str, str]] = []
    names = {
        "cross_entropy": ("cross-entropy", "{:.4f} nats/token"),
        "perplexity": ("perplexity", "{:.3f}"),
        "bits_per_byte": ("bits per byte", "{:.4f}"),
        "reference_cross_entropy": ("original", "{:.4f} nats/token"),
        "kl": ("KL to original", "{:.4f} nats/token"),
        "top1_agreement": ("same first choice", "{:.1%}"),
    }
    for key, (name, form) in names.items():
        if key in text:
            facts.append((name, form.format(text[key])))
    if "reference_cross_entropy" in text:
        facts.append(("delta", f"{text['cross_entropy'] - text['reference_cross_entropy']:+.4f} nats/token"))
    if cache:
        facts.append(
            (
                "KV cache",
                f"{cache['measured_bytes_per_token']:,} bytes per token measured, "
                f"{cache['computed_bytes_per_token']:,} computed ({cache['dtype']})",
            )
        )
    for task, values in found.tasks.items():
        accuracy = next((values[key] for key in ("accuracy", "acc,none") if key in values), None)
        facts.append((task, "-" if accuracy is None else f"accuracy {accuracy:.4f}"))
    for task, values in found.exact_match.items():
        facts.append((task, f"exact match {values['exact_match']:.4f}"))
    width = max(len(name) for name, _ in facts)
    return "\n".join([found.model, *(f"  {name:<{width}}  {value}" for name, value in facts)])


def benchmark_table(found: "Benchmark") -> str:
    """What `bench` prints: the cases of one batch and context under each other."""
    names = [each["name"] for each in found.models]
    ordered = sorted(found.cases, key=lambda case: (case.context, case.batch, names.index(case.model)))
    header = ["context", "batch", "model", "first token", "tokens/s", "step", "attention", "GB/s", "of copy"]
    header += ["cache", "peak", "largest batch"]
    shown = table(header, [_case_row(case) for case in ordered])
    models = [
        f"{each['name']}: {each['weight_bytes'] / 1e9:.2f} GB of weights, {each['cache_bytes_per_token']:,} bytes of "
        f"cache per token, attention {each['attention']!r}"
        for each in found.models
    ]
    copied = f"copy rate {found.copy_gb_s:,.1f} GB/s on {found.device}, {found.precision}; attention is one layer's"
    return "\n".join([shown, "", *models, copied])


def _case_row(case: "Case") -> list[str]:
    start = [f"{case.context:,}", str(case.batch), case.model]
    cache = f"{case.cache_bytes / 1e9:.3f} GB"
    if not case.fits:
        return [*start, "does not fit", *["-"] * 5, cache, "-", "-"]
    figures = [
        (case.first_token_seconds, "{:.3f} s"),
        (case.tokens_per_second, "{:,.1f}"),
        (None if case.step_seconds is None else case.step_seconds * 1e3, "{:.2f} ms"),
        (case.attention_microseconds, "{:,.0f} us"),
        (case.attention_gb_s, "{:,.1f}"),
        (case.copy_fraction, "{:.0%}"),
    ]
    shown = ["-" if value is None else form.format(value) for value, form in figures]
    peak = "-" if case.peak_bytes is None else f"{case.peak_bytes / 1e9:.2f} GB"
    return [*start, *shown, cache, peak, "-" if case.largest_batch is None else f"{case.largest_batch:,}"]


def demonstration_table(found: "Demonstration") -> str:
    """What `demo` prints."""
    rows = [
        [
            row.method + (" + refit" if row.refit else ""),
            row.target,
            f"{row.kv_bytes_per_token:,}",
            f"{row.delta_ce:+.3f}",
            f"{row.kl:.3f}",
            f"{row.seconds:.1f}",
        ]
        for row in found.rows
    ]
    original = ["(original)", "", f"{found.kv_bytes_before:,}", "+0.000", "0.000", "0.0"]
    shown = table(["method", "target", "KV bytes/token", "delta CE", "KL", "seconds"], [original, *rows])
    return f"{shown}\n\nbefore: {found.prompt}{_flat(found.before)}\nafter:  {found.prompt}{_flat(found.after)}"


def _counts(counts: Sequence[int]) -> str:
    return str(counts[0]) if len(set(counts)) == 1 else " ".join(map(str, counts))


def _flat(text: str) -> str:
    """One line, with the space kept that parts a continuation from its prompt."""
    return " " * text[:1].isspace() + " ".join(text.split())


def _is_number(text: str) -> bool:
    return text.strip("+-%x").replace(",", "").replace(".", "", 1).isdigit()
