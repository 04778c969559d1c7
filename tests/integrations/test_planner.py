"""Plans for engines: how near to the bound, what they move, with kernels and without."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moeplace.errors import ProblemError
from moeplace.instances import generate
from moeplace.integrations import planner, tables
from moeplace.integrations.planner import Ask, propose
from moeplace.integrations.settings import UNRESTRICTED, Effort
from moeplace.policies.eplb import eplb
from tests.integrations.cases import contiguous, loads, speeds

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    planner.warm()


def light(ask: Ask, effort: Effort):  # type: ignore[no-untyped-def]
    return planner._light(ask, effort)


@pytest.mark.parametrize("seed", [100, 101])
def test_all_layers_of_the_large_shape_are_within_a_thousandth_of_the_bound(seed: int) -> None:
    one = generate("A", seed).aggregate()
    found = propose(Ask(loads=one.mean_load[0], speeds=one.cluster.speeds, slots_per_rank=9))
    assert found.compiled
    assert (found.after <= found.bound * (1 + 1e-3)).all()
    assert tables.serves(found.slots, 58, 288, 256)
    assert not tables.duplicates(found.slots, 32).any()


@pytest.mark.parametrize(("shape", "size"), [("A", 9), ("B", 16), ("C", 5), ((3, 64, 72, 8), 9)])
def test_better_than_greedy_at_equal_speeds_with_and_without_kernels(shape, size: int) -> None:  # type: ignore[no-untyped-def]
    one = generate(shape, 101, speeds="equal").aggregate()
    ask = Ask(loads=one.mean_load[0][:6], speeds=one.cluster.speeds, slots_per_rank=size)
    greedy = tables.seconds(eplb(ask.loads, ask.ranks, size), ask.loads, ask.speeds)
    for found in (propose(ask), light(ask, UNRESTRICTED)):
        assert found.after.sum() < greedy.sum()
        assert (found.after >= found.bound * (1 - 1e-12)).all()


@pytest.mark.parametrize("plan", [propose, light])
def test_drift_is_met_with_few_moves_and_what_stays_keeps_its_slot(plan) -> None:  # type: ignore[no-untyped-def]
    base = Ask(loads=loads(), speeds=speeds(), slots_per_rank=9)
    old = propose(base).slots
    ask = Ask(loads=loads(epoch=1), speeds=speeds(), slots_per_rank=9, old=old)
    found = plan(ask, Effort())
    assert (found.before > found.bound * 1.1).all()
    assert (found.after <= found.bound * 1.02).all()
    assert (found.copies == tables.received(found.slots, old, 32, 256)).all()
    assert found.copies.mean() < 72  # of 288: from nothing it would be 250
    assert ((found.slots != old).sum(axis=1) == found.copies).all()
    again = plan(
        Ask(loads=ask.loads, speeds=ask.speeds, slots_per_rank=9, old=found.slots), Effort()
    )
    assert (again.slots == found.slots).all(), "nothing is left to save"
    assert again.copies.sum() == 0


def test_a_layer_moves_only_if_that_pays() -> None:
    old = propose(Ask(loads=loads(), speeds=speeds(), slots_per_rank=9)).slots
    drifted = loads(epoch=1)
    drifted[::2] = loads()[::2]
    ask = Ask(loads=drifted, speeds=speeds(), slots_per_rank=9, old=old)
    found = propose(ask, Effort())
    assert (found.slots[::2] == old[::2]).all()
    assert (found.slots[1::2] != old[1::2]).any(axis=1).all()
    nothing = propose(ask, Effort(min_saving=0.9))
    assert (nothing.slots == old).all()
    dear = propose(ask, Effort(move_cost=0.01))
    assert dear.copies.sum() < found.copies.sum()
    assert (dear.before - dear.after >= 0.01 * dear.copies * dear.before).all()


@pytest.mark.parametrize("most", [0, 1, 6, 30])
def test_no_more_moves_than_allowed(most: int) -> None:
    old = contiguous(6, 288, 256)
    ask = Ask(loads=loads(), speeds=speeds(), slots_per_rank=9, old=old)
    for found in (propose(ask, Effort(max_moves=most)), light(ask, Effort(max_moves=most))):
        assert (tables.received(found.slots, old, 32, 256) <= most).all()
        assert (found.after <= found.before).all()
        assert most < 6 or (found.after < found.before).any()


def test_groups_stay_on_their_nodes() -> None:
    ask = Ask(loads=loads(), speeds=speeds(), slots_per_rank=9, groups=8, nodes=4)
    found = propose(ask)
    old = found.slots
    drifted = Ask(
        loads=loads(epoch=1), speeds=speeds(), slots_per_rank=9, groups=8, nodes=4, old=old
    )
    for slots in (old, propose(drifted, Effort()).slots):
        assert tables.serves(slots, 6, 288, 256)
        node = np.arange(288) // 72
        for row in slots:
            for group in range(8):
                assert np.unique(node[row // 32 == group]).size == 1


def test_layers_without_load_keep_their_row_or_get_a_legal_one() -> None:
    weight = loads()
    weight[2] = 0
    fresh = propose(Ask(loads=weight, speeds=speeds(), slots_per_rank=9))
    assert tables.serves(fresh.slots, 6, 288, 256)
    old = contiguous(6, 288, 256)
    kept = propose(Ask(loads=weight, speeds=speeds(), slots_per_rank=9, old=old), Effort())
    assert (kept.slots[2] == old[2]).all()


def test_slots_that_do_not_fit_are_refused_with_the_rule() -> None:
    some = np.ones((1, 4))
    for size, ranks, rule in ((1, 3, "too few"), (5, 2, "would hold one twice")):
        with pytest.raises(ProblemError, match=rule):
            propose(Ask(loads=some, speeds=np.ones(ranks), slots_per_rank=size))
    with pytest.raises(ProblemError, match="do not divide"):
        propose(Ask(loads=some, speeds=np.ones(4), slots_per_rank=1, groups=4, nodes=3))


def test_a_process_without_cached_kernels_compiles_none_and_plans_all_the_same(
    tmp_path: Path,
) -> None:
    script = (
        "from tests.integrations.cases import loads, speeds\n"
        "from moeplace.integrations.planner import Ask, cached, propose\n"
        "found = propose(Ask(loads=loads(), speeds=speeds(), slots_per_rank=9))\n"
        "from moeplace.search.construct import _construct\n"
        "print(found.compiled, cached(), len(_construct.overloads), *found.notes, sep='|')\n"
        "print((found.after / found.bound).max() < 1.01)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True,
        env={"NUMBA_CACHE_DIR": str(tmp_path), "PATH": ""},
    )  # fmt: skip
    first, second = done.stdout.splitlines()
    assert first.startswith("False|False|0|planned without kernels")
    assert "moeplace warm" in first
    assert second == "True"
    assert not list(tmp_path.rglob("*.nbc"))
    assert "compiling" not in done.stderr
