"""What engines do with the files we write: their rules as documented, in our own few lines.

Each function takes what the engine is started with, and returns the experts [layers, ranks][slots]
that it would load, or raises as the engine would.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

Held = list[list[list[int]]]


@dataclass
class _Location:
    """SGLang builds its metadata from the file's keys: an unknown one is a TypeError."""

    physical_to_logical_map: Any


def sglang(path: Path, *, ranks: int, model_layers: int, moe_layers: range) -> Held:
    if path.suffix == ".pt":
        import torch

        found = torch.load(path, weights_only=True)
    else:
        assert path.suffix == ".json"
        found = json.loads(path.read_text())
    rows = np.asarray(_Location(**found).physical_to_logical_map)
    assert rows.ndim == 2
    if len(rows) != model_layers:
        raise IndexError("a layer of the model has no row")
    # The number of slots is not compared with what the engine allocates.
    return [row.reshape(ranks, -1).tolist() for row in rows[moe_layers.start : moe_layers.stop]]


def vllm_ascend(path: Path) -> Held:
    if not str(path).endswith(".json"):
        raise ValueError("expert_map_path must be json")
    file = json.loads(path.read_text())
    table: dict[int, list[list[int]]] = {}
    for layer in file["layer_list"]:
        devices: dict[int, list[int]] = {}
        for device in layer["device_list"]:
            experts = device["device_expert"]
            if len(set(experts)) != len(experts):
                raise ValueError("an expert twice on a device")
            devices[device["device_id"]] = experts
        if len({len(experts) for experts in devices.values()}) != 1:
            raise ValueError("devices with unequal experts")
        table[layer["layer_id"]] = [devices[g] for g in range(layer["device_count"])]
    return [table[layer] for layer in range(file["moe_layer_count"])]


def tensorrt_llm(path: Path, *, ranks: int, experts: int, moe_layers: range) -> Held:
    file = yaml.safe_load(path.read_text())
    held = []
    for layer in moe_layers:
        row = file["initial_global_assignments"][layer]  # KeyError: a layer is missing
        if len(row) != file["num_slots"]:
            raise ValueError("a row of another length than num_slots")
        if set(row) != set(range(experts)):
            raise ValueError("an expert without a slot")
        held.append(np.reshape(row, (ranks, -1)).tolist())
    assert file["layer_updates_per_iter"] == 0
    return held


def omni(path: Path) -> Held:
    placed = np.load(path)
    assert placed.dtype == np.int32
    assert np.isin(placed, (0, 1)).all()
    return [[np.flatnonzero(rank).tolist() for rank in layer] for layer in placed.swapaxes(0, 1)]


def vllm(path: Path, *, ranks: int, layers: int) -> Held:
    """The list forms: one row for all layers, or a row each."""
    rows = json.loads(path.read_text())
    if isinstance(rows[0], int):
        rows = [rows] * layers
    assert len(rows) == layers
    return [np.reshape(row, (ranks, -1)).tolist() for row in rows]


def vllm_ranks(path: Path) -> list[int]:
    """The form with a rank for each expert."""
    ranks: list[int] = json.loads(path.read_text())["expert_to_ep_rank"]
    return ranks


def deepseek(path: Path, *, ranks: int) -> Held:
    with np.load(path) as file:
        phy2log, log2phy, logcnt = file["phy2log"], file["log2phy"], file["logcnt"]
    for layer, row in enumerate(phy2log):
        for expert, slots in enumerate(log2phy[layer]):
            slots = slots[slots >= 0]
            assert (row[slots] == expert).all()
            assert len(slots) == logcnt[layer, expert] == (row == expert).sum()
    return [row.reshape(ranks, -1).tolist() for row in phy2log]
