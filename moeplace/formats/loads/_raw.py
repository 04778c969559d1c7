"""What a reader of loads is asked for, and what it hands back."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplace._check import FloatArray, IntArray
from moeplace._files import PathLike
from moeplace.errors import FormatError
from moeplace.formats._npy import MAX_ENTRIES, MAX_LAYERS
from moeplace.loads import Phase

#: Called with (done, total) while a long file is read.
ReadProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Ask:
    """What the caller wants to know of a file."""

    windows: int | None = None
    experts: int | None = None
    progress: ReadProgress | None = None


@dataclass(frozen=True)
class Raw:
    """Token counts [windows, layers, experts] as a file holds them."""

    tokens: Any
    passes: Any = None
    phase: Phase | None = None
    notes: tuple[str, ...] = ()


def window_of(count: int, windows: int, path: PathLike, what: str) -> IntArray:
    """The window [count] of each of `count` passes or tokens: consecutive, sizes equal to one."""
    if count < windows:
        raise FormatError(
            f"{path}: has {count:,} {what}, too few for {windows:,} windows: each needs one. "
            "Ask for fewer windows."
        )
    return np.arange(count) * windows // count


def empty(path: PathLike, windows: int, layers: int, experts: int) -> FloatArray:
    """Zeros [windows, layers, experts], or FormatError if that would be too large."""
    if windows * layers * experts > MAX_ENTRIES or layers > MAX_LAYERS:
        raise FormatError(
            f"{path}: {windows:,} windows x {layers:,} layers x {experts:,} experts are more than "
            f"the {MAX_ENTRIES:,} loads (in {MAX_LAYERS:,} layers) that are read. Ask for fewer "
            "windows (windows=1)."
        )
    return np.zeros((windows, layers, experts))
