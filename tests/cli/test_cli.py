"""The command line as a user meets it: output, exit codes, one-line errors."""

from __future__ import annotations

import json
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from locallearn import list_models, list_rules
from locallearn.cli import main
from locallearn.data import list_datasets
from locallearn.engine.run import load_checkpoint
from locallearn.kernels import BACKENDS, backends

SMALL = ["--epochs", "2", "--limit-train", "400", "--limit-test", "60"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")


def assert_one_line_error(code: int, captured) -> str:
    assert code == 2
    assert "Traceback" not in captured.err + captured.out
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("Error: ")
    return lines[0]


def test_train_with_defaults_prints_lines_and_a_result(capsys) -> None:
    assert main(["train", *SMALL]) == 0
    out = capsys.readouterr().out
    assert "digits: 400 training images, 60 test images, 10 classes, 1x8x8" in out
    assert "lls, square basis (official)" in out
    assert len(re.findall(r"^epoch [12]/2  loss .* test .* images/s  blocks ", out, re.M)) == 2
    assert re.search(r"^test accuracy \d+\.\d+ % after 2 epochs", out, re.M)
    (run,) = Path("runs").iterdir()
    assert f"written to {run}" in out
    assert re.fullmatch(r"\d{8}-\d{6}-digits-smallconv-lls", run.name)


def test_quiet_prints_the_result_alone(capsys) -> None:
    assert main(["train", *SMALL, "--quiet", "--out", "run"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_every_rule_trains_from_the_command_line() -> None:
    for rule in list_rules():
        arguments = ["--epochs", "1", "--limit-train", "64", "--limit-test", "20", "--quiet"]
        assert main(["train", "--rule", rule, "--out", rule, *arguments]) == 0
        assert json.loads(Path(rule, "summary.json").read_text())["rule"] == rule


def test_flags_reach_the_run() -> None:
    flags = {
        "--rule": "lls-mxm-reduced",
        "--basis": "cosine",
        "--setting": "paper",
        "--num-waves": 5,
        "--temperature": 0.7,
        "--label-smoothing": 0.1,
        "--batch-size": 64,
        "--test-batch-size": 32,
        "--lr": 0.01,
        "--optimizer": "adamw",
        "--weight-decay": 0.001,
        "--schedule": "multistep",
        "--augment": "basic",
        "--dropout": 0.1,
        "--val-split": 0.1,
        "--precision": "bf16",
        "--device": "cpu",
        "--num-threads": 1,
        "--seed": 7,
        "--epochs": 1,
        "--limit-train": 128,
        "--limit-test": 30,
    }
    given = [str(part) for pair in flags.items() for part in pair]
    assert main(["train", *given, "--no-channels-last", "--quiet", "--out", "run"]) == 0
    settings = json.loads(Path("run/config.json").read_text())["settings"]
    for name, value in flags.items():
        assert settings[name[2:].replace("-", "_")] == value, name
    assert settings["channels_last"] is False


def test_resume_of_a_finished_run_says_so(capsys) -> None:
    main(["train", *SMALL, "--quiet", "--out", "run"])
    before = {p: p.stat().st_mtime_ns for p in Path("run").iterdir()}
    capsys.readouterr()
    assert main(["train", "--resume", "run"]) == 0
    assert re.match(r"run is finished: test accuracy [\d.]+ %", capsys.readouterr().out)
    assert {p: p.stat().st_mtime_ns for p in Path("run").iterdir()} == before


LONG = ["--epochs", "6", "--num-threads", "1"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    path = tmp_path_factory.mktemp("whole") / "run"
    assert main(["train", *LONG, "--out", str(path), "--quiet"]) == 0
    return path


SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGKILL]


class Ended(NamedTuple):
    """What a program left."""

    path: Path
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def signalled(tmp_path_factory: pytest.TempPathFactory) -> dict[signal.Signals, Ended]:
    """Runs at the same time, as each takes seconds to start, told to stop in their second epoch."""
    folder = tmp_path_factory.mktemp("signalled")
    processes = {
        number: subprocess.Popen(
            [sys.executable, "-m", "locallearn", "train", *LONG, "--out", number.name],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
        )
        for number in SIGNALS
    }
    waiting, deadline = set(SIGNALS), time.monotonic() + 120
    try:
        while waiting:
            assert time.monotonic() < deadline, f"no checkpoints of {waiting}"
            for number in [n for n in waiting if (folder / n.name / "checkpoint.pt").exists()]:
                processes[number].send_signal(number)
                waiting.remove(number)
            for process in (processes[number] for number in waiting):
                assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        outputs = {number: p.communicate(timeout=120) for number, p in processes.items()}
    finally:
        for process in processes.values():
            process.kill()
    return {n: Ended(folder / n.name, processes[n].returncode, *outputs[n]) for n in SIGNALS}


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signalled_run_resumes_to_what_it_would_have_been(
    number: signal.Signals,
    whole: Path,
    signalled: dict[signal.Signals, Ended],
) -> None:
    cut, code, out, err = signalled[number]
    if number == signal.SIGKILL:
        assert code == -number
    else:
        assert code == 128 + number
        assert f"Continue with: locallearn train --resume {cut.name}" in err
        assert "Traceback" not in err
    assert not (cut / "summary.json").exists(), out
    assert main(["train", "--resume", str(cut)]) == 0
    one, two = (load_file(path / "model.safetensors") for path in (whole, cut))
    assert all(torch.equal(one[name], two[name]) for name in one)
    states = [load_checkpoint(path / "checkpoint.pt")["learner"] for path in (whole, cut)]
    torch.testing.assert_close(*(s["optimizers"] for s in states), rtol=0, atol=0)


def test_evaluate_and_predict(capsys, make_folder) -> None:
    root = make_folder(per_class=12)
    arguments = ["--dataset", "folder", "--data-dir", str(root), "--epochs", "6", "--lr", "0.01"]
    assert main(["train", *arguments, "--batch-size", "8", "--quiet", "--out", "run"]) == 0
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["test_acc"] > 90

    capsys.readouterr()
    assert main(["evaluate", "run", "--json", "e.json", "--plot", "c.png"]) == 0
    out = capsys.readouterr().out
    assert f"accuracy {summary['test_acc']:.2f} %" in out
    assert "apple" in out
    report = json.loads(Path("e.json").read_text())
    assert report["accuracy"] == pytest.approx(summary["test_acc"])
    assert report["loss"] == pytest.approx(summary["test_loss"], rel=1e-5)
    assert sum(map(sum, report["confusion"])) == report["num_images"] == 36
    assert Path("c.png").read_bytes().startswith(b"\x89PNG")
    assert main(["evaluate", "run/checkpoint.pt", "--split", "train"]) == 0
    assert "on 36 train images" in capsys.readouterr().out

    images = [str(root / "test" / name / "000.png") for name in ("plum", "apple")]
    assert main(["predict", "run", *images, "--json", "--top", "2"]) == 0
    answers = json.loads(capsys.readouterr().out)
    assert [a["predictions"][0]["class"] for a in answers] == ["plum", "apple"]
    assert [len(a["predictions"]) for a in answers] == [2, 2]
    assert main(["predict", "run", *images]) == 0
    assert "plum" in capsys.readouterr().out


def test_evaluate_of_many_classes_lists_confusions(capsys, make_folder) -> None:
    root = make_folder(classes=tuple(f"c{i:02d}" for i in range(24)), per_class=2)
    arguments = ["--dataset", "folder", "--data-dir", str(root), "--epochs", "1", "--quiet"]
    assert main(["train", *arguments, "--out", "run"]) == 0
    assert main(["evaluate", "run"]) == 0
    out = capsys.readouterr().out
    assert "accuracy by class" in out
    assert "most frequent confusions" in out


def test_evaluate_of_a_run_stopped_in_an_epoch(capsys) -> None:
    from locallearn.cli.console import QuietObserver
    from locallearn.engine import Interrupted, TrainConfig, Trainer

    trainer = Trainer.start(TrainConfig(epochs=3), Path("run"), QuietObserver())
    trainer.request_stop(2)
    with pytest.raises(Interrupted):
        trainer.fit()
    assert main(["evaluate", "run"]) == 0
    assert "accuracy" in capsys.readouterr().out
    code = main(["predict", "run", "x.png"])
    assert "stopped in the middle of an epoch" in assert_one_line_error(code, capsys.readouterr())


@pytest.mark.parametrize(
    "flags",
    [
        {"--rule": "local-losses", "--local-loss": "predsim"},
        {"--rule": "local-losses", "--similarity": 2.0},
        {"--rule": "lls-mxm", "--m-start": "identity"},
        {"--rule": "pepita", "--update-order": "end", "--feedback-scale": 0.1},
        {"--rule": "bp", "--bp-memory": "accumulate:3"},
        {"--rule": "lls", "--group-blocks": 2, "--width": 0.5},
        {"--rule": "drtp", "--activation": "relu", "--norm": "none"},
    ],
    ids=lambda flags: " ".join(map(str, flags.values())),
)
def test_flags_of_rules_and_blocks_reach_the_run_and_its_evaluation(flags, capsys) -> None:
    given = [str(part) for pair in flags.items() for part in pair]
    small = ["--epochs", "1", "--limit-train", "64", "--limit-test", "20"]
    assert main(["train", *given, *small, "--out", "run"]) == 0
    out = capsys.readouterr().out
    settings = json.loads(Path("run/config.json").read_text())["settings"]
    for name, value in flags.items():
        assert settings[name[2:].replace("-", "_")] == value, name
    assert main(["evaluate", "run"]) == 0
    trained = re.search(r"test accuracy (\S+) %", out)
    assert trained is not None
    assert f"accuracy {trained[1]} %" in capsys.readouterr().out


def test_the_start_tells_the_options_of_the_rule(capsys) -> None:
    small = ["--epochs", "1", "--limit-train", "64", "--limit-test", "20"]
    flags = ["--rule", "local-losses", "--local-loss", "predsim", "--group-blocks", "2"]
    assert main(["train", *flags, *small]) == 0
    out = capsys.readouterr().out
    assert "rule     local-losses, local-loss predsim, group-blocks 2\n" in out
    assert main(["train", "--rule", "dfa", *small]) == 0
    assert "autograd in each block, once the output's error is known" in capsys.readouterr().out
    assert main(["train", "--rule", "pepita", *small]) == 0
    assert "layer by layer, in a second forward" in capsys.readouterr().out


def test_the_usual_optimizer_is_the_rules(capsys) -> None:
    small = ["--epochs", "1", "--limit-train", "64", "--limit-test", "20", "--quiet"]
    usual = {"pepita": ("sgd", 0.01), "lls": ("schedulefree-adamw", 0.005)}
    for rule, (optimizer, lr) in usual.items():
        assert main(["train", "--rule", rule, *small, "--out", rule]) == 0
        settings = json.loads(Path(rule, "config.json").read_text())["settings"]
        assert (settings["optimizer"], settings["lr"]) == (optimizer, lr)
    assert main(["train", "--rule", "pepita", "--optimizer", "sgd", *small, "--out", "own"]) == 0
    assert json.loads(Path("own", "config.json").read_text())["settings"]["lr"] == 0.01


def test_list(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "240")
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    for name in [*list_models(), *list_rules(), *list_datasets()]:
        assert name in out
    assert main(["list", "rules"]) == 0
    out = capsys.readouterr().out
    assert "M, K x K numbers" in out
    assert "own output, label" in out
    assert "later weights" in out
    assert "as the tests measure it by perturbation" in out
    assert "smallconv" not in out


def test_doctor(capsys) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for word in ("torch", "triton", "C++ compiler", "CUDA", "--device auto means"):
        assert word in out


def test_version_and_help(capsys) -> None:
    assert main(["--version"]) == 0
    assert re.fullmatch(r"locallearn \d+\.\d+\.\d+\n", capsys.readouterr().out)
    assert main([]) == 0
    assert "evaluate" in capsys.readouterr().out
    assert main(["train", "--help"]) == 0
    assert "--label-smoothing" in capsys.readouterr().out


def text_file(path: str) -> str:
    Path(path).write_text("no image")
    return path


BAD_INPUT = [
    (["train", "--model", "smalconv"], r"unknown model 'smalconv'. Did you mean 'smallconv'\?"),
    (["train", "--rule", "lsl"], r"unknown rule 'lsl'. Did you mean 'lls'\? Valid: bp, dfa"),
    (["train", "--dataset", "cifar"], r"unknown dataset 'cifar'. Did you mean 'cifar10'"),
    (["train", "--basis", "sine"], r"unknown basis 'sine'"),
    (["train", "--augment", "lots"], r"unknown augmentation 'lots'. .*basic, none, standard"),
    (["train", "--dataset", "folder"], r"needs --data-dir"),
    (["train", "--dataset", "folder", "--data-dir", "nowhere"], r"nowhere does not exist"),
    (["train", "--dataset", "folder", "--data-dir", "."], r"holds no class folders"),
    (["train", "--batch-size", "0"], r"--batch-size must be at least 1, got 0"),
    (["train", "--epochs", "-1"], r"--epochs must be at least 1, got -1"),
    (["train", "--epochs", "many"], r"--epochs.*See `locallearn train --help`"),
    (["train", "--speed", "11"], r"--speed.*See `locallearn train --help`"),
    (["train", "--limit-train", "0"], r"--limit-train must be at least 1"),
    (["train", "--model", "vgg8"], r"images of 8x8 pixels are too small for vgg8"),
    (["train", "--resume", "nowhere"], r"nowhere is no directory"),
    (["train", "--resume", "."], r"is no run directory: it holds no config.json"),
    (["train", "--resume", "a", "--out", "b"], r"--resume and --out exclude each other"),
    (["train", "--out", "/proc/none"], r"can't use /proc/none: .* What was written before is who"),
    (["train", "--rule", "bp", "--basis", "square"], r"rule 'bp' has no option 'basis'"),
    (["train", "--bp-memory", "checkpoint"], r"rule 'lls' has no option 'bp_memory'; it has:"),
    (["train", "--rule", "bp", "--bp-memory", "less"], r"unknown bp_memory 'less'. Valid: plain"),
    (["train", "--rule", "bp", "--group-blocks", "2"], r"rule 'bp' has no such heads"),
    (["train", "--group-blocks", "0"], r"--group-blocks must be at least 1, got 0"),
    (["train", "--activation", "sigmoid"], r"unknown activation 'sigmoid'"),
    (["train", "--norm", "layer"], r"unknown norm 'layer'"),
    (["train", "--width", "0"], r"--width must be above 0, got 0"),
    (["evaluate", "nowhere"], r"nowhere does not exist; give a run directory or a file of one"),
    (["evaluate", "text.pt"], r"text.pt can't be read: it is truncated or no checkpoint"),
    (["evaluate", "text.safetensors"], r"is truncated or no safetensors file"),
    (["predict", "text.pt", "x.png"], r"text.pt can't be read"),
    (["list", "modles"], r"unknown kind 'modles'. Did you mean 'models'"),
    (["trian"], r"trian"),
]
if not torch.cuda.is_available():
    BAD_INPUT.append((["train", "--device", "cuda"], r"--device cuda: .* sees no such device"))


@pytest.mark.parametrize(
    ("arguments", "message"), BAD_INPUT, ids=[" ".join(row[0]) for row in BAD_INPUT]
)
def test_bad_input_is_one_line_and_leaves_nothing(arguments, message, capsys, tmp_path) -> None:
    for name in ("text.pt", "text.safetensors"):
        text_file(name)
    before = sorted(tmp_path.rglob("*"))
    code = main(arguments)
    line = assert_one_line_error(code, capsys.readouterr())
    assert re.search(message, line), line
    assert sorted(tmp_path.rglob("*")) == before


def test_errors_of_a_run(capsys, make_folder) -> None:
    main(["train", *SMALL, "--quiet", "--out", "run"])
    capsys.readouterr()
    for arguments, message in (
        (["train", "--out", "run"], r"run already holds a run"),
        (["evaluate", "run", "--split", "val"], r"held no validation images out"),
        (["evaluate", "run", "--split", "tests"], r"unknown split 'tests'"),
        (["evaluate", "run", "--batch-size", "0"], r"--batch-size must be at least 1"),
        (["evaluate", "run", "--plot", "c.xyz"], r"c.xyz can't be drawn: "),
        (["evaluate", "run", "--plot", "."], r"--plot . is a directory; give a file"),
        (["evaluate", "run", "--json", "no/e.json"], r"--json no/e.json: there is no directory no"),
        (["train", "--resume", "run", "--epochs", "9"], r"other settings: --epochs \(run: 2, give"),
        (["train", "--out", ""], r"--out is empty"),
        (["predict", "run", "nothing.png"], r"no such image files: nothing.png"),
        (["predict", "run", text_file("fake.png")], r"unreadable images: fake.png"),
        (["predict", "run", "x.png", "--top", "0"], r"--top must be at least 1"),
    ):
        line = assert_one_line_error(main(arguments), capsys.readouterr())
        assert re.search(message, line), line
    Path("run/summary.json").unlink()
    code = main(["train", "--resume", "run", "--lr", "0.1", "--seed", "0"])
    line = assert_one_line_error(code, capsys.readouterr())
    assert "made with other settings: --lr (run: 0.005, given: 0.1). Leave" in line


def test_evaluate_on_data_of_another_shape(capsys, make_folder) -> None:
    root, other = make_folder("one"), make_folder("two", sizes=((12, 14),))
    arguments = ["--dataset", "folder", "--data-dir", str(root), "--epochs", "1", "--quiet"]
    assert main(["train", *arguments, "--out", "run"]) == 0
    capsys.readouterr()
    code = main(["evaluate", "run", "--data-dir", str(other)])
    line = assert_one_line_error(code, capsys.readouterr())
    assert "image_size (12, 14), the network was trained with (12, 12)" in line


def test_relative_data_and_odd_names(capsys, make_folder, monkeypatch, tmp_path) -> None:
    """Resumed from another folder; class names that rich or the terminal would trip over."""
    make_folder("d", classes=("[bold", "[red]", "\u9b5a"))
    arguments = ["--dataset", "folder", "--data-dir", "d", "--epochs", "2", "--quiet"]
    assert main(["train", *arguments, "--out", "run"]) == 0
    Path("run/summary.json").write_text("{")  # as a crash of the machine may leave it
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert main(["train", "--resume", "../run"]) == 0
    assert json.loads(Path("../run/summary.json").read_text())["epochs"] == 2
    capsys.readouterr()
    assert main(["evaluate", "../run"]) == 0
    image = next((tmp_path / "d" / "test" / "[red]").iterdir())
    assert main(["predict", "../run", str(image), "--top", "3"]) == 0
    out = capsys.readouterr().out
    assert out.count("[bold") == 3
    assert "[red]" in out


def test_a_full_disk_is_one_line_and_can_be_resumed(capsys) -> None:
    """The file size limit stands for the disk: the first checkpoint does not fit."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600 * 1024, limits[1]))
    try:
        code = main(["train", "--out", "run", "--epochs", "1", "--quiet"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert re.match(
        r"Error: can't use run/checkpoint.pt: File too large. What was written before",
        assert_one_line_error(code, capsys.readouterr()),
    )
    assert sorted(p.name for p in Path("run").iterdir()) == ["config.json", "tensorboard"]
    assert main(["train", "--resume", "run", "--quiet"]) == 0


def test_no_network_is_one_line(capsys, monkeypatch) -> None:
    import torchvision

    def refuse(self) -> None:
        raise RuntimeError("Error downloading\ntrain-images")

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", refuse)
    code = main(["train", "--dataset", "mnist", "--data-dir", "data"])
    assert "nor be downloaded" in assert_one_line_error(code, capsys.readouterr())
    assert not Path("data").exists()


# -- bench and cost -----------------------------------------------------------------------------


def test_cost_prints_a_table_and_writes_json(capsys) -> None:
    assert main(["cost", "--model", "smallconv", "--rules", "bp,lls-mxm", "--json", "c.json"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"smallconv\s+bp\s+9\.704\s+30\.9\s+361,770\s+0\s", out)
    assert re.search(r"smallconv\s+lls-mxm\s+0\.037\s+21\.2\s+361,770\s+400\s", out)
    document = json.loads(Path("c.json").read_text())
    assert [row["rule"] for row in document["rows"]] == ["bp", "lls-mxm"]
    assert document["rows"][0]["learning_signal_macs"] == 9_704_448


def test_cost_of_all_models(capsys) -> None:
    assert main(["cost", "--model", "all", "--rules", "lls"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in list_models())


BENCH = ["bench", "--batch-size", "4", "--image-size", "8", "--rounds", "2", "--device", "cpu"]


def test_bench_writes_gate_record_and_rows(capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    files = ["--json", "b.json", "--plot", "a bar chart.png"]
    command = [*BENCH, "--rules", "lls", "--backend", "reference", "--ops", *files]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert out.startswith("gate green")
    assert re.search(r"^lls \(reference\) .*\nlls \(autograd\) ", out, re.M)
    assert len(re.findall(r"^bp.*\*? ", out, re.M)) == 5
    document = json.loads(Path("b.json").read_text())
    assert document["gate"] == "green"
    assert document["record"]["command"] == shlex.join(["locallearn", *command])
    assert document["record"]["environment"]["device"] == "cpu"
    assert document["record"]["settings"]["batch_size"] == 4
    keys = {
        "rule",
        "path",
        "backend",
        "step_time_ms_median",
        "step_time_ms_p20",
        "step_time_ms_p80",
        "speedup_vs_tuned_bp_median",
        "images_per_second",
        "peak_activation_mib",
    }
    assert all(keys <= set(row) for row in document["rows"])
    assert {each["op"] for each in document["ops"]} >= {"block_forward", "weight gradient"}
    assert Path("a bar chart.png").read_bytes().startswith(b"\x89PNG")


def test_bench_of_two_backends(capsys, monkeypatch) -> None:
    """The reference under a second name stands in for the other."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr("locallearn.kernels.backends.BACKENDS", (*BACKENDS, "twin"))
    monkeypatch.setitem(backends._KERNELS, "twin", "reference")
    files = ["--json", "b.json", "--plot", "b.png"]
    command = [*BENCH, "--rules", "lls", "--backend", "reference, twin,reference", "--ops", *files]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert re.search(r"^  lls: twin  .*$", out, re.M)
    assert re.search(r"^lls \(reference\) .*\nlls \(twin\) ", out, re.M)
    assert re.search(r"^bp \(eager, reference update\)\*? ", out, re.M)
    assert re.search(r"^twin against reference, times faster .*: lls \d", out, re.M)
    rows = r"^layer .*\n  least .*\nchannel_stats, reference .*\nchannel_stats, twin .*\n  least "
    assert re.search(rows, out, re.M)
    document = json.loads(Path("b.json").read_text())
    assert document["record"]["settings"]["backend"] == "reference,twin"
    assert {"reference", "twin"} < {row["backend"] for row in document["rows"]}
    assert {"reference", "twin", "torch"} == {each["backend"] for each in document["ops"]}


@pytest.mark.parametrize(
    ("given", "device", "expected"),
    [
        ("auto", "cuda", ("triton", "cuda")),
        ("cuda,auto", "cuda", ("cuda", "triton")),
        ("reference,auto", "cuda", ("reference", "triton", "cuda")),
        ("reference", "cpu", ("reference",)),
    ],
)
def test_which_backends_bench_compares(given, device, expected, monkeypatch) -> None:
    from locallearn.cli.bench import _chosen_backends

    monkeypatch.setattr("locallearn.kernels.backends.missing_for", lambda *_: None)
    assert _chosen_backends(given, device) == expected


def test_a_red_gate_shows_no_figures_and_fails(capsys, monkeypatch) -> None:
    monkeypatch.setattr("locallearn.engine.benchmark._GATE_FLOOR_AT_ALL", {"fp32": -10.0})
    assert main([*BENCH, "--rules", "lls", "--backend", "reference", "--json", "b.json"]) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith("gate RED")
    assert "No figures" in captured.err
    document = json.loads(Path("b.json").read_text())
    assert (document["gate"], document["rows"]) == ("red", [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cost", "--rules", "lsl"], "unknown rule 'lsl'"),
        (["cost", "--rules", ","], "--rules is empty"),
        (["cost", "--precision", "fp8"], "unknown precision 'fp8'"),
        (["cost", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["cost", "--image-size", "2"], "smallconv"),
        (["bench", "--rules", "bp"], "rule 'bp' is no rule to compare"),
        (["bench", "--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["bench", "--batch-size", "1"], "--batch-size must be at least 2, got 1"),
        (["bench", "--backend", "autograd"], "bench compares the closed form"),
        (["bench", "--backend", "reference,autograd"], "bench compares the closed form"),
        (["bench", "--backend", ","], "--backend is empty; name one or more, separated by commas"),
        (["bench", "--backend", "numpy"], "unknown backend 'numpy'"),
        (["bench", "--backend", "cuda", "--device", "cpu"], "needs a CUDA device, and this is cpu"),
        (["bench", "--model", "vgg9"], "unknown model 'vgg9'"),
        (["train", "--backend", "tritn"], "unknown backend 'tritn'. Did you mean 'triton'"),
    ],
)
def test_bad_input_to_bench_and_cost(arguments: list[str], message: str, capsys) -> None:
    line = assert_one_line_error(main(arguments), capsys.readouterr())
    assert message in line


def test_the_start_tells_the_backend_and_why(capsys) -> None:
    assert main(["train", *SMALL, "--backend", "reference"]) == 0
    out = capsys.readouterr().out
    assert "update   closed form in 4 of 4 blocks, backend reference (as asked)" in out
    (run,) = Path("runs").iterdir()
    assert json.loads((run / "summary.json").read_text())["backend"] == "reference"
    assert json.loads((run / "config.json").read_text())["settings"]["backend"] == "reference"
