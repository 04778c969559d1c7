"""What is shown on a terminal while a search runs, and where nothing is."""

import io
import re
import sys

import pytest

from moeplace import cli_progress
from moeplace.cli_progress import line, reading, searching
from moeplace.instances import generate
from moeplace.result import Progress
from moeplace.solve import solve

NOW = Progress(seconds=2.0, objective=2.0, lower_bound=1.0, layers_done=3, layers=7)


class Terminal(io.StringIO):
    """A stderr that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def usual(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)


def opened(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Within the test, since pytest sets stderr anew when one begins."""
    opened = Terminal()
    monkeypatch.setattr(sys, "stderr", opened)
    return opened


def plain(text: str) -> list[str]:
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text))


@pytest.mark.parametrize(("seconds", "drawn"), [(0.5, False), (2.0, True)])
def test_plan_bound_and_gap_appear_after_a_second(
    monkeypatch: pytest.MonkeyPatch, seconds: float, drawn: bool
) -> None:
    terminal = opened(monkeypatch)
    with searching(unit="token units") as progress:
        assert progress is not None
        progress(Progress(**{**NOW.__dict__, "seconds": seconds}))
    shown = "3/7 layers: 2.00000, bound 1.00000, gap 100 %" in terminal.getvalue()
    assert shown == drawn


def test_a_solver_on_one_layer_says_which() -> None:
    assert line(Progress(**{**NOW.__dict__, "layer": 4})).startswith("layer 4, 3/7 layers: ")


def test_there_is_nothing_elsewhere_or_if_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    opened(monkeypatch)
    with searching(quiet=True) as progress:
        assert progress is None
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with searching() as progress:
        assert progress is None


def test_no_colour_if_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = opened(monkeypatch)
    monkeypatch.setenv("NO_COLOR", "1")
    with searching() as progress:
        assert progress is not None
        progress(NOW)
    assert "gap 100 %" in terminal.getvalue()
    colours = re.findall(r"\x1b\[([0-9;]*)m", terminal.getvalue())
    assert not [code for code in colours if re.search(r"\b[34][0-8]\b", code)]


@pytest.mark.parametrize("windows", [1, 16])
def test_a_search_at_full_size_fits_the_line_and_never_claims_too_much(
    windows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = opened(monkeypatch)
    monkeypatch.setattr(cli_progress, "PATIENCE", 0.0)
    problem = generate("A", 0)
    problem = problem.aggregate() if windows == 1 else problem
    heard: list[Progress] = []
    with searching(unit="token units") as progress:

        def both(now: Progress) -> None:
            heard.append(now)
            assert progress is not None
            progress(now)

        found = solve(problem, time_limit=1.5, gap=0, progress=both)
    assert heard
    for now in heard:
        assert found.lower_bound <= now.lower_bound * (1 + 1e-9)
        assert found.objective <= now.objective * (1 + 1e-9)
    lines = plain(terminal.getvalue())
    assert any(re.search(r"\d+/58 layers: [\d.,]+, bound [\d.,]+, gap ", each) for each in lines)
    assert max(map(len, lines)) <= 80


def test_long_files_have_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = opened(monkeypatch)
    clock = iter([0.0, 0.5, 2.0])
    monkeypatch.setattr(cli_progress.time, "perf_counter", lambda: next(clock, 3.0))
    with reading() as progress:
        assert progress is not None
        progress(1, 3)
        assert terminal.getvalue() == ""
        progress(2, 3)
    assert "reading  67 %" in terminal.getvalue()


def test_files_are_read_in_silence_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with reading() as progress:
        assert progress is None
