"""vllm-ascend's tables, its factory, and planning processes that share only a store."""

import multiprocessing
import pickle
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moeplace.integrations import planner, tables, vllm, vllm_ascend
from moeplace.integrations.settings import Settings
from tests.integrations import engines
from tests.integrations.cases import contiguous, loads

TABLE = contiguous(6, 288, 256).reshape(6, 32, 9)


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    planner.warm()


def workload(table: Any, epoch: int = 0) -> Any:
    """Load of each slot [layers, ranks, slots per rank], as the devices count it."""
    flat = table.reshape(6, -1)
    layer = np.arange(6)[:, None]
    replicas = np.stack([np.bincount(row, minlength=256) for row in flat])
    return (np.round(loads(epoch=epoch))[layer, flat] / replicas[layer, flat]).reshape(table.shape)


def alone(**settings: Any) -> Any:
    policy = vllm_ascend.AscendPolicy(engines.AscendOwn(), Settings(**settings), None)
    from moeplace.integrations.agree import Alone

    policy._channel = Alone()
    return policy


@pytest.mark.parametrize("stages", [False, True])
def test_tables_obey_the_workers_checks_and_are_balanced(stages: bool) -> None:
    policy, table = alone(), TABLE
    for epoch in range(2):
        load = workload(table, epoch)
        given = torch.from_numpy(load[None] if stages else load)
        changed, order, new = policy.rebalance_experts(torch.from_numpy(table), given)
        engines.ascend_check(table, new)
        assert changed == 1
        assert sorted(order) == list(range(6))
        table = torch.tensor(new).numpy()
        weight = np.round(loads(epoch=epoch))
        times = tables.seconds(table.reshape(6, -1), weight, np.ones(32))
        assert (times <= weight.sum(axis=1) / 32 * 1.03).all()
    assert policy._policy.failures == 0
    same = policy.rebalance_experts(table, workload(table, 1))
    assert same[0] == 0
    assert (np.asarray(same[2]) == table).all()


def test_loads_of_slots_are_folded_into_experts() -> None:
    table = np.array([[[0, 1], [2, 0]], [[2, 1], [0, -1]]])
    load = np.array([[[1.0, 2], [3, 4]], [[5, 6], [7, 9]]])
    assert vllm_ascend.slot_loads(table, load).tolist() == [[5, 2, 3], [7, 6, 5]]


def test_whatever_fails_the_table_stays() -> None:
    policy = vllm_ascend.AscendPolicy(engines.AscendOwn(), Settings(), None)  # 32 ranks, no store
    changed, _, new = policy.rebalance_experts(TABLE, workload(TABLE))
    assert changed == 0
    assert (np.asarray(new) == TABLE).all()
    changed, _, new = alone().rebalance_experts(TABLE, np.full(TABLE.shape, np.nan))
    assert changed == 0
    assert (np.asarray(new) == TABLE).all()
    changed, _, new = alone().rebalance_experts(TABLE, None)
    assert changed == 0
    assert (np.asarray(new) == TABLE).all()


def test_the_factory_is_replaced_for_the_types_that_balance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class PolicyFactory:
        @staticmethod
        def generate_policy(policy_type: int) -> Any:
            return engines.AscendOwn()

    factory = "vllm_ascend.eplb.core.policy.policy_factory"
    names = [
        "vllm_ascend",
        "vllm_ascend.eplb",
        "vllm_ascend.eplb.core",
        "vllm_ascend.eplb.core.policy",
    ]
    modules = {name: engines._module(name) for name in names}
    engines.put(
        monkeypatch, modules | {factory: engines._module(factory, PolicyFactory=PolicyFactory)}
    )
    engines.put(monkeypatch, engines.vllm_modules())
    monkeypatch.setattr(vllm_ascend, "meeting", lambda: ("h", 1, 0, 2))
    monkeypatch.setenv("MOEPLACE_POLICY", "on")
    vllm.register()
    vllm.register()
    made = PolicyFactory.generate_policy(1)
    assert isinstance(made, vllm_ascend.AscendPolicy)
    assert isinstance(pickle.loads(pickle.dumps(made)), vllm_ascend.AscendPolicy)
    assert isinstance(PolicyFactory.generate_policy(0), engines.AscendOwn)
    # vLLM's own table is left alone there
    table = sys.modules["vllm.distributed.eplb.policy"].EPLB_POLICIES
    assert table == {"default": engines.DefaultEplbPolicy}
    # no group to agree by: theirs stays
    monkeypatch.setattr(vllm_ascend, "meeting", lambda: 1 / 0)
    assert isinstance(PolicyFactory.generate_policy(1), engines.AscendOwn)


def plan(policy: Any, rank: int, skew: bool, results: Any) -> None:
    torch.set_num_threads(1)
    load = workload(TABLE)
    if skew and rank == 1:
        load = load * np.linspace(1, 3, 9)
    results.put((rank, np.asarray(policy.rebalance_experts(TABLE, load)[2])))


@pytest.mark.parametrize("skew", [False, True])
def test_planning_processes_agree_or_all_keep_their_table(skew: bool) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    processes = []
    for rank in range(2):
        address = ("127.0.0.1", store.port, rank, 2)
        policy = vllm_ascend.AscendPolicy(engines.AscendOwn(), Settings(), address)
        arguments = (policy, rank, skew, results)
        processes.append(context.Process(target=plan, args=arguments, daemon=True))
        processes[-1].start()
    found = dict(results.get(timeout=100) for _ in processes)
    for each in processes:
        each.join(20)
    assert (found[0] == found[1]).all()
    assert (found[0] == TABLE).all() == skew


def test_workers_meet_at_the_store_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    group = SimpleNamespace(rank=lambda: 0, size=lambda: 1)
    modules = {
        "vllm": engines._module("vllm"),
        "vllm.distributed": engines._module("vllm.distributed"),
        "vllm.distributed.parallel_state": engines._module(
            "parallel_state", get_ep_group=lambda: SimpleNamespace(cpu_group=group)
        ),
    }
    engines.put(monkeypatch, modules)
    with pytest.raises(Exception, match="no process group"):
        vllm_ascend.meeting()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    assert vllm_ascend.meeting() is None
    monkeypatch.setattr(group, "size", lambda: 2)
    monkeypatch.setattr(vllm_ascend.Group, "_sum", lambda self, values: values)
    host, port, rank, size = vllm_ascend.meeting()  # type: ignore[misc]
    assert (rank, size) == (0, 2)
    dist.TCPStore(host, port, is_master=False, wait_for_workers=False).set("a", "b")
