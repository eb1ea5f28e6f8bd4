"""PEPITA: a second forward, with the error added to the input, in place of a backward.

Shapes: N batch, K classes.

With e = softmax(logits) - onehot of the first forward, the second one runs on x + F e, F fixed and
random, and each layer l moves by what that changes in its activity:

    dW_l = (h_l - h_l^err) (h_{l-1}^err)^T,         the last one by      dW_L = e (h_{L-1}^err)^T

each a mean over the batch, and of a convolution over the positions. There is no derivative of the
activation in it. What the paper leaves open is settled so: a BatchNorm's scale and shift learn as a
layer of their own does, from the same difference and from their own input; its running statistics
follow the first forward alone.

Source: Dellaferrera and Kreiman, "Error-driven Input Modulation: Solving the Credit Assignment
Problem without a Backward Pass" (ICML 2022), algorithm 1; scale of F from the authors' code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from locallearn.errors import UserError, unknown_name
from locallearn.rules.base import Information, Requirement, Rule, register_rule
from locallearn.rules.feedback import Feedback

UPDATE_ORDERS = ("layerwise", "end")


class Modulator(nn.Module):
    """x + F e.

    Arguments:
        num_classes: K.
        scale: F is uniform in +-scale * sqrt(6 / n), n the values of an image.
    """

    def __init__(self, num_classes: int, scale: float) -> None:
        super().__init__()
        self.feedback = Feedback(num_classes, scale)

    def forward(self, images: Tensor, error: Tensor) -> Tensor:
        """images: (N, ...); error: e, (N, K)."""
        return images + self.feedback.project(error, images).to(images.dtype)


@register_rule
@dataclass(frozen=True, kw_only=True)
class Pepita(Rule):
    """Each layer learns from what the error, added to the input, changes in its activity.

    Arguments:
        update_order: "layerwise", each layer as soon as the second forward has passed it, or "end",
            all after it. The activity that goes on was made before the update, so that both give
            the same weights; at the end, all gradients exist at once.
        feedback_scale: of F.
    """

    name: ClassVar[str] = "pepita"
    summary: ClassVar[str] = "a second forward of the input plus the projected error (PEPITA)"
    trains: ClassVar[str] = "nothing besides the network"
    requires: ClassVar[Requirement] = Requirement.TWO_FORWARDS
    learns_from: ClassVar[frozenset[Information]] = frozenset(
        {Information.OWN_OUTPUT, Information.LABEL, Information.OUTPUT_ERROR}
    )

    update_order: str = "layerwise"
    feedback_scale: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.update_order not in UPDATE_ORDERS:
            raise unknown_name("update_order", self.update_order, UPDATE_ORDERS)
        if not 0.0 < self.feedback_scale < math.inf:
            raise UserError(f"feedback_scale must be above 0, got {self.feedback_scale}.")

    def build_modulator(self, num_classes: int) -> Modulator:
        """What makes the second forward's input, on the CPU."""
        return Modulator(num_classes, self.feedback_scale)
