import json
from pathlib import Path

import pytest

from moeplace.errors import FormatError
from moeplace.formats.loads import read_loads
from moeplace.formats.loads.text import MAX_COLUMNS


def test_blank_lines_separate_windows(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("\n1,2\n3,4\n\n\n5, 6e0\r\n+7,.8\n\n")
    assert read_loads(path, "csv").tokens.tolist() == [[[1, 2], [3, 4]], [[5, 6], [7, 0.8]]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1,2\n3\n", "line 2 has 1 numbers but the first line has 2"),
        ("1,2\n\n3,4\n5,6\n", "window 1 has 2 lines but window 0 has 1"),
        ("1,x\n", r"line 1, column 2 must be a number, got 'x'"),
        ("1,\n", "column 2 must be a number, got ''"),
        ("1,nan\n", "must be a number, got 'nan'"),
        ("1,1_0\n", "must be a number, got '1_0'"),
        ("1,1e999\n", "got inf at window 0, layer 0, expert 1"),
        ("1" * 100, "column 1 must be a number"),
        (",".join("1" * (MAX_COLUMNS + 1)), "line 1 has 65,537 columns: the limit"),
        ("\n\n", "is empty, expected CSV"),
        ("a,b\n1,2\n", "a plain CSV file has no header"),
    ],
)
def test_csv_is_refused_with_line_and_column(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "x.csv"
    path.write_text(content)
    with pytest.raises(FormatError, match=message) as caught:
        read_loads(path, "csv")
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (",ep_0,ep_2\nlayer_0,1,2\n", "line 1 must be ,ep_0,ep_1,"),
        ("1,2\n", "line 1 must be"),
        (",ep_0,ep_1\nlayer_1,1,2\n", "line 2 must begin with layer_0, got 'layer_1,1,2'"),
        (",ep_0,ep_1\nlayer_0,1\n", "line 2 has 1 numbers but the header has 2"),
        (",ep_0,ep_1\nlayer_0\n", "line 2 must begin with layer_0"),
        (",ep_0,ep_1\n", "has a header but no layer"),
        (",ep_0\nlayer_0,x\n", "line 2, column 1 must be a number"),
    ],
)
def test_omni_is_refused_with_its_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "x.csv"
    path.write_text(content)
    with pytest.raises(FormatError, match=message):
        read_loads(path, "omni")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("json", {"tokens": [[1]], "pases": 3}, 'unknown field "pases"'),
        ("json", {"tokens": [1]}, r"\$.tokens must be .* nested 2 or 3 deep, got depth 1"),
        ("json", {"tokens": [[1], [1, 2]]}, r"\$.tokens\[1\] has 2 entries"),
        ("json", {"tokens": [[1]], "phase": "idle"}, r"\$.phase must be one of 'prefill', 'dec"),
        ("json", {"tokens": [[1]], "passes": [1, 2]}, "one number for each of the 1 windows"),
        ("json", [], "got depth 1"),
        ("json", [[]], r"\$\[0\] is empty"),
        ("json", [["1"]], r"\$\[0\]\[0\]: expected `float`, got `str`"),
        ("lmdeploy", {"tokens": [[1]]}, "nested 2 deep, got depth 0"),
        ("adrs", {"load_history": []}, r"\$.load_history.* is empty"),
        ("adrs", {"load_history": [{"x": 1}]}, r"load_history\[0\] lacks the required field"),
        ("adrs", {"load_history": [{"logical_expert_load": [[-1]]}]}, "got -1.0 at window 0"),
        ("instance", {"loads": 1}, "lacks the required field"),
    ],
)
def test_json_is_refused_with_its_place(
    tmp_path: Path, name: str, content: object, message: str
) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(content))
    with pytest.raises(FormatError, match=message) as caught:
        read_loads(path, name)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_history_has_a_window_for_each_entry(tmp_path: Path) -> None:
    path = tmp_path / "expert-load.json"
    entries = [{"logical_expert_load": [[i, 1], [2, 3]], "time": 3} for i in range(3)]
    path.write_text(json.dumps({"load_history": entries, "model": "x"}))
    assert read_loads(path).tokens[:, 0, 0].tolist() == [0, 1, 2]


def test_a_broken_instance_is_a_fault_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    file = {
        "format": "moeplace-instance",
        "version": 1,
        "cluster": {"speeds": [1], "slots": [1]},
        "loads": {"tokens": [[[1, -1]]]},
    }
    path.write_text(json.dumps(file))
    with pytest.raises(FormatError, match="got -1.0 at window 0, layer 0, expert 1"):
        read_loads(path)
