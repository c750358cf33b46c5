"""The scores as the command shows them: a table a protocol, the sets side by side.

    cdvae                    DiffCSP                            LLaMA
    structure_valid          100.00 %  10,000 / 10,000          99.94 %  3,219 / 3,221
    comp_valid                83.25 %   8,325 / 10,000         100.00 %  3,221 / 3,221

Not here: the page (report.py).
"""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

Plain = Mapping[str, Any]


def print_report(report: Plain) -> None:
    """Print the funnel and the scores of a report."""
    console = Console(highlight=False, markup=False)
    console.print(funnel_table(report))
    notes: dict[str, int] = {}
    for protocol in report["protocols"]:
        table = scores_table(report, protocol, notes)
        if table.row_count:
            console.print()
            console.print(table)
    if notes:
        console.print()
    for note, number in notes.items():
        console.print(f"{number}  {note}")
    for note in report["notes"]:
        console.print(f"note: {note}")


def funnel_table(report: Plain) -> Table:
    """Return how many samples of each set pass each gate."""
    table = _table("passed", [one["name"] for one in report["sets"]])
    for row, (gate, _) in enumerate(report["sets"][0]["funnel"]):
        cells = []
        for one in report["sets"]:
            n = one["funnel"][row][1]
            cells.append(f"{n:,}  {n / one['n_requested']:7.2%}")
        table.add_row(gate, *cells)
    return table


def scores_table(report: Plain, protocol: str, notes: dict[str, int]) -> Table:
    """Return the scores of one protocol; what has to be known to read them gets a number in `notes`."""
    sets = report["sets"]
    table = _table(protocol, [one["name"] for one in sets])
    by_set = [{s["name"]: s for s in one["scores"]} for one in sets]
    names = dict.fromkeys(name for scores in by_set for name in scores if name.partition(".")[0] == protocol)
    for name in names:
        cells = [_cell(scores[name], notes) if name in scores else Text("-") for scores in by_set]
        table.add_row(name.partition(".")[2], *cells)
    return table


def _table(first: str, names: list[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first, no_wrap=True)
    for name in names:
        table.add_column(name, justify="right")
    return table


def _cell(score: Plain, notes: dict[str, int]) -> Text:
    mark = f" [{notes.setdefault(score['note'], len(notes) + 1)}]" if score["note"] else ""
    if score["value"] is None:
        return Text(f"not computed{mark}", style="dim")
    if score["unit"] == "share":
        said = f"{score['value']:.2%}"
    else:
        said = f"{score['value']:.4g}" + (f" {score['unit']}" if score["unit"] else "")
    if score["numerator"] is not None:
        said += f"  {score['numerator']:,} / {score['denominator']:,}"
    if score["low"] is not None:
        low, high = score["low"], score["high"]
        said += f"  ({low:.1%} to {high:.1%})" if score["unit"] == "share" else f"  ({low:.4g} to {high:.4g})"
    return Text(said + mark)
