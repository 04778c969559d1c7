"""The layer on 1, 2 and 4 true ranks: right numbers, and every row where the plan says."""

from typing import Any

import numpy as np
import pytest

from moeplace.plan import EMPTY
from moeplace.replay.launch import run_job
from moeplace.replay.routing import expected_slot_tokens
from moeplace.replay.settings import Runtime
from tests.replay.jobs import KERNELS, LayerJob, plans, routing

#: Relative error: float32, and bfloat16 with sums in float32.
GATES = {"float32": 3e-6, "bfloat16": 8e-3}


@pytest.fixture(scope="module", params=[1, 2, 4])
def found(request: pytest.FixtureRequest) -> tuple[int, dict[Any, Any]]:
    """What all ranks measured, with one launch for each world size."""
    ranks: int = request.param
    runtime = Runtime(ranks=ranks, hidden=32, intermediate=48, device="cpu", timeout=120)
    return ranks, run_job(LayerJob(runtime))


def test_outputs_agree_with_a_dense_float64_reference(found: tuple[int, dict[Any, Any]]) -> None:
    ranks, errors = found
    for name in plans(ranks):
        for kernel, dtype in KERNELS:
            assert errors[name, kernel, dtype] < GATES[dtype], (name, kernel, dtype)


def test_every_slot_receives_tokens_of_its_expert_and_every_token_its_experts(
    found: tuple[int, dict[Any, Any]],
) -> None:
    ranks, answers = found
    ids = routing().experts_of[0]
    for name, plan in plans(ranks).items():
        got = answers[name, "integers"]
        for expert in range(plan.experts):
            slots = np.flatnonzero(plan.slots[0] == expert)
            tokens = sorted(token for slot in slots for token in got["received"][slot])
            assert tokens == np.flatnonzero((ids == expert).any(axis=1)).tolist(), name
        for slot in np.flatnonzero(plan.slots[0] == EMPTY):
            assert got["received"][slot] == []
        assert got["answers"] == (ids + 1).sum(axis=1).tolist(), name


def test_shares_are_realised_within_a_few_tokens(found: tuple[int, dict[Any, Any]]) -> None:
    ranks, answers = found
    for name, plan in plans(ranks).items():
        expected = expected_slot_tokens(plan, routing().counts[0], 0)
        got = [len(slot) for slot in answers[name, "integers"]["received"]]
        assert np.abs(expected - got).max() <= 1 + ranks, name


def test_ranks_from_which_no_token_starts_take_part(found: tuple[int, dict[Any, Any]]) -> None:
    ranks, errors = found
    for name in plans(ranks):
        assert errors[name, "one token"] < GATES["float32"], name
