"""The GPU code without a GPU: fake tensors on "cuda" run its checks on a CPU build of torch."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
dist = pytest.importorskip("torch.distributed")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

from moeplace.replay.kernels import Experts, Groups  # noqa: E402
from moeplace.replay.layer import (  # noqa: E402
    Layer,
    Route,
    choose_slots,
    exchange_counts,
    expert_weights,
)
from moeplace.replay.routing import replica_tables  # noqa: E402
from tests.replay.jobs import EXPERTS, TOP_K, plans, routing  # noqa: E402

RANKS, HIDDEN, INTER = 2, 32, 48


@pytest.fixture
def fake() -> Iterator[Any]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        yield mode
    dist.destroy_process_group()


def cuda_experts(kernel: str) -> Experts:
    """As on a GPU that has grouped products: there is none here to ask."""
    experts = Experts(kernel, 1.0, torch.device("cpu"), torch.bfloat16)
    assert experts.name == kernel
    return experts


def route(sizes: list[int]) -> Route:
    """A route on "cuda" with these rows for each of rank 0's slots, all sent by rank 0."""
    device, rows = torch.device("cuda", 0), sum(sizes)
    return Route(
        token=torch.arange(rows, device=device) // TOP_K,
        weight=torch.ones(rows, device=device),
        send_sizes=[rows, 0],
        receive_sizes=[rows, 0],
        by_slot=torch.arange(rows, device=device),
        arrived=torch.arange(rows, device=device),
        groups=Groups.of(sizes, device),
    )


@pytest.mark.parametrize("kernel", ["grouped", "loop"])
def test_the_whole_layer_stays_on_the_gpu(fake: Any, kernel: str) -> None:
    sizes = [6, 0, 9, 3]
    device = torch.device("cuda", 0)
    up = torch.empty((4, 2 * INTER, HIDDEN), dtype=torch.bfloat16, device=device)
    down = torch.empty((4, HIDDEN, INTER), dtype=torch.bfloat16, device=device)
    tokens = torch.empty((6, HIDDEN), dtype=torch.bfloat16, device=device)
    outputs = Layer(up, down, cuda_experts(kernel))(tokens, route(sizes))
    assert outputs.device == device
    assert outputs.dtype == torch.float32
    assert outputs.shape == (6, HIDDEN)


def test_weights_are_made_on_the_gpu_and_repeats_have_their_groups_there(fake: Any) -> None:
    device = torch.device("cuda", 0)
    groups = Groups.of([5, 0, 7], device)
    experts = cuda_experts("grouped")
    experts.factor = 2.5
    whole, part = experts.repeats(groups)
    assert whole is groups
    assert part.sizes == [5, 0, 1]
    assert part.ends.device == device
    assert part.ends.dtype == torch.int32


def test_grouped_products_refuse_float32_on_a_gpu(fake: Any) -> None:
    device = torch.device("cuda", 0)
    up = torch.empty((2, 2 * INTER, HIDDEN), device=device)
    down = torch.empty((2, HIDDEN, INTER), device=device)
    tokens = torch.empty((4, HIDDEN), device=device)
    with pytest.raises(RuntimeError):
        Layer(up, down, cuda_experts("grouped"))(tokens, route([4, 8]))


def test_slots_are_chosen_and_counts_exchanged_on_the_gpu(fake: Any) -> None:
    device = torch.device("cuda", 0)
    plan = plans(RANKS)["weighted"]
    slots, ends = replica_tables(plan, 0)
    ids = torch.empty(30, dtype=torch.int64, device=device)
    with fake:
        tables = (
            torch.empty(slots.shape, dtype=torch.int64, device=device),
            torch.empty(ends.shape, dtype=torch.float64, device=device),
        )
    chosen = choose_slots(ids, *tables, 0.25)
    assert chosen.device == device
    assert chosen.shape == (30,)
    sent = torch.zeros(plan.slots.shape[1], dtype=torch.int64, device=device)
    received = exchange_counts(sent, plan.rank_slots.tolist(), int(plan.rank_slots[0]))
    assert received.device == device
    assert received.shape == (RANKS, plan.rank_slots[0])


def test_a_forgotten_device_is_caught(fake: Any) -> None:
    """What the tests above are worth: tensors on two devices do not pass."""
    device = torch.device("cuda", 0)
    plan = plans(RANKS)["weighted"]
    slots, ends = replica_tables(plan, 0)
    ids = torch.empty(30, dtype=torch.int64, device=device)
    with pytest.raises(RuntimeError, match="device"):
        choose_slots(
            ids,
            torch.empty(slots.shape, dtype=torch.int64),
            torch.empty(ends.shape, dtype=torch.float64),
            0.25,
        )


def test_replicas_are_chosen_by_quota() -> None:
    """On the CPU, where values exist: each replica gets its share within four tokens."""
    plan = plans(4)["weighted"]
    slots, ends = replica_tables(plan, 0)
    ids = torch.tensor(routing(2000).experts_of[0]).flatten()
    chosen = choose_slots(ids, torch.tensor(slots), torch.tensor(ends), 0.125).numpy()
    assert plan.split is not None
    held = plan.slots[0]
    assert (held[chosen] == ids.numpy()).all()
    got = np.bincount(chosen, minlength=held.size)
    count = np.bincount(ids, minlength=EXPERTS)
    expected = np.where(held >= 0, plan.split[0] * count[np.maximum(held, 0)], 0)
    assert np.abs(got - expected).max() <= 4


def test_replicas_of_an_expert_have_the_same_weights() -> None:
    sizes = (HIDDEN, INTER, 0, torch.device("cpu"), torch.float32)
    here, there = expert_weights([3, -1, 5], 2, *sizes), expert_weights([5, 3], 2, *sizes)
    for mine, theirs in zip(here, there, strict=True):
        assert torch.equal(mine[0], theirs[1])
        assert torch.equal(mine[2], theirs[0])
        assert not mine[1].any()
