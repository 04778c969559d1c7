"""Prices that refute much, by a linear programme: what `dual_bound.Priced` then checks.

The programme serves the experts of a layer in fractions and asks for the least theta such that
theta times the room, slots and copies that there are suffice. Its dual prices refute the makespan
where theta is above 1. Nothing here is part of a proof.
"""

import numpy as np
from scipy import sparse
from scipy.optimize import linprog

from moeplace._check import FloatArray, IntArray
from moeplace.arguments import SLACK
from moeplace.claims import Prices
from moeplace.dual_bound import Priced, fewest_copies

#: Kinds of cuts that are priced: at most 1, 2, ... replicas of more than 1/2, 1/3, ... of a room.
CUTS = 2
#: Numbers of replicas of an expert that does not fit anywhere whole: the fewest, and one more.
LEVELS = 2
#: Steps of the simplex method, for each row; about one is enough, but it was seen going in circles.
STEPS = 4


def best_prices(case: Priced, seconds: float) -> Prices | None:
    """Prices that refute `seconds` most clearly; None if the programme has no solution."""
    rooms = case.rooms(seconds)
    unit = float(rooms.max(initial=0.0))
    if unit == 0:
        return None
    programme = _Programme(case, rooms / unit, unit)
    found = programme.solve(tokens_only=True)
    return programme.solve(tokens_only=False) if found is None else found


class _Entries:
    """Rows of a sparse matrix as they are added."""

    def __init__(self) -> None:
        self.rows = 0
        self.row: list[IntArray] = []
        self.column: list[IntArray] = []
        self.value: list[FloatArray] = []

    def new(self, number: int) -> IntArray:
        """Places of so many new rows."""
        self.rows += number
        return np.arange(self.rows - number, self.rows)

    def add(self, row: IntArray, column: IntArray, value: FloatArray | float) -> None:
        """Add entries; arguments are broadcast against each other."""
        entries = np.broadcast_arrays(row, column, np.asarray(value, dtype=float))
        self.row.append(entries[0].ravel())
        self.column.append(entries[1].ravel())
        self.value.append(entries[2].ravel())

    def matrix(self, columns: int) -> "sparse.csr_array":
        """All rows [rows, columns]."""
        row, column, value = (np.concatenate(p) for p in (self.row, self.column, self.value))
        return sparse.csr_array((value, (row, column)), shape=(self.rows, columns))


class _Programme:
    """The rows: what ranks offer, then every expert served; rooms in units of the largest."""

    def __init__(self, case: Priced, rooms: FloatArray, unit: float) -> None:
        self.case, self.rooms, self.unit = case, rooms, unit
        self.loads = case.loads / unit
        self.columns = 1  # theta
        self.most, self.equal = _Entries(), _Entries()
        ranks, experts = rooms.size, self.loads.size
        self.token, self.slot = self.most.new(ranks), self.most.new(ranks)
        self.cut = [self.most.new(ranks) for _ in range(CUTS)]
        self.copy, self.replica = self.most.new(1), self.most.new(1)
        self.offer = np.concatenate(
            [
                rooms,
                case.caps,
                *(np.full(ranks, k + 1) for k in range(CUTS)),
                [case.moves, case.copies],
            ]
        )
        # each group chooses among the parts; without groups there is one of either
        group = np.zeros(experts, dtype=np.int64) if case.group is None else case.group
        shape = (len(case.parts), int(group.max()) + 1)
        choice = self._new(shape[0] * shape[1]).reshape(shape)
        self.chosen = self.equal.new(shape[1])
        self.equal.add(self.chosen, choice, 1.0)
        self.served = self.equal.new(shape[0] * experts).reshape(shape[0], experts)
        # the others are best served whole by one rank, whatever the prices
        least = np.where(case.allowed, rooms, np.inf).min(axis=1)
        self.hard = (self.loads * (CUTS + 1) > least * (1 - SLACK)) | (case.pins > 0)
        for part, ranks_here in enumerate(case.parts):
            wanted = choice[part, group]
            expert, at = np.nonzero(case.allowed[:, ranks_here] & ~self.hard[:, None])
            column = self._new(expert.size)
            self._run(column, expert, ranks_here[at], self.loads[expert])
            self.equal.add(self.served[part, expert], column, 1.0)
            easy = np.flatnonzero(~self.hard)
            self.equal.add(self.served[part, easy], wanted[easy], -1.0)
            for one in np.flatnonzero(self.hard).tolist():
                serve = self._even if case.even or case.most[one] == 1 else self._shared
                serve(one, ranks_here, self.served[part, one], wanted[one])

    def _new(self, number: int) -> IntArray:
        self.columns += number
        return np.arange(self.columns - number, self.columns)

    def _hold(self, column: IntArray, expert: IntArray | int, rank: IntArray) -> None:
        """Columns that are replicas of experts on ranks."""
        case, column = self.case, np.broadcast_to(column, rank.shape)
        self.most.add(self.slot[rank], column, 1.0)
        self.most.add(self.replica, column, 1.0)
        if case.fresh is not None:
            received = case.fresh[expert, rank]
            self.most.add(self.copy, column[received], 1.0)

    def _run(
        self, column: IntArray, expert: IntArray | int, rank: IntArray, tokens: FloatArray | float
    ) -> None:
        """Columns that are replicas with so many tokens."""
        self._hold(column, expert, rank)
        self.most.add(self.token[rank], column, tokens)
        column, tokens = np.broadcast_to(column, rank.shape), np.broadcast_to(tokens, rank.shape)
        for k, rows in enumerate(self.cut):
            big = tokens * (k + 2) * (1 - SLACK) > self.rooms[rank]
            self.most.add(rows[rank[big]], column[big], 1.0)

    def _even(self, expert: int, ranks: IntArray, served: int, wanted: int) -> None:
        """Even routing: a number of replicas, each with an equal share."""
        case, load, levels = self.case, self.loads[expert], 0
        self.equal.add(np.array([served]), np.array([wanted]), -1.0)
        for copies in range(max(1, case.pins[expert]), min(case.most[expert], ranks.size) + 1):
            fits = case.allowed[expert, ranks] & (load / copies * (1 - SLACK) <= self.rooms[ranks])
            pinned, free = ranks[fits & case.pinned[expert, ranks]], ranks[fits]
            free = free[~case.pinned[expert, free]]
            if pinned.size < case.pins[expert] or pinned.size + free.size < copies:
                continue
            level, column = self._new(1), self._new(free.size)
            self._run(level, expert, pinned, load / copies)
            self._run(column, expert, free, load / copies)
            self.equal.add(np.array([served]), level, 1.0)
            number = self.equal.new(1)
            self.equal.add(number, column, 1.0)
            self.equal.add(number, level, -float(copies - pinned.size))
            if copies > 1:
                once = self.most.new(free.size)
                self.most.add(once, column, 1.0)
                self.most.add(once, level, -1.0)
            levels += 1
            if levels == LEVELS:
                break

    def _shared(self, expert: int, ranks: IntArray, served: int, wanted: int) -> None:
        """Any shares: tokens on ranks, each at most as its replica's fraction may run."""
        case, load = self.case, self.loads[expert]
        at = ranks[case.allowed[expert, ranks]]
        pinned = case.pinned[expert, at]
        self.equal.add(np.array([served]), np.array([wanted]), -load)
        if pinned.sum() < case.pins[expert]:
            return
        most = np.minimum(load, self.rooms[at])
        held, tokens = self._new(at.size), self._new(at.size)
        self._hold(held, expert, at)
        self.most.add(self.token[at], tokens, 1.0)
        self.equal.add(np.array([served]), tokens, 1.0)
        rows = self.most.new(at.size)
        self.most.add(rows, tokens, 1.0)
        self.most.add(rows, held, -most)
        for k, cut in enumerate(self.cut):
            step = self.rooms[at] / (k + 2)
            big = most * (1 - SLACK) > step
            rows, count = self.most.new(int(big.sum())), self._new(int(big.sum()))
            self.most.add(cut[at[big]], count, 1.0)
            self.most.add(rows, tokens[big], 1.0)
            self.most.add(rows, held[big], -step[big])
            self.most.add(rows, count, (step - most)[big])
        once, pin = self.most.new(at.size), self.equal.new(int(pinned.sum()))
        self.most.add(once, held, 1.0)
        self.most.add(once, np.array([wanted]), -1.0)
        self.equal.add(pin, held[pinned], 1.0)
        self.equal.add(pin, np.array([wanted]), -1.0)
        number, limit = self.most.new(1), self.most.new(1)
        fewest = fewest_copies(most[None], np.array([load]))[0]
        self.most.add(number, held, -1.0)
        self.most.add(number, np.array([wanted]), float(fewest))
        self.most.add(limit, held, 1.0)
        self.most.add(limit, np.array([wanted]), -float(case.most[expert]))

    def solve(self, tokens_only: bool) -> Prices | None:
        """The dual prices, in the problem's tokens."""
        offer = np.pad(self.offer, (0, self.most.rows - self.offer.size))
        scaled = np.arange(offer.size) < (self.rooms.size if tokens_only else offer.size)
        most = self.most.matrix(self.columns)
        theta = sparse.csr_array(-np.where(scaled, offer, 0.0)[:, None])
        goal = np.zeros(self.columns)
        goal[0] = 1.0
        given = np.zeros(self.equal.rows)
        given[self.chosen] = 1.0
        found = linprog(  # type: ignore[call-overload]
            goal,
            A_ub=sparse.hstack([theta, most[:, 1:]]),
            b_ub=np.where(scaled, 0.0, offer),
            A_eq=self.equal.matrix(self.columns),
            b_eq=given,
            method="highs-ds",
            options={"maxiter": STEPS * (self.most.rows + self.equal.rows)},
        )
        if found.status != 0:
            return None
        price = np.maximum(-found.ineqlin.marginals, 0.0)
        cut = np.array([price[rows] for rows in self.cut]).reshape(CUTS, self.rooms.size)
        prices = Prices(
            token=price[self.token] / self.unit,
            slot=price[self.slot],
            cut=cut[: int(np.flatnonzero(cut.any(axis=1)).max(initial=-1)) + 1],
            copy=float(price[self.copy][0]),
            replica=float(price[self.replica][0]),
            worth=np.zeros((0, self.loads.size)),
        )
        if self.case.even:
            return prices
        worth = np.maximum(found.eqlin.marginals[self.served], 0.0) / self.unit
        return self.case.with_worth(prices, np.where(self.hard, worth, 0.0))
