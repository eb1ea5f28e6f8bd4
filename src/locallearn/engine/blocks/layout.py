"""How a block's output lies in memory, and the view of it that heads read.

Shapes: N batch, C channels (or F features), L sequence, H W height and width, D depth, R parts
that an image was cut into (windows, time steps), each of which runs as if it were one of the batch.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from locallearn.errors import UserError

# Local heads see a block's output pooled to at most this many values (as in the authors' code).
_MAX_LATENT_LENGTH = 2048
_MAX_LATENT_SIZE = 4

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)

LatentSize = int | tuple[int, int]


class Parts(enum.Enum):
    """Of an output whose batch is R times as large: what lies side by side in it."""

    NONE = "N"
    OF_AN_IMAGE = "N R"
    OF_ALL_IMAGES = "R N"


@dataclass(frozen=True)
class Layout:
    """Which dimensions of an output are the batch and the features.

    Arguments:
        batch_dim: of N (or N R).
        feature_dim: of C.
        is_sequence: whether what is left is a sequence of tokens, pooled to one.
        parts: whether, and how, images lie there in parts.
    """

    batch_dim: int
    feature_dim: int
    is_sequence: bool = False
    parts: Parts = Parts.NONE

    @property
    def is_plain(self) -> bool:
        """Whether it is (N, C, ...)."""
        return self.batch_dim == 0 and self.feature_dim == 1 and self.parts is Parts.NONE

    def view(self, output: Tensor, num_images: int) -> Tensor:
        """(N, F), or (N, C, H, W) with what is left of other shapes spread over H and W.

        Of an output whose batch is R times as large, each image's parts lie along H.

        Raises:
            UserError: the batch dimension is no multiple of N.
        """
        # No len(), which fixes the number where torch.export looks on.
        if self.is_plain and output.shape[0] == num_images and output.ndim in (2, 4):
            return output
        h = output.movedim(self.batch_dim, 0)
        feature_dim = self.feature_dim + (1 if self.feature_dim < self.batch_dim else 0)
        num_entries = h.shape[0]
        if num_entries % num_images != 0:
            raise UserError(
                f"a block yields shape {tuple(output.shape)} for {num_images} images, of which "
                f"dimension {self.batch_dim} was the batch when the blocks were found."
            )
        if num_entries != num_images or self.parts is not Parts.NONE:
            if self.parts is Parts.OF_ALL_IMAGES:
                h = h.reshape(-1, num_images, *h.shape[1:]).movedim(1, 0)
            else:
                h = h.reshape(num_images, -1, *h.shape[1:])
            feature_dim += 1
        h = h.movedim(feature_dim, 1)
        if h.ndim == 3:
            return h.unsqueeze(-1)
        return h.flatten(2, h.ndim - 2) if h.ndim > 4 else h


PLAIN = Layout(batch_dim=0, feature_dim=1)
"""(N, C, H, W) or (N, F)."""


def possible_layouts(name: str, block: nn.Module, output: Tensor, num_images: int) -> list[Layout]:
    """How the output of a block may lie, by its shape; the likeliest first.

    The batch is the first or second dimension, if of size N, or a first one of a multiple of N.
    Features are as many as the block's last layer with weights makes; where several dimensions
    are, or none is, a block with convolutions has them behind the batch, and any other at the end.

    Arguments:
        name: of the block, for errors.
        block: the module.
        output: what it made of N images.
        num_images: N.

    Raises:
        UserError: an output without batch and features.
    """
    shape = tuple(output.shape)
    is_first = shape[0] == num_images
    is_second = len(shape) > 2 and shape[1] == num_images
    has_parts = shape[0] % num_images == 0 and shape[0] > num_images
    found: list[tuple[int, Parts]] = []
    if is_first:
        found.append((0, Parts.NONE))
    if is_second:
        found.append((1, Parts.NONE))
    if has_parts:
        in_parts = [(0, Parts.OF_AN_IMAGE), (0, Parts.OF_ALL_IMAGES)]
        # A sequence in front is likelier than one cut into parts as long as there are images.
        found = found + in_parts if len(shape) == 3 else in_parts + found
    if not found:
        raise UserError(
            f"block {name!r} yields shape {shape} for {num_images} images: no dimension is "
            f"the batch. Choose other blocks (blocks=[...]), such as the module around it."
        )
    return [_with_features(block, shape, batch_dim, parts) for batch_dim, parts in found]


def _with_features(
    block: nn.Module, shape: tuple[int, ...], batch_dim: int, parts: Parts
) -> Layout:
    others = [dim for dim in range(len(shape)) if dim != batch_dim]
    has_convolution = any(isinstance(module, _CONVOLUTIONS) for module in block.modules())
    is_in_front = has_convolution or (len(shape) != 3 and not _is_linear(block))
    usual = others[0] if is_in_front else others[-1]
    fitting = [dim for dim in others if shape[dim] == _num_features(block)]
    feature_dim = usual if usual in fitting or not fitting else fitting[-1]
    is_sequence = len(shape) == 3 and not _is_1d(block)
    return Layout(batch_dim, feature_dim, is_sequence, parts)


def fitting_layout(
    layouts: Sequence[Layout], output: Tensor, moved: Tensor, num_images: int
) -> Layout:
    """The first layout by which images that changed places did so in the output too.

    Where none does (a block that draws random numbers), the likeliest.

    Arguments:
        layouts: the likeliest first.
        output: of N images.
        moved: of the same, each in the next one's place, and the last in the first's.
        num_images: N.
    """
    tolerance = 1e-2 * output.abs().amax()
    for layout in layouts:
        expected = layout.view(output, num_images).roll(1, 0)
        if bool(((layout.view(moved, num_images) - expected).abs() <= tolerance).all()):
            return layout
    return layouts[0]


def _num_features(block: nn.Module) -> int | None:
    """How many the last layer with weights makes, in the order in which the block holds them."""
    num: int | None = None
    for module in block.modules():
        made = getattr(module, "out_channels", getattr(module, "out_features", None))
        if isinstance(made, int) and isinstance(getattr(module, "weight", None), Tensor):
            num = made
    return num


def _is_linear(block: nn.Module) -> bool:
    return any(isinstance(module, nn.Linear | nn.LayerNorm) for module in block.modules())


def _is_1d(block: nn.Module) -> bool:
    return any(isinstance(module, nn.Conv1d | nn.ConvTranspose1d) for module in block.modules())


def latent_size_of(view: Tensor, *, is_sequence: bool) -> tuple[LatentSize, int]:
    """What a view is pooled to, and T: tokens to one, channels to at most 4x4 cells, and no more
    than 2048 values wherever fewer cells do."""
    if view.ndim == 2:
        length = min(view.shape[1], _MAX_LATENT_LENGTH)
        return length, length
    channels, height, width = view.shape[1:]
    size = 1 if is_sequence else _MAX_LATENT_SIZE
    rows, columns = min(size, height), min(size, width)
    while max(rows, columns) > 1 and channels * rows * columns > _MAX_LATENT_LENGTH:
        rows, columns = max(1, rows // 2), max(1, columns // 2)
    return (rows if rows == columns else (rows, columns)), channels * rows * columns


def read_output(output: Any, name: str) -> Tensor:
    """The tensor of a block's output that its head reads: the first floating one with features.

    Raises:
        UserError: there is none.
    """
    return tree_flatten(output)[0][output_place(output, name)]  # type: ignore[no-any-return]


def output_place(output: Any, name: str) -> int:
    """The place of that tensor among the leaves of the output."""
    leaves = tree_flatten(output)[0]
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim > 1:
            return place
    raise UserError(
        f"block {name!r} returns {type(output).__name__} without a floating tensor of two or more "
        f"dimensions, from which it could learn; a tensor, or a tuple, list or dict of tensors is "
        f"expected. Choose other blocks (blocks=[...])."
    )


def replaced(output: Any, place: int, tensor: Tensor) -> Any:
    """The output, every tensor of it detached, with this one in that place."""
    leaves, structure = tree_flatten(output)
    leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    leaves[place] = tensor
    return tree_unflatten(leaves, structure)
