"""Bytes of an expert, from a config and from the weights themselves."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from moeplace.errors import FormatError
from moeplace.expert_bytes import expert_bytes

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
DEEPSEEK_V3: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "torch_dtype": "bfloat16",
    "quantization_config": FP8 | {"activation_scheme": "dynamic"},
}
QWEN3: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "torch_dtype": "bfloat16",
}
MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "dtype": "bfloat16",
}


def saved(folder: Path, config: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("config", "layers", "size"),
    [
        (DEEPSEEK_V3, 58, 44_040_192 + 10_752),
        (DEEPSEEK_V3 | {"quantization_config": None}, 58, 2 * 44_040_192),
        (QWEN3, 48, 2 * 3 * 2048 * 768),
        (QWEN3 | {"mlp_only_layers": [0, 5], "decoder_sparse_step": 2}, 23, 2 * 3 * 2048 * 768),
        (QWEN3 | {"moe_intermediate_size": 100, "quantization_config": FP8}, 48, 614_400 + 4 * 48),
        (MIXTRAL, 32, 2 * 3 * 4096 * 14336),
    ],
)
def test_known_models(tmp_path: Path, config: Any, layers: int, size: int) -> None:
    saved(tmp_path, config)
    for path in (tmp_path, tmp_path / "config.json"):
        assert expert_bytes(path).tolist() == [size] * layers


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (QWEN3 | {"model_type": "gpt_oss"}, "model_type 'gpt_oss' is not known here: known are"),
        (QWEN3 | {"torch_dtype": "int3"}, "torch_dtype is 'int3': known are float32"),
        (QWEN3 | {"torch_dtype": None}, "torch_dtype is None"),
        (QWEN3 | {"moe_intermediate_size": None}, 'lacks the field "moe_intermediate_size"'),
        (QWEN3 | {"hidden_size": 0}, r"\$.hidden_size: expected `int` >= 1"),
        (QWEN3 | {"hidden_size": "2048"}, r"\$.hidden_size: expected `int`, got `str`"),
        (QWEN3 | {"decoder_sparse_step": 99}, "leaves no MoE layer among 48"),
        (QWEN3 | {"num_hidden_layers": 10**12}, r"num_hidden_layers: expected `int` <="),
        (DEEPSEEK_V3 | {"moe_layer_freq": 2}, "moe_layer_freq other than 1"),
        (DEEPSEEK_V3 | {"first_k_dense_replace": None}, 'lacks the field "first_k_dense_replace"'),
        (QWEN3 | {"quantization_config": {"quant_method": "awq"}}, "awq method"),
        (QWEN3 | {"quantization_config": {"quant_method": "fp8"}}, "block None"),
        (QWEN3 | {"quantization_config": FP8 | {"fmt": "e5m2"}}, "format e5m2"),
        (
            QWEN3 | {"quantization_config": FP8 | {"modules_to_not_convert": ["l.0.mlp.experts"]}},
            "l.0.mlp.experts kept",
        ),
        ({}, "lacks the required field"),
    ],
)
def test_what_is_not_known_is_refused(tmp_path: Path, config: Any, message: str) -> None:
    path = saved(tmp_path, config)
    with pytest.raises(FormatError, match=message) as caught:
        expert_bytes(path)
    assert str(caught.value).startswith(f"{path}: ")


def weights(layers: Any = (3, 4), experts: int = 2) -> dict[str, Any]:
    found: dict[str, Any] = {"model.embed.weight": np.zeros(3, np.float32)}
    for layer in layers:
        mlp = f"model.layers.{layer}.mlp"
        found[f"{mlp}.shared_experts.up_proj.weight"] = np.zeros((64, 8), np.uint8)
        for expert in range(experts):
            for name, shape in (("gate", (4, 8)), ("up", (4, 8)), ("down", (8, 4))):
                weight = np.zeros(shape, np.uint8)
                found[f"{mlp}.experts.{expert}.{name}_proj.weight"] = weight
                scale = np.zeros((1, 1), np.float32)
                found[f"{mlp}.experts.{expert}.{name}_proj.weight_scale_inv"] = scale
    return found


def test_weights_are_counted_with_their_scales(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        assert expert_bytes(path).tolist() == [3 * 32 + 12] * 2


def test_shards_are_found_by_the_index(tmp_path: Path) -> None:
    names = sorted(weights())
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: weights()[name] for name in part}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    table = {name: file for file, part in parts.items() for name in part}
    index.write_text(json.dumps({"metadata": {}, "weight_map": table}))
    assert expert_bytes(index).tolist() == expert_bytes(tmp_path).tolist() == [108, 108]
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(FormatError, match="b.safetensors: no such file"):
        expert_bytes(index)
    index.write_text(json.dumps({"weight_map": {names[1]: "../a.safetensors"}}))
    with pytest.raises(FormatError, match="shards lie beside the index"):
        expert_bytes(index)


def test_experts_in_one_tensor_share_it(tmp_path: Path) -> None:
    fused = {
        "model.layers.0.mlp.experts.gate_up_proj": np.zeros((4, 8, 6), np.float16),
        "model.layers.0.mlp.experts.down_proj": np.zeros((4, 3, 8), np.float16),
    }
    save_file(fused, tmp_path / "model.safetensors")
    assert expert_bytes(tmp_path).tolist() == [2 * (48 + 24)]


def test_bad_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    uneven = weights()
    del uneven["model.layers.4.mlp.experts.1.up_proj.weight"]
    save_file(uneven, path)
    with pytest.raises(FormatError, match="expert 1 of layer 4 has 76 bytes but expert 0 has 108"):
        expert_bytes(path)
    save_file({"x": np.zeros(3)}, path)
    with pytest.raises(FormatError, match="names no tensor of an expert"):
        expert_bytes(path)
    path.write_bytes(b"\xff" * 20)
    with pytest.raises(FormatError, match="is no whole safetensors file"):
        expert_bytes(path)


def test_types_whose_size_is_unknown_are_refused(tmp_path: Path) -> None:
    head = {"model.layers.0.mlp.experts.0.w": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}
    text = json.dumps(head).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0\0")
    with pytest.raises(FormatError, match="x.safetensors: "):
        expert_bytes(path)
