"""Exported files give the network's answers, say what they are, and are not there when wrong."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

import locallearn
from locallearn import LocalLearner, UserError, build_model
from locallearn.export import (
    Comparison,
    Exported,
    export_onnx,
    export_program,
    load_export,
    quantize_onnx,
)
from locallearn.export.exporting import normalized
from locallearn.export.network import trace
from locallearn.export.verification import times_in_turn_ms

onnxruntime = pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")
pytest.importorskip("onnxscript", reason="the extra 'onnx' is not installed")

NAMES = [f"digit {i}" for i in range(10)]
MEAN, STD = (0.3, 0.4, 0.2), (0.4, 0.3, 0.5)
BLOCKS = ["conv1", "conv2", "conv3", "linear1"]


@dataclass
class Made:
    """A learner, what it was trained on, and its two files."""

    learner: LocalLearner
    pixels: Tensor  # uint8 (N, H, W, C)
    inputs: Tensor  # float32 (N, C, H, W)
    labels: Tensor
    onnx: Exported
    program: Exported


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Trained on digits in three channels that differ, so that none can be taken for another."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    digits = load_digits()
    grey = torch.tensor(digits.images[:640] * 15, dtype=torch.uint8)[..., None]
    pixels = torch.cat([grey, 255 - grey, grey // 2], dim=3)
    inputs, labels = normalized(pixels, MEAN, STD), torch.tensor(digits.target[:640])
    model = build_model("smallconv", num_classes=10, in_channels=3, image_size=(8, 8), width=0.25)
    learner = LocalLearner(model, "lls-mxm")
    for _ in range(6):
        for first in range(0, 640, 64):
            learner.step(inputs[first : first + 64], labels[first : first + 64])
    root = tmp_path_factory.mktemp("exported")
    common: dict[str, Any] = {"class_names": NAMES, "exits": True}
    onnx = export_onnx(learner, root / "net.onnx", pixels[:50], mean=MEAN, std=STD, **common)
    program = export_program(learner, root / "net.pt2", inputs[:50], **common)
    return Made(learner, pixels, inputs, labels, onnx, program)


@pytest.fixture(autouse=True)
def _few_threads(one_thread: None) -> None:
    pass


class Small(nn.Module):
    """The smallest network that can be exported: two blocks' worth of weights."""

    def __init__(self, num_features: int = 12) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(num_features, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.classifier = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.first(x.flatten(1)))


def small_learner(
    model: nn.Module | None = None, rule: str = "lls", **options: Any
) -> LocalLearner:
    x = torch.randn(6, 3, 2, 2)
    return LocalLearner(
        Small() if model is None else model,
        rule,
        num_classes=3,
        blocks=["first"] if rule == "lls" else "auto",
        example_input=x,
        **options,
    )


@pytest.mark.parametrize("num", [1, 3, 32, 100])
def test_both_files_give_the_networks_logits(made: Made, num: int) -> None:
    expected = made.learner.exit_logits(made.inputs[:num])
    expected["logits"] = expected.pop("output")
    assert torch.equal(expected["logits"], made.learner(made.inputs[:num]))
    for file, images in ((made.onnx, made.pixels[:num]), (made.program, made.inputs[:num])):
        outputs = load_export(file.path)(images)
        assert list(outputs) == ["logits", *BLOCKS]
        for name, logits in outputs.items():
            assert logits.dtype == torch.float32
            torch.testing.assert_close(logits, expected[name], atol=1e-5, rtol=1e-5)


def test_the_network_has_learned_something(made: Made) -> None:
    """Equal logits of a network that says the same of all images would prove little."""
    classes = load_export(made.onnx.path)(made.pixels)["logits"].argmax(1)
    assert (classes == made.labels).float().mean() > 0.8


def test_what_is_reported(made: Made) -> None:
    for file in (made.onnx, made.program):
        assert file.num_bytes == file.path.stat().st_size
        assert file.comparison.num_images == 50
        assert file.comparison.num_other_class == 0
        assert list(file.comparison.max_difference) == ["logits", *BLOCKS]
        assert max(file.comparison.max_difference.values()) <= 1e-4
        assert load_export(file.path).description == file.description


def test_onnxruntime_alone_suffices(made: Made) -> None:
    session = onnxruntime.InferenceSession(made.onnx.path, providers=["CPUExecutionProvider"])
    about = json.loads(session.get_modelmeta().custom_metadata_map["locallearn"])
    assert about["class_names"] == NAMES
    assert about["input"]["name"] == "images"
    assert about["input"]["shape"] == ["batch", 8, 8, 3]
    assert about["input"]["layout"] == "NHWC"
    assert (about["input"]["mean"], about["input"]["std"]) == (list(MEAN), list(STD))
    assert [output["block"] for output in about["outputs"]] == [None, *BLOCKS]
    assert about["precision"] == "float32"
    assert about["rule"] == "lls-mxm"
    assert about["locallearn"] == locallearn.__version__
    (given,) = session.get_inputs()
    assert (given.name, given.type, given.shape) == (
        "images",
        "tensor(uint8)",
        ["batch", 8, 8, 3],
    )
    assert [output.shape for output in session.get_outputs()] == [["batch", 10]] * 5
    pixels = np.asarray(made.pixels[:1])
    (logits,) = session.run(["logits"], {"images": pixels})
    np.testing.assert_allclose(logits, made.learner(made.inputs[:1]), atol=1e-5)


def test_torch_alone_suffices(made: Made) -> None:
    extra_files = {"locallearn.json": ""}
    program = torch.export.load(made.program.path, extra_files=extra_files)
    about = json.loads(extra_files["locallearn.json"])
    assert about["input"]["shape"] == ["batch", 3, 8, 8]
    assert about["input"]["dtype"] == "float32"
    logits = program.module()(made.inputs[:2])["logits"]
    torch.testing.assert_close(logits, made.learner(made.inputs[:2]), atol=1e-5, rtol=1e-5)


def test_batchnorm_is_in_the_weights_of_an_onnx_file(made: Made) -> None:
    onnx = pytest.importorskip("onnx")
    proto = onnx.load(made.onnx.path)
    assert {entry.domain: entry.version for entry in proto.opset_import} == {"": 18}
    operators = [node.op_type for node in proto.graph.node]
    assert "BatchNormalization" not in operators
    assert operators.count("Conv") == 3


def test_nothing_of_this_machine_is_in_a_file(made: Made) -> None:
    contents = [made.onnx.path.read_bytes()]
    with zipfile.ZipFile(made.program.path) as archive:
        contents += [archive.read(name) for name in archive.namelist()]
    here = str(Path(locallearn.__file__).parents[1]).encode()
    libraries = str(Path(torch.__file__).parents[1]).encode()
    for content in contents:
        assert here not in content
        assert libraries not in content


def test_int8_file(made: Made, tmp_path: Path) -> None:
    target = tmp_path / "net.int8.onnx"
    made_of = quantize_onnx(made.onnx.path, target, made.pixels[:128])
    assert "128 images" in (made_of.quantization or "")
    small = load_export(target)
    assert small.description == made_of
    assert small.description.exits == made.onnx.description.exits
    outputs, expected = small(made.pixels), load_export(made.onnx.path)(made.pixels)
    assert list(outputs) == list(expected)
    for name in outputs:
        assert outputs[name].isfinite().all()
        same = (outputs[name].argmax(1) == expected[name].argmax(1)).float().mean()
        assert same > 0.9, name
    assert not torch.equal(outputs["logits"], expected["logits"])
    onnx = pytest.importorskip("onnx")
    weights = [
        t for t in onnx.load(target).graph.initializer if t.data_type == onnx.TensorProto.INT8
    ]
    assert {tuple(t.dims) for t in weights} >= {(8, 3, 3, 3), (16, 8, 3, 3), (32, 16, 3, 3)}
    # Within 7 bits, so that no pair of products overflows 16.
    for tensor in weights:
        assert np.abs(onnx.numpy_helper.to_array(tensor)).max() <= 64
    assert list(tmp_path.iterdir()) == [target]


def test_a_learner_in_training_is_exported_as_it_evaluates(tmp_path: Path) -> None:
    """At the average of a schedule-free optimizer, not where it trains."""
    learner = small_learner(lr=0.1)
    x, labels = torch.randn(24, 3, 2, 2), torch.randint(0, 3, (24,))
    for _ in range(4):
        learner.step(x, labels)
    at_training_point = learner.model(x)
    file = export_program(learner, tmp_path / "net.pt2", x)
    assert not learner.training
    logits = load_export(file.path)(x)["logits"]
    assert torch.equal(logits, learner(x))
    assert (logits - at_training_point).abs().max() > 1e-2


@pytest.mark.parametrize(("precision", "channels_last"), [("bf16", True), ("fp32", False)])
def test_float32_whatever_the_run(
    made: Made, tmp_path: Path, precision: str, channels_last: bool
) -> None:
    model = build_model("smallconv", num_classes=10, in_channels=3, image_size=(8, 8), width=0.1)
    learner = LocalLearner(model, precision=precision, channels_last=channels_last)
    file = export_program(learner, tmp_path / "net.pt2", made.inputs[:8])
    with torch.no_grad():
        expected = model(made.inputs[:8])
    logits = load_export(file.path)(made.inputs[:8])["logits"]
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-6)


def test_an_exit_may_be_called_as_an_output_is(tmp_path: Path) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Sequential(nn.Linear(12, 8), nn.ReLU())
            self.classifier = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.classifier(self.logits(x.flatten(1)))

    x = torch.randn(5, 3, 2, 2)
    learner = LocalLearner(Named(), num_classes=3, blocks=["logits"], example_input=x)
    file = export_program(learner, tmp_path / "net.pt2", x, exits=True)
    outputs = load_export(file.path)(x)
    assert list(outputs) == ["logits", "logits.logits"]
    torch.testing.assert_close(outputs["logits"], learner(x))
    torch.testing.assert_close(outputs["logits.logits"], learner.exit_logits(x)["logits"])


@pytest.mark.parametrize("rule", ["lls-m", "lls-s", "local-losses"])
def test_heads_of_other_rules(rule: str, tmp_path: Path) -> None:
    x = torch.randn(9, 3, 2, 2)
    learner = LocalLearner(Small(), rule, num_classes=3, blocks=["first"], example_input=x)
    learner.step(x, torch.randint(0, 3, (9,)))
    file = export_program(learner, tmp_path / "net.pt2", x, exits=True)
    expected = learner.exit_logits(x)
    outputs = load_export(file.path)(x[:7])
    torch.testing.assert_close(outputs["first"], expected["first"][:7])
    torch.testing.assert_close(outputs["logits"], expected["output"][:7])


def test_attention_is_no_fused_operator() -> None:
    """Which torch's transformer layers have for inference, and ONNX has not."""

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.TransformerEncoderLayer(12, 2, 8, batch_first=True)

        def forward(self, images: Tensor) -> Tensor:
            return self.model(images).mean(dim=1)

    network, x = Attending().eval(), torch.randn(5, 4, 12)
    program = trace(network, x)
    operators = {str(node.target) for node in program.graph.nodes}
    assert "aten.linear.default" in operators
    assert not [name for name in operators if "transformer" in name or "multi_head" in name]
    torch.testing.assert_close(program.module()(x), network(x))
    assert torch.backends.mha.get_fastpath_enabled()


def test_temperatures_of_calibrated_exits(tmp_path: Path) -> None:
    learner = small_learner()
    x = torch.randn(40, 3, 2, 2)
    found = learner.calibrate_exits([(x, torch.randint(0, 3, (40,)))])
    file = export_program(learner, tmp_path / "net.pt2", x, exits=True)
    (first,) = file.description.exits
    assert (first.block, first.temperature) == ("first", found["first"].temperature)
    assert file.description.temperature == found["output"].temperature
    assert first.temperature != file.description.temperature


def test_a_file_that_differs_is_not_written(made: Made, tmp_path: Path) -> None:
    """The file multiplies pixels where the comparison divides: the last bits differ."""
    target = tmp_path / "net.pt2"
    target.write_bytes(b"the old one")
    said = r"output 'logits' differs by up to \S+e-0[5-9] on 50 images.* is 0\. Nothing was written"
    with pytest.raises(UserError, match=said):
        export_program(made.learner, target, made.pixels[:50], mean=MEAN, std=STD, tolerance=0)
    assert target.read_bytes() == b"the old one"
    assert list(tmp_path.iterdir()) == [target]


def test_comparison_counts() -> None:
    comparison = Comparison()
    expected = {"logits": torch.tensor([[1.0, 2.0], [3.0, 0.0]]), "conv1": torch.zeros(2, 2)}
    given = {"logits": torch.tensor([[1.0, 2.5], [3.0, 3.25]]), "conv1": torch.full((2, 2), -0.125)}
    comparison.add(given, expected, torch.tensor([1, 0]))
    comparison.add({n: t[:1] for n, t in given.items()}, {n: t[:1] for n, t in given.items()}, None)
    assert comparison.num_images == 3
    assert comparison.max_difference == {"logits": 3.25, "conv1": 0.125}
    assert comparison.num_other_class == 1  # 3.25 for the second class, where 3 was for the first
    assert (comparison.num_labelled, comparison.num_right, comparison.num_right_model) == (2, 1, 2)
    assert (comparison.accuracy, comparison.model_accuracy) == (50.0, 100.0)
    comparison.check(3.25)
    with pytest.raises(UserError, match=r"'logits' differs by up to 3\.2 on 3 images"):
        comparison.check(3.2)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_no_number_is_no_match(wrong: float) -> None:
    comparison = Comparison()
    outputs = {"logits": torch.tensor([[1.0, wrong]])}
    comparison.add(outputs, outputs, None)
    comparison.add({"logits": torch.zeros(1, 2)}, {"logits": torch.zeros(1, 2)}, None)
    assert comparison.accuracy is None
    with pytest.raises(UserError, match="differs by up to nan"):
        comparison.check(1e9)


def test_times_are_measured_in_turn() -> None:
    called: list[str] = []
    calls: dict[str, Callable[[], object]] = {
        name: (lambda name=name: called.append(name)) for name in "abc"
    }
    assert list(times_in_turn_ms(calls)) == ["a", "b", "c"]
    assert "".join(called) == "abc" * (len(called) // 3)
    assert len(called) > 6


class FixesBatch(Small):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.zeros(len(x), 1)


class LooksAtValues(Small):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else super().forward(-x)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (FixesBatch(), "forward fixes the number of images.*use images.shape"),
        (LooksAtValues(), "torch.export can't follow the model's forward: "),
    ],
)
def test_models_that_cannot_be_traced(model: nn.Module, said: str, tmp_path: Path) -> None:
    learner = small_learner(model)
    with pytest.raises(UserError, match=said) as raised:
        export_program(learner, tmp_path / "net.pt2", torch.randn(4, 3, 2, 2))
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"path": "net.onnx"}, r"net\.onnx must end in \.pt2"),
        ({"path": "none/net.pt2"}, "there is no directory"),
        ({"tolerance": -1.0}, "the tolerance must be at least 0, got -1"),
        ({"tolerance": math.nan}, "the tolerance must be at least 0, got nan"),
        ({"images": torch.zeros(0, 3, 2, 2)}, "give at least one"),
        ({"images": torch.zeros(2, 3, 2, 2).double()}, "must be float32.*got torch.float64"),
        ({"images": torch.zeros(2, 2, 2, 3, dtype=torch.uint8)}, "for pixels give mean and std"),
        ({"mean": MEAN, "std": STD}, r"uint8 pixels of shape \(N, H, W, C\), got torch.float32"),
        (
            {"images": torch.zeros(2, 2, 2, 3, dtype=torch.uint8), "mean": (0.5,), "std": STD},
            "a number for each of the 3 channels, got 1 and 3",
        ),
        ({"class_names": ["a", "b"]}, "class_names has 2 names for 3 classes"),
    ],
)
def test_bad_arguments(
    change: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"path": "net.pt2", "images": torch.zeros(2, 3, 2, 2)} | change
    with pytest.raises(UserError, match=said):
        export_program(small_learner(), **given)
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_float32(tmp_path: Path) -> None:
    learner = small_learner()
    learner.model.classifier.double()
    learner.model.forward = lambda x: learner.model.classifier(x.flatten(1)[:, :8].double())
    with pytest.raises(UserError, match=r"'classifier.weight' is torch.float64.*model.float\(\)"):
        export_program(learner, tmp_path / "net.pt2", torch.zeros(2, 3, 2, 2))


def test_a_rule_without_local_logits(tmp_path: Path) -> None:
    learner = small_learner(rule="bp")
    with pytest.raises(UserError, match="'bp' has no local losses"):
        export_program(learner, tmp_path / "net.pt2", torch.zeros(2, 3, 2, 2), exits=True)


@pytest.mark.parametrize("opset", [3, 99])
def test_opsets_that_are_not_written(opset: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"--opset must be between 18 and \d+, got {opset}"):
        export_onnx(small_learner(), tmp_path / "net.onnx", torch.zeros(2, 3, 2, 2), opset=opset)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    said = rf"{package} is missing: pip install 'locallearn\[onnx\]'"
    with pytest.raises(UserError, match=said):
        export_onnx(small_learner(), tmp_path / "net.onnx", torch.zeros(2, 3, 2, 2))
    assert not list(tmp_path.iterdir())


def test_files_that_are_none_of_ours(made: Made, tmp_path: Path) -> None:
    for name in ("net.onnx", "net.pt2"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
        with pytest.raises(UserError, match=re.escape(f"{tmp_path / name} can't be read: ")):
            load_export(tmp_path / name)
    with pytest.raises(UserError, match=r"ends in neither \.onnx nor \.pt2"):
        load_export(tmp_path / "net.bin")
    onnx = pytest.importorskip("onnx")
    proto = onnx.load(made.onnx.path)
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "other.onnx")
    with pytest.raises(UserError, match="it was not written by locallearn"):
        load_export(tmp_path / "other.onnx")
    entry = proto.metadata_props.add()
    entry.key = "locallearn"
    entry.value = made.onnx.description.to_text().replace(
        '"format_version": 1', '"format_version": 9'
    )
    onnx.save(proto, tmp_path / "later.onnx")
    with pytest.raises(UserError, match="format version 9; this locallearn reads version 1"):
        load_export(tmp_path / "later.onnx")


def test_the_guides_programs(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/export.md, with these files in place of a run's."""
    text = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    with_onnxruntime, with_torch, from_python = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    shutil.copy(made.onnx.path, "model.onnx")
    common = {"mean": MEAN, "std": STD, "class_names": NAMES}
    export_program(made.learner, "model.pt2", made.pixels[:3], **common)
    Image.fromarray(made.pixels[7].numpy()).save("image.png")
    names: dict[str, Any] = {}
    exec(with_onnxruntime, names)
    exec(with_torch, names)
    (expected,) = made.learner(made.inputs[7:8]).argmax(1).tolist()
    assert capsys.readouterr().out == 2 * f"{NAMES[expected]}\n"
    small, x = small_learner(), torch.randn(4, 3, 2, 2)
    exec(from_python, {"learner": small, "images": x, "names": ["a", "b", "c"]})
    assert set(eval(capsys.readouterr().out)) == {"logits", "first"}
    assert load_export("net.onnx").description.origin.class_names == ("a", "b", "c")
