"""Learning from a camera, one frame at a time, with another camera put in half way.

scikit-learn's digits wander over a background, a few frames each, while the light changes slowly.
Half way the camera is another: contrast the other way round, a colour cast, noise. Every frame is
first answered, then learned from (`StepResult.logits` are made before the update). Frames that
follow each other are nearly the same, which is hard on any learner: one of the two LLS-MxM
learners steps on the new frame alone, the other on it and seven that are drawn from the last
thousand. A copy that stops learning at the change shows what the change costs. About a minute on
one CPU core.

    python examples/camera_stream.py [FIGURE.png]

The figure needs `pip install 'locallearn[plot]'`.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from locallearn import LocalLearner

SIZE = 16  # pixels of a frame's side
WINDOW = 200  # frames that an accuracy is the mean of
NUM_REPLAYED, NUM_KEPT = 7, 1000


def camera(num_frames: int, change_at: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Frames (1, 3, SIZE, SIZE) and what they show (1,), int64."""
    generator = torch.Generator().manual_seed(0)
    digits = load_digits()
    shapes = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]
    shapes = F.interpolate(shapes, size=(12, 12), mode="bilinear", align_corners=False)
    room = torch.rand(1, 3, 4, 4, generator=generator)
    room = 0.3 * F.interpolate(room, size=(SIZE, SIZE), mode="bilinear", align_corners=False)[0]
    left = shown = 0
    top, side, down, right = 0.0, 0.0, 0.0, 0.0
    for number in range(num_frames):
        if left == 0:  # another digit, for some frames
            left = int(torch.randint(4, 12, (1,), generator=generator))
            shown = int(torch.randint(len(shapes), (1,), generator=generator))
            top, side, down, right = torch.rand(4, generator=generator).tolist()
        left -= 1
        top, side = (top + 0.2 * (down - 0.5)) % 1, (side + 0.2 * (right - 0.5)) % 1
        y, x = round(top * (SIZE - 12)), round(side * (SIZE - 12))
        frame = room.clone()
        frame[:, y : y + 12, x : x + 12] += 0.7 * shapes[shown]
        frame = frame.clamp(max=1) * (0.8 + 0.2 * math.sin(2 * math.pi * number / 500))
        if number >= change_at:
            cast = torch.tensor([1.0, 0.6, 0.8])[:, None, None]
            frame = cast * (1 - frame) + 0.1 * torch.randn(frame.shape, generator=generator)
        yield 2 * frame[None] - 1, torch.tensor([int(digits.target[shown])])


def conv(num_inputs: int, num_outputs: int) -> nn.Sequential:
    layer = nn.Conv2d(num_inputs, num_outputs, 3, padding=1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(num_outputs), nn.ReLU(), nn.MaxPool2d(2))


def build_learner(rule: str, lr: float) -> LocalLearner:
    torch.manual_seed(0)
    model = nn.Sequential(
        conv(3, 16), conv(16, 32), conv(32, 64), nn.Flatten(), nn.Linear(64 * 4, 10)
    )
    # Plain SGD: a schedule-free optimizer's average of all steps so far would remember the first
    # camera for as long as it has lasted.
    return LocalLearner(
        model,
        rule,
        num_classes=10,
        example_input=torch.zeros(2, 3, SIZE, SIZE),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=lr),
    )


class Replayed:
    """The last frames, some of which are learned again beside each new one."""

    def __init__(self) -> None:
        self.frames: list[tuple[Tensor, Tensor]] = []

    def with_some(self, frame: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """The new frame first."""
        chosen = [(frame, label)]
        if self.frames:
            drawn = torch.randint(len(self.frames), (NUM_REPLAYED,)).tolist()
            chosen += [self.frames[number] for number in drawn]
        self.frames = [*self.frames[1 - NUM_KEPT :], (frame, label)]
        images, labels = zip(*chosen, strict=True)
        return torch.cat(images), torch.cat(labels)


def run(rule: str, *, num_frames: int, lr: float, replays: bool = False) -> dict[str, list[bool]]:
    """Whether each frame was answered rightly: by the learner, and by the copy that stopped."""
    learner, replayed = build_learner(rule, lr), Replayed()
    stopped: nn.Module | None = None
    right: list[bool] = []
    right_of_stopped: list[bool] = []
    for number, (frame, label) in enumerate(camera(num_frames, num_frames // 2)):
        if number == num_frames // 2:
            stopped = copy.deepcopy(learner.model).eval()
        batch = replayed.with_some(frame, label) if replays else (frame, label)
        answers = learner.step(*batch).logits
        right.append(bool(answers[0].argmax() == label))
        if stopped is None:
            right_of_stopped.append(right[-1])
        else:
            with torch.no_grad():
                right_of_stopped.append(bool(stopped(frame).argmax() == label))
    return {"learning": right, "stopped": right_of_stopped}


def accuracy(right: list[bool]) -> float:
    """Percent."""
    return 100 * sum(right) / max(1, len(right))


def draw(curves: dict[str, list[bool]], path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.add_subplot()
    for name, right in curves.items():
        means = [accuracy(right[max(0, n - WINDOW) : n]) for n in range(1, len(right) + 1)]
        axis.plot(means, label=name, linestyle="--" if "stopped" in name else "-")
    axis.axvline(len(right) // 2, color="grey", linewidth=1)
    axis.annotate(" another camera", (len(right) // 2, 97), color="grey")
    axis.set(xlabel="frame", ylabel=f"right of the last {WINDOW} frames, %", ylim=(0, 100))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="lower left")
    figure.savefig(path, dpi=120)


def main(num_frames: int = 2400, figure: str | None = None) -> None:
    sides = {
        "LLS-MxM": run("lls-mxm", num_frames=num_frames, lr=0.01),
        "LLS-MxM, replay": run("lls-mxm", num_frames=num_frames, lr=0.01, replays=True),
        "backpropagation, replay": run("bp", num_frames=num_frames, lr=0.01, replays=True),
    }
    half = num_frames // 2
    last = min(500, half // 2)
    for name, side in sides.items():
        right = side["learning"]
        moments = {"before the change": right[half - last : half]}
        moments |= {"just after": right[half : half + last // 5], "at the end": right[-last:]}
        print(f"{name}: " + ", ".join(f"{k} {accuracy(v):.1f} %" for k, v in moments.items()))
    stopped = sides["LLS-MxM, replay"]["stopped"][-last:]
    print(f"a copy that stopped learning at the change: at the end {accuracy(stopped):.1f} %")
    every = [flag for side in sides.values() for flag in side["learning"]]
    print(f"accuracy {accuracy(every):.1f} % over all frames and learners")
    if figure:
        curves = {name: side["learning"] for name, side in sides.items()}
        draw(curves | {"LLS-MxM, replay, stopped": sides["LLS-MxM, replay"]["stopped"]}, figure)


if __name__ == "__main__":
    main(figure=sys.argv[1] if len(sys.argv) > 1 else None)
