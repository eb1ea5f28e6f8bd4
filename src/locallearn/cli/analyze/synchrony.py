"""`locallearn analyze synchrony`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from locallearn.cli.analyze.opening import (
    BlockOption,
    LimitOption,
    Opened,
    OutOption,
    RunArgument,
    SeedOption,
    check_every_class,
    class_numbers,
    figure_directory,
    open_run,
    write_figure,
)
from locallearn.cli.naming import file_name
from locallearn.cli.options import BatchSizeOption, CacheOption, DataDirOption, DeviceOption
from locallearn.errors import UserError, unknown_name

if TYPE_CHECKING:
    from torch import Tensor

    from locallearn.analysis.latents import BlockView, ClassMeans
    from locallearn.analysis.synchrony import Synchrony
    from locallearn.data import Dataset
    from locallearn.rules import LLS

_IMAGES = ("correct", "all")
_MAX_SHOWN = 4
_FOURTH = 3  # the paper's figure 2 is of VGG8's fourth block
_SIGNIFICANT = 0.01
_MIN_CLASSES = 5  # of four there are 24 orders, too few for such a p


def synchrony(
    run: RunArgument,
    block: BlockOption = None,
    classes: Annotated[
        str | None,
        typer.Option(
            help="Two to four classes to show, by name or number. Default: the first two.",
            metavar="A,B",
            show_default=False,
        ),
    ] = None,
    images: Annotated[
        str, typer.Option(help="Test images to average: correct (classified rightly), or all.")
    ] = "correct",
    basis: Annotated[
        str | None,
        typer.Option(
            help="cosine or square: look for these waves, instead of what the rule compares with.",
            show_default=False,
        ),
    ] = None,
    setting: Annotated[
        str | None,
        typer.Option(
            help="Of those waves: official or paper. Default of both: the run's own, or square and "
            "official.",
            show_default=False,
        ),
    ] = None,
    untrained: Annotated[
        bool, typer.Option(help="Compare with the network before its training.")
    ] = True,
    seed: SeedOption = 0,
    limit: LimitOption = None,
    out: OutOption = None,
    data_dir: DataDirOption = None,
    cache: CacheOption = None,
    batch_size: BatchSizeOption = 256,
    device: DeviceOption = "auto",
) -> None:
    """Whether a block's activations swing at their class's frequency (the paper's figure 2).

    Spectra of the mean latents of classes beside those of the waves they are compared with, and the
    synchrony index: the share of a class's energy at its own wave's frequency, against shuffled
    classes. By default of the fourth block. docs/analysis.md has the formulas.
    """
    from locallearn.analysis.figures.drawing import figure_class
    from locallearn.analysis.figures.synchrony import plot_synchrony
    from locallearn.analysis.latents import choose_view, class_means
    from locallearn.analysis.synchrony import synchrony as measure

    if images not in _IMAGES:
        raise unknown_name("choice of --images", images, _IMAGES)
    figure_class()
    opened = open_run(run, device)
    views = opened.views()
    place = choose_view(views, block, _FOURTH)
    shown = class_numbers(opened.class_names, classes) if classes is not None else [0, 1]
    if not 2 <= len(shown) <= _MAX_SHOWN:
        raise UserError(f"--classes takes two to {_MAX_SHOWN} classes, got {len(shown)}.")
    waves = _asked_waves(opened, basis, setting)
    references, reference = _references(opened, views, waves)
    directory = figure_directory(run, out)
    dataset = opened.load_data(data_dir, cache, limit)
    loader = opened.test_loader(dataset, batch_size)
    only_correct = images == "correct"
    means = class_means(opened.learner, views, loader.epoch(), only_correct=only_correct)
    check_every_class(opened.class_names, means.counts, only_correct=only_correct)
    names = [view.name for view in views]

    def compare(observed: ClassMeans) -> list[Synchrony | None]:
        """None of a block that has no spectra to compare."""
        results: list[Synchrony | None] = []
        for each, rows in zip(names, references, strict=True):
            try:
                results.append(measure(observed.means[each], rows, seed=seed))
            except UserError as error:
                if each == names[place] and observed is means:
                    raise UserError(f"block {each}: {error}") from error
                results.append(None)
        return results

    results = compare(means)
    chosen = results[place]
    assert chosen is not None
    before = None
    if untrained:
        before = compare(_before_training(opened, views, dataset, batch_size, means.kept))

    name = file_name(
        "synchrony",
        views[place].name,
        None if waves is None else f"{waves.basis}-{waves.setting}",
        "-".join(opened.class_names[number] for number in shown) if classes else None,
        "all" if images == "all" else None,
    )
    caption = _caption(opened, views[place].name, chosen, means, reference, only_correct)
    if before is not None and (fresh := before[place]) is not None:
        caption += f" Before training the index was {100 * fresh.index.value:.1f} %."
    _print(opened, views, results, before)
    print(caption)
    figure = plot_synchrony(
        results,
        before,
        block_names=names,
        place=place,
        class_names=opened.class_names,
        shown=shown,
        reference=reference,
        title=opened.title,
    )
    numbers = {
        "block": views[place].name,
        "reference": reference,
        "class_names": list(opened.class_names),
        "shown": [opened.class_names[number] for number in shown],
        "images": images,
        "num_images": len(means.kept),
        "images_by_class": means.counts.tolist(),
        "seed": seed,
        "energy": chosen.energy.tolist(),
        "frequencies_cycles_per_place": chosen.frequencies.tolist(),
        "spectra": {
            opened.class_names[number]: {
                "activation": chosen.activation[number].tolist(),
                "reference": chosen.reference[number].tolist(),
            }
            for number in shown
        },
        "blocks": [
            {
                "block": view.name,
                "latent_length": view.spec.latent_length,
                **({"index": None} if result is None else result.numbers()),
                "before_training": None if fresh is None else fresh.numbers(),
            }
            for view, result, fresh in zip(
                views, results, before or [None] * len(views), strict=True
            )
        ],
    }
    write_figure(opened, directory, name, figure, caption, numbers)


def _print(
    opened: Opened,
    views: list[BlockView],
    results: list[Synchrony | None],
    before: list[Synchrony | None] | None,
) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    headings = ("block", "index %", "shuffled %", "p", "untrained %", "peaks", "match")
    for heading in headings:
        justify: Literal["left", "right"] = "left" if heading == "block" else "right"
        table.add_column(heading, justify=justify, no_wrap=True)
    untaught = before or [None] * len(views)
    for view, result, fresh in zip(views, results, untaught, strict=True):
        if result is None:
            table.add_row(view.name, *["-"] * (len(headings) - 1))
            continue
        index, match = result.index, result.match
        table.add_row(
            view.name,
            f"{100 * index.value:.1f}",
            f"{100 * index.mean:.1f} ± {100 * index.std:.1f}",
            f"{index.p_value:.4f}",
            "-" if fresh is None else f"{100 * fresh.index.value:.1f}",
            f"{result.num_peaks_at_own} of {len(opened.class_names)}",
            f"{match.value:.2f} ({match.mean:.2f} ± {match.std:.2f})",
        )
    Console(highlight=False).print(table)


def _before_training(
    opened: Opened, views: list[BlockView], dataset: Dataset, batch_size: int, kept: Tensor
) -> ClassMeans:
    """Latents of those test images that are ``kept``, in the network as its seed made it."""
    import torch

    from locallearn.analysis.latents import class_means
    from locallearn.engine.building import build_learner

    settings = opened.settings
    torch.manual_seed(settings.seed)
    learner = build_learner(settings, opened.trained.config.inputs, len(opened.class_names))
    learner.to(opened.device)
    opened.recalibrate(learner, dataset)
    fresh = opened.views(learner)
    assert [view.name for view in fresh] == [view.name for view in views]
    loader = opened.test_loader(dataset, batch_size)
    return class_means(learner, fresh, loader.epoch(), among=kept)


def _caption(
    opened: Opened,
    block: str,
    result: Synchrony,
    means: ClassMeans,
    reference: str,
    only_correct: bool,
) -> str:
    """What the figure shows, in numbers, and whether it is what the paper says."""
    num = int(means.counts.sum())
    which = f"{num:,} test images classified rightly" if only_correct else f"{num:,} test images"
    shown = (
        f"Spectra of the mean latents by class of block {block} ({opened.title}; {which}) beside "
        f"those of {reference}. {_finding(result)}"
    )
    if result.num_overlapping:
        shown += (
            f" {result.num_overlapping} of the classes have a frequency so near another's that the "
            f"two can't be told apart fully."
        )
    return shown


def _finding(result: Synchrony) -> str:
    index, num_classes, num_peaks = result.index, len(result.peaks), result.num_peaks_at_own
    if num_classes < _MIN_CLASSES:
        told, end = "which of so few classes can't be told from chance", "."
    elif index.p_value >= _SIGNIFICANT:
        told = f"not told from chance at p < {_SIGNIFICANT}"
        end = ": it does not show the synchronisation that the paper says."
    elif 2 * num_peaks < num_classes:
        told, end = "more than by chance", ", while most peak elsewhere: less than the paper says."
    else:
        told, end = "more than by chance", ", as the paper shows for two."
    return (
        f"{100 * index.value:.1f} % of a class's energy lies at its own wave's frequency, {told} "
        f"({100 * index.mean:.1f} ± {100 * index.std:.1f} % with the classes shuffled, "
        f"p = {index.p_value:.4f}), and the spectrum peaks there for {num_peaks} of {num_classes} "
        f"classes ({result.num_peaks_shuffled:.1f} shuffled){end}"
    )


def _asked_waves(opened: Opened, basis: str | None, setting: str | None) -> LLS | None:
    """The waves to look for instead of what the rule compares with; None where none are asked."""
    from locallearn.rules import LLS
    from locallearn.rules.lls import BasisRule

    if basis is None and setting is None:
        return None
    rule = opened.learner.rule
    own = rule if isinstance(rule, BasisRule) else LLS()
    waves = LLS(basis=basis or own.basis, setting=setting or own.setting)
    if waves.basis == "random":
        raise UserError("a random basis has no frequencies. Give --basis cosine or square.")
    return waves


def _references(
    opened: Opened, views: list[BlockView], waves: LLS | None
) -> tuple[list[Tensor], str]:
    """What each block's latents are compared with, (K, T), and what that is, in words."""
    from locallearn.rules import LLSM, BasisHead
    from locallearn.rules.lls import BasisRule, ModulatedRule

    if waves is not None:
        rows = [waves.build_head(view.spec).projection() for view in views]
        return rows, f"B ({waves.basis}, {waves.setting})"
    rule = opened.learner.rule
    advice = "Give --basis cosine or square to look for the waves that LLS would use."
    if not isinstance(rule, BasisRule):
        raise UserError(f"rule {rule.name!r} compares latents with no waves. {advice}")
    if rule.basis == "random":
        raise UserError(f"the run's basis is random and has no frequencies. {advice}")
    rows = []
    for view in views:
        assert isinstance(view.head, BasisHead)
        rows.append(view.head.projection().detach().cpu())
    if not isinstance(rule, ModulatedRule):
        return rows, f"B ({rule.basis}, {rule.setting})"
    made = "scaled B" if isinstance(rule, LLSM) else "mixtures of B"
    return rows, f"D ({made}; {rule.basis}, {rule.setting})"
