"""TensorRT-LLM's ``moe_config.load_balancer`` YAML.

::

    num_slots: S
    initial_global_assignments: {3: [S experts], 4: [S experts], ...}
    layer_updates_per_iter: 0

Keys are the model's layer numbers. A MoE layer without a key, also one of multi-token prediction,
stops TensorRT-LLM with a KeyError; 0 updates keep the placement static.
"""

from itertools import pairwise
from typing import Any

import numpy as np

from moeplace._files import PathLike, write_text
from moeplace.errors import FormatError
from moeplace.formats import _yaml
from moeplace.formats._rows import HIGH, check_rows, check_writable, model_layers, plan_of_rows
from moeplace.formats._rows import trivial as trivial_row
from moeplace.plan import Plan

WRITES = frozenset({"first_moe_layer", "num_layers", "mtp_layers"})
READS = frozenset({"ranks"})
NEEDS = frozenset({"first_moe_layer"})
SLOTS, ROWS, UPDATES = "num_slots", "initial_global_assignments", "layer_updates_per_iter"


def write(
    plan: Plan,
    path: PathLike,
    *,
    first_moe_layer: int = 0,
    num_layers: int | None = None,
    mtp_layers: int = 0,
) -> None:
    """Write a static placement; MTP layers that the plan does not cover get slot p -> p mod E."""
    check_writable(plan, "TensorRT-LLM", duplicates=True)
    layers = model_layers(plan, first_moe_layer, num_layers, mtp_layers, "TensorRT-LLM")
    rows = dict(zip(layers, plan.slots.tolist(), strict=True))
    for layer in range(layers.stop, layers.stop + mtp_layers):
        rows[layer] = trivial_row(plan.experts, plan.slots.shape[1])
    lines = [f"{SLOTS}: {plan.slots.shape[1]}", f"{ROWS}:"]
    lines += [f"  {layer}: [{', '.join(map(str, row))}]" for layer, row in rows.items()]
    write_text(path, "\n".join([*lines, f"{UPDATES}: 0"]) + "\n")


def read(path: PathLike, *, ranks: int | None = None) -> Plan:
    """Read the rows in order of their layers."""
    file = _yaml.load(path)
    if not isinstance(file, dict):
        raise FormatError(f"{path}: is {_kind(file)}, expected a map with {ROWS}. Check the file.")
    odd = [key for key in file if key not in (SLOTS, ROWS, UPDATES)]
    missing = [key for key in (SLOTS, ROWS) if key not in file]
    if odd or missing:
        what = f"has the unknown key {str(odd[0])[:40]!r}" if odd else f"lacks the key {missing[0]}"
        raise FormatError(f"{path}: {what}: known are {SLOTS}, {ROWS}, {UPDATES}. Correct it.")
    slots = _whole(path, SLOTS, file[SLOTS])
    _whole(path, UPDATES, file.get(UPDATES, 0))
    table = file[ROWS]
    if not isinstance(table, dict) or not table:
        raise FormatError(
            f"{path}: {ROWS} is {_kind(table)}, expected a map of model layers to lists of "
            "experts, at least one. Correct it."
        )
    for layer, row in table.items():
        place = f"{ROWS}[{str(layer)[:20]}]"
        _whole(path, f"{ROWS}: the layer {str(layer)[:20]!r}", layer)
        if not isinstance(row, list):
            raise FormatError(f"{path}: {place} is {_kind(row)}, expected a list. Correct it.")
        for slot, expert in enumerate(row):
            _whole(path, f"{place}[{slot}]", expert)
        if len(row) != slots:
            raise FormatError(
                f"{path}: {place} has {len(row)} slots but {SLOTS} is {slots}: every layer needs "
                "as many. Correct that row."
            )
    layers = sorted(table)
    apart = [after - before for before, after in pairwise(layers)]
    if apart and max(apart) != min(apart):
        gap = apart.index(max(apart))
        raise FormatError(
            f"{path}: {ROWS} has the layers {layers[gap]} and {layers[gap + 1]} but none between, "
            f"while others are {min(apart)} apart: TensorRT-LLM stops at a MoE layer without a "
            "row. Add it."
        )
    rows = [table[layer] for layer in layers]
    check_rows(path, rows, ROWS)
    return plan_of_rows(path, np.asarray(rows), ranks)


def _kind(value: Any) -> str:
    return {dict: "a map", list: "a list", int: "a number"}.get(type(value), "text")


def _whole(path: PathLike, place: str, value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value <= HIGH:
        said = repr(value)[:40] if isinstance(value, int | str) else _kind(value)
        raise FormatError(
            f"{path}: {place} must be a whole number from 0 to {HIGH}, got {said}. Correct it."
        )
    return value
