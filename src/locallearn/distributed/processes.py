"""The processes of one training, as `torchrun` starts them."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, ProcessGroup, Store  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.rendezvous import rendezvous

from locallearn.distributed.agreement import meet
from locallearn.distributed.parallelism import Parallelism
from locallearn.distributed.pulse import DEAD_AFTER_SECONDS, HANG_AFTER_SECONDS, Pulse
from locallearn.engine.config import choose_device
from locallearn.engine.processes import expecting_others
from locallearn.errors import Silent, UserError

STAGES, REPLICAS = "layers", "data"  # dimensions of the mesh

# What torchrun tells each process.
_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

_START_SECONDS = 60.0  # for all to come


def num_restarts() -> int:
    """How often torchrun has started the processes again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


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
        pulse: this process's signs of life, and its look at the others'.
        hang_after: seconds that one may compute without a word.
        turns: numbers what is gathered over the store, which all do in the same order.
    """

    parallelism: Parallelism
    rank: int
    device: torch.device
    mesh: DeviceMesh
    control: ProcessGroup
    store: Store
    pulse: Pulse
    hang_after: float = HANG_AFTER_SECONDS
    turns: Iterator[int] = field(default_factory=itertools.count)

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

    def remedy(self, directory: Path, command: str) -> str:
        """What is to be done once a rank is lost, for the message.

        Arguments:
            directory: of the run.
            command: that goes on with it.
        """
        if num_restarts() < int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
            return f"torchrun starts all again, from the last checkpoint in {directory}."
        return f"Go on from the last checkpoint with `{command}`."

    def resume_command(self, directory: Path, flags: Sequence[str] = ()) -> str:
        """What the user types to go on with a run, on as many processes of one host.

        Arguments:
            directory: of the run.
            flags: more of them.
        """
        flags = [f"--parallel {self.parallelism}", *flags]
        if self.device.type != choose_device("auto"):
            flags.append(f"--device {self.device.type}")
        if self.hang_after != HANG_AFTER_SECONDS:
            flags.append(f"--hang-timeout {self.hang_after:g}")
        return (
            f"torchrun --nproc-per-node {self.num} -m locallearn train "
            f"{' '.join(flags)} --resume {directory}"
        )

    def rank_of(self, stage: int, replica: int) -> int:
        return stage * self.parallelism.num_replicas + replica

    @property
    def replicas(self) -> ProcessGroup:
        """The processes that train the same stage, on the device."""
        return self.mesh.get_group(REPLICAS)


@contextlib.contextmanager
def joined(
    parallelism: Parallelism,
    device: str,
    timeout_seconds: float,
    *,
    hang_after: float = HANG_AFTER_SECONDS,
    dead_after: float = DEAD_AFTER_SECONDS,
) -> Iterator[Processes]:
    """Within: the processes that torchrun has started are joined, and watch each other.

    Arguments:
        parallelism: how they are laid out.
        device: "cpu" or "cuda"; of several CUDA devices each process of a host takes its own.
        timeout_seconds: how long one waits for another in an exchange.
        hang_after: seconds that one may compute without a word, see `pulse`.
        dead_after: seconds without a sign of life after which one is taken for dead.

    Raises:
        UserError: not started by torchrun, more processes of a host than CUDA devices, one that
            does not come, or one that is laid out in another way.
        LostRank: one that died, hangs or failed.
        Silent: where another process says it.
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
            message = (
                f"process {local_rank} of this host has no CUDA device of its own: there are "
                f"{torch.cuda.device_count()}. Start as many processes as devices, or give "
                f"--device cpu."
            )
            # Each finds it alone; the first of them says it.
            if local_rank > torch.cuda.device_count():
                raise Silent(message)
            raise UserError(message)
        own = torch.device("cuda", local_rank)
        torch.cuda.set_device(own)
        backend = "cpu:gloo,cuda:nccl"
    timeout = timedelta(seconds=timeout_seconds)
    store, rank, num = _reach_others()
    names = [_place(parallelism, each) for each in range(num)]
    layout = {"--parallel": str(parallelism), "--device": own.type}
    meet(store, rank, names, layout, _START_SECONDS)
    with (
        Pulse(store, rank, names, hang_after=hang_after, dead_after=dead_after) as pulse,
        pulse.failing(),
    ):
        try:
            with pulse.waiting(None):
                dist.init_process_group(
                    backend, store=store, rank=rank, world_size=num, timeout=timeout
                )
                mesh = _mesh(parallelism, own.type, timeout)
                control = dist.new_group(backend="gloo", timeout=timeout)
            assert isinstance(control, ProcessGroup)
            run = PrefixStore("run", store)
            with expecting_others(), pulse.failing():  # before the groups are left, which may block
                yield Processes(
                    parallelism, rank, own, mesh, control, run, pulse, hang_after=hang_after
                )
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def _mesh(parallelism: Parallelism, device_type: str, timeout: timedelta) -> DeviceMesh:
    """Stages by replicas. `init_device_mesh` gives its groups no limit but the backend's own."""
    grid = torch.arange(parallelism.num_processes).view(-1, parallelism.num_replicas)
    groups = []
    for lines in (grid.T, grid):
        group, _ = dist.new_subgroups_by_enumeration(lines.tolist(), timeout=timeout)
        assert isinstance(group, ProcessGroup)
        groups.append(group)
    return DeviceMesh.from_group(groups, device_type, grid, mesh_dim_names=(STAGES, REPLICAS))


def _reach_others() -> tuple[Store, int, int]:
    """The store that torchrun keeps, this process's rank, and how many there are."""
    try:
        store, rank, num = next(rendezvous("env://", timeout=timedelta(seconds=_START_SECONDS)))
    except RuntimeError as error:
        message = (
            f"torchrun's store can't be reached at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']} ({str(error).splitlines()[0]})."
        )
        # Each finds it alone; one of a host says it.
        if os.environ["LOCAL_RANK"] != "0":
            raise Silent(message) from error
        raise UserError(message) from error
    # torchrun keeps its store when it starts the processes again: what was said then is history.
    return PrefixStore(f"attempt/{num_restarts()}", store), rank, num


def _place(parallelism: Parallelism, rank: int) -> str:
    """ "rank 3 (stage 1, replica 1)"; of a single stage, or without replicas, the one of them."""
    words = []
    if parallelism.num_stages > 1:
        words.append(f"stage {rank // parallelism.num_replicas}")
    if parallelism.num_replicas > 1:
        words.append(f"replica {rank % parallelism.num_replicas}")
    return f"rank {rank} ({', '.join(words)})" if words else f"rank {rank}"
