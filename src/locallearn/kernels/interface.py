"""The hot operations of local learning: one name and one signature each, whatever the backend.

Shapes: N batch, C channels (of a linear block: its features), H W height and width, F features,
s pooling size, T latent length, K classes, P pixels of a resident dataset, B images of a batch.

Notation (docs/closed-form.md derives it):

    xh = (z - mean) * inv_std        v = gamma * xh + beta        d = 1 where v > 0 else slope
    h  = v * d                       s0 = mean over a cell of d   s1 = mean over a cell of d * xh

A **cell** is a window of adaptive average pooling: rows floor(i H / s) to ceil((i + 1) H / s) of an
(N, C, H, W) tensor, columns alike; cells overlap where s does not divide H or W. In an (N, F)
tensor every feature is a cell of its own.

A backend is a module with these functions: `kernels.reference` (plain PyTorch, any floating dtype,
the definition), `kernels.compiled` (torch.compile), `kernels.triton`, `kernels.cuda` (CUDA C++).
None of them records an autograd graph, and none reads a value on the host. Statistics, moments and
everything of size (N, C, s, s) or smaller is float32, or float64 where z is; z and the output may
be bfloat16 or float16. 4-d tensors are fastest in channels-last memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class ChannelStats(NamedTuple):
    """mean, inv_std: (C,), float32 (float64 where z is)."""

    mean: Tensor
    inv_std: Tensor


class Moments(NamedTuple):
    """s0, s1: (N, C, s, s) for a 4-d z, (N, F) for a 2-d one; float32 (float64 where z is)."""

    s0: Tensor
    s1: Tensor


class BlockForward(NamedTuple):
    """output: the next block's input, in z's dtype; moments: None where no latent was asked for."""

    output: Tensor
    moments: Moments | None


class HeadResult(NamedTuple):
    """What a local head says of one batch.

    loss: scalar, mean over the batch; num_correct: scalar, int64; logits: (N, K);
    grad_latents: G = dL/dp before pooling to the latent's length, shaped like the moments;
    grad_gamma, grad_beta: (C,); grad_projection: dL/dD, (K, T), or None.
    """

    loss: Tensor
    num_correct: Tensor
    logits: Tensor
    grad_latents: Tensor
    grad_gamma: Tensor
    grad_beta: Tensor
    grad_projection: Tensor | None


class NormGradient(NamedTuple):
    """grad_z: shaped like z, in z's memory; grad_gamma, grad_beta: (C,)."""

    grad_z: Tensor
    grad_gamma: Tensor
    grad_beta: Tensor


class PeriodicBasis(NamedTuple):
    """A basis that a kernel makes by itself: D_ct = g(2 pi (first_phase + t turns_c)), t = 0..T-1.

    turns: (K,), float64, turns of the wave from one t to the next; first_phase: (K,), float64, in
    turns, at t = 0; latent_length: T; is_square: g is the sign of the sine, else the sine itself.
    A sample within 1e-9 of a zero crossing is zero, so that rounding decides nothing.
    """

    turns: Tensor
    first_phase: Tensor
    latent_length: int
    is_square: bool


class Crops(NamedTuple):
    """Which pixels make a batch: the crop of image b begins at (top, left) of its own pixels.

    pixels: (P, C), uint8, images' rows one after the other; offsets, heights, widths: (B,), int64,
    where each image begins in ``pixels`` and its size; top, left: (B,), int64, negative or beyond
    the image in padding, which is black; flip: (B,), bool, mirror left to right; box: (B, 4),
    int32, the rectangle (top, left, height, width) of the crop that is erased.
    """

    pixels: Tensor
    offsets: Tensor
    heights: Tensor
    widths: Tensor
    top: Tensor
    left: Tensor
    flip: Tensor
    box: Tensor


class ScheduleFreeState(NamedTuple):
    """Where Schedule-Free AdamW stands; 0-d tensors on the parameters' device.

    step: k, float64, steps taken; weight_sum: float64, of the average's weights; lr: float64, the
    learning rate to use; lr_max: float64, the highest so far.
    """

    step: Tensor
    weight_sum: Tensor
    lr: Tensor
    lr_max: Tensor


class Kernels(Protocol):
    """What a backend provides."""

    def channel_stats(
        self,
        z: Tensor,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        *,
        eps: float,
        momentum: float = 0.1,
    ) -> ChannelStats:
        """Mean and 1 / sqrt(var + eps) of each channel over the batch and all positions.

        Arguments:
            z: (N, C, H, W) or (N, F), more than one value for each channel.
            running_mean, running_var: (C,), updated in place as BatchNorm does, the variance
                unbiased; None where there are none.
            eps: added to the variance.
            momentum: weight of this batch in the running statistics.

        The variance is that of deviations from a nearby value (or Welford's), so that a mean far
        from zero costs no digits.

        Source: Ioffe and Szegedy, "Batch Normalization", arXiv 1502.03167, algorithm 1.
        """
        ...

    def block_forward(
        self,
        z: Tensor,
        stats: ChannelStats,
        gamma: Tensor,
        beta: Tensor,
        *,
        negative_slope: float,
        latent_size: int | None,
        max_pool: int = 1,
    ) -> BlockForward:
        """Normalise, activate, max-pool, and take the pooled moments, in one pass over z.

        Arguments:
            z: (N, C, H, W) or (N, F); not changed.
            stats: of z.
            gamma, beta: (C,), of the BatchNorm.
            negative_slope: of the LeakyReLU, at least 0; 0 is ReLU, 1 none.
            latent_size: s; None where no moments are wanted. Of a 2-d z the moments are those of
                every feature, whatever s is.
            max_pool: window and stride of the max-pool; rows and columns over are left out.

        Returns:
            output (N, C, H // max_pool, W // max_pool) or (N, F), and the moments.
        """
        ...

    def local_head(
        self,
        moments: Moments,
        gamma: Tensor,
        beta: Tensor,
        projection: Tensor | PeriodicBasis,
        labels: Tensor,
        *,
        normalize: bool,
        temperature: float,
        label_smoothing: float = 0.0,
        similarity: float = 0.0,
        needs_grad_projection: bool = False,
    ) -> HeadResult:
        """Latent, logits, loss, and every gradient that does not need z.

            p = gamma * s1 + beta * s0, flattened; of a linear block pooled along F to T
            q = p / ||p||_2 where normalize, else p        logits = q D^T / temperature
            e = (softmax(logits) - target) / (N temperature)
            dL/dq = e D                dL/dD = e^T q
            dL/dbeta = sum over n and cells of G * s0        dL/dgamma = the same of G * s1

        Arguments:
            moments: from :meth:`block_forward`.
            gamma, beta: (C,).
            projection: D, (K, T), in the moments' dtype, or a periodic basis to be made on the fly.
            labels: (N,), int64 in 0..K-1.
            normalize: project the direction of the latent alone. Where a latent is all zero, its
                direction is undefined, and its learning signal is zero.
            temperature: divides the logits.
            label_smoothing: mass spread evenly over the classes, in [0, 1).
            similarity: lambda; where above 0, lambda mean((S - Y)^2) is added to the loss, S and Y
                (N, N) the cosine similarities of the latents and of the one-hot labels, of either
                after the mean over the batch is subtracted.
            needs_grad_projection: whether dL/dD is wanted.

        Source: LLS (arXiv 2405.15868), for M equations 5 and 6; the similarity after Nokland and
        Eidnes, "Training Neural Networks with Local Error Signals" (ICML 2019), who subtract the
        mean of each row instead; the moments are our own.
        """
        ...

    def block_backward(
        self,
        z: Tensor,
        grad_latents: Tensor,
        stats: ChannelStats,
        gamma: Tensor,
        beta: Tensor,
        grad_gamma: Tensor,
        grad_beta: Tensor,
        *,
        negative_slope: float,
    ) -> Tensor:
        """dL/dz, written over z.

            dL/dz = gamma inv_std (d up(G) - (dL/dbeta + xh dL/dgamma) / n)      n = N H W

        where up(G) gives each position the sum, over the cells that hold it, of the cell's
        gradient divided by the cell's size.

        Arguments:
            z: (N, C, H, W) or (N, F); overwritten.
            grad_latents: G, (N, C, s, s) or (N, F).
            stats, gamma, beta, negative_slope: as in :meth:`block_forward`.
            grad_gamma, grad_beta: (C,), from the head.

        Returns:
            z, which now holds dL/dz.
        """
        ...

    def norm_backward(
        self,
        z: Tensor,
        grad_output: Tensor,
        stats: ChannelStats,
        gamma: Tensor,
        beta: Tensor,
        *,
        negative_slope: float,
    ) -> NormGradient:
        """Backward of BatchNorm and LeakyReLU from the gradient of their output, written over z.

            dL/dbeta = sum of d dL/dh      dL/dgamma = sum of d xh dL/dh      over n and positions
            dL/dz    = gamma inv_std (d dL/dh - (dL/dbeta + xh dL/dgamma) / n)

        Inside a depthwise-separable block, where the gradient has every position's own value.

        Arguments:
            z: (N, C, H, W) or (N, F); overwritten.
            grad_output: dL/dh, shaped like z; may be overwritten too.
        """
        ...

    def schedulefree_step(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        z: Sequence[Tensor],
        exp_avg_sq: Sequence[Tensor],
        state: ScheduleFreeState,
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        averages_by_bias_correction: bool = False,
    ) -> None:
        """One step of Schedule-Free AdamW over all given parameters, in place.

            lr = state.lr * min(1, (k + 1) / warmup_steps)      lr_max = max(lr, lr_max)
            weight = (k + 1)^r lr_max^weight_lr_power           weight_sum += weight
            c = weight / weight_sum
            v = beta2 v + (1 - beta2) g^2                       u = g / (sqrt(v / bias2) + eps)
            y = y + c (z - y) + lr (beta1 (1 - c) - 1) (u + decay y)
            z = z - lr (u + decay y)                            bias2 = 1 - beta2^(k + 1)

        Arguments:
            parameters: y, the points to train at, float32 or float64.
            gradients: shaped like the parameters; not changed.
            z, exp_avg_sq: shaped and laid out in memory like the parameters.
            state: advanced by one step.
            betas, eps, weight_decay, warmup_steps, r, weight_lr_power: as the package names them.
            averages_by_bias_correction: weigh step k by lr^2 (1 - beta2^(k + 1)) instead, as the
                package did up to version 1.2.7 and so the LLS authors.

        Source: Defazio et al., "The Road Less Scheduled", arXiv 2405.15682, algorithm 1.
        """
        ...

    def augment(
        self,
        crops: Crops,
        mean: Tensor,
        std: Tensor,
        *,
        size: tuple[int, int],
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Crop, mirror, normalise and erase a batch of uint8 images.

        Arguments:
            crops: which pixels.
            mean, std: (C,), float32, of pixel values in [0, 1].
            size: (H, W) of the crops.
            dtype: of the result.

        Returns:
            (B, C, H, W) in channels-last memory: (pixel / 255 - mean) / std, and 0 where erased.
        """
        ...
