"""The benchmark's gate, its figures, and the parts it is made of."""

from __future__ import annotations

import copy
import dataclasses
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from locallearn import LocalLearner, UserError, build_model
from locallearn.engine import benchmark
from locallearn.engine.allocator import keep_freed_memory
from locallearn.engine.benchmark import (
    BenchmarkConfig,
    Side,
    Spread,
    run_benchmark,
    same_weights,
)
from locallearn.engine.graphs import can_be_graphed
from locallearn.engine.op_benchmark import TORCH, measure_rates, time_ops
from locallearn.kernels import BACKENDS, backends, load_kernels

CONFIG = BenchmarkConfig(
    model="smallconv",
    rules=("lls", "lls-mxm"),
    batch_size=8,
    image_shape=(3, 8, 8),
    num_classes=10,
    precision="fp32",
    device="cpu",
    backends=("reference",),
    num_rounds=3,
)


def build():
    return same_weights(lambda: build_model("smallconv"))


@pytest.fixture
def without_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling backpropagation takes long and is not what is tested here."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def test_rows_of_a_green_gate(without_compiling) -> None:
    told: list[str] = []
    result = run_benchmark(CONFIG, build(), told.append)
    assert result.gate.is_green
    backends = ("autograd", "reference")
    assert set(result.gate.errors) == {f"{r}: {b}" for r in CONFIG.rules for b in backends}
    paths = {(row["rule"], row["path"]) for row in result.rows}
    assert paths == {
        ("lls", "closed form"),
        ("lls", "generic"),
        ("lls-mxm", "closed form"),
        ("lls-mxm", "generic"),
        ("bp", "backprop"),
        ("bp", "checkpoint"),
        ("bp", "accumulate:4"),
        ("bp", "fused-optimizer"),
    }
    for row in result.rows:
        assert 0 < row["step_time_ms_p20"] <= row["step_time_ms_median"] <= row["step_time_ms_p80"]
        assert row["images_per_second"] == pytest.approx(8000 / row["step_time_ms_median"])
        assert row["peak_activation_mib"] > 0
    tuned = [row for row in result.rows if row["is_tuned_bp"]]
    assert len(tuned) == 1
    assert tuned[0]["path"] == "backprop"
    assert tuned[0]["speedup_vs_tuned_bp_median"] == tuned[0]["activation_vs_tuned_bp"] == 1.0
    memory = {row["path"]: row["peak_activation_mib"] for row in result.rows if row["rule"] == "bp"}
    assert memory["fused-optimizer"] < memory["backprop"]
    assert "round 3 of 3" in told


@pytest.fixture
def twin(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference under a second name, which stands in for another backend."""
    monkeypatch.setattr("locallearn.kernels.backends.BACKENDS", (*BACKENDS, "twin"))
    monkeypatch.setitem(backends._KERNELS, "twin", "reference")


def test_several_backends_run_beside_each_other(without_compiling, twin) -> None:
    config = dataclasses.replace(CONFIG, rules=("lls", "dfa"), backends=("reference", "twin"))
    result = run_benchmark(config, build())
    assert result.gate.is_green
    checked = ("autograd", "reference", "twin")
    assert set(result.gate.errors) == {f"{r}: {b}" for r in ("lls", "dfa") for b in checked}
    sides = [(row["rule"], row["path"], row["backend"], row.get("update")) for row in result.rows]
    assert len(set(sides)) == len(sides)
    assert sides[:4] == [
        ("lls", "closed form", "reference", None),
        ("lls", "closed form", "twin", None),
        ("lls", "generic", "autograd", None),
        ("dfa", "generic", "autograd", None),  # which has no closed form by either
    ]
    tuned = [("bp", "backprop", how) for how in ("eager", "compiled")]
    assert sides[4:8] == [(*each, update) for update in ("reference", "twin") for each in tuned]
    compared = [row for row in result.rows if "speedup_vs_reference_median" in row]
    assert [(row["rule"], row["backend"]) for row in compared] == [("lls", "twin")]


def test_ratios_are_to_the_first_backend_round_by_round() -> None:
    """compiled is also how a backpropagation may be run, which is compared with bp alone."""

    def side(rule: str, path: str, backend: str, *times_ms: float) -> Side:
        is_tuned = rule == "bp"
        return Side(rule, path, backend, lambda *_: None, is_tuned, times_ms=list(times_ms))

    sides = [
        side("lls", "closed form", "compiled", 2.0, 4.0, 12.0),
        side("lls", "closed form", "reference", 1.0, 1.0, 4.0),
        side("lls", "generic", "autograd", 1.0, 1.0, 1.0),
        side("bp", "backprop", "compiled", 1.0, 1.0, 1.0),
        side("bp", "backprop", "eager", 9.0, 9.0, 9.0),
    ]
    for each in sides:
        each.peak_activation_mib = 1.0
    rows = benchmark._rows(sides, 8, "compiled")
    assert [row.get("speedup_vs_compiled_median") for row in rows] == [None, 3.0, None, None, None]
    assert rows[1]["speedup_vs_tuned_bp_median"] == 1.0


def test_a_wrong_second_backend_turns_the_gate_red(twin, monkeypatch) -> None:
    honest = load_kernels("reference")

    def wrong_backward(z, *args, **kwargs):
        return honest.block_backward(z, *args, **kwargs).mul_(1.001)

    names = {name: getattr(honest, name) for name in honest.__all__}
    broken = types.SimpleNamespace(**(names | {"block_backward": wrong_backward}))
    monkeypatch.setattr(
        "locallearn.engine.units.base.load_kernels",
        lambda backend: broken if backend == "twin" else load_kernels(backend),
    )
    config = dataclasses.replace(CONFIG, rules=("lls",), backends=("reference", "twin"))
    result = run_benchmark(config, build())
    assert not result.gate.is_green
    assert result.rows == []
    assert result.gate.errors["lls: reference"] < 1e-4 < result.gate.errors["lls: twin"]


def test_a_wrong_kernel_turns_the_gate_red_and_there_are_no_figures(monkeypatch) -> None:
    honest = load_kernels("reference")

    def wrong_backward(z, *args, **kwargs):
        return honest.block_backward(z, *args, **kwargs).mul_(1.001)

    names = {name: getattr(honest, name) for name in honest.__all__}
    broken = types.SimpleNamespace(**(names | {"block_backward": wrong_backward}))
    monkeypatch.setattr(benchmark, "choose_backend", lambda *args: "compiled")
    monkeypatch.setattr("locallearn.engine.learner.choose_backend", lambda backend, *args: backend)
    monkeypatch.setattr(
        "locallearn.engine.units.base.load_kernels",
        lambda backend: broken if backend == "compiled" else load_kernels(backend),
    )
    result = run_benchmark(CONFIG, build())
    assert not result.gate.is_green
    assert result.rows == []
    assert result.gate.errors["lls: compiled"] == pytest.approx(1e-3, rel=0.1)
    assert result.gate.errors["lls: autograd"] < 1e-4


def test_the_gate_passes_one_activation_of_the_other_slope_and_no_wrong_channel() -> None:
    exact = {"model.conv1.weight": torch.randn(32, 27).double()}
    one_off, all_off = (copy.deepcopy(exact) for _ in range(2))
    one_off["model.conv1.weight"][5] *= 1.003
    all_off["model.conv1.weight"] *= 1.001
    ((one,), (every,)) = (benchmark._errors(e, exact).values() for e in (one_off, all_off))
    assert one.typical == 0
    assert 1e-4 < one.at_all < 1e-3
    assert every.typical > 5e-4
    wrong = copy.deepcopy(exact)
    wrong["model.conv1.weight"][5] *= 2
    (error,) = benchmark._errors(wrong, exact).values()
    assert error.at_all > benchmark._GATE_FLOOR_AT_ALL["fp32"]


def test_bp_is_measured_beside_the_others_and_not_as_one_of_them() -> None:
    config = BenchmarkConfig(**{**vars(CONFIG), "rules": ("bp",)})
    with pytest.raises(UserError, match="'bp' is no rule to compare"):
        run_benchmark(config, build())


def test_a_rule_without_a_closed_form_is_measured_once(without_compiling) -> None:
    config = BenchmarkConfig(**{**vars(CONFIG), "rules": ("dfa", "lls-s")})
    result = run_benchmark(config, build())
    assert result.gate.is_green
    paths = [(row["rule"], row["path"]) for row in result.rows if row["rule"] != "bp"]
    assert paths == [("dfa", "generic"), ("lls-s", "closed form"), ("lls-s", "generic")]


def test_spread() -> None:
    assert Spread.of([float(i) for i in range(11)]) == Spread(5.0, 2.0, 8.0)
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)


def test_ops_have_times_and_floors() -> None:
    rates, times = time_ops(
        build_model("smallconv"),
        image_shape=(3, 8, 8),
        batch_size=4,
        num_classes=10,
        backends=("reference",),
        precision="fp32",
        device=torch.device("cpu"),
        num_rounds=1,
    )
    assert rates.bandwidth_gb_s > 0.1
    assert rates.macs_g_s > 0.1
    assert {each.block for each in times} == {"conv1", "conv2", "conv3", "linear1"}
    assert {each.backend for each in times} == {"reference", TORCH}
    by_name = {(each.block, each.op): each for each in times}
    assert by_name["conv1", "layer"].num_macs == 4 * 27 * 32 * 64
    assert by_name["conv1", "block_backward"].num_bytes == 2 * 4 * 4 * 32 * 64 + 4 * 4 * 512
    assert all(each.time_ms > 0 and each.floor_ms > 0 for each in times)


def test_ops_of_several_backends_stand_beside_each_other(twin) -> None:
    _, times = time_ops(
        build_model("smallconv"),
        image_shape=(3, 8, 8),
        batch_size=4,
        num_classes=10,
        backends=("reference", "twin"),
        precision="fp32",
        device=torch.device("cpu"),
        num_rounds=1,
    )
    of_conv1 = [each for each in times if each.block == "conv1"]
    by_op = {each.op: [] for each in of_conv1}
    for each in of_conv1:
        by_op[each.op].append(each)
    of_torch = {"layer", "weight gradient"}
    for op, found in by_op.items():
        expected = [TORCH] if op in of_torch else ["reference", "twin"]
        assert [each.backend for each in found] == expected
        assert len({each.floor_ms for each in found}) == 1
    assert of_torch < set(by_op)


class Products(TorchDispatchMode):
    """Keeps the dtypes of the matrices that are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default:
            self.dtypes += [factor.dtype for factor in args]
        return func(*args, **(kwargs or {}))


def test_bf16_rates_are_measured_in_bf16(monkeypatch) -> None:
    # A processor without bf16 of its own takes half a minute for one product of the usual size.
    monkeypatch.setattr("locallearn.engine.op_benchmark._MATRIX_SIDE", 256)
    with Products() as products:
        rates = measure_rates(torch.device("cpu"), torch.bfloat16, 1)
    assert rates.macs_g_s > 0
    assert set(products.dtypes) == {torch.bfloat16}


def test_freed_memory_is_kept_where_that_can_be_asked() -> None:
    assert keep_freed_memory() in (True, False)
    assert torch.ones(2**22).sum() == 2**22


def test_what_can_be_graphed() -> None:
    model = build_model("smallconv")
    assert not can_be_graphed(LocalLearner(model, "lls"))  # on the CPU
    if torch.cuda.is_available():
        assert can_be_graphed(LocalLearner(model.cuda(), "lls"))
        assert not can_be_graphed(LocalLearner(model, "lls", optimizer="adam"))
