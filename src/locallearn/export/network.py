"""The network as it runs on a device that does not train, traced by torch.export.

Shapes: N batch, C channels, H W height and width, K classes.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.passes import move_to_device_pass

from locallearn.engine import LocalLearner
from locallearn.engine.blocks import call_model
from locallearn.engine.exits import OUTPUT, EarlyExits
from locallearn.engine.procedures import logits_of
from locallearn.errors import UserError
from locallearn.export.description import INPUT, LOGITS, Description

# Images that the network is traced with: neither 0 nor 1, which torch.export takes for constants.
NUM_TRACED = 3


class DeviceNetwork(nn.Module):
    """A learner's network, and in front of it what turns pixels into what it was trained on.

    Arguments:
        learner: in evaluation mode.
        exits: blocks whose local logits are outputs too; None for none.
        description: says what the network takes.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, learner: LocalLearner, exits: EarlyExits | None, description: Description
    ) -> None:
        super().__init__()
        self.model = learner.model
        # The exits' heads: what a module computes with must lie in it, for torch to export it.
        self.heads = learner.heads if exits is not None else nn.ModuleList()
        self._exits = exits
        self._takes_pixels = description.takes_pixels
        if self._takes_pixels:
            # As the op `augment` makes a batch of pixels.
            device = next(self.model.parameters()).device
            mean = torch.tensor(description.mean, device=device)
            std = torch.tensor(description.std, device=device)
            self.register_buffer("scale", (1 / (255 * std)).view(-1, 1, 1))
            self.register_buffer("shift", (-mean / std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Output name -> logits (N, K), float32.

        Arguments:
            images: as the description says.
        """
        if self._takes_pixels:
            images = images.permute(0, 3, 1, 2).float() * self.scale + self.shift
        return outputs_of(self.model, self._exits, images)


def outputs_of(model: nn.Module, exits: EarlyExits | None, inputs: Tensor) -> dict[str, Tensor]:
    """Output name -> logits (N, K): the network's own, and those of each exit.

    Arguments:
        model: in evaluation mode.
        exits: of the model, or None.
        inputs: as the model takes them.
    """
    if exits is None:
        return {LOGITS: logits_of(call_model(model, inputs))}
    found = exits.logits(inputs)
    return {LOGITS: found.pop(OUTPUT), **{output_name(name): found[name] for name in found}}


def output_name(block: str) -> str:
    """Of a block's local logits in a file."""
    return f"{block}.logits" if block in (INPUT, LOGITS) else block


def check_exportable(model: nn.Module) -> None:
    """Raises UserError for weights that are not float32."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise UserError(
                f"{name!r} is {parameter.dtype}; a file holds float32 weights, so export the "
                f"learner of model.float()."
            )


def trace(network: nn.Module, example: Tensor) -> ExportedProgram:
    """The network as a graph, for batches of any size.

    Arguments:
        network: in evaluation mode, of any device; the graph is the CPU's.
        example: a batch as it takes them; at least one.

    Raises:
        UserError: a forward that torch.export can't follow, or only for one size of the batch.
    """
    example = example[torch.arange(NUM_TRACED) % len(example)]
    batch = Dim("batch")
    try:
        with quietly(), torch.no_grad(), _plain_attention():
            program = torch.export.export(
                network, (example,), dynamic_shapes={INPUT: {0: batch}}, strict=False
            )
    except Exception as error:  # of torch's many kinds, or of the model's own forward
        if "Constraints violated" in str(error):
            raise UserError(
                "the model's forward fixes the number of images: the file could take no other. "
                "len(images) and int(images.shape[0]) do that; use images.shape[0] as it is."
            ) from error
        raise UserError(
            f"torch.export can't follow the model's forward: {first_line(error)}."
        ) from error
    if example.device.type != "cpu":
        program = move_to_device_pass(program, "cpu")
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)  # paths of this machine
    return program


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Within: torch's transformer layers run their own modules also in inference, and not one fused
    operator that ONNX does not have."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Within: no warning and no log below an error, as the exporters give dozens of."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def first_line(error: BaseException) -> str:
    """What went wrong, without the pages that torch writes below it, and without a full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no word of why'}".rstrip(".")
