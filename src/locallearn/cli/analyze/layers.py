"""`locallearn analyze layers`."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.table import Table

from locallearn.cli.analyze.opening import (
    LimitOption,
    Opened,
    OutOption,
    RunArgument,
    figure_directory,
    open_run,
    write_figure,
)
from locallearn.cli.naming import file_name
from locallearn.cli.options import BatchSizeOption, CacheOption, DataDirOption, DeviceOption
from locallearn.errors import UserError


def layers(
    run: RunArgument,
    limit: LimitOption = None,
    out: OutOption = None,
    data_dir: DataDirOption = None,
    cache: CacheOption = None,
    batch_size: BatchSizeOption = 256,
    device: DeviceOption = "auto",
) -> None:
    """Accuracy of each block's own head: over the epochs, and on the test set.

    Of rules whose local heads give logits. The curves are of the training images, as metrics.csv
    has them; the test accuracies are of the weights as they are now.
    """
    from locallearn.analysis.figures.drawing import figure_class
    from locallearn.analysis.figures.layers import plot_layers
    from locallearn.analysis.layers import head_accuracies, read_curves
    from locallearn.engine import RunDirectory
    from locallearn.rules import ProjectionRule, list_rules, rule_class

    figure_class()
    opened = open_run(run, device)
    curves = read_curves(RunDirectory(Path(run)))
    views = opened.views()
    if any(view.name not in curves.blocks for view in views):
        having = [name for name in list_rules() if issubclass(rule_class(name), ProjectionRule)]
        given = opened.settings.local_loss
        rule = opened.settings.rule + (f" with local-loss {given}" if given else "")
        raise UserError(
            f"rule {rule!r} has no local heads with logits, and so no accuracy by block. Rules "
            f"that have: {', '.join(having)} (local-losses unless sim)."
        )
    directory = figure_directory(run, out)
    dataset = opened.load_data(data_dir, cache, limit)
    loader = opened.test_loader(dataset, batch_size)
    by_block, network = head_accuracies(opened.learner, views, loader.epoch())

    num = len(dataset.test)
    caption = _caption(opened, by_block, network, num, curves.epochs[-1])
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("block", no_wrap=True)
    for heading in ("training %, last epoch", "test %"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, accuracy in by_block.items():
        table.add_row(name, f"{curves.blocks[name][-1]:.2f}", f"{accuracy:.2f}")
    table.add_row("network", f"{curves.train[-1]:.2f}", f"{network:.2f}")
    Console(highlight=False).print(table)
    print(caption)
    numbers = {
        "num_images": num,
        "test_acc": network,
        "test_acc_by_block": by_block,
        "epochs": curves.epochs,
        "train_acc_by_block": {name: curves.blocks[name] for name in by_block},
        "network_train_acc": curves.train,
        "network_test_acc": curves.test,
    }
    figure = plot_layers(curves, by_block, network, title=opened.title)
    write_figure(opened, directory, file_name("layers"), figure, caption, numbers)


def _caption(
    opened: Opened, by_block: dict[str, float], network: float, num: int, num_epochs: int
) -> str:
    """What the figure shows, in numbers."""
    each = ", ".join(f"{name} {accuracy:.1f} %" for name, accuracy in by_block.items())
    return (
        f"Accuracy of each block's own head over {num_epochs} epochs ({opened.title}), and on "
        f"{num:,} test images at the end: {each}; the network's classifier {network:.1f} %. "
        f"{describe_course(by_block, network)}The paper has no such figure."
    )


def describe_course(by_block: dict[str, float], network: float) -> str:
    """How accuracy goes from block to block, as it is printed, in sentences with a space behind.

    Arguments:
        by_block: block name -> percent, in the order of the forward.
        network: the classifier's, percent.
    """
    names, values = list(by_block), [round(value, 1) for value in by_block.values()]
    if len(names) == 1:
        return ""
    steps = list(zip(names[1:], pairwise(values), strict=True))
    courses = {
        "falls": [name for name, (before, after) in steps if after < before],
        "stays the same": [name for name, (before, after) in steps if after == before],
        "rises": [name for name, (before, after) in steps if after > before],
    }
    there = {verb: at for verb, at in courses.items() if at}
    parts = [f"{verb} at {', '.join(at)}" for verb, at in there.items()]
    if len(there) == 1:
        parts = [f"{next(iter(there))} from block to block"]
    elif len(there.get("rises", [])) > 1:
        parts[-1] = "rises at every other step"
    *first, last = parts
    listed = f"{', '.join(first)} and {last}" if first else last
    course = f"The heads' accuracy {listed}. "
    if values[-1] > round(network, 1):
        course += "The last block's own head is right more often than the classifier behind it. "
    return course
