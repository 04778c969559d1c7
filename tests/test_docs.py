"""What README and docs tell people to type is typed here, block by block, in the order of the page.

A block that cannot run here is preceded by ``<!-- not run: the reason -->``. Blocks of a page share a
folder (and Python its names); files that a page takes for granted are made by `FILES`.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import moeplace as mp
from moeplace.formats import PLAN_FORMATS
from moeplace.formats.loads import FORMATS
from moeplace.instances import generate
from moeplace.integrations.observe import Decision, Recorder
from moeplace.profile import Profile, write_profile
from tests.test_cli import ROOT, Run, plain_terminal, run
from tests.test_fit import profile as measured

__all__ = ["plain_terminal", "run"]  # fixtures

ENGINES = sorted((ROOT / "docs/engines").glob("*.md"))
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "instances/README.md",
    *sorted(path for path in (ROOT / "docs").rglob("*.md")),
]
#: Blocks that are marked as not run: a new one is counted here, or it fails.
NOT_RUN = {
    "README.md": 2,
    "CONTRIBUTING.md": 1,
    "docs/index.md": 1,
    "docs/exact.md": 1,
    "docs/hardware.md": 1,
    "docs/inside-engines.md": 1,
    "docs/replay.md": 2,
    "docs/simulate.md": 1,
    "docs/benchmarks.md": 1,
    "docs/engines/sglang.md": 3,
    "docs/engines/vllm.md": 1,
}
#: Where pages say that an engine records.
FOLDER = "/var/log/moeplace"
#: The two commands as this environment has them.
SHELL = f"""
moeplace() {{ '{sys.executable}' -m moeplace "$@"; }}
python() {{ '{sys.executable}' "$@"; }}
"""


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str
    reason: str  # why it is not run; empty if it is

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = re.finditer(
        r"^(?:<!-- not run:(?P<reason>[^>]*)-->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$",
        text,
        re.MULTILINE | re.DOTALL,
    )
    made = [
        Block(
            page,
            text[: each.start()].count("\n") + 1,
            each["language"],
            each["text"],
            (each["reason"] or "").strip(),
        )
        for each in found
    ]
    assert 2 * len(made) == len(re.findall("^ *```", text, re.MULTILINE)), page
    assert sum(bool(block.reason) for block in made) == text.count("<!-- not run"), page
    return made


def lines(block: Block) -> list[str]:
    """Logical lines of a shell block: quotes closed, continuations joined."""
    found, line = [], ""
    for piece in block.text.splitlines(keepends=True):
        line += piece
        if line.endswith("\\\n"):
            line = line[:-2] + " "
            continue
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # an open quote
            continue
        if words:
            found.append(line)
        line = ""
    assert not line, f"{block.place}: {line!r} does not end"
    return found


# --- files that pages take for granted -----------------------------------------------------------


@cache
def large(epoch: int = 0) -> mp.Problem:
    return generate("A", 0, epoch=epoch).aggregate()


@cache
def plan_of(epoch: int) -> mp.Plan:
    return mp.solve(large(epoch), work_limit=2_000_000).plan


def small_problem() -> None:
    """Small enough for a solver of integer programs."""
    problem = mp.read_instance(ROOT / "instances/small/flashlb-even.json")
    mp.write_instance(problem, "problem.json")
    mp.write_plan(mp.solve(problem).plan, "plan.json")


def three_files() -> None:
    mp.write_instance(large(1), "instance.json")
    mp.write_plan(plan_of(0), "current.json")
    mp.write_plan(plan_of(1), "new.json")


def counts(layers: int = 58) -> Any:
    """Of DeepSeek-V3: dense layers first, if there are 61."""
    tokens = large().tokens[0].astype(np.int64)
    return np.concatenate([np.zeros((layers - 58, 256), dtype=np.int64), tokens])


def sglang_file(name: str = "expert_distribution_recorder_1.pt", layers: int = 61) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"rank": 0, "logical_count": torch.tensor(counts(layers))[None]}, name)
    recorded()


def tensorrt_llm_folder() -> None:
    from safetensors.numpy import save_file

    folder = Path("statistics")
    folder.mkdir()
    about = {"num_experts": 256, "num_experts_per_token": 8}
    (folder / "meta_info.json").write_text(json.dumps(about))
    windows = generate("A", 0).loads.tokens.astype(np.int64)
    rows = {f"{i}_{3 + n}": row for i, one in enumerate(windows) for n, row in enumerate(one)}
    save_file(rows, folder / "rank0.safetensors")


def trace_file() -> None:
    chance = np.random.default_rng(0)
    popular = chance.lognormal(0, 1, (8, 128))
    drawn = np.log(popular) + chance.gumbel(size=(4000, 8, 128))
    np.savez_compressed("topk.npz", topk_ids=np.argsort(-drawn, axis=2)[:, :, :4].astype(np.uint8))
    recorded()


def small_counts() -> Any:
    return np.rint(generate("B", 0).aggregate().tokens[0]).astype(np.int64)


def ascend_file() -> None:
    np.save("counts.npy", small_counts())
    recorded()


def omni_file() -> None:
    rows = small_counts()
    head = "," + ",".join(f"ep_{n}" for n in range(rows.shape[1]))
    body = [f"layer_{n}," + ",".join(map(str, row)) for n, row in enumerate(rows.tolist())]
    Path("activation.csv").write_text("\n".join([head, *body]) + "\n")


def recorded() -> None:
    """What a policy inside an engine leaves in its folder."""
    recorder = Recorder("recorded", 1 << 24)
    problem = generate("B", 0)
    start = np.tile(np.arange(problem.cluster.total_slots) % problem.experts, (problem.layers, 1))
    for window in problem.tokens[:3]:
        one = np.ones(problem.layers)
        recorder.write(
            Decision(
                weight=np.rint(window), old=start, proposed=start, before=one, after=one, bound=one,
                copies=np.zeros(problem.layers, dtype=np.int64), speeds=np.ones(problem.ranks),
                about={"saving": 0.0, "reason": "0 of 61 layers", "phase": "decode"},
            )
        )  # fmt: skip


def gpus(phase: str) -> Profile:
    """Eight GPUs, measured in one phase."""
    import msgspec

    found = measured(gpus=8)
    entries = [msgspec.structs.replace(one, phase=phase) for one in found.entries]
    return msgspec.structs.replace(found, entries=entries)


def profiled(name: str) -> None:
    write_profile(gpus("decode"), "profile.json")
    loads = mp.LoadHistogram(tokens=small_loads(), passes=np.full(4, 8.0))
    cluster = mp.Cluster.from_speeds(np.ones(8), slots=9, speed_unit="relative")
    problem = mp.Problem(loads.aggregate(), cluster)
    mp.write_instance(problem, name)
    mp.write_plan(mp.solve(problem, work_limit=100_000).plan, "plan.json")


def small_loads() -> Any:
    return mp.read_instance("instances/real/dsv2lite-tasks_8x9_equal.json").tokens


def watched() -> None:
    real = mp.read_instance("instances/real/dsv2lite-windows_8x9_equal.json")
    windows = real.loads.tokens
    start = mp.LoadHistogram(tokens=windows[:4])
    problem = mp.Problem(start.aggregate(), real.cluster)
    mp.write_instance(problem, "start.json")
    mp.write_plan(mp.solve(problem, work_limit=1_000_000).plan, "plan.json")
    Path("dumps").mkdir()
    for n, window in enumerate(windows[4:], 4):
        np.save(f"dumps/window_{n}.npy", window)
    seconds = mp.Cluster.from_speeds(np.full(8, 1e6), slots=9)
    mp.write_instance(mp.Problem(problem.loads, seconds), "start.json")
    three_files()


FILES: dict[str, Callable[[], None]] = {
    "README.md": lambda: sglang_file("recorder.pt", 58),
    "docs/exact.md": small_problem,
    "docs/hardware.md": lambda: profiled("instance.json"),
    "docs/inside-engines.md": recorded,
    "docs/live.md": watched,
    "docs/replay.md": lambda: profiled("deepseek.json"),
    "docs/report.md": three_files,
    "docs/whatif.md": lambda: mp.write_instance(generate((4, 32, 40, 8), 0).aggregate(), "a.json"),
    "docs/engines/lmdeploy.md": lambda: Path("statistics.json").write_text(
        json.dumps(small_counts().tolist())
    ),
    "docs/engines/omni.md": omni_file,
    "docs/engines/sglang.md": sglang_file,
    "docs/engines/tensorrt-llm.md": tensorrt_llm_folder,
    "docs/engines/vllm-ascend.md": ascend_file,
    "docs/engines/vllm.md": trace_file,
}  # fmt: skip


# --- running them --------------------------------------------------------------------------------


def shell(block: Block, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands of moeplace in this process, where kernels are loaded; others by bash."""
    for line in lines(block):
        line = line.replace(FOLDER, "recorded")
        words = shlex.split(line, comments=True)
        if words[0] == "moeplace" and words[1] not in ("calibrate", "replay"):
            answer = run(*words[1:])
            assert answer.code == 0, f"{block.place}: {line}{answer.out}{answer.err}"
        elif words[0] == "export":
            for word in words[1:]:
                monkeypatch.setenv(*word.split("=", 1))
        else:
            found = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", SHELL + line],
                check=False,
                capture_output=True,
                timeout=120,
                env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            )
            assert found.returncode == 0, f"{block.place}: {line}{found.stderr.decode()}"


def execute(block: Block, run: Run, names: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    if block.language == "sh":
        shell(block, run, patch)
    elif block.language == "python":
        text = block.text.replace(FOLDER, "recorded")
        exec(compile("\n" * block.line + text, str(block.page), "exec"), names)
    elif block.language == "json":
        Path("block.json").write_text(block.text)
        reads = {"moeplace-instance": mp.read_instance, "moeplace-plan": mp.read_plan}
        assert reads[json.loads(block.text)["format"]]("block.json")
    elif block.language == "yaml":
        assert yaml.safe_load(block.text)
    else:  # what a command said
        assert block.language in ("", "text"), f"{block.place}: what is {block.language}?"
        typed = [
            line
            for line in block.text.splitlines()
            if re.match(r"\$ |moeplace [a-z]|pip |python ", line)
        ]
        assert not typed, f"{block.place}: mark commands as sh, {typed}"


def runs(page: Path) -> bool:
    return any(block.language and not block.reason for block in blocks(page))


@pytest.mark.parametrize(
    "page", [*filter(runs, PAGES)], ids=lambda page: str(page.relative_to(ROOT))
)
def test_a_page_does_what_it_says(
    run: Run, page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("MOEPLACE_POLICY", "MOEPLACE_PROFILE", "MOEPLACE_PHASE", "MOEPLACE_FOLDER"):
        monkeypatch.delenv(name, raising=False)
    Path("instances").symlink_to(ROOT / "instances")
    FILES.get(str(page.relative_to(ROOT)), lambda: None)()
    names: dict[str, Any] = {}
    for block in blocks(page):
        if not block.reason:
            execute(block, run, names, monkeypatch)


MARKED = [block for page in PAGES for block in blocks(page) if block.reason]


@pytest.mark.parametrize("block", MARKED, ids=lambda block: block.place)
def test_a_block_that_is_not_run(block: Block) -> None:
    """Skipped with the reason of its page, so that a test run lists them all."""
    pytest.skip(f"{block.place}: {block.reason}")


def test_what_is_not_run_is_counted_and_has_its_reason() -> None:
    assert all(len(block.reason) >= 9 for block in MARKED)
    assert all(block.language == "sh" or "Ray" in block.reason for block in MARKED)
    found: dict[str, int] = {}
    for block in MARKED:
        name = str(block.page.relative_to(ROOT))
        found[name] = found.get(name, 0) + 1
    assert found == NOT_RUN


# --- what needs no run ---------------------------------------------------------------------------


def commands(page: Path) -> list[list[str]]:
    """Every command of moeplace on a page, those that are not run too."""
    typed = [line for block in blocks(page) if block.language == "sh" for line in lines(block)]
    words = [shlex.split(line, comments=True) for line in typed]
    return [line for line in words if line[0] == "moeplace"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_formats_exist(run: Run, page: Path) -> None:
    for _, command, *arguments in commands(page):
        known = run(command, "--help").out
        for option in arguments:
            if option.startswith("--"):
                assert f"{option} " in known, (command, option)
        if "--format" in arguments:
            name = arguments[arguments.index("--format") + 1]
            assert name in (FORMATS if command == "loads" else PLAN_FORMATS)


def test_the_readme_names_every_command(run: Run) -> None:
    known = re.findall(r"^  ([a-z]+)  ", run("--help").out.split("Commands:")[1], re.MULTILINE)
    assert {"solve", "watch", "reproduce"} < set(known)
    named = set(re.findall(r"moeplace ([a-z]+)", (ROOT / "README.md").read_text()))
    assert set(known) <= named


def test_every_engine_has_its_page_and_its_commands() -> None:
    pages = {page.stem for page in ENGINES} - {"README"}
    assert pages == {"sglang", "vllm", "vllm-ascend", "tensorrt-llm", "omni", "lmdeploy"}
    for page in ENGINES:
        if page.stem != "README":
            assert {line[1] for line in commands(page)} >= {"loads", "solve"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), target


def test_every_page_is_in_the_menu_and_every_file_format_on_its_page() -> None:
    menu = (ROOT / "mkdocs.yml").read_text()
    for page in PAGES:
        if ROOT / "docs" in page.parents:
            assert f" {page.relative_to(ROOT / 'docs')}\n" in menu, page
    sources = "".join(path.read_text() for path in (ROOT / "moeplace").rglob("*.py"))
    known = set(re.findall(r'"(moeplace-[a-z]+)"', sources))
    assert len(known) >= 8
    text = (ROOT / "docs/files.md").read_text()
    for name in known:
        assert f"| `{name}` |" in text, name


def test_every_format_is_in_the_overview() -> None:
    text = (ROOT / "docs/engines/README.md").read_text()
    for name in {*FORMATS, *PLAN_FORMATS} - {"moeplace"}:
        assert f"`{name}`" in text, name
