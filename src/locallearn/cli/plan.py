"""`locallearn plan`."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from locallearn.cli.command import running_command
from locallearn.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from locallearn.analysis.parallel_plan import Plan, Prediction, Setup
    from locallearn.engine.block_costs import BackpropCost, BlockCost

_MOST_DEVICES = 4096
_PLOTTED_DEVICES = 64
_NUM_ROUNDS = 3


def plan(
    model: Annotated[
        str, typer.Option(help="Network, named as in `locallearn train`.")
    ] = "smallconv",
    rule: Annotated[
        str, typer.Option(help="A local rule; options as NAME:OPTION=VALUE.")
    ] = "lls-mxm",
    devices: Annotated[int, typer.Option(help="How many there are.")] = 2,
    bandwidth: Annotated[
        float, typer.Option(help="Of a link between two, GB/s (1e9 bytes) each way.")
    ] = 12.5,
    latency: Annotated[float, typer.Option(help="Of a message, microseconds.")] = 20.0,
    batch_size: Annotated[int, typer.Option(help="Images a step, over all devices.")] = 128,
    image_size: Annotated[int, typer.Option(help="Height and width, pixels.")] = 32,
    channels: Annotated[int, typer.Option(help="Of the images.")] = 3,
    classes: Annotated[int, typer.Option(help="How many.")] = 10,
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    device: Annotated[
        str, typer.Option(help="To measure on, as each of them is: auto, cpu or cuda.")
    ] = "auto",
    backend: Annotated[
        str,
        typer.Option(
            help="Of the closed form: auto (triton on CUDA), compiled, triton, cuda, reference, "
            "autograd."
        ),
    ] = "auto",
    num_threads: Annotated[int, typer.Option(help="CPU threads of each process.")] = 1,
    beside: Annotated[
        int,
        typer.Option(
            help="Other processes that take the same steps on this host while costs are measured: "
            "devices that share a memory slow each other down."
        ),
    ] = 0,
    repeats: Annotated[int, typer.Option(help="How often each step is timed.")] = 9,
    json: Annotated[
        str | None, typer.Option(help="Write costs and predictions.", metavar="FILE.json")
    ] = None,
    plot: Annotated[
        str | None, typer.Option(help="Draw speed-up against devices.", metavar="FILE.png")
    ] = None,
) -> None:
    """What layers, copies or both in parallel would gain, and GPipe beside them.

    Measures what each block costs here, at several batch sizes, under the rule and under bp. The
    rest is a model of time, whose assumptions are printed below its figures.
    """
    import torch

    from locallearn.analysis.parallel_plan import plan_for, speedup_curves
    from locallearn.engine import PRECISIONS, choose_device
    from locallearn.engine.allocator import keep_freed_memory
    from locallearn.engine.environment import describe_environment
    from locallearn.engine.files import check_target, write_atomically, write_json
    from locallearn.errors import unknown_name

    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)
    for name, value, low in (
        ("devices", devices, 1),
        ("batch-size", batch_size, 2),
        ("channels", channels, 1),
        ("classes", classes, 1),
        ("num-threads", num_threads, 1),
        ("repeats", repeats, 1),
        ("beside", beside, 0),
    ):
        if value < low:
            raise UserError(f"--{name} must be at least {low}, got {value}.")
    if devices > _MOST_DEVICES:
        raise UserError(f"--devices must be at most {_MOST_DEVICES}, got {devices}.")
    if not 0 < bandwidth < float("inf"):
        raise UserError(f"--bandwidth must be a number of GB/s above 0, got {bandwidth}.")
    if not 0 <= latency < float("inf"):
        raise UserError(f"--latency must be a number of microseconds from 0, got {latency}.")
    for given, name in ((json, "--json"), (plot, "--plot")):
        if given is not None:
            check_target(Path(given), name)
    place = choose_device(device)
    if place == "mps":
        raise UserError("plan measures on cpu and cuda; use --device cpu.")
    torch.set_num_threads(num_threads)
    if place == "cpu":
        keep_freed_memory()

    console = Console(highlight=False)
    settings: dict[str, Any] = {
        "model": model,
        "rule": rule,
        "batch_size": batch_size,
        "image_shape": (channels, image_size, image_size),
        "num_classes": classes,
        "precision": precision,
        "device": place,
        "backend": backend,
        "num_threads": num_threads,
    }
    with console.status("") as status:
        setup = _measured(
            settings,
            devices,
            _most_parts(devices, is_plotted=plot is not None),
            (bandwidth, latency),
            beside,
            repeats,
            status.update,
        )
    found = plan_for(setup, devices)
    environment = describe_environment(place)
    title = (
        f"{model}, {rule}, {channels}x{image_size}x{image_size}, batch {batch_size}, {precision}, "
        f"{environment['device_name']} ({place}), {num_threads} "
        f"thread{'s' * (num_threads != 1)}; links {bandwidth:g} GB/s, {latency:g} us"
    )
    print(title)
    print(
        f"one device: {rule} {setup.one_device_ms:,.1f} ms a step, bp "
        f"{setup.one_device_backprop_ms:,.1f} ms"
    )
    console.print(_table_of_ways(found, setup))
    console.print(_table_of_stages(found.local[0]))
    print(_command(found.local[0], settings))
    for line in (*_remarks(found, setup), *_assumptions(setup, beside, place)):
        print(line)
    if json is not None:
        document = {
            "command": running_command(),
            "environment": environment,
            "num_threads": num_threads,
            "beside": beside,
            "batch_size": batch_size,
            "link": asdict(setup.link),
            "one_device_ms": setup.one_device_ms,
            "one_device_backprop_ms": setup.one_device_backprop_ms,
            "most_stages": setup.most_stages,
            "num_devices": devices,
            "ways": [asdict(each) for each in found.local],
            "gpipe": [asdict(each) for each in found.gpipe],
            "assumptions": _assumptions(setup, beside, place),
            "costs": {"local": setup.local.to_json(), "backprop": setup.backprop.to_json()},
        }
        write_json(Path(json), document)
        print(f"written to {json}")
    if plot is not None:
        from locallearn.analysis.figures.parallel_plan import plot_speedups

        curves = speedup_curves(setup, max(_PLOTTED_DEVICES, devices))
        caption = " ".join(
            (
                f"One device: {rule} {setup.one_device_ms:,.1f} ms a step, bp "
                f"{setup.one_device_backprop_ms:,.1f} ms.",
                *_assumptions(setup, beside, place),
            )
        )
        target = Path(plot)
        write_atomically(target, plot_speedups(curves, title, caption, target))
        print(f"drawn to {plot}")


def _most_parts(devices: int, *, is_plotted: bool) -> int:
    """Into how many a batch may have to be cut: by replicas, or into micro-batches, of which a
    pipeline gains by having several for each stage."""
    most_devices = max(_PLOTTED_DEVICES, devices) if is_plotted else devices
    return 1 if most_devices == 1 else max(16, 4 * most_devices)


def _measured(
    settings: dict[str, Any],
    num_devices: int,
    most_parts: int,
    link: tuple[float, float],
    num_beside: int,
    repeats: int,
    on_progress: Callable[[str], None],
) -> Setup:
    """Costs of the blocks, and the rest of what a prediction takes.

    Arguments:
        settings: of :class:`MeasuredSteps`.
        num_devices: that are to be used whole.
        most_parts: that a batch may be cut into; costs are measured down to such a part.
        link: GB/s and us.
        num_beside: processes that take the same steps meanwhile.
        repeats: timed steps.
        on_progress: told what is going on.

    Raises:
        UserError: no stages and copies make so many devices; or what can't be built or cut.
    """
    import functools

    from locallearn.analysis.parallel_plan import CostTable, Link, Setup, factorisations
    from locallearn.distributed.balance import balanced
    from locallearn.distributed.stages import Spread
    from locallearn.engine.block_costs import (
        halved,
        measure_backprop_costs,
        measure_block_costs,
        median_of,
    )
    from locallearn.engine.host_transfer import measure_host_transfer_ms_per_mib
    from locallearn.engine.measured_steps import MeasuredSteps, steps_beside

    steps = MeasuredSteps(**settings)
    images, labels = steps.batch()
    on_progress("building")
    learner = steps.learner(settings["rule"])
    spread = Spread(learner, images)
    allowed = [spread.can_begin_at(name) for name in spread.names]
    backprop = steps.learner("bp")
    most_stages = 1 + sum(allowed[1:])
    sizes = halved(settings["batch_size"], settings["batch_size"] // most_parts)
    most_replicas = settings["batch_size"] // sizes[-1]
    if not factorisations(num_devices, most_stages, most_replicas):
        raise UserError(
            f"--devices {num_devices} can't be used whole: the network can be cut into at most "
            f"{most_stages} stages, and a batch of {settings['batch_size']} shared by at most "
            f"{most_replicas} copies ({sizes[-1]} images each), and {num_devices} is no product of "
            f"two such numbers. Give another number of devices, or a larger --batch-size."
        )
    local: dict[int, list[list[BlockCost]]] = {size: [] for size in sizes}
    by_backprop: dict[int, list[list[BackpropCost]]] = {size: [] for size in sizes}
    of_round: dict[str, Any] = {"repeats": -(-repeats // _NUM_ROUNDS), "limit_seconds": 1.5}
    with steps_beside(steps, num_beside):
        # All sizes in turn, and again: what slows this machine for a while slows all of them.
        for number in range(_NUM_ROUNDS):
            for size in sizes:
                on_progress(f"round {number + 1} of {_NUM_ROUNDS}, {size} images")
                few = (images[:size], labels[:size])
                local[size].append(measure_block_costs(learner, *few, **of_round))
                by_backprop[size].append(measure_backprop_costs(backprop, *few, **of_round))
            of_round["warm_up"] = 1
    is_on_host = settings["device"] == "cpu"
    return Setup(
        local=CostTable({size: median_of(rounds) for size, rounds in local.items()}),
        backprop=CostTable({size: median_of(rounds) for size, rounds in by_backprop.items()}),
        batch_size=settings["batch_size"],
        link=Link(*link, measure_host_transfer_ms_per_mib() if is_on_host else 0.0),
        balance=functools.partial(balanced, allowed=allowed),
        most_stages=most_stages,
    )


def _table_of_ways(found: Plan, setup: Setup) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("way", no_wrap=True)
    for heading in ("ms a step", "images/s", "speed-up", "x bp", "idle", "fill ms"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("bound by", no_wrap=True)
    for each in (*found.local, found.gpipe[0]):
        m = each.num_micro_batches
        table.add_row(
            each.way if m is None else f"gpipe:{m}",
            f"{each.step_ms:,.1f}",
            f"{each.images_per_second(setup.batch_size):,.0f}",
            f"{each.speedup:.2f}",
            f"{setup.one_device_backprop_ms / each.step_ms:.2f}",
            f"{100 * each.idle_share:.0f} %",
            "-" if m is not None else f"{each.fill_ms:,.1f}",
            each.bound_by,
        )
    return table


def _table_of_stages(best: Prediction) -> Table:
    table = Table(
        title=f"stages of {best.way}, the fastest; times in ms",
        title_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, 1),
    )
    table.add_column("stage", justify="right")
    table.add_column("blocks", overflow="fold")
    for heading in ("compute", "send", "reduce", "busy", "sent MiB", "link"):
        table.add_column(heading, justify="right", no_wrap=True)
    for number, stage in enumerate(best.stages):
        names = [name or "output" for name in stage.blocks]
        named = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
        table.add_row(
            str(number),
            named,
            f"{stage.compute_ms:,.1f}",
            f"{stage.host_ms:,.1f}",
            f"{stage.exposed_ms:,.1f}",
            f"{100 * stage.busy_ms / best.step_ms:.0f} %",
            f"{stage.sent_bytes / 2**20:,.2f}",
            f"{stage.link_ms:,.2f}",
        )
    return table


def _command(best: Prediction, settings: dict[str, Any]) -> str:
    """How to train in that way, as it was measured: what is no default of `locallearn train`'s is
    written out. The data, of which only the shape is known here, is left to the user.

    Arguments:
        best: the way.
        settings: of :class:`MeasuredSteps`.
    """
    from locallearn.engine import TrainConfig, choose_device
    from locallearn.engine.config import flag

    channels, height, width = settings["image_shape"]
    words = [
        f"train so, with a --dataset of {channels}x{height}x{width} in {settings['num_classes']} "
        f"classes (--image-size {height}, of one that has it):"
    ]
    if best.num_devices > 1:
        words.append(f"torchrun --nproc-per-node {best.num_devices} -m")
    words.append("locallearn train")
    words += [f"--{name} {shlex.quote(settings[name])}" for name in ("model", "rule")]
    usual = TrainConfig()
    for name in ("batch_size", "precision", "backend"):
        if settings[name] != getattr(usual, name):
            words.append(f"{flag(name)} {settings[name]}")
    if settings["device"] != choose_device("auto"):
        words.append(f"--device {settings['device']}")
    if settings["device"] == "cpu":
        words.append(f"--num-threads {settings['num_threads']}")
    if best.num_devices > 1:
        words.append(f"--parallel {best.way}")
    if best.num_stages > 1:
        numbers = (sum(name != "" for name in stage.blocks) for stage in best.stages)
        words.append(f"--balance {','.join(map(str, numbers))}")
    return " ".join(words)


def _remarks(found: Plan, setup: Setup) -> list[str]:
    lines = [
        "gpipe:M: bp through a pipeline, M micro-batches a step; speed-up: over one device with "
        "the same rule; x bp: over one device with bp; idle: share of the devices' time without "
        "computing; fill: once an epoch; send, reduce: what is not hidden"
    ]
    if found.num_devices > setup.most_stages:
        lines.append(
            f"layers alone can use at most {setup.most_stages} devices: the network can be cut "
            f"into no more stages. GPipe is shown on as many."
        )
    if found.num_devices > setup.most_replicas:
        lines.append(
            f"data alone can use at most {setup.most_replicas} devices: below "
            f"{setup.local.smallest} images each nothing was measured."
        )
    return lines


def _assumptions(setup: Setup, num_beside: int, device: str) -> list[str]:
    """What the model of time takes for granted, a sentence each."""
    host = setup.link.host_ms_per_mib
    sending = f"takes {host:.2f} ms of it for each MiB" if host else "takes none of its time"
    beside = (
        f"as measured beside {num_beside} other process{'es' * (num_beside != 1)} on this host"
        if num_beside
        else "none slows another down"
    )
    return [
        f"Assumed: all devices are like this one, one process on each, and {beside}.",
        "Links carry both directions at once and are shared by nothing else; a device sends to one "
        "at a time.",
        f"Sending overlaps with computing and {sending}; receiving alike.",
        "Copies reduce each block's gradients by a ring while later blocks compute, and wait for "
        "the rest at the end of the step; each normalises by its own images.",
        "GPipe balances stages by bp's costs, keeps all activations and normalises by micro-batch.",
        "Loading and augmenting images costs nothing; costs between measured batch sizes lie on a "
        "straight line.",
        *(["Steps are launched one by one, not as a captured graph."] if device == "cuda" else []),
    ]
