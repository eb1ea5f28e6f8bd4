"""LocalLearner: makes a model learn locally without rewriting its forward.

Shapes: N batch, K classes, T latent length.

During a step the learner stands in for each block's ``forward``: it detaches what comes in, runs
the block, asks the rule for the learning signal of the block's own output, updates the block at
once, frees its gradients, and passes the detached output on. So a gradient cannot cross a block's
boundary, whatever the model's own ``forward`` does between the blocks, and nothing of a block
outlives it but its output. What lies in no block (the classifier) learns from the cross-entropy
of the logits. Outside a step the model is an ordinary module.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from locallearn.engine.finding import find_blocks, latent_shape, output_shapes
from locallearn.engine.optimizers import (
    OptimizerFactory,
    ScheduleFreeAdamW,
    optimizer_factory,
    set_mode,
)
from locallearn.engine.units import BlockUnit, UnitSignal, build_unit
from locallearn.errors import UserError
from locallearn.kernels import choose_backend, missing_for
from locallearn.models import Block
from locallearn.rules import LatentRule, LatentSpec, Requirement, Rule, build_rule

_log = logging.getLogger(__name__)

PRECISIONS = ("fp32", "bf16")

# Values of z for each block after which compiling has paid for itself on the CPU: it takes about
# 4 s a block, and saves about 3 ns for each value (2 cores; benchmarks/results/).
COMPILE_AFTER = 1_200_000_000


@dataclass
class StepResult:
    """What a training step yields; nothing here has been brought to the host.

    Attributes:
        logits: of the whole network, (N, K), detached.
        loss: cross-entropy of the logits, scalar, detached.
        block_losses: block name -> its local loss, scalar, in the order of the forward. Empty for
            a rule without local losses (bp).
        block_logits: block name -> its local logits, (N, K); only blocks whose rule has logits.
        block_num_correct: block name -> how many of these are highest at the label, scalar, int64.
    """

    logits: Tensor
    loss: Tensor
    block_losses: dict[str, Tensor] = field(default_factory=dict)
    block_logits: dict[str, Tensor] = field(default_factory=dict)
    block_num_correct: dict[str, Tensor] = field(default_factory=dict)


class LocalLearner(nn.Module):
    """A model, a rule and their optimizers: ``step`` trains, calling the learner infers.

    Arguments:
        model: any module from (N, ...) inputs to (N, K) logits. The package's networks know their
            blocks; for others name them with ``blocks``.
        rule: a name (see ``list_rules()``) or a rule made by ``build_rule``.
        num_classes: K; the model's own ``num_classes`` where None.
        optimizer: a name, or a function from a list of parameters to an optimizer. Called once
            for each block and once for what lies in no block.
        lr: learning rate; the named optimizer's usual one where None.
        weight_decay: of the named optimizer.
        blocks: names of the blocks (as in ``model.named_modules()``); by default every
            :class:`locallearn.models.Block` of the model.
        example_input: an input batch, from which the output shapes of blocks that are not the
            package's own are read; needed for those alone.
        precision: "fp32", or "bf16": forward and backward under autocast, float32 weights,
            statistics and heads.
        channels_last: keep 4-d weights and inputs in channels-last memory format, the faster one
            for convolutions.
        backend: how the blocks that allow it are updated. In closed form (docs/closed-form.md):
            "reference" (plain PyTorch, the definition), "compiled" (torch.compile), "triton"; or
            not: "autograd". "auto" is triton on CUDA; on the CPU autograd at first, and compiled as
            soon as training has gone on for so long that compiling pays.
        overlap_updates: on CUDA, run a block's weight gradient and update on a second stream
            beside the next block's forward. Costs memory: what both streams use is freed later.
            The model's forward must not write into a block's input after the block has run.
        compile: run what takes the generic path (bp, blocks without a closed form) through
            ``torch.compile``.
        recalibration_batches: how many of the last training batches to hold on to, so that the
            first inference after training can re-estimate BatchNorm's running statistics on them
            (with a schedule-free optimizer; see :meth:`recalibrate`). 0 holds none and leaves
            that to the caller.

    Raises:
        UserError: a model without blocks, overlapping or unknown blocks, an unknown rule,
            optimizer or precision.

    The model is used in place. ``parameters()`` are the model's and the rule's together.
    """

    def __init__(
        self,
        model: nn.Module,
        rule: str | Rule = "lls",
        *,
        num_classes: int | None = None,
        optimizer: str | OptimizerFactory = "schedulefree-adamw",
        lr: float | None = None,
        weight_decay: float = 0.0,
        blocks: Sequence[str] | None = None,
        example_input: Tensor | None = None,
        precision: str = "fp32",
        channels_last: bool = True,
        backend: str = "auto",
        overlap_updates: bool = False,
        compile: bool = False,
        recalibration_batches: int = 8,
    ) -> None:
        super().__init__()
        if precision not in PRECISIONS:
            raise UserError(f"unknown precision {precision!r}. Valid: {', '.join(PRECISIONS)}.")
        own = getattr(model, "num_classes", None)
        num_classes = own if num_classes is None else num_classes
        if num_classes is None:
            raise UserError("num_classes is not given and the model has no such attribute.")
        if own is not None and num_classes != own:
            raise UserError(f"num_classes is {num_classes}, but the model has {own} classes.")
        self.model = model
        self.rule = build_rule(rule) if isinstance(rule, str) else rule
        self.num_classes = num_classes
        self.precision = precision
        self.channels_last = channels_last
        if channels_last:
            model.to(memory_format=torch.channels_last)
        reference = next(model.parameters(), torch.empty(0))
        dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
        # Of several, the one that fewest backends take.
        dtype = next((d for d in dtypes if d != torch.float32), torch.float32)
        self.backend = choose_backend(backend, reference.device.type, dtype)
        self._later_backend: str | None = None
        if backend == "auto" and self.backend == "compiled":
            self.backend, self._later_backend = "autograd", "compiled"
        self._is_auto = backend == "auto"
        self._num_elements = 0  # values of z that the steps have made
        self.state_number = 0  # of the loaded states; a captured graph is for one
        self._side_stream: torch.cuda.Stream | None = None
        if overlap_updates:
            if reference.device.type != "cuda":
                raise UserError(
                    f"overlap_updates needs CUDA streams; the model is on {reference.device.type}."
                )
            self._side_stream = torch.cuda.Stream(  # type: ignore[no-untyped-call]
                reference.device
            )

        self._has_stepped = False
        # What the first inference after training re-estimates BatchNorm's statistics on.
        self._recent: deque[Tensor] = deque(maxlen=recalibration_batches)
        self._is_stale = False
        self.heads = nn.ModuleList()
        self._units: list[BlockUnit] = []
        self._forward: Callable[[Tensor], Tensor] = model.__call__
        make_optimizer = optimizer_factory(optimizer, lr=lr, weight_decay=weight_decay)
        if self.rule.requires is Requirement.LOCAL:
            self._build_units(blocks, example_input, make_optimizer, compile)
        elif self.rule.requires is Requirement.END_TO_END:
            if compile:
                self._forward = torch.compile(model.forward)
        else:
            raise UserError(f"rule {self.rule.name!r} needs {self.rule.requires}: not supported.")

        in_blocks = {id(p) for unit in self._units for p in unit.block.parameters()}
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in in_blocks]
        self._rest_ids = {id(p) for p in rest}
        self._rest_optimizer = make_optimizer(rest) if rest else None
        self._has_two_points = any(hasattr(o, "eval") for o in self.optimizers.values())
        self._use_backend(self.backend)
        self.train()

    # -- what it is made of ---------------------------------------------------------------------

    @property
    def block_names(self) -> list[str]:
        """Names of the blocks that learn locally, in the order of ``named_modules``."""
        return [unit.name for unit in self._units]

    @property
    def block_paths(self) -> dict[str, str]:
        """Block name -> "closed form" or "generic": how its updates are computed."""
        return {unit.name: unit.path for unit in self._units}

    @property
    def optimizers(self) -> dict[str, Optimizer]:
        """Block name -> its optimizer; "" -> that of what lies in no block."""
        table = {unit.name: unit.optimizer for unit in self._units if unit.optimizer is not None}
        if self._rest_optimizer is not None:
            table[""] = self._rest_optimizer
        return table

    @property
    def holds_batches(self) -> bool:
        """Whether training batches are held on to (``recalibration_batches``)."""
        return self._recent.maxlen != 0

    @property
    def num_additional_params(self) -> int:
        """How many numbers the rule trains besides the model's own parameters."""
        return sum(p.numel() for p in self.heads.parameters() if p.requires_grad)

    def _build_units(
        self,
        names: Sequence[str] | None,
        example_input: Tensor | None,
        make_optimizer: OptimizerFactory,
        compile_blocks: bool,
    ) -> None:
        assert isinstance(self.rule, LatentRule)
        blocks = find_blocks(self.model, names)
        foreign = {name: block for name, block in blocks.items() if not isinstance(block, Block)}
        shapes = output_shapes(self.model, foreign, example_input) if foreign else {}
        for name, block in blocks.items():
            parameters = list(block.parameters())
            reference = parameters[0] if parameters else torch.empty(0)
            if isinstance(block, Block):
                latent_size, latent_length = block.latent_size, block.latent_length
                basis_length = block.basis_length
            else:
                latent_size, latent_length = latent_shape(name, shapes[name])
                basis_length = None
            dtype = torch.float64 if reference.dtype == torch.float64 else torch.float32
            spec = LatentSpec(latent_length, self.num_classes, basis_length, dtype)
            head = self.rule.build_head(spec).to(reference.device)
            self.heads.append(head)
            trained = [p for p in [*parameters, *head.parameters()] if p.requires_grad]
            self._units.append(
                build_unit(
                    compile_block=compile_blocks,
                    side_stream=self._side_stream,
                    name=name,
                    block=block,
                    head=head,
                    latent_size=latent_size,
                    optimizer=make_optimizer(trained) if trained else None,
                )
            )

    def _use_backend(self, backend: str) -> None:
        self.backend = backend
        for unit in self._units:
            unit.backend = backend
        for optimizer in self.optimizers.values():
            if isinstance(optimizer, ScheduleFreeAdamW):
                optimizer.backend = backend

    def _consider_compiling(self) -> None:
        """Go over to the faster backend once the work done so far would have paid for it.

        By then at most half of the time was lost, however long training goes on. Counted in
        values and not in seconds, so that a run repeats, and resumes, exactly.
        """
        self._num_elements += sum(unit.num_elements for unit in self._units)
        if self._later_backend and self._num_elements > COMPILE_AFTER * max(1, len(self._units)):
            _log.info(
                "backend auto: %s from here on, after %d values of z; compiling takes a moment",
                self._later_backend,
                self._num_elements,
            )
            self._use_backend(self._later_backend)
            self._later_backend = None

    def _autocast(self, device_type: str) -> contextlib.AbstractContextManager[Any]:
        if self.precision == "fp32":
            return contextlib.nullcontext()
        # Without its cache of cast weights, which an update inside the step would make stale.
        return torch.autocast(device_type, dtype=torch.bfloat16, cache_enabled=False)

    # -- modes ----------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> LocalLearner:
        """Training or evaluation mode, of the modules and of schedule-free optimizers alike."""
        super().train(mode)
        set_mode(self.optimizers.values(), training=mode)
        return self

    def recalibrate(self, batches: Iterable[Tensor]) -> None:
        """Re-estimate BatchNorm's running statistics at the evaluation weights.

        While a schedule-free optimizer trains, the running statistics follow weights that are
        not those it evaluates at, so they are measured anew before an evaluation: the mean over
        the given batches. Leaves the learner in evaluation mode.

        Arguments:
            batches: image batches of the training set, augmented as in training; the authors
                take 50.
        """
        arranged = map(self._arrange, batches)
        first = next(arranged, None)
        if first is None:
            raise UserError("recalibrate needs at least one batch, got none.")
        self.eval()
        with self._autocast(first.device.type):
            torch.optim.swa_utils.update_bn(itertools.chain([first], arranged), self.model)
        self.model.eval()
        self._is_stale = False

    # -- state ----------------------------------------------------------------------------------

    def training_state(self) -> dict[str, Any]:
        """All that a later :meth:`load_training_state` needs to go on exactly from here.

        Weights stand where they are: at a schedule-free optimizer's training point in training
        mode, at its evaluation point in evaluation mode. Moving them between the two rounds, so a
        state is taken without.
        """
        return {
            "training": self.training,
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizers": {name: opt.state_dict() for name, opt in self.optimizers.items()},
            "backend": self.backend,
            "num_elements": self._num_elements,
        }

    def load_training_state(self, state: dict[str, Any]) -> None:
        """The counterpart of :meth:`training_state`, for a learner built alike.

        Raises:
            KeyError, RuntimeError, ValueError: the state is of another model, rule or optimizer.
        """
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        optimizers = self.optimizers
        if set(optimizers) != set(state["optimizers"]):
            raise ValueError("the state has optimizers for other blocks")
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self._num_elements = state["num_elements"]
        if self._is_auto:
            self._restore_backend(state["backend"])
        self.state_number += 1
        super().train(state["training"])  # the modules alone: the optimizers' mode was loaded

    def _restore_backend(self, backend: str) -> None:
        """Go on with what the state was made with, where that can run here."""
        reference = next(self.model.parameters(), torch.empty(0))
        fastest = choose_backend("auto", reference.device.type, reference.dtype)
        if missing_for(backend, reference.device.type, reference.dtype) is not None:
            _log.warning("the state was made by backend %s; going on by %s", backend, fastest)
            backend = fastest
        self._use_backend(backend)
        waits = backend == "autograd" and fastest == "compiled"
        self._later_backend = fastest if waits else None

    # -- inference and training -----------------------------------------------------------------

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Inference: logits (N, K), float32, in evaluation mode (switched to where need be).

        The first one after training with a schedule-free optimizer re-estimates BatchNorm's
        statistics at the averaged weights, on the last training batches.
        """
        if self._is_stale and self._recent:
            self.recalibrate(list(self._recent))
        if self.training:
            self.eval()
        with self._autocast(images.device.type):
            logits: Tensor = self.model(self._arrange(images))
        return logits if logits.dtype == torch.float64 else logits.float()

    def step(self, images: Tensor, labels: Tensor) -> StepResult:
        """One training step: the forward, and every update.

        Arguments:
            images: (N, ...), floating, on the model's device; held on to for some steps, so not
                to be written over.
            labels: (N,), int64 in 0..K-1, on the model's device.

        Returns:
            StepResult. Nothing forces the host to wait for the device.

        Raises:
            UserError: labels of another shape or type than said above.
        """
        if labels.ndim != 1 or labels.dtype != torch.int64 or len(labels) != len(images):
            raise UserError(
                f"labels must be int64 of shape ({len(images)},), one for each image, "
                f"got {labels.dtype} of shape {tuple(labels.shape)}."
            )
        if not self.training:
            self.train()
        images = self._arrange(images)
        if images.device.type == "cuda":
            # Kernels and streams go to the current device, which may be another of several.
            with torch.cuda.device(images.device):
                return self._step(images, labels)
        return self._step(images, labels)

    def _step(self, images: Tensor, labels: Tensor) -> StepResult:
        signals: dict[str, UnitSignal] = {}
        with (
            torch.enable_grad(),
            self._autocast(images.device.type),
            _standing_in(self._units, labels, signals),
        ):
            logits = self._forward(images)
        if self._side_stream is not None:
            torch.cuda.current_stream().wait_stream(self._side_stream)
        with torch.enable_grad():
            logits = logits if logits.dtype == torch.float64 else logits.float()
            loss = F.cross_entropy(logits, labels, label_smoothing=self.rule.label_smoothing)
            if self._rest_optimizer is not None and loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
                if self._units and not self._has_stepped:
                    self._warn_of_the_unreached()
                self._rest_optimizer.step()
                self._rest_optimizer.zero_grad(set_to_none=True)
        self._has_stepped = True
        self._consider_compiling()
        self._recent.append(images.detach())
        self._is_stale = self._has_two_points
        return StepResult(
            logits=logits.detach(),
            loss=loss.detach(),
            block_losses={name: signal.loss for name, signal in signals.items()},
            block_logits={n: s.logits for n, s in signals.items() if s.logits is not None},
            block_num_correct={
                n: s.num_correct for n, s in signals.items() if s.num_correct is not None
            },
        )

    def _warn_of_the_unreached(self) -> None:
        named = self.model.named_parameters()
        unreached = [name for name, p in named if id(p) in self._rest_ids and p.grad is None]
        if unreached:
            warnings.warn(
                f"no block holds {', '.join(unreached)}, and the output's gradient does not reach "
                f"across the blocks behind: they will not train. Name a block that holds them.",
                stacklevel=3,
            )

    def _arrange(self, images: Tensor) -> Tensor:
        if self.channels_last and images.ndim == 4:
            return images.contiguous(memory_format=torch.channels_last)
        return images


@contextlib.contextmanager
def _standing_in(
    units: Sequence[BlockUnit],
    labels: Tensor,
    signals: dict[str, UnitSignal],
) -> Iterator[None]:
    """Within: a block's ``forward`` is its unit's step; what its head says goes to ``signals``."""

    def stand_in(unit: BlockUnit) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if unit.name in signals:
                raise UserError(
                    f"block {unit.name!r} runs twice in one forward; a block is updated as soon "
                    f"as it has run, so it must run once."
                )
            output, signals[unit.name] = unit.step(labels, *args, **kwargs)
            return output

        return forward

    # Through __dict__: an instance attribute hides the class's forward, and nn.Module's own
    # __setattr__ would cost more than it does for us. What another library put there comes back.
    before = [unit.block.__dict__.get("forward") for unit in units]
    try:
        for unit in units:
            unit.block.__dict__["forward"] = stand_in(unit)
        yield
    finally:
        for unit, forward in zip(units, before, strict=True):
            if forward is None:
                unit.block.__dict__.pop("forward", None)
            else:
                unit.block.__dict__["forward"] = forward
