"""What a block's learning signal is. A rule knows no optimizer, no device and no file."""

from locallearn.rules.backprop import Backprop
from locallearn.rules.base import (
    LatentHead,
    LatentRule,
    LatentSpec,
    LocalSignal,
    ProjectionHead,
    ProjectionRule,
    Requirement,
    Rule,
    accumulate_grad,
    build_rule,
    list_rules,
    register_rule,
    rule_class,
    unregister_rule,
)
from locallearn.rules.bases import BASES, SETTINGS, build_basis
from locallearn.rules.lls import (
    LLS,
    LLSM,
    BasisHead,
    LLSMxM,
    LLSMxMReduced,
    MatrixModulatedHead,
    VectorModulatedHead,
)
from locallearn.rules.local_losses import LocalLosses

__all__ = [
    "BASES",
    "LLS",
    "LLSM",
    "SETTINGS",
    "Backprop",
    "BasisHead",
    "LLSMxM",
    "LLSMxMReduced",
    "LatentHead",
    "LatentRule",
    "LatentSpec",
    "LocalLosses",
    "LocalSignal",
    "MatrixModulatedHead",
    "ProjectionHead",
    "ProjectionRule",
    "Requirement",
    "Rule",
    "VectorModulatedHead",
    "accumulate_grad",
    "build_basis",
    "build_rule",
    "list_rules",
    "register_rule",
    "rule_class",
    "unregister_rule",
]
