"""What the pages on engines tell people to type is what the commands take."""

import re
import shlex
from pathlib import Path

import pytest

from moeplace.formats import PLAN_FORMATS
from moeplace.formats.loads import FORMATS
from tests.test_cli import Run, plain_terminal, run

__all__ = ["plain_terminal", "run"]  # fixtures

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs/engines").glob("*.md"))


def commands(page: Path) -> list[list[str]]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    typed = [block for kind, block in blocks if kind in ("", "sh")]
    lines = "\n".join(typed).replace("\\\n", " ").split("\n")
    return [shlex.split(line, comments=True) for line in lines if re.match("moeplace [a-z]", line)]


TYPED = [*PAGES, ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", TYPED, ids=lambda page: page.stem)
def test_commands_and_formats_exist(run: Run, page: Path) -> None:
    for _, command, *arguments in commands(page):
        known = run(command, "--help").out
        for option in arguments:
            if option.startswith("--"):
                assert f"{option} " in known, (command, option)
        if "--format" in arguments:
            name = arguments[arguments.index("--format") + 1]
            assert name == "NAME" or name in (FORMATS if command == "loads" else PLAN_FORMATS)


def test_the_readme_names_every_command(run: Run) -> None:
    known = re.findall(r"^  ([a-z]+)  ", run("--help").out.split("Commands:")[1], re.MULTILINE)
    assert {"solve", "watch", "reproduce"} < set(known)
    listed = {command for _, command, *_ in commands(ROOT / "README.md")}
    assert listed == set(known)


def test_every_engine_has_its_page_and_its_commands() -> None:
    pages = {page.stem for page in PAGES} - {"README"}
    assert pages == {"sglang", "vllm", "vllm-ascend", "tensorrt-llm", "omni", "lmdeploy"}
    for page in PAGES:
        if page.stem != "README":
            assert {line[1] for line in commands(page)} >= {"loads", "solve"}


@pytest.mark.parametrize("page", TYPED, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_every_format_is_in_the_overview() -> None:
    text = (ROOT / "docs/engines/README.md").read_text()
    for name in {*FORMATS, *PLAN_FORMATS} - {"moeplace"}:
        assert f"`{name}`" in text, name
