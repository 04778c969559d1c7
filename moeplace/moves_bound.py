"""Lower bounds under a budget of moves: what few received copies cannot mend.

Two arguments. `stay_curve`: experts that receive nothing stay within their ranks (any routing).
`FewMoves`: exhaustive over what experts with several replicas can do (even routing), in whole
numbers, by a compiled depth-first search; `bounds.recompute` runs the search again.
"""

import time

import numpy as np
from numba import njit

from moeplace._check import FloatArray
from moeplace.plan import EMPTY
from moeplace.problem import Problem

#: Experts with more replicas than this are left out of the search.
MOST_COPIES = 6
#: Nodes of the search when a bound is checked again.
THOROUGH = 2_000_000_000
#: Nodes in a second, and the last step of a bisection that has so many seconds.
PACE, STEP = 20_000_000, 0.02
#: Tokens are multiplied to whole numbers of this size for the busiest rank.
GRID = float(1 << 44)
#: Less than this in all is no load: its grid would overflow.
LEAST = 1e-250


def stay_curve(problem: Problem, window: int, layer: int, slack: float) -> FloatArray:
    """Bound [experts + 1] on the makespan if 0, 1, 2, ... copies are received.

    Any routing. Proof: let X be some ranks. An expert whose replicas all lie on X, and of which
    no copy is received, still lies wholly on X. So with M copies received X carries its base
    load and the loads of all such experts but at most M of them, at least all but the M
    largest. The sets tried are the n slowest ranks under the current plan, for every n.
    """
    assert problem.max_moves is not None
    plan, speeds = problem.max_moves.current, problem.cluster.speeds
    load, base = problem.tokens[window, layer], problem.base[window, layer]
    held = plan.slots[layer] != EMPTY
    expert, rank = plan.slots[layer, held], plan.rank_of_slot[held]
    share = load[expert] / plan.replicas[layer, expert]
    carried = base + np.bincount(rank, weights=share, minlength=speeds.size)
    order = np.argsort(-carried / speeds, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(order.size)
    last = np.zeros(load.size, dtype=np.int64)
    np.maximum.at(last, expert, place[rank])
    inside = np.where(last <= np.arange(order.size)[:, None], load, 0.0)  # [sets, experts]
    gone = np.cumsum(-np.sort(-inside, axis=1), axis=1)
    left = np.maximum(inside.sum(axis=1)[:, None] - np.insert(gone, 0, 0.0, axis=1), 0.0)
    tokens = left * (1 - slack) + base[order].cumsum()[:, None]
    return np.asarray((tokens / speeds[order].cumsum()[:, None]).max(axis=0) * (1 - slack))


@njit(cache=True, nogil=True, error_model="numpy")
def _idle(could, cap, lost, last, depth, moves, waste):  # type: ignore[no-untyped-def]
    """Room that stays unused, at least, on ranks whose options are all taken at `depth`.

    Ranks that receive may fill up: at most `moves`, so those with the most room left are let off.
    """
    n = 0
    for g in range(cap.size):
        unused = cap[g] - could[g] - lost[g]  # `lost`: what rounding down may have left out
        if last[g] <= depth and unused > 0:
            i = n
            while i > 0 and waste[i - 1] < unused:
                waste[i] = waste[i - 1]
                i -= 1
            waste[i] = unused
            n += 1
    total = 0
    for i in range(moves, n):
        total += waste[i]
    return total


@njit(cache=True, nogil=True, error_model="numpy")
def _excludes(  # type: ignore[no-untyped-def]
    load, hold, holders, start, cap, single, singles, lost, last, slack, moves, limit
):
    """1 if no choice of options keeps every rank within `cap`, 0 if one does, -1 if undecided.

    Options of an expert: (received, kept ranks as bits), in that order. The most copies received
    stand for any more: ranks then carry at least the share at all `moves`, at most that at so many.
    `last` [ranks] is the last expert that a rank holds, `slack` the room of all ranks less all
    tokens.
    """
    ranks = start.size
    waste = np.empty(ranks, dtype=np.int64)
    experts = load.size
    carried = start.copy()  # at least; the rest of a rank's load is its experts of one replica
    could = start.copy()  # at most, if it receives nothing
    need = np.zeros(ranks, dtype=np.int64)
    total = 0
    for g in range(ranks):
        x = carried[g]
        while x > cap[g] and need[g] < singles[g]:
            x -= single[g, need[g]]
            need[g] += 1
        if x > cap[g]:
            return 1
        total += need[g]
    if total > moves or _idle(could, cap, lost, last, -1, moves, waste) > slack:
        return 1
    if experts == 0:
        return 0
    most = cap.max()
    fewest = np.ones(experts, dtype=np.int64)  # replicas that are not larger than any rank's room
    for e in range(experts):
        while load[e] // fewest[e] > most:
            fewest[e] += 1
    option = np.full(experts, -1)
    share = np.zeros(experts, dtype=np.int64)
    high = np.zeros(experts, dtype=np.int64)
    spent = np.zeros(experts, dtype=np.int64)  # copies received by experts above
    needed = np.zeros(experts, dtype=np.int64)  # experts of one replica that must leave so far
    needed[0] = total
    before = np.zeros((experts, hold.shape[1]), dtype=np.int64)
    depth = 0
    nodes = 0
    while depth >= 0:
        count = holders[depth]
        if option[depth] >= 0:
            for i in range(count):
                g = hold[depth, i]
                if option[depth] >> i & 1:
                    carried[g] -= share[depth]
                    could[g] -= high[depth]
                need[g] = before[depth, i]
        while True:
            option[depth] += 1
            received = option[depth] >> count
            kept = 0
            for i in range(count):
                kept += option[depth] >> i & 1
            if received > fewest[depth] or spent[depth] + needed[depth] + received > moves:
                option[depth] = -1
                break
            if kept + received >= fewest[depth]:
                break
        if option[depth] < 0:
            depth -= 1
            continue
        nodes += 1
        if nodes > limit:
            return -1
        high[depth] = load[depth] // (kept + received)
        share[depth] = high[depth]
        if received == fewest[depth]:
            share[depth] = load[depth] // (kept + moves)
        total = needed[depth]
        used = spent[depth] + received
        fits = True
        for i in range(count):
            g = hold[depth, i]
            before[depth, i] = need[g]
            if option[depth] >> i & 1:
                carried[g] += share[depth]
                could[g] += high[depth]
        for i in range(count):
            g = hold[depth, i]
            x = carried[g]
            n = need[g]
            for k in range(n):
                x -= single[g, k]
            while x > cap[g] and n < singles[g]:
                x -= single[g, n]
                n += 1
            total += n - need[g]
            need[g] = n
            if x > cap[g] or used + total > moves:
                fits = False
                break
        if not fits or _idle(could, cap, lost, last, depth, moves, waste) > slack:
            continue
        if depth == experts - 1:
            return 0
        depth += 1
        spent[depth] = used
        needed[depth] = total
    return 1


class FewMoves:
    """One layer in one window: whether a makespan needs more received copies than are allowed.

    Even routing, latency of any kind that is at least tokens / speed. Proof: take a plan within
    T. Each expert e with several replicas today keeps some of them and receives m: with n left in
    all, each kept rank carries w_e / n, an option out of finitely many; what it receives lies
    elsewhere and is left out. An expert with one replica either receives nothing and stays, or
    receives at least one copy and takes at most its whole load away. So for the options taken,
    each rank that would carry more than it can within T must lose experts of one replica, at
    least as many as if the largest left first; these and the copies received in options are at
    most M. And a rank that receives nothing carries no more than its experts of one replica and
    the shares of its options, so it leaves room unused; at most M ranks receive. All ranks
    together have room for little more than all tokens. If no choice of options satisfies both,
    there is no plan. Loads are rounded down to whole numbers and room is too, and what that may
    lose is given back, so that sums are exact: a relaxation.

    Experts with more than `MOST_COPIES` replicas are left out, which relaxes further; ranks that
    hold one may be full.
    """

    def __init__(self, problem: Problem, window: int, layer: int) -> None:
        rules = problem.max_moves
        assert rules is not None
        row, rank = rules.current.slots[layer], rules.current.rank_of_slot
        load, base = problem.tokens[window, layer], problem.base[window, layer]
        self.cluster, self.capacity = problem.cluster, problem.capacity
        total = float(load.sum() + base.sum())
        self.scale = GRID / total if total > LEAST else 1.0  # all of it counts as nothing then
        whole = np.floor(load * self.scale).astype(np.int64)
        self.carried = np.floor(base * self.scale).astype(np.int64)
        held: list[list[int]] = [[] for _ in range(load.size)]
        for expert, at in zip(row.tolist(), rank.tolist(), strict=True):
            if expert != EMPTY and at not in held[expert]:
                held[expert].append(at)
        single: list[list[int]] = [[] for _ in range(problem.ranks)]
        several = []
        self.lost = np.full(problem.ranks, 2)  # base load and room
        self.last = np.full(problem.ranks, -1)
        for expert, ranks in enumerate(held):
            tokens = int(whole[expert])
            self.lost[ranks] += 2  # the load and its share
            if len(ranks) > MOST_COPIES:
                self.last[ranks] = load.size
            if len(ranks) == 1:
                single[ranks[0]].append(tokens)
                self.carried[ranks[0]] += tokens
            elif len(ranks) <= MOST_COPIES:
                several.append((tokens, ranks))
        several.sort(key=lambda pair: -pair[0] // len(pair[1]))
        self.load = np.array([tokens for tokens, _ in several], dtype=np.int64)
        self.holders = np.array([len(ranks) for _, ranks in several], dtype=np.int64)
        self.hold = np.zeros((len(several), MOST_COPIES), dtype=np.int64)
        for n, (_, ranks) in enumerate(several):
            self.hold[n, : len(ranks)] = ranks
            self.last[ranks] = np.maximum(self.last[ranks], n)
        self.total = int(np.floor(total * self.scale * (1 - 1e-12)))
        self.singles = np.array([len(mine) for mine in single])
        self.single = np.zeros((problem.ranks, max(int(self.singles.max()), 1)), dtype=np.int64)
        for at, mine in enumerate(single):
            self.single[at, : len(mine)] = sorted(mine, reverse=True)

    def refutes(self, moves: int, seconds: float, nodes: int = THOROUGH) -> bool:
        """Whether no plan that receives at most `moves` copies ends within `seconds`.

        False also if that is not decided within so many nodes.
        """
        room = np.minimum(self.cluster.tokens_by(np.array([seconds])), self.capacity)
        room = room * self.scale * (1 + 1e-12)
        cap = np.floor(np.minimum(room, GRID * 4)).astype(np.int64)
        slack = int(cap.sum()) + cap.size - self.total
        answer = _excludes(
            self.load, self.hold, self.holders, self.carried, cap, self.single, self.singles,
            self.lost, self.last, slack, moves, nodes,
        )  # fmt: skip
        return bool(answer == 1)

    def bound(
        self, moves: int, low: float, high: float, nodes: int, seconds: float | None = None
    ) -> float:
        """Largest makespan that `refutes` excludes, by bisection from `low` (returned if none).

        The search goes up to `high`. With `seconds` it is as deep as they allow, in rougher steps
        that begin small: what is near `low` is refuted soonest.
        """
        end = np.inf if seconds is None else time.perf_counter() + seconds
        if seconds is None and not self.refutes(moves, low * (1 + 1e-9), nodes):
            return low
        step = 0.5 if seconds is None else 1 / 16
        finest = 1e-7 * low if seconds is None else max(STEP * (high - low), 1e-7 * low)
        while high - low > finest:
            if seconds is not None:
                left = end - time.perf_counter()
                nodes = int(left / 3 * PACE)
                if nodes <= 0:
                    break
            middle = low + step * (high - low)
            if self.refutes(moves, middle, nodes):
                low, step = middle, min(2 * step, 0.5)
            else:
                high, step = middle, 0.5
        return low
