"""Sweeps give the same on threads and on a Dask cluster, one of whose workers is killed."""

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import moeplace as mp
from moeplace.errors import MissingExtraError, ProblemError
from moeplace.instances import generate
from moeplace.requests import Profiles, Requests
from moeplace.simulate import Engine, simulate
from moeplace.sweep import as_done, on_cluster, sweep


def served(seed: int, folder: str = "", wait: float = 0.0) -> tuple[int, float]:
    """A small simulation; tells its process in the folder, then takes its time."""
    if folder:
        (Path(folder) / f"{os.getpid()}-{seed}-{time.time_ns()}").touch()
        time.sleep(wait)
    made = generate((2, 16, 16, 4), 1).aggregate()
    cluster = mp.Cluster.from_speeds(made.cluster.speeds * 1e6, 4)
    problem = mp.Problem(made.loads, cluster)
    profiles = Profiles.of(problem.loads, count=8, seed=seed)
    requests = Requests.poisson(profiles, 40, rate=300, prompt=100, output=3, seed=seed)
    plan = mp.Plan(slots=np.tile(np.arange(16), (2, 1)), rank_slots=[4] * 4, experts=16)  # type: ignore[arg-type]
    found = simulate(problem, plan, requests, profiles, Engine(top_k=2), seed=seed)
    return seed, float(found.last.sum())


def test_threads_give_what_one_gives() -> None:
    calls = [(seed,) for seed in range(6)]
    assert sweep(served, calls) == sweep(served, calls, workers=2)


def test_errors_come_through() -> None:
    with pytest.raises(ProblemError):
        sweep(served, [(0,), (-1,)], workers=2)


def test_results_as_they_are_done_come_from_processes() -> None:
    calls = [(seed,) for seed in range(4)]
    assert list(as_done(served, calls)) == sweep(served, calls)
    assert sorted(as_done(divmod, [(9, 4), (7, 2)], jobs=2)) == [(2, 1), (3, 1)]
    told = as_done(served, [(0,), (-1,), (1,)])
    assert next(told) == served(0)
    with pytest.raises(ProblemError):
        next(told)


def test_no_scheduler_is_told() -> None:
    pytest.importorskip("distributed", reason="distributed is not installed")
    with pytest.raises(ProblemError, match="No Dask scheduler"), on_cluster("tcp://127.0.0.1:9"):
        pass


@pytest.mark.filterwarnings("ignore")
def test_a_killed_worker_loses_nothing(tmp_path: Path) -> None:
    """Three worker processes; one is killed while it works: its calls run again elsewhere."""
    distributed = pytest.importorskip("distributed", reason="distributed is not installed")
    import threading

    calls = [(seed, str(tmp_path), 0.4) for seed in range(24)]
    expected = [served(seed) for seed in range(24)]
    killed = []

    def kill() -> None:
        for _ in range(600):
            time.sleep(0.05)
            at_work = sorted(tmp_path.iterdir())
            if len(at_work) >= 4:
                pid = int(at_work[-1].name.split("-")[0])
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
                return

    with distributed.LocalCluster(
        n_workers=3, threads_per_worker=1, processes=True, dashboard_address=None
    ) as cluster:
        mine = os.getpid()
        killer = threading.Thread(target=kill)
        killer.start()
        with on_cluster(dask=cluster.scheduler_address):
            found = sweep(served, calls)
            assert sorted(as_done(served, calls[:3])) == expected[:3]
        killer.join()
    assert found == expected
    pids = {int(path.name.split("-")[0]) for path in tmp_path.iterdir()}
    assert len(killed) == 1
    assert mine not in pids  # it ran on the cluster
    assert len(pids) >= 3
    assert len(list(tmp_path.iterdir())) > 24  # what was lost ran again


def test_two_clusters_are_one_too_many() -> None:
    with pytest.raises(ProblemError, match="not both"), on_cluster("tcp://127.0.0.1:9", "auto"):
        pass


def test_without_ray_its_name_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match="pip install ray"), on_cluster(ray="auto"):
        pass


@pytest.mark.filterwarnings("ignore")
def test_ray_runs_the_same_in_other_processes(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    calls = [(seed, str(tmp_path), 0.3) for seed in range(6)]
    with on_cluster(ray="local"):
        found = sweep(served, calls)
        assert sorted(as_done(served, [(seed,) for seed in range(3)])) == found[:3]
    assert found == [served(seed) for seed in range(6)]
    pids = {int(path.name.split("-")[0]) for path in tmp_path.iterdir()}
    assert os.getpid() not in pids
    assert len(list(tmp_path.iterdir())) == 6


@pytest.mark.filterwarnings("ignore")
def test_no_ray_cluster_is_told() -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    with pytest.raises(ProblemError, match="No Ray cluster"), on_cluster(ray="auto"):
        pass
