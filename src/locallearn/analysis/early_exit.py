"""What early exits cost and save: accuracy against multiply-accumulates, and measured time.

Shapes: N images, K classes, E exits (the last is the network's output).

The curve is computed from the logits of every exit, of one inference that no image leaves; what
`LocalLearner.predict` then answers at a threshold is the same (tested).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from locallearn.engine.benchmark import Spread
from locallearn.engine.exits import OUTPUT, calibrate, expected_calibration_error
from locallearn.engine.exits.calibration import reliability
from locallearn.engine.learner import LocalLearner
from locallearn.engine.timing import elapsed_ms

NO_EXIT = 2.0
"""A threshold that no probability comes up to."""

_NUM_THRESHOLDS = 200


@dataclass(frozen=True)
class ExitLogits:
    """Of a set of images.

    Attributes:
        names: of the exits.
        logits: exit name -> (N, K), on the CPU.
        labels: (N,), on the CPU.
    """

    names: tuple[str, ...]
    logits: dict[str, Tensor]
    labels: Tensor

    def accuracy(self, name: str) -> float:
        """Of an exit for all images, percent."""
        right = self.logits[name].argmax(dim=1) == self.labels
        return 100 * right.double().mean().item()


@dataclass(frozen=True)
class CurvePoint:
    """What a threshold comes to.

    Attributes:
        threshold: of the probability.
        accuracy: percent.
        num_macs: multiply-accumulates for an image, mean.
        shares: of the images that leave at each exit, in [0, 1].
        accuracies: of those that leave at each exit, percent; None where none does.
    """

    threshold: float
    accuracy: float
    num_macs: float
    shares: tuple[float, ...]
    accuracies: tuple[float | None, ...]


@dataclass(frozen=True)
class Timing:
    """An inference with exits beside one without, measured in turns.

    Attributes:
        batch_size: images at a time.
        full_ms, early_ms: for all the images that were measured.
        speedup: full over early, by round.
        num_images: that were measured.
    """

    batch_size: int
    full_ms: Spread
    early_ms: Spread
    speedup: Spread
    num_images: int


def collect(learner: LocalLearner, batches: Iterable[tuple[Tensor, Tensor]]) -> ExitLogits:
    """Every exit's logits of every image.

    Arguments:
        learner: trained.
        batches: images and labels; at least one.

    Raises:
        UserError: as `LocalLearner.early_exits`.
    """
    logits: dict[str, list[Tensor]] = {}
    labels = []
    for images, of_images in batches:
        for name, of_exit in learner.exit_logits(images).items():
            logits.setdefault(name, []).append(of_exit.cpu())
        labels.append(of_images.cpu())
    return ExitLogits(
        tuple(logits), {name: torch.cat(parts) for name, parts in logits.items()}, torch.cat(labels)
    )


def exit_macs(learner: LocalLearner, image: Tensor) -> tuple[dict[str, int], int]:
    """Multiply-accumulates of one image that leaves at each exit, the heads that it came by
    included; and those of the whole network without heads.

    Arguments:
        learner: trained.
        image: (1, C, H, W).
    """
    exits = learner.early_exits(image)
    with FlopCounterMode(display=False) as counter:
        learner(image)
    return exits.num_macs(image), counter.get_total_flops() // 2


def curve(
    logits: ExitLogits, temperatures: Mapping[str, float], macs: Mapping[str, int]
) -> list[CurvePoint]:
    """Accuracy and cost at thresholds from 0 (all leave at the first exit) to none leaving.

    Arguments:
        logits: of the images.
        temperatures: exit name -> what its logits are divided by.
        macs: exit name -> of an image that leaves there.
    """
    answers = _Answers.of(logits, temperatures)
    sure = answers.confidences
    inner = torch.linspace(0, 1, _NUM_THRESHOLDS)
    among = torch.quantile(sure[:-1].flatten()[:: max(1, sure[:-1].numel() // 100_000)], inner)
    thresholds = [0.0, *sorted(set(among.tolist())), NO_EXIT]
    return [answers.at(threshold, macs) for threshold in thresholds]


def at_threshold(
    logits: ExitLogits,
    temperatures: Mapping[str, float],
    macs: Mapping[str, int],
    threshold: float,
) -> CurvePoint:
    """The point of the curve at one threshold; arguments as of :func:`curve`."""
    return _Answers.of(logits, temperatures).at(threshold, macs)


@dataclass(frozen=True)
class _Answers:
    """What each exit says of each image.

    Attributes:
        names: of the exits.
        confidences: (E, N): the highest probability at each exit, to the bit what inference
            computes, as one that is 1 in float32 may be less in float64.
        are_right: (E, N), bool.
    """

    names: tuple[str, ...]
    confidences: Tensor
    are_right: Tensor

    @classmethod
    def of(cls, logits: ExitLogits, temperatures: Mapping[str, float]) -> _Answers:
        confidences, are_right = [], []
        for name in logits.names:
            of_exit = logits.logits[name]
            probabilities = (of_exit.float() / temperatures.get(name, 1.0)).softmax(dim=1)
            confidences.append(probabilities.amax(dim=1))
            are_right.append(of_exit.argmax(dim=1) == logits.labels)
        return cls(logits.names, torch.stack(confidences), torch.stack(are_right))

    def at(self, threshold: float, macs: Mapping[str, int]) -> CurvePoint:
        """Where each image leaves at a threshold, and what that comes to."""
        leaves = self.confidences >= threshold
        leaves[-1] = True
        exits = leaves.int().argmax(dim=0)
        right = self.are_right.gather(0, exits[None])[0]
        num = len(exits)
        counts = torch.bincount(exits, minlength=len(self.names))
        num_right = torch.bincount(exits[right], minlength=len(self.names))
        costs = torch.tensor([macs[name] for name in self.names], dtype=torch.float64)
        return CurvePoint(
            threshold,
            accuracy=100 * int(right.sum()) / num,
            num_macs=float((counts * costs).sum()) / num,
            shares=tuple((counts / num).tolist()),
            accuracies=tuple(
                100 * r / n if n else None
                for r, n in zip(num_right.tolist(), counts.tolist(), strict=True)
            ),
        )


def cheapest_within(points: Sequence[CurvePoint], accuracy: float, max_drop: float) -> CurvePoint:
    """The point of least cost whose accuracy is at most so many points below; the last, at which
    no image leaves, where none is.

    Arguments:
        points: of a curve.
        accuracy: of the whole network, percent.
        max_drop: percentage points.
    """
    good = [point for point in points if point.accuracy >= accuracy - max_drop]
    return min(good, key=lambda point: point.num_macs) if good else points[-1]


def above_the_line(points: Sequence[CurvePoint]) -> tuple[float, float]:
    """How far a curve lies above the straight line between its ends, in percentage points: least
    and most, over the points between.

    The line is what mixing the first exit and the whole network at random would reach.
    """
    first, last = points[0], points[-1]
    width = last.num_macs - first.num_macs
    heights = []
    for point in points[1:-1]:
        if not first.num_macs < point.num_macs < last.num_macs:
            continue
        share = (point.num_macs - first.num_macs) / width
        line = first.accuracy + share * (last.accuracy - first.accuracy)
        heights.append(point.accuracy - line)
    return (min(heights), max(heights)) if heights else (0.0, 0.0)


def time_inference(
    learner: LocalLearner,
    batches: Sequence[Tensor],
    threshold: float,
    *,
    num_rounds: int = 11,
) -> Timing:
    """Inference of all batches with exits and without, in turns.

    Arguments:
        learner: trained, its exits calibrated.
        batches: images, on its device; all but the last of one size.
        threshold: of the probability.
        num_rounds: how often each; one more of each goes before, which is not counted.
    """
    full, early = [], []
    for round_number in range(num_rounds + 1):
        times = []
        for infer in (learner, lambda images: learner.predict(images, exit_threshold=threshold)):
            times.append(_time_ms(infer, batches))
        if round_number:
            full.append(times[0])
            early.append(times[1])
    return Timing(
        len(batches[0]),
        Spread.of(full),
        Spread.of(early),
        Spread.of([a / b for a, b in zip(full, early, strict=True)]),
        sum(len(images) for images in batches),
    )


def _time_ms(infer: Callable[[Tensor], object], batches: Sequence[Tensor]) -> float:
    def infer_all() -> None:
        for images in batches:
            infer(images)

    return elapsed_ms(infer_all, batches[0].device)


@dataclass(frozen=True)
class ExitRow:
    """One exit.

    Attributes:
        name: of its block, or "output".
        num_macs: of an image that leaves there.
        accuracy: of its head for all images, percent.
        temperature: fitted on the held-out images.
        error_before, error_after: expected calibration error in [0, 1] on the other images.
        reliability: confidence, accuracy and number of images by bin, calibrated.
    """

    name: str
    num_macs: int
    accuracy: float
    temperature: float
    error_before: float
    error_after: float
    reliability: tuple[list[float], list[float], list[float]]


@dataclass(frozen=True)
class ExitStudy:
    """What is to be said of a network's exits.

    Attributes:
        exits: in the order of the forward, the network's output last.
        points: of the curve.
        chosen: the point at the threshold that was given or chosen.
        accuracy: of the whole network, percent.
        num_macs: of the whole network, without heads, an image.
        above_line: see :func:`above_the_line`.
    """

    exits: list[ExitRow]
    points: list[CurvePoint]
    chosen: CurvePoint
    accuracy: float
    num_macs: int
    above_line: tuple[float, float]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def study_exits(
    learner: LocalLearner,
    held_out: Iterable[tuple[Tensor, Tensor]],
    shown: Iterable[tuple[Tensor, Tensor]],
    *,
    threshold: float | None = None,
    max_drop: float = 0.5,
) -> ExitStudy:
    """Calibrate a learner's exits, choose a threshold, and say what it comes to on other images.

    Arguments:
        learner: trained; its exits have these temperatures afterwards.
        held_out: batches to calibrate and choose on.
        shown: batches of other images.
        threshold: of the probability; None takes the cheapest that loses at most ``max_drop``
            percentage points on the held-out images.
        max_drop: see there.

    Raises:
        UserError: as `LocalLearner.early_exits`, or no images.
    """
    held = collect(learner, held_out)
    found = calibrate(held.logits, held.labels)
    learner.exit_temperatures = temperatures = {n: each.temperature for n, each in found.items()}
    kept: list[Tensor] = []
    seen = collect(learner, _keeping_one(shown, kept))
    macs, whole = exit_macs(learner, kept[0])
    if threshold is None:
        points = curve(held, temperatures, macs)
        threshold = cheapest_within(points, held.accuracy(OUTPUT), max_drop).threshold
    points = curve(seen, temperatures, macs)
    rows = []
    for name in seen.names:
        logits = seen.logits[name]
        calibrated = (logits / temperatures[name]).softmax(dim=1)
        rows.append(
            ExitRow(
                name,
                macs[name],
                seen.accuracy(name),
                temperatures[name],
                expected_calibration_error(logits.softmax(dim=1), seen.labels),
                expected_calibration_error(calibrated, seen.labels),
                tuple(each.tolist() for each in reliability(calibrated, seen.labels)),  # type: ignore[arg-type]
            )
        )
    return ExitStudy(
        rows,
        points,
        at_threshold(seen, temperatures, macs, threshold),
        seen.accuracy(OUTPUT),
        whole,
        above_the_line(points),
    )


def _keeping_one(
    batches: Iterable[tuple[Tensor, Tensor]], kept: list[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches; the first image goes to ``kept``."""
    for images, labels in batches:
        if not kept:
            kept.append(images[:1])
        yield images, labels
