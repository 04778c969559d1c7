"""A study as one HTML file that needs nothing else: plotly, figures, tables and words are in it.

Answers come in the order in which people ask: how unequal is it, what does each plan cost against
what is possible, which rank holds up which layer, what moves, what would changes buy. Beside each
figure stands its data as a table, for people who do not see it and for paper.
"""

from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np

from moeplace import __version__, figures
from moeplace.compare import amount, described, percent, printable
from moeplace.evaluate import Evaluation
from moeplace.report_page import Page, Section, Table, escaped, folded, layer_filter, table
from moeplace.result import Status
from moeplace.study import OURS, Study, layer_cost, rank_cost

GIGA = 1e9
#: Of searches that found a plan.
ENDED = {
    Status.OPTIMAL: "proven optimal",
    Status.WITHIN_GAP: "within the gap that was asked for",
    Status.FEASIBLE: "the best that was found in time",
    Status.INTERRUPTED: "what was found until the search was stopped",
}


def report(found: Study) -> str:
    """The report on a study, as HTML.

    Raises
    ------
    MissingExtraError
        If plotly is not installed.
    """
    figures.plotly()
    page = Page(f"Placement report: {printable(found.problem.name) or 'unnamed instance'}")
    for section in (_unequal, _costs, _slowest, _moved, _changes, _search):
        page.sections.append(section(page, found))
    facts = [*described(found.problem)]
    if found.problem.origin:
        facts.append(("loads and speeds from", printable(found.problem.origin)))
    facts.append(("digest", found.problem.digest()))
    made = datetime.now(UTC).isoformat(timespec="seconds")
    facts.append(("made", f"{made} by moeplace {__version__}"))
    head = table(Table(caption="What was planned for", heads=("", ""), rows=facts), words=True)
    head += "".join(f'<p class="note">{escaped(note)}</p>' for note in found.notes)
    return page.html(head, layer_filter(found.problem.layers))


def _unequal(page: Page, found: Study) -> Section:
    problem = found.problem
    tokens = problem.mean_load[0]
    summed = problem.loads.aggregate()
    gini, skew, zeros = summed.gini()[0], summed.skew()[0], summed.zeros()[0]
    tenth = max(1, round(problem.experts / 10))
    busiest = np.sort(tokens, axis=1)[:, ::-1][:, :tenth].sum(axis=1)
    total = np.where(tokens.sum(axis=1) > 0, tokens.sum(axis=1), 1.0)
    speeds = problem.cluster.speeds
    fastest = speeds.max() / speeds.min() - 1
    answer = (
        f"In a typical layer the busiest {tenth:,} of {problem.experts:,} experts take "
        f"{np.median(busiest / total):.0%} of the tokens (the worst layer: "
        f"{(busiest / total).max():.0%}). "
        + ("All GPUs are equally fast." if fastest == 0 else
           f"The fastest GPU is {percent(float(fastest))} faster than the slowest.")
    )  # fmt: skip
    loads = Table(
        caption="Loads of each layer, windows summed",
        heads=("layer", "max / mean", "gini", "experts without a token"),
        rows=[(str(i), f"{skew[i]:.3f}", f"{gini[i]:.3f}", f"{zeros[i]:.1%}")
              for i in range(problem.layers)],
        layers=True,
    )  # fmt: skip
    ranks = Table(
        caption="Ranks",
        heads=("rank", f"speed ({problem.cluster.speed_unit})", "against the mean", "slots"),
        rows=[(str(rank), f"{speed:,.6g}", f"{speed / speeds.mean() - 1:+.2%}",
               str(problem.cluster.slots[rank])) for rank, speed in enumerate(speeds)],
    )  # fmt: skip
    body = "<h3>Expert loads</h3>" + page.plot(
        "loads",
        figures.load_curve(tokens),
        f"Lorenz curves of expert loads. {answer}",
        "The further a curve is above the dotted line, the less even the load. The band holds "
        "all layers.",
        loads,
    )
    body += "<h3>GPUs</h3>" + page.plot(
        "speeds",
        figures.rank_speeds(speeds, problem.cluster.slots),
        f"Bars of each rank's speed against the mean, from {speeds.min() / speeds.mean() - 1:+.1%} "
        f"to {speeds.max() / speeds.mean() - 1:+.1%}",
        "Times follow tokens over speed, or the latency model named above.",
        ranks,
    )
    return Section(anchor="unequal", title="How unequal are loads and GPUs?",
                   answer=escaped(answer), body=body)  # fmt: skip


def _costs(page: Page, found: Study) -> Section:
    problem, unit = found.problem, found.problem.cluster.time_unit
    least, ours = found.result.lower_bound, found.ours
    rows = []
    for name, priced in found.plans.items():
        left = priced.objective / least - 1 if least > 0 else 0.0
        legal = "" if priced.legal else f"breaks {len(priced.violations)} rules"
        rows.append((
            name, amount(priced.objective, unit, ours.objective), percent(max(left, 0.0)),
            f"{priced.imbalance:.5f}", f"{priced.ratio.max():.4f}", legal,
        ))  # fmt: skip
    rows.append(("lower bound", amount(least, unit, ours.objective), "", "", "", "proven"))
    saved = 1 - ours.objective / found.first.objective if found.first.objective > 0 else 0.0
    name = next(iter(found.plans))
    answer = (
        f"A step takes {amount(ours.objective, unit)} under our plan, {saved:.2%} less than under "
        f"{name}. No plan can be more than {percent(found.result.gap)} faster than ours: the "
        f"bound is {amount(least, unit)}."
    )
    floor = found.floor()
    costs = {name: layer_cost(priced) for name, priced in found.plans.items()}
    body = table(
        Table(
            caption="Step time of each plan",
            heads=("plan", "step time", "above the bound", "imbalance", "worst layer", ""),
            rows=rows,
        )
    )
    source = found.bound.source
    heads = ("layer", *costs, "bound", "proven by")
    per_layer = Table(
        caption=f"Slowest rank of each layer ({unit}), mean over windows",
        heads=heads,
        rows=[
            (str(i), *(f"{cost[i]:.6g}" for cost in costs.values()), f"{floor[i]:.6g}",
             ", ".join(sorted(set(source[:, i].tolist()))))
            for i in range(problem.layers)
        ],
        layers=True,
    )  # fmt: skip
    body += page.plot(
        "costs",
        figures.layer_bounds(costs, floor, unit=unit),
        f"Slowest rank of each layer under each plan, against the bound. {answer}",
        "Above: grey bars are proven bounds, lines are plans. Below: how far each plan is from the "
        f"bound; gaps below {figures.LEAST_GAP:g} are drawn there.",
        per_layer,
        layers="xaxis",
    )
    return Section(anchor="costs", title="What does each plan cost against its bound?",
                   answer=escaped(answer), body=body)  # fmt: skip


def _slowest(page: Page, found: Study) -> Section:
    problem, floor = found.problem, found.floor()
    above = np.where(floor > 0, floor, 1.0)[:, None]
    times = {name: rank_cost(priced) / above for name, priced in found.plans.items()}
    limits = figures.span(times)
    names = list(times)
    for number, (name, rows) in enumerate(times.items()):
        figure = figures.rank_times({name: rows}, label="x bound", limits=limits)
        page.store(f"ranks{number}", figure)
    shown = [0, len(names) - 1] if len(names) > 1 else [0]
    panels = "".join(_panel(page, names, side, number) for side, number in enumerate(shown))
    tables = [lead(found.plans[names[number]], names[number]) for number in shown]
    first, last = (_lead_words(found.plans[names[number]]) for number in (0, -1))
    answer = f"Under {names[0]} {first}; under {names[-1]} {last}."
    caption = (
        "Time of each rank over its layer's proven bound, all plans under one colour scale: 1 is "
        "perfect, yellow holds up its layer, dark waits. A scale for each shows how even plans "
        "differ. "
    )
    if problem.windows > 1:
        caption += f"Means over {problem.windows:,} windows."
    body = (
        '<label><input id="own-scale" type="checkbox"> a colour scale for each plan</label>'
        f'<figure><div class="pair">{panels}</div><figcaption>{escaped(caption)}</figcaption>'
        f"</figure>{''.join(map(folded, tables))}"
    )
    return Section(anchor="slowest", title="Which rank is slowest in each layer, and by how much?",
                   answer=escaped(answer), body=body)  # fmt: skip


def _panel(page: Page, names: Sequence[str], side: int, number: int) -> str:
    """One heat map and the choice of its plan."""
    options = "".join(
        f'<option value="ranks{i}"{" selected" * (i == number)}>{escaped(name)}</option>'
        for i, name in enumerate(names)
    )
    drawing = page.drawing(
        f"ranks{number}", f"Heat map of rank times: {names[number]}", "yaxis", 460
    ).replace(f'id="plot-ranks{number}"', f'id="plot-side{side}"')
    return (
        f'<div><label>Plan <select data-plot="plot-side{side}">{options}</select></label>'
        f"{drawing}</div>"
    )


def lead(priced: Evaluation, name: str) -> Table:
    """Which rank is slowest in each layer, and by how much."""
    problem, unit = priced.problem, priced.problem.cluster.time_unit
    cost = rank_cost(priced)
    slowest = priced.rank_seconds.argmax(axis=2)  # [windows, layers]
    rows = []
    for layer in range(problem.layers):
        order = np.argsort(-cost[layer], kind="stable")
        rank, worst = int(order[0]), float(cost[layer, order[0]])
        second = float(cost[layer, order[1]]) if problem.ranks > 1 else worst
        mean = float(cost[layer].mean())
        times = int((slowest[:, layer] == rank).sum())
        rows.append((
            str(layer), str(rank), f"{worst:.6g}",
            f"{_above(worst, second):+.3%}", f"{_above(worst, mean):+.3%}",
            f"{times} of {problem.windows}",
        ))  # fmt: skip
    return Table(
        caption=f"Slowest ranks under {name}",
        heads=("layer", "rank", f"time ({unit})", "over the second", "over the mean",
               "slowest in windows"),
        rows=rows,
        layers=True,
    )  # fmt: skip


def _lead_words(priced: Evaluation) -> str:
    cost = rank_cost(priced)
    over = np.array([_above(float(row.max()), float(row.mean())) for row in cost])
    ranks, times = np.unique(cost.argmax(axis=1), return_counts=True)
    most = int(times.argmax())
    return (
        f"the slowest rank of a layer takes {over.mean():.2%} more than the mean rank, "
        f"{over.max():.2%} at worst (layer {int(over.argmax())}); rank {int(ranks[most])} is "
        f"slowest most often, in {int(times[most])} of {over.size} layers"
    )


def _moved(page: Page, found: Study) -> Section:
    problem, unit = found.problem, found.problem.cluster.time_unit
    received = found.received()
    first = next(iter(found.plans))
    total = int(found.ours.plan.moves_from(found.first.plan).sum())
    held = int((found.ours.plan.slots >= 0).sum())
    size = "" if found.expert_bytes is None else f", {total * found.expert_bytes / GIGA:,.1f} GB"
    answer = (
        f"From {first} to our plan {total:,} of {held:,} slots receive another expert{size}."
        if first != OURS
        else "There is no other plan to move from."
    )
    tokens = problem.mean_load[0]
    count = {name: priced.plan.replicas for name, priced in found.plans.items()}
    most = {name: replicas.max(axis=1) for name, replicas in count.items()}
    body = "<h3>Replicas</h3>" + page.plot(
        "replicas",
        figures.replicas(count, tokens),
        "Mean number of replicas by popularity of the expert, for each plan",
        "Mean over layers; experts are sorted by load within each layer, the busiest is 1.",
        Table(
            caption="Most replicas of one expert",
            heads=("layer", *most),
            rows=[(str(i), *(str(each[i]) for each in most.values()))
                  for i in range(problem.layers)],
            layers=True,
        ),
    )  # fmt: skip
    if received:
        body += f"<h3>Copies received, from {escaped(first)}</h3>" + page.plot(
            "moves",
            figures.moves(received),
            f"Copies that ranks must receive by layer. {answer}",
            "A copy is one expert's weights, received by a rank that did not hold it.",
            Table(
                caption=f"Copies received by layer, from {first}",
                heads=("layer", *received),
                rows=[(str(i), *(str(each[i]) for each in received.values()))
                      for i in range(problem.layers)],
                layers=True,
            ),
            layers="xaxis",
        )  # fmt: skip
    if len(found.points) > 1:
        what = "copies" if found.expert_bytes is None else "bytes"
        rows = [
            ("no limit" if point.budget is None else f"{point.budget} a layer",
             f"{point.moves:,}", *(() if what == "copies" else (f"{point.bytes / GIGA:,.2f}",)),
             amount(point.objective, unit, found.ours.objective),
             amount(point.lower_bound, unit, found.ours.objective), f"{point.kept:.1%}")
            for point in found.points
        ]  # fmt: skip
        enough = next(point for point in found.points if point.kept >= 0.5)
        answer += (
            f" {enough.kept:.0%} of what moves gained in our trials is had for {enough.moves:,} "
            "copies."
        )
        body += "<h3>Step time against moves</h3>" + page.plot(
            "pareto",
            figures.pareto(found.points, unit=unit, moved=what),
            f"Step time against {what} moved. {answer}",
            "Each point is the best plan found under a budget of moves; the dotted line is what no "
            "plan under that budget beats.",
            Table(
                caption="Plans by budget of moves",
                heads=("budget", "copies", *(() if what == "copies" else ("GB",)), "step time",
                       "bound", "share of the gain"),
                rows=rows,
            ),
        )  # fmt: skip
    return Section(anchor="moved", title="What moves?", answer=escaped(answer), body=body)


def _changes(page: Page, found: Study) -> Section:
    told = found.answers[1:]
    parts = []
    slot = next((each for each in told if each.question.startswith("one more slot")), None)
    if slot is not None and slot.change is not None and slot.at_best is not None:
        parts.append(
            f"One more slot on every rank changes the step time by {slot.change:+.2%}, and by "
            f"{slot.at_best:+.2%} at best."
        )
    if found.own is None:
        parts.append(
            "These loads are one window: what less drift would buy needs several (record more "
            "windows)." if found.problem.windows == 1 else
            "Plans for single windows were not found."
        )  # fmt: skip
    else:
        ours = found.ours.objective
        change = found.own / ours - 1 if ours > 0 else 0.0
        parts.append(
            f"Without drift between the {found.problem.windows:,} windows, a plan for each of them "
            f"would change it by {change:+.2%}, moves not counted; part of that is noise in the "
            "counts."
        )
    body = ""
    if told:
        body = page.plot(
            "changes",
            figures.changes(told),
            "Bars of what each change would do to the step time: " + " ".join(parts),
            "Bars: the plan found after the change. Strokes: no plan does better, proven. Left of "
            "0 is faster.",
            Table(
                caption="What changes would buy",
                heads=("change", "step time", "at best", "note"),
                rows=[(a.question, _signed(a.change), _signed(a.at_best), a.note) for a in told],
            ),
        )
    return Section(anchor="changes", title="What would one more slot, or less drift, buy?",
                   answer=escaped(" ".join(parts)), body=body)  # fmt: skip


def _search(page: Page, found: Study) -> Section:
    title = "How was it found, and what proves it?"
    result, unit = found.result, found.problem.cluster.time_unit
    sources = ", ".join(f"{name} ({n})" for name, n in result.bound.sources.items())
    answer = (
        f"Our plan is {ENDED[result.status]}: after {result.seconds:.2f} s and {result.work:,} "
        f"search steps it is within {percent(result.gap)} of the bound. Arguments that prove "
        f"the bound, with the layers and windows that they decide: {sources}."
    )
    if len(found.progress) < 2:
        return Section(anchor="search", title=title, answer=escaped(answer), body="")
    every = max(1, len(found.progress) // 40)
    body = page.plot(
        "search",
        figures.convergence(found.progress, unit=unit),
        f"Best plan and bound over the seconds of the search. {answer}",
        "Above: the best plan so far and the bound. Below: the gap between them.",
        Table(
            caption="The search",
            heads=("seconds", f"best plan ({unit})", f"bound ({unit})", "gap"),
            rows=[
                (f"{p.seconds:.3f}", f"{p.objective:.8g}", f"{p.lower_bound:.8g}", f"{p.gap:.2e}")
                for p in [*found.progress[:-1:every], found.progress[-1]]
            ],
        ),
    )
    return Section(anchor="search", title=title,
                   answer=escaped(answer), body=body)  # fmt: skip


def _above(value: float, other: float) -> float:
    return value / other - 1 if other > 0 else 0.0


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.3%}"
