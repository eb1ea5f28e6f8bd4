"""What information reaches each block's update, measured by perturbation.

Shapes: N batch, F features that the output layer sees, K classes.

One step of plain SGD at rate one tells each parameter's update. The step is repeated with one thing
changed at a time, and every block's update compared:

    label           other labels
    output error    another bias of the output layer, which alters nothing but the logits
    own output      other weights of the block itself
    later weights   other weights of every later block

In the last two the output layer is fitted anew, so that the logits of the batch, and with them the
error, are what they were: a change then tells of the weights themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from locallearn.engine.blocks import own_blocks
from locallearn.engine.learner import LocalLearner
from locallearn.errors import UserError
from locallearn.rules import Information

# An update that differs by more than this share of itself has been reached. Fitting the logits
# leaves an error of about 1e-12 in float64.
_REACHED = 1e-6

Updates = dict[str, Tensor]


def audit_locality(
    build: Callable[[], LocalLearner],
    images: Tensor,
    labels: Tensor,
    *,
    blocks: Sequence[str] | None = None,
    output_layer: str = "classifier",
) -> dict[str, frozenset[Information]]:
    """What reached each block's update.

    Arguments:
        build: makes the learner, each time with the same weights (and random feedback): in float64,
            without dropout, with SGD at rate one for its optimizer.
        images: (N, ...), float64, N no more than F.
        labels: (N,), int64.
        blocks: names of those to audit; all of them where None. Each takes two steps.
        output_layer: name of the linear layer that makes the logits.

    Returns:
        Block name -> what reached it.

    Raises:
        UserError: a learner that is not in float64, or a batch too large for the output layer to be
            fitted to it.
    """
    audit = _Audit(build, images, labels, output_layer)
    ordered = list(audit.blocks)
    names = ordered if blocks is None else [name for name in ordered if name in blocks]
    found: dict[str, set[Information]] = {name: set() for name in names}

    def note(information: Information, updates: Updates, names: Sequence[str]) -> None:
        for name in names:
            if audit.is_changed(updates, name):
                found[name].add(information)

    # Not the same classes under other names, which a similarity match would not tell apart.
    other_labels = labels.clone()
    other_labels[::2] = (labels[::2] + 1) % audit.num_classes
    note(Information.LABEL, audit.updates(labels=other_labels), names)
    note(Information.OUTPUT_ERROR, audit.updates(change=audit.shift_bias), names)
    for name in names:
        note(Information.OWN_OUTPUT, audit.updates(change=audit.reweigh([name])), [name])
        later = audit.reweigh(ordered[ordered.index(name) + 1 :])
        note(Information.LATER_WEIGHTS, audit.updates(change=later), [name])
    return {name: frozenset(information) for name, information in found.items()}


class _Audit:
    def __init__(
        self,
        build: Callable[[], LocalLearner],
        images: Tensor,
        labels: Tensor,
        output_layer: str,
    ) -> None:
        learner = build()
        dtypes = {p.dtype for p in learner.parameters()} | {images.dtype}
        if dtypes != {torch.float64}:
            raise UserError(f"an audit needs float64 throughout, got {sorted(map(str, dtypes))}.")
        self._build, self._images, self._labels = build, images, labels
        self._output_layer = output_layer
        self.num_classes = learner.num_classes
        self.blocks = _parameters_of_blocks(learner)
        features, logits = self._features_and_logits(learner)
        if len(features) > features.shape[1]:
            raise UserError(
                f"a batch of {len(features)} images is more than the {features.shape[1]} features "
                f"of {output_layer!r} can be fitted to; audit on fewer."
            )
        self._logits = logits
        self._plain = self.updates()

    def updates(
        self,
        *,
        change: Callable[[LocalLearner], None] = lambda learner: None,
        labels: Tensor | None = None,
    ) -> Updates:
        """Parameter name -> what one step moves it by, after ``change``."""
        learner = self._build()
        change(learner)
        before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
        learner.step(self._images, self._labels if labels is None else labels)
        return {name: before[name] - p.detach() for name, p in learner.model.named_parameters()}

    def is_changed(self, updates: Updates, block: str) -> bool:
        before = torch.cat([self._plain[name].flatten() for name in self.blocks[block]])
        after = torch.cat([updates[name].flatten() for name in self.blocks[block]])
        return bool((after - before).norm() > _REACHED * before.norm())

    def shift_bias(self, learner: LocalLearner) -> None:
        layer = self._layer(learner)
        with torch.no_grad():
            layer.bias.add_(_noise(layer.bias))

    def reweigh(self, blocks: Sequence[str]) -> Callable[[LocalLearner], None]:
        """Other weights in these blocks and in the output layer, and yet the same logits."""

        def change(learner: LocalLearner) -> None:
            parameters = dict(learner.model.named_parameters())
            layer = self._layer(learner)
            with torch.no_grad():
                for block in blocks:
                    for name in self.blocks[block]:
                        parameters[name].add_(0.1 * _noise(parameters[name]))
                layer.weight.add_(_noise(layer.weight))
                features, logits = self._features_and_logits(learner)
                correction = torch.linalg.pinv(features) @ (self._logits - logits)
                layer.weight.add_(correction.T)

        return change

    def _features_and_logits(self, learner: LocalLearner) -> tuple[Tensor, Tensor]:
        """What the output layer sees and makes of it in a step, (N, F) and (N, K)."""
        seen: list[Tensor] = []
        layer = self._layer(learner)
        handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        try:
            with torch.no_grad():
                logits = learner.model(self._images)
        finally:
            handle.remove()
        return seen[0], logits

    def _layer(self, learner: LocalLearner) -> nn.Linear:
        layer = learner.model.get_submodule(self._output_layer)
        if not isinstance(layer, nn.Linear) or layer.bias is None:
            raise UserError(f"{self._output_layer!r} is no linear layer with a bias.")
        return layer


def _parameters_of_blocks(learner: LocalLearner) -> Mapping[str, list[str]]:
    """Block (or group) name -> names of its parameters, in the order of the forward."""
    modules = learner.block_modules or {
        name: (block,) for name, block in own_blocks(learner.model).items()
    }
    names = {id(p): name for name, p in learner.model.named_parameters()}
    return {
        block: [names[id(p)] for member in members for p in member.parameters()]
        for block, members in modules.items()
    }


def _noise(like: Tensor) -> Tensor:
    """The same each time, of the size of what it is added to (or of one where that is zero)."""
    generator = torch.Generator().manual_seed(like.numel())
    noise = torch.randn(like.shape, generator=generator, dtype=like.dtype)
    scale = like.detach().norm() / like.numel() ** 0.5
    return noise.to(like.device) * torch.where(scale > 0, scale, 1.0)
