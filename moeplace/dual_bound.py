"""Lower bounds by prices: what no plan can buy with the room, slots and copies that there are.

`Priced` is one layer in one window. Prices come from anywhere (`dual_lp` finds good ones): any that
are not negative give a bound, and whoever has them checks it without a solver.
"""

import time
from dataclasses import replace
from typing import Any

import numpy as np

from moeplace._check import BoolArray, FloatArray, IntArray
from moeplace.arguments import SLACK, Row, most_copies, row_of, usable_slots
from moeplace.claims import Prices
from moeplace.constraints import Forbid, Pin
from moeplace.plan import EMPTY
from moeplace.problem import Problem

#: Name of the argument.
DUAL = "lp dual"
#: Rounds of prices for one bound, the least gain of one, and that below which no other follows.
ROUNDS, GAIN, ENOUGH = 8, 1e-7, 1e-4
#: A makespan of a plan that is above the bound by less than this factor is tried first.
NEAR = 4.0
#: Prices refute with this margin when they are found; when checked, with `arguments.SLACK`.
MARGIN = 1e-11
#: Under other than even routing, budgets of moves are priced up to so many moves.
FEW = 2
#: Pairs of an expert and a rank that a round gets through in a second, at least.
PACE = 30_000
#: The same pairs for all layers together without a time limit, each round counted.
PAIRS = 1_000_000


def worth_pricing(problem: Problem) -> bool:
    """Whether rules are present that no other argument knows."""
    holds = int((problem.cluster.slots > 0).sum())
    if any(isinstance(rule, Pin | Forbid) for rule in problem.constraints):
        return True
    if bool((problem.most_replicas < holds).any()):
        return True
    rules = problem.max_moves
    if rules is None or problem.routing == "even":
        return False
    few = int(rules.allowance().min()) if rules.total is None else rules.total
    return few <= FEW


def pricing_seconds(problem: Problem) -> float:
    """Time for one round of prices of all windows and layers, roughly."""
    return problem.windows * problem.allowed.size / PACE


def price_layers(
    problem: Problem, per_layer: FloatArray, high: FloatArray, seconds: float | None = None
) -> tuple[FloatArray, dict[tuple[int, int], Prices]]:
    """Bounds [windows, layers] lifted by prices, and the prices where they are.

    No bound is sought above `high` [windows, layers], nor where it is reached. The widest gaps come
    first; with `seconds`, none is begun that may take longer than what is left; without, rounds are
    counted, so that any machine does the same.
    """
    end = None if seconds is None else time.perf_counter() + seconds
    value, prices = per_layer.copy(), {}
    gap, pairs = high - per_layer, 0
    for at in np.argsort(-gap, axis=None, kind="stable").tolist():
        window, layer = (int(n) for n in np.unravel_index(at, gap.shape))
        busy = problem.tokens[window, layer].any()
        if not busy or high[window, layer] <= per_layer[window, layer] * (1 + GAIN):
            continue
        if end is not None and time.perf_counter() + problem.allowed[layer].size / PACE > end:
            break
        if end is None and pairs > PAIRS:
            break
        case = Priced(problem, window, layer)
        low, found = case.bound(per_layer[window, layer], high[window, layer], end)
        pairs += case.rounds * case.allowed.size
        if found is not None:
            value[window, layer], prices[window, layer] = low, found
    return value, prices


class Priced:
    """One layer in one window: whether prices refute a makespan T.

    Any routing, any latency, all rules on where replicas lie. Prices, none negative: p_g of a
    token on rank g, q_g of a replica there, m of a received copy, n of a replica anywhere, and u_gk
    of a replica on g with more than r_g / (k + 1) tokens, for k = 1, 2, ...

    Proof: take a plan within T. Rank g runs at most r_g tokens and holds at most K_g replicas; at
    most k of them have more than r_g / (k + 1) tokens, since k + 1 would not fit. At most M copies
    are received and N replicas held. So at these prices all replicas together cost at most

        sum_g (p_g r_g + q_g K_g + sum_k k u_gk) + m M + n N.

    The replicas of an expert cost at least what the cheapest way to serve it costs. If these least
    costs add up to more, there is no plan. An expert uses ranks that are allowed, the pinned ones
    always, and no more than its most replicas. Its least cost is

    * under even routing, or with one replica, over numbers c of replicas, that of the c cheapest
      ranks with room for w_e / c. They cost at least what one with all of w_e costs somewhere,
      whether it fits or not, plus c - 1 times the least price without tokens: where that is too
      much, the loop ends;
    * else, with any worth v_e of one of its tokens, at least v_e w_e plus the sum over its ranks of
      the least q_g + n + [m] + [u_gk] - (v_e - p_g) y over y up to min(w_e, r_g): Lagrange's bound,
      shares being not negative and of sum 1. The ranks are at least so many that w_e fits. What is
      least over y lies at 0, at the end, or where a u_gk begins.

    Under `NodeGroups` all replicas of a group lie on one node: the one where they cost least.
    """

    def __init__(self, problem: Problem, window: int, layer: int) -> None:
        self.row = row_of(problem, window, layer)
        self.loads: Any = problem.tokens[window, layer]
        self.even = problem.routing == "even"
        self.caps = usable_slots(problem)
        self.allowed = problem.allowed[layer]
        self.pinned = problem.pinned[layer]
        self.pins: IntArray = self.pinned.sum(axis=1)
        self.most = problem.most_replicas
        self.copies = most_copies(problem)
        self.fresh: BoolArray | None = None  # [experts, ranks] where a replica is received
        self.moves = 0
        if (rules := problem.max_moves) is not None:
            slots, rank = rules.current.slots[layer], rules.current.rank_of_slot
            self.fresh = np.ones(self.allowed.shape, dtype=np.bool_)
            self.fresh[slots[slots != EMPTY], rank[slots != EMPTY]] = False
            self.moves = int(rules.allowance()[layer])
            self.moves = self.moves if rules.total is None else min(self.moves, rules.total)
        self.group: IntArray | None = None
        self.parts: list[IntArray] = [np.arange(problem.ranks)]  # ranks that may serve one expert
        if problem.node_groups is not None:
            node = problem.cluster.node_of
            self.group = problem.node_groups.of(problem.experts)
            self.parts = [np.flatnonzero(node == n) for n in np.unique(node)]
        self.rounds = 0  # of prices sought

    def fits(self, prices: Prices) -> bool:
        """Whether prices are of this layer's shape, and none is negative."""
        ranks, experts = self.caps.size, self.loads.size
        arrays = (prices.token, prices.slot, prices.cut, prices.worth)
        worth = (0 if self.even else len(self.parts), experts)
        shapes = ((ranks,), (ranks,), (len(prices.cut), ranks), worth)
        return all(
            array.shape == shape and bool((np.isfinite(array) & (array >= 0)).all())
            for array, shape in zip(arrays, shapes, strict=True)
        ) and all(0 <= price < np.inf for price in (prices.copy, prices.replica))

    def follows(self, prices: Prices, seconds: float) -> bool:
        """Whether they fit and refute `seconds`."""
        return self.fits(prices) and self.refutes(prices, seconds)

    def exact(self, row: Row, loads: Any) -> "Priced":
        """The same with numbers that do not round."""
        other = object.__new__(Priced)
        other.__dict__ |= self.__dict__ | {"row": row, "loads": loads}
        return other

    def refutes(self, prices: Prices, seconds: Any, margin: float = SLACK) -> bool:
        """Whether by these prices no plan ends within `seconds`."""
        rooms = self.rooms(seconds)
        return bool(self.least(prices, rooms) * (1 - margin) > self.most_spent(prices, rooms))

    def rooms(self, seconds: Any) -> Any:
        """r_g of the ranks [ranks], exact where the row is."""
        rooms = self.row.rooms(seconds)
        return np.where(rooms > 0, rooms, 0)

    def most_spent(self, prices: Prices, rooms: Any) -> Any:
        """What all replicas of a plan cost at most."""
        spent = (prices.token * rooms).sum() + (prices.slot * self.caps).sum()
        spent = spent + prices.copy * self.moves + prices.replica * self.copies
        return spent + sum((k + 1) * cut.sum() for k, cut in enumerate(prices.cut))

    def least(self, prices: Prices, rooms: Any) -> Any:
        """What they cost at least: the sum over experts of the cheapest way to serve each."""
        each = np.array([self._part(prices, rooms, n) for n in range(len(self.parts))])
        if self.group is None:
            return each[0].sum()
        members = [self.group == n for n in range(int(self.group.max()) + 1)]
        return sum(each[:, mine].sum(axis=1).min() for mine in members)

    def _part(self, prices: Prices, rooms: Any, part: int) -> Any:
        """Least cost of each expert [experts] on the ranks of one part."""
        ranks = self.parts[part]
        rest = (prices.token[ranks], prices.cut[:, ranks], self.once(prices, ranks), rooms[ranks])
        best = self._even(ranks, *rest)
        if not self.even:
            shared = self._any(ranks, *rest, prices.worth[part])
            best = np.where(self.most > 1, shared, best)
        inside = self.pinned[:, ranks].sum(axis=1) == self.pins
        return np.where(inside, best, np.inf)

    def once(self, prices: Prices, ranks: IntArray) -> Any:
        """Price of a replica without tokens [experts or 1, ranks]."""
        price = prices.slot[None, ranks] + prices.replica
        return price if self.fresh is None else price + prices.copy * self.fresh[:, ranks]

    def _even(self, ranks: IntArray, token: Any, cut: Any, once: Any, room: Any) -> Any:
        best = np.full(self.loads.size, np.inf, dtype=self.loads.dtype)
        allowed = self.allowed[:, ranks]
        single = np.where(allowed, self.loads[:, None] * token + once, np.inf).min(axis=1)
        again = np.where(allowed, once, np.inf).min(axis=1)
        again = np.where(allowed.any(axis=1), again, 0)
        left = np.flatnonzero(self.even | (self.most == 1))
        for c in range(1, ranks.size + 1):
            # beside 1 / c of c single replicas, their prices without tokens for the rest
            cheaper = single[left] + (c - 1) * again[left] < best[left]
            left = left[cheaper & (self.most[left] >= c)]
            if left.size == 0:
                break
            share = self.loads[left, None] / c
            cost = share * token + (once if self.fresh is None else once[left])
            for k, price in enumerate(cut):
                cost = cost + np.where(share * ((k + 2) * (1 - SLACK)) > room, price, 0)
            fits = allowed[left] & (share * (1 - SLACK) <= room)
            cost = np.where(fits, cost, np.inf)
            number = c - self.pins[left]
            best[left] = np.minimum(best[left], self._chosen(cost, left, ranks, number, number))
        return best

    def _any(self, ranks: IntArray, token: Any, cut: Any, once: Any, room: Any, worth: Any) -> Any:
        loads, allowed = self.loads, self.allowed[:, ranks]
        most = np.minimum(loads[:, None], room)
        gain = np.maximum(worth[:, None] - token, 0)
        steps = [room / (k + 2) for k in range(len(cut))]
        least: Any = 0
        for at in range(len(cut) + 1):  # as many tokens as fit, or up to a step
            tokens = most if at == 0 else np.minimum(most, steps[at - 1])
            cost = -gain * tokens
            for step, price in zip(steps[at:], cut[at:], strict=True):
                cost = cost + np.where(tokens * (1 - SLACK) > step, price, 0)
            least = np.minimum(least, cost)
        cost = np.where(allowed, once + least, np.inf)
        every = np.arange(loads.size)
        fewest = fewest_copies(np.where(allowed, most, 0), loads)
        low, high = np.maximum(fewest, self.pins) - self.pins, self.most - self.pins
        return worth * loads + self._chosen(cost, every, ranks, low, high)

    def _chosen(self, cost: Any, left: IntArray, ranks: IntArray, low: Any, high: Any) -> Any:
        """Cost of the pinned ranks and the cheapest `low` to `high` others, of experts `left`."""
        pinned = self.pinned[np.ix_(left, ranks)]
        others = np.sort(np.where(pinned, np.inf, cost), axis=1)
        high = np.minimum(high, ranks.size)
        number = np.maximum(np.minimum((others < 0).sum(axis=1), high), low)
        taken = np.arange(ranks.size) < number[:, None]
        found = np.where(pinned, cost, 0).sum(axis=1) + np.where(taken, others, 0).sum(axis=1)
        return np.where((low >= 0) & (low <= high), found, np.inf)

    def with_worth(self, prices: Prices, worth: FloatArray) -> Prices:
        """The prices with worths [parts, experts]: where 0, that of the best single rank."""
        loads = np.where(self.loads > 0, self.loads, np.inf)[:, None]
        single = np.zeros_like(worth)
        for part, ranks in enumerate(self.parts):
            each = prices.token[ranks] + self.once(prices, ranks) / loads
            each = np.where(self.allowed[:, ranks], each, np.inf).min(axis=1)
            single[part] = np.where(np.isfinite(each), each, 0.0)
        return replace(prices, worth=np.where(worth > 0, worth, single))

    def climb(self, prices: Prices, low: float, high: float) -> float:
        """Largest makespan from `low` (returned if none) to `high` that the prices refute."""
        while high - low > 1e-10 * high:
            # what is spent at most reaches the need of `low` here: no later time is refuted
            need = self.least(prices, self.rooms(low)) * (1 - MARGIN)
            if np.isfinite(need):
                high = self._spent_by(prices, need, low, high)
            for middle in (high, 0.5 * (low + high)):
                if self.refutes(prices, middle, MARGIN):
                    low = middle
                    break
            else:
                high = middle
        return low

    def _spent_by(self, prices: Prices, need: float, low: float, high: float) -> float:
        """Largest makespan from `low` to `high` by which less than `need` is spent."""
        if self.most_spent(prices, self.rooms(high)) < need:
            return high
        for _ in range(60):
            middle = 0.5 * (low + high)
            if self.most_spent(prices, self.rooms(middle)) < need:
                low = middle
            else:
                high = middle
        return low

    def bound(
        self, low: float, high: float, end: float | None = None
    ) -> tuple[float, Prices | None]:
        """Largest makespan from `low` to `high` that prices refute, and the prices; or `low`, None.

        A linear programme names prices at `high`, if that is near, then at what is refuted so far.
        No round begins that may last beyond `end`, a reading of the clock.
        """
        from moeplace.dual_lp import best_prices  # scipy, only needed here

        best = None
        free = self._free()
        if self.refutes(free, low * (1 + GAIN), MARGIN):  # an expert that fits nowhere
            low, best = self.climb(free, low * (1 + GAIN), high), free
        longest = self.allowed.size / PACE
        at = high if high <= NEAR * low else low * (1 + GAIN)
        for _ in range(ROUNDS):
            began = time.perf_counter()
            if low * (1 + GAIN) >= high or (end is not None and began + longest > end):
                break
            self.rounds += 1
            before, found = low, best_prices(self, at)
            if found is not None and self.refutes(found, low * (1 + GAIN), MARGIN):
                low, best = self.climb(found, low * (1 + GAIN), high), found
            if at < high and low < before * (1 + ENOUGH):
                break
            at = low * (1 + GAIN)
            longest = max(longest, time.perf_counter() - began)
        return low, best

    def _free(self) -> Prices:
        """Nothing costs anything."""
        experts, ranks = self.allowed.shape
        return Prices(
            token=np.zeros(ranks),
            slot=np.zeros(ranks),
            cut=np.zeros((0, ranks)),
            copy=0.0,
            replica=0.0,
            worth=np.zeros((0 if self.even else len(self.parts), experts)),
        )


def fewest_copies(most: Any, loads: Any) -> Any:
    """Fewest replicas [experts] for all of a load, if each runs at most `most` [experts, ranks]."""
    reach = -np.sort(-most, axis=1).cumsum(axis=1)
    return 1 + (reach < loads[:, None] * (1 - SLACK)).sum(axis=1)
