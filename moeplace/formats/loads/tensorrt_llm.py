"""TensorRT-LLM's folder of expert statistics.

``meta_info.json`` has ``num_experts`` and ``num_experts_per_token``; each ``rank*.safetensors``
has one [experts] row of counts under ``"<iteration>_<layer>"``, and ranks are summed.
"""

import re
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from moeplace._files import PathLike, read_json
from moeplace.errors import FormatError
from moeplace.formats import _safetensors
from moeplace.formats.loads._raw import Ask, Raw, empty, window_of

_Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
_KEY = re.compile(r"(0|[1-9]\d{0,17})_(0|[1-9]\d{0,8})")


class _Meta(msgspec.Struct):
    num_experts: _Count
    num_experts_per_token: _Count


def read(path: PathLike, ask: Ask) -> Raw:
    """Sum the ranks' counts; iterations are forward passes."""
    folder = Path(path)
    if not folder.is_dir():
        raise FormatError(
            f"{path}: is no folder: TensorRT-LLM writes a folder with meta_info.json and "
            "rank*.safetensors. Name that."
        )
    meta = read_json(folder / "meta_info.json", _Meta)
    files = sorted(
        file for file in folder.glob("rank*.safetensors") if not file.stem.endswith("_raw")
    )
    if not files:
        raise FormatError(f"{path}: holds no rank*.safetensors. Record statistics again.")
    keys: dict[str, tuple[int, int]] = {}
    tokens: Any = None
    for n, file in enumerate(files):
        with _safetensors.opened(file) as tensors:
            names = tensors.names()
            if n == 0:
                keys = _keys(file, names)
                layers = sorted({layer for _, layer in keys.values()})
                iterations = sorted({iteration for iteration, _ in keys.values()})
                if len(keys) != len(layers) * len(iterations):
                    raise FormatError(_hole(file, keys, iterations, layers))
                windows = ask.windows or 1
                window = window_of(len(iterations), windows, path, "iterations")
                tokens = empty(path, windows, len(layers), meta.num_experts)
                at = {layer: i for i, layer in enumerate(layers)}
                of = dict(zip(iterations, window, strict=True))
            elif set(names) != set(keys):
                odd = sorted(set(names) ^ set(keys))[0]
                raise FormatError(
                    f"{file}: differs from {files[0].name} in the entry {odd!r}: all ranks must "
                    "have recorded the same iterations and layers. Record again."
                )
            for key, (iteration, layer) in keys.items():
                tokens[of[iteration], at[layer]] += _row(file, tensors, key, meta.num_experts)
        if ask.progress is not None:
            ask.progress(n + 1, len(files))
    note = (
        f"{len(files)} ranks summed, {len(iterations):,} iterations, model layers {layers[0]} to "
        f"{layers[-1]}, top-{meta.num_experts_per_token}"
    )
    return Raw(tokens, passes=np.bincount(window, minlength=windows), notes=(note,))


def _keys(file: Path, names: list[str]) -> dict[str, tuple[int, int]]:
    keys = {}
    for name in names:
        found = _KEY.fullmatch(name)
        if found is None:
            raise FormatError(
                f"{file}: has the entry {name[:60]!r}, expected iteration_layer as in '12_3'. "
                "Files with raw ids are named *_raw.safetensors."
            )
        keys[name] = (int(found[1]), int(found[2]))
    if not keys:
        raise FormatError(f"{file}: is without entries. Record statistics again.")
    return keys


def _hole(
    file: Path, keys: dict[str, tuple[int, int]], iterations: list[int], layers: list[int]
) -> str:
    there = set(keys.values())
    iteration, layer = next(
        (iteration, layer)
        for iteration in iterations
        for layer in layers
        if (iteration, layer) not in there
    )
    return (
        f"{file}: lacks layer {layer} of iteration {iteration}: every iteration needs all of its "
        f"{len(layers)} layers. Record again."
    )


def _row(file: Path, tensors: _safetensors.Tensors, key: str, experts: int) -> Any:
    row = tensors.array(key)
    if row.shape != (experts,) or row.dtype.kind not in "iu" or (row < 0).any():
        raise FormatError(
            f"{file}: {key} has {row.dtype} entries of shape {row.shape}, expected a count from 0 "
            f"on for each of the {experts} experts of meta_info.json. Record again."
        )
    return row
