"""Plans written for an engine are what the engine loads, and read back the same.

`engines` says in a few lines what each engine does with a file, also what it does not check.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moeplace.errors import FormatError, PlanError, ProblemError
from moeplace.formats import PLAN_FORMATS, read_plan, write_plan
from moeplace.plan import Plan
from tests.formats import engines
from tests.formats.plans import (
    EMPTY_SLOT,
    GOOD,
    SHARED,
    TWICE,
    UNEQUAL,
    full_plans,
    held,
    ordered,
)

ENGINES = sorted(set(PLAN_FORMATS) - {"moeplace"})
NAMES = {"omni": "plan.npy", "deepseek": "plan.npz", "tensorrt-llm": "plan.yaml"}
#: Options that each format needs when written and read, for `GOOD` and the like.
WRITE: dict[str, dict[str, Any]] = {
    "sglang": {"first_moe_layer": 1},
    "tensorrt-llm": {"first_moe_layer": 1},
}
READ: dict[str, dict[str, Any]] = {
    "deepseek": {"ranks": 2},
    "sglang": {"first_moe_layer": 1, "ranks": 2},
    "tensorrt-llm": {"ranks": 2},
    "vllm": {"ranks": 2},
}
repeated = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def saved(plan: Plan, folder: Path, name: str, **options: Any) -> Path:
    path = folder / NAMES.get(name, "plan.json")
    write_plan(plan, path, name, **(WRITE.get(name, {}) | options))
    return path


@repeated
@given(plan=full_plans(), first=st.integers(0, 3))
def test_sglang_loads_what_was_planned(tmp_path: Path, plan: Plan, first: int) -> None:
    total = first + plan.layers
    path = saved(plan, tmp_path, "sglang", first_moe_layer=first, num_layers=total)
    moe = range(first, total)
    loaded = engines.sglang(path, ranks=plan.ranks, model_layers=total, moe_layers=moe)
    assert loaded == held(plan)
    dense = engines.sglang(path, ranks=1, model_layers=total, moe_layers=range(first))
    assert all(set(row[0]) == set(range(plan.experts)) for row in dense)
    assert held(read_plan(path, "sglang", first_moe_layer=first, ranks=plan.ranks)) == held(plan)


@pytest.mark.parametrize("plan", [GOOD, TWICE])
def test_sglang_loads_a_torch_file(tmp_path: Path, plan: Plan) -> None:
    pytest.importorskip("torch")
    path = tmp_path / "plan.pt"
    write_plan(plan, path, "sglang", first_moe_layer=2)
    total = 2 + plan.layers
    loaded = engines.sglang(path, ranks=2, model_layers=total, moe_layers=range(2, total))
    assert loaded == held(plan)
    back = read_plan(path, "sglang", first_moe_layer=2, ranks=2)
    assert held(back) == held(plan)
    assert back.allow_duplicates == plan.allow_duplicates


@repeated
@given(plan=full_plans())
def test_vllm_ascend_loads_what_was_planned(tmp_path: Path, plan: Plan) -> None:
    path = saved(plan, tmp_path, "vllm-ascend")
    assert engines.vllm_ascend(path) == held(plan)
    assert held(read_plan(path, "vllm-ascend")) == held(plan)


@repeated
@given(plan=full_plans(), first=st.integers(0, 3), mtp=st.integers(0, 2))
def test_tensorrt_llm_loads_what_was_planned(
    tmp_path: Path, plan: Plan, first: int, mtp: int
) -> None:
    total = first + plan.layers + mtp
    path = saved(
        plan, tmp_path, "tensorrt-llm", first_moe_layer=first, num_layers=total, mtp_layers=mtp
    )
    shape = {"ranks": plan.ranks, "experts": plan.experts}
    loaded = engines.tensorrt_llm(path, **shape, moe_layers=range(first, total))
    assert loaded[: plan.layers] == held(plan)
    back = held(read_plan(path, "tensorrt-llm", ranks=plan.ranks))
    assert back == loaded


@repeated
@given(plan=full_plans())
def test_omni_loads_what_was_planned(tmp_path: Path, plan: Plan) -> None:
    path = saved(plan, tmp_path, "omni")
    assert engines.omni(path) == ordered(held(plan))
    back = read_plan(path, "omni")
    assert held(back) == ordered(held(plan))
    assert back.experts == plan.experts


def test_omni_holds_unequal_ranks_and_slots_that_are_empty_in_some_layers(tmp_path: Path) -> None:
    for plan in (UNEQUAL, EMPTY_SLOT):
        path = saved(plan, tmp_path, "omni")
        back = read_plan(path, "omni")
        assert back.rank_slots.tolist() == plan.rank_slots.tolist()
        assert ordered(held(back)) == engines.omni(path) == ordered(held(plan))
    assert read_plan(path, "omni", slots=3).rank_slots.tolist() == [3, 3]
    with pytest.raises(FormatError, match="rank 0 holds 2 experts in a layer, more than the 1"):
        read_plan(path, "omni", slots=1)


@repeated
@given(plan=full_plans())
def test_vllm_map_loads_what_was_planned(tmp_path: Path, plan: Plan) -> None:
    path = saved(plan, tmp_path, "vllm")
    assert engines.vllm(path, ranks=plan.ranks, layers=plan.layers) == held(plan)
    assert held(read_plan(path, "vllm", ranks=plan.ranks)) == held(plan)


@repeated
@given(plan=full_plans(alike=True))
def test_vllm_row_loads_what_was_planned(tmp_path: Path, plan: Plan) -> None:
    path = saved(plan, tmp_path, "vllm", form="row")
    assert engines.vllm(path, ranks=plan.ranks, layers=plan.layers) == held(plan)
    assert held(read_plan(path, "vllm", ranks=plan.ranks, layers=plan.layers)) == held(plan)


@repeated
@given(plan=full_plans(alike=True, replicas=False))
def test_vllm_ranks_load_what_was_planned(tmp_path: Path, plan: Plan) -> None:
    path = saved(plan, tmp_path, "vllm", form="expert-to-rank")
    ranks = engines.vllm_ranks(path)
    assert all(expert in held(plan)[0][rank] for expert, rank in enumerate(ranks))
    back = read_plan(path, "vllm", ranks=plan.ranks, layers=plan.layers)
    assert held(back) == ordered(held(plan))


@repeated
@given(plan=full_plans())
def test_deepseek_maps_are_what_was_planned(tmp_path: Path, plan: Plan) -> None:
    path = saved(plan, tmp_path, "deepseek")
    assert engines.deepseek(path, ranks=plan.ranks) == held(plan)
    assert held(read_plan(path, "deepseek", ranks=plan.ranks)) == held(plan)


# --- refused, not repaired ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ENGINES)
def test_shares_are_refused_unless_dropped_knowingly(tmp_path: Path, name: str) -> None:
    with pytest.raises(PlanError, match=f"stores shares .* the format {name} has no place"):
        saved(SHARED, tmp_path, name)
    assert not list(tmp_path.iterdir())
    saved(SHARED, tmp_path, name, drop_split=True)


@pytest.mark.parametrize("name", sorted(set(ENGINES) - {"omni"}))
@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (UNEQUAL, "has 1 slots on rank 1 but 2 on rank 0: .* needs as many on every rank"),
        (EMPTY_SLOT, r"leaves slot 3 \(rank 1\) of layer 1 EMPTY: .* needs an expert in every"),
    ],
)
def test_what_rows_cannot_hold_is_refused(
    tmp_path: Path, name: str, plan: Plan, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        saved(plan, tmp_path, name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["omni", "vllm-ascend"])
def test_duplicates_are_refused_where_the_engine_refuses_them(tmp_path: Path, name: str) -> None:
    with pytest.raises(PlanError, match="holds expert 2 twice on rank 1 in layer 0: .* at most"):
        saved(TWICE, tmp_path, name)


def test_omni_has_no_place_for_slots_that_are_never_used(tmp_path: Path) -> None:
    plan = Plan(slots=[[0, 1, 2, -1]], rank_slots=[2, 2], experts=3)
    with pytest.raises(PlanError, match="leaves 1 of the 2 slots of rank 1 EMPTY in every layer"):
        saved(plan, tmp_path, "omni")


@pytest.mark.parametrize("name", ["sglang", "tensorrt-llm"])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_layers": 4}, PlanError, "covers model layers 1 to 2, .* 4 layers: layer 3 is missi"),
        ({"num_layers": 2}, PlanError, "has 2 layers: layer 2 and later ones do not exist"),
        ({"first_moe_layer": None}, FormatError, "needs the option first_moe_layer"),
        ({"first_moe_layer": -1}, ProblemError, "first_moe_layer must be a whole number from 0"),
        ({"first_moe_layer": True}, ProblemError, "must be a whole number .* got True"),
        ({"form": "map"}, FormatError, "Option form is not one of the format"),
    ],
)
def test_layers_of_the_model_are_checked(
    tmp_path: Path, name: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        saved(GOOD, tmp_path, name, **options)


def test_a_missing_mtp_layer_is_refused_and_can_be_filled(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="layer 3 is missing"):
        saved(GOOD, tmp_path, "tensorrt-llm", num_layers=4)
    path = saved(GOOD, tmp_path, "tensorrt-llm", num_layers=4, mtp_layers=1)
    rows = yaml.safe_load(path.read_text())["initial_global_assignments"]
    assert rows == {1: [0, 1, 2, 0], 2: [1, 2, 0, 1], 3: [0, 1, 2, 0]}


def test_vllm_forms_hold_one_row_only_if_all_layers_are_alike(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="differs between layers 0 and 1 at slot 0: the form row"):
        saved(GOOD, tmp_path, "vllm", form="row")
    with pytest.raises(PlanError, match="has 2 replicas of expert 0 in layer 0"):
        saved(GOOD, tmp_path, "vllm", form="expert-to-rank")
    swapped = Plan(slots=[[0, 1], [1, 0]], rank_slots=[1, 1], experts=2)
    with pytest.raises(PlanError, match="differs between layers 0 and 1 at expert 0"):
        saved(swapped, tmp_path, "vllm", form="expert-to-rank")
    with pytest.raises(PlanError, match="must be one of map, row, expert-to-rank, got 'list'"):
        saved(GOOD, tmp_path, "vllm", form="list")


@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        ("vllm-ascend", "plan.txt", "takes a name that ends in .json only"),
        ("sglang", "plan.txt", r"must end in .json or .pt, not '.txt'"),
        ("omni", "plan.json", "is a .npy file"),
    ],
)
def test_names_that_the_engine_refuses(tmp_path: Path, name: str, file: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        write_plan(GOOD, tmp_path / file, name, **WRITE.get(name, {}))


def test_options_of_other_formats_are_errors(tmp_path: Path) -> None:
    with pytest.raises(
        FormatError, match="num_layers is not one of the format omni, which takes n"
    ):
        write_plan(GOOD, tmp_path / "x.npy", "omni", num_layers=3)
    with pytest.raises(FormatError, match="ranks is not one of the format moeplace, which takes n"):
        read_plan(tmp_path / "x.json", ranks=3)
    with pytest.raises(FormatError, match="slots .* format vllm, which takes layers, ranks when r"):
        read_plan(tmp_path / "x.json", "vllm", slots=3)


@pytest.mark.parametrize("name", ["deepseek", "sglang", "tensorrt-llm", "vllm"])
def test_ranks_are_asked_for_and_must_divide_the_slots(tmp_path: Path, name: str) -> None:
    path = saved(GOOD, tmp_path, name)
    options = {k: v for k, v in READ[name].items() if k != "ranks"}
    with pytest.raises(FormatError, match=r"does not say how many ranks .* \(ranks=\)"):
        read_plan(path, name, **options)
    with pytest.raises(FormatError, match="has 4 slots a layer, which 3 ranks cannot share"):
        read_plan(path, name, **options, ranks=3)


# --- mutated files: where the engine would fail or say nothing, we say what and where ------------

JSON: dict[str, list[tuple[Callable[[Any], Any], str]]] = {
    "sglang": [
        (lambda f: f | {"version": 1}, 'unknown field "version"'),
        (lambda f: {"logical_count": [[1]]}, "loads, not a plan. Read it with read_loads"),
        (lambda f: {}, "lacks the required field"),
        (lambda f: {"physical_to_logical_map": [[0, 1, 2, 0]]}, "none is left after the 1 dense"),
        (lambda f: _set(f, [*_MAP, 1], [0, 1, 2]), r"map\[1\] has 3 slots but .*map\[0\] has 4"),
        (lambda f: _set(f, [*_MAP, 1, 2], 0), "misses expert 2 in layer 0"),
        (lambda f: _set(f, [*_MAP, 1, 2], 9), "names expert 9 at layer 0, slot 2, but 4 slots"),
        (lambda f: _set(f, [*_MAP, 1, 2], -1), r"\[1\]\[2\]: expected `int` >= 0: -1"),
        (lambda f: _set(f, [*_MAP, 1, 2], 0.5), r"\[1\]\[2\]: expected `int`, got `float`"),
    ],
    "vllm-ascend": [
        (lambda f: f | {"moe_layer_count": 3}, r"moe_layer_count is 3, but 2 are listed"),
        (lambda f: _set(f, [*_LAYER, "layer_id"], 2), r"\[1\].layer_id is 2, expected 1"),
        (lambda f: _set(f, [*_LAYER, "device_count"], 3), r"device_count is 3, but 2 are listed"),
        (lambda f: _set(f, [*_DEVICE, "device_id"], 0), r"device_list\[1\].device_id is 0, expec"),
        (lambda f: _set(f, [*_DEVICE, "device_expert"], [0]), r"\[1\] has 1 slots but .*\[0\] ha"),
        (lambda f: _set(f, [*_DEVICE, "device_expert"], [1, 1]), r"\[1\] holds expert 1 again"),
        (lambda f: _set(f, [*_DEVICE, "device_expert"], [1, 7]), "names expert 7 at layer 1"),
        (lambda f: _set(f, [*_DEVICE, "x"], 1), 'unknown field "x"'),
        (lambda f: {"moe_layer_count": 0, "layer_list": []}, "must agree, at least one"),
    ],
    "vllm": [
        (lambda f: [], r"\$\[0\] has 0 slots"),
        (lambda f: [[0, 1, 2, 0], [0, 1]], r"\$\[1\] has 2 slots but \$\[0\] has 4"),
        (lambda f: [0, 1, 2, 0], r"one row for all layers: say how many .* \(layers="),
        (lambda f: {"expert_to_ep_rank": [0, 0, 1]}, "3 experts on 2 ranks unevenly"),
        (lambda f: {"expert_to_ep_rank": [0, 5]}, r"\[1\] is rank 5, but there are 2"),
        (lambda f: {"expert_to_rank": [0, 1]}, 'lacks the required field "expert_to_ep_rank"|unkn'),
        (lambda f: "x", r"\$: expected `array`, got `str`"),
    ],
}
_MAP = ["physical_to_logical_map"]
_LAYER = ["layer_list", 1]
_DEVICE = ["layer_list", 1, "device_list", 1]


def _set(file: Any, place: list[Any], value: Any) -> Any:
    inner = file
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return file


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [(name, change, message) for name, cases in JSON.items() for change, message in cases],
)
def test_mutated_json_is_refused_with_its_place(
    tmp_path: Path, name: str, change: Callable[[Any], Any], message: str
) -> None:
    path = saved(GOOD, tmp_path, name)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(FormatError, match=message) as caught:
        read_plan(path, name, **READ.get(name, {}))
    assert str(caught.value).startswith(f"{path}: ")


def test_what_engines_accept_silently_or_die_of(tmp_path: Path) -> None:
    """The writer's checks stand for those that the engine lacks."""
    path = saved(GOOD, tmp_path, "sglang")
    file = json.loads(path.read_text())
    short = {"physical_to_logical_map": [row[:2] for row in file["physical_to_logical_map"]]}
    path.write_text(json.dumps(short))
    engines.sglang(path, ranks=2, model_layers=3, moe_layers=range(1, 3))  # says nothing
    with pytest.raises(FormatError, match="misses expert 0 in layer 1|names expert"):
        read_plan(path, "sglang", **READ["sglang"])
    path.write_text(json.dumps(file | {"num_slots": 4}))
    with pytest.raises(TypeError):
        engines.sglang(path, ranks=2, model_layers=3, moe_layers=range(1, 3))
    path = saved(GOOD, tmp_path, "tensorrt-llm")
    with pytest.raises(KeyError):
        engines.tensorrt_llm(path, ranks=2, experts=3, moe_layers=range(1, 4))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("num_slots: 4", "num_slots: 5", r"\[1\] has 4 slots but num_slots is 5"),
        ("num_slots: 4", "num_slots: x", "num_slots must be a whole number .* got 'x'"),
        ("num_slots: 4\n", "", "lacks the key num_slots"),
        ("num_slots", "slots", "has the unknown key 'slots'"),
        ("  2: [", "  1: [", "line 4: the key '1' stands twice"),
        ("  2: [", "  2: [x, ", r"\[2\]\[0\] must be a whole number .* got 'x'"),
        ("  2: [", "  2: [-1, ", "got -1"),
        ("  2: [", "  '2': [", "the layer '2' must be a whole number"),
        ("  2: [1, 2, 0, 1]", "  2: [1, 1, 0, 1]", "misses expert 2 in layer 1"),
        ("  2: [", "  2: [[], ", r"\[2\]\[0\] must be a whole number .* got a list"),
        ("  2: [", "  2: &a [", "line 4: anchors and aliases are not read"),
        ("  2: [", "  2: !!set [", "line 4: tags are not read"),
        ("  2: [", "  2: ]", "is not YAML at line 4, column 6"),
        ("  2: [1, 2, 0, 1]", "  2: 5", r"\[2\] is a number, expected a list"),
        ("_iter: 0", "_iter: [0]", "got a list"),
        ("_iter: 0", "_iter: 0\n---\n1", "has 2 documents"),
        ("  2: [", "  ? [a]\n  : [", "line 4: a key must be a number or text"),
    ],
)
def test_mutated_yaml_is_refused_with_its_place(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    path = saved(GOOD, tmp_path, "tensorrt-llm")
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(FormatError, match=message) as caught:
        read_plan(path, "tensorrt-llm", ranks=2)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_gap_between_tensorrt_layers_is_refused(tmp_path: Path) -> None:
    plan = Plan(slots=[[0, 1]] * 4, rank_slots=[1, 1], experts=2)
    path = saved(plan, tmp_path, "tensorrt-llm", first_moe_layer=3)
    path.write_text(path.read_text().replace("  5: [0, 1]\n", ""))
    with pytest.raises(FormatError, match="has the layers 4 and 6 but none between"):
        read_plan(path, "tensorrt-llm", ranks=2)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((2, 2), np.int32), r"shape \(2, 2\), expected 0 and 1 on the axes \[ranks"),
        (np.ones((2, 2, 3)), "float64 entries"),
        (np.full((2, 2, 3), 2, np.int32), "holds 2 at rank 0, layer 0, expert 0"),
        (np.zeros((2, 2, 3), np.int32), "places no expert at all"),
        (np.eye(3, dtype=np.int32)[:2][:, None], "misses expert 2 in layer 0"),
        (np.zeros((0, 2, 3), np.int32), r"shape \(0, 2, 3\)"),
    ],
)
def test_mutated_omni_arrays_are_refused(tmp_path: Path, array: Any, message: str) -> None:
    path = tmp_path / "plan.npy"
    np.save(path, array)
    with pytest.raises(FormatError, match=message):
        read_plan(path, "omni")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logcnt": [[2, 1, 1], [1, 1, 2]]}, "logcnt disagrees with phy2log at layer 1, expert 1"),
        ({"logcnt": [[2, 1, 1]]}, r"logcnt has the shape \(1, 3\), expected \(2, 3\)"),
        ({"phy2log": [[0, 1, 2, -1], [1, 2, 0, 1]]}, "smallest entry -1"),
        ({"phy2log": [[0.5]]}, "phy2log has float64 entries"),
        ({"log2phy": [[[0, 1], [2, 3], [1, 2]]] * 2}, "log2phy disagrees with phy2log at layer 0"),
        ({"log2phy": None}, "lacks the array 'log2phy'"),
        ({"more": [1]}, "holds the array 'more', expected"),
    ],
)
def test_mutated_deepseek_maps_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = saved(GOOD, tmp_path, "deepseek")
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files} | change
    np.savez(path, **{name: np.asarray(a) for name, a in arrays.items() if a is not None})
    with pytest.raises(FormatError, match=message):
        read_plan(path, "deepseek", ranks=2)


def test_maps_with_duplicates_are_read_as_such(tmp_path: Path) -> None:
    for name in ("sglang", "tensorrt-llm", "vllm", "deepseek"):
        path = saved(TWICE, tmp_path, name)
        back = read_plan(path, name, **READ[name])
        assert back.allow_duplicates
        assert held(back) == held(TWICE)
