"""Which blocks the closed form covers."""

from __future__ import annotations

from torch import nn

from locallearn.models import ConvBlock, DepthwiseSeparableBlock, LinearBlock

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def has_closed_form(block: nn.Module) -> bool:
    """Whether a block is one of those that the closed form covers, as this package made it.

    A hook, patch or parametrization on one of its parts would be passed over, a subclass may
    compute something else, and a BatchNorm without scale, or that averages without end, is another:
    these take the generic path.
    """
    if type(block) not in (ConvBlock, LinearBlock, DepthwiseSeparableBlock):
        return False
    if not _is_plain(block, "activation", "downsample"):
        return False
    fits = {
        "conv": _is_plain_layer,
        "linear": _is_plain_layer,
        "depthwise": _is_plain_layer,
        "pointwise": lambda part: _is_plain_layer(part) and _is_pointwise(part),
        "norm": _is_usual_norm,
        "depthwise_norm": _is_usual_norm,
        "nonlinearity": lambda part: type(part) in (nn.LeakyReLU, nn.ReLU),
        "depthwise_nonlinearity": lambda part: type(part) in (nn.LeakyReLU, nn.ReLU),
        "pool": _is_usual_pool,
    }
    return all(
        name in fits and fits[name](part) and _is_plain(part)
        for name, part in block.named_children()
    )


def _is_plain(part: nn.Module, *methods: str) -> bool:
    """Whether a module computes what its class does: no hook of its parts, no patched method."""
    hooks = (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks)
    # The block's own hooks run around its step; those of its parts would not.
    is_hooked = not methods and any(hooks)
    return not is_hooked and not any(name in vars(part) for name in ("forward", *methods))


def _is_plain_layer(part: nn.Module) -> bool:
    is_usual = type(part) in (nn.Conv2d, nn.Linear) and part.bias is None
    return is_usual and getattr(part, "padding_mode", "zeros") == "zeros"


def _is_pointwise(part: nn.Module) -> bool:
    assert isinstance(part, nn.Conv2d)
    geometry = (part.kernel_size, part.stride, part.padding, part.groups)
    return geometry == ((1, 1), (1, 1), (0, 0), 1)


def _is_usual_norm(part: nn.Module) -> bool:
    is_norm = type(part) in NORMS
    return is_norm and bool(part.affine) and part.momentum is not None


def _is_usual_pool(part: nn.Module) -> bool:
    if type(part) is nn.Identity:
        return True
    return (
        type(part) is nn.MaxPool2d
        and isinstance(part.kernel_size, int)
        and (part.stride, part.padding, part.dilation) == (part.kernel_size, 0, 1)
        and not part.ceil_mode
    )
