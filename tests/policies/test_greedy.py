import numpy as np
import pytest
from hypothesis import given

from moeplace.errors import PolicyNotApplicable
from moeplace.policies.eplb import eplb
from moeplace.policies.greedy import greedy
from tests.policies.cases import cases, small


@small
@given(cases(equal=True))
def test_greedy_is_the_global_eplb(case):
    ranks, slots_per_rank = case.rank_slots.size, int(case.rank_slots[0])
    slots = greedy(case.loads, ranks, slots_per_rank)
    assert slots.dtype == np.int64
    assert (slots == eplb(case.loads, ranks, slots_per_rank)).all()


@pytest.mark.parametrize(
    ("experts", "ranks", "slots_per_rank"), [(256, 32, 9), (256, 320, 1), (60, 8, 40)]
)
@pytest.mark.parametrize("mean", [0.5, 20.0, 1e6])
def test_greedy_is_the_global_eplb_at_real_sizes(experts, ranks, slots_per_rank, mean):
    generator = np.random.default_rng(2)
    loads = generator.poisson(mean * generator.gamma(0.7, 1.0, (5, experts))).astype(np.float64)
    assert (greedy(loads, ranks, slots_per_rank) == eplb(loads, ranks, slots_per_rank)).all()


def test_greedy_takes_arrays_that_are_read_only_or_not_contiguous():
    loads = np.random.default_rng(3).random((6, 4))
    expected = eplb(loads.T, 4, 2)
    assert (greedy(loads.T, 4, 2) == expected).all()
    loads.setflags(write=False)
    assert (greedy(loads.T, 4, 2) == expected).all()
    assert (greedy(loads, 3, 2) == eplb(loads, 3, 2)).all()


def test_greedy_needs_a_slot_for_each_expert():
    with pytest.raises(PolicyNotApplicable, match="got 4 slots for 6 experts"):
        greedy(np.ones((1, 6)), 2, 2)
