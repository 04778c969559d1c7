"""What the engines do around their policies, told again in few words, to be tested against.

vLLM 0.33 (vllm/distributed/eplb), SGLang 0.5.23 (sglang/srt/eplb), vllm-ascend 0.23
(vllm_ascend/eplb/core). `modules` puts one engine's modules where its name is imported from.
"""

import sys
from enum import Enum, auto
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch

from moeplace.policies.eplb import eplb


class DefaultEplbPolicy:
    """vLLM's own: greedy, on float32."""

    @classmethod
    def rebalance_experts(
        cls,
        weight: torch.Tensor,
        num_replicas: int,
        num_groups: int,
        num_nodes: int,
        num_ranks: int,
        old_global_expert_indices: torch.Tensor | None = None,
    ) -> torch.Tensor:
        found = eplb(
            weight.double().nan_to_num(0, 0, 0).numpy(), num_ranks, num_replicas // num_ranks
        )
        return torch.from_numpy(found)


def vllm_modules(table: Any = None, option: Any = Literal["default"]) -> dict[str, ModuleType]:
    table = {"default": DefaultEplbPolicy} if table is None else table
    return {
        "vllm": _module("vllm", __version__="0.33.0"),
        "vllm.config": _module("vllm.config"),
        "vllm.config.parallel": _module("vllm.config.parallel", EPLBPolicyOption=option),
        "vllm.distributed": _module("vllm.distributed"),
        "vllm.distributed.eplb": _module("vllm.distributed.eplb"),
        "vllm.distributed.eplb.policy": _module(
            "vllm.distributed.eplb.policy", EPLB_POLICIES=table
        ),
    }


class EplbState:
    """vLLM's state of one model: takes its policy by name, rearranges at once or by layers."""

    def __init__(self, old: Any, ranks: int) -> None:
        policies = sys.modules["vllm.distributed.eplb.policy"].EPLB_POLICIES
        self.policy = policies["default"]
        self.map, self.ranks = torch.as_tensor(old).clone(), ranks

    def ask(self, weight: Any, groups: int = 1, nodes: int = 1) -> torch.Tensor:
        new = self.policy.rebalance_experts(
            torch.as_tensor(weight), self.map.shape[1], groups, nodes, self.ranks, self.map
        )
        assert new.device.type == "cpu"
        assert new.shape == self.map.shape
        assert new.dtype == torch.int64
        return new

    def rearrange(self, weight: Any, **topology: int) -> None:
        self.map.copy_(self.ask(weight, **topology))

    def rearrange_by_layers(self, weight: Any) -> Any:
        """One layer for each forward pass."""
        new = self.ask(weight)
        for layer in range(new.shape[0]):
            self.map[layer].copy_(new[layer])
            yield self.map


class EplbAlgorithm(Enum):
    deepseek = auto()
    elasticity_aware = auto()


def sglang_own(tokens: torch.Tensor, slots: int, local: int) -> Any:
    from moeplace.integrations.sglang import physical_maps

    found = eplb(tokens.sum(dim=0).double().numpy(), slots // local, local)
    maps = physical_maps(found, tokens.shape[-1], slots // local)
    return tuple(torch.from_numpy(each) for each in (found, *maps))


def sglang_modules(old: Any, active: Any = None, has_scaled: bool = False) -> dict[str, ModuleType]:
    def rebalance_experts(  # type: ignore[no-untyped-def]
        tokens_per_expert,
        num_physical_experts,
        num_local_physical_experts,
        num_groups,
        num_nodes,
        algorithm,
    ):
        return sglang_own(tokens_per_expert, num_physical_experts, num_local_physical_experts)

    metadata = (
        None if old is None else SimpleNamespace(physical_to_logical_map_cpu=torch.as_tensor(old))
    )
    elastic = None
    if active is not None:
        elastic = SimpleNamespace(active_ranks=torch.as_tensor(active), has_scaled=has_scaled)
    manager = SimpleNamespace(instance=lambda: elastic)
    algorithms = _module("eplb_algorithms", rebalance_experts=rebalance_experts)
    return {
        "sglang": _module("sglang", __version__="0.5.23"),
        "sglang.srt": _module("sglang.srt"),
        "sglang.srt.eplb": _module("sglang.srt.eplb", eplb_algorithms=algorithms),
        "sglang.srt.eplb.eplb_algorithms": algorithms,
        "sglang.srt.eplb.expert_location": _module(
            "expert_location", get_global_expert_location_metadata=lambda: metadata
        ),
        "sglang.srt.elastic_ep": _module("sglang.srt.elastic_ep"),
        "sglang.srt.elastic_ep.elastic_ep": _module("elastic_ep", ElasticEPStateManager=manager),
    }


def sglang_ask(tokens: Any, slots: int, local: int, **topology: int) -> Any:
    """As SGLang's ExpertLocationMetadata does: looks the function up anew, pads, counts."""
    found = sys.modules["sglang.srt.eplb"].eplb_algorithms.rebalance_experts(
        tokens_per_expert=torch.as_tensor(tokens),
        num_physical_experts=slots,
        num_local_physical_experts=local,
        num_groups=topology.get("groups"),
        num_nodes=topology.get("nodes", 1),
        algorithm=EplbAlgorithm.deepseek,
    )
    slot_map, places, count = (each.numpy() for each in found)
    assert (np.count_nonzero(places != -1, axis=-1) == count).all()
    return slot_map, places, count


class AscendOwn:
    """A policy of vllm-ascend: here one that changes nothing."""

    def rebalance_experts(self, current_expert_table: Any, expert_workload: Any) -> Any:
        return 0, np.arange(len(current_expert_table)), np.asarray(current_expert_table)


def ascend_check(old: Any, new: Any) -> None:
    """What vllm-ascend's worker refuses: a lost expert, a duplicate, a move inside a device."""
    old, new = np.asarray(old), np.asarray(new)
    for before, after in zip(old, new, strict=True):
        assert np.unique(after).size >= np.unique(before).size
        for mine, now in zip(before, after, strict=True):
            assert np.unique(now).size == now.size
            stays = np.isin(now, mine)
            assert (now[stays] == mine[stays]).all()


def _module(name: str, **content: Any) -> ModuleType:
    module = ModuleType(name)
    module.__path__ = []  # type: ignore[attr-defined]
    module.__spec__ = SimpleNamespace(name=name)  # type: ignore[assignment]
    vars(module).update(content)
    return module


def put(monkeypatch: pytest.MonkeyPatch, modules: dict[str, ModuleType]) -> None:
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
