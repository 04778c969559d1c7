"""SGLang's ``--init-expert-location`` (read from SGLang 0.5.23): ``.json`` or ``.pt``.

``{"physical_to_logical_map": [[S experts] x layers]}`` and no other key. The rows cover all layers
of the model, dense ones too, whose rows are not used. SGLang does not check the number of slots;
we do: each row needs as many, as many on every rank, and every expert.
"""

from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from moeplace._check import first
from moeplace._files import PathLike, read_json, write_json
from moeplace.errors import FormatError
from moeplace.formats import _torch
from moeplace.formats._rows import (
    HIGH,
    check_rows,
    check_writable,
    model_layers,
    plan_of_rows,
    trivial,
    whole_rows,
)
from moeplace.plan import Plan

WRITES = frozenset({"first_moe_layer", "num_layers"})
READS = frozenset({"ranks", "first_moe_layer"})
NEEDS = frozenset({"first_moe_layer"})
KEY = "physical_to_logical_map"

_Int = Annotated[int, msgspec.Meta(ge=0, le=HIGH)]


class _File(msgspec.Struct, forbid_unknown_fields=True):
    physical_to_logical_map: list[list[_Int]]


def write(
    plan: Plan, path: PathLike, *, first_moe_layer: int = 0, num_layers: int | None = None
) -> None:
    """Write a map with a row for each model layer; dense ones get slot p -> p mod E."""
    check_writable(plan, "SGLang", duplicates=True)
    model_layers(plan, first_moe_layer, num_layers, 0, "SGLang")
    dense = [trivial(plan.experts, plan.slots.shape[1])] * first_moe_layer
    rows = [*dense, *plan.slots.tolist()]
    if _is_torch(path):
        _torch.save(path, {KEY: np.asarray(rows, dtype=np.int64)})
    else:
        write_json(path, {KEY: rows})


def read(path: PathLike, *, ranks: int | None = None, first_moe_layer: int = 0) -> Plan:
    """Read the rows of the MoE layers."""
    rows = _torch_rows(path) if _is_torch(path) else _json_rows(path)
    if first_moe_layer >= len(rows):
        raise FormatError(
            f"{path}: {KEY} has {len(rows)} rows, one for each model layer, so that none is left "
            f"after the {first_moe_layer} dense ones. Correct first_moe_layer."
        )
    return plan_of_rows(path, rows[first_moe_layer:], ranks)


def _is_torch(path: PathLike) -> bool:
    suffix = Path(path).suffix
    if suffix not in (".json", ".pt"):
        raise FormatError(
            f"{path}: SGLang tells JSON from torch files by the name, which must end in .json or "
            f".pt, not {suffix!r}. Rename it."
        )
    return suffix == ".pt"


def _json_rows(path: PathLike) -> Any:
    keys = read_json(path, dict[str, msgspec.Raw])
    if KEY not in keys and "logical_count" in keys:
        raise FormatError(f"{path}: {_COUNTS}")
    rows = read_json(path, _File).physical_to_logical_map
    check_rows(path, rows, f"$.{KEY}")
    return np.asarray(rows)


_COUNTS = (
    "holds logical_count, from which SGLang makes a map of its own: loads, not a plan. Read it "
    "with read_loads."
)


def _torch_rows(path: PathLike) -> Any:
    found = _torch.load(path)
    if not isinstance(found, dict) or set(found) != {KEY}:
        if isinstance(found, dict) and "logical_count" in found:
            raise FormatError(f"{path}: {_COUNTS}")
        held = ", ".join(map(str, list(found)[:10])) if isinstance(found, dict) else "no keys"
        raise FormatError(
            f"{path}: holds {held}, expected {KEY} and nothing else: SGLang refuses other keys. "
            "Remove them."
        )
    value = found[KEY]
    if isinstance(value, list):
        return _listed(path, value)
    rows = whole_rows(path, _torch.array(path, value, KEY, ("layers", "slots")), KEY)
    if (rows < 0).any():
        layer, slot = first(rows < 0)
        raise FormatError(
            f"{path}: {KEY} holds {rows[layer, slot]} at layer {layer}, slot {slot}: SGLang needs "
            "an expert in every slot. Correct that entry."
        )
    return rows


def _listed(path: PathLike, value: list[Any]) -> Any:
    try:
        rows = msgspec.convert(value, list[list[_Int]])
    except (msgspec.ValidationError, RecursionError) as cause:
        raise FormatError(f"{path}: {KEY}: {str(cause)[:200]}. Correct that entry.") from cause
    check_rows(path, rows, KEY)
    return np.asarray(rows)
