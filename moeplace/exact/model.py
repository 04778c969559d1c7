"""The one formulation: a mixed-integer programme as plain arrays, built once for every solver.

For each layer, with x = 1 where an expert has a replica on a rank:

    minimise  sum over windows and layers of weight x T  (worst window, CVaR: see `_combine`)
    T_w >= (b_wg + sum_e w_we share_weg) / v_g        every window w and rank g (or its planes)
    sum_e x_eg <= K_g,  1 <= sum_g x_eg <= most_e     slots, replicas

*Weighted routing*: share_weg = y_weg in 0 .. x_eg with sum_g y_weg = 1, chosen in each window.
*Even routing*: the share 1 / c is not linear in the number c of replicas, so each expert selects
its number: z_ec, and x_egc <= z_ec with sum_g x_egc = c z_ec; the share is sum_c x_egc / c.
Levels c that cannot matter are left out: below what any plan better than the best known needs,
and above what that leaves to others. In large models levels from the fourth on are joined (4 to 7,
8 to 15, ...) at the smallest share of each, a relaxation; plans are priced by `evaluate` anyway.

Under a budget of moves an expert chooses which of today's replicas it keeps and how many it
receives, instead of a number (see `layer.Layer._from_current`).

Units: T of each window and layer in units of its lower bound, so that numbers are near 1 and no
solver's absolute tolerance matters; the objective in `unit`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from moeplace._check import BoolArray, FloatArray, IntArray
from moeplace.dispatch import shares
from moeplace.errors import ProblemError
from moeplace.evaluate import Evaluation, evaluate
from moeplace.exact.layer import Builder, Layer, LayerColumns
from moeplace.plan import EMPTY, Plan
from moeplace.problem import Problem
from moeplace.search.state import to_slots

#: Makespans so far above the best known are kept possible, beyond any solver's tolerance.
MARGIN = 1e-5


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """Minimise cost . x + constant, with row_low <= rows x <= row_high, low <= x <= high.

    Attributes
    ----------
    cost, low, high : array [columns]
    whole : array of bool [columns]
        Columns that must be whole numbers.
    rows : sparse array [rows, columns]
    row_low, row_high : array [rows]
    columns, row_names : list of str
    constant : float
    unit : float
        Seconds (or token units) of one unit of the objective.
    layers : tuple of int
        Layers of the problem that are modelled.
    held : array [n, 4]
        (column, layer, expert, rank): the column is 1 where that replica exists.
    """

    cost: FloatArray
    low: FloatArray
    high: FloatArray
    whole: BoolArray
    rows: "sparse.csr_array"
    row_low: FloatArray
    row_high: FloatArray
    columns: list[str]
    row_names: list[str]
    constant: float
    unit: float
    layers: tuple[int, ...]
    held: IntArray
    blocks: "list[LayerColumns]"
    combined: tuple[int, ...] = ()  # worst step; or the quantile and each window's excess over it

    def slots(self, problem: Problem, values: FloatArray) -> IntArray:
        """Slots [layers modelled, slots] of a solution [columns]."""
        ranks, experts = problem.ranks, problem.experts
        on = np.zeros((len(self.layers), ranks, experts), dtype=np.bool_)
        position = {layer: n for n, layer in enumerate(self.layers)}
        chosen = self.held[values[self.held[:, 0]] > 0.5]
        at = np.array([position[layer] for layer in chosen[:, 1].tolist()], dtype=np.int64)
        on[at, chosen[:, 3], chosen[:, 2]] = True
        most = int(np.minimum(problem.cluster.slots, experts).max())
        order = np.argsort(~on, axis=2, kind="stable")[:, :, :most]
        table = np.where(np.take_along_axis(on, order, axis=2), order, EMPTY)
        slots: IntArray = to_slots(table, problem.cluster.slots)
        return slots

    def values(self, problem: Problem, plan: Plan) -> FloatArray:
        """A plan as a solution [columns]: a start for solvers that take one.

        NaN in columns for replicas that the model left out since no better plan has them.
        """
        found = np.full(self.cost.size, np.nan)
        priced = evaluate(problem, plan)
        share = shares(problem, plan)
        share = np.broadcast_to(share, (problem.windows, *share.shape[-2:]))
        for block in self.blocks:
            block.fill(found, plan, share[:, block.layer])
            for window, column in enumerate(block.time):
                if column >= 0:
                    found[column] = priced.makespan[window, block.layer] / block.unit[window]
        if self.combined:
            steps = priced.step_seconds / self.unit
            level, *excess = self.combined
            found[level] = steps.max()
            if excess:
                tail = 1 - problem.cvar_alpha
                over = np.maximum(steps[:, None] - steps, 0.0)  # [windows, levels]
                price = steps + problem.window_weight @ over / tail
                found[level] = steps[price.argmin()]
                found[excess] = over[:, price.argmin()]
        return found


def refuse_table(problem: Problem) -> None:
    """Raise ProblemError if latency is a table: its times need not be convex, rows are."""
    if problem.cluster.table is not None:
        raise ProblemError(
            "Exact methods cannot hold a latency table, whose times need not be convex. Use method "
            "auto, or fit planes to the times (moeplace fit)."
        )


def build(
    problem: Problem,
    layers: Sequence[int],
    bound: FloatArray,
    cutoff: FloatArray,
    *,
    window_weight: FloatArray | None = None,
    move_price: float = 0.0,
    replica_price: float = 0.0,
) -> Model:
    """Formulate some layers of a problem.

    Parameters
    ----------
    problem : Problem
    layers : sequence of int
        All layers, or one of a problem whose layers do not constrain each other (or are coupled
        by prices instead).
    bound : array [windows, layers]
        Proven lower bounds on the makespans: units, and bounds of T.
    cutoff : array [windows, layers]
        Makespans above these are of no interest: a plan that has one is no better than the best
        known. Infinite where nothing is known.
    window_weight : array [windows], optional
        Minimise this weighted sum of windows instead of the problem's objective.
    move_price, replica_price : float
        Seconds charged for each copy received and each replica, instead of the rules over all
        layers.

    Raises
    ------
    ProblemError
        If the formulation does not know the routing or a rule.
    """
    refuse_table(problem)
    unknown = None
    if problem.routing not in ("even", "weighted"):
        unknown = f"{problem.routing} routing"
    elif problem.max_off_node is not None:
        unknown = "MaxOffNode"
    if unknown is not None:
        raise ProblemError(f"Exact methods do not know {unknown}: use method auto.")
    coupled = window_weight is None
    weight = problem.window_weight if window_weight is None else window_weight
    unit = (
        problem.total(bound)
        if coupled
        else float((weight @ bound[:, layers] * problem.layer_weight[list(layers)]).sum())
    )
    unit = unit if unit > 0 else 1.0
    make = Builder()
    blocks, held = [], []
    time_columns: dict[tuple[int, int], tuple[int, float]] = {}
    constant = np.zeros(problem.windows)  # seconds of each window that no plan changes
    moves: list[tuple[int, float]] = []
    replicas: list[int] = []
    for layer in layers:
        block = Layer(problem, layer, bound[:, layer], cutoff[:, layer], make)
        block.add()
        blocks.append(block.columns())
        held.append(np.array(block.held, dtype=np.int64).reshape(-1, 4))
        scale = problem.layer_weight[layer]
        for window in range(problem.windows):
            if block.time[window] >= 0:
                time_columns[window, layer] = (block.time[window], scale * block.unit[window])
            else:
                idle = problem.cluster.seconds(problem.base[window, layer]).max()
                constant[window] += scale * max(float(idle), bound[window, layer])
        moves += [(column, 1.0) for column in block.received]
        replicas += [entry[0] for entry in block.held]
    rules = problem.max_moves
    if rules is not None and rules.total is not None and move_price == 0.0 and moves:
        make.row("moves", [c for c, _ in moves], 1.0, -np.inf, float(rules.total))
    for column, count in moves:
        make.cost[column] += move_price * count / unit
    budget = problem.replica_budget
    if budget is not None and replica_price == 0.0:
        make.row("replicas", replicas, 1.0, -np.inf, float(budget))
    for column in replicas:
        make.cost[column] += replica_price / unit
    steps = [
        [(column, scale / unit) for (w, _), (column, scale) in time_columns.items() if w == window]
        for window in range(problem.windows)
    ]
    fixed, combined = _combine(make, problem, steps, constant / unit, weight, coupled)
    return Model(
        cost=np.array(make.cost),
        low=np.array(make.low),
        high=np.array(make.high),
        whole=np.array(make.whole, dtype=np.bool_),
        rows=make.rows(),
        row_low=np.array(make.row_low),
        row_high=np.array(make.row_high),
        columns=make.columns,
        row_names=make.row_names,
        constant=fixed,
        unit=unit,
        layers=tuple(int(layer) for layer in layers),
        held=np.concatenate(held),
        blocks=blocks,
        combined=combined,
    )


def _combine(
    make: Builder,
    problem: Problem,
    steps: list[list[tuple[int, float]]],
    constant: FloatArray,
    weight: FloatArray,
    coupled: bool,
) -> tuple[float, tuple[int, ...]]:
    """The objective over windows of step times (lists of (column, factor)).

    Returns its constant, and the columns that combine windows.

    Worst: Z >= step_w for every window. CVaR: t + sum_w p_w s_w / (1 - alpha) with
    s_w >= step_w - t (Rockafellar and Uryasev 2000).
    """
    if not coupled or problem.objective == "mean" or problem.windows == 1:
        for window, terms in enumerate(steps):
            for column, factor in terms:
                make.cost[column] += float(weight[window]) * factor
        return float(weight @ constant), ()
    most = max(
        float(limit) + sum(make.high[column] * factor for column, factor in terms)
        for limit, terms in zip(constant, steps, strict=True)
    )
    worst = problem.objective == "worst"
    share = 1.0 if worst else 1.0 / (1.0 - problem.cvar_alpha)
    level = make.column("worst" if worst else "quantile", 0.0, most, cost=1.0)
    columns = [level]
    for window, terms in enumerate(steps):
        index, value = [c for c, _ in terms], [f for _, f in terms]
        index.append(level)
        value.append(-1.0)
        if not worst:
            price = float(weight[window]) * share
            columns.append(make.column(f"excess_w{window}", 0.0, most, cost=price))
            index.append(columns[-1])
            value.append(-1.0)
        make.row(f"step_w{window}", index, value, -np.inf, -float(constant[window]))
    return 0.0, tuple(columns)


def cutoffs(problem: Problem, bound: FloatArray, best: Evaluation, alone: bool) -> FloatArray:
    """Makespans [windows, layers] above which no plan is cheaper than the best known.

    All other windows (and layers, unless each stands `alone`) cost at least their bounds; CVaR
    is at least the mean.
    """
    lower = bound * problem.layer_weight
    if alone:
        left = problem.mean((best.makespan - bound) * problem.layer_weight)[None]
        weight = problem.window_weight[:, None] * problem.layer_weight
    elif problem.objective == "worst":
        left = best.objective - lower.sum(axis=1)[:, None]
        weight = np.ones((problem.windows, 1)) * problem.layer_weight
    else:
        left = best.objective - problem.mean(lower).sum()
        weight = problem.window_weight[:, None] * problem.layer_weight
    with np.errstate(divide="ignore", invalid="ignore"):
        above = np.where(weight > 0, np.maximum(left, 0.0) / weight, np.inf)
    return np.asarray((bound + above) * (1 + MARGIN))
