"""What docs/own-loop.md shows runs, section by section, and does what the page says of it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

DOCS = Path(__file__).parents[1] / "docs"
TEXT = (DOCS / "own-loop.md").read_text()
SETUP, *_ = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)

Run = Callable[[str], list[dict[str, Any]]]

pytestmark = [
    # Lightning's and Accelerate's own advice and deprecations.
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Run:
    """Runs the code under a heading, in an empty directory: what is defined after each block."""
    monkeypatch.chdir(tmp_path)

    def run_section(heading: str) -> list[dict[str, Any]]:
        (section,) = re.findall(rf"^#+ {heading}\n(.*?)(?=^#|\Z)", _without_comments(), re.M | re.S)
        blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
        assert blocks
        names: dict[str, Any] = {}
        exec(SETUP, names)
        seen = []
        for block in blocks:
            exec(block.replace(_HASH, "#"), names)
            seen.append(dict(names))
        return seen

    return run_section


_HASH = "\0"


def _without_comments() -> str:
    """The page with the # of code out of the way, so that a heading is what begins with one."""
    return re.sub(
        r"```python\n.*?```", lambda block: block.group().replace("#", _HASH), TEXT, flags=re.DOTALL
    )


def accuracy(names: dict[str, Any]) -> float:
    ((images, labels),) = names["test_loader"]
    logits = names["learner"](images.to(names["device"]))
    return (logits.argmax(dim=1).cpu() == labels).float().mean().item()


def test_plain_loop_learns(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    (names,) = run("Plain PyTorch")
    assert accuracy(names) > 0.6
    assert set(names["result"].block_losses) == {"stem", "body"}
    lines = re.findall(r"^epoch \d: \d\.\d+, \d+\.\d% right$", capsys.readouterr().out, re.M)
    assert len(lines) == 3


def test_evaluation_leaves_an_ordinary_model(run: Run) -> None:
    (names,) = run("Evaluation")
    ((images, _),) = names["test_loader"]
    images = images.to(names["device"])
    plain = names["Net"]().to(names["device"]).eval()
    plain.load_state_dict(torch.load("weights.pt"))
    expected = names["learner"](images)
    torch.testing.assert_close(plain(images).float(), expected, rtol=1e-5, atol=1e-5)


def test_a_resumed_learner_is_bit_for_bit_the_one_that_went_on(run: Run) -> None:
    (names,) = run("Saving and going on")
    torch.set_rng_state(names["checkpoint"]["rng"])
    for images, labels in names["batches"][5:]:
        names["learner"].step(images, labels)
    ours, expected = names["resumed"].state_dict(), names["learner"].state_dict()
    assert list(ours) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor), name
    assert not Path("checkpoint.tmp").exists()


def test_schedules_reach_every_block(run: Run) -> None:
    (names,) = run("Learning rates")
    assert set(names["learner"].optimizers) == {"stem", "body", ""}
    for optimizer in names["learner"].optimizers.values():
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)


def test_gradients_are_clipped_in_each_block(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    norms = []
    clip = torch.nn.utils.clip_grad_norm_

    def noting(parameters: list[Any], limit: float) -> None:
        clip(parameters, limit)
        norms.append(torch.stack([p.grad.norm() for p in parameters]).norm().item())

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", noting)
    (names,) = run("Optimizers and clipping")
    assert len(norms) == 3 * len(names["train_loader"])
    assert max(norms) <= 1.0 + 1e-5


def test_bf16_learns_with_float32_weights(run: Run) -> None:
    (names,) = run("Mixed precision")
    assert {p.dtype for p in names["learner"].parameters()} == {torch.float32}
    assert accuracy(names) > 0.3


def test_a_loss_of_the_user_s_own_trains_the_classifier(run: Run) -> None:
    own, learner_s = run("A loss and an optimizer of your own")
    for names in (own, learner_s):
        assert accuracy(names) > 0.6
        assert set(names["local"].block_losses) == {"stem", "body"}
    # Of the user's own classifier the learner's optimizer has not stepped once.
    assert not any(own["learner"].optimizers[""].state.values())
    assert all(learner_s["learner"].optimizers[""].state.values())


def test_lightning_trains_evaluates_and_goes_on(run: Run) -> None:
    first, resumed, scheduled = run("Lightning")
    assert first["predictions"].shape == (297, 10)
    assert first["trainer"].global_step == 2 * len(first["train_loader"])
    assert resumed["trainer"].global_step == 4 * len(first["train_loader"])
    assert resumed["trainer"].callback_metrics["val_acc"] > 0.6
    for optimizer in scheduled["module"].learner.optimizers.values():
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)


@pytest.fixture
def _fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps what it is in the process, and tells others of it by the environment."""
    from accelerate.state import AcceleratorState, GradientState

    before = dict(os.environ)
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.usefixtures("_fresh_accelerate")
def test_accelerate_trains_and_goes_back(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    (names,) = run("Hugging Face Accelerate")
    printed = [float(p) for p in re.findall(r"epoch \d: ([\d.]+)% right", capsys.readouterr().out)]
    assert len(printed) == 3
    assert printed[-1] > 60
    # After load_state the learner is as it was saved, in the middle.
    assert 100 * accuracy(names) == pytest.approx(printed[1], abs=0.1)


@pytest.mark.usefixtures("_fresh_accelerate")
def test_a_model_that_was_prepared_learns_the_same() -> None:
    from accelerate import Accelerator

    names: dict[str, Any] = {}
    exec(SETUP, names)
    accelerator = Accelerator()
    learners = []
    for prepare in (lambda model: model.to(accelerator.device), accelerator.prepare):
        torch.manual_seed(0)
        learner = names["LocalLearner"](prepare(names["Net"]()), "lls", **names["settings"])
        images, labels = next(iter(names["train_loader"]))
        learner.step(images.to(accelerator.device), labels.to(accelerator.device))
        learners.append(learner)
    plain, prepared = (learner.state_dict() for learner in learners)
    for name, tensor in plain.items():
        assert torch.equal(prepared[name], tensor), name


def test_links_lead_somewhere() -> None:
    headings = re.findall(r"^#+ (.*)$", _without_comments(), re.M)
    anchors = {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\((?!http)([^)]+)\)", TEXT):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        else:
            assert (DOCS / target.partition("#")[0]).exists(), target
