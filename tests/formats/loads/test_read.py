"""Formats are told from the content only where no other fits, and options fill what a file lacks."""

import json
import logging
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeplace.errors import FormatError, MissingExtraError, ProblemError
from moeplace.formats.loads import FORMATS, detect, inspect, read_loads
from moeplace.formats.loads.binary import write
from moeplace.loads import LoadHistogram

ROWS = [[5, 3, 2], [1, 1, 1]]
ROOT = Path(__file__).resolve().parents[3]


def text(folder: Path, content: str, name: str = "loads") -> Path:
    path = folder / name
    path.write_text(content)
    return path


def trace(tokens: int = 500, layers: int = 2, k: int = 2, kind: Any = np.uint8) -> Any:
    random = np.random.default_rng(0)
    return np.argsort(random.random((tokens, layers, 8)), axis=2)[:, :, :k].astype(kind)


TEXTS = {
    "csv": "5,3,2\n1,1,1\n",
    "omni": ",ep_0,ep_1,ep_2\nlayer_0,5,3,2\nlayer_1,1,1,1\n",
    "json": json.dumps(ROWS),
    "adrs": json.dumps({"load_history": [{"logical_expert_load": ROWS}]}),
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_is_told_from_its_content(tmp_path: Path, name: str) -> None:
    path = text(tmp_path, TEXTS[name])
    found = inspect(path)
    assert (found.format, found.detected) == (name, True)
    assert found.loads.tokens.tolist() == [ROWS]
    assert not inspect(path, name).detected


def test_lmdeploy_reads_as_plain_json_does(tmp_path: Path) -> None:
    path = text(tmp_path, TEXTS["json"])
    assert (read_loads(path, "lmdeploy").tokens == read_loads(path).tokens).all()
    path = text(tmp_path, json.dumps([ROWS]))
    with pytest.raises(FormatError, match="nested 2 deep, got depth 3"):
        read_loads(path, "lmdeploy")


def test_an_instance_has_loads(tmp_path: Path) -> None:
    found = inspect(ROOT / "instances/real/qwen3-30b-sharegpt_16x9_equal.json")
    assert (found.format, found.loads.phase) == ("instance", "prefill")


def test_arrays_are_told_from_shape_and_type(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    for array, name in (
        (np.asarray(ROWS), "npy"),
        (np.asarray([ROWS]), "npy"),
        (np.asarray([ROWS], float), "npy"),
        (trace(), "trace"),
        (trace(kind=np.int16), "trace"),
    ):
        np.save(path, array)
        assert detect(path) == name
    path = tmp_path / "x.npz"
    for arrays, name in (
        ({"x": np.asarray(ROWS)}, "npz"),
        ({"topk": trace()}, "trace"),
        ({"tokens": trace()}, "npz"),
    ):
        np.savez(path, **arrays)
        assert detect(path) == name


@pytest.mark.parametrize("array", [trace(kind=np.int64), trace(3), trace(k=1), trace(k=1) * 0 + 3])
def test_what_might_be_a_trace_is_asked_for(tmp_path: Path, array: Any) -> None:
    np.savez(tmp_path / "x.npz", x=array)
    with pytest.raises(FormatError, match=r"could be trace .* or npz .*Name it \(format=\)"):
        read_loads(tmp_path / "x.npz")
    read_loads(tmp_path / "x.npz", "npz")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1}', 'is JSON with "a", which could be adrs, instance, json, lmdeploy'),
        ('{"loads": 1, "tokens": 1}', 'with "loads", "tokens", which could be instance or json'),
        ("{}", "is JSON with no key"),
        ('{"format": "moeplace-plan", "slots": []}', "of the format moeplace-plan, which holds no"),
        ('{"format": 7}', 'is JSON with "format", which could be'),
        ("layer;load\n", "begins like none of adrs, csv"),
        ("", "begins like none of"),
        ("PK\3\4", "is broken"),
    ],
)
def test_content_of_no_format_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = text(tmp_path, content)
    with pytest.raises(FormatError, match=message) as caught:
        read_loads(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_folders_are_of_tensorrt_llm_only(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"is a folder without meta_info.json"):
        read_loads(tmp_path)
    with pytest.raises(FormatError, match="no such file"):
        read_loads(tmp_path / "absent")


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"sglang"}))
def test_every_reader_says_that_a_file_is_absent(tmp_path: Path, name: str) -> None:
    with pytest.raises(FormatError, match=r"absent: (no such file|is no folder)"):
        read_loads(tmp_path / "absent", name)


def test_unknown_formats_are_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="Load format 'pickle' is unknown: choose one of adrs"):
        read_loads(tmp_path / "x", "pickle")


def test_detection_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = text(tmp_path, TEXTS["csv"])
    with caplog.at_level(logging.INFO):
        read_loads(path)
        read_loads(path, "csv")
    assert "detected as csv" in caplog.messages[0]
    assert "read as csv" in caplog.messages[1]


# --- options -----------------------------------------------------------------------------------


def test_passes_and_phase_come_by_option_where_the_file_has_none(tmp_path: Path) -> None:
    path = text(tmp_path, json.dumps([ROWS, ROWS]))
    loads = read_loads(path, passes=7, phase="decode")
    assert loads.passes is not None
    assert (loads.passes.tolist(), loads.phase) == ([7, 7], "decode")
    assert read_loads(path).phase == "mixed"
    with pytest.raises(ProblemError, match="Passes need one number for each of the 2 windows"):
        read_loads(path, passes=[1, 2, 3])
    with pytest.raises(ProblemError, match="Passes must be finite, above 0"):
        read_loads(path, passes=-1)
    with pytest.raises(ProblemError, match="Phase must be one of"):
        read_loads(path, phase="idle")  # type: ignore[arg-type]


def test_an_option_that_contradicts_the_file_is_refused(tmp_path: Path) -> None:
    path = text(tmp_path, json.dumps({"tokens": ROWS, "passes": 4, "phase": "prefill"}))
    assert read_loads(path, phase="prefill", passes=4).passes == [4]
    with pytest.raises(ProblemError, match="says its phase itself .*prefill.*, but .* 'decode'"):
        read_loads(path, phase="decode")
    with pytest.raises(ProblemError, match="says its passes itself"):
        read_loads(path, passes=5)


def test_layers_are_selected(tmp_path: Path) -> None:
    path = text(tmp_path, "0,0\n1,2\n3,4\n")
    assert read_loads(path, layers=slice(1, None)).tokens.tolist() == [[[1, 2], [3, 4]]]
    assert read_loads(path, layers=[2, 0]).tokens.tolist() == [[[3, 4], [0, 0]]]
    with pytest.raises(ProblemError, match="asks for layer 3, but there are 3"):
        read_loads(path, layers=[3])
    with pytest.raises(ProblemError, match="keeps none of the 3 layers"):
        read_loads(path, layers=slice(2, 1))
    for rows, said in ((slice(1, 4), "1:4"), (slice(-4, None), "-4:"), (slice(5, 9), "5:9")):
        with pytest.raises(ProblemError, match=f"rows {said}, but there are 3 .0 to 2.. Choose"):
            read_loads(path, layers=rows)
    assert read_loads(path, layers=slice(-3, 3)).layers == 3


def test_windows_are_summed_in_order(tmp_path: Path) -> None:
    path = text(tmp_path, json.dumps([[[i]] for i in range(5)]))
    loads = read_loads(path, windows=2, passes=[1, 2, 3, 4, 5])
    assert loads.tokens.ravel().tolist() == [0 + 1 + 2, 3 + 4]
    assert loads.passes is not None
    assert loads.passes.tolist() == [6, 9]
    with pytest.raises(FormatError, match="has 5 windows, too few for 6"):
        read_loads(path, windows=6)
    with pytest.raises(ProblemError, match="windows must be a whole number from 1 on, got 0"):
        read_loads(path, windows=0)
    with pytest.raises(ProblemError, match="experts is for traces"):
        read_loads(path, experts=3)


def test_negative_loads_are_a_fault_of_the_file(tmp_path: Path) -> None:
    path = text(tmp_path, "1,-2\n")
    with pytest.raises(FormatError, match="got -2.0 at window 0, layer 0, expert 1") as caught:
        read_loads(path, "csv")
    assert str(caught.value).startswith(f"{path}: ")


def test_written_loads_read_back_the_same(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    path = tmp_path / "loads.npz"
    for passes in (None, [3.5, 4]):
        loads = LoadHistogram(tokens=random.random((2, 3, 4)), passes=passes, phase="decode")
        write(loads, path)
        back = read_loads(path)
        assert (back.tokens == loads.tokens).all()
        assert back.phase == "decode"
        assert (back.passes is None) == (passes is None)
    with pytest.raises(FormatError, match=r"an \.npz archive: name it .*/x\.npz\.$"):
        write(loads, tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()


def test_torch_is_asked_for_only_where_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02}.")
    with pytest.raises(MissingExtraError, match=r"pip install 'moeplace\[torch\]'"):
        read_loads(tmp_path / "x.pt")


def test_importing_moeplace_loads_none_of_what_files_need() -> None:
    code = "import moeplace, sys; print([m for m in ('torch', 'yaml', 'safetensors') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert run.stdout == "[]\n"
