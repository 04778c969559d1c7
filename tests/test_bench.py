"""Suites on tiny cases: their tables, their seeds, and the command that prints them."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeplace import (
    bench_case,
    bench_dispatch,
    bench_formulations,
    bench_hard,
    bench_latency,
    bench_live,
    bench_lns,
    bench_methods,
    bench_scale,
    bench_search,
    bench_solvers,
    bench_symmetry,
    cli,
    instances,
)
from moeplace.bench import SUITES, markdown
from moeplace.bench_case import REPORT_SEEDS, TUNING_SEEDS, Case, Row
from moeplace.errors import FormatError, ProblemError
from moeplace.evaluate import evaluate
from moeplace.problem import Problem
from moeplace.result import Result
from moeplace.solve import solve

SOURCES = Path(__file__).parents[1] / "instances" / "sources"
TINY = (2, 32, 40, 8)


class Calls:
    """What a suite asks for."""

    def __init__(self) -> None:
        self.seeds: set[int] = set()
        self.limits: list[float] = []


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Make every case tiny and every time limit short."""
    heard = Calls()

    def generate(shape: Any, seed: int, *, speeds: Any = "het", **options: Any) -> Problem:
        heard.seeds.add(seed)
        if not isinstance(speeds, str | float):
            speeds = speeds[: TINY[-1]]
        return instances.generate(TINY, seed, speeds=speeds, **options)

    def quick(*arguments: Any, time_limit: float | None = None, **options: Any) -> Result:
        if time_limit is None:
            return solve(*arguments, **{"work_limit": 5000} | options)
        heard.limits.append(time_limit)
        return solve(*arguments, time_limit=time_limit / 100, **options)

    def search_gap(shape: str, seed: int, limit: float, options: dict[str, Any]) -> float:
        return gap_of(shape, seed, limit / 100, options)

    gap_of = bench_search._search_gap
    for module in (bench_case, bench_dispatch, bench_latency, bench_methods, bench_search):
        monkeypatch.setattr(module, "generate", generate)
        monkeypatch.setattr(module, "solve", quick)
        if module is not bench_latency:
            monkeypatch.setattr(module, "REPORT_SEEDS", REPORT_SEEDS[:2])
    monkeypatch.setattr(bench_search, "_search_gap", search_gap)
    monkeypatch.setattr(bench_search, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(bench_hard, "SHAPE", (1, 64, 72, 32))
    monkeypatch.setattr(bench_hard, "SECONDS", 0.3)
    monkeypatch.setattr(bench_hard, "FIRST", 0.1)
    monkeypatch.setattr(bench_formulations, "SHAPES", ((4, 5, 2),))
    for name, shape in (("LAYERS", (1, *TINY[1:])), ("MODELS", TINY)):
        aims = [replace(aim, shape=shape, seconds=0.05) for aim in getattr(bench_solvers, name)]
        monkeypatch.setattr(bench_solvers, name, aims)
    monkeypatch.setattr(bench_solvers, "SECONDS", 0.3)
    monkeypatch.setattr(bench_solvers, "REPORT_SEEDS", REPORT_SEEDS[:2])
    monkeypatch.setattr(bench_lns, "SHAPES", ((32, 32, 8), (32, 40, 8)))
    monkeypatch.setattr(bench_symmetry, "CASES", (((4, 4, 2), None), ((4, 5, 2), 6)))
    for module in (bench_formulations, bench_symmetry, bench_lns):
        monkeypatch.setattr(module, "SEEDS", REPORT_SEEDS[:2])
        monkeypatch.setattr(module, "SECONDS", 1.0)
    monkeypatch.setattr(bench_case.run, "__defaults__", (REPORT_SEEDS[:2], "auto"))
    return heard


class Here:
    """In place of a pool of processes: the same function, in this one, on a tiny shape."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.outcome: Any = None

    def __enter__(self) -> "Here":
        return self

    def __exit__(self, *_: object) -> None:
        return

    def submit(self, function: Any, shape: tuple[int, ...]) -> "Here":
        assert len(shape) == 4
        self.outcome = function(TINY)
        return self

    def result(self) -> Any:
        return self.outcome


@pytest.fixture
def shipped(tmp_path: Path) -> Path:
    """A folder like the shipped one, with two small instances and a fleet."""
    real, sources = tmp_path / "real", tmp_path / "sources"
    real.mkdir()
    sources.mkdir()
    for name in ("dsv2lite-windows_8x9_equal", "other"):
        one = instances.generate(TINY, 0)
        instances.write_instance(one, real / f"{name}.json")
    times = {"relative_time": {"a fleet": np.linspace(0.95, 1.05, 40).tolist()}}
    (sources / "gpu_relative_time.json").write_text(json.dumps(times))
    for name in ("moe_kernel_latency.csv", "moe_kernel_latency_grid.csv"):
        shutil.copy(SOURCES / name, sources)
    return tmp_path


def some_rows(name: str, folder: Path) -> list[Row]:
    """The first rows of a suite, as many as tell its kinds of cases apart."""
    number = {"targets": 40, "methods": 5, "spread": 7, "held-out": 4, "solvers": 20}.get(name, 2)
    return list(islice(SUITES[name](folder), number))


#: Suites of live systems: tests/test_bench_live.py.
LIVE = {"drift", "drift-real", "moves", "robust"}


@pytest.mark.parametrize("name", [name for name in SUITES if name not in LIVE])
def test_every_suite_makes_a_table(name: str, calls: Calls, shipped: Path) -> None:
    rows = some_rows(name, shipped)
    text = markdown(name, rows)
    lines = text.splitlines()
    assert lines[0] == f"# {name}"
    assert lines[2], "it says what it is"
    assert f"`moeplace bench {name}`" in text
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(rows)
    assert len({line.count("|") for line in table}) == 1, "rows are as wide as the head"
    assert "nan" not in text
    assert text.endswith("|\n")
    assert calls.seeds.isdisjoint(TUNING_SEEDS), "reporting on a seed that was tuned on"


@pytest.mark.parametrize("name", ["targets", "few-spares", "node-groups", "spread"])
def test_a_suite_tells_ratios_of_at_least_one(name: str, calls: Calls, shipped: Path) -> None:
    ratios = ("ratio", "hierarchical eplb", "auto", "auto ratio", "bound / fluid")
    for row in some_rows(name, shipped)[:3]:
        told = [float(row[key]) for key in ratios if key in row]
        assert told
        assert min(told) >= 1


def test_each_target_has_a_case(calls: Calls, shipped: Path) -> None:
    rows = list(SUITES["targets"](shipped))
    assert all(row["target"] for row in rows)
    text = " ".join(row["case"] for row in rows)
    for wanted in ("A even, equal", "B even", "C even", "D even", "weighted", "1024", "drifted"):
        assert wanted in text
    assert {0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0} == set(calls.limits)


def test_seeds_that_are_reported_were_not_tuned_on() -> None:
    assert len(set(REPORT_SEEDS)) == 5
    for seeds in (REPORT_SEEDS, bench_latency.SEEDS, bench_live.SEEDS,
                  [bench_scale._SEED]):  # fmt: skip
        assert set(seeds).isdisjoint(TUNING_SEEDS)
    assert "seeds 0 to 4" in (bench_case.__doc__ or "")


def test_a_row_is_the_median_of_its_seeds_with_the_worst_beside(calls: Calls) -> None:
    problems = {seed: instances.generate(TINY, seed).aggregate() for seed in (1, 2, 3)}
    given = {1: 1.25, 2: 1.5, 3: 4.0}
    case = Case("made up", problems.__getitem__, 1.0, "goal", score=lambda seed, _: given[seed])
    row = bench_case.run(case, seeds=[1, 2, 3])
    assert row["case"] == "made up"
    assert (row["limit"], row["target"]) == ("1 s", "goal")
    assert (row["ratio"], row["of 5, worst"]) == ("1.500000", "4.000000")
    assert row["moves"] == "", "there is no budget of moves"


def test_a_row_of_a_policy_tells_its_price(calls: Calls) -> None:
    one = instances.generate(TINY, 7).aggregate()
    row = bench_case.run(Case("one", lambda _: one, 1.0), seeds=[7], method="contiguous")
    price = evaluate(one, solve(one, "contiguous").plan).imbalance
    assert row["ratio"] == f"{price:.6f}"


def test_drift_is_planned_with_the_moves_it_says(calls: Calls) -> None:
    row = bench_case.run(Case("drifted", bench_case._drifted(3), 1.0), seeds=[100])
    assert 0 <= float(row["moves"]) <= 3  # none where ten milliseconds do not do


def test_planning_and_scoring_windows_are_apart(shipped: Path) -> None:
    path = shipped / "real" / "other.json"
    whole = instances.read_instance(path)
    seen, unseen = (bench_case.every_other(whole, part) for part in (0, 1))
    assert seen.windows + unseen.windows == whole.windows
    assert (seen.loads.tokens == whole.loads.tokens[0::2]).all()
    assert (unseen.loads.tokens == whole.loads.tokens[1::2]).all()


def test_few_spares_have_as_many_as_they_say(calls: Calls) -> None:
    for spares in (16, 4, 0):
        assert bench_search.spared("A", 100, spares).cluster.total_slots == TINY[1] + spares


def test_a_target_is_met_by_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    aim = bench_solvers.Aim(shape=TINY, seconds=0.05, gap=1e9)
    problems = [aim.problem(seed) for seed in (100, 101, 102)]
    gaps = iter([1e-3, 5e-2, 1e-5, 1e-3, 5e-2, 1e-5])
    monkeypatch.setattr(bench_solvers, "_gap", lambda _: next(gaps))
    row = bench_solvers._ours(replace(aim, gap=2e-3), problems)
    assert (row["gap of auto"], row["worst seed"]) == ("1.0e-03", "5.0e-02")
    assert (row["target"], row["met"]) == ("2e-03", "yes")
    assert bench_solvers._ours(replace(aim, gap=1e-4), problems)["met"] == "no"
    assert row["case"] == "2 x 32 / 40 / 8 even"


def test_cp_sat_tells_when_it_first_came_near(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_solvers, "SECONDS", 60.0)  # proven in half a second
    aim = bench_solvers.Aim(shape=(1, 12, 12, 3), seconds=0.05, gap=None)
    found = bench_solvers._cold(aim.problem(100))
    assert 0 < found.when[0] <= found.when[1]
    assert found.when[0] < float("inf")
    assert 0 <= found.gap < float("inf")
    assert 1 <= found.bound < 1.01


# Tables


def test_a_table_has_a_column_for_each_key_of_any_row() -> None:
    text = markdown("targets", [{"a": 1, "b": 2}, {"b": 3, "c": 4}])
    assert text.splitlines()[-4:] == [
        "| a | b | c |",
        "|---|---|---|",
        "| 1 | 2 |  |",
        "|  | 3 | 4 |",
    ]


def test_an_unknown_suite_is_refused() -> None:
    with pytest.raises(ProblemError, match=r"Suite must be one of targets, .*, got 'magic'\."):
        markdown("magic", [])


# The command


def two_rows(_: Path) -> Iterator[Row]:
    """Two rows that someone made up."""
    yield {"case": "é", "ratio": "1.5"}
    yield {"case": "b", "ratio": "2.0"}


def broken(_: Path) -> Iterator[Row]:
    """A suite that fails half way."""
    yield {"case": "a"}
    raise ProblemError("no such case")


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SUITES, "targets", two_rows)
    monkeypatch.setitem(SUITES, "real", broken)


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as leaving:
        cli.main(["bench", *map(str, arguments)])
    assert isinstance(leaving.value.code, int)
    return leaving.value.code


@pytest.mark.usefixtures("made_up")
def test_the_command_prints_and_writes_the_same_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "table.md"
    out.write_text("old")
    assert call("targets", "--out", out) == 0
    told = capsys.readouterr()
    assert out.read_text(encoding="utf-8") == told.out == markdown("targets", list(two_rows(out)))
    assert told.err.splitlines() == ["case é  ratio 1.5", "case b  ratio 2.0"]
    assert list(tmp_path.iterdir()) == [out], "nothing is left beside it"


@pytest.mark.usefixtures("made_up")
def test_rows_are_also_told_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("targets", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["suite"] == "targets"
    assert told["rows"] == list(two_rows(Path()))


@pytest.mark.usefixtures("made_up")
def test_a_suite_that_fails_leaves_the_old_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "table.md"
    out.write_text("old")
    assert call("real", "--out", out) != 0
    assert "no such case" in capsys.readouterr().err
    assert out.read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.usefixtures("made_up")
def test_what_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("targets", "--out", tmp_path / "absent" / "table.md") == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "ratio" not in told.err


def test_the_command_refuses_an_unknown_suite_and_lists_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call("magic") == 2
    told = capsys.readouterr().err
    assert all(name in told for name in SUITES)


def test_growth_is_fitted() -> None:
    from moeplace.bench_scale import GROWTH, LARGE, fitted, measured

    assert fitted([1, 2, 4], [3, 12, 48]) == pytest.approx((2, 1))
    assert fitted([1, 2, 4], [3, 24, 48])[1] > 1.2
    assert (64, 2048, 4096, 1024) in LARGE
    assert len(GROWTH) == 5
    found = measured((2, 32, 48, 8), "even")
    assert 0 <= found["gap"] <= found["first gap"] + 1e-12
    assert found["ratio"] >= 1
    assert found["peak"] >= found["before"] > 10


def test_growth_is_drawn_from_the_table_of_docs() -> None:
    pytest.importorskip("plotly", reason="plotly is not installed")
    from moeplace.figures_scale import growth, read_growth

    text = (Path(__file__).resolve().parents[1] / "docs" / "results" / "scale.md").read_text(
        encoding="utf-8"
    )
    panels = read_growth(text)
    assert list(panels) == ["first plan, CPU", "to gap 0.001, CPU"]
    sizes, seconds, reached = panels["to gap 0.001, CPU"]["slots"]
    assert sizes == [512, 1024, 2048, 4096]
    assert not reached[-1]
    figure = growth(panels)
    drawn = [line for line in figure.data if line.name == "slots"]
    assert list(drawn[1].y) == seconds
    assert drawn[1].marker.symbol[-1].endswith("-open")
    assert list(drawn[1].x) == [1, 2, 4, 8]
    told = [note.text for note in figure.layout.annotations]
    assert len(told) == 10
    assert all(
        "^" in name or "not straight" in name or name in panels["first plan, CPU"] for name in told
    )
    with pytest.raises(FormatError, match="moeplace bench scale"):
        read_growth("| what |\n|---|\n| growth in layers |\n")
