"""Layers in parallel: the same as one process, bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from benchmarks.same_run import differences
from tests.distributed.training import train_alone, train_in_processes
from torch import nn

from locallearn.distributed.stages import Spread
from locallearn.engine import LocalLearner
from locallearn.engine.run import RunDirectory
from locallearn.errors import UserError
from locallearn.models import build_model

# An odd last batch, dropout, augmentation, validation; the schedule-free optimizer's two points,
# and BatchNorm's statistics re-estimated in between.
SMALL = {
    "dataset": "digits",
    "limit_train": 150,
    "limit_test": 70,
    "batch_size": 32,
    "test_batch_size": 32,
    "val_split": 0.1,
    "epochs": 2,
    "dropout": 0.2,
    "augment": "standard",
    "num_threads": 1,
    "width": 0.25,
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory):
    """By settings: the run of one process, made once."""
    made: dict[str, Path] = {}

    def run(**settings: object) -> Path:
        key = repr(sorted(settings.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("alone") / "run"
            train_alone(made[key], **SMALL | settings)
        return made[key]

    return run


@pytest.mark.parametrize(
    ("num", "balance", "settings"),
    [
        (2, None, {"rule": "lls"}),
        (3, "1,1,2", {"rule": "lls-mxm", "backend": "reference"}),
        (4, "1,1,1,1", {"rule": "local-losses", "optimizer": "adamw", "schedule": "plateau"}),
        (2, "3,1", {"rule": "lls-m", "precision": "bf16", "channels_last": False}),
        (2, "1,1", {"rule": "lls", "group_blocks": 2}),
        (2, None, {"rule": "drtp"}),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_the_bits_are_those_of_one_process(alone, tmp_path: Path, num, balance, settings) -> None:
    train_in_processes("layers", num, tmp_path / "run", balance, **SMALL | settings)
    assert differences(alone(**settings), tmp_path / "run") == []


def test_a_stopped_run_goes_on_with_any_number_of_processes(alone, tmp_path: Path) -> None:
    """Stopped in the middle of epochs by 3, by 2 and by 1; the output layer is in a stage of its
    own process throughout."""
    out = tmp_path / "run"
    train_in_processes("layers", 3, out, "1,2,1", **SMALL | {"rule": "lls-mxm"}, stop_after=2)
    assert not RunDirectory(out).is_finished
    train_in_processes("layers", 2, out, None, stop_after=4)
    train_alone(out, stop_after=2)
    train_in_processes("layers", 4, out)
    assert differences(alone(rule="lls-mxm"), out) == []


# Of its four blocks only the last can begin a stage: what skips over the others leads before it.
SKIPPING = """
from torch import nn
import torch.nn.functional as F


def block(c_in, c_out, stride=1):
    conv = nn.Conv2d(c_in, c_out, 3, stride, 1)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU())


class Skipping(nn.Module):
    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.one, self.two = block(in_channels, 8), block(8, 8)
        self.three, self.four = block(8, 8), block(8, 12, 2)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(12, num_classes)

    def forward(self, x):
        a = F.dropout(self.one(x), 0.1, self.training)
        b = self.drop(self.two(a) + a)
        c = self.three(b) + a
        return self.head(self.drop(self.four(c)).mean((2, 3)))


def build(num_classes, in_channels, **others):
    return Skipping(num_classes, in_channels)
"""


def test_a_network_of_another_make_is_cut_where_it_can_be(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(SKIPPING)
    settings = SMALL | {"model": f"{tmp_path / 'net.py'}:build", "blocks": "one,two,three,four"}
    for name in ("width", "dropout"):
        settings.pop(name)
    train_alone(tmp_path / "alone", **settings)
    train_in_processes("layers", 2, tmp_path / "run", **settings)
    assert differences(tmp_path / "alone", tmp_path / "run") == []
    images = torch.randn(3, 1, 8, 8)
    model = build_model(settings["model"], num_classes=10, in_channels=1, image_size=8)
    learner = LocalLearner(
        model, "lls", num_classes=10, blocks="one,two,three,four", example_input=images
    )
    spread = Spread(learner, images)
    assert [spread.can_begin_at(name) for name in spread.names[1:]] == [False, False, True]
    with pytest.raises(UserError, match="no stage can begin at block 'three': what follows reads"):
        spread.stage(1, (2, 2))


def test_a_stage_holds_no_weights_of_others() -> None:
    """Nor optimizer state; and what it has let go it can hold again."""
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    learner = LocalLearner(build_model("smallconv", num_classes=10, width=0.25), "lls-mxm")
    learner.step(images, labels)
    before = {name: t.clone() for name, t in learner.training_state()["model"].items()}
    spread = Spread(learner, images)
    stage = spread.stage(1, (2, 1, 1))
    held = {
        name for name, p in learner.model.named_parameters() if p.untyped_storage().nbytes() > 4
    }
    own = {name for name in before if name.startswith("conv3.") and "running" not in name}
    assert held == {name for name in own if "num_batches" not in name}
    with_state = {name for name, o in learner.optimizers.items() if o.state}
    assert with_state == {"conv3"}
    with stage.alone(lambda tensor: None):
        learner.model(torch.randn(4, *spread.cut("conv3").feature_shape))
    stage.hold_all()
    learner.model.load_state_dict(before)
    for name, tensor in learner.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


# -- networks that can't be cut everywhere, or not as one might think ----------------------------


def block(c_in: int, c_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, 1, 1), nn.BatchNorm2d(c_out), nn.ReLU())


class Base(nn.Module):
    """stem -> one -> two -> fc, the stem in no block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, 1, 1)
        self.one, self.two, self.fc = block(4, 6), block(6, 6), nn.Linear(6, 10)
        self.scale = nn.Parameter(torch.tensor(2.0), requires_grad=False)
        self.norm = nn.BatchNorm2d(6, affine=False)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.two(self.between(self.one(self.stem(x).detach())))
        return self.fc(self.scale * x.mean((2, 3)))


class OneNormForBoth(Base):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.two(self.between(self.one(self.stem(x).detach()))))
        return self.fc(x.mean((2, 3)))


class Windows(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.one(self.stem(x).detach())
        halves = torch.cat(x.chunk(2, dim=2))  # (2N, C, H / 2, W)
        return self.fc(sum(self.two(halves).mean((2, 3)).chunk(2)))


class Contiguous(Base):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x.contiguous()


class TwoNames(Base):
    def __init__(self) -> None:
        super().__init__()
        self.classifier = self.fc


def spread_of(model: nn.Module) -> Spread:
    images = torch.randn(3, 1, 8, 8)
    learner = LocalLearner(
        model, "lls", num_classes=10, blocks="one,two", example_input=images, backend="autograd"
    )
    return Spread(learner, images)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (OneNormForBoth, "'two': BatchNorm2d with numbers of its own runs before it and after it"),
        (Windows, "'two': what it reads does not have the batch, image by image"),
    ],
)
def test_where_no_stage_can_begin(model: type[nn.Module], message: str) -> None:
    with pytest.raises(UserError, match=f"no stage can begin at block {message}"):
        spread_of(model()).stage(1, (1, 1))


@pytest.mark.filterwarnings("ignore:no block holds")
@pytest.mark.parametrize("model", [Base, Contiguous, TwoNames])
def test_stages_in_turn_are_the_network(model: type[nn.Module]) -> None:
    """Trained one after the other on the same batches, with what each holds alone; their states,
    put together, are the whole network's."""
    torch.manual_seed(1)
    whole = model()
    learners = [spread_of(copy.deepcopy(whole)).learner for _ in range(3)]
    images = torch.randn(3, 1, 8, 8)
    stages = [Spread(learners[n], images).stage(n, (1, 1)) for n in range(2)]
    for seed in range(3):
        batch = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
        labels = torch.arange(8)
        learners[2].step(batch, labels)
        handed_on: list[torch.Tensor] = []
        with stages[0].alone(handed_on.append):
            stages[0].learner.step_blocks(batch, labels)
        with stages[1].alone(handed_on.append):
            stages[1].learner.step(handed_on[0], labels)
    expected = learners[2].training_state()
    states = [s.learner.training_state() for s in stages]
    found = stages[0].owners.merged(
        states[0],
        [s.owners.part(state, n) for n, (s, state) in enumerate(zip(stages, states, strict=False))],
    )
    for part in ("model", "heads"):
        for name, tensor in expected[part].items():
            assert torch.equal(found[part][name], tensor), name


@pytest.mark.parametrize("rule", ["bp", "dfa", "pepita"])
def test_rules_that_need_later_layers_are_refused(rule: str) -> None:
    torch.manual_seed(0)
    learner = LocalLearner(build_model("smallconv", num_classes=10, width=0.25), rule)
    with pytest.raises(UserError, match=f"rule '{rule}' needs .*, as bp, dfa and pepita do"):
        Spread(learner, torch.randn(3, 3, 32, 32))
