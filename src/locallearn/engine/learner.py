"""LocalLearner: makes a model learn by a rule without rewriting its forward.

Shapes: N batch, K classes, T latent length.

During a step of a local rule the learner stands in for each block's ``forward``: it detaches what
comes in, runs the block, asks the rule for the learning signal of the block's own output, updates
the block at once, frees its gradients, and passes the detached output on. So a gradient cannot
cross a block's boundary, whatever the model's own ``forward`` does between the blocks, and nothing
of a block outlives it but its output. What lies in no block (the classifier) learns from the
cross-entropy of the logits. Rules that need more (the output's error, a second forward, the whole
network) have other steps: see `procedures`. Outside a step the model is an ordinary module.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from locallearn.engine.finding import (
    find_blocks,
    find_checkpointed,
    grouped,
    head_spec,
    output_shapes,
)
from locallearn.engine.optimizers import (
    OptimizerFactory,
    ScheduleFreeAdamW,
    optimizer_factory,
    set_mode,
)
from locallearn.engine.procedures import (
    ErrorUnit,
    ErrorUpdates,
    LocalUpdates,
    ModulatedUnit,
    OutputLayer,
    Procedure,
    TwoForwards,
    build_backpropagation,
)
from locallearn.engine.processes import check_one_process
from locallearn.engine.units import BlockUnit, build_unit
from locallearn.errors import UserError
from locallearn.kernels import choose_backend, missing_for
from locallearn.models import Block
from locallearn.rules import (
    Backprop,
    ErrorRule,
    HeadSpec,
    LocalRule,
    Pepita,
    Requirement,
    Rule,
    build_rule,
)

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
            a rule without local losses (bp, dfa, drtp, pepita).
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
            for each block and once for what lies in no block. By default the rule's usual one,
            schedulefree-adamw; pepita's is sgd.
        lr: learning rate; the named optimizer's usual one where None.
        weight_decay: of the named optimizer.
        blocks: names of the blocks (as in ``model.named_modules()``); by default every
            :class:`locallearn.models.Block` of the model.
        example_input: an input batch, from which the output shapes of blocks that are not the
            package's own are read; needed for those alone.
        group_blocks: so many blocks at a time learn together from the head of the last of them,
            with backpropagation between them. They must run one after the other.
        head_after_pool: a block's head reads what the block hands on, after its max-pool, and not
            the activation before. Takes the generic path where there is a max-pool.
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
            optimizer or precision, one of several processes.

    The model is used in place. ``parameters()`` are the model's and the rule's together.
    """

    def __init__(
        self,
        model: nn.Module,
        rule: str | Rule = "lls",
        *,
        num_classes: int | None = None,
        optimizer: str | OptimizerFactory | None = None,
        lr: float | None = None,
        weight_decay: float = 0.0,
        blocks: Sequence[str] | None = None,
        example_input: Tensor | None = None,
        group_blocks: int = 1,
        head_after_pool: bool = False,
        precision: str = "fp32",
        channels_last: bool = True,
        backend: str = "auto",
        overlap_updates: bool = False,
        compile: bool = False,
        recalibration_batches: int = 8,
    ) -> None:
        super().__init__()
        check_one_process()
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

        # What the first inference after training re-estimates BatchNorm's statistics on.
        self._recent: deque[Tensor] = deque(maxlen=recalibration_batches)
        self._is_stale = False
        self.heads = nn.ModuleList()
        self._units: list[BlockUnit] = []
        make_optimizer = optimizer_factory(
            optimizer, lr=lr, weight_decay=weight_decay, rule=self.rule
        )
        if self.rule.requires is Requirement.END_TO_END:
            checkpointed = find_checkpointed(model, blocks, self.rule)
            self._check_not_blockwise(group_blocks, head_after_pool)
        else:
            self._build_units(
                find_blocks(model, blocks),
                example_input,
                make_optimizer,
                group_blocks=group_blocks,
                compile_block=compile,
                head_after_pool=head_after_pool,
            )
        in_blocks = {id(p) for unit in self._units for m in unit.modules for p in m.parameters()}
        rest = {
            name: p
            for name, p in model.named_parameters()
            if p.requires_grad and id(p) not in in_blocks
        }
        self._rest_optimizers: dict[str, Optimizer] = {}
        if isinstance(self.rule, Backprop) and self.rule.bp_memory == "fused-optimizer":
            self._rest_optimizers = {name: make_optimizer([p]) for name, p in rest.items()}
        elif rest:
            self._rest_optimizers = {"": make_optimizer(list(rest.values()))}
        output_layer = OutputLayer(
            rest,
            self._rest_optimizers.get(""),
            label_smoothing=self.rule.label_smoothing,
            is_behind_blocks=bool(self._units),
        )
        if self.rule.requires is Requirement.END_TO_END:
            assert isinstance(self.rule, Backprop)
            self._procedure: Procedure = build_backpropagation(
                self.rule, model, checkpointed, output_layer, self._rest_optimizers, compile
            )
        else:
            self._procedure = self._build_procedure(output_layer)
        self._has_two_points = any(hasattr(o, "eval") for o in self.optimizers.values())
        self._use_backend(self.backend)
        self.train()

    # -- what it is made of ---------------------------------------------------------------------

    @property
    def block_names(self) -> list[str]:
        """Names of the blocks, in the order of ``named_modules``; of a group, the last one's."""
        return [unit.name for unit in self._units]

    @property
    def block_modules(self) -> dict[str, tuple[nn.Module, ...]]:
        """Block name -> the modules that learn together under it: one, or a group."""
        return {unit.name: unit.modules for unit in self._units}

    @property
    def loss_names(self) -> list[str]:
        """Those of them that have a local loss; none of bp, dfa, drtp and pepita has."""
        return [unit.name for unit in self._units if unit.has_loss]

    @property
    def can_be_graphed(self) -> bool:
        """Whether a step launches the same each time, with no number read on the host."""
        return self._procedure.can_be_graphed

    @property
    def block_paths(self) -> dict[str, str]:
        """Block name -> "closed form" or "generic" (autograd): how its updates are computed."""
        return {unit.name: unit.path for unit in self._units}

    @property
    def optimizers(self) -> dict[str, Optimizer]:
        """Block name -> its optimizer; "" -> that of what lies in no block.

        With bp's fused-optimizer, parameter name -> its optimizer.
        """
        table = {unit.name: unit.optimizer for unit in self._units if unit.optimizer is not None}
        return table | self._rest_optimizers

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
        blocks: dict[str, nn.Module],
        example_input: Tensor | None,
        make_optimizer: OptimizerFactory,
        *,
        group_blocks: int,
        head_after_pool: bool,
        compile_block: bool,
    ) -> None:
        """A unit for each block, or for each ``group_blocks`` of them, named after the last."""
        rule = self.rule
        if rule.requires is Requirement.TWO_FORWARDS:
            self._check_not_blockwise(group_blocks, head_after_pool)
            if compile_block:
                raise UserError(f"rule {rule.name!r} runs layer by layer, and is not compiled.")
        foreign = {}
        if isinstance(rule, LocalRule | ErrorRule) and not rule.fits_any_output:
            foreign = {n: block for n, block in blocks.items() if not isinstance(block, Block)}
        shapes = output_shapes(self.model, foreign, example_input) if foreign else {}
        for group in grouped(list(blocks.items()), group_blocks):
            name, block = group[-1]
            leaders = [leader for _, leader in group[:-1]]
            parameters = list(dict.fromkeys(p for _, m in group for p in m.parameters()))
            reference = parameters[0] if parameters else torch.empty(0)
            dtype = torch.float64 if reference.dtype == torch.float64 else torch.float32
            common: dict[str, Any] = {"name": name, "block": block}
            if not isinstance(rule, LocalRule | ErrorRule):
                optimizer = self._optimizer_of(parameters, make_optimizer)
                self._units.append(ModulatedUnit(optimizer=optimizer, **common))
                continue
            if rule.fits_any_output:
                spec = HeadSpec(1, self.num_classes, dtype=dtype)
            else:
                spec = head_spec(name, block, self.num_classes, dtype, shapes.get(name))
            head = rule.build_head(spec).to(reference.device)
            self.heads.append(head)
            common |= {
                "head": head,
                "latent_size": spec.latent_size,
                "optimizer": self._optimizer_of([*parameters, *head.parameters()], make_optimizer),
                "leaders": leaders,
                "compile_block": compile_block,
                "head_after_pool": head_after_pool,
            }
            if isinstance(rule, ErrorRule):
                self._units.append(ErrorUnit(**common))
            else:
                self._units.append(build_unit(side_stream=self._side_stream, **common))

    @staticmethod
    def _optimizer_of(
        parameters: Sequence[nn.Parameter], make_optimizer: OptimizerFactory
    ) -> Optimizer | None:
        trained = [p for p in parameters if p.requires_grad]
        return make_optimizer(trained) if trained else None

    def _check_not_blockwise(self, group_blocks: int, head_after_pool: bool) -> None:
        """These settings are of blocks' heads, which bp and pepita do not have."""
        for argument, is_given in (
            ("group_blocks", group_blocks != 1),
            ("head_after_pool", head_after_pool),
        ):
            if is_given:
                raise UserError(
                    f"{argument} says what a block's head reads; rule {self.rule.name!r} has no "
                    f"such heads. Leave it out."
                )

    def _build_procedure(self, output_layer: OutputLayer) -> Procedure:
        model, units, rule = self.model, self._units, self.rule
        if isinstance(rule, LocalRule):
            return LocalUpdates(model, units, output_layer, self._side_stream)
        if isinstance(rule, ErrorRule):
            waiting = [unit for unit in units if isinstance(unit, ErrorUnit)]
            return ErrorUpdates(model, waiting, output_layer)
        if not isinstance(rule, Pepita):
            raise UserError(
                f"rule {rule.name!r} needs {rule.requires}, but is neither a LocalRule nor an "
                f"ErrorRule, Pepita or Backprop: the engine does not know how to run it."
            )
        modulator = rule.build_modulator(self.num_classes)
        modulator.to(next(model.parameters()).device)
        self.heads.append(modulator)
        modulated = [unit for unit in units if isinstance(unit, ModulatedUnit)]
        return TwoForwards(
            model, modulated, output_layer, modulator, update_order=rule.update_order
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
        try:
            with torch.enable_grad(), self._autocast(images.device.type):
                logits, loss, signals = self._procedure(images, labels)
        except BaseException:
            self._abandon()
            raise
        self._consider_compiling()
        self._recent.append(images.detach())
        self._is_stale = self._has_two_points
        return StepResult(
            logits=logits,
            loss=loss,
            block_losses={n: s.loss for n, s in signals.items() if s.loss is not None},
            block_logits={n: s.logits for n, s in signals.items() if s.logits is not None},
            block_num_correct={
                n: s.num_correct for n, s in signals.items() if s.num_correct is not None
            },
        )

    def _abandon(self) -> None:
        """After a step that failed: nothing of it goes into the next, or holds memory."""
        for unit in self._units:
            unit.abandon()
        for parameter in self.parameters():
            parameter.grad = None

    def _arrange(self, images: Tensor) -> Tensor:
        if self.channels_last and images.ndim == 4:
            return images.contiguous(memory_format=torch.channels_last)
        return images
