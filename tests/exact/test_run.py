"""Exact methods as `solve` runs them: scales, limits, warm starts, interrupts, coupled layers."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings

import moeplace as mp
from moeplace.bounds import lower_bound
from moeplace.constraints import MaxMoves, ReplicaBudget
from moeplace.errors import ProblemError
from moeplace.exact import run as exact_run
from moeplace.exact.model import build, cutoffs
from moeplace.exact.run import Exact
from moeplace.exact.solvers import SOLVERS, Request
from moeplace.instances import generate, write_instance
from moeplace.problem import Problem
from moeplace.result import Limits
from moeplace.search.run import Run
from tests.brute_force import optimum
from tests.exact.cases import featured
from tests.strategies import problem


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-6])
@pytest.mark.parametrize("name", SOLVERS)
def test_the_scale_of_seconds_does_not_matter(name: str, scale: float) -> None:
    # at 1e-4 s a layer, models in seconds were "optimal" 0.5 to 9.8 % off
    speeds = np.array([1.0, 1.1, 0.9, 1.3]) / scale
    one = problem([31, 23, 17, 13, 11, 7, 5, 3], speeds, [3] * 4)
    result = mp.solve(one, method=name, time_limit=20, warm_start="none", gap=1e-5)
    assert result.objective / scale == pytest.approx(77 / 3, rel=1e-5)
    assert result.gap <= (5e-3 if name == "cbc" else 1e-5)  # of its bound CBC tells little
    assert result.lower_bound <= result.objective


@pytest.fixture(scope="module")
def large() -> tuple[Problem, mp.Evaluation, Any]:
    """A layer that no solver ends in a second, its plan and its model."""
    one = generate((1, 256, 258, 32), 3).aggregate()
    best = mp.solve(one, work_limit=300_000).evaluation
    assert best is not None
    bound = lower_bound(one).per_layer
    return one, best, build(one, [0], bound, cutoffs(one, bound, best, alone=True))


@pytest.mark.parametrize("name", SOLVERS)
def test_at_a_time_limit_nothing_is_called_optimal(
    name: str, large: tuple[Problem, mp.Evaluation, Any]
) -> None:
    # PuLP says "Optimal" of CBC at a time limit
    one, best, model = large
    began = time.perf_counter()
    answer = SOLVERS[name].solve(model, Request(seconds=1.0))
    assert time.perf_counter() - began < 20
    assert answer.ended in ("feasible", "unknown")
    assert answer.bound * model.unit <= best.objective
    if answer.values is not None:
        slots = model.slots(one, answer.values)
        plan = mp.Plan(slots=slots, rank_slots=one.cluster.slots, experts=one.experts)
        assert mp.evaluate(one, plan).legal


@pytest.mark.parametrize("name", [name for name in SOLVERS if SOLVERS[name].hint])
def test_the_best_plan_so_far_is_taken_as_a_start(
    name: str, large: tuple[Problem, mp.Evaluation, Any]
) -> None:
    one, best, model = large
    hint = model.values(one, best.plan)
    assert not np.isnan(hint).any()
    price = model.cost @ hint
    answer = SOLVERS[name].solve(model, Request(hint=hint, seconds=5.0))
    assert answer.values is not None
    assert model.cost @ answer.values <= price * (1 + 1e-6)
    if answer.first is not None:
        assert answer.first <= price * (1 + 1e-6)
    cold = SOLVERS[name].solve(model, Request(seconds=5.0))  # by itself it is not so good
    assert cold.values is None or model.cost @ cold.values > price


@pytest.mark.parametrize("start", ["none", "lpt", "greedy", "auto"])
def test_warm_starts_can_be_chosen(start: Any) -> None:
    one = generate((1, 16, 20, 4), 0).aggregate()
    result = mp.solve(one, method="cp-sat", warm_start=start, time_limit=5, gap=0.02)
    assert result.gap <= 0.02
    if start in ("none", "greedy"):
        text: list[str] = []
        options = {"time_limit": 2.0, "gap": 1e-9, "solver_log": text.append}
        mp.solve(one, method="cp-sat", warm_start=start, **options)  # type: ignore[arg-type]
        assert ("hint is complete and is feasible" in "\n".join(text)) == (start == "greedy")


@given(featured("all"))
@settings(max_examples=40, derandomize=True)
def test_prices_stand_for_rules_over_all_layers(one: Problem) -> None:
    run = Run(one, lower_bound(one), Limits(time=20.0, gap=0.0), time.perf_counter(), 0, 1, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact_run, "WHOLE", 0)
        patch.setattr(exact_run, "PRICES", 3)
        Exact(run, "cp-sat", gap=1e-6).solve()
    best = optimum(one)
    assert run.bound.total <= best * (1 + 1e-9)
    if run.best is not None:
        assert run.best.objective >= best * (1 - 1e-9)


def test_a_bound_by_prices_is_better_than_layers_alone() -> None:
    # one layer may replicate its hot expert, each alone would: 16.5 + 30, not 16.5 + 16.5
    two = problem([[[30, 1, 1, 1]] * 2], [1, 1], [3, 3], constraints=[ReplicaBudget(9)])
    run = Run(two, lower_bound(two), Limits(time=8.0, gap=0.0), time.perf_counter(), 0, 1, None)
    before = run.bound.total
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact_run, "WHOLE", 0)
        Exact(run, "cp-sat", gap=1e-4).solve()
    assert before <= 33
    assert 40 <= run.bound.total <= 46.5 * (1 + 1e-9)
    assert run.best is not None
    assert run.best.objective >= 46.5 * (1 - 1e-9)


@pytest.mark.parametrize("machines", [20, 40, 83, 167])
def test_three_jobs_a_machine(machines: int) -> None:
    """Triplets as of Falkenauer (1996): every machine is filled by three jobs, total 1,000."""
    draw = np.random.default_rng(machines)
    first = draw.integers(380, 491, machines)
    second = np.array([draw.integers(250, (1000 - a) // 2 + 1) for a in first])
    jobs = np.concatenate([first, second, 1000 - first - second])
    draw.shuffle(jobs)
    one = problem(jobs, np.ones(machines), [3] * machines)
    result = mp.solve(one, work_limit=20_000_000, gap=0)
    assert result.lower_bound == pytest.approx(1000, rel=1e-12)
    assert 1000 * (1 - 1e-12) <= result.objective <= 1010
    asked = mp.solve(one, method="cp-sat", time_limit=2.0, gap=1e-9)
    assert asked.lower_bound <= 1000 * (1 + 1e-12)  # no solver's claim is above the optimum


@pytest.mark.parametrize("kind", ["no replicas", "even", "weighted", "moves"])
def test_planted_optima_at_real_size(kind: str) -> None:
    """32 ranks that are all done at once: no plan is better, no bound may be above."""
    draw = np.random.default_rng(7)
    speeds = draw.uniform(0.9, 1.1, 32)
    spare = 0 if kind == "no replicas" else 1
    slots = np.arange(32 * (8 + spare)).reshape(32, -1) % 256
    load = np.zeros(256)
    for rank in range(32):
        mine = slots[rank, :8]
        part = draw.lognormal(0, 1, 8)
        load[mine] = part / part.sum() * speeds[rank] * 1000
    if kind == "no replicas":
        rows: Any = np.arange(256).reshape(32, 8)
    else:  # the first expert of a rank is also on the next one, and each half weighs as much
        rows = np.concatenate([np.arange(256).reshape(32, 8), np.roll(np.arange(32), 1)[:, None] * 8],
                              axis=1)  # fmt: skip
    loads = np.zeros(256)
    hot = np.arange(32) * 8
    each = draw.uniform(50, 200, 32)  # tokens that a rank runs of its own hot expert
    for rank in range(32):
        own = np.arange(8) + 8 * rank
        left = speeds[rank] * 1000
        if spare:
            left -= each[rank] + each[rank - 1]
        part = draw.lognormal(0, 1, 7)
        loads[own[1:]] = part / part.sum() * (left - (0 if spare else each[rank]))
        loads[hot[rank]] = 2 * each[rank] if spare else each[rank]
    options: dict[str, Any] = {"routing": "weighted" if kind == "weighted" else "even"}
    planted = mp.Plan(slots=rows.reshape(1, -1), rank_slots=np.full(32, 8 + spare), experts=256)
    if kind == "moves":
        options["constraints"] = [MaxMoves(planted, per_layer=4)]
    one = problem(loads, speeds, [8 + spare] * 32, **options)
    assert mp.evaluate(one, planted).objective == pytest.approx(1000)
    for method, limit in (("auto", {"work_limit": 3_000_000}), ("cp-sat", {"time_limit": 3.0})):
        result = mp.solve(one, method=method, gap=1e-6, **limit)  # type: ignore[arg-type]
        assert result.lower_bound <= 1000 * (1 + 1e-9)
        assert (
            1000 * (1 - 1e-9)
            <= result.objective
            < 1000 * (1.001 if kind != "no replicas" else 1.01)
        )


@pytest.mark.parametrize(
    ("name", "kind"),
    [("cp-sat", signal.SIGINT), ("highs", signal.SIGINT), ("cbc", signal.SIGTERM)],
)
def test_a_signal_ends_a_solver_and_the_plan_is_written(
    name: str, kind: signal.Signals, tmp_path: Path
) -> None:
    """Ctrl-C, or what `timeout` sends; nothing is left in the folder of temporary files."""
    one = generate((1, 128, 130, 16), 3).aggregate()
    write_instance(one, tmp_path / "one.json")
    code = "import sys; from moeplace.cli import main; sys.exit(main())"
    arguments = ["solve", "one.json", "--method", name, "--time-limit", "60", "--gap", "1e-9"]
    arguments += ["--out", "plan.json", "--json"]
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    time.sleep(8)
    assert len(list(temporary.glob("moeplace-cbc-*"))) == (name == "cbc")
    process.send_signal(kind)
    said, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    answer = msgspec.json.decode(said)
    assert answer["status"] == "interrupted"
    assert not list(temporary.glob("moeplace-*"))
    plan = mp.read_plan(tmp_path / "plan.json")
    assert mp.evaluate(one, plan).objective == pytest.approx(answer["objective"])


@pytest.mark.parametrize(
    ("name", "option", "said"),
    [
        ("cp-sat", {"foo": 1}, "CP-SAT does not take the parameter foo=1: there is none"),
        ("cp-sat", {"num_workers": "x"}, "num_workers='x': wrong type of value"),
        ("cp-sat", {"num_workers": -5}, r"its parameters .num_workers.: out of range"),
        ("highs", {"foo": 1}, r"option name was unknown.*own parameters .foo."),
        ("gscip", {"foo": 1}, r"own parameters .foo."),
        ("cbc", {"foo": 1}, r"CBC does not take its parameters .foo.: 'No match for foo"),
        ("cbc", {"threads": "x"}, "illegal for integer parameter threads"),
        *((name, {"foo": [1]}, r"foo must be a number, .* got \[1\]") for name in ("cbc", "highs")),
    ],
)
def test_parameters_that_a_solver_does_not_know(
    name: str, option: dict[str, Any], said: str
) -> None:
    one = generate((2, 8, 10, 2), 0).aggregate()
    with pytest.raises(ProblemError, match=said):
        mp.solve(one, name, time_limit=5.0, gap=0.0, solver_options=option)


@pytest.mark.parametrize(
    "option", [{"limits/nodes": 3}, {"limits/gap": 1}, {"nodeselection/childsel": "h"}]
)
def test_scip_s_types_of_parameters_are_found(option: dict[str, Any]) -> None:
    one = generate((1, 8, 10, 2), 0).aggregate()
    assert mp.solve(one, "gscip", time_limit=5.0, gap=0.0, solver_options=option).evaluation


def test_a_crash_of_cbc_at_its_time_limit_is_no_answer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """CBC 2.10 crashes where its time is out in its presolve; the plan so far is kept."""
    from moeplace.exact import cbc

    def crash(command: list[str], log: str, request: Request) -> int:
        Path(log).write_text("")
        return -11

    monkeypatch.setattr(cbc, "_run", crash)
    one = generate((2, 8, 10, 2), 0).aggregate()
    found = mp.solve(one, "cbc", time_limit=0.3, gap=0.0)
    assert found.evaluation is not None
    assert "CBC ended by signal 11 at its time limit" in caplog.text


def test_no_model_is_built_when_the_time_is_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """48 layers of a real size would take a minute to build."""
    built: list[int] = []
    real = exact_run.build

    def slow(problem: mp.Problem, layers: list[int], *rest: Any, **more: Any) -> Any:
        built.extend(layers)
        time.sleep(0.6)
        return real(problem, layers, *rest, **more)

    monkeypatch.setattr(exact_run, "build", slow)
    found = mp.solve(generate((12, 16, 20, 4), 0).aggregate(), "cp-sat", time_limit=0.5, gap=0.0)
    assert found.evaluation is not None
    assert len(built) <= 1


def test_the_first_error_ends_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def wrong(problem: mp.Problem, layers: list[int], *_: Any, **__: Any) -> Any:
        asked.extend(layers)
        raise ProblemError("wrong")

    monkeypatch.setattr(exact_run, "build", wrong)
    with pytest.raises(ProblemError, match="wrong"):
        mp.solve(generate((12, 16, 20, 4), 0).aggregate(), "cp-sat", time_limit=5.0, gap=0.0)
    assert len(asked) == 1
