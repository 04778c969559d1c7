"""Statistics against hand computation, relations, and censoring."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplace import figures
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
    figure = figures.profile({"a": np.array([0.5, 1.0])}, np.array([1.0, 2.0]))
    assert list(figure.data[0].y) == [0.5, 1.0]
    figure = figures.gap_curve({"a": np.array([0.0, 1e-2, np.inf, np.inf])})
    assert list(figure.data[0].x) == [figures.LEAST_GAP, 1e-2]
    assert list(figure.data[0].y) == [0.25, 0.5]
