"""omni-infer's placement (omni_placement): ``.npy`` of 0 and 1, int32 [ranks, layers, experts].

It says which experts a rank holds, not in which slot: read back, a rank's experts stand in
ascending order. A rank may hold fewer experts in some layers; then its last slots there are EMPTY.
"""

import numpy as np

from moeplace._check import first, where
from moeplace._files import PathLike
from moeplace.errors import FormatError, PlanError
from moeplace.formats._npy import npy, write_npy
from moeplace.formats._rows import MAX_SLOTS, check_duplicates, plan_of
from moeplace.plan import EMPTY, Plan

WRITES: frozenset[str] = frozenset()
READS = frozenset({"slots"})
NEEDS: frozenset[str] = frozenset()


def write(plan: Plan, path: PathLike) -> None:
    """Write which rank holds which expert."""
    check_duplicates(plan, "omni-infer")
    if not str(path).endswith(".npy"):
        raise FormatError(f"{path}: omni-infer's placement is a .npy file. Rename it.")
    empty = plan.slots == EMPTY
    least = plan.by_rank(~empty).sum(axis=2).max(axis=0)
    if empty.any() and (least < plan.rank_slots).any():
        (rank,) = first(least < plan.rank_slots)
        raise PlanError(
            f"Plan leaves {plan.rank_slots[rank] - least[rank]} of the {plan.rank_slots[rank]} "
            f"slots of rank {rank} EMPTY in every layer: omni-infer's file has no place for slots "
            "that are never used. Plan with as many slots as are used."
        )
    held = np.zeros((plan.ranks, plan.layers, plan.experts), dtype=np.int32)
    layer, slot = np.nonzero(~empty)
    held[plan.rank_of_slot[slot], layer, plan.slots[layer, slot]] = 1
    write_npy(path, held)


def read(path: PathLike, *, slots: int | None = None) -> Plan:
    """Read a placement; `slots` says how many a rank has, by default the most it uses."""
    with npy(path) as array:
        if array.dtype.kind not in "iu" or len(array.shape) != 3 or 0 in array.shape:
            raise FormatError(
                f"{path}: has {array.dtype} entries of shape {array.shape}, expected 0 and 1 on "
                "the axes [ranks, layers, experts]. Save it so."
            )
        held = array.whole()
    if ((held != 0) & (held != 1)).any():
        place = first((held != 0) & (held != 1))
        raise FormatError(
            f"{path}: holds {held[place]} at {where(place, ('rank', 'layer', 'expert'))}: entries "
            "are 0 or 1. Correct it."
        )
    ranks, layers, experts = held.shape
    count = held.sum(axis=2, dtype=np.int64)
    most = count.max(axis=1)
    if slots is not None:
        if (most > slots).any():
            (over,) = first(most > slots)
            raise FormatError(
                f"{path}: rank {over} holds {most[over]} experts in a layer, more than the {slots} "
                "slots it is said to have. Correct slots."
            )
        most[:] = slots
    if layers * int(most.sum()) > MAX_SLOTS:
        raise FormatError(
            f"{path}: has {layers:,} layers of {most.sum():,} slots: more than the {MAX_SLOTS:,} "
            "that a plan may have. Check the order of its axes."
        )
    rows = np.full((layers, int(most.sum())), EMPTY)
    starts = np.cumsum(most) - most
    layer, rank, expert = np.nonzero(held.swapaxes(0, 1))
    before = np.cumsum(count.T).reshape(layers, ranks) - count.T  # in earlier layers and ranks
    nth = np.arange(len(expert)) - before[layer, rank]
    rows[layer, starts[rank] + nth] = expert
    if rows.size == 0:
        raise FormatError(f"{path}: places no expert at all. Write it again.")
    return plan_of(path, rows, most.tolist(), experts)
