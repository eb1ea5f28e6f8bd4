"""Training within a limit of memory: what a step needs, and what fits.

`amounts` reads and writes numbers of bytes. `needs` measures what training steps, inference and
recalibration hold, `probing` what each block adds; `choosing` picks blocks and batch size by these,
`comparing` says what backpropagation would need.
"""

from locallearn.engine.budget.amounts import format_memory, parse_memory
from locallearn.engine.budget.choosing import Choice, choose
from locallearn.engine.budget.comparing import Comparison, Need, compare
from locallearn.engine.budget.needs import (
    MakeLearner,
    StepMemory,
    learner_maker,
    measure_inference,
    measure_recalibration,
    measure_step,
)

__all__ = [
    "Choice",
    "Comparison",
    "MakeLearner",
    "Need",
    "StepMemory",
    "choose",
    "compare",
    "format_memory",
    "learner_maker",
    "measure_inference",
    "measure_recalibration",
    "measure_step",
    "parse_memory",
]
