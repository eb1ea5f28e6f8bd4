"""The paper's tables as data (`table1.toml` and so on), and what plans, runs and writes them."""

from locallearn.recipes.jobs import TableListener, run_cells
from locallearn.recipes.messages import (
    Busy,
    EpochDone,
    Failed,
    Finished,
    Message,
    Noted,
    Outcome,
    Started,
    Stopped,
)
from locallearn.recipes.plan import (
    Cell,
    CellState,
    Changes,
    DatasetPlace,
    Plan,
    make_plan,
)
from locallearn.recipes.recipe import Recipe, RecipeTable, list_tables, read_table
from locallearn.recipes.results import RowResult, collect
from locallearn.recipes.writing import rehearsal_lines, remarks, say_runs, write_table

__all__ = [
    "Busy",
    "Cell",
    "CellState",
    "Changes",
    "DatasetPlace",
    "EpochDone",
    "Failed",
    "Finished",
    "Message",
    "Noted",
    "Outcome",
    "Plan",
    "Recipe",
    "RecipeTable",
    "RowResult",
    "Started",
    "Stopped",
    "TableListener",
    "collect",
    "list_tables",
    "make_plan",
    "read_table",
    "rehearsal_lines",
    "remarks",
    "run_cells",
    "say_runs",
    "write_table",
]
