"""Hostile files are refused quickly and within little memory; a sample of broken ones, too.

`tests.fuzz_readers` does the same ten thousand times for each reader.
"""

import importlib.util
import io
import os
import resource
import struct
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeplace import _files
from moeplace.errors import FormatError
from moeplace.expert_bytes import expert_bytes
from moeplace.formats import read_plan
from moeplace.formats.loads import read_loads
from tests.fuzz_readers import READERS, fuzz

TORCH = importlib.util.find_spec("torch") is not None


@pytest.mark.parametrize("name", READERS)
def test_broken_files_are_read_or_refused(name: str) -> None:
    if READERS[name].torch and not TORCH:
        pytest.skip("torch is not installed")
    counts, faults = fuzz(name, 60, seed=1)
    assert faults == []
    assert counts["read"] + counts["refused"] == 60


@contextmanager
def little(seconds: float = 30.0, mebibytes: int = 400) -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    yield
    assert time.perf_counter() - began < seconds
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10 < mebibytes


def head(shape: str, kind: str = "<f8", order: str = "False") -> bytes:
    text = f"{{'descr': '{kind}', 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


NPY = {
    "claims 10^12 entries": (head("(1000, 1000, 1000000)") + b"\0" * 64, "is cut off or not whole"),
    "claims 10^40 entries": (head(f"({10**40},)"), "is cut off or not whole"),
    "negative axis": (head("(-1, 2)") + b"\0" * 16, "no axis may be negative"),
    "empty axes beside huge ones": (head(f"(0, {10**12})"), "empty|shape"),
    "objects": (head("(1, 1)", "|O") + b"\0" * 8, "pickled objects are never loaded"),
    "code in the header": (head("__import__('os').system('x')"), "broken header"),
    "deep header": (head("(" * 4000 + ")" * 4000), "broken header"),
    "zero-width entries": (head(f"({10**12}, 1)", "<U0"), "numbers|entries|shape"),
    "complex": (head("(1, 1)", "<c16") + b"\0" * 16, "entries of type complex128"),
    "long header": (b"\x93NUMPY\x02\x00" + struct.pack("<I", 1 << 31), "has a header of version"),
    "version 9": (b"\x93NUMPY\x09\x00" + b"\0" * 99, "has a header of version"),
    "no header": (b"\x93NUMPY", "header"),
}


@pytest.mark.parametrize(("data", "message"), NPY.values(), ids=NPY)
@pytest.mark.parametrize("reader", ["npy", "trace", "omni"])
def test_arrays(tmp_path: Path, data: bytes, message: str, reader: str) -> None:
    path = tmp_path / "x.npy"
    path.write_bytes(data)
    with little(), pytest.raises(FormatError, match=message):
        read_plan(path, reader) if reader == "omni" else read_loads(path, reader)


def bomb(path: Path, shape: tuple[int, ...], kind: str = "|u1") -> Path:
    """Zeros, a thousand times smaller when packed."""
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file,
        file.open("x.npy", "w", force_zip64=True) as stream,
    ):
        stream.write(head(str(shape), kind))
        left = int(np.prod(shape)) * np.dtype(kind).itemsize
        while left > 0:
            stream.write(bytes(min(left, 1 << 22)))
            left -= 1 << 22
    return path


def test_a_packed_array_is_judged_before_it_is_unpacked(tmp_path: Path) -> None:
    path = bomb(tmp_path / "x.npz", (1 << 26,))
    with little(), pytest.raises(FormatError, match="has 67,108,864 entries"):
        read_loads(path, "npz")
    path = bomb(tmp_path / "x.npz", ((1 << 30) + 1, 1, 1))
    with little(), pytest.raises(FormatError, match="unpacks to .* times its size"):
        read_loads(path, "trace")
    path = bomb(tmp_path / "x.npz", (1 << 20, 2, 8))
    with (
        little(),
        pytest.raises(FormatError, match="the id 0 at token 0, .* once at most"),
    ):
        read_loads(path, "trace")
    path = bomb(tmp_path / "x.npz", (1, 1 << 25, 1))
    with little(), pytest.raises(FormatError, match="the limits are .* layers"):
        read_loads(path, "trace")


def test_a_zip_with_a_lying_directory(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    buffer = io.BytesIO()
    np.savez(buffer, np.ones((2, 2)))
    data = bytearray(buffer.getvalue())
    directory = data.rindex(b"PK\x01\x02")
    data[directory + 24 : directory + 28] = struct.pack("<I", 1 << 31)  # the size unpacked
    path.write_bytes(data)
    with little(), pytest.raises(FormatError, match=r"x.npz: "):
        read_loads(path, "npz")


DEEP = "[" * 100_000
TEXTS: dict[str, tuple[str, str]] = {
    "json": (DEEP, "nested 2 or 3 deep, got depth 100000"),
    "lmdeploy": ('{"x":' * 100_000, "nested 2 deep"),
    "adrs": ('{"load_history": ' + DEEP, "expected|nested too deeply|whole JSON"),
    "instance": ('{"loads": ' + DEEP, "expected|nested too deeply|lacks"),
    "csv": ("1," * 10_000_000, "line 1 has 10,000,001 columns: the limit"),
    "omni": ("," + "ep_0," * 5_000_000, "line 1 must be ,ep_0"),
}


@pytest.mark.parametrize(("name", "case"), TEXTS.items(), ids=TEXTS)
def test_texts(tmp_path: Path, name: str, case: tuple[str, str]) -> None:
    path = tmp_path / "x"
    path.write_text(case[0])
    with little(), pytest.raises(FormatError, match=case[1]):
        read_loads(path, name)
    with little(), pytest.raises(FormatError):
        read_loads(path)


@pytest.mark.parametrize("name", ["json", "csv", "lmdeploy", "adrs", "omni"])
def test_texts_with_too_many_values(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"[[" + b"0," * (_files.MAX_VALUES + 1) + b"0]]")
    with little(), pytest.raises(FormatError, match="lists more than the 16,777,216"):
        read_loads(path, name)


def test_a_wrong_value_in_a_long_file_is_placed_but_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"[[" + b" " * _files.SHOWN + b'0, "x"]]')
    with little(), pytest.raises(FormatError, match=r"\$\[0\]\[1\]: expected `float`.*: \.\.\."):
        read_loads(path, "json")


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(20)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "line 1: anchors and aliases are not read"),
        ("a: &a [*a]", "anchors and aliases"),
        (DEEP, "is nested more than 8 deep|is not YAML"),
        ("{" * 100_000, "is nested more than 8 deep|is not YAML"),
        ("- " * 100_000, "is nested more than 8 deep|is not YAML"),
        ("a: !!python/object/apply:os.system [x]", "tags are not read"),
        ("? " * 100_000, "is nested more than 8 deep|is not YAML|key"),
        ("num_slots: " + "9" * 100_000, "num_slots|lacks"),
        ("a: 1\n" * 100_000, "the key 'a' stands twice"),
        ("x", "is text, expected a map"),
        ("%YAML 9.9\n---\n", "is not YAML"),
        ("x" * (9 << 20), "is longer than the 8 MiB"),
    ],
)
def test_yaml(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with little(), pytest.raises(FormatError, match=message):
        read_plan(path, "tensorrt-llm", ranks=2)


PLANS = {
    "sglang": '{"physical_to_logical_map": ',
    "vllm": "",
    "vllm-ascend": '{"moe_layer_count": 1, "layer_list": ',
}


@pytest.mark.parametrize(("name", "start"), PLANS.items(), ids=PLANS)
@pytest.mark.parametrize("rest", [DEEP, "[[0, 1048577]]}", "[[0, 1000000]]}", "[[" + "0," * 99_999])
def test_plans(tmp_path: Path, name: str, start: str, rest: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(start + rest)
    options: dict[str, Any] = {} if name == "vllm-ascend" else {"ranks": 2}
    if name == "sglang":
        options["first_moe_layer"] = 0
    with little(), pytest.raises(FormatError, match=r"x.json: "):
        read_plan(path, name, **options)


@pytest.mark.parametrize("name", ["deepseek", "omni"])
def test_plans_as_arrays(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x"
    if name == "omni":
        np.save(path.with_suffix(".npy"), np.broadcast_to(np.int8(1), (2, 1 << 24, 1)))
        path = path.with_suffix(".npy")
    else:
        np.savez(path, phy2log=np.asarray([[1 << 60, 0]]), log2phy=0, logcnt=0)
        path = path.with_suffix(".npz")
    with little(), pytest.raises(FormatError, match="more than the 16,777,216|cannot hold"):
        read_plan(path, name, **({} if name == "omni" else {"ranks": 2}))


def test_long_files_are_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.json"
    with path.open("wb") as file:
        file.truncate(_files.MAX_BYTES + 1)
    for read in (
        lambda: read_loads(path, "json"),
        lambda: read_loads(path, "csv"),
        lambda: read_plan(path, "vllm", ranks=1),
        lambda: expert_bytes(path),
    ):
        with little(), pytest.raises(FormatError, match="is longer than the 256 MiB"):
            read()
    monkeypatch.setattr(_files, "MAX_BYTES", 1)
    with pytest.raises(FormatError, match="begins like none of"):
        read_loads(path)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no such device here")
def test_endless_files_are_refused() -> None:
    with little(seconds=20, mebibytes=900), pytest.raises(FormatError, match="is longer than"):
        read_loads("/dev/zero", "json")


def test_torch_files(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "x.pt"
    torch.save({"logical_count": torch.zeros(4, 4, 4)}, path)
    whole = path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(whole)) as file:
        members = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(name, data + bytes((1 << 26) if "data/0" in name else 0))
    with little(), pytest.raises(FormatError, match="bytes compressed: torch.save does not"):
        read_loads(path, "sglang")
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FormatError, match="is not a zip file"):
        read_loads(path, "sglang")
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members.items():
            name_of_code = b"c" + b"os." * 200_000 + b"\nsystem\n."
            file.writestr(name, name_of_code if name.endswith("data.pkl") else data)
    with little(), pytest.raises(FormatError, match="loading it could run code"):
        read_loads(path, "sglang")
    torch.save({"physical_to_logical_map": torch.zeros(1).expand(10**6, 10**6)}, path)
    with little(), pytest.raises(FormatError, match="of at most"):
        read_plan(path, "sglang", ranks=1, first_moe_layer=0)


def test_weights_with_huge_headers(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for data in (
        struct.pack("<Q", 1 << 62) + b"{}",
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        struct.pack("<Q", 2) + b"{}" + os.urandom(64),
        b"",
    ):
        path.write_bytes(data)
        with little(), pytest.raises(FormatError, match=r"x.safetensors: "):
            expert_bytes(path)
