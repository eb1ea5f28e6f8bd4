"""Models that a learner can't take."""

from __future__ import annotations

from torch import nn
from torch.nn.parameter import is_lazy

from locallearn.errors import UserError


def check_takes_model(model: nn.Module) -> None:
    """Raise a UserError for compiled models, lazy modules that have no weights yet, and copies on
    several devices."""
    if hasattr(model, "_orig_mod"):
        raise UserError(
            "the model is wrapped by torch.compile, whose graph passes the blocks by; give the "
            "module from before (its `_orig_mod`), and compile=True to have blocks compiled."
        )
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise UserError(
                f"{name!r} has no shape yet, as its module is a lazy one: run a batch through the "
                f"model, model(images), before you give it to a learner."
            )
    for module in model.modules():
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            raise UserError(
                f"nn.DataParallel runs copies of the model on {len(module.device_ids)} devices, "
                f"where a block's updates would be lost; give the model itself (its `.module`)."
            )
