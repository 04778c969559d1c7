"""Sweeps of independent calls through joblib, on this machine or on an existing cluster.

Inside ``joblib.parallel_config(backend="dask")`` (after `distributed.Client(...)`) or
``backend="ray"`` (after `ray.util.joblib.register_ray()`) the same sweep runs there.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from moeplace.errors import MissingExtraError, ProblemError

T = TypeVar("T")


def sweep(
    call: Callable[..., T], arguments: Iterable[tuple[Any, ...]], workers: int = 1
) -> list[T]:
    """Results of ``call(*each)`` in the order of the arguments.

    Parameters
    ----------
    call : callable
        What a cluster's processes must import, with all it is given, if one is configured.
    arguments : iterable of tuple
    workers : int
        Threads on this machine; at 1, what joblib is configured for, by default one after the
        other.

    Raises
    ------
    Exception
        What a call raises.
    """
    from joblib import Parallel, delayed

    jobs = workers if workers > 1 else None
    run = Parallel(n_jobs=jobs, prefer="threads")
    return list(run(delayed(call)(*each) for each in arguments))


def as_done(
    call: Callable[..., T], arguments: Iterable[tuple[Any, ...]], jobs: int = 1
) -> Iterator[T]:
    """Results of ``call(*each)``, each as soon as it is there (on Ray: all at the end).

    Parameters
    ----------
    call : callable
        What other processes can import, with all it is given.
    arguments : iterable of tuple
    jobs : int
        Processes on this machine; at 1, what joblib is configured for, by default this one, in
        the order of the arguments.

    Raises
    ------
    Exception
        What a call raises.
    """
    from joblib import Parallel, delayed

    given = {"n_jobs": jobs if jobs > 1 else None}
    try:
        run = Parallel(**given, return_as="generator_unordered")
    except ValueError:  # a backend (Ray's) that has all results at the end only
        run = Parallel(**given)
    yield from run(delayed(call)(*each) for each in arguments)


@contextmanager
def on_cluster(dask: str | None = None, ray: str | None = None) -> Iterator[None]:
    """Sweeps inside run on a Dask or Ray cluster; without an address, here.

    Parameters
    ----------
    dask : str, optional
        Address of a scheduler.
    ray : str, optional
        Address of a head node, "auto" for the one of this machine, "local" to start one here.

    Raises
    ------
    MissingExtraError
        If `distributed` or `ray` is not installed.
    ProblemError
        If both are given, or none answers.
    """
    if dask is not None and ray is not None:
        raise ProblemError("A sweep runs on one cluster: give --dask or --ray, not both.")
    if dask is not None:
        with _dask(dask):
            yield
    elif ray is not None:
        with _ray(ray):
            yield
    else:
        yield


@contextmanager
def _dask(address: str) -> Iterator[None]:
    try:
        from distributed import Client
    except ImportError as cause:
        raise MissingExtraError("--dask needs distributed: pip install distributed.") from cause
    import joblib

    try:
        client = Client(address, timeout=10)  # type: ignore[no-untyped-call]
    except (OSError, TimeoutError, ValueError) as cause:
        raise ProblemError(f"No Dask scheduler answers at {address}: {cause}") from cause
    with client, joblib.parallel_config(backend="dask"):
        yield


@contextmanager
def _ray(address: str) -> Iterator[None]:
    try:
        import ray
        from ray.util.joblib import register_ray
    except ImportError as cause:
        raise MissingExtraError("--ray needs ray: pip install ray.") from cause
    import joblib

    try:
        ray.init(address=address, log_to_driver=False, logging_level="error")
    except (ConnectionError, OSError, RuntimeError, ValueError) as cause:
        raise ProblemError(f"No Ray cluster answers at {address}: {cause}") from cause
    register_ray()
    try:
        with joblib.parallel_config(backend="ray", n_jobs=-1):
            yield
    finally:
        ray.shutdown()
