"""A learner is made in one process."""

from __future__ import annotations

import pytest
import torch

from locallearn import LocalLearner, UserError, build_model


@pytest.mark.parametrize("num_processes", [1, 2])
def test_one_of_several_processes_is_refused(
    num_processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: num_processes)
    model = build_model("smallconv", width=0.25)
    if num_processes == 1:
        assert LocalLearner(model, "lls").block_names
        return
    with pytest.raises(UserError, match="trains in one process, and this is one of 2: gradients"):
        LocalLearner(model, "lls")
