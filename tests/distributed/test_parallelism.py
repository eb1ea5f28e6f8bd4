from __future__ import annotations

import pytest

from locallearn.distributed.parallelism import Parallelism
from locallearn.errors import UserError


@pytest.mark.parametrize(
    ("text", "num", "expected"),
    [
        ("layers", 4, (4, 1)),
        ("layers:3", 3, (3, 1)),
        ("data", 2, (1, 2)),
        ("data:2,layers:3", 6, (3, 2)),
        ("layers:2,data", 8, (2, 4)),
        ("layers, data:2", 6, (3, 2)),
        ("layers:1", 1, (1, 1)),
    ],
)
def test_a_number_left_out_is_what_remains(text: str, num: int, expected: tuple[int, int]) -> None:
    found = Parallelism.parse(text, num)
    assert (found.num_stages, found.num_replicas) == expected
    assert Parallelism.parse(str(found), num) == found


@pytest.mark.parametrize("text", ["", "layer", "layers:0", "layers:x", "layers,layers", "data:-1"])
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="is not understood; expected layers, data"):
        Parallelism.parse(text, 2)


@pytest.mark.parametrize(
    ("text", "num", "message"),
    [
        ("layers:4", 2, "takes 4 processes, and 2 were started"),
        ("layers:2,data", 3, "takes 2 processes or a multiple, and 3 were"),
        ("layers:2", 1, "and 1 was started.*torchrun --nproc-per-node 2"),
        ("layers,data", 4, "leaves both numbers open"),
    ],
)
def test_the_number_of_processes_must_fit(text: str, num: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Parallelism.parse(text, num)
