"""How a training is spread over processes: `--parallel layers:2,data:2`."""

from __future__ import annotations

from dataclasses import dataclass

from locallearn.errors import UserError

_FORMS = "layers, data, layers:L, data:D, or layers:L,data:D"


@dataclass(frozen=True)
class Parallelism:
    """Ranks are laid out as a grid: rank = stage * num_replicas + replica.

    Arguments:
        num_stages: L, contiguous parts of the network, each trained by its own processes.
        num_replicas: D, copies of each stage, each trained on its own part of every batch.
    """

    num_stages: int = 1
    num_replicas: int = 1

    @property
    def num_processes(self) -> int:
        return self.num_stages * self.num_replicas

    def __str__(self) -> str:
        words = []
        if self.num_stages > 1 or self.num_replicas == 1:
            words.append(f"layers:{self.num_stages}")
        if self.num_replicas > 1:
            words.append(f"data:{self.num_replicas}")
        return ",".join(words)

    @classmethod
    def parse(cls, text: str, num_processes: int) -> Parallelism:
        """What a user wrote, for so many processes. A number that is left out is what remains.

        Raises:
            UserError: another form, or another number of processes than it takes.
        """
        wrong = UserError(f"--parallel {text!r} is not understood; expected {_FORMS}.")
        given: dict[str, int | None] = {}
        for part in text.split(","):
            name, colon, number = part.strip().partition(":")
            if name not in ("layers", "data") or name in given:
                raise wrong
            if colon and not (number.isdecimal() and int(number) >= 1):
                raise wrong
            given[name] = int(number) if colon else None
        open_ones = [name for name, number in given.items() if number is None]
        if len(open_ones) > 1:
            raise UserError(
                f"--parallel {text} leaves both numbers open; give one: layers:L,data:D, where "
                f"L x D is the number of processes ({num_processes} here)."
            )
        known = 1
        for size in given.values():
            known *= size or 1
        for left_out in open_ones:
            given[left_out] = max(1, num_processes // known)
        found = cls(given.get("layers") or 1, given.get("data") or 1)
        if found.num_processes != num_processes:
            raise UserError(
                f"--parallel {text} takes {known} process{'es' * (known != 1)}"
                f"{' or a multiple' if open_ones else ''}, and {num_processes} "
                f"{'was' if num_processes == 1 else 'were'} started. Start them with `torchrun "
                f"--nproc-per-node {known} -m locallearn train ...`, or give other numbers."
            )
        return found
