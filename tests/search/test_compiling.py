"""What an import costs, what a first solve says, and which clock compilation runs on."""

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from moeplace.search.compiling import _Clock, compile_seconds, load
from moeplace.solve import solve
from tests.strategies import problem

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
        "mp.solve(generate((1, 8, 10, 2), 0), work_limit=100)\n"
    )
    assert set(fresh(script + SAY)) <= {"numba", "llvmlite"}


def test_every_name_of_the_package_is_there() -> None:
    script = "import moeplace as mp; print(*(n for n in mp.__all__ if not hasattr(mp, n)), end='')"
    assert fresh(script) == []


# The clock of compilation


def test_compiling_is_timed_once_though_it_nests(caplog: pytest.LogCaptureFixture) -> None:
    clock = _Clock()
    with caplog.at_level(logging.WARNING, logger="moeplace"):
        began = time.perf_counter()
        clock.on_start(None)
        clock.on_start(None)  # a kernel that this one calls
        clock.on_end(None)
        assert clock.total == 0.0
        clock.on_end(None)
        spent = time.perf_counter() - began
    assert 0 < clock.total <= spent
    before = clock.total
    clock.on_start(None)
    clock.on_end(None)
    assert before < clock.total <= spent + time.perf_counter() - began
    assert [r.message.split(",")[0] for r in caplog.records] == ["compiling kernels"]


def test_loading_happens_once_and_its_time_is_no_compilation() -> None:
    load()
    before = compile_seconds()
    load()
    assert compile_seconds() == before


def test_compiling_is_told_once_and_timed(tmp_path: Path) -> None:
    script = (
        "import logging, sys\n"
        "logging.basicConfig(stream=sys.stdout, format='%(message)s')\n"
        "from moeplace.search.compiling import compile_seconds\n"
        "from moeplace.search.construct import construct\n"
        "from moeplace.search.state import State\n"
        "from tests.strategies import problem\n"
        "before = compile_seconds()\n"
        "for _ in range(2):\n"
        "    construct(State.of(problem([3, 1], [1, 1], 2)))\n"
        "print(compile_seconds() > before)\n"
    )
    told, spent = fresh(script, NUMBA_CACHE_DIR=str(tmp_path))
    assert told == ("compiling kernels, once after installation; later runs load them from a cache")
    assert spent == "True"
    assert fresh(script, NUMBA_CACHE_DIR=str(tmp_path)) == ["False"], "now from the cache"


def test_a_solve_does_not_count_what_was_compiled_before() -> None:
    one = problem(np.arange(1, 9), [1, 1], 5)
    solve(one, work_limit=0)
    compiled = compile_seconds()
    found = solve(one, work_limit=100)
    assert compile_seconds() == compiled, "kernels are compiled once"
    assert found.seconds >= 0
