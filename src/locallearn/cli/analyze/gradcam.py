"""`locallearn analyze gradcam`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from locallearn.cli.analyze.opening import (
    BlockOption,
    Opened,
    OutOption,
    RunArgument,
    SeedOption,
    class_numbers,
    figure_directory,
    open_run,
    write_figure,
)
from locallearn.cli.naming import file_name
from locallearn.cli.options import BatchSizeOption, CacheOption, DataDirOption, DeviceOption
from locallearn.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from locallearn.analysis.figures.gradcam import CamRow
    from locallearn.analysis.gradcam import Deletion
    from locallearn.data import Dataset

_SIGNIFICANT = 0.05
_MIN_IMAGES = 5  # of four there are 16 choices of signs, too few for such a p
_MAX_NAMED_FILES = 3


def gradcam(
    run: RunArgument,
    images: Annotated[
        list[str] | None,
        typer.Argument(
            help="Image files. Default: test images of the run's data, drawn at random.",
            metavar="[IMAGE...]",
            show_default=False,
        ),
    ] = None,
    block: BlockOption = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="Class to explain, by name or number. Default: the one predicted.",
            metavar="CLASS",
            show_default=False,
        ),
    ] = None,
    beside: Annotated[
        str | None,
        typer.Option(help="A second run on the same data.", metavar="RUN", show_default=False),
    ] = None,
    num_images: Annotated[
        int, typer.Option(help="Test images to draw, a third of them classified wrongly.")
    ] = 6,
    check: Annotated[int, typer.Option(help="Test images to check the maps on.")] = 200,
    seed: SeedOption = 0,
    out: OutOption = None,
    data_dir: DataDirOption = None,
    cache: CacheOption = None,
    batch_size: BatchSizeOption = 64,
    device: DeviceOption = "auto",
) -> None:
    """Which pixels a network's answers rest on: Grad-CAM (the paper's figure 4).

    By default of the last convolutional block. Needs the extra gradcam. The maps are checked: how
    far the target's probability drops where the hottest fifth of the pixels is deleted, against
    the same masks shifted, and against other images' masks. docs/analysis.md has the formulas.
    """
    from locallearn.analysis.figures.drawing import figure_class
    from locallearn.analysis.figures.gradcam import plot_gradcam
    from locallearn.analysis.gradcam import load_captum

    figure_class()
    load_captum()
    for name, number in (("num-images", num_images), ("check", check), ("batch-size", batch_size)):
        if number < 1:
            raise UserError(f"--{name} must be at least 1, got {number}.")
    opened = [open_run(run, device)]
    if beside is not None:
        opened.append(open_run(beside, device))
        _check_alike(*opened)
    names = opened[0].class_names
    wanted = None
    if target is not None:
        numbers = class_numbers(names, target)
        if len(numbers) != 1:
            raise UserError(f"--target takes one class, got {target!r}.")
        wanted = numbers[0]
    layers = [_layer(each, block) for each in opened]
    directory = figure_directory(run, out)
    if images:
        inputs, labels, order = _read_files(opened, images), None, None
    else:
        num = max(check, num_images)
        inputs, labels, order = _draw_test_images(opened, data_dir, cache, num, seed)
    results = [
        _explain(each, layer, seen, wanted, batch_size, seed)
        for each, (_, layer), seen in zip(opened, layers, inputs, strict=True)
    ]
    shown = list(range(len(inputs[0])))
    if labels is not None:
        shown = _choose(results[0].predicted == labels, num_images)

    caption = _caption(opened, layers, results, labels, shown, names, wanted)
    _print(opened, results)
    print(caption)
    titles = [Path(image).name for image in images or []]
    if labels is not None:
        titles = [names[int(labels[number])] for number in shown]
    figure = plot_gradcam(
        _pictures(opened[0], inputs[0][shown]),
        titles,
        [
            _row(each, layer, result, shown, names, wanted)
            for each, (layer, _), result in zip(opened, layers, results, strict=True)
        ],
        heading="image" if labels is None else "true class",
    )
    stems = [Path(image).stem for image in images or []]
    name = file_name(
        "gradcam",
        layers[0][0],
        None if wanted is None else f"target-{names[wanted]}",
        None if beside is None else f"beside-{Path(beside).resolve().name}",
        "-".join(stems[:_MAX_NAMED_FILES]),
        f"and-{len(stems) - _MAX_NAMED_FILES}" if len(stems) > _MAX_NAMED_FILES else None,
        f"seed-{seed}" if seed and not images else None,
    )
    write_figure(
        opened[0],
        directory,
        name,
        figure,
        caption,
        {
            "target": "predicted" if wanted is None else names[wanted],
            "images": [Path(image).name for image in images or []] or None,
            "test_images": None if order is None else [int(order[number]) for number in shown],
            "true_classes": None if labels is None else titles,
            "seed": seed,
            "num_checked": len(inputs[0]),
            "runs": [
                {
                    "run": Path(each.run).resolve().name,
                    "title": each.title,
                    "epochs": each.num_epochs,
                    "block": layer,
                    "predicted": [names[int(result.predicted[number])] for number in shown],
                    "probability": [float(result.probability[number]) for number in shown],
                    **result.numbers(),
                }
                for each, (layer, _), result in zip(opened, layers, results, strict=True)
            ],
        },
    )


@dataclass(frozen=True)
class _Explained:
    """predicted: (N,); probability: (N,), of the target; heat: (N, H, W); deletion: the check."""

    predicted: Tensor
    probability: Tensor
    heat: Tensor
    deletion: Deletion

    def numbers(self) -> dict[str, Any]:
        """The check as plain values."""
        from locallearn.analysis.gradcam import MASKED_SHARE, excess

        drops = self.deletion
        positive = (self.heat > 0).flatten(1).double().mean(dim=1)
        return {
            "mean_positive_share": float(positive.mean()),
            "num_with_less_positive_than_deleted": int((positive < MASKED_SHARE).sum()),
            "drop_hottest": float(drops.hottest.mean()),
            "drop_shifted": float(drops.shifted.mean()),
            "drop_other": None if drops.other is None else float(drops.other.mean()),
            "excess_over_shifted": asdict(excess(drops.hottest, drops.shifted)),
            "excess_over_other": (
                None if drops.other is None else asdict(excess(drops.hottest, drops.other))
            ),
        }


def _explain(
    opened: Opened, layer: nn.Module, images: Tensor, wanted: int | None, batch_size: int, seed: int
) -> _Explained:
    """In float32, whatever the run was trained in, so that maps and answers are of one network."""
    import torch

    from locallearn.analysis.gradcam import deletion, heat_maps, probabilities

    model, images = opened.learner.model.eval(), images.to(opened.device)
    answers = torch.cat([probabilities(model, part) for part in torch.split(images, batch_size)])
    predicted = answers.argmax(dim=1)
    targets = predicted if wanted is None else torch.full_like(predicted, wanted)
    parts = zip(torch.split(images, batch_size), torch.split(targets, batch_size), strict=True)
    heat = torch.cat([heat_maps(model, layer, *part) for part in parts])
    drops = deletion(model, images, targets, heat, seed=seed, batch_size=batch_size)
    probability = answers.gather(1, targets[:, None])[:, 0]
    return _Explained(predicted.cpu(), probability.cpu(), heat.cpu(), drops)


def _layer(opened: Opened, block: str | None) -> tuple[str, nn.Module]:
    """A convolutional block: the one named, or the last."""
    from locallearn.analysis.gradcam import convolutional_blocks

    blocks = convolutional_blocks(opened.learner, opened.example_input())
    if not blocks:
        raise UserError(f"{opened.run} has no convolutional block, of which Grad-CAM is made.")
    name = list(blocks)[-1] if block is None else block
    if name not in blocks:
        raise UserError(
            f"{opened.run} has no convolutional block {name!r}. They are, in order: "
            f"{', '.join(blocks)}."
        )
    return name, blocks[name]


def _check_alike(first: Opened, second: Opened) -> None:
    a, b = first.trained.config, second.trained.config
    for what, ours, theirs in (
        ("classes", a.class_names, b.class_names),
        ("image_size", a.inputs.image_size, b.inputs.image_size),
        ("num_channels", a.inputs.num_channels, b.inputs.num_channels),
        ("resize", a.inputs.resize, b.inputs.resize),
    ):
        if ours != theirs:
            raise UserError(
                f"--beside {second.run} was trained on other data: its {what} differ from those of "
                f"{first.run}. Give a run on the same data."
            )
    # The fingerprint of a run that streams its images is another than of one that holds them.
    parts = [config.data["fingerprint"].split("-")[1:2] for config in (a, b)]  # train-test
    if parts[0] != parts[1] and a.data["in_memory"] == b.data["in_memory"]:
        raise UserError(
            f"--beside {second.run} has other test images than {first.run}. Give a run on the same "
            f"data."
        )


def _read_files(opened: list[Opened], images: list[str]) -> list[Tensor]:
    """The files as each network sees them, (N, C, H, W)."""
    import torch

    from locallearn.data import read_for_prediction

    for each in opened:
        each.trained.check_statistics(each.run)
    paths = [Path(image) for image in images]
    return [
        torch.cat(list(read_for_prediction(paths, each.trained.config.inputs))) for each in opened
    ]


def _draw_test_images(
    opened: list[Opened], data_dir: str | None, cache: str | None, num: int, seed: int
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Test images drawn at random, as each network sees them; their labels; and which they are."""
    import torch

    dataset = opened[0].load_data(data_dir, cache, None)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(dataset.test), generator=generator)[:num]
    dataset = replace(dataset, test=dataset.test.subset(order))
    inputs = []
    for number, each in enumerate(opened):
        seen: Dataset = replace(dataset, inputs=each.trained.config.inputs)
        if number and each.trained.needs_recalibration:
            each.recalibrate(each.learner, seen)
        inputs.append(torch.cat([batch.cpu() for batch, _ in _batches(each, seen)]))
    return inputs, dataset.test.labels.cpu(), order


def _batches(opened: Opened, dataset: Dataset) -> Iterator[tuple[Tensor, Tensor]]:
    return opened.test_loader(dataset, 256).epoch()


def _choose(is_right: Tensor, num: int) -> list[int]:
    """So many images, a third of them (rounded down) classified wrongly where there are as many."""
    right = is_right.nonzero()[:, 0].tolist()
    wrong = (~is_right).nonzero()[:, 0].tolist()
    num_wrong = max(min(num // 3, len(wrong)), num - len(right))
    return right[: num - num_wrong] + wrong[:num_wrong]


def _pictures(opened: Opened, inputs: Tensor) -> Tensor:
    """The images as they are in the files, in [0, 1]."""
    import torch

    spec = opened.trained.config.inputs
    mean, std = (torch.tensor(values)[:, None, None] for values in (spec.mean, spec.std))
    return (inputs * std + mean).clamp(0, 1)


def _row(
    opened: Opened,
    layer: str,
    result: _Explained,
    shown: list[int],
    names: tuple[str, ...],
    wanted: int | None,
) -> CamRow:
    from locallearn.analysis.figures.gradcam import CamRow

    explained = "" if wanted is None else f"; {names[wanted]}"
    answers = [
        f"{names[int(result.predicted[n])]}{explained} {100 * float(result.probability[n]):.0f} %"
        for n in shown
    ]
    return CamRow(f"{opened.settings.rule}, {layer}", result.heat[shown], answers)


def _print(opened: list[Opened], results: list[_Explained]) -> None:
    table = Table(
        title="mean drop of the target's probability, in points of 100",
        title_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, 1),
    )
    for heading in ("rule", "hottest fifth", "shifted", "p", "other image's", "p"):
        justify: Literal["left", "right"] = "left" if heading == "rule" else "right"
        table.add_column(heading, justify=justify, no_wrap=True)
    for each, result in zip(opened, results, strict=True):
        n = result.numbers()
        other = n["excess_over_other"]
        table.add_row(
            each.settings.rule,
            f"{100 * n['drop_hottest']:.1f}",
            f"{100 * n['drop_shifted']:.1f}",
            f"{n['excess_over_shifted']['p_value']:.4f}",
            "-" if other is None else f"{100 * n['drop_other']:.1f}",
            "-" if other is None else f"{other['p_value']:.4f}",
        )
    Console(highlight=False).print(table)


def _caption(
    opened: list[Opened],
    layers: list[tuple[str, nn.Module]],
    results: list[_Explained],
    labels: Tensor | None,
    shown: list[int],
    names: tuple[str, ...],
    wanted: int | None,
) -> str:
    """What the figure shows, in numbers, and whether the maps are of what counts."""
    of = "the predicted class" if wanted is None else names[wanted]
    if labels is None:
        which = _counted(len(shown), "image file")
    else:
        num_right = int((results[0].predicted == labels)[shown].sum())
        which = _drawn(opened, len(labels), num_right, len(shown) - num_right)
    parts = [f"Grad-CAM for {of}: {which}."]
    for each, (layer, _), result in zip(opened, layers, results, strict=True):
        n = result.numbers()
        other = "" if n["drop_other"] is None else (
            f" and by {-100 * n['drop_other']:+.1f} under other images' masks"
        )  # fmt: skip
        num = len(result.predicted)
        parts.append(
            f"{each.title}, block {layer}: deleting the hottest fifth of the pixels changes the "
            f"probability by {-100 * n['drop_hottest']:+.1f} points on average "
            f"({_counted(num, 'image')}), by {-100 * n['drop_shifted']:+.1f} where the masks are "
            f"shifted{other}{_verdict(n, num)}"
        )
    return " ".join(parts)


def _drawn(opened: list[Opened], num: int, num_right: int, num_wrong: int) -> str:
    """Which of so many test images are shown: the split is the command's, not the network's."""
    whose = opened[0].title if len(opened) == 1 else f"the first network ({opened[0].title})"
    subjects = iter((whose, "it"))
    halves = [
        f"the first {f'{count} ' if count > 1 else ''}that {next(subjects)} classifies {how}"
        for count, how in ((num_right, "rightly"), (num_wrong, "wrongly"))
        if count
    ]
    return f"of {_counted(num, 'test image')} drawn at random, {' and '.join(halves)}"


def _counted(num: int, noun: str) -> str:
    return f"{num:,} {noun}{'' if num == 1 else 's'}"


def _verdict(numbers: dict[str, Any], num_images: int) -> str:
    if num_images < _MIN_IMAGES:
        return ". Of so few images that can't be told from chance."
    controls = [numbers["excess_over_shifted"], numbers["excess_over_other"]]
    if all(control["p_value"] < _SIGNIFICANT for control in controls):
        return ", so the maps point at what the answers rest on."
    return ", so the maps are not shown to point at what the answers rest on."
