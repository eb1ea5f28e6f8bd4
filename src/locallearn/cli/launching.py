"""From `torchrun`'s processes to the team that a training asks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from locallearn.errors import Silent, UserError

if TYPE_CHECKING:
    from locallearn.engine.team import Team

# How long processes wait at most in an exchange; a rank that dies or hangs is found sooner, by its
# signs of life.
_TIMEOUT_SECONDS = 3600.0


@dataclass(frozen=True)
class Sharing:
    """How a training is shared, as the command line says it.

    Arguments:
        parallel: "layers:2,data:2"; None for one process.
        balance: "2,3,1", blocks of each stage; None measures.
        hang_timeout: seconds.
    """

    parallel: str | None = None
    balance: str | None = None
    hang_timeout: float | None = None


def may_be_restarted() -> bool:
    """Whether torchrun would start the same command again (--max-restarts)."""
    return os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"


def is_restart() -> bool:
    """Whether torchrun has started the same command before."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


@contextlib.contextmanager
def sharing_work(sharing: Sharing, device: str) -> Iterator[Team]:
    """Within: the processes that torchrun has started are joined; or this one is alone.

    Arguments:
        sharing: how.
        device: as --device says.

    Raises:
        UserError: what does not fit the processes that there are; in the first of them.
        Silent: likewise, in the others.
    """
    from locallearn.engine.team import Team

    if sharing.parallel is None and "RANK" not in os.environ:
        for flag, value in (("balance", sharing.balance), ("hang-timeout", sharing.hang_timeout)):
            if value is not None:
                raise UserError(f"--{flag} is of --parallel; give that too, or leave it out.")
        yield Team()
        return
    from locallearn.distributed.parallelism import Parallelism
    from locallearn.distributed.processes import joined, num_started
    from locallearn.distributed.pulse import HANG_AFTER_SECONDS
    from locallearn.distributed.team import ProcessTeam
    from locallearn.engine import choose_device

    try:
        num = num_started()
        if sharing.parallel is None:
            raise UserError(
                f"torchrun has started {num} processes, and nothing says how they share the work. "
                f"Give --parallel layers, or --parallel data."
            )
        parallelism = Parallelism.parse(sharing.parallel, num)
        if sharing.balance is not None and parallelism.num_stages == 1:
            raise UserError("--balance is of --parallel layers; leave it out.")
        chosen = choose_device(device)
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            raise Silent(str(error)) from error
        raise
    hang_after = sharing.hang_timeout or HANG_AFTER_SECONDS
    with joined(parallelism, chosen, _TIMEOUT_SECONDS, hang_after=hang_after) as processes:
        yield ProcessTeam(processes, balance=sharing.balance)
