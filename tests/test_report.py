"""Figures hold the data they are given; the report is one sound page that needs nothing else."""

import base64
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeplace import figures
from moeplace.bench_run import COLUMNS
from moeplace.bench_table import as_csv
from moeplace.constraints import MaxMoves
from moeplace.errors import MissingExtraError, ProblemError
from moeplace.evaluate import evaluate
from moeplace.formats import write_plan
from moeplace.instances import generate, read_instance, write_instance
from moeplace.plan import Plan
from moeplace.policies import POLICIES
from moeplace.problem import Problem
from moeplace.report import report
from moeplace.result import Progress
from moeplace.solve import solve
from moeplace.study import OURS, Study, layer_cost, rank_cost, study
from tests.test_cli import Run, plain_terminal, run

__all__ = ["plain_terminal", "run"]  # fixtures

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def problem() -> Problem:
    problem = generate((6, 16, 24, 4), 3)
    return replace(problem, loads=problem.loads.select([0, 1, 2]), window_weight=None)


@pytest.fixture(scope="module")
def found(problem: Problem) -> Study:
    return study(problem, time_limit=4.0, expert_bytes=1_000_000)


class Parsed(HTMLParser):
    """Every start tag with its attributes, and the texts of scripts by id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, str] = {}
        self._inside: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.tags.append((tag, given))
        self._inside = given.get("id") if tag in ("script", "h2", "h1") else None

    def handle_data(self, data: str) -> None:
        if self._inside is not None:
            self.texts[self._inside] = self.texts.get(self._inside, "") + data

    def handle_endtag(self, tag: str) -> None:
        self._inside = None

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


# ------------------------------------------------------------------------------- figures


def test_rank_times_share_one_colour_scale() -> None:
    one, two = np.array([[1.0, 2.0], [0.5, 1.0]]), np.array([[1.0, 1.25], [1.0, 3.0]])
    figure = figures.rank_times({"a<b": one, "b": two})
    assert [np.array(trace.z).tolist() for trace in figure.data] == [one.tolist(), two.tolist()]
    assert {trace.coloraxis for trace in figure.data} == {"coloraxis"}
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0.5, 3.0)
    assert figure.layout.xaxis.domain[1] < figure.layout.xaxis2.domain[0]
    assert figure.layout.annotations[0].text == "a&lt;b"


def test_constant_times_still_have_a_scale() -> None:
    low, high = figures.span({"a": np.ones((2, 2))})
    assert low == 1.0 < high


def test_layer_bounds_draw_gaps_and_their_least() -> None:
    figure = figures.layer_bounds({"p": np.array([1.0, 1.5])}, np.array([1.0, 1.0]))
    bars, line, gaps = figure.data
    assert list(bars.y) == [1.0, 1.0]
    assert list(line.y) == [1.0, 1.5]
    assert list(gaps.y) == [figures.LEAST_GAP, 0.5]
    assert figure.layout.yaxis2.type == "log"


def test_load_curve_is_lorenz() -> None:
    figure = figures.load_curve(np.array([[1.0, 3.0], [0.0, 0.0], [2.0, 2.0]]))
    curves = {trace.name: list(trace.y) for trace in figure.data if trace.name}
    assert curves["least even layer"] == [0.0, 0.75, 1.0]
    assert curves["most even layer"] == [0.0, 0.5, 1.0]
    assert curves["median"] == [0.0, 0.625, 1.0]
    assert not any(np.isnan(trace.y).any() for trace in figure.data)


def test_load_curve_of_no_tokens() -> None:
    assert len(figures.load_curve(np.zeros((2, 3))).data) == 1


def test_replicas_are_sorted_by_load_of_each_layer() -> None:
    count = np.array([[1, 3, 1], [2, 1, 1]])
    tokens = np.array([[1.0, 9.0, 2.0], [5.0, 1.0, 2.0]])
    (line,) = figures.replicas({"p": count}, tokens).data
    assert list(line.y) == [2.5, 1.0, 1.0]


def test_moves_and_convergence() -> None:
    (line,) = figures.moves({"p": np.array([3, 0])}).data
    assert list(line.y) == [3, 0]
    steps = [
        Progress(seconds=s, objective=o, lower_bound=1.0, layers_done=0, layers=1)
        for s, o in ((0.1, 2.0), (0.2, 1.5))
    ]
    plans, bounds, gaps = figures.convergence(steps).data
    assert list(plans.y) == [2.0, 1.5]
    assert list(bounds.y) == [1.0, 1.0]
    assert list(gaps.y) == [1.0, 0.5]


def test_our_plan_always_has_one_style() -> None:
    for count in (1, 2, 6, 9):
        styles = figures.styles(count)
        assert len(styles) == count
        assert styles[-1] == figures.STYLES[-1]
        assert styles[-1] not in styles[:-1]
    assert figures.styles(0) == []


# --------------------------------------------------------------------------------- study


def test_study_prices_as_evaluate_does(problem: Problem, found: Study) -> None:
    assert list(found.plans) == ["contiguous", "eplb", "eplb + lpt", OURS]
    contiguous = evaluate(problem, POLICIES["contiguous"](problem))
    assert found.first.objective == contiguous.objective
    assert found.ours.objective >= found.result.lower_bound
    summed = float((layer_cost(found.ours) * problem.layer_weight).sum())
    assert summed == pytest.approx(found.ours.objective, rel=1e-12)
    assert (rank_cost(found.ours).max(axis=1) <= layer_cost(found.ours) * (1 + 1e-12)).all()
    assert (layer_cost(found.ours) >= found.floor() * (1 - 1e-9)).all()
    received = found.received()
    assert list(received) == ["eplb", "eplb + lpt", OURS]
    assert received[OURS].sum() == found.ours.plan.moves_from(contiguous.plan).sum()
    assert found.own is not None
    assert found.own <= found.ours.objective * (1 + 1e-3)
    assert found.points[0].objective >= found.points[-1].objective


def test_study_with_a_budget_starts_from_the_current_plan(problem: Problem) -> None:
    current = POLICIES["contiguous"](problem)
    limited = replace(problem.aggregate(), constraints=[MaxMoves(current, per_layer=1)])
    told = study(limited, time_limit=2.0)
    assert next(iter(told.plans)) == "current plan"
    assert (told.received()[OURS] <= 1).all()
    assert told.own is None
    assert told.progress[-1].objective == told.ours.objective


def test_steps_of_another_problem_are_not_shown(found: Study) -> None:
    prices = [each.objective for each in found.progress]
    assert prices == sorted(prices, reverse=True)
    assert prices[-1] == found.ours.objective


def test_study_refuses_what_it_cannot_do(problem: Problem) -> None:
    for seconds in (0.0, float("inf"), float("nan")):
        with pytest.raises(ProblemError, match="time limit"):
            study(problem, time_limit=seconds)


# ---------------------------------------------------------------------------------- page


def test_report_answers_in_order_and_needs_nothing_else(found: Study) -> None:
    page = Parsed(report(found))
    anchors = [each["id"] for each in page.of("h2")]
    assert anchors == ["unequal", "costs", "slowest", "moved", "changes", "search"]
    links = [each["href"] for each in page.of("a")]
    assert links == ["#main", *(f"#{anchor}" for anchor in anchors)]
    assert not [each for each in page.of("script") if "src" in each]
    assert [each["href"] for each in page.of("link")] == ["data:,"]
    assert not page.of("img")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_each_figure_has_data_words_and_a_table(found: Study) -> None:
    text = report(found)
    page = Parsed(text)
    plots = [each for each in page.of("div") if each.get("class") == "plot"]
    assert len(plots) >= 8
    for plot in plots:
        assert plot["role"] == "img"
        assert len(plot["aria-label"]) > 10
        assert re.fullmatch(r"height:\d+px", plot["style"])
        drawn = json.loads(page.texts[f"data-{plot['data-figure']}"])
        assert drawn["data"]
        for axis in plot["data-layers"].split():
            assert axis in drawn["layout"]
    for figure in re.findall(r"</figure>(<\w+)", text):
        assert figure == "<details"
    rows = [each["data-layer"] for each in page.of("tr") if "data-layer" in each]
    assert rows.count("5") == rows.count("0") > 0
    assert all(f'value="ranks{i}"' in text for i in range(len(found.plans)))


def test_names_cannot_become_markup(problem: Problem) -> None:
    evil = "</script><script>alert(1)</script>\x00&\u2028"
    named = replace(problem.aggregate(), name=evil, origin=evil)
    plan = POLICIES["contiguous"](named)
    text = report(study(named, {evil: plan}, time_limit=1.0))
    assert "alert(1)</script>" not in text
    page = Parsed(text)
    assert len(page.of("script")) == 2 + len(page.texts) - 6  # plotly, ours, data; 6 are headings


def table_of_runs(folder: Path) -> Path:
    """A table of two instances, three methods and two seeds, one of which was cut off."""
    row = dict.fromkeys(COLUMNS, "") | {"set": "tiny", "status": "feasible", "legal": "true"}
    rows = []
    for name, hard in (("tiny-100", 1.0), ("tiny-101", 2.0)):
        for method, seed, gap, goal in (
            ("eplb", "100", 0.25, ""), ("vibe", "100", 1e-4, "0.002"),
            ("auto", "100", 1e-5, "0.001"), ("auto", "101", 1e-5, "0.003" if hard == 1 else ""),
        ):  # fmt: skip
            rows.append(row | {
                "instance": name, "method": method, "seed": seed, "lower_bound": str(hard),
                "objective": str(hard * (1 + gap)), "gap": str(gap), "ratio": str(1 + gap),
                "wall_seconds": "0.01", "cpu_seconds": "0.01", "goal_seconds": goal,
                "moves": "3", "trace": f"0.001:0.5 0.01:{gap}",
            })  # fmt: skip
    folder.mkdir()
    settings = {"sets": ["tiny"], "methods": ["auto", "eplb", "vibe"], "seeds": [100, 101],
                "time_limit": 0.01, "work_limit": None, "jobs": 1}  # fmt: skip
    about = {"settings": settings, "environment": {"processor": "<b>", "commit": None}}
    (folder / "runs.csv").write_text(as_csv(rows))
    (folder / "settings.json").write_text(json.dumps(about))
    return folder


def test_a_table_of_runs_is_reported(run: Run, tmp_path: Path) -> None:
    folder, out = table_of_runs(tmp_path / "t"), tmp_path / "r.html"
    answer = run("report", str(folder), "--out", str(out))
    assert answer.code == 0, answer.err
    text = out.read_text(encoding="utf-8")
    page = Parsed(text)
    assert [each["id"] for each in page.of("h2")] == ["set-tiny", "not-run"]
    assert "<b>" not in text.replace("</b>", "").partition("<script>")[0]
    data = {name: json.loads(page.texts[f"data-{name}-tiny"])["data"]
            for name in ("ratio", "gaps", "time", "profile")}  # fmt: skip
    lines = {name: {line["name"]: line for line in drawn if "name" in line}
             for name, drawn in data.items()}  # fmt: skip
    assert list(lines["ratio"]) == ["eplb", "vibe", "auto"], "ours comes last"
    shares = {name: list(figures_of(line["y"])) for name, line in lines["profile"].items()}
    assert shares["eplb"][-1] == 0.0
    assert shares["vibe"][-1] == 1.0
    assert shares["auto"][-1] == 0.5, "a seed that was cut off is not reached"
    assert "1.2500" in text
    (folder / "runs.csv").write_text(as_csv([]))
    before = out.read_bytes()
    assert run("report", str(folder), "--out", str(out)).code == 2
    (folder / "settings.json").write_text("{}")
    assert run("report", str(folder), "--out", str(out)).code == 2
    assert out.read_bytes() == before


def figures_of(stored: Any) -> np.ndarray:
    """Numbers of a figure's data: a list, or bytes in base 64."""
    if isinstance(stored, dict):
        return np.frombuffer(base64.b64decode(stored["bdata"]), dtype=stored["dtype"])
    return np.array(stored)


def large() -> Study:
    """94 layers x 256 experts x 64 ranks, as a study without its long searches."""
    problem = generate((94, 256, 320, 64), 100).aggregate()
    result = solve(problem, time_limit=0.1)
    assert result.evaluation is not None
    plans = {name: evaluate(problem, POLICIES[name](problem)) for name in ("contiguous", "eplb")}
    more = {f"copy {i}": result.evaluation for i in range(3)}
    step = Progress(seconds=1.0, objective=2.0, lower_bound=1.0, layers_done=0, layers=94)
    return Study(
        problem=problem, plans={**plans, **more, OURS: result.evaluation}, result=result,
        progress=[step] * 300, points=[], answers=(), own=None, expert_bytes=None, notes=[],
    )  # fmt: skip


def test_a_large_report_stays_below_six_megabytes() -> None:
    assert len(report(large()).encode()) < 6_000_000


def test_weighted_latency_and_worst_case_problems_are_reported() -> None:
    for name in ("passes-seconds", "two-windows-worst", "zero-slot-rank", "flashlb-weighted",
                 "one-rank", "zero-loads", "pins-and-forbids"):  # fmt: skip
        problem = read_instance(ROOT / f"instances/small/{name}.json")
        told = study(problem, time_limit=1.0)
        page = Parsed(report(told))
        assert len(page.of("h2")) == 6
        assert "NaN" not in "".join(
            text for name, text in page.texts.items() if name.startswith("data-")
        )


# ------------------------------------------------------------------------------- command


def test_command_writes_and_tells(run: Run, tmp_path: Path, problem: Problem) -> None:
    instance, plan, out = (tmp_path / name for name in ("i.json", "p.json", "r.html"))
    write_instance(problem, instance)
    write_plan(POLICIES["contiguous"](problem), plan)
    given = ("report", str(instance), str(plan), str(plan), "--out", str(out), "--time-limit", "1")
    answer = run(*given, "--json")
    assert answer.code == 0, answer.err
    told: dict[str, Any] = json.loads(answer.out)
    assert list(told["plans"]) == ["p", "p'", OURS]
    assert told["bytes"] == out.stat().st_size
    assert told["plans"][OURS] <= told["plans"]["p"]
    assert "r.html: " in run(*given).out
    assert run(*given, "--quiet").out == ""


def test_command_refuses_bad_input_and_writes_nothing(
    run: Run, tmp_path: Path, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    instance, plan = tmp_path / "i.json", tmp_path / "p.json"
    write_instance(problem, instance)
    before = instance.read_bytes()
    for arguments in (
        (str(instance), "--out", str(instance)),
        (str(tmp_path / "none.json"), "--out", str(tmp_path / "r.html")),
        (str(instance), "--out", str(tmp_path / "no/r.html")),
        (str(instance), "--time-limit", "0", "--out", str(tmp_path / "r.html")),
        (str(instance), "--expert-bytes", "0", "--out", str(tmp_path / "r.html")),
    ):
        answer = run("report", *arguments)
        assert answer.code == 2, arguments
        assert answer.err.count("error:") == 1
    other = Plan(slots=[[0, 1]], rank_slots=[1, 1], experts=2)  # type: ignore[arg-type]
    write_plan(other, plan)
    answer = run("report", str(instance), str(plan), "--out", str(tmp_path / "r.html"))
    assert answer.code == 2
    assert "made for another model or cluster" in answer.err
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(MissingExtraError, match=r"moeplace\[report\]"):
        figures.plotly()
    assert not (tmp_path / "r.html").exists()
    assert instance.read_bytes() == before


def test_an_observe_folder_is_reported(run: Run, tmp_path: Path, problem: Problem) -> None:
    from moeplace.integrations.observe import Decision, Recorder

    folder, out = tmp_path / "observed", tmp_path / "r.html"
    before, after = evaluate(problem, POLICIES["contiguous"](problem)), solve(problem, gap=0.1)
    for verdict in ("keep", "</script><b>"):
        Recorder(folder, 10**9).write(
            Decision(
                weight=problem.mean_load[0], old=before.plan.slots, proposed=after.plan.slots,
                before=layer_cost(before), after=problem.mean(after.layers.objective),
                bound=problem.mean(after.bound.per_layer),
                copies=after.plan.moves_from(before.plan).sum(axis=1),
                speeds=problem.cluster.speeds, about={"verdict": verdict, "reason": "a & b"},
            )
        )  # fmt: skip
    answer = run("report", str(folder), "--out", str(out))
    assert answer.code == 0, answer.err
    text = out.read_text(encoding="utf-8")
    page = Parsed(text)
    assert [each["id"] for each in page.of("h2")] == ["decisions", "last"]
    saved = json.loads(page.texts["data-saving"])["data"][0]
    assert saved["mode"] == "lines+markers"
    assert "</script><b>" not in text
    assert "a &amp; b" in text
    assert run("report", str(tmp_path), "--out", str(out)).code == 2
