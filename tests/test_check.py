import numpy as np
import pytest

from moeplace._check import MAX_TOKENS, first, integers, numbers, where
from moeplace.errors import PlanError, ProblemError

AXES = ("layer", "expert")


def test_a_place_is_named_by_its_axes() -> None:
    assert where((0, 3), ("window", "layer")) == "window 0, layer 3"


def test_first_finds_the_first_true_entry_in_row_order() -> None:
    assert first([[False, False, True], [True, False, False]]) == (0, 2)


def test_numbers_are_copied_to_read_only_float64() -> None:
    given = np.array([[1, 2], [3, 4]])
    checked = numbers(given, "Loads", AXES, ProblemError)
    given[0, 0] = 99
    assert checked.dtype == np.float64
    assert checked.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    with pytest.raises(ValueError, match="read-only"):
        checked[0, 0] = 5.0


def test_numbers_lie_in_row_order_whatever_the_order_of_the_input() -> None:
    given = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    assert numbers(given, "Loads", AXES, ProblemError).flags.c_contiguous


def test_minus_zero_becomes_zero_so_that_equal_inputs_have_equal_bytes() -> None:
    assert (
        numbers([-0.0], "Loads", ("expert",), ProblemError).tobytes() == np.array([0.0]).tobytes()
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([[1, 2], [3]], r"Loads is ragged or not numeric.* \[layers, experts\]"),
        ("many", r"Loads must hold numbers \[layers, experts\], got entries of type <U4"),
        ([["1", "2"]], "must hold numbers"),
        ([[None, 1]], "must hold numbers .* type object"),
        ([[True, False]], "must hold numbers .* type bool"),
        ([[1j]], "must hold numbers .* type complex"),
        (7, r"must have the axes \[layers, experts\], got an array of shape \(\)"),
        ([1, 2], r"must have the axes \[layers, experts\], got an array of shape \(2,\)"),
        ([[]], r"Loads is empty.* at least one expert \(got shape \(1, 0\)\)"),
        (np.zeros((0, 3)), "at least one layer"),
        ([[1, float("nan")]], "must be finite.* got nan at layer 0, expert 1"),
        ([[1, 2], [float("inf"), 2]], "got inf at layer 1, expert 0"),
        (
            [[1, -2]],
            r"at least 0 .*: got -2\.0 at layer 0, expert 1. Correct or remove that expert",
        ),
        ([[2.0**54]], "at most 9.*e\\+15: got 1.8.*e\\+16 at layer 0, expert 0"),
    ],
)
def test_what_is_wrong_is_said_with_its_rule_and_place(value: object, message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        numbers(value, "Loads", AXES, ProblemError)


def test_the_caller_chooses_the_error() -> None:
    with pytest.raises(PlanError, match="Shares must be finite"):
        numbers([-1], "Shares", ("slot",), PlanError)


def test_the_largest_load_is_allowed_and_zero_only_if_not_strict() -> None:
    assert numbers([0.0, MAX_TOKENS], "Loads", ("expert",), ProblemError)[1] == 2.0**53
    with pytest.raises(ProblemError, match=r"above 0 and at most .*: got 0\.0 at expert 0"):
        numbers([0.0], "Loads", ("expert",), ProblemError, strict=True)


def test_integers_are_int64_and_read_only() -> None:
    checked = integers([1.0, 2], "Slots", ("rank",), ProblemError, low=0, high=5)
    assert checked.dtype == np.int64
    assert checked.tolist() == [1, 2]
    assert not checked.flags.writeable


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2.5], r"Slots must hold whole numbers: got 2\.5 at rank 1"),
        ([-1], "at least 0"),
        ([6], "at most 5"),
        ([float("nan")], "finite"),
    ],
)
def test_integers_refuse_fractions_and_what_is_out_of_range(value: object, message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        integers(value, "Slots", ("rank",), ProblemError, low=0, high=5)
