import subprocess
import sys

from moeplace.search.compiling import compile_seconds, load

SCRIPT = """
import logging, sys
logging.basicConfig(stream=sys.stdout, format="%(message)s")
from moeplace.search.compiling import compile_seconds
from moeplace.search.construct import construct
from moeplace.search.state import State
from tests.strategies import problem
before = compile_seconds()
for _ in range(2):
    construct(State.of(problem([3, 1], [1, 1], 2)))
print(compile_seconds() > before)
"""


def test_loading_twice_is_no_work() -> None:
    load()
    spent = compile_seconds()
    load()
    assert compile_seconds() == spent


def test_compiling_is_told_once_and_timed(tmp_path) -> None:  # type: ignore[no-untyped-def]
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        check=True,
        capture_output=True,
        text=True,
        env={"NUMBA_CACHE_DIR": str(tmp_path), "PATH": "", "PYTHONPATH": "."},
    )
    assert found.stdout.splitlines() == [
        "compiling kernels, once after installation; later runs load them from a cache",
        "True",
    ]
