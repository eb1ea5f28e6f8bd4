from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from tests.distributed.processes import _CONTEXT, environment, in_processes

from locallearn.distributed import pulse as of_pulse
from locallearn.distributed.parallelism import Parallelism
from locallearn.distributed.processes import Processes, joined
from locallearn.distributed.pulse import Pulse, _is_lost_connection
from locallearn.distributed.team import ProcessTeam
from locallearn.distributed.watch import Beat, Watch
from locallearn.errors import Silent, UserError

NAMES = ["rank 0", "rank 1", "rank 2"]
ENDS_WITHIN_SECONDS = 60  # no stated time: only that the test does not wait for ever


def beat(rank: int, count: int, doing: str = "computing", **more: Any) -> Beat:
    return replace(Beat(rank, count, f"host{rank}", 100 + rank, 1, doing, epoch=2, step=7), **more)


def beats(count: int, *others: Beat) -> dict[int, Beat]:
    return {rank: beat(rank, count) for rank in range(3)} | {each.rank: each for each in others}


def test_a_rank_without_a_new_beat_is_lost_after_so_long() -> None:
    watch = Watch(0, NAMES, dead_after=2, hang_after=60)
    for count in range(5):
        assert watch.look(beats(count), [], 0.5) is None
    still = beat(1, 4)
    for count in range(5, 8):
        assert watch.look(beats(count, still), [], 0.5) is None
    found = watch.look(beats(8, still), [], 0.5)
    assert found is not None
    assert found.rank == 1
    assert "rank 1 on host1 (pid 101) has given no sign of life for 2 s" in found.text
    assert "It was computing in step 7 of epoch 2" in found.text


def test_a_process_that_is_gone_is_lost_at_once() -> None:
    watch = Watch(0, NAMES, dead_after=10, hang_after=60)
    found = watch.look(beats(1, beat(2, 1, "waiting", waits_for=1)), [2], 0.5)
    assert found is not None
    assert found.rank == 2
    assert "rank 2 on host2 (pid 102) died" in found.text
    assert "waiting for rank 1 in step 7 of epoch 2" in found.text


def test_one_that_was_stopped_itself_accuses_nobody() -> None:
    watch = Watch(0, NAMES, dead_after=10, hang_after=60)
    assert watch.look(beats(1), [], 0.5) is None
    assert watch.look(beats(1), [], 3600.0) is None


def test_one_that_has_ended_is_not_missed() -> None:
    watch = Watch(0, NAMES, dead_after=1, hang_after=60)
    for count in range(20):
        assert watch.look(beats(count, beat(1, 3, "ended")), [], 0.5) is None


def test_one_that_never_came_is_named() -> None:
    watch = Watch(0, NAMES, dead_after=1, hang_after=60)
    known = [{0: beat(0, count), 2: beat(2, count)} for count in range(2)]
    assert watch.look(known[0], [], 0.5) is None
    found = watch.look(known[1], [], 0.5)
    assert found is not None
    assert found.text == "rank 1 did not come to the start in 1 s."


def test_the_first_that_stood_still_hangs() -> None:
    watch = Watch(0, NAMES, dead_after=10, hang_after=60)
    late = beats(1, beat(0, 1, "waiting", still_seconds=59), beat(1, 1, still_seconds=59.9))
    assert watch.look(late, [], 0.5) is None
    found = watch.look(
        beats(2, beat(1, 2, still_seconds=60.4), beat(2, 2, still_seconds=60.0)), [], 0.5
    )
    assert found is not None
    assert found.rank == 1
    assert (
        "rank 1 on host1 (pid 101) hangs: it has been computing in step 7 of epoch 2 for 60 s"
        in found.text
    )


def test_what_may_take_long_hangs_later() -> None:
    watch = Watch(0, NAMES, dead_after=10, hang_after=60)
    for doing in ("starting", "reading the data"):
        others = [beat(0, 1, "waiting", still_seconds=900), beat(2, 1, "ended", still_seconds=900)]
        busy = beat(1, 1, doing, still_seconds=599)
        assert watch.look(beats(1, busy, *others), [], 0.5) is None
        assert watch.look(beats(2, replace(busy, count=2, still_seconds=601)), [], 0.5) is not None


def test_all_that_wait_for_each_other_are_stuck() -> None:
    watch = Watch(0, NAMES, dead_after=10, hang_after=60)
    waiting = [
        beat(rank, 1, "waiting", waits_for=(rank + 1) % 3, still_seconds=61) for rank in range(2)
    ]
    found = watch.look(beats(1, *waiting, beat(2, 1, "ended")), [], 0.5)
    assert found is not None
    assert found.rank is None
    assert (
        "rank 0 is waiting for rank 1 in step 7 of epoch 2, rank 1 is waiting for rank 2"
        in found.text
    )


# -- with processes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (
            RuntimeError("[/x/gloo/transport/tcp/pair.cc:538] Connection closed by peer [::1]:9"),
            True,
        ),
        (RuntimeError("[../gloo/transport/tcp/pair.cc:40] Read error [::1]:9: I/O error"), True),
        (RuntimeError("[x.cc:1] Timed out waiting 30000ms for recv operation to complete"), True),
        (RuntimeError("Application timeout caused pair closure"), True),
        (RuntimeError("Gloo connectFullMesh failed with [x.cc:1] no error"), True),
        (dist.DistBackendError("NCCL communicator was aborted on rank 1."), True),
        (dist.DistNetworkError("failed to recv, got 0 bytes"), True),
        (RuntimeError("[enforce fail at /x/gloo/transport/tcp/pair.cc:9] 8 <= 4. 8 vs 4"), False),
        (RuntimeError("CUDA error: the launch timed out and was terminated"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (1x2 and 3x4)"), False),
        (torch.OutOfMemoryError("CUDA out of memory."), False),
    ],
)
def test_lost_connections_are_told_from_other_errors(error: RuntimeError, is_lost: bool) -> None:
    assert _is_lost_connection(error) is is_lost


def test_an_error_of_another_kind_passes_as_it_is() -> None:
    pulse = Pulse(dist.HashStore(), 0, NAMES)
    with pytest.raises(RuntimeError, match=r"^shapes differ$"), pulse.waiting(1):
        raise RuntimeError("shapes differ")


def test_what_is_traced_is_not_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append(pid))
    monkeypatch.setattr(of_pulse, "_born", lambda pid: 1)
    monkeypatch.setattr(of_pulse, "_state", {10: "T", 11: "t", 12: "S"}.__getitem__)
    pulse = Pulse(dist.HashStore(), 0, NAMES)
    pulse._neighbours = {rank: (10 + rank, 1) for rank in range(3)}
    pulse._kill_stopped()
    assert killed == [10]


def test_a_slow_disk_is_no_hang() -> None:
    pulse = Pulse(dist.HashStore(), 0, NAMES)
    nobody = cast(Any, None)
    cpu = torch.device("cpu")
    team = ProcessTeam(Processes(Parallelism(2, 1), 0, cpu, nobody, nobody, nobody, pulse))
    pulse.note(epoch=1, step=1)
    with team.writing():
        assert pulse.beats()[0].doing == "writing files"
    assert pulse.beats()[0].doing == "computing"


def _beats_of_each() -> list[tuple[int, int | None, float | None, bool]]:
    with joined(Parallelism(2, 1), "cpu", 60) as processes:
        pulse = processes.pulse
        pulse.note(epoch=1, step=3 + processes.rank, loss=0.5)
        while len(pulse.beats()) < 2 or pulse.beats()[1 - processes.rank].step is None:
            time.sleep(0.05)
        with pulse.waiting(None):
            dist.barrier(group=processes.control)
        own = pulse.beats()[processes.rank]
        assert own.waiting_seconds > 0
        assert own.computing_seconds > 0
        assert 0 <= own.load <= 1
        return [(each.rank, each.step, each.loss, each.pid > 0) for each in pulse.beats()]


def test_each_knows_how_the_others_are() -> None:
    expected = [(0, 3, 0.5, True), (1, 4, 0.5, True)]
    assert in_processes(2, _beats_of_each) == [expected, expected]


class Job:
    """Processes as torchrun's agent would start them, whose store is in this process."""

    def __init__(
        self, folder: Path, num: int, body: Callable[[Processes], None], **limits: float
    ) -> None:
        self.store = dist.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
        )
        self.errors = [folder / f"stderr{rank}" for rank in range(num)]
        self.processes = [
            _CONTEXT.Process(
                target=_worker,
                args=(rank, num, self.store.port, str(self.errors[rank]), body, limits),
            )
            for rank in range(num)
        ]
        for process in self.processes:
            process.start()

    def wait_for(self, key: str) -> None:
        self.store.wait([key], timedelta(seconds=60))

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def end(self) -> tuple[list[int | None], list[str]]:
        """Exit codes, and all lines on standard error but torch's own."""
        began = time.monotonic()
        for process in self.processes:
            process.join(max(0.0, ENDS_WITHIN_SECONDS + began - time.monotonic()))
            if process.is_alive():
                process.kill()
                pytest.fail(f"a process did not end: {self.lines()}")
        return [process.exitcode for process in self.processes], self.lines()

    def lines(self) -> list[str]:
        lines = [line for path in self.errors for line in path.read_text().splitlines()]
        return [line for line in lines if re.match(r"(Error|raised)", line)]


def _worker(
    rank: int,
    num: int,
    port: int,
    errors: str,
    body: Callable[[Processes], None],
    limits: dict[str, float],
) -> None:
    descriptor = os.open(errors, os.O_CREAT | os.O_WRONLY)
    os.dup2(descriptor, 2)
    os.environ.update(environment(rank, num, port), TORCHELASTIC_USE_AGENT_STORE="True")
    torch.set_num_threads(1)
    code = 0
    try:
        with joined(Parallelism(num, 1), "cpu", 300, **limits) as processes:
            processes.pulse.remedy = "Go on with X."
            body(processes)
    except Silent as error:
        code = error.exit_code
    except UserError as error:
        os.write(2, f"raised {error}\n".encode())
        code = error.exit_code
        if body is _linger_at_rank_0:
            time.sleep(1000)
    os._exit(code)


def _go_round(processes: Processes, stops: Callable[[int], None] = lambda step: None) -> None:
    """Activations go round, from rank to rank."""
    before, after = (processes.rank - 1) % processes.num, (processes.rank + 1) % processes.num
    pulse, content = processes.pulse, torch.zeros(8)
    for step in range(1_000_000):
        pulse.note(epoch=1, step=step)
        stops(step)
        sending = dist.isend(content, after)
        with pulse.waiting(before):
            dist.recv(torch.empty(8), before)
        with pulse.waiting(after):
            sending.wait()
        if step == 20 and processes.rank == 0:
            processes.store.set("going", "")


def _hang_at_rank_1(processes: Processes) -> None:
    def stops(step: int) -> None:
        if processes.rank == 1 and step == 3:
            time.sleep(1000)

    _go_round(processes, stops)


def _fail_at_rank_2(processes: Processes) -> None:
    def stops(step: int) -> None:
        if processes.rank == 2 and step == 3:
            raise UserError("the loss became NaN.")

    _go_round(processes, stops)


def _linger_at_rank_0(processes: Processes) -> None:
    if processes.rank == 0:
        raise UserError("the loss became NaN.")
    _go_round(processes)


def _fail_at_all(processes: Processes) -> None:
    def stops(step: int) -> None:
        if step == 3:
            raise UserError(f"the loss became NaN at rank {processes.rank}.")

    _go_round(processes, stops)


def _end_early_at_rank_1(processes: Processes) -> None:
    if processes.rank == 0:
        with processes.pulse.waiting(1):
            dist.recv(torch.empty(8), 1)


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_rank_is_named_by_one_of_the_others(tmp_path: Path, victim: int) -> None:
    job = Job(tmp_path, 3, _go_round)
    job.wait_for("attempt/0/run/going")
    job.kill(victim)
    codes, lines = job.end()
    expected = [1, 1, 1]
    expected[victim] = -signal.SIGKILL
    assert codes == expected
    assert len(lines) == 1
    pid = job.processes[victim].pid
    assert f"rank {victim} (stage {victim}) on " in lines[0]
    assert f"(pid {pid}) died: its process is gone" in lines[0]
    assert lines[0].endswith("Go on with X.")


def test_a_stopped_rank_is_named_and_ended(tmp_path: Path) -> None:
    job = Job(tmp_path, 3, _go_round, dead_after=2.0)
    job.wait_for("attempt/0/run/going")
    job.kill(1, signal.SIGSTOP)
    codes, lines = job.end()
    assert codes == [1, -signal.SIGKILL, 1]
    assert len(lines) == 1
    assert "rank 1 (stage 1)" in lines[0]
    assert "has given no sign of life for 2 s" in lines[0]


def test_a_rank_that_hangs_is_named(tmp_path: Path) -> None:
    codes, lines = Job(tmp_path, 3, _hang_at_rank_1, hang_after=2.0).end()
    assert codes == [1, 1, 1]
    assert len(lines) == 1
    assert "rank 1 (stage 1)" in lines[0]
    assert "hangs: it has been computing in step 3 of epoch 1 for 2 s" in lines[0]
    assert "--hang-timeout" in lines[0]


def test_a_rank_that_fails_says_it_itself(tmp_path: Path) -> None:
    codes, lines = Job(tmp_path, 3, _fail_at_rank_2).end()
    assert codes == [1, 1, 2]
    assert lines == ["raised the loss became NaN."]


def test_one_that_is_held_up_on_its_way_out_is_ended(tmp_path: Path) -> None:
    codes, lines = Job(tmp_path, 2, _linger_at_rank_0).end()
    assert codes == [1, 1]
    assert lines == ["raised the loss became NaN."]


def test_of_several_that_fail_at_once_one_says_it(tmp_path: Path) -> None:
    codes, lines = Job(tmp_path, 3, _fail_at_all).end()
    assert 2 in codes
    assert set(codes) <= {1, 2}
    assert len(lines) == 1
    assert "the loss became NaN at rank" in lines[0]


def test_without_the_store_all_end(tmp_path: Path) -> None:
    job = Job(tmp_path, 2, _go_round)
    job.wait_for("attempt/0/run/going")
    del job.store
    codes, lines = job.end()
    assert codes == [1, 1]
    assert len(lines) == 1
    assert "torchrun, which started rank 0 (stage 0)" in lines[0]
    assert "is gone" in lines[0]


def test_one_that_ended_is_not_waited_for(tmp_path: Path) -> None:
    codes, lines = Job(tmp_path, 2, _end_early_at_rank_1, dead_after=1.0, hang_after=1.0).end()
    assert codes == [1, 1]
    assert len(lines) == 1
    assert "rank 0" in lines[0]
