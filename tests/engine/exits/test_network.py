"""Inference that images leave early: the same answers as without, and less computed."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pytest
import torch
import torchvision
from torch import Tensor, nn

from locallearn import LocalLearner, UserError, build_model
from locallearn.engine.exits import OUTPUT, Prediction


def own_learner(
    rule: str = "lls-mxm", model: str = "smallconv", size: int = 16, **settings: object
) -> LocalLearner:
    torch.manual_seed(0)
    network = build_model(model, num_classes=4, in_channels=3, image_size=(size, size), width=0.5)
    learner = LocalLearner(network, rule, num_classes=4, **settings)  # type: ignore[arg-type]
    for _ in range(2):
        learner.step(torch.randn(8, 3, size, size), torch.arange(8) % 4)
    return learner


def expected(
    logits: dict[str, Tensor], temperatures: dict[str, float], threshold: float
) -> tuple[Tensor, Tensor]:
    """Where each image leaves, and its probabilities, from the logits of all exits."""
    names = list(logits)
    probabilities = torch.stack(
        [(logits[n] / temperatures.get(n, 1.0)).softmax(dim=1) for n in names]
    )
    places = []
    for image in range(probabilities.shape[1]):
        sure = [i for i, p in enumerate(probabilities[:, image].amax(dim=1)) if p >= threshold]
        places.append(sure[0] if sure else len(names) - 1)
    chosen = torch.tensor(places)
    return chosen, probabilities[chosen, torch.arange(len(places))]


def check_prediction(
    learner: LocalLearner, images: Tensor, threshold: float, *, tolerance: float = 1e-5
) -> Prediction:
    prediction = learner.predict(images, exit_threshold=threshold)
    exits, probabilities = expected(
        learner.exit_logits(images), learner.exit_temperatures, threshold
    )
    assert prediction.exits.tolist() == exits.tolist()
    torch.testing.assert_close(prediction.probabilities, probabilities, rtol=0, atol=tolerance)
    assert prediction.classes.tolist() == probabilities.argmax(dim=1).tolist()
    return prediction


def middle_threshold(learner: LocalLearner, images: Tensor) -> float:
    """At which some of the heads are sure, and no rounding decides which."""
    sure = [each.softmax(dim=1).amax(dim=1) for each in learner.exit_logits(images).values()]
    ordered = torch.cat(sure).sort().values
    ordered = ordered[len(ordered) // 4 : -(len(ordered) // 4)]
    place = int(ordered.diff().argmax())
    return float(ordered[place : place + 2].mean())


@pytest.mark.parametrize("rule", ["lls", "lls-m", "lls-mxm", "local-losses"])
@pytest.mark.parametrize("num_images", [1, 2, 9])
def test_each_image_has_the_answer_of_its_first_confident_block(rule: str, num_images: int) -> None:
    learner = own_learner(rule)
    images = torch.randn(num_images, 3, 16, 16)
    whole = learner(images)
    logits = learner.exit_logits(images)
    assert list(logits) == ["conv1", "conv2", "conv3", "linear1", OUTPUT]
    assert torch.equal(logits[OUTPUT], whole)
    learner.exit_temperatures = {"conv2": 0.2, OUTPUT: 3.0}
    for threshold in (0.0, middle_threshold(learner, images), 1.0):
        check_prediction(learner, images, threshold)


@pytest.mark.parametrize(("model", "size"), [("vgg8", 16), ("mobilenet-v1", 32)])
def test_other_networks_of_the_package(model: str, size: int) -> None:
    learner = own_learner(model=model, size=size)
    images = torch.randn(6, 3, size, size)
    check_prediction(learner, images, middle_threshold(learner, images))


@pytest.mark.parametrize("settings", [{"head_after_pool": True}, {"group_blocks": 2}])
def test_heads_behind_a_pool_and_groups_of_blocks(settings: dict[str, object]) -> None:
    learner = own_learner(**settings)
    images = torch.randn(6, 3, 16, 16)
    check_prediction(learner, images, middle_threshold(learner, images))


def test_local_logits_are_those_of_the_step() -> None:
    """Without a label they are what the head says of the block in training mode."""
    learner = own_learner("lls", optimizer="sgd", lr=1e-12)
    images = torch.randn(8, 3, 16, 16)
    labels = torch.arange(8) % 4
    # At momentum 1 the running statistics are those of the last batch, but for the unbiased
    # variance.
    for module in learner.model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    step = learner.step(images, labels)
    local = learner.exit_logits(images)
    for name in ("conv1", "conv2", "conv3"):
        torch.testing.assert_close(local[name], step.block_logits[name], rtol=0, atol=0.05)


class Residual(nn.Module):
    """Whose second block is passed by."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.third = nn.Sequential(nn.Conv2d(16, 8, 3, padding=1), nn.ReLU())
        self.classifier = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        both = torch.cat([first, self.second(first)], dim=1)
        out: Tensor = self.classifier(self.third(both).mean((2, 3)))
        return out


def test_a_block_that_is_passed_by_is_no_exit() -> None:
    torch.manual_seed(0)
    learner = LocalLearner(Residual(), num_classes=4, blocks=["first", "second", "third"])
    images = torch.randn(5, 3, 8, 8)
    assert learner.early_exits(images).names == ("first", "third", OUTPUT)
    check_prediction(learner, images, middle_threshold(learner, images))
    with pytest.raises(UserError, match=r"can't leave at block 'second'.*first, third"):
        learner.early_exits(images, ["second"])


class Tokens(nn.Module):
    """Sequence first: images lie along the second dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16) for _ in range(2))
        self.classifier = nn.Linear(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens).transpose(0, 1)
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.classifier(x.mean(dim=0))
        return out


def test_batches_in_the_second_dimension() -> None:
    torch.manual_seed(0)
    learner = LocalLearner(Tokens(), num_classes=4, example_input=torch.randint(0, 10, (4, 5)))
    tokens = torch.randint(0, 10, (6, 5))
    assert len(learner.early_exits(tokens).names) == 3
    check_prediction(learner, tokens, middle_threshold(learner, tokens))


def test_torchvision_in_channels_last() -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=4)
    learner = LocalLearner(model, num_classes=4, example_input=torch.randn(3, 3, 32, 32))
    images = torch.randn(4, 3, 32, 32)
    names = learner.early_exits(images).names
    assert names[0] == "conv1"
    assert names[-3:] == ("layer4.0", "layer4.1", OUTPUT)
    check_prediction(learner, images, middle_threshold(learner, images), tolerance=1e-4)


def test_images_that_left_are_not_computed() -> None:
    learner = own_learner()
    images = torch.randn(6, 3, 16, 16)
    seen: list[int] = []
    handle = learner.model.classifier.register_forward_hook(
        lambda module, inputs, output: seen.append(len(inputs[0]))
    )
    convolved: list[int] = []
    other = learner.model.conv2.conv.register_forward_hook(
        lambda module, inputs, output: convolved.append(len(inputs[0]))
    )
    learner.early_exits(images)
    seen.clear()
    convolved.clear()
    learner.predict(images, exit_threshold=0.0)
    assert seen == convolved == []  # all left at conv1, and the forward with them
    middle = float(learner.exit_logits(images)["conv1"].softmax(dim=1).amax(dim=1).median())
    convolved.clear()
    prediction = learner.predict(images, exit_threshold=middle)
    still_in = int((prediction.exits > 0).sum())
    assert 0 < still_in < 6
    assert convolved == [still_in]
    handle.remove()
    other.remove()


def test_macs_of_each_exit_by_hand() -> None:
    learner = own_learner("lls")
    image = torch.randn(1, 3, 16, 16)
    macs = learner.early_exits(image).num_macs(image)
    conv1 = 16 * 16 * 9 * 3 * 16
    head1 = learner.heads[0].projection().numel()
    assert macs["conv1"] == conv1 + head1
    conv2 = learner.model.conv2.conv.weight.numel() * 8 * 8
    head2 = learner.heads[1].projection().numel()
    assert macs["conv2"] == macs["conv1"] + conv2 + head2


def test_no_training_and_no_trace_is_left() -> None:
    learner = own_learner()
    images = torch.randn(5, 3, 16, 16)
    learner(images)
    before = {name: t.clone() for name, t in learner.state_dict().items()}
    learner.predict(images, exit_threshold=0.5)
    learner.exit_logits(images)
    for name, tensor in learner.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all("forward" not in vars(module) for module in learner.model.modules())
    learner.step(torch.randn(8, 3, 16, 16), torch.arange(8) % 4)  # goes on as before


def test_calibration_is_kept_and_uncalibrated_exits_are_told_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    learner = own_learner()
    images, labels = torch.randn(40, 3, 16, 16), torch.arange(40) % 4
    with caplog.at_level(logging.WARNING):
        learner.predict(images, exit_threshold=0.9)
        learner.predict(images, exit_threshold=0.9)
    assert sum("not calibrated" in record.message for record in caplog.records) == 1
    found = learner.calibrate_exits([(images[:20], labels[:20]), (images[20:], labels[20:])])
    assert set(found) == set(learner.exit_temperatures) == set(learner.early_exits(images).names)
    check_prediction(learner, images, 0.4)


@pytest.mark.parametrize("rule", ["bp", "dfa", "drtp", "pepita"])
def test_rules_without_local_logits_have_no_exits(rule: str) -> None:
    torch.manual_seed(0)
    network = build_model("smallconv", num_classes=4, in_channels=3, image_size=(16, 16))
    learner = LocalLearner(network, rule, num_classes=4)
    images = torch.randn(3, 3, 16, 16)
    with pytest.raises(UserError, match="no local losses"):
        learner.predict(images, exit_threshold=0.5)
    whole = learner.predict(images)
    assert whole.exit_names == (OUTPUT,)
    torch.testing.assert_close(whole.probabilities, learner(images).softmax(dim=1))


def test_frozen_blocks_are_no_exits() -> None:
    torch.manual_seed(0)
    images = torch.randn(3, 3, 16, 16)
    learners = []
    for trained in ("none", "conv3"):
        network = build_model("smallconv", num_classes=4, in_channels=3, image_size=(16, 16))
        learners.append(
            LocalLearner(
                network, num_classes=4, trained_blocks=trained, example_input=images, rule="lls-m"
            )
        )
    with pytest.raises(UserError, match="every block is frozen"):
        learners[0].predict(images, exit_threshold=0.5)
    assert learners[1].early_exits(images).names == ("conv3", OUTPUT)
    check_prediction(learners[1], images, middle_threshold(learners[1], images))


def test_sim_has_losses_but_no_logits() -> None:
    from locallearn import build_rule

    torch.manual_seed(0)
    network = build_model("smallconv", num_classes=4, in_channels=3, image_size=(16, 16))
    learner = LocalLearner(network, build_rule("local-losses", local_loss="sim"), num_classes=4)
    with pytest.raises(UserError, match="no block of BlockNetwork can be an exit"):
        learner.predict(torch.randn(3, 3, 16, 16), exit_threshold=0.5)


@pytest.mark.parametrize(
    ("threshold", "names", "message"),
    [
        (1.5, None, r"exit_threshold must be in \[0, 1\], got 1.5"),
        (float("nan"), None, r"exit_threshold must be in \[0, 1\]"),
        (0.5, ["conv9"], r"'conv9' is no block with a head.*conv1, conv2, conv3, linear1"),
        (0.5, [], "can be an exit|none"),
    ],
)
def test_wrong_arguments(threshold: float, names: Sequence[str] | None, message: str) -> None:
    learner = own_learner()
    with pytest.raises(UserError, match=message):
        learner.predict(torch.randn(2, 3, 16, 16), exit_threshold=threshold, exits=names)


def test_chosen_exits_alone() -> None:
    learner = own_learner()
    images = torch.randn(4, 3, 16, 16)
    prediction = learner.predict(images, exit_threshold=0.0, exits=["conv2"])
    assert prediction.exit_names == ("conv2", OUTPUT)
    assert prediction.exits.tolist() == [0] * 4
