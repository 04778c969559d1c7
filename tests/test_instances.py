"""Problems survive the disk, bad files are refused, generated and shipped instances hold true."""

import csv
import os
import runpy
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from moeplace.constraints import (
    Forbid,
    MaxMoves,
    MaxReplicas,
    NodeGroups,
    Pin,
    ReplicaBudget,
    TokenCapacity,
)
from moeplace.errors import FormatError, PlanError, ProblemError
from moeplace.hardware import Cluster, Planes
from moeplace.instances import ASSIGNMENTS, SHAPES, generate, read_instance, write_instance
from moeplace.loads import LoadHistogram
from moeplace.plan import Plan
from moeplace.problem import Problem
from tests.brute_force import optimum

FOLDER = Path(__file__).resolve().parents[1] / "instances"
SMALL = sorted((FOLDER / "small").glob("*.json"))
REAL = sorted((FOLDER / "real").glob("*.json"))

GOOD: dict[str, Any] = {
    "format": "moeplace-instance",
    "version": 1,
    "cluster": {"speeds": [1, 0.5], "slots": [2, 1]},
    "loads": {"tokens": [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]},
}


def written(folder: Path, change: dict[str, Any]) -> Path:
    path = folder / "problem.json"
    path.write_bytes(msgspec.json.encode(GOOD | change))
    return path


# --- reading and writing ---------------------------------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Problems with every field used or left out."""
    windows, layers = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    experts, ranks = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    amounts = st.one_of(st.integers(0, 10**6).map(float), st.floats(0, 1e9))
    weights = st.floats(1e-3, 1e3)

    def array(shape: tuple[int, ...], elements: st.SearchStrategy[float]) -> Any:
        return draw(arrays.arrays(np.float64, shape, elements=elements))

    def some(low: int, high: int, count: int) -> st.SearchStrategy[list[int]]:
        return st.lists(st.integers(low, high), min_size=count, max_size=count)

    def perhaps(value: Any) -> Any:
        return value if draw(st.booleans()) else None

    base_shape = (windows, layers, ranks)[draw(st.integers(0, 2)) :]
    pair = {
        "expert": st.integers(0, experts - 1),
        "rank": st.integers(0, ranks - 1),
        "layer": st.none() | st.integers(0, layers - 1),
    }
    pairs = draw(st.lists(st.builds(Pin, **pair) | st.builds(Forbid, **pair), max_size=3))
    slots = [experts, *draw(some(0, 3, ranks - 1))]
    filled = [*range(experts), *[-1] * (sum(slots) - experts)]
    budget = MaxMoves(
        Plan(
            slots=[filled] * layers,
            rank_slots=slots,
            experts=experts,
            allow_duplicates=draw(st.booleans()),
        ),
        per_layer=perhaps(2),
        total=perhaps(3),
    )
    groups = NodeGroups(draw(st.sampled_from([1, [0] * experts, list(range(experts))])))
    once = [rule for rule in (perhaps(budget), perhaps(groups)) if rule is not None]
    return Problem(
        LoadHistogram(
            tokens=array((windows, layers, experts), amounts),
            passes=perhaps(array((windows,), weights)),
            phase=draw(st.sampled_from(["prefill", "decode", "mixed"])),
        ),
        Cluster(
            speeds=array((ranks,), st.floats(0.01, 1e6)),
            slots=slots,
            nodes=perhaps(draw(some(0, 2, ranks))),
            speed_unit=draw(st.sampled_from(["tokens/s", "relative"])),
        ),
        routing=draw(st.sampled_from(["even", "weighted"])),
        objective=draw(st.sampled_from(["mean", "worst"])),
        constraints=[*once, *pairs],
        base_load=perhaps(array(base_shape, amounts)),
        layer_weight=perhaps(array((layers,), weights)),
        window_weight=perhaps(array((windows,), weights)),
        name=draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=5)),
        origin=draw(st.sampled_from(["", 'measured, ünïcode \u2028 "quoted"'])),
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(problem=problems())
def test_a_problem_read_back_is_the_same(tmp_path: Path, problem: Problem) -> None:
    write_instance(problem, tmp_path / "problem.json", notes="for people")
    back = read_instance(tmp_path / "problem.json")
    assert back.digest() == problem.digest()
    assert (back.name, back.origin) == (problem.name, problem.origin)
    keys = [[(type(c), c.key(problem.experts)) for c in p.constraints] for p in (back, problem)]
    assert keys[0] == keys[1]
    assert back.loads.phase == problem.loads.phase
    assert np.array_equal(back.loads.tokens, problem.loads.tokens)
    assert np.array_equal(back.base, problem.base)
    again = (tmp_path / "problem.json").read_bytes()
    write_instance(back, tmp_path / "problem.json", notes="for people")
    assert (tmp_path / "problem.json").read_bytes() == again


def test_every_field_of_a_problem_is_written(tmp_path: Path) -> None:
    """A field added to Problem, LoadHistogram or Cluster must reach the file."""
    problem = Problem(
        LoadHistogram(tokens=[[[1, 2.5]], [[3, 4]]], passes=[1, 3], phase="decode"),
        replace(
            Cluster.from_speeds([1, 0.5], 2, nodes=2),
            planes=Planes(startup=[0.5], activation=[0.25], compute=[1]),
        ),
        routing="weighted",
        objective="cvar",
        cvar_alpha=0.75,
        constraints=[
            Pin(0, 1),
            Forbid(1, 0, 0),
            TokenCapacity([3, 4.5]),
            MaxReplicas(2),
            ReplicaBudget(4),
        ],
        base_load=[[[1, 0]], [[0, 2]]],
        layer_weight=[2],
        window_weight=[1, 1],
        name="n",
        origin="o",
    )
    write_instance(problem, tmp_path / "x", notes="hello")
    file = msgspec.json.decode((tmp_path / "x").read_bytes())
    assert file == {
        "format": "moeplace-instance",
        "version": 1,
        "name": "n",
        "origin": "o",
        "notes": "hello",
        "routing": "weighted",
        "objective": "cvar",
        "cvar_alpha": 0.75,
        "cluster": {
            "speeds": [1, 0.5],
            "speed_unit": "tokens/s",
            "slots": [2, 2],
            "nodes": [0, 1],
            "planes": {"startup": [0.5], "activation": [0.25], "compute": [1]},
        },
        "constraints": [
            {"type": "pin", "expert": 0, "rank": 1, "layer": None},
            {"type": "forbid", "expert": 1, "rank": 0, "layer": 0},
            {"type": "token-capacity", "tokens": [3, 4.5]},
            {"type": "max-replicas", "limit": 2},
            {"type": "replica-budget", "total": 4},
        ],
        "base_load": [[[1, 0]], [[0, 2]]],
        "layer_weight": [2],
        "window_weight": [0.5, 0.5],
        "loads": {"phase": "decode", "passes": [1, 3], "tokens": [[[1, 2.5]], [[3, 4]]]},
    }
    assert read_instance(tmp_path / "x").digest() == problem.digest()
    for part, inside in ((problem, file), (problem.loads, file["loads"])):
        assert {f.name for f in fields(part)} - {"_"} <= set(inside)
    held = {f.name for f in fields(problem.cluster)} - {"table"}  # planes or a table: test_latency
    assert held <= set(file["cluster"])
    assert b"2.0" not in (tmp_path / "x").read_bytes()


def test_what_is_left_out_takes_its_default(tmp_path: Path) -> None:
    problem = read_instance(written(tmp_path, {}))
    assert (problem.routing, problem.objective, problem.constraints) == ("even", "mean", ())
    assert problem.cluster.speed_unit == "tokens/s"
    assert not problem.base.any()
    assert problem.window_weight.tolist() == [0.5, 0.5]


def loads(tokens: Any, **more: Any) -> dict[str, Any]:
    return {"loads": {"tokens": tokens, **more}}


def cluster(**change: Any) -> dict[str, Any]:
    return {"cluster": GOOD["cluster"] | change}


def rule(**change: Any) -> dict[str, Any]:
    return {"constraints": [{"type": "pin", "expert": 0, "rank": 0} | change]}


FORMAT_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "other format": (
        {"format": "moeplace-plan"},
        'format is "moeplace-plan", expected "moeplace-i',
    ),
    "other version": ({"version": 2}, r"version is 2, but versions known of .* are: 1\."),
    "typo at the top": ({"rooting": "even"}, r'\$ has the unknown field "rooting"'),
    "typo in loads": (loads([[[1]]], pases=[1]), r'\$.loads has the unknown field "pases"'),
    "typo in the cluster": (cluster(speed=[1]), r'\$.cluster has the unknown field "speed"'),
    "typo in a rule": (rule(exprt=1), r'\$.constraints\[0\] has the unknown field "exprt"'),
    "no tokens": ({"loads": {}}, r'\$.loads lacks the required field "tokens"'),
    "no slots": ({"cluster": {"speeds": [1]}}, r'\$.cluster lacks the required field "slots"'),
    "two axes": (loads([[1, 2]]), r"\$.loads.tokens\[0\]\[0\]: expected `array`, got `int`: 1"),
    "four axes": (loads([[[[1]]]]), r"\$.loads.tokens\[0\]\[0\]\[0\]: expected `float`"),
    "text load": (loads([[[1, 2], [3, "4"]]]), r"\$.loads.tokens\[0\]\[1\]\[1\]: expected `float`"),
    "ragged experts": (loads([[[1, 2], [3]]]), r"tokens\[0\]\[1\] has 1 entries but .* has 2"),
    "ragged layers": (loads([[[1]], [[1], [2]]]), r"tokens\[1\] has 2 entries but .* has 1"),
    "no window": (loads([]), r"\$.loads.tokens is empty"),
    "no expert": (loads([[[]]]), r"\$.loads.tokens\[0\]\[0\] is empty"),
    "one number of passes": (
        loads([[[1]]], passes=3),
        r"\$.loads.passes: expected `array \| null`",
    ),
    "unknown phase": (loads([[[1]]], phase="warm"), r"phase must be one of 'prefill', 'decode'"),
    "unknown routing": (
        {"routing": "evn"},
        r"routing must be one of 'even', 'weighted', .*, got \"evn",
    ),
    "unknown unit": (
        cluster(speed_unit="m/s"),
        r"speed_unit must be one of 'tokens/s', 'relative'",
    ),
    "unknown rule": (
        rule(type="pun"),
        r"\$.constraints\[0\].type must be one of 'pin', 'forbid', 'max-moves', 'node-groups'",
    ),
    "fractional slots": (cluster(slots=[1.5, 2]), r"slots\[0\]: expected `int`, got `float`: 1.5"),
    "huge slots": (cluster(slots=[1, 10**25]), r"slots\[1\]: expected `int` <= 1048576: 1000000"),
    "number as type": (rule(type=3), r"type must be one of .pin., .* got 3\. Correct it"),
    "untyped rule": ({"constraints": [{"expert": 1}]}, r'lacks the required field "type"'),
    "scalar rule": ({"constraints": [1]}, r"\$.constraints\[0\]: expected `object`, got `int`: 1"),
    "ragged current plan": (
        {"constraints": [{"type": "max-moves", "current": [[0, 1, 0], [0]]}]},
        r"\$.constraints\[0\].current\[1\] has 1 entries",
    ),
    "text in the current plan": (
        {"constraints": [{"type": "max-moves", "current": [["0"]]}]},
        r"\$.constraints\[0\].current\[0\]\[0\]: expected `int`, got `str`: \"0\"",
    ),
    "text group": (
        {"constraints": [{"type": "node-groups", "groups": [0, "1"]}]},
        r"\$.constraints\[0\].groups\[1\]: expected `int`, got `str`",
    ),
    "negative rank": (rule(rank=-1), r"\$.constraints\[0\].rank: expected `int` >= 0: -1"),
    "boolean weight": ({"layer_weight": [True, 1]}, r"layer_weight\[0\]: expected `float`"),
    "scalar base load": ({"base_load": 3}, r"\$.base_load must be .* 1 or 2 or 3 deep"),
    "ragged base load": ({"base_load": [[1, 2], [3]]}, r"\$.base_load\[1\] has 1 entries"),
    "text base load": ({"base_load": ["1", 2]}, r"\$.base_load\[0\]: expected `float`"),
    "number as name": ({"name": 3}, r"\$.name: expected `str`, got `int`: 3"),
}


@pytest.mark.parametrize(("change", "message"), FORMAT_FAULTS.values(), ids=FORMAT_FAULTS)
def test_files_that_are_not_of_the_schema_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = written(tmp_path, change)
    with pytest.raises(FormatError, match=message) as caught:
        read_instance(path)
    assert str(caught.value).startswith(f"{path}: ")


CONTENT_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "negative load": (loads([[[1, -2]]]), r"got -2.0 at window 0, layer 0, expert 1"),
    "huge load": (loads([[[1, 1e300]]]), r"got 1e\+300 at window 0, layer 0, expert 1"),
    "no passes": (loads([[[1, 2]]], passes=[0]), "Passes must be finite, above 0"),
    "too few passes": (loads([[[1]], [[2]]], passes=[1]), "one number for each of the 2 windows"),
    "speed 0": (cluster(speeds=[1, 0]), "got 0.0 at rank 1"),
    "too few slots": (cluster(slots=[1, 0]), "2 experts do not fit"),
    "unequal lengths": (cluster(slots=[2]), "2 speeds but 1 slots"),
    "unknown expert": (rule(expert=9), "names expert 9: experts are whole numbers from 0 to 1"),
    "negative budget": (
        {"constraints": [{"type": "max-moves", "current": [[0, 1, 0]] * 2, "total": -1}]},
        "MaxMoves total must be a whole number from 0, got -1",
    ),
    "current plan of other layers": (
        {"constraints": [{"type": "max-moves", "current": [[0, 1, 0]]}]},
        "current plan has other layers",
    ),
    "groups that do not divide": (
        {"constraints": [{"type": "node-groups", "groups": 3}]},
        "2 experts do not divide into 3 equal groups",
    ),
    "layer weights": ({"layer_weight": [1]}, "one number for each of the 2 layers, got 1"),
    "window weights": ({"window_weight": [0, 0]}, "Window weight is 0 everywhere"),
    "base load shape": ({"base_load": [1, 2, 3]}, r"Base load must have the shape \(2,\)"),
}


@pytest.mark.parametrize(("change", "message"), CONTENT_FAULTS.values(), ids=CONTENT_FAULTS)
def test_content_that_breaks_a_rule_is_a_problem_error_with_the_path(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = written(tmp_path, change)
    with pytest.raises(ProblemError, match=message) as caught:
        read_instance(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert type(caught.value) is ProblemError


def test_a_current_plan_that_breaks_a_rule_is_a_plan_error(tmp_path: Path) -> None:
    change = {"constraints": [{"type": "max-moves", "current": [[0, 0, 1], [0, 1, 0]]}]}
    path = written(tmp_path, change)
    with pytest.raises(PlanError, match=r"problem\.json: Plan holds expert 0 twice on rank 0"):
        read_instance(path)
    change["constraints"][0]["allow_duplicates"] = True
    assert read_instance(written(tmp_path, change)).max_moves is not None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\x80\x04\x95", "is not UTF-8 text"),
        (b"[" * 100_000, r"\$: expected `object`, got `array`"),
        (b'{"format":"moeplace-instance","version":1,"notes":' + b"[" * 100_000, "too deeply"),
        (b'{"format":"moeplace-instance","version":1,"base_load":[NaN]}', "NaN and Infinity"),
        (b'{"format":"moeplace-instance","version":1,"base_load":[1e999]', "JSON"),
    ],
)
def test_files_that_are_not_json(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "problem.json"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=message):
        read_instance(path)


def test_absent_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such file"):
        read_instance(tmp_path / "absent.json")
    with pytest.raises(FormatError, match="is a folder"):
        read_instance(tmp_path)
    with pytest.raises(FormatError, match="there is no folder"):
        write_instance(generate((1, 2, 2, 1), 0), tmp_path / "absent" / "x.json")


def test_an_existing_instance_survives_a_failing_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    path = written(tmp_path, {})
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FormatError, match="no space left"):
        write_instance(generate((1, 2, 2, 1), 0), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# --- generated instances ---------------------------------------------------------------------


@pytest.mark.parametrize("letter", SHAPES)
def test_letters_have_their_shape(letter: str) -> None:
    problem = generate(letter, 0)
    layers, experts, slots, ranks = SHAPES[letter]
    assert (problem.layers, problem.experts, problem.ranks) == (layers, experts, ranks)
    assert problem.cluster.total_slots == slots
    assert len(set(problem.cluster.slots.tolist())) == 1
    assert problem.windows == 16
    assert problem.cluster.time_unit == "token units"


def test_two_million_assignments_a_layer() -> None:
    problem = generate("A", 3)
    totals = problem.loads.tokens.sum(axis=(0, 2))
    assert problem.loads.integral
    assert np.abs(totals - ASSIGNMENTS).max() < 6 * ASSIGNMENTS**0.5
    windows = problem.loads.tokens.sum(axis=2)
    assert np.abs(windows - 125_000).max() < 6 * 125_000**0.5


def test_layers_alternate_between_two_kinds_of_popularity() -> None:
    logs = np.log(generate((40, 256, 256, 8), 5).loads.tokens.sum(axis=0))
    wide, steep = logs[::2].std(axis=1), logs[1::2].std(axis=1)
    assert wide.min() > 0.55
    assert wide.max() < 1.55
    assert steep.max() < 1.2
    assert wide.mean() > steep.mean() + 0.2


def test_the_same_arguments_give_the_same_problem() -> None:
    assert generate("B", 7).digest() == generate("B", 7).digest()
    assert generate("B", 7).digest() != generate("B", 8).digest()


def test_epochs_drift_from_the_same_base() -> None:
    shape = (20, 256, 256, 8)
    epochs = [generate(shape, 1, epoch=e) for e in range(3)]
    logs = [np.log(p.loads.tokens.sum(axis=0) + 1) for p in epochs]
    for later, spread in ((1, 0.25), (2, 0.25 * 2**0.5)):
        change = logs[later] - logs[0]
        assert (change - change.mean(axis=1, keepdims=True)).std() == pytest.approx(spread, rel=0.1)
        assert np.corrcoef(logs[later].ravel(), logs[0].ravel())[0, 1] > 0.8
    assert (logs[2] - logs[1]).std() < (logs[2] - logs[0]).std()
    other = np.log(generate(shape, 2).loads.tokens.sum(axis=0) + 1)
    assert abs(np.corrcoef(other.ravel(), logs[0].ravel())[0, 1]) < 0.1
    for problem in epochs:
        assert np.array_equal(problem.cluster.speeds, epochs[0].cluster.speeds)


def test_loads_do_not_change_with_speeds_or_routing() -> None:
    reference = generate("B", 2)
    for speeds in ("equal", 0.07, np.linspace(0.8, 1.2, 8)):
        assert np.array_equal(generate("B", 2, speeds=speeds).tokens, reference.tokens)
    weighted = generate("B", 2, routing="weighted")
    assert weighted.routing == "weighted"
    assert replace(weighted, routing="even").digest() == reference.digest()


def test_het_speeds_are_clipped_and_hold_a_slow_rank() -> None:
    speeds = np.array([generate((1, 32, 32, 32), s).cluster.speeds for s in range(40)])
    assert speeds.min() == 0.85
    assert speeds.max() <= 1.15
    assert (speeds == 0.85).any(axis=1).all()
    assert speeds.std() == pytest.approx(0.055, abs=0.01)
    assert len(set(speeds.argmin(axis=1))) > 10


@pytest.mark.parametrize("spread", [0, 0.0, 0.02, 0.04, 0.07, 0.13, np.float64(0.5)])
def test_spread_speeds(spread: float) -> None:
    speeds = generate((1, 32, 32, 16), 4, speeds=spread).cluster.speeds
    assert speeds.max() / speeds.min() - 1 == pytest.approx(spread, abs=1e-12)
    assert speeds.mean() == pytest.approx(1.0)
    steps = np.diff(np.sort(speeds))
    assert steps == pytest.approx(np.full(15, steps.mean()), abs=1e-12)
    if spread == 0:
        assert (speeds == 1).all()
    else:
        assert (np.diff(speeds) < 0).any()


def test_measured_and_equal_speeds() -> None:
    assert (generate("B", 0, speeds="equal").cluster.speeds == 1).all()
    measured = [1.0, 0.9, 1.1, 1.0, 1.2, 0.8, 1.0, 1.0]
    assert generate("B", 0, speeds=measured).cluster.speeds.tolist() == measured
    assert generate((1, 2, 2, 1), 0, speeds=0.1).cluster.speeds.tolist() == [1.0]


def test_slots_that_do_not_divide_are_dealt_evenly() -> None:
    assert generate((2, 8, 10, 4), 0).cluster.slots.tolist() == [3, 3, 2, 2]


BAD_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"shape": "Z"}, "Shape 'Z' is unknown: choose one of A, B, C, D"),
    ({"shape": (1, 2, 3)}, "Shape must be a letter or"),
    ({"shape": 5}, "Shape must be a letter or"),
    ({"shape": (1, 2, 2.0, 1)}, "must hold whole numbers .* got 2.0"),
    ({"shape": (0, 2, 2, 1)}, "must hold whole numbers .* got 0"),
    ({"shape": (1, 4, 2, 1)}, "4 experts do not fit"),
    ({"seed": -1}, "Seed must be a whole number from 0 on, got -1"),
    ({"seed": 0.5}, "Seed must be a whole number"),
    ({"epoch": -1}, "Epoch must be a whole number from 0 on, got -1"),
    ({"epoch": True}, "Epoch must be a whole number"),
    ({"speeds": "fast"}, "Speeds 'fast' are unknown"),
    ({"speeds": -0.1}, "Speed spread .* at least 0, got -0.1"),
    ({"speeds": float("nan")}, "Speed spread .* finite"),
    ({"speeds": [1, 2]}, "one number for each of the 1 ranks, got 2"),
    ({"speeds": [[1]]}, "Measured speeds must have the axes"),
    ({"speeds": [0]}, "Measured speeds must be finite, above"),
    ({"routing": "odd"}, "Routing must be one of even, weighted"),
]


@pytest.mark.parametrize(("change", "message"), BAD_ARGUMENTS, ids=lambda value: str(value)[:30])
def test_bad_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        generate(**({"shape": (1, 2, 2, 1), "seed": 0} | change))


# --- shipped instances -----------------------------------------------------------------------


def best_known() -> list[dict[str, str]]:
    with (FOLDER / "best_known.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_enough_instances_are_shipped() -> None:
    assert len(SMALL) >= 10
    assert len(REAL) >= 10
    assert sum(p.stat().st_size for p in FOLDER.rglob("*") if p.is_file()) < 3 * 2**20


@pytest.mark.parametrize("path", [*SMALL, *REAL], ids=lambda path: path.stem)
def test_shipped_instances_read_and_say_where_they_come_from(path: Path, tmp_path: Path) -> None:
    problem = read_instance(path)
    assert problem.name == path.stem
    assert problem.origin
    if path.parent.name == "real":
        assert "licence" in problem.origin
        assert "independent of the loads" in problem.origin or path.stem.endswith("_equal")
        assert problem.cluster.speed_unit == "relative"
    write_instance(problem, tmp_path / "again.json")
    assert read_instance(tmp_path / "again.json").digest() == problem.digest()


def test_best_known_holds_every_small_instance_under_both_routings() -> None:
    listed = [(row["instance"], row["routing"]) for row in best_known()]
    assert len(set(listed)) == len(listed)
    for path in SMALL:
        for routing in ("even", "weighted"):
            assert (f"small/{path.stem}", routing) in listed
    for row in best_known():
        assert float(row["lower_bound"]) <= float(row["objective"]) * (1 + 1e-9)
        assert (FOLDER / f"{row['instance']}.json").is_file()
        assert row["proof"]


@pytest.mark.parametrize(
    "row",
    [row for row in best_known() if row["instance"].startswith("small/")],
    ids=lambda row: f"{row['instance']}-{row['routing']}",
)
def test_best_known_of_small_instances_is_the_true_optimum(row: dict[str, Any]) -> None:
    problem = replace(read_instance(FOLDER / f"{row['instance']}.json"), routing=row["routing"])
    assert float(row["objective"]) == pytest.approx(optimum(problem), rel=1e-9)
    assert float(row["lower_bound"]) == float(row["objective"])


def test_the_script_makes_exactly_what_is_shipped(tmp_path: Path) -> None:
    made = runpy.run_path(str(FOLDER / "make.py"))
    made["main"](tmp_path)
    for path in [*SMALL, *REAL]:
        same = tmp_path / path.parent.name / path.name
        assert same.read_bytes() == path.read_bytes(), path
    assert len(list(tmp_path.rglob("*.json"))) == len(SMALL) + len(REAL)


def test_rows_of_other_instances_are_kept(tmp_path: Path) -> None:
    made = runpy.run_path(str(FOLDER / "make.py"))
    head = "instance,routing,objective,lower_bound,proof,work_limit,plan_digest\n"
    (tmp_path / "best_known.csv").write_text(
        head + "real/x,even,2,1,cp-sat,9,ab\nsmall/gone,even,1,1,-,,\n"
    )
    made["main"](tmp_path)
    text = (tmp_path / "best_known.csv").read_text()
    assert text.endswith("real/x,even,2,1,cp-sat,9,ab\n")
    assert "small/gone" not in text
