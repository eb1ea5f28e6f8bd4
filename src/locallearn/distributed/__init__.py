"""Training spread over processes: layers in parallel, data in parallel, or both.

`torchrun` starts the processes, `joined` brings them together, and `ProcessTeam` is what the
training loop then asks instead of doing all by itself: docs/parallel.md. What a process computes is
what the engine would in one; there is no arithmetic here.
"""

from locallearn.distributed.balance import balanced
from locallearn.distributed.parallelism import Parallelism
from locallearn.distributed.processes import Processes, joined
from locallearn.distributed.replicas import Replica
from locallearn.distributed.team import ProcessTeam

__all__ = ["Parallelism", "ProcessTeam", "Processes", "Replica", "balanced", "joined"]
