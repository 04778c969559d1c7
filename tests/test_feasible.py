import re
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings

from moeplace.constraints import Forbid, Pin
from moeplace.feasible import explain_infeasible
from moeplace.problem import Problem
from tests.strategies import problem, tiny_problems


def placeable(one: Problem) -> bool:
    """Whether some choice of ranks for each expert obeys pins, forbids and slots, by trial."""
    every = range(1, 1 << one.ranks)
    for layer in range(one.layers):
        bits = 1 << np.arange(one.ranks)
        allowed, pinned = one.allowed[layer] @ bits, one.pinned[layer] @ bits
        choices = [
            [m for m in every if not m & ~a and not p & ~m]
            for a, p in zip(allowed, pinned, strict=True)
        ]
        if not any(
            all(
                sum(mask >> rank & 1 for mask in masks) <= slots
                for rank, slots in enumerate(one.cluster.slots.tolist())
            )
            for masks in product(*choices)
        ):
            return False
    return True


@given(tiny_problems(max_experts=3, max_layers=2, constraints=True))
@settings(max_examples=5 * settings().max_examples)
def test_it_explains_exactly_what_has_no_placement(one: Problem) -> None:
    assert (explain_infeasible(one) is None) == placeable(one)


HALL = re.compile(r"layer \d+: (\d+) experts .* may lie only on \d+ ranks .* leave (\d+) slots\.")


@given(tiny_problems(max_experts=5, constraints=True))
@settings(max_examples=5 * settings().max_examples)
def test_the_experts_it_names_are_more_than_the_slots_open_to_them(one: Problem) -> None:
    found = explain_infeasible(one)
    clash = HALL.fullmatch(found) if found is not None else None
    if clash is not None:
        assert int(clash[1]) > int(clash[2])


def test_without_constraints_there_is_always_a_placement() -> None:
    assert explain_infeasible(problem([1, 2, 3], [1, 1], [0, 3])) is None


@pytest.mark.parametrize(
    ("slots", "rules", "message"),
    [
        (2, [Pin(1, 0), Forbid(1, 0)], "layer 0: expert 1 is pinned to rank 0, which is forbidden"),
        ([0, 3], [Pin(1, 0)], "layer 0: expert 1 is pinned to rank 0, which has no slots."),
        (
            [1, 3],
            [Pin(0, 0), Pin(2, 0)],
            "layer 0: 2 experts are pinned to rank 0, which has 1 slots",
        ),
        pytest.param(
            [1, 3],
            [Forbid(0, 1), Forbid(2, 1)],
            r"layer 0: 2 experts \(0, 2\) may lie only on 1 ranks \(0\), where pins leave 1 slots",
        ),
        pytest.param(
            [1, 3],
            [Pin(1, 0), Forbid(0, 1)],
            r"layer 0: 1 experts \(0\) may lie only on 1 ranks \(0\), where pins leave 0 slots",
        ),
        (
            2,
            [Forbid(0, 0), Forbid(0, 1)],
            r"layer 0: 1 experts \(0\) may lie only on 0 ranks",
        ),
    ],
)
def test_it_names_experts_and_ranks_that_clash(
    slots: object, rules: list[Pin | Forbid], message: str
) -> None:
    found = explain_infeasible(problem([1, 2, 3], [1, 1], slots, constraints=rules))
    assert found is not None
    assert re.match(message, found)


def test_it_names_the_layer() -> None:
    rules = [Forbid(2, rank, layer=1) for rank in range(2)]
    found = explain_infeasible(problem([[1, 2, 3]] * 3, [1, 1], 2, constraints=rules))
    assert found is not None
    assert found.startswith("layer 1: 1 experts (2)")


def test_pins_may_use_up_every_slot() -> None:
    rules = [Pin(e, g) for e in range(2) for g in range(2)]
    assert explain_infeasible(problem([1, 2], [1, 1], 2, constraints=rules)) is None
    found = explain_infeasible(problem([1, 2, 3], [1, 1], 2, constraints=rules))
    assert found is not None
    assert re.search(r"\(2\) may lie only on 2 ranks \(0, 1\), where pins leave 0 slots", found)


def test_a_long_list_of_experts_is_cut() -> None:
    rules = [Forbid(e, 1) for e in range(9)]
    found = explain_infeasible(problem(np.ones(9), [1, 1], [2, 8], constraints=rules))
    assert found is not None
    assert "9 experts (0, 1, 2, 3, 4, 5, ...)" in found
