"""Token capacities under even routing: makespans aimed at, as speeds that ranks are measured by.

A layer that aims at T measures rank g by the speed min(v_g, C_g / T): a placement that ends by T
so measured obeys the capacities C and has a makespan of at most T, and the other way round. So
the search for the least T needs no other kernels: an aim that is missed rises, until a legal
placement is known; from then on aims lie between the target and what is reached.
"""

import numpy as np

from moeplace._check import FloatArray
from moeplace.problem import Problem
from moeplace.search.state import State, ceiling

#: A rank without room is measured by this share of its speed.
SLOWEST = 1e-100
#: Least rise of an aim that was missed before any placement was legal; it doubles each time.
RISE = 1e-3
#: The aims between target and reached makespan: a half, a quarter, ... of the way down; then anew.
HALVINGS = 8


class Aims:
    """What the layers of a state aim at; sets `State.speed`.

    Parameters
    ----------
    problem : Problem
    state : State
        On its mean load: with several windows this is a start only.
    target : array [layers]
        Makespan at which a layer is done, in units of `state.unit`.

    Attributes
    ----------
    aim : array [layers]
        The target itself where capacities are not limited.
    """

    def __init__(self, problem: Problem, state: State, target: FloatArray) -> None:
        self.state, self.target, self.aim = state, target, target.copy()
        self.limited = bool(np.isfinite(problem.capacity).any())
        self._speed = problem.cluster.speeds
        self._room = ceiling(problem) / state.unit[:, None]
        self._reached = np.full(target.size, np.inf)
        self._missed = np.zeros(target.size, dtype=np.int64)
        self._measure()

    def _measure(self) -> None:
        if self.limited:
            capped = self._room / np.maximum(self.aim, SLOWEST)[:, None]
            self.state.speed[:] = np.clip(capped, SLOWEST * self._speed, self._speed)

    def follow(self) -> None:
        """Set the next aims by what the state has reached."""
        if not self.limited:
            return
        tokens, measured = self.state.tokens, self.state.makespan
        makespan = (tokens / self._speed).max(axis=1)
        legal = (tokens <= self._room).all(axis=1)
        self._reached = np.where(legal, np.minimum(makespan, self._reached), self._reached)
        self._missed = np.where(measured <= self.aim, 0, self._missed + 1)
        rise = RISE * 2.0 ** np.minimum(self._missed, 30)
        above = np.where(np.isfinite(self._reached), self._reached, self.target) - self.target
        between = self.target + above * (1 - 0.5 ** (1 + self._missed % HALVINGS))
        self.aim = np.where(
            np.isfinite(self._reached), between, np.maximum(measured, self.aim * (1 + rise))
        )
        self.aim = np.where(self._reached <= self.target, self.target, self.aim)
        self._measure()
