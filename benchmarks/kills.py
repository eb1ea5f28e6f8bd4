"""Runs of several processes that are killed at random moments: how soon does a job end, does it say
who was lost, and does the run that goes on come to the same?

    python benchmarks/kills.py [--kills N] [--seed S] [--layouts A,B] [--work DIR] [--out FILE.json]
    python benchmarks/kills.py --only NUMBER [--seed S]

Each kill trains on scikit-learn's digits by torchrun, with dropout and augmentation, and at a
random moment (in the start, or so many seconds after an epoch) sends SIGKILL or SIGSTOP to a
random rank, or SIGKILL to torchrun itself. Counted are the seconds until all its processes are
gone. Then torchrun starts them again by itself (--max-restarts), or the run is resumed by hand, by
as many processes or, of layers, by another number. Its checkpoint, weights and metrics.csv are
compared, bit for bit and without the columns of times, with a run that nobody disturbed: of layers
by one process, of replicas by as many replicas. Kill number I with seed S is always the same, as
far as the machine's load allows.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from same_run import differences

from locallearn.distributed.parallelism import Parallelism
from locallearn.engine.environment import describe_environment
from locallearn.engine.files import write_json
from locallearn.engine.run import RunDirectory

NUM_EPOCHS = 6
# As the documentation states them, from the kill to the last process' end.
STATED_SECONDS = {"killed": 30.0, "stopped": 40.0, "torchrun killed": 30.0, "at the start": 150.0}
GIVE_UP_SECONDS = 300.0
_LOOK_SECONDS = 0.02
_TIME_COLUMNS = ("images_per_second", "step_time_ms")

SETTINGS = (
    f"--dataset digits --epochs {NUM_EPOCHS} --batch-size 64 --width 0.25 --dropout 0.2 "
    f"--augment standard --rule lls-mxm --num-threads 1"
).split()


@dataclass
class Kill:
    """What is done to a run, and what came of it.

    Arguments:
        number: of the kill.
        layout: as --parallel says.
        victim: a rank; None for torchrun.
        how: "killed" (SIGKILL) or "stopped" (SIGSTOP).
        after_epoch: the kill comes so many seconds after this epoch's line; 0: after the start.
        delay_seconds: see there.
        go_on: "restart" by torchrun, "resume", or "resume with N" processes.

    Attributes:
        seconds: until the last process was gone.
        line_seconds: until the line was there that says who was lost.
        ranks_seconds: until the last rank was gone; torchrun takes some time after them.
        lines: that the run's processes said of it.
        in_start: it came before the first step.
        missed: the run had ended before.
        differing: from the run that nobody disturbed.
        wrong: what was not as it should be.
    """

    number: int
    layout: str
    victim: int | None
    how: str
    after_epoch: int
    delay_seconds: float
    go_on: str
    seconds: float = 0.0
    line_seconds: float = 0.0
    ranks_seconds: float = 0.0
    lines: list[str] = field(default_factory=list)
    in_start: bool = False
    missed: bool = False
    differing: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        if self.in_start:
            return "at the start"
        return "torchrun killed" if self.victim is None else self.how


def draw(number: int, seed: int, layouts: Sequence[str]) -> Kill:
    """The kill of that number."""
    chance = random.Random(f"{seed}/{number}")
    layout = layouts[number % len(layouts)]
    num, parallelism = _num_processes(layout), _parallelism(layout)
    kind = chance.choices(["killed", "stopped", "torchrun killed"], [6, 3, 1])[0]
    victim = None if kind == "torchrun killed" else chance.randrange(num)
    ways = ["resume"]
    if victim is not None:
        ways += ["restart", "restart"]
    if parallelism.num_replicas == 1:
        ways += [f"resume with {other}" for other in (1, 2, 3, 4) if other != num]
    after_epoch = chance.randrange(NUM_EPOCHS)
    return Kill(
        number,
        layout,
        victim,
        "stopped" if kind == "stopped" else "killed",
        after_epoch,
        chance.uniform(0, 8 if after_epoch == 0 else 1.5),
        chance.choice(ways),
    )


def _parallelism(layout: str) -> Parallelism:
    return Parallelism.parse(layout, _num_processes(layout))


def _num_processes(layout: str) -> int:
    num = 1
    for number in re.findall(r":(\d+)", layout):
        num *= int(number)
    return num


# -- a job ---------------------------------------------------------------------------------------


class Job:
    """torchrun and the processes that it has started."""

    def __init__(
        self, work: Path, name: str, num: int, arguments: Sequence[str], restarts: int = 0
    ) -> None:
        self.num = num
        self.out, self.err = work / f"{name}.out.txt", work / f"{name}.err.txt"
        command = [sys.executable, "-m", "locallearn", "train", *arguments]
        if num > 1:
            start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num)]
            start += ["--max-restarts", str(restarts)]
            command = [sys.executable, *start, *command[1:]]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with open(self.out, "wb") as out, open(self.err, "wb") as err:
            self.agent = subprocess.Popen(command, stdout=out, stderr=err, env=environment)

    def ranks(self) -> dict[int, int]:
        """Rank -> process id, of those that run now."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            fields = _stat(int(path.name))
            if fields and int(fields[1]) == self.agent.pid:
                try:
                    words = (path / "environ").read_bytes().split(b"\0")
                except OSError:
                    continue
                rank = next((w for w in words if w.startswith(b"RANK=")), None)
                if rank is not None:
                    found[int(rank.removeprefix(b"RANK="))] = int(path.name)
        return found

    def wait_for_epoch(self, epoch: int) -> bool:
        """Until the line of that epoch is there, or, of epoch 0, all ranks are. False where the job
        has ended before."""
        while self.agent.poll() is None:
            if epoch == 0 and len(self.ranks()) == self.num:
                return True
            if epoch and f"epoch {epoch}/{NUM_EPOCHS}" in self.out.read_text():
                return True
            time.sleep(_LOOK_SECONDS)
        return False

    def wait(self) -> int:
        try:
            return self.agent.wait(GIVE_UP_SECONDS)
        except subprocess.TimeoutExpired:
            for pid in (*self.ranks().values(), self.agent.pid):
                os.kill(pid, signal.SIGKILL)
            raise SystemExit(f"a job did not end: {self.err.read_text()[-2000:]}") from None

    def lines(self) -> list[str]:
        """What the ranks said on standard error."""
        text = self.err.read_text(errors="replace")
        return [line for line in text.splitlines() if line.startswith("Error: ")]


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; none of a process that is no more."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
    return [] if fields[0] in ("Z", "X") else fields


def do(kill: Kill, work: Path) -> Path:
    """Train, kill, and go on; what came of it is noted in the kill. The run's directory."""
    run = work / "run"
    num = _num_processes(kill.layout)
    train = [*SETTINGS, "--parallel", kill.layout, "--out", str(run)]
    restarts = int(kill.go_on == "restart")
    job = Job(work, "killed", num, train, restarts)
    kill.missed = not job.wait_for_epoch(kill.after_epoch)
    time.sleep(kill.delay_seconds)
    pids = job.ranks()
    kill.missed |= job.agent.poll() is not None or len(pids) < num
    if kill.missed:
        job.wait()
        return run
    kill.in_start = not job.out.read_text().count("run      ")
    began = time.monotonic()
    target = job.agent.pid if kill.victim is None else pids[kill.victim]
    os.kill(target, signal.SIGSTOP if kill.how == "stopped" else signal.SIGKILL)
    watched = list(pids.values()) if restarts else [*pids.values(), job.agent.pid]
    while any(_stat(pid) for pid in watched):
        job.agent.poll()
        if not kill.line_seconds and job.lines():
            kill.line_seconds = time.monotonic() - began
        if not kill.ranks_seconds and not any(_stat(pid) for pid in pids.values()):
            kill.ranks_seconds = time.monotonic() - began
        if time.monotonic() - began > GIVE_UP_SECONDS:
            kill.wrong.append("did not end")
            for pid in watched:
                if _stat(pid):
                    os.kill(pid, signal.SIGKILL)
            return run
        time.sleep(_LOOK_SECONDS)
    kill.seconds = time.monotonic() - began
    kill.ranks_seconds = kill.ranks_seconds or kill.seconds
    code = job.wait()
    kill.lines = job.lines()
    _check_message(kill, job)
    if kill.seconds > STATED_SECONDS[kill.kind]:
        kill.wrong.append(f"took {kill.seconds:.1f} s, stated are {STATED_SECONDS[kill.kind]:.0f}")
    if restarts:
        if code != 0:
            kill.wrong.append(f"ended with code {code} after the restart: {job.lines()}")
        return run
    if code == 0:
        kill.wrong.append("ended with code 0")
    _go_on(kill, work, run, train)
    return run


def _check_message(kill: Kill, job: Job) -> None:
    """One line that names the rank. Before the ranks know each other it is torchrun's."""
    if kill.in_start and not kill.lines:
        report = rf"local_rank: {kill.victim} "
        if kill.victim is None or re.search(report, job.err.read_text(errors="replace")):
            return
    if len(kill.lines) != 1:
        kill.wrong.append(f"{len(kill.lines)} lines: {kill.lines}")
        return
    expected = "torchrun" if kill.victim is None else rf"rank {kill.victim}\b"
    if not re.search(expected, kill.lines[0]):
        kill.wrong.append(f"another is named: {kill.lines[0]}")


def _go_on(kill: Kill, work: Path, run: Path, train: Sequence[str]) -> None:
    num = _num_processes(kill.layout)
    arguments = ["--resume", str(run), "--parallel", kill.layout]
    if kill.go_on.startswith("resume with"):
        num = int(kill.go_on.split()[-1])
        arguments = ["--resume", str(run), *(["--parallel", f"layers:{num}"] if num > 1 else [])]
    if not RunDirectory(run).config_path.exists():
        num, arguments = _num_processes(kill.layout), list(train)  # there is no run yet
    job = Job(work, "resumed", num, arguments)
    if job.wait() != 0:
        kill.wrong.append(f"could not go on: {job.err.read_text()[-1000:]}")


# -- what came of it -----------------------------------------------------------------------------


def metrics(run: Path) -> dict[str, Any]:
    columns = RunDirectory(run).read_metrics().columns
    return {name: column for name, column in columns.items() if name not in _TIME_COLUMNS}


def reference(layout: str, work: Path) -> Path:
    """The run that nobody disturbs: of layers by one process."""
    parallelism = _parallelism(layout)
    path = work / f"undisturbed-{parallelism.num_replicas}"
    if not path.exists():
        one = Parallelism(1, parallelism.num_replicas)
        arguments = [*SETTINGS, "--out", str(path)]
        if one.num_processes > 1:
            arguments += ["--parallel", str(one)]
        work.mkdir(parents=True, exist_ok=True)
        job = Job(work, "undisturbed", one.num_processes, arguments)
        if job.wait() != 0:
            raise SystemExit(f"the undisturbed run failed: {job.err.read_text()[-2000:]}")
    return path


def compare(kill: Kill, run: Path, undisturbed: Path) -> None:
    if kill.wrong and not RunDirectory(run).is_finished:
        return
    kill.differing = differences(undisturbed, run)
    if metrics(undisturbed) != metrics(run):
        kill.differing.append("metrics.csv")
    left = [str(path.relative_to(run)) for path in run.rglob("*.tmp")]
    if left:
        kill.wrong.append(f"left behind: {', '.join(left)}")
    if kill.differing:
        kill.wrong.append(f"{len(kill.differing)} differences")


def describe(kill: Kill) -> str:
    whom = "torchrun" if kill.victim is None else f"rank {kill.victim}"
    when = f"{kill.delay_seconds:.1f} s after epoch {kill.after_epoch}"
    what = f"{kill.number:3}  {kill.layout:16} {whom:8} {kill.how:7} {when:22} {kill.go_on:14}"
    if kill.missed:
        return f"{what} had ended before"
    start = " (start)" if kill.in_start else ""
    same = "the same" if not kill.wrong else "WRONG: " + "; ".join(kill.wrong)
    seconds = f"{kill.line_seconds:5.1f} s {kill.ranks_seconds:5.1f} s {kill.seconds:5.1f} s"
    return f"{what} {seconds}{start}  {same}"


def summarise(kills: Sequence[Kill]) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {}
    for kill in kills:
        seconds.setdefault(kill.kind, []).append(kill.seconds)
    return {
        "kills": len(kills),
        "right": sum(not kill.wrong for kill in kills),
        "seconds": {
            kind: {
                "kills": len(values),
                "median": statistics.median(values),
                "max": max(values),
                "stated": STATED_SECONDS[kind],
            }
            for kind, values in sorted(seconds.items())
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layouts", default="layers:2;layers:4;data:2;layers:2,data:2")
    parser.add_argument("--only", type=int, help="this kill alone")
    parser.add_argument("--work", type=Path, help="a directory; a temporary one by default")
    parser.add_argument("--out", type=Path, help="JSON to write")
    given = parser.parse_args()
    layouts = given.layouts.split(";")
    kills: list[Kill] = []
    print(f"seed {given.seed}, layouts {given.layouts}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        work = given.work or Path(temporary)
        number = -1
        while len(kills) < (1 if given.only is not None else given.kills):
            number = number + 1 if given.only is None else given.only
            kill = draw(number, given.seed, layouts)
            undisturbed = reference(kill.layout, work)
            place = work / f"kill-{number}-{time.time_ns()}"
            place.mkdir(parents=True)
            run = do(kill, place)
            if not kill.missed:
                compare(kill, run, undisturbed)
                kills.append(kill)
            print(describe(kill), flush=True)
            if given.out:
                record = {
                    "benchmark": "kills",
                    "command": f"python benchmarks/kills.py --kills {given.kills} "
                    f"--seed {given.seed} --layouts '{given.layouts}'",
                    "environment": describe_environment("cpu"),
                    "summary": summarise(kills),
                    "kills": [asdict(kill) for kill in kills],
                }
                write_json(given.out, record)
    print(json.dumps(summarise(kills), indent=1))
    return int(any(kill.wrong for kill in kills))


if __name__ == "__main__":
    sys.exit(main())
