"""What signs of life amount to: who of the processes is dead, hangs, or waits in vain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

INTERVAL_SECONDS = 0.5  # between beats

# What may take long (reading the data) counts as hung only after so many times as long as a step.
_PATIENCE = 10

STARTING, COMPUTING, WAITING, ENDED = "starting", "computing", "waiting", "ended"


@dataclass(frozen=True)
class Beat:
    """How a rank is.

    Arguments:
        rank: which.
        count: of its beats.
        host: it runs on.
        pid: of its process there.
        born: when that process started, ticks since the boot; 0 where the system does not tell.
        doing: computing, waiting, ended, or in words what may take long.
        waits_for: the rank that it waits for, or None for all.
        still_seconds: since its main thread last said anything.
        epoch, step: that it is in, from 1; None before the first.
        loss, accuracy: of the epoch so far, where it knows them.
        computing_seconds, waiting_seconds: so far.
        load: share of the last seconds that its host did not wait for others, in [0, 1].
    """

    rank: int
    count: int
    host: str
    pid: int
    born: int
    doing: str = STARTING
    waits_for: int | None = None
    still_seconds: float = 0.0
    epoch: int | None = None
    step: int | None = None
    loss: float | None = None
    accuracy: float | None = None
    computing_seconds: float = 0.0
    waiting_seconds: float = 0.0
    load: float = 1.0

    @property
    def has_ended(self) -> bool:
        return self.doing == ENDED

    def describe_doing(self) -> str:
        """ "waiting for rank 1 in step 12 of epoch 3"."""
        words = self.doing
        if self.doing == WAITING:
            words += " for the others" if self.waits_for is None else f" for rank {self.waits_for}"
        return words if self.step is None else f"{words} in step {self.step} of epoch {self.epoch}"


@dataclass(frozen=True)
class Finding:
    """Why the training can't go on.

    Arguments:
        text: a sentence or two that name the rank.
        rank: that is lost, or None where it is no single one.
        said_at: the host on which that rank says it itself, in its own way.
    """

    text: str
    rank: int | None = None
    said_at: str | None = None


class Watch:
    """What the others' beats amount to. It counts the seconds that it was awake itself: a process
    that was stopped for an hour, and goes on, accuses nobody.

    Arguments:
        rank: of this process.
        names: of the ranks, for messages.
        dead_after: seconds without a new beat that mean death.
        hang_after: seconds that computing, or everyone's waiting, may last without a word.
    """

    def __init__(
        self, rank: int, names: Sequence[str], dead_after: float, hang_after: float
    ) -> None:
        self._rank = rank
        self._names = names
        self._dead_after = dead_after
        self._hang_after = hang_after
        self._counts = [-1] * len(names)
        self._silent_seconds = [0.0] * len(names)

    def look(
        self, beats: Mapping[int, Beat], gone: Sequence[int], elapsed_seconds: float
    ) -> Finding | None:
        """The first reason to end, if there is one.

        Arguments:
            beats: the latest of each rank that has given one.
            gone: ranks whose process is known not to exist any more.
            elapsed_seconds: since the last look.
        """
        for rank in range(len(self._names)):
            beat = beats.get(rank)
            if beat is not None and beat.count != self._counts[rank]:
                self._counts[rank], self._silent_seconds[rank] = beat.count, 0.0
            else:
                self._silent_seconds[rank] += min(elapsed_seconds, 2 * INTERVAL_SECONDS)
        running = {rank: beat for rank, beat in beats.items() if not beat.has_ended}
        return self._dead(beats, gone) or self._hung(running) or self._stuck(running)

    def _dead(self, beats: Mapping[int, Beat], gone: Sequence[int]) -> Finding | None:
        words, first = [], None
        for rank, silent in enumerate(self._silent_seconds):
            beat = beats.get(rank)
            if rank == self._rank or (beat is not None and beat.has_ended):
                continue
            if beat is None:
                if silent < self._dead_after:
                    continue
                words.append(f"{self._names[rank]} did not come to the start in {silent:.0f} s")
            elif rank in gone:
                words.append(
                    f"{whole_name(self._names[rank], beat)} died: its process is gone. It was "
                    f"{beat.describe_doing()}"
                )
            elif silent >= self._dead_after:
                words.append(
                    f"{whole_name(self._names[rank], beat)} has given no sign of life for "
                    f"{silent:.0f} s: it was killed or stopped, or its machine is gone. It was "
                    f"{beat.describe_doing()}"
                )
            else:
                continue
            first = rank if first is None else first
        return Finding("; ".join(words) + ".", first) if words else None

    def _hung(self, running: Mapping[int, Beat]) -> Finding | None:
        hung = [
            beat
            for beat in running.values()
            if beat.doing != WAITING
            and beat.still_seconds
            >= self._hang_after * (1 if beat.doing == COMPUTING else _PATIENCE)
        ]
        if not hung:
            return None
        # The others wait for it, and so came to a standstill later.
        beat = max(hung, key=lambda each: each.still_seconds)
        return Finding(
            f"{whole_name(self._names[beat.rank], beat)} hangs: it has been "
            f"{beat.describe_doing()} for {beat.still_seconds:.0f} s. If it needs so long, give a "
            f"longer --hang-timeout.",
            beat.rank,
        )

    def _stuck(self, running: Mapping[int, Beat]) -> Finding | None:
        still = min((beat.still_seconds for beat in running.values()), default=0.0)
        all_wait = all(beat.doing == WAITING for beat in running.values())
        if not (all_wait and still >= self._hang_after):
            return None
        doing = ", ".join(
            f"rank {rank} is {beat.describe_doing()}" for rank, beat in sorted(running.items())
        )
        return Finding(f"all wait for each other since {still:.0f} s: {doing}.")


def whole_name(name: str, beat: Beat) -> str:
    """A rank's name, and where its process is."""
    return f"{name} on {beat.host} (pid {beat.pid})"
