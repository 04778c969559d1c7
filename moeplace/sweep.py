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
    """Results of ``call(*each)``, each as soon as it is there, from processes.

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

    run = Parallel(n_jobs=jobs if jobs > 1 else None, return_as="generator_unordered")
    yield from run(delayed(call)(*each) for each in arguments)


@contextmanager
def on_dask(address: str | None) -> Iterator[None]:
    """Sweeps inside run on the Dask cluster of this scheduler; without an address, here.

    Raises
    ------
    MissingExtraError
        If `distributed` is not installed.
    ProblemError
        If the scheduler does not answer.
    """
    if address is None:
        yield
        return
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
