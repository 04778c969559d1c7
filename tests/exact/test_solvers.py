"""One test body over every solver: brute force on tiny problems, scales, status, hints."""

import numpy as np
import pytest
from hypothesis import given, settings

from moeplace.bounds import lower_bound
from moeplace.exact.model import Model, build
from moeplace.exact.solvers import SOLVERS, Answer, Request
from moeplace.problem import Problem
from tests.brute_force import optimum
from tests.exact.cases import FEATURES, featured, price

#: Examples of each feature, as a multiple of the profile's: processes are slow to start.
PART = {"cp-sat": 1.0, "highs": 0.7, "gscip": 0.3, "cbc": 0.2}
#: How far above the optimum a solver that calls itself optimal may end.
CLOSE = {"cp-sat": 3e-6, "highs": 1e-5, "gscip": 1e-5, "cbc": 1e-5}


def some(name: str, share: float = 1.0) -> settings:
    count = max(int(settings().max_examples * share * PART[name]), 4)
    return settings(max_examples=count, derandomize=True)  # solvers are slow to hunt in


def whole(one: Problem, cut: object = np.inf) -> Model:
    bound = lower_bound(one).per_layer
    return build(one, range(one.layers), bound, np.broadcast_to(cut, bound.shape))


def assert_solved(name: str, one: Problem, model: Model, answer: Answer, best: float) -> None:
    """What the solver says is true of a problem whose optimum is `best`."""
    if best == np.inf:
        assert answer.ended == "infeasible"
        assert answer.bound == np.inf
        return
    assert answer.ended == "optimal"
    assert answer.values is not None
    found = price(one, model.slots(one, answer.values))
    assert answer.bound * model.unit <= best * (1 + 1e-9)
    assert answer.bound >= best / model.unit * (1 - CLOSE[name]) - CLOSE[name]
    loose = 1e-6 if np.isfinite(one.capacity).any() else 0.0  # shares come from a linear program
    assert best * (1 - 1e-9) - loose <= found <= best + CLOSE[name] * model.unit + loose


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("name", SOLVERS)
def test_the_optimum_is_brute_force_s(name: str, feature: str) -> None:
    @given(featured(feature))
    @some(name)
    def check(one: Problem) -> None:
        model = whole(one)
        assert_solved(name, one, model, SOLVERS[name].solve(model, Request()), optimum(one))

    check()
