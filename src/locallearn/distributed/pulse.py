"""Signs of life: who of the processes lives, and what happens when one no longer does.

Every process tells the others twice a second how it is, over the store that torchrun keeps, and
looks at what they tell. A blocked exchange can't be interrupted, so it is a thread that finds a
lost rank, says so in one line, and ends the process. What is found first is found for all: it goes
into the store as the verdict, so that all end for the same reason and one of a host says it.

    beat/RANK     how that rank is, see Beat
    verdict       the first that any rank found
    said/HOST     counts those who would say it: the first does
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from locallearn.distributed.watch import (
    COMPUTING,
    ENDED,
    INTERVAL_SECONDS,
    STARTING,
    WAITING,
    Beat,
    Finding,
    Watch,
    whole_name,
)
from locallearn.engine.trainer import Interrupted
from locallearn.errors import Silent, UserError

DEAD_AFTER_SECONDS = 10.0
HANG_AFTER_SECONDS = 600.0

_MEETING_SECONDS = 0.05  # between looks, until all are there
_WRITING_SECONDS = 5.0  # that a file which is being written may still take
_ENDING_SECONDS = 1.0  # that the main thread has to begin to end by itself
_LEAVING_SECONDS = 5.0  # and to end
_LOAD_BEATS = 10  # that a load is the mean of
_EXIT_CODE = 1

# What gloo says of a connection that is lost; the first of it, where it fails to read or write. Its
# "[enforce fail at ...]" is of wrong use, as of a tensor of another size than was sent.
_GLOO_LOST = re.compile(
    r"^\[(?!enforce fail)[^\]]*gloo/transport/[^\]]*:\d+\]"
    r"|closed by peer|caused pair closure|connectFullMesh|Socket (closed|timeout)|Broken pipe"
    r"|Connection (reset|refused|aborted|timed out)|No route to host|Network is unreachable"
    r"|Timed out waiting|Operation timed out|Connect timeout",
    re.IGNORECASE,
)


class LostRank(UserError):  # noqa: N818 - says what it is
    """Another process of the training died, hangs, or failed; the training can't go on.

    Once it has left :func:`processes.joined`, this process too is ended, in some seconds.

    Arguments:
        message: which, what it did, and how to go on.
        rank: that was lost, or None where it is no single one.
    """

    exit_code = _EXIT_CODE

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


@dataclass
class _Main:
    """What the main thread is at; guarded by Pulse's lock."""

    doing: str = STARTING
    waits_for: int | None = None
    since: float = field(default_factory=time.monotonic)  # of what it does
    spoke: float = field(default_factory=time.monotonic)
    computing_seconds: float = 0.0
    waiting_seconds: float = 0.0
    epoch: int | None = None
    step: int | None = None
    loss: float | None = None
    accuracy: float | None = None

    def turn_to(self, doing: str, waits_for: int | None = None) -> None:
        self.computing_seconds, self.waiting_seconds = self.seconds()
        self.since = self.spoke = time.monotonic()
        self.doing, self.waits_for = doing, waits_for

    def seconds(self) -> tuple[float, float]:
        """Computing and waiting so far."""
        now = time.monotonic() - self.since
        waiting = self.doing == WAITING
        return (
            self.computing_seconds + (0 if waiting else now),
            self.waiting_seconds + (now if waiting else 0),
        )


class Pulse:
    """This process's signs of life, and its look at the others'.

    Within ``with``, which begins once all have given a sign, it beats. Where the ``with`` is left
    without an error, it first waits for the others to come so far.

    Arguments:
        store: that all reach.
        rank: of this process.
        names: of all ranks, for messages.
        dead_after: seconds without a sign of life after which a rank is taken for dead.
        hang_after: seconds that a rank may compute without a word.

    Attributes:
        remedy: how to go on after a loss; said at the end of the message.

    Raises:
        LostRank: at the start, one that does not come.
        Silent: likewise, and another process says it.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        names: Sequence[str],
        *,
        dead_after: float = DEAD_AFTER_SECONDS,
        hang_after: float = HANG_AFTER_SECONDS,
    ) -> None:
        self.remedy = ""
        self._rank = rank
        self._dead_after = dead_after
        self._names = names
        self._watch = Watch(rank, names, dead_after, hang_after)
        # A connection of its own: an exchange that waits on the other one holds its lock.
        self._store = PrefixStore("pulse", store.clone())
        self._store.set_timeout(timedelta(seconds=dead_after))
        self._keys = [f"beat/{rank}" for rank in range(len(names))]
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._main = _Main()
        self._host = socket.gethostname()
        self._parent = os.getppid()
        self._own = Beat(rank, 0, self._host, os.getpid(), _born(os.getpid()) or 0)
        self._beats: dict[int, Beat] = {}
        self._loads: deque[tuple[float, float]] = deque(maxlen=_LOAD_BEATS + 1)
        self._neighbours: dict[int, tuple[int, int]] = {}  # ranks on this machine: pid, born

        self._proposal: Finding | None = None  # what the main thread found
        self._verdict: Finding | None = None
        self._is_said = True  # by another than this process
        self._wake = threading.Event()
        self._met = threading.Event()  # all have given a sign
        self._judged = threading.Event()
        self._parted = threading.Event()  # all have ended
        self._closed = threading.Event()
        self._main_ends = False  # the main thread is on its way out by itself
        self._num_ticks_done = 0
        self._threads = [
            threading.Thread(target=self._beat_on, name="pulse", daemon=True),
            threading.Thread(target=self._guard, name="pulse-guard", daemon=True),
        ]

    def __enter__(self) -> Self:
        self._main_ends = True  # if one does not come
        for thread in self._threads:
            thread.start()
        self._met.wait()
        if self._judged.is_set():
            error = self._error()
            self.close()
            raise error
        self._main_ends = False
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None or isinstance(error, Interrupted):  # on request, and so do the others
            self._turn_to(ENDED)
            self._wake.set()
            self._parted.wait()
        else:
            # An interpreter's end may wait for a lost rank, in threads of the groups; by then no
            # thread of Python runs any more.
            nowhere = open(os.devnull, "w")  # noqa: SIM115 - to the process' end
            faulthandler.dump_traceback_later(_LEAVING_SECONDS, exit=True, file=nowhere)
        self.close()

    # -- the main thread's -----------------------------------------------------------------------

    def note(
        self,
        *,
        epoch: int | None = None,
        step: int | None = None,
        loss: float | None = None,
        accuracy: float | None = None,
    ) -> None:
        """Say that this rank goes on: with the step that it begins, and what it knows of the
        epoch's loss and accuracy; what is left out stays as it was."""
        with self._lock:
            main = self._main
            main.spoke = time.monotonic()
            main.epoch = main.epoch if epoch is None else epoch
            main.step = main.step if step is None else step
            main.loss = main.loss if loss is None else loss
            main.accuracy = main.accuracy if accuracy is None else accuracy
            if step is not None and main.doing == STARTING:
                main.turn_to(COMPUTING)

    @contextlib.contextmanager
    def waiting(self, for_rank: int | None) -> Iterator[None]:
        """Within: the main thread waits for that rank, or for all (None), in an exchange.

        Raises:
            LostRank: the connection was lost; names who is to blame.
            Silent: likewise, and another process says it.
        """
        with self._doing(WAITING, for_rank):
            try:
                yield
            except RuntimeError as error:
                if not _is_lost_connection(error):
                    raise
                raise self.blame(error) from error

    def busy(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Within: the main thread is at something that may take long ("reading the data")."""
        return self._doing(what)

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """Within: an error is this rank's last word. The others end, and say that it failed.

        Raises:
            LostRank: in place of what an exchange raised where the device waited for it.
            Silent: likewise; and where another process has failed before.
        """
        try:
            yield
        except dist.DistError as error:
            raise self.blame(error) from error
        except BaseException as error:
            if not isinstance(error, Interrupted):
                self._main_ends = True
                if not isinstance(error, LostRank | Silent):
                    name = whole_name(self._names[self._rank], self._own)
                    text = f"{name} failed: {_first_line(error)}"
                    self._propose(Finding(text, self._rank, said_at=self._host))
                    verdict = self._verdict
                    # Several fail at once, where a loss becomes NaN: the first says it.
                    is_late = verdict is not None and verdict.rank != self._rank
                    if is_late and isinstance(error, UserError | OSError):
                        raise self._error() from error
            raise

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Within: files are written; the process is not ended then, for some seconds."""
        with self._writing:
            yield

    def beats(self) -> list[Beat]:
        """The latest beat of every rank that has given one, by rank."""
        beats = {**self._beats, self._rank: self._describe()}
        return [beats[rank] for rank in sorted(beats)]

    def blame(self, error: BaseException) -> LostRank | Silent:
        """To be raised where an exchange failed: names who is lost. It takes some seconds.

        Arguments:
            error: the exchange's.
        """
        self._main_ends = True
        self._wake.set()
        if not self._judged.wait(self._dead_after + 2 * INTERVAL_SECONDS):
            waits_for = self._main.waits_for
            whom = "the others" if waits_for is None else f"rank {waits_for}"
            ended = [str(beat.rank) for beat in self.beats() if beat.has_ended]
            others = f"; rank {', '.join(ended)} had ended" if ended else "; all of them answer"
            self._propose(
                Finding(
                    f"{self._names[self._rank]} lost its connection to {whom} "
                    f"({_first_line(error)}){others}."
                )
            )
        return self._error()

    def close(self) -> None:
        """Beat no more."""
        self._turn_to(ENDED)
        self._closed.set()
        self._wake.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(2 * INTERVAL_SECONDS)

    def _turn_to(self, doing: str) -> None:
        with self._lock:
            self._main.turn_to(doing)

    @contextlib.contextmanager
    def _doing(self, what: str, for_rank: int | None = None) -> Iterator[None]:
        with self._lock:
            before = self._main.doing, self._main.waits_for
            self._main.turn_to(what, for_rank)
        try:
            yield
        finally:
            with self._lock:
                self._main.turn_to(*before)

    def _error(self) -> LostRank | Silent:
        verdict = self._verdict or self._proposal
        assert verdict is not None
        if self._is_said and self._judged.is_set():
            return Silent(verdict.text, _EXIT_CODE)
        return LostRank(self._whole(verdict), verdict.rank)

    def _propose(self, finding: Finding) -> None:
        """Have the thread make it the verdict, unless there is one."""
        self._proposal = finding
        self._wake.set()
        self._judged.wait(4 * INTERVAL_SECONDS)

    # -- the threads' ----------------------------------------------------------------------------

    def _beat_on(self) -> None:
        began = time.monotonic()
        try:
            while True:
                self._wake.wait(INTERVAL_SECONDS if self._met.is_set() else _MEETING_SECONDS)
                self._wake.clear()
                closed = self._closed.is_set()
                now = time.monotonic()
                finding = self._exchange_beats(now - began)
                began = now
                self._num_ticks_done += 1
                if finding is not None:
                    self._judge(finding)
                if closed or finding is not None:
                    return
        except RuntimeError:  # of the store: it is gone, and with it torchrun, which keeps it
            self._end_without_torchrun("is gone")

    def _exchange_beats(self, elapsed_seconds: float) -> Finding | None:
        """Write the own beat, read the others', and judge."""
        self._own = self._describe(self._own.count + 1)
        self._loads.append((self._own.computing_seconds, self._own.waiting_seconds))
        self._store.set(self._keys[self._rank], json.dumps(asdict(self._own)))
        known = [
            rank
            for rank, key in enumerate(self._keys)
            if rank in self._beats or self._store.check([key])
        ]
        contents = self._store.multi_get([self._keys[rank] for rank in known])
        for rank, content in zip(known, contents, strict=True):
            self._beats[rank] = Beat(**json.loads(content))
        if self._store.check(["verdict"]):
            return Finding(**json.loads(self._store.get("verdict")))
        # The beats that were read are from before the look at the processes, so that one that
        # ended well in between is not taken for dead: its last beat is read again.
        finding = self._watch.look(self._beats, self._gone(), elapsed_seconds)
        if len(self._beats) == len(self._keys):
            self._met.set()
            if all(beat.has_ended for beat in self._beats.values()):
                self._parted.set()
        return self._proposal or finding

    def _gone(self) -> list[int]:
        """Ranks on this machine whose process is no more, and that had not ended before."""
        gone = []
        for rank, beat in self._beats.items():
            if beat.has_ended or rank == self._rank or beat.host != self._host or not beat.born:
                continue
            # One host name may be that of several containers with their own process ids: a rank
            # is watched by its process only once that was seen.
            alive = _born(beat.pid) == beat.born
            if alive:
                self._neighbours[rank] = beat.pid, beat.born
            elif rank in self._neighbours:
                last = Beat(**json.loads(self._store.get(self._keys[rank])))
                self._beats[rank] = last
                if not last.has_ended:
                    gone.append(rank)
        return gone

    def _judge(self, finding: Finding) -> None:
        """Make it everyone's verdict, or take the one that was there first, and end."""
        text = self._store.compare_set("verdict", "", json.dumps(asdict(finding)))
        verdict = Finding(**json.loads(text))
        is_said = verdict.said_at == self._host
        says_it = not is_said and self._store.add(f"said/{self._host}", 1) == 1
        self._is_said = not says_it
        self._verdict = verdict
        self._kill_stopped()
        self._judged.set()
        self._met.set()
        # The one that says it, in its own way, may not come to that.
        self._leave(verdict, says_it=says_it or (is_said and verdict.rank == self._rank))

    def _leave(self, verdict: Finding, *, says_it: bool) -> None:
        """End the process, once the main thread had its time to end by itself."""
        if self._closed.wait(_ENDING_SECONDS):
            return
        if self._main_ends and self._closed.wait(_LEAVING_SECONDS):
            return
        self._end(verdict, says_it=says_it)

    def _kill_stopped(self) -> None:
        """End the ranks of this machine that are stopped. They hear no SIGTERM, and torchrun gives
        them half a minute. One that a debugger holds ("t") is left to it."""
        for pid, born in self._neighbours.values():
            if _born(pid) == born and _state(pid) == "T":
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)

    def _guard(self) -> None:
        """End the process where torchrun is gone, or its store no longer answers."""
        silent_seconds, num_ticks = 0.0, -1
        while not (self._closed.wait(INTERVAL_SECONDS) or self._parted.is_set()):
            if os.getppid() != self._parent:
                self._end_without_torchrun("is gone")
            if self._judged.is_set() or num_ticks != self._num_ticks_done:
                silent_seconds, num_ticks = 0.0, self._num_ticks_done
            else:
                silent_seconds += INTERVAL_SECONDS
            if silent_seconds >= self._dead_after:
                self._end_without_torchrun(f"has not answered for {silent_seconds:.0f} s")

    def _describe(self, count: int | None = None) -> Beat:
        with self._lock:
            main = replace(self._main)
        computing, waiting = main.seconds()
        then = self._loads[0] if self._loads else (0.0, 0.0)
        spent = computing - then[0], waiting - then[1]
        return replace(
            self._own,
            count=self._own.count if count is None else count,
            doing=main.doing,
            waits_for=main.waits_for,
            still_seconds=time.monotonic() - main.spoke,
            epoch=main.epoch,
            step=main.step,
            loss=main.loss,
            accuracy=main.accuracy,
            computing_seconds=computing,
            waiting_seconds=waiting,
            load=spent[0] / sum(spent) if sum(spent) > 0 else 1.0,
        )

    def _end_without_torchrun(self, what: str) -> None:
        """torchrun on this host, or the one that keeps the store, is gone: each finds it alone."""
        if self._main.doing == ENDED:  # no more is to be asked of it
            self._parted.set()
            return
        says_it = os.environ.get("LOCAL_RANK", "0") == "0"
        self._is_said = not says_it
        self._verdict = Finding(
            f"torchrun, which started {whole_name(self._names[self._rank], self._own)}, {what}."
        )
        self._judged.set()
        self._met.set()
        self._leave(self._verdict, says_it=says_it)

    def _whole(self, verdict: Finding) -> str:
        return f"{verdict.text} {self.remedy}".strip()

    def _end(self, verdict: Finding, *, says_it: bool) -> None:
        """End this process, with a line where nobody else of this host says it."""
        self._writing.acquire(timeout=_WRITING_SECONDS)
        if says_it:
            _say(f"Error: {self._whole(verdict)}")
        os._exit(_EXIT_CODE)


def _is_lost_connection(error: RuntimeError) -> bool:
    """Whether it is the network's word, or a limit of time's: NCCL's and the store's have a class
    of their own, gloo's are known by their text."""
    return isinstance(error, dist.DistError) or _GLOO_LOST.search(str(error)) is not None


def _first_line(error: BaseException) -> str:
    """What an error says, without the trace that torch appends."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; none where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _state(pid: int) -> str:
    return (_stat(pid) or [""])[0]


def _born(pid: int) -> int | None:
    """When a living process started, ticks since the boot; None without one, or without /proc."""
    fields = _stat(pid)
    return int(fields[19]) if fields and fields[0] not in ("Z", "X") else None


def _say(line: str) -> None:
    """A line on standard error, past Python's buffers: the main thread may hold their locks."""
    text = " ".join(line.split()) + "\n"
    if sys.stdout is not None and os.isatty(1):
        text = "\r\x1b[?25h\x1b[K" + text  # the progress bar hides the cursor
    with contextlib.suppress(OSError):
        os.write(2, text.encode(errors="backslashreplace"))
