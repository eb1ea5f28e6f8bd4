"""Arguments and options that several subcommands have."""

from __future__ import annotations

from typing import Annotated

import typer

WeightsArgument = Annotated[
    str,
    typer.Argument(help="Run directory, checkpoint.pt or model.safetensors.", metavar="RUN"),
]
DataDirOption = Annotated[
    str | None, typer.Option(help="Where the data is now, if it has moved.", show_default=False)
]
CacheOption = Annotated[
    str | None,
    typer.Option(
        help="Where decoded images are kept, instead of the run's --cache; '' for nowhere.",
        show_default=False,
    ),
]
BatchSizeOption = Annotated[int, typer.Option(help="Images at a time.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
