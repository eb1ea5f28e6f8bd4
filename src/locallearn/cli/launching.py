"""From `torchrun`'s processes to the team that a training asks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from locallearn.errors import Silent, UserError

if TYPE_CHECKING:
    from locallearn.distributed.parallelism import Parallelism
    from locallearn.engine.team import Team

# How long processes wait at most in an exchange: days, so that it is the signs of life that find a
# rank that died or hangs, however long --hang-timeout is.
_TIMEOUT_SECONDS = 7 * 86400.0


@dataclass(frozen=True)
class Sharing:
    """How a training is shared, as the command line says it.

    Arguments:
        parallel: "layers:2,data:2"; None for one process.
        balance: "2,3,1", blocks of each stage; None measures.
        sync_batch_norm: whether replicas normalise by whole batches.
        replay: inputs that a stage holds, to train on instead of waiting; None waits.
        hang_timeout: seconds.
    """

    parallel: str | None = None
    balance: str | None = None
    sync_batch_norm: bool = False
    replay: int | None = None
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

    if sharing.parallel is None and num_started() == 1:
        for flag, value in (
            ("balance", sharing.balance),
            ("sync-batch-norm", sharing.sync_batch_norm or None),
            ("replay", sharing.replay),
            ("hang-timeout", sharing.hang_timeout),
        ):
            if value is not None:
                raise UserError(f"--{flag} is of --parallel; give that too, or leave it out.")
        yield Team()
        return
    from locallearn.distributed.parallelism import Parallelism
    from locallearn.distributed.processes import joined
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
        if sharing.sync_batch_norm and parallelism.num_replicas == 1:
            raise UserError("--sync-batch-norm is of --parallel data; leave it out.")
        if sharing.replay is not None:
            _check_replay(sharing.replay, parallelism)
        if sharing.hang_timeout is not None and not sharing.hang_timeout > 0:
            raise UserError(
                f"--hang-timeout must be above 0 seconds, got {sharing.hang_timeout:g}."
            )
        chosen = choose_device(device)
    except UserError as error:
        raise _said_once(error) from error
    hang_after = HANG_AFTER_SECONDS if sharing.hang_timeout is None else sharing.hang_timeout
    with joined(parallelism, chosen, _TIMEOUT_SECONDS, hang_after=hang_after) as processes:
        yield ProcessTeam(
            processes,
            balance=sharing.balance,
            synchronize_batch_norm=sharing.sync_batch_norm,
            replay=sharing.replay,
        )


def check_is_alone(command: str) -> None:
    """For a command that trains in one process: several would all write the same directory.

    Arguments:
        command: its name.

    Raises:
        UserError: torchrun has started several; in the first of them.
        Silent: likewise, in the others.
    """
    num = num_started()
    if num > 1:
        raise _said_once(
            UserError(
                f"torchrun has started {num} processes, and `locallearn {command}` runs in one. "
                f"Start it without torchrun."
            )
        )


def num_started() -> int:
    """How many processes `torchrun` has started together; 1 where it did not start this one.

    Raises:
        UserError: WORLD_SIZE is no number.
    """
    if "RANK" not in os.environ:
        return 1
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"the environment has WORLD_SIZE={text}, which is no number of processes.")
    return int(text)


def _said_once(error: UserError) -> UserError:
    """What each process finds alone: the first says it."""
    return error if os.environ.get("RANK", "0") == "0" else Silent(str(error))


def _check_replay(size: int, parallelism: Parallelism) -> None:
    if size < 1:
        raise UserError(f"--replay must be at least 1 input, got {size}.")
    if parallelism.num_stages == 1 or parallelism.num_replicas > 1:
        raise UserError(
            f"--replay is of --parallel layers alone, whose stages could wait for each other; it "
            f"does not go with {parallelism}. Leave it out."
        )
