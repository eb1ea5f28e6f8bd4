"""Several steps of a learner with the CUDA kernels' sources, run on the CPU, and the reference's.

tests/engine/test_gpu.py is the like of it on a GPU, for Triton's too: its interpreter takes 7 s for
a step, so that here it has the ops alone.
"""

from __future__ import annotations

import pytest
import torch
from tests.kernels.checks import DEVICE, check
from torch import Tensor, nn

from locallearn import LocalLearner, build_model
from locallearn.engine.optimizers import ScheduleFreeAdamW

pytestmark = [
    pytest.mark.skipif(DEVICE == "cuda", reason="test_gpu.py has it where there is a GPU"),
    pytest.mark.usefixtures("one_thread", "cuda_kernels"),
]
NUM_STEPS = 5
BATCH_SIZE = 8


def start(rule: str, precision: str, backend: str) -> LocalLearner:
    torch.manual_seed(1)
    dtype = torch.float64 if precision == "fp64" else torch.float32
    model = build_model("smallconv", image_size=8, width=0.25).to(dtype)

    def optimizer(parameters: list[nn.Parameter]) -> ScheduleFreeAdamW:
        # With a smaller eps, weights whose gradient is next to nothing move by its rounding.
        return ScheduleFreeAdamW(parameters, lr=5e-3, eps=1e-3)

    return LocalLearner(
        model,
        rule,
        precision="fp32" if precision == "fp64" else precision,
        backend=backend,
        optimizer=optimizer,
        recalibration_batches=0,
    )


def trained(learner: LocalLearner) -> list[Tensor]:
    """The parameters after some steps."""
    generator = torch.Generator().manual_seed(3)
    dtype = next(learner.model.parameters()).dtype
    for _ in range(NUM_STEPS):
        images = torch.randn(BATCH_SIZE, 3, 8, 8, generator=generator)
        labels = torch.randint(10, (BATCH_SIZE,), generator=generator)
        learner.step(images.to(dtype), labels)
    return [p.detach() for p in learner.parameters()]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("rule", ["lls", "lls-m", "lls-mxm"])
def test_the_weights_are_the_references(
    rule: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    low = start(rule, precision, "reference")
    exact = start(rule, "fp64", "reference")
    exact.heads.load_state_dict(start(rule, precision, "reference").heads.state_dict())
    # Which refuses a device backend on a CPU.
    monkeypatch.setattr("locallearn.engine.learner.choose_backend", lambda name, *args: name)
    ours = start(rule, precision, "cuda")
    before = [p.detach().clone() for p in ours.parameters()]
    results = [trained(learner) for learner in (ours, low, exact)]
    names = [name for name, _ in ours.named_parameters()]
    assert not any(map(torch.equal, results[0], before))
    check(*results, names)
