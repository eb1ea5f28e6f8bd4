"""`locallearn bench`."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from locallearn.cli.command import running_command
from locallearn.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from locallearn.engine.benchmark import BenchmarkConfig, GateResult
    from locallearn.engine.op_benchmark import MachineRates, OpTime

RED_GATE = 1

_LEGEND = """* the fastest backpropagation, which the others are compared with.
  x bp*: how many times faster; of bp*: share of its activation memory"""


def bench(
    model: Annotated[
        str, typer.Option(help="Network, named as in `locallearn train`.")
    ] = "smallconv",
    rules: Annotated[
        str, typer.Option(help="Rules to put beside bp, by commas; options as NAME:OPTION=VALUE.")
    ] = "lls,lls-m,lls-mxm,lls-s",
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 128,
    image_size: Annotated[int, typer.Option(help="Height and width, pixels.")] = 32,
    channels: Annotated[int, typer.Option(help="Of the images.")] = 3,
    classes: Annotated[int, typer.Option(help="How many.")] = 10,
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    backend: Annotated[
        str,
        typer.Option(
            help="Of the closed form: auto, compiled, triton, cuda or reference; several by commas "
            "run beside each other. auto is compiled on the CPU, and on CUDA triton and cuda both."
        ),
    ] = "auto",
    threads: Annotated[
        int | None, typer.Option(help="CPU threads. Default: one a core.", show_default=False)
    ] = None,
    rounds: Annotated[int, typer.Option(help="How often each side is timed.")] = 25,
    ops: Annotated[
        bool,
        typer.Option(
            "--ops",
            help="Also time each op of an LLS step beside the least it could take; of the "
            "package's own networks.",
        ),
    ] = False,
    json: Annotated[
        str | None, typer.Option(help="Write gate, record and rows.", metavar="FILE.json")
    ] = None,
    plot: Annotated[str | None, typer.Option(help="Write a bar chart.", metavar="FILE.png")] = None,
) -> int:
    """Step time and memory beside a tuned backpropagation, in turn, once the gate is green."""
    # The profiler, which counts allocations, tells of itself on standard error.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    import torch

    from locallearn.analysis import plot_benchmark, step_cost
    from locallearn.engine import PRECISIONS, choose_device
    from locallearn.engine.allocator import keep_freed_memory
    from locallearn.engine.benchmark import BenchmarkConfig, run_benchmark, same_weights
    from locallearn.engine.environment import describe_environment
    from locallearn.engine.files import check_target, write_atomically, write_json
    from locallearn.engine.op_benchmark import time_ops
    from locallearn.errors import unknown_name
    from locallearn.models import BlockNetwork, build_model, is_foreign
    from locallearn.rules import parse_rule

    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)
    limits = (("channels", channels, 1), ("classes", classes, 1), ("batch-size", batch_size, 2))
    for name, value, low in (*limits, ("rounds", rounds, 1), ("threads", threads or 1, 1)):
        if value < low:
            raise UserError(f"--{name} must be at least {low}, got {value}.")
    for given, name in ((json, "--json"), (plot, "--plot")):
        if given is not None:
            check_target(Path(given), name)
    place = choose_device(device)
    if place == "mps":
        raise UserError("bench measures on cpu and cuda; use --device cpu.")
    backends = _chosen_backends(backend, place)
    if threads is not None:
        torch.set_num_threads(threads)
    keeps_memory = place == "cpu" and keep_freed_memory()
    config = BenchmarkConfig(
        model=model,
        rules=tuple(name.strip() for name in rules.split(",") if name.strip()),
        batch_size=batch_size,
        image_shape=(channels, image_size, image_size),
        num_classes=classes,
        precision=precision,
        device=place,
        backends=backends,
        num_rounds=rounds,
    )
    if not config.rules:
        raise UserError("--rules is empty; name one or more, separated by commas.")

    if ops and is_foreign(model):
        raise UserError(
            f"--ops times the ops of the package's own blocks, and --model {model} is from "
            f"elsewhere. Leave out --ops."
        )

    def fresh() -> nn.Module:
        return build_model(model, num_classes=classes, in_channels=channels, image_size=image_size)

    torch.manual_seed(config.seed)
    build = same_weights(fresh)
    console = Console(highlight=False)
    with console.status("") as status:
        result = run_benchmark(config, build, status.update)
        timed = None
        network = build()
        if ops and result.gate.is_green:
            assert isinstance(network, BlockNetwork)
            status.update("ops")
            timed = time_ops(
                network,
                image_shape=config.image_shape,
                batch_size=batch_size,
                num_classes=classes,
                backends=config.backends,
                precision=precision,
                device=torch.device(place),
            )
    for row in result.rows:
        how = (row["path"], row["backend"])
        is_counted = row["path"] == "closed form" or how == ("backprop", "eager")
        if is_counted and isinstance(network, BlockNetwork):
            cost = step_cost(
                network,
                parse_rule(row["rule"]),
                image_shape=config.image_shape,
                batch_size=batch_size,
                bytes_per_value=2 if precision == "bf16" else 4,
            )
            row["counted_activation_mib"] = cost.peak_activation_mib  # as `locallearn cost`
    settings = asdict(config)
    settings["backend"] = ",".join(settings.pop("backends"))
    record: dict[str, Any] = {
        "command": running_command(),
        "settings": settings,
        "num_threads": torch.get_num_threads(),
        "keeps_freed_memory": keeps_memory,
        "environment": describe_environment(place),
    }
    document = {
        "gate": "green" if result.gate.is_green else "red",
        "gate_errors": result.gate.errors,
        "record": record,
        "rows": result.rows,
    }
    if timed is not None:
        document["machine"] = asdict(timed[0])
        document["ops"] = [asdict(each) for each in timed[1]]
    if json is not None:
        write_json(Path(json), document)
    _print_gate(result.gate)
    if not result.gate.is_green:
        print("No figures: the gate is red.", file=sys.stderr)
        return RED_GATE
    title = _title(config, record)
    print(title)
    console.print(_table(result.rows))
    print(_LEGEND)
    for line in _comparisons(result.rows, backends):
        print(line)
    if timed is not None:
        console.print(_op_table(*timed))
    if json is not None:
        print(f"written to {json}")
    if plot is not None:
        target = Path(plot)
        write_atomically(target, plot_benchmark(result.rows, title, target))
        print(f"bar chart written to {plot}")
    return 0


def _chosen_backends(given: str, device: str) -> tuple[str, ...]:
    """The backends that are named, each once; on CUDA "auto" is all of those made for it.

    Raises:
        UserError: none, one that can't run on the device, or none with a closed form.
    """
    from locallearn.kernels import choose_backend, fastest_candidates, missing_for

    chosen: list[str] = []
    for name in (each.strip() for each in given.split(",")):
        if not name:
            continue
        rivals = fastest_candidates(device) if name == "auto" else []
        chosen += rivals or [choose_backend(name, device)]
    if not chosen:
        raise UserError("--backend is empty; name one or more, separated by commas.")
    if "autograd" in chosen:
        missing = missing_for("compiled", device) or "is left out by --backend autograd"
        raise UserError(f"bench compares the closed form, and backend compiled {missing}.")
    return tuple(dict.fromkeys(chosen))


def _title(config: BenchmarkConfig, record: dict[str, Any]) -> str:
    channels, height, width = config.image_shape
    return (
        f"{config.model}, {channels}x{height}x{width}, batch {config.batch_size}, "
        f"{config.precision}, {record['environment']['device_name']} ({config.device}), "
        f"{record['num_threads']} threads"
    )


def _print_gate(gate: GateResult) -> None:
    state = "green" if gate.is_green else "RED"
    print(f"gate {state}: largest gradient error, a share of the gradient's norm")
    for name, error in gate.errors.items():
        print(f"  {name:28} {error:.1e}")


def _table(rows: list[dict[str, Any]]) -> Table:
    from locallearn.analysis import side_name, three_digits

    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("side", overflow="fold")  # narrow terminals take from it alone
    for heading in ("ms a step", "p20-p80", "x bp*", "images/s", "MiB", "of bp*"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            side_name(row) + ("*" if row["is_tuned_bp"] else ""),
            three_digits(row["step_time_ms_median"]),
            f"{three_digits(row['step_time_ms_p20'])}-{three_digits(row['step_time_ms_p80'])}",
            f"{row['speedup_vs_tuned_bp_median']:.2f}",
            f"{row['images_per_second']:,.0f}",
            f"{row['peak_activation_mib']:.1f}",
            f"{row['activation_vs_tuned_bp']:.2f}",
        )
    return table


def _comparisons(rows: list[dict[str, Any]], backends: tuple[str, ...]) -> list[str]:
    """A line for each backend but the first: how many times faster than that one its steps are."""
    first, *others = backends
    lines = []
    for backend in others:
        said = [
            f"{row['rule']}{row['path'].removeprefix('closed form')} "
            f"{row[f'speedup_vs_{first}_median']:.2f} "
            f"({row[f'speedup_vs_{first}_p20']:.2f}-{row[f'speedup_vs_{first}_p80']:.2f})"
            for row in rows
            if row["backend"] == backend and f"speedup_vs_{first}_median" in row
        ]
        if said:
            lines.append(f"{backend} against {first}, times faster (p20-p80): {'; '.join(said)}")
    return lines


def _op_table(rates: MachineRates, times: list[OpTime]) -> Table:
    """Ops by row, blocks by column: milliseconds by each backend, and the floor below."""
    from locallearn.analysis import three_digits
    from locallearn.engine.op_benchmark import TORCH

    blocks = list(dict.fromkeys(each.block for each in times))
    found = {(each.op, each.backend, each.block): each for each in times}
    is_alone = len({each.backend for each in times} - {TORCH}) == 1
    table = Table(
        title=f"ms of each op by itself, and below it the least that its bytes or MACs can take "
        f"({rates.bandwidth_gb_s:.0f} GB/s, {rates.macs_g_s:,.0f} GMAC/s here)",
        title_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, 1),
    )
    table.add_column("op", no_wrap=True)
    for name in (*blocks, "sum"):
        table.add_column(name, justify="right", no_wrap=True)
    for op in dict.fromkeys(each.op for each in times):
        of_op = dict.fromkeys(each.backend for each in times if each.op == op)
        for backend in of_op:
            own = [found[op, backend, block].time_ms for block in blocks]
            label = op if is_alone or backend == TORCH else f"{op}, {backend}"
            table.add_row(label, *map(three_digits, (*own, sum(own))))
        least = [found[op, backend, block].floor_ms for block in blocks]
        table.add_row("  least", *map(three_digits, (*least, sum(least))))
    return table
