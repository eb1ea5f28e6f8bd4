"""Stages of blocks, against hand-worked cases and all there are."""

from __future__ import annotations

import itertools
import random

import pytest

from locallearn.distributed.balance import balanced, parse_balance
from locallearn.errors import UserError


@pytest.mark.parametrize(
    ("costs", "num_stages", "expected"),
    [
        ([3.0], 1, (1,)),
        ([1, 1, 1, 1], 2, (2, 2)),
        ([1, 1, 1, 5], 2, (3, 1)),
        ([5, 1, 1, 1], 2, (1, 3)),
        ([2, 3, 4, 1], 2, (2, 2)),  # 5 and 5; (1, 3) would be 2 and 8
        ([1, 2, 3, 4, 5], 3, (3, 1, 1)),  # 6, 4, 5
        # The slowest is 9 whatever is done: what is left is shared as evenly as it can be.
        ([9, 1, 2, 3], 3, (1, 2, 1)),
        ([1, 9, 1, 1, 1], 3, (1, 1, 3)),
        # Two ways to be alike: the earlier stages hold fewer.
        ([1, 1, 1], 2, (1, 2)),
        ([0, 0, 0], 2, (1, 2)),
        ([1, 1, 1], 3, (1, 1, 1)),
    ],
)
def test_hand_worked(costs: list[float], num_stages: int, expected: tuple[int, ...]) -> None:
    assert balanced(costs, num_stages) == expected


def all_partitions(num_blocks: int, num_stages: int, starts: list[int]) -> list[tuple[int, ...]]:
    return [
        tuple(b - a for a, b in itertools.pairwise((0, *cuts, num_blocks)))
        for cuts in itertools.combinations(starts, num_stages - 1)
    ]


def badness(costs: list[float], numbers: tuple[int, ...]) -> tuple[float, float, tuple[int, ...]]:
    ends = list(itertools.accumulate(numbers))
    times = [sum(costs[end - n : end]) for end, n in zip(ends, numbers, strict=True)]
    return max(times), sum(time**2 for time in times), numbers


@pytest.mark.parametrize("seed", range(30))
def test_none_is_better(seed: int) -> None:
    draw = random.Random(seed)
    num_blocks = draw.randint(1, 9)
    # Whole numbers, so that ties are there and sums are exact.
    costs = [float(draw.randint(0, 6)) for _ in range(num_blocks)]
    allowed = [draw.random() < 0.7 for _ in costs]
    starts = [n for n in range(1, num_blocks) if allowed[n]]
    for num_stages in range(1, len(starts) + 2):
        every = all_partitions(num_blocks, num_stages, starts)
        best = min(every, key=lambda numbers: badness(costs, numbers))
        assert balanced(costs, num_stages, allowed=allowed) == best


def test_a_stage_begins_only_where_it_may() -> None:
    assert balanced([1, 1, 1, 1], 2, allowed=[False, False, False, True]) == (3, 1)


@pytest.mark.parametrize("num_stages", [0, 3])
def test_too_many_stages(num_stages: int) -> None:
    with pytest.raises(UserError, match=r"4 blocks .* cut in 1 places: at most 2\."):
        balanced([1, 1, 1, 1], num_stages, allowed=[True, False, True, False])


def test_parse_balance() -> None:
    assert parse_balance("2,3,1", 6, 3) == (2, 3, 1)
    assert parse_balance(" 4 ", 4, 1) == (4,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2,x,1", "'2,x,1' is not understood; expected one number of blocks for each stage"),
        ("", "is not understood"),
        ("2,-1,5", "is not understood"),
        ("2,4", "is for 2 stages, and there are 3. Give one number for each"),
        ("6", "is for 1 stage, and there are 3"),
        ("3,0,3", "leaves a stage without a block; give each at least 1"),
        ("2,3,2", "is of 7 blocks, and the network has 6. The numbers must add up to that"),
    ],
)
def test_parse_balance_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_balance(text, 6, 3)
