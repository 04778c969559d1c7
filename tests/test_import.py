"""What `import moeplace` loads: numpy and our own modules; heavy libraries when they are needed."""

import subprocess
import sys

HEAVY = (
    "joblib", "networkx", "numba", "ortools", "pandas", "plotly", "pulp", "rich", "safetensors",
    "scipy", "torch", "typer", "yaml",
)  # fmt: skip


def loaded(code: str) -> list[str]:
    """Heavy libraries in a process that ran `code`."""
    found = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules)"],
        capture_output=True,
        check=True,
        text=True,
    )
    return [name for name in HEAVY if name in found.stdout.split()]


def test_importing_moeplace_loads_nothing_heavy() -> None:
    assert loaded("import moeplace; assert 'moeplace.solve' in sys.modules") == []


def test_making_and_pricing_a_problem_loads_nothing_heavy() -> None:
    code = """
import moeplace as mp
loads = mp.LoadHistogram(tokens=[[[3.0, 2.0, 1.0]]])
problem = mp.Problem(loads, mp.Cluster.from_speeds([1, 1], 2, speed_unit="relative"))
plan = mp.Plan(slots=[[0, 1, 2, 0]], rank_slots=[2, 2], experts=3)
assert mp.evaluate(problem, plan).legal
"""
    assert loaded(code) == []


def test_the_command_line_loads_no_solver() -> None:
    known = loaded("import moeplace.cli; moeplace.cli.add_all_commands()")
    assert {*known} <= {"rich", "typer", "yaml"}
