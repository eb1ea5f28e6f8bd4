"""BatchNorm where the batch is too small to normalise by: running statistics, kept by images.

Shapes: N batch, C channels.

From so many images on a batch is normalised by its own mean and variance, as BatchNorm does it.
A smaller one is normalised by the running statistics, which take it in first:

    a = N / min(images seen, horizon)        d = batch mean - mean
    mean += a d                              var = (1 - a) var + a batch var + a (1 - a) d^2

so that until the horizon is reached they are mean and variance of all values seen, of which every
image counts alike, and afterwards a moving average over so many images, however many come at a
time. The last term is the spread between batches, which BatchNorm's own moving average of variances
leaves out: of batches of one image it is most of the variance that a linear layer sees. To the
gradient they are constants.

Source of the pooled variance: Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm
for Computing Sample Variances" (1979).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from locallearn.engine.blocks import bound_forward, observing, standing_in

# Below it running statistics are used: see docs/streaming.md for what was measured.
BATCH_STATISTICS_FROM = 3
# A BatchNorm's momentum is taken to be meant for batches of so many images.
USUAL_BATCH = 128
# Mean 0 and variance 1, which a BatchNorm begins with, count as so many images.
_PRIOR_IMAGES = 8.0

BatchNorm = nn.modules.batchnorm._BatchNorm


class RunningStatistics:
    """The running statistics of a model's BatchNorms, in steps on few images.

    Layers without running statistics, and those in evaluation mode, are left as they are.

    Arguments:
        model: whose layers they are.
        least: from so many images on the batch's own statistics are used.
    """

    def __init__(self, model: nn.Module, least: int) -> None:
        self._norms = list(tracked_norms(model).values())
        # Without such layers every batch is large enough.
        self.least = least if self._norms else 1
        self._forwards = {norm: bound_forward(norm) for norm in self._norms}
        means = [norm.running_mean for norm in self._norms if norm.running_mean is not None]
        device = means[0].device if means else torch.device("cpu")
        horizons = [max(_horizon(norm), float(least)) for norm in self._norms]
        # Images that the statistics rest on, at most the horizon. On the device, so that a step
        # can be captured in a graph.
        dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        self._counts = torch.zeros(len(means), dtype=dtype, device=device)
        self._horizons = torch.tensor(horizons, dtype=dtype, device=device)
        # The tensor of each layer's mean, and its version, as this left them: another is another's
        # doing, as that of a state which was loaded.
        self._known: list[tuple[Tensor | None, int]] = [(None, -1)] * len(self._norms)
        self._loaded: list[Tensor] = []  # means of a state that was loaded, until the next step
        self._batch = 1  # N, of the step that runs
        self._momenta: tuple[Tensor, ...] = ()
        self._seen: set[int] = set()  # numbers of the layers that have run in it
        self._replaced: dict[int, tuple[Tensor, Tensor]] = {}

    @contextlib.contextmanager
    def step(self, num_images: int) -> Iterator[None]:
        """Within: a training step.

        Arguments:
            num_images: N, that go through the model at a time.
        """
        if not self._norms:
            yield
            return
        self._look_for_others()
        self._loaded = []
        if num_images >= self.least:
            yield
            torch.minimum(self._counts.add_(num_images), self._horizons, out=self._counts)
            self._note()
            return
        torch.minimum(self._counts.add_(num_images), self._horizons, out=self._counts)
        self._batch = num_images
        self._momenta = (num_images / self._counts).unbind()
        active = [number for number, norm in enumerate(self._norms) if norm.training]
        norms = [self._norms[number] for number in active]
        observers = [functools.partial(self._observe, number) for number in active]
        watched: dict[nn.Module, Callable[..., None]] = dict(zip(norms, observers, strict=True))
        for norm in norms:
            norm.training = False
        try:
            with standing_in({norm: self._forwards[norm] for norm in norms}), observing(watched):
                yield
        finally:
            self._put_back()
            for norm in norms:
                norm.training = True
            self._note()

    @torch.no_grad()
    def _observe(self, number: int, input: Tensor, bias: Tensor | None = None) -> None:
        """Take in what a layer is given; ``bias``: (C,), is to be added to it first."""
        norm = self._norms[number]
        if norm.momentum == 0.0:  # a forward that is run again; `without_running_statistics`
            return
        momentum = self._momenta[number]
        if number in self._seen:
            momentum = self._go_on(number)
        self._seen.add(number)
        mean, var = norm.running_mean, norm.running_var
        assert mean is not None
        assert var is not None
        axes = [0, *range(2, input.ndim)]
        batch_var, batch_mean = torch.var_mean(input.to(mean.dtype), dim=axes, correction=0)
        if bias is not None:
            batch_mean = batch_mean + bias
        delta = batch_mean - mean
        pooled = torch.addcmul(batch_var, delta, delta * (1 - momentum))
        var.add_(momentum * (pooled - var))
        mean.add_(momentum * delta)
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)

    def _go_on(self, number: int) -> Tensor:
        """For a layer that runs again in a step: its momentum. The graphs of its runs before keep
        the statistics they were made with."""
        norm = self._norms[number]
        assert norm.running_mean is not None
        assert norm.running_var is not None
        self._replaced.setdefault(number, (norm.running_mean, norm.running_var))
        norm._buffers["running_mean"] = norm.running_mean.clone()
        norm._buffers["running_var"] = norm.running_var.clone()
        count = self._counts[number].add_(self._batch)
        torch.minimum(count, self._horizons[number], out=count)
        return self._batch / count

    def _put_back(self) -> None:
        self._seen.clear()
        for number, tensors in self._replaced.items():
            for name, tensor in zip(("running_mean", "running_var"), tensors, strict=True):
                buffers = self._norms[number]._buffers
                tensor.copy_(buffers[name])  # type: ignore[arg-type]
                buffers[name] = tensor
        self._replaced.clear()

    def _look_for_others(self) -> None:
        """Statistics that another has written count as a full horizon; those that a BatchNorm
        begins with (mean 0, variance 1) are nobody's, and count for nothing."""
        for number, (norm, (known, version)) in enumerate(
            zip(self._norms, self._known, strict=True)
        ):
            mean = norm.running_mean
            if mean is not known or mean is None or mean._version != version:
                # On the device: a host that asked would wait.
                count = torch.where(_is_fresh(norm), _PRIOR_IMAGES, self._horizons[number])
                if self._loaded and mean is not None:
                    # Loaded once more, as Lightning does, they are still those of the state.
                    is_same = (mean == self._loaded[number]).all()
                    count = torch.where(is_same, self._counts[number], count)
                self._counts[number] = count

    def _note(self) -> None:
        self._known = [
            (norm.running_mean, -1 if norm.running_mean is None else norm.running_mean._version)
            for norm in self._norms
        ]

    def state(self) -> dict[str, Tensor]:
        """What :meth:`load` needs, besides the model's own buffers."""
        self._look_for_others()
        self._note()
        return {"counts": self._counts.clone()}

    def load(self, state: dict[str, Tensor] | None) -> None:
        """After the model's buffers have been loaded; None of a state from before there was one.

        Raises:
            ValueError: of a model with other layers.
        """
        self._known = [(None, -1)] * len(self._norms)
        if state is None:
            return
        if state["counts"].shape != self._counts.shape:
            raise ValueError("the state is of a model with other BatchNorms")
        self._counts.copy_(state["counts"])
        means = (norm.running_mean for norm in self._norms)
        self._loaded = [mean.clone() for mean in means if mean is not None]
        self._note()


def tracked_norms(model: nn.Module) -> dict[str, BatchNorm]:
    """Name -> layer, of the BatchNorms that keep running statistics, in the order of a state."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BatchNorm) and module.running_mean is not None
    }


def _horizon(norm: BatchNorm) -> float:
    """Images; endless where the layer's averages are."""
    if norm.momentum is None or norm.momentum <= 0:
        return float("inf")
    return USUAL_BATCH / norm.momentum


def _is_fresh(norm: BatchNorm) -> Tensor:
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None
    assert var is not None
    return (mean == 0).all() & (var == 1).all()
