"""Files of vLLM's open pull requests; vLLM 0.33 itself reads no placement from a file.

- ``map`` (#49572, ``initial_expert_map_path``): a JSON list [[S experts] x layers];
- ``row`` (#49572): one list [S experts] for all layers;
- ``expert-to-rank`` (#34811, #34297): ``{"expert_to_ep_rank": [E ranks]}``, no replicas, one for
  all layers; read back, a rank's experts stand in ascending order.
"""

from typing import Annotated, Any

import msgspec
import numpy as np

from moeplace._check import first
from moeplace._files import PathLike, read_bytes, read_json, write_bytes, write_json
from moeplace.errors import FormatError, PlanError
from moeplace.formats._rows import HIGH, check_rows, check_writable, plan_of, plan_of_rows
from moeplace.plan import Plan

WRITES = frozenset({"form"})
READS = frozenset({"ranks", "layers"})
NEEDS: frozenset[str] = frozenset()
FORMS = ("map", "row", "expert-to-rank")
#: The most layers that one row may stand for.
MAX_LAYERS = 1 << 12

_Int = Annotated[int, msgspec.Meta(ge=0, le=HIGH)]


class _Ranks(msgspec.Struct, forbid_unknown_fields=True):
    expert_to_ep_rank: list[_Int]


def write(plan: Plan, path: PathLike, *, form: str = "map") -> None:
    """Write one of the forms."""
    if form not in FORMS:
        raise PlanError(f"Form of vLLM's file must be one of {', '.join(FORMS)}, got {form!r}.")
    check_writable(plan, "vLLM", duplicates=True)
    if form == "map":
        rows = [str(row) for row in plan.slots.tolist()]
        write_bytes(path, ("[\n " + ",\n ".join(rows) + "\n]\n").encode())
        return
    if form == "row":
        _check_same(plan.slots, "row", "slot")
        write_bytes(path, f"{plan.slots[0].tolist()}\n".encode())
        return
    if (plan.replicas > 1).any():
        layer, expert = first(plan.replicas > 1)
        raise PlanError(
            f"Plan has {plan.replicas[layer, expert]} replicas of expert {expert} in layer "
            f"{layer}: the form expert-to-rank holds one each. Use the form map."
        )
    rank = np.empty((plan.layers, plan.experts), dtype=np.int64)
    np.put_along_axis(rank, plan.slots, plan.rank_of_slot[None], axis=1)
    _check_same(rank, "expert-to-rank", "expert")
    write_json(path, {"expert_to_ep_rank": rank[0].tolist()})


def _check_same(rows: Any, form: str, axis: str) -> None:
    other = rows != rows[0]
    if other.any():
        layer, place = first(other)
        raise PlanError(
            f"Plan differs between layers 0 and {layer} at {axis} {place}: the form {form} has one "
            "row for all layers. Use the form map."
        )


def read(path: PathLike, *, ranks: int | None = None, layers: int | None = None) -> Plan:
    """Read any form; one row for all layers needs `layers`."""
    data = read_bytes(path).lstrip()
    if data.startswith(b"{"):
        return _of_ranks(path, read_json(path, _Ranks).expert_to_ep_rank, ranks, layers)
    if data.startswith(b"[") and data[1:].lstrip().startswith(b"["):
        rows = read_json(path, list[list[_Int]])
        check_rows(path, rows, "$")
        if layers is not None and layers != len(rows):
            raise FormatError(
                f"{path}: has {len(rows)} rows, expected {layers}, one for each MoE layer. Correct "
                "layers, or write the file again."
            )
        return plan_of_rows(path, rows, ranks)
    row = read_json(path, list[_Int])
    check_rows(path, [row], "$")
    return plan_of_rows(path, _repeated(path, row, layers), ranks)


def _repeated(path: PathLike, row: list[int], layers: int | None) -> Any:
    if layers is None or layers > MAX_LAYERS:
        raise FormatError(
            f"{path}: has one row for all layers: say how many there are (layers=, at most "
            f"{MAX_LAYERS:,})."
        )
    return np.tile(np.asarray(row), (layers, 1))


def _of_ranks(path: PathLike, of: list[int], ranks: int | None, layers: int | None) -> Plan:
    place = "$.expert_to_ep_rank"
    check_rows(path, [of], place)
    count = max(of) + 1 if ranks is None else ranks
    for expert, rank in enumerate(of):
        if rank >= count:
            raise FormatError(
                f"{path}: {place}[{expert}] is rank {rank}, but there are {count}. Correct it."
            )
    held = np.bincount(of, minlength=count) if count <= len(of) else np.zeros(1)
    uneven = held != held[0]
    if uneven.any() or not held[0]:
        raise FormatError(
            f"{path}: {place} puts {len(of)} experts on {count} ranks unevenly: each rank needs as "
            "many, at least one. Correct it."
        )
    row = np.argsort(of, kind="stable").tolist()
    return plan_of(path, _repeated(path, row, layers), held.astype(int).tolist())
