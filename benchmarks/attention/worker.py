"""The process that checks and times: one line for its driver for each thing begun and for each result."""

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend

from attention.cases import Case, checked_configs, configs, is_check, jobs, key_of, tuned
from attention.checks import close, verify, verify_learned
from attention.inputs import ROTATED_BYTES, Inputs, Learned
from attention.lines import say
from attention.peers import flashinfer_version, time_flashinfer
from attention.times import eager_microseconds, memory_rates, microseconds
from headfuse.ops.decoupled_attention.decode import DecodeConfig, default_config
from headfuse.ops.decoupled_attention.rows import Rows


def work(options: argparse.Namespace) -> None:
    """Do the jobs that the driver has not seen the end of."""
    done = set(json.loads(Path(options.done).read_text()))
    deadline = options.deadline
    if "rates" not in done:
        say(begin="rates")
        say(end="rates", meta=facts() | memory_rates())
        if options.mode in ("tune", "table") and flashinfer_version() is None:
            say(note="FlashInfer is not installed: there are no rows of it")
    for name, case in jobs(options.mode):
        if time.time() > deadline:
            say(note=f"out of time before {name}")
            return
        if is_check(name) and time.time() > options.checks_deadline and f"{name} whole" not in done:
            say(note=f"the checks' part of the budget is over: skipped {name}")
            say(end=f"{name} whole")
            continue
        try:
            measure(options, name, case, done, deadline)
        except Exception as error:
            say(begin=name)
            say(end=name, failed=f"{type(error).__name__}: {str(error)[:300]}")
            if "CUDA error" in str(error) or "illegal" in str(error):
                raise
        torch.cuda.empty_cache()


def facts() -> dict[str, Any]:
    """What the numbers were measured with."""
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "flashinfer": flashinfer_version(),
        "python": platform.python_version(),
        "timing": "median of CUDA-graph replays, inputs rotating over at least "
        f"{ROTATED_BYTES / 1e9:g} GB and 4 sets; gb_s counts each cached key and value once",
    }


def measure(options: argparse.Namespace, name: str, case: Case, done: set[str], deadline: float) -> None:
    """One case with every configuration."""
    if f"{name} whole" in done:
        return
    if name.startswith("check"):
        inputs = Inputs(case, sets=1)
        expected = inputs.reference()
        for index, config in enumerate(checked_configs(case)):
            attempt(f"{name} {index}", case, config, done, lambda config=config: verify(inputs, config, expected))
    elif name.startswith("learned"):
        inputs = Learned(case)
        attempt(name, case, "triton", done, lambda: verify_learned(inputs))
    elif name.startswith(("prefill", "backward")):
        time_learned(name, case, done, backward=name.startswith("backward"))
    elif name.startswith("tune"):
        tune(name, case, done, deadline)
    else:
        tabulate(name, case, done, tuned(options.tuned))
    say(end=f"{name} whole")


def tune(name: str, case: Case, done: set[str], deadline: float) -> None:
    """Time every configuration, and torch's attention where it can do the same."""
    inputs = Inputs(case)
    expected = inputs.reference()

    def timed(config: DecodeConfig) -> dict[str, float]:
        return verify(inputs, config, expected) | {"microseconds": microseconds(inputs.launches(config))}

    if case.key_heads == case.value_heads and case.maps == "grouped" and case.layout == "heads" and not case.page:
        baselines(name, case, done, inputs, expected[0])
    for index, config in enumerate(configs(case)):
        if time.time() > deadline:
            return
        attempt(f"{name} {index}", case, config, done, lambda config=config: timed(config), inputs)


def tabulate(name: str, case: Case, done: set[str], best: dict[str, DecodeConfig]) -> None:
    """Time the default (or the tuned) configuration and torch's attention."""
    inputs = Inputs(case)
    expected = inputs.reference()
    config = best.get(
        key_of(case), default_config(inputs.query[0], inputs.key[0], inputs.value[0], Rows(block_table=inputs.table))
    )

    def timed() -> dict[str, float]:
        return verify(inputs, config, expected) | {"microseconds": microseconds(inputs.launches(config))}

    attempt(f"{name} triton", case, config, done, timed, inputs)
    if case.key_heads == case.value_heads and case.maps == "grouped":
        baselines(name, case, done, inputs, expected[0])


def baselines(name: str, case: Case, done: set[str], inputs: Inputs, expected: Tensor) -> None:
    """Attention of torch, through cuDNN and Flash, and FlashInfer's decoding if it is installed."""
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        label = backend.name.split("_")[0].lower()
        launches = inputs.attention(backend)
        attempt(f"{name} {label}", case, label, done, lambda x=launches: {"microseconds": microseconds(x)}, inputs)
    if flashinfer_version() is not None:
        attempt(f"{name} flashinfer", case, "flashinfer", done, lambda: time_flashinfer(inputs, expected), inputs)


def time_learned(name: str, case: Case, done: set[str], *, backward: bool) -> None:
    """The kernels and gather + torch's attention, forward or backward; each result is held against the next."""
    inputs = Learned(case)
    flops = (10 if backward else 4) * case.batch * case.query_heads * case.context**2 * case.head_dim / 2
    ways: dict[str, Callable[[], Tensor]] = {"triton": inputs.triton}
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        ways[f"gather+{backend.name.split('_')[0].lower()}"] = lambda backend=backend: inputs.gathered(backend)
    if backward:
        ways["select+cudnn"] = lambda: inputs.selected(SDPBackend.CUDNN_ATTENTION)
    expected = inputs.gathered(SDPBackend.FLASH_ATTENTION)
    wanted = inputs.gradients(expected) if backward else (expected,)

    def timed(way: Callable[[], Tensor]) -> dict[str, Any]:
        if not backward:
            with torch.no_grad():
                return close((way(),), wanted, 2e-2) | eager_microseconds(way)
        out = way()
        first, second = inputs.gradients(out), inputs.gradients(out)
        repeats = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        return close(first, wanted, 3e-2) | {"repeats": repeats} | eager_microseconds(lambda: inputs.gradients(out))

    for label, way in ways.items():
        attempt(f"{name} {label}", case, label, done, lambda way=way: timed(way), flops=flops)


def attempt(
    name: str,
    case: Case,
    what: DecodeConfig | str | None,
    done: set[str],
    run: Callable[[], dict[str, float]],
    inputs: Inputs | None = None,
    flops: float | None = None,
) -> dict[str, float] | None:
    """Run one thing, tell the driver how it went, and go on whatever happens."""
    if name in done:
        return None
    say(begin=name)
    row: dict[str, Any] = {"backend": what if isinstance(what, str) else "triton", **asdict(case)}
    row["config"] = asdict(what) if isinstance(what, DecodeConfig) else None
    try:
        got = run()
    except Exception as error:
        say(end=name, row=row, failed=f"{type(error).__name__}: {str(error)[:300]}")
        if "CUDA error" in str(error) or "illegal" in str(error):
            raise
        return None
    if inputs is not None and "microseconds" in got:
        got["gb_s"] = round(inputs.bytes / got["microseconds"] / 1e3, 1)
    if flops is not None:
        got["tflop_s"] = round(flops / got["microseconds"] / 1e6, 1)
    if "microseconds" in got:
        got["microseconds"] = round(got["microseconds"], 2)
    say(end=name, row=row | got)
    return got
