"""One rank among others: process groups, agreement on errors, timers."""

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from moeplace.errors import MoeplaceError, ReplayError
from moeplace.replay.settings import Runtime, cores, said_by_all

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Where this rank stands in the job.

    `data` carries the layer's rows (NCCL on GPUs, gloo on CPU); `control` is always gloo, so
    that what is said beside the measurement never touches the device.
    """

    rank: int
    ranks: int
    on_host: int  #: ranks on this machine
    device: torch.device
    dtype: torch.dtype
    data: dist.ProcessGroup | None
    control: dist.ProcessGroup
    host: str

    @property
    def cuda(self) -> bool:
        """Whether ranks run on GPUs."""
        return self.device.type == "cuda"

    @property
    def serialised(self) -> bool:
        """Whether ranks must take turns, there being fewer processor cores than ranks."""
        return not self.cuda and self.on_host > cores()

    @property
    def label(self) -> str:
        """What a figure measured here may be called."""
        return "gpu-measured" if self.cuda else "cpu-emulated"

    def barrier(self) -> None:
        """Wait for all ranks, on the host."""
        dist.all_reduce(torch.zeros(1), group=self.control)

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in order, on every rank."""
        found: list[Any] = [None] * self.ranks
        dist.all_gather_object(found, value, group=self.control)
        return found

    def first(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        held: list[Any] = [value]
        dist.broadcast_object_list(held, src=0, group=self.control)
        found: T = held[0]
        return found

    def together(self, step: Callable[[], T]) -> T:
        """Run a step that may fail on some rank: if it does, all ranks raise the first error."""
        found, failed = None, None
        try:
            found = step()
        except MoeplaceError as cause:
            failed = str(cause), isinstance(cause, ValueError)  # as all errors of input are
        messages = self.gather(failed)
        for rank, told in enumerate(messages):
            if told is not None:
                message, bad_input = told
                same = all(other == told for other in messages)
                raise said_by_all(
                    message if same else f"Rank {rank}: {message}", bad_input=bad_input
                )
        return found  # type: ignore[return-value]

    def agree(self, what: str, value: str) -> None:
        """Raise ReplayError unless all ranks hold the same value."""
        values = self.gather(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise said_by_all(
                    f"Rank {rank} has another {what} than rank 0: all ranks must run the same. "
                    "Give every node the same files, options and version."
                )

    def take_turns(self) -> Iterator[bool]:
        """Yields once for each rank if ranks take turns (true for this one's), else once, true."""
        if not self.serialised:
            yield True
            return
        for turn in range(self.ranks):
            self.barrier()
            yield turn == self.rank
        self.barrier()


@contextmanager
def joined(runtime: Runtime, store: str) -> Iterator[World]:
    """Join the other ranks by the RANK, WORLD_SIZE, LOCAL_RANK of the environment.

    Parameters
    ----------
    runtime : Runtime
    store : str
        Where ranks meet: ``env://``, ``tcp://host:port`` or ``file://path``.

    Raises
    ------
    ReplayError
        If the world has another size than asked for, or the ranks cannot meet.
    """
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local = int(os.environ.get("LOCAL_RANK", rank))
    on_host = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    torch.set_num_threads(1)
    device = _device(runtime, local, on_host)
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=runtime.timeout)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            backend, init_method=store, rank=rank, world_size=ranks, timeout=timeout
        )
        control = dist.new_group(backend="gloo", timeout=timeout)
    except (RuntimeError, ValueError, OSError) as cause:
        raise ReplayError(_cannot_meet(store, cause)) from cause
    yield World(
        rank=rank,
        ranks=ranks,
        on_host=on_host,
        device=device,
        dtype=_dtype(runtime, device),
        data=None,
        control=control,
        host=socket.gethostname(),
    )
    dist.destroy_process_group()  # not after an error: it may wait for ranks that are gone


def _cannot_meet(store: str, cause: Exception) -> str:
    reason = str(cause).strip().splitlines()[0][:200]
    if "EADDRINUSE" in str(cause) or "already in use" in str(cause):
        return (
            f"The port of {_address(store)} is taken by another program: choose another one "
            "(--port, or --master-port of torchrun)."
        )
    return f"Ranks could not meet at {_address(store)}: {reason}. Check address, port and firewall."


def _address(store: str) -> str:
    if store != "env://":
        return store
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def _device(runtime: Runtime, local: int, on_host: int) -> torch.device:
    seen = torch.cuda.device_count()
    kind = runtime.device
    if kind == "auto":
        kind = "cuda" if seen >= on_host else "cpu"
    if kind == "cpu":
        return torch.device("cpu")
    if seen < on_host:
        raise ReplayError(
            f"{on_host} ranks on this machine need a GPU each, but torch {torch.__version__} sees "
            f"{seen}. Lower the number of ranks, or use --device cpu."
        )
    if runtime.emulate:
        raise ReplayError(
            "Slow ranks are emulated on CPU only: GPUs are measured as they are. Drop --emulate "
            "or use --device cpu."
        )
    return torch.device("cuda", local)


def _dtype(runtime: Runtime, device: torch.device) -> torch.dtype:
    if runtime.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    found: torch.dtype = getattr(torch, runtime.dtype)
    return found


class Span:
    """Time of a stretch of this rank's work: host clocks on CPU, an event pair on a GPU."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self.cpu = self._wall = 0.0
        if self._cuda:
            event: Callable[..., Any] = torch.cuda.Event
            self._events = [event(enable_timing=True) for _ in range(2)]

    def __enter__(self) -> "Span":
        if self._cuda:
            self._events[0].record()
        self._wall = -time.perf_counter()
        self.cpu = -time.thread_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.cpu += time.thread_time()
        self._wall += time.perf_counter()
        if self._cuda:
            self._events[1].record()

    @property
    def wall(self) -> float:
        """Seconds; on a GPU only after synchronisation."""
        if self._cuda:
            return float(self._events[0].elapsed_time(self._events[1])) / 1000
        return self._wall
