"""Tables of runs go on where they stopped, and best known values are reproduced or refused."""

import csv
import json
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeplace import bench_run, bench_table, best_known, certificate
from moeplace.bench_case import TUNING_SEEDS
from moeplace.bench_run import COLUMNS, TABLE_SEEDS, TIMES, read_trace, trace
from moeplace.bench_table import Settings, fill, read_runs
from moeplace.bounds import lower_bound
from moeplace.errors import FormatError, ProblemError
from moeplace.instances import read_instance
from moeplace.solve import solve
from tests.test_cli import Run, plain_terminal, run

__all__ = ["plain_terminal", "run"]  # fixtures

ROOT = Path(__file__).resolve().parents[1]
INSTANCES = ROOT / "instances"
QUICK = Settings(
    sets=("tiny",), methods=("contiguous", "eplb", "auto"), seeds=(100,), time_limit=0.02, jobs=1
)


@pytest.fixture(autouse=True)
def three_instances(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_run, "TABLE_SEEDS", (100, 101, 102))


def test_seeds_of_tables_are_not_those_of_tuning() -> None:
    assert not set(TABLE_SEEDS) & set(TUNING_SEEDS)
    assert len(TABLE_SEEDS) >= 30
    for seeds in ((4,), (), (-1,), (100, 3)):
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
        asked.append(given[0].instance)
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


def test_jobs_give_the_same_table_but_for_times(tmp_path: Path) -> None:
    plain = []
    for jobs in (1, 2):
        settings = Settings(
            sets=("tiny",), methods=("eplb", "auto"), seeds=(100, 101), time_limit=None,
            work_limit=2000, jobs=jobs,
        )  # fmt: skip
        rows = fill(tmp_path / str(jobs), settings, INSTANCES)
        read = read_runs(tmp_path / str(jobs))[0]
        assert read == rows
        plain.append([{key: row[key] for key in COLUMNS if key not in TIMES} for row in rows])
    assert len(plain[0]) == 3 + 2 * 3
    assert plain[0] == plain[1]


STOPPED = """
import os, signal, sys
from moeplace import bench_table
from moeplace.cli import main

left, measure = int(sys.argv.pop(1)), bench_table.measure

def measured(*given):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return measure(*given)

bench_table.measure = measured
main()
"""


def test_a_killed_table_goes_on_without_a_row_lost_or_doubled(tmp_path: Path) -> None:
    given = ("bench", "--out", str(tmp_path / "t"), "--sets", "tiny", "--methods", "contiguous",
             "--seeds", "100", "--instances", str(INSTANCES))  # fmt: skip
    for most in (2, 3, 100):
        ended = subprocess.run(
            [sys.executable, "-c", STOPPED, str(most), *given], capture_output=True, cwd=ROOT
        )
        killed = most < 100
        assert ended.returncode == (-signal.SIGKILL if killed else 0), ended.stderr
        lines = (tmp_path / "t/runs.csv").read_text().splitlines()
        if most == 2:
            assert len(lines) == 1 + 2
        elif most == 3:  # and the disk took the last row by half
            assert len(lines) == 1 + 5
            (tmp_path / "t/runs.csv").write_text("\n".join(lines)[:-30])
    rows, about = read_runs(tmp_path / "t")
    assert [row["instance"] for row in rows] == [f"tiny-{seed}" for seed in range(100, 130)]
    assert about["settings"]["methods"] == ["contiguous"]


def test_one_process_fills_a_table_at_a_time(tmp_path: Path) -> None:
    fill(tmp_path, QUICK, INSTANCES)
    with bench_table._alone(tmp_path), pytest.raises(FormatError, match="another process"):
        fill(tmp_path, QUICK, INSTANCES)
    assert len(fill(tmp_path, QUICK, INSTANCES)) == 9


def test_rows_that_are_no_part_of_the_table_are_refused(tmp_path: Path) -> None:
    fill(tmp_path, QUICK, INSTANCES)
    table = tmp_path / "runs.csv"
    text = table.read_text()
    last = text.splitlines()[-1]
    for more, why in ((last, "there already"), (last.replace("tiny-102", "tiny-9"), "no part"),
                      (last + ",1", "fields"), ("a,b", "fields")):  # fmt: skip
        table.write_text(text + more + "\n")
        with pytest.raises(FormatError, match=f"line 11 .*{why}"):
            fill(tmp_path, QUICK, INSTANCES)
    table.write_bytes(text.encode() + b"\xff\n")
    with pytest.raises(FormatError, match="cannot be read"):
        fill(tmp_path, QUICK, INSTANCES)
    table.write_text("")
    assert len(fill(tmp_path, QUICK, INSTANCES)) == 9


def test_parquet_holds_the_same_as_csv(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    rows = fill(tmp_path, QUICK, INSTANCES, parquet=True)
    read = parquet.read_table(tmp_path / "runs.parquet")
    assert read.column_names == list(COLUMNS)
    about = json.loads(read.schema.metadata[b"moeplace-bench"])
    assert about == json.loads((tmp_path / "settings.json").read_text())
    for row, found in zip(rows, read.to_pylist(), strict=True):
        for name, text in row.items():
            value = found[name]
            if value is None or value == "":
                assert text == ""
            elif isinstance(value, bool):
                assert text == str(value).lower()
            else:
                assert type(value)(text) == value


def test_parquet_without_pyarrow_is_said_before_anything_runs(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    answer = run("bench", "--out", str(tmp_path / "t"), "--sets", "tiny", "--parquet")
    assert answer.code != 0
    assert "pip install 'moeplace[bench]'" in answer.err
    assert not (tmp_path / "t").exists()


def test_traces_are_thinned_and_read_again() -> None:
    assert trace([(0.1, 0.5), (0.2, 0.5), (0.3, 0.125)]) == "0.1:0.5 0.3:0.125"
    points = [(i / 8, 2.0**-i) for i in range(1, 100)]
    found = read_trace(trace(points))
    assert 10 < len(found) <= bench_run.POINTS + 1
    assert found[0] == points[0]
    assert found[-1][0] == pytest.approx(points[-1][0], rel=1e-3)
    assert read_trace(trace([])) == []


def test_a_summary_is_what_its_rows_say(tmp_path: Path) -> None:
    rows = fill(tmp_path, QUICK, INSTANCES)
    text = (tmp_path / "summary.md").read_text()
    cost = {
        method: np.array([float(r["objective"]) for r in rows if r["method"] == method])
        for method in QUICK.methods
    }
    ratio = np.exp(np.log(cost["eplb"] / cost["auto"]).mean())
    assert f"| {ratio:.4f} [" in text
    assert f"| {ratio:.3f} [" in text
    assert "Methods cp-sat, " in text.partition("## What was not run")[2]
    assert "commit" in text.partition("## Machine")[2]
    for row in rows:
        reached = float(row["gap"]) <= bench_run.GOAL and row["legal"] == "true"
        assert reached or row["goal_seconds"] == ""
        assert float(row["load"]) >= 0


def test_what_does_not_apply_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench_run.SHAPES, "tiny", (2, 8, 9, 4))  # slots differ: no EPLB
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
        ("bench", "--out", out, "--methods", "auto,auto"),
        ("bench", "--out", out, "--time-limit", "1", "--work-limit", "9"),
        ("bench", "--out", out, "--work-limit", "0"),
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


def changed(row: str, **more: str) -> str:
    """A row with other fields."""
    given = dict(zip(best_known.COLUMNS, row.split(","), strict=True)) | more
    return ",".join(given.values())


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"objective": "8.08"}, "not the best: a plan costs 8.0"),
        ({"objective": "7.92", "lower_bound": "7.92"}, "value 7.92 could not be reproduced"),
        ({"objective": "nan"}, "could not be reproduced"),
        ({"lower_bound": "8.08"}, "above the value"),
        ({"lower_bound": "7.92"}, "bound 7.92 is not the best: 7.99999"),
        ({"lower_bound": "nan"}, "above the value"),
        ({"plan_digest": "abc"}, "plan has this value but is another"),
        ({"plan_digest": ""}, "plan has this value but is another"),
        ({"certificate_digest": "abc"}, "certificate holds but is another"),
        ({"certificate_digest": ""}, "certificate holds but is another"),
        ({"work_limit": "x"}, "number is missing"),
        ({"method": "magic"}, "magic"),
        ({"instance": "small/none"}, "none.json"),
        ({"routing": "weighted"}, "not the best|another one"),
    ],
)
def test_rows_that_do_not_hold_are_refused(
    run: Run, tmp_path: Path, more: dict[str, str], why: str
) -> None:
    (listed,) = rows_of("small/ties,even")
    place = folder(tmp_path, changed(listed, **more))
    answer = run("bench", "--check", "--instances", str(place))
    assert answer.code == 5
    assert re.search(f"REFUSED: .*({why})", answer.err), answer.err
    assert answer.out == "0 of 1 rows reproduced\n"


def test_a_bound_that_nothing_proves_is_refused(run: Run, tmp_path: Path) -> None:
    (listed,) = rows_of("small/slow-rank,weighted")
    fields = dict(zip(best_known.COLUMNS, listed.split(","), strict=True))
    given = read_instance(INSTANCES / "small/slow-rank.json")
    proven = lower_bound(replace(given, routing="weighted")).total
    if proven >= float(fields["lower_bound"]) * (1 - best_known.SAME):
        pytest.skip("arguments prove this bound now: take another instance")
    place = folder(tmp_path, changed(listed, proof="fluid"))
    answer = run("bench", "--check", "--instances", str(place))
    assert answer.code == 5
    assert "could not be reproduced" in answer.err


def test_certificates_are_told_by_what_they_say(tmp_path: Path, run: Run) -> None:
    given = read_instance(INSTANCES / "small/ties.json")
    path = tmp_path / "c.json"
    (listed,) = rows_of("small/ties,even")
    work = best_known.STEPS * given.layers
    result = solve(replace(given, routing="even"), work_limit=work, gap=0.0)
    certificate.write_certificate(result, path)
    told = certificate.digest(path)
    assert listed.endswith("," + told), "as the table has it"
    assert json.loads(run("certify", str(path), "--json").out)["certificate_digest"] == told
    file = json.loads(path.read_text())
    for key, value, same in (
        ("made_by", "another version", True),
        ("lower_bound", file["lower_bound"] * (1 - 1e-15), True),
        ("lower_bound", file["lower_bound"] * (1 - 1e-6), False),
        ("method", "eplb", False),
        ("arguments", [["mean"] * given.layers], False),
    ):
        path.write_text(json.dumps(file | {key: value}))
        assert (certificate.digest(path) == told) == same, key


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
    gone = changed(kept[0], instance="real/gone", proof="fluid")
    (place / "best_known.csv").write_text(f"{HEAD}{kept[0]}\n{gone}\n")
    assert len(list(best_known.update(place, steps=2000))) == 2
    lines = (place / "best_known.csv").read_text().splitlines()
    assert lines[1] == kept[0]
    assert [line.split(",")[1] for line in lines[2:]] == ["even", "weighted"]
    assert [row.refused for row in best_known.check(place)] == ["", "", ""]
