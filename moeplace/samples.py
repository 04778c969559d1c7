"""Measured times, and the files that they come in.

A profile of `moeplace calibrate`, or a table (CSV) of a production trace: a header and columns
``rank,tokens,activated,seconds``, one row for each rank and pass. Where only a layer's total is
known, ``pass,rank,tokens,activated,seconds`` with the total in each row of a pass. ``activated``
may be left out.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from moeplace._check import BoolArray, FloatArray, IntArray, integers, numbers
from moeplace._files import PathLike, read_bytes
from moeplace.errors import FormatError, ProblemError
from moeplace.loads import Phase
from moeplace.profile import Entry, Profile

#: A time that falls by more than this where tokens rise is reported.
FALL = 0.02
_COLUMNS = ("gpu", "activated", "tokens", "seconds")


@dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
    """Measured times.

    Parameters
    ----------
    gpu : int array [samples]
        Which GPU, counted from 0.
    activated, tokens, seconds : array [samples]
        Replicas with tokens, token assignments, and the time of the rank's experts.
    names : sequence of str [gpus], optional
    """

    gpu: IntArray
    activated: FloatArray
    tokens: FloatArray
    seconds: FloatArray
    names: Sequence[str] = ()

    def __post_init__(self) -> None:
        axes = ("sample",)
        arrays: dict[str, Any] = {
            "gpu": integers(self.gpu, "GPUs", axes, ProblemError, low=0, high=1 << 20)
        }
        for name in ("activated", "tokens", "seconds"):
            strict = name != "activated"
            array = numbers(getattr(self, name), name.title(), axes, ProblemError, strict=strict)
            arrays[name] = array
        if len({array.size for array in arrays.values()}) > 1:
            raise ProblemError(
                "Samples need one GPU, activated, tokens and seconds each, got "
                f"{', '.join(f'{array.size} {name}' for name, array in arrays.items())}."
            )
        count = int(arrays["gpu"].max()) + 1
        if (missing := np.setdiff1d(np.arange(count), arrays["gpu"])).size:
            raise ProblemError(
                f"GPU {missing[0]} has no samples: number GPUs from 0 without gaps, up to {count}."
            )
        for name, array in arrays.items():
            object.__setattr__(self, name, array)
        names = tuple(self.names) or tuple(f"GPU {g}" for g in range(count))
        if len(names) != count:
            raise ProblemError(f"{count} GPUs need a name each, got {len(names)}.")
        object.__setattr__(self, "names", names)

    @classmethod
    def of(cls, entries: Sequence[Entry]) -> "Samples":
        """The samples of profile entries, one GPU each."""
        rows = [
            (g, s.activated, s.tokens, s.median) for g, e in enumerate(entries) for s in e.samples
        ]
        if not rows:
            raise ProblemError("The profile entries have no samples: calibrate again.")
        gpu, activated, tokens, seconds = (np.array(column) for column in zip(*rows, strict=True))
        names = tuple(entry.uuid for entry in entries)
        return cls(gpu=gpu, activated=activated, tokens=tokens, seconds=seconds, names=names)

    @property
    def gpus(self) -> int:
        """Number of GPUs."""
        return len(self.names)

    def take(self, which: BoolArray | IntArray) -> "Samples":
        """Some of them, of all GPUs."""
        given = {name: getattr(self, name)[which] for name in _COLUMNS}
        return replace(self, **given)

    @cached_property
    def point(self) -> IntArray:
        """Number of each sample's point (activated, tokens)."""
        both = np.stack([self.activated, self.tokens], axis=1)
        return np.asarray(np.unique(both, axis=0, return_inverse=True)[1]).ravel()

    @property
    def falls(self) -> list[tuple[int, int, int]]:
        """Pairs of samples at which a GPU took more than `FALL` less for more tokens."""
        found = []
        for gpu in range(self.gpus):
            for activated in np.unique(self.activated[self.gpu == gpu]).tolist():
                at = np.flatnonzero((self.gpu == gpu) & (self.activated == activated))
                at = at[np.argsort(self.tokens[at], kind="stable")].tolist()
                found += [
                    (gpu, i, j)
                    for i, j in pairwise(at)
                    if self.seconds[j] < self.seconds[i] * (1 - FALL)
                    and self.tokens[j] > self.tokens[i]
                ]
        return found


def same_setting(profile: Profile, phase: Phase | None = None) -> list[Entry]:
    """The entries that compare with the latest one (of a phase): same kernel, dtype and sizes.

    Raises
    ------
    ProblemError
        If there are none.
    """
    entries = [entry for entry in profile.entries if phase in (None, entry.phase)]
    entries = [entry for entry in entries if entry.samples]
    if not entries:
        known = sorted({entry.phase for entry in profile.entries})
        raise ProblemError(
            f"The profile has no samples{'' if phase is None else f' of phase {phase}'} (phases: "
            f"{', '.join(known) or 'none'}). Calibrate first."
        )
    latest = max(entries, key=lambda entry: entry.date)
    return [entry for entry in entries if entry.setting == latest.setting]


def read_samples(path: PathLike) -> Samples:
    """Samples of a CSV file; each rank is a GPU.

    Raises
    ------
    FormatError
        If the file cannot be read or breaks a rule, with its line, or holds layer totals.
    """
    rows = _rows(path, ("rank", "tokens", "seconds"))
    _check_not_totals(path, rows)
    ranks, gpu = np.unique(rows["rank"], return_inverse=True)
    names = tuple(f"rank {int(rank)}" for rank in ranks)
    activated = rows.get("activated", np.zeros(gpu.size))
    try:
        return Samples(
            gpu=gpu,
            activated=activated,
            tokens=rows["tokens"],
            seconds=rows["seconds"],
            names=names,
        )
    except ProblemError as error:
        raise FormatError(f"{path}: {error}") from error


def _check_not_totals(path: PathLike, rows: dict[str, FloatArray]) -> None:
    """Refuse a log in which all ranks of each pass have the same seconds: a layer's totals."""
    if "pass" not in rows:
        return
    passes, at, rows_of = np.unique(rows["pass"], return_inverse=True, return_counts=True)
    least, most = np.full(passes.size, np.inf), np.zeros(passes.size)
    np.minimum.at(least, at, rows["seconds"])
    np.maximum.at(most, at, rows["seconds"])
    if (rows_of > 1).all() and (least == most).all():
        raise FormatError(
            f"{path}: has the same seconds for all ranks of each pass, as totals of a layer have: "
            "fit them with --passive (read_totals and fit_totals). If they are each rank's own "
            "times, leave the column pass out."
        )


def read_totals(path: PathLike) -> tuple[FloatArray, FloatArray, FloatArray | None]:
    """Tokens [passes, ranks], totals [passes] and activated [passes, ranks] of a CSV file.

    Raises
    ------
    FormatError
        If the file cannot be read or breaks a rule: each pass has one row for each rank.
    """
    rows = _rows(path, ("pass", "rank", "tokens", "seconds"))
    ranks = int(rows["rank"].max()) + 1
    passes, at = np.unique(rows["pass"], return_inverse=True)
    rank = rows["rank"].astype(np.int64)
    seen = np.zeros((passes.size, ranks), dtype=np.int64)
    np.add.at(seen, (at, rank), 1)
    if (seen != 1).any():
        n, g = np.argwhere(seen != 1)[0]
        raise FormatError(
            f"{path}: pass {passes[n]:g} has {seen[n, g]} rows of rank {g}, needs one of each rank "
            f"from 0 to {ranks - 1}."
        )
    found = {}
    for name in ("tokens", "seconds", "activated"):
        if name in rows:
            found[name] = np.empty(seen.shape)
            found[name][at, rank] = rows[name]
    seconds = found["seconds"]
    if (seconds != seconds[:, :1]).any():
        n = int((seconds != seconds[:, :1]).any(axis=1).argmax())
        raise FormatError(
            f"{path}: pass {passes[n]:g} has several totals: seconds must be the same in all its "
            "rows. Without --passive, seconds are those of each rank."
        )
    return found["tokens"], seconds[:, 0], found.get("activated")


def _rows(path: PathLike, needed: Sequence[str]) -> dict[str, FloatArray]:
    """Columns of a CSV file by name."""
    text = read_bytes(path, "CSV").decode()
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    reader = csv.DictReader(io.StringIO("\n".join(lines)), skipinitialspace=True)
    fields = [name.strip() for name in reader.fieldnames or ()]
    if missing := [name for name in needed if name not in fields]:
        raise FormatError(
            f"{path}: lacks the column {missing[0]!r}: the header must name {', '.join(needed)} "
            f"(and activated, if known), got {', '.join(fields)}."
        )
    columns: dict[str, list[float]] = {
        name: [] for name in dict.fromkeys((*needed, "activated", "pass")) if name in fields
    }
    for number, row in enumerate(reader, start=1):
        for name, values in columns.items():
            given = row.get(name)
            try:
                value = float(given or "")
            except ValueError:
                value = float("nan")
            if not np.isfinite(value) or value < 0 or (name == "rank" and value != int(value)):
                kind = "a whole number from 0" if name == "rank" else "a number from 0"
                raise FormatError(f"{path}: row {number}: {name} must be {kind}, got {given!r}.")
            values.append(value)
    if not columns["rank"]:
        raise FormatError(f"{path}: has a header but no rows.")
    if max(columns["rank"]) > 1 << 16:
        raise FormatError(f"{path}: ranks must be below 65,536, got {max(columns['rank']):g}.")
    return {name: np.array(values) for name, values in columns.items()}
