"""Published results of other systems, to stand beside ours: one protocol a table, each number with its mark.

    table = published_table("csp_comp_mp20")
    table.protocol, table.text              "csp_comp", "Composition-only CSP, full official test split; ..."
    row = published("csp_comp_mp20")[2]     row.system: "DiffCSP"
    row.values["match_rate@1"]              PublishedValue(51.49, mark="verified", source="Jiao et al., ...")

Contract: the numbers are those of `eval/published.yaml`, as printed by their source; the unit is the
column's (a share of ours, 0.5149, stands there as 51.49 %). A column names in `beside` the one score of ours
that is the same measure; where it names none, no number of ours may stand in it. Marks: "verified" (read
verbatim in the source's text), "local" (read from a repository's files), "recalled" (from memory: always
shown as "to be re-checked"), "measured" (for this project). What is not understood in the file is an error.

Not here: how rows are shown (scoring/report.py); our own scores.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from crystallm_kit.errors import RecipeError, UnknownName
from crystallm_kit.recipes import load_recipe
from crystallm_kit.scores.score import Better

Mark = Literal["verified", "local", "recalled", "measured"]
MARKS: dict[str, str] = {
    "verified": "read word for word in the source",
    "local": "read from the files of a repository",
    "recalled": "from memory, to be re-checked",
    "measured": "measured for this project",
}


@dataclass(frozen=True)
class PublishedValue:
    """One number of one system.

    Attributes:
        value: As printed, in the unit of its column.
        mark: How well it is known: a key of `MARKS`.
        source: Where it stands.
        plus_minus: As published.
        second_hand: Read word for word, but in a document that quotes the original.
        note: What has to be known to read it.
    """

    value: float
    mark: Mark
    source: str
    plus_minus: float | None = None
    second_hand: bool = False
    note: str = ""

    @property
    def needs_recheck(self) -> bool:
        """Tell whether it must be shown with the flag "to be re-checked"."""
        return self.mark == "recalled"


@dataclass(frozen=True)
class PublishedRow:
    """What is published of one system in one table: column -> number. Columns without one are left out."""

    table: str
    protocol: str
    system: str
    year: int | None
    values: Mapping[str, PublishedValue]


@dataclass(frozen=True)
class Column:
    """One column: its unit, which way is better, and our score that is the same measure ("": none is)."""

    unit: str
    better: Better = ""
    beside: str = ""

    @property
    def scale(self) -> float:
        """Return what a number of ours is multiplied by to stand here."""
        return 100.0 if self.unit == "%" else 1.0


@dataclass(frozen=True)
class PublishedTable:
    """The rows of one protocol on one data set.

    Attributes:
        name: As in `published(name)`.
        title: Its caption.
        protocol: The protocol's short name.
        text: What the protocol says.
        dataset: "" where the protocol has its own.
        note: What has to be said where a row of ours stands in it, or why none may.
        columns: Metric -> column, in the order in which they are shown.
        rows: A row a system.
    """

    name: str
    title: str
    protocol: str
    text: str
    dataset: str
    note: str
    columns: Mapping[str, Column]
    rows: tuple[PublishedRow, ...]


def published(protocol_or_table: str) -> list[PublishedRow]:
    """Return the rows of a table ("csp_comp_mp20"), or of all tables of a protocol ("csp_comp").

    Raises:
        UnknownName: There is neither.
    """
    tables = published_tables()
    found = [t for t in tables.values() if protocol_or_table in (t.name, t.protocol)]
    if not found:
        known = {*tables, *(t.protocol for t in tables.values())}
        raise UnknownName.among("table or protocol of published results", protocol_or_table, known)
    return [row for table in found for row in table.rows]


def published_table(name: str) -> PublishedTable:
    """Return one table. Raises UnknownName."""
    tables = published_tables()
    if name not in tables:
        raise UnknownName.among("table of published results", name, tables)
    return tables[name]


@cache
def published_tables() -> dict[str, PublishedTable]:
    """Return all tables that come with the kit, by name. Raises RecipeError if the file is damaged."""
    return read_published(_file())


def rows_for_report(name: str) -> list[dict[str, Any]]:
    """Return a table's rows for `report.json`: under our scores' names, shares in [0, 1], where there is one.

    A value: {"value", "mark", "source", "note"}. Columns that no score of ours may stand beside are left out;
    the report shows those from the table itself, which each row names.
    """
    table = published_table(name)
    result = []
    for row in table.rows:
        scores = {
            table.columns[metric].beside: {
                "value": value.value / table.columns[metric].scale,
                "mark": value.mark,
                "source": value.source,
                "note": value.note,
            }
            for metric, value in row.values.items()
            if table.columns[metric].beside
        }
        result.append({"system": row.system, "table": table.name, "scores": scores})
    return result


# ---------------------------------------------------------------- the file


@dataclass(frozen=True)
class _Row:
    system: str
    mark: Mark
    source: str
    values: dict[str, float]
    year: int | None = None
    second_hand: bool = False
    derived: bool = False
    carried_over: bool = False
    plus_minus: dict[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class _Table:
    name: str
    title: str
    protocol: str
    columns: dict[str, Column]
    rows: list[_Row]
    dataset: str = ""
    note: str = ""


@dataclass(frozen=True)
class _File:
    schema: Literal[1]
    date: Any
    recheck_flag: str
    protocols: dict[str, str]
    sources: dict[str, str]
    tables: list[_Table]


def _file() -> Path:
    """Return the file: beside this module in an installed package, in eval/ of a checkout."""
    installed = Path(str(files("crystallm_kit"))) / "scoring" / "published.yaml"
    if installed.is_file():
        return installed
    return Path(str(files("crystallm_kit"))).parent / "eval" / "published.yaml"


def read_published(path: str | Path) -> dict[str, PublishedTable]:
    """Return the tables of a file in the form of `eval/published.yaml`, by name.

    Raises:
        RecipeError: It cannot be read; a key or mark is unknown; a table, row or value refers to a protocol,
            source or column that the file does not have; a number is given twice or is not finite.
    """
    content = load_recipe(path, _File)
    tables: dict[str, PublishedTable] = {}
    for table in content.tables:
        where = f"{path}: table '{table.name}'"
        if table.name in tables:
            raise RecipeError(f"{where} is there twice; give each table a name of its own.")
        if table.protocol not in content.protocols:
            raise RecipeError(_missing(where, "protocol", table.protocol, "protocols", content.protocols))
        tables[table.name] = PublishedTable(
            name=table.name,
            title=table.title,
            protocol=table.protocol,
            text=content.protocols[table.protocol],
            dataset=table.dataset,
            note=table.note,
            columns=table.columns,
            rows=_merged(table, content.sources, where),
        )
    return tables


def _merged(table: _Table, sources: Mapping[str, str], where: str) -> tuple[PublishedRow, ...]:
    """Return one row a system: the file has one for each of a system's sources and marks."""
    years: dict[str, int | None] = {}
    values: dict[str, dict[str, PublishedValue]] = {}
    for row in table.rows:
        at = f"{where}, system '{row.system}'"
        if row.source not in sources:
            raise RecipeError(_missing(at, "source", row.source, "sources", sources))
        years.setdefault(row.system, row.year)
        mine = values.setdefault(row.system, {})
        for metric, number in row.values.items():
            if metric not in table.columns:
                raise RecipeError(_missing(at, "column", metric, "the table's columns", table.columns))
            if metric in mine:
                raise RecipeError(f"{at}: '{metric}' is given twice; keep the one with the better mark.")
            if not math.isfinite(number):
                raise RecipeError(f"{at}: '{metric}' is {number}; leave out what is not published.")
            mine[metric] = PublishedValue(
                number, row.mark, sources[row.source], row.plus_minus.get(metric), row.second_hand, _note(row)
            )
        for metric in row.plus_minus.keys() - row.values.keys():
            raise RecipeError(f"{at}: plus_minus of '{metric}', which has no value.")
    return tuple(
        PublishedRow(table.name, table.protocol, system, years[system], found)
        for system, found in values.items()
    )


def _note(row: _Row) -> str:
    said = [
        row.note,
        "computed from the published figures" if row.derived and "comput" not in row.note else "",
        "from a survey, not read again" if row.carried_over else "",
    ]
    return "; ".join(part for part in said if part)


def _missing(where: str, what: str, name: str, section: str, known: Mapping[str, Any]) -> str:
    return f"{where}: {what} '{name}' is not under {section}; known there: {', '.join(known)}."
