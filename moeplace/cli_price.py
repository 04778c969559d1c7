"""The commands that price and prove: `moeplace evaluate`, `bound` and `certify`."""

from typing import Annotated

import typer

from moeplace.batches import Batches, over_batches
from moeplace.bounds import lower_bound, recompute
from moeplace.claims import EXHAUSTIVE
from moeplace.cli_answers import (
    common,
    error,
    read_given,
    read_of_instance,
    sends_of,
    sources,
    traffic_by_method,
    write,
    write_json,
)
from moeplace.cli_options import (
    BAD_INPUT,
    AsJson,
    FirstMoeLayer,
    Hidden,
    Instance,
    PlanFormat,
    Quiet,
    SumWindows,
    TopK,
    add,
)
from moeplace.compare import (
    Row,
    aligned,
    described,
    exact,
    imbalance,
    percent,
    printable,
    sent,
)
from moeplace.evaluate import Evaluation
from moeplace.evaluate import evaluate as price
from moeplace.result import OPTIMAL_GAP, gap


def evaluate(
    instance: Instance,
    plan: Annotated[
        str, typer.Argument(metavar="PLAN", help="Plan file (JSON).", show_default=False)
    ],
    plan_format: PlanFormat = "moeplace",
    first_moe_layer: FirstMoeLayer = None,
    batches: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Price it over so many random forward passes of each window, too; the loads need "
            "passes.",
        ),
    ] = 0,
    sum_windows: SumWindows = False,
    hidden: Hidden = None,
    top_k: TopK = 1,
    as_json: AsJson = False,
) -> None:
    """Price a plan. A plan that breaks a rule of the problem is priced too, and ends with 2."""
    given = read_given(instance, sum_windows)
    problem, unit = given.problem, given.problem.cluster.time_unit
    sends = sends_of(problem, hidden, top_k)
    found = price(problem, read_of_instance(plan, plan_format, first_moe_layer, problem))
    bound = lower_bound(problem)
    # Bounds hold for legal plans only.
    least = min(bound.total, found.objective) if found.legal else bound.total
    left = float(gap(found.objective, least)) if found.legal else None
    status = "illegal" if left is None else "optimal" if left <= OPTIMAL_GAP else "feasible"
    row = Row(method="plan", evaluation=found)
    drawn = over_batches(problem, found.plan, batches) if batches else None
    if as_json:
        answer = common(given, status, found, least, left, [row]) | {
            "violations": list(found.violations)
        }
        if drawn is not None:
            answer["batches"] = {"count": batches, "objective": drawn.objective}
        if sends is not None:
            answer["traffic"] = traffic_by_method([row], sends)["plan"]
        write_json(answer)
    else:
        balanced = found.balancedness
        words = [
            *given.words,
            ("plan", printable(plan)),
            ("status", status),
            ("step time", exact(found.objective, unit)),
            ("lower bound", exact(least, unit)),
            *([] if left is None else [("gap", percent(left))]),
            *([] if drawn is None else [("random batches", _over(drawn, found, unit))]),
            ("imbalance", imbalance(found)),
            ("balancedness", f"{balanced.mean():.5f} on average, {balanced.min():.5f} at worst"),
        ]
        if sends is not None:
            ((_, off_rank, off_node),) = sent([row], *sends)
            said = f"{off_rank:,.0f} bytes leave their rank, {off_node:,.0f} their node"
            words.append(("each token", said))
        broken = [f"breaks a rule: {each}" for each in found.violations]
        write("\n".join([*aligned(words), *broken]) + "\n")
    if not found.legal:
        error(
            f"{plan}: the plan breaks {len(found.violations)} rules of the problem, the first: "
            f"{found.violations[0]}. Correct the plan or drop the rule."
        )
        raise typer.Exit(BAD_INPUT)


def _over(drawn: Batches, found: Evaluation, unit: str) -> str:
    """What random batches take, against the price at expected counts."""
    more = drawn.objective / found.objective - 1 if found.objective > 0 else 0.0
    return (
        f"{exact(drawn.objective, unit)}: {percent(more)} above, mean of {drawn.batches} batches' "
        "slowest ranks"
    )


def bound(instance: Instance, sum_windows: SumWindows = False, as_json: AsJson = False) -> None:
    """Prove a lower bound without solving, and check the proof again."""
    given = read_given(instance, sum_windows)
    problem, unit = given.problem, given.problem.cluster.time_unit
    proven = lower_bound(problem)
    recompute(problem, proven)
    fluid = problem.total(problem.fluid)
    if as_json:
        write_json(
            common(given, "bound", None, proven.total, None, [])
            | {"fluid": fluid, "sources": proven.sources, "recomputed": True}
        )
        return
    above = float(gap(proven.total, fluid))
    words = [
        *given.words,
        ("lower bound", exact(proven.total, unit)),
        ("fluid bound", exact(fluid, unit)),
        ("above fluid", percent(above)),
        ("bound from", sources(proven)),
        ("checked", "recomputed from the problem alone: every argument holds"),
    ]
    write("\n".join(aligned(words)) + "\n")


def certify(
    file: Annotated[
        str,
        typer.Argument(
            metavar="CERTIFICATE", help="What solve --certificate wrote.", show_default=False
        ),
    ],
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Check a certificate without a solver, in exact arithmetic; a false one ends with 5."""
    from moeplace.certificate import check
    from moeplace.certificate import digest as certificate_digest

    checked = check(file)
    problem, bound = checked.problem, checked.bound
    proven, claimed, left = checked.shares
    unit = problem.cluster.time_unit
    if as_json:
        write_json(
            {
                "status": "holds",
                "digest": problem.digest(),
                "certificate_digest": certificate_digest(file),
                "objective": float(checked.objective),
                "lower_bound": bound.total,
                "recomputed": bound.recomputed,
                "unit": unit,
                "arguments": checked.arguments,
                "claims": [
                    {"layers": list(claim.layers), "value": claim.value, "by": claim.by}
                    for claim in bound.claims
                ],
                "closed_by_arguments": proven,
                "closed_by_claims": claimed,
                "open": left,
            }
        )
        return
    if quiet:
        return
    by = sorted({claim.by for claim in bound.claims} - {EXHAUSTIVE})
    closed = (
        f"{percent(proven)} closed by what was checked here, {percent(claimed)} by claims, "
        f"{percent(left)} open"
    )
    words = [
        *described(problem),
        ("certificate", "holds"),
        ("step time", f"{exact(float(checked.objective), unit)}, computed in rational numbers"),
        ("lower bound", exact(bound.total, unit)),
        ("recomputed", exact(bound.recomputed, unit)),
        ("arguments", sources(bound)),
        *([("claimed by", ", ".join(by))] if by else []),
        ("gap to fluid", closed),
    ]
    write("\n".join(aligned(words)) + "\n")


_COMMANDS = (
    (evaluate, "evaluate instances/small/flashlb-even.json plan.json"),
    (bound, "bound instances/small/flashlb-even.json --json"),
    (certify, "certify certificate.json"),
)


def add_commands(app: typer.Typer) -> None:
    """Add the commands, once."""
    add(app, _COMMANDS)
