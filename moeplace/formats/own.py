"""Our own plan file: JSON that holds all that a Plan holds, shares to the last bit.

::

    {"format": "moeplace-plan", "version": 1,
     "experts": E, "rank_slots": [ranks], "slots": [layers][slots],
     "split": null | [layers][slots] | [windows][layers][slots]}

``slots`` holds the expert in each slot, rank by rank, -1 for an EMPTY one; ``split`` the share
(0 to 1) of its expert's tokens that a slot takes, null for the engine's even split. A priced
map with two replicas of one expert on a rank also says ``"allow_duplicates": true``.
"""

from typing import Annotated, Any

import msgspec

from moeplace._files import PathLike, check_full, nested, plain, read_json, write_json
from moeplace.errors import PlanError
from moeplace.plan import Plan

WRITES: frozenset[str] = frozenset()
READS: frozenset[str] = frozenset()
NEEDS: frozenset[str] = frozenset()
FORMAT, VERSION = "moeplace-plan", 1

_Int = Annotated[int, msgspec.Meta(ge=-1, le=1 << 20)]
_Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]


class _File(msgspec.Struct, forbid_unknown_fields=True):
    format: str
    version: int
    experts: _Count
    rank_slots: list[_Int]
    slots: list[list[_Int]]
    split: msgspec.Raw = msgspec.Raw(b"null")
    allow_duplicates: bool = False


def read(path: PathLike) -> Plan:
    """Read a plan; FormatError or PlanError as `read_plan` says."""
    file = read_json(path, _File, header=(FORMAT, VERSION))
    check_full(path, file.slots, "$.slots", 2)
    split = None
    if bytes(file.split) != b"null":
        split = nested(path, file.split, "$.split", (2, 3))
    try:
        return Plan(
            slots=file.slots,  # type: ignore[arg-type]
            rank_slots=file.rank_slots,  # type: ignore[arg-type]
            experts=file.experts,
            split=split,
            allow_duplicates=file.allow_duplicates,
        )
    except PlanError as error:
        raise type(error)(f"{path}: {error}") from error


def write(plan: Plan, path: PathLike) -> None:
    """Write a plan; FormatError as `write_plan` says."""
    file: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "experts": int(plan.experts),
        "rank_slots": plan.rank_slots.tolist(),
        "slots": plan.slots.tolist(),
        "split": None if plan.split is None else plain(plan.split),
    }
    if plan.allow_duplicates:
        file["allow_duplicates"] = True
    write_json(path, file)
