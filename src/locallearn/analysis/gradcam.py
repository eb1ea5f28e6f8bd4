"""Which pixels an answer rests on: Grad-CAM, and a check of it (the paper's figure 4).

Shapes: N images, C channels, H W height and width, K classes.

    heat[n] = sum over channels a of A_a * mean over places of d logit_target / dA_a

with A the block's output, interpolated bilinearly to the image; negative heat is drawn as none. The
check: the pixels of the highest fifth of the heat are set to the training data's mean, and the drop
in the target's probability is compared with that under controls of the same shape: the same mask
shifted around the image at random, and the mask of another image, which shares with it whatever
all maps have in common, such as a liking for the centre.

Source: Selvaraju et al., "Grad-CAM", ICCV 2017; computed by captum (the extra `gradcam`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from locallearn.analysis.shuffling import Shuffled
from locallearn.engine.learner import LocalLearner
from locallearn.errors import UserError
from locallearn.models import Block

MASKED_SHARE = 0.2
NUM_SHIFTS = 20
_NUM_SIGNS = 9999


def load_captum() -> Any:
    """captum.attr. Raises UserError where captum is not installed."""
    try:
        import captum.attr
    except ImportError as error:
        raise UserError("Grad-CAM needs captum: pip install 'locallearn[gradcam]'.") from error
    return captum.attr


def convolutional_blocks(learner: LocalLearner, example_input: Tensor) -> dict[str, nn.Module]:
    """Name -> module whose output (N, C, H, W) a heat map can be made of, in the model's order.

    The package's own convolutional blocks. In a network of another make those of its blocks that
    hold convolutions and put out as many channels as one of them; of a rule without blocks, every
    such module.

    Arguments:
        learner: the network.
        example_input: (N, C, H, W).
    """
    named = dict(learner.model.named_modules())
    own = {name: module for name, module in named.items() if isinstance(module, Block)}
    if own:
        return {name: block for name, block in own.items() if not block.is_linear}
    blocks = {name: modules[-1] for name, modules in learner.block_modules.items()} or named
    found: set[str] = set()

    def find(name: str, widths: set[int]) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 4 and output.shape[1] in widths:
                found.add(name)

        return hook

    handles = []
    for name, block in blocks.items():
        widths = {m.out_channels for m in block.modules() if isinstance(m, nn.Conv2d)}
        handles.append(block.register_forward_hook(find(name, widths)))
    try:
        learner(example_input)
    finally:
        for handle in handles:
            handle.remove()
    return {name: block for name, block in blocks.items() if name in found}


def heat_maps(model: nn.Module, layer: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """heat, (N, H, W), float32, negative where pixels speak against the target.

    Arguments:
        model: in evaluation mode; from images to logits (N, K).
        layer: a module of it whose output is (N, C', H', W').
        images: (N, C, H, W).
        targets: (N,), int64.

    Raises:
        UserError: captum is not installed.
    """
    attr = load_captum()
    with torch.enable_grad():
        maps = attr.LayerGradCam(model, layer).attribute(images, target=targets)
    size = tuple(images.shape[2:])
    heat: Tensor = attr.LayerAttribution.interpolate(maps.detach(), size, "bilinear")[:, 0]
    return heat


@torch.no_grad()
def probabilities(model: nn.Module, images: Tensor) -> Tensor:
    """(N, K)."""
    result: Tensor = model(images).softmax(dim=1)
    return result


def hottest(heat: Tensor, share: float = MASKED_SHARE) -> Tensor:
    """(N, H, W), bool: the pixels with the highest heat, exactly round(share H W) of them."""
    flat = heat.flatten(1)
    chosen = flat.topk(round(share * flat.shape[1]), dim=1).indices
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(1, chosen, True).view_as(heat)


@dataclass(frozen=True)
class Deletion:
    """Drops of the target's probability, (N,) float64 each, where pixels are deleted.

    hottest: those that the map names; shifted: the same mask elsewhere, mean over shifts; other:
    another image's mask, None of a single image.
    """

    hottest: Tensor
    shifted: Tensor
    other: Tensor | None


def deletion(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    heat: Tensor,
    *,
    seed: int = 0,
    batch_size: int = 64,
) -> Deletion:
    """What deleting pixels does to the target's probability.

    Arguments:
        model: in evaluation mode.
        images: (N, C, H, W), normalised, so that zero is the mean of the training data.
        targets: (N,), int64.
        heat: (N, H, W).
        seed: of the shifts, and of which other image.
        batch_size: images at a time.
    """
    generator = np.random.default_rng(seed)
    masks = hottest(heat)
    num, height, width = masks.shape
    before = _of_target(model, images, targets, batch_size)

    def drop(mask: Tensor) -> Tensor:
        deleted = images.masked_fill(mask[:, None], 0.0)
        return before - _of_target(model, deleted, targets, batch_size)

    shifted = torch.zeros_like(before)
    for place in generator.integers(1, height * width, NUM_SHIFTS).tolist():
        shifted += drop(masks.roll(divmod(place, width), dims=(1, 2))) / NUM_SHIFTS
    other = None
    if num > 1:
        order = torch.from_numpy(generator.permutation(num)).to(masks.device)
        swapped = torch.empty_like(masks)
        swapped[order] = masks[order.roll(1)]
        other = drop(swapped)
    return Deletion(drop(masks), shifted, other)


def _of_target(model: nn.Module, images: Tensor, targets: Tensor, batch_size: int) -> Tensor:
    """(N,), float64, on the CPU."""
    parts = zip(torch.split(images, batch_size), torch.split(targets, batch_size), strict=True)
    chosen = [probabilities(model, x).gather(1, t[:, None])[:, 0] for x, t in parts]
    return torch.cat(chosen).double().cpu()


def excess(drops: Tensor, control: Tensor, *, seed: int = 0) -> Shuffled:
    """The mean of ``drops - control`` beside what it is with random signs of the differences."""
    differences = (drops - control).numpy()
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), (_NUM_SIGNS, len(differences)))
    return Shuffled.of(float(differences.mean()), (signs * differences).mean(axis=1))
