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
import copy
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from locallearn.engine.assembly import Assembly, Settings, assemble
from locallearn.engine.batch_norm import SynchronizedNorms, check_can_synchronize
from locallearn.engine.blocks import (
    Blocks,
    Inputs,
    NetworkPlan,
    call_model,
    freeze,
    learn_all,
    needs_batch,
    num_inputs,
    own_blocks,
    plan_blocks,
    standing_in,
)
from locallearn.engine.exits import OUTPUT, Calibration, EarlyExits, Prediction, calibrate
from locallearn.engine.memory_format import in_channels_last, to_channels_last
from locallearn.engine.model_check import check_takes_model
from locallearn.engine.optimizers import (
    OptimizerFactory,
    ScheduleFreeAdamW,
    optimizer_factory,
    set_mode,
)
from locallearn.engine.pooling import pooled
from locallearn.engine.procedures import LocalUpdates, logits_of
from locallearn.engine.procedures.base import Outcome, not_below_float32
from locallearn.engine.processes import check_one_process
from locallearn.engine.reduction import GradientReduction
from locallearn.engine.results import LocalStep, StepResult
from locallearn.engine.statistics import BATCH_STATISTICS_FROM, RunningStatistics
from locallearn.engine.units import BlockUnit, GenericUnit, UnitSignal
from locallearn.errors import UserError
from locallearn.kernels import choose_backend, missing_for
from locallearn.rules import Backprop, Requirement, Rule, build_rule

_log = logging.getLogger(__name__)

PRECISIONS = ("fp32", "bf16")

# Values of z for each block after which compiling has paid for itself on the CPU: it takes about
# 4 s a block, and saves about 3 ns for each value (2 cores; benchmarks/results/).
COMPILE_AFTER = 1_200_000_000


class LocalLearner(nn.Module):
    """A model, a rule and their optimizers: ``step`` trains, calling the learner infers.

    Arguments:
        model: any module from (N, ...) inputs to (N, K) logits.
        rule: a name (see ``list_rules()``) or a rule made by ``build_rule``.
        num_classes: K; the model's own ``num_classes`` where None.
        optimizer: a name, or a function from a list of parameters to an optimizer. Called once
            for each block and once for what lies in no block. By default the rule's usual one,
            schedulefree-adamw; pepita's is sgd.
        lr: learning rate; the named optimizer's usual one where None: of schedulefree-adamw 5e-3,
            the paper's, or 3e-4 for a model without BatchNorm.
        weight_decay: of the named optimizer.
        blocks: which modules are the blocks. "auto": every :class:`locallearn.models.Block` of the
            model, and of any other model the repeated units of its stages (docs/own-model.md). Or
            names as in ``model.named_modules()``, globs ("layer*.?"), module types, as a sequence
            or in a string with commas ("stem,layer*.?,type:Bottleneck").
        trained_blocks: which of the blocks learn: names, a stage's too (the blocks it holds), globs
            or types, as `blocks`; None or "all": every one; "none" or an empty sequence: none. The
            others are frozen: they keep weights and statistics and run in evaluation mode, without
            graph, head or optimizer. What makes the logits and lies in no block always learns.
            The model's blocks are then found from a batch, whatever the model.
        example_input: an input batch, as :meth:`step` takes it, from which blocks that are not the
            package's own, and the shapes of their outputs, are read; without one, from the first
            batch.
        allow_reuse: whether a block may run more than once in a forward; it learns each time.
        group_blocks: so many blocks at a time learn together from the head of the last of them,
            with backpropagation between them. They must run one after the other.
        head_after_pool: a block's head reads what the block hands on, after its max-pool, and not
            the activation before. Takes the generic path where there is a max-pool.
        precision: "fp32", or "bf16": forward and backward under autocast, float32 weights,
            statistics and heads.
        channels_last: keep 4-d weights and inputs in channels-last memory format, the faster one
            for convolutions.
        backend: how the blocks that allow it are updated. In closed form (docs/closed-form.md):
            "reference" (plain PyTorch, the definition), "compiled" (torch.compile), "triton",
            "cuda" (CUDA C++, compiled at run time; extra `cuda`); or not: "autograd". "auto" is
            triton on CUDA (cuda where Triton is missing; a run of `locallearn train` measures which
            is the faster, a learner by itself does not); on the CPU autograd at first, and compiled
            as soon as training has gone on for so long that compiling pays.
        overlap_updates: on CUDA, run a block's weight gradient and update on a second stream
            beside the next block's forward. Costs memory: what both streams use is freed later.
            The model's forward must not write into a block's input after the block has run.
        compile: run what takes the generic path (bp, blocks without a closed form) through
            ``torch.compile``.
        recalibration_batches: how many of the last training batches to hold on to, so that the
            first inference after training can re-estimate BatchNorm's running statistics on them
            (with a schedule-free optimizer; see :meth:`recalibrate`). 0 holds none and leaves
            that to the caller. Batches below ``batch_statistics_from`` are not held.
        batch_statistics_from: so many images a batch must have for BatchNorm to normalise by it.
            Smaller ones are normalised by the running statistics, which take them in
            (docs/streaming.md). 1 for always by the batch, as torch has it.

    Raises:
        UserError: a model without blocks, overlapping or unknown blocks, an unknown rule,
            optimizer or precision, lazy modules without weights yet,
            DataParallel on several devices, one of several processes.

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
        blocks: Blocks | None = "auto",
        trained_blocks: Blocks | None = None,
        example_input: Inputs = None,
        allow_reuse: bool = False,
        group_blocks: int = 1,
        head_after_pool: bool = False,
        precision: str = "fp32",
        channels_last: bool = True,
        backend: str = "auto",
        overlap_updates: bool = False,
        compile: bool = False,
        recalibration_batches: int = 8,
        batch_statistics_from: int = BATCH_STATISTICS_FROM,
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
        check_takes_model(model)
        self.model = model
        self.rule = build_rule(rule) if isinstance(rule, str) else rule
        self.num_classes = num_classes
        self.precision = precision
        self.channels_last = channels_last
        if channels_last:
            to_channels_last(model)
        self._device = next(model.parameters(), torch.empty(0)).device
        dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
        # Of several, the one that fewest backends take.
        dtype = next((d for d in dtypes if d != torch.float32), torch.float32)
        self.backend = choose_backend(backend, self._device.type, dtype)
        self._later_backend: str | None = None
        if backend == "auto" and self.backend == "compiled":
            self.backend, self._later_backend = "autograd", "compiled"
        self._is_auto = backend == "auto"
        self._num_elements = 0  # values of z that the steps have made
        # Not where the model is entered behind its first blocks: what it takes stays as it lies.
        self.takes_images = True
        self.state_number = 0  # of the loaded states; a captured graph is for one
        if batch_statistics_from < 1:
            raise UserError(
                f"batch_statistics_from must be at least 1, which is always by the batch, got "
                f"{batch_statistics_from}."
            )
        self._statistics = RunningStatistics(model, batch_statistics_from)
        self._norms: SynchronizedNorms | None = None  # where replicas normalise together
        side_stream: torch.cuda.Stream | None = None
        if overlap_updates:
            if self._device.type != "cuda":
                raise UserError(
                    f"overlap_updates needs CUDA streams; the model is on {self._device.type}."
                )
            side_stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

        # What the first inference after training re-estimates BatchNorm's statistics on.
        self._recent: deque[Inputs] = deque(maxlen=recalibration_batches)
        self._is_stale = False
        self._has_two_points = False
        self.exit_temperatures: dict[str, float] = {}  # none until the exits are calibrated
        self._exits: EarlyExits | None = None
        self._has_said_uncalibrated = False
        self._blocks: Blocks = "auto" if blocks is None else blocks
        self._trained: Blocks | None = None if learn_all(trained_blocks) else trained_blocks
        if self._trained is not None and self.rule.requires is Requirement.TWO_FORWARDS:
            raise UserError(
                f"rule {self.rule.name!r} compares two forwards of every layer, and trains all "
                f"blocks; leave out trained_blocks, or use another rule."
            )
        self._settings = Settings(
            num_classes=num_classes,
            make_optimizer=optimizer_factory(
                optimizer, lr=lr, weight_decay=weight_decay, rule=self.rule, model=model
            ),
            group_blocks=group_blocks,
            head_after_pool=head_after_pool,
            compile=compile,
            allow_reuse=allow_reuse,
            side_stream=side_stream,
        )
        self.heads = nn.ModuleList()
        self.plan: NetworkPlan | None = None
        self._assembly: Assembly | None = None
        if example_input is not None:
            self.build(example_input)
        elif not self._needs_plan or not self._needs_batch:
            self._assemble(None)
        elif self.rule.requires is Requirement.TWO_FORWARDS:
            raise UserError(
                f"rule {self.rule.name!r} updates layer by layer, and takes locallearn's own "
                f"blocks alone (locallearn.models.Block with a method layers()); "
                f"{type(model).__name__} has others. Use another rule, or such blocks."
            )
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
    def is_local(self) -> bool:
        """Whether each block learns as soon as it has run, from its own output and the label."""
        return isinstance(self._parts.procedure, LocalUpdates)

    @property
    def can_be_graphed(self) -> bool:
        """Whether a step launches the same each time, with no number read on the host.

        Known of the package's own networks alone: another's forward may do anything.
        """
        if self._settings.updates.reduction is not None:  # it is looked at from the host
            return False
        return bool(own_blocks(self.model)) and self._parts.procedure.can_be_graphed

    @property
    def frozen_names(self) -> list[str]:
        """Names of the blocks that stay as they are (``trained_blocks``), as in the plan."""
        plan = self.plan if self.is_built else None
        return [] if plan is None else [block.name for block in plan.blocks if block.is_frozen]

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
        return table | self._parts.rest_optimizers

    def make_optimizer(self, parameters: list[nn.Parameter]) -> Optimizer:
        """One more of the kind that trains the blocks, for other parameters."""
        return self._settings.make_optimizer(parameters)

    @property
    def units(self) -> list[BlockUnit]:
        """What runs and updates the blocks, in their order."""
        return self._units

    @property
    def holds_batches(self) -> bool:
        """Whether training batches are held on to (``recalibration_batches``)."""
        return self._recent.maxlen != 0

    @property
    def num_additional_params(self) -> int:
        """How many numbers the rule trains besides the model's own parameters."""
        return sum(p.numel() for p in self.heads.parameters() if p.requires_grad)

    # -- building -------------------------------------------------------------------------------

    @property
    def is_built(self) -> bool:
        """Whether the blocks are known; a foreign model's are found from a batch."""
        return self._assembly is not None

    def build(self, images: Inputs) -> LocalLearner:
        """Find the blocks from a batch, where they are not known yet; returns the learner.

        The first :meth:`step` does it by itself. Some forwards of a few images are run in
        evaluation mode, and leave the model as it is.

        Arguments:
            images: as :meth:`step` takes them, on the model's device.

        Raises:
            UserError: no blocks, or such as nothing can be learned from.
        """
        if not self.is_built:
            with self._autocast(self._device.type):
                self._assemble(self._arrange(images))
        return self

    @property
    def _needs_plan(self) -> bool:
        """Whether it matters what the blocks are: for all rules but bp, and for bp where it runs
        them again, or where not all of them learn."""
        is_end_to_end = self.rule.requires is Requirement.END_TO_END
        return not is_end_to_end or is_checkpointing(self.rule) or self._trained is not None

    @property
    def _needs_batch(self) -> bool:
        return self._trained is not None or needs_batch(self.model, self._blocks)

    def _assemble(self, images: Inputs) -> None:
        plan = None
        if self._needs_plan:
            plan = plan_blocks(
                self.model,
                self._blocks,
                inputs=images,
                num_classes=self.num_classes,
                allow_reuse=self._settings.allow_reuse,
                reads_outputs=not getattr(self.rule, "fits_any_output", False),
            )
            if self._trained is not None:
                group_size = self._settings.group_blocks
                plan = freeze(self.model, plan, self._trained, images, group_size)
        self.plan = plan
        self._assembly = assemble(self.model, self.rule, plan, self._settings)
        self.heads.extend(self._assembly.heads)
        self._has_two_points = any(hasattr(o, "eval") for o in self.optimizers.values())
        self._use_backend(self.backend)
        set_mode(self.optimizers.values(), training=self.training)
        self._keep_frozen()

    @property
    def _parts(self) -> Assembly:
        if self._assembly is None:
            raise UserError(
                f"the blocks of {type(self.model).__name__} are found from its first batch, which "
                f"the learner has not seen yet: give an example_input, or call build(images) first."
            )
        return self._assembly

    @property
    def _units(self) -> list[BlockUnit]:
        return self._parts.units

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

    # -- replicas -------------------------------------------------------------------------------

    def share_batches(
        self, reduction: GradientReduction, *, synchronize_batch_norm: bool = False
    ) -> None:
        """From here on be one of several replicas, each of which trains on a part of every batch.

        All of them run the same blocks in the same order, and are alike: the same weights before
        every step, and after it. A step on no images (a last batch of fewer than there are
        replicas) takes the others' updates, and yields losses of zero.

        Arguments:
            reduction: over the replicas.
            synchronize_batch_norm: normalise by the whole batch, in blocks that run by autograd,
                and not by the replica's own part of it.

        Raises:
            UserError: settings that synchronized BatchNorm does not go with, or blocks that are
                still to be found (:meth:`build`).
        """
        if synchronize_batch_norm:
            has_closed_form = any(unit.path == "closed form" for unit in self._parts.units)
            check_can_synchronize(
                closed_form=has_closed_form and not self._is_auto,
                is_compiled=self._settings.compile,
                num_accumulated=getattr(self.rule, "num_accumulated", 1),
            )
            if self._is_auto:
                self._is_auto, self._later_backend = False, None
                self._use_backend("autograd")
            self._norms = SynchronizedNorms(self.model, reduction.gather)
        self._settings.updates.reduction = reduction

    @torch.no_grad()
    def synchronize_buffers(self) -> None:
        """Have the buffers of all replicas agree: running statistics of norms that learn become
        their mean, and other buffers of the model those of the first replica."""
        reduction = self._settings.updates.reduction
        assert reduction is not None, "see share_batches"
        running = self._running_statistics()
        state = self._statistics.state()
        if running:
            flat = torch.cat([tensor.flatten().double() for tensor in running.values()])
            means = reduction.gather(flat).mean(dim=0)
            parts = torch.split(means, [tensor.numel() for tensor in running.values()])
            for tensor, part in zip(running.values(), parts, strict=True):
                tensor.copy_(part.view_as(tensor))
            state["counts"] = reduction.gather(state["counts"]).mean(dim=0)
            self._statistics.load(state)
        for name, tensor in self.model.named_buffers():
            if name not in running:
                tensor.copy_(reduction.gather(tensor)[0])

    def _running_statistics(self) -> dict[str, Tensor]:
        """Name -> mean or variance, of norms that learn."""
        return {
            f"{name}.{kind}": tensor
            for name, module in self.model.named_modules()
            if isinstance(module, nn.modules.batchnorm._NormBase)
            and module not in self._parts.frozen
            for kind in ("running_mean", "running_var")
            if (tensor := getattr(module, kind)) is not None
        }

    def replica_state(self) -> dict[str, Any]:
        """What of :meth:`training_state` is this replica's alone, until buffers are synchronized:
        parts of few images are normalised by it."""
        running = {name: tensor.clone() for name, tensor in self._running_statistics().items()}
        return {"running": running, "counts": self._statistics.state()["counts"]}

    @torch.no_grad()
    def load_replica_state(self, state: dict[str, Any]) -> None:
        """The counterpart of :meth:`replica_state`."""
        for name, tensor in self._running_statistics().items():
            tensor.copy_(state["running"][name])
        self._statistics.load({"counts": state["counts"]})

    # -- modes ----------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> LocalLearner:
        """Training or evaluation mode, of the modules and of schedule-free optimizers alike."""
        super().train(mode)
        if self.is_built:
            set_mode(self.optimizers.values(), training=mode)
            self._keep_frozen()
        return self

    def _keep_frozen(self) -> None:
        """In evaluation mode, whatever the others are in."""
        for module in self._parts.frozen:
            module.training = False

    def _frozen_in_slices(self) -> contextlib.AbstractContextManager[None]:
        """Within: frozen blocks run as they do in a step, a few images at a time."""
        return standing_in(self._assembly.frozen_forwards if self._assembly else {})

    def recalibrate(self, batches: Iterable[Inputs]) -> None:
        """Re-estimate BatchNorm's running statistics at the evaluation weights.

        While a schedule-free optimizer trains, the running statistics follow weights that are
        not those it evaluates at, so they are measured anew before an evaluation: the mean over
        the given batches. Those of frozen blocks stay as they are. Leaves the learner in
        evaluation mode.

        Arguments:
            batches: image batches of the training set, augmented as in training; the authors
                take 50. Those of fewer images than ``batch_statistics_from`` are put together.
        """
        pools = pooled(batches, self._statistics.least)
        arranged = (self._arrange(images) for images in pools)
        first = next(arranged, None)
        if first is None:
            raise UserError("recalibrate needs at least one batch, got none.")
        self.eval()
        with torch.no_grad(), self._autocast(self._device.type):
            self._measure_statistics(itertools.chain([first], arranged))
        self._is_stale = False

    def _measure_statistics(self, batches: Iterable[Inputs]) -> None:
        """As torch's ``swa_utils.update_bn``, which knows of no frozen norms."""
        frozen = set(self._parts.frozen) if self.is_built else set()
        norms = [
            module
            for module in self.model.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module not in frozen
        ]
        if not norms:
            return
        momenta = [norm.momentum for norm in norms]
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the mean over all batches
            self.model.train()
            for module in frozen:
                module.training = False
            with self._frozen_in_slices():
                for images in batches:
                    call_model(self.model, images)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
            self.model.eval()

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
            "statistics": self._statistics.state(),
        }

    def load_training_state(self, state: dict[str, Any]) -> None:
        """The counterpart of :meth:`training_state`, for a learner built alike.

        Raises:
            KeyError, RuntimeError, ValueError: the state is of another model, rule or optimizer.
        """
        self.model.load_state_dict(state["model"])
        self._statistics.load(state.get("statistics"))  # an earlier version's has none
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
        self._keep_frozen()

    @contextlib.contextmanager
    def trial(self) -> Iterator[None]:
        """Within: steps on trial. Afterwards all is as it was before them: what
        :meth:`training_state` holds, the batches held on to, and torch's random numbers."""
        state = copy.deepcopy(self.training_state())
        recent, is_stale = list(self._recent), self._is_stale
        try:
            with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
                yield
        finally:
            self.load_training_state(state)
            self._recent.clear()
            self._recent.extend(recent)
            self._is_stale = is_stale

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

    # -- inference ------------------------------------------------------------------------------

    @torch.no_grad()
    def forward(self, images: Inputs) -> Tensor:
        """Inference: logits (N, K), float32, in evaluation mode (switched to where need be).

        The first one after training with a schedule-free optimizer re-estimates BatchNorm's
        statistics at the averaged weights, on the last training batches; where these were below
        ``batch_statistics_from``, the running statistics are used as they are.
        """
        self._before_inference()
        return self.infer(images)

    @torch.no_grad()
    def infer(self, images: Inputs) -> Tensor:
        """Logits (N, K), float32, in the modes that the modules are in, which stay so."""
        return not_below_float32(logits_of(self.run(images)))

    @torch.no_grad()
    def run(self, images: Inputs) -> Any:
        """What the model yields, in the modes that the modules are in."""
        images = self._arrange(images)
        with self._frozen_in_slices(), self._autocast(self._device.type):
            return call_model(self.model, images)

    def _before_inference(self) -> None:
        """In evaluation mode, and BatchNorm's statistics with it."""
        if self._is_stale and self._recent:
            self.recalibrate(list(self._recent))
        if self.training:
            self.eval()

    # -- early exits ----------------------------------------------------------------------------

    def early_exits(self, images: Inputs, names: Sequence[str] | None = None) -> EarlyExits:
        """The blocks at which images may leave.

        Arguments:
            images: a batch, on which they are found the first time, and whenever other names are
                given.
            names: of the blocks that are to be exits; None takes those of the last time, or all
                that can be.

        Raises:
            UserError: a rule without local logits, or a model that images can't leave early.
        """
        self.build(images)
        if self._exits is None or (names is not None and (*names, OUTPUT) != self._exits.names):
            units = [unit for unit in self._units if isinstance(unit, GenericUnit)]
            if self.frozen_names and not units:
                raise UserError(
                    "every block is frozen, and so none has a head that has learned to classify, "
                    "at which an image could leave. Train some (trained_blocks)."
                )
            if not any(unit.has_loss for unit in units):
                raise UserError(
                    f"rule {self.rule.name!r} has no local losses, and so no block that classifies "
                    f"by itself, at which an image could leave. The LLS family and local-losses do."
                )
            self._before_inference()
            with self._autocast(self._device.type):
                images = self._arrange(images)
                self._exits = EarlyExits(self.model, units, self.num_classes, images, names)
        return self._exits

    def exit_logits(self, images: Inputs) -> dict[str, Tensor]:
        """Exit name -> logits (N, K), not below float32, of an inference that no image leaves; the
        network's own come last, under "output".

        Raises:
            UserError: as :meth:`early_exits`.
        """
        exits = self.early_exits(images)
        self._before_inference()
        with self._frozen_in_slices(), self._autocast(self._device.type):
            return exits.logits(self._arrange(images))

    def calibrate_exits(self, batches: Iterable[tuple[Inputs, Tensor]]) -> dict[str, Calibration]:
        """Fit the temperature of each exit, so that its probabilities mean what they say.

        To be done once after training: the logits of the LLS family lie between -2 and 2, at which
        no softmax is sure of anything. More training makes the temperatures old.

        Arguments:
            batches: (images, labels), held out of the training.

        Returns:
            Exit name -> its temperature, and the calibration error before and after.

        Raises:
            UserError: as :meth:`early_exits`, or no batch.
        """
        logits: dict[str, list[Tensor]] = {}
        labels: list[Tensor] = []
        for images, of_images in batches:
            for name, of_exit in self.exit_logits(images).items():
                logits.setdefault(name, []).append(of_exit)
            labels.append(of_images)
        if not labels:
            raise UserError("calibrate_exits needs at least one batch, got none.")
        gathered = {name: torch.cat(parts) for name, parts in logits.items()}
        found = calibrate(gathered, torch.cat(labels))
        self.exit_temperatures = {name: each.temperature for name, each in found.items()}
        return found

    def predict(
        self,
        images: Inputs,
        *,
        exit_threshold: float | None = None,
        exits: Sequence[str] | None = None,
    ) -> Prediction:
        """Inference that stops, for each image, at the first block that is sure of it.

        Images that have left are not computed further: the batch that goes on is the smaller.

        Arguments:
            images: as :meth:`step` takes them.
            exit_threshold: the probability, in [0, 1], at which a block's word is taken; None runs
                the whole network. Meant for calibrated exits (:meth:`calibrate_exits`).
            exits: names of the blocks at which images may leave; see :meth:`early_exits`.

        Returns:
            Prediction: probabilities (N, K), classes, confidence, and where each image left.

        Raises:
            UserError: as :meth:`early_exits`, or a threshold out of range.
        """
        if exit_threshold is None:
            probabilities = self(images).softmax(dim=1)
            at_end = torch.zeros(len(probabilities), dtype=torch.int64, device=probabilities.device)
            return Prediction(probabilities, at_end, (OUTPUT,))
        if not 0.0 <= exit_threshold <= 1.0:
            raise UserError(f"exit_threshold must be in [0, 1], got {exit_threshold}.")
        found = self.early_exits(images, exits)
        is_calibrated = all(name in self.exit_temperatures for name in found.names)
        if not is_calibrated and not self._has_said_uncalibrated:
            self._has_said_uncalibrated = True
            _log.warning(
                "the exits are not calibrated: their probabilities may never come up to %s, or "
                "too soon. Call calibrate_exits with images that were held out of the training.",
                exit_threshold,
            )
        self._before_inference()
        with (
            self._on_device(),
            self._frozen_in_slices(),
            self._autocast(self._device.type),
        ):
            return found.predict(self._arrange(images), exit_threshold, self.exit_temperatures)

    # -- training -------------------------------------------------------------------------------

    def step(self, images: Inputs, labels: Tensor) -> StepResult:
        """One training step: the forward, and every update.

        Arguments:
            images: (N, ...) on the model's device; or a tuple of a model's arguments, or a dict of
                its keyword arguments, the first of which has N entries. Held on to for some steps,
                so not to be written over.
            labels: (N,), int64 in 0..K-1, on the model's device.

        Returns:
            StepResult. Nothing forces the host to wait for the device.

        Raises:
            UserError: labels of another shape or type than said above.
        """

        def procedure(images: Inputs, labels: Tensor) -> Outcome:
            return self._parts.procedure(self._arrange(images), labels)

        return self._checked_step(images, labels, procedure)

    def step_blocks(self, images: Inputs, labels: Tensor) -> StepResult:
        """As :meth:`step`, of a model that ends before its output, as a stage of several does: the
        blocks that run learn. ``logits`` are (0, K), and the loss is zero.

        Raises:
            UserError: as :meth:`local_step`.
        """
        local = self._local_procedure("step_blocks")

        def procedure(images: Inputs, labels: Tensor) -> Outcome:
            signals: dict[str, UnitSignal] = {}
            with local.learning(labels, signals):
                call_model(self.model, images)
            zeros = torch.zeros((1, self.num_classes), device=labels.device)
            return Outcome(zeros[:0], zeros[0, 0], signals)

        return self._checked_step(images, labels, procedure)

    def _checked_step(
        self, images: Inputs, labels: Tensor, procedure: Callable[[Inputs, Tensor], Outcome]
    ) -> StepResult:
        is_replica = self._settings.updates.reduction is not None
        num_images = 0 if is_replica and len(labels) == 0 else num_inputs(images)
        if labels.ndim != 1 or labels.dtype != torch.int64 or len(labels) != num_images:
            raise UserError(
                f"labels must be int64 of shape ({num_images},), one for each image, "
                f"got {labels.dtype} of shape {tuple(labels.shape)}."
            )
        self.build(images)
        if not self.training:
            self.train()
        self._keep_frozen()
        with self._on_device():
            if num_images == 0:
                return self._step_without_images(images, labels, procedure)
            outcome = self._step(images, labels, procedure, num_images=num_images)
        self._end_step(images)
        return _result_of(outcome)

    def _step_without_images(
        self, images: Inputs, labels: Tensor, procedure: Callable[[Inputs, Tensor], Outcome]
    ) -> StepResult:
        """The updates of the other replicas. It runs on zeros, which count for nothing: so every
        sum is begun here too, whatever the model does, and in the order of its forward."""
        zeros = tree_map_only(Tensor, lambda t: t.new_zeros((2, *t.shape[1:])), images)
        outcome = self._step(zeros, labels.new_zeros(2), procedure, num_images=0)

        def nothing(value: Tensor | None) -> Tensor | None:
            return None if value is None else torch.zeros_like(value)

        signals = {
            name: UnitSignal(
                nothing(signal.loss),
                None if signal.logits is None else signal.logits[:0],
                nothing(signal.num_correct),
            )
            for name, signal in outcome.signals.items()
        }
        return _result_of(Outcome(outcome.logits[:0], torch.zeros_like(outcome.loss), signals))

    def _step(
        self,
        images: Inputs,
        labels: Tensor,
        procedure: Callable[[Inputs, Tensor], Outcome],
        *,
        num_images: int,
    ) -> Outcome:
        try:
            with (
                torch.enable_grad(),
                self._autocast(self._device.type),
                self._normalizing(len(labels), num_images),
            ):
                outcome = procedure(images, labels)
                self._settings.updates.finish()
        except BaseException:
            self._abandon()
            raise
        return outcome

    def _local_procedure(self, method: str) -> LocalUpdates:
        procedure = self._parts.procedure
        if not isinstance(procedure, LocalUpdates):
            raise UserError(
                f"{method} is for rules whose blocks learn as soon as they have run; rule "
                f"{self.rule.name!r} needs {self.rule.requires}. Call step(images, labels)."
            )
        return procedure

    @contextlib.contextmanager
    def local_step(self, labels: Tensor) -> Iterator[LocalStep]:
        """Within: the blocks learn whenever the model's forward comes to them.

        For loops of the user's own: she calls the model as often and in whatever way she does, and
        what lies in no block is hers to train, by a loss of her own and an optimizer of her own or
        the learner's, ``optimizers[""]``. ::

            with learner.local_step(labels) as local:
                loss = my_loss(model(images), labels)
                loss.backward()
            learner.optimizers[""].step()
            learner.optimizers[""].zero_grad()

        Arguments:
            labels: (N,), int64 in 0..K-1, on the model's device, of the batch that comes.

        Yields:
            LocalStep; its losses are there once the forward has run.

        Raises:
            UserError: a rule whose blocks need more than their own output and the label, or blocks
                that are still to be found (:meth:`build`).
        """
        procedure = self._local_procedure("local_step")
        if self._settings.updates.reduction is not None:
            raise UserError(
                "local_step leaves what lies in no block to its caller, whose gradients are not "
                "summed over replicas. Call step(images, labels)."
            )
        if not self.training:
            self.train()
        self._keep_frozen()
        local = LocalStep()
        seen: list[Inputs] = []

        def see(module: nn.Module, args: Any, kwargs: Any) -> None:
            seen.append(kwargs or (args[0] if len(args) == 1 else args))

        handle = self.model.register_forward_pre_hook(see, with_kwargs=True)
        try:
            with (
                self._on_device(),
                torch.enable_grad(),
                self._autocast(self._device.type),
                self._statistics.step(len(labels)),
                procedure.learning(labels, local.signals),
            ):
                yield local
        except BaseException:
            self._abandon()
            raise
        finally:
            handle.remove()
        if seen:
            self._end_step(seen[0])

    def _end_step(self, images: Inputs) -> None:
        self._consider_compiling()
        # Small batches are trained on by the running statistics, which are then the right ones; one
        # at the end of an epoch of others changes nothing of what these have left.
        if self._has_two_points and num_inputs(images) >= self._statistics.least:
            self._is_stale = True
            self._recent.append(tree_map_only(Tensor, Tensor.detach, images))

    @contextlib.contextmanager
    def _normalizing(self, num_run: int, num_images: int) -> Iterator[None]:
        """Within: BatchNorm as it is in a step on so many images, of which so many count."""
        updates, norms = self._settings.updates, self._norms
        updates.num_images = num_images
        keeping = contextlib.nullcontext() if num_images else self._keeping_buffers()
        if norms is None:
            with keeping, self._statistics.step(self._parts.procedure.num_at_a_time(num_run)):
                yield
            return
        total = norms.total(num_images)
        if total >= self._statistics.least:
            with self._statistics.step(total), norms.step(num_images, total):
                yield
        else:
            with keeping, self._statistics.step(total):
                yield

    @contextlib.contextmanager
    def _keeping_buffers(self) -> Iterator[None]:
        """Within: what the model's buffers take in is forgotten afterwards."""
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        counts = self._statistics.state()
        yield
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        self._statistics.load(counts)

    def _on_device(self) -> contextlib.AbstractContextManager[Any]:
        """Kernels and streams go to the current device, which may be another of several."""
        if self._device.type == "cuda":
            return torch.cuda.device(self._device)
        return contextlib.nullcontext()

    def _abandon(self) -> None:
        """After a step that failed: nothing of it goes into the next, or holds memory."""
        for unit in self._units:
            unit.abandon()
        self._settings.updates.abandon()
        for parameter in self.parameters():
            parameter.grad = None

    def _arrange(self, images: Inputs) -> Inputs:
        if not (self.channels_last and self.takes_images):
            return images
        return tree_map_only(Tensor, in_channels_last, images)


def _result_of(outcome: Outcome) -> StepResult:
    local = LocalStep()
    local.signals = outcome.signals
    return StepResult(
        logits=outcome.logits,
        loss=outcome.loss,
        block_losses=local.block_losses,
        block_logits=local.block_logits,
        block_num_correct=local.block_num_correct,
    )


def is_checkpointing(rule: Rule) -> bool:
    """Whether it is bp, and its blocks are run again in the backward."""
    return isinstance(rule, Backprop) and rule.bp_memory == "checkpoint"
