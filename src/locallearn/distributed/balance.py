"""Which blocks each stage trains, so that no stage is much slower than the others."""

from __future__ import annotations

from collections.abc import Sequence

from locallearn.errors import UserError


def balanced(
    costs_ms: Sequence[float], num_stages: int, *, allowed: Sequence[bool] | None = None
) -> tuple[int, ...]:
    """Numbers of blocks for each stage, contiguous: the slowest stage is as fast as it can be, and
    among such the sum of the squares of the stages' times is the least; among those that are still
    alike, the earlier stages hold fewer.

    Arguments:
        costs_ms: of each block, in the order of the forward.
        num_stages: at least one block each.
        allowed: whether a stage may begin with that block; the first stage begins with the first
            block in any case. None allows all.

    Raises:
        UserError: more stages than can begin somewhere.
    """
    num_blocks = len(costs_ms)
    assert allowed is None or len(allowed) == num_blocks
    starts = [n for n in range(1, num_blocks) if allowed is None or allowed[n]]
    if not 1 <= num_stages <= len(starts) + 1:
        raise UserError(
            f"{num_stages} stages can't be made of {num_blocks} blocks between which the network "
            f"can be cut in {len(starts)} places: at most {len(starts) + 1}. Use fewer stages."
        )
    ends = [*starts, num_blocks]
    sums = [0.0]
    for cost in costs_ms:
        sums.append(sums[-1] + cost)

    def best(limit: float | None) -> dict[int, tuple[float, tuple[int, ...]]]:
        """Number of blocks -> the least badness of that many blocks in all stages, and where the
        stages end: of the slowest stage (no limit), or of the sum of squares (below the limit)."""
        found: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
        for _ in range(num_stages):
            longer: dict[int, tuple[float, tuple[int, ...]]] = {}
            for end in ends:
                for begin, (badness, before) in found.items():
                    if begin >= end:
                        continue
                    time = sums[end] - sums[begin]
                    if limit is not None and time > limit:
                        continue
                    total = max(badness, time) if limit is None else badness + time * time
                    candidate = (total, (*before, end))
                    if end not in longer or candidate < longer[end]:
                        longer[end] = candidate
            found = longer
        return found

    slowest = best(None)[num_blocks][0]
    cuts = best(slowest)[num_blocks][1]
    return tuple(end - begin for begin, end in zip((0, *cuts), cuts, strict=False))


def parse_balance(text: str, num_blocks: int, num_stages: int) -> tuple[int, ...]:
    """What a user wrote, numbers of blocks by commas: "2,3,1".

    Raises:
        UserError: no such numbers, not one for each stage, or not all blocks.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise UserError(
            f"--balance {text!r} is not understood; expected one number of blocks for each "
            f"stage, separated by commas, as 2,3,1."
        )
    numbers = tuple(int(word) for word in words)
    if len(numbers) != num_stages:
        raise UserError(
            f"--balance {text} is for {len(numbers)} stage{'s' * (len(numbers) != 1)}, and there "
            f"{'is' if num_stages == 1 else 'are'} {num_stages}. Give one number for each."
        )
    if 0 in numbers:
        raise UserError(f"--balance {text} leaves a stage without a block; give each at least 1.")
    if sum(numbers) != num_blocks:
        raise UserError(
            f"--balance {text} is of {sum(numbers)} blocks, and the network has {num_blocks}. "
            f"The numbers must add up to that."
        )
    return numbers
