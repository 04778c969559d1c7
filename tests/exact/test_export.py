"""Models for other solvers, and their solutions read back."""

from pathlib import Path
from typing import Any

import msgspec
import pulp
import pytest

import moeplace as mp
from moeplace.exact.export import read_solution, write_model
from tests.strategies import problem

ONE = problem([9.0, 7, 5, 3, 1], [1, 0.8, 1.2], 2)


def _cbc(model: Path) -> dict[str, float]:
    """Solve a model file by CBC, apart from our own model code."""
    reader = pulp.LpProblem.fromMPS(str(model))
    variables, made = reader
    with pytest.warns(DeprecationWarning, match="PuLP 4"):
        solver = pulp.PULP_CBC_CMD(msg=False)
    made.solve(solver)
    return {name: variable.varValue or 0.0 for name, variable in variables.items()}


@pytest.mark.parametrize("routing", ["even", "weighted"])
def test_a_solution_of_the_file_is_the_optimum(tmp_path: Path, routing: str) -> None:
    one = problem([9.0, 7, 5, 3, 1], [1, 0.8, 1.2], 2, routing=routing)
    result = mp.solve(one, gap=0)
    model = tmp_path / "model.mps"
    unit = write_model(one, model, "mps", result.evaluation)
    values = _cbc(model)
    lines = [f"{name} {value}" for name, value in values.items()]
    (tmp_path / "model.sol").write_text("\n".join(["# objective", *lines]))
    plan = read_solution(one, tmp_path / "model.sol", tmp_path / "model.json")
    assert mp.evaluate(one, plan).objective == pytest.approx(result.objective, rel=1e-4)
    names = msgspec.json.decode((tmp_path / "model.json").read_bytes())
    assert names["unit"] == unit
    assert names["start_objective"] * unit == pytest.approx(result.objective)


@pytest.mark.parametrize("kind", ["lp", "mps"])
def test_the_start_is_a_solution_of_the_file(tmp_path: Path, kind: str) -> None:
    result = mp.solve(ONE, gap=0)
    write_model(ONE, tmp_path / f"m.{kind}", kind, result.evaluation)  # type: ignore[arg-type]
    assert (tmp_path / f"m.{kind}").stat().st_size > 100
    plan = read_solution(ONE, tmp_path / "m.mst", tmp_path / "m.json")
    assert mp.evaluate(ONE, plan).objective == pytest.approx(result.objective)


def test_solution_files_of_several_solvers_are_read(tmp_path: Path) -> None:
    result = mp.solve(ONE, gap=0)
    write_model(ONE, tmp_path / "m.lp", "lp", result.evaluation)
    pairs = [line.split() for line in (tmp_path / "m.mst").read_text().splitlines()[1:]]
    texts = {
        "cbc": "\n".join(f"  {n} {a}   {b}   0" for n, (a, b) in enumerate(pairs)),
        "cplex": "\n".join(f'<variable name="{a}" index="1" value="{b}"/>' for a, b in pairs),
        "scip": "\n".join(f"{a}    {b}   (obj:0)" for a, b in pairs),
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        if name == "cplex":  # the index comes first there
            (tmp_path / name).write_text(text.replace(' index="1"', ""))
        plan = read_solution(ONE, tmp_path / name, tmp_path / "m.json")
        assert mp.evaluate(ONE, plan).objective == pytest.approx(result.objective), name


def test_what_is_no_plan_is_refused(tmp_path: Path) -> None:
    write_model(ONE, tmp_path / "m.lp", "lp", None)
    names = tmp_path / "m.json"
    (tmp_path / "s").write_text("nothing here\n")
    with pytest.raises(mp.FormatError, match="names no replica"):
        read_solution(ONE, tmp_path / "s", names)
    (tmp_path / "s").write_text("x_l0_e0_g0_c1 1\n")
    with pytest.raises(mp.PlanError, match="misses expert 1"):
        read_solution(ONE, tmp_path / "s", names)
    everything = msgspec.json.decode(names.read_bytes())["held"]
    (tmp_path / "s").write_text("\n".join(f"{name} 1" for name in everything))
    with pytest.raises(mp.PlanError, match="which has 2 slots"):
        read_solution(ONE, tmp_path / "s", names)
    other = problem([1.0, 2], [1, 1], 1)
    with pytest.raises(mp.FormatError, match="another problem"):
        read_solution(other, tmp_path / "s", names)
    with pytest.raises(mp.FormatError, match="must end in .lp"):
        write_model(ONE, tmp_path / "m.txt", "lp", None)


def test_what_no_plan_changes_is_in_the_objective_of_the_file(tmp_path: Path) -> None:
    one = problem([[[2.0, 1.0]], [[0.0, 0.0]]], [1, 0.5], 1, base_load=[1.0, 3.0])  # idle, then 6
    result = mp.solve(one, gap=0)
    unit = write_model(one, tmp_path / "m.mps", "mps", result.evaluation)
    values = _cbc(tmp_path / "m.mps")
    assert values["constant"] == 1.0
    _, made = pulp.LpProblem.fromMPS(str(tmp_path / "m.mps"))
    price = sum(factor * values[column.name] for column, factor in made.objective.items())
    assert price * unit == pytest.approx(result.objective, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"routing": "ascend"}, "do not know ascend routing"),
        ({"constraints": [mp.MaxOffNode(0.9)]}, "do not know MaxOffNode"),
    ],
)
def test_what_the_formulation_does_not_know_is_refused(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    one = problem([7, 5, 4, 3, 2], [1, 1, 1.2], [2, 2, 2], **options)
    with pytest.raises(mp.ProblemError, match=said):
        write_model(one, tmp_path / "model.lp", "lp", None)
    with pytest.raises(mp.ProblemError, match=said):
        mp.solve(one, method="highs", time_limit=5)
    assert not list(tmp_path.iterdir())
