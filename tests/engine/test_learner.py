"""LocalLearner: exact gradients, locality, and what it leaves behind."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from locallearn import LocalLearner, UserError, build_model, build_rule, list_models, list_rules
from locallearn.engine.measuring import peak_memory_bytes
from locallearn.kernels import cxx_compiler
from locallearn.models import Block, ConvBlock, LinearBlock
from locallearn.rules import BASES, SETTINGS, LatentRule, Requirement, rule_class

pytestmark = pytest.mark.usefixtures("one_thread")

LOCAL = [name for name in list_rules() if rule_class(name).requires is Requirement.LOCAL]
LATENT = [name for name in LOCAL if issubclass(rule_class(name), LatentRule)]
LLS_FAMILY = [name for name in LATENT if name.startswith("lls")]


@pytest.fixture(params=["autograd", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    """Autograd inside the block, and the definition of the closed form."""
    return request.param


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1.0)


def batch(num: int = 8, channels: int = 3, size: int = 8, classes: int = 10):
    return torch.randn(num, channels, size, size), torch.randint(classes, (num,))


def gradients(learner: LocalLearner, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What each parameter moved by in one step of plain SGD at rate one, negated."""
    before = {name: p.detach().clone() for name, p in learner.named_parameters()}
    learner.step(images, labels)
    return {name: before[name] - p.detach() for name, p in learner.named_parameters()}


# -- exact gradients ----------------------------------------------------------------------------


def definition(
    model: nn.Module, learner: LocalLearner, images: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """Gradients from float64 autograd of the formulas, on a copy of the model, block by block.

    Written from section 2.1 of the design: adaptive average pooling, F.normalize, B and M apart.
    """
    rule = learner.rule
    copies = copy.deepcopy(model)
    heads = copy.deepcopy(learner.heads)
    blocks = [(n, m) for n, m in copies.named_modules() if isinstance(m, Block)]
    outputs: dict[str, Tensor] = {}
    for name, block in blocks:

        def forward(x: Tensor, name: str = name, block: Block = block) -> Tensor:
            outputs[name] = block.activation(x.detach())
            return block.downsample(outputs[name].clone())

        block.forward = forward
    logits = copies(images)
    loss = F.cross_entropy(logits, labels, label_smoothing=rule.label_smoothing)
    loss.backward(inputs=list(copies.classifier.parameters()))
    for (name, block), head in zip(blocks, heads, strict=True):
        h = outputs[name]
        if h.ndim == 4:
            p = F.adaptive_avg_pool2d(h, block.latent_size).flatten(1)
        else:
            p = F.adaptive_avg_pool1d(h, block.latent_size)
        if rule.name == "local-losses":
            local = p @ head.weight.T
        else:
            q = F.normalize(p, dim=1) if rule.basis != "random" else p
            local = q @ head.basis.T
            if rule.name == "lls-m":
                local = local * head.modulation
            elif rule.name.startswith("lls-mxm"):
                local = local @ head.modulation
        local = local / rule.temperature
        loss = F.cross_entropy(local, labels, label_smoothing=rule.label_smoothing)
        if rule.similarity:
            onehot = F.one_hot(labels, local.shape[1]).to(p.dtype)
            loss = loss + rule.similarity * F.mse_loss(similarities(p), similarities(onehot))
        loss.backward(inputs=[*block.parameters(), *head.parameters()])
    found = {f"model.{n}": p.grad for n, p in copies.named_parameters()}
    return found | {f"heads.{n}": p.grad for n, p in heads.named_parameters()}


def similarities(rows: Tensor) -> Tensor:
    """Cosine similarity of each row with each, less their mean over the batch."""
    q = F.normalize(rows - rows.mean(0))
    return q @ q.T


def assert_exact(model: nn.Module, rule, images: Tensor, labels: Tensor, backend: str) -> None:
    # By the batch's own statistics, however few its images are.
    learner = LocalLearner(model, rule, optimizer=sgd, backend=backend, batch_statistics_from=1)
    expected = definition(model, learner, images, labels)
    actual = gradients(learner, images, labels)
    assert set(actual) == set(expected)
    for name, e in expected.items():
        error = (actual[name] - e).norm()
        # Of a zero gradient only rounding can be asked.
        assert error <= 1e-9 * e.norm() + 1e-14, f"{name}: {error / e.norm():.1e}"


RULES = [(name, {"basis": b, "setting": s}) for name in LLS_FAMILY for b in BASES for s in SETTINGS]
RULES += [("local-losses", {}), ("lls", {"label_smoothing": 0.2, "temperature": 2.0})]
RULES += [("local-losses", {"similarity": 3.0}), ("lls-m", {"similarity": 3.0})]
RULES += [(name, {"m_start": "identity"}) for name in ("lls-m", "lls-mxm")]


@pytest.mark.parametrize(("name", "options"), RULES, ids=str)
def test_gradients_of_every_rule_match_float64_autograd(
    name: str, options: dict, backend: str
) -> None:
    model = build_model("smallconv", num_classes=5).double()
    images, labels = batch(6, size=9, classes=5)  # 9 -> 4 -> 2: odd, and overlapping windows
    assert_exact(model, build_rule(name, **options), images.double(), labels, backend)


@pytest.mark.parametrize("name", list_models())
def test_gradients_in_every_model_match_float64_autograd(name: str, backend: str) -> None:
    model = build_model(name, num_classes=3, in_channels=1, width=1 / 4).double()
    images, labels = batch(3, channels=1, size=33, classes=3)
    assert_exact(model, build_rule("lls-mxm"), images.double(), labels, backend)


@pytest.mark.parametrize(
    ("num", "channels", "classes", "why"),
    [(2, 1, 1, "one class"), (2, 1, 2, "smallest batch"), (5, 4, 7, "odd numbers")],
)
def test_gradients_at_the_edges(
    num: int, channels: int, classes: int, why: str, backend: str
) -> None:
    model = build_model("smallconv", num_classes=classes, in_channels=channels).double()
    images, labels = batch(num, channels, 11, classes)
    assert_exact(model, build_rule("lls"), images.double(), labels, backend)


def test_bp_is_plain_backpropagation() -> None:
    model = build_model("smallconv").double()
    images, labels = batch(size=16)
    images = images.double()
    plain = copy.deepcopy(model).train()
    F.cross_entropy(plain(images), labels).backward()
    learner = LocalLearner(model, "bp", optimizer=sgd)
    expected = {f"model.{n}": p.grad for n, p in plain.named_parameters()}
    for name, gradient in gradients(learner, images, labels).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-13)


# -- locality -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", LOCAL)
@pytest.mark.parametrize("name", list_models())
def test_no_gradient_leaves_a_block(name: str, rule: str, backend: str) -> None:
    """What enters a block, and the images, receive no gradient; not a small one, none."""
    model = build_model(name, num_classes=3, width=1 / 8)
    learner = LocalLearner(model, rule, optimizer=sgd, backend=backend)
    images, labels = batch(4, size=32, classes=3)
    images.requires_grad_()
    entered: list[Tensor] = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        watched = inputs[0] if inputs[0].requires_grad else inputs[0].detach().requires_grad_()
        watched.retain_grad()
        entered.append(watched)
        return (watched,)

    learners_blocks = [m for m in model.modules() if isinstance(m, Block)]
    for block in learners_blocks:
        block.register_forward_pre_hook(record)
    moved = gradients(learner, images, labels)
    assert images.grad is None
    assert len(entered) == len(learners_blocks)
    assert all(x.grad is None for x in entered)
    # And yet everything learned.
    assert all(g.abs().max() > 0 for n, g in moved.items() if n.endswith("weight"))


@pytest.mark.parametrize("rule", LOCAL)
def test_an_update_does_not_depend_on_later_weights(rule: str, backend: str) -> None:
    """Perturbing a block leaves the updates of those before it as they were, bit for bit."""
    images, labels = batch(size=16)
    moved = []
    for scale in (1.0, 3.0):
        torch.manual_seed(1)
        model = build_model("smallconv")
        learner = LocalLearner(model, rule, optimizer=sgd, backend=backend)
        with torch.no_grad():
            model.conv3.conv.weight[0] *= scale
        moved.append(gradients(learner, images, labels))
    before = [n for n in moved[0] if n.startswith(("model.conv1", "model.conv2"))]
    assert len(before) == 6
    assert all(torch.equal(moved[0][n], moved[1][n]) for n in before)
    assert not torch.equal(
        moved[0]["model.linear1.linear.weight"], moved[1]["model.linear1.linear.weight"]
    )


def test_bp_by_contrast_does_depend_on_later_weights() -> None:
    images, labels = batch(size=16)
    moved = []
    for scale in (1.0, 3.0):
        torch.manual_seed(1)
        model = build_model("smallconv")
        learner = LocalLearner(model, "bp", optimizer=sgd)
        with torch.no_grad():
            model.conv3.conv.weight[0] *= scale
        moved.append(gradients(learner, images, labels)["model.conv1.conv.weight"])
    assert not torch.equal(*moved)


def stack(depth: int) -> nn.Module:
    blocks = [ConvBlock(8, 8, latent_size=2) for _ in range(depth)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


@pytest.mark.parametrize("rule", LOCAL)
def test_peak_memory_does_not_grow_with_depth(rule: str, backend: str) -> None:
    images, labels = batch(16, channels=8, size=32, classes=4)
    peaks = {}
    for depth in (4, 32):
        learner = LocalLearner(stack(depth), rule, num_classes=4, backend=backend)
        learner.step(images, labels)  # the optimizers' states come at the first step
        peaks[depth] = peak_memory_bytes(lambda step=learner.step: step(images, labels))
    # What does grow is what a step returns: a loss and logits for each block, under 1 KiB.
    assert peaks[32] <= peaks[4] + 28 * 1024


def test_peak_memory_of_bp_does_grow_with_depth() -> None:
    """The measurement sees what it is there to see."""
    images, labels = batch(16, channels=8, size=32, classes=4)
    peaks = []
    for depth in (4, 16):
        learner = LocalLearner(stack(depth), "bp", num_classes=4)
        learner.step(images, labels)
        peaks.append(peak_memory_bytes(lambda step=learner.step: step(images, labels)))
    assert peaks[1] > 3 * peaks[0]


# -- a step -------------------------------------------------------------------------------------


def test_result_of_a_step() -> None:
    learner = LocalLearner(build_model("smallconv"), "lls-mxm", num_classes=10)
    images, labels = batch(size=16)
    result = learner.step(images, labels)
    names = ["conv1", "conv2", "conv3", "linear1"]
    assert learner.block_names == names == list(result.block_losses) == list(result.block_logits)
    assert result.logits.shape == (8, 10)
    assert result.loss.shape == ()
    for name in names:
        assert result.block_losses[name].shape == ()
        assert result.block_logits[name].shape == (8, 10)
        expected = F.cross_entropy(result.block_logits[name], labels)
        torch.testing.assert_close(result.block_losses[name], expected)
    tensors = [result.logits, result.loss, *result.block_losses.values()]
    assert not any(t.requires_grad for t in tensors)
    assert LocalLearner(build_model("smallconv"), "bp").step(images, labels).block_losses == {}


class NoHostReads(TorchDispatchMode):
    """Raises where a tensor's value is asked for on the host, which would wait for a GPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket._qualified_op_name
        assert name not in ("aten::_local_scalar_dense", "aten::nonzero"), f"{name} in a step"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("rule", list_rules())
def test_a_step_never_waits_for_the_device(rule: str, backend: str) -> None:
    learner = LocalLearner(build_model("smallconv"), rule, num_classes=10, backend=backend)
    images, labels = batch(size=16)
    with NoHostReads():
        learner.step(images, labels)
    with pytest.raises(AssertionError, match="_local_scalar_dense in a step"), NoHostReads():
        images.sum().item()


def test_parameters_are_the_models_and_the_rules() -> None:
    model = build_model("smallconv")
    learner = LocalLearner(model, "lls-mxm", num_classes=10)
    ids = {id(p) for p in learner.parameters()}
    assert {id(p) for p in model.parameters()} < ids
    assert len(ids) == len(list(model.parameters())) + 4
    assert learner.num_additional_params == 400


def test_gradients_are_freed_and_the_model_is_left_as_it_was() -> None:
    model = build_model("smallconv")
    keys = list(model.state_dict())
    learner = LocalLearner(model, "lls-mxm", num_classes=10)
    images, labels = batch(size=16)
    learner.step(images, labels)
    assert all(p.grad is None for p in learner.parameters())
    assert list(model.state_dict()) == keys
    assert all("forward" not in vars(m) for m in model.modules())
    logits = learner(images)
    assert not model.training
    assert torch.equal(logits, model(images.contiguous(memory_format=torch.channels_last)))


def test_a_failing_forward_leaves_the_model_as_it_was() -> None:
    model = build_model("smallconv")
    learner = LocalLearner(model, "lls")
    with pytest.raises(RuntimeError):
        learner.step(torch.randn(4, 7, 16, 16), torch.zeros(4, dtype=torch.int64))
    assert all("forward" not in vars(m) for m in model.modules())


def test_inference_switches_to_evaluation_and_a_step_back_to_training() -> None:
    learner = LocalLearner(build_model("smallconv"), "lls")
    images, labels = batch(size=16)
    learner.step(images, labels)
    learner(images)
    assert not learner.training
    assert all(not o.param_groups[0]["train_mode"] for o in learner.optimizers.values())
    learner.step(images, labels)
    assert learner.training
    assert all(o.param_groups[0]["train_mode"] for o in learner.optimizers.values())


@pytest.mark.parametrize("rule", ["bp", "lls", "lls-mxm"])
def test_bf16_learns_and_keeps_float32_weights(rule: str, backend: str) -> None:
    learner = LocalLearner(
        build_model("smallconv", num_classes=4), rule, precision="bf16", backend=backend
    )
    images, labels = batch(32, size=16, classes=4)
    first = learner.step(images, labels)
    for _ in range(15):
        last = learner.step(images, labels)
    assert last.loss < first.loss
    assert last.logits.dtype == learner(images).dtype == torch.float32
    assert {p.dtype for p in learner.parameters()} == {torch.float32}


def test_memory_format_changes_speed_not_results(backend: str) -> None:
    images, labels = batch(size=16)
    moved = []
    for channels_last in (True, False):
        torch.manual_seed(1)
        model = build_model("smallconv").double()
        learner = LocalLearner(
            model, "lls", optimizer=sgd, channels_last=channels_last, backend=backend
        )
        assert model.conv2.conv.weight.is_contiguous() != channels_last
        moved.append(gradients(learner, images.double(), labels))
    for name in moved[0]:
        torch.testing.assert_close(moved[0][name], moved[1][name], rtol=1e-9, atol=1e-13)


def test_frozen_parameters_stay(backend: str) -> None:
    model = build_model("smallconv")
    for block in (model.conv1, model.conv2):
        block.requires_grad_(False)
    model.conv2.norm.requires_grad_(True)
    learner = LocalLearner(model, "lls", optimizer=sgd, backend=backend)
    images, labels = batch(size=16)
    moved = gradients(learner, images, labels)
    still = [n for n, g in moved.items() if g.abs().max() == 0]
    frozen = ["conv1.conv.weight", "conv1.norm.weight", "conv1.norm.bias", "conv2.conv.weight"]
    assert still == [f"model.{n}" for n in frozen]


@pytest.mark.filterwarnings("default")  # what torch's compiler warns of is not ours
@pytest.mark.parametrize("rule", ["bp", "lls-mxm"])
def test_compiled_blocks_learn_as_eager_ones(rule: str) -> None:
    if cxx_compiler() is None:
        pytest.skip("no C++ compiler on this machine: compilation on the CPU is refused here")
    images, labels = batch(8, channels=8, size=8, classes=4)
    moved = []
    for compiled in (False, True):
        torch.manual_seed(1)
        learner = LocalLearner(stack(1), rule, num_classes=4, optimizer=sgd, compile=compiled)
        moved.append(gradients(learner, images, labels))
    for name in moved[0]:
        torch.testing.assert_close(moved[0][name], moved[1][name], rtol=1e-4, atol=1e-5)


# -- other people's modules ---------------------------------------------------------------------


class Residual(nn.Module):
    """Two branches and a sum around plain modules: a forward that knows nothing of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.left = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.right = nn.Conv2d(8, 8, 1)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.left(x) + self.right(x) + x)
        return self.out(self.mlp(x.mean((2, 3))))


def test_foreign_blocks_by_name() -> None:
    images, labels = batch(16, classes=4)
    model = Residual()
    learner = LocalLearner(
        model,
        "lls",
        num_classes=4,
        blocks=["mlp", "stem", "left", "right"],
        example_input=images,
    )
    assert learner.block_names == ["stem", "left", "right", "mlp"]
    assert model.training
    first = learner.step(images, labels)
    for _ in range(40):
        last = learner.step(images, labels)
    assert all(last.block_losses[n] < first.block_losses[n] for n in learner.block_names)
    assert last.loss < first.loss


def test_layers_in_front_of_a_block_learn_with_it() -> None:
    images, labels = batch(16, classes=4)
    learner = LocalLearner(
        Residual(), "lls", num_classes=4, blocks=["mlp"], example_input=images, optimizer=sgd
    )
    moved = gradients(learner, images, labels)
    assert all(moved[f"model.{n}"].abs().max() > 0 for n in ("stem.0.weight", "right.weight"))
    assert moved["model.out.weight"].abs().max() > 0
    assert set(learner.optimizers) == {"mlp", ""}


def test_who_reads_no_output_is_warned_of() -> None:
    images, labels = batch(16, classes=4)
    model = Residual()
    model.unused = nn.Linear(2, 2)
    learner = LocalLearner(model, "lls", num_classes=4, example_input=images)
    with pytest.warns(UserWarning, match=r"no block holds unused.weight, .* will not train"):
        learner.step(images, labels)


def test_a_model_that_ends_in_a_block() -> None:
    images, labels = batch(16, classes=4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    learner = LocalLearner(model, "lls", num_classes=4, blocks=["1"], example_input=images)
    first = learner.step(images, labels).block_losses["1"]
    for _ in range(10):
        last = learner.step(images, labels).block_losses["1"]
    assert last < first


def test_a_forward_that_another_library_put_there_stays() -> None:
    model = build_model("smallconv")
    theirs = model.conv1.forward
    model.conv1.forward = theirs
    LocalLearner(model, "lls").step(*batch(size=16))
    assert vars(model.conv1)["forward"] is theirs


def test_a_latent_rule_sees_float32_under_bf16(backend: str) -> None:
    learner = LocalLearner(build_model("smallconv"), "lls", precision="bf16", backend=backend)
    seen = []
    head = learner.heads[0]
    signal = head.signal
    head.signal = lambda latents, labels: (seen.append(latents.dtype), signal(latents, labels))[1]
    learner.step(*batch(size=16))
    assert seen == [torch.float32]


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = LinearBlock(6, 6, latent_size=6)
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.block(self.block(x)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LocalLearner(nn.Linear(3, 2), "lls"), r"num_classes is not given"),
        (
            lambda: LocalLearner(
                nn.Linear(3, 2), "lls", num_classes=2, example_input=torch.zeros(2, 3)
            ),
            r"Linear has no block in front of its output layer",
        ),
        (
            lambda: LocalLearner(Residual(), "lls", num_classes=4, blocks=["stam"]),
            r"the model has no module 'stam'",
        ),
        (
            lambda: LocalLearner(Residual(), "lls", num_classes=4, blocks=["stem", "stem.0"]),
            r"block 'stem.0' lies inside block 'stem'",
        ),
        (
            lambda: LocalLearner(Residual(), "lls", num_classes=4, blocks=["stem"]).block_names,
            r"found from its first batch, .* give an example_input, or call build",
        ),
        (
            lambda: LocalLearner(build_model("smallconv"), "lls", precision="fp8"),
            r"unknown precision 'fp8'. Valid: fp32, bf16",
        ),
        (
            lambda: LocalLearner(build_model("smallconv"), "lls", optimizer="adamww"),
            r"unknown optimizer 'adamww'. Did you mean 'adamw'",
        ),
        (lambda: LocalLearner(build_model("smallconv"), "lls", lr=0.0), r"lr must be above 0"),
        (
            lambda: LocalLearner(build_model("smallconv"), "lls", optimizer=sgd, lr=0.1),
            r"lr and weight_decay belong to a named optimizer",
        ),
        (
            lambda: LocalLearner(build_model("smallconv"), "lls", num_classes=7),
            r"num_classes is 7, but the model has 10 classes",
        ),
        (
            lambda: LocalLearner(Residual(), "lls", num_classes=4, blocks=[]),
            r"blocks=\[\] names no block",
        ),
        (
            lambda: LocalLearner(build_model("smallconv"), "lls").recalibrate([]),
            r"recalibrate needs at least one batch",
        ),
        (
            lambda: LocalLearner(build_model("smallconv"), "lls", weight_decay=-1.0),
            r"weight_decay must be at least 0",
        ),
        (
            lambda: LocalLearner(Twice(), "lls", num_classes=2).step(
                torch.randn(4, 6), torch.zeros(4, dtype=torch.int64)
            ),
            r"block 'block' runs twice",
        ),
        (
            lambda: LocalLearner(build_model("smallconv"), "lls").step(
                torch.randn(4, 3, 8, 8), torch.zeros(3, dtype=torch.int64)
            ),
            r"labels must be int64 of shape \(4,\)",
        ),
    ],
)
def test_errors_say_what_is_wrong(call, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()


# -- state and statistics -----------------------------------------------------------------------


@pytest.mark.parametrize("in_training", [True, False])
@pytest.mark.parametrize("optimizer", ["schedulefree-adamw", "schedulefree-sgd", "adamw", "sgd"])
def test_training_goes_on_bit_for_bit_from_a_state(
    optimizer: str, in_training: bool, backend: str
) -> None:
    images, labels = batch(16, size=16)

    def fresh() -> LocalLearner:
        return LocalLearner(
            build_model("smallconv"), "lls-mxm", optimizer=optimizer, lr=0.01, backend=backend
        )

    one = fresh()
    for _ in range(3):
        one.step(images, labels)
    if not in_training:
        one.eval()
    state = copy.deepcopy(one.training_state())
    other = fresh()
    other.load_training_state(state)
    assert other.training == in_training
    for _ in range(3):
        a, b = one.step(images, labels), other.step(images, labels)
        assert torch.equal(a.logits, b.logits)
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_state_of_another_model_is_refused() -> None:
    state = LocalLearner(build_model("smallconv"), "lls").training_state()
    other = LocalLearner(build_model("vgg8"), "lls")
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_training_state(state)


def test_inference_after_training_measures_the_statistics_by_itself() -> None:
    """As the training loop does, on the batches that the learner held on to."""
    images, _ = batch(16, size=16)
    batches = [batch(16, size=16) for _ in range(10)]
    learners = []
    for number in (8, 0):
        torch.manual_seed(1)
        learner = LocalLearner(
            build_model("smallconv"), "lls", lr=0.1, recalibration_batches=number
        )
        for x, y in batches:
            learner.step(x, y)
        learners.append(learner)
    by_itself, by_hand = learners
    stale = by_hand(images)
    by_hand.recalibrate(x for x, _ in batches[2:])
    assert torch.equal(by_itself(images), by_hand(images))
    assert not torch.allclose(stale, by_hand(images), rtol=0.1)
    before = by_itself.model.conv1.norm.running_mean.clone()
    by_itself(images)  # once is enough
    assert torch.equal(before, by_itself.model.conv1.norm.running_mean)


def test_plain_optimizers_leave_the_statistics_alone() -> None:
    images, labels = batch(16, size=16)
    learner = LocalLearner(build_model("smallconv"), "lls", optimizer="adamw")
    learner.step(images, labels)
    before = learner.model.conv1.norm.running_mean.clone()
    learner(images)
    assert torch.equal(before, learner.model.conv1.norm.running_mean)


def test_recalibration_is_the_mean_over_the_batches_at_the_evaluation_weights() -> None:
    learner = LocalLearner(build_model("smallconv"), "lls", lr=0.1)
    batches = [batch(16, size=16) for _ in range(3)]
    for images, labels in batches:
        learner.step(images, labels)
    stale = learner.model.conv1.norm.running_mean.clone()
    learner.recalibrate(images for images, _ in batches)
    assert not learner.training
    assert all(not o.param_groups[0]["train_mode"] for o in learner.optimizers.values())
    conv, norm = learner.model.conv1.conv, learner.model.conv1.norm
    with torch.no_grad():
        means = [conv(images).mean((0, 2, 3)) for images, _ in batches]
    torch.testing.assert_close(norm.running_mean, torch.stack(means).mean(0), rtol=1e-4, atol=1e-6)
    assert (norm.running_mean - stale).abs().max() > 1e-3
    assert norm.momentum == 0.1
