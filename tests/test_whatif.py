"""What changes buy: every answer against brute force, and the real size in a table."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplace.constraints import Forbid, MaxMoves, Pin, TokenCapacity
from moeplace.errors import ProblemError
from moeplace.evaluate import evaluate
from moeplace.hardware import Cluster
from moeplace.instances import generate
from moeplace.loads import LoadHistogram
from moeplace.problem import Problem
from moeplace.safety import halves, twice, twice_bound, unserved, without
from moeplace.search.split import at_best_shares
from moeplace.whatif import Answer, whatif
from tests.brute_force import optimum
from tests.strategies import plan, problem, tiny_problems


def by_question(given: Problem, **options: Any) -> dict[str, Answer]:
    return {answer.question: answer for answer in whatif(given, **options).answers}


@settings(max_examples=15)
@given(st.data())
def test_bounds_hold_and_prices_are_prices(data: st.DataObject) -> None:
    """Against the optimum of the changed problem, found by trying every placement."""
    tiny = data.draw(tiny_problems(max_experts=4, max_ranks=3))
    try:
        answers = by_question(tiny, time_limit=0.5)
    except ProblemError as cause:
        pytest.skip(str(cause))
    other = "weighted" if tiny.routing == "even" else "even"
    changed: dict[str, Any] = {
        "as it is": tiny,
        f"{other} dispatch": replace(tiny, routing=other),  # type: ignore[arg-type]
    }
    more = replace(tiny.cluster, slots=tiny.cluster.slots + 1)
    changed["one more slot a rank"] = replace(tiny, cluster=more)
    if tiny.ranks > 1:
        fastest = int(tiny.cluster.speeds.argmax())
        gone = np.arange(tiny.ranks) == fastest
        name = f"rank {fastest} (the fastest) lost, new plan"
        try:
            changed[name] = without(tiny, gone)
        except ProblemError:
            assert "do not fit" in answers[name].note
    for question, after in changed.items():
        answer, best = answers[question], optimum(after)
        assert answer.price is not None
        assert answer.lower_bound is not None
        assert answer.lower_bound <= best * (1 + 1e-9)
        assert answer.price >= best * (1 - 1e-9)
        assert answer.plan is not None
        assert at_best_shares(after, answer.plan).legal


def test_known_changes() -> None:
    """Eight equal experts, two on each rank; speeds make the answers plain."""
    start = problem([1.0] * 8, [1.0, 1.0, 1.0, 2.0], [2, 2, 2, 2], speed_unit="relative")
    answers = by_question(start, time_limit=1.0)
    base = answers["as it is"]
    assert base.price == 2.0  # two experts on a slow rank
    assert answers["one fewer slot a rank"].note.startswith("impossible: 8 experts do not fit")
    more = answers["one more slot a rank"]
    assert more.price is not None
    assert more.price < 2.0
    kept = next(a for q, a in answers.items() if "slower, plan kept" in q)
    assert kept.price == pytest.approx(2 / 0.9)
    assert "impossible" in answers["rank 3 (the fastest) lost, new plan"].note
    assert not any("swapped" in question for question in answers)  # none is slower than most
    added = answers["one rank added"]
    assert added.lower_bound is not None
    assert added.lower_bound >= 8 / 6.25 * (1 - 1e-12)


def test_the_slowest_gpu_is_swapped_first() -> None:
    start = generate((3, 32, 40, 8), 2, speeds=[1.0, 0.8, 1.0, 1.1, 1.0, 0.9, 1.0, 1.0])
    answers = by_question(start.aggregate(), time_limit=1.0)
    assert "GPU of rank 1 swapped for a median one" in answers
    equal = generate((3, 32, 40, 8), 2, speeds="equal").aggregate()
    assert not any("swapped" in question for question in by_question(equal, time_limit=1.0))


def test_redundant_experts_under_weighted_routing() -> None:
    """ranks - 1 of them reach the fluid bound, which proves that more are worth nothing."""
    start = generate((3, 64, 72, 8), 2, routing="weighted").aggregate()
    hot = np.where(np.arange(64) == 5, 20.0, 1.0) * start.loads.tokens
    start = replace(start, loads=LoadHistogram(tokens=hot))
    answers = by_question(start, time_limit=2.0, slots_most=10)
    fluid = start.total(start.fluid)
    rule = answers["ranks - 1 = 7 redundant experts"]
    assert rule.price == pytest.approx(fluid, rel=1e-9)
    best = answers["best number of redundant experts: 8"]
    assert best.note == "no number of slots, however large, saves more"
    assert best.lower_bound == pytest.approx(fluid, rel=1e-12)
    none = answers["0 redundant experts (8 slots a rank)"]
    assert none.lower_bound is not None
    assert none.lower_bound > 1.01 * fluid
    curve = [a.price for q, a in answers.items() if "slots a rank)" in q]
    assert len(curve) == 3


def test_phases_of_unlike_loads_want_their_own_placements() -> None:
    prefill, decode = (generate((3, 32, 40, 8), seed).aggregate() for seed in (1, 2))
    decode = replace(decode, cluster=prefill.cluster)
    answers = by_question(prefill, decode=decode, work_limit=2_000_000)
    for name in ("prefill", "decode"):
        answer = answers[f"{name}: a placement of its own"]
        assert answer.change is not None
        assert answer.at_best is not None
        assert answer.at_best <= answer.change < -0.01
    same = by_question(prefill, decode=prefill, work_limit=2_000_000)
    assert same["decode: a placement of its own"].change == pytest.approx(0.0, abs=1e-3)
    with pytest.raises(ProblemError, match="one model on one cluster"):
        whatif(prefill, decode=generate((3, 16, 24, 8), 1).aggregate())


def test_a_whole_table_of_the_real_size_is_within_its_bounds() -> None:
    """By steps, not by time: so it is the same table on a busy machine."""
    start = generate("A", 100).aggregate()
    nodes = Cluster.from_speeds(start.cluster.speeds, 9, 4, "relative")
    start = replace(start, cluster=nodes)
    answers = by_question(start, work_limit=4_000_000, workers=2)
    again = by_question(start, work_limit=4_000_000)
    assert {q: a.price for q, a in answers.items()} == {q: a.price for q, a in again.items()}
    assert len(answers) >= 17
    for answer in answers.values():
        if answer.gap is not None:
            assert answer.gap < 0.01, answer.question
    assert answers["one node of 8 ranks added"].change == pytest.approx(-0.2, abs=0.001)


def test_odd_options_are_refused() -> None:
    start = problem([1.0, 1.0], [1.0, 1.0], [1, 1])
    with pytest.raises(ProblemError, match="time limit must be positive"):
        whatif(start, time_limit=0.0)
    with pytest.raises(ProblemError, match="work limit must be a finite number"):
        whatif(start, work_limit=-1)
    for most in (0, -3, 3, 1.5, True):
        with pytest.raises(ProblemError, match="must be a whole number from 1 .* to 2 .*, got"):
            whatif(start, slots_most=most)  # type: ignore[arg-type]
    barred = replace(start, constraints=[Forbid(0, 0), Forbid(0, 1)])
    with pytest.raises(ProblemError, match="no plan as it is"):
        whatif(barred)


# ------------------------------------------------------------------------------- losses


def test_what_is_left_of_rules_and_loads() -> None:
    start = problem(
        [2.0, 1.0, 1.0], [1.0, 2.0, 3.0], [1, 2, 3],
        base_load=[1.0, 2.0, 3.0],
        constraints=[Pin(0, 2), Forbid(1, 0), TokenCapacity([5.0, 6.0, 7.0])],
    )  # fmt: skip
    left = without(start, [True, False, False])
    assert left.cluster.speeds.tolist() == [2.0, 3.0]
    assert left.cluster.slots.tolist() == [2, 3]
    assert left.base.tolist() == [[[2.0, 3.0]]]
    assert left.pinned.tolist() == [[[False, True], [False, False], [False, False]]]
    assert left.allowed.all()
    assert left.capacity.tolist() == [6.0, 7.0]
    current = plan([0, 1, 2, 0, 1, 2], [1, 2, 3])
    moved = replace(start, constraints=[MaxMoves(current, total=1)])
    assert without(moved, [True, False, False]).max_moves is None


def test_experts_that_a_loss_leaves_without_a_replica() -> None:
    current = plan([[0, 1, 0, 2], [0, 1, 2, 1]], [2, 2])
    assert unserved(current, [True, False]) == 1 + 1
    assert unserved(current, [False, True]) == 1 + 1
    assert unserved(current, [False, False]) == 0


@pytest.mark.parametrize("routing", ["even", "weighted"])
@pytest.mark.parametrize("slots", [8, 9])
def test_no_loss_of_a_node_leaves_an_expert_unserved(routing: Any, slots: int) -> None:
    start = generate((4, 32, 8 * slots, 8), 3, routing=routing).aggregate()
    nodes = np.repeat(np.arange(4), 2)
    cluster = Cluster(
        speeds=start.cluster.speeds, slots=[slots] * 8, nodes=nodes, speed_unit="relative"
    )
    start = replace(start, cluster=cluster)
    side = halves(cluster.speeds, nodes)
    assert side.sum() == 4
    found = twice(start, side, {"time_limit": 0.5, "work_limit": None})
    for node in range(4):
        assert unserved(found, nodes == node) == 0
    price = at_best_shares(start, found)
    assert price.legal
    bound = twice_bound(start)
    assert bound <= price.objective
    assert price.objective < 1.05 * bound or slots == 8


@settings(max_examples=20)
@given(st.data())
def test_the_bound_on_safe_plans_holds(data: st.DataObject) -> None:
    """Every even plan in which every expert has two replicas, on three ranks."""
    experts = data.draw(st.integers(1, 3))
    loads = data.draw(st.lists(st.floats(0, 10), min_size=experts, max_size=experts))
    slots = data.draw(st.sampled_from([[experts] * 2, [experts] * 3, [experts, experts, 1]]))
    speeds = data.draw(st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=3, max_size=3))
    start = problem(loads, speeds[: len(slots)], slots)
    ranks = len(slots)
    least = np.inf
    sets = [s for s in range(1 << ranks) if bin(s).count("1") >= 2]
    for choice in np.ndindex(*[len(sets)] * experts):
        rows: list[list[int]] = [[] for _ in slots]
        for expert, index in enumerate(choice):
            for rank in range(ranks):
                if sets[index] >> rank & 1:
                    rows[rank].append(expert)
        if any(len(row) > room for row, room in zip(rows, slots, strict=True)):
            continue
        padded = [row + [-1] * (room - len(row)) for row, room in zip(rows, slots, strict=True)]
        placed = plan([e for row in padded for e in row], slots, experts)
        least = min(least, evaluate(start, placed).objective)
    if np.isfinite(least):
        assert twice_bound(start) <= least * (1 + 1e-9)
