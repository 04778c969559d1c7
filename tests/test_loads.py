import numpy as np
import pytest

from moeplace.errors import ProblemError
from moeplace.loads import LoadHistogram


def test_two_axes_mean_one_window() -> None:
    loads = LoadHistogram(tokens=[[1, 2, 3], [4, 5, 6]])
    assert (loads.windows, loads.layers, loads.experts) == (1, 2, 3)


def test_three_axes_are_windows_layers_and_experts() -> None:
    loads = LoadHistogram(tokens=np.zeros((4, 2, 3)))
    assert (loads.windows, loads.layers, loads.experts) == (4, 2, 3)


def test_tokens_are_a_read_only_copy() -> None:
    given = np.ones((1, 1, 2))
    loads = LoadHistogram(tokens=given)
    given[:] = 7
    assert loads.tokens.tolist() == [[[1.0, 1.0]]]
    assert not loads.tokens.flags.writeable


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[1, -1]], "got -1.0 at window 0, layer 0, expert 1"),
        ([[1, float("nan")]], "got nan at window 0, layer 0, expert 1"),
        ([[1, float("inf")]], "got inf"),
        ([[1, 2], [3]], "ragged"),
        ([[[1, 2], [3]]], "ragged"),
        ([], "axes"),
        ([[]], "at least one expert"),
        ([1, 2], r"axes \[windows, layers, experts\]"),
        ([["a"]], "must hold numbers"),
        ([[2.0**53, 1e300]], "at most"),
    ],
)
def test_bad_loads_are_refused_with_their_place(tokens: object, message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        LoadHistogram(tokens=tokens)


def test_a_layer_may_not_sum_to_more_than_floats_can_count() -> None:
    with pytest.raises(ProblemError, match=r"sum to at most 2\*\*53 .* at window 0, layer 1"):
        LoadHistogram(tokens=[[1, 1], [2.0**53, 2.0**53]])


def test_passes_may_be_one_number_or_one_for_each_window() -> None:
    assert LoadHistogram(tokens=[[1]], passes=5).passes == [5.0]
    assert LoadHistogram(tokens=np.ones((2, 1, 1)), passes=[5, 6]).passes == pytest.approx([5, 6])


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        (0, "Passes must be finite, above 0"),
        ([1, -1], "got -1.0 at window 1"),
        ([1, 2, 3], "one number for each of the 2 windows, got 3"),
        (5, "one number for each of the 2 windows, got 1"),
        ([[1, 2]], r"axes \[windows\]"),
        ("ten", "must hold numbers"),
    ],
)
def test_bad_passes_are_refused(passes: object, message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        LoadHistogram(tokens=np.ones((2, 1, 1)), passes=passes)


def test_ragged_passes_are_refused() -> None:
    with pytest.raises(ProblemError, match="Passes is ragged"):
        LoadHistogram(tokens=np.ones((2, 1, 1)), passes=[[1], [1, 2]])


def test_an_unknown_phase_is_refused() -> None:
    with pytest.raises(ProblemError, match="prefill, decode, mixed, got 'warmup'"):
        LoadHistogram(tokens=[[1]], phase="warmup")


def test_counts_are_integral_and_means_are_not() -> None:
    assert LoadHistogram(tokens=[[1, 2]]).integral
    assert not LoadHistogram(tokens=[[1, 2.5]]).integral


def test_aggregate_sums_windows_and_passes() -> None:
    loads = LoadHistogram(tokens=[[[1, 2]], [[3, 4]]], passes=[10, 20], phase="decode")
    total = loads.aggregate()
    assert total.tokens.tolist() == [[[4.0, 6.0]]]
    assert total.passes == [30.0]
    assert total.phase == "decode"
    assert LoadHistogram(tokens=[[1]]).aggregate().passes is None


def test_select_keeps_windows_and_their_passes() -> None:
    loads = LoadHistogram(tokens=[[[1]], [[2]], [[3]]], passes=[10, 20, 30])
    odd = loads.select([0, 2])
    assert odd.tokens.ravel().tolist() == [1.0, 3.0]
    assert odd.passes == pytest.approx([10, 30])
    assert loads.select(slice(1, None)).tokens.ravel().tolist() == [2.0, 3.0]


def test_regimes_sum_the_windows_of_each_label() -> None:
    loads = LoadHistogram(tokens=[[[1, 2]], [[3, 4]], [[5, 6]]], passes=[1, 2, 3], phase="decode")
    both = loads.regimes([1, 0, 1])
    assert both.tokens.tolist() == [[[3, 4]], [[6, 8]]]
    assert both.passes is not None
    assert both.passes.tolist() == [2, 4]
    assert both.phase == "decode"
    with pytest.raises(ProblemError, match="one label for each of the 3 windows, got 2"):
        loads.regimes([0, 1])


def test_scale_multiplies_every_load() -> None:
    assert LoadHistogram(tokens=[[1, 2]]).scale(2.5).tokens.tolist() == [[[2.5, 5.0]]]


def test_a_sample_has_the_number_of_assignments_asked_for_and_follows_the_shares() -> None:
    loads = LoadHistogram(tokens=[[[1, 3, 0]], [[0, 0, 0]]])
    drawn = loads.sample(40_000, seed=3)
    assert drawn.tokens[0, 0].sum() == 40_000
    assert drawn.tokens[0, 0, 2] == 0
    assert drawn.tokens[0, 0, 1] == pytest.approx(30_000, rel=0.02)
    assert drawn.tokens[1].sum() == 0, "a layer without tokens stays empty"
    assert drawn.integral


def test_a_sample_is_set_by_its_seed() -> None:
    loads = LoadHistogram(tokens=[[1, 3, 2]])
    assert (loads.sample(100, seed=1).tokens == loads.sample(100, seed=1).tokens).all()
    assert (loads.sample(100, seed=1).tokens != loads.sample(100, seed=2).tokens).any()


def test_skew_is_largest_over_mean_and_one_for_an_empty_layer() -> None:
    assert LoadHistogram(tokens=[[1, 2, 6], [0, 0, 0]]).skew().tolist() == [[2.0, 1.0]]


def test_distance_is_one_minus_the_cosine_whatever_the_magnitude() -> None:
    one = LoadHistogram(tokens=[[1, 0], [1, 0], [1, 1], [0, 0]])
    two = LoadHistogram(tokens=[[5, 0], [0, 2], [3, 0], [1, 1]])
    assert one.distance(two) == pytest.approx([0, 1, 1 - 0.5**0.5, 0])


def test_distance_needs_equal_shapes() -> None:
    with pytest.raises(ProblemError, match=r"got \(1, 2\) and \(1, 3\)"):
        LoadHistogram(tokens=[[1, 2]]).distance(LoadHistogram(tokens=[[1, 2, 3]]))


def test_gini_is_0_for_even_loads_and_near_1_for_one_expert() -> None:
    assert LoadHistogram(tokens=[[3, 3, 3, 3], [0, 0, 8, 0], [0, 0, 0, 0]]).gini().tolist() == [
        [0, 0.75, 0]
    ]


def test_gini_is_half_the_mean_difference_over_the_mean() -> None:
    tokens = np.random.default_rng(0).exponential(size=9)
    apart = np.abs(tokens[:, None] - tokens).mean() / (2 * tokens.mean())
    assert LoadHistogram(tokens=tokens[None]).gini()[0, 0] == pytest.approx(apart)


def test_zeros_are_the_share_of_experts_without_tokens() -> None:
    assert LoadHistogram(tokens=[[0, 1, 0, 0], [1, 1, 1, 1]]).zeros().tolist() == [[0.75, 0]]
