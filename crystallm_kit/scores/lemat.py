"""LeMat-GenBench's three checks of one structure: charge, distances, plausibility.

    lemat_checks(structure)   -> {"charge_neutral": True, "distance": True, "plausible": True}

`lemat.valid` is all three. On the 10,000 samples that DiffCSP published: charge 9,634, distance 9,940,
plausible 10,000, valid 9,576; of the first 2,500 valid 2,392, as the peer's own code counts them.

The peer's loopholes are kept: images of the same atom are not looked at (Li in a cubic cell of 1.3 angstrom
passes), and an alloy is neutral. `kit.structure_valid` (checks.py) is the stricter number beside it.

Not here: what the composition decides about the charge (lemat_charge.py), statistics over a set
(statistics.py), stability.
Source: LeMaterial/lemat-genbench, metrics/validity_metrics.py (arXiv:2512.04562).
"""

import math
import os
import warnings
from functools import cache
from typing import Any

import numpy as np
from pymatgen.core import Structure

from crystallm_kit.scores.distances import atomic_radii
from crystallm_kit.scores.lemat_charge import (
    can_be_neutral,
    lemat_tables,
    metallicity,
    neutral_by_composition,
)
from crystallm_kit.scores.measures import MeasuredCrystal
from crystallm_kit.scores.thresholds import PROTOCOLS

NAMES = ("charge_neutral", "distance", "plausible")
SYMPREC_ANGSTROM = 0.01  # of the peer's every look at the symmetry
# O'Keeffe and Brese's electronegative elements: only a bond with one of them has a valence.
_ANIONS = frozenset("H B C Si N P As Sb O S Se Te F Cl Br I".split())
_NEAREST = 1.1  # neighbours are within this of the nearest one (pymatgen's MinimumDistanceNN)
_NEIGHBOURS_WITHIN_ANGSTROM = 10.0
_FAILURES = (ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError, ArithmeticError)
_VALENCE_WITHIN_ANGSTROM = 8.0  # there a bond valence is far above the 1e-15 that count as none


def lemat_checks(structure: Structure) -> dict[str, bool]:
    """Return the three checks of a structure; one with shared sites, or whose cell is none, fails all."""
    if not structure.is_ordered:
        return dict.fromkeys(NAMES, False)
    found = MeasuredCrystal(structure)
    return checks_of(found, None if found.cell_fault else lemat_spacegroup_number(found))


def checks_of(found: MeasuredCrystal, spacegroup_number: int | None) -> dict[str, bool]:
    """Return `lemat_checks` of what is measured already.

    Args:
        found: The structure.
        spacegroup_number: What `lemat_spacegroup_number` says of it.
    """
    if found.cell_fault:
        return dict.fromkeys(NAMES, False)
    has_symmetry = spacegroup_number is not None
    return {
        "charge_neutral": is_charge_neutral(found, has_symmetry=has_symmetry),
        "distance": _keeps_distance(found),
        "plausible": has_symmetry and _is_plausible(found),
    }


def lemat_spacegroup_number(found: MeasuredCrystal) -> int | None:
    """Return the space group that spglib finds at 0.01 angstrom, as the peer asks for it; None: none."""
    dataset = spglib_dataset(found, SYMPREC_ANGSTROM)
    return None if dataset is None or not 1 <= dataset.number <= 230 else int(dataset.number)


def is_charge_neutral(found: MeasuredCrystal, *, has_symmetry: bool) -> bool:
    """Tell whether the peer's rule (lemat_charge.py) calls a structure neutral.

    Args:
        found: The structure.
        has_symmetry: Whether spglib finds a space group at 0.01 angstrom; without one step 2 is left out.
    """
    divisor = math.gcd(*found.counts.values())
    counts = tuple(sorted(found.counts.items(), key=_by_electronegativity))
    reduced = tuple((symbol, n // divisor) for symbol, n in counts)
    if neutral_by_composition(reduced):
        return True
    if has_symmetry and metallicity(reduced) is not None and _bond_valences_vanish(found):
        return True
    states = [lemat_tables().elements[symbol].bond_valence for symbol, _ in counts]
    # What the analyzer finds is neutral, and the states of an element differ by 1 at most: without such a
    # choice for the whole cell it finds nothing.
    return can_be_neutral(counts, states) and _analyzer_finds_states(found.structure)


def _by_electronegativity(item: tuple[str, int]) -> tuple[bool, float, str]:
    x = lemat_tables().elements[item[0]].electronegativity
    return x is None, x or 0.0, item[0]


def _bond_valences_vanish(found: MeasuredCrystal) -> bool:
    """Step 2: whether all bond-valence sums over nearest neighbours are 0."""
    from pymatgen.core.bond_valence import calculate_bv_sum
    from pymatgen.core.local_env import get_neighbors_of_site_with_index
    from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

    anions = np.array([symbol in _ANIONS for symbol in _symbols()])
    own = anions[found.numbers]
    near = found.distances
    first, second = near.first, near.second
    counted = (found.numbers[first] != found.numbers[second]) & (own[first] | own[second])
    if not (len(found.counts) > 1 and own.any()) and near.self_image <= _NEIGHBOURS_WITHIN_ANGSTROM:
        return True
    nearest = np.full(len(found.numbers), near.self_image)
    with_valence = np.full(len(found.numbers), np.inf)
    for ends in (first, second):
        np.minimum.at(nearest, ends, near.distance)
        np.minimum.at(with_valence, ends[counted], near.distance[counted])
    if (with_valence <= np.minimum(nearest * (_NEAREST - 1e-6), _VALENCE_WITHIN_ANGSTROM)).all():
        return False  # every site has a bond that counts
    structure = found.structure
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            groups = SpacegroupAnalyzer(structure).get_symmetrized_structure().equivalent_indices
            return all(
                # pymatgen leaves these without types
                abs(calculate_bv_sum(structure[i], get_neighbors_of_site_with_index(structure, i))) < 1e-15  # type: ignore[no-untyped-call]
                for i in [group[0] for group in groups]
            )
    except _FAILURES:  # no neighbour, an element without parameters: the peer goes on to step 3
        return False


def _analyzer_finds_states(structure: Structure) -> bool:
    """Step 3: whether pymatgen's BVAnalyzer, with its defaults, assigns oxidation states."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _analyzer().get_valences(structure)
    except _FAILURES:  # ValueError where it finds none; anything else is the peer's "not valid"
        return False
    return True


@cache
def _analyzer() -> Any:
    from pymatgen.core.bond_valence import BVAnalyzer

    return BVAnalyzer()  # type: ignore[no-untyped-call]


def _keeps_distance(found: MeasuredCrystal) -> bool:
    near, radii = found.distances, atomic_radii()[found.numbers]
    protocol = PROTOCOLS["lemat_geometry"]
    limit = protocol.radius_scale * (protocol.radius_offset_angstrom + radii[near.first] + radii[near.second])
    return bool((near.distance >= limit).all())


def _is_plausible(found: MeasuredCrystal) -> bool:
    protocol, lattice = PROTOCOLS["lemat_geometry"], found.structure.lattice
    lengths, angles = lattice.abc, lattice.angles
    return (
        protocol.density_g_cm3[0] <= found.density <= protocol.density_g_cm3[1]
        and protocol.sites_per_angstrom3[0]
        <= len(found.numbers) / found.volume
        <= protocol.sites_per_angstrom3[1]
        and found.volume > protocol.volume_angstrom3
        and all(protocol.lengths_angstrom[0] <= x <= protocol.lengths_angstrom[1] for x in lengths)
        and all(0 < x < 180 for x in angles)
    )


def spglib_dataset(found: MeasuredCrystal, symprec_angstrom: float) -> Any:
    """Return spglib's dataset as pymatgen's SpacegroupAnalyzer asks for it; None: it finds no symmetry."""
    # spglib prints each tolerance that it lowers, unless told not to
    os.environ.setdefault("SPGLIB_WARNING", "OFF")
    import spglib

    kinds = {number: i for i, number in enumerate(dict.fromkeys(found.numbers.tolist()), start=1)}
    labels = [kinds[number] for number in found.numbers.tolist()]
    cell: Any = (found.lattice, found.fractional, labels)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        return spglib.get_symmetry_dataset(cell, symprec=symprec_angstrom, angle_tolerance=5.0)


@cache
def _symbols() -> tuple[str, ...]:
    """Symbols by atomic number; entry 0 is no element."""
    return ("", *lemat_tables().elements)
