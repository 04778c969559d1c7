"""Lower bounds that need no solver, and their check.

`lower_bound` searches the largest makespan T that some argument refutes (`arguments`; compiled, in
`bound_kernels`), and what rules lift: groups on nodes, few moves, planes, prices. `recompute` asks
the named argument about a claimed bound again, from the problem and the prices that the bound
holds, with NumPy code.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from moeplace._check import FloatArray, IntArray, frozen, sum_by
from moeplace.arguments import (
    ARGUMENTS,
    SLACK,
    ceiling,
    most_copies,
    row_of,
    units_of,
    usable_slots,
)
from moeplace.claims import EXHAUSTIVE, Bound, Claim, Prices, claimed, own
from moeplace.dual_bound import DUAL, Priced, price_layers, worth_pricing
from moeplace.errors import CertificateError
from moeplace.evaluate import evaluate
from moeplace.hardware import Cluster
from moeplace.loads import LoadHistogram
from moeplace.nodes_bound import affordable, share_groups
from moeplace.planes_bound import planes, planes_bound
from moeplace.problem import Problem, check_problem

#: Sources of bounds that a constraint lifts: groups on nodes (a prefix), and few moves.
NODES, STAY, FEW = "nodes: ", "moves", "few moves"
#: `FewMoves` is tried for so many moves, for so much of a time limit (of one core).
MOST_MOVES, MOVES_SHARE = 8, 0.6
#: Source of bounds by every way to share groups out over nodes.
GROUPS = "groups on nodes"
#: Source of bounds by the latency planes.
PLANES = "planes"


def lower_bound(problem: Problem, time_limit: float | None = None, *, prices: bool = True) -> Bound:
    """The best of all arguments for each window and layer, and in total.

    Sharing groups out over nodes is left out where it may take most of the time limit (seconds),
    and few moves are looked at for a part of it. `prices` looks for those of "lp dual" where rules
    are that other arguments do not know, in 0.1 to 1 s for a layer of 256 experts on 32 ranks.
    """
    check_problem(problem)
    bound = _without_prices(problem, time_limit)
    if not prices or not worth_pricing(problem):
        return bound
    lifted, found = price_layers(
        problem, bound.per_layer, longest(problem, problem.tokens, problem.base), time_limit
    )
    return lifted_bound(problem, bound, lifted, DUAL, found)


def _without_prices(problem: Problem, time_limit: float | None) -> Bound:
    shape = (problem.windows, problem.layers)
    units = np.repeat(units_of(problem)[:, None], problem.layers, axis=1)
    value, source = _search(problem, problem.tokens, problem.base, problem.fluid, units)
    names = np.array(list(ARGUMENTS))[source].reshape(shape)
    per_layer = value.reshape(shape)
    if (coarse := nodes_as_ranks(problem)) is not None:
        other = lower_bound(coarse)
        names = np.where(other.per_layer > per_layer, np.char.add(NODES, other.source), names)
        per_layer = np.maximum(per_layer, other.per_layer)
    shared_out = share_groups(problem) if affordable(problem, time_limit) else None
    if shared_out is not None:
        lifted = shared_out.bound * (1 - SLACK)
        better = lifted > per_layer * (1 + SLACK)
        names = np.where(better, GROUPS, names)
        per_layer = np.where(better, lifted, per_layer)
    if problem.cluster.planes is not None:
        poured = planes_bound(problem, per_layer)
        names = np.where(poured > per_layer, PLANES, names)
        per_layer = np.maximum(per_layer, poured)
    if problem.max_moves is None:
        return Bound(per_layer=per_layer, source=names, total=problem.total(per_layer))
    stay = _stay(problem)
    names = np.where(stay > per_layer, STAY, names)
    per_layer = np.maximum(per_layer, stay)
    few = few_moves(problem, per_layer, within=time_limit)
    names = np.where(few > per_layer, FEW, names)
    per_layer = few
    alone, shared = problem.total(per_layer), shared_moves(problem, per_layer)
    return Bound(
        per_layer=per_layer, source=names, total=max(alone, shared), coupled=shared > alone
    )


def mean_bound(problem: Problem) -> FloatArray:
    """Lower bound [layers] on the makespan of the mean load: what planning on it can reach.

    Below the mean of the windows' makespans, so a target for the search, not for the result.
    """
    tokens, base = problem.mean_load
    fluid = problem.cluster.fluid_seconds(tokens.sum(axis=1), base)
    return _search(problem, tokens, base, fluid, np.zeros(problem.layers))[0]


def _search(
    problem: Problem, tokens: FloatArray, base: FloatArray, fluid: FloatArray, units: FloatArray
) -> tuple[FloatArray, IntArray]:
    from moeplace.bound_kernels import search

    value, source = search(
        -np.sort(-tokens, axis=-1).reshape(-1, problem.experts),
        frozen(base.reshape(-1, problem.ranks)),
        fluid.ravel(),
        frozen(problem.cluster.seconds(base).reshape(-1, problem.ranks)),
        problem.cluster.knots,
        usable_slots(problem),
        problem.routing == "even",
        units.ravel(),
        ceiling(problem),
        most_copies(problem),
    )
    # where capacities leave no placement every makespan is refuted: more than this says nothing
    return np.minimum(value, 2.0 * longest(problem, tokens, base).ravel()), source


def longest(problem: Problem, tokens: FloatArray, base: FloatArray) -> FloatArray:
    """Time [...] that no plan exceeds: tokens [..., experts] and base [..., ranks]."""
    whole = tokens.sum(axis=-1)[..., None] + base
    most = usable_slots(problem).max() * 1.0
    return np.asarray(problem.cluster.seconds(whole, np.array([most])).max(axis=-1))


def lifted_bound(
    problem: Problem,
    bound: Bound,
    better: FloatArray,
    name: str,
    prices: Mapping[tuple[int, int], Prices] | None = None,
) -> Bound:
    """The bound with layers lifted to `better` [windows, layers] by the argument `name`."""
    lifted = np.asarray(better > bound.per_layer)
    source = np.where(lifted, name, bound.source)
    per_layer = np.where(lifted, better, bound.per_layer)
    alone = problem.total(per_layer)
    shared = shared_moves(problem, per_layer)
    total = max(alone, shared)
    believed = claimed(problem, per_layer, bound.claims)
    return Bound(
        per_layer=per_layer,
        source=source,
        total=max(total, believed),
        coupled=shared > alone,
        claims=bound.claims,
        proven=max(total, claimed(problem, per_layer, own(bound.claims))),
        prices={**bound.prices, **(prices or {})},
    )


def recompute(problem: Problem, bound: Bound) -> None:
    """Check a bound from the problem alone; silent if every argument holds.

    Solvers' claims are not arguments: only that `total` follows from them is checked. Those of the
    exhaustive search are checked by searching again.

    Raises
    ------
    CertificateError
        If an argument does not refute every makespan below (1 - 1e-11) of its claim, or the
        total is more than the layers add up to. It names window, layer and argument.
    """
    check_problem(problem)
    if not isinstance(bound, Bound):
        raise CertificateError(
            f"A bound must be a moeplace.Bound, got {type(bound).__name__}: pass lower_bound's "
            "answer, or a result's bound."
        )
    shape = (problem.windows, problem.layers)
    if bound.per_layer.shape != shape or bound.source.shape != shape:
        raise CertificateError(
            f"Bound has the shape {bound.per_layer.shape}, the problem has [windows, layers] = "
            f"{shape}: it is for another problem."
        )
    coarse, shared = nodes_as_ranks(problem), None
    stay = _stay(problem) if problem.max_moves is not None else np.zeros(shape)
    for window, layer in np.ndindex(shape):
        claim = float(bound.per_layer[window, layer])
        name = str(bound.source[window, layer])
        place = f"window {window}, layer {layer}"
        if name == STAY:
            holds = bool(claim <= stay[window, layer] * (1 + SLACK))
        elif name == FEW and problem.max_moves is not None and problem.routing == "even":
            from moeplace.moves_bound import FewMoves

            case = FewMoves(problem, window, layer)
            holds = case.follows(int(_move_budget(problem)[layer]), claim * (1 - 1e-11))
        elif name == GROUPS and problem.node_groups is not None:
            if shared is None:
                shared = share_groups(problem)
            holds = shared is not None and bool(claim <= shared.bound[window, layer])
        elif name == EXHAUSTIVE:
            from moeplace.exhaustive import Exhaustive

            tiny = Exhaustive(problem, window, layer)
            holds = bool(tiny.refutes(claim * (1 - 1e-11)))
        elif name == DUAL:
            priced, found = Priced(problem, window, layer), bound.prices.get((window, layer))
            holds = found is not None and priced.follows(found, claim * (1 - 1e-11))
        elif name == PLANES and problem.cluster.planes is not None:
            holds = bool(planes(problem, window, np.array([layer]), np.array([claim]))[0])
        else:
            inner = coarse if name.startswith(NODES) else problem
            argument = ARGUMENTS.get(name.removeprefix(NODES))
            if argument is None or inner is None:
                raise CertificateError(f"Bound of {place} names an unknown argument {name!r}.")
            row = row_of(inner, window, layer)
            holds = claim == 0 or (claim > 0 and argument(row, claim * (1 - 1e-11)))
        if not holds:
            raise CertificateError(
                f"Bound {claim!r} of {place} does not follow from {name!r}: "
                "that argument does not refute a smaller makespan."
            )
    total = problem.total(bound.per_layer)
    if bound.coupled and problem.max_moves is not None:
        total = max(total, shared_moves(problem, bound.per_layer))
    for tried in own(bound.claims):
        if not _searched_again(problem, tried):
            raise CertificateError(
                f"Bound claims {tried.value!r} of layers {list(tried.layers)} by {tried.by!r}, but "
                "that search does not exclude less."
            )
    total = max(total, claimed(problem, bound.per_layer, own(bound.claims)))
    if not bound.recomputed <= total * (1 + SLACK):
        raise CertificateError(
            f"Bound claims {bound.recomputed!r} in total, its layers give {total!r}."
        )
    total = max(total, claimed(problem, bound.per_layer, bound.claims))
    if not bound.total <= total * (1 + SLACK):
        raise CertificateError(
            f"Bound claims {bound.total!r} in total, its layers and solvers' claims give {total!r}."
        )


def _searched_again(problem: Problem, claim: Claim) -> bool:
    from moeplace.exhaustive import Exhaustive

    priced = claim.move_price or claim.replica_price
    if claim.weight is None or (claim.weight < 0).any() or priced or len(claim.layers) != 1:
        return False
    (layer,) = claim.layers
    weight = float(problem.layer_weight[layer])
    if weight == 0:
        return claim.value == 0
    tiny = Exhaustive(problem, None, layer, claim.weight)
    return bool(tiny.refutes(claim.value / weight * (1 - 1e-11)))


def nodes_as_ranks(problem: Problem) -> Problem | None:
    """Expert groups as experts and nodes as ranks: a relaxation under `NodeGroups`, else None.

    Any routing. Proof: a group's replicas all lie on its node, so the node runs the group's
    load; its ranks together have the node's speed, and its slots hold at most so many groups.
    A makespan that no assignment of groups to nodes reaches, no plan reaches.
    """
    if problem.node_groups is None:
        return None
    cluster = problem.cluster
    assert cluster.nodes is not None
    groups = problem.node_groups.of(problem.experts)
    number, nodes = int(groups.max()) + 1, int(cluster.nodes.max()) + 1
    holds = cluster.slots > 0
    smallest = np.sort(np.bincount(groups, minlength=number)).cumsum()
    room = sum_by(np.minimum(cluster.slots, problem.experts), cluster.nodes, nodes)
    slots = np.searchsorted(smallest, room, "right")
    if slots.sum() < number:
        return None  # no plan at all
    loads = problem.loads
    speed = sum_by(cluster.speeds * holds, cluster.nodes, nodes)
    base = np.broadcast_to(problem.base_load, problem.base.shape) * holds
    tokens = sum_by(loads.tokens, groups, number)
    return Problem(
        LoadHistogram(tokens=tokens, passes=loads.passes, phase=loads.phase),
        Cluster(speeds=np.where(speed > 0, speed, 1.0), slots=slots),
        routing="weighted",
        objective=problem.objective,
        base_load=sum_by(base, cluster.nodes, nodes),
        layer_weight=problem.layer_weight,
        window_weight=problem.window_weight,
    )


def _stay(problem: Problem) -> FloatArray:
    """`stay_curve` at each layer's own budget of moves [windows, layers]."""
    from moeplace.moves_bound import stay_curve

    budget = _move_budget(problem)
    value = np.empty((problem.windows, problem.layers))
    for window, layer in np.ndindex(value.shape):
        curve = stay_curve(problem, window, layer, SLACK)
        value[window, layer] = curve[min(int(budget[layer]), problem.experts)]
    return value


def _move_budget(problem: Problem) -> IntArray:
    """Copies that each layer may receive [layers]."""
    rules = problem.max_moves
    assert rules is not None
    budget = rules.allowance()
    return budget if rules.total is None else np.minimum(budget, rules.total)


def few_moves(
    problem: Problem,
    per_layer: FloatArray,
    high: FloatArray | None = None,
    seconds: float | None = None,
    within: float | None = None,
) -> FloatArray:
    """Bounds [windows, layers] lifted by `FewMoves`; `high` are makespans known to be possible.

    Without them, those of the current plan (which a broken rule may exclude: still a limit of
    the search only). `seconds` for each layer and window; without, few steps, and fewer or none
    if they would take long `within` a time limit.
    """
    value = per_layer.copy()
    if problem.max_moves is None or problem.routing != "even":
        return value
    if high is None:
        high = evaluate(problem, problem.max_moves.current.with_split(None)).makespan
    from moeplace.moves_bound import FEWEST, PACE, QUICK, FewMoves  # compiled

    budget = _move_budget(problem)
    cases = [
        (int(window), int(layer))
        for window, layer in np.argwhere(high > per_layer * (1 + 1e-6))
        if budget[layer] <= MOST_MOVES
    ]

    steps = QUICK
    if within is not None and cases:
        steps = min(steps, int(MOVES_SHARE * within * PACE / len(cases)))
    if seconds is None and steps < FEWEST:
        return value

    def lift(case: tuple[int, int]) -> float:
        moves, low, top = int(budget[case[1]]), float(per_layer[case]), float(high[case])
        return FewMoves(problem, *case).bound(moves, low, top, seconds, steps)

    with ThreadPoolExecutor(1 if seconds is not None else None) as pool:
        for case, bound in zip(cases, pool.map(lift, cases), strict=True):
            value[case] = bound
    return value


def shared_moves(problem: Problem, per_layer: FloatArray) -> float:
    """Bound on the objective if the moves in all are shared over the layers as well as can be.

    Each layer's bound as a function of its copies received is replaced by its lower convex hull;
    the cheapest way to share the total is then greedy, and no integer way is cheaper. One window
    only (0 otherwise).
    """
    rules = problem.max_moves
    if rules is None or rules.total is None or problem.windows > 1:
        return 0.0
    from moeplace.moves_bound import stay_curve

    total, saved = rules.total, []
    start = np.empty(problem.layers)
    for layer in range(problem.layers):
        most = min(int(rules.allowance()[layer]), problem.experts)
        curve = np.maximum(stay_curve(problem, 0, layer, SLACK)[: most + 1], per_layer[0, layer])
        start[layer] = curve[0]
        at = 0
        while at < most:
            slopes = (curve[at] - curve[at + 1 :]) / np.arange(1, most - at + 1)
            step = int(slopes.argmax()) + 1
            if slopes[step - 1] <= 0:
                break
            saved += [float(slopes[step - 1] * problem.layer_weight[layer])] * step
            at += step
    saving = sum(sorted(saved, reverse=True)[:total])
    return max(problem.total(start[None]) - saving, 0.0) * (1 - 1e-11)
