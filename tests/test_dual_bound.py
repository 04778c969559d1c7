"""The bound by prices, against every legal plan of tiny problems."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplace.bounds import longest, lower_bound
from moeplace.claims import Prices
from moeplace.constraints import Forbid, MaxMoves, MaxReplicas, NodeGroups, Pin
from moeplace.dual_bound import Priced
from moeplace.problem import Problem
from tests.brute_force import optimum
from tests.strategies import legal_plans, plan, problem, tiny_problems


@st.composite
def ruled(draw: st.DrawFn) -> Problem:
    """Tiny problems with every rule: pins, forbids, limits, moves and groups on nodes."""
    one = draw(tiny_problems(max_experts=5, constraints=True, limits=True))
    rules = list(one.constraints)
    if draw(st.booleans()):
        moves = draw(st.integers(0, 2))
        rules.append(MaxMoves(draw(legal_plans(one)), per_layer=moves))
    if draw(st.integers(0, 3)) == 3:
        nodes = draw(st.lists(st.integers(0, 1), min_size=one.ranks, max_size=one.ranks))
        group = st.lists(st.integers(0, 2), min_size=one.experts, max_size=one.experts)
        groups = np.minimum(draw(group), one.experts - 1)
        one = replace(one, cluster=replace(one.cluster, nodes=nodes))
        rules.append(NodeGroups(groups))
    return replace(one, constraints=rules)


@st.composite
def some_prices(draw: st.DrawFn, one: Problem) -> Prices:
    """Any prices that are not negative."""

    def array(*shape: int) -> Any:
        size = int(np.prod(shape))
        price = st.one_of(st.just(0.0), st.floats(0, 3, allow_subnormal=False))
        return np.reshape(draw(st.lists(price, min_size=size, max_size=size)), shape)

    parts = len(Priced(one, 0, 0).parts)
    return Prices(
        token=array(one.ranks),
        slot=array(one.ranks),
        cut=array(draw(st.integers(0, 3)), one.ranks),
        copy=float(array(1)[0]),
        replica=float(array(1)[0]),
        worth=array(0 if one.routing == "even" else parts, one.experts),
    )


@given(st.data(), ruled())
@settings(max_examples=6 * settings().max_examples)
def test_no_prices_refute_what_a_plan_reaches(data: st.DataObject, one: Problem) -> None:
    best = optimum(one)
    if math.isinf(best):
        return
    case = Priced(one, 0, 0)
    for _ in range(5):
        assert not case.refutes(data.draw(some_prices(one)), best * (1 + 1e-9))


@given(ruled())
@settings(max_examples=6 * settings().max_examples)
def test_the_best_prices_never_exceed_the_optimum(one: Problem) -> None:
    best = optimum(one)
    if not one.tokens.any():
        return
    case = Priced(one, 0, 0)
    low = float(lower_bound(one).per_layer[0, 0]) * 0.5
    high = float(longest(one, one.tokens, one.base)[0, 0])
    found, prices = case.bound(low, high)
    assert found <= best * (1 + 1e-9)
    if prices is not None:
        assert case.fits(prices)
        assert case.refutes(prices, found * (1 - 1e-11))
