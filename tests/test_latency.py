from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moeplace as mp
from moeplace._check import FloatArray
from moeplace.bounds import lower_bound, recompute
from moeplace.certificate import check, write_certificate
from moeplace.errors import ProblemError
from moeplace.evaluate import evaluate
from moeplace.exhaustive import Exhaustive
from moeplace.hardware import Cluster
from moeplace.latency import Planes, Table, tokens_by
from moeplace.problem import Problem
from tests.exact.cases import planes_optimum, with_planes
from tests.strategies import legal_plans

TIMES = st.sampled_from([0.5, 1.0, 1.5, 4.0, 9.0])


@st.composite
def tables(draw: st.DrawFn, ranks: int) -> Table:
    """Measured times that may fall, stay level or jump, but end with a rise."""
    points = draw(st.integers(1, 4))
    steps = st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=points, max_size=points)
    tokens = [np.cumsum(draw(steps)).tolist() for _ in range(ranks)]
    times = draw(
        st.lists(st.lists(TIMES, min_size=points, max_size=points), min_size=ranks, max_size=ranks)
    )
    for row in times:
        row[-1] = max(row) + 0.25
    return Table(tokens=tokens, seconds=times)  # type: ignore[arg-type]


@st.composite
def with_table(draw: st.DrawFn, routing: str) -> Problem:
    """A tiny problem of one layer whose ranks take measured times."""
    one = draw(with_planes(routing))
    table = draw(tables(one.ranks))
    cluster = Cluster.from_table(table.tokens, table.seconds, one.cluster.slots)
    return replace(one, cluster=cluster)


# Tables


def by_hand(table: Table, rank: int, tokens: float) -> float:
    """The definition, in words of one syllable."""
    n, t = table.tokens[rank].tolist(), table.seconds[rank].tolist()
    if tokens <= 0:
        return 0.0
    if tokens <= n[0]:
        return float(t[0])
    for (n0, t0), (n1, t1) in pairwise(zip(n, t, strict=True)):
        if tokens <= n1:
            return float(t0 + (tokens - n0) * (t1 - t0) / (n1 - n0))
    if len(n) == 1:
        return float(tokens * t[0] / n[0])
    slope = (t[-1] - t[-2]) / (n[-1] - n[-2])
    return float(t[-1] + (tokens - n[-1]) * slope)


@given(tables(2), st.floats(0.0, 20.0, allow_subnormal=False))
def test_a_table_is_linear_between_points_level_before_and_goes_on_beyond(
    table: Table, tokens: float
) -> None:
    found = table.at(np.full((1, 2), tokens))[0].tolist()
    assert found == pytest.approx([by_hand(table, g, tokens) for g in range(2)], rel=1e-12)


def test_times_that_fall_are_lifted_and_counted() -> None:
    table = Table(tokens=[1, 2, 4, 8], seconds=[[3, 2, 5, 6], [1, 2, 3, 4]])  # type: ignore[arg-type]
    assert table.seconds.tolist() == [[3, 3, 5, 6], [1, 2, 3, 4]]
    assert table.lifted.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("tokens", "seconds", "message"),
    [
        ([1, 1], [[1, 2]], "must ascend: rank 0 has 1 before 1"),
        ([1, 2], [[1, 1]], "nothing says what more tokens take"),
        ([1, 2], [[2, 1]], "last time of rank 0 is 1, not above"),
        ([0, 2], [[1, 2]], "above 0"),
        ([1, 2], [[1, float("inf")]], "finite"),
        ([1, 2], [[1, 2, 3]], r"shape \(1, 2\) and its seconds \(1, 3\)"),
    ],
)
def test_bad_tables_are_refused(tokens: list[float], seconds: object, message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        Table(tokens=tokens, seconds=seconds)  # type: ignore[arg-type]


def test_a_cluster_checks_its_table() -> None:
    cluster = Cluster.from_table([2, 4], [[1, 2], [1, 3]], 1)
    assert cluster.speeds.tolist() == [2.0, 2.0]
    for change, message in (
        ({"speeds": [1, 1, 1], "slots": [1, 1, 1], "nodes": None}, "3 ranks but the table has 2"),
        ({"speeds": [3, 2]}, "its tokens per second at best"),
        ({"speed_unit": "relative"}, "speeds must be in tokens/s"),
        ({"planes": Planes(startup=[0], activation=[0], compute=[1])}, "give one latency model"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ProblemError, match=message):
            replace(cluster, **change)  # type: ignore[arg-type]
    assert cluster.of([1]).table.seconds.tolist() == [[1, 3]]  # type: ignore[union-attr]


def test_a_model_that_is_not_linear_needs_passes() -> None:
    loads = mp.LoadHistogram(tokens=[[[1.0, 2.0]]])  # type: ignore[arg-type]
    for cluster in (
        Cluster.from_table([2, 4], [[1, 2], [1, 3]], 1),
        Cluster.from_planes([0.1], [0.1], [1.0], [1, 1], 1),
    ):
        with pytest.raises(ProblemError, match="need tokens per forward pass"):
            Problem(loads, cluster)


# The inverse


def models() -> st.SearchStrategy[Cluster]:
    small = st.sampled_from([0.0, 0.5, 2.0])
    planes = st.integers(1, 3).flatmap(
        lambda k: st.builds(
            lambda t, w, c, r: Cluster.from_planes(t, w, [1.0, *c], r, 1),
            *(st.lists(small, min_size=k, max_size=k) for _ in range(2)),
            st.lists(st.sampled_from([0.0, 0.2, 3.0]), min_size=k - 1, max_size=k - 1),
            st.lists(st.sampled_from([0.7, 1.0]), min_size=2, max_size=2),
        )
    )
    table = tables(2).map(lambda t: Cluster.from_table(t.tokens, t.seconds, 1))
    linear = st.just(Cluster.from_speeds([1.0, 1.5], 1))
    return st.one_of(linear, planes, table)


@given(models(), st.floats(0.01, 30.0))
def test_tokens_by_is_the_most_that_ends_in_time(cluster: Cluster, seconds: float) -> None:
    tokens = cluster.tokens_by(np.array([seconds]))
    assert tokens.tolist() == tokens_by(cluster.knots, np.array([seconds])).tolist()
    assert (cluster.seconds(tokens) <= seconds * (1 + 1e-9)).all()
    assert (cluster.seconds(tokens + 1e-6 * (1 + tokens)) > seconds).all()


@given(models(), st.lists(st.floats(0.0, 20.0), min_size=2, max_size=2))
def test_no_rank_beats_its_speed_and_more_tokens_never_take_less(
    cluster: Cluster, tokens: list[float]
) -> None:
    n = np.array(tokens)
    assert (cluster.seconds(n) >= n / cluster.speeds * (1 - 1e-12)).all()
    assert (cluster.seconds(n + 0.5) >= cluster.seconds(n)).all()


@given(models(), st.floats(0.0, 20.0), st.booleans())
def test_the_fluid_bound_is_where_ranks_together_run_the_tokens(
    cluster: Cluster, tokens: float, based: bool
) -> None:
    base = np.array([1.0, 2.0]) * based
    time = float(cluster.fluid_seconds(np.array(tokens), base))
    if tokens + base.sum() == 0:
        assert time == 0
        return
    room = np.maximum(cluster.tokens_by(np.array([time * (1 + 1e-9)])) - base, 0).sum()
    assert room >= tokens * (1 - 1e-6)
    less = np.maximum(cluster.tokens_by(np.array([time * (1 - 1e-9)])) - base, 0).sum()
    late = (cluster.seconds(base) > time * (1 - 1e-9)).any()
    assert late or less < tokens


# Bounds


@given(st.one_of(with_table("even"), with_planes("even")))
def test_no_bound_is_above_the_true_optimum_and_all_are_recomputed(one: Problem) -> None:
    bound = lower_bound(one)
    recompute(one, bound)
    best = planes_optimum(one)
    assert bound.total <= best * (1 + 1e-9)
    for window in range(one.windows):
        value = float(bound.per_layer[window, 0])
        assert Exhaustive(one, window, 0).refutes(value * (1 + 1e-9)) in (True, False)


@pytest.mark.parametrize("tokens", [1e-5, 0.3, 1.0, 2.0, 3.0])
def test_a_plane_without_compute_does_not_round_the_bound_up(tokens: float) -> None:
    cluster = Cluster.from_planes([0.0, 0.0], [0.0, 3.0], [1.0, 0.0], [0.7], [1])
    loads = mp.LoadHistogram(tokens=[[[tokens]]], passes=[1.0])  # type: ignore[arg-type]
    bound = lower_bound(Problem(loads, cluster)).total
    assert bound == pytest.approx(-3 * np.expm1(-tokens), rel=1e-9)


@given(with_table("even"))
def test_the_search_reaches_the_optimum_of_tiny_tables_and_proves_what_it_says(
    one: Problem,
) -> None:
    result = mp.solve(one, work_limit=20_000)
    assert result.objective <= planes_optimum(one) * (1 + 1e-6)
    assert result.lower_bound <= result.objective
    recompute(one, result.bound)


def test_a_table_that_is_not_convex_has_bounds_by_its_inverse() -> None:
    """Two ranks, 8 tokens each at best: a plateau up to 8, then a jump."""
    cluster = Cluster.from_table([1, 8, 9, 10], [[1, 1, 5, 5.5]] * 2, 2)
    loads = mp.LoadHistogram(tokens=[[[5.0, 5, 3, 3]]], passes=[1.0])  # type: ignore[arg-type]
    one = Problem(loads, cluster)
    result = mp.solve(one)
    assert result.objective == 1.0
    assert result.lower_bound == pytest.approx(1.0)
    uneven = Problem(replace(loads, tokens=[[[9.0, 5, 3, 3]]]), cluster)  # type: ignore[arg-type]
    assert lower_bound(uneven).total > 4.9  # 20 tokens pass the plateaus: no plan avoids the jump


@pytest.mark.parametrize("routing", ["even", "weighted"])
def test_a_certificate_of_a_table_is_checked_in_exact_numbers(
    routing: str, tmp_path: object
) -> None:
    cluster = Cluster.from_table([1, 8, 9, 10], [[1, 1.3, 5, 5.5], [1, 1.4, 2, 3]], 3)
    loads = mp.LoadHistogram(tokens=[[[9.0, 5, 3, 3]]], passes=[1.0])  # type: ignore[arg-type]
    result = mp.solve(Problem(loads, cluster, routing=routing))  # type: ignore[arg-type]
    write_certificate(result, f"{tmp_path}/c.json")
    checked = check(f"{tmp_path}/c.json")
    assert float(checked.objective) == pytest.approx(result.objective, rel=1e-12)


def test_exact_methods_refuse_tables() -> None:
    cluster = Cluster.from_table([2, 4], [[1, 2], [1, 3]], 1)
    loads = mp.LoadHistogram(tokens=[[[1.0, 2.0]]], passes=[1.0])  # type: ignore[arg-type]
    with pytest.raises(ProblemError, match="cannot hold a latency table"):
        mp.solve(Problem(loads, cluster), method="highs")


# Files


def test_an_instance_holds_its_table(tmp_path: object) -> None:
    cluster = Cluster.from_table([[2, 4], [1, 5]], [[1, 2], [1, 3]], [1, 2])
    loads = mp.LoadHistogram(tokens=[[[1.0, 2.0]]], passes=[4.0])  # type: ignore[arg-type]
    one = Problem(loads, cluster)
    mp.write_instance(one, f"{tmp_path}/one.json")
    again = mp.read_instance(f"{tmp_path}/one.json")
    assert again.digest() == one.digest()
    other = Cluster.from_table([[2, 4], [1, 5]], [[1, 2], [1, 2.9]], [1, 2])
    assert Problem(loads, other).digest() != one.digest()


def test_evaluate_prices_a_plan_by_the_table() -> None:
    cluster = Cluster.from_table([2, 4], [[1, 2], [1, 3]], 1)
    loads = mp.LoadHistogram(tokens=[[[6.0, 8.0]]], passes=[2.0])  # type: ignore[arg-type]
    plan = mp.Plan(slots=[[0, 1]], rank_slots=cluster.slots, experts=2)  # type: ignore[arg-type]
    priced: FloatArray = evaluate(Problem(loads, cluster), plan).rank_seconds
    assert priced.tolist() == [[[1.5, 3.0]]]


@given(st.one_of(with_table("weighted"), with_planes("weighted")), st.data())
def test_no_bound_is_above_a_plan_with_any_shares(one: Problem, data: st.DataObject) -> None:
    plan = data.draw(legal_plans(one))
    weights = st.lists(
        st.sampled_from([0.0, 0.1, 1.0]), min_size=plan.slots.size, max_size=plan.slots.size
    )
    share = np.where(plan.slots >= 0, np.array(data.draw(weights)) + 1e-9, 0.0)
    total = np.zeros((one.layers, one.experts + 1))
    np.add.at(total, (0, plan.slots[0]), share[0])
    split = share / np.where(plan.slots >= 0, total[0][plan.slots], 1.0)
    priced = evaluate(one, plan.with_split(split))
    assert lower_bound(one).total <= priced.objective * (1 + 1e-9)
    best = evaluate(one, mp.resplit(one, plan))
    assert lower_bound(one).total <= best.objective * (1 + 1e-9)
    assert best.objective <= evaluate(one, plan).objective * (1 + 1e-12)
