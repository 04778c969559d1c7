"""Certificates: what holds is accepted, and no line may be changed unseen."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

import moeplace as mp
from moeplace.certificate import _exact, check, write_certificate
from moeplace.claims import Claim, with_claims
from moeplace.constraints import MaxMoves
from moeplace.problem import Problem
from tests.strategies import legal_plans, problem, tiny_problems

SMALL = Path(__file__).parent.parent / "instances" / "small"
FRESH = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A certificate of a small layer, proven by trying every placement."""
    result = mp.solve(mp.read_instance(SMALL / "flashlb-even.json"), work_limit=1_000_000)
    path = tmp_path / "certificate.json"
    write_certificate(result, path)
    return path


def changed(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    file = msgspec.json.decode(path.read_bytes())
    change(file)
    path.write_bytes(msgspec.json.encode(file))
    return path


def test_a_proven_optimum_needs_no_solver(toy: Path) -> None:
    checked = check(toy)
    assert checked.arguments == {"exhaustive": 1}
    assert checked.objective == Fraction(590, 3)
    proven, claimed, left = checked.shares
    assert proven > 1 - 1e-7
    assert claimed == 0
    assert left < 1e-7


@pytest.mark.parametrize("name", sorted(path.name for path in SMALL.glob("*.json")))
def test_every_small_instance_is_solved_and_certified(name: str, tmp_path: Path) -> None:
    result = mp.solve(mp.read_instance(SMALL / name), gap=0)
    assert result.gap < 2e-7, "passes-seconds by CP-SAT, in whole numbers; the others by us"
    write_certificate(result, tmp_path / "c.json")
    checked = check(tmp_path / "c.json")
    assert float(checked.objective) == pytest.approx(result.objective, rel=1e-12)
    assert checked.bound.total == result.lower_bound


@given(tiny_problems(max_layers=2, max_windows=2, constraints=True))
@FRESH
def test_what_solve_returns_is_certified(tmp_path: Path, one: Problem) -> None:
    result = mp.solve(one, work_limit=20_000)
    if result.evaluation is None:
        return
    write_certificate(result, tmp_path / "c.json")
    assert float(check(tmp_path / "c.json").objective) == pytest.approx(
        result.objective, rel=1e-9, abs=1e-300
    )


CLAIM = {"layers": [0], "weight": None, "value": 1.0, "by": "an oracle 1.0"}
Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: f.update(objective=f["objective"] * 0.99), r"\$.objective is 194.7.*costs 196"),
        (lambda f: f["bounds"][0].__setitem__(0, 197.0), r"does not follow from 'exhaustive'"),
        (lambda f: f["arguments"][0].__setitem__(0, "fluid"), r"does not follow from 'fluid'"),
        (lambda f: f["arguments"][0].__setitem__(0, "magic"), "unknown argument 'magic'"),
        (lambda f: f.update(digest="0" * 64), r"\$.digest is 0000000000000000..., the instance"),
        (
            lambda f: f["instance"]["loads"]["tokens"][0][0].__setitem__(0, 1),
            r"\$.digest .*one of them was changed",
        ),
        (lambda f: f["plan"]["slots"][0].__setitem__(0, 9), r"\$.plan: "),
        (lambda f: f.update(recomputed=196.9), r"196.9 in total, its layers give 196.66"),
        (lambda f: f.update(lower_bound=196.9), r"196.9 in total, its layers and solvers' claims"),
        (
            lambda f: f.update(recomputed=-1.0),
            r"\$.recomputed is -1.0, but the bounds add up to 196",
        ),
        (lambda f: f.update(lower_bound=1.0), r"\$.lower_bound is 1.0, but bounds and claims give"),
        (lambda f: f.update(coupled=True), r"\$.coupled is true, but no rule lifts"),
        (lambda f: f["instance"].update(version=2), r"\$.instance has format and version .*, 2\)"),
        (
            lambda f: f["claims"].append(CLAIM | {"value": 197.0}),
            r"claims\[0\].value is 197.0, but the plan",
        ),
        (
            lambda f: f["claims"].append(CLAIM | {"layers": [0, 0]}),
            r"claims\[0\] must be about all",
        ),
        (
            lambda f: f["claims"].append(CLAIM | {"replica_price": 1.0}),
            r"claims\[0\] has prices, but",
        ),
        (
            lambda f: f["claims"].append(CLAIM | {"weight": [1.0], "move_price": 1.0}),
            r"claims\[0\] has a price of moves, which no rule limits",
        ),
        (
            lambda f: f["bounds"].append([1.0]),
            r"\$.bounds must be \[windows\]\[layers\] = \(1, 1\)",
        ),
    ],
)
def test_a_changed_line_is_refused(toy: Path, change: Change, says: str) -> None:
    with pytest.raises(mp.CertificateError, match=says):
        check(changed(toy, change))


def test_a_plan_that_breaks_a_rule_is_refused(tmp_path: Path) -> None:
    one = problem([5.0, 4, 3], [1, 1], 2)
    current = mp.solve(one).plan
    few = replace(one, constraints=[MaxMoves(current, per_layer=0)])
    write_certificate(mp.solve(few), tmp_path / "c.json")
    slots = np.roll(current.slots, 1).tolist()
    with pytest.raises(mp.CertificateError, match=r"\$.plan breaks a rule: layer 0: .* received"):
        check(changed(tmp_path / "c.json", lambda f: f["plan"].update(slots=slots)))


def test_a_false_claim_of_a_solver_is_seen_and_others_are_told_apart(tmp_path: Path) -> None:
    result = mp.solve(problem([5.0, 4, 3], [1, 1], 2), method="contiguous")
    price, weight = result.objective, np.ones(1)

    def claiming(value: float) -> Path:
        claim = Claim(layers=(0,), weight=weight, value=value, by="an oracle 1.0")
        bound = with_claims(result.problem, result.bound, [claim])
        write_certificate(replace(result, bound=bound), tmp_path / "c.json")
        return tmp_path / "c.json"

    proven, claimed, _ = check(claiming(0.5 * (price + result.bound.total))).shares
    assert (proven, claimed) == (0.0, pytest.approx(0.5))
    path = changed(claiming(price), lambda f: f.update(lower_bound=2 * price))
    with pytest.raises(mp.CertificateError, match="in total"):
        check(path)
    changed(path, lambda f: f["claims"][0].update(value=2 * price))
    with pytest.raises(mp.CertificateError, match="but the plan costs .* claim is false"):
        check(path)


def test_windows_searched_together_are_checked_by_searching_again(tmp_path: Path) -> None:
    one = mp.read_instance(SMALL / "passes-seconds.json")
    result = mp.solve(one, gap=0)
    assert result.status == "optimal"
    write_certificate(result, tmp_path / "c.json")
    checked = check(tmp_path / "c.json")
    assert checked.arguments == {"fluid": 2, "exhaustive, all windows": 1}
    assert checked.shares[0] == pytest.approx(1, abs=1e-6)

    def refused(change: Callable[[Any], Any], says: str) -> None:
        path = changed(Path(shutil.copy(tmp_path / "c.json", tmp_path / "t.json")), change)
        with pytest.raises(mp.CertificateError, match=says):
            check(path)

    price = result.objective
    refused(lambda f: f["claims"][0].update(value=price * 1.001), "does not exclude less")
    refused(lambda f: f["claims"][0].update(weight=[0.5, 0.5]), "in total|does not exclude less")
    refused(lambda f: f["claims"][0].update(by="an oracle 1.0"), "in total")
    refused(lambda f: f["claims"][0].update(move_price=1.0), "a price of moves")
    refused(lambda f: f.update(recomputed=price * 1.001, lower_bound=price * 1.001), "in total")


def test_real_sizes_are_checked(tmp_path: Path) -> None:
    for shape, routing in (((6, 256, 288, 32), "even"), ((6, 128, 128, 8), "weighted")):
        one = mp.instances.generate(shape, 0, routing=routing).aggregate()  # type: ignore[arg-type]
        write_certificate(mp.solve(one, work_limit=3_000_000), tmp_path / "c.json")
        checked = check(tmp_path / "c.json")
        assert sum(checked.arguments.values()) == 6


def _legal_pairs() -> Any:
    return tiny_problems(max_layers=2, max_windows=3).flatmap(
        lambda one: legal_plans(one).map(lambda plan: (one, plan))
    )


@given(_legal_pairs())
def test_the_exact_price_is_that_of_evaluate(pair: tuple[Problem, mp.Plan]) -> None:
    one, plan = pair
    priced = mp.evaluate(one, plan)
    assert float(_exact(priced)) == pytest.approx(priced.objective, rel=1e-12, abs=1e-300)


def test_a_rank_without_tokens_takes_no_time_under_planes(tmp_path: Path) -> None:
    cluster = mp.Cluster.from_planes([3.0], [3.0], [1.0], [1, 1], 2)
    loads = mp.LoadHistogram(tokens=[[[0.0, 0.0]]], passes=[1.0])  # type: ignore[arg-type]
    write_certificate(mp.solve(Problem(loads, cluster)), tmp_path / "c.json")
    assert check(tmp_path / "c.json").objective == 0


def test_planes_are_priced_from_above() -> None:
    cluster = mp.Cluster.from_planes([0.1, 0.05], [0.3, 0.1], [0.5, 1.0], [1, 1.2], 2)
    loads = mp.LoadHistogram(tokens=[[[3.0, 2.0, 0.5]]], passes=[1.0])
    priced = mp.evaluate(
        Problem(loads, cluster), mp.Plan(slots=[[0, 1, 2, 0]], rank_slots=[2, 2], experts=3)
    )
    exact = _exact(priced)
    assert Fraction(priced.objective) * (1 - Fraction(1, 10**14)) <= exact
    assert float(exact) == pytest.approx(priced.objective, rel=1e-13)
