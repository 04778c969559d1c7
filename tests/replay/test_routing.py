"""Which experts tokens go to: exact counts, no expert twice, traces, and bad input."""

from pathlib import Path

import numpy as np
import pytest

from moeplace.errors import FormatError, ProblemError
from moeplace.plan import Plan
from moeplace.replay.measure import spread
from moeplace.replay.routing import (
    TokenRouting,
    draw_routing,
    expected_slot_tokens,
    read_trace,
    replica_tables,
)

LOADS = np.array([[5.0, 3, 2, 2, 0], [1, 1, 1, 1, 1], [40, 30, 20, 5, 5]])


def test_exact_counts_are_the_shares_rounded() -> None:
    found = draw_routing(LOADS, 60, 2, layers=(0, 2), seed=0)
    assert found.counts.tolist() == [[50, 30, 20, 20, 0], [48, 36, 24, 6, 6]]
    assert found.assignments == 120
    assert (found.tokens, found.top_k, found.layers) == (60, 2, (0, 2))


@pytest.mark.parametrize("draw", ["exact", "sampled"])
def test_no_token_goes_to_one_expert_twice(draw: str) -> None:
    for seed in range(5):  # TokenRouting refuses it
        found = draw_routing(LOADS, 31, 2, layers=(0, 1, 2), seed=seed, draw=draw)  # type: ignore[arg-type]
        assert (found.counts.sum(axis=1) == 62).all()
        assert found.counts.max() <= 31


def test_sampled_counts_have_the_noise_of_a_draw() -> None:
    load = np.full((1, 8), 1e12)  # not fewer than are drawn: a multinomial
    counts = np.stack(
        [
            draw_routing(load, 4000, 2, layers=(0,), seed=seed, draw="sampled").counts[0]
            for seed in range(30)
        ]
    )
    assert counts.std() == pytest.approx(np.sqrt(8000 / 8 * 7 / 8), rel=0.15)


def test_all_of_a_histogram_drawn_without_return_is_the_histogram() -> None:
    load = np.array([[30.0, 20, 10]])
    found = draw_routing(load, 30, 2, layers=(0,), seed=3, draw="sampled")
    assert found.counts.tolist() == [[30, 20, 10]]


def test_the_same_seed_gives_the_same_routing_and_layers_do_not_depend_on_each_other() -> None:
    both = draw_routing(LOADS, 20, 2, layers=(0, 2), seed=7)
    one = draw_routing(LOADS, 20, 2, layers=(2,), seed=7)
    assert (both.experts_of[1] == one.experts_of[0]).all()
    assert (both.experts_of != draw_routing(LOADS, 20, 2, layers=(0, 2), seed=8).experts_of).any()


def test_shares_that_distinct_experts_cannot_have_are_refused() -> None:
    with pytest.raises(ProblemError, match=r"Expert 0 has 0\.9 of the load of layer 0.*to 1"):
        draw_routing(np.array([[9.0, 0.5, 0.5]]), 10, 2, layers=(0,))
    with pytest.raises(ProblemError, match="load on 1 experts but tokens go to 2"):
        draw_routing(np.array([[9.0, 0, 0]]), 10, 2, layers=(0,))
    with pytest.raises(ProblemError, match="Tokens must be a whole number from 1"):
        draw_routing(LOADS, 0, 2, layers=(0,))
    with pytest.raises(ProblemError, match="Draw must be one of exact, sampled"):
        draw_routing(LOADS, 9, 2, layers=(0,), draw="some")  # type: ignore[arg-type]


def test_tokens_start_on_ranks_in_almost_equal_parts() -> None:
    found = draw_routing(LOADS, 10, 2, layers=(0,))
    parts = [found.shard(rank, 4) for rank in range(4)]
    assert [part.stop - part.start for part in parts] == [2, 3, 2, 3]
    assert parts[-1].stop == 10


def test_a_trace_is_read_by_layer(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).permuted(np.tile(np.arange(5), (7, 3, 1)), axis=2)[..., :2]
    np.savez(tmp_path / "trace.npz", topk_ids=ids)
    found = read_trace(tmp_path / "trace.npz", 5, (0, 2))
    assert (found.experts_of == ids[:, [0, 2]].transpose(1, 0, 2)).all()
    assert "trace.npz" in found.source
    with pytest.raises(FormatError, match="has 3 layers, so there is no layer 3"):
        read_trace(tmp_path / "trace.npz", 5, (3,))
    with pytest.raises(ProblemError, match="experts are 0 to 3"):
        read_trace(tmp_path / "trace.npz", 4, (0, 1, 2))


def test_other_files_than_traces_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    with pytest.raises(FormatError, match="not a NumPy archive that can be read"):
        read_trace(path, 5, (0,))
    path.write_bytes(b"no archive")
    with pytest.raises(FormatError, match="not a NumPy archive that can be read"):
        read_trace(path, 5, (0,))
    np.savez(path, other=np.zeros(3))
    with pytest.raises(FormatError, match="lacks the array topk_ids"):
        read_trace(path, 5, (0,))
    np.savez(path, topk_ids=np.zeros((3, 3)))
    with pytest.raises(FormatError, match="whole numbers"):
        read_trace(path, 5, (0,))


def test_routing_that_names_an_expert_twice_is_refused() -> None:
    with pytest.raises(ProblemError, match="token 1 twice to expert 3"):
        TokenRouting(experts_of=np.array([[[0, 1], [3, 3]]]), experts=4, layers=(0,), source="")


def test_expected_tokens_follow_shares_windows_and_even_splits() -> None:
    slots, counts = np.array([[0, 1, 0, -1, 2, 0]]), np.array([12, 5, 7])
    even = Plan(slots=slots, rank_slots=np.array([2, 2, 2]), experts=3)
    assert expected_slot_tokens(even, counts, 0).tolist() == [4, 5, 4, 0, 7, 4]
    split = np.array([[[0.5, 1, 0, 0, 1, 0.5]], [[0, 1, 0.25, 0, 1, 0.75]]])
    weighted = even.with_split(split)
    assert expected_slot_tokens(weighted, counts, 0, 0).tolist() == [6, 5, 0, 0, 7, 6]
    assert expected_slot_tokens(weighted, counts, 0, 1).tolist() == [0, 5, 3, 0, 7, 9]


def test_no_number_below_one_falls_behind_the_last_replica_with_a_share() -> None:
    thirds = np.array([[1 / 3, 1, 1 / 3, 0, 1, 1 - 2 / 3]])
    plan = Plan(slots=np.array([[0, 1, 0, -1, 2, 0]]), rank_slots=np.array([2, 2, 2]), experts=3)
    _, ends = replica_tables(plan.with_split(thirds), 0)
    assert ends[0, 2] == 2
    zero_last = np.array([[0.5, 1, 0.5, 0, 1, 0]])
    slots, ends = replica_tables(plan.with_split(zero_last), 0)
    chosen = (np.nextafter(1, 0) >= ends[0]).sum()
    assert slots[0, chosen] == 2


def test_layers_are_spread_over_the_model() -> None:
    assert spread(58, 4) == (0, 19, 38, 57)
    assert spread(2, 4) == (0, 1)
    assert spread(5, 1) == (0,)
