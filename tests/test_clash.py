"""Rules that clash: what is named has no plan, and without any one of it there is one."""

import re
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import moeplace as mp
from moeplace import clash
from moeplace.clash import Search, named
from moeplace.cli import main
from moeplace.constraints import (
    Constraint,
    Forbid,
    MaxMoves,
    MaxReplicas,
    NodeGroups,
    Pin,
    ReplicaBudget,
    TokenCapacity,
)
from moeplace.exact.feasibility import find_placement
from moeplace.instances import generate, write_instance
from moeplace.loads import LoadHistogram
from moeplace.plan import Plan
from moeplace.problem import Problem
from moeplace.result import Status
from moeplace.search.split import at_best_shares
from tests.brute_force import optimum
from tests.exact.cases import featured
from tests.strategies import legal_plans, plan, problem

MORE = settings(
    max_examples=2 * settings().max_examples,
    derandomize=True,  # CP-SAT is slow to hunt in
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)


@st.composite
def crowded(draw: st.DrawFn) -> Problem:
    """A tiny problem whose rules often leave no plan."""
    one = draw(featured("all", max_experts=4))
    rules = [rule for rule in one.constraints if draw(st.integers(0, 3))]
    for _ in range(draw(st.integers(0, 3))):
        expert = draw(st.integers(0, one.experts - 1))
        rank = draw(st.integers(0, one.ranks - 1))
        rules.append(draw(st.sampled_from([Pin, Forbid]))(expert, rank))
    kinds = {type(rule) for rule in rules}
    if MaxMoves not in kinds and draw(st.booleans()):
        most = draw(st.integers(0, 1))
        rules.append(MaxMoves(draw(legal_plans(replace(one, constraints=()))), total=most))
    if TokenCapacity not in kinds and draw(st.booleans()):
        most = float(one.tokens.sum(axis=2).max() + one.base.sum(axis=2).max())
        part = st.sampled_from([0.6, 0.9, 1.1])
        rules.append(TokenCapacity(draw(part) * most / one.ranks + 0.5))
    return replace(one, constraints=rules)


def of_layer(one: Problem, layer: int, rules: Sequence[Constraint]) -> Problem:
    """A problem of one layer; shares no code with the package."""
    mine: list[Constraint] = []
    for rule in rules:
        if isinstance(rule, Pin | Forbid):
            assert rule.layer in (None, layer)
            mine.append(type(rule)(rule.expert, rule.rank))
        elif isinstance(rule, MaxMoves):
            current = Plan(
                slots=rule.current.slots[layer : layer + 1],
                rank_slots=rule.current.rank_slots,
                experts=one.experts,
            )
            mine.append(MaxMoves(current, per_layer=rule.per_layer, total=rule.total))
        else:
            mine.append(rule)
    return Problem(
        LoadHistogram(tokens=one.tokens[:, layer : layer + 1]),
        one.cluster,
        routing=one.routing,
        constraints=mine,
        base_load=one.base[:, layer : layer + 1],
    )


def assert_least(one: Problem, found: mp.Result) -> None:
    """The rules named have no plan, and without any one of them there is one."""
    assert found.clash, found.reason
    assert set(map(id, found.clash)) <= set(map(id, one.constraints))
    layer = re.match(r"layer (\d+):", found.reason)
    least = "Rules that clash: " in found.reason
    assert least or "Rules that clash, at most: " in found.reason

    def best(rules: Sequence[Constraint]) -> float:
        if layer:
            return optimum(of_layer(one, int(layer[1]), rules))
        return optimum(replace(one, constraints=rules))

    assert best(found.clash) == np.inf
    if least:
        for n in range(len(found.clash)):
            assert best(found.clash[:n] + found.clash[n + 1 :]) < np.inf


@given(crowded())
@MORE
def test_the_rules_named_clash_and_each_is_needed(one: Problem) -> None:
    found = mp.solve(one, work_limit=20_000)
    if optimum(one) < np.inf:
        assert found.status is not Status.INFEASIBLE
        return
    assert found.status is Status.INFEASIBLE
    assert_least(one, found)


@pytest.mark.parametrize("method", ["cp-sat", "highs", "gscip", "cbc"])
def test_exact_methods_name_them_too(method: str) -> None:
    groups = NodeGroups(np.array([0, 0, 1, 1]))
    one = problem([4, 3, 2, 1], [1, 1], 3, constraints=[Pin(0, 0), groups, Pin(1, 1), Forbid(2, 0)])
    one = replace(one, cluster=replace(one.cluster, nodes=[0, 1]))
    for warm in ("auto", "none"):
        found = mp.solve(one, method, warm_start=warm, time_limit=20)  # type: ignore[arg-type]
        assert found.status is Status.INFEASIBLE
        assert set(map(id, found.clash)) == set(map(id, [one.constraints[n] for n in (0, 1, 2)]))
        assert "claims" in found.reason
        assert_least(one, found)


def test_a_false_claim_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from moeplace.exact import mathopt
    from moeplace.exact.solvers import Answer

    one = problem([4, 3, 2, 1], [1, 1], 3, constraints=[Pin(0, 0)])
    monkeypatch.setattr(mathopt, "solve", lambda *_: Answer(ended="infeasible", bound=np.inf))
    with pytest.raises(mp.SolverError, match="highs claims that no plan obeys .* one is known"):
        mp.solve(one, "highs", warm_start="none", time_limit=20)


CLASHING = problem(
    [[4, 3, 2, 1]] * 3, [1, 1], 3, constraints=[MaxReplicas(1), Pin(0, 0, 1), Pin(0, 1), Pin(3, 0)]
)


def test_the_command_names_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_instance(CLASHING, tmp_path / "one.json")
    said = (
        "layer 1: expert 0 is pinned to 2 ranks and may have 1 replicas. Rules that clash: "
        "MaxReplicas(limit=1), Pin(expert=0, rank=0, layer=1), Pin(expert=0, rank=1)."
    )
    for method in ("auto", "eplb", "cp-sat"):
        with pytest.raises(SystemExit) as ended:
            main(["solve", str(tmp_path / "one.json"), "--method", method, "--json"])
        assert ended.value.code == 3
        shown = capsys.readouterr()
        assert shown.err.strip() == f"error: infeasible: {said}"
        answer = msgspec.json.decode(shown.out)
        assert answer["reason"] == said
        assert answer["clash"] == [named(rule) for rule in CLASHING.constraints[:3]]


def test_rules_are_written_short() -> None:
    current = plan([0, 1], [1, 1])
    assert named(Pin(1, 2)) == "Pin(expert=1, rank=2)"
    assert named(Forbid(1, 2, 3)) == "Forbid(expert=1, rank=2, layer=3)"
    assert named(MaxMoves(current, per_layer=4)) == "MaxMoves(per_layer=4)"
    assert (
        named(TokenCapacity(np.arange(6) / 8))
        == "TokenCapacity(tokens=[0, 0.125, 0.25, 0.375, ...])"
    )
    assert named(NodeGroups([1, 0])) == "NodeGroups(groups=[1, 0])"  # type: ignore[arg-type]
    assert named(ReplicaBudget(123456)) == "ReplicaBudget(total=123456)"
    many = clash.Clash(rules=tuple(Pin(e, 0) for e in range(20)), why="Why.", least=False)
    assert str(many).startswith("Why. Rules that clash, at most: Pin(expert=0, rank=0), Pin")
    assert str(many).endswith("Pin(expert=7, rank=0), ... (20 in all).")


@pytest.fixture(scope="module")
def whole() -> Problem:
    """A whole model on nodes; in one layer a group is torn apart."""
    one = generate((58, 256, 288, 32), 0).aggregate()
    one = replace(one, cluster=replace(one.cluster, nodes=np.arange(32) // 8))
    many = [Pin(expert, expert % 8, layer) for layer in range(58) for expert in range(40, 44)]
    rules = [NodeGroups(8), *many, Pin(0, 0, 17), Pin(1, 9, 17)]
    return replace(one, constraints=rules)


def test_one_layer_of_a_whole_model_is_named(whole: Problem) -> None:
    began = time.perf_counter()
    found = mp.solve(whole, time_limit=60.0)
    assert time.perf_counter() - began < 65
    assert found.status is Status.INFEASIBLE
    assert found.reason == (
        "layer 17: CP-SAT claims that no plan obeys all rules (its word, not checked). Rules that "
        "clash: NodeGroups(groups=8), Pin(expert=0, rank=0, layer=17), "
        "Pin(expert=1, rank=9, layer=17)."
    )


def test_the_time_limit_holds(whole: Problem) -> None:
    for limit in (0.0, 0.3, 1.0):
        began = time.perf_counter()
        found = mp.solve(whole, time_limit=limit)
        assert time.perf_counter() - began < limit + 3
        assert found.status in (Status.INFEASIBLE, Status.NONE_IN_TIME)


def test_a_plan_found_while_clashes_are_sought_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = NodeGroups(np.array([0, 0, 1, 1]))
    one = problem([4, 3, 2, 1], [1, 1], 3, constraints=[Pin(0, 1), groups, Pin(2, 0)])
    one = replace(one, cluster=replace(one.cluster, nodes=[0, 1]))
    from moeplace.search import portfolio

    real, asked = portfolio.search, []

    def blind(run: Any, start: Plan | None) -> None:
        asked.append(start)
        if start is not None:
            real(run, start)

    monkeypatch.setattr(portfolio, "search", blind)
    found = mp.solve(one, time_limit=10.0)
    assert found.evaluation is not None
    assert found.evaluation.legal
    assert asked[0] is None
    assert asked[-1] is not None


def test_ctrl_c_ends_the_search_for_a_clash() -> None:
    """Where rules are known to clash those so far are named, else it is passed on."""
    one = Search(CLASHING)
    calls = []

    def interrupted(*_: Any) -> bool:
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Search, "_asked", interrupted)
        found = one.find()
        assert found is not None
        assert not found.least
        assert len(found.rules) == len(CLASHING.constraints) - 1  # one is of another layer
        with pytest.raises(KeyboardInterrupt):
            Search(CLASHING).find()


def test_ctrl_c_stops_cp_sat(monkeypatch: pytest.MonkeyPatch) -> None:
    from moeplace.exact import feasibility

    one = generate((1, 128, 144, 16), 0).aggregate()
    most = float(one.tokens.sum()) / 16
    one = replace(one, constraints=[TokenCapacity(1.000001 * most)])

    def impatient(*_: Any, **__: Any) -> Any:
        time.sleep(2.0)
        raise KeyboardInterrupt

    stopped: list[bool] = []

    class Told(feasibility.Stop):
        def stop(self) -> None:
            super().stop()
            stopped.append(self.called)

    monkeypatch.setattr(feasibility, "wait", impatient)
    monkeypatch.setattr(feasibility, "Stop", Told)
    with pytest.raises(KeyboardInterrupt):
        find_placement(one, 60.0, None)
    assert stopped == [True]
    assert threading.active_count() < 10


@given(crowded())
@MORE
def test_a_placement_that_is_found_obeys_the_rules(one: Problem) -> None:
    assume(one.constraints)
    ended, slots = find_placement(one, 20.0, None)
    assert ended != "unknown"
    if ended == "infeasible":
        assert optimum(one) == np.inf
        return
    assert slots is not None
    placed = Plan(slots=slots, rank_slots=one.cluster.slots, experts=one.experts)
    assert at_best_shares(one, placed).legal
