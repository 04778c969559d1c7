"""What an import costs, what a first solve says, and what time limits count."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: Packages that take long to import, and that importing moeplace must not.
HEAVY = ("numba", "llvmlite", "scipy.optimize", "networkx", "ortools", "pulp", "rich", "typer")


def fresh(script: str, **environment: str) -> list[str]:
    """Lines that a script prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


SAY = f"import sys; print(*(name for name in {HEAVY} if name in sys.modules), sep='\\n', end='')"


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert fresh(f"import moeplace; {SAY}") == []


def test_describing_and_pricing_need_nothing_heavy_either() -> None:
    script = (
        "import numpy as np; import moeplace as mp\n"
        "cluster = mp.Cluster.from_speeds([1.0, 0.9], 2)\n"
        "one = mp.Problem(mp.LoadHistogram(tokens=np.ones((1, 1, 3))), cluster)\n"
        "plan = mp.Plan(slots=[[0, 1, 2, 0]], rank_slots=[2, 2], experts=3)\n"
        "assert mp.evaluate(one, plan).legal\n"
    )
    assert fresh(script + SAY) == []


def test_a_solve_under_even_routing_needs_no_solver() -> None:
    script = (
        "import moeplace as mp; from moeplace.instances import generate\n"
        "mp.solve(generate((1, 128, 136, 8), 0), work_limit=100)\n"
    )
    assert set(fresh(script + SAY)) <= {"numba", "llvmlite"}


def test_every_name_of_the_package_is_there() -> None:
    script = "import moeplace as mp; print(*(n for n in mp.__all__ if not hasattr(mp, n)), end='')"
    assert fresh(script) == []


# What is said when kernels compile


def test_compiling_is_told_once_and_never_again_from_the_cache(tmp_path: Path) -> None:
    script = (
        "import logging, sys\n"
        "logging.basicConfig(stream=sys.stdout, format='%(message)s')\n"
        "import moeplace.search.compiling\n"
        "from moeplace.search.construct import construct\n"
        "from moeplace.search.state import State\n"
        "from tests.strategies import problem\n"
        "for _ in range(2):\n"
        "    construct(State.of(problem([3, 1], [1, 1], 2)))\n"
    )
    told = fresh(script, NUMBA_CACHE_DIR=str(tmp_path))
    assert told == ["compiling kernels, once after installation; later runs load them from a cache"]
    assert fresh(script, NUMBA_CACHE_DIR=str(tmp_path)) == [], "now from the cache"


def test_neither_compiling_nor_loading_counts_against_the_time_limit() -> None:
    # a fresh process loads kernels for a third of a second, far more than it is given
    script = (
        "import moeplace as mp\n"
        "one = mp.instances.generate((2, 64, 72, 8), 0).aggregate()\n"
        "print(mp.solve(one, time_limit=0.05, gap=0.0).work > 0)\n"
    )
    assert fresh(script) == ["True"]


@pytest.mark.parametrize(
    ("weighted", "several", "near", "rule"),
    [
        (False, False, False, "planes"),
        (True, True, False, "planes"),
        (True, True, False, "mp.MaxReplicas(3)"),
        (False, False, False, "mp.TokenCapacity(700.0)"),
        (True, False, False, "mp.TokenCapacity(700.0)"),
        (False, True, False, "mp.TokenCapacity(700.0)"),
        (False, False, False, "mp.ReplicaBudget(132)"),
        (True, False, False, "mp.ReplicaBudget(132)"),
        (False, True, True, "mp.MaxMoves(plan, per_layer=4)"),
    ],
)
def test_all_kernels_that_a_problem_needs_are_rehearsed(
    weighted: bool, several: bool, near: bool, rule: str
) -> None:
    script = f"""
import sys
import numpy as np
import moeplace as mp
from moeplace.search.portfolio import rehearse

def kernels():
    modules = [m for name, m in list(sys.modules.items()) if name.startswith("moeplace.")]
    return {{
        (name, str(signature))
        for module in modules
        for name, kernel in vars(module).items()
        for signature in getattr(kernel, "overloads", ())
    }}

loads = np.random.default_rng(0).lognormal(5, 1, ({1 + several}, 2, 64))
loads *= 5000 / loads.sum(axis=2, keepdims=True)
cluster = mp.Cluster.from_speeds(np.linspace(0.9, 1.1, 8), 9)
plan = mp.Plan(slots=[[*range(64)] + [-1] * 8] * 2, rank_slots=cluster.slots, experts=64)
if {rule == "planes"}:
    cluster = mp.Cluster.from_planes([9.0], [1.0], [0.1], np.linspace(0.9, 1.1, 8), 9)
one = mp.Problem(
    mp.LoadHistogram(tokens=loads, passes=np.ones({1 + several})), cluster,
    constraints=[{rule if rule != "planes" else ""}],
    routing={"weighted" if weighted else "even"!r}, objective="cvar",
)
rehearse({weighted}, {several}, {near}, False, nonlinear={rule == "planes"})
before = kernels()
found = mp.solve(one, work_limit=200_000, gap=0.0)
assert found.evaluation is not None, found.reason
print(*(kernels() - before), sep="\\n", end="")
"""
    assert fresh(script) == []
