"""The table of addresses that Triton's schedule-free step keeps on the device."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch
from tests.kernels.checks import Trajectory


def test_the_table_is_made_when_a_tensor_moves(
    triton_kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    step_module = importlib.import_module("locallearn.kernels.triton.schedulefree_step")
    monkeypatch.setattr(step_module, "_TABLES", step_module._Tables())
    make_table, made = step_module._make_table, []
    monkeypatch.setattr(step_module, "_make_table", lambda q: made.append(1) or make_table(q))
    ours = Trajectory(triton_kernels, torch.float32, lr=0.01)
    gradients = [torch.zeros_like(p) for p in ours.y]
    moved = [torch.zeros_like(p) for p in ours.y]
    options = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    for g, count in [(gradients, 1), (gradients, 1), (moved, 2), (gradients, 2)]:
        triton_kernels.schedulefree_step(ours.y, g, ours.z, ours.v, ours.state, **options)
        assert len(made) == count
