"""Published experiments in form: tables of our model's numbers, the paper's beside them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeplace.errors import ProblemError

#: Papers by the name that `reproduce` takes.
PAPERS = ("vibe",)


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of one experiment; all have the keys of the first."""

    title: str
    about: str
    rows: list[dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class Report:
    """All tables of a paper."""

    title: str
    about: str
    tables: list[Table] = field(default_factory=list)
    lacks: str = ""

    def markdown(self) -> str:
        """As Markdown."""
        parts = [f"# {self.title}", "", self.about, ""]
        for table in self.tables:
            columns = list(dict.fromkeys(key for row in table.rows for key in row))
            parts += [f"## {table.title}", "", table.about, ""]
            parts += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
            parts += [
                "| " + " | ".join(row.get(column, "") for column in columns) + " |"
                for row in table.rows
            ]
            parts.append("")
        return "\n".join([*parts, "## Why ours is less", "", self.lacks, ""])

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "title": self.title,
            "tables": [{"title": table.title, "rows": table.rows} for table in self.tables],
        }


def reproduce(
    what: str,
    instances: Path,
    *,
    quick: bool = False,
    workers: int = 1,
    tell: Callable[[str], object] = lambda _: None,
) -> Report:
    """Repeat a paper's experiments; options as in `moeplace.vibe_tables.vibe`.

    Raises
    ------
    ProblemError
        If the paper is unknown, or the shipped instances are not in that folder.
    """
    if what not in PAPERS:
        raise ProblemError(f"What to reproduce must be one of {', '.join(PAPERS)}, got {what!r}.")
    if not (instances / "sources" / "moe_kernel_latency.csv").is_file():
        raise ProblemError(
            f"No measured curves in {instances}: run from a checkout, or name its folder with "
            "--instances."
        )
    from moeplace.vibe_tables import vibe

    return vibe(instances, quick=quick, workers=workers, tell=tell)
