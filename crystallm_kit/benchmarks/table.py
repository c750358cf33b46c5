"""The table of a benchmark: our rows first, then the published ones, one protocol a table.

    | system | match_rate@1, % | rmse@1 | match_rate@20, % | rmse@20 |
    | --- | --- | --- | --- | --- |
    | **ours, ranked** | 67.3 (61.8 to 72.4; 202/300) | 0.041 | 85.0 (80.5 to 88.6; 255/300) | 0.039 |
    | DiffCSP (2023) | 51.49 | 0.0631 | 77.93 | 0.0492 |
    | EquiCSP (2024) † | 57.59 † | 0.0510 † | 82.02 † | |

A number of ours stands in a column only where the published table names the score as the same measure
(scoring/published.py). † is recalled, to be re-checked; ‡ was read where another document quotes it.

Not here: what the scores are (scores/), the report of a scoring run (scoring/report.py).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from crystallm_kit.scores.score import Score
from crystallm_kit.scoring.published import Column, PublishedTable, PublishedValue

_MARKS = {"recalled": " †", "measured": " (measured)", "local": "", "verified": ""}
_LEGEND = (
    "In bold: this run, with 95 % intervals and counts. † recalled, to be re-checked; ‡ read in a document "
    "that quotes the original; the others were read word for word in their source, or in its repository."
)


@dataclass(frozen=True)
class OwnRow:
    """A row of ours.

    Attributes:
        name: Of the system.
        scores: By name.
        about: Training data and settings.
    """

    name: str
    scores: dict[str, Score]
    about: str = ""


def number_text(score: Score) -> str:
    """Return "67.3 (61.8 to 72.4; 202/300)" of a share, "0.041" of another number, "" of none."""
    if not math.isfinite(score.value):
        return ""
    if score.unit != "share":
        return f"{score.value:.4f}" + _interval(score, 1, 4)
    counts = f"{score.numerator:,}/{score.denominator:,}" if score.numerator is not None else ""
    return f"{100 * score.value:.2f}" + _interval(score, 100, 1, counts)


def _interval(score: Score, scale: float, digits: int, counts: str = "") -> str:
    known = score.low is not None and score.high is not None
    low, high = (scale * (v or 0.0) for v in (score.low, score.high))
    parts = ([f"{low:.{digits}f} to {high:.{digits}f}"] if known else []) + ([counts] if counts else [])
    return f" ({'; '.join(parts)})" if parts else ""


def own_table(rows: Sequence[OwnRow]) -> list[str]:
    """Return the Markdown lines of our rows, a line for each score, a column for each row."""
    names = list(dict.fromkeys(name for row in rows for name in row.scores))
    lines = [
        f"| score | {' | '.join(row.name for row in rows)} |",
        "| --- |" + " --- |" * len(rows),
    ]
    for name in names:
        cells = (number_text(row.scores[name]) if name in row.scores else "" for row in rows)
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    notes: dict[str, dict[str, None]] = {}  # note -> the scores that it is of, in order
    for row in rows:
        for name, score in row.scores.items():
            if score.note:
                notes.setdefault(score.note, {})[name] = None
    return [*lines, "", *(f"- {', '.join(f'`{n}`' for n in names)}: {note}" for note, names in notes.items())]


def published_lines(table: PublishedTable, rows: Sequence[OwnRow]) -> list[str]:
    """Return the Markdown lines of a published table with our rows above its own."""
    columns = table.columns
    lines = [
        f"### {table.title}",
        "",
        f"Protocol `{table.protocol}`: {table.text}.",
        "",
        f"| system | {' | '.join(_heading(name, column) for name, column in columns.items())} |",
        "| --- |" + " --- |" * len(columns),
    ]
    lines += [_own_line(row, columns.values()) for row in rows if _stands_in(row, table)]
    for row in table.rows:
        cells = (_value_text(row.values[name]) if name in row.values else "" for name in columns)
        year = f" ({row.year})" if row.year else ""
        lines.append(f"| {row.system}{year} | {' | '.join(cells)} |")
    return [*lines, "", *([table.note, ""] if table.note else []), *_sources(table)]


def _heading(name: str, column: Column) -> str:
    return f"{name}, {column.unit}" if column.unit else name


def _stands_in(row: OwnRow, table: PublishedTable) -> bool:
    return any(column.beside in row.scores for column in table.columns.values() if column.beside)


def _own_line(row: OwnRow, columns: Any) -> str:
    cells = (number_text(row.scores[c.beside]) if c.beside in row.scores else "" for c in columns)
    return f"| **{row.name}** | {' | '.join(cells)} |"


def _value_text(value: PublishedValue) -> str:
    error = f" ± {value.plus_minus:g}" if value.plus_minus is not None else ""
    return f"{value.value:g}{error}{' ‡' if value.second_hand else ''}{_MARKS[value.mark]}"


def _sources(table: PublishedTable) -> Iterator[str]:
    found = dict.fromkeys(value.source for row in table.rows for value in row.values.values())
    yield f"Sources: {'; '.join(found)}."


def markdown(
    title: str, rows: Sequence[OwnRow], tables: Sequence[PublishedTable], about: Sequence[str]
) -> str:
    """Return the whole table as a Markdown document.

    Args:
        title: Of the benchmark.
        rows: Ours.
        tables: What stands beside.
        about: Lines that must be read with the numbers: targets, command, versions.
    """
    lines = [f"# {title}", "", *(f"- {line}" for line in about), ""]
    lines += [f"- {row.name}: {row.about}" for row in rows if row.about]
    lines += ["", "## All scores", "", *own_table(rows)]
    if tables:
        lines += ["", "## Beside published results", "", _LEGEND]
    for table in tables:
        lines += ["", *published_lines(table, rows)]
    return "\n".join(lines) + "\n"


def as_json(title: str, rows: Sequence[OwnRow], about: Sequence[str]) -> dict[str, Any]:
    """Return our rows for JSON."""
    return {
        "title": title,
        "about": list(about),
        "rows": [
            {"name": row.name, "about": row.about, "scores": [s.as_dict() for s in row.scores.values()]}
            for row in rows
        ],
    }
