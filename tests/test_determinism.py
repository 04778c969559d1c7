"""Equal inputs, seed and work limit give equal bits on any CPU, thread count and process.

Kernels for a plainer CPU are compiled afresh in a folder of their own, which also shows what
happens where the package's folder holds no cache: compiled once, and never again.
"""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeplace.constraints import (
    Constraint,
    Forbid,
    MaxMoves,
    MaxReplicas,
    NodeGroups,
    ReplicaBudget,
    TokenCapacity,
)
from moeplace.plan import EMPTY, Plan
from moeplace.problem import Problem
from moeplace.result import Result
from moeplace.solve import solve
from tests.strategies import problem

ROOT = Path(__file__).resolve().parents[1]
NOTICE = "compiling kernels"


def make(routing: str = "even", layers: int = 4, windows: int = 1, slots: Any = 5) -> Problem:
    random = np.random.default_rng(12)
    # rounded and divided: logarithms differ in their last bit from CPU to CPU
    loads = np.round(random.lognormal(5, 1, (windows, layers, 32))) / 7
    return problem(loads, random.uniform(0.85, 1.15, 8), slots, routing=routing)


def drifted(routing: str) -> Problem:
    current = Plan(
        slots=[np.append(np.arange(32), [EMPTY] * 8)] * 4, rank_slots=[5] * 8, experts=32
    )
    return replace(make(routing), constraints=[MaxMoves(current, per_layer=5, total=16)])


def on_nodes() -> Problem:
    one = make()
    return replace(
        one, cluster=replace(one.cluster, nodes=np.arange(8) // 2), constraints=[NodeGroups(8)]
    )


def ruled(*rules: Constraint, **options: Any) -> Problem:
    one = make(**options)
    return replace(one, constraints=[*one.constraints, *rules])


def tight(factor: float, **options: Any) -> Problem:
    """Token capacities at so many times the fair share of the fullest layer."""
    one = make(**options)
    fair = float(one.tokens.sum(axis=2).max()) / one.ranks
    return replace(one, constraints=[TokenCapacity(fair * factor)])


KINDS: dict[str, Callable[[], Problem]] = {
    "even": make,
    "weighted": lambda: make("weighted"),
    "weighted, few spare slots": lambda: make("weighted", slots=[5, 5, 4, 4, 4, 4, 4, 4]),
    "few moves": lambda: drifted("even"),
    "few moves, weighted": lambda: drifted("weighted"),
    "two windows": lambda: make(windows=2),
    "two windows, the worst": lambda: replace(make(windows=2), objective="worst"),
    "groups on nodes": on_nodes,
    "forbidden": lambda: replace(make(), constraints=[Forbid(e, 3) for e in range(20)]),
    "capacity": lambda: tight(1.02),
    "capacity, weighted": lambda: tight(1.01, routing="weighted"),
    "capacity, two windows": lambda: tight(1.15, windows=2),
    "most replicas": lambda: ruled(MaxReplicas(2)),
    "replica budget": lambda: ruled(ReplicaBudget(4 * 32 + 12)),
    "replica budget, weighted": lambda: ruled(ReplicaBudget(4 * 32 + 12), routing="weighted"),
    "cvar": lambda: replace(make(windows=3), objective="cvar", cvar_alpha=0.5),
}


def digest(result: Result) -> str:
    """What must not differ: the plan's bits, its price, its bound and the work."""
    state = hashlib.sha256(result.plan.slots.tobytes())
    if result.plan.split is not None:
        state.update(result.plan.split.tobytes())
    numbers = (result.objective, result.bound.total, float(result.work))
    state.update(np.array(numbers).tobytes() + result.bound.per_layer.tobytes())
    return state.hexdigest()


def digests(workers: int = 1, kinds: Iterable[str] = KINDS) -> list[str]:
    return [
        digest(solve(KINDS[kind](), work_limit=100_000, gap=0, seed=7, workers=workers))
        for kind in kinds
    ]


@pytest.fixture(scope="module")
def here() -> dict[str, str]:
    """Digest of each kind in this process."""
    return dict(zip(KINDS, digests(), strict=True))


def elsewhere(
    workers: int = 1, kinds: Iterable[str] = KINDS, **environment: str
) -> tuple[dict[str, str], str]:
    """Digest of each kind in a process with that environment, and what it wrote to stderr."""
    kinds = list(kinds)
    script = (
        "from tests.test_determinism import digests\n"
        f"print(*digests({workers}, {kinds}), sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(kinds, done.stdout.split(), strict=True)), done.stderr


def assert_alike(found: dict[str, str], wanted: dict[str, str]) -> None:
    differ = [kind for kind, value in found.items() if value != wanted[kind]]
    assert differ == []


def optional_features() -> list[str]:
    """CPU features that numpy has code for beyond its baseline, and that this CPU has."""
    from numpy._core import _multiarray_umath as core

    return [name for name in core.__cpu_dispatch__ if core.__cpu_features__.get(name)]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_neither_repetition_nor_workers_change_a_bit(workers: int, here: dict[str, str]) -> None:
    assert_alike(dict(zip(KINDS, digests(workers), strict=True)), here)


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"},
        {"PYTHONHASHSEED": "2", "OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"},
    ],
)
def test_another_process_gives_the_same_bits(
    environment: dict[str, str], here: dict[str, str]
) -> None:
    assert_alike(elsewhere(workers=2, **environment)[0], here)


def test_numpy_without_wide_vectors_gives_the_same_bits(here: dict[str, str]) -> None:
    features = optional_features()
    if not features:
        pytest.skip("numpy has no code beyond its baseline for this CPU")
    assert_alike(elsewhere(NPY_DISABLE_CPU_FEATURES=" ".join(features))[0], here)


def test_kernels_for_a_plain_cpu_give_the_same_bits_and_are_compiled_once(
    here: dict[str, str], cache: pytest.Cache
) -> None:
    plain = {
        "NUMBA_CPU_NAME": "generic",
        # kept from run to run: to compile all kernels takes longer than all other tests here
        "NUMBA_CACHE_DIR": str(cache.mkdir("numba-generic")),
        "NPY_DISABLE_CPU_FEATURES": " ".join(optional_features()),
    }
    found, said = elsewhere(kinds=["even", "weighted", "few moves"], **plain)
    assert said.count(NOTICE) <= 1, "it is said once that kernels are compiled"
    assert_alike(found, here)
    found, said = elsewhere(kinds=["even", "weighted", "few moves"], **plain)
    assert said == "", "a second process compiles nothing and says nothing"
    assert_alike(found, here)


def test_seeds_lead_elsewhere() -> None:
    one = make()
    ends = {digest(solve(one, work_limit=100_000, gap=0, seed=seed)) for seed in range(4)}
    assert len(ends) > 1
