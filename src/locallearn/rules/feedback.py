"""Direct feedback: a fixed random projection of the output's error, or of the label.

Shapes: N batch, K classes, n values of a block's output for one image.

Each block has a B of its own, (K, n), drawn once and never trained:

    DFA    dL/dh = e B,            e = dL/dlogits = (softmax(logits) - onehot) / N
    sDFA   dL/dh = sign(e) B / N
    DRTP   dL/dh = onehot B / N

Source: Nokland, "Direct Feedback Alignment Provides Learning in Deep Neural Networks" (NeurIPS
2016), equation 7; Frenkel, Lefebvre and Bol, "Learning Without Feedback: Fixed Random Learning
Signals Allow for Feedforward Training of Deep Neural Networks" (Frontiers in Neuroscience 2021).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from locallearn.rules.base import (
    ErrorHead,
    ErrorRule,
    HeadSpec,
    Information,
    LocalHead,
    LocalRule,
    LocalSignal,
    register_rule,
)

_MAX_SEED = 2**62


class Feedback(nn.Module):
    """B, fixed and uniform in +-scale * sqrt(6 / n), as DRTP's authors draw it for all three.

    It is made from its seed for each shape of what it feeds, when that is first seen; only the seed
    is part of the state.

    Arguments:
        num_classes: K.
        scale: of its values.
    """

    seed: Tensor

    def __init__(self, num_classes: int, scale: float = 1.0) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.scale = scale
        self.register_buffer("seed", torch.randint(_MAX_SEED, ()))
        self._seed = int(self.seed)  # on the host, where a step can read it without waiting
        self._matrices: dict[tuple[Any, ...], Tensor] = {}
        self.register_load_state_dict_post_hook(_forget)  # type: ignore[no-untyped-call]

    def matrix(self, like: Tensor) -> Tensor:
        """B as (K, ...), shaped as an image's share of ``like`` (N, ...) and laid out as that is.

        In its dtype, but not below float32.
        """
        dtype = torch.promote_types(like.dtype, torch.float32)
        is_last = _is_channels_last(like)
        key = (like.shape[1:], dtype, like.device, is_last)
        if key not in self._matrices:
            generator = torch.Generator().manual_seed(self._seed)
            shape = (self.num_classes, *like.shape[1:])
            bound = self.scale * math.sqrt(6 / math.prod(like.shape[1:]))
            uniform = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
            made = (uniform * bound).to(like.device, dtype)
            # Each is kept: a captured graph reads it where it lies.
            self._matrices[key] = (
                made.contiguous(memory_format=torch.channels_last) if is_last else made
            )
        return self._matrices[key]

    def project(self, signal: Tensor, like: Tensor) -> Tensor:
        """signal B: (N, K) to the shape of ``like``."""
        return self._combine(
            like, lambda rows: (signal @ rows.flatten(1)).view(-1, *rows.shape[1:])
        )

    def select(self, labels: Tensor, like: Tensor) -> Tensor:
        """onehot B: each label's row, in the shape of ``like``."""
        return self._combine(like, lambda rows: rows[labels])

    def _combine(self, like: Tensor, combine: Callable[[Tensor], Tensor]) -> Tensor:
        """What ``combine`` makes of B's rows, which it is given in the order of memory, so that
        nothing is copied."""
        matrix = self.matrix(like)
        if not _is_channels_last(matrix):
            return combine(matrix)
        return combine(matrix.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


def _forget(feedback: nn.Module, incompatible_keys: Any) -> None:
    """After a state was loaded: the seed may be another."""
    assert isinstance(feedback, Feedback)
    feedback._seed = int(feedback.seed)
    feedback._matrices = {}


class DFAHead(ErrorHead):
    """dL/dh = e B."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.feedback = Feedback(num_classes)

    def signal(self, features: Tensor, error: Tensor) -> Tensor:
        return self.feedback.project(error, features)


class SignDFAHead(DFAHead):
    """dL/dh = sign(e) B / N."""

    def signal(self, features: Tensor, error: Tensor) -> Tensor:
        return self.feedback.project(error.sign() / len(error), features)


class DRTPHead(LocalHead):
    """dL/dh = onehot B / N: no loss, and no logits."""

    has_loss = False

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.feedback = Feedback(num_classes)

    def signal(self, features: Tensor, labels: Tensor) -> LocalSignal:
        return LocalSignal(None, None, self.feedback.select(labels, features) / len(labels))


@register_rule
@dataclass(frozen=True, kw_only=True)
class DFA(ErrorRule):
    """Direct feedback alignment: the output's error, projected at random to every block."""

    name: ClassVar[str] = "dfa"
    summary: ClassVar[str] = "the output error projected at random to each block (DFA)"
    trains: ClassVar[str] = "nothing besides the network"
    fits_any_output: ClassVar[bool] = True

    def build_head(self, spec: HeadSpec) -> ErrorHead:
        return DFAHead(spec.num_classes)


@register_rule
@dataclass(frozen=True, kw_only=True)
class SignDFA(ErrorRule):
    """DFA with the sign of the error alone.

    Without label smoothing that sign is -1 at the label and 1 elsewhere, for as long as no
    probability is rounded to 0 or 1: nothing of the output is left in it, which is what led its
    authors to DRTP.
    """

    name: ClassVar[str] = "sdfa"
    summary: ClassVar[str] = "DFA with the error's sign alone (sDFA)"
    trains: ClassVar[str] = "nothing besides the network"
    fits_any_output: ClassVar[bool] = True
    learns_from: ClassVar[frozenset[Information]] = LocalRule.learns_from

    def build_head(self, spec: HeadSpec) -> ErrorHead:
        return SignDFAHead(spec.num_classes)


@register_rule
@dataclass(frozen=True, kw_only=True)
class DRTP(LocalRule):
    """Direct random target projection: the label in the error's place, so nothing is awaited."""

    name: ClassVar[str] = "drtp"
    summary: ClassVar[str] = "the label projected at random to each block (DRTP)"
    trains: ClassVar[str] = "nothing besides the network"
    fits_any_output: ClassVar[bool] = True
    activation: ClassVar[str] = "tanh"

    def build_head(self, spec: HeadSpec) -> LocalHead:
        return DRTPHead(spec.num_classes)
