"""One process or many: who we are, and how a model is spread over the processes (FSDP2)."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from headfuse.errors import ConfigError
from headfuse.precision import Precision


@dataclass(frozen=True)
class Processes:
    """Where a run runs: a device, a precision, and the place of this process among those that `torchrun` started."""

    device: torch.device
    precision: Precision = "fp32"
    rank: int = 0
    world: int = 1
    mesh: DeviceMesh | None = None

    @property
    def first(self) -> bool:
        """Whether this process writes files and reports progress."""
        return self.rank == 0

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            dist.barrier()

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the processes."""
        if self.world > 1:
            dist.all_reduce(values, op=dist.ReduceOp.SUM)
            values = values / self.world
        return values


def world_size() -> int:
    """How many processes torchrun started together; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_alone() -> None:
    """Raise ConfigError if torchrun started this process with others."""
    if (world := world_size()) > 1:
        raise ConfigError(
            f"wanted one process to convert, got {world}; convert without torchrun, then `headfuse heal` under it"
        )


@contextmanager
def processes(device: torch.device, precision: Precision = "fp32") -> Iterator[Processes]:
    """The processes of this run: those of torchrun, each on the GPU of its local rank, or this one on `device`."""
    world = world_size()
    if world == 1:
        yield Processes(device, precision)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    started = not dist.is_initialized()
    if started:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(device, precision, dist.get_rank(), world, init_device_mesh(device.type, (world,)))
    finally:
        if started:
            dist.destroy_process_group()


def shard(module: nn.Module, blocks: nn.ModuleList, here: Processes) -> None:
    """Spread a module's parameters over the processes, block by block (FSDP2), in place; alone, do nothing.

    Parameters stay fp32 in memory; they travel and compute in bf16 under that precision, gradients are summed in fp32.
    """
    if here.mesh is None:
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    bf16 = here.precision == "bf16"
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    for block in blocks:
        fully_shard(block, mesh=here.mesh, mp_policy=policy)
    fully_shard(module, mesh=here.mesh, mp_policy=policy)
