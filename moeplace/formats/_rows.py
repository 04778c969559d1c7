"""What engine formats of plans share: rows of experts by slot, and the rules for them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from moeplace._check import IntArray, first
from moeplace._files import PathLike
from moeplace.errors import FormatError, PlanError
from moeplace.plan import EMPTY, Plan

#: The largest number that a slot or layer of a file may have.
HIGH = 1 << 20
#: The most slots that all layers of a plan may have together.
MAX_SLOTS = 1 << 24


def check_writable(plan: Plan, engine: str, *, duplicates: bool = False) -> None:
    """Refuse what rows of experts cannot hold: unequal ranks, EMPTY slots, duplicates.

    Raises
    ------
    PlanError
    """
    check_equal_slots(plan, engine)
    check_full_slots(plan, engine)
    if not duplicates:
        check_duplicates(plan, engine)


def check_equal_slots(plan: Plan, engine: str) -> None:
    """Refuse ranks with unequal slots."""
    uneven = plan.rank_slots != plan.rank_slots[0]
    if uneven.any():
        (rank,) = first(uneven)
        raise PlanError(
            f"Plan has {plan.rank_slots[rank]} slots on rank {rank} but {plan.rank_slots[0]} on "
            f"rank 0: {engine} needs as many on every rank. Plan for a cluster with equal slots."
        )


def check_full_slots(plan: Plan, engine: str) -> None:
    """Refuse EMPTY slots."""
    empty = plan.slots == EMPTY
    if empty.any():
        layer, slot = first(empty)
        raise PlanError(
            f"Plan leaves slot {slot} (rank {plan.rank_of_slot[slot]}) of layer {layer} EMPTY: "
            f"{engine} needs an expert in every slot. Solve with --fill, or use mp.fill(problem, "
            "plan)."
        )


def check_duplicates(plan: Plan, engine: str) -> None:
    """Refuse two replicas of one expert on a rank."""
    if plan.duplicates.any():
        layer, rank = first(plan.duplicates)
        held = np.sort(plan.slots[layer, plan.rank_of_slot == rank])
        twice = held[1:][(held[1:] == held[:-1]) & (held[1:] != EMPTY)][0]
        raise PlanError(
            f"Plan holds expert {twice} twice on rank {rank} in layer {layer}: {engine} takes one "
            "replica of an expert on a rank at most. Give that slot another expert."
        )


def trivial(experts: int, slots: int) -> list[int]:
    """A row for a layer that no plan covers: slot p holds expert p mod E."""
    return (np.arange(slots) % experts).tolist()


def model_layers(
    plan: Plan, first_moe_layer: int, num_layers: int | None, further: int, engine: str
) -> range:
    """The model layers that the plan's layers are, checked against the model's number of layers."""
    end = first_moe_layer + plan.layers
    if num_layers is not None and end + further != num_layers:
        covers = f"layers {first_moe_layer} to {end + further - 1}"
        if end + further < num_layers:
            what = f"layer {end + further} is missing"
        else:
            what = f"layer {num_layers} and later ones do not exist"
        raise PlanError(
            f"Plan of {plan.layers} MoE layers covers model {covers}, but the model has "
            f"{num_layers} layers: {what}, and {engine} needs a row for every one. Correct "
            "first_moe_layer or num_layers, or plan for all MoE layers."
        )
    return range(first_moe_layer, end)


def check_rows(path: PathLike, rows: Sequence[Sequence[int]], place: str) -> int:
    """The common length of rows of experts; FormatError where one is empty or differs."""
    if not rows:
        raise FormatError(f"{path}: {place} is empty: it needs a row for each layer. Fill it.")
    for i, row in enumerate(rows):
        if len(row) != len(rows[0]) or not row:
            raise FormatError(
                f"{path}: {place}[{i}] has {len(row)} slots but {place}[0] has {len(rows[0])}: "
                "every layer needs as many, and at least one. Correct that row."
            )
    if len(rows) * len(rows[0]) > MAX_SLOTS:
        raise FormatError(f"{path}: {place} has more than {MAX_SLOTS:,} slots. Check the file.")
    return len(rows[0])


def plan_of_rows(path: PathLike, rows: Any, ranks: int | None) -> Plan:
    """A plan from [layers, slots] and a number of ranks that the file does not say.

    Two replicas of one expert on a rank, which the balancers of engines make, are kept: such a
    plan can be priced.
    """
    if ranks is None:
        raise FormatError(f"{path}: does not say how many ranks share its slots. Say it (ranks=).")
    rows = np.asarray(rows)
    if rows.shape[1] % ranks:
        raise FormatError(
            f"{path}: has {rows.shape[1]} slots a layer, which {ranks} ranks cannot share evenly: "
            "each has as many. Correct the number of ranks."
        )
    return plan_of(path, rows, [rows.shape[1] // ranks] * ranks)


def plan_of(path: PathLike, rows: Any, rank_slots: list[int], experts: int | None = None) -> Plan:
    """A plan from a file; whatever rule it breaks becomes a FormatError."""
    rows = np.asarray(rows)
    if rows.size > MAX_SLOTS:
        raise FormatError(
            f"{path}: has {rows.size:,} slots: more than the {MAX_SLOTS:,} that a plan may have. "
            "Check the file."
        )
    high = int(rows.max())
    if experts is None and high >= rows.shape[1]:
        layer, slot = first(rows == high)
        raise FormatError(
            f"{path}: names expert {high} at layer {layer}, slot {slot}, but {rows.shape[1]} slots "
            f"cannot hold {high + 1} experts: each needs one. Correct that entry."
        )
    try:
        plan = Plan(
            slots=rows,
            rank_slots=rank_slots,  # type: ignore[arg-type]
            experts=high + 1 if experts is None else experts,
            allow_duplicates=True,
        )
        if plan.duplicates.any():
            return plan
        return Plan(slots=plan.slots, rank_slots=plan.rank_slots, experts=plan.experts)
    except PlanError as error:
        raise FormatError(f"{path}: {error}") from error


def whole_rows(path: PathLike, rows: IntArray, place: str) -> IntArray:
    """A file's array of whole numbers from 0 on, as int64."""
    if rows.dtype.kind not in "iu" or rows.size == 0:
        raise FormatError(
            f"{path}: {place} has {rows.dtype} entries of shape {rows.shape}, expected whole "
            "numbers. Save integers."
        )
    return rows.astype(np.int64)
