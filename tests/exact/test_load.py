"""Solvers beside highspy, in processes of their own: a clash of libraries is a crash."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

SOLVE = """
import moeplace as mp
from moeplace.exact.export import write_model
one = mp.read_instance("instances/small/flashlb-even.json")
def run(name):
    if name == "export":
        write_model(one, "model.lp", "lp", None)
    elif name in ("highspy", "pulp", "ortools.sat.python.cp_model"):
        __import__(name)
    else:
        assert mp.solve(one, name, time_limit=5, warm_start="none").evaluation is not None
for name in {names}:
    run(name)
"""


@pytest.mark.parametrize(
    "names",
    [
        ["highs", "cbc", "highs"],
        ["export", "highs"],
        ["cbc", "gscip", "cp-sat", "highs"],
        pytest.param(["highspy", "highs", "cbc"], id="highspy-first"),
        pytest.param(["pulp", "highs"], id="pulp-first"),
        pytest.param(["pulp", "ortools.sat.python.cp_model", "cp-sat"], id="both-first"),
    ],
)
def test_every_solver_works_where_highspy_is_installed(names: list[str], tmp_path: object) -> None:
    if find_spec("highspy") is None:
        pytest.skip("highspy is not installed")
    done = _python(SOLVE.format(names=names), str(tmp_path))
    assert done.returncode == 0, done.stderr


def test_a_crash_to_come_is_refused(tmp_path: object) -> None:
    if find_spec("highspy") is None or sys.platform != "linux":
        pytest.skip("highspy is not installed, or its symbols are not visible")
    names = ["pulp", "ortools.sat.python.cp_model", "highs"]
    done = _python(SOLVE.format(names=names), str(tmp_path))
    assert done.returncode == 1
    assert "PuLP was imported before OR-Tools" in done.stderr


def _python(code: str, folder: str) -> "subprocess.CompletedProcess[str]":
    code = f"import sys; sys.path[:0] = {[each for each in sys.path if each]!r}\n{code}"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
