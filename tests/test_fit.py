import csv
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import numpy as np
import pytest

from moeplace._check import FloatArray
from moeplace.errors import FormatError, ProblemError
from moeplace.fit import Fit, fit, ties
from moeplace.hardware import Cluster
from moeplace.passive import fit_totals
from moeplace.profile import Entry, Profile, Sample, write_profile
from moeplace.samples import Samples, read_samples, read_totals

SOURCES = Path(__file__).parents[1] / "instances" / "sources"
#: Slow GPU 2, fast GPU 4.
SLOWNESS = np.array([1, 1, 1.1, 1, 0.94, 1, 1, 1])


def rows(name: str) -> Iterator[dict[str, str]]:
    with (SOURCES / name).open() as file:
        yield from csv.DictReader(line for line in file if not line.startswith("#"))


def curve(model: str, system: str, ep: int) -> Samples:
    """One measured curve: activated experts, assignments, seconds (see the file's head)."""
    points = []
    for row in rows("moe_kernel_latency.csv"):
        if (row["model"], row["system"], int(row["ep_size"])) == (model, system, ep):
            tokens = int(row["num_tokens"]) * int(row["top_k"]) / ep
            activated = min(int(row["experts"]) / ep, tokens)
            points.append((activated, tokens, float(row["latency_ms"]) * 1e-3))
    return one_gpu(np.array(points))


def grid() -> Samples:
    points = [
        (float(r["activated_experts"]), 8 * float(r["tokens"]), float(r["time_us"]) * 1e-6)
        for r in rows("moe_kernel_latency_grid.csv")
    ]
    return one_gpu(np.array(points))


def one_gpu(points: FloatArray) -> Samples:
    activated, tokens, seconds = points.T
    gpu = np.zeros(tokens.size, dtype=np.int64)
    return Samples(gpu=gpu, activated=activated, tokens=tokens, seconds=seconds)


def made_up(noise: float = 0.01, seed: int = 0, gpus: int = 8) -> Samples:
    """Times of the maximum of two planes, on GPUs that differ in compute."""
    draw = np.random.default_rng(seed)
    points = [(a, n) for a in (4, 16, 32) for n in (32, 128, 512, 2048, 8192, 32768)]
    columns = []
    for gpu in range(gpus):
        for a, n in points:
            r = SLOWNESS[gpu]
            time = max(31e-6 + 14e-6 * a + 2e-8 * r * n, 25e-6 + 3e-6 * a + 1.17e-7 * r * n)
            columns.append((gpu, a, n, time * draw.lognormal(0, noise)))
    gpu, activated, tokens, seconds = np.array(columns).T
    return Samples(gpu=gpu.astype(int), activated=activated, tokens=tokens, seconds=seconds)


# Errors on public measurements, as docs/hardware.md lists them


@pytest.mark.parametrize("system", ["h100", "h200", "b200"])
@pytest.mark.parametrize(("model", "ep"), [("DeepSeek-V3", 8), ("Qwen3-235B-A22B", 8)])
def test_two_planes_fit_measured_curves_where_one_speed_fails(
    model: str, system: str, ep: int
) -> None:
    samples = curve(model, system, ep)
    planes, speed = fit(samples, "planes"), fit(samples, "speed")
    assert planes.mean_error < 0.016
    assert planes.max_error < 0.13
    assert planes.cv_mean < 0.04
    assert 0.6 < speed.mean_error < 0.8
    assert speed.max_error > 0.98


def test_two_planes_fit_the_grid_best() -> None:
    errors = {m: fit(grid(), m).mean_error for m in ("speed", "offset", "plane", "planes")}  # type: ignore[arg-type]
    assert errors["planes"] < 0.055 < errors["plane"] < 0.08 < errors["offset"] < errors["speed"]
    assert errors["speed"] > 0.65


def test_hinges_are_planes_that_begin_later() -> None:
    found = fit(curve("DeepSeek-V3", "h100", 8), "hinges")
    assert found.planes is not None
    assert len(found.planes) > 1
    assert found.mean_error < fit(curve("DeepSeek-V3", "h100", 8), "plane").mean_error
    cluster = found.cluster(36)
    s = found.samples
    priced = cluster.seconds(s.tokens[:, None], s.activated[:, None])[:, 0]
    np.testing.assert_allclose(priced, found.seconds(s), rtol=1e-9)
    assert (
        np.diff(cluster.seconds(np.arange(100.0)[:, None], np.full((100, 1), 3.0))[:, 0]) >= 0
    ).all()


# Parameters and GPUs


@pytest.fixture(scope="module")
def eight() -> Fit:
    return fit(made_up())


def test_parameters_of_a_known_model_come_back(eight: Fit) -> None:
    assert eight.planes is not None
    assert eight.mean_error < 0.012
    low = eight.planes[eight.planes[:, 2].argmin()]
    high = eight.planes[eight.planes[:, 2].argmax()]
    scale = np.exp(np.log(SLOWNESS).mean())
    assert low[1] == pytest.approx(14e-6, rel=0.05)
    assert high[2] == pytest.approx(1.17e-7 * scale, rel=0.02)


def test_gpus_that_differ_are_told_apart_and_the_others_tied(eight: Fit) -> None:
    true = SLOWNESS / np.exp(np.log(SLOWNESS).mean())
    assert eight.tied.tolist() == [1, 1, 2, 1, 0, 1, 1, 1]
    np.testing.assert_allclose(eight.slowness, true, rtol=0.02)
    assert (eight.intervals[:, 0] <= eight.intervals[:, 1]).all()


def test_noise_alone_is_no_difference() -> None:
    samples = made_up(0.02, seed=3, gpus=2)
    assert fit(samples).tied.tolist() == [0, 0]


def test_ties_share_a_value() -> None:
    slowness, group = ties(
        np.array([1.0, 1.02, 1.2]), np.array([0.98, 1.0, 1.1]), np.array([1.01, 1.05, 1.3])
    )
    assert group.tolist() == [0, 0, 1]
    assert slowness[0] == slowness[1] == pytest.approx((1.0 * 1.02) ** 0.5)


def test_an_outlier_is_reported_and_left_out() -> None:
    samples = made_up(0.005)
    seconds = samples.seconds.copy()
    seconds[20] *= 3
    found = fit(Samples(**{**_columns(samples), "seconds": seconds}))
    assert found.outliers.tolist() == [20]
    assert found.max_error < 0.03


def test_times_that_fall_with_tokens_are_reported() -> None:
    samples = made_up(0.0)
    seconds = samples.seconds.copy()
    seconds[4] = 0.9 * seconds[3]
    assert Samples(**{**_columns(samples), "seconds": seconds}).falls == [(0, 3, 4)]
    assert samples.falls == []


def _columns(samples: Samples) -> dict[str, FloatArray]:
    return {name: getattr(samples, name) for name in ("gpu", "activated", "tokens", "seconds")}


def test_a_table_takes_each_gpu_at_the_most_activated_replicas() -> None:
    samples = made_up(0.0, gpus=3)
    found = fit(samples, "table")
    cluster = found.cluster([2, 2, 2], gpus=[2, 0, 1])
    at = (samples.activated == 32) & (samples.tokens == 2048)
    want = samples.seconds[at][[2, 0, 1]]
    np.testing.assert_allclose(cluster.seconds(np.full((1, 3), 2048.0))[0], want, rtol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seconds": [1.0, 0.0]}, "Seconds must be finite, above"),
        ({"tokens": [1.0]}, "one GPU, activated, tokens and seconds each"),
        ({"gpu": [0, 2]}, "GPU 1 has no samples"),
    ],
)
def test_bad_samples_are_refused(change: dict[str, list[float]], message: str) -> None:
    good = {"gpu": [0, 1], "activated": [1, 1], "tokens": [1, 2], "seconds": [1, 2]}
    with pytest.raises(ProblemError, match=message):
        Samples(**{**good, **change})  # type: ignore[arg-type]


def test_a_fit_needs_points_and_times_that_rise() -> None:
    few = one_gpu(np.array([[1, 1, 1.0], [1, 2, 2.0]]))
    with pytest.raises(ProblemError, match="at least 3 points"):
        fit(few)
    flat = one_gpu(np.array([[1, n, 1.0] for n in (1, 2, 4, 8)]))
    with pytest.raises(ProblemError, match="do not rise with tokens"):
        fit(flat, "plane")
    with pytest.raises(ProblemError, match="Model must be one of"):
        fit(flat, "cubic")  # type: ignore[arg-type]


# Totals


def totals(slowness: FloatArray, passes: int = 600) -> tuple[FloatArray, FloatArray, FloatArray]:
    draw = np.random.default_rng(1)
    shape = (passes, slowness.size)
    tokens = draw.lognormal(0, 0.15, shape) * 2000 * draw.lognormal(0, 0.5, (passes, 1))
    activated = draw.integers(4, 9, shape).astype(float)
    each = (30e-6 + 14e-6 * activated + 1.2e-7 * slowness * tokens) * draw.lognormal(0, 0.02, shape)
    return tokens, each.max(axis=1), activated


def test_totals_name_the_ranks_that_differ() -> None:
    true = SLOWNESS / np.exp(np.log(SLOWNESS).mean())
    found = fit_totals(*totals(true))
    np.testing.assert_allclose(found.slowness, true, rtol=0.015)
    assert len({int(found.tied[g]) for g in (0, 1, 3, 5, 6, 7)}) == 1
    assert found.tied[4] < found.tied[0] < found.tied[2]
    assert ((found.intervals[:, 0] <= true) & (true <= found.intervals[:, 1])).sum() >= 7
    assert found.noise == pytest.approx(0.02, rel=0.2)
    assert found.slowest.sum() == pytest.approx(1)


def test_a_rank_that_is_never_the_slowest_has_a_wide_interval() -> None:
    tokens, _, activated = totals(np.ones(4), 300)
    tokens[:, 3] *= 0.3
    each = 30e-6 + 14e-6 * activated + 1.2e-7 * tokens
    each *= np.random.default_rng(2).lognormal(0, 0.02, each.shape)
    found = fit_totals(tokens, each.max(axis=1), activated)
    width = found.intervals[:, 1] / found.intervals[:, 0]
    assert width[3] > 3 * width[:3].max()
    assert found.slowest[3] < 0.02


def test_totals_are_checked() -> None:
    tokens, seconds, _ = totals(np.ones(2), 30)
    with pytest.raises(ProblemError, match="one total for each pass"):
        fit_totals(tokens, seconds[1:])
    with pytest.raises(ProblemError, match="say too little"):
        fit_totals(tokens[:3], seconds[:3])
    tokens[4] = 0
    with pytest.raises(ProblemError, match="no tokens on any rank"):
        fit_totals(tokens, seconds)


# Files


def test_a_trace_is_read(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("# a trace\nrank,tokens,seconds,activated\n3,10,1e-3,2\n1,20,2e-3,4\n")
    found = read_samples(path)
    assert found.names == ("rank 1", "rank 3")
    assert found.gpu.tolist() == [1, 0]
    assert found.activated.tolist() == [2, 4]


def test_totals_are_read(tmp_path: Path) -> None:
    path = tmp_path / "totals.csv"
    path.write_text("pass,rank,tokens,seconds\n7,0,10,1\n7,1,20,1\n9,1,5,2\n9,0,6,2\n")
    tokens, seconds, activated = read_totals(path)
    assert tokens.tolist() == [[10, 20], [6, 5]]
    assert seconds.tolist() == [1, 2]
    assert activated is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank,tokens\n0,1\n", "lacks the column 'seconds'"),
        ("rank,tokens,seconds\n", "no rows"),
        ("rank,tokens,seconds\n0,1,x\n", "row 1: seconds must be a number from 0, got 'x'"),
        ("rank,tokens,seconds\n0,1\n", "row 1: seconds must be .* got None"),
        ("rank,tokens,seconds\n0.5,1,1\n", "rank must be a whole number"),
        ("rank,tokens,seconds\n0,-1,1\n", "tokens must be a number from 0"),
        ("rank,tokens,seconds\n0,1,0\n", "Seconds must be finite, above"),
        ("rank,tokens,seconds\n99999999999,1,0\n", "below 65,536"),
    ],
)
def test_a_bad_trace_is_refused_with_its_row(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(FormatError, match=message):
        read_samples(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("7,0,10,1\n7,0,20,1\n", "pass 7 has 2 rows of rank 0"),
        ("7,0,10,1\n7,1,20,2\n", "pass 7 has several totals"),
        ("7,1,10,1\n", "pass 7 has 0 rows of rank 0"),
    ],
)
def test_bad_totals_are_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "totals.csv"
    path.write_text("pass,rank,tokens,seconds\n" + text)
    with pytest.raises(FormatError, match=message):
        read_totals(path)


# Profiles


def profile(age_days: float = 0.0, gpus: int = 3) -> Profile:
    samples = made_up(0.003, gpus=gpus)
    date = (datetime.now(UTC) - timedelta(days=age_days)).isoformat()
    entries = []
    for gpu in range(gpus):
        mine = np.flatnonzero(samples.gpu == gpu)
        measured = [
            Sample(
                activated=int(samples.activated[i]),
                tokens=int(samples.tokens[i]),
                median=float(samples.seconds[i]),
                p10=float(samples.seconds[i]),
                p90=float(samples.seconds[i]),
            )
            for i in mine
        ]
        entries.append(
            Entry(
                uuid=f"GPU-{gpu}",
                host="node",
                rank=gpu,
                date=date,
                label="gpu-measured",
                phase="prefill",
                kernel="grouped",
                dtype="bfloat16",
                hidden=1,
                intermediate=1,
                slots=32,
                samples=measured,
            )
        )
    return Profile(entries=entries)


@pytest.mark.parametrize("model", ["speed", "plane", "planes", "hinges", "table"])
def test_ranks_get_the_times_of_the_gpus_that_they_have(model: str, tmp_path: Path) -> None:
    write_profile(profile(), tmp_path / "profile.json")
    uuids = ["GPU-2", "GPU-0", "GPU-1"]
    cluster = Cluster.from_profile(tmp_path / "profile.json", 9, uuids=uuids, model=model)
    seconds = cluster.seconds(np.full((1, 3), 30_000.0), np.full((1, 3), 8.0))[0]
    assert seconds[0] > 1.05 * seconds[1]
    assert seconds[1] == pytest.approx(seconds[2], rel=0.02)
    assert cluster.nonlinear == (model != "speed")
    assert cluster.time_unit == "s"


@pytest.mark.parametrize(
    ("given", "uuids", "wanted", "message"),
    [
        (profile(), ["GPU-0", "GPU-9"], {}, "no entry for rank 1"),
        (profile(8.0), ["GPU-0", "GPU-1"], {}, "8 days old"),
        (profile(), ["GPU-0", "GPU-1"], {"phase": "decode"}, "measured for phase prefill"),
        (profile(), ["GPU-0", "GPU-0"], {}, "same device"),
        (
            Profile(
                entries=[
                    profile().entries[0],
                    msgspec.structs.replace(profile().entries[1], dtype="float32"),
                ]
            ),
            ["GPU-0", "GPU-1"],
            {},
            "another setting",
        ),
    ],
)
def test_a_profile_that_does_not_fit_means_equal_speeds_and_one_warning(
    given: Profile,
    uuids: list[str],
    wanted: dict[str, str],
    message: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cluster = Cluster.from_profile(given, 9, uuids=uuids, **wanted)
    assert cluster.speeds.tolist() == [1.0, 1.0]
    assert cluster.time_unit == "token units"
    assert len(caplog.records) == 1
    assert message in caplog.text


def test_without_uuids_ranks_are_those_of_the_measuring_job() -> None:
    assert Cluster.from_profile(profile(), [9, 9, 8]).slots.tolist() == [9, 9, 8]
    with pytest.raises(ProblemError, match="no devices"):
        Cluster.from_profile(Profile(entries=[]), 9)
