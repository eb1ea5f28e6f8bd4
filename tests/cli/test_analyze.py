"""`locallearn analyze` as a user meets it: files, captions, one-line errors."""

from __future__ import annotations

import copy
import itertools
import json
import re
import shlex
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from locallearn.analysis import latents
from locallearn.analysis.gradcam import Deletion
from locallearn.analysis.layers import head_accuracies
from locallearn.analysis.shuffling import Shuffled
from locallearn.analysis.superclasses import CIFAR10, CIFAR100
from locallearn.analysis.synchrony import Synchrony
from locallearn.cli import main
from locallearn.cli.analyze import synchrony
from locallearn.cli.analyze.gradcam import _drawn, _Explained
from locallearn.cli.analyze.layers import describe_course
from locallearn.cli.analyze.opening import Opened, open_run
from locallearn.cli.analyze.semantics import _saying, _verdict
from locallearn.cli.console import QuietObserver
from locallearn.engine import Interrupted, TrainConfig, Trainer

pytest.importorskip("matplotlib")

TINY = [
    "--epochs",
    "2",
    "--limit-train",
    "500",
    "--limit-test",
    "100",
    "--num-threads",
    "1",
    "--width",
    "0.5",
]
GROUPS = {"round": ["0", "6", "8", "9"], "straight": ["1", "4", "7"], "both": ["2", "3", "5"]}
FEW = ["--limit", "60", "--images", "all", "--no-untrained"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of short runs, named by their rule, and what else the commands are given."""
    root = tmp_path_factory.mktemp("runs")
    rules = {"lls": [], "mxm": ["lls-mxm"], "bp": ["bp"], "random": ["lls", "--basis", "random"]}
    for name, rule in rules.items():
        flags = ["--rule", *rule] if rule else []
        assert main(["train", *TINY, *flags, "--quiet", "--out", str(root / name)]) == 0
    (root / "groups.json").write_text(json.dumps(GROUPS))
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        pixels = rng.integers(0, 255, (9, 11), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{name}.png")
    (root / "broken.png").write_text("no image")
    return root


@pytest.fixture(autouse=True)
def _beside_the_runs(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.chdir(runs)
    monkeypatch.setenv("COLUMNS", "160")


def read_figure(directory: str, name: str) -> dict:
    """The JSON of a figure whose picture and drawing are whole."""
    base = Path(directory)
    with Image.open(base / f"{name}.png") as picture:
        picture.load()
        assert min(picture.size) > 200
    root = ElementTree.parse(base / f"{name}.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    document = json.loads((base / f"{name}.json").read_text())
    assert list(document) == ["figure", "caption", "command", "numbers", "epochs", "environment"]
    assert document["figure"] == name
    assert document["command"].startswith("locallearn analyze ")
    assert document["epochs"] > 0
    assert {"git_commit", "packages", "device_name"} < set(document["environment"])
    assert document["caption"].endswith(".")
    return document


def test_synchrony(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["analyze", "synchrony", "lls", "--classes", "3,8,1", "--images", "all"]
    assert main(command) == 0
    out = capsys.readouterr().out
    document = read_figure("lls/figures", "synchrony-linear1-3-8-1-all")
    assert document["caption"] in out
    assert "written to lls/figures/synchrony-linear1-3-8-1-all.png, .svg and .json" in out
    assert len(re.findall(r"^(conv\d|linear1) +[\d.]+ +[\d.]+ ± [\d.]+ +[01]\.\d", out, re.M)) == 4
    numbers = document["numbers"]
    assert numbers["reference"] == "B (square, official)"
    assert numbers["num_images"] == sum(numbers["images_by_class"]) == 100
    assert [row["block"] for row in numbers["blocks"]] == ["conv1", "conv2", "conv3", "linear1"]
    index = numbers["blocks"][3]["index"]
    assert np.trace(numbers["energy"]) / 10 == pytest.approx(index["value"])
    assert f"{100 * index['value']:.1f} % of a class's energy" in document["caption"]
    # Trained to swing so, and untrained not.
    assert index["p_value"] < 0.01
    untrained = numbers["blocks"][3]["before_training"]["index"]
    assert untrained["p_value"] > 0.01
    assert untrained["value"] < index["value"] / 2
    assert ", as the paper shows for two. Before training" in document["caption"]
    # What is drawn: spectra of the classes shown, which sum to one.
    assert list(numbers["spectra"]) == numbers["shown"] == ["3", "8", "1"]
    for spectra in numbers["spectra"].values():
        for shares in spectra.values():
            assert len(shares) == len(numbers["frequencies_cycles_per_place"])
            assert sum(shares) == pytest.approx(1)


def test_synchrony_of_correct_images_in_a_network_without_waves() -> None:
    """The waves that LLS would use, and no peaks at them; another block, another directory."""
    command = ["analyze", "synchrony", "bp", "--block", "conv2", "--basis", "cosine"]
    assert main([*command, "--setting", "paper", "--no-untrained", "--out", "new/figures"]) == 0
    document = read_figure("new/figures", "synchrony-conv2-cosine-paper")
    numbers = document["numbers"]
    assert numbers["reference"] == "B (cosine, paper)"
    assert sum(numbers["images_by_class"]) < numbers["num_images"]
    assert numbers["blocks"][0]["before_training"] is None
    assert numbers["blocks"][1]["index"]["p_value"] > 0.01
    assert "does not show the synchronisation that the paper says" in document["caption"]


def test_synchrony_compares_with_the_mixtures() -> None:
    assert main(["analyze", "synchrony", "mxm", *FEW]) == 0
    numbers = read_figure("mxm/figures", "synchrony-linear1-all")["numbers"]
    assert numbers["reference"] == "D (mixtures of B; square, official)"
    assert numbers["num_images"] == 60


def test_synchrony_looks_for_the_runs_own_waves_where_one_option_is_given() -> None:
    assert main(["analyze", "synchrony", "lls", "--setting", "paper", *FEW]) == 0
    numbers = read_figure("lls/figures", "synchrony-linear1-square-paper-all")["numbers"]
    assert numbers["reference"] == "B (square, paper)"


@pytest.mark.parametrize(
    ("num_classes", "num_at_own", "p_value", "expected"),
    [
        (
            4,
            4,
            0.0001,
            "which of so few classes can't be told from chance (.*4 of 4 classes ",
        ),
        (6, 6, 0.01, "not told from chance at p < 0.01 (.*: it does not show the"),
        (
            6,
            2,
            0.0001,
            "more than by chance (.* for 2 of 6 .*, while most peak elsewhere: less",
        ),
        (
            6,
            3,
            0.0001,
            "more than by chance (.* for 3 of 6 classes (1.0 shuffled), as the paper",
        ),
    ],
)
def test_what_an_index_says(
    num_classes: int, num_at_own: int, p_value: float, expected: str
) -> None:
    """Spectra of waves of which so many have the frequency of their class."""
    waves = torch.eye(64)[5 * torch.arange(1, num_classes + 1)]
    own = [*range(num_at_own), *range(num_at_own + 1, num_classes), num_at_own][:num_classes]
    shares = waves.double().numpy()
    result = Synchrony(
        126,
        shares,
        shares[own],
        shares.argmax(axis=1),
        shares @ shares.T,
        Shuffled(0.5, 0.1, 0.01, p_value),
        Shuffled(0.5, 0.1, 0.01, p_value),
        1.0,
        0.1,
    )
    assert result.num_peaks_at_own == num_at_own
    pattern = re.escape(expected).replace(r"\.\*", ".*")
    assert re.search(pattern, synchrony._finding(result))


def flatten(monkeypatch: pytest.MonkeyPatch, calls: tuple[int, ...]) -> None:
    """Makes conv1's latents the same for every class, at those calls of class_means."""
    real, num_calls = latents.class_means, itertools.count()

    def class_means(*args, **kwargs) -> latents.ClassMeans:
        found = real(*args, **kwargs)
        if next(num_calls) in calls:
            found.means["conv1"][:] = 1.0
        return found

    monkeypatch.setattr(latents, "class_means", class_means)


def test_a_block_without_spectra_is_a_gap(monkeypatch: pytest.MonkeyPatch, error_line) -> None:
    flatten(monkeypatch, (0, 2, 3, 4))
    command = ["analyze", "synchrony", "lls", "--images", "all", "--out", "gap"]
    assert main(command) == 0
    blocks = read_figure("gap", "synchrony-linear1-all")["numbers"]["blocks"]
    assert blocks[0]["index"] is None
    assert blocks[0]["before_training"]["index"]["value"] > 0
    assert blocks[1]["index"]["value"] > 0
    line = error_line([*command, "--block", "conv1"])
    assert "block conv1: the latents of some classes do not differ" in line
    semantics = ["analyze", "semantics", "lls", "--of", "latents", "--groups", "groups.json"]
    assert main([*semantics, "--out", "gap"]) == 0
    blocks = read_figure("gap", "semantics-linear1-latents-groups")["numbers"]["blocks"]
    assert [each["silhouette"] is None for each in blocks] == [True, False, False, False]
    assert "block conv1: the vectors of some classes" in error_line(
        [*semantics, "--block", "conv1"]
    )


def test_an_untrained_block_without_spectra_is_a_gap_too(monkeypatch: pytest.MonkeyPatch) -> None:
    flatten(monkeypatch, (1,))
    command = ["analyze", "synchrony", "lls", "--images", "all", "--block", "conv1"]
    assert main([*command, "--out", "gap"]) == 0
    document = read_figure("gap", "synchrony-conv1-all")
    assert document["numbers"]["blocks"][0]["before_training"] is None
    assert "Before training" not in document["caption"]


def test_semantics(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyze", "semantics", "mxm", "--groups", "groups.json", "--data-dir", "no"]) == 0
    out = capsys.readouterr().out
    document = read_figure("mxm/figures", "semantics-linear1-groups")
    assert document["caption"] in out
    numbers = document["numbers"]
    assert numbers["groups"][:3] == ["round", "straight", "both"]
    assert np.shape(numbers["points"]) == (10, 2)
    assert numbers["perplexity"] == 3
    score = numbers["blocks"][3]["silhouette"]
    assert f"the silhouette by group is {score['value']:.3f}" in document["caption"]
    assert f"of the points drawn it is {numbers['silhouette_of_points']['value']:.3f}" in out


def test_semantics_of_latents_of_a_rule_without_m() -> None:
    command = ["analyze", "semantics", "bp", "--of", "latents", "--block", "conv1"]
    assert main([*command, "--groups", "groups.json", "--limit", "60"]) == 0
    document = read_figure("bp/figures", "semantics-conv1-latents-groups")
    assert document["numbers"]["of"] == "latents"
    assert "the paper" not in document["caption"]


@pytest.mark.parametrize(
    ("groups", "value", "p_value", "expected"),
    [
        ("aabb", 0.9, 0.01, "There are too few classes to tell whether that is chance."),
        ("aaabbbb", 0.9, 0.1, "That is not told from chance at p < 0.05: it does not show"),
        ("aaaabbb", -0.1, 0.01, "Classes of a group lie closer than by chance, though on average"),
        (
            "aaaabbb",
            0.3,
            0.01,
            "Classes of a group lie close together, more than by chance, as",
        ),
    ],
)
def test_what_a_silhouette_says(groups: str, value: float, p_value: float, expected: str) -> None:
    score = Shuffled(value, 0.0, 0.1, p_value)
    assert _verdict(score, list(groups), "as the paper says").startswith(expected)


@pytest.mark.parametrize(
    ("of", "run", "groups", "expected"),
    [
        ("modulation", "mxm", [*CIFAR100], "as the paper says"),
        ("modulation", "mxm", [*CIFAR10], "as the paper says of CIFAR-100's superclasses"),
        ("latents", "mxm", [*CIFAR100], "though the paper says so of M, not of latents"),
        ("latents", "lls", [*CIFAR100], "which the data brings about without M"),
        ("latents", "bp", [*CIFAR100], "which the data brings about without M"),
    ],
)
def test_what_the_paper_says_of_it(of: str, run: str, groups: list[str], expected: str) -> None:
    assert _saying(of, open_run(run, "cpu").views()[-1], groups) == expected


def test_semantics_knows_cifar10_by_its_names(make_folder) -> None:
    names = sorted([*CIFAR10["animals"], *CIFAR10["vehicles"]])
    data = make_folder(classes=tuple(names), per_class=4)
    flags = ["--dataset", "folder", "--data-dir", str(data), "--rule", "lls-mxm", "--epochs", "1"]
    assert main(["train", *flags, "--quiet", "--out", "cifar"]) == 0
    assert main(["analyze", "semantics", "cifar"]) == 0
    numbers = read_figure("cifar/figures", "semantics-linear1")["numbers"]
    assert numbers["groups"] == ["vehicles"] * 2 + ["animals"] * 6 + ["vehicles"] * 2


def test_gradcam_of_test_images(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("captum")
    command = ["analyze", "gradcam", "mxm", "--beside", "bp", "--check", "65", "--num-images", "3"]
    assert main(command) == 0
    document = read_figure("mxm/figures", "gradcam-conv3-beside-bp")
    assert document["caption"] in capsys.readouterr().out
    drawn = (
        "Grad-CAM for the predicted class: of 65 test images drawn at random, the first 2 that the "
        "first network (smallconv, lls-mxm, digits) classifies rightly and the first that it "
        "classifies wrongly."
    )
    assert drawn in document["caption"]
    numbers = document["numbers"]
    assert numbers["num_checked"] == 65
    assert numbers["seed"] == 0
    assert numbers["images"] is None
    # The true classes are those of the test images that are named.
    test = open_run("mxm", "cpu").load_data(None, None, None).test
    assert test.labels[numbers["test_images"]].tolist() == [*map(int, numbers["true_classes"])]
    predicted = numbers["runs"][0]["predicted"]
    assert [a == b for a, b in zip(predicted, numbers["true_classes"], strict=True)] == [
        True,
        True,
        False,
    ]
    assert [run["run"] for run in numbers["runs"]] == ["mxm", "bp"]
    for run in numbers["runs"]:
        drop = run["drop_hottest"] - run["drop_other"]
        assert run["excess_over_other"]["value"] == pytest.approx(drop)
        assert all(0 <= probability <= 1 for probability in run["probability"])
        assert 0 <= run["mean_positive_share"] <= 1
        assert run["epochs"] == 2
        change = f"changes the probability by {-100 * run['drop_hottest']:+.1f} points"
        assert f"{change} on average (65 images)" in document["caption"]


def test_gradcam_of_files_as_predict_sees_them(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("captum")
    assert main(["predict", "lls", "a.png", "b.png", "--json"]) == 0
    answers = [row["predictions"][0] for row in json.loads(capsys.readouterr().out)]
    assert main(["analyze", "gradcam", "lls", "a.png", "b.png", "--block", "conv1"]) == 0
    document = read_figure("lls/figures", "gradcam-conv1-a-b")
    assert "Of so few images that can't be told from chance" in document["caption"]
    assert "predicted class: 2 image files." in document["caption"]
    assert "the paper" not in document["caption"]
    (run,) = document["numbers"]["runs"]
    assert run["predicted"] == [answer["class"] for answer in answers]
    assert run["probability"] == pytest.approx([answer["probability"] for answer in answers])

    assert main(["analyze", "gradcam", "lls", "a.png", "--target", "7", "--seed", "3"]) == 0
    document = read_figure("lls/figures", "gradcam-conv3-target-7-a")
    assert document["caption"].startswith("Grad-CAM for 7: 1 image file.")
    assert "on average (1 image), by" in document["caption"]
    numbers = document["numbers"]
    assert numbers["target"] == "7"
    assert numbers["images"] == ["a.png"]
    assert numbers["test_images"] is None
    assert numbers["runs"][0]["drop_other"] is None


def test_a_run_from_a_gpu_is_looked_at_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its device nor its backend is asked for."""
    real = synchrony.open_run

    def open_run(run: str, device: str) -> Opened:
        opened = real(run, device)
        config = opened.trained.config
        settings = replace(config.settings, device="cuda", backend="triton")
        trained = replace(opened.trained, config=replace(config, settings=settings))
        return replace(opened, trained=trained)

    monkeypatch.setattr(synchrony, "open_run", open_run)
    command = ["analyze", "synchrony", "lls", "--images", "all", "--device", "cpu"]
    assert main([*command, "--out", "gpu"]) == 0
    read_figure("gpu", "synchrony-linear1-all")


def test_layers(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["analyze", "layers", "lls", "--out", "two words"]
    assert main(command) == 0
    document = read_figure("two words", "layers")
    assert document["command"] == shlex.join(["locallearn", *command])
    assert document["epochs"] == 2
    assert document["caption"] in capsys.readouterr().out
    numbers = document["numbers"]
    summary = json.loads(Path("lls/summary.json").read_text())
    assert numbers["test_acc"] == pytest.approx(summary["test_acc"])
    assert numbers["network_test_acc"] == summary["test_acc_per_epoch"]
    assert numbers["epochs"] == [1, 2]
    assert list(numbers["test_acc_by_block"]) == ["conv1", "conv2", "conv3", "linear1"]
    # Ten classes: what has learned is far above a tenth.
    assert numbers["test_acc_by_block"]["linear1"] > 30


FALL = "It falls from block to block. "
BEATEN = "The last block's own head is right more often than the classifier behind it. "


@pytest.mark.parametrize(
    ("accuracies", "network", "expected"),
    [
        ([50.0], 60.0, ""),
        ([50.0], 40.0, ""),
        ([50.0, 60.0, 70.0], 71.0, "It rises from block to block. "),
        ([50.0, 60.0, 70.0], 69.0, f"It rises from block to block. {BEATEN}"),
        ([60.0, 50.0], 55.0, FALL),
        ([60.0, 50.0, 40.0], 55.0, FALL),
        ([50.0, 50.0], 50.0, "It stays the same from block to block. "),
        (
            [50.01, 50.04],
            50.0,
            "It stays the same from block to block. ",
        ),  # as it is printed
        ([50.0, 60.0, 55.0], 60.0, "It falls at c and rises at b. "),
        (
            [50.0, 60.0, 55.0, 65.0],
            70.0,
            "It falls at c and rises at every other step. ",
        ),
        ([60.0, 50.0, 50.0], 60.0, "It falls at b and stays the same at c. "),
        (
            [50.0, 60.0, 60.0, 65.0],
            70.0,
            "It stays the same at c and rises at every other step. ",
        ),
        (
            [50.0, 60.0, 60.0, 55.0],
            70.0,
            "It falls at d, stays the same at c and rises at b. ",
        ),
    ],
)
def test_the_course_of_accuracy_in_words(
    accuracies: list[float], network: float, expected: str
) -> None:
    course = describe_course(dict(zip("abcd", accuracies, strict=False)), network)
    assert course == expected.replace("It ", "The heads' accuracy ")


def test_an_interrupted_run_is_shown_as_it_is(runs: Path) -> None:
    summary = Path("mxm/summary.json")
    content = summary.read_text()
    summary.unlink()
    try:
        assert main(["analyze", "layers", "mxm", "--out", "partial"]) == 0
    finally:
        summary.write_text(content)
    numbers = read_figure("partial", "layers")["numbers"]
    assert numbers["test_acc"] == pytest.approx(json.loads(content)["test_acc"])


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["analyze"], ["analyze", "--help"]):
        assert main(arguments) == 0
        out = capsys.readouterr().out
        assert all(name in out for name in ("synchrony", "semantics", "gradcam", "layers"))
    assert main(["analyze", "gradcam", "-h"]) == 0
    assert "--beside" in capsys.readouterr().out


SYNCHRONY, SEMANTICS = ["analyze", "synchrony"], ["analyze", "semantics"]
GRADCAM, LAYERS = ["analyze", "gradcam"], ["analyze", "layers"]
BAD_INPUT = [
    ([*SYNCHRONY, "nowhere"], "nowhere is no directory; expected a run directory"),
    ([*SYNCHRONY, "."], r"is no run directory: it holds no config.json"),
    ([*SYNCHRONY, "lls", "--block", "conv9"], "unknown block 'conv9'. .* conv1, conv2, conv3, lin"),
    ([*SYNCHRONY, "lls", "--classes", "3,x"], "unknown class 'x'. .* 0, 1, 2"),
    ([*SYNCHRONY, "lls", "--classes", "3"], "--classes takes two to 4 classes, got 1"),
    ([*SYNCHRONY, "lls", "--images", "some"], "unknown choice of --images 'some'"),
    ([*SYNCHRONY, "lls", "--limit", "0"], "--limit must be at least 1, got 0"),
    ([*SYNCHRONY, "lls", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
    ([*SYNCHRONY, "lls", "--images", "all", "--limit", "5"], "there is no test image of: "),
    ([*SYNCHRONY, "lls", "--limit", "5"], "no test image is classified rightly as: .*--images all"),
    ([*SYNCHRONY, "lls", "--out", "a.png"], "--out a.png is a file; give a directory"),
    ([*SYNCHRONY, "lls", "--out", ""], "--out is empty"),
    ([*SYNCHRONY, "lls", "--seed", "-1"], "--seed"),
    ([*SYNCHRONY, "bp"], "rule 'bp' compares latents with no waves. Give --basis cosine or square"),
    ([*SYNCHRONY, "random"], "the run's basis is random and has no frequencies. Give --basis"),
    ([*SYNCHRONY, "lls", "--basis", "random"], "a random basis has no frequencies"),
    ([*SYNCHRONY, "lls", "--basis", "sine"], "unknown basis 'sine'"),
    ([*SEMANTICS, "mxm"], "known of CIFAR-10 and CIFAR-100 alone; give --groups"),
    (
        [*SEMANTICS, "lls", "--groups", "groups.json"],
        "no M .* lls-mxm, lls-mxm-reduced. Use",
    ),
    ([*SEMANTICS, "mxm", "--groups", "none.csv"], "--groups none.csv does not exist"),
    ([*SEMANTICS, "mxm", "--of", "rows"], "unknown choice of --of 'rows'"),
    ([*GRADCAM, "lls", "broken.png"], "unreadable images: broken.png"),
    ([*GRADCAM, "lls", "none.png"], "no such image files: none.png"),
    ([*GRADCAM, "lls", "--block", "linear1"], "no convolutional block 'linear1'. .* conv1, conv2"),
    ([*GRADCAM, "lls", "--target", "x"], "unknown class 'x'"),
    ([*GRADCAM, "lls", "--target", "1,2"], "--target takes one class, got '1,2'"),
    ([*GRADCAM, "lls", "--num-images", "0"], "--num-images must be at least 1, got 0"),
    ([*GRADCAM, "lls", "--beside", "nowhere"], "nowhere is no directory"),
    ([*LAYERS, "bp"], "rule 'bp' has no local heads with logits, .* lls, lls-m, .* unless sim"),
    ([*LAYERS, "lls", "--device", "gpu"], "unknown device 'gpu'"),
    (["analyze", "synchrny", "lls"], "synchrny.* See `locallearn analyze --help`"),
    ([*LAYERS, "lls", "--blok", "x"], "--blok.* See `locallearn analyze layers --help`"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), BAD_INPUT, ids=[" ".join(row[0][1:]) for row in BAD_INPUT]
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if arguments[1] == "gradcam":
        pytest.importorskip("captum")
    before = sorted(Path().rglob("*"))
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    (line,) = captured.err.strip().splitlines()
    assert re.search("^Error: .*" + message, line), line
    assert sorted(Path().rglob("*")) == before


def test_what_is_not_installed_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "captum", None)
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    assert main(["analyze", "gradcam", "lls"]) == 2
    assert "Grad-CAM needs captum: pip install 'locallearn[gradcam]'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["analyze", "layers", "lls"]) == 2
    assert "drawn by matplotlib: pip install 'locallearn[plot]'" in capsys.readouterr().err


def test_runs_on_other_data_are_not_put_beside(
    make_folder, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("captum")
    flags = ["--dataset", "folder", "--data-dir", str(make_folder()), "--epochs", "1", "--quiet"]
    assert main(["train", *flags, "--out", "other"]) == 0
    assert main(["analyze", "gradcam", "lls", "--beside", "other"]) == 2
    assert "--beside other was trained on other data: its classes differ" in capsys.readouterr().err
    assert main(["train", "--epochs", "1", "--limit-test", "90", "--quiet", "--out", "fewer"]) == 0
    capsys.readouterr()
    assert main(["analyze", "gradcam", "lls", "--beside", "fewer"]) == 2
    assert "--beside fewer has other test images than lls. Give" in capsys.readouterr().err


def test_which_images_are_shown() -> None:
    lls = open_run("lls", "cpu")
    whose = "smallconv, lls, digits"
    assert _drawn([lls], 9, 3, 0) == (
        f"of 9 test images drawn at random, the first 3 that {whose} classifies rightly"
    )
    assert _drawn([lls], 1, 0, 1) == (
        f"of 1 test image drawn at random, the first that {whose} classifies wrongly"
    )


def test_a_share_of_positive_heat() -> None:
    """Of ten pixels one is positive in the first map, four in the second."""
    heat = -torch.ones(2, 1, 10)
    heat[0, 0, :1] = heat[1, 0, :4] = 1
    drops = torch.zeros(2, dtype=torch.float64)
    numbers = _Explained(drops, drops, heat, Deletion(drops, drops, drops)).numbers()
    assert numbers["mean_positive_share"] == pytest.approx(0.25)
    assert numbers["num_with_less_positive_than_deleted"] == 1


def test_a_run_stopped_in_an_epoch(error_line, capsys: pytest.CaptureFixture[str]) -> None:
    """BatchNorm's statistics are estimated anew; where there is no data for it, that is said."""
    pytest.importorskip("captum")
    trainer = Trainer.start(TrainConfig(epochs=3, limit_test=100), Path("cut"), QuietObserver())
    trainer.request_stop(2)
    with pytest.raises(Interrupted):
        trainer.fit()
    opened = open_run("cut", "cpu")
    assert opened.num_epochs == 0
    before = copy.deepcopy(opened.learner.model.state_dict())
    dataset = opened.load_data(None, None, None)
    after = opened.learner.model.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed
    assert all("running_" in name or "num_batches" in name for name in changed)
    loader = opened.test_loader(dataset, 256)
    _, accuracy = head_accuracies(opened.learner, opened.views(), loader.epoch())
    assert main(["evaluate", "cut", "--json", "cut.json"]) == 0
    assert accuracy == pytest.approx(json.loads(Path("cut.json").read_text())["accuracy"])
    capsys.readouterr()
    line = error_line(["analyze", "gradcam", "cut", "a.png"])
    assert "cut was stopped in the middle of an epoch" in line
