from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplace.constraints import Pin
from moeplace.errors import PlanError
from moeplace.evaluate import evaluate
from moeplace.hardware import Cluster
from moeplace.loads import LoadHistogram
from moeplace.plan import Plan
from moeplace.problem import Problem
from tests.strategies import legal_plans, plan, problem, tiny_problems


class TestByHand:
    def test_replicas_share_evenly_and_the_slowest_rank_counts(self) -> None:
        priced = evaluate(problem([6, 2, 4], [1, 2], 2), plan([0, 1, 0, 2], [2, 2]))
        assert priced.rank_tokens.tolist() == [[[5.0, 7.0]]]
        assert priced.rank_seconds.tolist() == [[[5.0, 3.5]]]
        assert priced.makespan.tolist() == [[5.0]]
        assert priced.objective == 5.0
        assert priced.ratio.tolist() == [[1.25]]
        assert priced.imbalance == 1.25
        assert priced.balancedness == pytest.approx(6 / 7)
        assert priced.legal

    def test_stored_shares_are_used_under_weighted_routing(self) -> None:
        one = problem([6, 2, 4], [1, 2], 2, routing="weighted")
        priced = evaluate(one, plan([0, 1, 0, 2], [2, 2], split=[[0.25, 1, 0.75, 1]]))
        assert priced.rank_tokens.tolist() == [[[3.5, 8.5]]]
        assert priced.objective == 4.25

    def test_shares_may_differ_by_window(self) -> None:
        one = problem([[[4, 0]], [[2, 8]]], [1, 1], 2, routing="weighted")
        split = [[[0.25, 1, 0.75]], [[1, 1, 0]]]
        one = replace(one, cluster=Cluster(speeds=[1, 1], slots=[2, 1]))
        priced = evaluate(one, plan([0, 1, 0], [2, 1], split=split))
        assert priced.rank_tokens.tolist() == [[[1.0, 3.0]], [[10.0, 0.0]]]
        assert priced.step_seconds.tolist() == [3.0, 10.0]

    def test_a_rank_with_k_of_c_copies_gets_k_shares_of_c(self) -> None:
        twice = plan([0, 0, 1, 0, 2, -1], [3, 3], allow_duplicates=True)
        priced = evaluate(problem([6, 2, 4], [1, 1], 3), twice)
        assert priced.rank_tokens.tolist() == [[[2 / 3 * 6 + 2, 1 / 3 * 6 + 4]]]
        assert priced.violations == ("layer 0: rank 0 holds two replicas of one expert",)
        assert not priced.legal

    def test_base_load_is_run_whatever_the_plan_also_without_slots(self) -> None:
        one = problem([6, 2], [1, 2, 1], [2, 0, 0], base_load=[1, 4, 9.5])
        priced = evaluate(one, plan([0, 1], [2, 0, 0]))
        assert priced.rank_seconds.tolist() == [[[9.0, 2.0, 9.5]]]
        assert priced.objective == 9.5

    def test_with_passes_all_times_are_per_forward_pass(self) -> None:
        one = problem([[[8, 4]], [[9, 3]]], [2, 1], 1, passes=[4, 3])
        priced = evaluate(one, plan([0, 1], [1, 1]))
        assert priced.makespan.tolist() == [[1.0], [1.5]]
        assert priced.objective == pytest.approx(4 / 7 * 1.0 + 3 / 7 * 1.5)

    def test_layers_weigh_by_their_calls_per_step(self) -> None:
        one = problem([[1, 2], [4, 3]], [1, 1], 1, layer_weight=[1, 2.5])
        assert evaluate(one, plan([[0, 1], [0, 1]], [1, 1])).objective == 2 + 2.5 * 4

    def test_the_worst_window_is_that_of_the_sum_over_layers(self) -> None:
        loads = [[[2, 0], [1, 0]], [[1, 0], [2, 0]]]
        placed = plan([[0, 1], [0, 1]], [1, 1])
        for objective, price in (("worst", 3.0), ("mean", 3.0)):
            assert (
                evaluate(problem(loads, [1, 1], 1, objective=objective), placed).objective == price
            )
        uneven = problem(loads, [1, 1], 1, objective="worst", layer_weight=[2, 1])
        assert evaluate(uneven, placed).step_seconds.tolist() == [5.0, 4.0]
        assert evaluate(uneven, placed).objective == 5.0

    def test_empty_layers_cost_nothing_and_are_in_balance(self) -> None:
        priced = evaluate(problem([0, 0], [1, 2], 1), plan([0, 1], [1, 1]))
        assert priced.objective == 0
        assert priced.ratio.tolist() == [[1.0]]
        assert priced.balancedness.tolist() == [[1.0]]
        assert priced.imbalance == 1.0

    def test_imbalance_of_several_layers_is_total_over_total(self) -> None:
        one = problem([[3, 1], [1, 1]], [1, 1], 1)
        priced = evaluate(one, plan([[0, 1], [0, 1]], [1, 1]))
        assert priced.ratio.tolist() == [[1.5, 1.0]]
        assert priced.imbalance == 4 / 3


class TestFit:
    ONE = problem([[1, 2], [1, 2]], [1, 1], 1)

    @pytest.mark.parametrize(
        ("other", "message"),
        [
            (plan([0, 1], [1, 1]), "Plan has 1 layers but the problem has 2"),
            (plan([[0, 1, 2]] * 2, [2, 1]), "Plan has 3 experts but the problem has 2"),
            (plan([[0, 1]] * 2, [2, 0]), r"\[2, 0\] slots per rank but the problem has \[1, 1\]"),
        ],
    )
    def test_a_plan_for_another_shape_is_refused(self, other: Plan, message: str) -> None:
        with pytest.raises(PlanError, match=message):
            evaluate(self.ONE, other)

    def test_shares_that_the_routing_ignores_are_refused(self) -> None:
        with pytest.raises(PlanError, match="routing is even"):
            evaluate(self.ONE, plan([[0, 1]] * 2, [1, 1], split=np.ones((2, 2))))


PROBLEMS = tiny_problems(max_layers=2, max_windows=2)


@given(st.data(), PROBLEMS)
def test_no_token_is_lost(data: st.DataObject, one: Problem) -> None:
    priced = evaluate(one, data.draw(legal_plans(one)))
    wanted = one.tokens.sum(axis=2) + one.base.sum(axis=2)
    assert priced.rank_tokens.sum(axis=2) == pytest.approx(wanted, rel=1e-12, abs=1e-300)


@given(st.data(), PROBLEMS)
def test_a_loop_over_slots_says_the_same(data: st.DataObject, one: Problem) -> None:
    placed = data.draw(legal_plans(one))
    tokens = one.base.copy()
    for window, layer in np.ndindex(one.windows, one.layers):
        for slot, expert in enumerate(placed.slots[layer].tolist()):
            if expert >= 0:
                copies = (placed.slots[layer] == expert).sum()
                rank = int(np.searchsorted(np.cumsum(placed.rank_slots), slot, side="right"))
                tokens[window, layer, rank] += one.tokens[window, layer, expert] / copies
    assert evaluate(one, placed).rank_tokens == pytest.approx(tokens, rel=1e-12, abs=1e-300)


@given(st.data(), PROBLEMS, st.sampled_from([0.5, 3.0, 1e-4, 1e6]))
def test_scaling_loads_scales_time(data: st.DataObject, one: Problem, factor: float) -> None:
    placed = data.draw(legal_plans(one))
    more = replace(one, loads=one.loads.scale(factor), base_load=one.base_load * factor)
    before, after = evaluate(one, placed), evaluate(more, placed)
    assert after.makespan == pytest.approx(before.makespan * factor, rel=1e-12, abs=1e-300)
    assert after.objective == pytest.approx(before.objective * factor, rel=1e-12, abs=1e-300)


@given(st.data(), PROBLEMS, st.sampled_from([0.5, 3.0, 1e-4, 1e6]))
def test_scaling_speeds_divides_time(data: st.DataObject, one: Problem, factor: float) -> None:
    placed = data.draw(legal_plans(one))
    fast = replace(one, cluster=replace(one.cluster, speeds=one.cluster.speeds * factor))
    before, after = evaluate(one, placed), evaluate(fast, placed)
    assert after.makespan * factor == pytest.approx(before.makespan, rel=1e-12, abs=1e-300)


@given(st.data(), PROBLEMS)
def test_relabelling_ranks_changes_labels_only(data: st.DataObject, one: Problem) -> None:
    placed = data.draw(legal_plans(one))
    order = np.array(data.draw(st.permutations(range(one.ranks))))
    cluster = one.cluster
    other = replace(
        one,
        cluster=replace(cluster, speeds=cluster.speeds[order], slots=cluster.slots[order]),
        base_load=one.base[:, :, order],
    )
    parts = np.split(placed.slots, np.cumsum(cluster.slots)[:-1], axis=1)
    moved = Plan(
        slots=np.concatenate([parts[g] for g in order], axis=1),
        rank_slots=other.cluster.slots,
        experts=one.experts,
    )
    before, after = evaluate(one, placed), evaluate(other, moved)
    assert (after.rank_seconds == before.rank_seconds[:, :, order]).all()
    assert after.objective == before.objective
    assert other.fluid == pytest.approx(one.fluid, rel=1e-12, abs=1e-300)


@given(st.data(), PROBLEMS)
def test_relabelling_experts_changes_nothing(data: st.DataObject, one: Problem) -> None:
    placed = data.draw(legal_plans(one))
    order = np.array(data.draw(st.permutations(range(one.experts))))
    other = replace(one, loads=replace(one.loads, tokens=one.loads.tokens[:, :, order]))
    names = np.append(np.argsort(order), -1)  # EMPTY stays EMPTY
    moved = Plan(slots=names[placed.slots], rank_slots=placed.rank_slots, experts=one.experts)
    assert (evaluate(other, moved).rank_seconds == evaluate(one, placed).rank_seconds).all()


@given(st.data(), PROBLEMS)
def test_no_plan_beats_the_fluid_bound_and_balance_is_at_most_one(
    data: st.DataObject, one: Problem
) -> None:
    priced = evaluate(one, data.draw(legal_plans(one)))
    assert (priced.ratio >= 1 - 1e-12).all()
    assert priced.imbalance >= 1 - 1e-12
    assert (priced.balancedness <= 1 + 1e-12).all()
    assert (priced.balancedness > 0).all()


@given(st.data(), tiny_problems(max_layers=2, max_windows=2, routing="even"))
def test_windows_are_priced_as_if_each_stood_alone(data: st.DataObject, one: Problem) -> None:
    placed = data.draw(legal_plans(one))
    priced = evaluate(one, placed)
    for window in range(one.windows):
        alone = replace(
            one,
            loads=one.loads.select([window]),
            base_load=one.base[[window]],
            window_weight=None,
        )
        assert (evaluate(alone, placed).makespan[0] == priced.makespan[window]).all()
    if one.objective == "worst":
        assert priced.objective == priced.step_seconds.max()
    else:
        mean = (priced.step_seconds * one.window_weight).sum()
        assert priced.objective == pytest.approx(mean, rel=1e-12, abs=1e-300)


@given(st.data(), tiny_problems(max_layers=2, max_windows=3))
def test_a_plan_looks_better_on_the_sum_than_it_is(data: st.DataObject, one: Problem) -> None:
    placed = data.draw(legal_plans(one))
    summed = evaluate(one.aggregate(), placed).makespan[0]
    each = evaluate(one, placed).makespan.sum(axis=0)
    assert (summed <= each * (1 + 1e-12) + 1e-300).all()


@given(st.data(), tiny_problems(constraints=True, max_layers=2))
def test_a_plan_is_legal_if_no_constraint_speaks_up(data: st.DataObject, one: Problem) -> None:
    placed = data.draw(legal_plans(one))
    priced = evaluate(one, placed)
    broken = [r for r in one.constraints if r.violations(placed, one.cluster, priced.rank_tokens)]
    assert priced.legal == (not broken)
    held = np.zeros_like(one.allowed)
    for layer, row in enumerate(placed.by_rank(placed.slots)):
        for rank, experts in enumerate(row):
            held[layer, experts[experts >= 0], rank] = True
    assert (not broken) == (not (one.pinned & ~held).any() and not (held & ~one.allowed).any())


def test_violations_are_those_of_all_constraints() -> None:
    one = problem([1, 2], [1, 1], [2, 1], constraints=[Pin(0, 1), Pin(1, 1)])
    placed = plan([0, 1, 1], [2, 1])
    assert evaluate(one, placed).violations == (
        "layer 0: expert 0 is pinned to rank 1 but not there",
    )


def test_token_units_stay_token_units() -> None:
    one = Problem(
        LoadHistogram(tokens=[[4.0]]), Cluster(speeds=[2], slots=[1], speed_unit="relative")
    )
    assert evaluate(one, plan([0], [1])).objective == 2.0
    assert one.cluster.time_unit == "token units"
