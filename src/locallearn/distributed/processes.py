"""The processes of one training, as `torchrun` starts them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, ProcessGroup, Store  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from locallearn.distributed.parallelism import Parallelism
from locallearn.engine.processes import expecting_others
from locallearn.errors import UserError

STAGES, REPLICAS = "layers", "data"  # dimensions of the mesh

# What torchrun tells each process.
_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def num_started() -> int:
    """How many processes `torchrun` has started together; 1 where it did not start this one."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


@dataclass(frozen=True)
class Processes:
    """This process among the others, all of which have joined.

    Arguments:
        parallelism: how they are laid out.
        rank: of this process.
        device: that this process trains on.
        mesh: stages by replicas.
        control: a gloo group of all of them, for what lies on the host, whatever the device.
        store: a key-value store that all of them reach.
    """

    parallelism: Parallelism
    rank: int
    device: torch.device
    mesh: DeviceMesh
    control: ProcessGroup
    store: Store

    @property
    def num(self) -> int:
        return self.parallelism.num_processes

    @property
    def stage(self) -> int:
        """Which of the stages this process trains."""
        return self.rank // self.parallelism.num_replicas

    @property
    def replica(self) -> int:
        """Which part of every batch it trains on."""
        return self.rank % self.parallelism.num_replicas

    @property
    def is_first_of_host(self) -> bool:
        return os.environ["LOCAL_RANK"] == "0"

    def rank_of(self, stage: int, replica: int) -> int:
        return stage * self.parallelism.num_replicas + replica

    @property
    def replicas(self) -> ProcessGroup:
        """The processes that train the same stage, on the device."""
        return self.mesh.get_group(REPLICAS)


@contextlib.contextmanager
def joined(parallelism: Parallelism, device: str, timeout_seconds: float) -> Iterator[Processes]:
    """Within: the processes that torchrun has started are joined.

    Arguments:
        parallelism: how they are laid out.
        device: "cpu" or "cuda"; of several CUDA devices each process of a host takes its own.
        timeout_seconds: how long one waits for another, at the start and in an exchange.

    Raises:
        UserError: not started by torchrun, or more processes of a host than CUDA devices.
    """
    missing = [name for name in _NEEDED if name not in os.environ]
    if missing:
        raise UserError(
            f"--parallel needs the processes that torchrun starts ({', '.join(missing)} not set). "
            f"Start them with `torchrun --nproc-per-node {parallelism.num_processes} -m "
            f"locallearn train ...`."
        )
    local_rank = int(os.environ["LOCAL_RANK"])
    own = torch.device(device)
    backend = "gloo"
    if own.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {local_rank} of this host has no CUDA device of its own: there are "
                f"{torch.cuda.device_count()}. Start as many processes as devices, or give "
                f"--device cpu."
            )
        own = torch.device("cuda", local_rank)
        torch.cuda.set_device(own)
        backend = "cpu:gloo,cuda:nccl"
    timeout = timedelta(seconds=timeout_seconds)
    store, rank, num = next(rendezvous("env://", timeout=timeout))
    dist.init_process_group(backend, store=store, rank=rank, world_size=num, timeout=timeout)
    try:
        shape = (parallelism.num_stages, parallelism.num_replicas)
        mesh = init_device_mesh(own.type, shape, mesh_dim_names=(STAGES, REPLICAS))
        control = dist.new_group(backend="gloo", timeout=timeout)
        assert isinstance(control, ProcessGroup)
        with expecting_others():
            yield Processes(parallelism, rank, own, mesh, control, PrefixStore("run", store))
    finally:
        dist.destroy_process_group()
