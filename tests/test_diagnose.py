"""Each lie that statistics are known to tell is found, and measured loads are left alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplace.diagnose import NAMES, diagnose, drift
from moeplace.instances import generate, read_instance
from moeplace.loads import LoadHistogram

ROOT = Path(__file__).resolve().parents[1]
REAL = sorted((ROOT / "instances/real").glob("*.json"))


def routed(windows: int = 8, layers: int = 6, experts: int = 32, tokens: int = 4000) -> Any:
    """Counts of a skewed top-4 router: layer totals are equal."""
    random = np.random.default_rng(3)
    shares = random.dirichlet(np.full(experts, 0.7), layers) + 0.002
    shares /= shares.sum(axis=1, keepdims=True)
    counts = [[random.multinomial(4 * tokens, row) for row in shares] for _ in range(windows)]
    return np.asarray(counts, dtype=float)


def names(tokens: Any, **options: Any) -> list[str]:
    found = diagnose(LoadHistogram(tokens=tokens, **options))
    return [finding.name for finding in found]


def only(tokens: Any, name: str, **options: Any) -> Any:
    (finding,) = diagnose(LoadHistogram(tokens=tokens, **options))
    assert finding.name == name
    return finding


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_measured_loads_are_left_alone(path: Path) -> None:
    loads = read_instance(path).loads
    assert diagnose(loads) == ()
    assert diagnose(loads.aggregate()) == ()
    for window in range(loads.windows):
        assert diagnose(loads.select([window])) == ()


@pytest.mark.parametrize("shape", "ABCD")
def test_synthetic_loads_are_left_alone(shape: str) -> None:
    loads = generate(shape, 0).loads
    assert diagnose(loads) == ()
    assert diagnose(loads.aggregate()) == ()


@given(st.integers(0, 2**32 - 1))
def test_sampled_loads_are_left_alone(seed: int) -> None:
    loads = LoadHistogram(tokens=routed())
    assert diagnose(loads.sample(2000, seed)) == ()


def test_a_router_is_left_alone() -> None:
    assert names(routed()) == []
    assert names(routed(windows=1)) == []


def test_empty_layers_and_windows() -> None:
    tokens = routed()
    tokens[:, :2] = 0
    tokens[3] = 0
    finding = only(tokens, "empty")
    assert (finding.windows, finding.layers) == ((3,), (0, 1))
    assert "layers 0 to 1 of 6" in finding.message
    assert "window 3 of 8" in finding.message
    assert "nothing was recorded" in only(tokens * 0, "empty").message


def test_layer_totals_that_differ() -> None:
    tokens = routed()
    tokens[2, 4] = np.floor(tokens[2, 4] * 0.9)
    finding = only(tokens, "totals-differ")
    assert (finding.windows, finding.layers) == ((2,), (4,))
    assert "in layer 4 but 16,000 in most others (window 2)" in finding.message


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_only_one_rank(ranks: int) -> None:
    tokens = routed()
    block = 32 // ranks
    tokens[:, :, : 2 * block - block] = 0
    tokens[:, :, 2 * block :] = 0
    found = {each.name: each for each in diagnose(LoadHistogram(tokens=tokens))}
    message = found["one-rank-only"].message
    assert f"experts {block} to {2 * block - 1} of 32 have tokens" in message
    assert f"rank 1 of {ranks}" in message


def test_a_few_tokens_on_one_rank_are_no_finding() -> None:
    tokens = np.zeros((1, 6, 32))
    tokens[:, :, 3] = 4
    assert names(tokens) == []


@pytest.mark.parametrize("size", [2, 3, 8])
def test_counts_multiplied_by_the_data_parallel_size(size: int) -> None:
    finding = only(routed() * size, "multiples")
    assert f"are multiples of {size}:" in finding.message


def test_means_are_no_multiples() -> None:
    assert names(routed() * 2.5) == []


def test_padding_that_is_routed_alike() -> None:
    tokens = routed()
    random = np.random.default_rng(0)
    for window in (1, 5):
        for layer in range(6):
            tokens[window, layer, random.choice(32, 4, replace=False)] += 40_000
    found = {each.name: each for each in diagnose(LoadHistogram(tokens=tokens))}
    assert found["padding-spikes"].windows == (1, 5)
    assert "4 experts a layer have alike loads" in found["padding-spikes"].message


def test_dummy_batches_with_forced_routing() -> None:
    tokens = routed()
    tokens[4] = 500
    finding = only(tokens, "too-uniform")
    assert finding.windows == (4,)


def test_warm_up_windows() -> None:
    few = routed()
    few[:2] = np.floor(few[:2] / 100)
    assert only(few, "warm-up").windows == (0, 1)
    other = routed()
    other[0] = np.roll(other[0], 7, axis=1)
    finding = only(other, "warm-up")
    assert finding.windows == (0,)
    assert "cosine distance" in finding.message


def test_warm_up_is_judged_per_pass() -> None:
    tokens = routed()
    tokens[0] = np.floor(tokens[0] / 100)
    passes = np.full(8, 100.0)
    passes[0] = 1
    assert names(tokens, passes=passes) == []


def test_a_shift_of_work_is_no_warm_up() -> None:
    tokens = routed()
    tokens[4:] = np.roll(tokens[4:], 5, axis=2)
    assert names(tokens) == []


def test_findings_come_in_the_order_of_their_names() -> None:
    tokens = routed() * 2
    tokens[:, 0] = 0
    tokens[0, 1] *= 2
    found = names(tokens)
    assert found == sorted(found, key=NAMES.index)
    assert len(found) == 3


def test_drift_is_the_distance_to_the_next_window() -> None:
    assert drift(LoadHistogram(tokens=[[[1, 0]], [[1, 0]], [[0, 3]]])).tolist() == [0, 1]
    assert drift(LoadHistogram(tokens=[[1, 2]])).tolist() == []
    assert drift(LoadHistogram(tokens=[[[1, 1]], [[0, 0]]])).tolist() == [0]


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=8))
def test_any_loads_can_be_diagnosed(values: list[float]) -> None:
    for shape in ((1, 1, -1), (1, -1, 1), (-1, 1, 1)):
        loads = LoadHistogram(tokens=np.reshape(values, shape))
        diagnose(loads)
        assert (drift(loads) >= 0).all()
