"""Settings as the command that gives them again."""

from __future__ import annotations

import hashlib
import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer

from locallearn import UserError
from locallearn.cli.main import app
from locallearn.engine import TrainConfig, list_optimizers
from locallearn.engine.config import (
    chosen_settings,
    data_name,
    differing_settings,
    model_name,
    train_command,
)
from locallearn.models import list_models
from locallearn.rules import build_rule, list_rules


def parse(command: str) -> dict[str, Any]:
    """What the command line itself makes of it: the settings that were given."""
    program, name, *words = shlex.split(command)
    assert (program, name) == ("locallearn", "train")
    context = typer.main.get_command(app).commands["train"].make_context("train", words)
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {n: v for n, v in context.params.items() if sources[n].name == "COMMANDLINE"}


OF_RULES = [{"rule": rule} for rule in list_rules()]
OF_MODELS = [{"model": model, "dataset": "cifar10"} for model in list_models()]
# Of sgd, 0.005 is not the default; of schedulefree-adamw it is.
OF_OPTIMIZERS = [{"optimizer": name, "lr": lr} for name in list_optimizers() for lr in (None, 5e-3)]
OTHERS: list[dict[str, Any]] = [
    {"dataset": "folder", "data_dir": "/data/my photos; rm -rf $HOME", "image_size": 48},
    {"dataset": "folder", "data_dir": "/it's", "cache": "/tmp/a b"},
    {"channels_last": False, "cuda_graph": False, "head_after_pool": True},
    {"rule": "bp", "bp_memory": "accumulate:4", "compile": True},
    {"rule": "pepita", "update_order": "end", "feedback_scale": 0.1, "optimizer": "adam"},
    {"rule": "pepita", "optimizer": "sgd", "lr": 0.05},
    {"rule": "local-losses", "local_loss": "predsim", "label_smoothing": 0.1},
    {"rule": "lls-mxm-reduced", "num_waves": 5, "basis": "cosine"},
    {"rule": "lls-mxm", "m_start": "identity"},
    {"rule": "lls:normalize=false:temperature=0.3", "basis": "random"},
    {"rule": "lls-s", "similarity": 0.0, "setting": "paper", "temperature": 0.7},
    {"rule": "drtp", "activation": "relu", "norm": "none", "width": 0.5, "group_blocks": 2},
    {"model": "vgg8", "dataset": "mnist", "epochs": 100, "augment": "basic", "dropout": 0.25},
    {"epochs": 3, "batch_size": 64, "test_batch_size": 32, "weight_decay": 1e-05, "seed": 7},
    {"schedule": "cosine", "optimizer": "sgd", "val_split": 0.1, "precision": "bf16"},
    {"limit_train": 100, "limit_test": 10, "backend": "reference", "num_threads": 3},
    {"model": "torchvision:resnet18:stem=cifar", "blocks": "layer*.?,type:BasicBlock"},
    {"model": "timm:vit_tiny_patch16_224:img_size=32", "dataset": "cifar10", "epochs": 5},
    {"model": "my nets/it's.py:build:depth=3", "rule": "drtp", "epochs": 7},
]


@pytest.mark.parametrize("given", OF_RULES + OF_MODELS + OF_OPTIMIZERS + OTHERS, ids=str)
def test_command_gives_the_settings_again(given: dict[str, Any], monkeypatch) -> None:
    monkeypatch.setattr("locallearn.engine.config.missing_for", lambda *_: None)
    resolved = TrainConfig(**{"device": "cpu", "num_threads": 1, **given}).resolve()
    resolved = replace(resolved, backend=given.get("backend", "autograd"))  # as a run chose
    assert TrainConfig(**parse(train_command(resolved))).resolve() == resolved


def test_an_option_with_the_rule_s_name_is_the_flag_s() -> None:
    settings = TrainConfig(rule="lls:similarity=2", temperature=0.3).resolve()
    assert (settings.similarity, settings.temperature) == (2.0, 0.3)
    assert TrainConfig.from_json(json.loads(json.dumps(settings.to_json()))) == settings
    assert settings.build_rule() == build_rule("lls", similarity=2.0, temperature=0.3)


def test_an_option_is_given_once() -> None:
    message = "--similarity is 3.0, but --rule lls:similarity=2 says 2.0; give it once"
    with pytest.raises(UserError, match=message):
        TrainConfig(rule="lls:similarity=2", similarity=3.0).resolve()


def test_command_names_what_is_not_the_default_alone() -> None:
    settings = TrainConfig(rule="lls-m", epochs=5, basis="square", channels_last=False)
    expected = "locallearn train --dataset digits --model smallconv --rule lls-m"
    assert train_command(settings) == f"{expected} --epochs 5 --no-channels-last"
    run = replace(settings.resolve(), device="cuda", backend="triton", num_threads=8)
    machine = "--device cuda --no-channels-last --backend triton --num-threads 8"
    assert train_command(run) == f"{expected} --epochs 5 {machine}"


@pytest.mark.parametrize(
    ("dataset", "data_dir", "name"),
    [
        ("cifar10", None, "cifar10"),
        ("cifar10", "/data/elsewhere", "cifar10"),
        ("folder", "/data/cifar10_jpeg/", "cifar10_jpeg"),
        ("folder", "/", "folder"),
        ("folder", None, "folder"),
    ],
)
def test_data_in_a_word(dataset: str, data_dir: str | None, name: str) -> None:
    assert data_name(TrainConfig(dataset=dataset, data_dir=data_dir)) == name


# -- models from elsewhere ----------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's file, in the directory that the program runs in."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "vgg_net.py"
    path.write_text("raise RuntimeError('no setting is read by running a file')")
    return path


def test_a_files_path_and_content_are_noted(file: Path) -> None:
    given = TrainConfig(model="vgg_net.py:build:depth=3", dataset="cifar10")
    resolved = given.resolve()
    assert resolved.model == f"{file}:build:depth=3"
    assert resolved.model_digest == hashlib.sha256(file.read_bytes()).hexdigest()
    assert model_name(resolved) == model_name(given) == "vgg_net.py:build:depth=3"
    assert (resolved.epochs, resolved.augment) == (100, "standard")
    assert resolved.activation is None
    for settings in (given, resolved):
        assert chosen_settings(replace(settings, num_threads=None, device="auto")) == {}
        assert "digest" not in train_command(settings)
    assert TrainConfig(model="smallconv").resolve().model_digest is None
    assert TrainConfig(model="smallconv.py:build", dataset="mnist").resolve().augment == "standard"


def test_a_record_is_read_where_the_file_is_not(file: Path) -> None:
    resolved = TrainConfig(model="vgg_net.py:build", device="cpu").resolve()
    file.write_text("another")
    assert TrainConfig.from_json(resolved.to_json()) == resolved
    file.unlink()
    assert TrainConfig.from_json(resolved.to_json()) == resolved
    assert chosen_settings(replace(resolved, num_threads=None, device="auto")) == {}


def test_a_record_of_an_earlier_version_is_read() -> None:
    resolved = TrainConfig(device="cpu").resolve()
    old = resolved.to_json()
    del old["blocks"], old["model_digest"]
    assert TrainConfig.from_json(old) == resolved
    with pytest.raises(UserError, match="a setting of the run has the wrong type"):
        TrainConfig.from_json({**old, "blocks": 5})


def test_a_repeated_model_may_be_named_from_elsewhere(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved = TrainConfig(model="vgg_net.py:build").resolve()
    assert differing_settings(resolved, {"model": "vgg_net.py:build"}) == []
    monkeypatch.chdir("/")
    (differing,) = differing_settings(resolved, {"model": "vgg_net.py:build"})
    assert differing == f"--model (run: {file}:build, given: /vgg_net.py:build)"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"width": 0.5}, r"--width is of the package's own networks, and model 'timm:vit' is fr"),
        ({"activation": "relu"}, r"--activation is of .* written behind its name: timm:vit:OPTION"),
        ({"norm": "none"}, r"--norm is of the package's own networks"),
        ({"dropout": 0.1}, r"--dropout is of the package's own networks"),
        ({"model": "tim:vit"}, r"unknown source of model 'tim:vit': 'tim'. Did you mean 'timm'"),
        ({"blocks": " "}, r"--blocks is empty"),
    ],
)
def test_settings_that_a_model_from_elsewhere_has_not(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainConfig(**{"model": "timm:vit", **given}).resolve()
