"""vllm-ascend's ``expert_map_path`` (read from vllm-ascend 0.23): JSON, named ``.json``.

::

    {"moe_layer_count": L, "layer_list": [{"layer_id": l, "device_count": G, "device_list":
        [{"device_id": g, "device_expert": [K experts]}]}]}

``layer_id`` counts MoE layers from 0; every device has K experts, none twice.
"""

from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from moeplace._files import PathLike, read_json, write_json
from moeplace.errors import FormatError
from moeplace.formats._rows import HIGH, check_rows, check_writable, plan_of
from moeplace.plan import Plan

WRITES: frozenset[str] = frozenset()
READS: frozenset[str] = frozenset()
NEEDS: frozenset[str] = frozenset()

_Int = Annotated[int, msgspec.Meta(ge=0, le=HIGH)]


class _Device(msgspec.Struct, forbid_unknown_fields=True):
    device_id: _Int
    device_expert: list[_Int]


class _Layer(msgspec.Struct, forbid_unknown_fields=True):
    layer_id: _Int
    device_count: _Int
    device_list: list[_Device]


class _File(msgspec.Struct, forbid_unknown_fields=True):
    moe_layer_count: _Int
    layer_list: list[_Layer]


def write(plan: Plan, path: PathLike) -> None:
    """Write an expert map."""
    _check_name(path)
    check_writable(plan, "vllm-ascend")
    held = plan.slots.reshape(plan.layers, plan.ranks, -1)
    layers: list[dict[str, Any]] = [
        {
            "layer_id": layer,
            "device_count": plan.ranks,
            "device_list": [
                {"device_id": rank, "device_expert": experts.tolist()}
                for rank, experts in enumerate(row)
            ],
        }
        for layer, row in enumerate(held)
    ]
    write_json(path, {"moe_layer_count": plan.layers, "layer_list": layers})


def read(path: PathLike) -> Plan:
    """Read an expert map; layers and devices must stand in order, complete."""
    _check_name(path)
    file = read_json(path, _File)
    _check_count(path, "$.moe_layer_count", file.moe_layer_count, len(file.layer_list))
    rows = []
    for i, layer in enumerate(file.layer_list):
        place = f"$.layer_list[{i}]"
        _check_place(path, f"{place}.layer_id", layer.layer_id, i)
        _check_count(path, f"{place}.device_count", layer.device_count, len(layer.device_list))
        devices = f"{place}.device_list"
        check_rows(path, [device.device_expert for device in layer.device_list], devices)
        for g, device in enumerate(layer.device_list):
            _check_place(path, f"{devices}[{g}].device_id", device.device_id, g)
            _check_distinct(path, f"{devices}[{g}].device_expert", device.device_expert)
        rows.append([expert for device in layer.device_list for expert in device.device_expert])
        if layer.device_count != file.layer_list[0].device_count:
            raise FormatError(
                f"{path}: {place}.device_count is {layer.device_count} but $.layer_list[0] has "
                f"{file.layer_list[0].device_count}: all layers need the same devices. Correct it."
            )
    slots = check_rows(path, rows, "$.layer_list")
    ranks = file.layer_list[0].device_count
    return plan_of(path, np.asarray(rows), [slots // ranks] * ranks)


def _check_name(path: PathLike) -> None:
    if Path(path).suffix != ".json":
        raise FormatError(f"{path}: vllm-ascend takes a name that ends in .json only. Rename it.")


def _check_count(path: PathLike, place: str, said: int, there: int) -> None:
    if said != there or not there:
        raise FormatError(
            f"{path}: {place} is {said}, but {there} are listed: they must agree, at least one. "
            "Correct it."
        )


def _check_place(path: PathLike, place: str, said: int, expected: int) -> None:
    if said != expected:
        raise FormatError(
            f"{path}: {place} is {said}, expected {expected}: entries stand in order from 0, none "
            "missing. Sort or complete the list."
        )


def _check_distinct(path: PathLike, place: str, experts: list[int]) -> None:
    seen: set[int] = set()
    for position, expert in enumerate(experts):
        if expert in seen:
            raise FormatError(
                f"{path}: {place}[{position}] holds expert {expert} again: a device has an expert "
                "once at most. Give it another expert."
            )
        seen.add(expert)
