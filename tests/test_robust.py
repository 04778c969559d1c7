"""Plans for several windows, held out."""

from pathlib import Path
from typing import Any

import pytest

from moeplace import cli
from moeplace.errors import ProblemError
from moeplace.instances import generate, read_instance
from moeplace.problem import Problem
from moeplace.robust import Score, folds, scores, verdict
from tests.strategies import problem
from tests.test_cli import Run, plain_terminal, run

__all__ = ["plain_terminal", "run"]  # fixtures

REAL = Path(__file__).resolve().parents[1] / "instances/real/dsv2lite-windows_8x9_equal.json"


def judged(given: Problem) -> tuple[str, dict[str, list[Score]]]:
    found = {name: scores(given, *parts, time_limit=0.2) for name, parts in folds(given).items()}
    return verdict(found), found


def test_two_regimes_that_both_come_back_are_worth_it() -> None:
    whole = read_instance(REAL)
    found = scores(whole, range(0, 16, 2), range(1, 16, 2), time_limit=0.5)
    assert [score.planned_on for score in found][:2] == ["sum", "mean of windows"]
    assert len(found) == 6
    assert found[0].against_sum == 0
    for score in found[1:]:
        assert score.against_sum < -0.08
        assert score.in_sample < score.held_out < found[0].held_out
        assert score.worst >= score.held_out
        assert score.against_sum == pytest.approx(score.held_out / found[0].held_out - 1)


def test_independent_noise_is_not_and_it_says_so() -> None:
    said, found = judged(generate((4, 32, 40, 8), 1))
    assert said.startswith("Does not help")
    assert set(found) == {"even on odd", "odd on even", "earlier on later"}


def test_verdict_needs_every_fold() -> None:
    def score(name: str, against: float) -> Score:
        return Score(
            planned_on=name, in_sample=1, held_out=1, worst=1, against_sum=against,
            worst_against_sum=0,
        )  # fmt: skip

    good = [score("sum", 0.0), score("worst window", -0.05), score("mean", -0.02)]
    bad = [score("sum", 0.0), score("worst window", 0.05), score("mean", -0.03)]
    assert verdict({"a": good, "b": bad}) == (
        "Helps: planned on mean, held-out windows are faster by 2.0% or more."
    )
    bad[2] = score("mean", -0.001)
    assert verdict({"a": good, "b": bad}).startswith("Does not help")


@pytest.mark.parametrize("routing", ["even", "weighted"])
def test_shares_are_the_best_of_each_window(routing: Any) -> None:
    loads = [[[4.0, 1.0]], [[1.0, 4.0]], [[4.0, 1.0]], [[1.0, 4.0]]]
    given = problem(loads, [1.0, 2.0], [2, 2], routing=routing)
    found = scores(given, [0, 1], [2, 3], time_limit=0.1)
    assert all(score.held_out >= 1 - 1e-9 for score in found)
    assert (found[1].held_out < 1 + 1e-9) == (routing == "weighted")


def test_too_few_windows_and_odd_folds_are_refused(run: Run) -> None:
    few = problem([[[1.0, 2.0]]] * 3, [1.0, 1.0], [1, 1])
    with pytest.raises(ProblemError, match="at least 4 of them, got 3"):
        folds(few)
    for seen, unseen in (([], [0]), ([0], [0]), ([0], [7])):
        with pytest.raises(ProblemError):
            scores(few, seen, unseen)


def test_command(run: Run) -> None:
    found = run("robust", REAL, "--time-limit", "0.05")
    assert found.code == cli.OK
    assert "Does not help" in found.out or "Helps" in found.out
    assert len(run("robust", REAL, "--time-limit", "0.05", "--json").json["folds"]) == 3
