"""The bound by prices, against every legal plan of tiny problems."""

import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moeplace as mp
from moeplace.bounds import longest, lower_bound, recompute
from moeplace.certificate import _exact_prices, _exactly, _rational, check, write_certificate
from moeplace.claims import Prices
from moeplace.constraints import Forbid, MaxMoves, MaxReplicas, NodeGroups, Pin
from moeplace.dual_bound import DUAL, Priced, price_layers, worth_pricing
from moeplace.problem import Problem
from tests.brute_force import optimum
from tests.strategies import legal_plans, plan, problem, tiny_problems

#: Two hot experts confined to the first of two ranks.
CONFINED = problem([4, 3, 1, 1], [1, 1], 3, constraints=[Forbid(0, 1), Forbid(1, 1)])


def grouped() -> Problem:
    """The first group may use one rank of the first node."""
    rules = [Forbid(e, g) for e in (0, 1) for g in (1, 2, 3)]
    one = problem([3, 3, 1, 1], [1] * 4, 2)
    return replace(
        one, cluster=replace(one.cluster, nodes=[0, 0, 1, 1]), constraints=[NodeGroups(2), *rules]
    )


def held(moves: int) -> Problem:
    """Experts 0 and 1 lie on the first two ranks only, which are not the two slowest."""
    current = plan([0, 1, 0, -1, 2, -1], [2, 2, 2])
    rule = MaxMoves(current, per_layer=moves)
    return problem([9, 4, 6], [1] * 3, 2, routing="weighted", constraints=[rule])


#: Problems that only prices decide, with the bound computed by hand.
DECIDED: dict[str, tuple[Problem, float]] = {
    "forbids": (CONFINED, 7),
    "forbids, weighted": (
        problem(
            [6, 4, 1, 1], [1] * 3, 3, routing="weighted", constraints=[Forbid(0, 2), Forbid(1, 2)]
        ),
        5,
    ),
    # three replicas share 6 tokens, one of them on the slow rank
    "a pin to a slow rank": (problem([6, 1, 1], [4, 4, 0.5], 2, constraints=[Pin(0, 2)]), 4),
    # two of three hot experts share a rank of speed 2; tokens alone would say 3.75
    "three hot experts for two ranks": (
        problem([5, 5, 5, 1], [2, 2, 0.5, 0.5], 4, constraints=[MaxReplicas(1)]),
        5,
    ),
    "the same, weighted": (
        problem(
            [5, 5, 5, 1], [2, 2, 0.5, 0.5], 4, routing="weighted", constraints=[MaxReplicas(1)]
        ),
        5,
    ),
    "groups": (grouped(), 6),
    "no moves": (held(0), 6.5),
}


@pytest.mark.parametrize("name", DECIDED)
def test_prices_decide_where_no_other_argument_does(name: str) -> None:
    one, value = DECIDED[name]
    assert lower_bound(one, prices=False).total < value * 0.99
    bound = lower_bound(one)
    assert bound.sources == {DUAL: 1}
    assert bound.total == pytest.approx(value, rel=1e-9)
    recompute(one, bound)
    assert optimum(one) == pytest.approx(value, rel=1e-9), "it is reached: none could be higher"


def test_a_cut_is_needed_where_fractions_of_replicas_fit() -> None:
    one, value = DECIDED["three hot experts for two ranks"]
    bound = lower_bound(one)
    prices = bound.prices[0, 0]
    assert prices.cut.any()
    free = replace(prices, cut=prices.cut[:0])
    assert not Priced(one, 0, 0).refutes(free, value * 0.8)


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


@given(st.data(), ruled(), st.floats(0.3, 2.0))
def test_rational_numbers_say_the_same(data: st.DataObject, one: Problem, factor: float) -> None:
    case, prices = Priced(one, 0, 0), data.draw(some_prices(one))
    exact = case.exact(_rational(case.row), _exactly(case.loads))
    seconds = factor * float(one.fluid[0, 0])
    rational = _exact_prices(prices), exact.rooms(Fraction(seconds))
    assert float(exact.least(*rational)) == pytest.approx(
        float(case.least(prices, case.rooms(seconds))), rel=1e-9, abs=1e-9
    )
    assert float(exact.most_spent(*rational)) == pytest.approx(
        float(case.most_spent(prices, case.rooms(seconds))), rel=1e-9, abs=1e-9
    )


@given(tiny_problems(max_experts=4, max_layers=2, max_windows=2, constraints=True, limits=True))
def test_prices_only_add_to_a_bound_that_holds(one: Problem) -> None:
    bound, without = lower_bound(one), lower_bound(one, prices=False)
    assert bound.total <= optimum(one) * (1 + 1e-9)
    assert (bound.per_layer >= without.per_layer).all()
    recompute(one, bound)
    if not worth_pricing(one):
        assert (bound.source == without.source).all()


@given(ruled())
@settings(max_examples=3 * settings().max_examples)
def test_with_all_rules_together_the_bound_holds_too(one: Problem) -> None:
    bound = lower_bound(one)
    assert bound.total <= optimum(one) * (1 + 1e-9)
    recompute(one, bound)


def test_without_such_rules_nothing_is_priced() -> None:
    assert not worth_pricing(problem([4, 3, 1], [1, 1], 2))
    assert not worth_pricing(replace(held(9), constraints=held(9).constraints))
    assert not worth_pricing(replace(held(0), routing="even"))
    assert worth_pricing(held(1))


def test_no_round_begins_without_time() -> None:
    start = lower_bound(CONFINED, prices=False).per_layer
    high = longest(CONFINED, CONFINED.tokens, CONFINED.base)
    value, prices = price_layers(CONFINED, start, high, seconds=0.0)
    assert (value == start).all()
    assert prices == {}


# Real sizes


def _half(seed: int, routing: str) -> Problem:
    """One layer of 256 x 288 / 32: the 64 hottest experts on 12 of the ranks."""
    one = mp.instances.generate((1, 256, 288, 32), seed, routing=routing).aggregate()  # type: ignore[arg-type]
    hot = np.argsort(-one.tokens[0, 0])[:64].tolist()
    return replace(one, constraints=[Forbid(e, g) for e in hot for g in range(12, 32)])


@pytest.mark.parametrize("routing", ["even", "weighted"])
def test_real_sizes_with_forbids_are_nearly_closed(routing: str, tmp_path: Path) -> None:
    one = _half(0, routing)
    assert lower_bound(one, prices=False).total < 1.001 * one.fluid.sum()
    result = mp.solve(one, work_limit=2_000_000)
    assert result.bound.sources == {DUAL: 1}
    assert result.lower_bound > 1.8 * one.fluid.sum()
    assert result.gap < 5e-4
    write_certificate(result, tmp_path / "c.json")
    assert check(tmp_path / "c.json").arguments == {DUAL: 1}


def test_no_moves_under_weighted_routing_are_proven_at_real_size() -> None:
    shape = (1, 256, 288, 32)
    now = mp.solve(mp.instances.generate(shape, 1, routing="weighted").aggregate()).plan
    later = mp.instances.generate(shape, 1, epoch=1, routing="weighted").aggregate()
    few = replace(later, constraints=[MaxMoves(now, per_layer=0)])
    without = lower_bound(few, prices=False).total
    result = mp.solve(few, work_limit=1_000_000)
    assert result.bound.sources == {DUAL: 1}
    assert result.gap < 1e-6
    assert result.lower_bound > 1.01 * without


def test_equal_inputs_give_equal_bits() -> None:
    one = replace(_half(3, "weighted"))
    results = [mp.solve(one, work_limit=500_000, workers=n) for n in (1, 2)]
    assert results[0].bound.total == results[1].bound.total
    assert (results[0].plan.slots == results[1].plan.slots).all()


def test_exact_methods_begin_with_prices() -> None:
    rules = [Forbid(e, g) for e in range(4) for g in (2, 3)]
    one = problem([9, 8, 7, 6, 1, 1, 1, 1], [1, 1.5, 1, 1], 3, constraints=rules)
    result = mp.solve(one, method="cp-sat", time_limit=10)
    assert result.bound.sources == {DUAL: 1}
    assert result.bound.recomputed == pytest.approx(12)


# Certificates


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """Of experts confined by forbids, weighted: prices have worths."""
    one, _ = DECIDED["forbids, weighted"]
    write_certificate(mp.solve(one, work_limit=100_000), tmp_path / "c.json")
    return tmp_path / "c.json"


def changed(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    file = msgspec.json.decode(path.read_bytes())
    change(file)
    path.write_bytes(msgspec.json.encode(file))
    return path


def test_prices_are_stored_and_checked_without_a_solver(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "moeplace.dual_lp", None)
    checked = check(certificate)
    assert checked.arguments == {DUAL: 1}
    assert checked.objective == 5
    assert checked.bound.recomputed == pytest.approx(5, rel=1e-10)
    assert list(checked.bound.prices) == [(0, 0)]


Change = Callable[[dict[str, Any]], object]
PRICES = r"\$.prices\[0\]"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: f["bounds"][0].__setitem__(0, 5.0000001), "layer 0 does not follow from 'lp du"),
        (lambda f: f["prices"][0].update(token=[1.0, 0.5, 0.5]), "does not follow from 'lp dual'"),
        (lambda f: f["prices"][0].update(token=[0.0, 0.0, 0.0]), "does not follow from 'lp dual'"),
        (lambda f: f["prices"][0].update(token=[1.0, 1.0, -1.0]), PRICES + " must have prices"),
        (lambda f: f["prices"][0].update(token=[1.0]), PRICES + " must have prices"),
        (lambda f: f["prices"][0].update(cut=[[1.0], [1.0, 2.0]]), PRICES + " must have prices"),
        (lambda f: f["prices"][0].update(worth=[]), PRICES + " must have prices"),
        (lambda f: f["prices"][0].update(copy=-1.0), PRICES + " must have prices"),
        (lambda f: f["prices"][0].update(layer=1), PRICES + " names a window or layer that"),
        (lambda f: f["prices"].append(f["prices"][0]), r"\$.prices\[1\] is for .* again"),
        (lambda f: f.pop("prices"), "layer 0 does not follow from 'lp dual'"),
        (lambda f: f["arguments"][0].__setitem__(0, "fluid"), "does not follow from 'fluid'"),
    ],
)
def test_a_changed_line_is_refused(certificate: Path, change: Change, says: str) -> None:
    with pytest.raises(mp.CertificateError, match=says):
        check(changed(certificate, change))


def test_the_command_refuses_with_exit_code_5(certificate: Path) -> None:
    command = [sys.executable, "-m", "moeplace", "certify", str(certificate)]
    good = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.search(r"arguments +lp dual 1", good.stdout)
    changed(certificate, lambda f: f["prices"][0].update(token=[0.1, 0.0, 0.0]))
    bad = subprocess.run(command, capture_output=True, text=True, check=False)
    assert bad.returncode == 5
    assert "$.bounds: Bound " in bad.stderr
    assert "layer 0 does not follow from 'lp dual'" in bad.stderr


def test_any_prices_that_do_are_a_proof(certificate: Path) -> None:
    def scale(file: dict[str, Any]) -> None:
        prices = file["prices"][0]
        for name in ("token", "slot"):
            prices[name] = [3 * price for price in prices[name]]
        prices["worth"] = [[3 * each for each in row] for row in prices["worth"]]

    assert check(changed(certificate, scale)).arguments == {DUAL: 1}


def test_files_without_prices_are_read(tmp_path: Path) -> None:
    write_certificate(mp.solve(problem([4, 3, 1], [1, 1], 2)), tmp_path / "c.json")
    path = changed(tmp_path / "c.json", lambda f: f.pop("prices"))
    assert DUAL not in check(path).arguments
