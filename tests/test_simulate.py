"""The serving simulation against queueing theory, conservation and token-by-token sampling."""

from dataclasses import replace

import numpy as np
import pytest

import moeplace as mp
from moeplace.draws import draw, quantile
from moeplace.errors import FormatError, ProblemError
from moeplace.evaluate import evaluate
from moeplace.instances import generate
from moeplace.policies import POLICIES
from moeplace.problem import Problem
from moeplace.requests import Profiles, Requests, read_requests
from moeplace.service import Interval, Service, Slo
from moeplace.serving import layer_ranks
from moeplace.simulate import (
    Change,
    Engine,
    Goodput,
    by_rank,
    disaggregated,
    goodput,
    held,
    model_of,
    simulate,
)


def problem_of(layers: int = 3, experts: int = 32, slots: int = 40, ranks: int = 4) -> Problem:
    """Synthetic loads on ranks of a million assignments a second."""
    made = generate((layers, experts, slots, ranks), 5)
    cluster = mp.Cluster.from_speeds(made.cluster.speeds * 1e6, made.cluster.slots)
    return replace(made.aggregate(), cluster=cluster)


def planes_of(made: Problem) -> Problem:
    cluster = mp.Cluster.from_planes(
        [4e-5, 2e-5], [1e-6, 1e-5], [2e-7, 1e-7], 1 / (made.cluster.speeds / 1e6),
        made.cluster.slots,
    )  # fmt: skip
    passes = made.loads.tokens.sum() / made.layers / 4096
    return replace(
        made, cluster=cluster, loads=mp.LoadHistogram(tokens=made.loads.tokens, passes=passes),
        window_weight=None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def problem() -> Problem:
    return problem_of()


@pytest.fixture(scope="module")
def plan(problem: Problem) -> mp.Plan:
    return mp.solve(problem, work_limit=20_000).plan


@pytest.fixture(scope="module")
def profiles(problem: Problem) -> Profiles:
    return Profiles.of(problem.loads, count=16)


ENGINE = Engine(top_k=4, max_tokens=2048, max_running=64)


def some(profiles: Profiles, count: int = 400, rate: float = 100.0, **more: float) -> Requests:
    options = {"prompt": 300.0, "output": 20.0, "variation": 0.7} | more
    return Requests.poisson(profiles, count, rate=rate, **options)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------ theory


@pytest.mark.parametrize("load", [0.3, 0.6, 0.85])
def test_waiting_times_are_those_of_m_d_1(load: float) -> None:
    """One token a pass, each 1 ms: mean wait = rho D / (2 (1 - rho)) (Pollaczek-Khinchine)."""
    one = Problem(mp.LoadHistogram(tokens=[[5.0]]), mp.Cluster.from_speeds([1e3], 1))
    plan = mp.Plan(slots=[[0]], rank_slots=[1], experts=1)
    profiles = Profiles.of(one.loads, count=1)
    requests = Requests.poisson(
        profiles, 400_000, rate=load * 1e3, prompt=1, output=1, seed=int(100 * load)
    )
    engine = Engine(top_k=1, max_tokens=1)
    served = simulate(one, plan, requests, profiles, engine)
    assert served.steps["seconds"] == pytest.approx(1e-3)
    wait = served.ttft - 1e-3
    blocks = wait.reshape(40, -1).mean(axis=1)
    expected = load * 1e-3 / (2 * (1 - load))
    assert abs(wait.mean() - expected) < 4 * blocks.std() / np.sqrt(40)
    # P(wait = 0) = 1 - rho
    assert (wait < 1e-12).mean() == pytest.approx(1 - load, abs=0.01)


@pytest.mark.parametrize("phase", ["prefill", "decode", "mixed"])
def test_little_and_conservation(
    problem: Problem, plan: mp.Plan, profiles: Profiles, phase: str
) -> None:
    requests = some(profiles)
    if phase != "mixed":
        requests = requests.only(phase)
    served = simulate(problem, plan, requests, profiles, ENGINE)
    steps = served.steps
    # tokens in = tokens out: each prompt token once, then each output but the first (unless
    # decode alone makes them all)
    made = requests.output - (phase != "decode")
    assert steps["tokens"].sum() == requests.prompt.sum() + made.sum()
    assert steps["assignments"].sum() == pytest.approx(
        steps["tokens"].sum() * ENGINE.top_k * problem.layers, rel=1e-6
    )
    assert (steps["tokens"] <= max(ENGINE.max_tokens, ENGINE.max_running)).all()
    # Little: mean number that decode = rate x mean time in decode. From the steps' log (one
    # token of each that runs) and from the requests' own times.
    decoded = steps["tokens"] * steps["seconds"]
    if phase == "decode":
        in_service = (served.last - served.begun).sum()
        assert decoded.sum() == pytest.approx(in_service, rel=1e-9)
    assert (served.begun >= requests.arrival).all()
    assert (served.first > served.begun).all()
    assert (served.last >= served.first).all()
    # one pass after the other, never idle while a request waits
    ends = steps["start"] + steps["seconds"]
    assert (steps["start"][1:] >= ends[:-1] - 1e-9).all()
    for at, until in zip(ends[:-1], steps["start"][1:], strict=True):
        if until > at + 1e-9:
            in_system = (requests.arrival < at) & (served.last > at + 1e-9)
            assert not in_system.any()


def test_first_come_first_served(problem: Problem, plan: mp.Plan, profiles: Profiles) -> None:
    served = simulate(problem, plan, some(profiles, rate=1e4), profiles, ENGINE)
    assert (np.diff(served.begun) >= 0).all()
    assert (np.diff(served.first) >= 0).all()


def test_a_long_prompt_is_cut_into_chunks(
    problem: Problem, plan: mp.Plan, profiles: Profiles
) -> None:
    requests = Requests(arrival=[0.0], prompt=[5000], output=[1], profile=[0])  # type: ignore[arg-type]
    served = simulate(problem, plan, requests, profiles, ENGINE)
    assert served.steps["tokens"].tolist() == [2048, 2048, 904]
    assert served.first[0] == pytest.approx(served.steps["seconds"].sum())


# ---------------------------------------------------------------- draws, latency


def test_quantile() -> None:
    from scipy.special import ndtri

    u = np.array([1e-12, 1e-4, 0.02, 0.3, 0.5, 0.77, 0.98, 1 - 1e-9])
    assert [quantile(x) for x in u] == pytest.approx(ndtri(u), rel=1e-8, abs=1e-9)


def _token_by_token(shares: np.ndarray, tokens: list[int], k: int, draws: int) -> np.ndarray:
    """Counts [draws, experts] of tokens that choose k experts each, one token after the other.

    Systematic sampling in random order (Madow 1949): a token chooses each expert once at most,
    with probability exactly k x share.
    """
    random = np.random.default_rng(3)
    counts = np.zeros((draws, shares.shape[1]))
    every = np.repeat(np.arange(len(tokens)), tokens)
    for n in range(draws):
        chance = k * shares[every]
        order = random.permuted(np.tile(np.arange(shares.shape[1]), (every.size, 1)), axis=1)
        ends = np.take_along_axis(chance, order, axis=1).cumsum(axis=1)
        start = random.random((every.size, 1))
        hit = np.floor(ends + start) - np.floor(np.roll(ends, 1, axis=1) + start)
        hit[:, 0] = np.floor(ends[:, 0] + start[:, 0])
        chosen = np.zeros_like(hit)
        np.put_along_axis(chosen, order, hit, axis=1)
        counts[n] = chosen.sum(axis=0)
    return counts


@pytest.mark.parametrize("tokens", [[600, 400, 1000], [3, 2, 5, 1]], ids=["prefill", "decode"])
def test_rank_loads_scatter_as_token_by_token(plan: mp.Plan, tokens: list[int]) -> None:
    problem = planes_of(problem_of())
    k, draws, layer = 4, 2000 if sum(tokens) < 100 else 400, 1
    profiles = Profiles.of(problem.loads, count=len(tokens), spread=0.5, seed=2)
    shares = np.asarray(profiles.shares[:, layer], dtype=float)
    shares = np.minimum(shares, 0.9 / k)
    shares /= shares.sum(axis=1, keepdims=True)
    assert k * shares.max() < 1
    sampled = _token_by_token(shares, tokens, k, draws)
    mean = k * (np.array(tokens)[:, None] * shares).sum(axis=0)
    ours, scratch = np.empty_like(sampled), np.empty((4, mean.size))
    for n in range(draws):
        total = draw(mean, sum(tokens), np.uint64(977 * n + 5), ours[n], scratch)
        assert total == pytest.approx(k * sum(tokens))
        assert ours[n].sum() == pytest.approx(total)
    slots = tuple(part[layer] for part in held(problem, plan))
    found = []
    for counts in (sampled, ours):
        rank = np.empty((2, draws, problem.ranks))
        for n in range(draws):
            layer_ranks(counts[n], slots, by_rank(problem), np.zeros(4), model_of(problem),
                        rank[0, n], rank[1, n])  # fmt: skip
        found.append(rank)
    theirs, mine = found
    error = theirs[0].std(axis=0) / np.sqrt(draws)
    assert (np.abs(mine[0].mean(axis=0) - theirs[0].mean(axis=0)) < 6 * error).all()
    # variance of a rank's load: sampling error of a variance is sqrt(2 / draws)
    ratio = mine[0].var(axis=0) / theirs[0].var(axis=0)
    assert np.abs(ratio - 1).max() < 5 * np.sqrt(4 / draws), ratio
    # what a layer waits for: the slowest rank's time, its mean and scatter
    slowest = [rank[1].max(axis=1) for rank in found]
    assert slowest[1].mean() == pytest.approx(slowest[0].mean(), rel=0.01)
    assert slowest[1].std() == pytest.approx(slowest[0].std(), rel=0.25)


def test_ranks_of_a_layer_by_hand(plan: mp.Plan) -> None:
    """Tokens, activated replicas (those of one expert run by chance) and own tokens of ranks."""
    problem = planes_of(problem_of())
    assert problem.cluster.planes is not None
    activation = mp.Cluster.from_planes(
        [0.0, 0.0], [1e-5, 2e-5], [1e-9, 0.0], 1 / problem.cluster.speeds, problem.cluster.slots
    )
    problem = replace(problem, cluster=activation)
    counts = np.random.default_rng(0).integers(0, 4, problem.experts).astype(float)
    own = np.array([0.0, 7.0, 0.0, 3.0])
    layer = 1
    expert = plan.slots[layer]
    share = 1 / plan.replicas[layer][expert]
    assert (share < 1).sum() >= 8
    runs = np.where(share == 1, counts[expert] > 0, 1 - (1 - share) ** counts[expert])
    rank = np.repeat(np.arange(4), problem.cluster.slots)
    tokens = np.bincount(rank, counts[expert] * share) + own
    expected = activation.seconds(tokens, np.bincount(rank, runs))
    found = np.empty((2, 4))
    slots = tuple(part[layer] for part in held(problem, plan))
    layer_ranks(counts, slots, by_rank(problem), own, model_of(problem), *found)
    assert found[0] == pytest.approx(tokens)
    assert found[1] == pytest.approx(expected)


@pytest.mark.parametrize("model", ["speeds", "planes", "table"])
def test_large_batches_cost_what_evaluate_says(problem: Problem, plan: mp.Plan, model: str) -> None:
    engine = Engine(top_k=4, max_tokens=1 << 22)
    if model == "planes":
        problem = planes_of(problem)
    elif model == "table":
        points = np.array([100.0, 1e3, 1e5, 1e7])
        times = (5e-5 + points / 1e6) * (1 + 0.1 * np.arange(4)[:, None])
        cluster = mp.Cluster.from_table(points, times, problem.cluster.slots)
        problem = replace(
            problem, cluster=cluster,
            loads=mp.LoadHistogram(tokens=problem.loads.tokens, passes=1.0),
        )  # fmt: skip
    profiles = Profiles.of(problem.loads, count=1, spread=0.0)
    prompt = 1 << 22
    requests = Requests(arrival=[0.0], prompt=[prompt], output=[1], profile=[0])  # type: ignore[arg-type]
    served = simulate(problem, plan, requests, profiles, engine)
    tokens = problem.loads.aggregate().tokens
    scaled = tokens / tokens.sum(axis=2, keepdims=True) * 4 * prompt
    price = evaluate(
        replace(problem, loads=mp.LoadHistogram(tokens=scaled, passes=1.0), window_weight=None),
        plan,
    )
    assert served.steps["moe"][0] == pytest.approx(price.objective, rel=2e-3)
    idle = 1 - price.rank_seconds.mean(axis=2).sum() / price.makespan.sum()
    assert served.idle_share == pytest.approx(idle, abs=2e-3)


def test_base_loads_follow_the_batch(problem: Problem, plan: mp.Plan) -> None:
    total = problem.loads.tokens.sum(axis=2)[0, 0]
    based = replace(problem, base_load=np.array([0.0, 0.0, total, 0.0]))
    profiles = Profiles.of(problem.loads, count=4)
    requests = some(profiles, 50)
    plain, more = (simulate(one, plan, requests, profiles, ENGINE) for one in (problem, based))
    assert more.layer_seconds > 2 * plain.layer_seconds
    assert more.steps["assignments"].sum() == pytest.approx(more.steps["tokens"].sum() * 12)


def test_profiles_have_the_mean_of_their_window() -> None:
    loads = generate((2, 32, 32, 4), 1).loads.select([0, 5])
    profiles = Profiles.of(loads, count=40, spread=0.6)
    for window in (0, 1):
        own = profiles.shares[profiles.kind == window]
        mean = loads.tokens[window] / loads.tokens[window].sum(axis=1, keepdims=True)
        assert own.mean(axis=0) == pytest.approx(mean, rel=2e-3, abs=1e-9)
        assert own.sum(axis=2) == pytest.approx(np.ones((20, 2)), rel=2e-3)
        variation = own.std(axis=0) / mean
        assert 0.4 < variation.mean() < 0.7
    assert np.bincount(profiles.kind).tolist() == [20, 20]


def test_empty_layers_take_no_time(problem: Problem, plan: mp.Plan) -> None:
    tokens = np.array(problem.loads.tokens)
    tokens[:, 1] = 0
    empty = replace(problem, loads=mp.LoadHistogram(tokens=tokens))
    profiles = Profiles.of(empty.loads, count=4)
    engine = replace(ENGINE, link_seconds=1e-5)
    served = simulate(empty, plan, some(profiles, 20), profiles, engine)
    assert served.steps["link"] == pytest.approx(2e-5)
    assert served.steps["assignments"].sum() == pytest.approx(served.steps["tokens"].sum() * 8)


# --------------------------------------------------------------------- plans, changes


def test_the_same_seed_gives_the_same_bits_and_a_worse_plan_is_slower(
    problem: Problem, plan: mp.Plan, profiles: Profiles
) -> None:
    requests = some(profiles, 300, rate=400)
    one, two = (simulate(problem, plan, requests, profiles, ENGINE, seed=3) for _ in range(2))
    assert np.array_equal(one.last, two.last)
    other = simulate(problem, plan, requests, profiles, ENGINE, seed=4)
    assert not np.array_equal(one.last, other.last)
    worse = simulate(problem, POLICIES["contiguous"](problem), requests, profiles, ENGINE, seed=3)
    assert worse.layer_seconds > 1.2 * one.layer_seconds
    assert worse.ttft.mean() > one.ttft.mean()


def test_common_random_numbers_sharpen_comparisons(problem: Problem, plan: mp.Plan) -> None:
    """Same-seed differences between two plans scatter less than differences across seeds."""
    near = mp.solve(problem, work_limit=20_000, seed=1).plan
    paired, crossed = [], []
    times = {}
    for seed in range(12):
        profiles = Profiles.of(problem.loads, count=16, seed=seed)
        requests = some(profiles, 300, rate=700).only("prefill")
        for name, one in (("plan", plan), ("near", near)):
            times[name, seed] = simulate(
                problem, one, requests, profiles, ENGINE, seed=seed
            ).ttft.mean()  # fmt: skip
    for seed in range(12):
        paired.append(times["plan", seed] - times["near", seed])
        crossed.append(times["plan", seed] - times["near", (seed + 1) % 12])
    assert np.std(paired) < 0.5 * np.std(crossed)


def test_a_replan_stalls_and_then_serves(
    problem: Problem, plan: mp.Plan, profiles: Profiles
) -> None:
    worse = POLICIES["contiguous"](problem)
    requests = some(profiles, 400, rate=60).only("prefill")
    at = float(requests.arrival[200])
    kept = simulate(problem, worse, requests, profiles, ENGINE)
    changed = simulate(
        problem, worse, requests, profiles, ENGINE, changes=[Change(at=at, stall=0.25, plan=plan)]
    )
    steps = changed.steps
    before, after = steps["plan"] == 0, steps["plan"] == 1
    assert before.any()
    assert after.any()
    ends = steps["start"][before] + steps["seconds"][before]
    assert steps["start"][after][0] >= max(at, ends[-1]) + 0.25 - 1e-9
    assert changed.ttft.max() > 0.25
    # per token, the better plan is faster
    rate = [steps["moe"][one].sum() / steps["tokens"][one].sum() for one in (before, after)]
    assert rate[1] < 0.85 * rate[0]
    assert np.array_equal(kept.first[:100], changed.first[:100])


def test_disaggregated_is_one_pool_after_the_other(
    problem: Problem, plan: mp.Plan, profiles: Profiles
) -> None:
    requests = some(profiles, 200)
    pools = {"prefill": (problem, plan, ENGINE), "decode": (problem, plan, ENGINE)}
    served = disaggregated(pools, requests, profiles, transfer=0.01)
    ahead = simulate(problem, plan, requests.only("prefill"), profiles, ENGINE)
    assert np.array_equal(served.ttft, ahead.ttft)
    several = requests.output > 1
    assert (served.last[several] >= served.first[several] + 0.01).all()
    assert served.tpot.size == several.sum()
    mixed = simulate(problem, plan, requests, profiles, ENGINE)
    assert mixed.ttft.mean() > served.ttft.mean()  # decode is not in the way


def test_goodput_is_the_edge(problem: Problem, plan: mp.Plan, profiles: Profiles) -> None:
    requests = some(profiles, 1500).only("prefill")
    slo = Slo(ttft=0.05)
    found = goodput(problem, plan, requests, profiles, ENGINE, slo)
    assert found.attained >= 0.9
    span = requests.arrival[-1] - requests.arrival[0]
    faster = requests.faster(found.rate * 1.03 * span / requests.count)
    assert simulate(problem, plan, faster, profiles, ENGINE).attained(slo) < 0.9
    worse = goodput(problem, POLICIES["contiguous"](problem), requests, profiles, ENGINE, slo)
    assert 0 < worse.rate < 0.9 * found.rate
    never = goodput(problem, plan, requests, profiles, ENGINE, Slo(ttft=1e-9))
    assert never == Goodput(rate=0.0, attained=0.0)


def test_interval() -> None:
    found = Interval.of([1.0, 2.0, 3.0])
    assert found.mean == 2
    assert found.half == pytest.approx(4.302653 / np.sqrt(3), rel=1e-6)
    assert Interval.of([1.0]).half == np.inf


def test_figures_are_those_of_the_arrays(
    problem: Problem, plan: mp.Plan, profiles: Profiles
) -> None:
    served: Service = simulate(problem, plan, some(profiles), profiles, ENGINE)
    figures = served.figures()
    assert figures["ttft p90"] == np.percentile(served.ttft, 90)
    assert figures["tpot p99"] == np.percentile(served.tpot, 99)
    assert served.attained(Slo(ttft=np.percentile(served.ttft, 50))) == pytest.approx(0.5, abs=0.01)
    assert served.attained(Slo()) == 1
    assert 0 < served.layer_gap < served.layer_seconds


# ---------------------------------------------------------------------------- bad input


def test_bad_input_is_refused(
    problem: Problem, plan: mp.Plan, profiles: Profiles, tmp_path: object
) -> None:
    requests = some(profiles, 10)
    relative = replace(problem, cluster=generate((3, 32, 40, 4), 5).cluster)
    with pytest.raises(ProblemError, match="relative"):
        simulate(relative, plan, requests, profiles, ENGINE)
    with pytest.raises(ProblemError, match="experts"):
        simulate(problem, plan, requests, Profiles.of(generate((3, 8, 8, 2), 0).loads), ENGINE)
    with pytest.raises(ProblemError, match="profile"):
        simulate(problem, plan, replace(requests, profile=requests.profile + 99), profiles, ENGINE)
    late, early = Change(at=2, stall=0, plan=plan), Change(at=1, stall=0, plan=plan)
    with pytest.raises(ProblemError, match="order of time"):
        simulate(problem, plan, requests, profiles, ENGINE, changes=[late, early])
    with pytest.raises(ProblemError, match=r"\(top-k\) must be .* got 64"):
        simulate(problem, plan, requests, profiles, Engine(top_k=64))
    with pytest.raises(ProblemError, match="max_tokens"):
        Engine(max_tokens=0)
    with pytest.raises(ProblemError, match="ascend"):
        replace(requests, arrival=requests.arrival[::-1])
    with pytest.raises(ProblemError, match="rate"):
        some(profiles, rate=0)
    with pytest.raises(ProblemError, match="spread"):
        Profiles.of(problem.loads, spread=-1)
    with pytest.raises(mp.PlanError):
        simulate(
            problem, mp.Plan(slots=[[0]], rank_slots=[1], experts=1), requests, profiles, ENGINE
        )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("arrival,prompt\n1,2\n", "lacks the column 'output'"),
        ("arrival,prompt,output\n", "no rows"),
        ("arrival,prompt,output\n0,5,x\n", "row 1"),
        ("arrival,prompt,output\n0,5,1.5\n", "row 1"),
        ("arrival,prompt,output\n0,5,0\n", "Outputs"),
        ("arrival,prompt,output,kind\n0,5,1,7\n", "kind 7"),
    ],
)
def test_bad_traces(tmp_path: object, profiles: Profiles, text: str, says: str) -> None:
    path = tmp_path / "trace.csv"  # type: ignore[operator]
    path.write_text(text)
    with pytest.raises(FormatError, match=says):
        read_requests(path, profiles)


def test_a_trace_is_read(tmp_path: object) -> None:
    path = tmp_path / "trace.csv"  # type: ignore[operator]
    path.write_text("# recorded\narrival, prompt, output, kind\n2.5,7,3,1\n0.5,9,1,0\n")
    profiles = Profiles.of(generate((2, 8, 8, 2), 0).loads.select([0, 1]), count=8)
    found = read_requests(path, profiles)
    assert found.arrival.tolist() == [0.5, 2.5]
    assert found.prompt.tolist() == [9, 7]
    assert profiles.kind[found.profile].tolist() == [0, 1]
