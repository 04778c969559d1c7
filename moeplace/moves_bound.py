"""Lower bounds under a budget of moves: what few received copies cannot mend.

Two arguments. `stay_curve`: experts that receive nothing stay within their ranks (any routing).
`FewMoves`: what few copies leave idle or overfull, whatever becomes of the experts with several
replicas (even routing), in whole numbers; `bounds.recompute` searches again.
"""

import time

import numpy as np

from moeplace import moves_search as search
from moeplace._check import FloatArray, IntArray
from moeplace.plan import EMPTY
from moeplace.problem import Problem

#: Experts with more replicas than this are left out of the search.
MOST_COPIES = 8
#: Copies that an expert of several replicas receives; the last stands for any more.
MORE = 3
#: Tokens are multiplied to whole numbers of this size for the busiest rank.
GRID = float(1 << 44)
#: Less than this in all is no load: its grid would overflow.
LEAST = 1e-250
#: States of the search: at first, and at most (each more than before by this factor).
STATES, MOST_STATES, GROWTH = 1_000, 512_000, 8
#: Cells of a table of prices with the fewest states, and with more.
CELLS, MORE_CELLS = 256, 1024
#: Prices of a copy and of a receiver that are tried, as shares of a rank's room; so many are kept.
SHARES, KEPT = (0.02, 0.035, 0.06, 0.1, 0.17), 3
#: Steps of work (cells of tables, states tried) for one bound without seconds of its own, those
#: that it needs at least, and those in a second.
QUICK, FEWEST, PACE = 700_000, 100_000, 28_000_000
#: A bisection tries the point at SHARE of what is open, down to STEP of it, and further where a
#: trial takes less than BRIEF seconds.
SHARE, STEP, BRIEF = 0.4, 1 / 64, 0.02


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


class FewMoves:
    """One layer in one window: whether a makespan needs more received copies than are allowed.

    Even routing, latency of any kind that is at least tokens / speed. Proof: take a plan within
    T. Each expert e with several replicas today keeps some of them and receives m: with n left in
    all, each kept rank carries w_e / n, an option out of finitely many; what it receives lies
    elsewhere and is left out. An expert with one replica that receives m copies leaves its rank,
    or stays with w_e / (m + 1) there. So each rank carries a load out of finitely many before it
    receives, and within what it can by T. A rank that receives nothing wastes the room that is
    left. All ranks together have room for little more than all tokens, which is all that may be
    wasted; at most M copies are received, by at most M ranks. If no choice of options satisfies
    the three budgets, there is no plan.

    The choices are made one expert at a time, in an order that soon closes ranks again: two
    choices that leave the open ranks with the same loads, and have spent the same, have one
    future. That experts with several replicas are few makes such states few (the graph of ranks
    that share experts is nearly a tree). Where they are too many, loads become intervals. A state
    is dropped when with any prices for copies and receivers the cheapest that each rank can still
    become exceeds the waste allowed: Lagrange's bound, an expert's copies paid by its holders in
    equal parts. Loads are rounded down to whole numbers and room is too, and what that may lose
    is given back, so that sums are exact: a relaxation.

    Experts with more than `MOST_COPIES` replicas are left out, which relaxes further: their ranks
    may carry all or nothing of them.
    """

    def __init__(self, problem: Problem, window: int, layer: int) -> None:
        rules = problem.max_moves
        assert rules is not None
        row, rank = rules.current.slots[layer], rules.current.rank_of_slot
        load, base = problem.tokens[window, layer], problem.base[window, layer]
        self.cluster, self.capacity = problem.cluster, problem.capacity
        self.fluid = float(problem.fluid[window, layer])
        total = float(load.sum() + base.sum())
        self.scale = GRID / total if total > LEAST else 1.0  # all of it counts as nothing then
        whole = np.floor(load * self.scale).astype(np.int64)
        held: list[list[int]] = [[] for _ in range(load.size)]
        for expert, at in zip(row.tolist(), rank.tolist(), strict=True):
            if expert != EMPTY and at not in held[expert]:
                held[expert].append(at)
        single: list[list[int]] = [[] for _ in range(problem.ranks)]
        shared = []
        # what a rank carries at least if nothing is received and shared experts are elsewhere
        self.start = np.floor(base * self.scale).astype(np.int64)
        self.spread = np.ones(problem.ranks, dtype=np.int64)  # and at most, above that
        for expert, ranks in enumerate(held):
            tokens = int(whole[expert])
            if len(ranks) == 1:
                single[ranks[0]].append(tokens)
                self.start[ranks[0]] += tokens
                self.spread[ranks[0]] += 1
            elif len(ranks) <= MOST_COPIES:
                shared.append((tokens, ranks))
            else:
                self.spread[ranks] += tokens + 1
        self.total = int(np.floor(total * self.scale * (1 - 1e-12)))
        self.singles = np.array([len(mine) for mine in single])
        self.single = np.zeros((problem.ranks, max(int(self.singles.max()), 1)), dtype=np.int64)
        for at, mine in enumerate(single):
            self.single[at, : len(mine)] = sorted(mine, reverse=True)
        self.most = np.insert(self.single.cumsum(axis=1), 0, 0, axis=1)
        self.gone, self.begin = search.departures(self.single, self.singles)
        chosen, self.order = _order([ranks for _, ranks in shared], problem.ranks)
        self.load = np.array([shared[n][0] for n in chosen], dtype=np.int64)
        self.holders = np.array([len(shared[n][1]) for n in chosen], dtype=np.int64)
        self.hold = np.zeros((len(chosen), MOST_COPIES), dtype=np.int64)
        for n, expert in enumerate(chosen):
            self.hold[n, : self.holders[n]] = shared[expert][1]
        of = np.zeros(problem.ranks, dtype=np.int64)
        for _, ranks in shared:
            of[ranks] += 1
        self.rows = np.insert((of + 1).cumsum(), 0, 0)
        self.prices: dict[int, IntArray] = {}
        self.effort = 0

    def _room(self, seconds: float) -> IntArray:
        room = np.minimum(self.cluster.tokens_by(np.array([seconds])), self.capacity)
        room = room * self.scale * (1 + 1e-12)
        return np.asarray(np.floor(np.minimum(room, GRID * 4)).astype(np.int64))

    def _tables(
        self, moves: int, cap: IntArray, prices: IntArray, cells: int
    ) -> tuple[IntArray, IntArray, IntArray]:
        """What ranks still pay [prices, rows, cells], bits of a cell, experts' least copies."""
        fewest = np.maximum(-(-(self.load + 1) // (int(cap.max()) + 1)), 1)
        reach = cap - self.start + self.most[:, min(moves, self.single.shape[1])]
        bits = np.frexp(np.maximum(reach, 0) // cells)[1].astype(np.int64)  # cells << bits > reach
        tables = search.prices(
            self.load, self.holders, self.hold, fewest, self.rows, bits, cells, self.start, cap,
            self.gone, self.begin, self.most, self.singles, moves, min(MORE, moves), prices,
        )  # fmt: skip
        self.effort += tables.size
        return tables, bits, fewest

    def _chosen(self, moves: int, cells: int) -> IntArray:
        """The prices that alone bound best at fluid's T."""
        if moves not in self.prices:
            cap = self._room(self.fluid)
            tried = (np.array(SHARES) * cap.mean()).astype(np.int64)
            tables, bits, _ = self._tables(moves, cap, tried, cells)
            paid = [_paid(table, self.rows, bits, self.spread) for table in tables]
            best = np.argsort(2 * moves * tried - np.array(paid), kind="stable")
            self.prices[moves] = tried[best[:KEPT]]
        return self.prices[moves]

    def refutes(self, moves: int, seconds: float, states: int = MOST_STATES) -> bool:
        """Whether no plan that receives at most `moves` copies ends within `seconds`.

        False also where that does not show with so many states.
        """
        cap = self._room(seconds)
        slack = int(cap.sum()) + cap.size - self.total
        reach = cap - self.start + self.most[:, min(moves, self.single.shape[1])]
        if slack < 0 or (reach < 0).any():
            return True
        cells = CELLS if states <= STATES else MORE_CELLS
        prices = self._chosen(moves, cells)
        tables, bits, fewest = self._tables(moves, cap, prices, cells)
        states = max(states, 4 * (moves + 1) ** 2)  # at least all that may be spent
        answer, effort = search.excludes(
            self.load, self.holders, self.hold, fewest, self.order, self.rows, bits, self.start,
            self.spread, cap, self.gone, self.begin, self.most, self.singles, moves,
            min(MORE, moves), slack, tables, prices, states,
        )  # fmt: skip
        self.effort += effort
        return bool(answer)

    def follows(self, moves: int, seconds: float) -> bool:
        """Whether `refutes` says so with any number of states that `bound` may have used."""
        states = STATES
        while states <= MOST_STATES:
            if self.refutes(moves, seconds, states):
                return True
            states *= GROWTH
        return False

    def bound(
        self, moves: int, low: float, high: float, seconds: float | None = None, steps: int = QUICK
    ) -> float:
        """Largest makespan that `refutes` excludes, by bisection from `low` (returned if none).

        The search goes up to `high`. Without `seconds`, few states and about so many steps; with
        them, ever more states while they last.
        """
        end = np.inf if seconds is None else time.perf_counter() + seconds
        states, longest, finest = STATES, 0.0, 1e-7 * low
        self.effort = 0
        while states <= MOST_STATES and high - low > finest:
            top, last = high, STEP * (high - low)
            while top - low > finest and (seconds is None or top - low > last or longest < BRIEF):
                began = time.perf_counter()
                if began + longest > end or (seconds is None and self.effort > steps):
                    return low
                middle = low + SHARE * (top - low)
                if self.refutes(moves, middle, states):
                    low = middle
                else:
                    top = middle
                longest = max(longest, time.perf_counter() - began)
            if seconds is None:
                break
            states *= GROWTH
            longest *= GROWTH
        return low


def _paid(table: IntArray, rows: IntArray, bits: IntArray, spread: IntArray) -> int:
    """Sum of the ranks' prices before any expert is decided."""
    first = table[rows[:-1]]
    return sum(
        int(row[: (int(wide) >> int(bit)) + 1].min())
        for row, bit, wide in zip(first, bits, spread, strict=True)
    )


def _order(shared: list[list[int]], ranks: int) -> tuple[list[int], IntArray]:
    """Experts in the order of decision, and the steps: places in that order, or -1 - a closed rank.

    The rank that leaves fewest others open is closed next, as soon as all it shares is decided.
    """
    of: list[set[int]] = [set() for _ in range(ranks)]
    for expert, holders in enumerate(shared):
        for rank in holders:
            of[rank].add(expert)
    chosen: list[int] = []
    steps: list[int] = []
    opened: set[int] = set()
    left = set(range(ranks))

    def opens(rank: int) -> tuple[int, int]:
        after = opened.union(*(shared[expert] for expert in of[rank]))
        return sum(not of[other] <= of[rank] for other in after if other != rank), rank

    while left:
        rank = min(left, key=opens)
        for expert in sorted(of[rank], key=lambda e: (len(set(shared[e]) - opened), e)):
            steps.append(len(chosen))
            chosen.append(expert)
            opened.update(shared[expert])
            for other in shared[expert]:
                of[other].discard(expert)
                if not of[other]:
                    steps.append(-1 - other)
                    left.discard(other)
                    opened.discard(other)
        if rank in left:  # it shares nothing
            steps.append(-1 - rank)
            left.discard(rank)
    return chosen, np.array(steps, dtype=np.int64)
