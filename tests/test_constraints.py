import numpy as np
import pytest

from moeplace.constraints import Constraint, Forbid, MaxMoves, NodeGroups, Pin
from moeplace.errors import ProblemError
from moeplace.evaluate import evaluate
from moeplace.hardware import Cluster
from tests.strategies import plan, problem

TWO_LAYERS = plan([[0, 1, 2, 0], [1, 2, 0, 2]], [2, 2])
TWO_RANKS = Cluster(speeds=[1, 1], slots=[2, 2])
TOKENS = np.zeros((1, 2, 2))
TWO_NODES = Cluster(speeds=[1, 1], slots=[2, 2], nodes=[0, 1])


def test_a_pin_is_broken_in_every_layer_where_the_rank_lacks_the_expert() -> None:
    assert Pin(0, 0).violations(TWO_LAYERS, TWO_RANKS, TOKENS) == [
        "layer 1: expert 0 is pinned to rank 0 but not there"
    ]
    assert Pin(0, 1).violations(TWO_LAYERS, TWO_RANKS, TOKENS) == []


def test_a_forbid_is_broken_in_every_layer_where_the_rank_holds_the_expert() -> None:
    assert Forbid(2, 1).violations(TWO_LAYERS, TWO_RANKS, TOKENS) == [
        "layer 0: expert 2 is forbidden on rank 1 but there",
        "layer 1: expert 2 is forbidden on rank 1 but there",
    ]
    assert Forbid(1, 1).violations(TWO_LAYERS, TWO_RANKS, TOKENS) == []


def test_a_rule_for_one_layer_says_nothing_about_the_others() -> None:
    assert Pin(0, 0, layer=0).violations(TWO_LAYERS, TWO_RANKS, TOKENS) == []
    assert len(Pin(0, 0, layer=1).violations(TWO_LAYERS, TWO_RANKS, TOKENS)) == 1
    assert Forbid(0, 0, layer=1).violations(TWO_LAYERS, TWO_RANKS, TOKENS) == []


@pytest.mark.parametrize("kind", [Pin, Forbid])
@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ((3, 0), "names expert 3: experts are whole numbers from 0 to 2"),
        ((-1, 0), "names expert -1"),
        ((0, 2), "names rank 2: ranks are whole numbers from 0 to 1"),
        ((0, 0, 2), "names layer 2: layers are whole numbers from 0 to 1"),
        ((0.5, 0), "names expert 0.5"),
        ((True, 0), "names expert True"),
        (("0", 0), "names expert '0'"),
    ],
)
def test_rules_about_what_does_not_exist_are_refused(
    kind: type[Pin] | type[Forbid], rule: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ProblemError, match=message):
        problem([[1, 2, 3], [1, 2, 3]], [1, 1], 2, constraints=[kind(*rule)])


def test_rules_become_masks_that_planners_read() -> None:
    rules: list[Constraint] = [Pin(0, 1), Forbid(1, 0, layer=1)]
    one = problem([[1, 2], [1, 2]], [1, 1, 1], [2, 2, 0], constraints=rules)
    pinned = np.zeros((2, 2, 3), dtype=bool)
    pinned[:, 0, 1] = True
    allowed = np.ones((2, 2, 3), dtype=bool)
    allowed[1, 1, 0] = False
    allowed[:, :, 2] = False  # no slots there
    assert (one.pinned == pinned).all()
    assert (one.allowed == allowed).all()


def test_evaluate_lists_every_broken_rule() -> None:
    rules = [Pin(2, 0), Forbid(0, 0)]
    one = problem([1, 2, 3], [1, 1], 2, constraints=rules)
    priced = evaluate(one, plan([0, 1, 2, 0], [2, 2]))
    assert not priced.legal
    assert priced.violations == (
        "layer 0: expert 2 is pinned to rank 0 but not there",
        "layer 0: expert 0 is forbidden on rank 0 but there",
    )


def test_moves_are_counted_layer_by_layer_and_in_all() -> None:
    current = plan([[0, 1, 2, 1], [0, 1, 2, 1]], [2, 2])
    assert MaxMoves(current, per_layer=1).violations(TWO_LAYERS, TWO_RANKS, TOKENS) == [
        "layer 1: 2 copies are received, at most 1 may"
    ]
    assert MaxMoves(current, total=2).violations(TWO_LAYERS, TWO_RANKS, TOKENS) == [
        "3 copies are received in all, at most 2 may"
    ]
    assert MaxMoves(current, per_layer=2, total=3).violations(TWO_LAYERS, TWO_RANKS, TOKENS) == []
    assert MaxMoves(current).violations(TWO_LAYERS, TWO_RANKS, TOKENS) == []


def test_a_budget_of_moves_must_fit_the_problem() -> None:
    loads, current = [[1, 2, 3], [1, 2, 3]], TWO_LAYERS
    for rule, message in (
        (MaxMoves(current, per_layer=-1), "per_layer must be a whole number from 0, got -1"),
        (MaxMoves(current, total=1.5), "total must be a whole number from 0, got 1.5"),  # type: ignore[arg-type]
        (MaxMoves(current, total=True), "got True"),
        (MaxMoves("now"), "needs the current Plan, got str"),  # type: ignore[arg-type]
        (MaxMoves(plan([0, 1, 2, 0], [2, 2])), "other layers, experts or slots"),
    ):
        with pytest.raises(ProblemError, match=message):
            problem(loads, [1, 1], 2, constraints=[rule])
    with pytest.raises(ProblemError, match="other layers, experts or slots"):
        problem(loads, [1, 1], [1, 3], constraints=[MaxMoves(current)])


def test_the_budget_of_a_layer_is_never_more_than_its_slots() -> None:
    assert MaxMoves(TWO_LAYERS).allowance().tolist() == [4, 4]
    assert MaxMoves(TWO_LAYERS, per_layer=3).allowance().tolist() == [3, 3]
    assert MaxMoves(TWO_LAYERS, per_layer=99).allowance().tolist() == [4, 4]


def test_a_group_may_not_lie_on_two_nodes() -> None:
    rule = NodeGroups([0, 0, 1])
    assert rule.violations(plan([0, 1, 2, -1], [2, 2]), TWO_NODES, TOKENS) == []
    assert rule.violations(TWO_LAYERS, TWO_NODES, TOKENS) == [
        "layer 0: expert group 0 lies on nodes [0, 1], one is allowed",
        "layer 1: expert group 0 lies on nodes [0, 1], one is allowed",
        "layer 1: expert group 1 lies on nodes [0, 1], one is allowed",
    ]
    assert rule.violations(TWO_LAYERS, TWO_RANKS, TOKENS) == [], "both ranks are on one node"


def test_groups_are_given_by_number_or_for_each_expert() -> None:
    assert NodeGroups(2).of(4).tolist() == [0, 0, 1, 1]
    assert NodeGroups([3, 0, 3, 1]).of(4).tolist() == [2, 0, 2, 1], "gaps are closed"


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (2, "3 experts do not divide into 2 equal groups"),
        (0, "do not divide into 0"),
        (4, "do not divide into 4"),
        ([0, 1], "one entry for each of the 3 experts, got 2"),
        ([0, 1, -1], "at least 0"),
        ([0, 1, 0.5], "whole numbers"),
    ],
)
def test_groups_must_fit_the_experts(groups: object, message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        problem([1, 2, 3], [1, 1], 2, constraints=[NodeGroups(groups)])  # type: ignore[arg-type]


def test_moves_and_groups_may_be_given_once() -> None:
    for rule in (MaxMoves(TWO_LAYERS), NodeGroups(1)):
        with pytest.raises(ProblemError, match=f"{type(rule).__name__} may be given once"):
            problem([[1, 2, 3], [1, 2, 3]], [1, 1], 2, constraints=[rule, rule])


def test_whole_numbers_of_numpy_name_the_same_rule() -> None:
    assert Pin(np.int64(1), np.int64(0)) == Pin(1, 0)
    assert Pin(np.int64(1), np.int64(0)).key(2) == Pin(1, 0).key(2)
