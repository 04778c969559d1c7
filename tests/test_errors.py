import inspect
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import moeplace as mp
from moeplace import errors
from moeplace.errors import CertificateError, PlanError, ProblemError
from tests.strategies import plan, problem


def drawn_tree() -> dict[str, tuple[str, ...]]:
    """Class name -> names of its bases, as the docstring of the module draws them."""
    tree: dict[str, tuple[str, ...]] = {"MoeplaceError": ("Exception",)}
    path = ["MoeplaceError"]
    for line in inspect.getdoc(errors).splitlines():  # type: ignore[union-attr]
        found = re.match(r"^ *([│ ]*)[├└]── (\w+)(?: \((\w+)\))?  +\S", line)
        if found:
            depth = len(found[1]) // 4 + 1
            path[depth:] = [found[2]]
            tree[found[2]] = (path[depth - 1], *([found[3]] if found[3] else []))
    return tree


def test_the_tree_in_the_docstring_is_the_tree_of_the_classes() -> None:
    classes = {
        name: tuple(base.__name__ for base in kind.__bases__)
        for name, kind in inspect.getmembers(errors, inspect.isclass)
    }
    drawn = drawn_tree()
    assert len(drawn) == 9
    # a child of ProblemError need not repeat that it is a ValueError
    drawn["PolicyNotApplicable"] = tuple(
        b for b in drawn["PolicyNotApplicable"] if b != "ValueError"
    )
    assert drawn == classes


def test_every_error_can_be_caught_as_one() -> None:
    for _, kind in inspect.getmembers(errors, inspect.isclass):
        assert issubclass(kind, errors.MoeplaceError)


def test_bad_input_is_a_value_error_and_a_missing_extra_an_import_error() -> None:
    for kind in (errors.ProblemError, errors.PlanError, errors.FormatError):
        assert issubclass(kind, ValueError)
    assert issubclass(errors.PolicyNotApplicable, errors.ProblemError)
    assert issubclass(errors.MissingExtraError, ImportError)
    assert not issubclass(errors.SolverError, ValueError)
    assert not issubclass(errors.CertificateError, ValueError)


PROBLEM = problem([1.0, 1.0], [1.0, 1.0], [1, 1])
PLAN = plan([[0, 1]], [1, 1])
ECONOMY = mp.Economy(expert_bytes=1, links=mp.Links(intra=1, inter=1), steps=1)
#: What takes a problem, as its other arguments are.
OF_PROBLEMS: dict[str, Callable[[Any], object]] = {
    "solve": mp.solve,
    "lower_bound": mp.lower_bound,
    "compare": lambda it: mp.compare(it, mp.solve(PROBLEM)),
    "recompute": lambda it: mp.recompute(it, mp.lower_bound(PROBLEM)),
    "evaluate": lambda it: mp.evaluate(it, PLAN),
    "resplit": lambda it: mp.resplit(it, PLAN),
    "fill": lambda it: mp.fill(it, PLAN),
    "over_batches": lambda it: mp.over_batches(it, PLAN),
    "traffic": lambda it: mp.traffic(it, PLAN),
    "trace_traffic": lambda it: mp.trace_traffic(it, PLAN, [[[0]]]),
    "rank_plans": lambda it: mp.rank_plans(it, [PLAN], alpha=1, beta=1, hidden=8, tokens=1),
    "coactivation": lambda it: mp.coactivation(it, [[[0]]]),
    "gather": lambda it: mp.gather(it, PLAN, np.zeros((1, 2, 2))),
    "relabel": lambda it: mp.relabel(it, PLAN, PLAN),
    "tradeoff": lambda it: mp.tradeoff(it, PLAN, expert_bytes=1),
    "propose": lambda it: mp.propose(it, PLAN, ECONOMY),
    "Monitor": lambda it: mp.Monitor(it, PLAN),
    "waterfill": lambda it: mp.waterfill(it, PLAN, [1.0, 1.0]),
    "whatif": mp.whatif,
    "write_instance": lambda it: mp.write_instance(it, "nowhere/x.json"),
}
#: What takes a plan.
OF_PLANS: dict[str, Callable[[Any], object]] = {
    "evaluate": lambda it: mp.evaluate(PROBLEM, it),
    "resplit": lambda it: mp.resplit(replace(PROBLEM, routing="weighted"), it),
    "fill": lambda it: mp.fill(PROBLEM, it),
    "traffic": lambda it: mp.traffic(PROBLEM, it),
    "migrate, current": lambda it: mp.migrate(it, PLAN, expert_bytes=1),
    "migrate, target": lambda it: mp.migrate(PLAN, it, expert_bytes=1),
    "relabel, current": lambda it: mp.relabel(PROBLEM, it, PLAN),
    "relabel, plan": lambda it: mp.relabel(PROBLEM, PLAN, it),
    "tradeoff": lambda it: mp.tradeoff(PROBLEM, it, expert_bytes=1),
    "propose": lambda it: mp.propose(PROBLEM, it, ECONOMY),
    "Monitor": lambda it: mp.Monitor(PROBLEM, it),
    "waterfill": lambda it: mp.waterfill(PROBLEM, it, [1.0, 1.0]),
}


@pytest.mark.parametrize("name", OF_PROBLEMS)
def test_what_is_no_problem_is_refused(name: str) -> None:
    for wrong, kind in ((None, "NoneType"), ("one.json", "str"), (PLAN, "Plan")):
        with pytest.raises(ProblemError, match=f"must be a moeplace.Problem, got {kind}: build"):
            OF_PROBLEMS[name](wrong)


@pytest.mark.parametrize("name", OF_PLANS)
def test_what_is_no_plan_is_refused(name: str) -> None:
    for wrong, kind in ((None, "NoneType"), ([[0, 1]], "list"), (PROBLEM, "Problem")):
        with pytest.raises(PlanError, match=f"must be a moeplace.Plan, got {kind}: build"):
            OF_PLANS[name](wrong)


def test_other_parts_are_of_their_kind() -> None:
    with pytest.raises(ProblemError, match=r"must be a moeplace\.LoadHistogram, got NoneType"):
        mp.diagnose(None)  # type: ignore[arg-type]
    with pytest.raises(ProblemError, match=r"must be a moeplace\.Economy, got NoneType"):
        mp.propose(PROBLEM, PLAN, None)  # type: ignore[arg-type]
    with pytest.raises(CertificateError, match=r"must be a moeplace\.Bound, got NoneType"):
        mp.recompute(PROBLEM, None)  # type: ignore[arg-type]
    with pytest.raises(ProblemError, match=r"needs moeplace\.Requests, got NoneType"):
        mp.simulate(PROBLEM, PLAN, None, None, None)  # type: ignore[arg-type]
