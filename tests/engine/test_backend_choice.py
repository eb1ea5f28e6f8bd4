"""How a run comes to its backend where several kernels for the device are there."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from locallearn import UserError
from locallearn.cli.console import QuietObserver
from locallearn.data import Dataset, load_dataset
from locallearn.engine import TrainConfig, Trainer, backend_choice, timing
from locallearn.engine.backend_choice import choose_measured, choose_run_backend, medians_in_turn
from locallearn.engine.team import Team
from locallearn.kernels import BACKENDS, backends

CPU = torch.device("cpu")
RIVALS = ("triton", "cuda")


class Clock:
    """Stands still, but for what is said to take time."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def perf_counter(self) -> float:
        return self.seconds

    def taking(self, *milliseconds: float, log: list[str] | None = None, name: str = "") -> Any:
        """A step that takes these times, one after the other and again."""
        steps = [0]

        def step() -> None:
            self.seconds += milliseconds[steps[0] % len(milliseconds)] / 1000
            steps[0] += 1
            if log is not None:
                log.append(name)

        return step


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (backend_choice, timing):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture(scope="module")
def data() -> Dataset:
    return load_dataset("digits")


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both can run, and there is memory to be given back."""
    monkeypatch.setattr(backend_choice, "choose_backend", lambda *_: "triton")
    monkeypatch.setattr(backend_choice, "fastest_candidates", lambda *_: list(RIVALS))
    monkeypatch.setattr(backend_choice, "missing_for", lambda *_: None)


def settings(**given: Any) -> TrainConfig:
    return TrainConfig(**{"device": "cpu", "epochs": 1, "batch_size": 16, **given}).resolve()


def on_device(config: TrainConfig) -> Any:
    """The settings of a run on CUDA, which can't be resolved where there is none."""
    values = {name: getattr(config, name) for name in ("backend", "batch_size", "epochs")}
    return SimpleNamespace(device="cuda", **values)


def steps_of(
    clock: Clock, times_ms: dict[str, float], paths: tuple[str, ...] = ("closed form", "generic")
) -> Callable[..., tuple[Any, Callable[[], None]]]:
    """Stands in for what builds a learner and its step."""

    def run_step(settings: TrainConfig, dataset: Dataset, team: Team) -> Any:
        torch.rand(3)
        learner = SimpleNamespace(block_paths=dict(enumerate(paths)))
        return learner, clock.taking(times_ms[settings.backend])

    return run_step


# -- turns ----------------------------------------------------------------------------------------


def test_turns_alternate_and_each_side_is_first_in_turn(clock: Clock) -> None:
    log: list[str] = []
    steps = {name: clock.taking(1.0, log=log, name=name) for name in "ab"}
    medians_in_turn(steps, CPU)
    turns = log[:: backend_choice._STEPS_A_TURN]
    assert turns == [name for turn in "abba" * 9 for name in turn][: 2 * backend_choice._NUM_TURNS]
    assert len(log) == 2 * backend_choice._NUM_TURNS * backend_choice._STEPS_A_TURN


def test_the_median_of_a_step_s_time_and_not_the_mean(clock: Clock) -> None:
    turn = [2.0] * backend_choice._STEPS_A_TURN
    slow_once = [100.0] * backend_choice._STEPS_A_TURN + turn * (backend_choice._NUM_TURNS - 1)
    medians = medians_in_turn({"a": clock.taking(*slow_once), "b": clock.taking(3.0)}, CPU)
    assert medians == pytest.approx({"a": 2.0, "b": 3.0})


def test_of_slow_steps_fewer_turns_are_taken(clock: Clock) -> None:
    log: list[str] = []
    steps = {name: clock.taking(60_000.0, log=log, name=name) for name in "ab"}
    assert medians_in_turn(steps, CPU) == pytest.approx({"a": 60_000.0, "b": 60_000.0})
    assert len(log) == 2 * backend_choice._FEWEST_TURNS * backend_choice._STEPS_A_TURN


# -- the decision ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("times_ms", "expected"),
    [
        ({"triton": 3.6, "cuda": 3.1}, ("cuda", "auto: cuda 3.10 ms a step, triton 3.60")),
        ({"triton": 3.1, "cuda": 3.6}, ("triton", "auto: triton 3.10 ms a step, cuda 3.60")),
        (  # of equal ones the first; 1/512 s, which adds up exactly
            {"triton": 1.953125, "cuda": 1.953125},
            ("triton", "auto: triton 1.95 ms a step, cuda 1.95"),
        ),
    ],
)
def test_the_faster_is_taken_and_both_times_are_told(
    times_ms: dict[str, float],
    expected: tuple[str, str],
    clock: Clock,
    data: Dataset,
    on_cuda: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backend_choice, "_run_step", steps_of(clock, times_ms))
    assert choose_measured(RIVALS, settings(), data, Team()) == expected


def test_random_numbers_stay_where_they_are(clock, data, monkeypatch) -> None:
    monkeypatch.setattr(backend_choice, "_run_step", steps_of(clock, {"triton": 1, "cuda": 2}))
    before = torch.get_rng_state()
    choose_measured(RIVALS, settings(), data, Team())
    assert torch.equal(torch.get_rng_state(), before)


def test_no_other_device_is_seeded(clock, data, monkeypatch) -> None:
    """Their numbers would not be put back."""
    drawn = []

    def run_step(settings: TrainConfig, *_: Any) -> Any:
        drawn.append(torch.rand(3))
        learner = SimpleNamespace(block_paths={0: "closed form"})
        return learner, clock.taking(1.0)

    monkeypatch.setattr(backend_choice, "_run_step", run_step)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", None)
    choose_measured(RIVALS, settings(seed=7), data, Team())
    expected = torch.rand(3, generator=torch.Generator().manual_seed(7))
    assert len(drawn) == 2
    assert all(torch.equal(each, expected) for each in drawn)


def test_without_a_closed_form_nothing_is_measured(clock, data, monkeypatch) -> None:
    run_step = steps_of(clock, {"triton": 2, "cuda": 1}, paths=("generic",))
    monkeypatch.setattr(backend_choice, "_run_step", run_step)
    monkeypatch.setattr(backend_choice, "medians_in_turn", None)
    reason = "auto: rule and blocks have no closed form to be measured"
    assert choose_measured(RIVALS, settings(), data, Team()) == ("triton", reason)


def failing(clock: Clock, errors: dict[str, Exception]) -> Callable[..., Any]:
    honest = steps_of(clock, {"triton": 2, "cuda": 1})

    def run_step(settings: TrainConfig, *rest: Any) -> Any:
        if settings.backend in errors:
            raise errors[settings.backend]
        return honest(settings, *rest)

    return run_step


def test_one_that_can_not_is_told_of(clock, data, monkeypatch) -> None:
    run_step = failing(clock, {"cuda": UserError("no compiler for it.")})
    monkeypatch.setattr(backend_choice, "_run_step", run_step)
    reason = "auto: triton 2.00 ms a step, cuda can't be used (no compiler for it.)"
    assert choose_measured(RIVALS, settings(), data, Team()) == ("triton", reason)


def test_what_both_say_is_said(clock, data, monkeypatch) -> None:
    errors: dict[str, Exception] = {name: UserError(f"{name} says no") for name in RIVALS}
    monkeypatch.setattr(backend_choice, "_run_step", failing(clock, errors))
    with pytest.raises(UserError, match=r"^triton says no$"):
        choose_measured(RIVALS, settings(), data, Team())


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        (
            {"cuda": torch.OutOfMemoryError()},
            ("triton", "auto: too little memory to measure cuda beside it"),
        ),
        (  # nothing else is tried then
            {"triton": torch.OutOfMemoryError()},
            ("triton", "auto: too little memory to measure cuda beside it"),
        ),
        (  # what can't run is not what it comes to
            {"triton": UserError("no compiler."), "cuda": torch.OutOfMemoryError()},
            (
                "cuda",
                "auto: too little memory to measure it, triton can't be used (no compiler.)",
            ),
        ),
    ],
)
def test_too_little_memory_for_both_ends_no_run(
    errors: dict[str, Exception], expected: tuple[str, str], clock, data, monkeypatch
) -> None:
    monkeypatch.setattr(backend_choice, "_run_step", failing(clock, errors))
    before = torch.get_rng_state()
    assert choose_measured(RIVALS, settings(), data, Team()) == expected
    assert torch.equal(torch.get_rng_state(), before)


def test_too_little_memory_for_the_data_or_for_taking_turns(clock, data, monkeypatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError

    expected = ("triton", "auto: too little memory to measure cuda beside it")
    monkeypatch.setattr(backend_choice, "_run_step", steps_of(clock, {"triton": 2, "cuda": 1}))
    with monkeypatch.context() as patch:
        patch.setattr(backend_choice, "medians_in_turn", full)
        assert choose_measured(RIVALS, settings(), data, Team()) == expected
    monkeypatch.setattr(type(data.train), "to", full)
    assert choose_measured(RIVALS, settings(), data, Team()) == expected


def test_what_was_made_is_let_go_when_memory_runs_out(clock, data, monkeypatch) -> None:
    """The run that follows is to have all of it."""
    honest, held = steps_of(clock, {"triton": 2}), []

    def run_step(settings: TrainConfig, *rest: Any) -> Any:
        if settings.backend == "cuda":
            raise torch.OutOfMemoryError
        learner, step = honest(settings, *rest)
        held.append(weakref.ref(step))
        return learner, step

    monkeypatch.setattr(backend_choice, "_run_step", run_step)
    choose_measured(RIVALS, settings(), data, Team())
    gc.collect()
    assert [each() for each in held] == [None]


@pytest.mark.parametrize("backend", RIVALS)
def test_a_bug_of_either_is_not_hidden(backend: str, clock, data, monkeypatch) -> None:
    run_step = failing(clock, {backend: RuntimeError("illegal memory access")})
    monkeypatch.setattr(backend_choice, "_run_step", run_step)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        choose_measured(RIVALS, settings(), data, Team())


# -- on CUDA --------------------------------------------------------------------------------------


def test_a_run_on_cuda_measures(on_cuda, data, monkeypatch) -> None:
    asked: list[Any] = []

    def measured(*arguments: Any) -> tuple[str, str]:
        asked.append(arguments)
        return "cuda", "auto: cuda 1.00 ms a step, triton 2.00"

    monkeypatch.setattr(backend_choice, "choose_measured", measured)
    config, team = on_device(settings()), Team()
    assert choose_run_backend(config, data, team)[0] == "cuda"
    assert asked == [(list(RIVALS), config, data, team)]
    named = on_device(settings(backend="reference"))
    assert choose_run_backend(named, data) == ("triton", "as asked")
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("absent", "expected"),
    [
        ({"cuda": "needs X"}, ("triton", "auto: cuda needs X")),
        ({"triton": "needs Y"}, ("cuda", "auto: triton needs Y")),
        (
            {"cuda": "needs X", "triton": "needs Y"},
            ("autograd", "auto: triton needs Y; cuda needs X"),
        ),
    ],
)
def test_where_one_is_missing_the_reason_names_it(absent, expected, data, monkeypatch) -> None:
    able = [name for name in RIVALS if name not in absent]
    monkeypatch.setattr(backend_choice, "choose_backend", lambda *_: [*able, "autograd"][0])
    monkeypatch.setattr(backend_choice, "fastest_candidates", lambda *_: able)
    monkeypatch.setattr(backend_choice, "missing_for", lambda name, *_: absent.get(name))
    assert choose_run_backend(on_device(settings()), data) == expected


# -- a run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_replicas", "num_images"), [(1, 16), (3, 6)])
def test_what_is_measured_is_the_run_s_own_step(
    num_replicas: int, num_images: int, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference stands in for both, under two names; its steps are real ones."""
    monkeypatch.setattr("locallearn.kernels.backends.BACKENDS", (*BACKENDS, "twin"))
    monkeypatch.setitem(backends._KERNELS, "twin", "reference")
    made: list[tuple[str, torch.Size]] = []
    honest = backend_choice.training_loader

    def watched(settings: TrainConfig, *rest: Any) -> Any:
        loader = honest(settings, *rest)
        images = loader.images

        def make(crops: Any) -> torch.Tensor:
            made.append((loader.backend, images(crops).shape))
            return images(crops)

        loader.images = make
        return loader

    monkeypatch.setattr(backend_choice, "training_loader", watched)
    team = Team()
    team.num_replicas = num_replicas
    rivals = ("reference", "twin")
    backend, reason = choose_measured(rivals, settings(), data, team)
    assert backend in rivals
    # Two names, two times: whichever of them came first.
    assert reason.count(" ms a step") == 1
    assert all(name in reason for name in rivals)
    shape = torch.Size((num_images, data.inputs.num_channels, *data.inputs.image_size))
    assert set(made) <= {(name, shape) for name in rivals}
    counts = [sum(name == each for name, _ in made) for each in rivals]
    assert counts[0] == counts[1] >= backend_choice._FEWEST_TURNS * backend_choice._STEPS_A_TURN


def test_the_record_tells_what_was_chosen_and_why(tmp_path, monkeypatch) -> None:
    chosen = ("reference", "auto: reference 1.00 ms a step, compiled 2.00")
    monkeypatch.setattr("locallearn.engine.trainer.choose_run_backend", lambda *_: chosen)
    trainer = Trainer.start(settings(limit_train=64), tmp_path / "run", QuietObserver())
    assert trainer.settings.backend == trainer.learner.backend == "reference"
    assert trainer.run.read_config().data["backend_reason"] == chosen[1]


def test_one_process_chooses_for_all(tmp_path, monkeypatch) -> None:
    """What the others would have measured, they are not asked."""

    class Second(Team):
        def first(self, make: Callable[[], Any], what: str) -> Any:
            if what == "choosing a backend":
                return "reference", "auto: reference 1.00 ms a step, compiled 2.00"
            return make()

    monkeypatch.setattr("locallearn.engine.trainer.choose_run_backend", None)
    out = tmp_path / "run"
    trainer = Trainer.start(settings(limit_train=64), out, QuietObserver(), team=Second())
    assert trainer.learner.backend == "reference"
