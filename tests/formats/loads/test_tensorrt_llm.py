"""TensorRT-LLM's folder: ranks are summed, iterations are passes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from moeplace.errors import FormatError
from moeplace.formats.loads import detect, inspect, read_loads


def row(iteration: int, layer: int, rank: int = 0, experts: int = 3) -> Any:
    return np.arange(experts, dtype=np.int64) + 10 * iteration + 100 * layer + 1000 * rank


def saved(folder: Path, *, ranks: int = 2, **changes: Any) -> Path:
    (folder / "meta_info.json").write_text(
        json.dumps({"num_experts": 3, "num_experts_per_token": 2, "other": 1})
    )
    for rank in range(ranks):
        rows = {f"{i}_{layer}": row(i, layer, rank) for i in (8, 9, 10) for layer in (3, 4)}
        if rank == ranks - 1:
            rows = {k: v for k, v in (rows | changes).items() if v is not None}
        save_file(rows, folder / f"rank{rank}.safetensors")
    save_file({"8_3": np.zeros((5, 2))}, folder / "rank0_raw.safetensors")
    return folder


def test_ranks_are_summed_and_iterations_are_passes_in_numerical_order(tmp_path: Path) -> None:
    path = saved(tmp_path)
    assert detect(path) == "tensorrt-llm"
    loads = read_loads(path, windows=3)
    for window, iteration in enumerate((8, 9, 10)):
        for layer in (3, 4):
            expected = row(iteration, layer, 0) + row(iteration, layer, 1)
            assert loads.tokens[window, layer - 3].tolist() == expected.tolist()
    assert loads.passes is not None
    assert loads.passes.tolist() == [1, 1, 1]
    found = inspect(path)
    assert (found.loads.tokens == loads.tokens.sum(axis=0)).all()
    assert found.loads.passes == [3]
    assert "2 ranks summed, 3 iterations, model layers 3 to 4, top-2" in found.notes[0]


@pytest.mark.parametrize(
    ("ranks", "changes", "message"),
    [
        (1, {"9_4": None}, r"rank0.safetensors: lacks layer 4 of iteration 9"),
        (2, {"9_4": None}, r"rank1.safetensors: differs from rank0.* in the entry '9_4'"),
        (1, {"x": row(1, 1)}, "has the entry 'x', expected iteration_layer"),
        (2, {"9_4": row(1, 1, experts=4)}, r"9_4 has int64 entries of shape \(4,\)"),
        (2, {"9_4": -row(1, 1)}, "expected a count from 0 on for each of the 3 experts"),
        (2, {"9_4": row(1, 1) / 2}, "9_4 has float64 entries"),
        (0, {}, r"holds no rank\*.safetensors"),
    ],
)
def test_bad_folders_are_refused_with_file_and_entry(
    tmp_path: Path, ranks: int, changes: dict[str, Any], message: str
) -> None:
    path = saved(tmp_path, ranks=ranks, **changes)
    with pytest.raises(FormatError, match=message) as caught:
        read_loads(path)
    assert str(caught.value).startswith(str(path))


def test_broken_parts_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    whole = (path / "rank1.safetensors").read_bytes()
    for data in (b"", whole[:50], whole[:-3], b"\xff" * 100):
        (path / "rank1.safetensors").write_bytes(data)
        with pytest.raises(FormatError, match="rank1.safetensors: is no whole safetensors file"):
            read_loads(path)
    saved(path)
    (path / "meta_info.json").write_text('{"num_experts": 0, "num_experts_per_token": 2}')
    with pytest.raises(FormatError, match=r"meta_info.json: \$.num_experts: expected `int` >= 1"):
        read_loads(path)
