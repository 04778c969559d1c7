"""Ranks as processes of this machine: none outlives the call, and one message says what failed.

Each rank is ``python -m moeplace.replay.launch FOLDER`` with a pickled job in the folder. It
ends by itself when its standard input, a pipe from the parent, closes: also if the parent is
killed. The parent ends all ranks as soon as one fails or the time is up.
"""

import contextlib
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from moeplace.errors import MoeplaceError, ProblemError, ReplayError
from moeplace.replay.settings import Runtime, require_torch, said_by_all, under_launcher

if TYPE_CHECKING:
    from moeplace.replay.world import World

GRACE = 2.0  #: seconds in which the others may tell why, once one rank has failed
_PEER = re.compile(r"gloo|connection|socket|nccl|timed? ?out|broken pipe|store", re.IGNORECASE)
#: Exit codes: this rank failed; its input is at fault; it lost touch with another rank.
_FAULT, _BAD_INPUT, _LOST = 1, 2, 3


class Job(Protocol):
    """What ranks run. It is pickled; `run` may import torch, the class's module may not."""

    @property
    def runtime(self) -> Runtime:
        """Ranks and what they run on."""

    def run(self, world: "World") -> Any:
        """Do this rank's part; rank 0's return value is the answer."""


def run_job(job: Job) -> Any:
    """Run a job on local processes, or as one of its ranks if torchrun started this process.

    Returns
    -------
    The answer; None on the ranks of torchrun other than 0.

    Raises
    ------
    MissingExtraError
        If torch is not installed.
    ProblemError
        If torchrun started another number of ranks, or a rank finds the input at fault.
    ReplayError
        If a rank fails or dies, ranks cannot meet, or the time is up.
    """
    require_torch()
    if under_launcher():
        answer = _as_rank(job, "env://")
        return answer if os.environ["RANK"] == "0" else None
    return _local(job)


def _as_rank(job: Job, store: str) -> Any:
    from moeplace.replay.world import joined

    ranks = int(os.environ["WORLD_SIZE"])
    if ranks != job.runtime.ranks:
        raise said_by_all(
            f"The job has {ranks} ranks (WORLD_SIZE) but {job.runtime.ranks} were asked for: the "
            "two must be equal. Start as many processes as the plan has ranks.",
            bad_input=True,
        )
    limit = threading.Timer(job.runtime.timeout, _out_of_time, (job.runtime.timeout,))
    limit.daemon = True
    limit.start()
    try:
        with joined(job.runtime, store) as world:
            return job.run(world)
    except MoeplaceError:
        raise
    except RuntimeError as cause:
        if _PEER.search(str(cause)):
            reason = str(cause).strip().splitlines()[0][:160]
            raise ReplayError(
                f"Rank {os.environ['RANK']} lost touch with another rank ({reason}). See the "
                "message of the rank that failed first."
            ) from cause
        raise
    finally:
        limit.cancel()


def _out_of_time(seconds: float) -> None:
    sys.stderr.write(f"error: {_too_late(seconds)}\n")
    sys.stderr.flush()
    os._exit(_FAULT)


def _too_late(seconds: float) -> str:
    return (
        f"The run did not end within {seconds:g} s, so it was stopped. Give more --timeout, or "
        "less work (fewer rounds, layers or tokens)."
    )


# -------------------------------------------------------------------------------- the parent


def _local(job: Job) -> Any:
    runtime = job.runtime
    if runtime.port:
        _check_port(runtime.port)
    deadline = time.monotonic() + runtime.timeout
    with tempfile.TemporaryDirectory(prefix="moeplace-") as name:
        folder = Path(name)
        (folder / "job").write_bytes(pickle.dumps(job))
        ranks: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(runtime.ranks):
                ranks.append(_start(folder, runtime, rank))
            _await(ranks, folder, runtime, deadline)
        finally:
            _end(ranks)
        answer = folder / "answer"
        if not answer.exists():
            raise ReplayError("Rank 0 ended without an answer. This is a fault of moeplace.")
        return pickle.loads(answer.read_bytes())


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as cause:
            reason = (cause.strerror or str(cause)).lower()
            raise ReplayError(
                f"Port {port} of this machine cannot be used by the ranks ({reason}): choose "
                "another --port, or none (0)."
            ) from cause


def _start(folder: Path, runtime: Runtime, rank: int) -> "subprocess.Popen[bytes]":
    loopback = "lo" if sys.platform.startswith("linux") else "lo0"
    environment = {
        "GLOO_SOCKET_IFNAME": loopback,
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(runtime.ranks),
        "LOCAL_WORLD_SIZE": str(runtime.ranks),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    store = f"tcp://127.0.0.1:{runtime.port}" if runtime.port else f"file://{folder}/store"
    with (folder / f"log{rank}").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "moeplace.replay.launch", str(folder), store],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C reaches the parent alone, which ends them
        )


def _await(
    ranks: "list[subprocess.Popen[bytes]]", folder: Path, runtime: Runtime, deadline: float
) -> None:
    """Return when all ranks ended well; raise ReplayError for the first cause if one did not."""
    while True:
        codes = [process.poll() for process in ranks]
        if any(code not in (None, 0) for code in codes):
            break
        if all(code == 0 for code in codes):
            return
        if time.monotonic() > deadline:
            raise ReplayError(_too_late(runtime.timeout))
        time.sleep(0.02)
    until = time.monotonic() + GRACE
    while time.monotonic() < until and any(process.poll() is None for process in ranks):
        time.sleep(0.02)
    codes = [process.poll() for process in ranks]
    raise _why(codes, folder)


def _why(codes: list[int | None], folder: Path) -> MoeplaceError:
    """The first cause: a killed rank, then a rank's own error, then one that lost another."""
    killed = [
        rank
        for rank, code in enumerate(codes)
        if code is not None and code < 0 and not (folder / f"error{rank}").exists()
    ]
    if killed:
        number = -(codes[killed[0]] or 0)
        with contextlib.suppress(ValueError):
            cause = f"signal {signal.Signals(number).name}"
            if number == signal.SIGKILL:
                cause += ", perhaps for lack of memory"
            return ReplayError(f"Rank {killed[0]} was killed ({cause}), so the run was stopped.")
        return ReplayError(
            f"Rank {killed[0]} was killed (signal {number}), so the run was stopped."
        )
    failed = [rank for rank, code in enumerate(codes) if code not in (None, 0)]
    rank = next((rank for rank in failed if codes[rank] != _LOST), failed[0])
    told = folder / f"error{rank}"
    if told.exists():
        kind = ProblemError if codes[rank] == _BAD_INPUT else ReplayError
        return kind(told.read_text())
    lines = (folder / f"log{rank}").read_text(errors="replace").strip().splitlines()
    last = f": {lines[-1][:200]}" if lines else " without a word"
    return ReplayError(
        f"Rank {rank} ended with exit code {codes[rank]}{last}. The run was stopped."
    )


def _end(ranks: "list[subprocess.Popen[bytes]]") -> None:
    for process in ranks:
        if process.poll() is None:
            process.kill()
    for process in ranks:
        process.wait()
        if process.stdin is not None:
            process.stdin.close()


# --------------------------------------------------------------------------------- a rank


def _main(folder: Path, store: str) -> int:
    threading.Thread(target=_end_with_parent, args=(folder,), daemon=True).start()
    rank = os.environ["RANK"]
    job = pickle.loads((folder / "job").read_bytes())
    try:
        answer = _as_rank(job, store)
    except MoeplaceError as cause:
        (folder / f"error{rank}").write_text(str(cause))
        traceback.print_exc()
        if isinstance(cause.__cause__, RuntimeError):
            return _LOST
        return _BAD_INPUT if isinstance(cause, ValueError) else _FAULT
    except Exception as cause:
        told = f"Rank {rank} failed: {type(cause).__name__}: {cause}"
        (folder / f"error{rank}").write_text(told.strip().splitlines()[0][:400])
        traceback.print_exc()
        return _FAULT
    if rank == "0":
        part = folder / "answer.part"
        part.write_bytes(pickle.dumps(answer))
        part.replace(folder / "answer")
    return 0


def _end_with_parent(folder: Path) -> None:
    """End with the parent; one that was killed could not remove its folder."""
    while os.read(0, 1):  # not sys.stdin, whose lock would be held when Python ends
        pass
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(_FAULT)


if __name__ == "__main__":
    ended = _main(Path(sys.argv[1]), sys.argv[2])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(ended)  # threads of gloo that have lost a rank may abort an orderly exit
