"""The curve of early exits, by hand and beside what inference does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from locallearn import LocalLearner, build_model
from locallearn.analysis.early_exit import (
    NO_EXIT,
    CurvePoint,
    ExitLogits,
    above_the_line,
    at_threshold,
    cheapest_within,
    collect,
    curve,
    exit_macs,
    study_exits,
    time_inference,
)
from locallearn.analysis.figures.early_exit import plot_exits

# Two exits, three images of two classes: logits whose softmax is 0.88, 0.73, 0.5 at the first.
LOGITS = ExitLogits(
    ("first", "output"),
    {
        "first": torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]]),
        "output": torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 3.0]]),
    },
    torch.tensor([0, 0, 1]),
)
MACS = {"first": 10, "output": 100}


@pytest.mark.parametrize(
    ("threshold", "shares", "accuracy"),
    [
        (0.0, (1.0, 0.0), 100 / 3),  # all by the first, which is right of image 0 alone
        (0.6, (2 / 3, 1 / 3), 200 / 3),  # image 1 leaves wrong
        (0.8, (1 / 3, 2 / 3), 100.0),
        (NO_EXIT, (0.0, 1.0), 100.0),
    ],
)
def test_a_point_by_hand(threshold: float, shares: tuple[float, ...], accuracy: float) -> None:
    point = at_threshold(LOGITS, {}, MACS, threshold)
    assert point.shares == pytest.approx(shares)
    assert point.accuracy == pytest.approx(accuracy)
    assert point.num_macs == pytest.approx(10 * shares[0] + 100 * shares[1])


def test_temperature_decides_who_leaves() -> None:
    assert at_threshold(LOGITS, {"first": 0.1}, MACS, 0.8).shares == pytest.approx((2 / 3, 1 / 3))
    assert at_threshold(LOGITS, {"first": 100.0}, MACS, 0.8).shares == pytest.approx((0.0, 1.0))


def test_the_curve_goes_from_all_leaving_to_none() -> None:
    points = curve(LOGITS, {}, MACS)
    assert points[0].num_macs == 10
    assert points[-1].num_macs == 100
    assert [p.num_macs for p in points] == sorted(p.num_macs for p in points)
    # At 40 MAC the line has 55.6 %, the curve 66.7; at 70 it has 77.8, the curve 100.
    assert above_the_line(points) == pytest.approx((100 / 9, 200 / 9))


def point(num_macs: float, accuracy: float) -> CurvePoint:
    return CurvePoint(0.5, accuracy, num_macs, (), ())


def test_the_cheapest_within() -> None:
    points = [point(1, 50.0), point(2, 79.6), point(3, 79.0), point(4, 80.0)]
    assert cheapest_within(points, 80.0, 0.5).num_macs == 2
    assert cheapest_within(points, 80.0, 0.0).num_macs == 4
    assert cheapest_within(points, 90.0, 1.0).num_macs == 4  # none is good enough: none leaves


def trained() -> tuple[LocalLearner, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    network = build_model("smallconv", num_classes=3, in_channels=1, image_size=(8, 8), width=0.25)
    learner = LocalLearner(network, "lls", num_classes=3)
    labels = torch.arange(60) % 3
    images = torch.randn(60, 1, 8, 8) + labels[:, None, None, None]
    for _ in range(5):
        learner.step(images, labels)
    return learner, images, labels


def test_a_study_is_what_inference_does(tmp_path: Path) -> None:
    learner, images, labels = trained()
    held = [(images[:20], labels[:20]), (images[20:30], labels[20:30])]
    shown = [(images[30:], labels[30:])]
    study = study_exits(learner, held, shown, max_drop=5.0)
    assert learner.exit_temperatures == {row.name: row.temperature for row in study.exits}
    logits = collect(learner, shown)
    macs, whole = exit_macs(learner, images[:1])
    assert study.num_macs == whole < macs["output"]
    for threshold in (0.0, 0.5, 0.7, 1.0):
        said = at_threshold(logits, learner.exit_temperatures, macs, threshold)
        prediction = learner.predict(images[30:], exit_threshold=threshold)
        right = (prediction.classes == labels[30:]).double().mean()
        assert said.accuracy == pytest.approx(100 * float(right))
        counts = torch.bincount(prediction.exits, minlength=len(prediction.exit_names))
        assert said.shares == pytest.approx((counts / 30).tolist())
    for suffix, start in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        assert plot_exits(study, "title", tmp_path / f"exits{suffix}").startswith(start)


def test_times_are_of_every_image() -> None:
    learner, images, _ = trained()
    learner.exit_temperatures = dict.fromkeys(learner.early_exits(images).names, 1.0)
    timing = time_inference(learner, [images[:20], images[20:40]], 0.5, num_rounds=3)
    assert (timing.batch_size, timing.num_images) == (20, 40)
    assert 0 < timing.speedup.p20 <= timing.speedup.median <= timing.speedup.p80
