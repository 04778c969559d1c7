"""The engine's balancer in processes: all ranks agree and every expert is served, always."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from moeplace.errors import MoeplaceError
from moeplace.instances import read_instance
from moeplace.integrations import planner
from moeplace.integrations.driver import Job, Rank, run
from moeplace.integrations.settings import Effort, Settings

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    planner.warm()


def job(**options: Any) -> Job:
    """Real loads (DeepSeek-V2-Lite, four tasks one after the other) on four ranks."""
    one = read_instance(ROOT / "instances/real/dsv2lite-tasks_8x9_frontera-resnet.json")
    tokens = np.asarray(one.loads.tokens)[:, :12]
    return Job(
        tokens=np.repeat(tokens, 2, axis=0), speeds=one.cluster.speeds[:4], slots_per_rank=18,
        every=1, passes=14, settings=Settings(effort=Effort()), **options,
    )  # fmt: skip


@pytest.mark.parametrize("engine", ["vllm", "vllm-async", "sglang"])
def test_all_ranks_agree_and_serve_every_expert_at_every_pass(engine: str) -> None:
    ours = run(job(engine=engine))
    assert ours.failures == 0
    assert ours.checks == 8 * 14
    assert ours.rebalances >= 5
    assert ours.copies > 0
    if engine == "vllm":
        theirs = run(job(engine=engine, ours=False))  # every run starts four processes
        assert ours.step < theirs.step
        assert ours.copies < theirs.copies


@pytest.fixture
def rank(tmp_path: Path) -> Iterator[Rank]:
    """A run of one rank, in this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield Rank(0, replace(job(), speeds=np.ones(1), slots_per_rank=64))
    dist.destroy_process_group()


def test_the_checks_find_what_is_wrong(rank: Rank) -> None:
    rank.check()
    rank.weights[4, 7, 1] = 8
    with pytest.raises(MoeplaceError, match="weights are not those"):
        rank.check()
    rank.map[4, 7] = 8
    with pytest.raises(MoeplaceError, match="not served"):
        rank.check()


def test_options_that_no_engine_has_are_refused() -> None:
    with pytest.raises(MoeplaceError, match="Engine must be one of"):
        run(job(engine="other"))
