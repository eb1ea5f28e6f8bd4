"""Data in parallel, held to one process that trains on whole batches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.distributed.processes import in_processes
from torch import Tensor, nn

from locallearn import LocalLearner, UserError, build_model, build_rule
from locallearn.data import ImageLoader, InputSpec, MemoryImages
from locallearn.data.augment import Augmentation
from locallearn.distributed.parallelism import Parallelism
from locallearn.distributed.processes import joined
from locallearn.distributed.replicas import Replica
from locallearn.distributed.shards import ShardedLoader
from locallearn.engine.batch_norm import SynchronizedNorms
from locallearn.engine.evaluation import evaluate, tally
from locallearn.models import BlockStyle

CLASSES = 5
SIZE = 9


@dataclass(frozen=True)
class Case:
    """A training to be compared.

    rule, rule_settings, model, optimizer, norm: of the learner; settings: the others of it;
    batches: how many images each step has.
    """

    rule: str
    model: str = "smallconv"
    norm: str = "none"
    optimizer: str = "sgd"
    batches: tuple[int, ...] = (7, 7, 6, 1)
    rule_settings: tuple[tuple[str, Any], ...] = ()
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def is_synchronized(self) -> bool:
        return self.norm == "batch"

    def learner(self) -> LocalLearner:
        torch.manual_seed(0)
        style = BlockStyle(norm=self.norm)
        model = build_model(
            self.model, num_classes=CLASSES, in_channels=2, width=1 / 8, dropout=0.0, style=style
        )
        rule = build_rule(self.rule, **dict(self.rule_settings))
        return LocalLearner(
            model.double(), rule, optimizer=self.optimizer, lr=0.01, **dict(self.settings)
        )


def memory(kind: str) -> tuple[tuple[str, Any], ...]:
    return (("bp_memory", kind),)


BY_BATCHES_OF_ANY_SIZE = (("batch_statistics_from", 1),)

CASES = [
    Case("lls", batches=(7, 4) * 10, optimizer="schedulefree-adamw"),  # many steps
    Case("lls-mxm"),
    Case("local-losses"),
    Case("lls", settings=(("group_blocks", 2),)),
    Case("bp"),
    Case("bp", rule_settings=memory("accumulate:2")),
    Case("bp", rule_settings=memory("checkpoint")),
    Case("bp", rule_settings=memory("fused-optimizer")),
    Case("dfa"),
    Case("drtp"),
    Case("pepita"),
    Case("lls", norm="batch", batches=(7, 4) * 10, optimizer="schedulefree-adamw"),
    Case("bp", norm="batch"),
    Case("bp", norm="batch", rule_settings=memory("checkpoint")),
    Case("lls", model="mobilenet-v1", norm="batch"),  # two norms in a block
    # Of the last batches some replicas have nothing, and still normalise with the others.
    Case("lls", norm="batch", batches=(7, 2), settings=BY_BATCHES_OF_ANY_SIZE),
    Case("bp", norm="batch", batches=(7, 2), settings=BY_BATCHES_OF_ANY_SIZE),
]


class Outcome:
    """What a case gave in one process, to be pickled."""

    def __init__(
        self, difference: float, loss_difference: float, movement: float, digest: str
    ) -> None:
        self.difference = difference  # of the weights from one process's, the largest
        self.loss_difference = loss_difference
        self.movement = movement  # of the weights, by training
        self.digest = digest


def digest(learner: LocalLearner) -> str:
    crc = hashlib.sha256()
    for parameter in learner.parameters():
        crc.update(parameter.detach().contiguous().numpy().tobytes())
    return crc.hexdigest()


def part(num: int, index: int, of: int) -> slice:
    bounds = [sum(len(range(i, num, of)) for i in range(k)) for k in (index, index + 1)]
    return slice(*bounds)


def _compare(case: Case, learner: LocalLearner, alone: LocalLearner, replica: Replica) -> Outcome:
    """Against the same training on whole batches, in this very process."""
    replica.attach(learner)
    generator = torch.Generator().manual_seed(1)
    before = [parameter.detach().clone() for parameter in learner.parameters()]
    loss_difference = 0.0
    for num in case.batches:
        images = torch.randn(num, 2, SIZE, SIZE, dtype=torch.float64, generator=generator)
        labels = torch.randint(CLASSES, (num,), generator=generator)
        whole = alone.step(images, labels)
        own = part(num, replica.index, replica.num)
        ours = learner.step(images[own], labels[own])
        assert ours.logits.shape == (own.stop - own.start, CLASSES)
        assert ours.block_losses.keys() == whole.block_losses.keys()
        losses = torch.stack([ours.loss, *ours.block_losses.values()])
        losses = replica.sum(losses * len(labels[own])) / num
        expected = torch.stack([whole.loss, *whole.block_losses.values()])
        loss_difference = max(loss_difference, float((losses - expected).abs().max()))
    difference = distance(learner, list(alone.parameters()))
    return Outcome(difference, loss_difference, distance(learner, before), digest(learner))


def distance(learner: LocalLearner, others: Sequence[Tensor]) -> float:
    """The largest, from one parameter to another."""
    pairs = zip(learner.parameters(), others, strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def _at_default_precision(replica: Replica, learner: LocalLearner) -> tuple[str, float]:
    """As it is trained by default: each by its own statistics."""
    replica.attach(learner)
    loader = replica.loader(digits(num=29, batch_size=7))  # parts of 4 and 3, and of 1 and none
    for epoch in range(2):
        for images, labels in loader.epoch(epoch):
            learner.step(images, labels)
    mean = next(b for name, b in learner.model.named_buffers() if name.endswith("running_mean"))
    before = replica.gather(mean)
    replica.synchronize_buffers()
    spread = float((before[0] - before[1]).abs().max())
    torch.testing.assert_close(mean, before.double().mean(dim=0).float(), rtol=0, atol=0)
    assert all((replica.gather(b) == b).all() for b in learner.model.buffers())
    return digest(learner), spread


def _stops(replica: Replica) -> list[int | None]:
    """What is answered in each of five steps, where one replica is told to stop in the third."""
    is_told = [step == 2 and replica.index == replica.num - 1 for step in range(5)]
    return [replica.agree_to_stop(15 if told else None) for told in is_told]


def _evaluations(replica: Replica, learner: LocalLearner) -> tuple[Any, ...]:
    loader = digits(num=23, batch_size=5, shuffle=False)
    alone = evaluate(learner, loader, CLASSES)
    ours = replica.evaluation(*tally(learner, replica.dealt(loader).epoch(), CLASSES))
    assert torch.equal(ours.confusion, alone.confusion)
    assert ours.accuracy == alone.accuracy
    return ours.loss, alone.loss


def _run(cases: list[Case], num: int) -> dict[str, Any]:
    pairs = [(case.learner(), case.learner()) for case in cases]
    by_default = of_images()
    with joined(Parallelism(1, num), "cpu", 60) as processes:
        outcomes = []
        for case, pair in zip(cases, pairs, strict=True):
            replica = Replica(processes, synchronize_batch_norm=case.is_synchronized)
            outcomes.append(_compare(case, *pair, replica))
        replica = Replica(processes)
        return {
            "cases": outcomes,
            "default": _at_default_precision(replica, by_default),
            "stops": _stops(replica),
            "evaluations": _evaluations(replica, by_default),
        }


def of_images() -> LocalLearner:
    """Of images as :func:`digits` has them, with BatchNorm."""
    torch.manual_seed(0)
    model = build_model("smallconv", num_classes=CLASSES, in_channels=1, width=1 / 8)
    return LocalLearner(model, "lls-mxm", recalibration_batches=0)


def digits(num: int, batch_size: int, *, shuffle: bool = True) -> ImageLoader:
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(256, (num, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    labels = torch.randint(CLASSES, (num,), generator=generator)
    return ImageLoader(
        MemoryImages.from_array(pixels, labels),
        InputSpec((SIZE, SIZE), 1, mean=(0.5,), std=(0.5,)),
        batch_size=batch_size,
        device=torch.device("cpu"),
        augmentation=Augmentation(2, True, True, 0.5) if shuffle else Augmentation(),
        shuffle=shuffle,
        seed=3,
    )


@pytest.mark.parametrize("num", [2, 3])
def test_replicas_train_as_one_process_on_whole_batches(num: int) -> None:
    """With three of them a few cases, in which some have no images."""
    cases = CASES if num == 2 else [case for case in CASES if case.batches == (7, 2)]
    found = in_processes(num, _run, cases, num)
    for number, case in enumerate(cases):
        outcomes = [of_rank["cases"][number] for of_rank in found]
        assert max(outcome.difference for outcome in outcomes) < 1e-10, case
        assert max(outcome.loss_difference for outcome in outcomes) < 1e-10, case
        assert min(outcome.movement for outcome in outcomes) > 1e-4, case
        assert len({outcome.digest for outcome in outcomes}) == 1, case
    digests, spreads = zip(*(of_rank["default"] for of_rank in found), strict=True)
    assert len(set(digests)) == 1
    assert min(spreads) > 0  # each had statistics of its own
    for of_rank in found:
        assert of_rank["stops"] == [None, None, None, 15, None]
        ours, alone = of_rank["evaluations"]
        assert ours == pytest.approx(alone, rel=1e-6)
        assert of_rank["evaluations"] == found[0]["evaluations"]


# -- the engine's side, in one process -----------------------------------------------------------


class _Recorded:
    """A reduction over one, that notes what happens and is done when it is told."""

    def __init__(self, events: list[str], names: dict[int, str]) -> None:
        self.events = events
        self.names = names  # of the blocks, by the length of their buckets
        self.are_done: set[str] = set()

    def begin(self, bucket: Tensor) -> _Noted:
        name = self.names.get(len(bucket), "rest")
        self.events.append(f"begin {name}")
        return _Noted(self, name)

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor[None]


@dataclass
class _Noted:
    of: _Recorded
    name: str

    def is_done(self) -> bool:
        return self.name in self.of.are_done

    def wait(self) -> None:
        self.of.events.append(f"apply {self.name}")


def recorded(learner: LocalLearner) -> _Recorded:
    """Attached; forwards of the blocks are noted too."""
    events: list[str] = []
    lengths = {}
    for name, optimizer in learner.optimizers.items():
        parameters = optimizer.param_groups[0]["params"]
        lengths[sum(p.numel() for p in parameters) + len(parameters) + 1] = name or "rest"
    assert len(lengths) == len(learner.optimizers)
    for name, modules in learner.block_modules.items():

        def note(module: nn.Module, args: Any, name: str = name) -> None:
            events.append(f"forward {name}")

        modules[0].register_forward_pre_hook(note)
    reduction = _Recorded(events, lengths)
    learner.share_batches(reduction)
    return reduction


@pytest.mark.usefixtures("one_thread")
def test_sums_are_made_while_the_next_blocks_run() -> None:
    learner, alone = of_images(), of_images()
    reduction = recorded(learner)
    names = learner.block_names
    reduction.are_done = {names[0]}
    images, labels = torch.randn(8, 1, SIZE, SIZE), torch.arange(8) % CLASSES
    learner.step(images, labels)
    expected = []
    for number, name in enumerate(names):
        expected += [f"forward {name}", f"begin {name}"]
        if number == 0:  # it is done, and that is seen
            expected.append(f"apply {name}")
    expected.append("begin rest")
    expected += [f"apply {name}" for name in (*names[1:], "rest")]
    assert reduction.events == expected

    # A reduction over one changes no bit: eight images are weighed by 8, and divided by it.
    alone.step(images, labels)
    assert digest(learner) == digest(alone)
    assert all(parameter.grad is None for parameter in learner.parameters())


@pytest.mark.usefixtures("one_thread")
def test_a_block_that_runs_again_has_learned_from_its_first_run() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
            self.classifier = nn.Linear(6, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.classifier(self.body(self.body(x)))
            return logits

    images, labels = torch.randn(8, 6), torch.arange(8) % CLASSES

    def learner() -> LocalLearner:
        torch.manual_seed(0)
        return LocalLearner(
            Twice(),
            "lls",
            num_classes=CLASSES,
            blocks=["body"],
            example_input=images,
            allow_reuse=True,
        )

    ours, alone = learner(), learner()
    reduction = recorded(ours)
    ours.step(images, labels)
    alone.step(images, labels)
    assert reduction.events == [
        "forward body",
        "begin body",
        "forward body",
        "apply body",
        "begin body",
        "begin rest",
        "apply body",
        "apply rest",
    ]
    assert digest(ours) == digest(alone)


@pytest.mark.usefixtures("one_thread")
def test_what_no_image_reaches_here_takes_the_gradients_of_the_others() -> None:
    """A parameter without a gradient is updated where the marks say that another has one."""

    class Chooses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(6, CLASSES), nn.Linear(6, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = (self.left if x[0, 0] > 0 else self.right)(x)
            return logits

    class Mirrored(_Recorded):
        """As if another replica had run on the same images, by the other layer."""

        def begin(self, bucket: Tensor) -> _Noted:
            gradients, marks, num = bucket.split([2 * 6 * CLASSES + 2 * CLASSES, 4, 1])
            bucket += torch.cat([gradients.roll(len(gradients) // 2), marks.roll(2), num])
            return super().begin(bucket)

    torch.manual_seed(0)
    learner = LocalLearner(Chooses(), "bp", num_classes=CLASSES, optimizer="sgd", lr=0.1)
    before = [p.detach().clone() for p in learner.parameters()]
    learner.share_batches(Mirrored([], {}))
    images = torch.rand(4, 6) + 0.1
    learner.step(images, torch.arange(4))
    moved = [b - p.detach() for b, p in zip(before, learner.parameters(), strict=True)]
    assert float(moved[0].abs().max()) > 0
    torch.testing.assert_close(moved[0], moved[2])
    torch.testing.assert_close(moved[1], moved[3])


@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 7), (3, 3, 4, 5), (2, 3, 2, 3, 2)])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("is_affine", [True, False])
def test_synchronized_norm_over_one_is_batch_norm(
    shape: tuple[int, ...], momentum: float | None, is_affine: bool
) -> None:
    kinds: dict[int, Callable[..., nn.Module]] = {4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    kind = kinds.get(len(shape), nn.BatchNorm1d)

    def norm() -> nn.Module:
        torch.manual_seed(0)
        return kind(3, momentum=momentum, affine=is_affine).double()

    ours, theirs = norm(), norm()
    together = SynchronizedNorms(ours, lambda tensor: tensor[None])
    for _ in range(2):
        # A mean that is large beside the deviation: sums of squares would lose it.
        x = torch.randn(shape, dtype=torch.float64) + 1e6
        weights = torch.randn(shape, dtype=torch.float64)
        ours_in, theirs_in = x.clone().requires_grad_(), x.clone().requires_grad_()
        with together.step(len(x), len(x)):
            output = ours(ours_in)
        expected = theirs(theirs_in)
        (output * weights).sum().backward()
        (expected * weights).sum().backward()
        torch.testing.assert_close(output, expected, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(ours_in.grad, theirs_in.grad, rtol=1e-8, atol=1e-8)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-8, atol=1e-8)
    for mine, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(mine, other)
    ours.eval()
    with together.step(1, 1):
        torch.testing.assert_close(ours(x), F.batch_norm(x, *_settings(ours)))


def _settings(norm: Any) -> tuple[Any, ...]:
    return norm.running_mean, norm.running_var, norm.weight, norm.bias


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "reference"}, "needs backend 'autograd'"),
        ({"compile": True}, "and compile exclude each other"),
        ({"rule": build_rule("bp", bp_memory="accumulate:2")}, "'accumulate' exclude each other"),
    ],
)
def test_what_synchronized_norms_do_not_go_with(settings: dict[str, Any], message: str) -> None:
    model = build_model("smallconv", num_classes=CLASSES, in_channels=1, width=1 / 8)
    learner = LocalLearner(model, **settings)
    with pytest.raises(UserError, match=message):
        learner.share_batches(_Recorded([], {}), synchronize_batch_norm=True)


def test_own_loops_leave_the_output_layer_to_their_caller() -> None:
    learner = of_images()
    learner.share_batches(_Recorded([], {}))
    with (
        pytest.raises(UserError, match="not summed over replicas"),
        learner.local_step(torch.zeros(2, dtype=torch.int64)),
    ):
        pass


# -- parts of batches ----------------------------------------------------------------------------


@pytest.mark.parametrize(("num", "num_images", "batch_size"), [(2, 13, 4), (3, 29, 9), (4, 9, 9)])
def test_the_parts_are_the_batches(num: int, num_images: int, batch_size: int) -> None:
    """Bit for bit: order, augmentation and labels are those of one process."""
    whole = digits(num_images, batch_size)
    shards = [ShardedLoader(digits(num_images, batch_size), i, num) for i in range(num)]
    assert sum(shard.num_images for shard in shards) == whole.num_images
    for epoch, start in ((0, 0), (3, len(whole) - 1)):
        batches = list(whole.epoch(epoch, start))
        parts = [list(shard.epoch(epoch, start)) for shard in shards]
        assert all(
            len(shard) == len(whole) and len(p) == len(batches)
            for shard, p in zip(shards, parts, strict=True)
        )
        for number, (images, labels) in enumerate(batches):
            of_batch = [part[number] for part in parts]
            sizes = [len(part) for _, part in of_batch]
            assert max(sizes) - min(sizes) <= 1
            assert torch.equal(torch.cat([part for part, _ in of_batch]), images)
            assert torch.equal(torch.cat([part for _, part in of_batch]), labels)


def test_images_of_other_parts_are_not_read() -> None:
    loader = digits(num=13, batch_size=4)
    read: list[Tensor] = []
    batches = loader.source.batches

    def watched(indices: Sequence[Tensor], *arguments: Any) -> Any:
        read.extend(indices)
        return batches(indices, *arguments)

    loader.source.batches = watched  # type: ignore[method-assign]
    shards = [ShardedLoader(loader, index, 2) for index in range(2)]
    for shard in shards:
        read.clear()
        assert sum(len(labels) for _, labels in shard.epoch()) == shard.num_images
        assert sum(map(len, read)) == shard.num_images


def test_too_small_batches_are_refused() -> None:
    with pytest.raises(UserError, match="a batch of 2 cannot be shared by 3 replicas"):
        ShardedLoader(digits(num=9, batch_size=2), 0, 3)
