import hashlib
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplace.bounds import lower_bound, recompute
from moeplace.constraints import Forbid, MaxMoves, NodeGroups, Pin
from moeplace.errors import MoeplaceError, PlanError, PolicyNotApplicable, ProblemError
from moeplace.evaluate import evaluate
from moeplace.feasible import explain_infeasible, refuted
from moeplace.hardware import Cluster
from moeplace.loads import LoadHistogram
from moeplace.plan import EMPTY, Plan
from moeplace.policies import POLICIES
from moeplace.problem import Problem
from moeplace.result import Progress, Result, Status
from moeplace.search.split import resplit
from moeplace.solve import solve
from tests.brute_force import optimum
from tests.many_small import KINDS
from tests.many_small import one as one_of_many
from tests.strategies import legal_plans, plan, problem, tiny_problems

MORE = settings(max_examples=2 * settings().max_examples)
#: Search steps that are plenty for a tiny problem.
WORK = 20_000


def shaped(
    layers: int, experts: int, slots: int, ranks: int, seed: int = 0, **options: Any
) -> Problem:
    """Lognormal loads and speeds N(1, 0.05) in 0.85 to 1.15, one rank at 0.85."""
    random = np.random.default_rng(seed)
    loads = np.exp(random.normal(0, random.uniform(0.7, 1.3, (layers, 1)), (layers, experts)))
    speeds = np.clip(random.normal(1, 0.05, ranks), 0.85, 1.15)
    speeds[random.integers(ranks)] = 0.85
    return problem(np.round(1e4 * loads), speeds, slots // ranks, **options)


def digest(result: Result) -> str:
    state = hashlib.sha256(result.plan.slots.tobytes())
    if result.plan.split is not None:
        state.update(result.plan.split.tobytes())
    return state.hexdigest()


def assert_sound(result: Result, best: float | None = None) -> None:
    """The plan is legal and priced by `evaluate`; bound and status are true."""
    one = result.problem
    priced = evaluate(one, result.plan)
    assert priced.legal
    assert result.objective == priced.objective
    assert result.lower_bound <= result.objective
    recompute(one, result.bound)
    if best is not None:
        assert result.lower_bound <= best * (1 + 1e-9)
        assert best <= result.objective * (1 + 1e-9)
    if result.status is Status.OPTIMAL:
        assert result.gap <= 1e-9
    elif result.status is Status.WITHIN_GAP:
        assert result.gap <= result.limits.gap
    else:
        assert result.status is Status.FEASIBLE


def assert_sound_or_none(result: Result, best: float) -> None:
    """A sound plan, or none: the search may fail where a plan exists, but then proves nothing."""
    if result.evaluation is None:
        assert result.status in (Status.NONE_IN_TIME, Status.INFEASIBLE)
        assert result.status is not Status.INFEASIBLE or best == float("inf")
        assert result.reason
    else:
        assert_sound(result, best)


# Against brute force


@given(tiny_problems(max_experts=5, max_layers=2, max_windows=2))
@MORE
def test_every_method_lies_between_the_true_optimum_and_its_own_bound(one: Problem) -> None:
    best = optimum(one)
    for method in ("auto", *POLICIES):  # exact solvers: tests/exact
        try:
            found = solve(one, method, work_limit=WORK)
        except PolicyNotApplicable:
            assert method != "auto"
            continue
        assert_sound(found, best)


@given(tiny_problems(max_experts=5, max_layers=2, constraints=True))
@MORE
def test_pins_and_forbids_are_obeyed_or_proven_to_clash(one: Problem) -> None:
    found, best = solve(one, work_limit=WORK), optimum(one)
    if best == float("inf"):
        assert found.status is Status.INFEASIBLE
        assert explain_infeasible(one) is not None
        assert re.match(r"layer \d+: .*\. Rules that clash: .*\(.*\)\.$", found.reason)
        with pytest.raises(MoeplaceError, match="no plan"):
            _ = found.plan
    else:
        assert_sound(found, best)


@given(
    tiny_problems(max_experts=5, max_layers=2, max_windows=2, limits=True)
    | tiny_problems(max_experts=4, max_layers=2, constraints=True, limits=True)
)
@MORE
def test_capacities_and_budgets_of_replicas_are_obeyed(one: Problem) -> None:
    assert_sound_or_none(solve(one, work_limit=WORK), optimum(one))


@given(st.data(), tiny_problems(max_experts=4, max_layers=2, max_windows=2, limits=True))
@MORE
def test_with_few_moves_and_on_nodes_too(data: st.DataObject, one: Problem) -> None:
    rules = list(one.constraints)
    current, count = data.draw(legal_plans(one)), st.one_of(st.none(), st.integers(0, 3))
    rules.append(MaxMoves(current, per_layer=data.draw(count), total=data.draw(count)))
    if data.draw(st.booleans()):
        rules.append(NodeGroups(np.arange(one.experts) // 2))
    nodes = data.draw(st.lists(st.integers(0, 1), min_size=one.ranks, max_size=one.ranks))
    few = replace(one, cluster=replace(one.cluster, nodes=nodes), constraints=rules)
    found = solve(few, work_limit=WORK)
    assert_sound_or_none(found, optimum(few))
    stay = evaluate(few, resplit(few, current) if few.routing == "weighted" else current)
    assert not stay.legal or found.objective <= stay.objective


@given(st.data(), tiny_problems(max_experts=5, max_layers=2))
@MORE
def test_a_budget_of_moves_is_kept(data: st.DataObject, one: Problem) -> None:
    current, count = data.draw(legal_plans(one)), st.one_of(st.none(), st.integers(0, 3))
    rule = MaxMoves(current, per_layer=data.draw(count), total=data.draw(count))
    few = replace(one, constraints=[rule])
    found = solve(few, work_limit=WORK)
    assert_sound(found, optimum(few))
    stay = resplit(few, current) if few.routing == "weighted" else current
    assert found.objective <= evaluate(few, stay).objective


@given(st.data(), tiny_problems(max_experts=5, max_layers=2))
@MORE
def test_groups_stay_on_their_nodes(data: st.DataObject, one: Problem) -> None:
    group = st.lists(st.integers(0, one.experts - 1), min_size=one.experts, max_size=one.experts)
    nodes = data.draw(st.lists(st.integers(0, 2), min_size=one.ranks, max_size=one.ranks))
    apart = replace(
        one,
        cluster=replace(one.cluster, nodes=nodes),
        constraints=[NodeGroups(np.array(data.draw(group)))],
    )
    found = solve(apart, work_limit=WORK)
    assert_sound_or_none(found, optimum(apart))


def tiny_set(routing: str) -> list[Problem]:
    """One hundred fixed problems of up to 6 experts and 3 ranks, speeds 0.3 to 1.5."""
    random = np.random.default_rng(11)
    chosen = []
    while len(chosen) < 100:
        experts, ranks = int(random.integers(2, 7)), int(random.integers(2, 4))
        slots = random.integers(0, experts + 1, ranks)
        if np.minimum(slots, experts).sum() < experts:
            continue
        loads = random.integers(0, 10, experts) * random.choice([1, 1, 0.1])
        base = random.integers(0, 4, ranks) * random.integers(0, 2)
        speeds = random.choice([random.uniform(0.3, 1.5, ranks), np.ones(ranks)])
        chosen.append(problem(loads, speeds, slots, routing=routing, base_load=base))
    return chosen


@pytest.mark.parametrize(("routing", "least"), [("even", 97), ("weighted", 90)])
def test_auto_finds_the_optimum_of_most_tiny_problems(routing: str, least: int) -> None:
    hits = 0
    for one in tiny_set(routing):
        found, best = solve(one, work_limit=200_000, gap=0), optimum(one)
        assert_sound(found, best)
        hits += found.objective <= best * (1 + 1e-9)
    assert hits >= least


@pytest.mark.parametrize(
    ("kind", "least"),
    [
        ("capacity", 0.9),
        ("capacity, two windows", 0.8),
        ("most replicas", 0.95),
        ("replica budget", 0.9),
        ("cvar", 0.85),
        ("capacity and moves", 0.85),
        ("budget and moves", 0.85),
        ("several rules", 0.9),
    ],
)
def test_auto_finds_the_optimum_of_most_tiny_problems_with_further_rules(
    kind: str, least: float
) -> None:
    seeds = range(KINDS.index(kind), 60 * len(KINDS), len(KINDS))
    outcomes = [found for seed in seeds if (found := one_of_many(seed)) and found[0] == kind]
    assert len(outcomes) >= 20
    assert np.mean([gap < 1e-9 for _, gap, _ in outcomes]) >= least


# Against the policies


@pytest.mark.parametrize("routing", ["even", "weighted"])
@pytest.mark.parametrize("windows", [1, 3])
@pytest.mark.parametrize("objective", ["mean", "worst"])
def test_auto_is_never_worse_than_a_legal_policy(
    routing: str, windows: int, objective: str
) -> None:
    random = np.random.default_rng(windows)
    for slots in ([3, 3, 3, 3], [5, 2, 1, 2], [2, 2, 2, 2]):
        loads = np.round(np.exp(random.normal(3, 1, (windows, 5, 8))))
        one = problem(
            loads, random.uniform(0.7, 1.3, 4), slots, routing=routing, objective=objective
        )
        best = solve(one, work_limit=20_000)
        assert_sound(best)
        for name in POLICIES:
            try:
                assert best.objective <= solve(one, name).objective * (1 + 1e-12), name
            except PolicyNotApplicable:
                continue


def test_a_policy_that_breaks_a_rule_is_not_applicable() -> None:
    one = problem([4, 3, 2, 1], [1, 1], 2, constraints=[Forbid(0, 0)])
    with pytest.raises(PolicyNotApplicable, match="contiguous gives no legal plan here: .*forbid"):
        solve(one, "contiguous")
    assert_sound(solve(one))


def test_under_weighted_routing_a_policy_gets_the_best_shares() -> None:
    one = problem([6, 2, 1], [1, 2], 2, routing="weighted")
    found = solve(one, "contiguous")
    assert found.objective == evaluate(one, resplit(one, found.plan)).objective
    assert found.method == "contiguous"


# Start plans


@given(st.data(), tiny_problems(max_layers=2, max_windows=2, constraints=True, limits=True))
@MORE
def test_a_start_plan_is_never_made_worse(data: st.DataObject, one: Problem) -> None:
    start = data.draw(legal_plans(one))
    if explain_infeasible(one) is not None or refuted(one, lower_bound(one)) is not None:
        return
    start = resplit(one, start) if one.routing == "weighted" else start
    if not evaluate(one, start).legal:
        with pytest.raises(PlanError, match="start plan breaks a rule"):
            solve(one, start=start, work_limit=100)
        return
    found = solve(one, start=start, work_limit=100)
    assert_sound(found)
    assert found.objective <= evaluate(one, start).objective


def test_shares_of_a_start_plan_are_kept_if_nothing_is_better() -> None:
    one = shaped(2, 16, 16, 4, routing="weighted")
    first = solve(one, work_limit=500_000)
    again = solve(one, work_limit=0, start=first.plan)
    assert again.objective <= first.objective


def test_a_start_plan_counts_under_a_budget_of_moves_too() -> None:
    one = problem([9, 9, 1, 1, 1], [1, 1], 3)
    current = plan([0, 1, EMPTY, 2, 3, 4], [3, 3])
    few = replace(one, constraints=[MaxMoves(current, per_layer=3)])
    best = solve(few, work_limit=WORK).plan
    assert solve(few, work_limit=0, start=best).objective <= evaluate(few, best).objective
    with pytest.raises(PlanError, match="start plan breaks a rule"):
        solve(few, start=plan([2, 3, 4, 0, 1, 2], [3, 3]))


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (plan([0, 1], [1, 1]), "2 experts but the problem has 3"),
        (plan([0, 1, 2, -1], [1, 3]), "slots per rank"),
        (plan([0, 1, 2, 0], [2, 2], split=[[0.5, 1, 1, 0.5]]), "routing is even"),
        (
            plan([0, 0, 1, 2], [2, 2], allow_duplicates=True),
            "start plan breaks a rule.*two replica",
        ),
    ],
)
def test_a_start_plan_must_fit(start: Plan, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        solve(problem([3, 2, 1], [1, 1], 2), start=start)


# Limits and status


@given(tiny_problems(max_layers=2, max_windows=2))
def test_no_time_at_all_still_gives_a_plan_and_its_bound(one: Problem) -> None:
    found = solve(one, time_limit=0)
    assert_sound(found, optimum(one))
    assert found.bound.total == lower_bound(one).total


@pytest.mark.parametrize("routing", ["even", "weighted"])
def test_no_work_at_all_still_gives_a_plan(routing: str) -> None:
    assert_sound(solve(shaped(3, 32, 36, 4, routing=routing), work_limit=0))


def test_work_stays_near_its_limit() -> None:
    one = shaped(8, 64, 72, 8)
    for limit in (10_000, 200_000):
        assert limit <= solve(one, work_limit=limit, gap=0).work <= limit + 50_000


def test_a_wide_gap_ends_the_search_early() -> None:
    one = shaped(4, 64, 72, 8)
    rough, fine = solve(one, gap=0.05), solve(one, gap=1e-3)
    assert rough.status in (Status.WITHIN_GAP, Status.OPTIMAL)
    assert fine.status in (Status.WITHIN_GAP, Status.OPTIMAL)
    assert rough.work < fine.work
    assert rough.gap <= 0.05
    assert fine.gap <= 1e-3


def test_what_pins_exclude_is_infeasible_with_a_reason_and_a_bound() -> None:
    one = problem([3, 2, 1], [1, 1], 2, constraints=[Pin(0, 0), Pin(1, 0), Pin(2, 0)])
    for method in ("auto", "contiguous"):
        found = solve(one, method)
        assert found.status is Status.INFEASIBLE
        assert "3 experts are pinned to rank 0, which has 2 slots" in found.reason
        assert found.bound.total == lower_bound(one, prices=False).total
        assert found.evaluation is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "Method must be one of auto, .* got 'magic'"),
        ({"seed": -1}, "seed must be a whole number from 0, got -1"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"seed": True}, "seed must be a whole number"),
        ({"workers": 0}, "workers must be a whole number from 1, got 0"),
        ({"time_limit": -1}, "time limit must be a finite number of at least 0"),
        ({"work_limit": -1}, "work limit must be a finite number of at least 0"),
        ({"gap": float("nan")}, "gap limit must be a finite number of at least 0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        solve(problem([1, 2], [1], 2), **options)


def test_progress_is_told_and_never_claims_too_much() -> None:
    heard: list[Progress] = []
    one = shaped(4, 128, 144, 16)
    found = solve(one, work_limit=3_000_000, gap=0, progress=heard.append)
    assert heard
    for progress in heard:
        assert progress.layers == 4
        assert 0 <= progress.layers_done <= 4
        assert progress.lower_bound <= progress.objective * (1 + 1e-9)
    assert found.objective <= heard[-1].objective * (1 + 1e-9)


def test_an_interrupt_keeps_the_plan_so_far() -> None:
    def stop(_: Progress) -> None:
        raise KeyboardInterrupt

    one = shaped(4, 128, 144, 16)
    found = solve(one, work_limit=3_000_000, gap=0, progress=stop)
    assert found.status is Status.INTERRUPTED
    assert evaluate(one, found.plan).legal


# The same bits


def several(routing: str) -> Problem:
    random = np.random.default_rng(5)
    loads = np.round(np.exp(random.normal(5, 1, (2, 6, 24))))
    speeds = np.clip(random.normal(1, 0.05, 4), 0.85, 1.15)
    return problem(loads, speeds, [7, 7, 6, 8], routing=routing)


SAME = {
    "even": shaped(6, 64, 72, 8),
    "weighted": shaped(6, 64, 66, 8, routing="weighted"),
    "windows, even": several("even"),
    "windows, weighted": several("weighted"),
    "few moves": replace(
        one := shaped(6, 64, 72, 8),
        constraints=[MaxMoves(POLICIES["contiguous"](one), per_layer=4, total=16)],
    ),
    "groups": Problem(
        LoadHistogram(tokens=shaped(6, 64, 72, 8).tokens),
        Cluster.from_speeds(np.ones(8), 9, nodes=2),
        constraints=[NodeGroups(8)],
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_the_number_of_workers_changes_no_bit(name: str) -> None:
    outcomes = {
        digest(solve(SAME[name], work_limit=150_000, gap=0, seed=3, workers=workers))
        for workers in (1, 2, 3)
    }
    assert len(outcomes) == 1


@pytest.mark.parametrize("name", ["even", "weighted", "few moves"])
def test_seeds_are_heard_and_repeat(name: str) -> None:
    one = SAME[name]
    first, again, other = (solve(one, work_limit=150_000, gap=0, seed=seed) for seed in (1, 1, 2))
    assert digest(first) == digest(again)
    assert first.work == again.work
    assert_sound(other)


def test_another_seed_searches_elsewhere() -> None:
    ends = {digest(solve(SAME["even"], work_limit=300_000, gap=0, seed=s)) for s in range(4)}
    assert len(ends) > 1


def test_two_processes_find_the_same_bits() -> None:
    script = (
        "from tests.test_solve import SAME, digest\n"
        "from moeplace.solve import solve\n"
        "for one in SAME.values():\n"
        "    print(digest(solve(one, work_limit=150_000, gap=0, seed=3)))\n"
    )
    outcomes = [
        subprocess.run(
            [sys.executable, "-c", script],
            cwd=Path(__file__).parent.parent,
            check=True,
            capture_output=True,
            text=True,
            env={"PYTHONHASHSEED": seed, "PATH": ""},
        ).stdout
        for seed in ("1", "2")
    ]
    mine = [digest(solve(one, work_limit=150_000, gap=0, seed=3)) for one in SAME.values()]
    assert outcomes[0].split() == outcomes[1].split() == mine


# Shapes


@pytest.mark.parametrize("routing", ["even", "weighted"])
def test_a_deepseek_sized_model_ends_at_a_proven_gap_of_a_thousandth(routing: str) -> None:
    one = shaped(58, 256, 288, 32, routing=routing)
    found = solve(one, gap=1e-3, work_limit=20_000_000, workers=2)
    assert_sound(found)
    assert found.gap <= 1e-3
    assert (found.layers.gap <= 1e-3 + 1e-9).all()
    assert found.status in (Status.WITHIN_GAP, Status.OPTIMAL)


def test_without_spare_slots_the_plan_is_close_to_its_bound() -> None:
    one = shaped(8, 128, 128, 8)
    found = solve(one, work_limit=2_000_000)
    assert (found.plan.replicas == 1).all()
    assert found.gap <= 5e-3


def test_windows_are_planned_together() -> None:
    # on the sum both hot experts look alike and harmless; in each window one of them is hot
    random = np.random.default_rng(2)
    loads = np.round(np.exp(random.normal(4, 1, (4, 3, 32))))
    speeds = np.ones(4)
    for objective in ("mean", "worst"):
        every = problem(loads, speeds, 9, objective=objective)
        together = solve(every, work_limit=1_000_000)
        summed = solve(every.aggregate(), work_limit=1_000_000)
        assert_sound(together)
        assert together.objective < evaluate(every, summed.plan).objective


@pytest.mark.parametrize("routing", ["even", "weighted"])
class TestCorners:
    def test_one_rank(self, routing: str) -> None:
        found = solve(problem([3, 2, 0], [2], 5, routing=routing))
        assert found.status is Status.OPTIMAL
        assert found.objective == pytest.approx(2.5)

    def test_one_expert(self, routing: str) -> None:
        found = solve(problem([6], [1, 2, 3], 1, routing=routing))
        assert_sound(found)
        # even: on the two fastest (3 / 2) rather than all (2 / 1) or one (6 / 3)
        assert found.objective == pytest.approx(1.5 if routing == "even" else 1.0)

    def test_one_expert_with_slots_to_waste(self, routing: str) -> None:
        assert_sound(solve(problem([6], [1, 2], 4, routing=routing)))

    def test_a_slot_for_every_expert_on_every_rank(self, routing: str) -> None:
        found = solve(problem([6, 3, 1], [1, 1], 3, routing=routing))
        assert found.status is Status.OPTIMAL
        assert found.objective == pytest.approx(5)

    def test_as_many_slots_as_experts(self, routing: str) -> None:
        found = solve(problem([7, 5, 4, 2], [1, 1], 2, routing=routing))
        assert found.status is Status.OPTIMAL
        assert found.objective == pytest.approx(9)

    def test_as_many_ranks_as_slots(self, routing: str) -> None:
        found = solve(problem([7, 5, 4], [1, 2, 1], 1, routing=routing))
        assert found.status is Status.OPTIMAL
        assert found.objective == 5

    def test_a_very_slow_rank_gets_what_weighs_nothing(self, routing: str) -> None:
        found = solve(problem([5, 5, 0, 1e-9], [1, 1, 1e-6], [2, 2, 1], routing=routing))
        assert_sound(found)
        assert found.objective == pytest.approx(5, rel=1e-6)

    def test_a_rank_without_slots_only_runs_its_base_load(self, routing: str) -> None:
        one = problem([4, 2], [1, 1, 1], [1, 1, 0], routing=routing, base_load=[0, 0, 3])
        found = solve(one)
        assert_sound(found)
        assert found.objective == 4

    def test_base_load_moves_tokens_elsewhere(self, routing: str) -> None:
        one = problem([4, 4, 4, 4], [1, 1], 4, routing=routing, base_load=[8, 0])
        found = solve(one)
        assert found.status is Status.OPTIMAL
        assert found.objective == pytest.approx(12)

    def test_layers_without_tokens_cost_nothing(self, routing: str) -> None:
        found = solve(problem([[0, 0], [2, 2], [0, 0]], [1, 1], 2, routing=routing))
        assert found.status is Status.OPTIMAL
        assert found.layers.objective == pytest.approx(np.array([[0, 2, 0]]))
        assert solve(problem([0, 0], [1, 2], 1, routing=routing)).objective == 0

    def test_loads_of_any_scale(self, routing: str) -> None:
        for scale in (1e-200, 1e-9, 1e12):
            one = problem(np.array([7, 5, 4, 2]) * scale, [1, 1], 2, routing=routing)
            found = solve(one)
            assert_sound(found)
            assert found.objective == pytest.approx(9 * scale, rel=1e-9)

    def test_layers_may_weigh_nothing(self, routing: str) -> None:
        one = problem([[3, 1], [3, 1]], [1, 1], 1, routing=routing, layer_weight=[0, 2])
        found = solve(one)
        assert_sound(found)
        assert found.objective == 6

    def test_a_window_may_weigh_nothing(self, routing: str) -> None:
        for objective in ("mean", "worst"):
            one = problem(
                [[[7, 5, 4, 2]], [[1, 9, 1, 1]]],
                [1, 1],
                2,
                routing=routing,
                window_weight=[1, 0],
                objective=objective,
            )
            assert_sound(solve(one, work_limit=10_000), optimum(one))


@given(tiny_problems(max_windows=3, routing="even", max_layers=1))
@settings(max_examples=20)
def test_a_tiny_layer_in_several_windows_is_proven(one: Problem) -> None:
    result = solve(one, gap=0, work_limit=100_000_000)
    exact = one.windows == 1 or one.objective == "mean"  # else CP-SAT's grid
    assert result.objective == pytest.approx(optimum(one), rel=1e-9 if exact else 1e-6)
    assert result.gap <= (1e-9 if exact else 1e-6)
    if exact:
        assert result.status == "optimal"
        recompute(one, result.bound)
