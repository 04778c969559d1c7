"""Working state of the planners: all layers at once, as plain arrays that kernels change.

Ranks hold slots in ascending order of value; EMPTY is expert number E with value 0, so that a
move into a free slot is an exchange with an expert that weighs nothing.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplace._check import FloatArray, IntArray, frozen
from moeplace.constraints import CAPACITY_SLACK
from moeplace.plan import EMPTY, Plan
from moeplace.problem import Problem

#: Bits of `State.on`.
HELD, BARRED, PINNED, OLD = 1, 2, 4, 8


@dataclass(kw_only=True, eq=False)
class State:
    """Layers under construction, in units of each layer's fluid bound.

    Attributes
    ----------
    load : array [layers, experts + 1]
        Tokens; the last column (EMPTY) is 0.
    base : array [layers, ranks]
    speed : array [layers, ranks]
        What a layer's makespan is measured by (see `aims`: token capacities lower it).
    cap : array [ranks]
        Slots of each rank that can be used.
    least : array [layers, experts + 1]
        Copies that must stay: 1 of each expert, and of EMPTY the slots beyond the layer's quota
        of replicas.
    most : array [experts + 1]
        Copies that there may be; of EMPTY any number.
    unit : array [layers]
        What makespans here are multiplied by to get seconds.
    slot : array [layers, ranks, most slots]
        Expert in each slot; only the first `cap` of a rank count.
    value : array [layers, ranks, most slots]
        Tokens that the slot carries under even routing.
    tokens : array [layers, ranks]
    copies : array [layers, experts + 1]
        Replicas of each expert; free slots in the last column.
    on : array of bits [layers, ranks, experts + 1]
        HELD: the rank has a replica; BARRED: it must not; PINNED: it must; OLD: the current
        plan has it there.
    random : array of uint64 [layers]
        State of each layer's random numbers.
    work : array [layers]
        Search steps used.
    """

    load: FloatArray
    base: FloatArray
    speed: FloatArray
    cap: IntArray
    least: IntArray
    most: IntArray
    unit: FloatArray
    slot: IntArray
    value: FloatArray
    tokens: FloatArray
    copies: IntArray
    on: npt.NDArray[np.uint8]
    random: npt.NDArray[np.uint64]
    work: IntArray

    @classmethod
    def of(cls, problem: Problem, seed: int = 0, quota: IntArray | None = None) -> "State":
        """Empty state of the problem's layers, on the weighted mean of its windows.

        `quota` [layers] limits the replicas in each layer; by default their slots do.
        """
        tokens, base = problem.mean_load
        cluster = problem.cluster
        unit = cluster.fluid_seconds(tokens.sum(axis=1), base)
        state = cls._empty(tokens, base, unit, cluster.speeds, cluster.slots, seed)
        state.most[:-1] = problem.most_replicas
        if quota is not None:
            state.least[:, -1] = np.maximum(state.cap.sum() - quota, 0)
        if problem.constraints:
            held = state.on[:, :, : problem.experts]
            held |= np.where(problem.allowed, 0, BARRED).astype(np.uint8).swapaxes(1, 2)
            held |= np.where(problem.pinned, PINNED, 0).astype(np.uint8).swapaxes(1, 2)
        return state

    @classmethod
    def alone(
        cls, load: FloatArray, base: FloatArray, speed: FloatArray, slots: IntArray, seed: int
    ) -> "State":
        """Empty state of a single layer: load [experts], the others [ranks]."""
        unit = np.atleast_1d((load.sum() + base.sum()) / speed.sum())
        return cls._empty(load[None], base[None], unit, speed, slots, seed)

    @classmethod
    def _empty(
        cls,
        tokens: FloatArray,
        base: FloatArray,
        unit: FloatArray,
        speed: FloatArray,
        slots: IntArray,
        seed: int,
    ) -> "State":
        layers, experts = tokens.shape
        unit = np.where(unit > 0, unit, 1.0)
        load = np.zeros((layers, experts + 1))
        load[:, :experts] = tokens / unit[:, None]
        cap = np.minimum(slots, experts)
        on = np.zeros((layers, cap.size, experts + 1), dtype=np.uint8)
        on[:, cap == 0, :] = BARRED
        most = int(cap.max())
        streams = np.random.SeedSequence(seed).generate_state(2, np.uint64)
        random = (np.arange(layers, dtype=np.uint64) + streams[0]) * np.uint64(0x9E3779B97F4A7C15)
        return cls(
            load=load,
            base=base / unit[:, None],
            speed=np.tile(speed, (layers, 1)),
            cap=cap,
            least=np.repeat([[1] * experts + [0]], layers, axis=0),
            most=np.full(experts + 1, np.iinfo(np.int64).max),
            unit=unit,
            slot=np.full((layers, cap.size, most), experts),
            value=np.zeros((layers, cap.size, most)),
            tokens=base / unit[:, None],
            copies=np.zeros((layers, experts + 1), dtype=np.int64),
            on=on,
            random=random ^ streams[1] | np.uint64(1),
            work=np.zeros(layers, dtype=np.int64),
        )

    @property
    def makespan(self) -> FloatArray:
        """Makespan [layers] under even routing, in units of `unit`."""
        return np.asarray((self.tokens / self.speed).max(axis=1))

    def plan(self, problem: Problem) -> Plan:
        """The placement as a checked plan: experts ascending on each rank, EMPTY last."""
        used = np.arange(self.slot.shape[2]) < self.cap[:, None]
        ordered = np.sort(np.where(used, self.slot, problem.experts), axis=2)
        rank_slots = problem.cluster.slots
        slots = to_slots(np.where(ordered == problem.experts, EMPTY, ordered), rank_slots)
        return Plan(slots=slots, rank_slots=rank_slots, experts=problem.experts)


def ceiling(problem: Problem) -> FloatArray:
    """Token capacity of each rank [ranks], with the slack for rounding but for a thousandth."""
    return frozen(problem.capacity * (1 + 0.999 * CAPACITY_SLACK))


def to_slots(table: Any, rank_slots: IntArray, fill: float = EMPTY) -> Any:
    """Undo `plan.by_rank`: [layers, ranks, most usable] -> [layers, slots], `fill` beyond."""
    layers, ranks, most = table.shape
    if (rank_slots == most).all():
        return table.reshape(layers, -1)
    full = np.full((layers, ranks, int(rank_slots.max())), fill, dtype=table.dtype)
    full[:, :, :most] = table
    return full[:, np.arange(full.shape[2]) < rank_slots[:, None]]
