"""Shapes of the attention benchmarks: which are checked and timed, in what order, and the configurations to try."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from headfuse.ops.decoupled_attention.decode import DecodeConfig, hopper_config
from headfuse.ops.decoupled_attention.head_maps import HeadMaps, head_maps
from headfuse.ops.decoupled_attention.scoring import PLAIN, Scoring

# Modes with many queries a row; the others decode.
LEARNED_MODES = ("prefill", "backward")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One shape. `maps`: "grouped" is grouped-query attention, "random" any; `layout`: the outer axis of a cache.

    `page` 0 is a dense cache; `ragged` draws lengths between a quarter of `context` and all of it.
    """

    batch: int
    context: int
    key_heads: int
    value_heads: int
    query_heads: int = 32
    head_dim: int = 128
    dtype: str = "bf16"
    maps: str = "random"
    layout: str = "heads"
    page: int = 0
    ragged: bool = False
    softcap: float | None = None
    window: int | None = None

    @property
    def scoring(self) -> Scoring:
        """Its soft-cap and window."""
        return PLAIN if self.softcap is self.window is None else Scoring(softcap=self.softcap, window=self.window)


# Shapes of the table: each pair of head counts at each size.
SIZES = ((1, 131072), (8, 8192), (64, 2048), (1, 16384))
COUNTS = ((32, 32, "grouped"), (8, 8, "grouped"), (8, 8, "random"), (6, 10, "random"), (2, 14, "random"))
COUNTS += ((4, 4, "grouped"), (4, 4, "random"), (2, 6, "random"))


def table_cases() -> list[Case]:
    """The table, then other layouts, sizes and widths."""
    cases = [Case(b, t, k, v, maps=maps) for b, t in SIZES for k, v, maps in COUNTS]
    cases += [Case(b, t, k, v, layout="tokens") for b, t in SIZES for k, v in ((6, 10), (2, 6))]
    cases += [Case(b, t, 6, 10, layout="tokens", page=page) for b, t in SIZES[:2] for page in (16, 64)]
    cases += [Case(8, 8192, 6, 10, layout="heads", page=64), Case(8, 16384, 6, 10, ragged=True)]
    cases += [Case(1, 4096, 6, 10), Case(8, 4096, 6, 10), Case(16, 4096, 6, 10), Case(64, 4096, 6, 10)]
    cases += [Case(8, 8192, 6, 10, query_heads=64), Case(8, 8192, 12, 20, head_dim=64)]
    return cases


def tuned_cases() -> list[Case]:
    """What decides the choice of a configuration, the most telling first."""
    cases = [Case(b, t, k, v) for b, t in SIZES for k, v in ((6, 10), (2, 6))]
    cases += [Case(b, t, n, n, maps="grouped") for b, t in SIZES for n in (8, 4)]
    cases += [Case(b, t, 6, 10, layout="tokens") for b, t in SIZES]
    cases += [Case(1, 131072, 32, 32, maps="grouped"), Case(8, 8192, 32, 32), Case(1, 4096, 6, 10)]
    cases += [Case(8, 8192, 6, 10, layout="tokens", page=page) for page in (64, 16)]
    return [*cases, Case(8, 8192, 6, 10, query_heads=64), Case(8, 8192, 6, 10, query_heads=128)]


def checked_cases() -> list[Case]:
    """Small shapes that reach every branch of the kernels."""
    base = Case(3, 1000, 5, 11, ragged=True)
    cases = [replace(base, dtype=dtype) for dtype in DTYPES]
    cases += [replace(base, layout="tokens", page=page) for page in (0, 16, 64, 128)]
    cases += [replace(base, head_dim=dim) for dim in (32, 64, 96, 256)]
    cases += [replace(base, key_heads=8, value_heads=8, maps="grouped"), replace(base, batch=70, context=300)]
    cases += [replace(base, query_heads=count) for count in (11, 40, 64, 128)]
    cases += [replace(base, softcap=20.0), replace(base, window=300), replace(base, window=5, page=64, layout="tokens")]
    return [*cases, replace(base, batch=1, context=20000, ragged=False)]


def learned_cases() -> list[Case]:
    """What `prefill` and `backward` time: many queries a row."""
    cases = [Case(b, t, 6, 10) for b, t in ((8, 4096), (4, 8192), (2, 16384), (1, 32768))]
    cases += [Case(8, 4096, 8, 8, maps="grouped"), Case(8, 4096, 2, 6), Case(8, 4096, 12, 20, head_dim=64)]
    return [*cases, Case(8, 4096, 32, 32, maps="grouped")]


def learned_checks() -> list[Case]:
    """Small shapes that reach every branch of the prefill and backward kernels."""
    base = Case(2, 333, 5, 11, query_heads=16)
    cases = [replace(base, dtype=dtype) for dtype in DTYPES] + [
        replace(base, head_dim=dim) for dim in (32, 64, 96, 256)
    ]
    cases += [replace(base, ragged=True), replace(base, softcap=20.0), replace(base, window=100, ragged=True)]
    return [*cases, replace(base, context=9), replace(base, context=1100, key_heads=1, value_heads=16)]


def jobs(mode: str) -> Iterator[tuple[str, Case]]:
    """Names and cases of a mode, checks first."""
    if mode in LEARNED_MODES:
        yield from ((f"learned check {index}", case) for index, case in enumerate(learned_checks()))
        yield from ((f"{mode} {index}", case) for index, case in enumerate(learned_cases()))
        return
    yield from ((f"check {index}", case) for index, case in enumerate(checked_cases()))
    if mode != "check":
        cases = tuned_cases() if mode == "tune" else table_cases()
        yield from ((f"{mode} {index}", case) for index, case in enumerate(cases))


def is_check(name: str) -> bool:
    """Whether a job's name is that of a check."""
    return name.startswith(("check", "learned check"))


def maps_of(case: Case) -> HeadMaps:
    """Equal consecutive groups, or every head at least once in random order."""
    generator = torch.Generator().manual_seed(case.key_heads * 100 + case.value_heads)
    drawn = []
    for heads in (case.key_heads, case.value_heads):
        count = case.query_heads
        if case.maps == "grouped":
            drawn.append([query * heads // count for query in range(count)])
        else:
            rest = torch.randint(heads, (count - heads,), generator=generator)
            chosen = torch.cat([torch.arange(heads), rest])
            drawn.append(chosen[torch.randperm(count, generator=generator)].tolist())
    return head_maps(drawn[0], drawn[1], "cuda")


def default_for(case: Case) -> DecodeConfig:
    """What a case of the table takes by itself on Hopper."""
    tokens = case.batch * case.context / torch.cuda.get_device_properties(0).multi_processor_count
    return hopper_config(case.query_heads, case.head_dim, tokens)


def configs(case: Case) -> list[DecodeConfig]:
    """What to try for one shape."""
    default = default_for(case)
    found = [default, replace(default, programs=2 * default.programs), DecodeConfig("passes", 128, 4, 3, 2)]
    if case.query_heads <= 64 and case.head_dim == 128:
        shapes = [(128, 4, 6, 1), (64, 4, 5, 2), (64, 4, 12, 1), (32, 4, 6, 3)]
        found += [DecodeConfig("hopper", *shape) for shape in shapes]
    return list(dict.fromkeys(found))


def checked_configs(case: Case) -> list[DecodeConfig | None]:
    """The default, and each way of computing that suits the size."""
    passes = DecodeConfig("passes", 32 if case.dtype == "fp32" else 64, warps=4, stages=3, programs=2)
    return [None, passes]


def key_of(case: Case) -> str:
    """A case as a key of a dictionary."""
    return json.dumps(asdict(case), sort_keys=True)


def tuned(path: str | None) -> dict[str, DecodeConfig]:
    """The best configuration of every case that `tune` measured."""
    if path is None:
        return {}
    best: dict[str, tuple[float, DecodeConfig]] = {}
    fields = Case.__dataclass_fields__
    for row in json.loads(Path(path).read_text())["rows"]:
        if row["backend"] == "triton" and "microseconds" in row:
            key = key_of(Case(**{name: row[name] for name in fields}))
            found = (row["microseconds"], DecodeConfig(**row["config"]))
            best[key] = min(best.get(key, found), found, key=lambda pair: pair[0])
    return {key: config for key, (_, config) in best.items()}
