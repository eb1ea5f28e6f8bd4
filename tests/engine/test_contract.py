"""What every rule does in every model: it learns, resumes exactly, runs in bf16, and is as local
as it says."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from locallearn import LocalLearner, build_model, build_rule, list_models, list_rules
from locallearn.engine import audit_locality
from locallearn.models import Block, BlockStyle
from locallearn.rules import Rule

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in list_rules()),
    ("lls", {"basis": "random"}),
    ("lls-m", {"m_start": "identity", "similarity": 1.0}),
    ("lls-mxm", {"m_start": "identity", "similarity": 1.0}),
    ("local-losses", {"similarity": 1.0}),
    ("local-losses", {"local_loss": "sim"}),
    ("local-losses", {"local_loss": "predsim"}),
    ("pepita", {"update_order": "end"}),
    ("bp", {"bp_memory": "checkpoint"}),
    ("bp", {"bp_memory": "accumulate:2"}),
    ("bp", {"bp_memory": "fused-optimizer"}),
]
CLASSES = 4
WIDTHS = {"smallconv": 1 / 4, "smallconv-l": 1 / 12, "vgg8": 1 / 16, "vgg11": 1 / 16}


pytestmark = pytest.mark.usefixtures("one_thread")

every_rule_and_model = pytest.mark.parametrize(
    ("model", "name", "options"),
    [(model, *rule) for model in list_models() for rule in OPTIONS],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value,
)


def network_of(model: str, rule: Rule) -> nn.Module:
    return build_model(
        model,
        num_classes=CLASSES,
        in_channels=1,
        width=WIDTHS.get(model, 1 / 8),
        style=BlockStyle(rule.activation),
    )


def learner_of(
    model: str, rule: Rule, dtype: torch.dtype = torch.float32, seed: int = 0, **settings: Any
) -> LocalLearner:
    torch.manual_seed(seed)
    network = network_of(model, rule).to(dtype)
    return LocalLearner(network, rule, recalibration_batches=0, **settings)


def dataset(num: int = 16) -> tuple[Tensor, Tensor]:
    """Noise about one picture for each class, 32x32."""
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randn(CLASSES, 1, 32, 32, generator=generator)
    labels = torch.arange(num) % CLASSES
    return pictures[labels] + 0.3 * torch.randn(num, 1, 32, 32, generator=generator), labels


@every_rule_and_model
def test_learns_and_resumes_exactly(model: str, name: str, options: dict[str, Any]) -> None:
    rule = build_rule(name, **options)
    images, labels = dataset()
    learner = learner_of(model, rule)
    first = learner.step(images, labels)
    assert list(first.block_losses) == learner.loss_names
    for _ in range(2):
        learner.step(images, labels)

    state = learner.training_state()
    twin = learner_of(model, rule, seed=1)  # other weights, random bases and feedback
    twin.load_training_state(copy.deepcopy(state))
    resumed = twin.step(images, labels)
    last = learner.step(images, labels)
    twins = twin.state_dict()
    for key, value in learner.state_dict().items():
        assert torch.equal(value, twins[key]), key
    assert torch.equal(resumed.loss, last.loss)

    for _ in range(4):
        last = learner.step(images, labels)
    assert last.loss < first.loss
    for block, loss in last.block_losses.items():
        assert loss < first.block_losses[block], block


@every_rule_and_model
def test_runs_in_bf16(model: str, name: str, options: dict[str, Any]) -> None:
    learner = learner_of(model, build_rule(name, **options), precision="bf16")
    before = {key: p.detach().clone() for key, p in learner.named_parameters()}
    images, labels = dataset()
    for _ in range(2):
        result = learner.step(images, labels)
    assert result.loss.isfinite()
    assert result.logits.dtype == torch.float32
    for key, p in learner.named_parameters():
        assert p.dtype == torch.float32
        assert p.isfinite().all()
        assert not torch.equal(p, before[key]), key


@every_rule_and_model
def test_what_reaches_a_block_is_what_the_rule_declares(
    model: str, name: str, options: dict[str, Any]
) -> None:
    rule = build_rule(name, **options)
    images, labels = dataset(8)
    # The first block and the last but one, which has one behind it.
    names = [n for n, m in network_of(model, rule).named_modules() if isinstance(m, Block)]
    chosen = [names[0], names[-2]]
    audited = audit_locality(
        lambda: learner_of(model, rule, torch.float64, optimizer=sgd),
        images.double(),
        labels,
        blocks=chosen,
    )
    assert list(audited) == chosen
    for block, information in audited.items():
        assert information == rule.learns_from, block


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1.0)
