"""What several processes of one training have to do with a learner: nothing yet."""

from __future__ import annotations

import torch

from locallearn.errors import UserError


def check_one_process() -> None:
    """Raises UserError in one of several processes that torch.distributed has joined.

    Wrappers such as DistributedDataParallel average gradients over processes in one backward of
    the whole network. A block's gradient is used and freed inside the forward, so that each
    process would train a network of its own, and nothing would tell.
    """
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    num_processes = torch.distributed.get_world_size() if joined else 1
    if num_processes > 1:
        raise UserError(
            f"a LocalLearner trains in one process, and this is one of {num_processes}: gradients "
            f"of blocks are not averaged over processes yet. Start one process."
        )
