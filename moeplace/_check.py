"""Turn what a user hands in into read-only arrays, or say exactly what is wrong with it."""

from typing import Any

import numpy as np
import numpy.typing as npt

from moeplace.errors import MoeplaceError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

#: Tokens beyond 2**53 are not exact in float64, and their sums could overflow.
MAX_TOKENS = float(2**53)


def frozen(array: FloatArray) -> FloatArray:
    """The array, contiguous and read-only: kernels are compiled once for each kind of array."""
    array = np.ascontiguousarray(array)
    array = array.copy() if array.base is not None else array
    array.setflags(write=False)
    return array


def sum_by(values: FloatArray, label: IntArray, count: int) -> FloatArray:
    """Sum the last axis by label: [..., n] -> [..., count], in order, so that bits never differ.

    (A matrix product would be shorter, but BLAS adds in another order on another CPU.)
    """
    total = np.zeros((*values.shape[:-1], count))
    for position, to in enumerate(label):
        total[..., to] += values[..., position]
    return total


def where(index: tuple[Any, ...], axes: tuple[str, ...]) -> str:
    """Name a place: ``where((0, 3), ("window", "layer"))`` is ``"window 0, layer 3"``."""
    return ", ".join(f"{axis} {int(i)}" for axis, i in zip(axes, index, strict=True))


def ndim(value: Any) -> int:
    """Number of axes; -1 for ragged lists, which `numbers` then refuses with its place."""
    try:
        return int(np.ndim(value))
    except ValueError:
        return -1


def first(mask: npt.ArrayLike) -> tuple[int, ...]:
    """Index of the first true entry."""
    return tuple(int(i) for i in np.argwhere(np.asarray(mask))[0])


def numbers(
    value: Any,
    name: str,
    axes: tuple[str, ...],
    error: type[MoeplaceError],
    *,
    low: float = 0.0,
    high: float = MAX_TOKENS,
    strict: bool = False,
) -> FloatArray:
    """Copy `value` to a read-only float64 array with one axis for each name in `axes`.

    Raises
    ------
    error
        If it is ragged, not numeric, has another number of axes or an empty one, or holds
        a number that is not finite or outside ``[low, high]`` (``(low, high]`` if `strict`).
    """
    form = f"[{', '.join(axis + 's' for axis in axes)}]"
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as cause:
        raise error(
            f"{name} is ragged or not numeric: it must be a full array {form} of numbers. "
            "Give every row the same length."
        ) from cause
    if array.dtype.kind not in "iuf":
        raise error(
            f"{name} must hold numbers {form}, got entries of type {array.dtype}. "
            "Give plain integers or floats, with no text, nulls or ragged rows."
        )
    if array.ndim != len(axes):
        raise error(f"{name} must have the axes {form}, got an array of shape {array.shape}.")
    if 0 in array.shape:
        empty = axes[array.shape.index(0)]
        raise error(
            f"{name} is empty: {form} needs at least one {empty} (got shape {array.shape})."
        )
    array = np.array(array, dtype=np.float64, order="C")
    bad = ~np.isfinite(array) | (array <= low if strict else array < low) | (array > high)
    if bad.any():
        place = first(bad)
        rule = f"{'above' if strict else 'at least'} {low:g} and at most {high:g}"
        raise error(
            f"{name} must be finite, {rule}: got {array[place]} at {where(place, axes)}. "
            f"Correct or remove that {axes[-1]}."
        )
    array += 0.0  # -0.0 becomes 0.0, so that equal inputs have equal bytes
    array.setflags(write=False)
    return array


def integers(
    value: Any,
    name: str,
    axes: tuple[str, ...],
    error: type[MoeplaceError],
    *,
    low: int,
    high: int,
) -> IntArray:
    """Copy `value` to a read-only int64 array, as :func:`numbers` does for floats."""
    array = numbers(value, name, axes, error, low=float(low), high=float(high))
    if (array != np.floor(array)).any():
        place = first(array != np.floor(array))
        raise error(f"{name} must hold whole numbers: got {array[place]} at {where(place, axes)}.")
    whole = array.astype(np.int64)
    whole.setflags(write=False)
    return whole
