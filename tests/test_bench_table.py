"""Tables of runs go on where they stopped, and best known values are reproduced or refused."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from moeplace import bench_table, best_known
from moeplace.bench_table import COLUMNS, TABLE_SEEDS, TUNING_SEEDS, Settings, fill
from moeplace.errors import FormatError, ProblemError
from tests.test_cli import Run, plain_terminal, run

__all__ = ["plain_terminal", "run"]  # fixtures

ROOT = Path(__file__).resolve().parents[1]
INSTANCES = ROOT / "instances"
QUICK = Settings(
    sets=("tiny",), methods=("contiguous", "eplb", "auto"), seeds=(100,), time_limit=0.02, jobs=1
)


@pytest.fixture(autouse=True)
def three_instances(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_table, "TABLE_SEEDS", (100, 101, 102))


def test_seeds_of_tables_are_not_those_of_tuning() -> None:
    assert not set(TABLE_SEEDS) & set(TUNING_SEEDS)
    assert len(TABLE_SEEDS) >= 30
    for seeds in ((4,), (), (-1,)):
        with pytest.raises(ProblemError, match="tuning"):
            Settings(sets=("A",), methods=("auto",), seeds=seeds, time_limit=1.0, jobs=1)


def test_a_table_holds_every_run_once(tmp_path: Path) -> None:
    rows = fill(tmp_path / "t", QUICK, INSTANCES)
    assert [(row["instance"], row["method"]) for row in rows] == [
        (f"tiny-{seed}", method) for seed in (100, 101, 102) for method in QUICK.methods
    ]
    for row in rows:
        assert float(row["objective"]) >= float(row["lower_bound"]) * (1 - 1e-9)
        assert float(row["ratio"]) >= 1 - 1e-9
        assert row["legal"] in ("true", "false")
    auto = [float(row["objective"]) for row in rows if row["method"] == "auto"]
    first = [float(row["objective"]) for row in rows if row["method"] == "contiguous"]
    assert all(one < other for one, other in zip(auto, first, strict=True))
    kept = json.loads((tmp_path / "t/settings.json").read_text())
    assert kept["settings"]["seeds"] == [100]
    assert kept["environment"].keys() >= {"moeplace", "numpy", "source", "processor", "cores"}
    text = (tmp_path / "t/summary.md").read_text()
    assert "| auto | 3 |" in text
    assert "3 instances only" in text


def test_a_table_goes_on_where_it_was_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    measure = bench_table.measure

    def heard(*given: Any) -> Any:
        asked.append(given[1])
        return measure(*given)

    monkeypatch.setattr(bench_table, "measure", heard)
    fill(tmp_path, QUICK, INSTANCES)
    table = tmp_path / "runs.csv"
    whole = table.read_text().splitlines(keepends=True)
    table.write_text("".join(whole[:-2]) + whole[-2][:20])  # cut off within a row
    asked.clear()
    rows = fill(tmp_path, QUICK, INSTANCES)
    assert asked == ["tiny-102", "tiny-102"]
    assert len(rows) == 9
    with table.open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [tuple(row) for row in read] == [COLUMNS] * 9
    asked.clear()
    fill(tmp_path, QUICK, INSTANCES)
    assert asked == []


def test_jobs_give_the_same_rows(tmp_path: Path) -> None:
    two = Settings(sets=("tiny",), methods=("contiguous",), seeds=(100,), time_limit=1.0, jobs=2)
    one = Settings(sets=("tiny",), methods=("contiguous",), seeds=(100,), time_limit=1.0, jobs=1)
    plain = [
        sorted((row["instance"], row["objective"], row["digest"]) for row in rows)
        for rows in (fill(tmp_path / "2", two, INSTANCES), fill(tmp_path / "1", one, INSTANCES))
    ]
    assert plain[0] == plain[1]


def test_what_does_not_apply_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench_table.SHAPES, "tiny", (2, 8, 9, 4))  # slots differ: no EPLB
    text_of = fill(tmp_path, QUICK, INSTANCES)
    assert {row["status"] for row in text_of if row["method"] == "eplb"} == {"not_applicable"}
    assert "eplb has no plan in 3 runs, the first: " in (tmp_path / "summary.md").read_text()


def test_other_settings_and_other_folders_are_refused(tmp_path: Path) -> None:
    fill(tmp_path / "t", QUICK, INSTANCES)
    before = (tmp_path / "t/runs.csv").read_bytes()
    other = Settings(sets=("tiny",), methods=("auto",), seeds=(100,), time_limit=9.0, jobs=1)
    with pytest.raises(FormatError, match="fixed before the first run"):
        fill(tmp_path / "t", other, INSTANCES)
    settings = tmp_path / "t/settings.json"
    kept = json.loads(settings.read_text())
    kept["environment"]["processor"] = "another"
    settings.write_text(json.dumps(kept))
    with pytest.raises(FormatError, match="another processor"):
        fill(tmp_path / "t", QUICK, INSTANCES)
    settings.write_text("{}")
    with pytest.raises(FormatError, match="not what bench wrote"):
        fill(tmp_path / "t", QUICK, INSTANCES)
    assert (tmp_path / "t/runs.csv").read_bytes() == before
    with pytest.raises(FormatError, match="holds no table"):
        fill(tmp_path, QUICK, INSTANCES)


def test_command(run: Run, tmp_path: Path) -> None:
    out = str(tmp_path / "t")
    given = ("bench", "--out", out, "--sets", "tiny", "--methods", "contiguous", "--json")
    answer = run(*given)
    assert answer.code == 0, answer.err
    assert len(json.loads(answer.out)["rows"]) == 3
    for wrong in (
        ("bench",),
        ("bench", "--out", out, "--sets", "tiny", "--seeds", "x"),
        ("bench", "--out", out, "--sets", "tiny", "--seeds", "3"),
        ("bench", "--out", out, "--sets", "huge"),
        ("bench", "--out", out, "--methods", "none"),
        ("bench", "real", "--check"),
        ("bench", "--out", out, "--sets", "tiny", "--only", "small/"),
        ("bench", "--out", out, "--sets", "tiny", "--dask", "tcp://127.0.0.1:1"),
    ):
        answer = run(*wrong)
        assert answer.code == 2, wrong
        assert answer.err.count("error:") == 1


# ---------------------------------------------------------------------------- best known

HEAD = ",".join(best_known.COLUMNS) + "\n"


def folder(tmp_path: Path, *rows: str) -> Path:
    for part in ("small", "real"):
        (tmp_path / part).symlink_to(INSTANCES / part)
    (tmp_path / "best_known.csv").write_text(HEAD + "".join(row + "\n" for row in rows))
    return tmp_path


def rows_of(prefix: str) -> list[str]:
    lines = (INSTANCES / "best_known.csv").read_text().splitlines()[1:]
    return [line for line in lines if line.startswith(prefix)]


def test_best_known_of_small_instances_are_reproduced(run: Run) -> None:
    answer = run("bench", "--check", "--only", "small/", "--instances", str(INSTANCES))
    assert answer.code == 0, answer.err
    count = len(rows_of("small/"))
    assert answer.out == f"{count} of {count} rows reproduced\n"


def test_best_known_of_a_real_instance_is_reproduced(run: Run) -> None:
    only = "real/qwen3-30b-sharegpt_8x16_equal"
    assert len(rows_of(only)) == 2
    answer = run("bench", "--check", "--only", only, "--instances", str(INSTANCES), "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out) == {"rows": 2, "refused": []}


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("small/ties,even,{high},{low},-,,", "not the best"),
        ("small/ties,even,{below},{low},-,,", "not be reproduced"),
        ("small/ties,even,{value},{high},-,,", "above the value"),
        ("small/slow-rank,weighted,6.9230769230769225,6.9230769230769225,fluid,,", "bound"),
        ("small/ties,even,{value},{low},-,,abc", "another one"),
        ("small/ties,even,x,{low},-,,", "number is missing"),
        ("small/none,even,1,1,-,,", "none.json"),
    ],
)
def test_rows_that_do_not_hold_are_refused(run: Run, tmp_path: Path, row: str, why: str) -> None:
    (listed,) = rows_of("small/ties,even")
    value = float(listed.split(",")[2])
    text = row.format(value=value, high=value * 1.01, below=value * 0.99, low=value * 0.5)
    answer = run("bench", "--check", "--instances", str(folder(tmp_path, text)))
    assert answer.code == 5
    assert "REFUSED" in answer.err
    assert why in answer.err
    assert answer.out == "0 of 1 rows reproduced\n"


def test_a_table_that_is_none_is_bad_input(run: Run, tmp_path: Path) -> None:
    assert run("bench", "--check", "--instances", str(tmp_path)).code == 2
    (tmp_path / "best_known.csv").write_text("a,b\n")
    assert run("bench", "--check", "--instances", str(tmp_path)).code == 2


def test_update_keeps_other_rows(tmp_path: Path) -> None:
    place = tmp_path / "i"
    place.mkdir()
    (place / "small").symlink_to(INSTANCES / "small")
    (place / "real").mkdir()
    source = INSTANCES / "real/dsv2lite-tasks_8x9_equal.json"
    (place / "real" / source.name).write_bytes(source.read_bytes())
    kept = rows_of("small/ties,even")
    (place / "best_known.csv").write_text(HEAD + kept[0] + "\nreal/gone,even,1,1,-,,\n")
    assert len(list(best_known.update(place, steps=2000))) == 2
    lines = (place / "best_known.csv").read_text().splitlines()
    assert lines[1] == kept[0]
    assert [line.split(",")[1] for line in lines[2:]] == ["even", "weighted"]
    assert [row.refused for row in best_known.check(place)] == ["", "", ""]
