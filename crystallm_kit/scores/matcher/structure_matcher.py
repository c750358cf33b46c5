"""pymatgen's StructureMatcher, decision for decision, compiled.

    fit(reduced(one), reduced(other), TOLERANCES["default"])            -> bool
    rms_distance(reduced(candidate), reduced(truth), TOLERANCES["csp"]) -> 0.031, or None

Settings are pymatgen's defaults (primitive cells, scaled volumes, no supercells) but for the tolerances. It
is not symmetric: the first argument is the prediction, the second the truth.

Contract: decisions are pymatgen's, RMS distances too (to 1e-9). Where rounding decides (a tolerance met to
1e-9, assignments that are equally good and differ in their distance: about one pair in a thousand) pymatgen
itself is asked. Sites are told apart by element: isotopes and oxidation states are not. The first call in a
process loads compiled code from the cache of numba (about half a second); the first of all compiles it.

Not here: which pairs are compared (novelty/copies.py, matching.py); the search itself (kernel.py), the
reduction (reduction.py); agreement and speed measured (speed.py).
Source: pymatgen-core 2026.10.16, core/structure_matcher.py.
"""

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pymatgen.core import Composition, Element, Lattice, PeriodicSite, Structure

from crystallm_kit.errors import DisorderedStructure, UserError


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
_CHUNK = 64  # structures handed to a process at once


@dataclass(frozen=True, eq=False)
class Reduced:
    """What comparing needs of a structure: its primitive, Niggli-reduced cell.

    Attributes:
        formula: Reduced formula; structures of different ones never match.
        numbers: (N,) int16 atomic numbers.
        lattice: (3, 3) rows are lattice vectors, angstrom.
        fractional: (N, 3); in [0, 1), or as they came where the cell was reduced already.
    """

    formula: str
    numbers: NDArray[np.int16]
    lattice: NDArray[np.float64]
    fractional: NDArray[np.float64]


def reduced(structure: Structure) -> Reduced:
    """Return the reduced form of an ordered structure.

    Raises:
        DisorderedStructure: If a site is shared or partly empty.
        UserError: If it has no cell: a number that is none, no volume, or a needle (edges a thousand times
            as long as others), for which there is no end of lattice points to look at.
    """
    numbers = np.array([_number_of(site) for site in structure], dtype=np.int16)
    lattice = structure.lattice.matrix
    fractional = np.concatenate([site.frac_coords for site in structure]).reshape(-1, 3)
    return reduced_cell(numbers, lattice, fractional)


def reduced_cell(
    numbers: NDArray[np.int16], lattice: NDArray[np.float64], fractional: NDArray[np.float64]
) -> Reduced:
    """Return the reduced form of a structure given as arrays (a Structure costs more than its reduction).

    Args:
        numbers: (N,) atomic numbers.
        lattice: (3, 3) rows are lattice vectors, angstrom.
        fractional: (N, 3).

    Raises:
        UserError: As `reduced` does.
    """
    from crystallm_kit.scores.matcher.compiled import reduce_cell
    from crystallm_kit.scores.matcher.niggli import DONE, NO_CELL

    own = (  # copies, as what comes back may be the same array
        np.array(numbers, dtype=np.int16, order="C"),
        np.array(lattice, dtype=np.float64, order="C"),
        np.array(fractional, dtype=np.float64, order="C"),
    )
    status, found, cell, sites = reduce_cell(own[0], _ranks(), own[1], own[2])
    if status == DONE:
        return Reduced(_formula(numbers), found, cell, sites)
    if status == NO_CELL:
        raise UserError(
            f"{_formula(numbers)}: lattice vectors {lattice.round(4).tolist()} span no cell that can be "
            "reduced (flat, or a needle), or a coordinate is not finite; leave it out"
        )
    return _reduced_by_pymatgen(Structure(Lattice(lattice), numbers.tolist(), fractional), _formula(numbers))


def reduce_many(structures: Iterable[Structure | None], *, processes: int = 1) -> list[Reduced | None]:
    """Return the reduced form of each; None for None, and where there is none (see `reduced`).

    Args:
        structures: In any number; they are taken as they come.
        processes: 1: in this one. More pay off from some ten thousand structures on.
    """
    if processes <= 1:
        return [_reduced_or_none(structure) for structure in structures]
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return list(pool.map(_reduced_or_none, structures, chunksize=_CHUNK))


def fit(first: Reduced, second: Reduced, tolerances: Tolerances) -> bool:
    """Tell whether two structures are the same, as StructureMatcher.fit does."""
    if first.formula != second.formula:
        return False
    found = _compare(first, second, tolerances, False)
    if found is not None:
        return found >= 0
    matcher = _matcher(tolerances)
    return bool(matcher.fit(_structure(first), _structure(second), skip_structure_reduction=True))


def rms_distance(first: Reduced, second: Reduced, tolerances: Tolerances) -> float | None:
    """Return get_rms_dist's first number, in units of (V/N)^(1/3); None where they do not match."""
    if first.formula != second.formula:
        return None
    found = _compare(first, second, tolerances, True)
    if found is not None:
        return found if found >= 0 else None
    matcher = _matcher(tolerances)
    pair = matcher._preprocess(_structure(first), _structure(second), skip_structure_reduction=True)
    match = matcher._match(*pair, use_rms=True, break_on_match=False)
    return None if match is None else float(match[0])


def is_undecided(first: Reduced, second: Reduced, tolerances: Tolerances) -> bool:
    """Tell whether rounding would decide on the RMS distance, so that `rms_distance` asks pymatgen."""
    return first.formula == second.formula and _compare(first, second, tolerances, True) is None


def rms_distances(
    candidates: Sequence[Reduced | None], truth: Reduced, tolerances: Tolerances
) -> list[float | None]:
    """Return the RMS distance of each candidate to the truth; None for None and where it does not match."""
    return [None if one is None else rms_distance(one, truth, tolerances) for one in candidates]


def _compare(first: Reduced, second: Reduced, tolerances: Tolerances, is_rms: bool) -> float | None:
    """Return the distance, -1.0 where they do not match, None where rounding decides."""
    from crystallm_kit.scores.matcher.compiled import match
    from crystallm_kit.scores.matcher.kernel import NO_MATCH, UNCERTAIN

    if len(first.numbers) != len(second.numbers):
        return -1.0
    status, value = match(
        *_arrays(first),
        *_arrays(second),
        tolerances.length,
        tolerances.site,
        tolerances.angle_degrees,
        is_rms,
    )
    if status == UNCERTAIN:
        return None
    return -1.0 if status == NO_MATCH else float(value)


def _arrays(form: Reduced) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    return _plain(form.numbers, np.int16), _plain(form.lattice), _plain(form.fractional)


def _plain(array: NDArray[Any], kind: type[np.generic] = np.float64) -> NDArray[Any]:
    """Return the array as compiled code knows it; that of a mapped file, or in another order, is a copy.

    For any other type numba compiles everything once more.
    """
    flags = array.flags
    if array.dtype == kind and flags.c_contiguous and flags.writeable:
        return array
    return np.array(array, dtype=kind, order="C")


def _reduced_or_none(structure: Structure | None) -> Reduced | None:
    try:
        return None if structure is None else reduced(structure)
    except UserError:
        return None


def _reduced_by_pymatgen(structure: Structure, formula: str) -> Reduced:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        matcher = _matcher(TOLERANCES["default"])
        # pymatgen's cache may answer with a structure that differs by 1e-5
        matcher._get_reduced_istructure.cache_clear()
        try:
            found = matcher._get_reduced_structure(structure, True, True)
        except (ValueError, ArithmeticError) as error:
            raise UserError(f"{formula}: pymatgen cannot reduce its cell ({error}); leave it out") from error
    numbers = np.array([site.specie.Z for site in found], dtype=np.int16)
    return Reduced(formula, numbers, np.array(found.lattice.matrix), np.array(found.frac_coords))


def _number_of(site: PeriodicSite) -> int:
    species = site.species
    if len(species) != 1 or species.num_atoms != 1:  # what site.specie checks, in a third of its time
        raise DisorderedStructure(
            f"{species} shares a site or leaves it partly empty; structures are compared atom by atom. Give "
            "ordered ones."
        )
    return int(next(iter(species)).Z)


def _structure(form: Reduced) -> Structure:
    return Structure(Lattice(form.lattice), form.numbers.tolist(), form.fractional)


def _formula(numbers: NDArray[np.int16]) -> str:
    return _formula_of(tuple(sorted(numbers.tolist())))


@lru_cache(maxsize=100_000)
def _formula_of(numbers: tuple[int, ...]) -> str:
    counts = Counter(Element.from_Z(number).symbol for number in numbers)
    divisor = math.gcd(*counts.values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # helium has no electronegativity to sort it by
        return Composition({symbol: count // divisor for symbol, count in counts.items()}).reduced_formula


@cache
def _ranks() -> NDArray[np.int64]:
    """Return the place of each atomic number in the order of the symbols, by which pymatgen sorts sites."""
    symbols = sorted(range(1, 119), key=lambda number: Element.from_Z(number).symbol)
    ranks = np.zeros(119, dtype=np.int64)
    ranks[symbols] = np.arange(118)
    return ranks


@cache
def _matcher(tolerances: Tolerances) -> Any:
    from pymatgen.analysis.structure_matcher import StructureMatcher

    return StructureMatcher(ltol=tolerances.length, stol=tolerances.site, angle_tol=tolerances.angle_degrees)
