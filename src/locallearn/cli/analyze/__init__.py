"""`locallearn analyze`: the paper's figures, of a run of one's own."""

from __future__ import annotations

import typer

from locallearn.cli.analyze import gradcam, layers, semantics, synchrony

app = typer.Typer(help="Figures of a trained network, with the numbers they show.")
app.command("synchrony")(synchrony.synchrony)
app.command("semantics")(semantics.semantics)
app.command("gradcam")(gradcam.gradcam)
app.command("layers")(layers.layers)


@app.callback(invoke_without_command=True)
def _root(ctx: typer.Context) -> None:
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())
