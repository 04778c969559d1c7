import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplace.errors import ProblemError
from moeplace.hardware import Cluster
from tests.strategies import SPEEDS


def poured(cluster: Cluster, seconds: float, base: np.ndarray) -> float:
    """Tokens that the ranks with slots can still run by `seconds`."""
    room = np.maximum(seconds * cluster.speeds - base, 0.0)
    return float(room[cluster.slots > 0].sum())


def fluid_by_bisection(cluster: Cluster, tokens: float, base: np.ndarray) -> float:
    low, high = 0.0, float((tokens + base.sum()) / cluster.speeds.min()) + 1.0
    for _ in range(200):
        middle = (low + high) / 2
        enough = poured(cluster, middle, base) >= tokens
        done = enough and (base <= middle * cluster.speeds).all()
        low, high = (low, middle) if done else (middle, high)
    return high


@st.composite
def poured_loads(draw: st.DrawFn) -> tuple[Cluster, float, np.ndarray]:
    ranks = draw(st.integers(1, 6))
    speeds = draw(st.lists(SPEEDS, min_size=ranks, max_size=ranks))
    slots = draw(st.lists(st.integers(0, 2), min_size=ranks, max_size=ranks).filter(any))
    amount = st.one_of(st.just(0.0), st.floats(0.0, 10.0, allow_subnormal=False))
    base = draw(st.lists(amount, min_size=ranks, max_size=ranks))
    return Cluster(speeds=speeds, slots=slots), draw(amount), np.array(base)


@given(poured_loads())
def test_fluid_seconds_are_what_bisection_finds(case: tuple[Cluster, float, np.ndarray]) -> None:
    cluster, tokens, base = case
    found = float(cluster.fluid_seconds(np.array(tokens), base))
    assert found == pytest.approx(fluid_by_bisection(cluster, tokens, base), rel=1e-12, abs=1e-15)


def test_without_base_load_fluid_is_tokens_over_the_speed_of_ranks_with_slots() -> None:
    cluster = Cluster(speeds=[1, 2, 5], slots=[1, 1, 0])
    assert cluster.fluid_seconds(np.array([6.0, 0.0]), np.zeros((2, 3))).tolist() == [2.0, 0.0]


def test_base_load_is_levelled_out_before_the_high_ranks_are_reached() -> None:
    # 4 tokens: rank 0 has room 3 below rank 1's level of 3, the last token is shared
    cluster = Cluster(speeds=[1, 1], slots=[1, 1])
    assert float(cluster.fluid_seconds(np.array(4.0), np.array([0.0, 3.0]))) == 3.5
    assert float(cluster.fluid_seconds(np.array(2.0), np.array([0.0, 3.0]))) == 3.0


def test_a_rank_without_slots_still_runs_its_base_load() -> None:
    cluster = Cluster(speeds=[1, 1], slots=[1, 0])
    assert float(cluster.fluid_seconds(np.array(2.0), np.array([0.0, 7.0]))) == 7.0
    assert float(cluster.fluid_seconds(np.array(9.0), np.array([0.0, 7.0]))) == 9.0


def test_fluid_seconds_broadcast_over_windows_and_layers() -> None:
    cluster = Cluster(speeds=[1, 3], slots=[1, 1])
    tokens = np.arange(6.0).reshape(2, 3)
    base = np.arange(12.0).reshape(2, 3, 2)
    found = cluster.fluid_seconds(tokens, base)
    each = [
        [float(cluster.fluid_seconds(tokens[w, m], base[w, m])) for m in range(3)] for w in range(2)
    ]
    assert found.tolist() == each


def test_seconds_are_tokens_over_speed() -> None:
    cluster = Cluster(speeds=[1, 4], slots=[1, 1])
    assert cluster.seconds(np.array([[2.0, 2.0]])).tolist() == [[2.0, 0.5]]


def test_from_speeds_gives_every_rank_the_same_slots_and_splits_ranks_into_nodes() -> None:
    cluster = Cluster.from_speeds([1, 1, 1, 2], slots=3, nodes=2)
    assert cluster.slots.tolist() == [3, 3, 3, 3]
    assert cluster.nodes.tolist() == [0, 0, 1, 1]
    assert (cluster.ranks, cluster.total_slots) == (4, 12)


def test_from_speeds_takes_slots_and_nodes_of_each_rank() -> None:
    cluster = Cluster.from_speeds([1, 1], slots=[3, 0], nodes=[1, 0])
    assert cluster.slots.tolist() == [3, 0]
    assert cluster.nodes.tolist() == [1, 0]


def test_all_ranks_are_on_one_node_unless_told() -> None:
    assert Cluster(speeds=[1, 1], slots=[1, 1]).nodes.tolist() == [0, 0]


def test_times_under_relative_speeds_are_never_called_seconds() -> None:
    assert Cluster(speeds=[1], slots=[1]).time_unit == "s"
    assert Cluster(speeds=[1], slots=[1], speed_unit="relative").time_unit == "token units"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"speeds": [1, 0]}, r"Speeds must be finite, above 1e-09.* got 0\.0 at rank 1"),
        ({"speeds": [1, -1]}, r"got -1\.0 at rank 1"),
        ({"speeds": [1, float("nan")]}, "got nan at rank 1"),
        ({"speeds": [1, float("inf")]}, "got inf at rank 1"),
        ({"speeds": []}, "Speeds is empty"),
        ({"speeds": 1.0}, r"axes \[ranks\]"),
        ({"slots": [1, 1, 1]}, "2 speeds but 3 slots"),
        ({"slots": [1, -1]}, "at least 0"),
        ({"slots": [1, 1.5]}, "whole numbers"),
        ({"slots": [0, 0]}, "Slots are 0 on every rank"),
        ({"slots": [1, 2**21]}, "at most 1"),
        ({"nodes": [0]}, "2 speeds but 1 nodes"),
        ({"nodes": [0, -1]}, "at least 0"),
        ({"speed_unit": "furlongs"}, "tokens/s, relative, got 'furlongs'"),
    ],
)
def test_bad_clusters_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        Cluster(**{"speeds": [1, 1], "slots": [1, 1]} | change)


@pytest.mark.parametrize("nodes", [0, -1, 3, 1.5])
def test_nodes_must_divide_the_ranks(nodes: float) -> None:
    with pytest.raises(ProblemError, match=f"4 ranks do not divide into {nodes} equal nodes"):
        Cluster.from_speeds([1, 1, 1, 1], slots=1, nodes=nodes)


@pytest.mark.parametrize("change", [{"speeds": [[1], [1, 2]]}, {"slots": [[1], [1, 2]]}])
def test_ragged_speeds_and_slots_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ProblemError, match="ragged"):
        Cluster.from_speeds(**{"speeds": [1, 1], "slots": 1} | change)  # type: ignore[arg-type]


def test_arrays_of_a_cluster_are_read_only() -> None:
    cluster = Cluster.from_speeds([1, 1], slots=1)
    for array in (cluster.speeds, cluster.slots, cluster.nodes):
        assert not array.flags.writeable
