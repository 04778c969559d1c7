"""A result beside the policies that engines use, all priced alike, and its summary in words."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moeplace.errors import PolicyNotApplicable
from moeplace.evaluate import Evaluation
from moeplace.plan import Plan
from moeplace.policies import POLICIES, planning_loads
from moeplace.policies.vibe import vibe_assignment
from moeplace.problem import Problem, check_problem
from moeplace.result import Result
from moeplace.search.split import at_best_shares
from moeplace.tables import WIDTH, table
from moeplace.topology import traffic

#: What `compare` prices unless told otherwise: what engines start with, the published balancers
#: and the fair rival.
RIVALS = ("contiguous", "eplb", "eplb_lpt", "vibe")

#: Headings of `cells`: the imbalance ratio in total, then of the layers mean and worst.
COLUMNS = ("method", "step time", "imbalance", "mean layer", "worst", "moves")

_LABELS = {"eplb_lpt": "eplb + speed-aware LPT", "auto": "moeplace (auto)"}
_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method on the problem.

    Attributes
    ----------
    method : str
    evaluation : Evaluation or None
        Price of its plan; None if the method does not apply.
    reason : str
        Why it does not apply; empty if it does.
    moves : int or None
        Copies that ranks receive, summed, from what they hold now: the current plan of
        `MaxMoves`, else contiguous. None without a plan, or where contiguous does not apply.
    """

    method: str
    evaluation: Evaluation | None
    reason: str = ""
    moves: int | None = None

    @property
    def label(self) -> str:
        """The method's name for people."""
        return _LABELS.get(self.method, self.method)


def compare(
    problem: Problem, result: Result | None = None, methods: Sequence[str] = RIVALS
) -> list[Row]:
    """Price policies, and the plan of a result, on one problem.

    Under weighted routing the policies know no shares: each gets the best ones for its
    placement (`resplit`), so that only placements are compared. Plans that break a rule of the
    problem (EPLB may put two copies on a rank) are priced too; their violations say so.

    Parameters
    ----------
    problem : Problem
    result : Result, optional
        Its row comes last, and instead of the policy's if its method is one.
    methods : sequence of str
        Keys of `POLICIES`. With "vibe" comes a row "vibe (uncapped)", the algorithm as printed,
        where that puts more experts on a rank than it has slots; elsewhere the two agree.

    Returns
    -------
    list of Row
    """
    check_problem(problem)
    held = _held(problem)
    rows = []
    if problem.max_moves is not None:
        current = problem.max_moves.current.with_split(None)
        rows.append(_row("current plan", at_best_shares(problem, current), held))
    for method in methods:
        if result is not None and method == result.method:
            continue
        try:
            rows.append(_row(method, at_best_shares(problem, POLICIES[method](problem)), held))
        except PolicyNotApplicable as cause:
            rows.append(Row(method=method, evaluation=None, reason=str(cause)))
        if method == "vibe":
            rows += _uncapped(problem)
    if result is not None and result.evaluation is None:
        rows.append(Row(method=result.method, evaluation=None, reason=result.reason))
    elif result is not None and result.evaluation is not None:
        rows.append(_row(result.method, result.evaluation, held))
    return rows


def _held(problem: Problem) -> Plan | None:
    """What the ranks hold now: the current plan of `MaxMoves`, else contiguous."""
    if problem.max_moves is not None:
        return problem.max_moves.current
    try:
        return POLICIES["contiguous"](problem)
    except PolicyNotApplicable:
        return None


def _row(method: str, evaluation: Evaluation, held: Plan | None) -> Row:
    moves = None if held is None else int(evaluation.plan.moves_from(held).sum())
    return Row(method=method, evaluation=evaluation, moves=moves)


def _uncapped(problem: Problem) -> list[Row]:
    """ViBE as printed where it needs slots that are not there (else it equals the capped one)."""
    rank = vibe_assignment(planning_loads(problem), problem.cluster.speeds)
    experts = (rank[:, :, None] == np.arange(problem.ranks)).sum(axis=1)  # [layers, ranks]
    over = int((experts > problem.cluster.slots).any(axis=1).sum())
    if over == 0:
        return []
    reason = f"{over} of {problem.layers} layers put more experts on a rank than it has slots"
    return [Row(method="vibe (uncapped)", evaluation=None, reason=reason)]


def cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Text of each row under `COLUMNS`; times in one unit, that of the last row with a price."""
    priced = [row.evaluation for row in rows if row.evaluation is not None]
    like = priced[-1].objective if priced else 0.0
    texts: list[tuple[str, ...]] = []
    for row in rows:
        if row.evaluation is None:
            texts.append((row.label, "n/a", "", "", "", ""))
            continue
        found = row.evaluation
        label = row.label if found.legal else f"{row.label} *"
        time = amount(found.objective, found.problem.cluster.time_unit, like)
        ratios = (found.imbalance, float(found.ratio.mean()), float(found.ratio.max()))
        moves = "n/a" if row.moves is None else f"{row.moves:,}"
        texts.append((label, time, *map(_ratio, ratios), moves))
    return texts


def sent(rows: Sequence[Row], hidden: int, top_k: float) -> list[tuple[str, float, float]]:
    """Label of each priced row, and the bytes that leave rank and node for each token."""
    found = []
    for row in rows:
        if row.evaluation is not None:
            problem, plan = row.evaluation.problem, row.evaluation.plan
            rank, node = traffic(problem, plan, top_k).bytes_per_token(hidden)
            found.append((row.label, rank, node))
    return found


def notes(problem: Problem, rows: Sequence[Row]) -> list[str]:
    """What a reader of the table must know, in lines."""
    held = "contiguous" if problem.max_moves is None else "the current plan"
    said = [f"moves: copies that the ranks receive, from {held}."]
    if problem.routing == "weighted":
        said.append("Every policy has the best shares for its placement.")
    for row in rows:
        if row.evaluation is None:
            said.append(f"{row.label}: {row.reason or 'no plan'}")
        elif not row.evaluation.legal:
            broken = row.evaluation.violations
            more = f" ({len(broken)} in all)" if len(broken) > 1 else ""
            said.append(f"* {row.label} breaks rules of the problem: {broken[0]}{more}")
    return [line for note in said for line in textwrap.wrap(printable(note), WIDTH)]


def summary(result: Result) -> str:
    """The result in plain text of at most 80 columns, with contiguous and eplb beside it."""
    lines = aligned(facts(result))
    rows = compare(result.problem, result, methods=("contiguous", "eplb"))
    return "\n".join([*lines, "", *table([COLUMNS, *cells(rows)]), *notes(result.problem, rows)])


def facts(result: Result) -> list[tuple[str, str]]:
    """Label and value of all that a result says, the comparison aside."""
    problem, bound = result.problem, result.bound
    unit = problem.cluster.time_unit
    found = [*described(problem), ("method", result.method), ("status", str(result.status))]
    if result.evaluation is None:
        found.append(("reason", result.reason))
    else:
        found.append(("step time", exact(result.objective, unit)))
    found.append(("lower bound", exact(result.lower_bound, unit)))
    if result.evaluation is not None:
        found.append(("gap", percent(result.gap)))
    steps = f", {result.work:,} search steps" if result.work else ""
    found.append(("wall time", wall(result.seconds) + steps))
    if result.evaluation is not None:
        found.append(("imbalance", imbalance(result.evaluation)))
    found.append(("bound from", ", ".join(f"{name} {n}" for name, n in bound.sources.items())))
    return found


def described(problem: Problem) -> list[tuple[str, str]]:
    """Label and value of what is to be solved."""
    spread = float(problem.cluster.speeds.max() / problem.cluster.speeds.min() - 1)
    speeds = f"fastest {percent(spread)} above slowest" if spread > 0 else "all equal"
    over = f"{problem.objective} over {problem.windows:,} windows of the "
    unit = "forward pass" if problem.loads.passes is not None else "window"
    named = [("instance", printable(problem.name))] if problem.name else []
    cluster, model = problem.cluster, []
    if cluster.planes is not None:
        count = _count(cluster.planes.startup.size, "plane")
        model = [("latency", f"{count} in (replicas, tokens)")]
    elif cluster.table is not None:
        count = _count(cluster.table.tokens.shape[1], "point")
        model = [("latency", f"table of {count}")]
    rules = [("constraints", str(len(problem.constraints)))] if problem.constraints else []
    return [
        *named,
        ("shapes", shapes(problem)),
        ("speeds", f"{problem.cluster.speed_unit}, {speeds}"),
        *model,
        ("routing", problem.routing),
        *rules,
        ("objective", f"{over if problem.windows > 1 else ''}step time per {unit}"),
    ]


def shapes(problem: Problem) -> str:
    """Windows, layers, experts, slots and ranks in words."""
    sizes = (
        _count(problem.windows, "window"),
        _count(problem.layers, "layer"),
        _count(problem.experts, "expert"),
    )
    slots = _count(problem.cluster.total_slots, "slot")
    return f"{' x '.join(sizes)}; {slots} on {_count(problem.ranks, 'rank')}"


def imbalance(evaluation: Evaluation) -> str:
    """Imbalance ratios in words: makespan over fluid bound."""
    ratio = evaluation.ratio
    return (
        f"{_ratio(evaluation.imbalance)} in total; layers {_ratio(float(ratio.mean()))} on "
        f"average, {_ratio(float(ratio.max()))} at worst"
    )


def aligned(pairs: Sequence[tuple[str, str]], width: int = WIDTH) -> list[str]:
    """Labels and values in two columns, long values wrapped."""
    indent = max(len(label) for label, _ in pairs) + 2
    lines = []
    for label, value in pairs:
        wrapped = textwrap.wrap(value, width - indent) or [""]
        lines.append(f"{label:<{indent}}{wrapped[0]}")
        lines += [" " * indent + more for more in wrapped[1:]]
    return lines


def exact(value: float, unit: str) -> str:
    """A time to read, and to the last digit."""
    return f"{amount(value, unit)} (exactly {value!r})"


def amount(value: float, unit: str, like: float | None = None) -> str:
    """Six digits of a time; seconds in ms, us or ns where `like` (or itself) is that small."""
    scale, name = 1.0, unit
    if unit == "s":
        size = value if like is None else like
        scale, name = next((pair for pair in _UNITS if size >= pair[0]), _UNITS[-1])
        if size == 0:
            scale, name = _UNITS[0]
    elif like is not None:  # a column of a table has no room for the words
        name = ""
    return f"{_digits(value / scale)} {name}".rstrip()


def wall(seconds: float) -> str:
    """A wall time, to three digits."""
    return f"{seconds:.3g} s" if seconds < 1000 else f"{seconds:,.0f} s"


def percent(ratio: float) -> str:
    """A ratio as per cent, small ones with two digits that count."""
    if not np.isfinite(ratio):
        return "infinite"
    return f"{100 * ratio:.3g} %" if ratio < 10 else f"{100 * ratio:,.0f} %"


def printable(text: str) -> str:
    """The text with control characters escaped: names come from files."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _digits(value: float) -> str:
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e9:
        return f"{value:.6g}"
    decimals = max(0, 5 - int(np.floor(np.log10(abs(value)))))
    return f"{value:,.{min(decimals, 6)}f}"


def _ratio(value: float) -> str:
    return f"{value:.5f}" if value < 100 else f"{value:.6g}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
