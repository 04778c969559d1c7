"""`moeplace warm`: what it says of the cache, and how it ends."""

import json
import os
import subprocess
import sys
from pathlib import Path

from moeplace.integrations import planner

ROOT = Path(__file__).resolve().parents[2]


def warm(*arguments: str, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", "from moeplace.cli import main; main()", "warm", *arguments],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout


def test_warm_says_whether_a_new_process_finds_the_kernels(tmp_path: Path) -> None:
    planner.warm()
    assert warm() == (0, "Kernels are in the cache: engines plan with them.\n")
    code, told = warm("--check", "--json", NUMBA_CACHE_DIR=str(tmp_path))
    assert (code, json.loads(told)) == (1, {"cached": False})
    assert not list(tmp_path.rglob("*.nbc")), "--check compiles nothing"
