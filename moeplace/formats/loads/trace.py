"""Token traces: the top-k expert ids of every token, [tokens, layers, k], as NumPy integers.

Traces are larger than memory sooner than any other file: ids are read a few MiB at a time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplace._files import PathLike, reading
from moeplace.errors import FormatError
from moeplace.formats._npy import MAGIC, MAX_LAYERS, Array, npy, npz
from moeplace.formats.loads._raw import Ask, Raw, empty, window_of

#: The largest expert id that a trace may hold.
MAX_EXPERT = 1 << 15
#: The most ids that a trace may have: days of serving, minutes of reading.
MAX_IDS = 1 << 37
#: What packs better than this, and has more ids than that, is no trace.
MAX_PACKING, LONG = 100, 1 << 30


def read(path: PathLike, ask: Ask) -> Raw:
    """Count the assignments of each expert in each layer."""
    with opened(path) as array:
        return _count(array, ask)


@contextmanager
def opened(path: PathLike) -> Iterator[Array]:
    """The array of ids: a ``.npy``, or the only one of an ``.npz``."""
    if is_npy(path):
        with npy(path) as array:
            yield array
        return
    with npz(path) as archive:
        if len(archive.names) > 1:
            raise FormatError(
                f"{path}: holds the arrays {', '.join(archive.names[:20])}: a trace has one, "
                "[tokens, layers, k]. Save that alone."
            )
        with archive.open(archive.names[0]) as array:
            yield array


def is_npy(path: PathLike) -> bool:
    """Whether the file begins as a NumPy array does."""
    with reading(path), Path(path).open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _count(array: Array, ask: Ask) -> Raw:
    if array.dtype.kind not in "iu" or len(array.shape) != 3 or 0 in array.shape:
        raise FormatError(
            f"{array.place}has {array.dtype} entries of shape {array.shape}: a trace has integer "
            "ids [tokens, layers, k]. Save it so, or name another format."
        )
    total, layers, k = array.shape
    if array.entries > MAX_IDS or layers > MAX_LAYERS or k > MAX_EXPERT:
        raise FormatError(
            f"{array.place}has {array.entries:,} ids of shape {array.shape}: the limits are "
            f"{MAX_IDS:,} ids, {MAX_LAYERS:,} layers, top-{MAX_EXPERT:,}. Check the order of its "
            "axes, or split the file."
        )
    if array.packing > MAX_PACKING and array.entries > LONG:
        raise FormatError(
            f"{array.place}unpacks to {array.packing:,.0f} times its size, {array.entries:,} ids: "
            f"no router's choices pack more than {MAX_PACKING} times. Check that it is a trace."
        )
    windows = ask.windows or 1
    if total < windows:
        window_of(total, windows, array.path, "tokens")
    experts = ask.experts or 1
    counts = empty(array.path, windows, layers, experts).astype(np.int64)
    done = 0
    for ids in array.rows():
        high = _checked(array, ids, done, ask.experts)
        if high >= counts.shape[2]:
            grown = empty(array.path, windows, layers, high + 1).astype(np.int64)
            grown[:, :, : counts.shape[2]] = counts
            counts = grown
        _add(counts, ids, done, total)
        done += len(ids)
        if ask.progress is not None:
            ask.progress(done, total)
    notes = [f"{total:,} tokens, top-{k}"]
    if ask.experts is None:
        notes.append(
            f"experts: {counts.shape[2]}, the largest id + 1; say how many there are (experts=) "
            "if the last ones may be cold"
        )
    return Raw(counts, notes=tuple(notes))


def _checked(array: Array, ids: npt.NDArray[Any], start: int, experts: int | None) -> int:
    """The largest id of a piece, or FormatError at the first that no trace would hold."""
    high = int(ids.max())
    limit = MAX_EXPERT if experts is None else experts
    bad = None
    if high >= limit or ids.min() < 0:
        bad = np.argwhere((ids >= limit) | (ids < 0))[0]
        rule = f"ids must be from 0 to {limit - 1:,}"
        remedy = "Remove padded tokens, or correct the number of experts."
    else:
        ordered = np.sort(ids, axis=2)
        twice = ordered[:, :, 1:] == ordered[:, :, :-1]
        if twice.any():
            bad = np.argwhere(twice)[0]
            bad[2] = np.argwhere(ids[bad[0], bad[1]] == ordered[tuple(bad)])[1, 0]
            rule = "a token goes to an expert once at most"
            remedy = "Remove padded tokens, or name another format (npz)."
    if bad is not None:
        raise FormatError(
            f"{array.place}has the id {int(ids[tuple(bad)])} at token {start + int(bad[0])}, "
            f"layer {int(bad[1])}, choice {int(bad[2])}: {rule}. {remedy}"
        )
    return high


def _add(counts: npt.NDArray[np.int64], ids: npt.NDArray[Any], start: int, total: int) -> None:
    windows, layers, experts = counts.shape
    first = np.arange(layers)[:, None] * experts
    of = np.arange(start, start + len(ids)) * windows // total
    cuts = np.flatnonzero(np.diff(of, prepend=-1, append=windows))
    for low, high in pairwise(cuts):
        flat = (ids[low:high].astype(np.int64) + first).ravel()
        found = np.bincount(flat, minlength=layers * experts)
        counts[of[low]] += found.reshape(layers, experts)


def looks(array: Array) -> bool | None:
    """Whether an array of whole numbers is a trace: yes, no, or (None) it might be either.

    A token's experts are distinct, while loads have ties and zeros before long.
    """
    if array.dtype.kind not in "iu" or len(array.shape) != 3 or 0 in array.shape:
        return False
    _, layers, k = array.shape
    if k > 64:
        return False
    piece = next(iter(array.rows()))
    ordered = np.sort(piece, axis=2)
    if (ordered[:, :, 1:] == ordered[:, :, :-1]).any() or piece.min() < 0:
        return False
    sure = array.dtype.itemsize <= 2 and k > 1 and len(piece) * layers >= 1000
    return True if sure and piece.max() < MAX_EXPERT else None
