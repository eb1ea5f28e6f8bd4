"""What a training step costs: multiply-accumulates, parameters, and peak activation memory.

Shapes: N batch, C channels, H W height and width, T latent length, K classes, R rows of a basis.

Everything follows from the shapes of the layers, which one forward on the meta device yields;
nothing is computed. 1 MAC is one multiplication and one addition.

**Learning signal** is what generates dL/dh, the gradient at a block's output. For backpropagation
it is the input-gradient product of every layer after the first; for a projection rule, 2 T K for
each block (project, project back), K more for LLS-M, 2 R K more for LLS-MxM (design: its T K are
then T R), and with the similarity term 2 T N (an image with each of the batch, and back). For DFA
it is K n for each block, n the values of its output; for DRTP, which looks a row up, nothing; for
PEPITA the second forward, and K for each value of the input; for sim a convolution forward and
back. Of a rule from elsewhere it is what its loss and the gradient of that multiply: its head is
run without numbers, on the meta device (on the CPU if it reads some), and matrix products and
convolutions are counted. The paper prints such figures without a formula.

**Memory** is what a step allocates beyond parameters, optimizer state and the batch of images, at
its highest moment: a sum over the tensors that live at once, followed through the step. A local
rule in closed form holds one block's input, z and output; backpropagation holds every layer's saved
tensors, and then gradients as those go. Both as PyTorch computes them on the CPU.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from locallearn.engine import RunConfig
from locallearn.engine.building import build_network
from locallearn.kernels.compiled.cells import FEW_CHANNELS
from locallearn.kernels.reference.schedulefree_step import SLICE_VALUES
from locallearn.models import (
    Block,
    BlockNetwork,
    ConvBlock,
    DepthwiseSeparableBlock,
    LinearBlock,
    is_foreign,
)
from locallearn.rules import (
    DRTP,
    Backprop,
    BasisHead,
    ErrorRule,
    HeadSpec,
    LatentHead,
    LocalHead,
    LocalRule,
    MatrixModulatedHead,
    Pepita,
    ProjectionHead,
    Rule,
    SimilarityHead,
    VectorModulatedHead,
)

_INDEX_BYTES = 8  # a max-pool under autograd keeps int64 indices
# oneDNN makes a convolution's weight gradient in a layout of its own, and it is reordered twice.
_CONV_GRADIENT_COPIES = 3
# s0, s1 and G; the head's latent and its gradient before it.
_NUM_MOMENTS = 4
# Of the batch: the latents' and the labels', float32.
_NUM_SIMILARITIES = 2
# What the update of a weight, or of a slice of it, makes on the way, in plain PyTorch.
_UPDATE_COPIES = 2


@dataclass(frozen=True)
class Stage:
    """A convolution or linear layer with the BatchNorm and activation behind it, for one sample.

    Arguments:
        num_macs: of the forward, and of each of the two gradient products.
        x, z: values of the input and of the layer's output.
        output: values handed on, after the max-pool.
        num_weights: of the layer.
        gradient_copies: how often the weight gradient exists while it is made.
        is_pooled: whether a max-pool follows.
    """

    num_macs: int
    x: int
    z: int
    output: int
    num_weights: int
    gradient_copies: int
    is_pooled: bool

    @property
    def gradient_bytes(self) -> int:
        """Of the weight gradient while it is made; float32."""
        return 4 * self.gradient_copies * self.num_weights


@dataclass(frozen=True)
class BlockShapes:
    """A block's stages (one, or two of a depthwise-separable block), and its moments' values."""

    name: str
    stages: tuple[Stage, ...]
    moments: int
    latent_length: int
    basis_length: int | None
    row_sums: int  # values between the two halves of the moments' sums, of many channels
    latent_size: int
    out_channels: int
    is_linear: bool

    def head_spec(self, num_classes: int) -> HeadSpec:
        """What the block's head must fit."""
        return HeadSpec(
            self.latent_length,
            num_classes,
            self.basis_length,
            latent_size=self.latent_size,
            num_channels=self.out_channels,
            is_linear=self.is_linear,
        )


@dataclass(frozen=True)
class Cost:
    """What a step costs.

    Attributes:
        learning_signal_macs: for each sample.
        forward_macs, total_macs: for each sample, of the forward and of the whole step.
        num_params: of the network; num_additional_params: what the rule trains besides.
        peak_activation_bytes: of the batch; None where it is not followed: of rules whose blocks
            have no closed form, and of backpropagation's memory-saving forms.
        largest_block: name of the block at which the peak stands; "" where there is none.
    """

    learning_signal_macs: int
    forward_macs: int
    total_macs: int
    num_params: int
    num_additional_params: int
    peak_activation_bytes: int | None
    largest_block: str

    @property
    def peak_activation_mib(self) -> float | None:
        return None if self.peak_activation_bytes is None else self.peak_activation_bytes / 2**20


def step_cost(
    model: BlockNetwork,
    rule: Rule,
    *,
    image_shape: tuple[int, int, int],
    batch_size: int,
    bytes_per_value: int = 4,
) -> Cost:
    """The cost of one training step.

    Arguments:
        model: one of the package's networks; only its shapes are looked at.
        rule: any of the package's.
        image_shape: (C, H, W).
        batch_size: N.
        bytes_per_value: of activations: 4 in float32, 2 in bfloat16.
    """
    blocks, classifier = _trace(model, image_shape)
    num_params = sum(p.numel() for p in model.parameters())
    stages = [stage for block in blocks for stage in block.stages]
    forward = sum(stage.num_macs for stage in stages) + classifier.num_macs
    # Within a block of two layers backpropagation goes on.
    inside = sum(stage.num_macs for block in blocks for stage in block.stages[1:])
    additional, peak, name = 0, None, ""
    if isinstance(rule, Backprop):
        signal, inside = forward - stages[0].num_macs, 0
        if rule.bp_memory == "checkpoint":
            inside = forward - classifier.num_macs  # the blocks run once more
        if rule.bp_memory == "plain":
            peak = _peak_of_backprop(stages, classifier, batch_size, bytes_per_value)
    elif isinstance(rule, Pepita):
        signal, inside = forward + model.num_classes * stages[0].x, 0
    elif isinstance(rule, ErrorRule):
        signal = model.num_classes * sum(block.stages[-1].z for block in blocks)
    else:
        assert isinstance(rule, LocalRule)
        heads = [_head_macs(rule, block, model.num_classes, batch_size) for block in blocks]
        signal = sum(head.signal for head in heads)
        inside += sum(head.gradient for head in heads)
        additional = sum(head.num_params for head in heads)
        if all(head.is_latent for head in heads):
            name, peak = _peak_of_local_rule(blocks, batch_size, bytes_per_value)
            if any(head.is_matched for head in heads):
                peak += _NUM_SIMILARITIES * 4 * batch_size**2
    total = 2 * forward + signal + inside
    return Cost(signal, forward, total, num_params, additional, peak, name)


def run_cost(config: RunConfig, rule: Rule | None = None) -> Cost | None:
    """The cost of a step of a run, of the same network under another rule where one is given.

    Blocks that are grouped are counted as if each were by itself. None of a model from elsewhere,
    whose layers are not ours to count, and of blocks that were chosen, or that do not all learn.
    """
    settings, inputs = config.settings, config.inputs
    are_all = settings.blocks == "auto" and settings.trained_blocks == "all"
    if is_foreign(settings.model) or not are_all:
        return None
    with torch.device("meta"):
        model = build_network(settings, inputs, len(config.class_names))
    assert isinstance(model, BlockNetwork)
    return step_cost(
        model,
        settings.build_rule() if rule is None else rule,
        image_shape=(inputs.num_channels, *inputs.image_size),
        batch_size=settings.batch_size,
        bytes_per_value=2 if settings.precision == "bf16" else 4,
    )


@dataclass(frozen=True)
class _HeadMacs:
    """signal: project and project back; gradient: of D, or of what else is trained; num_params:
    trained in the head; is_latent: whether the head sees the pooled latent alone."""

    signal: int
    gradient: int
    num_params: int
    is_latent: bool = True
    is_matched: bool = False  # whether similarities are


def _run_macs(head: LocalHead, block: BlockShapes, batch_size: int) -> int:
    """What a head multiplies for an image, in forward and backward, counted while it runs."""
    if isinstance(head, LatentHead):
        shape: tuple[int, ...] = (batch_size, block.latent_length)
    elif block.is_linear:
        shape = (batch_size, block.out_channels)
    else:
        num_positions = block.stages[-1].z // block.out_channels
        height = math.isqrt(num_positions)  # of square images, as far as that goes
        while num_positions % height:
            height -= 1
        shape = (batch_size, block.out_channels, height, num_positions // height)

    def run(device: str) -> int:
        features = torch.zeros(shape, device=device)
        labels = torch.zeros(batch_size, dtype=torch.int64, device=device)
        with FlopCounterMode(display=False) as counter:
            copy.deepcopy(head).to(device).signal(features, labels)
        return int(counter.get_total_flops()) // (2 * batch_size)

    try:
        return run("meta")
    except RuntimeError:  # a head that reads numbers, as one does that indexes by a mask
        return run("cpu")


def _head_macs(rule: LocalRule, block: BlockShapes, num_classes: int, batch_size: int) -> _HeadMacs:
    t, k = block.latent_length, num_classes
    head = rule.build_head(block.head_spec(num_classes))
    num_params = sum(p.numel() for p in head.parameters() if p.requires_grad)
    if isinstance(head, SimilarityHead):
        width = block.out_channels
        layer = sum(p.numel() for p in head.features.parameters()) * block.stages[-1].z // width
        signal, gradient = 2 * layer + 2 * width * batch_size, layer
        if head.classifier is not None:
            signal, gradient = signal + 2 * t * k, gradient + t * k
        return _HeadMacs(signal, gradient, num_params, is_latent=False)
    if isinstance(rule, DRTP):
        return _HeadMacs(0, 0, num_params, is_latent=False)
    if not isinstance(head, ProjectionHead):
        total = _run_macs(head, block, batch_size)
        signal = _run_macs(head.requires_grad_(False), block, batch_size)
        is_latent = isinstance(head, LatentHead)
        return _HeadMacs(signal, total - signal, num_params, is_latent=is_latent)
    matched = 2 * t * batch_size if head.similarity else 0
    if isinstance(head, MatrixModulatedHead):
        rows = head.modulation.shape[0]
        signal, gradient = 2 * t * rows + 2 * rows * k, rows * k
    elif isinstance(head, VectorModulatedHead):
        signal, gradient = 2 * t * k + k, k
    else:
        signal, gradient = 2 * t * k, 0 if isinstance(head, BasisHead) else t * k
    return _HeadMacs(signal + matched, gradient, num_params, is_matched=matched > 0)


def _trace(
    model: BlockNetwork, image_shape: tuple[int, int, int]
) -> tuple[list[BlockShapes], Stage]:
    """Shapes of every block, and of the classifier, from a forward of one sample on meta."""
    shapes: dict[nn.Module, tuple[int, int]] = {}
    widths: dict[nn.Module, int] = {}

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        shapes[module] = (inputs[0].numel(), output.numel())
        widths[module] = output.shape[-1]

    twin = copy.deepcopy(model).to("meta")
    for module in twin.modules():
        if isinstance(module, Block | nn.Conv2d | nn.Linear):
            module.register_forward_hook(record)
    with torch.no_grad():
        twin.eval()(torch.empty(1, *image_shape, device="meta"))

    def stage(layer: nn.Module, output: int | None = None, is_pooled: bool = False) -> Stage:
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        x, z = shapes[layer]
        num_weights = layer.weight.numel()
        num_macs = z // layer.weight.shape[0] * num_weights
        copies = _CONV_GRADIENT_COPIES if isinstance(layer, nn.Conv2d) else 1
        output = z if output is None else output
        return Stage(num_macs, x, z, output, num_weights, copies, is_pooled)

    blocks = []
    for name, block in twin.named_modules():
        if not isinstance(block, Block):
            continue
        is_pooled, output = not isinstance(block.pool, nn.Identity), shapes[block][1]
        if isinstance(block, DepthwiseSeparableBlock):
            stages: tuple[Stage, ...] = (
                stage(block.depthwise),
                stage(block.pointwise, output, is_pooled),
            )
        else:
            assert isinstance(block, ConvBlock | LinearBlock)
            layer = block.conv if isinstance(block, ConvBlock) else block.linear
            stages = (stage(layer, output, is_pooled),)
        is_linear = isinstance(block, LinearBlock)
        moments = block.out_channels if is_linear else block.latent_length
        row_sums = 0
        if not is_linear and block.out_channels > FEW_CHANNELS:
            last = block.pointwise if isinstance(block, DepthwiseSeparableBlock) else block.conv
            row_sums = 2 * block.latent_size * widths[last] * block.out_channels
        blocks.append(
            BlockShapes(
                name,
                stages,
                moments,
                block.latent_length,
                block.basis_length,
                row_sums,
                block.latent_size,
                block.out_channels,
                is_linear,
            )
        )
    return blocks, stage(twin.classifier)


def _peak_of_local_rule(
    blocks: list[BlockShapes], batch_size: int, bytes_per_value: int
) -> tuple[str, int]:
    """The block that needs the most, and how many bytes."""
    peaks = []
    for number, block in enumerate(blocks):
        values = 0 if number == 0 else block.stages[0].x  # the images are the caller's
        values += sum(stage.z + stage.output for stage in block.stages)
        # Always float32; the sums of rows are gone when the head begins.
        moments = 4 * max(_NUM_MOMENTS * block.moments, 2 * block.moments + block.row_sums)
        weights = 4 * sum(stage.num_weights for stage in block.stages[:-1])
        weights += block.stages[-1].gradient_bytes
        peaks.append((batch_size * (values * bytes_per_value + moments) + weights, block.name))
    peak, name = max(peaks)
    return name, peak


def _peak_of_backprop(
    stages: list[Stage], classifier: Stage, batch_size: int, bytes_per_value: int
) -> int:
    """Followed through the backward, from the last stage to the first, and the update."""
    saved = [batch_size * _saved(stage, bytes_per_value) for stage in stages]
    weights = 4 * classifier.num_weights
    peak = sum(saved)
    for number in reversed(range(len(stages))):
        stage = stages[number]
        before = sum(saved[:number])
        z, output, x = (batch_size * bytes_per_value * v for v in (stage.z, stage.output, stage.x))
        for live in _backward_of(stage, z, output, x if number else 0, saved[number]):
            peak = max(peak, before + weights + live)
        weights += 4 * stage.num_weights
    largest = min(SLICE_VALUES, max(stage.num_weights for stage in stages))
    return max(peak, weights + _UPDATE_COPIES * 4 * largest)


def _saved(stage: Stage, bytes_per_value: int) -> int:
    """Bytes that autograd keeps of a stage: z for BatchNorm, the activation over it, and of a
    max-pool its output (the next stage's input) and its indices."""
    kept = 2 * stage.z * bytes_per_value
    if stage.is_pooled:
        kept += stage.output * (bytes_per_value + _INDEX_BYTES)
    return kept


def _backward_of(stage: Stage, z: int, output: int, x: int, saved: int) -> Iterator[int]:
    """Bytes alive, of this stage, at each step of its backward."""
    if stage.is_pooled:
        yield saved + output + z  # gradients of the max-pool's output and input
    yield 2 * z + 2 * z  # z and h; gradients of h and of v
    yield z + 2 * z  # z; gradients of v and of z
    # Gradients of z, of x and of the weights.
    yield z + x + stage.gradient_bytes
