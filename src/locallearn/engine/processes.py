"""What several processes of one training have to do with a learner."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch

from locallearn.errors import UserError

_EXPECTED: ContextVar[bool] = ContextVar("expected", default=False)


@contextlib.contextmanager
def expecting_others() -> Iterator[None]:
    """Within: learners are built for the processes that share the work (`locallearn.distributed`),
    which see to it that they train one network."""
    token = _EXPECTED.set(True)
    try:
        yield
    finally:
        _EXPECTED.reset(token)


def check_one_process() -> None:
    """Raises UserError in one of several processes that torch.distributed has joined, unless these
    are expected.

    Wrappers such as DistributedDataParallel average gradients over processes in one backward of
    the whole network. A block's gradient is used and freed inside the forward, so that each
    process would train a network of its own, and nothing would tell.
    """
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    num_processes = torch.distributed.get_world_size() if joined else 1
    if num_processes > 1 and not _EXPECTED.get():
        raise UserError(
            f"a LocalLearner trains in one process, and this is one of {num_processes}: gradients "
            f"of blocks are not averaged over processes. Start one process; or have several share "
            f"the work by `torchrun ... -m locallearn train --parallel layers`."
        )
