"""Ranks are lost or added."""

import numpy as np
import pytest

from moeplace.errors import ProblemError
from moeplace.integrations import planner, tables
from moeplace.integrations.planner import Ask, propose
from moeplace.integrations.recover import with_ranks, without_ranks
from tests.integrations.cases import loads, speeds


@pytest.fixture(scope="module")
def old():  # type: ignore[no-untyped-def]
    planner.warm()
    return propose(Ask(loads=loads(), speeds=speeds(), slots_per_rank=9)).slots


@pytest.mark.parametrize("lost", [[0], [31], [3, 17]])
def test_the_ranks_left_serve_all_and_the_orphans_are_named(old, lost: list[int]) -> None:  # type: ignore[no-untyped-def]
    found = without_ranks(old, loads(), 32, lost, speeds())
    left = 32 - len(lost)
    alive = np.delete(np.arange(32), lost)
    kept = old.reshape(6, 32, 9)[:, alive].reshape(6, -1)
    assert tables.serves(found.plan.slots, 6, 9 * left, 256)
    assert not tables.duplicates(found.plan.slots, left).any()
    expected = {
        (layer, expert)
        for layer in range(6)
        for expert in set(range(256)) - set(kept[layer].tolist())
    }
    assert set(found.orphans) == expected
    assert expected
    assert found.plan.copies.sum() >= len(expected)
    assert (found.plan.copies < 100).all()
    assert (found.plan.after <= found.plan.bound * 1.08).all()


@pytest.mark.parametrize("added", [1, 4])
def test_new_ranks_are_filled_and_nothing_else_moves(old, added: int) -> None:  # type: ignore[no-untyped-def]
    found = with_ranks(old, loads(), 32, added)
    slots = found.plan.slots
    assert tables.serves(slots, 6, 9 * (32 + added), 256)
    assert (slots[:, :288] == old).all()
    assert (found.plan.copies == 9 * added).all()
    assert found.orphans == ()
    before = tables.seconds(old, loads(), np.ones(32))
    assert (found.plan.after <= before * 1.001).all()
    assert added == 1 or (found.plan.after < before).all()


def test_what_cannot_be_recovered_says_why(old) -> None:  # type: ignore[no-untyped-def]
    for lost, rule in (([40], "Rank 40"), (list(range(32)), "All 32"), ([1, 2, 3, 4], "too few")):
        with pytest.raises(ProblemError, match=rule):
            without_ranks(old, loads(), 32, lost)
    with pytest.raises(ProblemError, match="At least one"):
        with_ranks(old, loads(), 32, 0)
    with pytest.raises(ProblemError, match="map in use"):
        with_ranks(old[:, :287], loads(), 32, 1)
    with pytest.raises(ProblemError, match="speed each"):
        with_ranks(old, loads(), 32, 1, speeds())


def test_without_any_load_experts_count_alike(old) -> None:  # type: ignore[no-untyped-def]
    found = without_ranks(old, np.zeros((6, 256)), 32, [5])
    assert tables.serves(found.plan.slots, 6, 279, 256)
