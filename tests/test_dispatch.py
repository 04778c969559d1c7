from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplace.dispatch import FIXED, shares, sources, waterfill
from moeplace.errors import PlanError, ProblemError
from moeplace.evaluate import evaluate
from moeplace.plan import Plan
from moeplace.problem import Problem
from tests.strategies import legal_plans, plan, problem, tiny_problems

EVEN = problem([4, 2, 1], [1, 1], [2, 3])
WEIGHTED = problem([4, 2, 1], [1, 1], [2, 3], routing="weighted")


@pytest.mark.parametrize("one", [EVEN, WEIGHTED])
def test_without_shares_the_replicas_share_evenly(one: object) -> None:
    placed = plan([0, 1, 2, 0, -1], [2, 3])
    assert shares(one, placed).tolist() == [[0.5, 1.0, 1.0, 0.5, 0.0]]  # type: ignore[arg-type]


def test_two_copies_on_one_rank_take_two_shares() -> None:
    twice = plan([0, 1, 2, 0, 0], [2, 3], allow_duplicates=True)
    assert shares(EVEN, twice)[0] == pytest.approx([1 / 3, 1, 1, 1 / 3, 1 / 3])


def test_under_weighted_routing_stored_shares_rule() -> None:
    split = [[0.25, 1, 1, 0.75, 0]]
    assert shares(WEIGHTED, plan([0, 1, 2, 0, -1], [2, 3], split=split)).tolist() == split


def test_an_engine_that_shares_evenly_would_ignore_stored_shares() -> None:
    with pytest.raises(PlanError, match=r"routing is even: .* Drop the shares"):
        shares(EVEN, plan([0, 1, 2, 0, -1], [2, 3], split=[[0.5, 1, 1, 0.5, 0]]))


def test_shares_per_window_must_be_for_as_many_windows() -> None:
    split = np.array([[[0.5, 1, 1, 0.5, 0]]] * 2)
    with pytest.raises(PlanError, match="for 2 windows but the problem has 1"):
        shares(WEIGHTED, plan([0, 1, 2, 0, -1], [2, 3], split=split))


def test_each_layer_counts_its_own_replicas() -> None:
    two = problem([[1, 1], [1, 1]], [1, 1], [2, 1])
    placed = plan([[0, 1, 0], [0, 1, 1]], [2, 1])
    assert shares(two, placed).tolist() == [[0.5, 1, 0.5], [1, 0.5, 0.5]]


def ranks_used(problem: Problem, placed: Plan) -> list[list[tuple[int, ...]]]:
    """Slots that may serve each (layer, expert) and source rank, engine rules told rank by rank.

    A tuple of one slot where the rule decides; of all slots where ranks are dealt.
    """
    nodes = problem.cluster.nodes
    assert nodes is not None
    told = []
    for row in placed.slots:
        for expert in range(placed.experts):
            found = np.flatnonzero(row == expert).tolist()
            where = placed.rank_of_slot[found].tolist()
            choice = []
            for source in range(problem.ranks):
                own = [s for s, g in zip(found, where, strict=True) if g == source]
                near = [s for s, g in zip(found, where, strict=True) if nodes[g] == nodes[source]]
                if problem.routing == "ascend":
                    choice.append((found[source % len(found)],))
                elif own or len(found) > len(near) > 0:
                    choice.append(((own or near)[0],))
                else:
                    choice.append(tuple(found))
            told.append(choice)
    return told


@given(data=st.data())
def test_fixed_rules_use_the_replicas_that_each_source_rank_would(data: st.DataObject) -> None:
    one = data.draw(tiny_problems(routing=data.draw(st.sampled_from(FIXED)), max_ranks=6))
    nodes = data.draw(st.lists(st.integers(0, 2), min_size=one.ranks, max_size=one.ranks))
    one = replace(one, cluster=replace(one.cluster, nodes=nodes))
    placed = data.draw(legal_plans(one))
    used = sources(one, placed, data.draw(st.integers(0, 3)))
    for place, choice in enumerate(ranks_used(one, placed)):
        layer, expert = divmod(place, placed.experts)
        slots = np.flatnonzero(placed.slots[layer] == expert)
        sure = [sum(c == (s,) for c in choice) for s in slots]
        dealt = used[layer, slots] - (sure if len(slots) > 1 else 0)
        assert dealt.sum() + (sum(sure) if len(slots) > 1 else 0) == one.ranks
        assert dealt.min() >= 0
        assert dealt.max() - dealt.min() <= 1  # as evenly as possible
    assert np.array_equal(shares(one, placed), sources(one, placed) / one.ranks)
    evaluate(one, placed)


def test_sglang_static_prefers_the_rank_then_the_node_then_deals() -> None:
    one = problem([6, 1, 1, 1, 1], [1] * 6, [2] * 6, routing="sglang-static")
    one = replace(one, cluster=replace(one.cluster, nodes=[0, 0, 1, 1, 2, 2]))
    placed = plan([0, 1, 2, 3, 0, 4, 0, 1, 2, 3, 4, 1], [2] * 6)
    # expert 0 on ranks 0, 2 and 3: rank 1 uses rank 0's, ranks 4 and 5 are dealt two of three
    used = sources(one, placed)[0]
    assert used[[0, 4, 6]].sum() == 6
    assert sorted(used[[0, 4, 6]] - [2, 1, 1]) == [0, 1, 1]
    draws = {tuple(sources(one, placed, draw)[0, [0, 4, 6]].tolist()) for draw in range(20)}
    assert draws == {(3, 2, 1), (3, 1, 2), (2, 2, 2)}


def test_on_one_node_sglang_static_is_fair() -> None:
    one = problem([6, 1, 1], [1] * 6, [1] * 6, routing="sglang-static")
    placed = plan([0, 1, 0, 2, 0, -1], [1] * 6)
    assert sources(one, placed).tolist() == [[2, 6, 2, 6, 2, 0]]


def test_ascend_turns_through_the_replicas_in_slot_order() -> None:
    one = problem([6, 1], [1] * 5, [1] * 5, routing="ascend")
    placed = plan([1, 0, 0, -1, 0], [1] * 5)
    assert sources(one, placed).tolist() == [[5, 2, 2, 0, 1]]


def test_a_second_copy_on_the_rank_is_only_dealt_to() -> None:
    one = problem([6, 1], [1] * 4, [2] * 4, routing="sglang-static")
    twice = plan([0, 0, 1, -1, -1, -1, -1, -1], [2] * 4, allow_duplicates=True)
    used = sources(one, twice)[0]
    assert used[:2].sum() == 4
    assert used[1] in (1, 2)  # of three dealt
    assert used[2] == 4


def test_the_linear_program_levels_tokens_and_not_time() -> None:
    one = problem([4, 0], [1, 3], [2, 2], routing="sglang-lp")
    both = plan([0, 1, 0, -1], [2, 2])
    assert shares(one, both)[0, 0] == pytest.approx([0.5, 1, 0.5, 0])
    assert evaluate(one, both).makespan.tolist() == [[2.0]]  # by time it would be 1


@pytest.mark.parametrize("routing", ["sglang-static", "ascend", "sglang-lp"])
def test_an_engine_with_its_own_rule_would_ignore_stored_shares(routing: Any) -> None:
    one = replace(EVEN, routing=routing)
    with pytest.raises(PlanError, match=f"routing is {routing}: .* Drop the shares"):
        shares(one, plan([0, 1, 2, 0, -1], [2, 3], split=[[0.5, 1, 1, 0.5, 0]]))


def test_waterfill_pours_the_shared_expert_on_the_emptiest_ranks() -> None:
    one = problem([6, 3, 1], [1, 2, 1], [1, 1, 1])
    placed = plan([0, 1, 2], [1, 1, 1])
    assert evaluate(waterfill(one, placed, [3]), placed).rank_tokens.tolist() == [[[6, 3.5, 3.5]]]
    assert waterfill(one, placed, [[0]]).base.tolist() == [[[0, 0, 0]]]
    passes = problem([60, 30, 10], [1, 2, 1], [1, 1, 1], passes=[10])
    assert evaluate(waterfill(passes, placed, [30]), placed).rank_tokens.tolist() == [
        [[6, 3.5, 3.5]]
    ]
    for shared, said in (([1, 2], "must have the shape"), ([-1], "at least 0")):
        with pytest.raises(ProblemError, match=said):
            waterfill(one, placed, shared)
