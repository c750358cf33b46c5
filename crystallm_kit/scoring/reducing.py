"""The stage `forms`: the reduced form of one structure, made once for all comparisons.

Not here: comparing (scores/matcher/structure_matcher.py).
"""

from collections.abc import Mapping
from typing import Any

from pymatgen.core import Lattice, Structure

from crystallm_kit.scores.matcher.structure_matcher import TOLERANCES, fit, reduced, rms_distance
from crystallm_kit.scoring.rows import form_columns
from crystallm_kit.scoring.stages import Item


def warm_up() -> None:
    """Compile, or load, the matcher: the first time that takes many seconds."""
    sites = [[0.0, 0.0, 0.0], [0.5, 0.5, 0.5]]
    rock_salt = reduced(
        Structure(Lattice([[0, 2.8, 2.8], [2.8, 0, 2.8], [2.8, 2.8, 0]]), ["Na", "Cl"], sites)
    )
    for tolerances in TOLERANCES.values():
        fit(rock_salt, rock_salt, tolerances)
        rms_distance(rock_salt, rock_salt, tolerances)


def reduce(item: Item, settings: Mapping[str, Any], where: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of the stage."""
    del settings, where
    return form_columns(None if item.structure is None else reduced(item.structure))
