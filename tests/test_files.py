"""Files are read safely, and a failing write leaves what was there."""

import os
from pathlib import Path

import msgspec
import numpy as np
import pytest

from moeplace import _files
from moeplace._files import (
    check_output,
    check_outputs,
    nested,
    plain,
    read_json,
    write_bytes,
    write_json,
    write_text,
)
from moeplace.errors import FormatError

AS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


class Inner(msgspec.Struct, forbid_unknown_fields=True):
    numbers: list[float]


class Outer(msgspec.Struct, forbid_unknown_fields=True):
    inner: Inner
    format: str = ""
    version: int = 1


def write(folder: Path, content: bytes | str) -> Path:
    path = folder / "in.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def denied(*args: object, **options: object) -> None:
    raise PermissionError(13, "Permission denied")


def full(*args: object) -> None:
    raise OSError(28, "No space left on device")


BAD = {
    "empty": ("", "is empty, expected JSON"),
    "blank": (" \n\t", "is empty, expected JSON"),
    "cut off": ('{"inner": {"numbers": [1', "is not whole JSON .*Write or copy it again"),
    "not JSON": ("{inner: 1}", r"at line 1, column 2: 'inner: 1\}'"),
    "broken on line 2": ('{"inner":\n {"numbers": [1,]}}', "trailing comma .* line 2, column 1"),
    "two documents": ('{"inner": {"numbers": []}} {}', "trailing characters"),
    "array at the top": ("[1]", r"\$: expected `object`, got `array`: \[1\]"),
    "null at the top": ("null", r"\$: expected `object`, got `null`"),
    "number at the top": ("3", r"\$: expected `object`, got `int`: 3"),
    "binary": (b"\x80\x02}q\x00", "is not UTF-8 text .byte 0x80 at offset 0"),
    "UTF-16": ('{"inner": 1}'.encode("utf-16"), "is not UTF-8 text"),
    "Latin-1 key": (b'{"inner": {"\xe9": 1}}', "is not UTF-8 text .byte 0xe9"),
    "deep arrays": ("[" * 100_000, r"\$: expected `object`, got `array`"),
    "deep rows": ('{"inner": {"numbers": ' + "[" * 100_000, r"numbers\[0\]: expected `float`"),
    "deep header": ('{"x": ' + "[" * 100_000, 'unknown field "x"'),
    "NaN": ('{"inner": {"numbers": [1, NaN]}}', "'NaN.*: give a finite number"),
    "Infinity": ('{"inner": {"numbers": [1, Infinity]}}', "'Infinity.*: give a finite number"),
    "-Infinity": ('{"inner": {"numbers": [-Infinity]}}', "'Infinity.*: give a finite number"),
    "huge float": ('{"inner": {"numbers": [1, 1e999]}}', r"\$.inner.numbers\[1\]: .*range: 1e999"),
    "huge int": ('{"inner": {"numbers": [1' + "0" * 400 + "]}}", r"numbers\[0\]: .*range: 1000"),
    "text": (
        '{"inner": {"numbers": [1, "2"]}}',
        r"numbers\[1\]: expected `float`, got `str`: \"2\"",
    ),
    "boolean": ('{"inner": {"numbers": [true]}}', "expected `float`, got `bool`: true"),
    "null": ('{"inner": {"numbers": [null]}}', "expected `float`, got `null`: null"),
    "unknown field": (
        '{"inner": {"numbrs": []}}',
        r'\$.inner has the unknown field "numbrs". Correct .* known there: numbers\.',
    ),
    "missing field": ('{"format": "x"}', r'\$ lacks the required field "inner". Add it'),
    "lone surrogate": ('{"format": "\\ud800", "inner": 1}', "JSON"),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD)
def test_bad_json_is_refused_with_its_place(
    tmp_path: Path, content: bytes | str, message: str
) -> None:
    path = write(tmp_path, content)
    with pytest.raises(FormatError, match=message) as caught:
        read_json(path, Outer)
    assert str(caught.value).startswith(f"{path}: ")


def test_deep_nesting_in_a_field_that_the_header_skips(tmp_path: Path) -> None:
    path = write(tmp_path, '{"inner": ' + "[" * 100_000)
    with pytest.raises(FormatError, match="nested too deeply"):
        read_json(path, Outer, header=("ours", 1))


def test_header_names_the_known_version(tmp_path: Path) -> None:
    body = '"inner": {"numbers": [1]}}'
    good = write(tmp_path, '{"format": "ours", "version": 1, ' + body)
    assert read_json(good, Outer, header=("ours", 1)).inner.numbers == [1.0]
    for head, message in {
        '{"format": "theirs", "version": 1, ': 'format is "theirs", expected "ours"',
        '{"format": "ours", "version": 7, ': "version is 7, but versions known of ours are: 1",
        '{"format": "ours", "version": "1", ': r"\$.version: expected `int`, got `str`",
        '{"version": 1, ': 'lacks the required field "format"',
    }.items():
        with pytest.raises(FormatError, match=message):
            read_json(write(tmp_path, head + body), Outer, header=("ours", 1))


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    path = write(tmp_path, b'\xef\xbb\xbf{"inner": {"numbers": [2]}}')
    assert read_json(path, Outer).inner.numbers == [2.0]


def test_paths_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, "{}")
    for bad, message in {
        "absent.json": "absent.json: no such file in .*Check the path",
        str(tmp_path / "absent.json"): "absent.json: no such file. Check",
        str(tmp_path): "is a folder, not a file",
        "": "an empty path",
        "nul\0byte": "cannot be read .embedded null byte",
        "x" * 300: "cannot be read .file name too long",
        "in.json/deeper": "cannot be read .not a directory",
    }.items():
        with pytest.raises(FormatError, match=message):
            read_json(bad, Outer)
    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(FormatError, match=r"may not be read .*Give yourself read access"):
        read_json(path, Outer)


@pytest.mark.skipif(AS_ROOT, reason="root may read and write everything")
def test_modes_are_obeyed(tmp_path: Path) -> None:
    path = write(tmp_path, "{}")
    path.chmod(0o000)
    with pytest.raises(FormatError, match="may not be read"):
        read_json(path, Outer)
    path.chmod(0o444)
    with pytest.raises(FormatError, match="is a read-only file"):
        write_text(path, "new")
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(FormatError, match="is read-only"):
            write_text(tmp_path / "new", "new")
    finally:
        tmp_path.chmod(0o755)


def test_nested_takes_the_named_depths_only() -> None:
    assert nested("p", b"[[1, 2]]", "$.x", (2, 3)) == [[1.0, 2.0]]
    assert nested("p", b"[ [\n[1], [2]]]", "$.x", (2, 3)) == [[[1.0], [2.0]]]
    for raw, message in {
        b"[1]": r"p: \$.x must be lists of numbers nested 2 or 3 deep, got depth 1",
        b"7": "got depth 0 .7",
        b"[[1, 2], [3]]": r"\$.x\[1\] has 1 entries but \$.x\[0\] has 2",
        b"[[[1], [2]], [[3]]]": r"\$.x\[1\] has 1 entries but \$.x\[0\] has 2",
        b"[[[1], [2, 3]]]": r"\$.x\[0\]\[1\] has 2 entries",
        b"[[], []]": r"\$.x\[0\] is empty",
        b'[[1, "2"]]': r"\$.x\[0\]\[1\]: expected `float`, got `str`: \"2\"",
        b"[[1, [2]]]": r"\$.x\[0\]\[1\]: expected `float`, got `array`: \[2\]",
    }.items():
        with pytest.raises(FormatError, match=message):
            nested("p", raw, "$.x", (2, 3))


def test_whole_numbers_become_ints_and_others_stay_exact() -> None:
    assert repr(plain(np.array([[1.0, 2.0]]))) == "[[1, 2]]"
    assert repr(plain(np.array([1.0, 0.1, 1 / 3]))) == "[1, 0.1, 0.3333333333333333]"


def test_json_has_one_row_a_line(tmp_path: Path) -> None:
    write_json(tmp_path / "x", {"a": [[1, 2], [3, 4]], "b": {"c": None, "d": []}})
    assert (tmp_path / "x").read_text() == (
        '{\n "a": [\n  [1,2],\n  [3,4]\n ],\n "b": {\n  "c": null,\n  "d": []\n }\n}\n'
    )


def test_text_that_utf8_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"the text .* cannot be written as UTF-8"):
        write_json(tmp_path / "x", {"name": "\ud800"})
    assert names(tmp_path) == []


def test_new_files_get_the_mode_of_the_umask_and_old_ones_keep_theirs(tmp_path: Path) -> None:
    path = tmp_path / "x"
    before = os.umask(0o027)
    try:
        write_text(path, "ä")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640
    path.chmod(0o600)
    write_text(path, "new")
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_text() == "new"
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.replace", "pathlib.Path.chmod"])
def test_an_existing_file_survives_a_failing_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    monkeypatch.setattr(step, full)
    with pytest.raises(FormatError, match=r"no space left on device\); what was there before is"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["x"]


def test_an_interrupted_write_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "x"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["x"]


def test_writing_through_a_link_keeps_the_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_a_device_is_written_directly() -> None:
    write_bytes("/dev/null", b"x")
    assert not Path("/dev/null").is_file()
    check_output("/dev/null", ["/dev/null"])


def test_outputs_that_cannot_work_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, "old")
    cases = {
        str(tmp_path): "is a folder, not a file. Add a file name",
        "": "an empty path",
        str(tmp_path / "no" / "x"): r"there is no folder .*no. Create it \(mkdir -p",
        str(path / "x"): "in.json is a file, not a folder",
        "nul\0byte": "cannot be written .embedded null byte",
        str(tmp_path / ("x" * 300)): "cannot be written .file name too long",
    }
    for bad, message in cases.items():
        for attempt in (lambda p: write_text(p, "new"), check_output):
            with pytest.raises(FormatError, match=message):
                attempt(bad)
    monkeypatch.setattr(_files.os, "access", lambda p, mode: Path(p) != tmp_path)
    with pytest.raises(FormatError, match=r"the folder .* is read-only. Give yourself write"):
        write_text(tmp_path / "new", "new")
    monkeypatch.setattr(_files.os, "access", lambda p, mode: Path(p) != path)
    with pytest.raises(FormatError, match=r"is a read-only file\. Make it writable"):
        check_output(path)
    assert names(tmp_path) == ["in.json"]
    assert path.read_text() == "old"


def test_an_output_must_not_be_an_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, "{}")
    (tmp_path / "soft").symlink_to(path)
    (tmp_path / "hard").hardlink_to(path)
    (tmp_path / "loose").symlink_to("absent")
    for same in (path, "in.json", "./in.json", "soft", "hard"):
        with pytest.raises(FormatError, match=r"is the input .*Choose another path"):
            check_output(same, ["other.json", path])
    with pytest.raises(FormatError, match="is the input"):
        check_output("loose", ["absent"])
    check_output("out.json", [path, "absent"])
    assert names(tmp_path) == ["hard", "in.json", "loose", "soft"]


def test_outputs_must_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there").touch()
    Path("hard").hardlink_to("there")
    Path("loose").symlink_to("absent")
    pairs = (("a", "sub/../a"), ("a", "./a"), ("absent", "loose"), ("loose", "absent"))
    for one, two in (*pairs, ("there", "hard")):
        with pytest.raises(FormatError, match="is given for two outputs"):
            check_outputs([one, None, two])
    with pytest.raises(FormatError, match="is the input"):
        check_outputs(["a", "b"], [None, "b"])
    check_outputs(["a", "b", None, "/dev/null", "/dev/null"], ["c", None])
