"""`locallearn analyze semantics`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
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
    figure_directory,
    open_run,
    write_figure,
)
from locallearn.cli.naming import file_name
from locallearn.cli.options import BatchSizeOption, CacheOption, DataDirOption, DeviceOption
from locallearn.errors import UserError, unknown_name

if TYPE_CHECKING:
    from torch import Tensor

    from locallearn.analysis.latents import BlockView
    from locallearn.analysis.shuffling import Shuffled

_VECTORS = ("modulation", "latents")
_SIGNIFICANT = 0.05


def semantics(
    run: RunArgument,
    block: BlockOption = None,
    of: Annotated[
        str,
        typer.Option(help="modulation (M's vector of a class), or latents (a class's mean)."),
    ] = "modulation",
    groups: Annotated[
        str | None,
        typer.Option(
            help="Which classes belong together: {group: [class, ...]} as .json, or rows "
            "group,class as .csv. Default: the groups of CIFAR-10 and CIFAR-100.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    seed: SeedOption = 0,
    limit: LimitOption = None,
    out: OutOption = None,
    data_dir: DataDirOption = None,
    cache: CacheOption = None,
    batch_size: BatchSizeOption = 256,
    device: DeviceOption = "auto",
) -> None:
    """Whether what a block learns of similar classes is similar (the paper's figure 3).

    t-SNE of the classes by their vectors in M, coloured by group, and the silhouette by group
    against shuffled groups. By default of the last block. Data is needed for --of latents alone.
    docs/analysis.md has the formulas.
    """
    from locallearn.analysis.figures.drawing import figure_class
    from locallearn.analysis.figures.semantics import plot_semantics
    from locallearn.analysis.latents import choose_view, class_means
    from locallearn.analysis.semantics import (
        cosine_distances,
        directions,
        embed,
        euclidean_distances,
        num_arrangements,
        silhouette,
    )
    from locallearn.analysis.superclasses import groups_of

    if of not in _VECTORS:
        raise unknown_name("choice of --of", of, _VECTORS)
    figure_class()
    opened = open_run(run, device)
    views = opened.views()
    place = choose_view(views, block, len(views) - 1)
    names = opened.class_names
    by_class = groups_of(names, None if groups is None else Path(groups))
    if of == "modulation":
        vectors = _modulations(opened, views)
    directory = figure_directory(run, out)
    if of == "latents":
        dataset = opened.load_data(data_dir, cache, limit)
        loader = opened.test_loader(dataset, batch_size)
        means = class_means(opened.learner, views, loader.epoch(), only_correct=False)
        check_every_class(names, means.counts)
        vectors = [means.means[view.name] for view in views]

    scores: list[Shuffled | None] = []
    for number, each in enumerate(vectors):
        try:
            scores.append(silhouette(cosine_distances(directions(each)), by_class, seed=seed))
        except UserError as error:
            if number == place:
                raise UserError(f"block {views[number].name}: {error}") from error
            scores.append(None)
    chosen = scores[place]
    assert chosen is not None
    embedding = embed(directions(vectors[place]), seed=seed)
    of_embedding = silhouette(euclidean_distances(embedding.points), by_class, seed=seed)
    what = "column of M" if of == "modulation" else "mean latent"
    verdict = _verdict(chosen, by_class, _saying(of, views[place], by_class))
    caption = _caption(opened, views[place].name, what, by_class, chosen, of_embedding, verdict)
    _print(views, scores)
    print(caption)
    figure = plot_semantics(
        embedding,
        scores,
        class_names=names,
        groups=by_class,
        block_names=[view.name for view in views],
        place=place,
        what=what,
        title=opened.title,
    )
    name = file_name(
        "semantics",
        views[place].name,
        "latents" if of == "latents" else None,
        None if groups is None else Path(groups).stem,
    )
    numbers = {
        "block": views[place].name,
        "of": of,
        "class_names": list(names),
        "groups": by_class,
        "num_arrangements": num_arrangements(by_class),
        "seed": seed,
        "perplexity": embedding.perplexity,
        "points": embedding.points.tolist(),
        "silhouette_of_points": asdict(of_embedding),
        "blocks": [
            {"block": view.name, "silhouette": None if score is None else asdict(score)}
            for view, score in zip(views, scores, strict=True)
        ],
    }
    write_figure(opened, directory, name, figure, caption, numbers)


def _modulations(opened: Opened, views: list[BlockView]) -> list[Tensor]:
    """M's vector of each class, (K, R), for each block."""
    from locallearn.rules import MatrixModulatedHead, list_rules, rule_class
    from locallearn.rules.lls import ModulatedRule

    vectors = []
    for view in views:
        if not isinstance(view.head, MatrixModulatedHead):
            having = [
                name
                for name in list_rules()
                if issubclass(rule_class(name), ModulatedRule) and name != "lls-m"
            ]
            raise UserError(
                f"rule {opened.learner.rule.name!r} has no M with a vector for each class; rules "
                f"that have: {', '.join(having)}. Use --of latents."
            )
        vectors.append(view.head.modulation.detach().cpu().T)
    return vectors


def _caption(
    opened: Opened,
    block: str,
    what: str,
    by_class: list[str],
    score: Shuffled,
    of_embedding: Shuffled,
    verdict: str,
) -> str:
    """What the figure shows, in numbers, and whether it is what the paper says."""
    return (
        f"t-SNE of the {len(by_class)} classes by their {what} in block {block} ({opened.title}), "
        f"coloured by {len(set(by_class))} groups; the silhouette by group is {score.value:.3f} "
        f"({score.mean:.3f} ± {score.std:.3f} with the groups shuffled, p = {score.p_value:.3f}), "
        f"and of the points drawn it is {of_embedding.value:.3f}. {verdict}"
    )


def _saying(of: str, view: BlockView, by_class: list[str]) -> str:
    """How what is looked at stands to the paper's statement, of M and CIFAR-100's superclasses."""
    from locallearn.analysis.superclasses import CIFAR100
    from locallearn.rules import MatrixModulatedHead

    if of == "modulation":
        is_the_papers = set(by_class) == set(CIFAR100)
        return "as the paper says" + ("" if is_the_papers else " of CIFAR-100's superclasses")
    if isinstance(view.head, MatrixModulatedHead):
        return "though the paper says so of M, not of latents"
    return "which the data brings about without M"


def _verdict(score: Shuffled, by_class: list[str], saying: str) -> str:
    """What the score says, and ``saying`` where it says so."""
    from locallearn.analysis.semantics import num_arrangements

    if 1 / num_arrangements(by_class) >= _SIGNIFICANT:
        return "There are too few classes to tell whether that is chance."
    if score.p_value >= _SIGNIFICANT:
        return (
            f"That is not told from chance at p < {_SIGNIFICANT}: it does not show that classes of "
            f"a group lie close together."
        )
    if score.value <= 0:
        return (
            "Classes of a group lie closer than by chance, though on average no closer than the "
            "nearest other group."
        )
    return f"Classes of a group lie close together, more than by chance, {saying}."


def _print(views: list[BlockView], scores: list[Shuffled | None]) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for heading in ("block", "silhouette", "groups shuffled", "p"):
        justify: Literal["left", "right"] = "left" if heading == "block" else "right"
        table.add_column(heading, justify=justify, no_wrap=True)
    for view, score in zip(views, scores, strict=True):
        if score is None:
            table.add_row(view.name, "-", "-", "-")
            continue
        spread = f"{score.mean:.3f} ± {score.std:.3f}"
        table.add_row(view.name, f"{score.value:.3f}", spread, f"{score.p_value:.3f}")
    Console(highlight=False).print(table)
