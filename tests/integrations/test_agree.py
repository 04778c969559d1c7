"""One decision for all ranks, by a store; by a process group see `test_driver`."""

import threading
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from moeplace.integrations.agree import KEEP, TAKE, Answer, Disagreement, Store


def together(size: int, act: Any) -> list[Any]:
    """Run `act(store of the rank)` on threads that share a store; exceptions are results."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=20))
    found: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            found[rank] = act(Store(store, rank, size))
        except Exception as cause:
            found[rank] = cause

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(30)
    return found


def test_ranks_that_come_to_the_same_take_it() -> None:
    slots = np.arange(6).reshape(2, 3)

    def act(store: Store) -> Any:
        return [store.settle(lambda: Answer(TAKE, slots), 2, 3).slots for _ in range(3)]

    for answers in together(4, act):
        assert all((each == slots).all() for each in answers)


@pytest.mark.parametrize("odd", [0, 2])
def test_one_that_differs_makes_all_keep_the_map(odd: int) -> None:
    def act(store: Store) -> Any:
        mine = np.full((2, 3), int(store.rank == odd))
        return store.settle(lambda: Answer(TAKE, mine), 2, 3)

    assert all(isinstance(each, Disagreement) for each in together(4, act))


def test_one_that_does_not_come_makes_all_keep_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "PATIENCE", 0.3)

    def act(store: Store) -> Any:
        if store.rank == 1:
            return None
        return store.settle(lambda: Answer(TAKE, np.zeros((1, 1))), 1, 1)

    found = together(3, act)
    assert [type(each) for each in found] == [Disagreement, type(None), Disagreement]


def test_keys_come_in_rank_order() -> None:
    assert (
        together(3, lambda store: store.gather(f"GPU-{store.rank}"))
        == [["GPU-0", "GPU-1", "GPU-2"]] * 3
    )


def test_a_decision_to_keep_is_agreed_on_too() -> None:
    found = together(3, lambda store: store.settle(lambda: Answer(KEEP), 2, 3))
    assert [each.verdict for each in found] == [KEEP] * 3
