"""locallearn: train deep networks with local learning rules.

>>> from locallearn import LocalLearner, build_model
>>> model = build_model("smallconv", num_classes=10, in_channels=3)
>>> learner = LocalLearner(model, rule="lls-mxm", num_classes=10)
>>> result = learner.step(images, labels)        # forward and every block's update
>>> logits = learner(test_images)                # inference
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from locallearn._version import __version__

if TYPE_CHECKING:
    from locallearn.engine import LocalLearner, StepResult
    from locallearn.errors import UserError
    from locallearn.models import build_model, list_models
    from locallearn.rules import build_rule, list_rules

# Resolved on first use, so that `locallearn --help` does not wait seconds for torch.
_HOME = {
    "LocalLearner": "locallearn.engine",
    "StepResult": "locallearn.engine",
    "UserError": "locallearn.errors",
    "build_model": "locallearn.models",
    "list_models": "locallearn.models",
    "build_rule": "locallearn.rules",
    "list_rules": "locallearn.rules",
}

__all__ = [
    "LocalLearner",
    "StepResult",
    "UserError",
    "__version__",
    "build_model",
    "build_rule",
    "list_models",
    "list_rules",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'locallearn' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
