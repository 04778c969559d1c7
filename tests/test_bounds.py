from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplace import bound_kernels
from moeplace.arguments import ARGUMENTS, row_of
from moeplace.bounds import lower_bound, mean_bound, recompute
from moeplace.claims import Bound
from moeplace.constraints import MaxMoves, NodeGroups
from moeplace.errors import CertificateError
from moeplace.evaluate import evaluate
from moeplace.hardware import Cluster
from moeplace.loads import LoadHistogram
from moeplace.plan import Plan
from moeplace.problem import Problem
from moeplace.solve import solve
from tests.brute_force import optimum
from tests.strategies import legal_plans, plan, problem, tiny_problems


def grouped(loads: list[float], slots: int) -> Problem:
    """Two nodes of two ranks; the first half of the experts is one group, the rest the other."""
    cluster = Cluster.from_speeds([1, 1, 1, 1], slots, nodes=2)
    return Problem(LoadHistogram(tokens=[loads]), cluster, constraints=[NodeGroups(2)])


def stale(loads: list[float], moves: int) -> Problem:
    """Experts 0 and 1 lie on the slow rank, 2 on the fast one, a slot is free on each."""
    current = plan([0, 1, -1, 2, -1], [3, 2])
    return problem(loads, [1, 2], [3, 2], constraints=[MaxMoves(current, per_layer=moves)])


#: Problems on which one argument decides, with the bound computed by hand.
DECIDED: dict[str, tuple[Problem, str, float]] = {
    "base load of a rank without slots": (
        problem([1], [1, 1], [1, 0], base_load=[0, 5]),
        "base load",
        5,
    ),
    "all ranks together": (problem([3, 1], [1, 1], 2), "fluid", 2),
    "all ranks together, over a base load": (
        problem([3, 2], [1, 1], 2, base_load=[2, 0]),
        "fluid",
        3.5,
    ),
    # the fast rank may hold one expert of 1, the slow one runs the other two
    "few slots on the fast rank": (problem([1, 1, 1], [1, 2], [2, 1]), "slot cap", 2),
    # two copies lie on ranks of speed 2 and 1: the slower runs 9 / 2
    "one hot expert, even": (problem([9, 1], [2, 1, 1], 1), "even copies", 4.5),
    # two copies run 9 together at speed 2 + 1
    "one hot expert, weighted": (
        problem([9, 1], [2, 1, 1], 1, routing="weighted"),
        "hot expert",
        3,
    ),
    # beside the hottest lies at least one other
    "a hot expert and its neighbour": (problem([10, 2, 2, 2], [1, 1], 2), "hot expert", 12),
    # one spare slot cannot help both
    "two hot experts, one spare slot": (
        problem([6, 6], [1, 1, 1], 1, routing="weighted"),
        "joint copies",
        6,
    ),
    # any two of the hot ones on one rank take 12; apart, two of them have a neighbour, and the
    # spare slot frees one of these at most
    "three hot experts apart": (
        problem([6, 6, 6, 2, 2], [1, 1, 1], 2, routing="weighted"),
        "hot experts",
        8,
    ),
    # two of the three hottest share a rank, and its third slot
    "three hot experts on two ranks": (problem([5, 5, 5, 1, 1, 1], [1, 1], 3), "no replicas", 11),
    "an odd number of tokens on two ranks": (
        problem([3, 3, 2, 2, 2, 1], [1, 1], 3),
        "whole tokens",
        7,
    ),
    "whole tokens of two passes": (
        problem([3, 3, 2, 2, 2, 1], [1, 1], 3, passes=2),
        "whole tokens",
        3.5,
    ),
    # two of 8 with a neighbour each need more than ranks of 8: one is cut, and then holds two ranks
    "two hot experts and one spare slot": (
        problem([8, 8, 3, 2, 1], [1, 1, 1], 2, routing="weighted"),
        "hot experts",
        8.5,
    ),
    # each group fills a node
    "a hot group on one node": (grouped([3, 3, 3, 3, 1, 1, 1, 1], 2), "nodes: hot expert", 6),
    # nothing may move: both experts stay on the slow rank
    "no moves": (stale([4, 3, 1], 0), "moves", 7),
    "one move": (stale([4, 3, 1], 1), "moves", 3),
}


@pytest.mark.parametrize("name", DECIDED)
def test_each_argument_decides_where_it_should_and_is_reached(name: str) -> None:
    one, source, value = DECIDED[name]
    bound = lower_bound(one)
    assert bound.source.tolist() == [[source]]
    assert bound.per_layer == pytest.approx(value, rel=1e-11)
    assert bound.total == bound.per_layer[0, 0]
    assert bound.sources == {source: 1}
    recompute(one, bound)
    assert optimum(one) == pytest.approx(value, rel=1e-9), "it is reached: none could be higher"


def test_hot_experts_are_packed_and_a_plan_reaches_the_bound() -> None:
    # too large for brute force: the plan itself proves that no bound could be higher
    loads = [11, 11, 9, 5, 3, 3, 2, 2, 1, 1, 1, 1, 1]
    one = problem(loads, [1] * 5, 3, routing="weighted")
    bound = lower_bound(one)
    assert bound.source.tolist() == [["hot packing"]]
    assert bound.total == pytest.approx(11, rel=1e-11)
    recompute(one, bound)
    assert solve(one, gap=0.0, work_limit=1_000_000).objective == pytest.approx(11, rel=1e-9)


def test_every_argument_has_its_example() -> None:
    names = {source.removeprefix("nodes: ") for _, source, _ in DECIDED.values()}
    assert names == {*ARGUMENTS, "moves"} - {"hot packing"}  # which has the test above


def test_one_fast_rank_cannot_use_its_speed_with_too_few_slots() -> None:
    speeds = np.array([1.3] + [30.7 / 31] * 31)
    bound = lower_bound(problem(np.ones(257), speeds, 9))
    fluid = 257 / 32
    assert bound.source.tolist() == [["slot cap"]]
    assert bound.total / fluid == pytest.approx(1.0058, abs=5e-5)
    # the fast rank holds nine experts, the others run the rest
    assert bound.total == pytest.approx((257 - 9) / 30.7, rel=1e-11)


def test_loads_per_window_and_layer_are_bounded_apart_and_summed_first() -> None:
    loads = [[[2, 0], [1, 0]], [[1, 0], [2, 0]]]
    for objective, routing in (("worst", "even"), ("mean", "weighted")):
        bound = lower_bound(problem(loads, [1], 2, objective=objective, routing=routing))
        assert bound.per_layer == pytest.approx(np.array([[2, 1], [1, 2]]))
        assert bound.total == pytest.approx(3)


def test_layers_without_tokens_are_bounded_by_zero() -> None:
    bound = lower_bound(problem([[0, 0], [1, 1]], [1, 1], 1))
    assert bound.per_layer[0, 0] == 0
    recompute(problem([[0, 0], [1, 1]], [1, 1], 1), bound)


@pytest.mark.parametrize(("load", "speed"), [(5e-324, 4.0), (1e-310, 1e18), (1e-300, 1e-8)])
def test_loads_too_small_to_time_end_the_search(load: float, speed: float) -> None:
    assert lower_bound(problem([load, load], [speed, speed], 2)).total <= 2 * load / speed


def test_nodes_may_have_any_numbers() -> None:
    cluster = Cluster(speeds=[1, 1], slots=[1, 1], nodes=[3, 2**20])
    one = Problem(LoadHistogram(tokens=[[1, 2]]), cluster, constraints=[NodeGroups(2)])
    assert lower_bound(one).total == pytest.approx(2)


# The compiled search and the arguments in NumPy


@st.composite
def rows(draw: st.DrawFn) -> Problem:
    """One layer of up to 24 experts on up to 6 ranks, often with few spare slots."""
    ranks, experts = draw(st.integers(1, 6)), draw(st.integers(1, 24))
    whole = draw(st.booleans())
    entry = st.integers(0, 9) if whole else st.floats(0, 10, allow_subnormal=False)
    loads = draw(st.lists(entry, min_size=experts, max_size=experts))
    hot = draw(st.integers(0, experts - 1))
    loads[hot] *= draw(st.sampled_from([1, 1, 5, 20]))
    most = -(-experts // ranks) + 1
    slots = draw(st.lists(st.integers(0, most), min_size=ranks, max_size=ranks))
    for g in range(ranks):
        slots[g] += max(0, min(experts, experts - sum(slots)))
    base = st.lists(st.floats(0, 5, allow_subnormal=False), min_size=ranks, max_size=ranks)
    return problem(
        loads,
        draw(st.lists(st.floats(0.3, 1.5), min_size=ranks, max_size=ranks)),
        slots,
        routing=draw(st.sampled_from(["even", "weighted"])),
        base_load=draw(st.one_of(st.none(), base)),
    )


@given(rows())
@settings(max_examples=4 * settings().max_examples)
def test_the_source_refutes_the_bound_and_no_argument_refutes_more(one: Problem) -> None:
    bound = lower_bound(one)
    value, row = float(bound.per_layer[0, 0]), row_of(one, 0, 0)
    if value > 0:
        assert ARGUMENTS[str(bound.source[0, 0])](row, value * (1 - 1e-11))
        above = [name for name, refutes in ARGUMENTS.items() if refutes(row, value * (1 + 1e-9))]
        assert above == []
    recompute(one, bound)


@given(rows(), st.floats(0.3, 3.0))
@settings(max_examples=4 * settings().max_examples)
def test_each_compiled_argument_is_its_numpy_twin(one: Problem, factor: float) -> None:
    row = row_of(one, 0, 0)
    seconds = factor * float(one.fluid[0, 0])
    if row.loads.sum() == 0:
        return  # the search leaves such layers out
    used = np.sort(row.caps[row.caps > 0])
    fewest, most = (np.concatenate([[0], caps.cumsum()]) for caps in (used, used[::-1]))
    prefix = np.concatenate([[0.0], row.loads.cumsum()])
    rest = (row.loads, prefix, row.base, row.knots, row.caps, fewest, most, row.unit)
    rest += (row.capacity, row.copies)
    for kind, (name, refutes) in enumerate(ARGUMENTS.items()):
        applies = {
            "base load": False,  # these two are where the search starts
            "fluid": False,
            "even copies": row.even,
            "hot experts": row.spare < used.size,
            "no replicas": row.spare == 0,
            "whole tokens": row.spare == 0 and row.unit > 0,
        }
        if applies.get(name, True):
            assert bound_kernels._refutes(kind, seconds, *rest) == refutes(row, seconds), name


def test_kinds_are_numbered_in_the_order_of_the_arguments() -> None:
    names = [name.upper().replace(" ", "_").replace("BASE_LOAD", "BASE") for name in ARGUMENTS]
    assert [getattr(bound_kernels, name) for name in names] == list(range(len(ARGUMENTS)))


# True to brute force


@given(tiny_problems())
@settings(max_examples=6 * settings().max_examples)
def test_no_argument_refutes_the_true_optimum(one: Problem) -> None:
    best, row = optimum(one), row_of(one, 0, 0)
    refuting = [name for name, refutes in ARGUMENTS.items() if refutes(row, best * (1 + 1e-9))]
    assert refuting == []
    assert lower_bound(one).total <= best * (1 + 1e-9)


@given(tiny_problems(max_experts=4, max_layers=2, max_windows=2, constraints=True, limits=True))
def test_the_total_is_never_above_the_true_optimum(one: Problem) -> None:
    bound = lower_bound(one)
    assert bound.total <= optimum(one) * (1 + 1e-9)
    recompute(one, bound)


@given(st.data(), tiny_problems(max_experts=5, max_layers=2))
def test_with_few_moves_the_bound_holds_too(data: st.DataObject, one: Problem) -> None:
    counts = st.one_of(st.none(), st.integers(0, 3))
    rule = MaxMoves(
        data.draw(legal_plans(one)), per_layer=data.draw(counts), total=data.draw(counts)
    )
    budget = replace(one, constraints=[rule])
    bound = lower_bound(budget)
    assert bound.total <= optimum(budget) * (1 + 1e-9)
    assert (bound.per_layer >= lower_bound(one).per_layer).all()
    recompute(budget, bound)


@given(st.data(), tiny_problems(max_experts=5, max_layers=2))
def test_with_groups_on_nodes_the_bound_holds_too(data: st.DataObject, one: Problem) -> None:
    group = st.lists(st.integers(0, one.experts - 1), min_size=one.experts, max_size=one.experts)
    nodes = data.draw(st.lists(st.integers(0, 2), min_size=one.ranks, max_size=one.ranks))
    apart = replace(
        one,
        cluster=replace(one.cluster, nodes=nodes),
        constraints=[NodeGroups(np.array(data.draw(group)))],
    )
    bound = lower_bound(apart)
    assert bound.total <= optimum(apart) * (1 + 1e-9)
    recompute(apart, bound)


@given(st.data(), tiny_problems(max_layers=2, max_windows=2))
def test_no_plan_beats_its_bound(data: st.DataObject, one: Problem) -> None:
    priced = evaluate(one, data.draw(legal_plans(one)))
    bound = lower_bound(one)
    assert (priced.makespan >= bound.per_layer * (1 - 1e-9)).all()
    assert priced.objective >= bound.total * (1 - 1e-9)


@given(st.data(), tiny_problems(max_layers=2, max_windows=3))
def test_the_bound_on_the_mean_load_is_below_every_mean_of_makespans(
    data: st.DataObject, one: Problem
) -> None:
    priced = evaluate(one, data.draw(legal_plans(one)))
    mean = (priced.makespan * one.window_weight[:, None]).sum(axis=0)
    assert (mean_bound(one) <= mean * (1 + 1e-9)).all()


# Relations


@given(rows(), st.sampled_from([0.5, 3.0, 1e-6, 1e6]))
def test_scaling_speeds_divides_the_bound(one: Problem, factor: float) -> None:
    fast = replace(one, cluster=replace(one.cluster, speeds=one.cluster.speeds * factor))
    assert lower_bound(fast).total * factor == pytest.approx(lower_bound(one).total, rel=1e-9)


@given(st.data(), rows())
def test_the_order_of_ranks_and_experts_does_not_matter(data: st.DataObject, one: Problem) -> None:
    ranks = np.array(data.draw(st.permutations(range(one.ranks))))
    experts = np.array(data.draw(st.permutations(range(one.experts))))
    other = problem(
        one.loads.tokens[:, :, experts],
        one.cluster.speeds[ranks],
        one.cluster.slots[ranks],
        routing=one.routing,
        base_load=one.base[:, :, ranks],
    )
    assert lower_bound(other).total == pytest.approx(lower_bound(one).total, rel=1e-9)


@given(st.data(), rows())
def test_one_more_slot_never_lifts_the_bound(data: st.DataObject, one: Problem) -> None:
    slots = one.cluster.slots.copy()
    slots[data.draw(st.integers(0, one.ranks - 1))] += 1
    more = replace(one, cluster=replace(one.cluster, slots=slots))
    assert lower_bound(more).total <= lower_bound(one).total * (1 + 1e-9)


@given(st.data(), rows())
def test_a_faster_rank_never_lifts_the_bound(data: st.DataObject, one: Problem) -> None:
    speeds = one.cluster.speeds.copy()
    speeds[data.draw(st.integers(0, one.ranks - 1))] *= 1.25
    more = replace(one, cluster=replace(one.cluster, speeds=speeds))
    assert lower_bound(more).total <= lower_bound(one).total * (1 + 1e-9)


@given(rows())
def test_weighted_routing_can_do_all_that_even_routing_can(one: Problem) -> None:
    even, weighted = (lower_bound(replace(one, routing=r)).total for r in ("even", "weighted"))
    assert weighted <= even * (1 + 1e-12)


# Certificates

TWO = problem(
    [[[9, 1], [3, 1]], [[4, 4], [0, 6]]], [2, 1, 1], 1, objective="worst", layer_weight=[1, 2]
)


def raised(bound: Bound, by: float) -> Bound:
    per_layer = bound.per_layer.copy()
    per_layer[1, 0] *= 1 + by
    return replace(bound, per_layer=per_layer)


def renamed(bound: Bound, name: str) -> Bound:
    source = bound.source.astype("<U20")
    source[0, 0] = name
    return replace(bound, source=source)


TAMPERED: dict[str, tuple[Callable[[Bound], Bound], str]] = {
    "raised value": (lambda b: raised(b, 1e-9), "window 1, layer 0 does not follow from"),
    "infinite value": (lambda b: raised(b, float("inf")), "does not follow"),
    "value that is not a number": (lambda b: raised(b, float("nan")), "does not follow"),
    "negative value": (lambda b: raised(b, -2.0), "does not follow"),
    "another argument": (lambda b: renamed(b, "fluid"), "window 0, layer 0 does not follow"),
    "argument that does not apply": (lambda b: renamed(b, "no replicas"), "does not follow"),
    "nodes without groups": (lambda b: renamed(b, "nodes: fluid"), "unknown argument"),
    "moves without a budget": (lambda b: renamed(b, "moves"), "does not follow"),
    "made-up argument": (lambda b: renamed(b, "trust me"), "unknown argument 'trust me'"),
    "missing window": (
        lambda b: replace(b, per_layer=b.per_layer[:1], source=b.source[:1]),
        r"shape \(1, 2\), the problem has .* \(2, 2\)",
    ),
    "missing sources": (lambda b: replace(b, source=b.source[:, :1]), "shape"),
    "raised total": (lambda b: replace(b, total=b.total * (1 + 1e-9)), "in total"),
    "total that is not a number": (lambda b: replace(b, total=float("nan")), "in total"),
    "infinite total": (lambda b: replace(b, total=float("inf")), "in total"),
    "total said to be coupled": (
        lambda b: replace(b, total=b.total * 1.1, coupled=True),
        "in total",
    ),
}


def test_a_true_certificate_is_accepted() -> None:
    recompute(TWO, lower_bound(TWO))


@pytest.mark.parametrize("name", TAMPERED)
def test_a_tampered_certificate_is_refused(name: str) -> None:
    tamper, message = TAMPERED[name]
    bound = lower_bound(TWO)
    assert bound.source[0, 0] == "even copies"
    with pytest.raises(CertificateError, match=message):
        recompute(TWO, tamper(bound))


def test_a_lower_claim_is_still_a_bound() -> None:
    bound = lower_bound(TWO)
    recompute(TWO, replace(raised(bound, -0.5), total=bound.total * 0.1))


def test_a_certificate_is_refused_for_another_problem() -> None:
    slower = replace(TWO, cluster=replace(TWO.cluster, speeds=[3, 2, 2]))
    with pytest.raises(CertificateError, match="does not follow"):
        recompute(slower, lower_bound(TWO))
    with pytest.raises(CertificateError, match="even copies"):
        recompute(replace(TWO, routing="weighted"), lower_bound(TWO))


def test_a_raised_claim_about_moves_is_refused() -> None:
    one = stale([4, 3, 1], 0)
    bound = lower_bound(one)
    with pytest.raises(CertificateError, match="does not follow from 'moves'"):
        recompute(one, replace(bound, per_layer=bound.per_layer * (1 + 1e-9)))


def test_moves_in_all_couple_the_layers_and_the_coupled_total_is_checked() -> None:
    current = Plan(slots=[[0, 1, -1, 2, -1]] * 3, rank_slots=[3, 2], experts=3)
    rule = MaxMoves(current, total=1)
    one = problem([[4, 3, 1]] * 3, [1, 2], [3, 2], constraints=[rule])
    bound = lower_bound(one)
    assert bound.coupled
    # each layer may use the one move, but not all three
    assert bound.per_layer == pytest.approx(3.0)
    assert bound.total == pytest.approx(7 + 7 + 3)
    assert bound.total <= optimum(one)
    recompute(one, bound)
    with pytest.raises(CertificateError, match="in total"):
        recompute(one, replace(bound, total=bound.total * (1 + 1e-9)))
    with pytest.raises(CertificateError, match="in total"):
        recompute(one, replace(bound, coupled=False))
