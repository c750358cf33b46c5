"""pymatgen's StructureMatcher, decision for decision.

    fit(reduced(one), reduced(other), TOLERANCES["default"])            -> bool
    rms_distance(reduced(candidate), reduced(truth), TOLERANCES["csp"]) -> 0.031, or None

Settings are pymatgen's defaults (primitive cells, scaled volumes, no supercells) but for the tolerances. It
is not symmetric: the first argument is the prediction, the second the truth.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pymatgen.core import Lattice, Structure


@dataclass(frozen=True)
class Tolerances:
    """What still counts as the same: pymatgen's ltol, stol and angle_tol.

    Attributes:
        length: Relative, of lattice vectors.
        site: Of the largest distance between sites, in units of (V/N)^(1/3).
        angle_degrees: Of the cell.
    """

    length: float
    site: float
    angle_degrees: float


TOLERANCES = {
    "csp": Tolerances(0.3, 0.5, 10.0),
    "default": Tolerances(0.2, 0.3, 5.0),
    "lemat": Tolerances(0.1, 0.3, 5.0),
}


@dataclass(frozen=True, eq=False)
class Reduced:
    """What comparing needs of a structure: its primitive, Niggli-reduced cell.

    Attributes:
        formula: Reduced formula; structures of different ones never match.
        numbers: (N,) int16 atomic numbers.
        lattice: (3, 3) rows are lattice vectors, angstrom.
        fractional: (N, 3) in [0, 1).
    """

    formula: str
    numbers: NDArray[np.int16]
    lattice: NDArray[np.float64]
    fractional: NDArray[np.float64]


def reduced(structure: Structure) -> Reduced:
    """Return the reduced form of an ordered structure."""
    found = _matcher(TOLERANCES["default"])._get_reduced_structure(structure, True, True)
    numbers = np.array([site.specie.Z for site in found], dtype=np.int16)
    return Reduced(
        structure.composition.reduced_formula,
        numbers,
        np.array(found.lattice.matrix),
        np.array(found.frac_coords),
    )


def fit(first: Reduced, second: Reduced, tolerances: Tolerances) -> bool:
    """Tell whether two structures are the same, as StructureMatcher.fit does."""
    if first.formula != second.formula:
        return False
    matcher = _matcher(tolerances)
    return bool(matcher.fit(_structure(first), _structure(second), skip_structure_reduction=True))


def rms_distance(first: Reduced, second: Reduced, tolerances: Tolerances) -> float | None:
    """Return get_rms_dist's first number, in units of (V/N)^(1/3); None where they do not match."""
    if first.formula != second.formula:
        return None
    found = _matcher(tolerances).get_rms_dist(_structure(first), _structure(second))
    return None if found is None else float(found[0])


def _structure(form: Reduced) -> Structure:
    return Structure(Lattice(form.lattice), form.numbers.tolist(), form.fractional)


@cache
def _matcher(tolerances: Tolerances) -> Any:
    from pymatgen.analysis.structure_matcher import StructureMatcher

    return StructureMatcher(ltol=tolerances.length, stol=tolerances.site, angle_tol=tolerances.angle_degrees)
