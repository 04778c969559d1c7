"""SGLang's function, its maps, dead ranks, and the launcher."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeplace.integrations import planner, sglang, tables
from tests.integrations import engines
from tests.integrations.cases import contiguous, loads

ROOT = Path(__file__).resolve().parents[2]
OLD = contiguous(6, 288, 256)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    planner.warm()
    monkeypatch.setenv("MOEPLACE_POLICY", "on")


def install(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> Any:
    engines.put(monkeypatch, engines.sglang_modules(*arguments))
    sglang.register()
    return sys.modules["sglang.srt.eplb"].eplb_algorithms.rebalance_experts.moeplace


def whole(epoch: int = 0) -> Any:
    return np.round(loads(epoch=epoch)).astype(np.int64)


def test_the_maps_are_those_that_sglang_expects(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = install(monkeypatch, OLD)
    tokens = np.stack([whole(), whole(1)])  # [T, layers, experts]
    slots, places, count = engines.sglang_ask(tokens, 288, 9)
    assert tables.serves(slots, 6, 288, 256)
    assert (count.sum(axis=1) == 288).all()
    for layer in range(6):
        for expert in range(256):
            held = np.flatnonzero(slots[layer] == expert)
            assert (places[layer, expert][: held.size] == held).all()
            assert (places[layer, expert][held.size :] == -1).all()
    times = tables.seconds(slots, tokens.sum(axis=0).astype(float), np.ones(32))
    assert (times <= tokens.sum(axis=(0, 2)) / 32 * 1.03).all()
    assert policy.failures == 0


def test_rows_of_dense_layers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, OLD)
    tokens = whole()
    tokens[:3] = 0
    slots, _, _ = engines.sglang_ask(tokens[None], 288, 9)
    assert (slots[:3] == OLD[:3]).all()
    assert (slots[3:] != OLD[3:]).any(axis=1).all()


@pytest.mark.parametrize("dead", [[0], [5, 31]])
def test_dead_ranks_hold_placeholders_that_are_no_replicas(
    dead: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    active = np.ones(40, dtype=np.int32)  # SGLang reserves places for ranks that may join
    active[32:] = 0
    active[dead] = 0
    policy = install(monkeypatch, OLD, active)
    slots, places, count = engines.sglang_ask(whole()[None], 288, 9)
    rank = np.arange(288) // 9
    gone = np.isin(rank, dead)
    assert (slots[:, gone] == 0).all()
    assert tables.serves(slots[:, ~gone], 6, int((~gone).sum()), 256)
    assert not np.isin(places[places >= 0] // 9, dead).any()
    assert (count.sum(axis=1) == (~gone).sum()).all()
    assert policy.failures == 0


def test_after_scaling_up_rank_0_is_asked_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engines.put(monkeypatch, engines.sglang_modules(OLD, np.ones(32), True))
    assert sglang.state()[2] is True
    assert type(sglang.channel("cpu", None, True)).__name__ == "Alone"


def test_at_the_start_and_on_failure_it_is_sglang_that_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, None)
    slots, _, _ = engines.sglang_ask(whole()[None], 288, 9)
    import torch

    assert (slots == engines.sglang_own(torch.from_numpy(whole()[None]), 288, 9)[0].numpy()).all()
    policy = install(monkeypatch, np.zeros_like(OLD))
    monkeypatch.setattr("moeplace.integrations.policy.propose", None)
    slots, _, _ = engines.sglang_ask(whole()[None], 288, 9)
    assert tables.serves(slots, 6, 288, 256)
    assert policy.failures == 1


def test_another_signature_keeps_sglangs_own(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    modules = engines.sglang_modules(OLD)
    changed = lambda tokens, slots: None  # noqa: E731
    modules["sglang.srt.eplb.eplb_algorithms"].rebalance_experts = changed  # type: ignore[attr-defined]
    engines.put(monkeypatch, modules)
    sglang.register()
    assert modules["sglang.srt.eplb.eplb_algorithms"].rebalance_experts is changed
    assert len(caplog.records) == 1
    assert "own policy stays" in caplog.text


def test_the_launcher_replaces_in_spawned_processes_too(tmp_path: Path) -> None:
    packages = {
        "sglang/__init__.py": "__version__ = 'test'\n",
        "sglang/srt/__init__.py": "",
        "sglang/srt/eplb/__init__.py": "",
        "sglang/srt/eplb/eplb_algorithms/__init__.py": "def rebalance_experts(tokens_per_expert, "
        "num_physical_experts, num_local_physical_experts, num_groups, num_nodes, algorithm): pass\n",
        "work.py": "def seen(level, q):\n"
        "    import multiprocessing as mp\n"
        "    from sglang.srt.eplb import eplb_algorithms as a\n"
        "    q.put((level, hasattr(a.rebalance_experts, 'moeplace')))\n"
        "    if level < 2:\n"
        "        p = mp.get_context('spawn').Process(target=seen, args=(level + 1, q)); p.start(); p.join()\n",
        "sglang/launch_server.py": "if __name__ == '__main__':\n"
        "    import multiprocessing as mp, sys, work\n"
        "    q = mp.get_context('spawn').Queue()\n"
        "    work.seen(0, q)\n"
        "    print(sorted(q.get() for _ in range(3)), sys.argv[1:])\n",
    }
    for name, text in packages.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    import os

    done = subprocess.run(
        [sys.executable, "-m", "moeplace.integrations.sglang", "--model", "m"],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "MOEPLACE_POLICY": "on"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[(0, True), (1, True), (2, True)] ['--model', 'm']"
