"""Profiles: files, which entries count for which ranks, and speeds from samples."""

import json
import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from moeplace.errors import FormatError, ProblemError
from moeplace.profile import (
    Entry,
    Profile,
    Sample,
    match,
    measured_devices,
    predicted_seconds,
    read_profile,
    relative_speeds,
    seconds_model,
    write_profile,
)

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
POINTS = [(a, n) for a in (2, 8) for n in (64, 1024, 2048, 4096)]


def entry(uuid: str, slowness: float = 1.0, **more: Any) -> Entry:
    """Times t0 + w a + c n, with the slowness on c alone."""
    samples = [
        Sample(
            activated=a,
            tokens=n,
            median=(t := 30e-6 + 10e-6 * a + 0.1e-6 * slowness * n),
            p10=0.9 * t,
            p90=1.2 * t,
            count=30,
        )
        for a, n in POINTS
    ]
    fields: dict[str, Any] = {
        "uuid": uuid,
        "host": "node1",
        "date": (NOW - timedelta(days=1)).isoformat(),
        "label": "gpu-measured",
        "phase": "prefill",
        "kernel": "grouped",
        "dtype": "bfloat16",
        "hidden": 7168,
        "intermediate": 2048,
        "slots": 8,
        "samples": samples,
    }
    return Entry(**(fields | more))


TWO = Profile(entries=[entry("GPU-a", rank=0), entry("GPU-b", 1.1, rank=1)])


def test_a_profile_reads_back_as_it_was_written(tmp_path: Path) -> None:
    full = TWO.merged([entry("GPU-c", anchors=[1e-3, 1.1e-3], conditions={"sm_clock_mhz": 1980.0})])
    write_profile(full, tmp_path / "p.json")
    assert read_profile(tmp_path / "p.json") == full
    assert full.entries[-1].drift == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("version",), 2, r"\$\.version is 2"),
        (("format",), "moeplace-plan", r"\$\.format is"),
        (("entries", 0, "samples", 0, "median"), -1, "samples"),
        (("entries", 0, "samples", 0, "p10"), 9, "p10 <= median <= p90"),
        (("entries", 0, "samples", 1, "tokens"), 1, "a token for each activated slot"),
        (("entries", 1, "date"), "yesterday", r"entries\[1\]\.date must be a date"),
        (("entries", 1, "date"), "2026-03-01T12:00:00", "with a zone"),
        (("entries", 1, "label"), "guessed", "must be one of"),
        (("entries", 1, "speed"), 1, "unknown field"),
    ],
)
def test_a_file_that_breaks_a_rule_is_refused(
    tmp_path: Path, path: tuple[Any, ...], value: Any, message: str
) -> None:
    file = tmp_path / "p.json"
    write_profile(TWO, file)
    content = json.loads(file.read_text())
    place = content
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    file.write_text(json.dumps(content))
    with pytest.raises(FormatError, match=message):
        read_profile(file)


def test_ranks_find_the_entries_of_their_devices_in_any_order() -> None:
    found = match(TWO, ["GPU-b", "GPU-a"], now=NOW)
    assert found.reason == ""
    assert found.entries is not None
    assert [each.uuid for each in found.entries] == ["GPU-b", "GPU-a"]


@pytest.mark.parametrize(
    ("profile", "options", "reason"),
    [
        (TWO, {"uuids": ["GPU-a", "GPU-x"]}, "no entry for rank 1 \\(GPU-x\\)"),
        (TWO, {"uuids": ["GPU-a", "GPU-a"]}, "same device GPU-a"),
        (TWO, {"now": NOW + timedelta(days=6.5)}, "7 days old"),
        (TWO, {"phase": "decode"}, "measured for phase prefill, not decode"),
        (TWO, {"kernel": "engine:moe"}, "measured for kernel grouped"),
        (TWO, {"dtype": "float32"}, "measured for dtype bfloat16"),
        (TWO, {"hosts": ["node1", "node2"]}, "no entry for rank 1"),
        (TWO.merged([entry("GPU-b", dtype="float32", hidden=8)]), {}, ""),
        (
            Profile(entries=[TWO.entries[0], entry("GPU-b", hidden=8)]),
            {},
            "another setting than rank 0",
        ),
        (Profile(entries=[TWO.entries[0], entry("GPU-b", samples=[])]), {}, "no samples"),
    ],
)
def test_one_unusable_entry_makes_all_ranks_equal_with_one_warning(
    profile: Profile, options: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = match(profile, **({"uuids": ["GPU-a", "GPU-b"], "now": NOW} | options))
    if not reason:
        assert found.entries is not None
        assert not caplog.records
        return
    assert found.entries is None
    assert len(caplog.records) == 1
    import re

    assert re.search(reason, found.reason)
    assert "equally fast" in caplog.text


def test_hosts_must_be_as_many_as_ranks() -> None:
    with pytest.raises(ProblemError, match="need a host each"):
        match(TWO, ["GPU-a", "GPU-b"], hosts=["node1"], now=NOW)


def test_a_newer_entry_of_the_same_setting_replaces_the_old_one() -> None:
    newer = entry("GPU-b", 1.3, rank=1, date=NOW.isoformat())
    merged = TWO.merged([newer])
    assert len(merged.entries) == 2
    assert match(merged, ["GPU-a", "GPU-b"], now=NOW).entries == (TWO.entries[0], newer)


def test_devices_come_in_the_order_of_the_latest_job() -> None:
    old = entry("cpu-0", rank=0, label="cpu-emulated", date="2026-01-01T00:00:00Z")
    swapped = Profile(
        entries=[old, msgspec.structs.replace(TWO.entries[0], rank=1), entry("GPU-b", rank=0)]
    )
    assert measured_devices(swapped) == ["GPU-b", "GPU-a"]
    assert measured_devices(Profile(entries=[])) == []


def test_speeds_are_those_of_the_points_with_many_tokens() -> None:
    entries = [entry("a"), entry("b", 2.0), entry("c", 1.25)]
    speeds = relative_speeds(entries)
    assert speeds[0] == 1
    assert speeds[1] == pytest.approx(0.57, abs=0.03)
    assert speeds[1] < speeds[2] < 1
    # An outlier at one point does not move them.
    odd = [*entries[1].samples[:-1], msgspec.structs.replace(entries[1].samples[-1], median=9.0)]
    bent = msgspec.structs.replace(entries[1], samples=odd)
    assert relative_speeds([entries[0], bent])[1] == pytest.approx(0.57, abs=0.04)


def test_entries_without_a_common_point_cannot_be_compared() -> None:
    other = entry("b", samples=[Sample(activated=1, tokens=1, median=1, p10=1, p90=1)])
    with pytest.raises(ProblemError, match="share no point"):
        relative_speeds([entry("a"), other])


def test_the_model_finds_its_parameters_and_no_tokens_take_no_time() -> None:
    slow = entry("a", 1.5)
    assert seconds_model(slow) == pytest.approx([30e-6, 10e-6, 0.15e-6], rel=1e-6)
    found = predicted_seconds([slow, entry("b")], np.array([8.0, 0.0]), np.array([2048.0, 0.0]))
    assert found == pytest.approx([110e-6 + 0.15e-6 * 2048, 0])
