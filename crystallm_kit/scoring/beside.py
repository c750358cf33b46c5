"""Published rows beside ours, in words: one protocol a table, a mark and a source a number.

    block = published_block(published_table("csp_comp_mp20"), report)
    block.rows[2]      ("DiffCSP", 2023, [PublishedCell("51.49", "verified", "Jiao et al., ..."), ...])
    block.ours         [("the kit", 0, ["61.20 (59.60 to 62.78)", ...])]

Contract: a number of ours stands only in a column whose table says which of our scores is the same measure.

Not here: the numbers and their marks (published.py).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crystallm_kit.scoring.axes import number, written_unit
from crystallm_kit.scoring.published import PublishedTable, PublishedValue
from crystallm_kit.scoring.tables import ScoreDict, interval_of, label_of, protocol_of


@dataclass(frozen=True)
class PublishedCell:
    """One published number in words: its text, its mark and where it stands."""

    text: str = ""
    mark: str = ""
    source: str = ""
    note: str = ""
    needs_recheck: bool = False
    second_hand: bool = False


@dataclass(frozen=True)
class PublishedBlock:
    """One published table with our rows on top, where a column allows one.

    Attributes:
        title, protocol, text, note: As of the table.
        columns: (label, unit, our score's name or "") of each.
        ours: (set's name, its number, (value, interval) of each column; "" where it has none).
        rows: (system, year, the cells).
        sources: All that the cells name, in order.
    """

    title: str
    protocol: str
    text: str
    note: str
    columns: list[tuple[str, str, str]]
    ours: list[tuple[str, int, list[tuple[str, str]]]]
    rows: list[tuple[str, int | None, list[PublishedCell]]]
    sources: list[str]


def published_block(table: PublishedTable, report: Mapping[str, Any]) -> PublishedBlock:
    """Return a published table beside the report's sets; a set without any of its numbers is left out."""
    # Percentages of a column have as many decimals as the longest; other values those they were printed with.
    digits = {
        metric: max(_decimals(r.values[metric].value) for r in table.rows if metric in r.values)
        if column.unit == "%"
        else 0
        for metric, column in table.columns.items()
    }
    ours = []
    for k, one in enumerate(report["sets"]):
        scores = {score["name"]: score for score in one["scores"]}
        cells = [
            _our_cell(scores.get(column.beside), column.scale, 2 if column.unit == "%" else 4)
            for column in table.columns.values()
        ]
        if any(value for value, _ in cells):
            ours.append((str(one["name"]), k, cells))
    rows = [
        (row.system, row.year, [_published_cell(row.values.get(m), digits[m]) for m in table.columns])
        for row in table.rows
    ]
    sources = list(dict.fromkeys(cell.source for _, _, cells in rows for cell in cells if cell.source))
    columns = [
        (label_of(f".{metric}"), written_unit(column.unit), column.beside)
        for metric, column in table.columns.items()
    ]
    return PublishedBlock(table.title, table.protocol, table.text, table.note, columns, ours, rows, sources)


def plain_block(
    protocol: str, entries: Sequence[Mapping[str, Any]], report: Mapping[str, Any]
) -> PublishedBlock:
    """Return rows that name no table of the kit, as a table of one protocol's scores."""
    names = list(dict.fromkeys(n for e in entries for n in e["scores"] if protocol_of(n) == protocol))
    known = [{score["name"]: score for score in one["scores"]} for one in report["sets"]]
    is_share = {n: any(s[n]["unit"] == "share" for s in known if n in s) for n in names}
    rows = []
    for entry in entries:
        cells = []
        for name in names:
            found = entry["scores"].get(name)
            if found is None or found.get("value") is None:
                cells.append(PublishedCell())
                continue
            value = float(found["value"]) * (100 if is_share[name] else 1)
            mark = str(found.get("mark", ""))
            cells.append(
                PublishedCell(
                    number(value, 4), mark, str(found.get("source", "")), str(found.get("note", "")),
                    mark == "recalled",
                )
            )  # fmt: skip
        if any(cell.text for cell in cells):
            rows.append((str(entry["system"]), entry.get("year"), cells))
    ours = []
    for k, (one, scores) in enumerate(zip(report["sets"], known, strict=True)):
        mine = [
            _our_cell(scores.get(n), 100.0 if is_share[n] else 1.0, 2 if is_share[n] else 4) for n in names
        ]
        if any(value for value, _ in mine):
            ours.append((str(one["name"]), k, mine))
    columns = [(label_of(n), "%" if is_share[n] else "", n) for n in names]
    sources = list(dict.fromkeys(cell.source for _, _, cells in rows for cell in cells if cell.source))
    about = report["protocols"].get(protocol, {})
    title = f"Published beside ours: {about.get('title', protocol)}"
    return PublishedBlock(title, protocol, str(about.get("text", "")), "", columns, ours, rows, sources)


def _our_cell(score: ScoreDict | None, scale: float, decimals: int) -> tuple[str, str]:
    if score is None or score["value"] is None:
        return "", ""
    span = interval_of(score)
    between = f"{span[0] * scale:.{decimals}f} to {span[1] * scale:.{decimals}f}" if span else ""
    return f"{score['value'] * scale:.{decimals}f}", between


def _published_cell(value: PublishedValue | None, decimals: int) -> PublishedCell:
    if value is None:
        return PublishedCell()
    text = f"{value.value:.{max(decimals, _decimals(value.value))}f}"
    if value.plus_minus is not None:
        text += f" ± {value.plus_minus:g}"
    return PublishedCell(text, value.mark, value.source, value.note, value.needs_recheck, value.second_hand)


def _decimals(value: float) -> int:
    if not math.isfinite(value):
        return 0
    return min(len(f"{value:.6f}".rstrip("0").partition(".")[2]), 4)
