"""What the commands print on shipped instances fits a terminal of 80 columns."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_cli import ROOT, Run, plain_terminal, run

__all__ = ["plain_terminal", "run"]  # fixtures

QWEN = "instances/real/qwen3-30b-sharegpt_16x9_sgemm-longhorn.json"
TASKS = "instances/real/dsv2lite-tasks_8x9_sgemm-longhorn.json"
BRIEF = ("--time-limit", "0.2")
SHOWN = {
    "solve": ("solve", QWEN, *BRIEF),
    "compare": ("compare", QWEN, "--sum-windows", "--hidden", "7168", "--top-k", "8", *BRIEF),
    "evaluate": ("evaluate", QWEN, "plan.json", "--hidden", "7168"),
    "bound": ("bound", TASKS),
    "loads": ("loads", QWEN),
    "certify": ("certify", "proof.json"),
    "whatif": ("whatif", TASKS, "--sum-windows", "--time-limit", "2"),
    "robust": ("robust", TASKS, "--time-limit", "0.02"),
    "migrate": ("migrate", QWEN, "plan.json", "--step-seconds", "0.05", "--time-limit", "0.05"),
    "simulate": (
        "simulate", TASKS, "--tokens-per-second", "5e6", "--requests", "50", "--seeds", "2",
        *BRIEF,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import moeplace as mp
    from moeplace.certificate import write_certificate

    place = tmp_path_factory.mktemp("terminal")
    problem = mp.read_instance(QWEN)
    mp.write_plan(mp.solve(problem, time_limit=0.1).plan, place / "plan.json")
    small = mp.read_instance("instances/small/flashlb-even.json")
    write_certificate(mp.solve(small, gap=0), place / "proof.json")
    return place


@pytest.mark.parametrize("name", SHOWN)
def test_no_line_is_wider_than_80_columns(
    run: Run, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    answer = run(*SHOWN[name])
    assert answer.code == 0, answer.err
    lines = answer.out.split("\n")
    assert len(lines) > 6
    assert [line for line in lines if len(line) > 80 or line != line.rstrip()] == []
    if name in ("solve", "compare", "loads", "robust", "migrate"):
        assert "█" in answer.out


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")
@pytest.mark.parametrize("colour", [True, False])
def test_a_search_on_a_terminal_shows_where_it_stands(colour: bool) -> None:
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
    words = ["solve", "generate:A:0", "--gap", "0", "--time-limit", "2.5"]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80", "PYTHONPATH": str(ROOT)}
    environment.pop("NO_COLOR", None)
    if not colour:
        environment["NO_COLOR"] = "1"
    command = [sys.executable, "-m", "moeplace", *words]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment) as running:
        os.close(theirs)
        text = b""
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # the other side was closed
                break
            if not piece:
                break
            text += piece
    os.close(ours)
    assert running.returncode == 0
    shown = text.decode()
    plain = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown))
    assert max(map(len, plain)) <= 80
    assert any(
        re.search(r"\d+/58 layers: [\d,]+, bound [\d,]+, gap [\d.]+ %", line) for line in plain
    )
    assert any(line.startswith("moeplace (auto)") for line in plain)
    assert bool(re.search(r"\x1b\[[0-9;]*3[0-9]m", shown)) == colour
