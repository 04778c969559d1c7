"""Maps of slots: what moves, what is missing, what is free."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moeplace.evaluate import evaluate
from moeplace.integrations import tables
from moeplace.plan import EMPTY, Plan
from tests.strategies import problem


@st.composite
def maps(draw, full=True):  # type: ignore[no-untyped-def]
    """(slots [2, ranks x size] without duplicates on a rank, ranks, experts)."""
    ranks, size = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    experts = draw(st.integers(size, 8))
    rows = [
        [e for _ in range(ranks) for e in draw(st.permutations(range(experts)))[:size]]
        for _ in range(2)
    ]
    slots = np.array(rows)
    if not full:
        slots[
            draw(
                st.lists(st.booleans(), min_size=slots.size, max_size=slots.size).map(
                    lambda x: np.array(x).reshape(slots.shape)
                )
            )
        ] = EMPTY
    return slots, ranks, experts


@given(st.data())
def test_alignment_keeps_the_experts_of_each_rank_and_the_slots_of_those_that_stay(data) -> None:  # type: ignore[no-untyped-def]
    new, ranks, experts = data.draw(maps())
    size = new.shape[1] // ranks
    old = np.array(
        [
            [
                e
                for _ in range(ranks)
                for e in data.draw(
                    st.lists(st.integers(-1, experts - 1), min_size=size, max_size=size)
                )
            ]
            for _ in range(2)
        ]
    )
    got = tables.aligned(new, old, ranks, experts)
    by_rank = (
        got.reshape(2, ranks, size),
        new.reshape(2, ranks, size),
        old.reshape(2, ranks, size),
    )
    assert (np.sort(by_rank[0], axis=2) == np.sort(by_rank[1], axis=2)).all()
    for layer in range(2):
        for rank in range(ranks):
            mine, was = by_rank[0][layer, rank].tolist(), by_rank[2][layer, rank].tolist()
            for expert in mine:
                if expert in was:
                    assert mine[was.index(expert)] == expert


@given(maps(full=False), st.integers(0, 1000))
def test_repair_serves_every_expert_and_fill_leaves_no_slot_free(drawn, seed: int) -> None:  # type: ignore[no-untyped-def]
    slots, ranks, experts = drawn
    if slots.shape[1] < experts:
        return
    loads = np.random.default_rng(seed).integers(0, 50, (2, experts)).astype(float)
    full = tables.filled(tables.repaired(slots, loads, ranks), loads, ranks)
    assert tables.serves(full, 2, slots.shape[1], experts)
    # only repair can have put an expert beside its replica; it never does where a slot is free
    assert not tables.duplicates(full, ranks).any()
    before = tables.held(slots, ranks, experts)
    assert (
        tables.received(full, slots, ranks, experts)
        == (tables.held(full, ranks, experts) & ~before).sum(axis=(1, 2))
    ).all()


def test_makespans_are_those_of_evaluate_also_with_duplicates() -> None:
    random = np.random.default_rng(4)
    loads, speeds = random.integers(1, 90, (3, 10)).astype(float), random.uniform(0.8, 1.2, 4)
    slots = np.concatenate([np.tile(np.arange(10), (3, 1)), random.integers(0, 10, (3, 2))], axis=1)
    plan = Plan(slots=slots, rank_slots=[3] * 4, experts=10, allow_duplicates=True)
    priced = evaluate(problem(loads[None], speeds, 3), plan)
    np.testing.assert_allclose(tables.seconds(slots, loads, speeds), priced.makespan[0])
    free = slots.copy()
    free[:, -2:] = EMPTY
    plan = Plan(slots=free, rank_slots=[3] * 4, experts=10)
    np.testing.assert_allclose(
        tables.seconds(free, loads, speeds),
        evaluate(problem(loads[None], speeds, 3), plan).makespan[0],
    )


def test_what_an_engine_can_go_on_with() -> None:
    good = np.array([[0, 1, 2, 0]])
    assert tables.serves(good, 1, 4, 3)
    assert not tables.serves(None, 1, 4, 3)
    for wrong in ([[0, 1, 1, 0]], [[0, 1, 2, -1]], [[0, 1, 2, 3]], [[0, 1, 2]]):
        assert not tables.serves(np.array(wrong), 1, 4, 3)
    assert not tables.serves(good.astype(float), 1, 4, 3)
