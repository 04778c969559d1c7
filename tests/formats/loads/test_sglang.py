"""Dumps of SGLang's recorder, in its three modes."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeplace.errors import FormatError
from moeplace.formats.loads import detect, inspect, read_loads

torch = pytest.importorskip("torch")

MAP = [[0, 1, 2, 0], [2, 1, 0, 1]]
COUNTS = [[[5, 1, 2, 3], [1, 2, 3, 4]], [[0, 1, 0, 0], [9, 0, 0, 0]], [[1, 1, 1, 1], [2, 2, 2, 2]]]


def record(number: int, counts: Any, **more: Any) -> dict[str, Any]:
    return {
        "forward_pass_id": number,
        "rank": 0,
        "gatherer_key": "primary",
        "global_physical_count": torch.tensor(counts),
        **more,
    }


def per_pass() -> dict[str, Any]:
    records = [record(7 + i, counts) for i, counts in enumerate(COUNTS)]
    return {"records": records, "last_physical_to_logical_map": torch.tensor(MAP)}


def saved(folder: Path, value: Any) -> Path:
    path = folder / "expert_distribution_recorder_1.pt"
    torch.save(value, path)
    return path


def test_stat(tmp_path: Path) -> None:
    counts = torch.arange(12, dtype=torch.int32).reshape(2, 2, 3)
    dump = {"rank": 0, "logical_count": counts, "average_utilization_rate_over_window": 0.5}
    path = saved(tmp_path, dump)
    assert detect(path) == "sglang"
    assert (read_loads(path).tokens == counts.numpy()).all()


@pytest.mark.parametrize("per_token", [False, True])
def test_slots_are_folded_into_experts_with_the_map_of_the_dump(
    tmp_path: Path, per_token: bool
) -> None:
    dump = per_pass()
    if per_token:
        for each in dump["records"]:
            each["topk_ids_of_layer"] = torch.zeros((2, 5, 2), dtype=torch.int16)
    path = saved(tmp_path, dump)
    folded = np.zeros((3, 2, 3))
    for i, counts in enumerate(COUNTS):
        for layer, row in enumerate(counts):
            for slot, count in enumerate(row):
                folded[i, layer, MAP[layer][slot]] += count
    loads = read_loads(path, windows=3)
    assert (loads.tokens == folded).all()
    assert loads.passes is not None
    assert loads.passes.tolist() == [1, 1, 1]
    found = inspect(path)
    assert (found.loads.tokens == folded.sum(axis=0)).all()
    assert found.loads.passes == [3]
    assert "3 records of 3 forward passes on rank 0" in found.notes[0]


def test_records_of_one_pass_are_one_pass(tmp_path: Path) -> None:
    dump = per_pass()
    dump["records"][1]["forward_pass_id"] = 7
    assert read_loads(saved(tmp_path, dump)).passes == [2]


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("code ran",))


def test_a_pickle_that_would_run_code_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(tmp_path, {"logical_count": Evil()})
    with pytest.raises(FormatError, match=r"loading it could run code, so it is refused"):
        read_loads(path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(FormatError, match="is not a zip file, as torch.save writes"):
        read_loads(path, "sglang")
    assert capsys.readouterr().out == ""


def change(**changes: Any) -> dict[str, Any]:
    return per_pass() | changes


def of_record(**changes: Any) -> dict[str, Any]:
    dump = per_pass()
    dump["records"][1] |= changes
    return dump


BAD: dict[str, tuple[Any, str]] = {
    "other keys": ({"a": 1}, "holds the keys a, expected what SGLang's"),
    "a list": ([1], "holds list, expected"),
    "flat counts": ({"logical_count": torch.ones(3)}, r"logical_count has the shape \(3,\)"),
    "no tensor": ({"logical_count": [[[1]]]}, "logical_count is list, expected a tensor"),
    "sparse": (
        {"logical_count": torch.ones(1, 1, 1).to_sparse()},
        "holds more than tensors and plain",
    ),
    "complex": ({"logical_count": torch.ones(1, 1, 1) * 1j}, "sparse, quantised or complex"),
    "expanded": (
        {"logical_count": torch.ones(1).expand(1, 10**6, 10**6)},
        r"has the shape \(1, 1000000, 1000000\), expected .* at most",
    ),
    "negative": ({"logical_count": -torch.ones(1, 1, 1)}, "got -1.0 at window 0"),
    "no records": (change(records=[]), "records is list without entries"),
    "records text": (change(records="abc"), "records is str"),
    "no map": ({"records": per_pass()["records"]}, "lacks last_physical_to_logical_map"),
    "float map": (change(last_physical_to_logical_map=torch.ones(2, 4)), "must hold an expert"),
    "unknown expert": (
        change(last_physical_to_logical_map=torch.full((2, 4), 4)),
        "must hold an expert for every slot",
    ),
    "expert without slot": (
        change(last_physical_to_logical_map=torch.tensor([[0, 1, 2, 0], [2, 1, 1, 1]])),
        "misses expert 0 in layer 1",
    ),
    "no pass": (of_record(forward_pass_id=None), r"records\[1\].forward_pass_id must be"),
    "negative pass": (of_record(forward_pass_id=-1), r"records\[1\].forward_pass_id must be"),
    "other slots": (
        of_record(global_physical_count=torch.ones(2, 5)),
        r"records\[1\].global_physical_count has the shape \(2, 5\), but the map has \(2, 4\)",
    ),
    "negative count": (
        of_record(global_physical_count=-torch.ones(2, 4)),
        r"is -1.0 at layer 0, slot 0: counts must",
    ),
    "no count": (of_record(global_physical_count=None), "global_physical_count is NoneType"),
}


@pytest.mark.parametrize(("value", "message"), BAD.values(), ids=BAD)
def test_bad_dumps_are_refused_with_their_place(tmp_path: Path, value: Any, message: str) -> None:
    path = saved(tmp_path, value)
    with pytest.raises(FormatError, match=message) as caught:
        read_loads(path, "sglang")
    assert str(caught.value).startswith(f"{path}: ")
