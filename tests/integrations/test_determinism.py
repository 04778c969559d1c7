"""Eight processes under uneven load, with other thread counts, plan the same bits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moeplace.integrations import planner

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import hashlib, sys
from tests.integrations.cases import loads, speeds
from moeplace.integrations import planner
from moeplace.integrations.planner import Ask
from moeplace.integrations.settings import UNRESTRICTED, Effort
light = sys.argv[1] == "light"
plan = planner._light if light else planner.propose
state = hashlib.sha256()
old = None
for epoch in range(2):
    for groups, nodes in ((1, 1), (8, 4)) if epoch and not light else ((1, 1),):
        ask = Ask(loads=loads(epoch=epoch), speeds=speeds(), slots_per_rank=9, old=old, groups=groups, nodes=nodes)
        for effort in (Effort(), UNRESTRICTED):
            found = plan(ask, effort)
            assert found.compiled != light
            for array in (found.slots, found.after, found.before, found.copies):
                state.update(array.tobytes())
    old = found.slots
print(state.hexdigest())
"""


@pytest.mark.parametrize("kind", ["kernels", "light"])
def test_eight_processes_under_uneven_load(kind: str) -> None:
    planner.warm()
    burn = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(1)]
    try:
        running = []
        for rank in range(8):
            threads = str([1, 2, 3, 8][rank % 4])
            environment = os.environ | dict.fromkeys(
                ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"),
                threads,
            )
            nice = ["nice", "-n", "5"] if rank % 2 else []
            running.append(
                subprocess.Popen(
                    [*nice, sys.executable, "-c", SCRIPT, kind], cwd=ROOT, env=environment,
                    stdout=subprocess.PIPE, text=True,
                )
            )  # fmt: skip
        found = [each.communicate(timeout=200)[0].strip() for each in running]
    finally:
        for each in burn:
            each.kill()
            each.wait()
    assert len(found[0]) == 64
    assert found == [found[0]] * 8
