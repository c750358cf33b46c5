"""The scores as the command shows them: a table a protocol, the sets side by side.

    cdvae                       DiffCSP (10,000)                LLaMA (3,221)
    structure_valid  10,000  100.00 (100.0-100.0)    3,219   99.94 (99.8-100.0)
    comp_valid        8,325   83.25   (82.5-84.0)    3,221  100.00 (99.9-100.0)

A share: how many, in percent, and its 95 % interval; the denominator stands above, or behind a stroke where
it is another.

Not here: the page (report.py).
"""

from collections.abc import Mapping, Sequence
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
    table = _table("passed", report["sets"])
    for row, (gate, _) in enumerate(report["sets"][0]["funnel"]):
        cells = []
        for one in report["sets"]:
            n = one["funnel"][row][1]
            cells.append(f"{n:,}  {100 * n / one['n_requested']:6.2f}")
        table.add_row(gate, *cells)
    return table


def scores_table(report: Plain, protocol: str, notes: dict[str, int]) -> Table:
    """Return the scores of one protocol; what has to be known to read them gets a number in `notes`."""
    sets = report["sets"]
    table = _table(protocol, sets)
    by_set = [{s["name"]: s for s in one["scores"]} for one in sets]
    names = dict.fromkeys(name for scores in by_set for name in scores if name.partition(".")[0] == protocol)
    for name in names:
        cells = [
            _cell(scores[name], one["n_requested"], notes) if name in scores else Text("-")
            for one, scores in zip(sets, by_set, strict=True)
        ]
        table.add_row(name.partition(".")[2], *cells)
    return table


def _table(first: str, sets: Sequence[Plain]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first, no_wrap=True)
    for one in sets:
        table.add_column(f"{one['name']} ({one['n_requested']:,})", justify="right")
    return table


def _cell(score: Plain, n_requested: int, notes: dict[str, int]) -> Text:
    mark = f" [{notes.setdefault(score['note'], len(notes) + 1)}]" if score["note"] else ""
    if score["value"] is None:
        return Text(f"not computed{mark}", style="dim")
    is_share = score["unit"] == "share"
    said = f"{100 * score['value']:.2f}" if is_share else f"{score['value']:.4g}"
    if is_share and score["numerator"] is not None:
        other = score["denominator"] != n_requested
        behind = f" / {score['denominator']:,}" if other else ""
        said = f"{score['numerator']:,}{behind}  {said:>6}"
    elif score["unit"] not in ("", "share"):
        said += f" {score['unit']}"
    if score["low"] is not None:
        low, high = score["low"], score["high"]
        interval = f"({100 * low:.1f}-{100 * high:.1f})" if is_share else f"({low:.4g}-{high:.4g})"
        said += f" {interval:>13}"
    return Text(said + mark)
