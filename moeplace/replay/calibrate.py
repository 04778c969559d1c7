"""Measure how long every rank's experts take over a grid of (activated slots, tokens).

All ranks run the same point at the same time, as they would in service: neighbours share power
and cooling. Points come in random order with one anchor between them, so that drift shows and
is not taken for a slope. The profile is written after each point, whole or not at all: a run
that is interrupted keeps what it measured, and the next one goes on from there.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import msgspec
import numpy as np

from moeplace._files import PathLike, check_output
from moeplace.errors import ProblemError
from moeplace.loads import Phase
from moeplace.profile import MAX_AGE_DAYS, Entry, Profile, Sample, read_profile, write_profile
from moeplace.replay.launch import run_job
from moeplace.replay.settings import Runtime, at_least, check_memory, free_memory

if TYPE_CHECKING:
    from moeplace.replay.world import World

#: Each point is visited so often, each time in another random order: noise of the moment and
#: drift then spread over all points.
VISITS = 3
#: At a point: seconds and least calls over all visits, most calls of one; seconds dropped first.
_SECONDS = {"cuda": 0.6, "cpu": 0.6}
_LEAST = {"cuda": 30, "cpu": 9}
_CALLS = 2000
_SETTLE = {"cuda": 1.0, "cpu": 0.02}
_SOAK = {"cuda": 60.0, "cpu": 0.5}
#: Bytes written between two calls: twice the second-level cache of any GPU of today.
_FLUSH = 256 << 20
_ANCHOR_EVERY = 5
_DRIFT = 0.05

_log = logging.getLogger(__name__)


def default_grid(slots: int, phase: Phase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Activated slots and tokens that a phase visits."""
    activated = tuple(sorted({1, max(1, slots // 4), max(1, slots // 2), slots}))
    low, high = {"prefill": (9, 14), "decode": (3, 10), "mixed": (4, 14)}[phase]
    return activated, tuple(2**i for i in range(low, high + 1))


def calibrate_ranks(
    runtime: Runtime,
    out: PathLike,
    *,
    slots: int = 8,
    activated: Sequence[int] | None = None,
    tokens: Sequence[int] | None = None,
    phase: Phase = "mixed",
    seconds: float | None = None,
    soak: float | None = None,
    restart: bool = False,
) -> Profile | None:
    """Measure all ranks at the same time and write their profile.

    Parameters
    ----------
    runtime : Runtime
        Ranks, their devices and the size of an expert.
    out : path
        Profile file. Entries of other devices and settings that it holds are kept; points of the
        same ones that were measured in the last seven days are not measured again.
    slots : int
        Slots whose weights a rank holds.
    activated, tokens : sequence of int, optional
        Grid; points with fewer tokens than activated slots, or more slots than there are, are
        left out. By default what the phase visits.
    phase : {"prefill", "decode", "mixed"}
    seconds : float, optional
        Time at each point, over its three visits; by default 0.6 s, and at least 30 calls on GPUs
        and 9 on CPU.
    soak : float, optional
        Seconds of the largest point before anything counts; by default at least 60 on GPUs and
        until the SM clock's median moves less than 1 %, 0.5 on CPU.
    restart : bool
        Measure again what the file already holds.

    Returns
    -------
    Profile, or None on ranks other than 0 under torchrun.

    Raises
    ------
    ProblemError
        If an option is out of range.
    ReplayError
        If the ranks fail.
    FormatError
        If the file cannot be written, or holds something else.
    """
    at_least("Slots", slots, 1)
    if phase not in get_args(Phase):
        raise ProblemError(f"Phase must be one of {', '.join(get_args(Phase))}, got {phase!r}.")
    usual = default_grid(slots, phase)
    grids: list[tuple[int, ...]] = []
    for name, given, default in (
        ("Activated slots", activated, usual[0]),
        ("Tokens", tokens, usual[1]),
    ):
        for value in given or ():
            at_least(name, value, 1)
        grids.append(tuple(given or default))
    points = tuple(sorted({(a, n) for a in grids[0] for n in grids[1] if a <= min(n, slots)}))
    if not points:
        raise ProblemError(
            f"The grid has no point: activated slots {grids[0]} must be at most the {slots} slots "
            f"and the tokens {grids[1]}. Give fewer activated slots or more tokens."
        )
    for name, limit in (("Seconds", seconds), ("Soak", soak)):
        if limit is not None and not 0 <= limit < float("inf"):
            raise ProblemError(f"{name} must be a finite number from 0, got {limit}.")
    check_output(out)
    if Path(out).exists():
        read_profile(out)  # refuse another file before measuring
    job = CalibrateJob(
        runtime=runtime,
        out=str(Path(out).absolute()),
        slots=slots,
        points=points,
        phase=phase,
        seconds=seconds,
        soak=soak,
        restart=restart,
    )
    found: Profile | None = run_job(job)
    return found


@dataclass(frozen=True, kw_only=True)
class CalibrateJob:
    """What each rank measures."""

    runtime: Runtime
    out: str
    slots: int
    points: tuple[tuple[int, int], ...]
    phase: Phase
    seconds: float | None
    soak: float | None
    restart: bool

    def run(self, world: "World") -> Profile | None:
        """Measure; rank 0 writes the file after each point and returns the profile."""
        return _Meter(self, world).run()


class _Meter:
    """The measurement on one rank."""

    def __init__(self, job: CalibrateJob, world: "World"):
        from moeplace.replay.kernels import Experts
        from moeplace.replay.nvml import Gauge

        self.job, self.world = job, world
        kind = "cuda" if world.cuda else "cpu"
        self.seconds = _SECONDS[kind] if job.seconds is None else job.seconds
        self.settle = min(_SETTLE[kind], self.seconds)
        self.soak = _SOAK[kind] if job.soak is None else job.soak
        self.seconds /= VISITS
        self.least = _LEAST[kind] // VISITS
        world.agree(
            "calibration (grid or options)", repr((job.runtime, job.slots, job.points, job.phase))
        )
        world.together(self._check)
        runtime = job.runtime
        self.experts = world.together(
            lambda: Experts(runtime.kernel, runtime.factor(world.rank), world.device, world.dtype)
        )
        self.uuid, self.name = device_key(world, runtime.factor(world.rank))
        self.gauge = Gauge(self.uuid)

    def _check(self) -> None:
        import torch

        job, world = self.job, self.world
        dtype = str(world.dtype).removeprefix("torch.")
        needed = job.slots * job.runtime.expert_bytes(dtype) + (_FLUSH if world.cuda else 0)
        needed += max(n for _, n in job.points) * job.runtime.row_bytes(dtype)
        if world.cuda:
            free: int | None = torch.cuda.mem_get_info(world.device)[0]
        else:
            free, needed = free_memory(), needed * world.on_host
        check_memory(
            needed,
            free,
            f"Calibration with {job.slots} slots on this {'GPU' if world.cuda else 'machine'}",
            "Lower --slots, --tokens or --hidden.",
        )

    def run(self) -> Profile | None:
        import torch

        from moeplace.replay.layer import expert_weights

        job, world, runtime = self.job, self.world, self.job.runtime
        self.up, self.down = expert_weights(
            list(range(job.slots)),
            0,
            runtime.hidden,
            runtime.intermediate,
            runtime.seed,
            world.device,
            world.dtype,
        )
        most = max(n for _, n in job.points)
        drawn = torch.Generator(world.device).manual_seed(runtime.seed)
        self.rows = torch.randn(
            (most, runtime.hidden), device=world.device, dtype=world.dtype, generator=drawn
        )
        self.flush = torch.empty(_FLUSH if world.cuda else 0, dtype=torch.int8).to(world.device)
        entries = world.gather(self._entry([], []))
        old = world.first(self._old(entries) if world.rank == 0 else None)
        assert old is not None
        before, entries, done = old
        todo = [point for point in job.points if point not in done]
        generator = np.random.default_rng(runtime.seed)
        visits = [todo[i] for _ in range(VISITS) for i in generator.permutation(len(todo))]
        if todo:
            self._soak(max(job.points, key=lambda point: point[::-1]))
        anchor = max(job.points, key=lambda point: (point[0], -abs(point[1] - most // 4)))
        times: dict[tuple[int, int], list[list[float]]] = {point: [] for point in todo}
        for number, point in enumerate(visits):
            extra = None
            if number % _ANCHOR_EVERY == 0 or number == len(visits) - 1:
                extra = float(np.median(self._visit(anchor)))
            times[point].append(self._visit(point))
            measured = world.gather((_sample(point, times[point]), extra, self.gauge.summary()))
            entries = [
                _extended(entry, *part) for entry, part in zip(entries, measured, strict=True)
            ]
            if world.rank == 0:
                write_profile(before.merged(entries), job.out)
                _log.info("visit %d of %d: %s", number + 1, len(visits), point)
        for entry in entries:
            if abs(entry.drift) > _DRIFT and world.rank == 0:
                _log.warning(
                    "The anchor of %s moved by %.1f %% from first to last: let it soak longer, or "
                    "stop other work on it, and calibrate again.",
                    entry.uuid,
                    100 * entry.drift,
                )
        return before.merged(entries) if world.rank == 0 else None

    def _old(self, entries: list[Entry]) -> tuple[Profile, list[Entry], set[tuple[int, int]]]:
        """The file as it stands, what of it goes on, and the points that all ranks have."""
        job = self.job
        before = read_profile(job.out) if Path(job.out).exists() else Profile(entries=[])
        kept, done = [], set(job.points)
        now = datetime.now(UTC)
        for entry in entries:
            same = [
                old
                for old in before.entries
                if (old.uuid, old.host, old.setting, old.slots)
                == (entry.uuid, entry.host, entry.setting, entry.slots)
                and (now - datetime.fromisoformat(old.date)).days < MAX_AGE_DAYS
            ]
            if job.restart or not same:
                return before, entries, set()
            kept.append(same[0])
            done &= {(s.activated, s.tokens) for s in same[0].samples if s.visits >= VISITS}
        return before, kept, done

    def _entry(self, samples: list[Sample], anchors: list[float]) -> Entry:
        world, runtime = self.world, self.job.runtime
        return Entry(
            uuid=self.uuid,
            host=world.host,
            rank=world.rank,
            date=_stamp(),
            label=world.label,  # type: ignore[arg-type]
            device=self.name,
            phase=self.job.phase,
            kernel=self.experts.name,
            dtype=str(world.dtype).removeprefix("torch."),
            hidden=runtime.hidden,
            intermediate=runtime.intermediate,
            slots=self.job.slots,
            samples=samples,
            anchors=anchors,
        )

    def _soak(self, point: tuple[int, int]) -> None:
        """Run the largest point until clocks have settled: a fixed time where none can be read."""
        began, clocks = time.monotonic(), []
        while True:
            self._calls(point, min(1.0, self.soak), 1)
            clock = self.gauge.read()
            if clock is not None:
                clocks.append(clock)
            spent = time.monotonic() - began
            recent, earlier = clocks[-10:], clocks[-20:-10]
            steady = len(earlier) < 10 or (
                abs(float(np.median(recent) / np.median(earlier)) - 1) < 0.01
            )
            # All ranks leave together: they go on heating each other until then.
            if all(self.world.gather(spent >= self.soak and (steady or spent >= 5 * self.soak))):
                return

    def _visit(self, point: tuple[int, int]) -> list[float]:
        """Seconds of calls at a point, which all ranks visit at the same time."""
        self._calls(point, self.settle, 1)
        self.world.barrier()
        times = self._calls(point, self.seconds, self.least)
        self.gauge.read()
        return times

    def _calls(self, point: tuple[int, int], seconds: float, least: int) -> list[float]:
        """Seconds of each call, for at least so long and so many calls."""
        import torch

        from moeplace.replay.kernels import Groups
        from moeplace.replay.world import Span

        activated, tokens = point
        share = [tokens // activated + (i < tokens % activated) for i in range(activated)]
        groups = Groups.of(share + [0] * (self.job.slots - activated), self.world.device)
        again, rows = self.experts.repeats(groups), self.rows[:tokens]
        spans: list[Span] = []
        began = time.monotonic()
        while len(spans) < _CALLS and (len(spans) < least or time.monotonic() - began < seconds):
            if self.world.cuda:
                self.flush.zero_()
            with Span(self.world.device) as span:
                self.experts.run(rows, self.up, self.down, groups, again)
            spans.append(span)
            if self.world.cuda and len(spans) % 16 == 0:  # the queue stays short
                torch.cuda.synchronize(self.world.device)
        if self.world.cuda:
            torch.cuda.synchronize(self.world.device)
            return [span.wall for span in spans]
        return [span.cpu for span in spans]


def device_key(world: "World", factor: float) -> tuple[str, str]:
    """UUID and name of this rank's device; host, rank and slowness stand for a CPU rank's."""
    if not world.cuda:
        return cpu_key(world.host, world.rank, factor), "CPU"
    import torch

    properties = torch.cuda.get_device_properties(world.device)
    uuid = getattr(properties, "uuid", None)
    key = f"{world.host}-cuda{world.device.index}" if uuid is None else f"GPU-{uuid}"
    return key, properties.name


def cpu_key(host: str, rank: int, factor: float) -> str:
    """Key of an emulated rank: its CPU is no better known than that."""
    return f"cpu-{host}-rank{rank}-x{factor:g}"


def _sample(point: tuple[int, int], visits: list[list[float]]) -> Sample:
    """The sample of all visits of a point so far."""
    times = np.concatenate([np.array(visit) for visit in visits])
    low, middle, high = np.quantile(times, [0.1, 0.5, 0.9])
    return Sample(
        activated=point[0],
        tokens=point[1],
        median=float(middle),
        p10=float(low),
        p90=float(high),
        count=times.size,
        visits=len(visits),
    )


def _extended(entry: Entry, sample: Sample, anchor: float | None, conditions: Any) -> Entry:
    """An entry with a new or better sample."""
    point = (sample.activated, sample.tokens)
    others = [s for s in entry.samples if (s.activated, s.tokens) != point]
    return msgspec.structs.replace(
        entry,
        samples=sorted([*others, sample], key=lambda s: (s.activated, s.tokens)),
        anchors=entry.anchors if anchor is None else [*entry.anchors, anchor],
        date=_stamp(),
        conditions=conditions or entry.conditions,
    )


def _stamp() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


if __name__ == "__main__":  # for torchrun -m
    import sys

    from moeplace.cli import main

    main(["calibrate", *sys.argv[1:]])
