"""Steps that are no plain local ones, against their definitions written out again in float64."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallearn import LocalLearner, UserError, build_model, build_rule
from locallearn.engine.measuring import peak_memory_bytes
from locallearn.models import Block, BlockStyle, ConvBlock, LinearBlock
from locallearn.rules import Feedback, Rule, SimilarityHead

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = 5
STYLES = [BlockStyle(), BlockStyle("tanh", "none"), BlockStyle("relu", "none")]


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1.0)


def learner_of(model: str, rule: Rule, style: BlockStyle, **settings: Any) -> LocalLearner:
    network = build_model(model, num_classes=CLASSES, in_channels=2, width=1 / 8, style=style)
    return LocalLearner(network.double(), rule, optimizer=sgd, **settings)


def batch(num: int = 6, size: int = 33) -> tuple[Tensor, Tensor]:
    """Odd images, so that windows overlap and pools leave a row out."""
    return torch.randn(num, 2, size, size, dtype=torch.float64), torch.randint(CLASSES, (num,))


def updates(learner: LocalLearner, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What each parameter moved by in one step of plain SGD at rate one, negated."""
    before = {name: p.detach().clone() for name, p in learner.named_parameters()}
    learner.step(images, labels)
    return {name: before[name] - p.detach() for name, p in learner.named_parameters()}


def blocks_of(model: nn.Module) -> list[Block]:
    return [m for m in model.modules() if isinstance(m, Block)]


def record_activations(model: nn.Module) -> dict[nn.Module, Tensor]:
    """Block -> its activation in the next forward; its graph begins at the block's input."""
    activations: dict[nn.Module, Tensor] = {}
    for block in blocks_of(model):

        def forward(x: Tensor, block: Block = block) -> Tensor:
            activations[block] = block.activation(x.detach())
            return block.downsample(activations[block].clone())

        block.forward = forward
    return activations


def assert_updates(actual: dict[str, Tensor], model: nn.Module) -> None:
    """The model's parameters hold the expected gradients."""
    for name, p in model.named_parameters():
        error = (actual[f"model.{name}"] - p.grad).norm()
        assert error <= 1e-9 * p.grad.norm() + 1e-14, name


# -- the output's error, and the label, projected at random --------------------------------------


@pytest.mark.parametrize("style", STYLES, ids=str)
@pytest.mark.parametrize("model", ["smallconv", "mobilenet-v1"])
@pytest.mark.parametrize("rule", ["dfa", "sdfa", "drtp"])
def test_direct_feedback_is_its_definition(rule: str, model: str, style: BlockStyle) -> None:
    learner = learner_of(model, build_rule(rule), style)
    images, labels = batch()
    twin = copy.deepcopy(learner.model).train()
    activations = record_activations(twin)
    logits = twin(images)
    F.cross_entropy(logits, labels).backward(inputs=list(twin.classifier.parameters()))
    onehot = F.one_hot(labels, CLASSES).double()
    error = (logits.detach().softmax(1) - onehot) / len(images)
    signal = {"dfa": error, "sdfa": error.sign() / len(images), "drtp": onehot / len(images)}[rule]
    for block, head in zip(blocks_of(twin), learner.heads, strict=True):
        h = activations[block]
        matrix = head.feedback.matrix(h.detach())
        gradient = torch.einsum("nk,k...->n...", signal, matrix)
        torch.autograd.backward(h, gradient, inputs=list(block.parameters()))
    assert_updates(updates(learner, images, labels), twin)


def test_dfa_by_hand() -> None:
    """One linear unit without an activation of its own, two classes, one image."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 2)).double()
    with torch.no_grad():
        model[0].weight.fill_(2.0)
        model[1].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        model[1].bias.zero_()
    images, labels = torch.tensor([[0.5]], dtype=torch.float64), torch.tensor([0])
    learner = LocalLearner(
        model, "dfa", num_classes=2, blocks=["0"], example_input=images, optimizer=sgd
    )
    b = learner.heads[0].feedback.matrix(torch.zeros(1, 1, dtype=torch.float64))[:, 0].tolist()
    moved = updates(learner, images, labels)
    # h = 1, logits (1, -1), so that softmax at the label is 1 / (1 + exp(-2)).
    e = 1 / (1 + math.exp(-2)) - 1
    assert moved["model.0.weight"].item() == pytest.approx((e * b[0] - e * b[1]) * 0.5)
    assert moved["model.1.weight"][:, 0].tolist() == pytest.approx([e, -e])


def test_the_sign_of_the_error_is_the_labels() -> None:
    """What sdfa declares: without label smoothing its updates do not depend on the output."""
    moved = []
    images, labels = batch(size=16)
    for scale in (1.0, -3.0):
        torch.manual_seed(0)
        learner = learner_of("smallconv", build_rule("sdfa"), BlockStyle())
        with torch.no_grad():
            learner.model.classifier.weight.mul_(scale)
        moved.append(updates(learner, images, labels)["model.conv1.conv.weight"])
    assert torch.equal(*moved)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_feedback_is_the_same_in_any_layout_and_comes_back_from_its_seed(layout) -> None:
    feedback = Feedback(3)
    like = torch.zeros(2, 4, 5, 6).contiguous(memory_format=layout)
    signal, labels = torch.randn(2, 3), torch.tensor([2, 0])
    expected = torch.einsum("nk,k...->n...", signal, feedback.matrix(torch.zeros(2, 4, 5, 6)))
    projected = feedback.project(signal, like)
    torch.testing.assert_close(projected, expected)
    assert projected.is_contiguous(memory_format=layout)
    assert torch.equal(feedback.select(labels, like)[0], feedback.matrix(like)[2])
    assert feedback.matrix(like).abs().max() <= math.sqrt(6 / 120)
    assert feedback.matrix(like).std() == pytest.approx(math.sqrt(2 / 120), rel=0.1)

    other = Feedback(3)
    assert not torch.equal(other.matrix(like), feedback.matrix(like))
    other.load_state_dict(feedback.state_dict())
    assert torch.equal(other.matrix(like), feedback.matrix(like))
    # Another shape, and the same values again.
    assert other.matrix(torch.zeros(1, 7)).shape == (3, 7)
    assert torch.equal(other.matrix(like), feedback.matrix(like))


# -- a second forward ---------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES, ids=str)
@pytest.mark.parametrize("model", ["smallconv", "mobilenet-v1"])
def test_pepita_is_its_definition(model: str, style: BlockStyle) -> None:
    learner = learner_of(model, build_rule("pepita", feedback_scale=1.0), style)
    images, labels = batch()
    twin = copy.deepcopy(learner.model).train()
    modulator = learner.heads[0]

    def forward(x: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
        """Inputs, layer outputs z and activities of every layer, and the classifier's input."""
        inputs, outputs, activities = [], [], []
        for block in blocks_of(twin):
            if block is blocks_of(twin)[-1] and model == "smallconv":
                x = twin.pool(x).flatten(1)
            for layer in block.layers():
                inputs.append(x)
                outputs.append(layer.weighted(x))
                x = layer.nonlinearity(layer.norm(outputs[-1]).clone())
                activities.append(x)
            x = block.downsample(x)
        return inputs, outputs, activities, x if x.ndim == 2 else twin.pool(x).flatten(1)

    _, _, standard, features = forward(images)
    e = twin.classifier(features).softmax(1) - F.one_hot(labels, CLASSES)
    f = modulator.feedback.matrix(images)
    inputs, outputs, modulated, features = forward(images + torch.einsum("nk,k...->n...", e, f))
    layers = [layer for block in blocks_of(twin) for layer in block.layers()]
    for layer, x, z, h, h_err in zip(layers, inputs, outputs, standard, modulated, strict=True):
        change = ((h - h_err) / (len(images) * math.prod(h.shape[2:]))).detach()
        # (h - h_err) h_below_err^T, of a convolution over every position: its weight gradient.
        again = layer.weighted(x.detach())
        torch.autograd.backward(again, change, inputs=list(layer.weighted.parameters()))
        if style.norm == "batch":
            mean = z.mean([0, *range(2, z.ndim)], keepdim=True)
            var = z.var([0, *range(2, z.ndim)], keepdim=True, unbiased=False)
            xh = (z - mean) / (var + layer.norm.eps).sqrt()
            axes = [0, *range(2, z.ndim)]
            layer.norm.weight.grad = (change * xh).sum(axes).detach()
            layer.norm.bias.grad = change.sum(axes)
    twin.classifier.weight.grad = (e.T @ features / len(images)).detach()
    twin.classifier.bias.grad = e.mean(0).detach()
    assert_updates(updates(learner, images, labels), twin)


def test_both_update_orders_of_pepita_give_the_same_weights() -> None:
    images, labels = batch(size=16)
    states = []
    for order in ("layerwise", "end"):
        torch.manual_seed(0)
        learner = learner_of("smallconv", build_rule("pepita", update_order=order), BlockStyle())
        for _ in range(3):
            learner.step(images, labels)
        states.append(learner.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_running_statistics_follow_the_first_forward_alone() -> None:
    learner = learner_of("smallconv", build_rule("pepita"), BlockStyle())
    images, labels = batch(size=16)
    twin = copy.deepcopy(learner.model).train()
    twin(images)
    learner.step(images, labels)
    for name, buffer in twin.named_buffers():
        torch.testing.assert_close(learner.model.get_buffer(name), buffer, msg=name)


def test_dropout_is_the_same_in_both_forwards() -> None:
    """Without an error there is nothing to learn from, however much is dropped."""
    torch.manual_seed(3)
    model = build_model("smallconv", num_classes=CLASSES, in_channels=2, dropout=0.5, width=1 / 8)
    learner = LocalLearner(model.double(), "pepita", optimizer=sgd)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([100.0, 0, 0, 0, 0]))
    images, labels = batch(size=16)[0], torch.zeros(6, dtype=torch.int64)
    moved = updates(learner, images, labels)
    assert all(moved[n].abs().max() < 1e-12 for n in moved if "conv" in n)
    for a, b in zip(torch.rand(3), torch.rand(3), strict=True):
        assert a != b


def test_pepita_says_which_blocks_it_cannot_update() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(UserError, match=r"updates layer by layer, .* Sequential has others"):
        LocalLearner(model, "pepita", num_classes=2, blocks=["0"])


# -- similarity match of the whole output -------------------------------------------------------


@pytest.mark.parametrize("local_loss", ["sim", "predsim"])
@pytest.mark.parametrize("model", ["smallconv", "mobilenet-v1"])
def test_similarity_match_is_its_definition(model: str, local_loss: str) -> None:
    learner = learner_of(model, build_rule("local-losses", local_loss=local_loss), BlockStyle())
    images, labels = batch()
    twin, heads = copy.deepcopy(learner.model).train(), copy.deepcopy(learner.heads)
    activations = record_activations(twin)
    F.cross_entropy(twin(images), labels).backward(inputs=list(twin.classifier.parameters()))

    def similarities(rows: Tensor) -> Tensor:
        """The correlations of the rows, with the authors' epsilon."""
        deviations = rows - rows.mean(1, keepdim=True)
        norms = deviations.norm(dim=1) + 1e-8
        return deviations @ deviations.T / torch.outer(norms, norms)

    target = torch.corrcoef(F.one_hot(labels, CLASSES).double())
    for block, head in zip(blocks_of(twin), heads, strict=True):
        assert isinstance(head, SimilarityHead)
        h = activations[block]
        seen = head.features(h)
        if seen.ndim == 4:
            single = seen.shape[2:] == (1, 1)
            seen = seen.flatten(1) if single else (seen.flatten(2).var(2) + 1e-12).sqrt()
        loss = (similarities(seen) - target).square().mean()
        if local_loss == "predsim":
            if h.ndim == 4:
                p = F.adaptive_avg_pool2d(h, block.latent_size).flatten(1)
            else:
                p = F.adaptive_avg_pool1d(h, block.latent_size)
            entropy = F.cross_entropy(p @ head.classifier.weight.T / 0.5, labels)
            loss = 0.99 * loss + 0.01 * entropy
        loss.backward(inputs=[*block.parameters(), *head.parameters()])
    moved = updates(learner, images, labels)
    for name, p in [
        *((f"model.{n}", p) for n, p in twin.named_parameters()),
        *((f"heads.{n}", p) for n, p in heads.named_parameters()),
    ]:
        error = (moved[name] - p.grad).norm()
        assert error <= 1e-9 * p.grad.norm() + 1e-13, name


# -- backpropagation in less memory -------------------------------------------------------------


def trained_by_bp(form: str, norm: str = "batch", dropout: float = 0.0) -> LocalLearner:
    torch.manual_seed(0)
    model = build_model(
        "smallconv",
        num_classes=CLASSES,
        in_channels=2,
        width=1 / 8,
        dropout=dropout,
        style=BlockStyle(norm=norm),
    )
    learner = LocalLearner(model.double(), build_rule("bp", bp_memory=form), lr=1e-3)
    for seed in range(4):
        torch.manual_seed(seed)
        learner.step(*batch(7, 16))
    return learner


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("form", ["checkpoint", "fused-optimizer"])
def test_memory_saving_forms_give_plain_weights_and_statistics(form: str, dropout: float) -> None:
    plain, saving = trained_by_bp("plain", dropout=dropout), trained_by_bp(form, dropout=dropout)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(saving.state_dict()[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("num", [2, 3, 100])
def test_accumulation_gives_plain_weights_where_there_is_no_batchnorm(num: int) -> None:
    plain = trained_by_bp("plain", "none").state_dict()
    ours = trained_by_bp(f"accumulate:{num}", "none").state_dict()
    for name, value in plain.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-7, atol=1e-9)


def test_accumulation_with_batchnorm_normalises_each_part_by_itself() -> None:
    model = build_model("smallconv", num_classes=CLASSES, in_channels=2, width=1 / 8).double()
    images, labels = batch(6, 16)
    twin = copy.deepcopy(model).train()
    for part in (slice(0, 3), slice(3, 6)):
        (F.cross_entropy(twin(images[part]), labels[part]) / 2).backward()
    learner = LocalLearner(model, build_rule("bp", bp_memory="accumulate:2"), optimizer=sgd)
    assert_updates(updates(learner, images, labels), twin)
    for name, buffer in twin.named_buffers():
        torch.testing.assert_close(learner.model.get_buffer(name), buffer, msg=name)


def test_memory_saving_forms_save_memory() -> None:
    images, labels = torch.randn(16, 8, 32, 32), torch.randint(4, (16,))
    peaks = {}
    for form in ("plain", "checkpoint", "accumulate:4"):
        blocks = [ConvBlock(8, 8, latent_size=2) for _ in range(12)]
        model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
        learner = LocalLearner(model, build_rule("bp", bp_memory=form), num_classes=4)
        learner.step(images, labels)
        peaks[form] = peak_memory_bytes(lambda step=learner.step: step(images, labels))
    assert peaks["checkpoint"] < 0.75 * peaks["plain"]
    assert peaks["accumulate:4"] < 0.35 * peaks["plain"]


def test_gradients_of_a_fused_optimizer_do_not_outlive_the_step() -> None:
    learner = trained_by_bp("fused-optimizer")
    assert all(p.grad is None for p in learner.parameters())
    assert set(learner.optimizers) == {name for name, _ in learner.model.named_parameters()}
    # Outside a step the model is an ordinary one: a backward leaves gradients and no update.
    before = learner.model.conv1.conv.weight.detach().clone()
    learner.model(batch(4, 16)[0]).sum().backward()
    assert torch.equal(learner.model.conv1.conv.weight, before)
    assert learner.model.conv1.conv.weight.grad is not None


@pytest.mark.parametrize("form", ["checkpoint", "fused-optimizer"])
def test_memory_saving_forms_are_not_compiled(form: str) -> None:
    with pytest.raises(UserError, match=f"bp_memory '{form}' and compile exclude each other"):
        LocalLearner(build_model("smallconv"), build_rule("bp", bp_memory=form), compile=True)


# -- blocks in groups, and heads behind the max-pool ---------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 9])
def test_a_group_learns_from_its_last_blocks_head(size: int) -> None:
    rule = build_rule("lls-mxm")
    learner = learner_of("smallconv", rule, BlockStyle(), group_blocks=size)
    images, labels = batch(size=16)
    names = ["conv1", "conv2", "conv3", "linear1"]
    groups = [names[first : first + size] for first in range(0, 4, size)]
    assert learner.block_names == [group[-1] for group in groups]

    twin, heads = copy.deepcopy(learner.model).train(), copy.deepcopy(learner.heads)
    activations: dict[str, Tensor] = {}
    for group in groups:
        for name in group:
            block = twin.get_submodule(name)

            def forward(x: Tensor, block=block, name=name, group=group) -> Tensor:
                h = block.activation(x.detach() if name == group[0] else x)
                activations[name] = h
                return block.downsample(h.clone())

            block.forward = forward
    loss = F.cross_entropy(twin(images), labels)
    loss.backward(inputs=list(twin.classifier.parameters()), retain_graph=True)
    for group, head in zip(groups, heads, strict=True):
        h = activations[group[-1]]
        pool = F.adaptive_avg_pool2d if h.ndim == 4 else F.adaptive_avg_pool1d
        p = pool(h, twin.get_submodule(group[-1]).latent_size).flatten(1)
        local = F.normalize(p) @ head.basis.T @ head.modulation / 0.5
        inputs = [p for name in group for p in twin.get_submodule(name).parameters()]
        F.cross_entropy(local, labels).backward(inputs=inputs)
    assert_updates(updates(learner, images, labels), twin)


def test_a_head_behind_the_pool_reads_what_the_block_hands_on() -> None:
    learner = learner_of("smallconv", build_rule("lls"), BlockStyle(), head_after_pool=True)
    images, labels = batch(size=16)
    twin = copy.deepcopy(learner.model).train()
    outputs: dict[Block, Tensor] = {}
    for block in blocks_of(twin):

        def forward(x: Tensor, block: Block = block) -> Tensor:
            outputs[block] = block.downsample(block.activation(x.detach()))
            return outputs[block].clone()

        block.forward = forward
    F.cross_entropy(twin(images), labels).backward(inputs=list(twin.classifier.parameters()))
    for block, head in zip(blocks_of(twin), learner.heads, strict=True):
        h = outputs[block]
        pool = F.adaptive_avg_pool2d if h.ndim == 4 else F.adaptive_avg_pool1d
        p = pool(h, block.latent_size).flatten(1)
        local = F.normalize(p) @ head.basis.T / 0.5
        F.cross_entropy(local, labels).backward(inputs=list(block.parameters()))
    assert_updates(updates(learner, images, labels), twin)


def test_only_blocks_with_a_pool_leave_the_closed_form_for_a_head_behind_it() -> None:
    model = build_model("smallconv")
    learner = LocalLearner(model, "lls", backend="reference", head_after_pool=True)
    paths = {"conv1": "generic", "conv2": "generic"}
    assert learner.block_paths == paths | {"conv3": "closed form", "linear1": "closed form"}


@pytest.mark.parametrize("rule", ["bp", "pepita"])
@pytest.mark.parametrize(
    "settings", [{"group_blocks": 2}, {"head_after_pool": True}], ids=lambda s: next(iter(s))
)
def test_rules_without_heads_take_no_settings_of_heads(rule: str, settings: dict) -> None:
    with pytest.raises(UserError, match=f"rule '{rule}' has no such heads. Leave it out"):
        LocalLearner(build_model("smallconv"), rule, **settings)


def test_a_group_has_at_least_one_block() -> None:
    with pytest.raises(UserError, match="group_blocks must be at least 1, got 0"):
        LocalLearner(build_model("smallconv"), "lls", group_blocks=0)


class Wired(nn.Module):
    """Two blocks and a classifier, wired as ``forward`` says."""

    def __init__(self, forward) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.c = nn.Linear(6, 3)
        self.wiring = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.wiring(self, x)


def wired(forward, rule: str = "lls", **settings: Any) -> LocalLearner:
    example = torch.randn(4, 6)
    return LocalLearner(
        Wired(forward),
        rule,
        num_classes=3,
        blocks=["a", "b"],
        example_input=example,
        optimizer=sgd,
        **settings,
    )


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda m, x: m.c(m.a(m.b(x))), "'b' do not run one after the other"),
        (lambda m, x: m.c(m.a(x) + m.b(x)), "'b' does not depend on a block that is to learn"),
    ],
    ids=["in another order", "side by side"],
)
def test_a_group_that_is_no_chain_is_refused(forward, message: str) -> None:
    learner = wired(forward, group_blocks=2)
    with pytest.raises(UserError, match=message):
        learner.step(torch.randn(4, 6), torch.tensor([0, 1, 2, 0]))
    assert all(p.grad is None for p in learner.parameters())


@pytest.mark.parametrize("rule", ["lls", "dfa"])
def test_a_skip_around_a_grouped_block_carries_no_gradient(rule: str) -> None:
    def forward(model: Wired, x: Tensor) -> Tensor:
        h = model.a(x)
        return model.c(h + model.b(h))

    learner = wired(forward, rule, group_blocks=2)
    learner.step(torch.randn(4, 6), torch.tensor([0, 1, 2, 0]))
    assert all(p.grad is None for p in learner.parameters())


@pytest.mark.parametrize(
    ("rule", "options", "num_calls"),
    [
        ("bp", {"bp_memory": "accumulate:3"}, 2),
        ("bp", {"bp_memory": "checkpoint"}, 1),
        ("bp", {"bp_memory": "fused-optimizer"}, 1),
        ("pepita", {"update_order": "end"}, 2),
        ("dfa", {}, 1),
    ],
    ids=str,
)
def test_a_step_that_fails_leaves_nothing_for_the_next(
    rule: str, options: dict, num_calls: int
) -> None:
    """The last call of the classifier in a step runs out of memory."""
    learners = []
    images, labels = batch(size=16)
    for fails in (False, True):
        torch.manual_seed(0)
        learner = learner_of("smallconv", build_rule(rule, **options), BlockStyle(norm="none"))
        before = copy.deepcopy(learner.model.state_dict())
        if fails:
            calls = []

            def out_of_memory(module: nn.Module, inputs: tuple, calls: list = calls) -> None:
                calls.append(module)
                if len(calls) == num_calls:
                    raise MemoryError

            handle = learner.model.classifier.register_forward_pre_hook(out_of_memory)
            with pytest.raises(MemoryError):
                learner.step(images, labels)
            handle.remove()
            assert all(p.grad is None for p in learner.parameters())
        learner.model.load_state_dict(before)
        learner.step(images, labels)
        learners.append(learner)
    for a, b in zip(*(learner.parameters() for learner in learners), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_pepita_sees_that_a_model_writes_into_a_blocks_output() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = ConvBlock(2, 3, latent_size=1)
            self.c = nn.Linear(3, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            h.add_(1.0)
            return self.c(h.mean([2, 3]))

    learner = LocalLearner(Writes().double(), "pepita", num_classes=CLASSES, optimizer=sgd)
    with pytest.raises(UserError, match="writes in place into the output of block 'a'"):
        learner.step(*batch(4, 8))


def test_pepita_runs_a_block_once() -> None:
    block = LinearTwice()
    learner = LocalLearner(block, "pepita", num_classes=3, optimizer=sgd)
    with pytest.raises(UserError, match="block 'block' runs twice in one forward"):
        learner.step(torch.randn(4, 6), torch.tensor([0, 1, 2, 0]))


class LinearTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = LinearBlock(6, 6, latent_size=6)
        self.c = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.block(self.block(x)))


@pytest.mark.parametrize("rule", ["dfa", "drtp"])
def test_feedback_takes_outputs_of_any_shape_and_needs_no_example(rule: str) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Flatten(), nn.Linear(40, 3))
    learner = LocalLearner(model, rule, num_classes=3, blocks=["0"], optimizer=sgd)
    moved = updates(learner, torch.randn(4, 5, 6), torch.tensor([0, 1, 2, 0]))
    assert moved["model.0.weight"].abs().max() > 0


@pytest.mark.parametrize("rule", ["lls", "dfa", "drtp", "pepita", "bp"])
def test_backward_and_update_run_outside_of_autocast(rule: str) -> None:
    seen = []

    class Watching(torch.optim.SGD):
        def step(self, closure=None) -> None:
            seen.append(torch.is_autocast_enabled("cpu"))
            super().step()

    learner = LocalLearner(
        build_model("smallconv", in_channels=2, width=1 / 8),
        rule,
        precision="bf16",
        optimizer=lambda p: Watching(p, lr=0.1),
    )
    learner.step(torch.randn(4, 2, 8, 8), torch.tensor([0, 1, 2, 0]))
    assert seen
    assert not any(seen)
