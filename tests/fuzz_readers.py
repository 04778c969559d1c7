"""Feed every reader broken and hostile files: it reads them, or says what is wrong; nothing else.

``python -m tests.fuzz_readers [--files 10000] [--only NAME] [--seed 0]`` prints a table: files read,
files refused with a `FormatError` that names the file, and faults (any other exception, a file
that takes more than ten seconds, a crash), each with the number that makes it again. A seeded
sample runs with the other tests.
"""

import argparse
import io
import json
import resource
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save as safetensors_bytes

from moeplace.errors import FormatError, PlanError
from moeplace.expert_bytes import expert_bytes
from moeplace.formats import read_plan, write_plan
from moeplace.formats.loads import read_loads
from moeplace.formats.loads.binary import write as write_loads
from moeplace.instances import generate, write_instance
from moeplace.loads import LoadHistogram
from moeplace.plan import Plan

SECONDS = 10.0
#: Memory that reading may take beyond what the process has, in bytes.
MEMORY = 3 << 30

Files = dict[str, bytes]


@dataclass(frozen=True)
class Reader:
    """Sound files, and how they are read; of a folder, all of it."""

    sound: Callable[[], list[Files]]
    read: Callable[[Path], Any]
    torch: bool = False
    folder: bool = False


# --- sound files -----------------------------------------------------------------------------


def written(name: str, write: Callable[[Path], Any]) -> Files:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        write(path)
        return {name: path.read_bytes()}


def plan(**options: Any) -> Plan:
    slots = [[0, 1, 2, 0, 3, 1], [3, 2, 0, 1, 2, 0]]
    return Plan(slots=slots, rank_slots=[2, 2, 2], experts=4, **options)


def exported(name: str, file: str, **options: Any) -> Callable[[], list[Files]]:
    return lambda: [written(file, lambda path: write_plan(plan(), path, name, **options))]


def vllm_forms() -> list[Files]:
    return [
        {"x.json": json.dumps(value).encode()}
        for value in ([[0, 1, 2], [2, 0, 1]], [0, 1, 2], {"expert_to_ep_rank": [0, 2, 1]})
    ]


def own_plans() -> list[Files]:
    split = np.full((2, 6), 0.5)
    split[0, 2] = split[0, 4] = split[1, 0] = split[1, 3] = 1.0
    return [
        written("x.json", lambda path, p=each: write_plan(p, path))  # type: ignore[misc]
        for each in (plan(), plan(split=split))
    ]


def texts(*contents: Any) -> Callable[[], list[Files]]:
    return lambda: [
        {"x": each.encode() if isinstance(each, str) else json.dumps(each).encode()}
        for each in contents
    ]


def arrays(*each: Any, name: str = "x.npy") -> list[Files]:
    return [written(name, lambda path, a=a: path.write_bytes(npy(a))) for a in each]  # type: ignore[misc]


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def traces() -> list[Files]:
    ids = np.argsort(np.random.default_rng(0).random((40, 3, 9)), axis=2)[:, :, :2]
    stored = written("x.npz", lambda path: np.savez(path, ids.astype(np.uint8)))
    packed = written("x.npz", lambda path: np.savez_compressed(path, ids.astype(np.int16)))
    return [stored, packed, *arrays(ids)]


def loads_npz() -> list[Files]:
    loads = LoadHistogram(tokens=np.arange(24).reshape(2, 3, 4), passes=[1, 2], phase="decode")
    plain = written("x.npz", lambda path: np.savez(path, loads.tokens[0]))
    return [written("x.npz", lambda path: write_loads(loads, path)), plain]


def recorded() -> list[Files]:
    import torch

    held = torch.tensor([[0, 1, 2, 0], [2, 1, 0, 1]])
    record = {"forward_pass_id": 3, "rank": 0, "gatherer_key": "primary"}
    counts = torch.arange(8).reshape(2, 4)
    records = [record | {"global_physical_count": counts + i} for i in range(3)]
    values = [
        {"rank": 0, "logical_count": torch.arange(24, dtype=torch.int32).reshape(2, 3, 4)},
        {"records": records, "last_physical_to_logical_map": held},
    ]
    return [written("x.pt", lambda path, v=v: torch.save(v, path)) for v in values]  # type: ignore[misc]


def statistics() -> list[Files]:
    rows = {f"{i}_{layer}": np.arange(4) + i for i in (1, 2) for layer in (3, 4)}
    meta = {"num_experts": 4, "num_experts_per_token": 2}
    return [
        {
            "meta_info.json": json.dumps(meta).encode(),
            "rank0.safetensors": safetensors_bytes(rows),
            "rank1.safetensors": safetensors_bytes(rows),
        }
    ]


def instance() -> list[Files]:
    problem = generate((2, 4, 6, 2), 0)
    return [written("x.json", lambda path: write_instance(problem, path))]


def config() -> list[Files]:
    value = {
        "model_type": "deepseek_v3",
        "hidden_size": 7168,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "first_k_dense_replace": 3,
        "torch_dtype": "bfloat16",
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }
    return [{"config.json": json.dumps(value).encode()}]


def weights() -> list[Files]:
    names = [f"model.layers.{i}.mlp.experts.{e}.up.weight" for i in (0, 1) for e in (0, 1)]
    return [
        {"x.safetensors": safetensors_bytes({name: np.zeros((2, 3), np.int16) for name in names})}
    ]


ROWS = [[5, 3, 2, 11], [1, 1, 1, 0.5]]

READERS: dict[str, Reader] = {
    "loads adrs": Reader(
        texts({"load_history": [{"logical_expert_load": ROWS}] * 3}),
        lambda path: read_loads(path, "adrs"),
    ),
    "loads csv": Reader(
        texts("1,2,3\n4,5,6\n\n7,8,9\n1,2,3\n"), lambda path: read_loads(path, "csv")
    ),
    "loads instance": Reader(instance, lambda path: read_loads(path, "instance")),
    "loads json": Reader(
        texts([ROWS, ROWS], {"tokens": ROWS, "passes": 3, "phase": "decode"}),
        lambda path: read_loads(path, "json"),
    ),
    "loads lmdeploy": Reader(texts(ROWS), lambda path: read_loads(path, "lmdeploy")),
    "loads npy": Reader(
        lambda: arrays(np.asarray(ROWS), np.arange(12).reshape(2, 3, 2)),
        lambda path: read_loads(path, "npy"),
    ),
    "loads npz": Reader(loads_npz, lambda path: read_loads(path, "npz")),
    "loads omni": Reader(
        texts(",ep_0,ep_1,ep_2\nlayer_0,5,3,2\nlayer_1,1,1,1\n"),
        lambda path: read_loads(path, "omni"),
    ),
    "loads sglang": Reader(recorded, lambda path: read_loads(path, "sglang"), torch=True),
    "loads tensorrt-llm": Reader(
        statistics, lambda path: read_loads(path, "tensorrt-llm"), folder=True
    ),
    "loads trace": Reader(traces, lambda path: read_loads(path, "trace", windows=2)),
    "plan deepseek": Reader(
        exported("deepseek", "x.npz"), lambda path: read_plan(path, "deepseek", ranks=3)
    ),
    "plan moeplace": Reader(own_plans, lambda path: read_plan(path)),
    "plan omni": Reader(exported("omni", "x.npy"), lambda path: read_plan(path, "omni")),
    "plan sglang": Reader(
        exported("sglang", "x.json", first_moe_layer=1),
        lambda path: read_plan(path, "sglang", ranks=3, first_moe_layer=1),
    ),
    "plan sglang .pt": Reader(
        exported("sglang", "x.pt", first_moe_layer=1),
        lambda path: read_plan(path, "sglang", ranks=3, first_moe_layer=1),
        torch=True,
    ),
    "plan tensorrt-llm": Reader(
        exported("tensorrt-llm", "x.yaml", first_moe_layer=1),
        lambda path: read_plan(path, "tensorrt-llm", ranks=3),
    ),
    "plan vllm": Reader(vllm_forms, lambda path: read_plan(path, "vllm", ranks=3, layers=2)),
    "plan vllm-ascend": Reader(
        exported("vllm-ascend", "x.json"), lambda path: read_plan(path, "vllm-ascend")
    ),
    "bytes config": Reader(config, expert_bytes),
    "bytes safetensors": Reader(weights, expert_bytes),
}

# --- broken files ----------------------------------------------------------------------------

NUMBERS = [
    b"-1", b"0", b"-0", b"0.5", b"1e999", b"NaN", b"Infinity", b"1000000000000", b"null", b'"x"',
    b"9223372036854775807", b"9223372036854775808", b"1" + b"0" * 400, b"[]", b"{}", b"true", b"1_0",
    b"65536", b"2147483648", b"1e-320", b"0x10", b"\xff",
]  # fmt: skip
PIECES = [
    b"[" * 100_000, b"{" * 1000, b'{"a":' * 50_000, b"(" * 5000, b",", b"\n", b"\n\n", b"\0", b": ",
    b"1," * 70_000, b"&a [*a, *a]", b"*a", b"!!python/object:os.system x", b"- " * 5000, b'"', b"\\",
    b"\xef\xbb\xbf", b"\xed\xa0\x80", b"layer_0", b"%", b"---\n", b"|u1", b"True", b"<f8", b"|O",
]  # fmt: skip


def broken(data: bytes, random: np.random.Generator) -> bytes:
    """One to three random changes."""
    for _ in range(int(random.choice([1, 1, 1, 2, 3]))):
        data = CHANGES[int(random.integers(len(CHANGES)))](data, random)
    return data


def _spot(data: bytes, random: np.random.Generator) -> int:
    return int(random.integers(len(data) + 1))


def _cut(data: bytes, random: np.random.Generator) -> bytes:
    return data[: _spot(data, random)]


def _flip(data: bytes, random: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for _ in range(int(random.integers(1, 9)) if data else 0):
        changed[int(random.integers(len(changed)))] ^= 1 << int(random.integers(8))
    return bytes(changed)


def _remove(data: bytes, random: np.random.Generator) -> bytes:
    start = _spot(data, random)
    return data[:start] + data[start + int(random.integers(1, 20)) :]


def _repeat(data: bytes, random: np.random.Generator) -> bytes:
    start, stop = sorted((_spot(data, random), _spot(data, random)))
    return data[:stop] + data[start:]


def _noise(data: bytes, random: np.random.Generator) -> bytes:
    start = _spot(data, random)
    return data[:start] + random.bytes(int(random.integers(1, 9))) + data[start + 4 :]


def _insert(data: bytes, random: np.random.Generator) -> bytes:
    start = _spot(data, random)
    return data[:start] + PIECES[int(random.integers(len(PIECES)))] + data[start:]


def _number(data: bytes, random: np.random.Generator) -> bytes:
    """Put something else where a number stands."""
    digits = [i for i, byte in enumerate(data) if 48 <= byte <= 57]
    if not digits:
        return data
    start = stop = digits[int(random.integers(len(digits)))]
    while stop < len(data) and (48 <= data[stop] <= 57 or data[stop] == 46):
        stop += 1
    return data[:start] + NUMBERS[int(random.integers(len(NUMBERS)))] + data[stop:]


def _zipped(data: bytes, random: np.random.Generator) -> bytes:
    """Break a member of a zip, or its name, and zip it again with a sound checksum."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            members = [(info, file.read(info)) for info in file.infolist()]
    except Exception:
        return _number(data, random)
    if not members:
        return data
    which = int(random.integers(len(members)))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for i, (info, content) in enumerate(members):
            if i == which:
                content = CHANGES[int(random.integers(len(CHANGES) - 1))](content, random)
            how = zipfile.ZIP_DEFLATED if random.random() < 0.2 else info.compress_type
            file.writestr(info.filename, content, how)
    return buffer.getvalue()


def _nothing(data: bytes, random: np.random.Generator) -> bytes:
    del random
    return data


CHANGES = [
    _cut, _flip, _remove, _repeat, _noise, _insert, _number, _number, _flip, _nothing, _zipped,
    _zipped, _zipped, _zipped,
]  # fmt: skip

# --- run -------------------------------------------------------------------------------------


class TooSlow(BaseException):
    """A reader took more than SECONDS."""


def _ring(*_: object) -> None:
    raise TooSlow


def outcome(reader: Reader, files: Files, folder: Path) -> str:
    """``read``, ``refused``, or what went wrong."""
    for name, data in files.items():
        (folder / name).write_bytes(data)
    path = folder if reader.folder else folder / next(iter(files))
    signal.signal(signal.SIGALRM, _ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        found = reader.read(path)
    except FormatError as error:
        return "refused" if str(error).startswith(str(path)) else f"no path: {error}"[:200]
    except PlanError as error:  # our own plan files: sound, but the plan breaks a rule
        own = str(error).startswith(f"{path}: Plan") or str(error).startswith(f"{path}: S")
        return "refused" if own else f"PlanError: {error}"[:200]
    except TooSlow:
        return "too slow"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:200]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return "read" if isinstance(found, LoadHistogram | Plan | np.ndarray) else "no result"


def fuzz(name: str, files: int, seed: int = 0, start: int = 0) -> tuple[Counter[str], list[str]]:
    """Counts of outcomes, and faults with the numbers that make them again."""
    reader = READERS[name]
    sound = reader.sound()
    counts: Counter[str] = Counter()
    faults = []
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as text:
        folder = Path(text)
        for each in sound:
            if outcome(reader, each, folder) != "read":
                raise AssertionError(f"{name}: a sound file is not read")
        for number in range(start, start + files):
            key = [seed, number, *name.encode()]
            random = np.random.default_rng(np.random.SeedSequence(key))
            given = dict(sound[int(random.integers(len(sound)))])
            which = list(given)[int(random.integers(len(given)))]
            given[which] = broken(given[which], random)
            found = outcome(reader, given, folder)
            known = found in ("read", "refused")
            counts[found if known else "fault"] += 1
            if not known:
                faults.append(f"{name} number {number}: {found}")
    return counts, faults


def _limit() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(READERS))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        READERS[options.only].sound()  # imports
        _limit()
        began = time.perf_counter()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        counts, faults = fuzz(options.only, options.files, options.seed, options.start)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        answer = {"counts": counts, "faults": faults, "grown": grown >> 10}
        print(json.dumps(answer | {"seconds": time.perf_counter() - began}))
        return
    print(f"{'reader':<20}{'files':>8}{'read':>8}{'refused':>9}{'faults':>8}{'MiB':>6}{'s':>7}")
    failed = False
    for name in [options.only] if options.only else READERS:
        command = [sys.executable, "-m", "tests.fuzz_readers", "--child", "--only", name]
        command += ["--files", str(options.files), "--seed", str(options.seed)]
        command += ["--start", str(options.start)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            failed = True
            print(f"{name:<20}crashed with {run.returncode}: {run.stderr[-300:]}")
            continue
        found = json.loads(run.stdout)
        counts = [found["counts"].get(key, 0) for key in ("read", "refused", "fault")]
        row = f"{name:<20}{sum(counts):>8}{counts[0]:>8}{counts[1]:>9}{counts[2]:>8}"
        print(f"{row}{found['grown']:>6}{found['seconds']:>7.0f}", flush=True)
        for fault in found["faults"][:10]:
            failed = True
            print("  ", fault)
    sys.exit(failed)


if __name__ == "__main__":
    main()
