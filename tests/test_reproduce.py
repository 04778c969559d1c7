"""The setting and the tables of published experiments, on small parts of them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moeplace import vibe_runs, vibe_sensitivity, vibe_setting, vibe_tables
from moeplace.errors import ProblemError
from moeplace.evaluate import evaluate
from moeplace.reproduce import Report, Table, reproduce
from moeplace.vibe_runs import Runs, change, replanned
from moeplace.vibe_setting import MODELS, VIBE, setting, slowness
from moeplace.vibe_tables import PAPER, decode, drift, prefill, rates

INSTANCES = Path(__file__).resolve().parents[1] / "instances"


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """One model of three layers, and little time."""
    small = {"DeepSeek-V3": replace(MODELS["DeepSeek-V3"], layers=3)}
    for module in (vibe_setting, vibe_tables, vibe_sensitivity):
        monkeypatch.setattr(module, "MODELS", small)
    for module in (vibe_setting, vibe_tables, vibe_sensitivity, vibe_runs):
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
        later, moved = replanned(policy, plan, after)
        assert moved > 0
        old, new = evaluate(after.problem, plan), evaluate(after.problem, later)
        assert new.legal
        assert new.objective < old.objective


def test_tables(few: None) -> None:
    runs = Runs(INSTANCES, (100, 101), 0.1, 2)
    layers = prefill(runs)
    assert len(layers.rows) == 13
    layer = next(row for row in layers.rows if "ViBE against contiguous" in row["what"])
    assert layer["paper"] == PAPER["layer vibe / contiguous"]
    assert layer["unequal GPUs"].startswith("-")
    found = rates(runs).rows
    assert len(found) == 10
    assert {row["GPUs"] for row in found} == {"unequal", "equal"}
    assert all(float(row["requests/s in limit"]) > 0 for row in found)
    assert len(decode(runs).rows) == 10
    shifted = drift(runs).rows
    assert [row["policy"] for row in shifted[:3]] == ["EPLB", "ViBE", "ours"]
    assert shifted[0]["paper"] == PAPER["drift", "eplb", "DeepSeek-V3"]


def number(cell: str) -> float:
    return float(cell.split()[0])


def test_no_plan_wins_more_than_the_limit(few: None) -> None:
    table = vibe_sensitivity.limits(Runs(INSTANCES, (100,), 0.1, 1))
    assert len(table.rows) == 7
    control = table.rows.pop(0)
    assert abs(number(control["ViBE / EPLB"])) < 0.2
    for row in table.rows:
        most = number(row["bound / EPLB"])
        assert number(row["bound / contiguous"]) < most < 0
        for ours in ("ViBE / EPLB", "ours / EPLB"):
            assert number(row[ours]) >= most - 0.05
        # balanced tokens are a legal plan's, so speeds alone buy no more than their spread
        assert -most <= number(row["mean / min speed - 1"]) + 0.3
        assert 80 <= number(row["share of a layer's time that slowness stretches"]) <= 100
    assert number(table.rows[0]["mean / min speed - 1"]) < 3
    assert number(table.rows[-1]["mean / min speed - 1"]) == pytest.approx(24.5, abs=0.1)


def test_sensitivity_of_each_headline(few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    some = tuple(c for c in vibe_sensitivity.CASES if c[1] in ("0 %", "22 %", "1.5"))
    monkeypatch.setattr(vibe_sensitivity, "CASES", some)
    runs = Runs(INSTANCES, (100, 101), 0.1, 2)
    layers = vibe_sensitivity.layers(runs).rows
    assert [row["value"] for row in layers] == ["0 %", "22 %", "1.5"]
    even, wide, _ = (number(row["layer: ViBE / EPLB"]) for row in layers)
    assert abs(even) < 0.5
    assert wide < -3
    assert number(layers[2]["layer: ViBE / EPLB, equal"]) == pytest.approx(0, abs=0.5)
    served = vibe_sensitivity.requests(runs).rows
    assert number(served[1]["rate: ViBE / EPLB"]) > number(served[0]["rate: ViBE / EPLB"])
    assert number(served[1]["P90: ViBE / EPLB"]) < 0
    shifted = vibe_sensitivity.drift(runs).rows
    assert len(shifted) == 3
    assert {"EPLB, adaptive / static", "ViBE, adaptive / static"} <= set(shifted[0])


def test_change_is_paired() -> None:
    assert change([1.1, 2.2, 3.3], [1, 2, 3]) == "+10.0 +-0.0 %"
    assert change([0.5], [1.0]) == "-50.0 %"


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
