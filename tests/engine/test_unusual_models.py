"""Models of other people's making whose forwards do what few do."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallearn import LocalLearner
from locallearn.errors import UserError

N, K = 12, 5


class Residual(nn.Module):
    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.last = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.last(F.relu(self.norm(self.conv(x)))))


class Net(nn.Module):
    """A stem, two residual blocks, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.stage = nn.Sequential(Residual(), Residual())
        self.classifier = nn.Linear(8, K)

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.stage(self.stem(images)))

    def classify(self, x: Tensor) -> Tensor:
        return self.classifier(x.mean((2, 3)))


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(N, 3, 8, 8), torch.arange(N) % K


def unmoved_by_steps(learner: LocalLearner, inputs: object, labels: Tensor) -> set[str]:
    """Names of the parameters that two steps leave as they are; losses are finite and fall."""
    before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    first = learner.step(inputs, labels)
    learner.step(inputs, labels)
    last = learner.step(inputs, labels)
    assert list(first.block_losses) == learner.block_names
    for name, loss in last.block_losses.items():
        assert loss < first.block_losses[name], name
    return {n for n, p in learner.model.named_parameters() if torch.equal(p, before[n])}


# -- a number of entries that is no batch -------------------------------------------------------


class Hypernetwork(Net):
    """Its blocks' weights come of another network, from three embeddings: as many as a trace
    takes images."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Parameter(torch.randn(3, 8))
        self.make = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8 * 8))

    def forward(self, images: Tensor) -> Tensor:
        x = self.stage(self.stem(images))
        for weight in self.make(self.embeddings).view(3, 8, 8, 1, 1):
            x = F.relu(x + F.conv2d(x, weight))
        return self.classify(x)


def test_what_makes_weights_is_no_block_and_learns_with_what_uses_them() -> None:
    images, labels = batch()
    learner = LocalLearner(Hypernetwork(), "lls", num_classes=K)
    assert unmoved_by_steps(learner, images, labels) == set()
    assert learner.block_names == ["stem", "stage.0", "stage.1"]
    assert learner.plan is not None
    assert "make.0.weight" in learner.plan.output


class MixtureOfExperts(nn.Module):
    """Tokens are sent to the best of four experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).max(-1)
        output = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero()[:, 0]
            if len(rows) > 0:
                output[rows] = weights[rows, None] * expert(x[rows])
        return output


class Routed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.mixture = MixtureOfExperts()

    def forward(self, images: Tensor) -> Tensor:
        x = self.stage(self.stem(images)).mean((2, 3))
        return self.classifier(x + self.mixture(x))


def test_experts_are_blocks_only_with_the_module_that_routes() -> None:
    images, labels = batch()
    blocks = ["stem", "stage.*", "mixture"]
    learner = LocalLearner(Routed(), "lls", num_classes=K, blocks=blocks, example_input=images)
    torch.nn.init.constant_(learner.model.mixture.gate.bias, 0.0)
    learner.step(images, labels)
    assert learner.block_names == ["stem", "stage.0", "stage.1", "mixture"]


class SomeOf(Net):
    """In training, its second block sees but some of the images."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.stage[0](self.stem(images))
        num = 7 if self.training else len(x)
        return self.classify(torch.cat([self.stage[1](x[:num]), x[num:]]))


def test_a_block_that_sees_some_of_the_images_is_named() -> None:
    images, labels = batch()
    learner = LocalLearner(SomeOf(), "lls", num_classes=K, blocks=["stage.1"], example_input=images)
    with pytest.raises(UserError, match=r"'stage\.1' yields shape \(7, .* for 12 images: no entry"):
        learner.step(images, labels)


class OfNodes(nn.Module):
    """Classifies the nodes of one graph, given its adjacency matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6)) for _ in range(2)
        )
        self.classifier = nn.Linear(6, K)
        self.register_buffer("adjacency", torch.rand(N, N).softmax(-1))

    def forward(self, nodes: Tensor) -> Tensor:
        for layer in self.layers:
            nodes = F.relu(self.adjacency @ layer(nodes))
        return self.classifier(nodes)


def test_a_model_that_runs_on_no_part_of_its_batch() -> None:
    learner = LocalLearner(OfNodes(), "lls", num_classes=K)
    assert unmoved_by_steps(learner, torch.randn(N, 6), torch.arange(N) % K) == set()


class Clips(nn.Module):
    """3-d convolutions, whose weights have five dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm3d(4)
        self.classifier = nn.Linear(4, K)

    def forward(self, clips: Tensor) -> Tensor:
        return self.classifier(F.relu(self.norm(self.conv(clips))).mean((2, 3, 4)))


def test_clips_at_default_settings() -> None:
    learner = LocalLearner(Clips(), "lls", num_classes=K)
    assert unmoved_by_steps(learner, torch.randn(N, 3, 2, 8, 8), torch.arange(N) % K) == set()


# -- what does not learn ------------------------------------------------------------------------


class Backbone(Net):
    """Its stem and first block run without gradients."""

    def __init__(self, without_grad: type[torch.no_grad] = torch.no_grad) -> None:
        super().__init__()
        self.without_grad = without_grad

    def forward(self, images: Tensor) -> Tensor:
        with self.without_grad():
            x = self.stage[0](self.stem(images))
        return self.classify(self.stage[1](x.clone()))


@pytest.mark.filterwarnings("ignore:no block holds")
@pytest.mark.parametrize("without_grad", [torch.no_grad, torch.inference_mode])
def test_what_runs_without_gradients_is_no_block(without_grad: type[torch.no_grad]) -> None:
    images, labels = batch()
    learner = LocalLearner(Backbone(without_grad), "lls", num_classes=K)
    unmoved = unmoved_by_steps(learner, images, labels)
    assert learner.block_names == ["stage.1"]
    expected = {n for n, _ in learner.model.named_parameters() if n.startswith(("stem", "stage.0"))}
    assert unmoved == expected


def test_what_runs_without_gradients_can_not_be_named() -> None:
    images, _ = batch()
    with pytest.raises(UserError, match=r"'stage\.0' runs under torch\.no_grad\(\)"):
        LocalLearner(Backbone(), "lls", num_classes=K, blocks=["stage.0"], example_input=images)


class Copied(Net):
    """Holds another of itself, which does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.copy = Net()


def test_the_warning_of_what_no_block_holds_names_a_few() -> None:
    images, labels = batch()
    learner = LocalLearner(Copied(), "lls", num_classes=K)
    with pytest.warns(UserWarning, match=r"no block holds copy\.stem\.0\.weight, .* and 10 more,"):
        learner.step(images, labels)


# -- what is refused ----------------------------------------------------------------------------


class FeaturesFirst(Net):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x = self.stage(self.stem(images))
        return x.mean((2, 3)), self.classify(x)


@pytest.mark.parametrize("rule", ["lls", "bp", "dfa"])
def test_logits_of_another_number_than_the_classes(rule: str) -> None:
    images, labels = batch()
    with pytest.raises(UserError, match=r"logits of shape \(12, 8\), but num_classes is 5"):
        LocalLearner(FeaturesFirst(), rule, num_classes=K).step(images, labels)
    with pytest.raises(UserError, match=r"logits of shape \(12, 5\), but num_classes is 7"):
        LocalLearner(Net(), rule, num_classes=7).step(images, labels)


def test_lazy_modules_need_a_batch_first() -> None:
    images, labels = batch()
    model = nn.Sequential(
        nn.LazyConv2d(8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(K)
    )
    with pytest.raises(UserError, match=r"'0\.weight' has no shape yet, .* run a batch through"):
        LocalLearner(model, "lls", num_classes=K)
    model(images)
    assert unmoved_by_steps(LocalLearner(model, "lls", num_classes=K), images, labels) == set()


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_scripts_are_refused_by_name() -> None:
    images, labels = batch()
    model = Net()
    model.stage[1] = torch.jit.trace(model.stage[1].eval(), torch.randn(2, 8, 8, 8))
    with pytest.raises(UserError, match=r"module 'stage\.1' is made by torch\.jit, .* from before"):
        LocalLearner(model, "lls", num_classes=K).step(images, labels)


def test_copies_on_several_devices_are_refused() -> None:
    images, labels = batch()
    parallel = nn.DataParallel(Net())
    LocalLearner(parallel, "lls", num_classes=K).step(images, labels)
    parallel.device_ids = [0, 1]
    with pytest.raises(UserError, match=r"DataParallel runs copies .* on 2 devices"):
        LocalLearner(parallel, "lls", num_classes=K)


def test_a_compiled_model_is_refused() -> None:
    with pytest.raises(UserError, match=r"wrapped by torch\.compile, .* and compile=True"):
        LocalLearner(torch.compile(Net()), "lls", num_classes=K)


def test_a_wrapper_of_all_but_the_output_layer_is_looked_into() -> None:
    images, _ = batch()
    body = nn.Sequential(
        OrderedDict(
            first=nn.Conv2d(3, 8, 3), relu=nn.ReLU(), second=nn.Conv2d(8, 8, 3), last=nn.ReLU()
        )
    )

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = body

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x).mean((2, 3))

    model = nn.Sequential(Body(), nn.Linear(8, K))
    learner = LocalLearner(model, "lls", num_classes=K, example_input=images)
    assert learner.block_names == ["0.layers.first", "0.layers.second"]


def test_a_layer_with_a_hook_is_no_part_of_a_chain() -> None:
    """The chain's first module runs the others by their forwards, which would pass it over."""
    images, labels = batch()
    model = Net()
    model.stem = nn.Identity()
    model.conv, model.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
    model.forward = lambda x: model.classify(model.stage(model.norm(model.conv(x))))
    calls: list[int] = []
    model.norm.register_forward_hook(lambda module, args, output: calls.append(1))
    learner = LocalLearner(model, "lls", num_classes=K, example_input=images)
    calls.clear()
    learner.step(images, labels)
    assert calls == [1]
    assert learner.plan.blocks[0].names != ("conv", "norm")


def test_an_empty_batch_is_one_line() -> None:
    images, labels = batch()
    learner = LocalLearner(Net(), "lls", num_classes=K, example_input=images)
    with pytest.raises(UserError, match=r"the batch is empty: its shape is \(0, 3, "):
        learner.step(images[:0], labels[:0])
