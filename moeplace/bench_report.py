"""The report on a table of runs: how good, how near, how fast methods are, for each set."""

from pathlib import Path
from typing import Any

import numpy as np

from moeplace import figures, figures_bench
from moeplace._check import FloatArray
from moeplace._files import PathLike
from moeplace.bench_run import GOAL, Row, read_trace
from moeplace.bench_stats import performance_profile, solved_within
from moeplace.bench_summary import (
    against,
    base_of,
    command,
    goal_times,
    instances_of,
    not_run,
    values,
)
from moeplace.bench_table import read_runs
from moeplace.compare import percent, printable
from moeplace.errors import FormatError
from moeplace.report_page import Page, Section, Table, escaped, table

#: Points in time at which gaps are drawn.
POINTS = 60


def is_runs(path: PathLike) -> bool:
    """Whether a folder holds a table of runs."""
    return (Path(path) / "runs.csv").exists() and (Path(path) / "settings.json").exists()


def report_runs(folder: PathLike) -> str:
    """The report on a folder that `moeplace bench --out` made, as HTML.

    Raises
    ------
    FormatError
        If it is none, or has no rows.
    MissingExtraError
        If plotly is not installed.
    """
    figures.plotly()
    place = Path(folder)
    rows, about = read_runs(place)
    if not rows:
        raise FormatError(f"{folder}: the table has no rows yet. Let moeplace bench go on.")
    settings = about["settings"]
    page = Page(f"Benchmark: {printable(place.resolve().name)}")
    for chosen in settings["sets"]:
        part = [row for row in rows if row["set"] == chosen]
        if part:
            page.sections.append(_set(page, part, chosen, settings))
    page.sections.append(
        Section(anchor="not-run", title="What was not run?", answer=escaped(not_run(settings)),
                body="")
    )  # fmt: skip
    facts = [("command", command(settings)), ("runs", f"{len(rows):,}")]
    facts += [(key.replace("_", " "), printable(str(value)))
              for key, value in about["environment"].items()]  # fmt: skip
    head = table(Table(caption="What ran, and where", heads=("", ""), rows=facts), words=True)
    return page.html(head, "")


def _set(page: Page, rows: list[Row], chosen: str, settings: dict[str, Any]) -> Section:
    names, base = instances_of(rows), base_of(settings)
    methods = [m for m in settings["methods"] if any(row["method"] == m for row in rows)]
    methods.sort(key=lambda method: method == base)  # the last one is drawn as ours
    ratios = {m: _of(values(rows, m, "ratio"), names, np.nan) for m in methods}
    gaps = {m: _of(values(rows, m, "gap"), names, np.inf) for m in methods}
    times = np.array([goal_times(rows, m) for m in methods])
    reached = np.isfinite(times)
    factors, shares = performance_profile(times, reached)
    seconds = np.geomspace(*_span(rows), POINTS)
    over_time = {m: _gaps_at(rows, m, names, seconds) for m in methods}
    body = f"<h3>Ratio by method, set {escaped(chosen)}</h3>" + page.plot(
        f"ratio-{chosen}",
        figures_bench.ratio_by_method(ratios, names),
        f"Imbalance ratio less 1 of each instance of set {chosen}, by method, in a log scale",
        "A point is an instance, mean over seeds; boxes are quartiles. 1 is perfect and often "
        f"impossible; values below {figures.LEAST_GAP:g} are drawn there.",
        _ratios(rows, methods, base, chosen),
    )
    body += f"<h3>Share of instances within a gap, set {escaped(chosen)}</h3>" + page.plot(
        f"gaps-{chosen}",
        figures_bench.gap_curve(gaps),
        f"Share of instances of set {chosen} within a gap to the proven bound, by method",
        "Further left and higher is better. Runs without a plan never arrive.",
        Table(
            caption=f"Gaps to the proven bound, set {chosen}",
            heads=("instance", *methods),
            rows=[(name, *(f"{gaps[m][i]:.2e}" for m in methods)) for i, name in enumerate(names)],
        ),
    )
    body += f"<h3>Gap over time, set {escaped(chosen)}</h3>" + page.plot(
        f"time-{chosen}",
        figures_bench.gap_over_time(seconds, over_time),
        f"Median gap over the seconds of a run in set {chosen}, by method, both in log scales",
        "Bands hold the middle half of instances. A search tells its gap at most ten times a "
        "second, so it had it earlier than drawn; over several windows it tells only the last.",
        Table(
            caption=f"Median gap at times, set {chosen}",
            heads=("seconds", *methods),
            rows=[
                (f"{seconds[i]:.3g}", *(_gap(np.median(over_time[m][:, i])) for m in methods))
                for i in range(0, POINTS, 6)
            ],
        ),
    )
    body += f"<h3>Performance profile, set {escaped(chosen)}</h3>" + page.plot(
        f"profile-{chosen}",
        figures_bench.profile(dict(zip(methods, shares, strict=True)), factors),
        f"Share of instances of set {chosen} that a method brings within {GOAL:g} of the bound in "
        "so many times the fastest method's time",
        f"Goal: within {GOAL:g} of the proven bound, every seed. Runs that were cut off before "
        "count as not reached at any factor.",
        Table(
            caption=f"Time to the goal, set {chosen}",
            heads=("method", "reached", "in 0.01 s", "in 0.1 s", "in 1 s"),
            rows=[
                (m, f"{mark.mean():.0%}", *(f"{share:.0%}" for share in within))
                for m, mark, within in zip(
                    methods, reached, solved_within(times, reached, [0.01, 0.1, 1.0]), strict=True
                )
            ],
        ),
    )
    return Section(anchor=f"set-{chosen}", title=f"How good is each method on set {chosen}?",
                   answer=escaped(_words(rows, methods, base)), body=body)  # fmt: skip


def _words(rows: list[Row], methods: list[str], base: str) -> str:
    """How the methods compare, in a sentence or two."""
    pairs = [(method, against(rows, method, base)) for method in methods]
    over = [f"{method} {found.estimate:.3f}" for method, found in pairs if found is not None]
    gaps = list(values(rows, base, "gap").values())
    said = f"{len(instances_of(rows))} instances. "
    if over:
        said += f"Step time over that of {base}, geometric mean: {', '.join(over)}. "
    if not gaps:
        return said + f"{base} has no plan."
    left, most = percent(float(np.median(gaps))), percent(max(gaps))
    return said + f"{base} is within {left} of the bound in the median, {most} at worst."


def _ratios(rows: list[Row], methods: list[str], base: str, chosen: str) -> Table:
    said = []
    for method in methods:
        ratio = np.array(list(values(rows, method, "ratio").values()))
        quartiles = np.quantile(ratio, (0.0, 0.5, 1.0)) if ratio.size else ()
        illegal = len({r["instance"] for r in rows
                       if r["method"] == method and r["legal"] == "false"})  # fmt: skip
        said.append((
            method, str(ratio.size), *([f"{each:.5f}" for each in quartiles] or [""] * 3),
            str(against(rows, method, base) or ""), str(illegal or ""),
        ))  # fmt: skip
    return Table(
        caption=f"Imbalance ratios, set {chosen}",
        heads=("method", "instances", "least", "median", "largest",
               f"step time over {base}'s, 95 % interval", "break a rule"),
        rows=said,
    )  # fmt: skip


def _of(found: dict[str, float], names: list[str], otherwise: float) -> FloatArray:
    return np.array([found.get(name, otherwise) for name in names])


def _span(rows: list[Row]) -> tuple[float, float]:
    """Ends of the axis of time: about the first gap that is known, and the last."""
    at = [seconds for row in rows for seconds, _ in read_trace(row["trace"])]
    low = max(min(at, default=1e-3), 1e-6)
    return low, max(max(at, default=1.0), low * 10)


def _gaps_at(rows: list[Row], method: str, names: list[str], at: FloatArray) -> FloatArray:
    """Gap of each instance's run at times [instances, points], the worst over its seeds."""
    found = np.full((len(names), at.size), -np.inf)
    place = {name: i for i, name in enumerate(names)}
    for row in rows:
        if row["method"] == method:
            steps = np.full(at.size, np.inf)
            for seconds, gap in read_trace(row["trace"]):
                steps[at >= seconds * (1 - 1e-9)] = gap
            mine = found[place[row["instance"]]]
            np.maximum(mine, steps, out=mine)
    return np.where(found < 0, np.inf, found)


def _gap(value: Any) -> str:
    return f"{value:.2e}" if np.isfinite(value) else "none yet"
