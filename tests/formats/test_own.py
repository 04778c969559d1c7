"""Our plan file holds all of a plan, to the last bit."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moeplace.errors import FormatError, PlanError
from moeplace.evaluate import evaluate
from moeplace.formats import read_plan, write_plan
from moeplace.hardware import Cluster
from moeplace.loads import LoadHistogram
from moeplace.plan import Plan
from moeplace.problem import Problem

GOOD: dict[str, Any] = {
    "format": "moeplace-plan",
    "version": 1,
    "experts": 3,
    "rank_slots": [2, 2],
    "slots": [[0, 1, 2, 0], [0, 1, 2, -1]],
    "split": None,
}


def same(mine: Plan, theirs: Plan) -> bool:
    splits = (mine.split is None) == (theirs.split is None)
    if splits and mine.split is not None and theirs.split is not None:
        splits = mine.split.shape == theirs.split.shape and (mine.split == theirs.split).all()
    return bool(
        splits
        and np.array_equal(mine.slots, theirs.slots)
        and np.array_equal(mine.rank_slots, theirs.rank_slots)
        and mine.experts == theirs.experts
        and mine.allow_duplicates == theirs.allow_duplicates
    )


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Plans with unequal slots, EMPTY slots, and shares of none, two or three axes."""
    experts, layers = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    extra = draw(st.lists(st.integers(0, experts), max_size=3))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rank_slots = [experts, *extra]
    slots = np.full((layers, sum(rank_slots)), -1)
    slots[:, :experts] = np.arange(experts)
    start = experts
    for size in extra:
        for layer in range(layers):
            used = int(random.integers(0, size + 1))
            slots[layer, start : start + used] = random.permutation(experts)[:used]
        start += size
    axes = draw(st.sampled_from([0, 2, 3]))
    if axes == 0:
        return Plan(slots=slots, rank_slots=rank_slots, experts=experts)
    windows = draw(st.integers(1, 3)) if axes == 3 else 1
    split = random.uniform(0.01, 1.0, (windows, *slots.shape)) * (slots >= 0)
    for expert in range(experts):
        held = slots == expert
        split = np.where(held, split / (split * held).sum(axis=2, keepdims=True), split)
    return Plan(
        slots=slots,
        rank_slots=rank_slots,
        experts=experts,
        split=split if axes == 3 else split[0],
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(plan=plans())
def test_a_plan_read_back_is_the_same(tmp_path: Path, plan: Plan) -> None:
    write_plan(plan, tmp_path / "plan.json")
    back = read_plan(tmp_path / "plan.json")
    assert same(plan, back)
    windows = 1 if plan.split is None or plan.split.ndim == 2 else plan.split.shape[0]
    loads = np.random.default_rng(0).uniform(0, 100, (windows, plan.layers, plan.experts))
    problem = Problem(
        LoadHistogram(tokens=loads),
        Cluster.from_speeds(np.linspace(0.7, 1.3, plan.ranks), plan.rank_slots),
        routing="weighted",
    )
    assert evaluate(problem, back).objective == evaluate(problem, plan).objective


def test_a_map_with_duplicates_is_kept_as_such(tmp_path: Path) -> None:
    plan = Plan(slots=[[0, 0, 1]], rank_slots=[2, 1], experts=2, allow_duplicates=True)
    write_plan(plan, tmp_path / "plan.json")
    assert same(plan, read_plan(tmp_path / "plan.json"))


def test_the_file_is_the_documented_json(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_plan(Plan(slots=GOOD["slots"], rank_slots=[2, 2], experts=3), path)
    assert msgspec.json.decode(path.read_bytes()) == GOOD


def test_split_may_be_left_out(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(msgspec.json.encode({k: v for k, v in GOOD.items() if k != "split"}))
    assert read_plan(path).split is None


BAD: dict[str, tuple[dict[str, Any], type[ValueError], str]] = {
    "other format": ({"format": "moeplace-instance"}, FormatError, "expected .moeplace-plan"),
    "other version": ({"version": 2}, FormatError, "version is 2, but versions known of .*: 1"),
    "typo": ({"slot": []}, FormatError, 'unknown field "slot"'),
    "no experts": ({"experts": 0}, FormatError, r"\$.experts: expected `int` >= 1: 0"),
    "huge expert": ({"slots": [[10**30]]}, FormatError, r"\$.slots\[0\]\[0\]: expected `int` <="),
    "text": ({"slots": [["0"]]}, FormatError, r"\$.slots\[0\]\[0\]: expected `int`, got `str`"),
    "fraction": ({"slots": [[0.5]]}, FormatError, r"expected `int`, got `float`: 0.5"),
    "ragged": ({"slots": [[0, 1, 2, 0], [0]]}, FormatError, r"\$.slots\[1\] has 1 entries"),
    "flat split": ({"split": [1, 1]}, FormatError, r"\$.split must be .* 2 or 3 deep"),
    "split text": ({"split": [[1, "x"]]}, FormatError, r"\$.split\[0\]\[1\]: expected `float`"),
    "missing expert": ({"slots": [[0, 1, 1, 0]]}, PlanError, "misses expert 2 in layer 0"),
    "unknown expert": ({"slots": [[0, 1, 2, 3]]}, PlanError, "at most 2: got 3.0 at layer 0"),
    "duplicate": ({"slots": [[0, 0, 1, 2]]}, PlanError, "expert 0 twice on rank 0"),
    "slots do not sum": ({"rank_slots": [2, 1]}, PlanError, "4 slots a layer but its ranks have 3"),
    "wrong shares": (
        {"split": [[1, 1, 1, 1], [1, 1, 1, 0]]},
        PlanError,
        "Shares of expert 0 sum to 2",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD)
def test_bad_plans_are_refused(
    tmp_path: Path, change: dict[str, Any], error: type[ValueError], message: str
) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(msgspec.json.encode(GOOD | change))
    with pytest.raises(error, match=message) as caught:
        read_plan(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_unknown_formats_are_named(tmp_path: Path) -> None:
    plan = Plan(slots=[[0]], rank_slots=[1], experts=1)
    with pytest.raises(FormatError, match=r"format 'pickle' is unknown: choose one of .*moeplace"):
        write_plan(plan, tmp_path / "x", format="pickle")
    with pytest.raises(FormatError, match="format 'pickle' is unknown"):
        read_plan(tmp_path / "x", format="pickle")
    with pytest.raises(PlanError, match="Only a Plan can be written, got dict"):
        write_plan({}, tmp_path / "x")  # type: ignore[arg-type]
