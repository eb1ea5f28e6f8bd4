"""Early exits: each block's head is a classifier, so an image may leave where one is sure.

`network` runs a model so that images leave it, `calibration` makes the heads' probabilities mean
what they say.
"""

from locallearn.engine.exits.calibration import (
    Calibration,
    calibrate,
    expected_calibration_error,
    fit_temperature,
)
from locallearn.engine.exits.network import OUTPUT, EarlyExits, Prediction
from locallearn.engine.exits.record import ExitRecord

__all__ = [
    "OUTPUT",
    "Calibration",
    "EarlyExits",
    "ExitRecord",
    "Prediction",
    "calibrate",
    "expected_calibration_error",
    "fit_temperature",
]
