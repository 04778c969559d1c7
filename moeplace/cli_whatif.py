"""The commands `moeplace whatif` (what a change would buy) and `moeplace robust`."""

import textwrap
from dataclasses import asdict
from typing import Annotated, Any

import typer

from moeplace.cli_answers import read_given, write, write_json
from moeplace.cli_options import (
    AsJson,
    Dask,
    Instance,
    ProfileFile,
    Ray,
    Seed,
    SumWindows,
    Workers,
    add,
)
from moeplace.compare import aligned, exact
from moeplace.sweep import on_cluster
from moeplace.tables import WIDTH, table
from moeplace.whatif import GOOD, SECONDS, Answer


def whatif(
    instance: Instance,
    decode: Annotated[
        str | None,
        typer.Option(
            metavar="INSTANCE",
            help="The same model under decode loads: what a placement for each phase buys.",
            show_default=False,
        ),
    ] = None,
    slots_most: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Slots that a rank's memory has room for. Default: two more than it has.",
            show_default=False,
        ),
    ] = None,
    time_limit: Annotated[
        float, typer.Option(metavar="SECONDS", help="Wall time of all answers together.")
    ] = SECONDS,
    work_limit: Annotated[
        int | None,
        typer.Option(
            metavar="STEPS",
            help="Search steps of each solve instead: the same inputs then give the same answers.",
            show_default=False,
        ),
    ] = None,
    seed: Seed = 0,
    workers: Workers = 1,
    profile: ProfileFile = None,
    sum_windows: SumWindows = False,
    dask: Dask = None,
    ray: Ray = None,
    as_json: AsJson = False,
) -> None:
    """Price changes: slots, GPUs added, lost, slower or swapped, dispatch; each with its bound."""
    from moeplace.whatif import whatif as ask

    given = read_given(instance, sum_windows, profile)
    other = None if decode is None else read_given(decode, sum_windows, profile).problem
    with on_cluster(dask, ray):
        table = ask(
            given.problem,
            decode=other,
            slots_most=slots_most,
            time_limit=time_limit,
            work_limit=work_limit,
            workers=workers,
            seed=seed,
        )
    base = table.answers[0]
    if as_json:
        write_json(
            {
                "instance": instance,
                "digest": given.problem.digest(),
                "unit": given.problem.cluster.time_unit,
                "answers": [_answer(answer) for answer in table.answers],
            }
        )
        return
    unit = given.problem.cluster.time_unit
    assert base.price is not None
    assert base.lower_bound is not None
    words = [
        *given.words,
        ("step time", exact(base.price, unit)),
        ("lower bound", exact(base.lower_bound, unit)),
    ]
    gap = base.gap or 0.0
    if gap > GOOD:
        words.append(("gap", f"{gap:.2%}: smaller changes are not told apart; give more time"))
    write("\n".join([*aligned(words), "", *_rows(table.answers)]) + "\n")


def _answer(answer: Answer) -> dict[str, Any]:
    return {
        "question": answer.question,
        "price": answer.price,
        "lower_bound": answer.lower_bound,
        "gap": answer.gap,
        "change": answer.change,
        "at_best": answer.at_best,
        "note": answer.note,
    }


def _rows(answers: tuple[Answer, ...]) -> list[str]:
    rows = [("change", "step time", "at best")]
    rows += [
        (answer.question, _signed(answer.change), _signed(answer.at_best)) for answer in answers[1:]
    ]
    lines = table(rows, notes=[answer.note for answer in answers[1:]])
    return [*lines, "step time: of the plan found. at best: proven, no plan does better."]


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.2%}"


def robust(
    instance: Instance,
    time_limit: Annotated[float, typer.Option(metavar="SECONDS", help="Of each solve.")] = 2.0,
    seed: Seed = 0,
    profile: ProfileFile = None,
    as_json: AsJson = False,
) -> None:
    """Plan on some windows, score on the others: whether a plan for several windows helps."""
    from moeplace.robust import folds, scores, verdict

    given = read_given(instance, False, profile)
    problem = given.problem
    found = {
        name: scores(problem, *parts, time_limit=time_limit, seed=seed)
        for name, parts in folds(problem).items()
    }
    if as_json:
        folded = {name: [asdict(score) for score in each] for name, each in found.items()}
        write_json({"instance": instance, "verdict": verdict(found), "folds": folded})
        return
    lines = []
    for name, each in found.items():
        head = (f"{name:<19}", "in sample", "held out", "worst", "against the sum")
        rows = [
            (score.planned_on, f"{score.in_sample:.4f}", f"{score.held_out:.4f}",
             f"{score.worst:.4f}", f"{score.against_sum:+.1%}")
            for score in each
        ]  # fmt: skip
        above = [score.held_out - 1 for score in each]
        most = max(*above, 1e-9)
        lines += ["", *table([head, *rows], bars=[x / most for x in above])]
    said = ["bar: held out, above the bound", *textwrap.wrap(verdict(found), WIDTH)]
    write("\n".join([*aligned(given.words), *lines, "", *said]) + "\n")


_COMMANDS = (
    (whatif, "whatif generate:A:0 --sum-windows --workers 2"),
    (robust, "robust instances/real/dsv2lite-windows_8x9_equal.json"),
)


def add_commands(app: typer.Typer) -> None:
    """Add both commands, once."""
    add(app, _COMMANDS)
