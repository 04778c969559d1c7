"""Drop-in for DeepSeek's ``eplb.rebalance_experts`` (github.com/deepseek-ai/EPLB)."""

import logging
from typing import Any

import numpy as np

from moeplace.errors import ProblemError
from moeplace.integrations.planner import Ask, propose
from moeplace.integrations.settings import UNRESTRICTED, Effort
from moeplace.integrations.sglang import physical_maps

_log = logging.getLogger(__name__)


def rebalance_experts(
    weight: Any,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    *,
    speeds: Any = None,
    current: Any = None,
) -> tuple[Any, Any, Any]:
    """Plan which expert each slot holds; no GPU holds one twice.

    Parameters
    ----------
    weight : tensor [layers, experts]
        Load of each expert.
    num_replicas : int
        Slots of all GPUs.
    num_groups, num_nodes : int
        Expert groups that stay on one node each. DeepSeek's function drops the groups without a
        word where they do not divide by the nodes; here that is an error. 1 group: none.
    num_gpus : int
    speeds : tensor [GPUs], optional
        Relative; equal by default.
    current : tensor [layers, slots], optional
        The map in use: then only moves that pay are made (see `Effort`), and what stays on a GPU
        keeps its slot.

    Returns
    -------
    physical_to_logical_map : tensor [layers, slots]
        The expert of each slot.
    logical_to_physical_map : tensor [layers, experts, most replicas]
        The slots of each expert, padded with -1.
    expert_count : tensor [layers, experts]

    Raises
    ------
    ProblemError
        If the numbers do not fit each other, or weights or speeds are negative or not finite.
    """
    import torch

    loads = _array(weight, "Weight")
    if loads.ndim != 2:
        raise ProblemError(f"Weight must be [layers, experts], got shape {loads.shape}.")
    if num_gpus < 1 or num_replicas % num_gpus:
        raise ProblemError(
            f"{num_replicas} replicas do not divide evenly over {num_gpus} GPUs. Give a multiple."
        )
    if num_groups > 1 and num_nodes > 1 and num_gpus % num_nodes:
        raise ProblemError(f"{num_gpus} GPUs do not divide evenly over {num_nodes} nodes.")
    old = None if current is None else _array(current, "Current").astype(np.int64)
    if old is not None and (
        old.shape != (loads.shape[0], num_replicas) or old.min() < -1 or old.max() >= loads.shape[1]
    ):
        raise ProblemError(
            f"Current must hold experts below {loads.shape[1]} in [{loads.shape[0]}, "
            f"{num_replicas}], got shape {old.shape}."
        )
    speed = np.ones(num_gpus) if speeds is None else _array(speeds, "Speeds").astype(np.float64)
    if speed.shape != (num_gpus,):
        raise ProblemError(f"Speeds must be one for each of {num_gpus} GPUs, got {speed.shape}.")
    groups, nodes = (num_groups, num_nodes) if num_groups > 1 and num_nodes > 1 else (1, 1)
    ask = Ask(
        loads=loads.astype(np.float64),
        speeds=speed,
        slots_per_rank=num_replicas // num_gpus,
        old=old,
        groups=groups,
        nodes=nodes,
    )
    plan = propose(ask, UNRESTRICTED if old is None else Effort())
    for note in plan.notes:
        _log.warning("%s", note)
    maps = (plan.slots, *physical_maps(plan.slots, ask.experts, num_gpus))
    slots, places, count = (torch.from_numpy(np.ascontiguousarray(each)) for each in maps)
    return slots, places, count


def _array(value: Any, name: str) -> Any:
    detach = getattr(value, "detach", None)
    array = np.asarray(value if detach is None else detach().cpu().numpy())
    if array.dtype.kind not in "iuf":
        raise ProblemError(f"{name} must hold numbers, got {array.dtype}.")
    return array
