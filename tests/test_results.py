"""The committed table of runs is what its rows say, its rows are found again, the README quotes it."""

from pathlib import Path

import numpy as np
import pytest

from moeplace.bench_case import TUNING_SEEDS
from moeplace.bench_run import COLUMNS, TABLE_SEEDS, TIMES, Run, measure, names
from moeplace.bench_summary import command, overview, summary
from moeplace.bench_table import Settings, read_runs

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "docs/results/runs"
README = (ROOT / "README.md").read_text(encoding="utf-8")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def test_the_table_holds_every_run_of_its_settings() -> None:
    rows, about = read_runs(RUNS)
    given = about["settings"]
    settings = Settings(**{key: tuple(value) if isinstance(value, list) else value
                           for key, value in given.items()})  # fmt: skip
    wanted = [
        (chosen, name, method, str(settings.seeds[0]))
        for chosen in settings.sets
        for name in names(chosen, ROOT / "instances")
        for method in settings.methods
    ]
    assert [(r["set"], r["instance"], r["method"], r["seed"]) for r in rows] == wanted
    assert {"real", "A", "B", "C", "D"} <= set(settings.sets)
    assert not {int(row["seed"]) for row in rows} & set(TUNING_SEEDS)
    assert not set(TABLE_SEEDS) & set(TUNING_SEEDS)
    for row in rows:
        assert float(row["objective"]) >= float(row["lower_bound"]) * (1 - 1e-12)


def test_the_summary_is_what_the_rows_say() -> None:
    assert (RUNS / "summary.md").read_text(encoding="utf-8") == summary(*read_runs(RUNS))


@pytest.mark.parametrize("name", ["real/dsv2lite-tasks_8x9_equal", "B/B-100"])
def test_rows_are_found_again(name: str) -> None:
    rows, about = read_runs(RUNS)
    settings = Settings(**{key: tuple(value) if isinstance(value, list) else value
                           for key, value in about["settings"].items()})  # fmt: skip
    chosen, instance = name.split("/")
    for row in rows:
        if (row["set"], row["instance"]) == (chosen, instance):
            run = Run(chosen, instance, row["method"], int(row["seed"]))
            again = measure(run, settings, ROOT / "instances")
            for column in COLUMNS:
                if column in ("objective", "lower_bound", "gap", "ratio", "worst_layer"):
                    # Other processors may add up in another order.
                    want, found = float(row[column]), float(again[column])
                    assert found == pytest.approx(want, rel=1e-9, abs=1e-9), column
                elif column not in TIMES:
                    assert again[column] == row[column], column


def test_the_readme_quotes_the_table_and_its_command() -> None:
    rows, about = read_runs(RUNS)
    lines = README.splitlines()
    quoted = [line for line in overview(rows, about["settings"]) if line.startswith("|")]
    first = lines.index(quoted[0])
    assert lines[first : first + len(quoted)] == quoted
    words = " ".join(README.split())
    given = command(about["settings"])
    for option in ("--sets", "--work-limit"):
        value = given.split()[given.split().index(option) + 1]
        assert f"{option} {value}" in words
        assert f"{option} {value}" in (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    # one cell by hand
    prices = {
        method: np.array([float(r["objective"]) for r in rows
                          if (r["set"], r["method"]) == ("A", method)])
        for method in ("eplb", "auto")
    }  # fmt: skip
    ratio = np.exp(np.log(prices["eplb"] / prices["auto"]).mean())
    column = cells(quoted[0]).index("eplb / auto")
    (line,) = [line for line in quoted if line.startswith("| A: 30 ")]
    assert cells(line)[column].startswith(f"{ratio:.3f} [")


def test_the_readme_quotes_the_targets() -> None:
    table = (ROOT / "docs/results/targets.md").read_text(encoding="utf-8").splitlines()
    heads, *told = [cells(line) for line in table if line.startswith("|") and "---" not in line]
    known = [dict(zip(heads, row, strict=True)) for row in told]
    lines = README.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| case | limit |"))
    quoted = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        quoted.append(dict(zip(cells(lines[first]), cells(line), strict=True)))
    assert len(quoted) >= 5
    for row in quoted:
        assert any(row.items() <= each.items() for each in known), row
