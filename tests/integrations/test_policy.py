"""Whatever an engine hands over, a map comes back that it can use, and nothing is raised."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplace.integrations import planner, tables
from moeplace.integrations.agree import KEEP, OWN, Answer
from moeplace.integrations.policy import Request
from moeplace.integrations.settings import UNRESTRICTED, read_settings, wanted
from moeplace.profile import Entry, Profile, Sample, write_profile
from tests.integrations.cases import contiguous, decide, loads, make, own, speeds

OLD = contiguous(6, 288, 256)


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    planner.warm()


def request(**change: Any) -> Request:
    given: dict[str, Any] = {"weight": loads(), "ranks": 32, "slots": 288, "old": OLD}
    return Request(**given | change)


def test_on_good_input_nothing_fails_and_plans_are_at_the_bound(tmp_path: Path) -> None:
    policy, said = make(effort=UNRESTRICTED)
    policy._rank_speeds = lambda ranks: speeds()  # type: ignore[method-assign]
    old = OLD
    for epoch in range(4):
        weight = loads(epoch=epoch)
        slots = decide(policy, request(weight=weight, old=old))
        bound = weight.sum(axis=1) / speeds().sum()
        assert (tables.seconds(slots, weight, speeds()) <= bound * (1 + 1e-3)).all()
        old = slots
    assert (policy.failures, policy.decisions, said) == (0, 4, [])


BROKEN = {
    "NaN": np.where(np.arange(256) == 3, np.nan, loads()),
    "infinite": np.where(np.arange(256) == 3, np.inf, loads()),
    "negative": loads() - 1e6,
}


@pytest.mark.parametrize("weight", BROKEN.values(), ids=BROKEN.keys())
def test_garbage_weights_keep_the_map_with_one_line(weight: Any) -> None:
    policy, said = make()
    assert (decide(policy, request(weight=weight)) == OLD).all()
    assert policy.failures == 1
    assert len(said) == 1
    assert "NaN, infinite or negative" in said[0]
    # without a map in use it is the engine's own policy that answers
    asked = request(weight=weight, old=None)
    assert (decide(policy, asked) == own(asked)()).all()


def test_no_load_keeps_the_map_without_a_word() -> None:
    policy, said = make()
    assert (decide(policy, request(weight=np.zeros((6, 256)))) == OLD).all()
    assert (policy.failures, said) == (0, [])


WRONG_MAPS: dict[str, Any] = {
    "no map": None,
    "other layers": OLD[:4],
    "unknown expert": np.where(OLD == 7, 400, OLD),
    "not numbers of experts": OLD.astype(float),
    "empty": np.zeros((6, 0), dtype=int),
    "one expert everywhere": np.zeros_like(OLD),
    "an expert missing": np.where(OLD == 7, 8, OLD),
    "duplicates on a rank": np.sort(OLD, axis=1),
    "slots that do not divide": OLD[:, :100],
}


@pytest.mark.parametrize("old", WRONG_MAPS.values(), ids=WRONG_MAPS.keys())
def test_absent_and_unusable_maps_are_planned_anew(old: Any) -> None:
    policy, said = make()
    slots = decide(policy, request(old=old))
    assert tables.serves(slots, 6, 288, 256)
    assert not tables.duplicates(slots, 32).any()
    assert policy.failures == 0
    assert len(said) <= 1
    bound = loads().sum(axis=1) / 32
    assert (tables.seconds(slots, loads(), np.ones(32)) <= bound * 1.06).all()


@pytest.mark.parametrize("ranks", [31, 36, 48])
def test_a_changed_number_of_ranks_is_planned_for(ranks: int) -> None:
    policy, _ = make()
    before = decide(policy, request())
    slots = decide(policy, request(ranks=ranks, slots=9 * ranks, old=before))
    assert tables.serves(slots, 6, 9 * ranks, 256)
    assert not tables.duplicates(slots, ranks).any()
    assert policy.failures == 0
    if ranks > 32:  # copies go to the new ranks first of all
        wider = np.pad(before, ((0, 0), (0, 9 * (ranks - 32))), constant_values=-1)
        assert (
            tables.received(slots, wider, ranks, 256).mean() < 9 * (ranks - 32) + 90
        )  # from nothing: 8.7 a rank


def test_fewer_slots_than_experts_are_left_to_the_engine() -> None:
    policy, said = make()
    asked = request(ranks=16, slots=144, old=None, weight=np.ones((2, 150)))
    fallback = np.full((2, 144), 5)
    assert (policy.decide(asked, lambda: Broken(), lambda: fallback) == 5).all()
    assert policy.failures == 1
    assert "no way to the others" in said[0]


class Broken:
    first = True

    def gather(self, key: str) -> list[str]:
        raise OSError("no way to the others")

    def settle(self, make: Any, layers: int, slots: int) -> Answer:
        raise OSError("no way to the others")


@pytest.mark.parametrize("where", ["reach", "gather", "settle", "plan", "own"])
def test_any_exception_ends_in_a_map(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, said = make()

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("from the depths")

    asked = request(old=None if where == "own" else OLD)
    broken = Broken()
    if where != "gather":
        broken.gather = lambda key: [key]  # type: ignore[method-assign]
    if where in ("plan", "own"):
        monkeypatch.setattr("moeplace.integrations.policy.propose", fail)
        broken.settle = lambda make, layers, slots: make()  # type: ignore[method-assign]
    reach = fail if where == "reach" else lambda: broken
    slots = policy.decide(asked, reach, fail)
    assert tables.serves(slots, 6, 288, 256)
    assert policy.failures >= 1
    assert any("from the depths" in line or "no way to the others" in line for line in said)


@settings(max_examples=25)
@given(st.data())
def test_nothing_that_is_handed_over_raises(data: st.DataObject) -> None:
    policy, _ = make()
    layers, experts = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))
    ranks, size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    numbers = st.sampled_from([0.0, 1.0, 5.0, 1e9, -1.0, np.nan, np.inf, 1e300])
    weight = np.array([[data.draw(numbers) for _ in range(experts)] for _ in range(layers)])
    width = data.draw(st.integers(1, 12))
    old = np.array([[data.draw(st.integers(-2, 7)) for _ in range(width)] for _ in range(layers)])
    asked = Request(
        weight=weight, ranks=ranks, slots=ranks * size, old=data.draw(st.sampled_from([None, old])),
        groups=data.draw(st.integers(0, 4)), nodes=data.draw(st.integers(0, 3)),
    )  # fmt: skip
    slots = decide(policy, asked)
    assert slots.shape == (layers, ranks * size)
    if ranks * size >= experts:
        assert tables.serves(slots, layers, ranks * size, experts)


def test_observing_records_and_moves_nothing(tmp_path: Path) -> None:
    policy, _ = make(mode="observe", folder=str(tmp_path))
    assert (decide(policy, request()) == OLD).all()
    assert len(list(tmp_path.glob("6x256-288-32/*.npz"))) == 1
    assert policy.failures == 0


def test_a_folder_that_cannot_be_written_is_no_reason_to_keep_a_slow_map(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    policy, said = make(folder=str(tmp_path / "file"))
    assert (decide(policy, request()) != OLD).any()
    decide(policy, request())
    assert len(said) == 1
    assert "decisions are not recorded" in said[0]


# Speeds


def profile(path: Path, uuids: list[str], days: float = 0, phase: str = "prefill") -> str:
    when = (datetime.now(UTC) - timedelta(days=days)).isoformat()
    entries = [
        Entry(
            uuid=uuid, host="h", date=when, label="gpu-measured", phase=phase, kernel="k",  # type: ignore[arg-type]
            dtype="bfloat16", hidden=8, intermediate=8, slots=4,
            samples=[Sample(activated=4, tokens=4096, median=s, p10=s, p90=s)],
        )
        for uuid, s in zip(uuids, np.linspace(1.0, 1.3, len(uuids)).tolist(), strict=True)
    ]  # fmt: skip
    write_profile(Profile(entries=entries), path)
    return str(path)


class Four:
    """Four ranks whose devices are in another order than they were measured in."""

    first = True

    def gather(self, key: str) -> list[str]:
        return ["GPU-c", "GPU-a", "GPU-d", "GPU-b"]

    def settle(self, make: Any, layers: int, slots: int) -> Answer:
        return make()


def four() -> Request:
    return Request(
        weight=np.round(loads((6, 16, 20, 4))), ranks=4, slots=20, old=contiguous(6, 20, 16)
    )


def used_speeds(policy: Any) -> Any:
    asked = four()
    policy.decide(asked, Four, own(asked))
    return policy._rank_speeds(4)


def test_speeds_follow_the_device_and_not_the_rank(tmp_path: Path) -> None:
    path = profile(tmp_path / "p.json", ["GPU-a", "GPU-b", "GPU-c", "GPU-d"])
    policy, said = make(profile=path)
    np.testing.assert_allclose(used_speeds(policy), [1 / 1.2, 1, 1 / 1.3, 1 / 1.1])
    assert said == []


@pytest.mark.parametrize("case", ["missing", "stale", "no file", "broken", "phase", "two phases"])
def test_unknown_speeds_count_as_equal_with_one_warning(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uuids, path = ["GPU-a", "GPU-b", "GPU-c", "GPU-d"], tmp_path / "p.json"
    options: dict[str, Any] = {}
    if case == "missing":
        profile(path, [*uuids[:3], "GPU-x"])
    elif case == "stale":
        profile(path, uuids, days=8)
    elif case == "broken":
        path.write_text("{")
    elif case in ("phase", "two phases"):
        profile(path, uuids)
        options = {"phase": "decode"} if case == "phase" else {}
        if case == "two phases":
            held = json.loads(path.read_text())
            held["entries"] += [entry | {"phase": "decode"} for entry in held["entries"]]
            path.write_text(json.dumps(held))
    policy, said = make(profile=str(path), **options)
    assert (used_speeds(policy) == 1).all()
    used_speeds(policy)
    assert len(said) + len([r for r in caplog.records if r.levelname == "WARNING"]) == 1
    assert policy.failures == 0


# Settings


def test_settings_are_read_and_refused() -> None:
    assert not wanted({})
    assert not wanted({"MOEPLACE_POLICY": "off", "MOEPLACE_PROFILE": "x"})
    assert wanted({"MOEPLACE_PROFILE": "x"})
    read = read_settings(
        {"MOEPLACE_PROFILE": "x", "MOEPLACE_PHASE": "decode", "MOEPLACE_GAP": "0.02"}
    )
    assert (read.mode, read.profile, read.phase, read.effort.gap) == ("on", "x", "decode", 0.02)
    assert read_settings({"MOEPLACE_POLICY": "observe"}).folder == "moeplace-observe"
    assert read_settings({"MOEPLACE_MAX_MOVES": "8"}).effort.max_moves == 8
    for name, value in (
        ("MOEPLACE_POLICY", "yes"),
        ("MOEPLACE_PHASE", "x"),
        ("MOEPLACE_GAP", "-1"),
    ):
        with pytest.raises(ValueError, match=name):
            read_settings({name: value})


def test_verdicts_are_distinct() -> None:
    assert Answer(KEEP).digest() != Answer(OWN).digest()
    assert Answer(1, np.zeros((2, 3))).digest() != Answer(1, np.zeros((3, 2))).digest()
