"""Small cases to draw, and what must hold of every placement."""

from typing import Any, NamedTuple

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

small = settings(max_examples=60, deadline=None)


class Case(NamedTuple):
    loads: Any  # [layers, experts]
    speeds: Any  # [ranks]
    rank_slots: Any  # [ranks]

    def layer(self, i: int) -> "Case":
        return self._replace(loads=self.loads[i : i + 1])


def token_loads(layers: int, experts: int) -> st.SearchStrategy[Any]:
    """Whole numbers with many ties and zeros, or any."""
    few = st.integers(0, 3).map(float)
    many = st.floats(0.0, 1e6, allow_subnormal=False)
    return st.sampled_from([few, many]).flatmap(
        lambda elements: arrays.arrays(np.float64, (layers, experts), elements=elements)
    )


@st.composite
def cases(draw, equal: bool = False, spare: int = 4) -> Case:
    """At least a slot for each expert, at most `spare` slots on each rank beyond the fewest."""
    experts = draw(st.integers(1, 8))
    ranks = draw(st.integers(1, 5))
    need = -(-experts // ranks)
    extra = st.integers(0, spare)
    if equal:
        rank_slots = np.full(ranks, need + draw(extra))
    else:
        rank_slots = np.array(
            draw(st.lists(st.integers(0, need + spare), min_size=ranks, max_size=ranks))
        )
        while rank_slots.sum() < experts:
            rank_slots[rank_slots.argmin()] += 1
    speeds = draw(arrays.arrays(np.float64, ranks, elements=st.sampled_from([0.3, 0.9, 1.0, 1.2])))
    return Case(draw(token_loads(draw(st.integers(1, 3)), experts)), speeds, rank_slots)


def by_rank(row, rank_slots) -> list[list[int]]:
    """The experts on each rank, in the order of its slots, without empty slots."""
    parts = np.split(row, np.cumsum(rank_slots)[:-1])
    return [[int(e) for e in part if e >= 0] for part in parts]


def copies(row, experts: int) -> list[int]:
    return [int((row == e).sum()) for e in range(experts)]


def makespans(slots, loads, speeds, rank_slots) -> list[float]:
    """The slowest rank's time in each layer, tokens shared evenly among copies."""
    times = []
    for row, load in zip(slots, loads, strict=True):
        count = copies(row, load.size)
        times.append(
            max(
                sum(load[e] / count[e] for e in held) / speed
                for held, speed in zip(by_rank(row, rank_slots), speeds, strict=True)
            )
        )
    return times


def assert_complete(slots, experts: int, rank_slots) -> None:
    """The shape and type are right and every layer holds every expert."""
    assert slots.dtype == np.int64
    assert slots.shape[1] == sum(rank_slots)
    for row in slots:
        assert set(row) - {-1} == set(range(experts))


def assert_no_duplicates(slots, rank_slots) -> None:
    for row in slots:
        for held in by_rank(row, rank_slots):
            assert len(held) == len(set(held))
