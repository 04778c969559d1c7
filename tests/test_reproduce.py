"""The setting and the tables of published experiments, on small parts of them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moeplace import vibe_setting, vibe_tables
from moeplace.errors import ProblemError
from moeplace.evaluate import evaluate
from moeplace.reproduce import Report, Table, reproduce
from moeplace.vibe_setting import MODELS, VIBE, setting, slowness
from moeplace.vibe_tables import PAPER, _change, _replanned, _Runs

INSTANCES = Path(__file__).resolve().parents[1] / "instances"


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """One model of three layers, and little time."""
    small = {"DeepSeek-V3": replace(MODELS["DeepSeek-V3"], layers=3)}
    for module in (vibe_setting, vibe_tables):
        monkeypatch.setattr(module, "MODELS", small)
        monkeypatch.setattr(module, "VIBE", replace(VIBE, solve_seconds=0.1))
    return


def test_slowness_is_measured_or_even() -> None:
    times = slowness(INSTANCES, "fleet", 8)
    assert (1 / times).mean() == pytest.approx(1)
    assert times.max() / times.min() == pytest.approx(1.0512, abs=1e-4)
    assert (slowness(INSTANCES, "equal", 16) == 1).all()
    some = slowness(INSTANCES, 0.07, 8)
    assert some.max() / some.min() == pytest.approx(1.07)


def test_setting_is_the_papers_where_it_can_be() -> None:
    for name, (layers, experts) in {"DeepSeek-V3": (58, 256), "Qwen3-235B": (48, 128)}.items():
        one = setting(INSTANCES, name, "fleet")
        problem = one.problem
        assert (problem.layers, problem.experts, problem.ranks) == (layers, experts, 8)
        assert problem.cluster.total_slots == experts  # one replica of each
        assert problem.tokens.sum(axis=2) == pytest.approx(16_384 * 8)
        assert problem.cluster.planes is not None
    assert problem.layer_weight.sum() == pytest.approx(94)
    even = setting(INSTANCES, "Qwen3-235B", "equal", skew=0.0).problem.tokens
    assert even.max() == pytest.approx(even.min())


def test_replans_are_legal_and_better(few: None) -> None:
    before = setting(INSTANCES, "DeepSeek-V3", "fleet", epoch=0)
    after = setting(INSTANCES, "DeepSeek-V3", "fleet", epoch=1)
    for policy in ("vibe", "auto"):
        plan = before.plans([policy])[policy]
        later, moved = _replanned(policy, plan, after)
        assert moved > 0
        old, new = evaluate(after.problem, plan), evaluate(after.problem, later)
        assert new.legal
        assert new.objective < old.objective


def test_tables(few: None) -> None:
    runs = _Runs(INSTANCES, (100, 101), 0.1, 2)
    prefill = runs.prefill()
    assert len(prefill.rows) == 13
    layer = next(row for row in prefill.rows if "ViBE against contiguous" in row["what"])
    assert layer["paper"] == PAPER["layer vibe / contiguous"]
    assert layer["unequal GPUs"].startswith("-")
    rates = runs.rates().rows
    assert len(rates) == 10
    assert {row["GPUs"] for row in rates} == {"unequal", "equal"}
    assert all(float(row["requests/s in limit"]) > 0 for row in rates)
    assert len(runs.decode().rows) == 10
    drift = runs.drift().rows
    assert [row["policy"] for row in drift[:3]] == ["EPLB", "ViBE", "ours"]
    assert drift[0]["paper"] == PAPER["drift", "eplb", "DeepSeek-V3"]


def test_change_is_paired() -> None:
    assert _change([1.1, 2.2, 3.3], [1, 2, 3]) == "+10.0 +-0.0 %"
    assert _change([0.5], [1.0]) == "-50.0 %"


def test_report() -> None:
    rows = [{"a": "1", "b": "2"}, {"a": "3", "c": "4"}]
    report = Report(
        title="T", about="About.", tables=[Table(title="One", about="x", rows=rows)], lacks="Much."
    )
    text = report.markdown()
    assert "| a | b | c |" in text
    assert "| 3 |  | 4 |" in text
    assert text.endswith("Much.\n")
    assert report.to_json()["tables"][0]["rows"] == rows


def test_unknown_paper_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ProblemError, match="vibe"):
        reproduce("other", INSTANCES)
    with pytest.raises(ProblemError, match="--instances"):
        reproduce("vibe", tmp_path)


def test_constants_are_told() -> None:
    assert "DVFS" in vibe_tables.LACKS
    assert len(VIBE.seeds) == 5
    assert np.isfinite([model.token_seconds for model in MODELS.values()]).all()
