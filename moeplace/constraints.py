"""What a plan must obey beyond slots: small frozen classes that check a plan.

Each class says what it demands (`check` it against the shape, list its `violations` in a
plan); planners read the same facts as masks from `Problem.allowed` and `Problem.pinned`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moeplace.errors import ProblemError

if TYPE_CHECKING:
    from moeplace.plan import Plan


@dataclass(frozen=True)
class _Pair:
    """One expert and one rank, in one layer or (layer None) in all."""

    expert: int
    rank: int
    layer: int | None = None

    def check(self, layers: int, experts: int, ranks: int) -> None:
        """Raise ProblemError if expert, rank or layer does not exist."""
        limits: tuple[tuple[str, int, int], ...]
        limits = (("expert", self.expert, experts), ("rank", self.rank, ranks))
        if self.layer is not None:
            limits += (("layer", self.layer, layers),)
        for name, value, limit in limits:
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < limit:
                raise ProblemError(
                    f"{self} names {name} {value!r}: {name}s are whole numbers from 0 to "
                    f"{limit - 1}."
                )

    def _held(self, plan: "Plan") -> Iterator[tuple[int, bool]]:
        rank_slots = plan.slots[:, plan.rank_of_slot == self.rank]
        held = (rank_slots == self.expert).any(axis=1)
        for layer in range(plan.layers) if self.layer is None else [self.layer]:
            yield layer, bool(held[layer])


@dataclass(frozen=True)
class Pin(_Pair):
    """The expert must have a replica on the rank (others elsewhere are allowed)."""

    def violations(self, plan: "Plan") -> list[str]:
        """One sentence for each layer that breaks the rule."""
        return [
            f"layer {layer}: expert {self.expert} is pinned to rank {self.rank} but not there"
            for layer, held in self._held(plan)
            if not held
        ]


@dataclass(frozen=True)
class Forbid(_Pair):
    """The expert must have no replica on the rank."""

    def violations(self, plan: "Plan") -> list[str]:
        """One sentence for each layer that breaks the rule."""
        return [
            f"layer {layer}: expert {self.expert} is forbidden on rank {self.rank} but there"
            for layer, held in self._held(plan)
            if held
        ]


Constraint = Pin | Forbid
