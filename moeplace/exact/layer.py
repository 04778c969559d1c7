"""One layer of the formulation: its columns and rows (see `model`), and plans as their values."""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from moeplace._check import BoolArray, FloatArray, IntArray
from moeplace.constraints import CAPACITY_SLACK, MaxMoves
from moeplace.plan import Plan
from moeplace.problem import Problem

#: Choices of an expert under a budget of moves that are spelt out.
OPTIONS = 2_000
#: Columns of a layer up to which every level of a replica count is modelled.
COLUMNS = 40_000


@dataclass(frozen=True, kw_only=True)
class LayerColumns:
    """Where the columns of a layer lie."""

    layer: int
    time: list[int]  # [windows] columns of T, -1 where no plan changes it
    unit: FloatArray  # [windows]
    place: IntArray  # weighted: [experts, ranks] columns of x, -1 where none
    share: IntArray  # weighted: [windows, experts, ranks] columns of y, -1 where none
    level: list[tuple[IntArray, int]]  # of each expert: fewest copies [levels], column of z or -1
    at: dict[tuple[int, int], IntArray]  # (expert, level) -> [ranks] columns, -1 where none
    options: dict[int, list[tuple[int, frozenset[int], int]]]  # column, kept ranks, received
    node: IntArray | None  # [groups, nodes] columns
    groups: IntArray | None
    nodes: IntArray | None

    def _level(self, expert: int, copies: int) -> int:
        """The level that holds so many copies."""
        return max(int(np.searchsorted(self.level[expert][0], copies, "right")) - 1, 0)

    def fill(self, values: FloatArray, plan: Plan, split: FloatArray) -> None:
        """Write the plan, whose slots take shares `split` [windows, slots], into `values`."""
        held = np.zeros((plan.experts, plan.ranks), dtype=np.bool_)
        row = plan.slots[self.layer]
        used, at = row[row >= 0], plan.rank_of_slot[row >= 0]
        held[used, at] = True
        share = np.zeros((len(self.time), *held.shape))
        share[:, used, at] = split[:, row >= 0]
        for expert, options in self.options.items():
            here = frozenset(np.flatnonzero(held[expert]).tolist())
            before = frozenset[int]().union(*(kept for _, kept, _ in options))
            kept, count = here & before, len(here)
            for column, stay, received in options:
                values[column] = float(stay == kept and received == len(here - before))
            for (other, level), columns in self.at.items():
                if other == expert:
                    used = columns >= 0
                    values[columns[used]] = held[expert][used] if level == count else 0.0
        if self.level:
            for expert, (counts, z) in enumerate(self.level):
                if expert in self.options:
                    continue
                mine = self._level(expert, int(held[expert].sum()))
                for level in range(counts.size):
                    columns = self.at[expert, level]
                    used = columns >= 0
                    values[columns[used]] = held[expert][used] if level == mine else 0.0
                    if z >= 0:
                        values[z + level] = float(level == mine)
        else:
            used = self.place >= 0
            values[self.place[used]] = held[used]
            values[self.share[self.share >= 0]] = share[self.share >= 0]
        if self.node is not None:
            assert self.groups is not None
            assert self.nodes is not None
            for group, node in np.ndindex(self.node.shape):
                lies = held[np.ix_(self.groups == group, self.nodes == node)].any()
                values[self.node[group, node]] = float(lies)


class Builder:
    """Columns and rows as they are added."""

    def __init__(self) -> None:
        self.cost: list[float] = []
        self.low: list[float] = []
        self.high: list[float] = []
        self.whole: list[bool] = []
        self.columns: list[str] = []
        self.row_names: list[str] = []
        self.named: dict[str, int] = {}
        self.row_low: list[float] = []
        self.row_high: list[float] = []
        self.index: list[Any] = []
        self.value: list[Any] = []
        self.length: list[int] = []

    def column(
        self,
        name: str,
        low: float = 0.0,
        high: float = 1.0,
        *,
        whole: bool = False,
        cost: float = 0.0,
    ) -> int:
        """Add a column; its place."""
        self.columns.append(name)
        self.low.append(low)
        self.high.append(high)
        self.whole.append(whole)
        self.cost.append(cost)
        return len(self.columns) - 1

    def row(self, name: str, index: Any, value: Any, low: float, high: float) -> None:
        """Add low <= sum of value x columns <= high; equal names are numbered."""
        index = np.asarray(index, dtype=np.int64)
        self.index.append(index)
        self.value.append(np.broadcast_to(np.asarray(value, dtype=float), index.shape))
        self.length.append(index.size)
        self.row_low.append(low)
        self.row_high.append(high)
        again = self.named.get(name, 0)
        self.named[name] = again + 1
        self.row_names.append(f"{name}_{again}" if again else name)

    def rows(self) -> "sparse.csr_array":
        """All rows as a sparse array [rows, columns]."""
        start = np.concatenate([[0], np.cumsum(self.length)]).astype(np.int64)
        index = np.concatenate(self.index) if self.index else np.zeros(0, dtype=np.int64)
        value = np.concatenate(self.value) if self.value else np.zeros(0)
        shape = (len(self.length), len(self.columns))
        rows = sparse.csr_array((value, index, start), shape=shape)
        rows.sum_duplicates()  # a choice that keeps several replicas counts each
        return rows


class Layer:
    """One layer's columns and rows."""

    def __init__(
        self, problem: Problem, layer: int, bound: FloatArray, cutoff: FloatArray, make: Builder
    ) -> None:
        self.problem, self.layer, self.make = problem, layer, make
        cluster = problem.cluster
        self.tokens, self.base = problem.tokens[:, layer], problem.base[:, layer]
        self.capacity = problem.capacity * (1 + CAPACITY_SLACK)
        self.cutoff, self.bound = cutoff, bound
        self.busy: BoolArray = np.asarray(self.tokens.any(axis=1))
        self.unit = np.where(bound > 0, bound, 1.0)
        self.caps = np.minimum(cluster.slots, problem.experts)
        self.allowed = problem.allowed[layer]
        self.pinned = problem.pinned[layer]
        self.held: list[tuple[int, int, int, int]] = []
        self.received: list[int] = []
        self.time = [-1] * problem.windows
        self.place = np.full((problem.experts, problem.ranks), -1)
        self.share = np.full((problem.windows, problem.experts, problem.ranks), -1)
        self.level: list[tuple[IntArray, int]] = []
        self.at: dict[tuple[int, int], IntArray] = {}
        self.options: dict[int, list[tuple[int, frozenset[int], int]]] = {}
        self.carry: list[list[tuple[int, int, int]]] = [[] for _ in range(problem.ranks)]
        self.node: IntArray | None = None
        rules = problem.max_moves
        self.old = np.zeros(self.allowed.shape, dtype=np.bool_)
        if rules is not None:
            row = rules.current.slots[layer]
            self.old[row[row >= 0], rules.current.rank_of_slot[row >= 0]] = True

    def add(self) -> None:
        """All columns and rows of the layer."""
        problem, make, layer = self.problem, self.make, self.layer
        for window in np.flatnonzero(self.busy).tolist():
            idle = problem.cluster.seconds(self.base[window])[self.caps == 0]
            low = max(float(idle.max(initial=0.0)), self.bound[window]) / self.unit[window]
            high = min(self.cutoff[window], self._longest(window)) / self.unit[window]
            high = max(low, high * (1 + 1e-9))
            self.time[window] = make.column(f"T_l{layer}_w{window}", low, high)
        if problem.routing == "even":
            self._even()
        else:
            self._weighted()
        for expert, rank in np.argwhere(self.pinned & ~self.allowed).tolist():
            self._never(f"pin_l{layer}_e{expert}_g{rank}")
        for window, rank in np.argwhere(self.base > self.capacity).tolist():
            self._never(f"capacity_l{layer}_w{window}_g{rank}")
        self._slots()
        self._rules()
        self._times()

    def _never(self, name: str) -> None:
        """A row that no solution obeys: what it is named for excludes every plan."""
        self.make.row(name, [self.make.column(f"never_{name}", 0.0, 0.0)], 1.0, 1.0, np.inf)

    def _longest(self, window: int) -> float:
        """Makespan if the slowest rank ran everything: no plan is slower."""
        cluster = self.problem.cluster
        tokens = np.full(self.problem.ranks, self.tokens[window].sum()) + self.base[window]
        return float(cluster.seconds(tokens, np.full(tokens.size, self.caps.max() * 1.0)).max())

    def columns(self) -> LayerColumns:
        """Where they lie."""
        groups = self.problem.node_groups
        return LayerColumns(
            layer=int(self.layer),
            time=self.time,
            unit=self.unit,
            place=self.place,
            share=self.share,
            level=self.level,
            at=self.at,
            options=self.options,
            node=self.node,
            groups=None if groups is None else groups.of(self.problem.experts),
            nodes=self.problem.cluster.nodes,
        )

    def _replica(self, name: str, expert: int, rank: int, pinned: bool) -> int:
        column = self.make.column(name, float(pinned), 1.0, whole=True)
        self.held.append((column, int(self.layer), int(expert), int(rank)))
        if self.problem.max_moves is not None and not self.old[expert, rank]:
            self.received.append(column)
        return column

    def _even(self) -> None:
        """Replica counts are selected: z_ec, x_egc (see the module)."""
        problem, make, layer = self.problem, self.make, self.layer
        least, most = self._levels()
        columns = int(((most - least + 1) * self.allowed.sum(axis=1)).sum())
        for expert in range(problem.experts):
            first, last = int(least[expert]), int(most[expert])
            if self._from_current(expert, first, last):
                self.level.append((np.arange(first, last + 1), -1))
                continue
            counts = np.arange(first, last + 1)
            if columns > COLUMNS:
                counts = counts[(counts < 4) | (counts & (counts - 1) == 0) | (counts == first)]
            tops = np.append(counts[1:] - 1, last)
            z = -1
            if counts.size > 1:
                names = [f"z_l{layer}_e{expert}_c{count}" for count in counts]
                z = min([make.column(name, whole=True) for name in names])
                chosen = z + np.arange(counts.size)
                make.row(f"count_l{layer}_e{expert}", chosen, 1.0, 1.0, 1.0)
            self.level.append((counts, z))
            for n, (count, top) in enumerate(zip(counts.tolist(), tops.tolist(), strict=True)):
                columns_of = np.full(problem.ranks, -1)
                heavy = self._too_heavy(expert, top)
                for rank in np.flatnonzero(self.allowed[expert] & ~heavy).tolist():
                    fixed = bool(self.pinned[expert, rank]) and counts.size == 1
                    name = f"x_l{layer}_e{expert}_g{rank}_c{count}"
                    columns_of[rank] = self._replica(name, expert, rank, fixed)
                    self.carry[rank].append((int(columns_of[rank]), expert, top))
                self.at[expert, n] = columns_of
                used = columns_of[columns_of >= 0]
                label = f"copies_l{layer}_e{expert}_c{count}"
                if z < 0:
                    make.row(label, used, 1.0, float(count), float(top))
                    continue
                ones = [1.0] * used.size
                high = 0.0 if top == count else np.inf
                make.row(label, [*used, z + n], [*ones, -float(count)], 0.0, high)
                if top > count:
                    make.row(f"{label}_most", [*used, z + n], [*ones, -float(top)], -np.inf, 0.0)
                for column in used:
                    make.row(f"on_{make.columns[column]}", [column, z + n], [1, -1], -np.inf, 0)
            if z >= 0:
                for rank in np.flatnonzero(self.pinned[expert] & self.allowed[expert]).tolist():
                    every = [self.at[expert, n][rank] for n in range(counts.size)]
                    held = [column for column in every if column >= 0]
                    make.row(f"pin_l{layer}_e{expert}_g{rank}", held, 1.0, 1.0, np.inf)

    def _from_current(self, expert: int, first: int, last: int) -> bool:
        """Under a budget of moves: which of today's replicas are kept, and how many received.

        One column for each choice, and the received copies by their number and rank. Far tighter
        than levels: the little that may change is spelt out. False, and nothing is added, if
        there is no budget or the choices are too many.
        """
        problem, make, layer = self.problem, self.make, self.layer
        rules = problem.max_moves
        before = np.flatnonzero(self.old[expert] & self.allowed[expert]).tolist()
        if rules is None or not before or 2 ** len(before) > OPTIONS:
            return False
        limit = int(rules.allowance()[layer])
        if rules.total is not None:
            limit = min(limit, rules.total)
        pinned = set(np.flatnonzero(self.pinned[expert] & self.allowed[expert]).tolist())
        elsewhere = np.flatnonzero(self.allowed[expert] & ~self.old[expert]).tolist()
        limit = min(limit, len(elsewhere))
        if 2 ** len(before) * (limit + 1) > OPTIONS:
            return False
        options, received = [], dict[int, list[tuple[int, int]]]()
        for kept in itertools.product((True, False), repeat=len(before)):
            ranks = frozenset(itertools.compress(before, kept))
            if (pinned & set(before)) - ranks:
                continue
            for more in range(limit + 1):
                count = len(ranks) + more
                if not first <= count <= last:
                    continue
                name = f"o_l{layer}_e{expert}_k{'_'.join(map(str, sorted(ranks)))}_m{more}"
                column = make.column(name, whole=True)
                options.append((column, ranks, more))
                for rank in ranks:
                    self.held.append((column, int(layer), expert, rank))
                    self.carry[rank].append((column, expert, count))
                if more:
                    received.setdefault(count, []).append((column, more))
        make.row(f"choice_l{layer}_e{expert}", [c for c, _, _ in options], 1.0, 1.0, 1.0)
        for count, chosen in received.items():
            heavy = self._too_heavy(expert, count)
            columns = np.full(problem.ranks, -1)
            picks = [column for column, _ in chosen]
            for rank in elsewhere:
                if heavy[rank]:
                    continue
                name = f"x_l{layer}_e{expert}_g{rank}_c{count}"
                columns[rank] = self._replica(name, expert, rank, False)
                self.carry[rank].append((int(columns[rank]), expert, count))
                index = [columns[rank], *picks]
                make.row(f"on_{name}", index, [1.0, *[-1.0] * len(picks)], -np.inf, 0.0)
            used = columns[columns >= 0]
            value = [1.0] * used.size + [-float(more) for _, more in chosen]
            label = f"received_l{layer}_e{expert}_c{count}"
            make.row(label, [*used, *picks], value, 0.0, 0.0)
            self.at[expert, count] = columns
        for rank in pinned - set(before):
            mine = [at[rank] for (e, _), at in self.at.items() if e == expert and at[rank] >= 0]
            make.row(f"pin_l{layer}_e{expert}_g{rank}", mine, 1.0, 1.0, np.inf)
        self.options[expert] = options
        return True

    def _levels(self) -> tuple[IntArray, IntArray]:
        """Fewest and most replicas [experts] in plans whose makespans are below the cutoff."""
        problem = self.problem
        least = np.maximum(self.pinned.sum(axis=1), 1)
        for window in np.flatnonzero(self.busy & np.isfinite(self.cutoff)).tolist():
            room = self._room(window)
            room = np.sort(room[self.caps > 0])[::-1]
            reach = np.maximum.accumulate(room * np.arange(1, room.size + 1))
            needed = np.searchsorted(reach, self.tokens[window] * (1 - 1e-9)) + 1
            least = np.maximum(least, np.minimum(needed, room.size))
        most = np.minimum(problem.most_replicas, self.allowed.sum(axis=1))
        total = int(self.caps.sum())
        if problem.replica_budget is not None:
            others = (problem.layers - 1) * problem.experts
            total = min(total, problem.replica_budget - others)
        spare = max(total - int(least.sum()), 0)
        most = np.maximum(np.minimum(most, least + spare), 1)
        if problem.max_moves is not None:
            had = (self.old & self.allowed).sum(axis=1)
            most = np.minimum(most, np.maximum(had + problem.max_moves.allowance()[self.layer], 1))
        return np.minimum(least, most), most

    def _room(self, window: int) -> FloatArray:
        """Tokens [ranks] that ranks can run within the cutoff beside their base load."""
        most = self.cutoff[window] * (1 + 1e-9) * self.problem.cluster.speeds
        room = np.minimum(most, self.capacity) - self.base[window]
        return np.asarray(np.maximum(room, 0.0))

    def _too_heavy(self, expert: int, count: int) -> BoolArray:
        """Ranks [ranks] on which one of `count` even replicas alone passes the cutoff."""
        heavy = np.zeros(self.problem.ranks, dtype=np.bool_)
        for window in np.flatnonzero(self.busy & np.isfinite(self.cutoff)).tolist():
            heavy |= self.tokens[window, expert] / count > self._room(window) * (1 + 1e-9)
        return heavy

    def _weighted(self) -> None:
        """Shares y_weg <= x_eg are chosen in each window."""
        problem, make, layer = self.problem, self.make, self.layer
        most = np.minimum(problem.most_replicas, self.allowed.sum(axis=1))
        for expert in range(problem.experts):
            for rank in np.flatnonzero(self.allowed[expert]).tolist():
                name = f"x_l{layer}_e{expert}_g{rank}"
                pinned = bool(self.pinned[expert, rank])
                self.place[expert, rank] = self._replica(name, expert, rank, pinned)
            used = self.place[expert][self.place[expert] >= 0]
            make.row(f"copies_l{layer}_e{expert}", used, 1.0, 1.0, max(float(most[expert]), 1.0))
        for window in np.flatnonzero(self.busy).tolist():
            for expert in np.flatnonzero(self.tokens[window] > 0).tolist():
                ranks = np.flatnonzero(self.place[expert] >= 0).tolist()
                place = f"l{layer}_w{window}_e{expert}"
                mine = [make.column(f"y_{place}_g{rank}") for rank in ranks]
                self.share[window, expert, ranks] = mine
                make.row(f"served_{place}", mine, 1.0, 1.0, 1.0)
                for column, rank in zip(mine, ranks, strict=True):
                    pair = [column, self.place[expert, rank]]
                    make.row(f"on_{place}_g{rank}", pair, [1.0, -1.0], -np.inf, 0.0)

    def _slots(self) -> None:
        by_rank: list[list[int]] = [[] for _ in range(self.problem.ranks)]
        for column, _, _, rank in self.held:
            by_rank[rank].append(column)
        for rank, mine in enumerate(by_rank):
            if mine:
                name = f"slots_l{self.layer}_g{rank}"
                self.make.row(name, mine, 1.0, -np.inf, float(self.caps[rank]))

    def _rules(self) -> None:
        """Moves of the layer, expert groups on nodes."""
        problem, make, layer = self.problem, self.make, self.layer
        rules = problem.max_moves
        if isinstance(rules, MaxMoves) and self.received:
            limit = int(rules.allowance()[layer])
            if rules.total is not None:
                limit = min(limit, rules.total)
            make.row(f"moves_l{layer}", self.received, 1.0, -np.inf, float(limit))
        if problem.node_groups is None:
            return
        groups = problem.node_groups.of(problem.experts)
        assert problem.cluster.nodes is not None
        node = problem.cluster.nodes
        number, nodes = int(groups.max()) + 1, int(node.max()) + 1
        self.node = np.empty((number, nodes), dtype=np.int64)
        for group, at in np.ndindex(number, nodes):
            self.node[group, at] = make.column(f"n_l{layer}_q{group}_d{at}", whole=True)
        for group in range(number):
            make.row(f"node_l{layer}_q{group}", self.node[group], 1.0, 1.0, 1.0)
        for column, _, expert, rank in self.held:
            pair = [column, self.node[groups[expert], node[rank]]]
            make.row(f"node_{make.columns[column]}", pair, [1.0, -1.0], -np.inf, 0.0)
        room = np.bincount(node, weights=self.caps, minlength=nodes)
        size = np.bincount(groups, minlength=number)
        for at in range(nodes):
            name = f"room_l{layer}_d{at}"
            make.row(name, self.node[:, at], size.astype(float), -np.inf, float(room[at]))

    def _carried(self, window: int, rank: int) -> tuple[list[int], FloatArray, FloatArray]:
        """Columns of a rank, the tokens each brings, and the activations (at least)."""
        columns: list[int] = []
        tokens: list[float] = []
        active: list[float] = []
        load = self.tokens[window]
        if self.problem.routing == "even":
            for column, expert, count in self.carry[rank]:
                if load[expert] > 0:
                    columns.append(column)
                    tokens.append(load[expert] / count)
                    active.append(-np.expm1(-load[expert] / count))
        else:
            for expert in np.flatnonzero(self.share[window, :, rank] >= 0).tolist():
                columns.append(int(self.share[window, expert, rank]))
                tokens.append(load[expert])
                active.append(-np.expm1(-load[expert]))  # chord of a concave function: a bound
        return columns, np.array(tokens), np.array(active)

    def _times(self) -> None:
        problem, make = self.problem, self.make
        speeds, planes = problem.cluster.speeds, problem.cluster.planes
        for window in np.flatnonzero(self.busy).tolist():
            for rank in np.flatnonzero(self.caps > 0).tolist():
                columns, tokens, active = self._carried(window, rank)
                if not columns:
                    continue
                base, unit = self.base[window, rank], self.unit[window]
                name = f"l{self.layer}_w{window}_g{rank}"
                parts = [(0.0, 0.0, 1.0)]
                if planes is not None:
                    each = (planes.startup, planes.activation, planes.compute)
                    parts = list(zip(*(part.tolist() for part in each), strict=True))
                for k, (startup, activation, compute) in enumerate(parts):
                    rate = compute / speeds[rank]
                    value = (activation * active + rate * tokens) / unit
                    fixed = (startup + rate * base) / unit
                    label = f"time_{name}" if planes is None else f"time_{name}_k{k}"
                    index = [*columns, self.time[window]]
                    make.row(label, index, [*value, -1.0], -np.inf, -fixed)
                capacity = self.capacity[rank]
                if base <= capacity < base + tokens.sum():
                    scale = capacity if capacity > 0 else 1.0
                    room = (capacity - base) / scale
                    make.row(f"capacity_{name}", columns, tokens / scale, -np.inf, room)
