"""The folder of decisions: written whole, bounded, read back."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeplace as mp
from moeplace.errors import FormatError
from moeplace.formats.loads import detect
from moeplace.integrations.observe import Decision, Recorder, read_decisions


def decision(scale: float = 1.0, layers: int = 2, old: bool = True, **about: Any) -> Decision:
    return Decision(
        weight=np.arange(layers * 4.0).reshape(layers, 4) * scale,
        old=np.tile([0, 1, 2, 3, 0, -1], (layers, 1)) if old else None,
        proposed=np.tile([0, 1, 2, 3, 0, 1], (layers, 1)),
        before=np.full(layers, 3.0),
        after=np.full(layers, 2.0),
        bound=np.full(layers, 1.5),
        copies=np.ones(layers, dtype=np.int64),
        speeds=np.ones(2),
        about={"saving": 1 / 3, "reason": "x", "phase": "decode"} | about,
    )


def test_what_is_written_is_read_back_oldest_first(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 1 << 20)
    for n in range(12):
        recorder.write(decision(n + 1.0, old=n > 0))
    found = list(read_decisions(tmp_path))
    assert [each.weight[1, 3] for each in found] == [7.0 * (n + 1) for n in range(12)]
    assert found[0].old is None
    assert found[1].old is not None
    assert (found[1].old == decision().old).all()
    assert found[3].about["saving"] == 1 / 3
    assert "time" in found[3].about
    assert not list(tmp_path.rglob("*.tmp"))


def test_read_loads_takes_a_window_of_each_decision(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 1 << 20)
    for n in range(3):
        recorder.write(decision(n + 1.0))
    assert detect(tmp_path) == "observe"
    for path in (tmp_path, tmp_path / "2x4-6-2"):
        read = mp.read_loads(path)
        assert read.tokens.shape == (3, 2, 4)
        assert read.tokens[2, 1, 3] == 21.0
        assert read.phase == "decode"
    assert mp.read_loads(tmp_path, windows=1).tokens[0, 1, 3] == 7.0 * 6


def test_the_oldest_go_when_the_folder_is_full(tmp_path: Path) -> None:
    size = Recorder(tmp_path / "one", 0).write(decision()).stat().st_size
    recorder = Recorder(tmp_path / "many", int(3.5 * size))
    paths = [recorder.write(decision()) for _ in range(8)]
    left = sorted((tmp_path / "many").rglob("*.npz"))
    assert left == paths[-3:]
    assert Recorder(tmp_path / "many", 1 << 20).write(decision()).stem == "00000009"


def test_several_models_are_told_apart(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 1 << 20)
    recorder.write(decision())
    recorder.write(decision(layers=1))
    with pytest.raises(FormatError, match=r"several models .*1x4-6-2, 2x4-6-2"):
        mp.read_loads(tmp_path)
    assert mp.read_loads(tmp_path / "1x4-6-2").tokens.shape == (1, 1, 4)


def test_folders_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no recorded decisions"):
        mp.read_loads(tmp_path, "observe")
    header = tmp_path / "moeplace-observe.json"
    header.write_text(json.dumps({"format": "moeplace-observe", "version": 2}))
    with pytest.raises(FormatError, match="version 2"):
        mp.read_loads(tmp_path)
    with pytest.raises(FormatError, match="version 2"):
        Recorder(tmp_path, 1 << 20).write(decision())
    header.write_text(json.dumps({"format": "moeplace-observe", "version": 1}))
    with pytest.raises(FormatError, match="no recorded decisions"):
        mp.read_loads(tmp_path)
    (tmp_path / "2x4-6-2").mkdir()
    (tmp_path / "2x4-6-2/00000001.npz").write_bytes(b"PK broken")
    with pytest.raises(FormatError, match="is broken"):
        mp.read_loads(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("weight", np.ones(3), "weight is float64 of shape"),
        ("weight", np.full((2, 4), -1.0), "at least 0"),
        ("old", np.array([["a"]]), "old is"),
        ("about", np.array("{"), "not JSON"),
        ("about", np.array("[]"), "not a JSON object"),
        ("about", np.array(3), "about is int64"),
        ("speeds", None, "lacks the array 'speeds'"),
    ],
)
def test_a_file_that_is_wrong_is_named(tmp_path: Path, name: str, value: Any, rule: str) -> None:
    path = Recorder(tmp_path, 1 << 20).write(decision())
    arrays = dict(np.load(path))
    arrays[name] = value
    if value is None:
        del arrays[name]
    np.savez(path, **arrays)
    with pytest.raises(FormatError, match=rule):
        mp.read_loads(tmp_path)
