"""The commands that read and write engines' files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeplace.formats import read_plan, write_plan
from moeplace.instances import read_instance
from moeplace.plan import Plan
from tests.test_cli import GOOD, PLAN, Run, plain_terminal, refused, run, saved

__all__ = ["plain_terminal", "run"]  # fixtures

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT / "instances/real/qwen3-30b-sharegpt_16x9_equal.json"


def lying(path: Path) -> Path:
    """Counts of which all are even."""
    random = np.random.default_rng(0)
    np.save(path, 2 * random.multinomial(4000, np.full(32, 1 / 32), (1, 4)).astype(np.int64))
    return path


# --- loads -------------------------------------------------------------------------------------


def test_loads_says_shape_skew_and_drift(run: Run) -> None:
    answer = run("loads", REAL)
    assert (answer.code, answer.err) == (0, "")
    assert answer.fact("format") == "instance (told from its content)"
    assert answer.fact("shape") == "3 windows x 48 layers x 128 experts"
    assert answer.fact("phase") == "prefill"
    assert answer.fact("assignments").startswith("2,338,560 over all")
    assert "cosine distance" in answer.fact("drift")
    assert answer.out.endswith("no warnings\n")


def test_loads_as_json(run: Run) -> None:
    found = run("loads", REAL, "--json", "--format", "instance", "--passes", "2").json
    assert (found["format"], found["detected"], found["passes"]) == ("instance", False, [2, 2, 2])
    assert found["shapes"] == {"windows": 3, "layers": 48, "experts": 128}
    loads = read_instance(REAL).loads
    assert found["per_layer"][5]["skew"] == loads.aggregate().skew()[0, 5]
    assert found["warnings"] == []
    assert len(found["drift"]) == 2


def test_strict_ends_with_2_if_there_is_a_warning(run: Run, tmp_path: Path) -> None:
    path = lying(tmp_path / "x.npy")
    answer = run("loads", path)
    assert answer.code == 0
    assert "are multiples of 2" in answer.fact("warning: multiples")
    answer = run("loads", path, "--strict", "--json")
    assert answer.code == 2
    assert answer.json["warnings"][0]["name"] == "multiples"
    assert (
        answer.err
        == f"error: {path}: multiples: the loads may not be what the model's router did. See above.\n"
    )
    assert run("loads", REAL, "--strict").code == 0


def test_loads_writes_plain_loads_and_an_instance(run: Run, tmp_path: Path) -> None:
    out, instance = tmp_path / "loads.npz", tmp_path / "instance.json"
    answer = run(
        "loads", REAL, "--layers", "3:", "--windows", "1", "--out", out,
        "--instance", instance, "--ranks", "16", "--slots", "9",
    )  # fmt: skip
    assert answer.code == 0
    problem = read_instance(instance)
    assert (problem.layers, problem.windows, problem.ranks) == (45, 1, 16)
    assert (problem.cluster.speeds == 1).all()
    assert run("loads", out).fact("format") == "npz (told from its content)"
    expected = read_instance(REAL).loads.tokens.sum(axis=0)[None, 3:]
    assert (problem.loads.tokens == expected).all()


def test_loads_refuses_bad_options(run: Run, tmp_path: Path) -> None:
    refused(run("loads", REAL, "--layers", "3"), "--layers must be FROM:TO")
    refused(run("loads", REAL, "--layers", "x:3"), "--layers must be FROM:TO")
    refused(run("loads", REAL, "--layers", "3:61"), "rows 3:61, but there are 48 .*dense layers")
    refused(run("loads", REAL, "--out", tmp_path / "x.json"), r"name it .*x\.npz\.")
    refused(run("loads", REAL, "--phase", "idle"), "Phase must be one of|says its phase itself")
    refused(run("loads", REAL, "--ranks", "3"), "--instance, --ranks and --slots belong together")
    refused(run("loads", REAL, "--out", REAL), "must not overwrite an input")
    refused(run("loads", tmp_path), "is a folder without meta_info.json")
    refused(run("loads", REAL, "--format", "x"), "Load format 'x' is unknown")


# --- export ------------------------------------------------------------------------------------

FULL = PLAN | {"slots": [[0, 1, 2, 0], [0, 1, 2, 0]]}


@pytest.mark.parametrize(
    ("name", "file", "options"),
    [
        ("sglang", "map.json", ["--first-moe-layer", 3, "--num-layers", 5]),
        (
            "tensorrt-llm",
            "map.yaml",
            ["--first-moe-layer", 3, "--num-layers", 6, "--mtp-layers", 1],
        ),
        ("vllm-ascend", "map.json", []),
        ("vllm", "map.json", ["--form", "row"]),
        ("omni", "map.npy", []),
        ("deepseek", "map.npz", []),
        ("moeplace", "map.json", []),
    ],
)
def test_export_writes_and_evaluate_reads(
    run: Run, tmp_path: Path, name: str, file: str, options: list[Any]
) -> None:
    instance = saved(tmp_path / "instance.json", GOOD)
    plan = saved(tmp_path / "plan.json", FULL)
    out = tmp_path / file
    answer = run("export", plan, "--format", name, "--out", out, *options)
    assert (answer.code, answer.out, answer.err) == (0, "", "")
    expected = run("evaluate", instance, plan, "--json").json["objective"]
    first = ["--first-moe-layer", 3] if name == "sglang" else []
    if name == "tensorrt-llm":  # the MTP layer is one more than the instance has
        refused(run("evaluate", instance, out, "--plan-format", name), "layers")
        return
    answer = run("evaluate", instance, out, "--plan-format", name, *first, "--json")
    assert answer.json["objective"] == expected
    answer = run(
        "solve", instance, "--start", out, "--plan-format", name, *first, "--work-limit", "10",
        "--json",
    )  # fmt: skip
    assert answer.json["objective"] <= expected


def test_export_refuses(run: Run, tmp_path: Path) -> None:
    plan, out = saved(tmp_path / "plan.json", PLAN), tmp_path / "out.json"
    refused(run("export", plan, "--format", "vllm", "--out", out), "slot 3 .* of layer 1 EMPTY")
    refused(run("export", plan, "--format", "x", "--out", out), "Plan format 'x' is unknown")
    refused(run("export", plan, "--out", out), "needs one of --format")
    refused(run("export", plan, "--format", "vllm"), "[Mm]issing option '--out'")
    refused(run("export", plan, "--format", "moeplace", "--out", plan), "overwrite an input")
    own = ("export", plan, "--format", "moeplace", "--out", out)
    refused(run(*own, "--names", "x"), "--names is for --solution")
    refused(run(*own, "--start", "x"), "--start is for --model")
    assert not out.exists()


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_what_is_no_path_at_all_is_bad_input(run: Run, tmp_path: Path, name: str) -> None:
    """Also for commands that look at it before they read it."""
    plan, out = saved(tmp_path / "plan.json", PLAN), tmp_path / "out.json"
    good = saved(tmp_path / "good.json", GOOD)
    watch = ("watch", name, "--instance", good, "--plan", plan, "--out", out, "--once")
    for command in (
        ("loads", name),
        ("loads", name, "--out", tmp_path / "x.npz"),
        ("export", name, "--format", "moeplace", "--out", out),
        ("report", name, "--out", out),
        ("solve", name, "--out", out),
        watch,
    ):
        if command is watch and "\0" in name:
            refused(run(*command), "is no folder")
        else:
            refused(run(*command), "cannot be read .(file name too long|embedded null byte)")
    refused(run("watch", "", *watch[2:]), "'': is no folder")
    assert not out.exists()


def test_a_plans_format_is_checked_where_no_plan_is_read(run: Run) -> None:
    refused(run("solve", REAL, "--plan-format", "foo"), "Plan format 'foo' is unknown")
    refused(run("solve", REAL, "--first-moe-layer", "-1"), "a whole number from 0, got -1")


def test_export_drops_shares_only_if_told(run: Run, tmp_path: Path) -> None:
    shared = FULL | {"split": [[0.5, 1, 1, 0.5]] * 2}
    plan, out = saved(tmp_path / "plan.json", shared), tmp_path / "out.json"
    refused(run("export", plan, "--format", "vllm", "--out", out), "stores shares")
    assert run("export", plan, "--format", "vllm", "--out", out, "--drop-split").code == 0
    assert read_plan(out, "vllm", ranks=2).split is None


def test_engines_plans_with_duplicates_are_priced(run: Run, tmp_path: Path) -> None:
    instance, out = saved(tmp_path / "instance.json", GOOD), tmp_path / "map.json"
    twice = Plan(slots=[[0, 0, 1, 2]] * 2, rank_slots=[2, 2], experts=3, allow_duplicates=True)
    write_plan(twice, out, "vllm")
    answer = run("evaluate", instance, out, "--plan-format", "vllm", "--json")
    assert answer.code == 2
    assert json.loads(answer.out)["status"] == "illegal"
