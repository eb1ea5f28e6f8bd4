"""What a rule is, and the kinds that there are.

Shapes: N batch, T latent length, K classes.

A **local rule** gives each block a head, which makes a learning signal of the block's own output
and the label. Of these, a **latent rule** sees the output only through its pooled latent p (N, T):
it writes a loss of (p, y), with autograd on that small tensor, and everything large stays with the
engine. A **projection rule** is a latent rule whose logits are p projected on a matrix D (K, T): it
supplies D, and the head's loss and gradients come in closed form (`kernels.project_latents`). A
local rule that is no latent rule reads the whole output.

An **error rule** gives each block a head that makes its learning signal of the error at the
network's output. What does not fit (`bp`, `pepita`) the engine knows by what it requires.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import re
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallearn.errors import UserError
from locallearn.kernels import project_latents
from locallearn.registry import Registry


class Requirement(enum.StrEnum):
    """What has to run before a block can be updated."""

    LOCAL = "local"  # nothing: the block's own output and the label
    GLOBAL_ERROR = "global error"  # the error at the network's output
    TWO_FORWARDS = "two forwards"  # a second forward of a modulated input
    END_TO_END = "end to end"  # gradients through every later block


class Information(enum.StrEnum):
    """What can reach a block's update. `engine.audit` measures it by perturbation."""

    OWN_OUTPUT = "own output"
    LABEL = "label"
    OUTPUT_ERROR = "output error"  # of the network, at its logits
    LATER_WEIGHTS = "later weights"  # beyond what the output error tells of them


@dataclass(frozen=True)
class HeadSpec:
    """What a head must fit.

    Arguments:
        latent_length: T.
        num_classes: K.
        basis_length: length of a random basis before it is pooled to T (the authors'
            ``hidden_dim``); T where None.
        dtype: of the head's parameters and bases: the block's own, float32 or float64.
        latent_size: s (or height and width), or T of a block whose output is (N, F).
        num_channels: C or F of the block's output; None where a latent is all that is known.
        is_linear: whether the output is (N, F).
    """

    latent_length: int
    num_classes: int
    basis_length: int | None = None
    dtype: torch.dtype = torch.float32
    latent_size: int | tuple[int, int] = 1
    num_channels: int | None = None
    is_linear: bool = False


class LocalSignal(NamedTuple):
    """What a head says of one batch.

    loss: scalar, mean over the batch, and logits: (N, K); None where the rule has none. grad: of
    the loss with respect to what the head was given, in its shape.
    """

    loss: Tensor | None
    logits: Tensor | None
    grad: Tensor


class LocalHead(nn.Module):
    """The part of a local rule that belongs to one block, and reads its whole output.

    Subclasses write :meth:`loss`, or :meth:`signal` itself where there is no loss to write.

    Attributes:
        has_loss: whether there is one.
    """

    has_loss: bool = True

    def loss(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """The local loss as a differentiable function of the block's output.

        Arguments:
            features: h, (N, C, H, W) or (N, F), float32 or float64, requiring grad.
            labels: (N,), int64.

        Returns:
            The scalar loss (mean over N), and logits (N, K) or None.
        """
        raise NotImplementedError

    def signal(self, features: Tensor, labels: Tensor) -> LocalSignal:
        """Loss, logits and dL/dh; the head's own parameters receive their gradients.

        Arguments:
            features: h, detached from the block.
            labels: (N,), int64.
        """
        with torch.enable_grad():
            h = features.detach().requires_grad_()
            loss, logits = self.loss(h, labels)
            loss.backward()  # type: ignore[no-untyped-call]
        assert h.grad is not None, "the local loss does not depend on what the head was given"
        return LocalSignal(loss.detach(), None if logits is None else logits.detach(), h.grad)

    def logits(self, features: Tensor) -> Tensor | None:
        """The local logits (N, K) of what the head is given, where nobody knows the labels; None
        of a rule without. Equal to those of :meth:`signal`, which must not depend on labels.

        Arguments:
            features: as :meth:`signal` takes them.
        """
        if not self.has_loss:
            return None
        labels = torch.zeros(features.shape[0], dtype=torch.int64, device=features.device)
        return self.loss(features, labels)[1]


class LatentHead(LocalHead):
    """The part of a latent rule that belongs to one block.

    As :class:`LocalHead`, but ``features`` are the pooled latents p, (N, T).
    """


class ErrorHead(nn.Module):
    """The part of an error rule that belongs to one block. Subclasses write :meth:`signal`."""

    def signal(self, features: Tensor, error: Tensor) -> Tensor:
        """dL/dh, shaped like the block's output.

        Arguments:
            features: h, (N, C, H, W) or (N, F), detached from the block.
            error: dL/dlogits of the network's cross-entropy, (N, K), float32 or float64.
        """
        raise NotImplementedError


class ProjectionHead(LatentHead):
    """A head whose logits are q D^T / temperature. Subclasses write :meth:`projection`.

    Arguments:
        normalize: whether the latent is scaled to length one first.
        temperature: divides the logits.
        label_smoothing: in [0, 1).
        similarity: weight of the similarity term (see `kernels.match_similarity`); 0 for none.
    """

    def __init__(
        self,
        *,
        normalize: bool,
        temperature: float,
        label_smoothing: float,
        similarity: float = 0.0,
    ) -> None:
        super().__init__()
        self.normalize = normalize
        self.temperature = temperature
        self.label_smoothing = label_smoothing
        self.similarity = similarity

    @property
    def is_trained(self) -> bool:
        """Whether D depends on parameters that are trained."""
        return any(parameter.requires_grad for parameter in self.parameters())

    @property
    def has_closed_form(self) -> bool:
        """Whether the signal is the projection's alone: no subclass or patch says otherwise."""
        return type(self).signal is ProjectionHead.signal and "signal" not in vars(self)

    def projection(self) -> Tensor:
        """D, (K, T), as a differentiable function of the head's parameters (if it has any)."""
        raise NotImplementedError

    def logits(self, features: Tensor) -> Tensor:
        if self.normalize:
            features = F.normalize(features, dim=1)
        return features @ self.projection().T / self.temperature

    def projection_backward(self, grad_projection: Tensor) -> None:
        """Add to the parameters' ``.grad`` what dL/dD (K, T) means for them.

        The default asks autograd through :meth:`projection`. A head whose answer is one small
        product overrides it, and is spared the graph.
        """
        with torch.enable_grad():
            self.projection().backward(grad_projection)  # type: ignore[no-untyped-call]

    def signal(self, features: Tensor, labels: Tensor) -> LocalSignal:
        with torch.no_grad():
            projection = self.projection()
        result = project_latents(
            features,
            projection,
            labels,
            normalize=self.normalize,
            temperature=self.temperature,
            label_smoothing=self.label_smoothing,
            similarity=self.similarity,
            needs_grad_projection=self.is_trained,
        )
        if result.grad_projection is not None:
            self.projection_backward(result.grad_projection)
        return LocalSignal(result.loss, result.logits, result.grad_latents)


def accumulate_grad(parameter: nn.Parameter, grad: Tensor) -> None:
    """Add ``grad`` to ``parameter.grad``, as autograd would; ``grad`` itself stays as it is."""
    parameter.grad = grad if parameter.grad is None else parameter.grad + grad


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A learning rule: immutable settings, and the name by which users ask for it.

    Class attributes:
        name: in the registry and on the command line.
        summary: one line: what it is.
        trains: one line: what is trained besides the network itself.
        requires: what has to run before a block can be updated.
        learns_from: what reaches a block's update.
        activation: of the blocks that its paper uses, which a run's network has unless told
            otherwise (see `models.BlockStyle`).
        fits_any_output: whether heads take outputs of any shape, and need only the number of
            classes and the dtype of what they must fit.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    trains: ClassVar[str]
    requires: ClassVar[Requirement]
    learns_from: ClassVar[frozenset[Information]]
    activation: ClassVar[str] = "leaky-relu"
    fits_any_output: ClassVar[bool] = False

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing < 1.0:
            raise UserError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}.")

    def options(self) -> dict[str, Any]:
        """The settings as plain values: ``build_rule(rule.name, **rule.options())`` is equal."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class LocalRule(Rule):
    """A rule that sees each block's own output and the label. Subclasses write `build_head`."""

    requires: ClassVar[Requirement] = Requirement.LOCAL
    learns_from: ClassVar[frozenset[Information]] = frozenset(
        {Information.OWN_OUTPUT, Information.LABEL}
    )

    def build_head(self, spec: HeadSpec) -> LocalHead:
        """One block's head, on the CPU; its floating tensors in ``spec.dtype``."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class LatentRule(LocalRule):
    """A local rule that sees the output through its pooled latents: heads are `LatentHead`s."""


@dataclass(frozen=True, kw_only=True)
class ErrorRule(Rule):
    """A rule that hands each block the error at the network's output. Subclasses write
    `build_head`."""

    requires: ClassVar[Requirement] = Requirement.GLOBAL_ERROR
    learns_from: ClassVar[frozenset[Information]] = frozenset(
        {Information.OWN_OUTPUT, Information.LABEL, Information.OUTPUT_ERROR}
    )

    def build_head(self, spec: HeadSpec) -> ErrorHead:
        """One block's head, on the CPU."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ProjectionRule(LatentRule):
    """A latent rule that projects: settings that all of the family share.

    Arguments:
        temperature: divides the logits (the authors' 0.5).
        similarity: weight lambda of the similarity term, lambda mean((S - Y)^2) with S and Y the
            cosine similarities of the latents and of the one-hot labels; 0 for none.
    """

    temperature: float = 0.5
    similarity: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.temperature < math.inf:
            raise UserError(f"temperature must be above 0, got {self.temperature}.")
        if not 0.0 <= self.similarity < math.inf:
            raise UserError(f"similarity must be at least 0, got {self.similarity}.")

    def head_settings(self) -> dict[str, Any]:
        """The keyword arguments of :class:`ProjectionHead` that the settings give."""
        return {
            "temperature": self.temperature,
            "label_smoothing": self.label_smoothing,
            "similarity": self.similarity,
        }


RULES: Registry[type[Rule]] = Registry("rule")

_SAID_BY_EVERY_RULE: dict[str, type] = {
    "name": str,
    "summary": str,
    "trains": str,
    "requires": Requirement,
    "learns_from": frozenset,
}

R = TypeVar("R", bound=type[Rule])


def register_rule(cls: R) -> R:
    """Class decorator: make the rule known by its ``name``.

    A class of the same module and name takes the place of the one before, so that a notebook's
    cell can be run again.

    Raises:
        UserError: a name that is another rule's, or that a command line could not hold; or a class
            that does not say what every rule says.
    """
    for attribute, kind in _SAID_BY_EVERY_RULE.items():
        if not isinstance(getattr(cls, attribute, None), kind):
            raise UserError(
                f"rule class {_full_name(cls)} needs the class attribute {attribute!r}, "
                f"a {kind.__name__}."
            )
    if not re.fullmatch(r"[\w.-]+", cls.name):
        raise UserError(
            f"rule name {cls.name!r} of {_full_name(cls)} may hold letters, digits, '_', '.' and "
            f"'-' alone."
        )
    if cls.name in RULES:
        other = RULES.get(cls.name)
        if _full_name(other) != _full_name(cls):
            raise UserError(
                f"rule {cls.name!r} is registered already, as {_full_name(other)}; give "
                f"{_full_name(cls)} another name."
            )
        RULES.remove(cls.name)
    RULES.add(cls.name, cls)
    return cls


def unregister_rule(name: str) -> None:
    """Forget a rule (tests, plug-ins that reload)."""
    RULES.remove(name)


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
