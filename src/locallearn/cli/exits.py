"""`locallearn evaluate --early-exit`: the blocks' heads as early exits, measured and calibrated."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from locallearn.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from locallearn.analysis.early_exit import ExitStudy, Timing
    from locallearn.data import Dataset, ImageSource
    from locallearn.engine import LocalLearner, Trained

_HELD_OUT_SHARE = 0.2  # of the test images, of a run that held none out
_HELD_OUT_SEED = 0
# Of the timing: a pass over the images takes about so long, and all of it some twenty seconds.
_PASS_MS = 600.0
_NUM_SINGLES = 64  # images, one at a time


@dataclass(frozen=True)
class ExitOptions:
    """As the command line has them.

    Arguments:
        threshold: None chooses it on the held-out images.
        max_drop: percentage points that the chosen one may lose there.
        names: of blocks, by commas; None for all.
        batch_size: images at a time.
    """

    threshold: float | None
    max_drop: float
    names: str | None
    batch_size: int


def evaluate_exits(
    trained: Trained,
    run: Path,
    dataset: Dataset,
    device: torch.device,
    options: ExitOptions,
    plot: str | None,
    json: str | None,
) -> None:
    """Calibrate the exits on held-out images, look at them on the others, and say what they save.

    Arguments:
        trained: its learner is on the device.
        run: its directory, where exits.json goes, or a file of it.
        dataset: its data.
        device: where it infers.
        options: of the command line.
        plot, json: files to write, or None.
    """
    from locallearn.analysis.early_exit import study_exits
    from locallearn.engine.building import evaluation_loader
    from locallearn.engine.config import model_name
    from locallearn.engine.environment import describe_environment
    from locallearn.engine.exits import ExitRecord
    from locallearn.engine.files import write_atomically, write_json
    from locallearn.engine.run import RunDirectory
    from locallearn.engine.weights import weights_digest

    if options.threshold is not None and not 0 <= options.threshold <= 1:
        raise UserError(f"--exit-threshold must be in [0, 1], got {options.threshold}.")
    if not options.max_drop >= 0:
        raise UserError(f"--max-drop must be at least 0, got {options.max_drop}.")
    learner = trained.learner
    held, shown, where = _parts(dataset)
    held_loader = evaluation_loader(held, dataset, options.batch_size, device)
    shown_loader = evaluation_loader(shown, dataset, options.batch_size, device)
    first, _ = next(iter(shown_loader.epoch()))
    names = None
    if options.names is not None:
        names = [name.strip() for name in options.names.split(",") if name.strip()]
        if not names:
            raise UserError("--exits names no block; name at least one, or leave it out.")
    learner.early_exits(first, names)

    study = study_exits(
        learner,
        held_loader.epoch(),
        shown_loader.epoch(),
        threshold=options.threshold,
        max_drop=options.max_drop,
    )
    timings = _time(learner, first, study.chosen.threshold)
    settings = trained.config.settings
    title = f"{model_name(settings)}, {settings.rule}"
    print(f"{trained.origin}: early exits, {len(shown):,} test images; {where}")
    _print(study, timings, options)
    if plot is not None:
        from locallearn.analysis.figures.early_exit import plot_exits

        target = Path(plot)
        write_atomically(target, plot_exits(study, title, target))
        print(f"curve written to {target}")
    if json is not None:
        write_json(
            Path(json),
            {
                "run": str(trained.origin),
                "num_images": len(shown),
                "num_held_out": len(held),
                "held_out": where,
                **study.to_json(),
                "timings": [asdict(timing) for timing in timings],
                "environment": describe_environment(device.type),
            },
        )
        print(f"figures written to {json}")
    if run.is_dir():
        path = RunDirectory(run).exits_path
        record = ExitRecord(
            weights_digest(learner),
            learner.exit_temperatures,
            min(1.0, study.chosen.threshold),
            len(held),
        )
        record.write(path)
        print(f"written to {path}, for `predict --exit-threshold auto`: temperatures, threshold")


def _parts(dataset: Dataset) -> tuple[ImageSource, ImageSource, str]:
    """Images to calibrate on, images to show, and where the former are from."""
    from locallearn.data.dataset import stratified_split

    if dataset.val is not None:
        return dataset.val, dataset.test, f"calibrated on {len(dataset.val):,} validation images"
    kept, held = stratified_split(dataset.test.labels.cpu(), _HELD_OUT_SHARE, _HELD_OUT_SEED)
    if not len(held) or not len(kept):
        raise UserError(
            f"{len(dataset.test)} test images are too few to calibrate exits on a part of them; "
            f"train with --val-split."
        )
    where = f"calibrated on {len(held):,} other test images, as the run held none out (--val-split)"
    return dataset.test.subset(held), dataset.test.subset(kept), where


def _time(learner: LocalLearner, images: Tensor, threshold: float) -> list[Timing]:
    """Of batches as they come, and of single images."""
    from locallearn.analysis.early_exit import time_inference

    timings = []
    for batches in ([images], [images[i : i + 1] for i in range(min(_NUM_SINGLES, len(images)))]):
        trial = time_inference(learner, batches, threshold, num_rounds=1)
        num = max(1, min(10, int(_PASS_MS / max(trial.full_ms.median, 1e-3))))
        timings.append(time_inference(learner, batches * num, threshold, num_rounds=7))
    return timings


def _print(study: ExitStudy, timings: list[Timing], options: ExitOptions) -> None:
    chosen, whole = study.chosen, study.num_macs
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("exit", overflow="fold")
    for heading in (
        "MMAC",
        "right, %",
        "T",
        "ECE, %",
        "with T",
        "leave, %",
        "of these right",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for place, row in enumerate(study.exits):
        right = chosen.accuracies[place]
        table.add_row(
            escape(row.name),
            f"{row.num_macs / 1e6:,.2f}",
            f"{row.accuracy:.2f}",
            f"{row.temperature:.3f}",
            f"{100 * row.error_before:.1f}",
            f"{100 * row.error_after:.1f}",
            f"{100 * chosen.shares[place]:.1f}",
            "-" if right is None else f"{right:.1f}",
        )
    Console(highlight=False).print(table)
    print("T: temperature; ECE: expected calibration error; leave: at the threshold")
    if options.threshold is None:
        how = f"chosen on the held-out images to lose at most {options.max_drop:g} points"
    else:
        how = "as asked"
    shown = "none (no image leaves)" if chosen.threshold > 1 else f"{chosen.threshold:.3f}"
    print(f"threshold {shown}, {how}")
    print(
        f"accuracy {chosen.accuracy:.2f} %, whole network {study.accuracy:.2f} %; "
        f"{chosen.num_macs / 1e6:,.2f} MMAC an image, whole network {whole / 1e6:,.2f} "
        f"({chosen.num_macs / whole:.2f} of it)"
    )
    for timing in timings:
        each = timing.early_ms.median / timing.num_images
        print(
            f"batches of {timing.batch_size}: {each:.3f} ms an image, "
            f"{timing.speedup.median:.2f} times as fast as the whole network "
            f"({timing.speedup.p20:.2f}-{timing.speedup.p80:.2f})"
        )
    least, most = study.above_line
    print(
        f"the curve lies {least:.1f} to {most:.1f} points above the straight line between its ends"
        if least >= 0
        else f"the curve dips {-least:.1f} points below the straight line between its ends, and "
        f"rises {most:.1f} above it"
    )
