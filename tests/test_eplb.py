"""The drop-in for DeepSeek's function."""

import numpy as np
import pytest
import torch

from moeplace.eplb import rebalance_experts
from moeplace.errors import ProblemError
from moeplace.integrations import planner, tables
from moeplace.policies.eplb import eplb
from tests.integrations.cases import loads, speeds


def test_never_worse_than_greedy_where_that_is_legal() -> None:
    random = np.random.default_rng(0)
    compared = 0
    for _ in range(60):
        gpus, size = int(random.integers(2, 9)), int(random.integers(1, 6))
        experts = int(random.integers(size, gpus * size + 1))
        weight = np.round(random.lognormal(4, 1, (4, experts)))
        slots, _, _ = rebalance_experts(torch.from_numpy(weight), gpus * size, 1, 1, gpus)
        greedy = eplb(weight, gpus, size)
        legal = ~tables.duplicates(greedy, gpus).any(axis=1)
        ours, theirs = (tables.seconds(m, weight, np.ones(gpus)) for m in (slots.numpy(), greedy))
        assert (ours <= theirs * (1 + 1e-12))[legal].all()
        compared += int(legal.sum())
    assert compared > 100


# the example of DeepSeek's repository
WEIGHT = torch.tensor(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    planner.warm()


@pytest.mark.parametrize("groups", [1, 4])
def test_the_published_example_is_balanced_at_least_as_well(groups: int) -> None:
    slots, places, count = rebalance_experts(WEIGHT, 16, groups, 2, 8)
    theirs = eplb(WEIGHT.double().numpy(), 8, 2, groups, 2 if groups > 1 else 1)
    weight = WEIGHT.double().numpy()
    ours = tables.seconds(slots.numpy(), weight, np.ones(8))
    # a duplicate is an uneven share, which legal maps of so few slots cannot always make up for
    legal = ~tables.duplicates(theirs, 8).any(axis=1)
    assert (ours <= tables.seconds(theirs, weight, np.ones(8)) * (1 + 1e-12))[legal].all()
    assert (ours <= tables.seconds(theirs, weight, np.ones(8)) * 1.05).all()
    assert slots.dtype == places.dtype == count.dtype == torch.int64
    assert count.sum(dim=1).tolist() == [16, 16]
    for layer in range(2):
        for expert in range(12):
            there = places[layer, expert]
            assert (slots[layer][there[there >= 0]] == expert).all()
            assert (there >= 0).sum() == count[layer, expert]
    assert not tables.duplicates(slots.numpy(), 8).any()


@pytest.mark.parametrize("groups", [1, 8])
def test_speeds_and_the_map_in_use_count(groups: int) -> None:
    speed, weight = torch.tensor(speeds()), torch.from_numpy(loads())
    slots, _, _ = rebalance_experts(weight, 288, groups, 4, 32, speeds=speed)
    times = tables.seconds(slots.numpy(), loads(), speeds())
    blind, _, _ = rebalance_experts(weight, 288, groups, 4, 32)
    assert times.sum() < tables.seconds(blind.numpy(), loads(), speeds()).sum() / 1.1
    drifted = torch.from_numpy(loads(epoch=1))
    again, _, _ = rebalance_experts(drifted, 288, groups, 4, 32, speeds=speed, current=slots)
    moved = tables.received(again.numpy(), slots.numpy(), 32, 256)
    assert moved.mean() < (80 if groups == 1 else 250)


def test_float_and_half_weights_and_lists_are_taken() -> None:
    for weight in (WEIGHT.float(), WEIGHT.to(torch.float16), WEIGHT.tolist()):
        assert rebalance_experts(weight, 16, 1, 1, 8)[0].shape == (2, 16)


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ((WEIGHT, 15, 1, 1, 8), "do not divide evenly over 8 GPUs"),
        ((WEIGHT, 16, 3, 2, 8), "do not divide evenly over 2 nodes"),
        ((WEIGHT, 16, 4, 3, 8), "do not divide evenly over 3 nodes"),
        ((WEIGHT, 8, 1, 1, 8), "too few"),
        ((WEIGHT[0], 16, 1, 1, 8), "must be"),
        ((-WEIGHT, 16, 1, 1, 8), "at least 0"),
        ((WEIGHT / 0, 16, 1, 1, 8), "finite"),
    ],
)
def test_what_does_not_fit_is_an_error_and_no_other_policy(arguments, rule: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ProblemError, match=rule):
        rebalance_experts(*arguments)


def test_options_that_do_not_fit() -> None:
    with pytest.raises(ProblemError, match="one for each of 8 GPUs"):
        rebalance_experts(WEIGHT, 16, 1, 1, 8, speeds=torch.ones(4))
    with pytest.raises(ProblemError, match="Current must hold"):
        rebalance_experts(WEIGHT, 16, 1, 1, 8, current=torch.zeros((2, 15), dtype=torch.int64))
    with pytest.raises(ProblemError, match="above 1e-09"):
        rebalance_experts(WEIGHT, 16, 1, 1, 8, speeds=torch.zeros(8))
