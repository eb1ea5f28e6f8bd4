"""The paper's tables as data (`table1.toml` and so on), and what runs them.

Knows the engine; prints nothing.
"""

from locallearn.recipes.jobs import (
    Busy,
    EpochDone,
    Failed,
    Finished,
    Message,
    Noted,
    Outcome,
    Started,
    Stopped,
    TableListener,
    log_path,
    run_cells,
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
from locallearn.recipes.results import RowResult, collect, measure, unmeasured
from locallearn.recipes.writing import rehearsal_lines, to_markdown, write_table

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
    "log_path",
    "make_plan",
    "measure",
    "read_table",
    "rehearsal_lines",
    "run_cells",
    "to_markdown",
    "unmeasured",
    "write_table",
]
