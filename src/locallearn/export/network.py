"""The network as a device runs it, traced by torch.export.

Shapes: N batch, C channels, H W height and width, K classes.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from locallearn.engine import LocalLearner
from locallearn.engine.blocks import call_model
from locallearn.engine.procedures import logits_of
from locallearn.errors import UserError
from locallearn.export.description import INPUT, LOGITS, Description

# Images that the network is traced with: neither 0 nor 1, which torch.export takes for constants.
NUM_TRACED = 3


class DeviceNetwork(nn.Module):
    """A copy of a learner's network: on the CPU, in float32, in evaluation mode.

    Arguments:
        learner: in evaluation mode.
        description: says what the network takes, and which outputs it yields.

    Raises:
        UserError: a model that can't be copied.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, learner: LocalLearner, description: Description) -> None:
        super().__init__()
        try:
            model = copy.deepcopy(learner.model)
        except Exception as error:  # whatever a module of another make says against it
            raise UserError(
                f"{type(learner.model).__name__} can't be copied, and so not exported: "
                f"{first_line(error)}."
            ) from error
        self.model = model.cpu().float().eval()
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            tensor.data = tensor.data.contiguous()
            tensor.requires_grad_(False)
        self._takes_pixels = description.takes_pixels
        if self._takes_pixels:
            # As the op `augment` makes a batch of pixels.
            mean, std = torch.tensor(description.mean), torch.tensor(description.std)
            self.register_buffer("scale", (1 / (255 * std)).view(-1, 1, 1))
            self.register_buffer("shift", (-mean / std).view(-1, 1, 1))
        self.eval()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Output name -> logits (N, K), float32.

        Arguments:
            images: as the description says.
        """
        if self._takes_pixels:
            images = images.permute(0, 3, 1, 2).float() * self.scale + self.shift
        return {LOGITS: logits_of(call_model(self.model, images))}


def trace(network: nn.Module, example: Tensor) -> ExportedProgram:
    """The network as a graph, for batches of any size.

    Arguments:
        network: in evaluation mode, on the CPU.
        example: a batch as it takes them; at least one.

    Raises:
        UserError: a forward that torch.export can't follow, or only for one size of the batch.
    """
    example = example[torch.arange(NUM_TRACED) % len(example)]
    batch = Dim("batch")
    try:
        with quietly(), torch.no_grad():
            program = torch.export.export(
                network, (example,), dynamic_shapes={INPUT: {0: batch}}, strict=False
            )
    except Exception as error:  # of torch's many kinds, or of the model's own forward
        raise UserError(
            f"torch.export can't follow the model's forward for batches of any size: "
            f"{first_line(error)}."
        ) from error
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)  # paths of this machine
    return program


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
