"""Ranks are lost or added: a map for those that are there, at once."""

from dataclasses import dataclass

import numpy as np

from moeplace._check import FloatArray, IntArray, numbers
from moeplace.errors import ProblemError
from moeplace.integrations import tables
from moeplace.integrations.planner import Ask, Proposal, propose
from moeplace.integrations.settings import Effort
from moeplace.plan import EMPTY

#: A lost rank is an emergency: near the bound, with few moves besides those that must be.
EMERGENCY = Effort(gap=0.03, min_saving=0.0, move_cost=1e-3)
#: New ranks are filled, and no copy more is moved: the next rebalance may.
FEWEST = Effort(gap=0.03, min_saving=0.0, max_moves=0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Recovery:
    """A map for the ranks that serve.

    Attributes
    ----------
    plan : Proposal
        `slots` [layers, slots of these ranks], in their order.
    orphans : tuple of (layer, expert)
        Experts that no rank left holds: their weights must come from disk or host memory.
    """

    plan: Proposal
    orphans: tuple[tuple[int, int], ...]


def without_ranks(
    old: IntArray,
    loads: FloatArray,
    ranks: int,
    lost: list[int],
    speeds: FloatArray | None = None,
    effort: Effort = EMERGENCY,
) -> Recovery:
    """Plan for the ranks that are left, from what they hold.

    Parameters
    ----------
    old : int array [layers, slots]
        The map before.
    loads : array [layers, experts]
        Tokens; all zero is taken as equal loads.
    ranks : int
        Of before.
    lost : list of int
    speeds : array [ranks], optional
        Of before; equal by default.

    Raises
    ------
    ProblemError
        If the slots left are fewer than experts, or the input is not of these shapes.
    """
    alive = np.ones(ranks, dtype=np.bool_)
    wrong = [rank for rank in lost if not 0 <= rank < ranks]
    if wrong:
        raise ProblemError(f"Rank {wrong[0]} is lost, but there are {ranks} (0 to {ranks - 1}).")
    alive[list(lost)] = False
    if not alive.any():
        raise ProblemError(f"All {ranks} ranks are lost: none is left to plan for.")
    old, loads, speed = _checked(old, loads, ranks, speeds)
    left = old.reshape(old.shape[0], ranks, -1)[:, alive].reshape(old.shape[0], -1)
    return _recover(left, loads, speed[alive], effort)


def with_ranks(
    old: IntArray,
    loads: FloatArray,
    ranks: int,
    added: int,
    speeds: FloatArray | None = None,
    effort: Effort = FEWEST,
) -> Recovery:
    """Plan that fills `added` ranks behind the `ranks` of before, and moves nothing else.

    Parameters
    ----------
    old, loads, ranks : as in `without_ranks`
    added : int
    speeds : array [ranks + added], optional

    Raises
    ------
    ProblemError
        If the input is not of these shapes.
    """
    if added < 1:
        raise ProblemError(f"At least one rank must be added, got {added}.")
    old, loads, _ = _checked(old, loads, ranks, None)
    each = old.shape[1] // ranks
    wider = np.pad(old, ((0, 0), (0, added * each)), constant_values=EMPTY)
    speed = np.ones(ranks + added) if speeds is None else np.asarray(speeds, dtype=np.float64)
    if speed.shape != (ranks + added,):
        raise ProblemError(f"{ranks + added} ranks need a speed each, got shape {speed.shape}.")
    return _recover(wider, loads, speed, effort)


def _checked(
    old: IntArray, loads: FloatArray, ranks: int, speeds: FloatArray | None
) -> tuple[IntArray, FloatArray, FloatArray]:
    load = numbers(loads, "Loads", ("layer", "expert"), ProblemError)
    table = np.asarray(old)
    sound = table.ndim == 2 and table.shape[0] == load.shape[0] and table.dtype.kind in "iu"
    if not sound or table.shape[1] % ranks or not -1 <= table.min() <= table.max() < load.shape[1]:
        raise ProblemError(
            f"The map in use must hold experts 0 to {load.shape[1] - 1} (-1 for none) in "
            f"[{load.shape[0]} layers, slots of {ranks} equal ranks], got shape {table.shape}."
        )
    speed = np.ones(ranks) if speeds is None else np.asarray(speeds, dtype=np.float64)
    if speed.shape != (ranks,):
        raise ProblemError(f"{ranks} ranks need a speed each, got shape {speed.shape}.")
    load = np.where(load.any(axis=1, keepdims=True), load, 1.0)
    return table.astype(np.int64), load, speed


def _recover(left: IntArray, loads: FloatArray, speeds: FloatArray, effort: Effort) -> Recovery:
    there = tables.held(left, speeds.size, loads.shape[1]).any(axis=1)
    orphans = tuple((int(layer), int(expert)) for layer, expert in np.argwhere(~there))
    ask = Ask(loads=loads, speeds=speeds, slots_per_rank=left.shape[1] // speeds.size, old=left)
    return Recovery(plan=propose(ask, effort), orphans=orphans)
