"""The frozen front of a network: what runs before the first thing that learns.

What it makes of an image never changes, so it can be made once and kept. `FrozenFront.made` makes
it; within `FrozenFront.skipped` the model takes it in place of the images, and goes on from there:
see `engine.blocks.cutting`. Whether a model can be entered there is checked on real images, not
guessed.

Shapes: N batch.
"""

from __future__ import annotations

import contextlib

from torch import Tensor, nn

from locallearn.engine.blocks import CannotCut, Cut, find_cut
from locallearn.engine.learner import LocalLearner
from locallearn.errors import UserError

_NUM_CHECKED = 4  # images
_RANDOM = ("Dropout", "StochasticDepth", "DropPath", "DropBlock")
_ADVICE = "Leave --cache out: the frozen blocks then run at every step."


class FrozenFront:
    """What runs before the first thing that learns, made by :func:`find_front`.

    Attributes:
        learner: whose model it is.
        cut_name: name of the module that it ends before.
        feature_shape: of what it makes of an image.
        feature_dtype: of that.
        state_names: of the model's parameters and buffers that it may read.
        num_modules: that are passed over.
    """

    def __init__(self, learner: LocalLearner, cut: Cut) -> None:
        names = {module: name for name, module in learner.model.named_modules()}
        self.learner = learner
        self.cut_name = names[cut.module]
        self.feature_shape = cut.feature_shape
        self.feature_dtype = cut.feature_dtype
        frozen = {n for n, p in learner.model.named_parameters() if not p.requires_grad}
        frozen |= {n for n, _ in learner.model.named_buffers()}
        owners = {names[module] for module in cut.started}
        self.state_names = tuple(
            name
            for name in learner.model.state_dict()
            if name in frozen and name.rpartition(".")[0] in owners
        )
        self.num_modules = cut.num_passed
        self._cut = cut

    def made(self, images: Tensor) -> Tensor:
        """What the front makes of images, (N, *feature_shape), in evaluation mode."""
        return self._cut.made(images, self.learner.infer)

    def skipped(self) -> contextlib.AbstractContextManager[None]:
        """Within: the model, and so the learner, takes what :meth:`made` makes for images."""
        return self._cut.entered()

    def check(self, images: Tensor) -> None:
        """Raises UserError where the model does not yield the same without its front.

        Arguments:
            images: a few.
        """
        tolerance = 1e-4 if self.learner.precision == "fp32" else 3e-2
        try:
            self._cut.check(images, self.learner.infer, tolerance=tolerance)
        except CannotCut as why:
            raise _unfit(self.learner, self._cut.module, str(why)) from why


def find_front(learner: LocalLearner, images: Tensor) -> FrozenFront:
    """What runs before the first thing that learns, checked on images.

    Arguments:
        learner: with its final weights; stays as it is.
        images: three at least, on its device.

    Raises:
        UserError: nothing is frozen in front, or it can't be passed over.
    """
    learning = {module for modules in learner.block_modules.values() for module in modules}
    met: list[nn.Module] = []

    def learns(module: nn.Module) -> bool:
        own = module.parameters(recurse=False)
        if module not in learning and not any(p.requires_grad for p in own):
            return False
        met.append(module)
        return True

    try:
        cut = find_cut(learner.model, learns, images, learner.infer)
    except LookupError as error:
        raise UserError("--cache: nothing in the model's forward learns; leave it out.") from error
    except CannotCut as why:
        raise _unfit(learner, met[0], str(why)) from why
    if not cut.num_passed:
        raise UserError(
            f"--cache keeps what frozen blocks in front make, and nothing is frozen before "
            f"{_name(learner.model, cut.module)!r}, which learns. Leave --cache out, or freeze the "
            f"first blocks (--trained-blocks, or a smaller --memory-limit)."
        )
    _check_modes(learner, cut)
    front = FrozenFront(learner, cut)
    front.check(images[:_NUM_CHECKED])
    return front


def _check_modes(learner: LocalLearner, cut: Cut) -> None:
    """Raises UserError where what runs in front differs from step to step in training."""
    was_training = {module: module.training for module in learner.model.modules()}
    for module in cut.started:
        if next(module.children(), None) is not None or not was_training[module]:
            continue
        kind = type(module).__name__
        probability = getattr(module, "p", getattr(module, "drop_prob", 1.0))
        is_random = kind.startswith(_RANDOM) and bool(probability)
        if is_random or isinstance(module, nn.modules.batchnorm._BatchNorm):
            name = _name(learner.model, module)
            raise _unfit(learner, cut.module, f"{kind} {name!r} in front of it is not frozen")


def _unfit(learner: LocalLearner, cut: nn.Module, why: str) -> UserError:
    return UserError(
        f"the frozen blocks before {_name(learner.model, cut)!r} can't be cached: {why}. {_ADVICE}"
    )


def _name(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, each in model.named_modules() if each is module) or "the model"
