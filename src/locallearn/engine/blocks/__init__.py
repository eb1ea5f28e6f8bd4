"""Which modules of a model are its blocks, and what each of them reads and yields.

`policy` finds the blocks of an unknown model, `choosing` those that a user names; `planning` joins
both with what `wiring` sees: which parameters learn with which block. `freezing` says what stays as
it is where only some blocks learn. `cutting` enters a model at one of its modules. `layout` says
how outputs lie, `recognition` which blocks the closed form covers. All of them read a model, from a
forward watched by `trace`, and leave it as it is.
"""

from locallearn.engine.blocks.chain import Chain, forwards_through, modules_of
from locallearn.engine.blocks.choosing import BlockChoice, Blocks, choose, parse_blocks
from locallearn.engine.blocks.cutting import CannotCut, Cut, Reached, find_cut
from locallearn.engine.blocks.freezing import freeze, learn_all
from locallearn.engine.blocks.frozen_runs import FrozenRun, WithoutGraph
from locallearn.engine.blocks.layout import (
    PLAIN,
    LatentSize,
    Layout,
    Parts,
    output_place,
    read_output,
    replaced,
)
from locallearn.engine.blocks.planning import (
    BlockPlan,
    NetworkPlan,
    needs_batch,
    own_blocks,
    plan_blocks,
)
from locallearn.engine.blocks.recognition import (
    NORMS,
    ClosedForm,
    NormalizedLayer,
    cut_at_head,
    recognize,
)
from locallearn.engine.blocks.standing_in import (
    bound_forward,
    normalizing,
    observer_of,
    observing,
    standing_in,
)
from locallearn.engine.blocks.trace import Inputs, call_model, evaluating, few, num_inputs

__all__ = [
    "NORMS",
    "PLAIN",
    "BlockChoice",
    "BlockPlan",
    "Blocks",
    "CannotCut",
    "Chain",
    "ClosedForm",
    "Cut",
    "FrozenRun",
    "Inputs",
    "LatentSize",
    "Layout",
    "NetworkPlan",
    "NormalizedLayer",
    "Parts",
    "Reached",
    "WithoutGraph",
    "bound_forward",
    "call_model",
    "choose",
    "cut_at_head",
    "evaluating",
    "few",
    "find_cut",
    "forwards_through",
    "freeze",
    "learn_all",
    "modules_of",
    "needs_batch",
    "normalizing",
    "num_inputs",
    "observer_of",
    "observing",
    "output_place",
    "own_blocks",
    "parse_blocks",
    "plan_blocks",
    "read_output",
    "recognize",
    "replaced",
    "standing_in",
]
