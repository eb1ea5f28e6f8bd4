"""What a training step does, one file for each thing that a rule can require.

`local`: each block is updated as soon as it has run. `error`: blocks wait for the network's error.
`two_forwards`: a second forward brings the updates. `backprop`: the gradient of the whole network,
and forms of it that need less memory.
"""

from locallearn.engine.procedures.backprop import Backpropagation, build_backpropagation
from locallearn.engine.procedures.base import Outcome, OutputLayer, Procedure, logits_of
from locallearn.engine.procedures.error import ErrorUnit, ErrorUpdates
from locallearn.engine.procedures.local import LocalUpdates
from locallearn.engine.procedures.two_forwards import ModulatedUnit, TwoForwards

__all__ = [
    "Backpropagation",
    "ErrorUnit",
    "ErrorUpdates",
    "LocalUpdates",
    "ModulatedUnit",
    "Outcome",
    "OutputLayer",
    "Procedure",
    "TwoForwards",
    "build_backpropagation",
    "logits_of",
]
