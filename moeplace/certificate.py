"""What proves a result, in a file that stands on its own, and the check of it.

The file holds the instance, the plan, the bound of every window and layer with the argument that
proves it, and what solvers claim beyond. `check` believes none of it: the digest is computed from
the instance, the plan is checked and priced again in rational numbers, each argument is asked
again with rational loads, speeds and makespans, and the totals are summed again. What only a
solver claims is told apart.

Sums are exact. An argument compares them with a margin of 1e-12, wider than the one rounding of
that comparison, so that what holds here holds. "hot packing", "few moves" and "exhaustive" search
again, in whole numbers; "moves" and "planes" add floating-point numbers with a margin wider than
their rounding, and so does whatever contains an exponential. Prices of "lp dual" are the rational
numbers that stand in the file: whoever found them, if none is negative, they prove what follows.
"""

import hashlib
import math
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import msgspec
import numpy as np

from moeplace import __version__
from moeplace._check import FloatArray
from moeplace._files import PathLike, check_full, nested, plain, read_json, write_json
from moeplace.arguments import ARGUMENTS, Row, row_of
from moeplace.bounds import NODES, nodes_as_ranks, recompute, shared_moves
from moeplace.claims import Bound, Claim, Prices, claimed, own
from moeplace.dual_bound import DUAL, Priced
from moeplace.errors import CertificateError, PlanError, ProblemError
from moeplace.evaluate import Evaluation, evaluate
from moeplace.instances import FORMAT as INSTANCE_FORMAT
from moeplace.instances import VERSION as INSTANCE_VERSION
from moeplace.instances import InstanceFile, as_file, from_file
from moeplace.latency import Table
from moeplace.plan import EMPTY, Plan
from moeplace.problem import Problem
from moeplace.result import Result

FORMAT, VERSION = "moeplace-certificate", 1
#: Relative difference at which a stored number is another number.
SAME = Fraction(1, 10**9)
#: Bounds were lowered by 1e-12 when made; checked with this margin below.
MARGIN = 1 - Fraction(1, 10**11)


class _Claim(msgspec.Struct, forbid_unknown_fields=True):
    layers: list[int]
    weight: list[float] | None
    value: float
    by: str
    move_price: float = 0.0
    replica_price: float = 0.0


class _Prices(msgspec.Struct, forbid_unknown_fields=True):
    window: int
    layer: int
    token: list[float]
    slot: list[float]
    cut: list[list[float]]
    copy: float
    replica: float
    worth: list[list[float]]


class _Plan(msgspec.Struct, forbid_unknown_fields=True):
    slots: list[list[int]]
    split: msgspec.Raw = msgspec.Raw(b"null")


class _File(msgspec.Struct, forbid_unknown_fields=True):
    format: str
    version: int
    made_by: str
    method: str
    digest: str
    instance: InstanceFile
    plan: _Plan
    objective: float
    lower_bound: float
    recomputed: float
    coupled: bool
    bounds: list[list[float]]
    arguments: list[list[str]]
    claims: list[_Claim] = []
    prices: list[_Prices] = []  # files of older versions have none


@dataclass(frozen=True, kw_only=True, eq=False)
class Checked:
    """A certificate that holds.

    Attributes
    ----------
    problem : Problem
    evaluation : Evaluation
        Of the plan.
    bound : Bound
    method : str
    objective : Fraction
        Exact price of the plan; under latency planes the upper end of an interval.
    arguments : dict of str to int
        How many bounds of a window and layer each argument proves.
    """

    problem: Problem
    evaluation: Evaluation
    bound: Bound
    method: str
    objective: Fraction
    arguments: dict[str, int]

    @property
    def shares(self) -> tuple[float, float, float]:
        """Of the distance from fluid bound to plan: closed by arguments, by claims, and open.

        All 0 if there is none.
        """
        fluid = self.problem.total(self.problem.fluid)
        whole = float(self.objective) - fluid
        if whole <= float(SAME) * fluid:
            return 0.0, 0.0, 0.0
        proven = min(max((self.bound.recomputed - fluid) / whole, 0.0), 1.0)
        claimed = min(max((self.bound.total - fluid) / whole, 0.0), 1.0)
        return proven, claimed - proven, 1.0 - claimed


def write_certificate(result: Result, path: PathLike) -> None:
    """Write what proves a result, whole or not at all.

    Raises
    ------
    MoeplaceError
        If the result has no plan.
    FormatError
        If the file cannot be written.
    """
    bound, plan = result.bound, result.plan
    write_json(
        path,
        {
            "format": FORMAT,
            "version": VERSION,
            "made_by": f"moeplace {__version__}",
            "method": result.method,
            "digest": result.problem.digest(),
            "objective": float(result.objective),
            "lower_bound": float(result.lower_bound),
            "recomputed": float(min(bound.recomputed, result.objective)),
            "coupled": bound.coupled,
            "claims": [
                {
                    "layers": list(claim.layers),
                    "weight": None if claim.weight is None else plain(claim.weight),
                    "value": float(claim.value),
                    "by": claim.by,
                    "move_price": float(claim.move_price),
                    "replica_price": float(claim.replica_price),
                }
                for claim in bound.claims
            ],
            "arguments": bound.source.tolist(),
            "bounds": plain(bound.per_layer),
            "prices": [
                {
                    "window": window,
                    "layer": layer,
                    "token": plain(prices.token),
                    "slot": plain(prices.slot),
                    "cut": plain(prices.cut),
                    "copy": prices.copy,
                    "replica": prices.replica,
                    "worth": plain(prices.worth),
                }
                for (window, layer), prices in sorted(bound.prices.items())
                if bound.source[window, layer] == DUAL
            ],
            "plan": {
                "slots": plan.slots.tolist(),
                "split": None if plan.split is None else plain(plan.split),
            },
            "instance": as_file(result.problem),
        },
    )


def digest(path: PathLike) -> str:
    """SHA-256 of what a certificate says, whoever made it.

    Bounds and prices count with ten digits and shares with nine decimals, so that another
    processor's rounding does not make another certificate. The prices that prove a bound do not
    count: other ones may prove the same. Nothing is checked.

    Raises
    ------
    FormatError
        If the file cannot be read or is no certificate.
    """
    file = read_json(path, _File, header=(FORMAT, VERSION))
    split = msgspec.json.decode(bytes(file.plan.split))
    said = [
        file.method, file.digest, file.plan.slots, _rounded(split, "{:.9f}"), file.coupled,
        file.arguments, [[claim.layers, claim.by] for claim in file.claims],
        *(_rounded(number, "{:.9e}") for number in (
            file.objective, file.lower_bound, file.recomputed, file.bounds,
            [[claim.weight, claim.value, claim.move_price, claim.replica_price]
             for claim in file.claims],
        )),
    ]  # fmt: skip
    return hashlib.sha256(msgspec.json.encode(said)).hexdigest()


def _rounded(numbers: Any, form: str) -> Any:
    """Nested lists of numbers as text."""
    if isinstance(numbers, list):
        return [_rounded(each, form) for each in numbers]
    return None if numbers is None else form.format(numbers)


def check(path: PathLike) -> Checked:
    """Read a certificate and check all of it that can be.

    Raises
    ------
    FormatError
        If the file cannot be read or is no certificate.
    CertificateError
        If something in it does not follow, with its place.
    """
    file = read_json(path, _File, header=(FORMAT, VERSION))
    header = (file.instance.format, file.instance.version)
    if header != (INSTANCE_FORMAT, INSTANCE_VERSION):
        raise CertificateError(
            f"{path}: $.instance has format and version {header}, expected "
            f"{(INSTANCE_FORMAT, INSTANCE_VERSION)}."
        )
    try:
        problem = from_file(path, file.instance, "$.instance")
    except (ProblemError, PlanError) as error:
        raise CertificateError(f"$.instance: {error}") from error
    if problem.digest() != file.digest:
        raise CertificateError(
            f"{path}: $.digest is {file.digest[:16]}..., the instance in the file has "
            f"{problem.digest()[:16]}...: one of them was changed."
        )
    evaluation = _priced(path, file, problem)
    exact = _exact(evaluation)
    _same(path, "$.objective", file.objective, exact, "the plan costs")
    bound = _bound(path, file, problem)
    try:
        recompute(problem, bound)
        _again(problem, bound)
    except CertificateError as error:
        raise CertificateError(f"{path}: $.bounds: {error}") from error
    _totals(path, file, bound, evaluation, exact)
    return Checked(
        problem=problem,
        evaluation=evaluation,
        bound=bound,
        method=file.method,
        objective=exact,
        arguments=bound.sources,
    )


def _priced(path: PathLike, file: _File, problem: Problem) -> Evaluation:
    split = None
    check_full(path, file.plan.slots, "$.plan.slots", 2)
    if bytes(file.plan.split) != b"null":
        split = nested(path, file.plan.split, "$.plan.split", (2, 3))
    try:
        plan = Plan(
            slots=file.plan.slots,  # type: ignore[arg-type]
            rank_slots=problem.cluster.slots,
            experts=problem.experts,
            split=split,
        )
        evaluation = evaluate(problem, plan)
    except PlanError as error:
        raise CertificateError(f"{path}: $.plan: {error}") from error
    if not evaluation.legal:
        raise CertificateError(f"{path}: $.plan breaks a rule: {evaluation.violations[0]}.")
    return evaluation


def _bound(path: PathLike, file: _File, problem: Problem) -> Bound:
    shape = (problem.windows, problem.layers)
    for name, rows in (("bounds", file.bounds), ("arguments", file.arguments)):
        if [len(row) for row in rows] != [problem.layers] * problem.windows:
            raise CertificateError(
                f"{path}: $.{name} must be [windows][layers] = {shape}, one for each."
            )
    if not np.isfinite(file.bounds).all():
        raise CertificateError(f"{path}: $.bounds must be finite.")
    claims = []
    for n, claim in enumerate(file.claims):
        place = f"{path}: $.claims[{n}]"
        if not all(0 <= layer < problem.layers for layer in claim.layers):
            raise CertificateError(f"{place}.layers names a layer that does not exist.")
        if claim.weight is not None and (
            len(claim.weight) != problem.windows or len(claim.layers) != 1
        ):
            raise CertificateError(f"{place} must weigh every window, of one layer.")
        if claim.weight is None and sorted(claim.layers) != list(range(problem.layers)):
            raise CertificateError(f"{place} must be about all layers.")
        if claim.weight is None and (claim.move_price or claim.replica_price):
            raise CertificateError(f"{place} has prices, but is about the whole problem.")
        if claim.move_price and problem.max_moves is None:
            raise CertificateError(f"{place} has a price of moves, which no rule limits.")
        if min(claim.move_price, claim.replica_price) < 0 or not math.isfinite(claim.value):
            raise CertificateError(f"{place} has a negative price or no finite value.")
        weight = None if claim.weight is None else np.array(claim.weight)
        given: dict[str, Any] = msgspec.structs.asdict(claim)
        given |= {"layers": tuple(claim.layers), "weight": weight}
        claims.append(Claim(**given))
    prices = {}
    for n, stored in enumerate(file.prices):
        place, at = f"{path}: $.prices[{n}]", (stored.window, stored.layer)
        if not (0 <= at[0] < problem.windows and 0 <= at[1] < problem.layers):
            raise CertificateError(f"{place} names a window or layer that does not exist.")
        if at in prices:
            raise CertificateError(f"{place} is for window {at[0]}, layer {at[1]} again.")
        prices[at] = _prices(stored, problem)
        if not Priced(problem, *at).fits(prices[at]):
            raise CertificateError(
                f"{place} must have prices of at least 0, for each rank and, unless routing is "
                "even, for each expert."
            )
    return Bound(
        per_layer=np.array(file.bounds),
        source=np.array(file.arguments),
        total=file.lower_bound,
        coupled=file.coupled,
        claims=tuple(claims),
        proven=file.recomputed,
        prices=prices,
    )


def _prices(stored: _Prices, problem: Problem) -> Prices:
    """Prices as they are in the file; ragged lists get a shape that fits no layer."""

    def rows(lists: list[list[float]], length: int) -> FloatArray:
        if any(len(row) != length for row in lists):
            return np.zeros((0, 0))
        return np.array(lists, dtype=float).reshape(len(lists), length)

    return Prices(
        token=np.array(stored.token, dtype=float),
        slot=np.array(stored.slot, dtype=float),
        cut=rows(stored.cut, problem.ranks),
        copy=stored.copy,
        replica=stored.replica,
        worth=rows(stored.worth, problem.experts),
    )


def _totals(
    path: PathLike, file: _File, bound: Bound, evaluation: Evaluation, exact: Fraction
) -> None:
    """Hold totals and claims against the bounds of the layers and against the plan."""
    problem = evaluation.problem
    alone = _total(problem, bound.per_layer)
    shared = Fraction(shared_moves(problem, bound.per_layer))
    if file.coupled and shared <= alone * (1 - SAME):
        raise CertificateError(
            f"{path}: $.coupled is true, but no rule lifts the total above the layers' bounds."
        )
    proven = max(alone, shared) if file.coupled else alone
    proven = max(proven, Fraction(claimed(problem, bound.per_layer, own(bound.claims))))
    _same(path, "$.recomputed", file.recomputed, min(proven, exact), "the bounds add up to")
    rules = problem.max_moves
    for n, claim in enumerate(bound.claims):
        price = evaluation.objective
        if claim.weight is not None:
            (layer,) = claim.layers
            price = float(claim.weight @ evaluation.makespan[:, layer])
            price *= float(problem.layer_weight[layer])
            price += claim.replica_price * int((evaluation.plan.slots[layer] != EMPTY).sum())
            if claim.move_price and rules is not None:
                moves = evaluation.plan.moves_from(rules.current)[layer].sum()
                price += claim.move_price * int(moves)
        if claim.value > price * (1 + float(SAME)):
            raise CertificateError(
                f"{path}: $.claims[{n}].value is {claim.value!r}, but the plan costs {price!r}: "
                "the claim is false."
            )
    believed = Fraction(claimed(problem, bound.per_layer, bound.claims))
    believed = min(max(proven, believed), exact)
    _same(path, "$.lower_bound", file.lower_bound, believed, "bounds and claims give")


def _same(path: PathLike, place: str, stored: float, exact: Fraction, what: str) -> None:
    if not math.isfinite(stored) or abs(Fraction(stored) - exact) > SAME * abs(exact):
        raise CertificateError(f"{path}: {place} is {stored!r}, but {what} {float(exact)!r}.")


def _again(problem: Problem, bound: Bound) -> None:
    """Ask the arguments of `arguments.ARGUMENTS`, and prices, again in rational numbers."""
    coarse = nodes_as_ranks(problem)
    for window, layer in np.ndindex(bound.per_layer.shape):
        name = str(bound.source[window, layer])
        claim = Fraction(float(bound.per_layer[window, layer]))
        inner = coarse if name.startswith(NODES) else problem
        argument = ARGUMENTS.get(name.removeprefix(NODES))
        if name == DUAL:
            case, prices = Priced(problem, window, layer), bound.prices[window, layer]
            case = case.exact(_rational(case.row), _exactly(case.loads))
            holds = case.refutes(_exact_prices(prices), claim * MARGIN)
        elif claim == 0 or argument is None or inner is None:
            continue  # checked by `recompute`
        else:
            holds = argument(_rational(row_of(inner, window, layer)), claim * MARGIN)  # type: ignore[arg-type]
        if not holds:
            raise CertificateError(
                f"Bound {float(claim)!r} of window {window}, layer {layer} does not follow from "
                f"{name!r} in exact arithmetic."
            )


def _rational(row: Row) -> Row:
    """The same row with numbers that do not round."""
    return replace(
        row,
        loads=_exactly(row.loads),
        base=_exactly(row.base),
        knots=(_exactly(row.knots[0]), _exactly(row.knots[1]), _exactly(row.knots[2])),
        capacity=_exactly(row.capacity),
    )


def _exactly(values: FloatArray) -> Any:
    flat = [Fraction(x) if math.isfinite(x) else x for x in values.ravel().tolist()]
    return np.array(flat, dtype=object).reshape(values.shape)


def _exact_prices(prices: Prices) -> Prices:
    return Prices(
        token=_exactly(prices.token),
        slot=_exactly(prices.slot),
        cut=_exactly(prices.cut),
        copy=Fraction(prices.copy),  # type: ignore[arg-type]
        replica=Fraction(prices.replica),  # type: ignore[arg-type]
        worth=_exactly(prices.worth),
    )


def _exact(evaluation: Evaluation) -> Fraction:
    """Price of a plan in rational numbers; with planes, the upper end of an interval.

    Stored shares are normalised: each is divided by the sum over its expert's slots.
    """
    problem, plan = evaluation.problem, evaluation.plan
    cluster = problem.cluster
    speeds = [Fraction(speed) for speed in cluster.speeds.tolist()]
    ranks = plan.rank_of_slot.tolist()
    seconds = []
    for window in range(problem.windows):
        total = Fraction(0)
        for layer in range(problem.layers):
            load = [Fraction(x) for x in problem.tokens[window, layer].tolist()]
            carried = [Fraction(x) for x in problem.base[window, layer].tolist()]
            active = [Fraction(0)] * problem.ranks
            held = plan.slots[layer].tolist()
            if plan.split is None:
                copies = Counter(held)
                share = [Fraction(1, copies[e]) for e in held]
            else:
                stored = plan.split if plan.split.ndim == 2 else plan.split[window]
                share = [Fraction(x) for x in stored[layer].tolist()]
                sums: dict[int, Fraction] = {}
                for expert, part in zip(held, share, strict=True):
                    sums[expert] = sums.get(expert, Fraction(0)) + part
                share = [
                    part / sums[expert] if sums[expert] else part
                    for expert, part in zip(held, share, strict=True)
                ]
            for expert, rank, part in zip(held, ranks, share, strict=True):
                if expert != EMPTY:
                    carried[rank] += load[expert] * part
                    if cluster.planes is not None:
                        active[rank] += _activation(load[expert] * part)
            weight = Fraction(float(problem.layer_weight[layer]))
            total += weight * _slowest(problem, carried, active, speeds)
        seconds.append(total)
    return _over_windows(problem, seconds)


def _slowest(
    problem: Problem, carried: list[Fraction], active: list[Fraction], speeds: list[Fraction]
) -> Fraction:
    if problem.cluster.table is not None:
        return max(_looked_up(problem.cluster.table, g, n) for g, n in enumerate(carried))
    planes = problem.cluster.planes
    plain_times = [tokens / speed for tokens, speed in zip(carried, speeds, strict=True)]
    if planes is None:
        return max(plain_times)
    parts = [
        tuple(Fraction(x) for x in part)
        for part in zip(
            planes.startup.tolist(),
            planes.activation.tolist(),
            planes.compute.tolist(),
            strict=True,
        )
    ]
    return max(
        max(t + w * replicas + c * time for t, w, c in parts) if replicas or time else Fraction(0)
        for time, replicas in zip(plain_times, active, strict=True)
    )


def _looked_up(table: Table, rank: int, tokens: Fraction) -> Fraction:
    """A table's time, linear between its points."""
    known = [Fraction(n) for n in table.tokens[rank].tolist()]
    seconds = [Fraction(t) for t in table.seconds[rank].tolist()]
    if tokens <= known[0]:
        return seconds[0] if tokens > 0 else Fraction(0)
    if len(known) == 1:
        known, seconds = [Fraction(0), *known], [Fraction(0), *seconds]
    n = min(bisect_left(known, tokens), len(known) - 1)
    slope = (seconds[n] - seconds[n - 1]) / (known[n] - known[n - 1])
    return seconds[n - 1] + (tokens - known[n - 1]) * slope


def _activation(tokens: Fraction) -> Fraction:
    """At least 1 - exp(-tokens): libraries' exp is within one unit in the last place, we take 4."""
    if tokens == 0:  # exactly none, or an idle rank would pay the planes' start
        return Fraction(0)
    low = math.exp(-float(tokens)) * (1 - 2.0**-50)
    return min(1 - Fraction(low) + Fraction(2) ** -52 * tokens, Fraction(1))


def _total(problem: Problem, per_layer: FloatArray) -> Fraction:
    """What the bounds add up to: layers first, then windows."""
    weights = [Fraction(x) for x in problem.layer_weight.tolist()]
    steps = [
        sum((w * Fraction(b) for w, b in zip(weights, row, strict=True)), Fraction(0))
        for row in per_layer.tolist()
    ]
    return _over_windows(problem, steps)


def _over_windows(problem: Problem, steps: list[Fraction]) -> Fraction:
    if problem.objective == "worst":
        return max(steps)
    weight = [Fraction(x) for x in problem.window_weight.tolist()]
    scale = sum(weight)
    weight = [w / scale for w in weight]
    if problem.objective == "mean":
        return sum((w * s for w, s in zip(weight, steps, strict=True)), Fraction(0))
    left, total = Fraction(1), Fraction(0)
    tail = 1 - Fraction(problem.cvar_alpha)
    for step, share in sorted(zip(steps, weight, strict=True), reverse=True):
        part = min(share / tail, left)
        total += part * step
        left -= part
    return total
