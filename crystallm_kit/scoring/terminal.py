"""The scores as the command shows them: a table a protocol, the sets side by side.

    cdvae               DiffCSP (10,000)         LLaMA (3,221)
    structure_valid  10,000  100.00 ±0.0   3,219   99.94 ±0.1
    comp_valid        8,325   83.25 ±0.7   3,221  100.00 ±0.1

A share: how many, in percent, and half the width of its 95 % interval; a denominator that is not what was
requested stands behind a stroke. What was not computed comes last, by reason. Ends of intervals, and what has
to be known to read a number, are in report.json and on the page.

Not here: the page (report.py).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

Plain = Mapping[str, Any]


def print_report(report: Plain) -> None:
    """Print the funnel and the scores of a report."""
    console = Console(highlight=False, markup=False)
    console.print(funnel_table(report))
    for protocol in report["protocols"]:
        table = scores_table(report, protocol)
        if table.row_count:
            console.print()
            console.print(table)
    console.print()
    for why, names in _missing(report).items():
        console.print(f"not computed: {', '.join(names)} ({why})")
    for note in report["notes"]:
        console.print(f"note: {note}")


def _missing(report: Plain) -> dict[str, list[str]]:
    """Return why -> the scores that no set has."""
    found: dict[str, dict[str, str]] = {}
    for one in report["sets"]:
        for score in one["scores"]:
            found.setdefault(score["name"], {})[one["name"]] = (
                "" if score["value"] is not None else score["note"]
            )
    by_reason: dict[str, list[str]] = {}
    for name, whys in found.items():
        if all(whys.values()):
            by_reason.setdefault(next(iter(whys.values())), []).append(name)
    return by_reason


def funnel_table(report: Plain) -> Table:
    """Return how many samples of each set pass each gate."""
    table = _table("passed", report["sets"])
    for row, (gate, _) in enumerate(report["sets"][0]["funnel"]):
        cells = []
        for one in report["sets"]:
            n = one["funnel"][row][1]
            cells.append(f"{n:,}  {100 * n / one['n_requested']:6.2f}")
        table.add_row(gate, *cells)
    return table


def scores_table(report: Plain, protocol: str) -> Table:
    """Return the scores of one protocol that any set has."""
    sets = report["sets"]
    table = _table(protocol, sets)
    by_set = [{s["name"]: s for s in one["scores"] if s["value"] is not None} for one in sets]
    names = dict.fromkeys(s["name"] for one in sets for s in one["scores"])
    for name in names:
        home, _, metric = name.partition(".")
        if home.removesuffix("_gated") == protocol and any(name in scores for scores in by_set):
            cells = [
                _cell(scores[name], one["n_requested"]) if name in scores else "-"
                for one, scores in zip(sets, by_set, strict=True)
            ]
            table.add_row(metric if home == protocol else f"{metric}, gated", *cells)
    return table


def _table(first: str, sets: Sequence[Plain]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first, overflow="fold")
    for one in sets:
        table.add_column(f"{one['name']} ({one['n_requested']:,})", justify="right", no_wrap=True)
    return table


def _cell(score: Plain, n_requested: int) -> str:
    is_share = score["unit"] == "share"
    said = f"{100 * score['value']:.2f}" if is_share else f"{score['value']:.4g}"
    if is_share and score["numerator"] is not None:
        behind = f" / {score['denominator']:,}" if score["denominator"] != n_requested else ""
        said = f"{score['numerator']:,}{behind}  {said:>6}"
    if score["low"] is not None:
        half = (score["high"] - score["low"]) / 2
        said += f" ±{100 * half:.1f}" if is_share else f" ±{half:.2g}"
    return said if score["unit"] in ("", "share") else f"{said} {score['unit']}"
