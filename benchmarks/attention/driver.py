"""The driver of the attention benchmarks: compiles in several processes, measures in one, writes what they find."""

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from attention.cases import Case
from attention.lines import heard
from training_free import provenance, write

SCRIPT = "decode_attention.py"
STALL_SECONDS = 45
COMPILERS, COMPILE_SECONDS = 12, 90
MOST_WORKERS = 12
# Of the budget; the mode `check` has all of it.
CHECKS_SHARE = 1 / 3


def drive(options: argparse.Namespace) -> None:
    """Start workers until everything is done or the time is up; write what is known after every result."""
    findings = Findings(options)
    deadline = findings.started + options.budget
    precompile(options, findings, deadline)
    findings.tell("compiled")
    checks = deadline if options.mode == "check" else time.time() + CHECKS_SHARE * options.budget
    for _ in range(MOST_WORKERS):
        if time.time() > deadline or one_worker(options, findings, deadline, checks):
            break
    findings.save()
    summary(findings.state)
    findings.tell(f"in all, {len(findings.state['failed'])} failures")


class Findings:
    """What is known so far, in a file that is written after every result, and the names of what is done."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.mode, self.out, self.started = options.mode, Path(options.out), time.time()
        self.done: list[str] = []
        arguments = [options.mode, *(["--tuned", Path(options.tuned).name] if options.tuned else [])]
        meta = provenance(SCRIPT, [*arguments, f"--budget {options.budget:g}"], options.commit, 0.0)
        del meta["peak_memory_bytes"]  # of this process, which computes nothing
        self.state: dict[str, Any] = {"meta": meta, "rows": [], "checks": [], "failed": [], "notes": []}

    def tell(self, text: str) -> None:
        """Print with the time so far."""
        print(f"{time.time() - self.started:6.1f}s {text}", flush=True)

    def save(self) -> None:
        """Write everything known so far, never half of it."""
        self.state["meta"]["seconds"] = round(time.time() - self.started, 1)
        write(self.out, self.state)

    def note(self, text: str) -> None:
        """Keep a remark."""
        self.state["notes"].append(text)

    def lost(self, at: str | None, why: str) -> None:
        """A worker was lost at something, which is not tried again."""
        self.state["failed"].append({"what": at or "starting", "failed": why})
        print(f"   !! worker {why} at {at}", flush=True)
        if at:
            self.done.append(at)

    def take(self, line: dict[str, Any]) -> None:
        """Take in what a worker says of something done, or a note of it."""
        if "note" in line:
            self.note(line["note"])
            self.tell(line["note"])
            return
        name = line["end"]
        self.done.append(name)
        if "meta" in line:
            self.state["meta"] |= line["meta"]
            self.tell(str(line["meta"]))
        if "failed" in line:
            self.state["failed"].append({"what": name, "failed": line["failed"], "row": line.get("row")})
            self.tell(f"FAILED {name} {line['failed']} {line.get('row')}")
        elif "row" in line:
            self.add(line["row"])
        elif name.endswith("whole") and self.mode == "tune":
            self.tell(name)

    def add(self, row: dict[str, Any]) -> None:
        """Take in a row: a time, or a check if it has none."""
        if "microseconds" in row:
            if "gb_s" in row:
                row["copy_fraction"] = round(row["gb_s"] / self.state["meta"]["copy_gb_s"], 4)
            self.state["rows"].append(row)
            if self.mode != "tune":
                self.tell(shown(row))
        else:
            self.state["checks"].append(row)
        self.save()


def child(options: argparse.Namespace, role: str, *more: str) -> subprocess.Popen[str]:
    """The script again, in another role."""
    script = str(Path(__file__).parent.with_name(SCRIPT))
    command = [sys.executable, script, options.mode, "--out", options.out, "--role", role, *more]
    if options.tuned:
        command += ["--tuned", options.tuned]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1)


def precompile(options: argparse.Namespace, findings: Findings, deadline: float) -> None:
    """Fill Triton's cache from several processes."""
    count = min(COMPILERS, max(1, (os.cpu_count() or 2) - 2))
    until = min(deadline, time.time() + COMPILE_SECONDS)
    shares = [child(options, "compile", "--share", str(i), "--of", str(count)) for i in range(count)]
    for share in shares:
        try:
            out, _ = share.communicate(timeout=max(1, until - time.time()))
        except subprocess.TimeoutExpired:
            share.kill()
            out, _ = share.communicate()
            findings.note("a compiling process ran out of time")
        else:
            if share.returncode:
                findings.note(f"a compiling process ended with {share.returncode}: {out[-300:]}")
        for line in filter(None, map(heard, out.splitlines())):
            findings.note(line["note"])


def one_worker(options: argparse.Namespace, findings: Findings, deadline: float, checks: float) -> bool:
    """Follow one worker to its end; whether it came to it by itself. `checks`: when no more of those may begin."""
    listed = findings.out.with_suffix(".done")
    listed.parent.mkdir(parents=True, exist_ok=True)
    listed.write_text(json.dumps(findings.done))
    times = ("--deadline", str(deadline), "--checks-deadline", str(checks))
    worker = child(options, "work", "--done", str(listed), *times)
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=pump, args=(worker, lines), daemon=True).start()
    at, tail, stalled = None, [], False
    while True:
        try:
            printed = lines.get(timeout=STALL_SECONDS)
        except queue.Empty:
            stalled = True
            worker.kill()
            break
        if printed is None:
            break
        line = heard(printed)
        if line is None:
            tail = [*tail[-15:], printed.rstrip()]
        elif "begin" in line:
            at = line["begin"]
        else:
            findings.take(line)
    code = worker.wait()
    listed.unlink(missing_ok=True)
    if code == 0 and not stalled:
        return True
    findings.lost(at, "hung" if stalled else f"ended with {code}: " + " | ".join(tail)[-400:])
    return False


def pump(worker: subprocess.Popen[str], lines: "queue.Queue[str | None]") -> None:
    """Pass a worker's lines on, None at the end."""
    assert worker.stdout is not None
    for line in worker.stdout:
        lines.put(line)
    lines.put(None)


def shown(row: dict[str, Any]) -> str:
    """A row in one line."""
    config = row.get("config") or {}
    how = " ".join(str(value) for value in config.values())
    extra = f"{row['layout']} page {row['page']}" + (" ragged" if row["ragged"] else "")
    heads = f"{row['key_heads']:>2}/{row['value_heads']:<2}"
    rate = f"{row['tflop_s']:>7.1f} TFLOP/s {row['peak_mb']:>8.1f} MB" if "tflop_s" in row else ""
    rate = rate or f"{row['gb_s']:>7.1f} GB/s {100 * row['copy_fraction']:>5.1f}%"
    return (
        f"B={row['batch']:<3} T={row['context']:<6} H={row['query_heads']:<3} {heads} "
        f"d={row['head_dim']} {row['maps']:<7} {extra:<14} {row['backend']:<10} {row['microseconds']:>8.2f} us "
        f"{rate}  {how}"
    )


def summary(state: dict[str, Any]) -> None:
    """For each case the best of every backend and design."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in state["rows"]:
        groups.setdefault(json.dumps([row[name] for name in Case.__dataclass_fields__]), []).append(row)
    worst = max((check["error"] for check in state["checks"]), default=None)
    print(f"\n{len(state['checks'])} checks passed, worst relative error {worst}")
    for rows in groups.values():
        best: dict[str, dict[str, Any]] = {}
        for row in rows:
            config = row["config"] or {"design": ""}
            key = f"{row['backend']} {config['design']}"
            best[key] = min(best.get(key, row), row, key=lambda each: each["microseconds"])
        for row in sorted(best.values(), key=lambda each: each["microseconds"]):
            print(shown(row))
    for failure in state["failed"]:
        print("failed:", failure["what"], failure["failed"][:200])
