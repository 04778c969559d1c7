"""How many bytes the weights of one expert have: what a move of a replica copies.

From a model's ``config.json``, for the families in `_FAMILIES`, or exactly from its safetensors
headers. Scales of quantised weights are included. What is not known is an error, never a guess.
"""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from moeplace._check import IntArray
from moeplace._files import PathLike, read_json
from moeplace.errors import FormatError
from moeplace.formats import _safetensors

_Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 32)]
_Layers = Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
_Index = Annotated[int, msgspec.Meta(ge=0, le=1 << 16)]

#: Bytes of a weight of each type that a config may name.
_DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
#: Gate, up and down projection.
MATRICES = 3


class _Quantised(msgspec.Struct):
    quant_method: str = ""
    fmt: str | None = None
    weight_block_size: list[_Size] | None = None
    modules_to_not_convert: list[str] | None = None
    ignored_layers: list[str] | None = None


class _Config(msgspec.Struct):
    model_type: str
    hidden_size: _Size
    num_hidden_layers: _Layers
    torch_dtype: str | None = None
    dtype: str | None = None
    quantization_config: _Quantised | None = None
    intermediate_size: _Size | None = None
    moe_intermediate_size: _Size | None = None
    first_k_dense_replace: _Index | None = None
    moe_layer_freq: msgspec.Raw = msgspec.Raw(b"null")
    decoder_sparse_step: _Size | None = None
    mlp_only_layers: list[_Index] | None = None


#: The field with the width of an expert, and how the MoE layers are told, for each model type.
_FAMILIES = {
    "deepseek_v2": ("moe_intermediate_size", "leading"),
    "deepseek_v3": ("moe_intermediate_size", "leading"),
    "kimi_k2": ("moe_intermediate_size", "leading"),
    "glm4_moe": ("moe_intermediate_size", "leading"),
    "qwen2_moe": ("moe_intermediate_size", "sparse"),
    "qwen3_moe": ("moe_intermediate_size", "sparse"),
    "mixtral": ("intermediate_size", "all"),
    "olmoe": ("intermediate_size", "all"),
    "phimoe": ("intermediate_size", "all"),
}


def expert_bytes(path: PathLike) -> IntArray:
    """Bytes of one expert's weights in each MoE layer, scales included.

    Parameters
    ----------
    path : path
        A ``config.json``, a ``.safetensors`` file, its ``.safetensors.index.json``, or a model's
        folder, where the index or files are preferred if they are there.

    Returns
    -------
    array [MoE layers]
        DeepSeek-V3 in fp8: 44,050,944 each (44,040,192 of weights, 10,752 of scales).

    Raises
    ------
    FormatError
        If the file cannot be read, or its model type, number type or quantisation is not known,
        or a layer's experts differ in size.
    """
    found = Path(path)
    if found.is_dir():
        return _of_folder(found)
    if found.name.endswith(".index.json"):
        return _of_index(found)
    if found.suffix == ".safetensors":
        return _of_headers(path, [found])
    return _of_config(path)


def _of_folder(folder: Path) -> IntArray:
    index = sorted(folder.glob("*.safetensors.index.json"))
    files = sorted(folder.glob("*.safetensors"))
    if index and files:
        return _of_index(index[0])
    if files:
        return _of_headers(folder, files)
    return _of_config(folder / "config.json")


# ------------------------------------------------------------------------------ config.json


def _of_config(path: PathLike) -> IntArray:
    config = read_json(path, _Config)
    if config.model_type not in _FAMILIES:
        raise FormatError(
            f"{path}: $.model_type {config.model_type[:40]!r} is not known here: known are "
            f"{', '.join(_FAMILIES)}. Give the model's safetensors instead."
        )
    field, rule = _FAMILIES[config.model_type]
    width: int | None = getattr(config, field)
    if width is None:
        raise FormatError(f'{path}: $ lacks the field "{field}". Add it.')
    layers = _moe_layers(path, config, rule)
    size = _bytes(path, config, width)
    return np.full(layers, size, dtype=np.int64)


def _moe_layers(path: PathLike, config: _Config, rule: str) -> int:
    total = config.num_hidden_layers
    freq = bytes(config.moe_layer_freq)
    if freq not in (b"null", b"1"):
        raise FormatError(
            f"{path}: $.moe_layer_freq other than 1 is not known here. Give the model's "
            "safetensors instead."
        )
    if rule == "all":
        return total
    if rule == "leading":
        if config.first_k_dense_replace is None:
            raise FormatError(f'{path}: $ lacks the field "first_k_dense_replace". Add it.')
        layers = total - config.first_k_dense_replace
    else:
        step, dense = config.decoder_sparse_step or 1, set(config.mlp_only_layers or [])
        layers = sum((i + 1) % step == 0 and i not in dense for i in range(total))
    if layers < 1:
        raise FormatError(
            f"{path}: leaves no MoE layer among {total}. Check that it is a MoE model's config."
        )
    return layers


def _bytes(path: PathLike, config: _Config, width: int) -> int:
    weights = MATRICES * config.hidden_size * width
    quantised = config.quantization_config
    if quantised is None:
        dtype = config.torch_dtype or config.dtype
        if dtype not in _DTYPES:
            raise FormatError(
                f"{path}: $.torch_dtype is {dtype!r}: known are {', '.join(_DTYPES)}. Give the "
                "model's safetensors instead."
            )
        return weights * _DTYPES[dtype]
    block = quantised.weight_block_size
    kept = [*(quantised.modules_to_not_convert or []), *(quantised.ignored_layers or [])]
    some = next((name for name in kept if "experts" in name and "shared" not in name), None)
    known = quantised.quant_method == "fp8" and quantised.fmt in (None, "e4m3")
    if not known or block is None or len(block) != 2 or some is not None:
        what = f"{quantised.quant_method or 'no'} method, format {quantised.fmt}, block {block}"
        raise FormatError(
            f"{path}: $.quantization_config ({what}{f', {some[:40]} kept' if some else ''}) is not "
            "known here: known is fp8, e4m3, with weight_block_size and all experts converted. "
            "Give the model's safetensors instead."
        )
    # One byte a weight, and one float32 scale a block: gate and up are [width, hidden], down is
    # [hidden, width].
    across = _blocks(width, config.hidden_size, block)
    return weights + 4 * (2 * across + _blocks(config.hidden_size, width, block))


def _blocks(rows: int, columns: int, block: list[int]) -> int:
    return math.ceil(rows / block[0]) * math.ceil(columns / block[1])


# ------------------------------------------------------------------------------ safetensors

#: A tensor of one expert, and one that all experts of a layer share.
_ONE = re.compile(r".*\blayers\.(\d{1,6})\..*\bexperts\.(\d{1,7})\..+")
_FUSED = re.compile(r".*\blayers\.(\d{1,6})\..*\bexperts\.(?!\d).+")


class _Indexed(msgspec.Struct):
    weight_map: dict[str, str]


def _of_index(path: Path) -> IntArray:
    names = read_json(path, _Indexed).weight_map
    shards = sorted({shard for name, shard in names.items() if "experts." in name})
    for shard in shards:
        if Path(shard).name != shard:
            raise FormatError(
                f"{path}: $.weight_map names the file {shard[:60]!r}: shards lie beside the index. "
                "Correct it."
            )
    return _of_headers(path, [path.parent / shard for shard in shards])


def _of_headers(path: PathLike, files: Iterable[Path]) -> IntArray:
    single: dict[int, dict[int, int]] = {}
    fused: dict[int, int] = {}
    for file in files:
        with _safetensors.opened(file) as tensors:
            for name in tensors.names():
                if (one := _ONE.fullmatch(name)) is not None:
                    experts = single.setdefault(int(one[1]), {})
                    expert = int(one[2])
                    experts[expert] = experts.get(expert, 0) + _size(file, name, tensors)
                elif (shared := _FUSED.fullmatch(name)) is not None:
                    layer = int(shared[1])
                    fused[layer] = fused.get(layer, 0) + _share(file, name, tensors)
    if not single and not fused:
        raise FormatError(
            f"{path}: names no tensor of an expert (…layers.N.….experts.…). Check that it is a MoE "
            "model's checkpoint."
        )
    sizes = []
    for layer in sorted(single.keys() | fused.keys()):
        experts = single.get(layer, {0: 0})
        few = min(experts, key=experts.__getitem__)
        if experts[few] != max(experts.values()):
            many = max(experts, key=experts.__getitem__)
            raise FormatError(
                f"{path}: expert {few} of layer {layer} has {experts[few]:,} bytes but expert "
                f"{many} has {experts[many]:,}: all need as many. Is a shard missing?"
            )
        sizes.append(experts[few] + fused.get(layer, 0))
    return np.asarray(sizes, dtype=np.int64)


def _size(file: Path, name: str, tensors: _safetensors.Tensors) -> int:
    kind, shape = tensors.kind(name)
    if kind not in _safetensors.BYTES:
        raise FormatError(
            f"{file}: {name} has numbers of type {kind}, whose size is not known here: known are "
            f"{', '.join(_safetensors.BYTES)}."
        )
    return math.prod(shape) * _safetensors.BYTES[kind]


def _share(file: Path, name: str, tensors: _safetensors.Tensors) -> int:
    """One expert's part of a tensor [experts, ...]."""
    _, shape = tensors.kind(name)
    if not shape or not shape[0]:
        raise FormatError(
            f"{file}: {name} has the shape {shape}, expected one part for each expert first."
        )
    return _size(file, name, tensors) // shape[0]
