"""Working state of the planners: all layers at once, as plain arrays that kernels change.

Ranks hold slots in ascending order of value; EMPTY is expert number E with value 0, so that a
move into a free slot is an exchange with an expert that weighs nothing.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moeplace._check import FloatArray, IntArray
from moeplace.plan import EMPTY, Plan
from moeplace.problem import Problem

#: Bits of `State.on`.
HELD, BARRED, PINNED = 1, 2, 4


@dataclass(kw_only=True, eq=False)
class State:
    """Layers under construction, in units of each layer's fluid bound.

    Attributes
    ----------
    load : array [layers, experts + 1]
        Tokens; the last column (EMPTY) is 0.
    base : array [layers, ranks]
    speed : array [ranks]
    cap : array [ranks]
        Slots of each rank that can be used.
    unit : array [layers]
        What makespans here are multiplied by to get seconds.
    slot : array [layers, ranks, most slots]
        Expert in each slot; only the first `cap` of a rank count.
    value : array [layers, ranks, most slots]
        Tokens that the slot carries under even routing.
    tokens : array [layers, ranks]
    copies : array [layers, experts + 1]
    on : array of bits [layers, ranks, experts + 1]
        HELD: the rank has a replica; BARRED: it must not; PINNED: it must.
    random : array of uint64 [layers]
        State of each layer's random numbers.
    work : array [layers]
        Search steps used.
    """

    load: FloatArray
    base: FloatArray
    speed: FloatArray
    cap: IntArray
    unit: FloatArray
    slot: IntArray
    value: FloatArray
    tokens: FloatArray
    copies: IntArray
    on: npt.NDArray[np.uint8]
    random: npt.NDArray[np.uint64]
    work: IntArray

    @classmethod
    def of(cls, problem: Problem, seed: int = 0) -> "State":
        """Empty state of the problem's layers, on the weighted mean of its windows."""
        layers, experts, ranks = problem.layers, problem.experts, problem.ranks
        weight = problem.window_weight[:, None, None]
        mean, base = (problem.tokens * weight).sum(axis=0), (problem.base * weight).sum(axis=0)
        unit = problem.cluster.fluid_seconds(mean.sum(axis=1), base)
        scale = np.where(unit > 0, unit, 1.0)[:, None]
        load = np.zeros((layers, experts + 1))
        load[:, :experts] = mean / scale
        cap = np.minimum(problem.cluster.slots, experts)
        on = np.zeros((layers, ranks, experts + 1), dtype=np.uint8)
        if problem.constraints or (cap == 0).any():
            on[:, :, :experts] |= np.where(problem.allowed, 0, BARRED).astype(np.uint8).swapaxes(1, 2)
            on[:, :, :experts] |= np.where(problem.pinned, PINNED, 0).astype(np.uint8).swapaxes(1, 2)
        on[:, cap == 0, experts] = BARRED
        most = int(cap.max())
        streams = np.random.SeedSequence(seed).generate_state(2, np.uint64)
        random = (np.arange(layers, dtype=np.uint64) + streams[0]) * np.uint64(0x9E3779B97F4A7C15)
        return cls(
            load=load,
            base=base / scale,
            speed=problem.cluster.speeds,
            cap=cap,
            unit=np.where(unit > 0, unit, 1.0),
            slot=np.full((layers, ranks, most), experts),
            value=np.zeros((layers, ranks, most)),
            tokens=base / scale,
            copies=np.zeros((layers, experts + 1), dtype=np.int64),
            on=on,
            random=random ^ streams[1] | np.uint64(1),
            work=np.zeros(layers, dtype=np.int64),
        )

    @property
    def makespan(self) -> FloatArray:
        """Makespan [layers] under even routing, in units of `unit`."""
        return np.asarray((self.tokens / self.speed).max(axis=1))

    def slots(self, rank_slots: IntArray) -> IntArray:
        """Slots [layers, slots] of a plan: experts ascending on each rank, EMPTY last."""
        layers, ranks, most = self.slot.shape
        experts = self.load.shape[1] - 1
        used = np.arange(most) < self.cap[:, None]
        ordered = np.sort(np.where(used, self.slot, experts), axis=2)
        ordered = np.where(ordered == experts, EMPTY, ordered)
        if (rank_slots == most).all():
            return ordered.reshape(layers, -1)
        full = np.full((layers, ranks, int(rank_slots.max())), EMPTY)
        full[:, :, :most] = ordered
        return full[:, np.arange(full.shape[2]) < rank_slots[:, None]]

    def plan(self, problem: Problem) -> Plan:
        """The placement as a checked plan."""
        rank_slots = problem.cluster.slots
        return Plan(slots=self.slots(rank_slots), rank_slots=rank_slots, experts=problem.experts)
