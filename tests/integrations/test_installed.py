"""The engines' own files, where they are: the names, signatures and calls that stubs tell again.

Runs for each engine that is installed, or that lies unpacked in the folder `MOEPLACE_ENGINES`
(``unzip vllm-*.whl``, ...). Packages are entered without running their ``__init__``, and what
needs a device is stood in for, so that no GPU and none of the engines' dependencies are needed.
"""

import ast
import importlib
import importlib.util
import inspect
import logging
import os
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch

from moeplace.integrations import planner, sglang, tables, vllm, vllm_ascend
from moeplace.integrations.agree import Alone
from moeplace.integrations.settings import Settings
from tests.integrations import engines
from tests.integrations.cases import contiguous, loads, speeds

OLD = contiguous(58, 288, 256)


def root(package: str) -> Path:
    """The folder that holds the package, or skip."""
    folder = os.environ.get("MOEPLACE_ENGINES")
    if folder:
        for path in sorted(Path(folder).glob(f"**/{package}")):
            if path.is_dir():
                return path
    try:
        found = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        found = None
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"{package} is neither installed nor in MOEPLACE_ENGINES")
    return Path(next(iter(found.submodule_search_locations)))


def enter(monkeypatch: pytest.MonkeyPatch, base: Path, *packages: str) -> None:
    """Make packages importable from `base`'s parent without running their ``__init__``."""
    for name in list(sys.modules):
        if name.split(".")[0] == base.name:
            monkeypatch.delitem(sys.modules, name)
    for name in packages:
        module = ModuleType(name)
        module.__path__ = [str(base.parent / name.replace(".", "/"))]
        module.__spec__ = importlib.util.spec_from_loader(name, None)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> None:
    planner.warm()
    monkeypatch.setenv("MOEPLACE_POLICY", "on")


def option(path: Path, name: str) -> Any:
    """The literals of ``name = Literal[...]`` in a file that cannot be imported here."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name:
            words = ast.literal_eval(node.value.slice)  # type: ignore[attr-defined]
            return Literal[words]
    raise AssertionError(f"{path} has no {name}")


def test_vllm(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    base = root("vllm")
    enter(monkeypatch, base, "vllm", "vllm.config", "vllm.distributed", "vllm.distributed.eplb")
    choices = option(base / "config/parallel.py", "EPLBPolicyOption")
    engines.put(
        monkeypatch, {"vllm.config.parallel": engines._module("p", EPLBPolicyOption=choices)}
    )
    policy = importlib.import_module("vllm.distributed.eplb.policy")
    theirs = policy.EPLB_POLICIES["default"]
    made = vllm.policy_class
    monkeypatch.setattr(vllm, "policy_class", lambda own, p: made(own, p, lambda _: Alone()))
    vllm.register()
    ours = policy.EPLB_POLICIES["default"]
    assert caplog.text == "" or "own policy stays" not in caplog.text
    assert issubclass(ours, theirs)
    weight = torch.tensor(loads("A"))
    state = engines.EplbState(OLD, 32)
    state.rearrange(weight)
    assert ours.moeplace.failures == 0
    took = {}
    for name, one in (("theirs", theirs), ("ours", made(theirs, ours.moeplace, lambda _: Alone()))):
        times = []
        for _ in range(5):
            began = time.perf_counter()
            got = one.rebalance_experts(weight, 288, 1, 1, 32, None)
            times.append(time.perf_counter() - began)
        took[name] = (sorted(times)[2], tables.seconds(got.numpy(), loads("A"), np.ones(32)).sum())
    assert took["ours"][1] < took["theirs"][1]
    bound = loads("A").sum() / 32
    logging.getLogger(__name__).info(
        "vLLM: %s",
        {
            name: f"{t * 1e3:.0f} ms, {value / bound:.5f} of the bound"
            for name, (t, value) in took.items()
        },
    )
    # the places where the engine takes up the policy and calls it
    state_file = (base / "distributed/eplb/eplb_state.py").read_text()
    assert "self.policy = EPLB_POLICIES[policy_type]" in state_file
    worker = (base / "distributed/eplb/async_worker.py").read_text()
    assert "eplb_state.policy.rebalance_experts(" in worker
    assert "get_eplb_group().cpu_group" in worker
    plugins = (base / "plugins/__init__.py").read_text()
    assert '"vllm.general_plugins"' in plugins


def test_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    base = root("sglang")
    enter(monkeypatch, base, "sglang", "sglang.srt", "sglang.srt.eplb")
    stubs = engines.sglang_modules(OLD, np.ones(32, dtype=np.int32))
    wanted = (
        "sglang.srt.eplb.expert_location",
        "sglang.srt.elastic_ep",
        "sglang.srt.elastic_ep.elastic_ep",
    )
    engines.put(monkeypatch, {name: stubs[name] for name in wanted})
    algorithms = importlib.import_module("sglang.srt.eplb.eplb_algorithms")
    monkeypatch.setattr(
        sys.modules["sglang.srt.eplb"], "eplb_algorithms", algorithms, raising=False
    )
    own = algorithms.rebalance_experts
    assert tuple(inspect.signature(own).parameters) == sglang.PARAMETERS
    sglang.register()
    ours = algorithms.rebalance_experts
    assert ours.moeplace is not None
    tokens = torch.tensor(loads("A"))[None]
    algorithm = algorithms.EplbAlgorithm.deepseek
    theirs, found = (f(tokens, 288, 9, 8, 1, algorithm) for f in (own, ours))
    for mine, other in zip(found, theirs, strict=True):
        assert (mine.dtype, mine.ndim, mine.shape[:2]) == (other.dtype, other.ndim, other.shape[:2])
    assert ours.moeplace.failures == 0
    times = [
        tables.seconds(each[0].numpy(), loads("A"), np.ones(32)).sum() for each in (found, theirs)
    ]
    assert times[0] < times[1] * 1.01
    # dead ranks: the same form as SGLang's own
    active = torch.ones(32, dtype=torch.int32)
    active[[2, 9]] = 0
    stubs = engines.sglang_modules(OLD, active)
    engines.put(monkeypatch, {name: stubs[name] for name in wanted})
    elastic = algorithms.EplbAlgorithm.elasticity_aware
    theirs, found = (f(tokens, 288, 9, 8, 1, elastic) for f in (own, ours))
    gone = np.isin(np.arange(288) // 9, [2, 9])
    for each in (theirs, found):
        slots, places, count = (part.numpy() for part in each)
        assert (slots[:, gone] == 0).all()
        assert not np.isin(places[places >= 0] // 9, [2, 9]).any()
        assert (count.sum(axis=1) == 270).all()
    assert ours.moeplace.failures == 0
    location = (base / "srt/eplb/expert_location.py").read_text()
    assert "eplb_algorithms.rebalance_experts(" in location
    assert "def get_global_expert_location_metadata" in location
    if (base / "srt/plugins/__init__.py").exists():
        assert '"sglang.srt.plugins"' in (base / "srt/plugins/__init__.py").read_text()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_vllm_ascend(monkeypatch: pytest.MonkeyPatch) -> None:
    base = root("vllm_ascend")
    monkeypatch.setattr(vllm_ascend, "meeting", lambda: None)
    monkeypatch.setattr(vllm_ascend, "_meet", lambda address, ranks: Alone())
    log = logging.getLogger("stub")
    group = lambda: SimpleNamespace(rank_in_group=0, world_size=32)  # noqa: E731
    names = [
        "vllm_ascend",
        "vllm_ascend.eplb",
        "vllm_ascend.eplb.core",
        "vllm_ascend.eplb.core.policy",
    ]
    enter(monkeypatch, base, *names)
    engines.put(
        monkeypatch,
        {
            "vllm": engines._module("vllm"),
            "vllm.logger": engines._module("vllm.logger", logger=log),
            "vllm.distributed": engines._module("vllm.distributed", get_ep_group=group),
            "torch_npu": engines._module("torch_npu"),
            "vllm_ascend.distributed": engines._module("d"),
            "vllm_ascend.distributed.parallel_state": engines._module(
                "p", get_dynamic_eplb_group=group
            ),
            "vllm_ascend.eplb.core.eplb_utils": engines._module(
                "u", generate_log2phy_map=lambda maps, rank, tp_size: maps[rank]
            ),
        },
    )
    factory = importlib.import_module("vllm_ascend.eplb.core.policy.policy_factory")
    assert vllm_ascend.register()
    made = factory.PolicyFactory.generate_policy(1)
    assert isinstance(made, vllm_ascend.AscendPolicy)
    worker = importlib.import_module("vllm_ascend.eplb.core.eplb_worker").EplbWorker
    table = torch.tensor(OLD.reshape(58, 32, 9))
    replicas = np.stack([np.bincount(row, minlength=256) for row in OLD])
    layer = np.arange(58)[:, None]
    load = torch.tensor((loads("A")[layer, OLD] / replicas[layer, OLD]).reshape(58, 32, 9))
    shared = {"moe_load": load}
    one = worker(shared, 1)
    assert isinstance(one.policy, vllm_ascend.AscendPolicy)
    shared["expert_maps"] = one.local2global(table)
    packed = one.do_update()  # the worker's own checks put a row back that they refuse
    assert one.policy._policy is not None
    assert one.policy._policy.failures == 0
    assert len(packed) == 58
    new = one.global2local(one.old_expert_maps, 9).numpy()
    times = tables.seconds(new.reshape(58, -1), loads("A"), np.ones(32))
    assert (times <= loads("A").sum(axis=1) / 32 * 1.03).all()


def test_speeds_reach_the_plan() -> None:
    """Without any engine: what the comparisons above leave out."""
    from moeplace.integrations.policy import Policy, Request

    policy = Policy("test", Settings(), logging.getLogger("x"))
    policy._rank_speeds = lambda ranks: speeds("A")  # type: ignore[method-assign]
    found = policy.decide(Request(weight=loads("A"), ranks=32, slots=288), Alone, lambda: OLD)
    bound = loads("A").sum(axis=1) / speeds("A").sum()
    assert (tables.seconds(found, loads("A"), speeds("A")) <= bound * (1 + 1e-3)).all()
