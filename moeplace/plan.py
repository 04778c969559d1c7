"""Which expert each slot holds, and (weighted routing) what share of its tokens a slot takes."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from moeplace._check import BoolArray, FloatArray, IntArray, first, integers, ndim, numbers, where
from moeplace.errors import PlanError

EMPTY = -1
SHARE_TOLERANCE = 1e-9


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """Experts in slots, and their shares of the tokens.

    Parameters
    ----------
    slots : array-like [layers, slots]
        Expert in each slot, rank by rank; EMPTY (-1) for none.
    rank_slots : array-like [ranks]
        Slots of each rank; they sum to the number of slots.
    experts : int
        Number of logical experts.
    split : array-like [layers, slots] or [windows, layers, slots], optional
        Share of its expert's tokens that each slot takes (weighted routing only). None means
        that the engine shares evenly.
    allow_duplicates : bool
        Accept two replicas of one expert on one rank, as published maps hold. Such a plan can
        be priced but is never a result.

    Raises
    ------
    PlanError
        If an expert is missing, unknown or twice on a rank, or shares are negative, sit on an
        EMPTY slot or do not sum to 1 for each expert.
    """

    slots: IntArray
    rank_slots: IntArray
    experts: int
    split: FloatArray | None = None
    allow_duplicates: bool = False

    def __post_init__(self) -> None:
        whole = isinstance(self.experts, int | np.integer) and not isinstance(self.experts, bool)
        if not whole or self.experts < 1:
            raise PlanError(
                f"Plan needs a whole number of experts of at least 1, got {self.experts!r}."
            )
        high = int(self.experts) - 1
        rank_slots = integers(
            self.rank_slots, "Slots per rank", ("rank",), PlanError, low=0, high=1 << 20
        )
        slots = integers(
            self.slots, "Plan slots", ("layer", "slot"), PlanError, low=EMPTY, high=high
        )
        if slots.shape[1] != rank_slots.sum():
            raise PlanError(
                f"Plan has {slots.shape[1]} slots a layer but its ranks have {rank_slots.sum()}: "
                "the two must be equal."
            )
        object.__setattr__(self, "slots", slots)
        object.__setattr__(self, "rank_slots", rank_slots)
        missing = self.replicas == 0
        if missing.any():
            layer, expert = first(missing)
            raise PlanError(
                f"Plan misses expert {expert} in layer {layer}: every expert needs at least one "
                f"slot (got 0). Put it in a slot of that layer."
            )
        if not self.allow_duplicates and self.duplicates.any():
            layer, rank = first(self.duplicates)
            held = np.sort(slots[layer, self.rank_of_slot == rank])
            twice = held[1:][(held[1:] == held[:-1]) & (held[1:] != EMPTY)][0]
            raise PlanError(
                f"Plan holds expert {twice} twice on rank {rank} in layer {layer}: a rank needs "
                "one replica of an expert at most. Empty the slot (-1) or give it another expert."
            )
        if self.split is not None:
            object.__setattr__(self, "split", self._checked_split())

    def _checked_split(self) -> FloatArray:
        given: Any = self.split
        axes = ("layer", "slot") if ndim(given) == 2 else ("window", "layer", "slot")
        split = numbers(given, "Shares", axes, PlanError, high=1.0 + SHARE_TOLERANCE)
        if split.shape[-2:] != self.slots.shape:
            raise PlanError(
                f"Shares must have one number for each slot {self.slots.shape}, "
                f"got shape {split.shape}."
            )
        absent = (split > 0) & (self.slots == EMPTY)
        if absent.any():
            place = first(absent)
            raise PlanError(
                f"Shares give {split[place]:g} to an EMPTY slot at {where(place, axes)}: "
                "a share needs a replica. Set it to 0 or fill the slot."
            )
        flat = split.reshape(-1, *self.slots.shape)
        for window, share in enumerate(flat):
            total = self._per_expert(share)
            wrong = np.abs(total - 1.0) > SHARE_TOLERANCE
            if wrong.any():
                layer, expert = first(wrong)
                spot = f"layer {layer}" + (f" of window {window}" if split.ndim == 3 else "")
                raise PlanError(
                    f"Shares of expert {expert} sum to {total[layer, expert]:.12g} in {spot}: "
                    "they must sum to 1 over its replicas. Normalise them."
                )
        return split

    def _per_expert(self, weights: FloatArray) -> FloatArray:
        """Sum [layers, slots] over the slots of each expert -> [layers, experts]."""
        held = self.slots != EMPTY
        index = np.arange(self.layers)[:, None] * self.experts + self.slots
        size = self.layers * self.experts
        summed = np.bincount(index[held], weights=weights[held], minlength=size)
        return summed.astype(np.float64).reshape(self.layers, self.experts)

    @property
    def layers(self) -> int:
        """Number of MoE layers."""
        return int(self.slots.shape[0])

    @property
    def ranks(self) -> int:
        """Number of EP ranks."""
        return self.rank_slots.size

    @cached_property
    def rank_of_slot(self) -> IntArray:
        """Rank of each slot [slots]."""
        return np.repeat(np.arange(self.ranks), self.rank_slots)

    @cached_property
    def replicas(self) -> IntArray:
        """Replicas of each expert [layers, experts]."""
        return self._per_expert(np.ones(self.slots.shape)).astype(np.int64)

    @cached_property
    def duplicates(self) -> IntArray:
        """Slots [layers, ranks] wasted on a second replica of an expert on the same rank."""
        held = np.sort(self.by_rank(self.slots), axis=2)
        twice = (held[:, :, 1:] == held[:, :, :-1]) & (held[:, :, 1:] != EMPTY)
        return np.asarray(twice.sum(axis=2))

    def held(self) -> BoolArray:
        """Where replicas lie [layers, experts, ranks]."""
        held = np.zeros((self.layers, self.experts, self.ranks), dtype=np.bool_)
        layer, slot = np.nonzero(self.slots != EMPTY)
        held[layer, self.slots[layer, slot], self.rank_of_slot[slot]] = True
        return held

    def by_rank(self, values: Any) -> Any:
        """Lay [..., slots] out as [..., ranks, most slots], padded with EMPTY."""
        return by_rank(values, self.rank_slots)

    def with_split(self, split: FloatArray | None) -> "Plan":
        """The same placement with other shares."""
        return Plan(
            slots=self.slots,
            rank_slots=self.rank_slots,
            experts=self.experts,
            split=split,
            allow_duplicates=self.allow_duplicates,
        )

    def moves_from(self, old: "Plan") -> IntArray:
        """Copies [layers, ranks] that each rank must receive: its experts less those it had.

        Raises
        ------
        PlanError
            If the two plans have different layers, experts or ranks.
        """
        mine = (self.layers, self.experts, self.ranks)
        theirs = (old.layers, old.experts, old.ranks)
        if mine != theirs:
            raise PlanError(
                f"Moves need two plans of one shape (layers, experts, ranks): got {theirs} and "
                f"{mine}."
            )
        return np.asarray((self.held() & ~old.held()).sum(axis=1))


def by_rank(values: Any, rank_slots: IntArray) -> Any:
    """Lay [..., slots] out as [..., ranks, most slots], padded with EMPTY (-1)."""
    most = int(rank_slots.max())
    if (rank_slots == most).all():
        return values.reshape(*values.shape[:-1], rank_slots.size, most)
    used = np.arange(most) < rank_slots[:, None]
    padded = np.full((*values.shape[:-1], rank_slots.size, most), EMPTY, dtype=values.dtype)
    padded[..., used] = values
    return padded


def check_plan(value: object) -> None:
    """Raise PlanError unless it is a plan."""
    if not isinstance(value, Plan):
        raise PlanError(
            f"A plan must be a moeplace.Plan, got {type(value).__name__}: build one from slots, "
            "rank_slots and experts, read one (read_plan), or pass a result's plan."
        )
