"""Statistics against hand computation, relations, and censoring."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplace import figures, figures_bench
from moeplace.bench_stats import (
    by_instance,
    paired_ratio,
    performance_profile,
    shifted_geometric_mean,
    solved_within,
)
from moeplace.errors import ProblemError

POSITIVE = st.floats(1e-3, 1e3)


def test_shifted_geometric_mean_by_hand() -> None:
    assert shifted_geometric_mean([0.0, 3.0], 1.0) == pytest.approx(1.0)
    assert shifted_geometric_mean([1.0, 4.0], 0.0) == pytest.approx(2.0)
    for values, shift in (([], 1.0), ([0.0, 1.0], 0.0), ([1.0], -1.0), ([np.nan], 1.0)):
        with pytest.raises(ProblemError):
            shifted_geometric_mean(values, shift)


@given(st.lists(POSITIVE, min_size=1, max_size=20), st.floats(0.0, 10.0))
def test_shifted_mean_lies_between(values: list[float], shift: float) -> None:
    mean = shifted_geometric_mean(values, shift)
    assert min(values) * (1 - 1e-9) - 1e-9 <= mean <= max(values) * (1 + 1e-9) + 1e-9


def test_paired_ratio_sees_through_hard_instances() -> None:
    hard = np.exp(np.random.default_rng(0).normal(0, 3, 30))
    found = paired_ratio(1.1 * hard, hard)
    assert found.estimate == pytest.approx(1.1)
    assert found.low == pytest.approx(1.1)
    assert found.high == pytest.approx(1.1)
    assert "only" not in str(found)
    assert str(paired_ratio([2.0], [1.0])) == "2.0000 [2.0000, 2.0000], 1 instances only"


@settings(max_examples=25)
@given(st.lists(st.tuples(POSITIVE, POSITIVE), min_size=2, max_size=12))
def test_paired_ratio_turned_round_is_the_inverse(pairs: list[tuple[float, float]]) -> None:
    one, other = map(np.array, zip(*pairs, strict=True))
    there, back = paired_ratio(one, other, draws=500), paired_ratio(other, one, draws=500)
    assert there.low * (1 - 1e-12) <= there.estimate <= there.high * (1 + 1e-12) or len(pairs) < 5
    assert math.log(there.estimate) == pytest.approx(-math.log(back.estimate), abs=1e-9)
    assert there.low == pytest.approx(1 / back.high, rel=1e-6)


def test_interval_covers_the_truth() -> None:
    """Of 200 experiments with 30 instances, 95 % intervals hold the true ratio in most."""
    draw, held = np.random.default_rng(1), 0
    for _ in range(200):
        noise = np.exp(draw.normal(math.log(1.05), 0.1, 30))
        found = paired_ratio(noise, np.ones(30), draws=1000)
        held += found.low <= 1.05 <= found.high
    assert 175 <= held <= 200


def test_pairs_are_checked() -> None:
    for one, other in (([1.0], [1.0, 2.0]), ([], []), ([0.0], [1.0]), ([np.inf], [1.0])):
        with pytest.raises(ProblemError):
            paired_ratio(one, other)
    with pytest.raises(ProblemError, match="level"):
        paired_ratio([1.0], [1.0], level=1.0)


def test_profile_counts_time_outs_as_unsolved() -> None:
    seconds = [[1.0, 2.0, 10.0, 10.0], [2.0, 1.0, 4.0, 10.0]]
    reached = [[True, True, False, False], [True, True, True, False]]
    factors, shares = performance_profile(seconds, reached)
    assert factors.tolist() == [1.0, 2.0]
    assert shares.tolist() == [[0.25, 0.5], [0.5, 0.75]]
    within = solved_within(seconds, reached, [1.0, 2.0, 100.0])
    assert within.tolist() == [[0.25, 0.5, 0.5], [0.25, 0.5, 0.75]]


def test_profile_of_no_solved_instance_and_of_nonsense() -> None:
    factors, shares = performance_profile([[1.0]], [[False]])
    assert factors.tolist() == [1.0]
    assert shares.tolist() == [[0.0]]
    with pytest.raises(ProblemError):
        performance_profile([[0.0]], [[True]])
    with pytest.raises(ProblemError):
        performance_profile([[1.0]], [[True, True]])


def test_seeds_of_an_instance_are_one_value() -> None:
    names, values = by_instance(np.array([1.0, 5.0, 3.0]), ["b", "a", "b"])
    assert names == ["b", "a"]
    assert values.tolist() == [2.0, 5.0]


def test_figures_of_profiles_and_gaps() -> None:
    figure = figures_bench.profile({"a": np.array([0.5, 1.0])}, np.array([1.0, 2.0]))
    assert list(figure.data[0].x) == [1.0, 2.0, 10.0]
    assert list(figure.data[0].y) == [0.5, 1.0, 1.0]
    figure = figures_bench.gap_curve({"a": np.array([0.0, 1e-2, np.inf, np.inf])})
    assert list(figure.data[0].x) == [figures.LEAST_GAP, 1e-2]
    assert list(figure.data[0].y) == [0.25, 0.5]
    assert figure.layout.xaxis.type == "log"


def test_names_lie_on_their_curves_of_gaps() -> None:
    gaps = {"a": np.array([1e-3, 1e-2]), "b": np.array([0.5, 0.25]), "c": np.full(2, np.inf)}
    figure = figures_bench.gap_curve(gaps)
    curves = {line.name: line for line in figure.data}
    assert len(figure.layout.annotations) == 3
    for note in figure.layout.annotations:
        line = curves[note.text]
        there = int(np.searchsorted(line.x, 10**note.x * (1 - 1e-9)))
        assert line.y[there] >= note.y - 1e-12


def test_names_stay_apart_and_below_the_ceiling() -> None:
    figure = figures.plotly().Figure()
    ends = [(str(i), 1.0, figures.INK) for i in range(4)] + [("low", 0.0, figures.INK)]
    figures.name_ends(figure, ends, floor=0.1, ceiling=1.0)
    places = [note.y for note in figure.layout.annotations]
    assert places == pytest.approx([0.0, 0.7, 0.8, 0.9, 1.0])
    assert max(places) <= 1.0


def test_gap_over_time_draws_medians_and_no_gap_before_there_is_one() -> None:
    inf = np.inf
    rows = np.array([[inf, 0.5, 0.1], [inf, inf, 0.2], [inf, 0.3, 0.0]])
    figure = figures_bench.gap_over_time(np.array([0.1, 1.0, 10.0]), {"a": rows})
    low, high, middle = figure.data
    assert list(middle.x) == [1.0, 10.0]
    assert list(middle.y) == [0.5, 0.1]  # of inf, 0.5, 0.3 the median is 0.5
    assert list(low.x) == list(high.x) == [10.0], "a quarter without a gap has no upper end"
    assert list(low.y) == [figures.LEAST_GAP]
    assert list(high.y) == [0.2]
    assert (figure.layout.xaxis.type, figure.layout.yaxis.type) == ("log", "log")
    none = figures_bench.gap_over_time(np.array([1.0]), {"a": np.array([[inf]])})
    assert [len(line.x) for line in none.data] == [0, 0, 0]


def test_ratio_by_method_draws_instances_that_have_one() -> None:
    ratios = {"a": np.array([1.5, np.nan]), "ours": np.array([1.0, 1.25])}
    figure = figures_bench.ratio_by_method(ratios, ["x", "y"])
    first, ours = figure.data
    assert (list(first.x), list(first.text)) == ([0.5], ["x"])
    assert (list(ours.x), list(ours.text)) == ([figures.LEAST_GAP, 0.25], ["x", "y"])
    assert figure.layout.xaxis.type == "log"


def test_means_and_intervals_agree_with_scipy() -> None:
    """The same statistics by an independent implementation, on skewed pairs of many scales."""
    from scipy import stats

    draw = np.random.default_rng(7)
    hard = np.exp(draw.normal(0, 3, 40))
    one, other = hard * np.exp(draw.gamma(0.5, 0.2, 40)), hard
    assert shifted_geometric_mean(one, 0.0) == pytest.approx(stats.gmean(one))
    assert shifted_geometric_mean(one, 2.0) == pytest.approx(stats.gmean(one + 2.0) - 2.0)
    for level in (0.9, 0.95):
        ours = paired_ratio(one, other, level=level, draws=40_000)
        theirs = stats.bootstrap(
            (one, other),
            lambda a, b, axis: stats.gmean(a, axis=axis) / stats.gmean(b, axis=axis),
            paired=True, vectorized=True, n_resamples=40_000, confidence_level=level,
            method="percentile", rng=np.random.default_rng(11),
        ).confidence_interval  # fmt: skip
        wide = theirs.high - theirs.low
        assert ours.low == pytest.approx(theirs.low, abs=0.03 * wide)
        assert ours.high == pytest.approx(theirs.high, abs=0.03 * wide)
        assert ours.estimate == pytest.approx(stats.gmean(one) / stats.gmean(other))


def test_shares_solved_are_empirical_distributions_of_censored_times() -> None:
    """One less the survival curve of Kaplan and Meier, where all time-outs come at the limit."""
    from scipy import stats

    draw = np.random.default_rng(3)
    seconds = draw.exponential(1.0, (2, 50)) + 0.1
    reached = seconds < 1.5
    cut = np.minimum(seconds, 1.5)
    for row, done, mine in zip(
        cut, reached, solved_within(cut, reached, [0.3, 0.7, 1.4]), strict=True
    ):
        data = stats.CensoredData(uncensored=row[done], right=row[~done])
        known = stats.ecdf(data).cdf.evaluate([0.3, 0.7, 1.4])
        assert mine == pytest.approx(known)
    factors, shares = performance_profile(cut, reached)
    best = np.where(reached, cut, np.inf).min(axis=0)
    for method in range(2):
        for factor, share in zip(factors, shares[method], strict=True):
            within = [reached[method, i] and cut[method, i] / best[i] <= factor
                      for i in range(50)]  # fmt: skip
            assert share == pytest.approx(np.mean(within), abs=1e-12)
