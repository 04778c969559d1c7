"""Stages of a migration: what ranks send and receive, how long it takes, when it pays."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from moeplace._check import IntArray
from moeplace.errors import ProblemError
from moeplace.plan import EMPTY, Plan

Mode = Literal["stall", "slowed"]


@dataclass(frozen=True, kw_only=True)
class Copy:
    """One expert's weights, from a slot of `source` into a slot of `rank`."""

    expert: int
    source: int
    rank: int
    slot: int


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Copies of one layer that are received into buffers and then take effect at once.

    Attributes
    ----------
    layer : int
    turn : int
        Between which forward passes: stages of one turn run without a pass in between.
    copies : tuple of Copy
    dropped : tuple of int
        Slots that become EMPTY.
    """

    layer: int
    turn: int
    copies: tuple[Copy, ...]
    dropped: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Links:
    """Bandwidth of a rank in each direction, bytes per second, and seconds lost in every stage.

    Both directions and both kinds of link work at the same time.
    """

    intra: float
    inter: float
    overhead: float = 0.0

    def __post_init__(self) -> None:
        for name, value, least in (
            ("intra", self.intra, 1.0),
            ("inter", self.inter, 1.0),
            ("overhead", self.overhead, 0.0),
        ):
            real = isinstance(value, int | float | np.number) and not isinstance(value, bool)
            if not (real and least <= value < float("inf")):
                raise ProblemError(
                    f"Links: {name} must be a finite number of at least {least:g} "
                    f"({'seconds' if name == 'overhead' else 'bytes per second'}), got {value!r}."
                )


@dataclass(frozen=True, kw_only=True, eq=False)
class Migration:
    """How ranks get from one plan to another.

    Attributes
    ----------
    current, target : Plan
        The target's slots are arranged so that what stays on a rank stays in its slot.
    nodes : array [ranks]
    expert_bytes : array [layers]
        Bytes of one expert.
    stages : tuple of Stage
    buffer : int
        Experts that a rank receives at most before they take effect: memory beyond its slots.
    """

    current: Plan
    target: Plan
    nodes: IntArray
    expert_bytes: IntArray
    stages: tuple[Stage, ...]
    buffer: int

    @cached_property
    def moves(self) -> int:
        """Copies that ranks receive from others; both of two on one rank, as old maps hold them."""
        return sum(copy.source != copy.rank for stage in self.stages for copy in stage.copies)

    @cached_property
    def bytes(self) -> int:
        """Bytes that ranks receive from others."""
        return sum(
            int(self.expert_bytes[stage.layer]) * (copy.source != copy.rank)
            for stage in self.stages
            for copy in stage.copies
        )

    @cached_property
    def cross_node(self) -> int:
        """Copies whose source is on another node."""
        return sum(
            bool(self.nodes[copy.source] != self.nodes[copy.rank])
            for stage in self.stages
            for copy in stage.copies
        )

    @property
    def turns(self) -> int:
        """Forward passes over which the stages are spread."""
        return len({stage.turn for stage in self.stages})

    def seconds(self, links: Links) -> float:
        """Time of all stages one after the other; each ends when its busiest rank ends."""
        return float(sum(self.stage_seconds(stage, links) for stage in self.stages))

    def stage_seconds(self, stage: Stage, links: Links) -> float:
        """Time of the busiest rank and direction; copies within a rank count as nothing."""
        size = float(self.expert_bytes[stage.layer])
        busy = np.zeros((2, 2, self.nodes.size))  # link, direction, rank
        for copy in stage.copies:
            if copy.source != copy.rank:
                link = int(self.nodes[copy.source] != self.nodes[copy.rank])
                busy[link, 0, copy.source] += size
                busy[link, 1, copy.rank] += size
        slowest = max(busy[0].max() / links.intra, busy[1].max() / links.inter)
        return float(slowest) + links.overhead

    def after(self, stages: int) -> Plan:
        """The plan that is served after so many stages, with even shares."""
        slots = np.array(self.current.slots)
        for stage in self.stages[:stages]:
            for copy in stage.copies:
                slots[stage.layer, copy.slot] = copy.expert
            slots[stage.layer, list(stage.dropped)] = EMPTY
        return Plan(
            slots=slots,
            rank_slots=self.current.rank_slots,
            experts=self.current.experts,
            allow_duplicates=self.current.allow_duplicates,
        )


@dataclass(frozen=True, kw_only=True)
class Payback:
    """When a migration has earned what it costs.

    Attributes
    ----------
    gain : float
        Seconds saved in each step afterwards.
    stall : float
        Seconds lost if serving stops while weights move.
    slowed : float
        Seconds lost if it goes on, slower, while weights move beside it.
    duration : float
        Seconds that the slowed phase takes.
    """

    gain: float
    stall: float
    slowed: float
    duration: float

    def steps(self, mode: Mode = "stall") -> float:
        """Steps until the cost is earned; infinite if nothing is gained."""
        cost = self.stall if mode == "stall" else self.slowed
        return cost / self.gain if self.gain > 0 else (0.0 if cost == 0 else float("inf"))

    def net(self, steps: float, mode: Mode = "stall") -> float:
        """Seconds won over so many steps, the cost taken off."""
        return self.gain * steps - (self.stall if mode == "stall" else self.slowed)


def payback(
    migration: Migration,
    links: Links,
    *,
    before: float,
    after: float,
    slowdown: float = 0.1,
    share: float = 0.5,
) -> Payback:
    """What a migration costs and earns.

    Parameters
    ----------
    migration : Migration
    links : Links
    before, after : float
        Seconds of a step under the current plan and under the new one.
    slowdown : float
        Part by which steps take longer while weights move beside them; 1 at most.
    share : float
        Part of the bandwidth that the moving weights then get.

    Raises
    ------
    ProblemError
        If a number is out of range.
    """
    check_slowdown(slowdown, share)
    _within("before", before, 0.0, 1e12)
    _within("after", after, 0.0, 1e12)
    stall = migration.seconds(links)
    duration = max(stall / share, migration.turns * before)
    return Payback(gain=before - after, stall=stall, slowed=slowdown * duration, duration=duration)


def check_slowdown(slowdown: float, share: float) -> None:
    """Raise ProblemError unless both are shares of one, that of the bandwidth above 0."""
    _within("slowdown", slowdown, 0.0, 1.0)
    _within("share", share, 1e-6, 1.0)


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ProblemError(f"Payback: {name} must be from {low:g} to {high:g}, got {value!r}.")
