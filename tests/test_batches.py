import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moeplace as mp
from moeplace.batches import over_batches
from moeplace.errors import ProblemError
from moeplace.evaluate import evaluate
from moeplace.hardware import Cluster
from tests.strategies import legal_plans
from tests.test_latency import with_table


def two_ranks(tokens: list[float], **options: object) -> mp.Problem:
    cluster = Cluster.from_speeds([1.0, 1.0], 1)
    return mp.Problem(mp.LoadHistogram(tokens=[[tokens]], passes=[1.0]), cluster, **options)  # type: ignore[arg-type]


PAIR = mp.Plan(slots=[[0, 1]], rank_slots=[1, 1], experts=2)  # type: ignore[arg-type]


def test_two_equal_experts_wait_for_the_larger_half() -> None:
    """E max(X, 4 - X) of X ~ Bin(4, 1/2) is 2.75, by hand; the expected counts say 2."""
    found = over_batches(two_ranks([2, 2]), PAIR, 4000)
    assert found.objective == pytest.approx(2.75, abs=4 * float(found.standard_error[0, 0]))
    assert found.standard_error[0, 0] < 0.02


def test_one_expert_with_all_tokens_does_not_scatter() -> None:
    found = over_batches(two_ranks([5, 0]), PAIR, 8)
    assert found.makespan.tolist() == [[5.0]]
    assert found.standard_error.tolist() == [[0.0]]


def test_batches_have_the_mean_size_of_a_pass() -> None:
    found = over_batches(two_ranks([2.5, 0]), PAIR, 20_000)
    assert found.objective == pytest.approx(2.5, abs=0.02)


def test_a_replica_is_activated_by_its_first_token() -> None:
    cluster = Cluster.from_planes([0.0], [1.0], [1e-9], [1, 1], 1)
    loads = mp.LoadHistogram(tokens=[[[1.0, 0.0]]], passes=[1.0])  # type: ignore[arg-type]
    one = mp.Problem(loads, cluster)
    assert over_batches(one, PAIR, 8).objective == pytest.approx(1.0)
    assert evaluate(one, PAIR).objective == pytest.approx(1 - np.exp(-1))


@given(with_table("even"), st.data())
def test_every_plan_and_model_can_be_drawn(one: mp.Problem, data: st.DataObject) -> None:
    plan = data.draw(legal_plans(one))
    found, again = (over_batches(one, plan, 4, seed=1) for _ in range(2))
    assert found.makespan.tolist() == again.makespan.tolist()
    idle = one.cluster.seconds(one.base).max(axis=2)
    assert (found.makespan >= idle * (1 - 1e-12)).all()


def test_many_tokens_scatter_little() -> None:
    few, many = (over_batches(two_ranks([n, n]), PAIR, 200).objective / n for n in (10, 100_000))
    assert few > 1.1
    assert 1 < many < 1.01


@pytest.mark.parametrize("batches", [1, 0, 2.5, True])
def test_bad_batches_are_refused(batches: int) -> None:
    with pytest.raises(ProblemError, match="Batches must be a whole number"):
        over_batches(two_ranks([1, 1]), PAIR, batches)


def test_without_passes_nothing_says_how_large_a_batch_is() -> None:
    loads = mp.LoadHistogram(tokens=[[[1.0, 1.0]]])  # type: ignore[arg-type]
    with pytest.raises(ProblemError, match="give the loads `passes`"):
        over_batches(mp.Problem(loads, Cluster.from_speeds([1, 1], 1)), PAIR)
