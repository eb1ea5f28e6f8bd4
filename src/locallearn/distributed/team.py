"""The processes that share a training, as its loop sees them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from locallearn.data.loader import EpochLoader
from locallearn.distributed.agreement import agree, together
from locallearn.distributed.balance import balanced, parse_balance
from locallearn.distributed.links import Inbox, Outbox
from locallearn.distributed.processes import Processes
from locallearn.distributed.receiving import ReceivingLoader
from locallearn.distributed.replay import ReplayLoader, ReplaySource
from locallearn.distributed.replicas import Replica
from locallearn.distributed.stages import Spread, State, whole
from locallearn.engine.block_costs import measure_block_costs
from locallearn.engine.building import recalibrate
from locallearn.engine.config import TrainConfig
from locallearn.engine.evaluation import Evaluation, evaluation_of, tally
from locallearn.engine.learner import LocalLearner
from locallearn.engine.results import StepResult
from locallearn.engine.sums import EpochSums, combined, nothing_of, scaled
from locallearn.engine.team import Team
from locallearn.errors import UserError

Made = TypeVar("Made")

_LOOK_SECONDS = 0.5  # between looks whether another process was asked to stop
_TELL_SECONDS = 1.0  # between figures for the progress bar
_STOP_KEY = "stop"


class ProcessTeam(Team):
    """One of several processes: it trains a stage of the network.

    Arguments:
        processes: all that have joined.
        balance: "2,3,1", blocks of each stage; None measures, and balances by time.
        synchronize_batch_norm: whether replicas normalise by whole batches.
        replay: so many inputs a stage holds, to train on instead of waiting; None waits. See
            `replay`.
    """

    is_alone = False

    def __init__(
        self,
        processes: Processes,
        *,
        balance: str | None = None,
        synchronize_batch_norm: bool = False,
        replay: int | None = None,
    ) -> None:
        self._processes = processes
        self._pulse = processes.pulse
        self._balance = balance
        self._synchronize_batch_norm = synchronize_batch_norm
        self._replay = replay
        self._replaying: ReplayLoader | None = None  # of a stage that is not the first
        self._replica: Replica | None = None  # where there are several
        self._is_without_images = False  # in a step of this replica
        self._sizes: tuple[int, ...] = ()
        self._own_request: int | None = None
        self._has_passed_on = False
        self._stop: int | None = None
        self._looked = 0.0
        self._told = 0.0
        self._num_images_before = 0  # of the epoch, by whatever processes
        self._num_elements_before = 0  # values that were made before all processes went on

    @property
    def is_first(self) -> bool:  # type: ignore[override]
        return self._processes.rank == 0

    @property
    def replica(self) -> int:  # type: ignore[override]
        return self._processes.replica

    @property
    def num_replicas(self) -> int:  # type: ignore[override]
        return self._processes.parallelism.num_replicas

    @property
    def synchronizes_batch_norm(self) -> bool:  # type: ignore[override]
        return self._synchronize_batch_norm

    # -- the start ------------------------------------------------------------------------------

    def together(self, what: str) -> contextlib.AbstractContextManager[None]:
        return together(self._processes, what)

    def first(self, make: Callable[[], Made], what: str) -> Made:
        made: list[Any] = [None]
        with self.together(what):
            if self.is_first:
                made[0] = make()
        with self._pulse.waiting(None):
            dist.broadcast_object_list(made, src=0, group=self._processes.control)
        return made[0]  # type: ignore[no-any-return]

    def load(self, make: Callable[[], Made]) -> Made:
        made: list[Made] = []
        for is_turn in (self._processes.is_first_of_host, not self._processes.is_first_of_host):
            with self.together("loading the data"):
                if is_turn:
                    made.append(make())
        return made[0]

    def agree(self, facts: dict[str, Any]) -> None:
        own = {
            "--balance": self._balance,
            "--sync-batch-norm": self._synchronize_batch_norm,
            "--replay": self._replay,
        }
        agree(self._processes, facts | own)

    def describe(self) -> dict[str, Any]:
        described: dict[str, Any] = {"parallel": str(self._processes.parallelism)}
        if self._synchronize_batch_norm:
            described["sync_batch_norm"] = True
        if self._replay is not None:
            described["replay"] = self._replay
        return described

    def going_on(self, directory: Path, recorded: dict[str, Any]) -> list[str]:
        parallelism = self._processes.parallelism
        begun = f"{directory} was begun"
        was_synchronized = recorded.get("sync_batch_norm", False)
        if parallelism.num_replicas > 1 and was_synchronized != self._synchronize_batch_norm:
            raise UserError(
                f"{begun} with --sync-batch-norm. Give it again."
                if was_synchronized
                else f"{begun} without --sync-batch-norm. Leave it out."
            )
        size = recorded.get("replay")
        has_stages_alone = parallelism.num_stages > 1 and parallelism.num_replicas == 1
        if has_stages_alone and size != self._replay:
            raise UserError(
                f"{begun} without --replay. Leave it out."
                if size is None
                else f"{begun} with --replay {size}. Give that again."
            )
        return super().going_on(directory, recorded)

    def resume_command(self, directory: Path) -> str:
        flags = [] if self._balance is None else [f"--balance {self._balance}"]
        if self._synchronize_batch_norm:
            flags.append("--sync-batch-norm")
        if self._replay is not None:
            flags.append(f"--replay {self._replay}")
        return self._processes.resume_command(directory, flags)

    def join(
        self,
        learner: LocalLearner,
        settings: TrainConfig,
        twin: Callable[[], LocalLearner],
        images: Tensor,
    ) -> None:
        self._learner = learner
        parallelism = self._processes.parallelism
        if parallelism.num_replicas > 1:
            with self.together("joining the replicas"):
                self._replica = Replica(
                    self._processes, synchronize_batch_norm=self._synchronize_batch_norm
                )
                self._replica.attach(learner)
        if parallelism.num_stages == 1:
            self._stage = whole(learner.build(images))
            return
        with self.together("cutting the network into stages"):
            spread = Spread(learner, images)
            if parallelism.num_stages > len(spread.names):
                raise UserError(
                    f"--parallel {parallelism} has {parallelism.num_stages} stages, and "
                    f"{settings.model} has only {len(spread.names)} blocks. Use fewer stages, or "
                    f"--parallel layers:{len(spread.names)},data."
                )
            if self._balance is not None:
                self._sizes = parse_balance(
                    self._balance, len(spread.names), parallelism.num_stages
                )
        if not self._sizes:
            self._sizes = self.first(
                lambda: self._measured_sizes(spread, settings, twin, images), "measuring the blocks"
            )
        with self.together("cutting the network into stages"):
            self._stage = spread.stage(self._processes.stage, self._sizes)
        place, replica = self._processes.stage, self._processes.replica
        if not self._stage.is_first:
            sender = self._processes.rank_of(place - 1, replica)
            self._inbox = Inbox(self._processes, sender, self._pulse.waiting, images.device)
        if not self._stage.is_last:
            receiver = self._processes.rank_of(place + 1, replica)
            self._outbox = Outbox(self._processes, receiver, self._pulse.waiting)

    def _measured_sizes(
        self,
        spread: Spread,
        settings: TrainConfig,
        twin: Callable[[], LocalLearner],
        images: Tensor,
    ) -> tuple[int, ...]:
        """Balanced by the time that blocks take here, on noise of the batch's size."""
        num_stages = self._processes.parallelism.num_stages
        num = -(-settings.batch_size // self._processes.parallelism.num_replicas)
        batch = torch.randn(num, *images.shape[1:], device=images.device)
        labels = torch.arange(num, device=images.device) % spread.learner.num_classes
        measured = measure_block_costs(twin(), batch, labels)
        costs = {cost.name: cost.step_ms for cost in measured}
        times = [costs[name] for name in spread.names]
        times[-1] += costs.get("", 0.0)  # the output layer goes with the last block
        allowed = [spread.can_begin_at(name) for name in spread.names]
        return balanced(times, num_stages, allowed=allowed)

    # -- training -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def working(self, directory: Path) -> Iterator[None]:
        self._pulse.remedy = self._processes.remedy(directory, self.resume_command(directory))
        with self._stage.alone(self._put):
            yield

    def _put(self, tensor: Tensor) -> None:
        # Without an image of its own a replica runs on something else.
        self._outbox.put(tensor[:0] if self._is_without_images else tensor)

    def training_loader(self, loader: EpochLoader[Any]) -> EpochLoader[Any]:
        if self._replica is not None:
            with self.together("sharing the batches"):
                loader = self._replica.loader(loader)
        self._loader = loader
        if self._replay is None:
            return loader if self._stage.is_first else ReceivingLoader(loader, self._inbox)
        if self._stage.is_first:
            return ReplaySource(loader, self._outbox)
        self._replaying = ReplayLoader(
            loader,
            self._inbox,
            None if self._stage.is_last else self._outbox,
            size=self._replay,
            waiting=self._pulse.waiting,
        )
        return self._replaying

    def tell(self, epoch: int, step: int, sums: EpochSums) -> None:
        self._pulse.note(epoch=epoch, step=step)
        now = time.monotonic()
        # Asking for the figures makes the host wait for the device.
        if self._stage.is_last and now - self._told > _TELL_SECONDS:
            self._told = now
            self._pulse.note(loss=sums.mean_loss()[0], accuracy=sums.accuracy()[0])

    def progress(self, sums: EpochSums) -> tuple[float, float, tuple[float, ...]]:
        beats = self._pulse.beats()
        last = beats[self._processes.rank_of(self._processes.parallelism.num_stages - 1, 0)]
        return last.loss or 0.0, last.accuracy or 0.0, tuple(beat.load for beat in beats)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        with self._pulse.busy("writing files"), self._pulse.writing():
            yield

    def step(self, images: Tensor, labels: Tensor) -> StepResult:
        if not self._stage.is_first:
            self._stop = self._inbox.flag or None
            self._pass_on_request()
        elif self._replica is not None:
            self._stop = self._replica.agree_to_stop(self._request())
        else:
            self._stop = self._request()
        if self._stage.is_last:
            return self._learner.step(images, labels)
        self._outbox.flag = self._stop or 0
        self._is_without_images = len(labels) == 0
        result = self._learner.step_blocks(images, labels)
        self._is_without_images = False
        return result

    def request_stop(self, signal_number: int) -> None:
        self._own_request = signal_number

    def _pass_on_request(self) -> None:
        """To the first stage, which alone can say after which step."""
        if self._own_request is not None and not self._has_passed_on:
            self._has_passed_on = True
            self._processes.store.set(_STOP_KEY, str(self._own_request))

    def _request(self) -> int | None:
        """Whether this process, or, as far as it has been seen, another was asked to stop."""
        now = time.monotonic()
        if self._own_request is None and now - self._looked > _LOOK_SECONDS:
            self._looked = now
            if self._processes.store.check([_STOP_KEY]):
                self._own_request = int(self._processes.store.get(_STOP_KEY))
        return self._own_request

    def stop(self, *, is_last: bool) -> int | None:
        if self._replaying is not None or is_last:
            return None  # of a replaying stage its inputs just end
        if self._stop is not None and self._replay is not None:
            self._outbox.flag = self._stop
            self._outbox.end()
        return self._stop

    def left_early(self) -> int | None:
        return None if self._replaying is None else self._replaying.flag or None

    def stop_at_epoch(self) -> int | None:
        requested = torch.tensor(self._own_request or self._stop or 0)
        with self._pulse.waiting(None):
            dist.all_reduce(requested, dist.ReduceOp.MAX, group=self._processes.control)
        return int(requested) or None

    # -- between epochs -------------------------------------------------------------------------

    def total(self, sums: State) -> State:
        parts = self._gathered(sums, at_all=True)
        num_replicas = self._processes.parallelism.num_replicas
        if self._replay is not None:
            # Stages differ in how many images they have trained on since the run went on.
            before = min(self._num_images_before, parts[0]["num_images"])
            self._num_images_before = before
            num = parts[0]["num_images"] - before
            parts = [parts[0], *(scaled(part, num) for part in parts[1:])]
        return combined(parts, num_images=sum(part["num_images"] for part in parts[:num_replicas]))

    def own_part(self, sums: State) -> State:
        self._num_images_before = sums["num_images"]
        return sums if self._processes.rank == 0 else nothing_of(sums)

    def recalibrate(self, loader: EpochLoader[Any], epoch: int) -> None:
        if self._stage.is_first:
            recalibrate(self._learner, self._loader, epoch)
        else:
            self._learner.recalibrate(self._inbox.sequence())
        if not self._stage.is_last:
            self._outbox.end()
        self._synchronize_buffers()

    def _synchronize_buffers(self) -> None:
        if self._replica is not None:
            self._replica.synchronize_buffers()

    def evaluate(
        self, infer: Callable[[Tensor], Tensor], loader: EpochLoader[Any], num_classes: int
    ) -> Evaluation:
        self._synchronize_buffers()
        if self._replica is not None:
            loader = self._replica.dealt(loader)
        if not self._stage.is_first:
            loader = ReceivingLoader(loader, self._inbox)
        found: list[Any] = [None]
        if self._stage.is_last:
            counted = tally(self._noting(infer), loader.epoch(), num_classes)
            replica = self._replica
            found[0] = replica.evaluation(*counted) if replica else evaluation_of(*counted)
        else:
            for images, _ in loader.epoch():
                self._pulse.note()
                self._learner.run(images)
        last = self._processes.rank_of(self._processes.parallelism.num_stages - 1, 0)
        with self._pulse.waiting(last):
            dist.broadcast_object_list(found, src=last, group=self._processes.control)
        return found[0]  # type: ignore[no-any-return]

    def _noting(self, infer: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """With a sign of life for every batch."""

        def inferring(images: Tensor) -> Tensor:
            self._pulse.note()
            return infer(images)

        return inferring

    def training_state(self) -> State | None:
        owners, num_replicas = self._stage.owners, self._processes.parallelism.num_replicas
        own = _on_host(self._learner.replica_state())
        self._synchronize_buffers()
        state = self._learner.training_state()
        mine: State = {"own": own}
        if self._processes.replica == 0:  # the others' are the same
            mine |= _on_host(owners.part(state, self._stage.number))
        parts = self._gathered(mine)
        if not parts:
            return None
        of_replicas = [
            owners.merged_replica([part.pop("own") for part in parts[replica::num_replicas]])
            for replica in range(num_replicas)
        ]
        stages = parts[::num_replicas]
        whole = self._stage.owners.merged(state, stages)
        begun = self._num_elements_before
        if num_replicas > 1:
            whole["replicas"] = of_replicas
        whole["num_elements"] = begun + sum(part["num_elements"] - begun for part in stages)
        return whole

    def load_training_state(self, state: State) -> None:
        self._stage.hold_all()
        self._learner.load_training_state(state)
        of_replicas = state.get("replicas", [])
        # Of another number of them it is their mean that goes on.
        if len(of_replicas) == self._processes.parallelism.num_replicas:
            self._learner.load_replica_state(of_replicas[self._processes.replica])
        self._stage.let_go()
        self._num_elements_before = state["num_elements"]

    def collect_weights(self) -> None:
        self._synchronize_buffers()
        mine: State = {}
        if self._processes.replica == 0:
            mine = _on_host(self._stage.owners.weights(self._learner, self._stage.number))
        parts = self._gathered(mine)
        if parts:
            self._stage.hold_all()
            modules = {"model": self._learner.model, "heads": self._learner.heads}
            for name, module in modules.items():
                state = module.state_dict()  # which has more to it than entries
                for part in parts:
                    state.update(part.get(name, {}))
                module.load_state_dict(state)

    def _gathered(self, value: State, *, at_all: bool = False) -> list[State]:
        """By rank; at others than the first nothing, unless asked."""
        parts: list[Any] = [None] * self._processes.num
        control = self._processes.control
        with self._pulse.waiting(None):
            if at_all:
                dist.all_gather_object(parts, value, group=control)
                return parts
            dist.gather_object(value, parts if self.is_first else None, dst=0, group=control)
        return parts if self.is_first else []


def _on_host(state: Any) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, lambda t: t.detach().cpu(), state)
