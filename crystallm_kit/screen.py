"""What the command shows: tables of samples, the funnel, a progress bar.

    sample  formula  space group    Å³/atom  nearest Å  verdict
    0-0     NaCl     Fm-3m (225)      22.41      2.820  valid
    0-1     NaCl     Pm-3m (221)      20.10      2.960  duplicate: same crystal a…

Not here: what is counted (scores/funnel.py, prediction.py), the output for programs
(generation.sample_to_dict).
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from crystallm_kit.records import Sample
from crystallm_kit.scores.funnel import STAGES, Funnel
from crystallm_kit.structures.spacegroups import spacegroup_symbol

if TYPE_CHECKING:
    from crystallm_kit.prediction import Prediction

T = TypeVar("T")
SHOWN = 20  # samples of a long run that the table shows


def console(*, stderr: bool = False) -> Console:
    """Return the console; nothing in a text is taken for markup or coloured by its content."""
    return Console(stderr=stderr, highlight=False, markup=False)


def samples_table(samples: Sequence[Sample], *, names: str = "sample") -> Table:
    """Return the first samples as a table; a verdict is cut to the width of the screen.

    Args:
        samples: In the order of the requests.
        names: What an id stands for.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(names, no_wrap=True)
    table.add_column("formula", no_wrap=True)
    table.add_column("space group", no_wrap=True)
    table.add_column("Å³/atom", justify="right", no_wrap=True)
    table.add_column("nearest Å", justify="right", no_wrap=True)
    table.add_column("verdict")  # the one column that gives way on a narrow screen
    for sample in samples[:SHOWN]:
        verdict = sample.verdict
        said = "valid" if verdict.valid else f"{verdict.reason}: {verdict.detail}".removesuffix(": ")
        table.add_row(
            sample.id,
            sample.structure.composition.reduced_formula if sample.structure is not None else "-",
            _spacegroup(sample),
            _number(sample, "volume_per_atom_angstrom3", 2),
            _number(sample, "nearest_distance_angstrom", 3),
            Text(said, no_wrap=True, overflow="ellipsis"),
        )
    return table


def polymorphs_table(prediction: "Prediction") -> Table:
    """Return the first polymorphs of a prediction; hull distances where there are any; *: not converged."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    has_energies = prediction.ranked_by == "energy"
    has_hull = any(math.isfinite(p.hull_distance_ev_per_atom) for p in prediction.polymorphs)
    columns = [
        "rank",
        "space group",
        "ΔE meV/atom",
        "hull meV/atom",
        "Å³/atom",
        "atoms",
        "found",
    ]
    shown = [name for name in columns if has_energies or "ΔE" not in name]
    shown = [name for name in shown if has_hull or "hull" not in name]
    for name in shown:
        table.add_column(name, no_wrap=True, justify="left" if name == "space group" else "right")
    table.add_column("")
    for one in prediction.polymorphs[:SHOWN]:
        number = one.spacegroup_number
        cells = {
            "rank": str(one.rank),
            "space group": "-" if number is None else f"{spacegroup_symbol(number)} ({number})",
            "ΔE meV/atom": f"{one.above_best_mev_per_atom:.1f}",
            "hull meV/atom": f"{1000 * one.hull_distance_ev_per_atom:.0f}",
            "Å³/atom": f"{one.volume_per_atom_angstrom3:.2f}",
            "atoms": str(one.n_sites),
            "found": str(one.n_found),
        }
        table.add_row(*(cells[name] for name in shown), "*" if has_energies and not one.converged else "")
    return table


def funnel_table(counts: Funnel) -> Table:
    """Return how many samples passed each gate, and what stopped the others."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("passed")
    table.add_column("samples", justify="right")
    table.add_column("share", justify="right")
    for stage in STAGES:
        n = getattr(counts, stage)
        table.add_row(stage, f"{n:,}", f"{n / counts.requested:.1%}")
    for reason, n in counts.reasons.items():
        table.add_row(f"stopped by {reason}", f"{n:,}", "")
    return table


def with_progress(items: Iterable[T], total: int, *, what: str) -> Iterator[T]:
    """Yield the items, and show on standard error how many there were; nothing for a short run."""
    if total <= SHOWN:
        yield from items
        return
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(stderr=True), transient=True) as shown:
        yield from shown.track(items, total=total)


def _spacegroup(sample: Sample) -> str:
    number = sample.measures.get("spacegroup_number")
    return "-" if number is None else f"{spacegroup_symbol(int(number))} ({number})"


def _number(sample: Sample, name: str, decimals: int) -> str:
    value = sample.measures.get(name)
    return "-" if value is None else f"{float(value):.{decimals}f}"
