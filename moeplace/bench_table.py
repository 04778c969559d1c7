"""A table of instances x methods x seeds, one row a run, that goes on where it stopped.

Settings are fixed in ``settings.json`` before the first run; ``runs.csv`` grows by a row a run and
``summary.md`` is made of it. Seeds 0 to 4 were used for tuning and are refused: tables use others.
The clock starts after kernels are loaded. With several jobs at once, runs slow each other down;
the table says how many there were.
"""

import csv
import fcntl
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moeplace._files import write_bytes, write_json, write_text
from moeplace.bench_case import TUNING_SEEDS
from moeplace.bench_environment import environment
from moeplace.bench_run import COLUMNS, SETS, Row, Run, measure, names
from moeplace.bench_summary import summary
from moeplace.errors import FormatError, MissingExtraError, ProblemError
from moeplace.policies import POLICIES
from moeplace.solve import METHODS
from moeplace.sweep import as_done

#: Columns of `runs.parquet` that are not text.
KINDS = {
    "seed": "int64", "moves": "int64", "legal": "bool",
    **dict.fromkeys(
        ("objective", "lower_bound", "gap", "ratio", "worst_layer", "wall_seconds", "cpu_seconds",
         "goal_seconds", "load"), "float64"
    ),
}  # fmt: skip
#: What must be the same when a table goes on.
SAME = ("moeplace", "source", "instances", "processor", "numpy", "numba")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a table is of, fixed before its first run.

    Attributes
    ----------
    sets, methods : tuple of str
    seeds : tuple of int
        Of searches; policies draw nothing and run once.
    time_limit : float or None
        Seconds of each run.
    work_limit : int or None
        Search steps a layer in place of it: then only times differ from one machine to another.
    jobs : int
        Runs at once.
    """

    sets: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    time_limit: float | None
    work_limit: int | None = None
    jobs: int = 1

    def __post_init__(self) -> None:
        for what, given, known in (
            ("Set", self.sets, SETS),
            ("Method", self.methods, METHODS),
        ):
            for name in given:
                if name not in known:
                    raise ProblemError(f"{what} must be of {', '.join(known)}, got {name!r}.")
        for each in (self.sets, self.methods, self.seeds):
            if len(set(each)) < len(each):
                raise ProblemError(f"Nothing may be named twice, got {list(each)}.")
        used = sorted(set(self.seeds) & set(TUNING_SEEDS))
        if used or not self.seeds or min(self.seeds) < 0:
            raise ProblemError(
                f"Seeds must be whole numbers from 5 on (0 to 4 were used for tuning), got "
                f"{list(self.seeds)}."
            )
        if (self.time_limit is None) == (self.work_limit is None):
            raise ProblemError("Give a time limit or a work limit, one of them.")
        if self.time_limit is not None and not 0 < self.time_limit < float("inf"):
            raise ProblemError(f"The time limit must be positive, got {self.time_limit!r}.")
        if self.work_limit is not None and self.work_limit < 1:
            raise ProblemError(f"The work limit must be at least 1, got {self.work_limit}.")
        if self.jobs < 1:
            raise ProblemError(f"Jobs must be at least 1, got {self.jobs}.")


def fill(
    folder: Path,
    settings: Settings,
    instances: Path,
    told: Callable[[Row], None] | None = None,
    parquet: bool = False,
) -> list[Row]:
    """Run what the folder's table lacks, and write its summary.

    Parameters
    ----------
    folder : path
        Made if it is not there. A table of other settings is refused.
    settings : Settings
    instances : path
        Folder of the shipped instances.
    told : callable, optional
        Gets each new row.
    parquet : bool
        Write ``runs.parquet`` too.

    Returns
    -------
    list of Row
        All rows, in the order of sets, instances, methods and seeds.

    Raises
    ------
    FormatError
        If the folder holds something else, another process fills it, or it cannot be written.
    MissingExtraError
        If parquet is asked for and pyarrow is not installed.
    """
    if parquet:
        _pyarrow()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise FormatError(f"{folder}: cannot be made ({cause.strerror}).") from cause
    with _alone(folder):
        about = _settle(folder, settings, instances)
        runs = {run.key: run for run in _runs(settings, instances)}
        table = folder / "runs.csv"
        rows = {_key(row): row for row in _kept(table, runs.keys())}
        missing = [(run, settings, instances) for key, run in runs.items() if key not in rows]
        with table.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            for row in as_done(measure, missing, settings.jobs):
                writer.writerow(row)
                file.flush()
                os.fsync(file.fileno())
                rows[_key(row)] = row
                if told is not None:
                    told(row)
        ordered = [rows[key] for key in runs]
        if list(rows) != list(runs):
            write_text(table, as_csv(ordered))
        write_text(folder / "summary.md", summary(ordered, about))
        if parquet:
            write_bytes(folder / "runs.parquet", _as_parquet(table, about))
    return ordered


def read_runs(folder: Path) -> tuple[list[Row], dict[str, Any]]:
    """Rows of a folder's table, and its settings and environment.

    Raises
    ------
    FormatError
        If it holds no table.
    """
    table = folder / "runs.csv"
    try:
        text = table.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as cause:
        raise FormatError(f"{table}: cannot be read: {cause}.") from cause
    return _parsed(table, text[: text.rfind("\n") + 1]), _about(folder / "settings.json")


def as_csv(rows: Sequence[Row]) -> str:
    """Rows as the text of a table."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _key(row: Row) -> tuple[str, str, str, str]:
    return (row["set"], row["instance"], row["method"], row["seed"])


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other process fills the folder meanwhile; the lock ends with the process."""
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as cause:
        raise FormatError(f"{folder}: another process fills this table. Wait for it.") from cause
    finally:
        os.close(held)


def _settle(folder: Path, settings: Settings, instances: Path) -> dict[str, Any]:
    """Write the settings and the environment, or compare with those that are there."""
    path = folder / "settings.json"
    asked: dict[str, Any] = json.loads(json.dumps(asdict(settings)))
    now = environment(settings.sets, instances)
    if not path.exists():
        if any(folder.iterdir()):
            raise FormatError(f"{folder}: is not empty and holds no table. Choose another folder.")
        write_json(path, {"settings": asked, "environment": now})
        return {"settings": asked, "environment": now}
    about = _about(path)
    if about["settings"] != asked:
        raise FormatError(
            f"{path}: the table there has the settings {about['settings']}, not {asked}. Settings "
            "are fixed before the first run: choose another folder."
        )
    changed = [key for key in SAME if about["environment"].get(key) != now[key]]
    if changed:
        raise FormatError(
            f"{path}: the table there was begun with another {', '.join(changed)}: runs would not "
            "compare. Choose another folder."
        )
    return about


def _about(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        sound = isinstance(found["settings"], dict) and isinstance(found["environment"], dict)
    except (OSError, ValueError, KeyError, TypeError) as cause:
        raise FormatError(f"{path}: is not what bench wrote. Choose another folder.") from cause
    if not sound:
        raise FormatError(f"{path}: is not what bench wrote. Choose another folder.")
    return dict(found)


def _kept(table: Path, known: Any) -> list[Row]:
    """Rows that are whole; a last one that was cut off is run again."""
    if not table.exists():
        write_text(table, as_csv([]))
        return []
    try:
        text = table.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as cause:
        raise FormatError(f"{table}: cannot be read: {cause}. Remove it to begin anew.") from cause
    whole = text[: text.rfind("\n") + 1]
    rows = _parsed(table, whole or as_csv([]))
    seen = set()
    for number, row in enumerate(rows, start=2):
        if _key(row) not in known or _key(row) in seen:
            raise FormatError(
                f"{table}: line {number} is a run that is no part of this table, or there already: "
                f"{', '.join(_key(row))}. Remove the line."
            )
        seen.add(_key(row))
    if whole != text or not whole:
        write_text(table, whole or as_csv([]))
    return rows


def _parsed(table: Path, text: str) -> list[Row]:
    reader = csv.DictReader(io.StringIO(text))
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise FormatError(f"{table}: has other columns than {', '.join(COLUMNS)}. Remove it.")
    rows = list(reader)
    for number, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise FormatError(f"{table}: line {number} has not {len(COLUMNS)} fields. Remove it.")
    return rows


def _runs(settings: Settings, instances: Path) -> Iterator[Run]:
    for name in settings.sets:
        for instance in names(name, instances):
            for method in settings.methods:
                seeds = settings.seeds if method not in POLICIES else settings.seeds[:1]
                for seed in seeds:
                    yield Run(name, instance, method, seed)


def _pyarrow() -> Any:
    try:
        import pyarrow.csv
        import pyarrow.parquet
    except ImportError as cause:
        raise MissingExtraError("Parquet needs pyarrow: pip install 'moeplace[bench]'.") from cause
    return pyarrow


def _as_parquet(table: Path, about: dict[str, Any]) -> bytes:
    """The table with numbers as numbers, empty fields as nulls, and what it is of."""
    pyarrow = _pyarrow()
    kinds = {name: getattr(pyarrow, KINDS.get(name, "string").replace("bool", "bool_"))()
             for name in COLUMNS}  # fmt: skip
    options = pyarrow.csv.ConvertOptions(column_types=kinds, strings_can_be_null=False)
    read = pyarrow.csv.read_csv(table, convert_options=options)
    read = read.replace_schema_metadata({"moeplace-bench": json.dumps(about)})
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(read, sink)
    return bytes(sink.getvalue())
