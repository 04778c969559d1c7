"""`moeplace simulate` and `moeplace reproduce` as people type them."""

import json
from pathlib import Path

import pytest

from moeplace.instances import generate, write_instance
from tests.test_cli import Run, plain_terminal, run

__all__ = ["plain_terminal", "run"]  # fixtures


@pytest.fixture
def small(tmp_path: Path) -> str:
    path = tmp_path / "small.json"
    write_instance(generate((2, 16, 20, 4), 3).aggregate(), path)
    return str(path)


FEW = ["--tokens-per-second", "1e6", "--requests", "60", "--prompt", "100", "--output", "5",
       "--rate", "200", "--seeds", "3", "--top-k", "2", "--time-limit", "0.1"]  # fmt: skip


def test_table(run: Run, small: str) -> None:
    found = run("simulate", small, "eplb", "auto", *FEW, "--slo-ttft", "50", "--find-rate")
    assert found.code == 0, found.err
    for word in ("ttft p90", "goodput", "ratio", "simulated, prefill; 60 requests", "seeds 3"):
        assert word in found.out


@pytest.mark.parametrize("phase", ["decode", "mixed"])
def test_json(run: Run, small: str, phase: str) -> None:
    found = run("simulate", small, "contiguous", "auto", *FEW, "--phase", phase, "--json",
                "--variation", "0.5", "--workers", "2")  # fmt: skip
    assert found.code == 0, found.err
    answer = json.loads(found.out)
    assert set(answer["plans"]) == {"contiguous", "auto"}
    assert answer["plans"]["auto"]["tpot p90"]["mean"] > 0
    assert 0.5 < answer["ratios"]["auto"]["layer"]["mean"] < (1.0 if phase == "mixed" else 1.1)
    assert answer["requests"] == 60


def test_disaggregated_replans_and_traces(run: Run, small: str, tmp_path: Path) -> None:
    found = run("simulate", small, "auto", *FEW, "--phase", "disaggregated", "--decode", small)
    assert found.code == 0, found.err
    assert "tpot p99" in found.out
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival,prompt,output\n0,50,4\n0.01,60,2\n")
    found = run("simulate", small, "contiguous", *FEW, "--phase", "mixed", "--trace", str(trace),
                "--replan", "0.005:0.5:auto", "--json")  # fmt: skip
    assert found.code == 0, found.err
    answer = json.loads(found.out)
    assert answer["requests"] == 2
    assert answer["plans"]["contiguous"]["ttft p99"]["mean"] > 0.4


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "relative"),
        (["--tokens-per-second", "-1"], "positive"),
        ([*FEW, "--phase", "both"], "Phase must be one of"),
        ([*FEW, "--phase", "disaggregated"], "--decode"),
        ([*FEW, "--find-rate"], "--slo-ttft"),
        ([*FEW, "--replan", "x:1:auto"], "AT:STALL:PLAN"),
        ([*FEW, "--seeds", "0"], "--seeds"),
        ([*FEW, "--rate", "0"], "rate"),
        ([*FEW, "--max-tokens", "0"], "max_tokens"),
        ([*FEW, "--trace", "nowhere.csv"], "nowhere.csv"),
        ([*FEW, "--seed", "-4"], "Seed"),
        ([*FEW, "--slo-ttft", "nan"], "limit of service (ttft) must be above 0 s"),
        ([*FEW, "--slo-tpot", "-1"], "limit of service (tpot) must be above 0 s"),
        ([*FEW, "--attainment", "nan"], "Attainment must be above 0"),
        ([*FEW, "--time-limit", "nan"], "time limit must be a finite number"),
        ([*FEW, "--workers", "0"], "--workers must be a whole number from 1"),
    ],
)
def test_bad_options(run: Run, small: str, arguments: list[str], says: str) -> None:
    found = run("simulate", small, "contiguous", *arguments)
    assert found.code == 2
    assert says in found.err
    assert "Traceback" not in found.err


def test_a_paper_must_be_known(run: Run) -> None:
    found = run("reproduce", "moby-dick")
    assert found.code == 2
    assert "vibe" in found.err
