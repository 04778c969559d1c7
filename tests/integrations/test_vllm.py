"""vLLM's policy table, its calls, and what is left alone."""

import sys
from importlib.metadata import EntryPoint
from typing import Any, Literal

import numpy as np
import pytest
import torch

from moeplace.integrations import planner, tables, vllm
from tests.integrations import engines
from tests.integrations.cases import contiguous, loads


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    planner.warm()
    engines.put(monkeypatch, engines.vllm_modules())
    monkeypatch.setattr(vllm, "channel", lambda ranks: None)
    for name in ("POLICY", "PROFILE", "FOLDER"):
        monkeypatch.delenv(f"MOEPLACE_{name}", raising=False)


def table() -> dict[str, Any]:
    return sys.modules["vllm.distributed.eplb.policy"].EPLB_POLICIES  # type: ignore[no-any-return]


def installed(monkeypatch: pytest.MonkeyPatch, mode: str = "on") -> Any:
    from moeplace.integrations.agree import Alone

    monkeypatch.setenv("MOEPLACE_POLICY", mode)
    made = vllm.policy_class
    monkeypatch.setattr(
        vllm, "policy_class", lambda own, policy: made(own, policy, lambda _: Alone())
    )
    vllm.register()
    return table()["default"].moeplace


def test_nothing_is_replaced_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm.register()
    assert table() == {"default": engines.DefaultEplbPolicy}
    monkeypatch.setenv("MOEPLACE_POLICY", "off")
    vllm.register()
    assert table() == {"default": engines.DefaultEplbPolicy}


def test_the_entry_point_of_the_package_is_this_one() -> None:
    from pathlib import Path

    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    for group, value in (
        ("vllm.general_plugins", "moeplace.integrations.vllm:register"),
        ("sglang.srt.plugins", "moeplace.integrations.sglang:register"),
    ):
        assert f'[project.entry-points."{group}"]\nmoeplace = "{value}"' in text
        assert callable(EntryPoint("moeplace", value, group).load())


def test_registering_twice_is_registering_once(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)
    first = table()["default"]
    vllm.register()
    assert table()["default"] is first
    assert issubclass(first, engines.DefaultEplbPolicy)


class Changed(engines.DefaultEplbPolicy):
    @classmethod
    def rebalance_experts(cls, weight: Any, num_replicas: int, extra: int) -> Any:  # type: ignore[override]
        return None


@pytest.mark.parametrize(
    "modules",
    [
        lambda: engines.vllm_modules({"default": Changed}),
        lambda: engines.vllm_modules({"default": engines.DefaultEplbPolicy, "new": None}),
        lambda: engines.vllm_modules(option=Literal["default", "new"]),
        lambda: engines.vllm_modules({"other": engines.DefaultEplbPolicy}),
        lambda: {"vllm.distributed.eplb.policy": engines._module("moved")},
    ],
    ids=["signature", "more policies", "more options", "another name", "moved"],
)
def test_a_version_that_is_not_known_keeps_its_policy_with_one_line(
    modules: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engines.put(monkeypatch, modules())
    monkeypatch.setenv("MOEPLACE_POLICY", "on")
    before = dict(getattr(sys.modules["vllm.distributed.eplb.policy"], "EPLB_POLICIES", {}))
    vllm.register()
    after = dict(getattr(sys.modules["vllm.distributed.eplb.policy"], "EPLB_POLICIES", {}))
    assert before == after
    assert len(caplog.records) == 1
    assert "own policy stays" in caplog.text


def test_a_setting_that_is_wrong_keeps_its_policy_with_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MOEPLACE_POLICY", "yes please")
    vllm.register()
    assert table() == {"default": engines.DefaultEplbPolicy}
    assert len(caplog.records) == 1
    assert "MOEPLACE_POLICY must be one of" in caplog.text


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_model_is_rebalanced_with_few_moves(
    asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = installed(monkeypatch)
    state = engines.EplbState(contiguous(6, 288, 256), 32)
    moved = []
    for epoch in range(3):
        weight = torch.from_numpy(np.round(loads(epoch=epoch)).astype(np.int32))
        before = state.map.numpy().copy()
        if asynchronous:
            for held in state.rearrange_by_layers(weight):
                assert tables.serves(held.numpy(), 6, 288, 256)
        else:
            state.rearrange(weight)
        after = state.map.numpy()
        moved.append(tables.received(after, before, 32, 256).mean())
        times = tables.seconds(after, weight.double().numpy(), np.ones(32))
        assert (times <= weight.double().numpy().sum(axis=1) / 32 * 1.03).all()
    assert policy.failures == 0
    assert max(moved[1:]) < 80 < moved[0]


def test_the_profile_run_without_load_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = installed(monkeypatch)
    state = engines.EplbState(contiguous(6, 288, 256), 32)
    state.rearrange(torch.zeros((6, 256), dtype=torch.int32))
    assert (state.map.numpy() == contiguous(6, 288, 256)).all()
    assert policy.failures == 0


def test_groups_on_nodes_as_vllm_hands_them_over(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = installed(monkeypatch)
    state = engines.EplbState(contiguous(6, 288, 256), 32)
    state.rearrange(loads(), groups=8, nodes=4)
    node = np.arange(288) // 72
    for row in state.map.numpy():
        for group in range(8):
            assert np.unique(node[row // 32 == group]).size == 1
    state.rearrange(loads(epoch=1), groups=8, nodes=3)  # does not divide: said, not failed
    assert policy.failures == 0


def test_observing_moves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("MOEPLACE_FOLDER", str(tmp_path / "seen"))
    installed(monkeypatch, "observe")
    state = engines.EplbState(contiguous(6, 288, 256), 32)
    state.rearrange(loads())
    assert (state.map.numpy() == contiguous(6, 288, 256)).all()
    from moeplace.integrations.observe import read_decisions

    (seen,) = read_decisions(tmp_path / "seen")
    assert seen.about["engine"] == "vllm 0.33.0"
    assert seen.about["saving"] > 0.3
    assert (seen.weight == loads()).all()


def test_scaling_down_and_up(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = installed(monkeypatch)
    chosen = table()["default"]
    old = torch.from_numpy(contiguous(6, 288, 256))
    fewer = chosen.rebalance_experts(torch.from_numpy(loads()), 279, 1, 1, 31, old)
    assert tables.serves(fewer.numpy(), 6, 279, 256)
    wider = torch.nn.functional.pad(fewer, (0, 27), value=-1)  # as vLLM marks new slots
    more = chosen.rebalance_experts(torch.from_numpy(loads()), 306, 1, 1, 34, wider)
    assert tables.serves(more.numpy(), 6, 306, 256)
    assert policy.failures == 0
