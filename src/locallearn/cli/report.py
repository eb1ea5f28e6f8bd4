"""`locallearn report`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[
        list[str],
        typer.Argument(
            help="Run directories, or directories with runs below them.", metavar="RUN..."
        ),
    ],
    out: Annotated[
        str, typer.Option(help="The page to write.", metavar="FILE.html")
    ] = "report.html",
    title: Annotated[
        str | None, typer.Option(help="Of the page. Default: what is compared.", show_default=False)
    ] = None,
) -> None:
    """Compare runs on one page of HTML: results, curves, costs, settings, figures, commands.

    The page needs no other file and no network. Runs that differ in the seed alone are shown as
    mean and standard deviation; runs that are not finished, with the epochs there are.
    """
    from locallearn.analysis.report import collect_runs, render_report
    from locallearn.engine.files import check_target, write_atomically

    target = Path(out)
    check_target(target, "--out")
    foreign: list[Path] = []
    found = collect_runs([Path(run) for run in runs], foreign.append)
    write_atomically(target, render_report(found, title).encode())
    if foreign:
        more = f" (and {len(foreign) - 1} more)" if len(foreign) > 1 else ""
        print(f"note: {foreign[0]}{more}: not written by locallearn, passed over", file=sys.stderr)
    unfinished = sum(not run.is_finished for run in found)
    note = f", {unfinished} of them not finished" if unfinished else ""
    print(f"report on {len(found)} run{'s' * (len(found) > 1)}{note} written to {target}")
