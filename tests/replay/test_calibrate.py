"""Calibration: grids, a run that is interrupted and goes on, and drift that is told."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moeplace.errors import FormatError, ProblemError
from moeplace.profile import Profile, read_profile
from moeplace.replay import Runtime, calibrate_ranks
from moeplace.replay.calibrate import VISITS, default_grid

RUNTIME = Runtime(ranks=2, emulate=(1, 3), hidden=32, device="cpu", timeout=100)


def calibrate(out: Path, *tokens: int, restart: bool = False) -> Profile:
    found = calibrate_ranks(
        RUNTIME, out, slots=4, activated=(2, 4), tokens=tokens, seconds=0, soak=0, restart=restart
    )
    assert found is not None
    return found


def test_an_interrupted_run_keeps_what_it_measured_and_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    command = ["calibrate", "--ranks", "2", "--emulate", "1,3", "--hidden", "32", "--device", "cpu"]
    grid = ["--slots", "4", "--activated", "2,4", "--tokens", "64,512", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "moeplace.cli", *command, *grid, "--soak", "0", "--seconds", "3"],
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # not as in the background
    )
    until = time.monotonic() + 60
    while not out.exists() and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130, said
    assert b"interrupted" in said
    kept = read_profile(out)
    assert len(kept.entries) == 2
    assert 1 <= len(kept.entries[0].samples) < 4

    whole = calibrate(out, 64, 512)
    assert read_profile(out) == whole
    for rank, (entry, factor) in enumerate(zip(whole.entries, (1, 3), strict=True)):
        assert entry.uuid == f"cpu-{entry.host}-rank{rank}-x{factor}"
        assert (entry.label, entry.rank, entry.slots) == ("cpu-emulated", rank, 4)
        points = [(sample.activated, sample.tokens) for sample in entry.samples]
        assert points == [(2, 64), (2, 512), (4, 64), (4, 512)]
        assert all(sample.visits == VISITS for sample in entry.samples)
        assert all(sample.count >= 9 for sample in entry.samples)
        assert entry.anchors

    more = calibrate(out, 64, 512, 128)  # the four points stand, two are new
    for old, new in zip(whole.entries, more.entries, strict=True):
        assert len(new.samples) == 6
        assert [sample for sample in new.samples if sample.tokens != 128] == old.samples


def test_the_default_grid_follows_the_phase() -> None:
    activated, tokens = default_grid(32, "decode")
    assert activated == (1, 8, 16, 32)
    assert (tokens[0], tokens[-1]) == (8, 1024)
    assert default_grid(32, "prefill")[1][-1] == 16384
    assert default_grid(1, "mixed")[0] == (1,)


def test_bad_options_and_files_are_refused_before_anything_runs(tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    with pytest.raises(ProblemError, match="grid has no point"):
        calibrate_ranks(RUNTIME, out, slots=2, activated=(4,))
    with pytest.raises(ProblemError, match="Tokens must be a whole number from 1, got 0"):
        calibrate_ranks(RUNTIME, out, tokens=(0,))
    with pytest.raises(ProblemError, match="Phase must be one of"):
        calibrate_ranks(RUNTIME, out, phase="warm")  # type: ignore[arg-type]
    with pytest.raises(ProblemError, match="Soak must be a finite number from 0"):
        calibrate_ranks(RUNTIME, out, soak=-1)
    with pytest.raises(FormatError, match="there is no folder"):
        calibrate_ranks(RUNTIME, tmp_path / "none" / "p.json")
    out.write_text(json.dumps({"format": "moeplace-plan", "version": 1}))
    with pytest.raises(FormatError, match="expected"):
        calibrate_ranks(RUNTIME, out)
