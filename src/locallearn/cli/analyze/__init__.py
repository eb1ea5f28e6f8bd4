"""`locallearn analyze`: the paper's figures, of a run of one's own."""

from __future__ import annotations

import typer

from locallearn.cli.analyze import gradcam, layers, semantics, synchrony

app = typer.Typer(
    help="Figures of a trained network, with the numbers they show: docs/analysis.md.",
    no_args_is_help=True,
)
app.command("synchrony")(synchrony.synchrony)
app.command("semantics")(semantics.semantics)
app.command("gradcam")(gradcam.gradcam)
app.command("layers")(layers.layers)
