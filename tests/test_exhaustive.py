"""Every placement of a tiny layer tried: what is refuted is below the optimum, and up to it."""

from hypothesis import given, settings
from hypothesis import strategies as st

from moeplace.constraints import ReplicaBudget
from moeplace.evaluate import evaluate
from moeplace.exhaustive import Exhaustive
from moeplace.plan import Plan
from moeplace.problem import Problem
from tests.brute_force import optimum
from tests.strategies import problem, tiny_problems

MORE = settings(max_examples=4 * settings().max_examples)


def rules_left_out(one: Problem) -> bool:
    """Budgets, and what ranks without slots run beside the layer."""
    idle = one.base[:, 0, one.cluster.slots == 0]
    return bool(idle.any()) or any(isinstance(rule, ReplicaBudget) for rule in one.constraints)


@st.composite
def layers(draw: st.DrawFn) -> Problem:
    return draw(
        tiny_problems(
            routing="even",
            max_layers=1,
            max_windows=3,
            constraints=draw(st.booleans()),
            limits=draw(st.booleans()),
        ).filter(lambda one: one.objective == "mean" or one.windows == 1)
    )


@given(layers())
@MORE
def test_all_below_the_optimum_is_refuted_and_nothing_above(one: Problem) -> None:
    best = optimum(one) / float(one.layer_weight[0] or 1.0)
    if one.layer_weight[0] == 0:
        return
    tiny = Exhaustive(one, None, 0)
    if best == float("inf"):
        return
    assert tiny.refutes(best * (1 + 1e-9)) is False
    if not rules_left_out(one) and best > 1e-200:  # less counts as nothing
        assert tiny.refutes(best * (1 - 1e-9)) is True
    found, slots = tiny.search(best * (1 + 1e-9), 10_000_000)
    assert found is False
    assert slots is not None
    plan = Plan(slots=slots[None], rank_slots=one.cluster.slots, experts=one.experts)
    priced = evaluate(one, plan)
    if not rules_left_out(one):
        assert one.mean(priced.makespan)[0] <= best * (1 + 1e-9) + 1e-12


def test_windows_apart_say_less_than_together() -> None:
    # each window alone is even on two ranks; no placement is for both
    one = problem([[[4, 4, 0, 0]], [[4, 0, 4, 0]], [[4, 0, 0, 4]]], [1, 1], [2, 2])
    apart = [Exhaustive(one, window, 0) for window in range(3)]
    assert all(each.refutes(4 * (1 - 1e-9)) and not each.refutes(4.0) for each in apart)
    together = Exhaustive(one, None, 0)
    assert together.refutes(optimum(one) * (1 - 1e-9))
    assert optimum(one) > 4 * (1 + 1e-9)
