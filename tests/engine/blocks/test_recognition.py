"""Which blocks of other makes the closed form covers, and that it is exact there."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from locallearn import LocalLearner
from locallearn.engine.blocks import plan_blocks, recognize

pytestmark = pytest.mark.usefixtures("one_thread")


class Functional(nn.Module):
    """Layer and norm as modules, the activation as whatever is given."""

    def __init__(
        self, layer: nn.Module, norm: nn.Module, activation: Callable[..., Tensor]
    ) -> None:
        super().__init__()
        self.norm = norm  # held in another order than run
        self.layer = layer
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(self.layer(x)))


def conv(c_in: int = 3, c_out: int = 6, size: int = 3, **options: object) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, size, padding=size // 2, **{"bias": False, **options})


def norm(channels: int = 6, **options: object) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, **options)


def functional(activation: Callable[..., Tensor]) -> nn.Module:
    return Functional(conv(), norm(), activation)


SEPARABLE = (conv(3, 3, groups=3), norm(3), nn.ReLU(), conv(3, 6, 1), norm(), nn.ReLU())

COVERED: dict[str, Callable[[], nn.Module]] = {
    "conv-bn-relu": lambda: nn.Sequential(conv(), norm(), nn.ReLU(inplace=True)),
    "leaky-relu": lambda: nn.Sequential(conv(), norm(), nn.LeakyReLU(0.2, inplace=True)),
    "biased": lambda: nn.Sequential(conv(bias=True), norm(), nn.ReLU()),
    "no-activation": lambda: nn.Sequential(conv(bias=True), norm()),
    "stride-dilation-groups": lambda: nn.Sequential(
        conv(stride=2, dilation=2, groups=3), norm(), nn.ReLU()
    ),
    "nested": lambda: nn.Sequential(nn.Sequential(conv(), norm()), nn.Sequential(nn.ReLU())),
    "idle-parts": lambda: nn.Sequential(conv(), nn.Identity(), norm(), nn.ReLU(), nn.Dropout(0.0)),
    "max-pool": lambda: nn.Sequential(conv(), norm(), nn.ReLU(), nn.MaxPool2d(2)),
    "max-pool-3": lambda: nn.Sequential(conv(bias=True), norm(), nn.ReLU(), nn.MaxPool2d(3)),
    "F.relu": lambda: functional(F.relu),
    "torch.relu": lambda: functional(torch.relu),
    "method": lambda: functional(lambda h: h.relu_()),
    "F.leaky_relu": lambda: functional(lambda h: F.leaky_relu(h, 0.3)),
    "F.leaky_relu-usual-slope": lambda: functional(F.leaky_relu),
    "linear": lambda: nn.Sequential(nn.Linear(243, 6), nn.BatchNorm1d(6), nn.ReLU()),
    "separable": lambda: nn.Sequential(*copy.deepcopy(SEPARABLE)),
    "separable-biased": lambda: nn.Sequential(
        conv(3, 3, groups=3, bias=True), norm(3), nn.LeakyReLU(), conv(3, 6, 1, bias=True), norm()
    ),
    "conv-and-pointwise-pooled": lambda: nn.Sequential(
        conv(3, 5), norm(5), nn.ReLU(), conv(5, 6, 1), norm(), nn.ReLU(), nn.MaxPool2d(2)
    ),
    "no-running-statistics": lambda: nn.Sequential(conv(), norm(track_running_stats=False)),
}


class Net(nn.Module):
    """A block on images of 3x9x9, flat for a linear one, and an output layer."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.is_flat = isinstance(next(block.children(), None), nn.Linear)
        with torch.no_grad():
            num = self._features(torch.randn(2, 3, 9, 9)).shape[1]
        self.out = nn.Linear(num, 4)

    def _features(self, x: Tensor) -> Tensor:
        return self.block(x.flatten(1) if self.is_flat else x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self._features(x))


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1.0)


def after_two_steps(model: nn.Module, rule: str, backend: str) -> LocalLearner:
    images, labels = torch.randn(6, 3, 9, 9, dtype=torch.float64), torch.arange(6) % 4
    torch.manual_seed(2)  # of the heads
    learner = LocalLearner(
        model,
        rule,
        num_classes=4,
        blocks="block",
        example_input=images,
        optimizer=sgd,
        backend=backend,
    )
    for _ in range(2):
        learner.step(images, labels)
    return learner


@pytest.mark.parametrize("name", COVERED)
def test_the_closed_form_is_exact(name: str) -> None:
    rule = "lls-mxm"
    model = Net(COVERED[name]()).double()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):  # of either sign, as after training
                module.weight.normal_()
                module.bias.normal_()
    twin = copy.deepcopy(model)
    torch.manual_seed(3)
    closed = after_two_steps(model, rule, "reference")
    torch.manual_seed(3)
    plain = after_two_steps(twin, rule, "autograd")
    assert closed.block_paths == {"block": "closed form"}
    assert plain.block_paths == {"block": "generic"}
    expected = plain.state_dict()
    for key, value in closed.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, expected[key], rtol=1e-8, atol=1e-10, msg=key)
        else:
            assert torch.equal(value, expected[key])


def test_a_norm_of_timm_with_its_activation_inside() -> None:
    layers = pytest.importorskip("timm.layers")
    block = layers.ConvNormAct(3, 6, 3)
    assert recognize(block) is not None
    model = Net(block).double()
    twin = copy.deepcopy(model)
    torch.manual_seed(3)
    closed = after_two_steps(model, "lls", "reference")
    torch.manual_seed(3)
    plain = after_two_steps(twin, "lls", "autograd")
    assert closed.block_paths == {"block": "closed form"}
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10, msg=name)
    assert plain.block_names == closed.block_names
    assert recognize(layers.ConvNormAct(3, 6, 3, act_layer=nn.GELU)) is None
    assert recognize(layers.ConvNormAct(3, 6, 3, drop_layer=nn.Dropout2d)) is None


class Drop(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * torch.bernoulli(torch.full((len(x), 1, 1, 1), 0.5))


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(3, 3), norm(3), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class OfTwo(Branches):
    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.body(x)


class InADict(Branches):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"x": self.body(x)}


class ByData(Branches):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if x.sum() > 0 else self.body(-x)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(3, 3), norm(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.conv(x)))


class OddConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def hooked(part: int) -> nn.Module:
    block = nn.Sequential(conv(), norm(), nn.ReLU())
    block[part].register_forward_hook(lambda module, args, output: output * 2)
    return block


def patched() -> nn.Module:
    block = nn.Sequential(conv(), norm(), nn.ReLU())
    block.forward = lambda x: torch.tanh(x)
    return block


NOT_COVERED: dict[str, Callable[[], nn.Module]] = {
    "no norm": lambda: nn.Sequential(conv(), nn.ReLU()),
    "no layer": lambda: nn.Sequential(norm(), nn.ReLU()),
    "norm first": lambda: nn.Sequential(norm(3), nn.ReLU(), conv()),
    "activation in between": lambda: nn.Sequential(conv(), nn.ReLU(), norm()),
    "two activations": lambda: nn.Sequential(conv(), norm(), nn.ReLU(), nn.LeakyReLU()),
    "another activation": lambda: nn.Sequential(conv(), norm(), nn.GELU()),
    "another norm": lambda: nn.Sequential(conv(), nn.GroupNorm(2, 6), nn.ReLU()),
    "parametric": lambda: nn.Sequential(conv(), norm(), nn.PReLU()),
    "no scale": lambda: nn.Sequential(conv(), norm(affine=False), nn.ReLU()),
    "averages without end": lambda: nn.Sequential(conv(), norm(momentum=None), nn.ReLU()),
    "padding by name": lambda: nn.Sequential(nn.Conv2d(3, 6, 3, padding="same"), norm()),
    "padding by reflection": lambda: nn.Sequential(conv(padding_mode="reflect"), norm()),
    "dropout": lambda: nn.Sequential(conv(), norm(), nn.ReLU(), nn.Dropout(0.1)),
    "functional dropout": lambda: functional(lambda h: F.dropout(F.relu(h), 0.1)),
    "stochastic depth": lambda: nn.Sequential(conv(), norm(), nn.ReLU(), Drop()),
    "two convolutions": lambda: nn.Sequential(conv(), norm(), nn.ReLU(), conv(6), norm()),
    "pointwise with a stride": lambda: nn.Sequential(
        conv(3, 3), norm(3), nn.ReLU(), conv(3, 6, 1, stride=2), norm()
    ),
    "overlapping pool": lambda: nn.Sequential(conv(), norm(), nn.MaxPool2d(3, 2)),
    "pool that rounds up": lambda: nn.Sequential(conv(), norm(), nn.MaxPool2d(2, ceil_mode=True)),
    "linear over images": lambda: nn.Sequential(nn.Linear(9, 9), norm(3), nn.ReLU()),
    "a residual": Branches,
    "two inputs": OfTwo,
    "a dict": InADict,
    "branches by data": ByData,
    "a subclass": lambda: nn.Sequential(OddConv(3, 6, 1), norm(), nn.ReLU()),
    "a hook on the layer": lambda: hooked(0),
    "a hook on the norm": lambda: hooked(1),
    "a hook on the activation": lambda: hooked(2),
    "another forward": patched,
    "weight norm": lambda: nn.Sequential(parametrizations.weight_norm(conv()), norm(), nn.ReLU()),
    "spectral norm": lambda: nn.Sequential(nn.utils.spectral_norm(conv()), norm(), nn.ReLU()),
    "one layer twice": Twice,
}


@pytest.mark.parametrize("is_training", [True, False], ids=["training", "evaluating"])
@pytest.mark.parametrize("name", NOT_COVERED)
def test_what_the_closed_form_does_not_cover(name: str, is_training: bool) -> None:
    block = NOT_COVERED[name]().train(is_training)
    assert recognize(block) is None
    assert all(module.training == is_training for module in block.modules())


@pytest.mark.parametrize("name", COVERED)
def test_what_it_covers_does_not_depend_on_the_mode(name: str) -> None:
    block = COVERED[name]()
    block.register_forward_hook(lambda module, args, output: None)  # runs around the block
    assert recognize(block.eval()) == recognize(block.train()) is not None


def test_the_head_reads_what_lies_before_a_max_pool() -> None:
    (block,) = plan_blocks(
        Net(COVERED["max-pool"]()), ["block"], inputs=torch.randn(3, 3, 9, 9)
    ).blocks
    assert block.view_shape == (3, 6, 9, 9)


def test_stochastic_depth_is_in_force_whatever_the_mode_at_the_start() -> None:
    """A model is often in evaluation mode when it comes, where such a module does nothing."""
    learner = LocalLearner(
        Net(nn.Sequential(conv(), norm(), nn.ReLU(), Drop())).eval(),
        num_classes=4,
        blocks=["block"],
        example_input=torch.randn(2, 3, 9, 9),
        backend="reference",
    )
    assert learner.block_paths == {"block": "generic"}


def test_an_output_that_is_not_square_takes_the_generic_path() -> None:
    images = torch.randn(3, 3, 9, 2)
    model = nn.Sequential(nn.Sequential(conv(), norm(), nn.ReLU()), nn.Flatten(), nn.Linear(108, 4))
    (block,) = plan_blocks(model, ["0"], inputs=images).blocks
    assert recognize(block.module) is not None
    assert block.latent_size() == ((4, 2), 48)
    assert block.closed_form() is None


def test_a_block_that_trains_what_lies_before_it_takes_the_generic_path() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 3, 1),
        nn.Sequential(conv(), norm(), nn.ReLU()),
        nn.Flatten(),
        nn.Linear(486, 4),
    )
    (block,) = plan_blocks(model, ["1"], inputs=torch.randn(3, 3, 9, 9)).blocks
    assert block.joined == ("0.weight", "0.bias")
    assert recognize(block.module) is not None
    assert block.closed_form() is None
