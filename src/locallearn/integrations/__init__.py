"""Local learning in the training loops of other packages, which are extras."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from locallearn.integrations.lightning import LocalLightningModule

__all__ = ["LocalLightningModule"]


def __getattr__(name: str) -> Any:
    # On first use, since the packages are extras, and take seconds to import.
    if name != "LocalLightningModule":
        raise AttributeError(f"module 'locallearn.integrations' has no attribute {name!r}")
    from locallearn.integrations.lightning import LocalLightningModule

    return LocalLightningModule
