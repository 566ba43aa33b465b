"""Two processes that share a model (FSDP2, gloo) learn what one does, and resume what one began."""

import json
import os
import socket
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import multiprocessing

from headfuse.training.processes import processes
from pico import pico
from short_runs import LENGTH, ROWS, Stopped, curve, run, short, stopping, trained_of, weights_of

UPDATES = ("adamw", "muon")
STEPS, STOP = 6, 4


def options_for(update):
    return short(tokens=STEPS * ROWS * LENGTH, update=update, save_every=3, rate=1e-3)


def model_for():
    return pico("llama", tie_word_embeddings=True, num_key_value_heads=2)


def stop_half_way(update, root, here=None):
    where = {} if here is None else {"here": here}
    with pytest.raises(Stopped):
        run(trained_of(model_for()), options_for(update), root, stages=stopping(STOP), **where)


def work(rank: int, world: int, port: int, folder: str) -> None:
    """What each of the processes does: a whole run, the resuming of one, and the beginning of one."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    warnings.filterwarnings("error", message="FSDP2")
    with processes(torch.device("cpu")) as here:
        assert (here.rank, here.world, here.first) == (rank, world, rank == 0)
        assert here.mean(torch.tensor(float(rank))).item() == (world - 1) / 2
        for update in UPDATES:
            place = Path(folder) / update
            run(trained_of(model_for()), options_for(update), place / "two", here=here)
            run(trained_of(model_for()), options_for(update), place / "one-then-two", here=here)
            stop_half_way(update, place / "two-then-one", here)
        micro = replace(options_for("adamw"), micro_rows=1)
        run(trained_of(model_for()), micro, Path(folder) / "adamw" / "micro", here=here)


def losses(root):
    return [json.loads(line)["loss"] for line in (root / "metrics.jsonl").read_text().splitlines()]


# Muon orthogonalises in bf16, where sums of two halves round otherwise.
TOLERANCE = {"adamw": 1e-5, "muon": 2e-4}


def test_two_processes_have_the_losses_of_one_and_either_resumes_what_the_other_began(tmp_path):
    """One test, as starting the processes takes most of its time."""
    for update in UPDATES:
        stop_half_way(update, tmp_path / update / "one-then-two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work, (2, port, str(tmp_path)), nprocs=2)
    for update, tolerance in TOLERANCE.items():
        model, place = model_for(), tmp_path / update
        wanted, weights = curve(run(trained_of(model), options_for(update))), weights_of(model)
        assert len(wanted) == STEPS
        for name in ("two", "one-then-two", *(["micro"] if update == "adamw" else [])):
            assert losses(place / name) == pytest.approx(wanted, abs=tolerance), (update, name)
        checkpoints = place / "two-then-one" / "checkpoints"
        assert [path.name for path in checkpoints.iterdir()] == ["step-00000003"]
        resumed = model_for()
        report = run(trained_of(resumed), options_for(update), place / "two-then-one")
        assert curve(report) == pytest.approx(wanted, abs=tolerance)
        for name, tensor in resumed.state_dict().items():
            torch.testing.assert_close(tensor, weights[name], atol=10 * tolerance, rtol=0)


def test_one_process_is_told_nothing_of_others():
    with processes(torch.device("cpu")) as here:
        assert (here.rank, here.world, here.mesh, here.first) == (0, 1, None, True)
        here.wait()
        assert here.mean(torch.tensor(3.0)).item() == 3.0
