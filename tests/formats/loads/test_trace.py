"""Traces are counted in pieces, whatever the size of the pieces."""

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeplace.errors import FormatError
from moeplace.formats import _npy
from moeplace.formats.loads import inspect, read_loads


def ids(tokens: int, layers: int = 3, k: int = 2, experts: int = 8) -> Any:
    random = np.random.default_rng(1)
    return np.argsort(random.random((tokens, layers, experts)), axis=2)[:, :, :k]


def counted(trace: Any, windows: int, experts: int) -> Any:
    """What the reader is to find, one id at a time."""
    counts = np.zeros((windows, trace.shape[1], experts))
    for token, layers in enumerate(trace):
        for layer, chosen in enumerate(layers):
            for expert in chosen:
                counts[token * windows // len(trace), layer, expert] += 1
    return counts


@pytest.mark.parametrize("chunk", [1, 7, 100, 1 << 22])
@pytest.mark.parametrize("kind", [np.uint8, np.int16, ">i2", np.uint64])
def test_pieces_of_any_size_count_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, kind: Any
) -> None:
    monkeypatch.setattr(_npy, "CHUNK", chunk)
    trace = ids(50)
    for path, save in ((tmp_path / "t.npz", np.savez_compressed), (tmp_path / "t.npy", np.save)):
        save(path, trace.astype(kind))
        for windows in (1, 3, 50):
            seen: list[tuple[int, int]] = []
            loads = read_loads(
                path,
                "trace",
                windows=windows,
                experts=9,
                progress=lambda done, total, seen=seen: seen.append((done, total)),
            )
            assert (loads.tokens == counted(trace, windows, 9)).all()
            assert seen[-1] == (50, 50)
            assert sorted(seen) == seen


def test_experts_are_the_largest_id_and_this_is_said(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    np.savez(path, ids(50).astype(np.uint8))
    found = inspect(path, "trace")
    assert found.loads.experts == 8
    assert "largest id + 1" in found.notes[1]
    assert len(inspect(path, "trace", experts=8).notes) == 1


def test_experts_that_appear_late_are_counted(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(_npy, "CHUNK", 4)
    trace = np.arange(60, dtype=np.uint8).reshape(30, 1, 2)
    np.savez(tmp_path / "t.npz", trace)
    loads = read_loads(tmp_path / "t.npz", "trace", windows=2)
    assert (loads.tokens == counted(trace, 2, 60)).all()


@pytest.mark.parametrize(
    ("trace", "message"),
    [
        (np.full((9, 2, 2), 3, np.uint8), "id 3 at token 0, layer 0, choice 1: a token goes to"),
        (np.asarray([[[0, 1]], [[2, -1]]]), "id -1 at token 1, layer 0, choice 1: ids must be"),
        (np.asarray([[[0, 1]], [[9, 1]]]), "id 9 at token 1, layer 0, choice 0: .* 0 to 7"),
        (np.ones((2, 2)), "has float64 entries of shape"),
        (np.ones((2, 2, 2)), "a trace has integer ids"),
        (np.ones((0, 2, 2), int), r"of shape \(0, 2, 2\)"),
        (np.asfortranarray(ids(10)), "is in Fortran order"),
        (np.asarray(["a"], object), "pickled objects are never loaded"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, trace: Any, message: str) -> None:
    path = tmp_path / "t.npz"
    np.savez(path, trace)
    with pytest.raises(FormatError, match=message) as caught:
        read_loads(path, "trace", experts=8)
    assert str(caught.value).startswith(f"{path}: ")


def test_the_only_array_is_meant(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", a=ids(5), b=ids(5))
    with pytest.raises(FormatError, match="holds the arrays a, b: a trace has one"):
        read_loads(tmp_path / "t.npz", "trace")
    np.savez(tmp_path / "t.npz", ids(5))
    with pytest.raises(FormatError, match="has 5 tokens, too few for 6 windows"):
        read_loads(tmp_path / "t.npz", "trace", windows=6)


MEASURE = """
import resource, sys
from moeplace.formats.loads import read_loads
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loads = read_loads(sys.argv[1], "trace", experts=64)
print(int(loads.tokens.sum()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_long_trace_takes_little_memory(tmp_path: Path) -> None:
    """Two hundred megabytes of ids, never more than a tenth of that at once."""
    path = tmp_path / "t.npz"
    tokens, layers, k = 500_000, 50, 8
    row = (np.arange(layers)[:, None] + np.arange(k)).astype(np.uint8)
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file,
        file.open("ids.npy", "w", force_zip64=True) as stream,
    ):
        head = {"descr": "|u1", "fortran_order": False, "shape": (tokens, layers, k)}
        np.lib.format.write_array_header_1_0(stream, head)
        for _ in range(0, tokens, 5000):
            stream.write(np.tile(row, (5000, 1, 1)).tobytes())
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)], capture_output=True, check=True, timeout=120
    )
    total, kilobytes = map(int, run.stdout.split())
    assert total == tokens * layers * k
    assert kilobytes < 120_000
