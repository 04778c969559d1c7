"""Profile files: how long each GPU really takes, as samples, so that fits can be made again.

::

    {"format": "moeplace-profile", "version": 1,
     "entries": [{"uuid": "GPU-...", "host": "node1", "rank": 0, "date": "2026-01-31T12:00:00Z",
                  "label": "gpu-measured", "device": "NVIDIA ...", "phase": "prefill",
                  "kernel": "grouped", "dtype": "bfloat16", "hidden": H, "intermediate": I,
                  "slots": S, "samples": [{"activated": A, "tokens": n, "count": 30,
                                           "median": s, "p10": s, "p90": s}],
                  "anchors": [s], "conditions": {"sm_clock_mhz": ...}}]}

An entry is one device under one kernel, dtype, phase and size of expert. The key of a GPU is its
UUID and host: ranks change GPUs when a job restarts, and a speed by rank number may land on the
wrong card. The ranks of a CPU run are keyed by host, rank and emulated slowness.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from moeplace._check import FloatArray
from moeplace._files import PathLike, read_json, write_json
from moeplace.errors import FormatError, ProblemError
from moeplace.loads import Phase

FORMAT, VERSION = "moeplace-profile", 1
#: Days after which a measurement no longer counts: clocks, drivers and cooling change.
MAX_AGE_DAYS = 7.0

Label = Literal["gpu-measured", "cpu-emulated", "simulated"]

_LONG_AGO = datetime.min.replace(tzinfo=UTC)

_log = logging.getLogger(__name__)
_Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]
_Seconds = Annotated[float, msgspec.Meta(gt=0)]


class Sample(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds of one rank's experts at one point.

    Attributes
    ----------
    activated : int
        Slots with tokens.
    tokens : int
        Token assignments, shared evenly by the activated slots.
    median, p10, p90 : float
        Seconds of a call: median and quantiles.
    count, visits : int
        Calls measured, and how many times the point was returned to for them.
    """

    activated: _Size
    tokens: _Size
    median: _Seconds
    p10: _Seconds
    p90: _Seconds
    count: _Size = 1
    visits: _Size = 1


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What was measured on one device under one kernel, dtype, phase and size of expert.

    Attributes
    ----------
    uuid, host : str
        The key: GPU UUID (or host, rank and slowness of a CPU rank), and the machine.
    rank : int
        Rank in the measuring job; says nothing about later ones.
    date : str
        When measuring ended, ISO 8601 with a time zone.
    anchors : list of float
        Seconds of one and the same point over the run, in order: they show drift.
    conditions : dict
        Clocks, power, throttle reasons and the like, as far as they could be read.
    """

    uuid: str
    host: str
    date: str
    label: Label
    phase: Phase
    kernel: str
    dtype: str
    hidden: _Size
    intermediate: _Size
    slots: _Size
    samples: list[Sample]
    rank: int = 0
    device: str = ""
    anchors: list[_Seconds] = []
    conditions: dict[str, Any] = {}

    @property
    def setting(self) -> tuple[str, str, str, int, int, str]:
        """What must agree before the times of two entries may be compared."""
        sizes = (self.hidden, self.intermediate)
        return (self.phase, self.kernel, self.dtype, *sizes, self.label)

    @property
    def drift(self) -> float:
        """Last over first anchor - 1; 0 without anchors."""
        return self.anchors[-1] / self.anchors[0] - 1 if self.anchors else 0.0


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All entries of a file."""

    entries: list[Entry]
    format: str = FORMAT
    version: int = VERSION

    def merged(self, entries: Sequence[Entry]) -> "Profile":
        """Add entries; one of the same key and setting is replaced."""
        new = {(entry.uuid, entry.host, entry.setting) for entry in entries}
        kept = [e for e in self.entries if (e.uuid, e.host, e.setting) not in new]
        return Profile(entries=[*kept, *entries])


def measured_devices(profile: Profile) -> list[str]:
    """Devices [ranks] of the latest measuring job, in the order that its ranks had.

    Right as long as ranks keep their devices: an engine that restarts must ask each rank for its.
    """
    if not profile.entries:
        return []
    latest = max(profile.entries, key=lambda entry: _when(entry) or _LONG_AGO)
    same = [entry for entry in profile.entries if entry.setting == latest.setting]
    at: dict[int, Entry] = {}
    for entry in sorted(same, key=lambda entry: _when(entry) or _LONG_AGO):
        at[entry.rank] = entry
    return [at[rank].uuid for rank in sorted(at)]


def read_profile(path: PathLike) -> Profile:
    """Read a profile.

    Raises
    ------
    FormatError
        If the file cannot be read or breaks a rule.
    """
    profile = read_json(path, Profile, header=(FORMAT, VERSION))
    for i, entry in enumerate(profile.entries):
        if _when(entry) is None:
            raise FormatError(
                f"{path}: $.entries[{i}].date must be a date and time with a zone (ISO 8601), got "
                f"{entry.date!r}. Correct it, e.g. 2026-01-31T12:00:00Z."
            )
        for j, sample in enumerate(entry.samples):
            if sample.tokens < sample.activated or not sample.p10 <= sample.median <= sample.p90:
                raise FormatError(
                    f"{path}: $.entries[{i}].samples[{j}] must have at least a token for each "
                    f"activated slot and p10 <= median <= p90, got {sample}. Correct or remove it."
                )
    return profile


def write_profile(profile: Profile, path: PathLike) -> None:
    """Write a profile whole or not at all.

    Raises
    ------
    FormatError
        If it cannot be written.
    """
    built: dict[str, Any] = msgspec.to_builtins(profile)
    write_json(path, {key: built[key] for key in ("format", "version", "entries")})


@dataclass(frozen=True)
class Match:
    """Entries of the ranks of a job.

    Attributes
    ----------
    entries : tuple of Entry, or None
        One for each rank; None where they cannot all be used.
    reason : str
        Why not; empty if they can.
    """

    entries: tuple[Entry, ...] | None
    reason: str = ""


def match(
    profile: Profile,
    uuids: Sequence[str],
    *,
    hosts: Sequence[str] | None = None,
    phase: Phase | None = None,
    kernel: str | None = None,
    dtype: str | None = None,
    now: datetime | None = None,
    max_age_days: float = MAX_AGE_DAYS,
) -> Match:
    """Find the entry of each rank's device: all ranks', fresh and comparable, or none.

    Speeds of some ranks only, or of another kernel, can be worse than none: if one entry is
    missing, stale or measured otherwise, none is used, and one warning is logged.

    Parameters
    ----------
    profile : Profile
    uuids : sequence of str [ranks]
        Device of each rank.
    hosts : sequence of str [ranks], optional
        Machine of each rank; not compared by default.
    phase, kernel, dtype : optional
        What the entries must be for; by default whatever the first rank's latest entry is for.
    now : datetime, optional
        With a time zone; by default the clock.
    max_age_days : float
    """
    found, reason = _find(profile, uuids, hosts, (phase, kernel, dtype), now, max_age_days)
    if reason:
        _log.warning("All ranks count as equally fast: %s", reason)
        return Match(None, reason)
    return Match(tuple(found))


def _find(
    profile: Profile,
    uuids: Sequence[str],
    hosts: Sequence[str] | None,
    wanted: tuple[str | None, str | None, str | None],
    now: datetime | None,
    max_age_days: float,
) -> tuple[list[Entry], str]:
    """Entries of all ranks and "", or what is wrong first."""
    now = datetime.now(UTC) if now is None else now
    if hosts is not None and len(hosts) != len(uuids):
        raise ProblemError(f"{len(uuids)} ranks need a host each, got {len(hosts)}.")
    if len(set(uuids)) != len(uuids):
        twice = next(uuid for uuid in uuids if list(uuids).count(uuid) > 1)
        return [], f"two ranks have the same device {twice}; each needs its own."
    found: list[Entry] = []
    for rank, uuid in enumerate(uuids):
        host = None if hosts is None else hosts[rank]
        mine = [e for e in profile.entries if e.uuid == uuid and host in (None, e.host)]
        if not mine:
            return [], f"the profile has no entry for rank {rank} ({uuid}); calibrate that device."
        for name, index in (("phase", 0), ("kernel", 1), ("dtype", 2)):
            if wanted[index] is not None:
                known = sorted({str(getattr(entry, name)) for entry in mine})
                mine = [entry for entry in mine if getattr(entry, name) == wanted[index]]
                if not mine:
                    return [], (
                        f"rank {rank} ({uuid}) was measured for {name} {', '.join(known)}, not "
                        f"{wanted[index]}; calibrate for it."
                    )
        if found:
            mine = [entry for entry in mine if entry.setting == found[0].setting]
            if not mine:
                return [], (
                    f"rank {rank} ({uuid}) was measured under another setting than rank 0 "
                    f"({', '.join(map(str, found[0].setting))}); calibrate all ranks together."
                )
        entry = max(mine, key=lambda entry: _when(entry) or _LONG_AGO)
        age = now - (_when(entry) or _LONG_AGO)
        if age > timedelta(days=max_age_days):
            return [], (
                f"the entry of rank {rank} ({uuid}) is {age.days} days old, above the limit of "
                f"{max_age_days:g}; calibrate again."
            )
        if not entry.samples:
            return [], f"the entry of rank {rank} ({uuid}) has no samples; calibrate again."
        found.append(entry)
    return found, ""


def relative_speeds(entries: Sequence[Entry]) -> FloatArray:
    """Speeds [ranks] relative to the fastest (1), from the points with many tokens.

    The median, over the points that all entries share with at least half of the most tokens, of
    the fastest time over a rank's time. Differences between GPUs of one type sit in the compute
    term, which is all that counts there; at few tokens memory hides them.

    Raises
    ------
    ProblemError
        If the entries share no point.
    """
    times = [{(s.activated, s.tokens): s.median for s in entry.samples} for entry in entries]
    shared = set(times[0]).intersection(*times[1:])
    if not shared:
        raise ProblemError(
            "The entries of a profile share no point (activated, tokens), so that speeds cannot "
            "be compared: calibrate all ranks over one grid."
        )
    most = max(tokens for _, tokens in shared)
    points = sorted(point for point in shared if 2 * point[1] >= most)
    seconds = np.array([[time[point] for point in points] for time in times])
    ratio = np.median(np.median(seconds, axis=0) / seconds, axis=1)
    return np.asarray(ratio / ratio.max())


def seconds_model(entry: Entry) -> FloatArray:
    """Parameters (t0, w, c) of seconds = t0 + w activated + c tokens, none negative.

    Least squares of relative errors over the samples' medians: good enough to say beforehand what
    a replay will take, within the range of the grid.
    """
    from scipy.optimize import nnls

    rows = np.array([[1.0, s.activated, s.tokens] for s in entry.samples])
    seconds = np.array([s.median for s in entry.samples])
    scale = rows.max(axis=0)
    fitted, _ = nnls(rows / scale / seconds[:, None], np.ones(seconds.size))
    return np.asarray(fitted / scale)


def predicted_seconds(
    entries: Sequence[Entry], activated: FloatArray, tokens: FloatArray
) -> FloatArray:
    """Seconds of ranks at activated slots and tokens, all [..., ranks]; 0 without tokens."""
    model = np.stack([seconds_model(entry) for entry in entries])
    found = model[:, 0] + model[:, 1] * activated + model[:, 2] * tokens
    return np.where(tokens > 0, found, 0.0)


def _when(entry: Entry) -> datetime | None:
    try:
        when = datetime.fromisoformat(entry.date)
    except ValueError:
        return None
    return when if when.tzinfo is not None else None
