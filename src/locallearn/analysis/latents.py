"""What a trained network's blocks put out, as a local head would read it.

Shapes: N batch, T latent length, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from locallearn.data.dataset import DATA_SEED, Dataset, stratified_order
from locallearn.engine.assembly import head_dtype, head_spec
from locallearn.engine.blocks import PLAIN, BlockPlan, Layout, read_output
from locallearn.engine.learner import LocalLearner
from locallearn.errors import UserError
from locallearn.kernels import pool_latents
from locallearn.models import Block
from locallearn.rules import HeadSpec, LatentHead, LocalHead, LocalRule

_NORM_EPS = 1e-12  # of a latent that is zero throughout


@dataclass(frozen=True)
class BlockView:
    """A block, and what a local head reads of it.

    Arguments:
        name: in the model.
        block: the module.
        head: the rule's own; None of a rule without local heads.
        spec: what a head of this block must fit.
        is_after_pool: whether what is read is what the block hands on, after its max-pool; always
            of a block that is not the package's own.
        layout: how its output lies.
    """

    name: str
    block: nn.Module
    head: LocalHead | None
    spec: HeadSpec
    is_after_pool: bool
    layout: Layout = PLAIN

    def latents(self, features: Tensor) -> Tensor:
        """p, (N, T), of what is read, (N, C, H, W) or (N, F)."""
        return pool_latents(features, self.spec.latent_size)


def block_views(learner: LocalLearner, *, head_after_pool: bool = False) -> list[BlockView]:
    """The blocks of a network, in the order of the forward.

    Of blocks that learn in groups, the last of each group, which the head reads. Where the rule has
    no local heads, every block of the package's own.

    Arguments:
        learner: the network.
        head_after_pool: whether the run's heads read after the max-pool.

    Raises:
        UserError: a network of another make without blocks that learn by themselves, or a block of
            it that yields what no local head reads.
    """
    is_local = isinstance(learner.rule, LocalRule)
    blocks: dict[str, nn.Module] = {n: group[-1] for n, group in learner.block_modules.items()}
    heads: dict[str, nn.Module] = {}
    if is_local:
        heads = dict(zip(learner.block_names, learner.heads, strict=True))
    else:
        own: dict[str, nn.Module] = {
            name: module
            for name, module in learner.model.named_modules()
            if isinstance(module, Block)
        }
        blocks = own or blocks
    if not blocks:
        raise UserError(
            f"{type(learner.model).__name__} is a network of another make, in which rule "
            f"{learner.rule.name!r} knows no blocks to look at. Look at a run of a local rule."
        )
    rule = learner.rule if isinstance(learner.rule, LocalRule) else LocalRule()
    plans = {plan.name: plan for plan in learner.plan.blocks} if learner.plan else {}
    views = []
    for name, block in blocks.items():
        head = heads.get(name)
        assert head is None or isinstance(head, LocalHead)
        plan = plans.get(name) or BlockPlan(name, (name,), block)
        dtype = head_dtype(next(block.parameters(), torch.empty(0)))
        spec = head_spec(plan, learner.num_classes, dtype, rule)
        is_after_pool = not isinstance(plan.module, Block) or (head_after_pool and is_local)
        views.append(BlockView(name, block, head, spec, is_after_pool, plan.layout or PLAIN))
    return views


def choose_view(views: Sequence[BlockView], name: str | None, default: int) -> int:
    """The place of the block of that name; of None ``default``, or the last where there are fewer.

    Raises:
        UserError: no such block; names those there are.
    """
    names = [view.name for view in views]
    if name is None:
        return min(default, len(views) - 1)
    if name not in names:
        raise UserError(f"unknown block {name!r}. The blocks are, in order: {', '.join(names)}.")
    return names.index(name)


@dataclass(frozen=True)
class Observed:
    """A batch that went through the network.

    labels: (N,); logits: (N, K); features: block name -> what its head reads, float32.
    """

    labels: Tensor
    logits: Tensor
    features: dict[str, Tensor]


@torch.no_grad()
def observe(
    learner: LocalLearner, views: Sequence[BlockView], batches: Iterable[tuple[Tensor, Tensor]]
) -> Iterator[Observed]:
    """Run images through the network as an evaluation does, and yield what the blocks put out."""
    for images, labels in batches:
        with _reading(views) as features:
            logits = learner(images)
            seen = {v.name: v.layout.view(features[v.name], len(labels)) for v in views}
            yield Observed(labels, logits, seen)


@contextmanager
def _reading(views: Sequence[BlockView]) -> Iterator[dict[str, Tensor]]:
    """Within: a forward of the model leaves each block's features here."""
    features: dict[str, Tensor] = {}

    def before(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            features[name] = inputs[0].detach().float()

        return hook

    def after(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            features[name] = read_output(output, name).detach().float()

        return hook

    handles = []
    for view in views:
        if isinstance(view.block, Block) and not view.is_after_pool:
            handles.append(view.block.pool.register_forward_pre_hook(before(view.name)))
        else:
            handles.append(view.block.register_forward_hook(after(view.name)))
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class ClassMeans:
    """Mean latents by class.

    means: block name -> (K, T), float64, of latents scaled to length one; NaN of a class without
    images. counts: (K,), int64, images that each mean is of. kept: (M,), bool, which of all that
    were looked at those are.
    """

    means: dict[str, Tensor]
    counts: Tensor
    kept: Tensor


def class_means(
    learner: LocalLearner,
    views: Sequence[BlockView],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    only_correct: bool = False,
    among: Tensor | None = None,
) -> ClassMeans:
    """The mean of q = p / ||p|| over the images of each class.

    Every image counts alike, as in the cosine that a local head takes of it.

    Arguments:
        learner: in evaluation mode.
        views: blocks to look at.
        batches: images and labels.
        only_correct: leave out what the network classifies wrongly.
        among: (M,), bool, the images to take; all of them where None.
    """
    num_classes = learner.num_classes
    sums = {
        v.name: torch.zeros(num_classes, v.spec.latent_length, dtype=torch.float64) for v in views
    }
    counts = torch.zeros(num_classes, dtype=torch.int64)
    taken: list[Tensor] = []
    num_images = 0
    for batch in observe(learner, views, batches):
        labels = batch.labels.cpu()
        kept = torch.ones_like(labels, dtype=torch.bool)
        if among is not None:
            kept = among[num_images : num_images + len(labels)]
        if only_correct:
            kept = kept & (batch.logits.argmax(dim=1).cpu() == labels)
        num_images += len(labels)
        taken.append(kept)
        counts += torch.bincount(labels[kept], minlength=num_classes)
        for view in views:
            latents = view.latents(batch.features[view.name]).cpu()[kept]
            scaled = nn.functional.normalize(latents.double(), dim=1, eps=_NORM_EPS)
            sums[view.name].index_add_(0, labels[kept], scaled)
    means = {name: total / counts[:, None] for name, total in sums.items()}
    return ClassMeans(means, counts, torch.cat(taken))


@torch.no_grad()
def local_logits(view: BlockView, features: Tensor) -> Tensor | None:
    """What a block's own head answers, (N, K); None of a head without logits.

    Arguments:
        view: of the block.
        features: what its head reads.
    """
    if view.head is None:
        return None
    is_latent = isinstance(view.head, LatentHead)
    return view.head.logits(view.latents(features) if is_latent else features)


def limited(dataset: Dataset, limit: int | None) -> Dataset:
    """The dataset with so many test images at most, the classes in their proportions."""
    if limit is None:
        return dataset
    order = stratified_order(dataset.test.labels.cpu(), DATA_SEED)
    return replace(dataset, test=dataset.test.subset(order[:limit]))
