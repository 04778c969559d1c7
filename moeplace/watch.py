"""Follow a folder of load dumps: decide for each window, write a new plan when it pays.

One file is one transaction. Its windows are judged, then the state is written (whole or not at
all) with the plan that holds from there on and the log lines of the file; then the plan file,
then the log. A run that stops in between is completed by the next one, which finds plan and lines
in the state. So no window is judged twice and no decision is lost.
"""

import json
import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from moeplace._files import PathLike, check_outputs, read_json, reading, write_json
from moeplace.constraints import MaxMoves
from moeplace.drift import Decision, Monitor
from moeplace.errors import FormatError, MoeplaceError, ProblemError
from moeplace.evaluate import evaluate
from moeplace.formats import read_loads, read_plan, write_plan
from moeplace.formats._npy import npz
from moeplace.formats.loads import check_format
from moeplace.loads import LoadHistogram
from moeplace.migrate import relabel
from moeplace.plan import Plan
from moeplace.problem import Problem
from moeplace.profile import measured_devices, read_profile, relative_speeds
from moeplace.replan import Economy, propose
from moeplace.result import Limits
from moeplace.search.split import resplit
from moeplace.solve import solve
from moeplace.tradeoff import BUDGETS, STEPS, check_budgets

logger = logging.getLogger(__name__)

FORMAT, VERSION = "moeplace-watch", 1
#: The file that marks a folder of our policies in engines.
OBSERVED = "moeplace-observe.json"
Line = dict[str, Any]


class _State(msgspec.Struct, forbid_unknown_fields=True):
    """What the state file holds."""

    format: str
    version: int
    digest: str
    trigger: str
    monitor: dict[str, Any]
    changed: bool
    lines: int
    last: list[Line]
    done: dict[str, list[int]]
    bad: list[str]
    reading: str = ""


@dataclass(kw_only=True)
class Watch:
    """A folder that is followed.

    Parameters
    ----------
    folder : path
        Of dumps that `read_loads` reads, a window or more in each, or of the decisions that our
        policies in engines record; hidden files and folders are passed over. Dumps are taken in
        the order of their names, numbers in them as numbers.
    monitor : Monitor
        At the plan and loads of the beginning; a state file that is there goes before it.
    out : path
        Where plans are written, whole or not at all.
    state, log : path
        Where to go on after a restart; and the decisions, a JSON object a line.
    economy : Economy, optional
        What moving costs: a plan is only written if it pays. Without it every re-plan that the
        monitor asks for is made.
    budgets : sequence of int
        Received copies a layer to try; without an economy the largest is the limit.
    options : dict
        For `read_loads`: format, layers, passes, phase.
    profile : path, optional
        Profile of `moeplace calibrate`: read again whenever it changes.
    settle : float
        A file may be half-written until it is this many seconds old.
    time_limit : float, optional
        Seconds of each solve; by default steps limit it, as `tradeoff` says.

    Raises
    ------
    FormatError
        If the folder is none, an output cannot be written, the state is damaged or a format is
        unknown.
    ProblemError
        If an option is out of range, or the state is of another instance.
    """

    folder: PathLike
    monitor: Monitor
    out: PathLike
    state: PathLike
    log: PathLike
    economy: Economy | None = None
    budgets: Sequence[int] = BUDGETS
    options: dict[str, Any] = field(default_factory=dict)
    profile: PathLike | None = None
    settle: float = 10.0
    time_limit: float | None = None

    def __post_init__(self) -> None:
        with reading(self.folder):
            known = bool(os.fspath(self.folder)) and Path(self.folder).is_dir()
        if not known:
            raise FormatError(
                f"{os.fspath(self.folder)!r}: is no folder. Name the one that a recorder writes to."
            )
        check_outputs([self.out, self.state, self.log])
        check_budgets(self.budgets)
        Limits(time=self.time_limit)
        if not 0 <= self.settle < float("inf"):
            raise ProblemError(f"Settle must be finite seconds from 0, got {self.settle!r}.")
        _check_reading(self.options, self.monitor.problem)
        self._start = self.monitor.problem.digest()
        self._scale = float(self.monitor.problem.cluster.speeds.mean())
        self._seen_profile: tuple[int, int] | None = None
        self._done: dict[str, list[int]] = {}
        self._bad: set[str] = set()
        self._waiting: dict[str, tuple[list[int], float]] = {}
        self._lines, self._last, self._changed = 0, list[Line](), False
        if Path(self.state).exists():
            self._resume()

    # ------------------------------------------------------------------------------- polling

    def poll(self, heard: Callable[[Line], None] | None = None, *, settled: bool = False) -> int:
        """Take all files that are ready; return their number. `heard` gets each log line.

        With `settled` no file is taken for half-written.
        """
        self._speeds(heard)
        taken = 0
        for path, signature in self._files():
            if not (settled or self._whole(path.name, signature)):
                break  # later ones wait for it: order matters
            lines = self._file(path)
            self._done[path.name] = signature
            self._waiting.pop(path.name, None)
            self._commit(lines, heard)
            taken += 1
        return taken

    def _whole(self, name: str, signature: list[int]) -> bool:
        """Whether a file is old enough, or has not changed for long enough while we looked."""
        since = self._waiting.get(name)
        if since is None or since[0] != signature:
            self._waiting[name] = (signature, time.monotonic())
            since = self._waiting[name]
        old = time.time() - signature[1] / 1e9 >= self.settle
        return old or time.monotonic() - since[1] >= self.settle

    def _place(self) -> Path:
        """The folder itself, or the one model's in a folder of our policies in engines."""
        folder = Path(self.folder)
        if not (folder / OBSERVED).exists():
            return folder
        models = sorted(path for path in folder.iterdir() if path.is_dir())
        if len(models) > 1:
            raise FormatError(
                f"{folder}: holds decisions on several models. Name one of the folders in it: "
                f"{', '.join(path.name for path in models)}."
            )
        return models[0] if models else folder

    def _files(self) -> list[tuple[Path, list[int]]]:
        """New files, and bad ones that have changed, in order, with their size and time."""
        own = {os.path.realpath(path) for path in (self.out, self.state, self.log)}
        found = []
        present = set()
        try:
            listed = list(os.scandir(self._place()))
        except OSError as cause:  # perhaps it comes back
            logger.warning("%s: cannot be listed (%s)", self.folder, cause)
            return []
        for entry in listed:
            if (
                entry.name.startswith(".")
                or entry.name == OBSERVED
                or os.path.realpath(entry.path) in own
            ):
                continue
            try:
                if not entry.is_file():
                    continue
                status = entry.stat()
            except OSError:  # gone since
                continue
            present.add(entry.name)
            signature = [status.st_size, status.st_mtime_ns]
            known = self._done.get(entry.name)
            if known is None or (entry.name in self._bad and known != signature):
                found.append((Path(entry.path), signature))
        for gone in set(self._done) - present:
            del self._done[gone]
            self._bad.discard(gone)
        return sorted(found, key=lambda each: _natural(each[0].name))

    def _file(self, path: Path) -> list[Line]:
        """Judge the windows of one file."""
        self._bad.discard(path.name)
        try:
            loads = _read(path, self.options)
            self._fits(loads)
        except (FormatError, ProblemError) as cause:
            self._bad.add(path.name)
            return [self._line(path, None, {"action": "skip", "reason": str(cause)})]
        lines = []
        known = self.monitor.problem.loads.passes is not None
        for window in range(loads.windows):
            passes = None
            if known and loads.passes is not None:
                passes = float(loads.passes[window])
            decision = self.monitor.observe(loads.tokens[window], passes)
            lines.append(self._line(path, window, self._acted(decision)))
        return lines

    def _fits(self, loads: LoadHistogram) -> None:
        problem = self.monitor.problem
        if (loads.layers, loads.experts) != (problem.layers, problem.experts):
            raise ProblemError(
                f"holds {loads.layers} layers x {loads.experts} experts, the instance has "
                f"{problem.layers} x {problem.experts}: it is another model's, or some of its "
                "rows are dense layers (--layers)."
            )
        if problem.loads.passes is not None and loads.passes is None:
            raise ProblemError(
                "does not say how many forward passes it sums, which the instance's loads do: "
                "give --passes."
            )

    # ------------------------------------------------------------------------------- acting

    def _acted(self, decision: Decision) -> Line:
        """Do what the monitor asks for, if it pays."""
        line: Line = {
            "action": decision.action,
            "reason": decision.reason,
            "trigger": self.monitor.trigger,
            "value": decision.value,
            "threshold": decision.threshold,
            "noise": decision.noise,
        }
        if decision.action == "keep":
            return line
        monitor, now = self.monitor, self.monitor.now
        if decision.action == "resplit":
            monitor.adopt(resplit(now, monitor.plan), monitor.loads)
            self._changed = True
            return line | {"moves": 0, "bytes": 0}
        plan, more = self._planned(now)
        if plan is None:
            monitor.rest()
            return line | {"action": "keep", "reason": f"{decision.reason}; {more.pop('why')}"}
        before = evaluate(now, monitor.plan) if now.routing == "even" else None
        more |= {"moves": int(plan.moves_from(monitor.plan).sum())}
        if before is not None and before.objective > 0:
            more |= {"saves": 1 - evaluate(now, plan).objective / before.objective}
        monitor.adopt(plan, monitor.loads)
        self._changed = True
        return line | more

    def _planned(self, now: Problem) -> tuple[Plan | None, Line]:
        current = self.monitor.plan
        if self.economy is not None:
            found = propose(
                now, current, self.economy, budgets=self.budgets, time_limit=self.time_limit
            )
            if not found.pays:
                return None, {"why": found.reason}
            return found.point.plan, {
                "why": found.reason,
                "bytes": found.point.bytes,
                "net_seconds": found.net,
            }
        rules = list(now.constraints)
        if self.budgets:
            rules.append(MaxMoves(current, per_layer=max(self.budgets)))
        steps = STEPS * now.layers if self.time_limit is None else None
        limited = replace(now, constraints=rules)
        result = solve(limited, time_limit=self.time_limit, work_limit=steps)
        if result.evaluation is None:
            return None, {"why": f"no plan was found: {result.reason}"}
        return relabel(now, current, result.plan), {}

    def _speeds(self, heard: Callable[[Line], None] | None) -> None:
        """Take new speeds from the profile, if it has changed."""
        if self.profile is None:
            return
        path = Path(self.profile)
        try:
            status = path.stat()
            signature = (status.st_size, status.st_mtime_ns)
        except OSError:
            signature = (0, 0)
        if signature == self._seen_profile:
            return
        self._seen_profile = signature
        try:
            profile = read_profile(path)
            by_uuid = {entry.uuid: entry for entry in profile.entries}
            speeds = relative_speeds([by_uuid[uuid] for uuid in measured_devices(profile)])
            if self.monitor.problem.cluster.speed_unit != "relative":
                speeds = speeds * self._scale / speeds.mean()
            self.monitor.speeds(speeds)
            found = {
                "action": "speeds",
                "reason": f"slowest / fastest {speeds.min() / speeds.max():.4f}",
            }
        except MoeplaceError as cause:
            found = {"action": "skip", "reason": str(cause)}
        self._commit([self._line(path, None, found)], heard)

    # -------------------------------------------------------------------------------- files

    def _line(self, path: Path, window: int | None, found: Line) -> Line:
        self._lines += 1
        stamp = datetime.now(UTC).isoformat(timespec="seconds")
        return {"n": self._lines, "time": stamp, "file": path.name, "window": window} | found

    def _commit(self, lines: list[Line], heard: Callable[[Line], None] | None) -> None:
        self._last = lines
        write_json(
            self.state,
            {
                "format": FORMAT,
                "version": VERSION,
                "digest": self._start,
                "trigger": self.monitor.trigger,
                "monitor": self.monitor.state(),
                "changed": self._changed,
                "lines": self._lines,
                "last": lines,
                "done": self._done,
                "bad": sorted(self._bad),
                "reading": self._reading(),
            },
        )
        if any(line["action"] in ("replan", "resplit") for line in lines):
            write_plan(self.monitor.plan, self.out)
        self._append(lines)
        for line in lines if heard is not None else []:
            heard(line)  # type: ignore[misc]

    def _append(self, lines: list[Line]) -> None:
        data = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        try:
            with Path(self.log).open("a", encoding="utf-8") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as cause:
            raise FormatError(f"{self.log}: cannot be written ({cause}). Mend that.") from cause

    def _resume(self) -> None:
        """Go on from the state file, and write what the last run could not."""
        state = read_json(self.state, _State, header=(FORMAT, VERSION))
        if (state.digest, state.trigger) != (self._start, self.monitor.trigger):
            raise ProblemError(
                f"{self.state}: is of another instance, or another trigger. Give the ones it was "
                "begun with, or remove it to begin again."
            )
        try:
            self.monitor.restore(state.monitor)
        except (KeyError, TypeError, ValueError) as cause:
            raise FormatError(
                f"{self.state}: is damaged ({cause}). Remove it to begin again."
            ) from cause
        self._lines, self._changed = state.lines, state.changed
        self._done, self._bad = state.done, set(state.bad)
        if state.reading != self._reading():  # what could not be read so perhaps can be now
            for name in self._bad:
                self._done.pop(name, None)
            self._bad.clear()
        if state.changed and not self._holds(self.out, self.monitor.plan):
            write_plan(self.monitor.plan, self.out)
        written = self._last_written()
        self._append([line for line in state.last if line["n"] > written])
        logger.info("%s: goes on after %d lines", self.state, state.lines)

    def _reading(self) -> str:
        """The options of reading, to see whether they changed."""
        given = {name: value for name, value in self.options.items() if value is not None}
        return repr(sorted(given.items()))

    def _holds(self, path: PathLike, plan: Plan) -> bool:
        try:
            found = read_plan(path)
        except MoeplaceError:
            return False
        same = found.slots.shape == plan.slots.shape and bool((found.slots == plan.slots).all())
        if not same or found.split is None or plan.split is None:
            return same and found.split is plan.split
        return bool(np.array_equal(found.split, plan.split))

    def _last_written(self) -> int:
        """The number of the log's last whole line; a torn one is cut off."""
        path = Path(self.log)
        if not path.exists() or path.stat().st_size == 0:
            return 0
        with path.open("rb+") as file:
            size = path.stat().st_size
            file.seek(max(size - (1 << 20), 0))
            whole, _, torn = file.read().rpartition(b"\n")
            file.truncate(size - len(torn))
        for line in reversed(whole.split(b"\n")):
            try:
                return int(json.loads(line)["n"])
            except (ValueError, TypeError, KeyError):
                continue
        return 0


def _check_reading(options: dict[str, Any], problem: Problem) -> None:
    """Refuse options by which no dump at all could be read."""
    if options.get("format") is not None:
        check_format(options["format"])
    passes, layers = options.get("passes"), options.get("layers")
    windows = 1 if passes is None else np.size(passes)
    LoadHistogram(
        tokens=np.zeros((windows, 1, 1)), passes=passes, phase=options.get("phase") or "mixed"
    )
    if isinstance(layers, slice):
        if layers.stop is None or min(layers.start or 0, layers.stop) < 0:
            return  # how many these are is up to the dump
        layers = range(layers.start or 0, layers.stop, layers.step or 1)
    if layers is not None and len(layers) != problem.layers:
        raise ProblemError(
            f"Option layers keeps {len(layers)} rows of a dump, the instance has {problem.layers} "
            "layers: no dump would fit. Keep as many."
        )


def _read(path: Path, options: dict[str, Any]) -> LoadHistogram:
    """Any format of `read_loads`, or a decision of our policies in engines, for its counts."""
    if path.suffix == ".npz" and options.get("format") is None:
        with npz(path) as archive:
            if {"weight", "about"} <= set(archive.names):
                try:
                    return LoadHistogram(tokens=archive.array("weight"))
                except ProblemError as cause:
                    raise FormatError(f"{path}: {cause}") from cause
    return read_loads(path, **options)


def _natural(name: str) -> list[tuple[int, float, str]]:
    """Order of names with numbers as numbers: dump_2 before dump_10, 17.45 before 17.5."""
    stem = Path(name).stem
    parts = re.split(r"(\d+(?:\.\d+)?)", stem)
    keys = [(0, float(part), "") if n % 2 else (1, 0.0, part) for n, part in enumerate(parts)]
    return [*keys, (1, 0.0, name)]
