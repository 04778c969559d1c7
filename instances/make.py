"""Write every instance of this folder and `best_known.csv`, from `sources/` and this script alone.

Run ``python instances/make.py`` from the checkout, with moeplace installed. The same files come
out on any machine. Rows of `best_known.csv` that are not about ``small/`` are kept.
"""

import csv
import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from moeplace.constraints import Forbid, Pin  # noqa: E402
from moeplace.hardware import Cluster  # noqa: E402
from moeplace.instances import read_instance, write_instance  # noqa: E402
from moeplace.loads import LoadHistogram  # noqa: E402
from moeplace.problem import Problem  # noqa: E402
from tests.brute_force import optimum  # noqa: E402

COLUMNS = [
    "instance",
    "routing",
    "objective",
    "lower_bound",
    "proof",
    "work_limit",
    "plan_digest",
]
FLEETS = ["frontera-bert", "bert-longhorn", "frontera-resnet", "sgemm-longhorn"]
FLASHLB = [[600, 560, 120, 120, 20, 10, 10, 10]]

#: Source of the loads, name, and the (ranks, slots per rank) that each is placed on.
MODELS = [
    ("qwen3_30b_a3b_sharegpt", "qwen3-30b-sharegpt", [(8, 16), (16, 9)]),
    ("deepseek_v2_lite_tasks", "dsv2lite-tasks", [(8, 9), (16, 5)]),
    ("deepseek_v2_lite_windows", "dsv2lite-windows", [(8, 9)]),
]


def tiny(loads: Any, speeds: list[float], slots: Any, note: str, **options: Any) -> Problem:
    """A hand-made problem: loads [windows][layers][experts] or [layers][experts]."""
    given = {key: options.pop(key) for key in ("passes", "phase") if key in options}
    unit = options.pop("speed_unit", "relative")
    options.setdefault("origin", f"Hand-made. {note}")
    return Problem(
        LoadHistogram(tokens=loads, **given),
        Cluster.from_speeds(speeds, slots, speed_unit=unit),
        **options,
    )


def small() -> dict[str, Problem]:
    """Tiny problems, each with one trap; the stated optima are worked out by hand."""
    flashlb = {
        "loads": FLASHLB,
        "speeds": [1] * 8,
        "slots": 2,
        "note": "",
        "origin": (
            "The toy example of FlashLB (vllm-ascend): greedy EPLB 232, FlashLB 205; optimum "
            "590/3 = 196.67 even, 1450/8 = 181.25 weighted (the mean, a perfect score)."
        ),
    }
    return {
        "flashlb-even": tiny(**flashlb),
        "flashlb-weighted": tiny(**flashlb, routing="weighted"),
        "one-rank": tiny([[5, 3, 2]], [0.5], 3, "One rank runs all: 10 / 0.5 = 20."),
        "no-spares": tiny(
            [[7, 5, 4, 2]], [1, 1], 2, "S = E: 7 + 2 against 5 + 4, optimum 9 (fluid bound 9)."
        ),
        "no-spares-hot": tiny(
            [[20, 3, 2, 1]],
            [1, 1],
            2,
            "S = E and a hot expert: it lies with the least one, 20 + 1 = 21 against 13 fluid.",
        ),
        "every-expert-everywhere": tiny(
            [[6, 4, 2]],
            [1, 1, 1],
            3,
            "S = G x E: all on every rank, 12 / 3 = 4; no slot is short.",
        ),
        "replicas-hurt": tiny(
            [[8, 1]],
            [1, 0.1],
            2,
            "Even: a copy of the hot expert on the slow rank would take 4 / 0.1 = 40, so its slot "
            "stays EMPTY: 8 + 1 / 2 = 8.5. Weighted: 9 / 1.1 = 8.18.",
        ),
        "zero-slot-rank": tiny(
            [[6, 4, 2, 2]],
            [1, 1, 2],
            [3, 2, 0],
            "Unequal slots; the fastest rank holds none: 14 / 2 = 7 by 6 / 2 + 4 and "
            "6 / 2 + 2 + 2.",
        ),
        "slow-rank": tiny(
            [[5, 4, 3, 2, 1]],
            [1, 1, 0.3],
            2,
            "One rank at 0.3 and one spare slot. Even: 5 + 1, 4 + 3, 2 / 0.3, optimum 7.",
        ),
        "zero-loads": tiny(
            [[9, 0, 0, 3, 0]],
            [1, 1],
            3,
            "Experts without tokens need a slot too, so one is spare. Even: 9 / 2 + 3 = 7.5. "
            "Weighted: 12 / 2 = 6.",
        ),
        "empty-layer": tiny(
            [[4, 3, 2, 1], [0, 0, 0, 0]],
            [1, 1],
            2,
            "The second layer has no tokens: 5 + 0.",
            layer_weight=[1, 3],
        ),
        "base-load": tiny(
            [[6, 4, 2, 1], [3, 3, 3, 3]],
            [1, 1, 1],
            2,
            "Rank 0 runs 5 tokens, rank 1 runs 1 whatever the plan; layer 1 counts twice.",
            base_load=[5, 1, 0],
            layer_weight=[1, 2],
        ),
        "pins-and-forbids": tiny(
            [[8, 4, 2, 1], [8, 4, 2, 1]],
            [1, 1, 0.5],
            2,
            "The hot expert is pinned to the slow rank in layer 0 and forbidden there in layer 1; "
            "expert 3 is kept off rank 0.",
            constraints=[Pin(0, 2, 0), Forbid(0, 2, 1), Forbid(3, 0)],
        ),
        "two-windows-worst": tiny(
            [[[6, 1, 2, 3]], [[1, 6, 3, 2]]],
            [1, 1],
            2,
            "Expert 0 is hot in window 0, expert 1 in window 1; no spare slots. 6 + 1 = 7 lies "
            "beside 2 + 3 in both windows.",
            objective="worst",
        ),
        "worst-over-layers": tiny(
            [[[2, 0, 0], [1, 0, 0]], [[1, 0, 0], [2, 0, 0]]],
            [1],
            3,
            "Window costs (2, 1) and (1, 2): the true worst is 3, the sum of worsts 4.",
            objective="worst",
        ),
        "worst-trade-off": tiny(
            [[[0, 1, 5, 8], [0, 6, 7, 7]], [[8, 1, 5, 8], [3, 1, 4, 0]]],
            [1, 1],
            2,
            "Window times of the layers: (8, 16) or (9, 13), and (13, 5) or (14, 4). The least "
            "worst of each layer apart gives max(9 + 13, 13 + 5) = 22; optimum max(8 + 13, "
            "16 + 5) = 21.",
            objective="worst",
        ),
        "ties": tiny(
            [[4, 4, 4, 4, 4]],
            [1, 1, 1],
            2,
            "Five equal experts, one spare slot: two lie whole on one rank, 8.",
        ),
        "passes-seconds": tiny(
            [[[600, 400, 200]], [[100, 300, 800]]],
            [1000, 800],
            2,
            "Speeds in tokens per second and passes per window: seconds per forward pass, "
            "windows weighted by their passes.",
            passes=[3, 1],
            phase="prefill",
            speed_unit="tokens/s",
        ),
    }


def real(sources: Path = HERE / "sources") -> dict[str, tuple[Problem, str]]:
    """Measured loads, each paired with measured speeds of GPUs that never ran them."""
    gpus = json.loads((sources / "gpu_relative_time.json").read_text())
    problems = {}
    for source, model, sizes in MODELS:
        found = json.loads((sources / f"{source}.json").read_text())
        loads = LoadHistogram(tokens=found["loads"], phase="prefill")
        for ranks, slots in sizes:
            for fleet in ["equal", *FLEETS]:
                name = f"{model}_{ranks}x{slots}_{fleet}"
                if fleet == "equal":
                    speeds, of = [1.0] * ranks, "Speeds: all equal, a control; no measurement."
                else:
                    speeds = pick(gpus["relative_time"][fleet], ranks)
                    of = (
                        f"Speeds: 1 / relative time of {ranks} GPUs of the fleet {fleet}, "
                        f"{gpus['source']}, licence {gpus['licence']}; independent of the loads: "
                        "the GPUs never ran this model."
                    )
                problem = Problem(
                    loads,
                    Cluster.from_speeds(speeds, slots, speed_unit="relative"),
                    name=name,
                    origin=(
                        f"Loads: {found['model']}, {found['source']}, licence {found['licence']}. "
                        f"{of}"
                    ),
                )
                notes = (
                    f"{found['note']} Windows: {', '.join(found['windows'])}. Loads in token "
                    f"assignments (top-{found['top_k']}), speeds relative, times in token units."
                )
                problems[name] = problem, notes
    return problems


def pick(relative_times: list[float], ranks: int) -> list[float]:
    """Speeds of GPUs at evenly spaced quantiles of a fleet, (i + 1/2) / ranks, shuffled."""
    count = len(relative_times)
    chosen = [sorted(relative_times)[(2 * i + 1) * count // (2 * ranks)] for i in range(ranks)]
    random.Random(ranks).shuffle(chosen)
    return [1.0 / time for time in chosen]


def rows(folder: Path) -> list[dict[str, Any]]:
    """Optima of all small instances under both routings, by trying every placement."""
    found = []
    for path in sorted((folder / "small").glob("*.json")):
        problem = read_instance(path)
        for routing in ("even", "weighted"):
            best = optimum(replace(problem, routing=routing))
            found.append(dict(zip(COLUMNS, proven(path.stem, routing, best), strict=False)))
    return found


def proven(name: str, routing: str, best: float) -> list[Any]:
    """A row whose lower bound is the optimum itself."""
    return [f"small/{name}", routing, repr(best), repr(best), "brute force"]


def main(folder: Path = HERE) -> None:
    """Write all instances and best_known.csv to `folder`."""
    for part in ("small", "real"):
        (folder / part).mkdir(exist_ok=True)
    for name, problem in small().items():
        write_instance(replace(problem, name=name), folder / "small" / f"{name}.json")
    for name, (problem, notes) in real().items():
        write_instance(problem, folder / "real" / f"{name}.json", notes=notes)
    table = folder / "best_known.csv"
    kept: list[dict[str, Any]] = []
    if table.exists():
        with table.open(newline="") as file:
            kept = [row for row in csv.DictReader(file) if not row["instance"].startswith("small/")]
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows([*rows(folder), *kept])


if __name__ == "__main__":
    main()
