"""Whether samples are what was asked for, condition by condition: hit rates.

    row = asked_checks(structure, Conditions(formula={"Na": 1, "Cl": 1}, spacegroup_number=225))
        {"kit.hit_rate.formula": True, "kit.hit_rate.spacegroup": False, "kit.hit_rate.all": False}
    hit_scores({"kit.hit_rate.formula": [True, None, False], ...})
        [Score("kit.hit_rate.formula", 0.5, numerator=1, denominator=2, over="asked", ...), ...]

Formulas, counts and symmetry are compared as validity.py does: reduced formulas, unless the number of sites
is the formula's sum; space groups at 0.1 angstrom. A property that is asked as one value is hit within 20 %
of it, one asked as an interval inside the interval. What failed, and what was not measured, is a miss: rates
are of the samples for which the condition was asked.

Not here: spread and medians of a property, target by target (hits.py); reading conditions (text/).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray
from pymatgen.core import Structure

from crystallm_kit.records import Conditions, Range
from crystallm_kit.scores.hits import TOLERANCE
from crystallm_kit.scores.measures import MeasuredCrystal
from crystallm_kit.scores.score import Score, share
from crystallm_kit.scores.validity import conditions_met

PREFIX = "kit.hit_rate."


def asked_of(wanted: Conditions) -> tuple[str, ...]:
    """Return the names of the conditions that are asked, properties under their own."""
    asked = {
        "formula": wanted.formula is not None,
        "elements": bool(wanted.elements),
        "only_elements": wanted.only_elements,
        "n_elements": wanted.n_elements is not None,
        "anonymous_formula": wanted.anonymous_formula is not None,
        "n_sites": wanted.n_sites is not None,
        "crystal_system": wanted.crystal_system is not None,
        "spacegroup": wanted.spacegroup_number is not None,
    }
    return (*(name for name, is_asked in asked.items() if is_asked), *wanted.properties)


def asked_checks(
    structure: Structure | None,
    wanted: Conditions,
    *,
    properties: Mapping[str, float] | None = None,
    tolerance: float = TOLERANCE,
) -> dict[str, bool]:
    """Return whether one sample meets each condition asked of it.

    Args:
        structure: None where there is none: everything asked is missed.
        wanted: What was asked.
        properties: Kit property name -> what was measured on the sample.
        tolerance: Of a property asked as one value, relative.

    Returns:
        "kit.hit_rate.<condition>" -> hit, of those asked; with any, "kit.hit_rate.all" too.
    """
    names = asked_of(wanted)
    met = dict.fromkeys(names, False)
    if structure is not None and structure.is_ordered:
        found = MeasuredCrystal(structure)
        if not found.cell_fault:
            met |= conditions_met(found, wanted)
            for name, asked in wanted.properties.items():
                met[name] = is_hit((properties or {}).get(name), asked, tolerance)
    row = {f"{PREFIX}{name}": met[name] for name in names}
    return {**row, f"{PREFIX}all": all(row.values())} if row else {}


def is_hit(value: float | None, asked: Range, tolerance: float = TOLERANCE) -> bool:
    """Tell whether a measured value is what was asked for.

    Args:
        value: None, NaN: not measured, so a miss.
        asked: low == high: a value, hit within the tolerance; else an interval, ends included.
        tolerance: Relative; a value of 0 is hit by 0 alone.
    """
    if value is None or math.isnan(value):
        return False
    if asked.low is not None and asked.low == asked.high:
        return abs(value - asked.low) <= tolerance * abs(asked.low)
    return (asked.low is None or asked.low <= value) and (asked.high is None or value <= asked.high)


def hit_scores(columns: Mapping[str, Sequence[bool | float | None] | NDArray[Any]]) -> list[Score]:
    """Return the hit rate of every condition over the samples for which it was asked.

    Args:
        columns: Names of `asked_checks` -> one entry a sample, None (or NaN) where it was not asked; other
            columns are passed over.
    """
    scores = []
    for name, column in columns.items():
        asked = [x for x in column if x is not None and x == x]
        if name.startswith(PREFIX) and asked:
            note = "every condition asked" if name == f"{PREFIX}all" else ""
            scores.append(share(name, sum(bool(x) for x in asked), len(asked), over="asked", note=note))
    return scores
