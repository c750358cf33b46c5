"""The conventional cell that CrystaLLM's text describes: pymatgen's refined structure, without pymatgen.

    StandardCell(number=225, lengths_and_angles=(5.6402, ..., 90.0), volume=179.43,
                 sites=(StandardSite("Na", 4, (0.0, 0.0, 0.0)), StandardSite("Cl", 4, (0.0, 0.0, 0.5))))

What symmetry fixes is the same whoever computes it. What it leaves open follows CifWriter(symprec=0.1):
    setting        smallest Hall number: origin choice 1, unique axis b, hexagonal axes for R groups
    printed atom   of an orbit, the one with the smallest x, then y, then z. pymatgen compares without
                   tolerance: of equal coordinates rounding noise picks one there, 1e-6 of the cell counts
                   here
    lengths        the mean of those that the crystal system makes equal (moyo itself: of their squares)
    origin, axes   where the space group's normalizer allows several, spglib keeps what its search meets first
                   in the given cell; nothing canonical is behind it. See `_nearest_frame`
Origin and axes follow the given cell, so a crystal that stands in a standard cell mostly stays as it is.

Not here: the text (cif.py); space groups for other uses, in origin choice 2 (structures/symmetry.py).
"""

import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import moyopy
import numpy as np
from numpy.typing import NDArray
from pymatgen.core import Element, Lattice, Structure

from crystallm_kit.errors import EncodeError
from crystallm_kit.records import Crystal
from crystallm_kit.structures.symmetry import check_apart, closest_angstrom, crystal_system
from crystallm_kit.text.cif_tables import Floats, check_elements, spacegroup_operations, spacegroup_symbols


@dataclass(frozen=True)
class StandardSite:
    """One orbit: element, number of atoms in the conventional cell, and the printed atom (fractional)."""

    element: str
    multiplicity: int
    position: tuple[float, float, float]


@dataclass(frozen=True)
class StandardCell:
    """A crystal in the conventional cell of its space group: angstrom, degrees, cubic angstrom."""

    number: int
    lengths_and_angles: tuple[float, ...]
    volume: float
    sites: tuple[StandardSite, ...]


def ordered_cell(crystal: Crystal) -> tuple[Floats, Floats, list[str]]:
    """Return lattice rows (3, 3) in angstrom, fractional coordinates (N, 3), and N element symbols.

    Raises:
        EncodeError: For molecules, partial occupancies, and elements that CrystaLLM has no token for.
    """
    structure = crystal.structure
    if not isinstance(structure, Structure):
        raise EncodeError(f"{crystal.id}: format 'cif' needs a periodic crystal; got a molecule. Take 'xyz'.")
    if not structure.is_ordered or not len(structure):
        raise EncodeError(
            f"{crystal.id}: format 'cif' needs one whole atom per site; got partial occupancies."
        )
    elements = [str(getattr(site.specie, "symbol", site.specie)) for site in structure]
    check_elements(set(elements))
    return structure.lattice.matrix, structure.frac_coords, elements


def standard_cell_by_moyo(crystal: Crystal, symprec_angstrom: float) -> StandardCell:
    """Return the conventional cell that moyo finds, origin and axes near the given ones as spglib has them.

    Raises:
        EncodeError: If moyo finds no space group, or the crystal lies between two; see also `ordered_cell`.
    """
    lattice, positions, elements = ordered_cell(crystal)
    cell = moyopy.Cell(lattice.tolist(), positions.tolist(), [Element(e).Z for e in elements])
    try:
        check_apart(closest_angstrom(Lattice(lattice), positions), symprec_angstrom)
        found = _moyo_dataset(cell, symprec_angstrom)
    except (ValueError, RuntimeError, EncodeError) as error:
        raise _no_space_group(crystal.id, symprec_angstrom, error) from error
    to_conventional = np.array(found.prim_std_cell.basis) @ np.linalg.inv(np.array(found.std_cell.basis))
    refined = np.array(found.prim_std_cell.positions) @ to_conventional
    first = sorted(set(found.orbits))

    linear = np.linalg.inv(np.array(found.std_linear))
    rotation, shift = _nearest_frame(found.number, linear, -linear @ np.array(found.std_origin_shift))
    return _standard_cell(
        crystal.id,
        found.number,
        np.linalg.inv(rotation @ linear).T @ lattice,
        [elements[i] for i in first],
        refined[[found.mapping_std_prim[i] for i in first]] @ rotation.T + shift,
        found.std_cell.num_atoms,
    )


def _moyo_dataset(cell: moyopy.Cell, symprec_angstrom: float) -> moyopy.MoyoDataset:
    """Return moyo's dataset at this tolerance, or at a tenth of it where the full one merges unlike cells."""
    setting = moyopy.Setting.spglib()
    found = moyopy.MoyoDataset(cell, symprec=symprec_angstrom, setting=setting)
    if found.prim_std_cell.num_atoms < cell.num_atoms:
        strict = moyopy.MoyoDataset(cell, symprec=symprec_angstrom / 10, setting=setting)
        # moyo takes a translation that fits within symprec for one of the lattice, spglib is stricter
        return strict if strict.prim_std_cell.num_atoms > found.prim_std_cell.num_atoms else found
    return found


def standard_cell_by_spglib(crystal: Crystal, symprec_angstrom: float) -> StandardCell:
    """Return the conventional cell that spglib finds, asked as CifWriter asks it (angle tolerance 5 degrees).

    Raises:
        EncodeError: As `standard_cell_by_moyo`.
    """
    import spglib

    lattice, positions, elements = ordered_cell(crystal)
    cell: Any = (lattice, positions, [Element(e).Z for e in elements])  # arrays do; the stub says sequences
    try:
        with quietly():
            found = spglib.get_symmetry_dataset(cell, symprec=symprec_angstrom, angle_tolerance=5)
    except spglib.SpglibError as error:  # spglib raises, or returns None, by its OLD_ERROR_HANDLING
        raise _no_space_group(crystal.id, symprec_angstrom, error) from error
    if found is None:
        raise _no_space_group(crystal.id, symprec_angstrom, "spglib")
    first = np.unique(found.crystallographic_orbits)
    in_standard = [list(found.std_mapping_to_primitive).index(found.mapping_to_primitive[i]) for i in first]
    return _standard_cell(
        crystal.id,
        int(found.number),
        found.std_lattice,
        [elements[i] for i in first],
        found.std_positions[in_standard],
        len(found.std_types),
    )


@contextmanager
def quietly() -> Iterator[None]:
    """Keep back two notices: spglib's that it will raise one day, and pymatgen's for He, Ne and Ar."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Set OLD_ERROR_HANDLING", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="No Pauling electronegativity", category=UserWarning)
        yield


def _no_space_group(crystal_id: str, symprec_angstrom: float, why: object) -> EncodeError:
    return EncodeError(f"{crystal_id}: no space group found within {symprec_angstrom} angstrom ({why}).")


def _standard_cell(
    crystal_id: str, number: int, lattice: Floats, elements: list[str], positions: Floats, n_sites: int
) -> StandardCell:
    """Return the cell that is printed.

    Args:
        crystal_id: For messages.
        number: Space group.
        lattice: (3, 3) rows of the conventional cell in angstrom, ideal within the tolerance.
        elements: K, one per orbit.
        positions: (K, 3) one atom per orbit, fractional, exactly symmetric.
        n_sites: Atoms in the conventional cell.
    """
    chosen, multiplicities = _printed_atoms(positions, *spacegroup_operations(number))
    if multiplicities.sum() != n_sites:
        raise EncodeError(
            f"{crystal_id}: the orbits of space group {number} hold {multiplicities.sum()} atoms, the cell "
            f"{n_sites}: the crystal lies between two symmetries. Set symprec_angstrom lower."
        )
    sites = tuple(
        StandardSite(element, m, (x, y, z))
        for element, m, (x, y, z) in zip(elements, multiplicities.tolist(), chosen.tolist(), strict=True)
    )
    parameters = _ideal_parameters(number, lattice)
    return StandardCell(number, parameters, _volume(parameters), sites)


def _printed_atoms(
    positions: Floats, rotations: Floats, translations: Floats
) -> tuple[Floats, NDArray[np.int64]]:
    """Return for each orbit its atom with the smallest coordinates (K, 3), and its number of atoms (K).

    Args:
        positions: (K, 3), one atom per orbit, exact within 1e-4 of the cell.
        rotations: (O, 3, 3) operations of the conventional cell, centring included.
        translations: (O, 3)
    """
    images = np.einsum("oij,kj->koi", rotations, positions) + translations
    shifts = images - positions[:, None]
    stays = np.abs(shifts - np.rint(shifts)).max(axis=2) < 1e-4
    steps = np.rint(images * 1e6).astype(np.int64) % 1_000_000
    smallest = np.argmin((steps[..., 0] * 1_000_000 + steps[..., 1]) * 1_000_000 + steps[..., 2], axis=1)
    each = np.arange(len(positions))
    chosen = np.where(steps[each, smallest] == 0, 0.0, images[each, smallest] % 1.0)
    return chosen, len(rotations) // stays.sum(axis=1)


def _ideal_parameters(number: int, lattice: Floats) -> tuple[float, ...]:
    """Return a, b, c (angstrom), alpha, beta, gamma (degrees) of lattice rows, averaged as spglib does."""
    a, b, c = lengths = [float(x) for x in np.linalg.norm(lattice, axis=1)]
    cosines = [lattice[i] @ lattice[j] / (lengths[i] * lengths[j]) for i, j in ((1, 2), (0, 2), (0, 1))]
    alpha, beta, gamma = (math.degrees(math.acos(max(-1.0, min(1.0, x)))) for x in cosines)
    system = crystal_system(number)
    if system == "triclinic":
        return a, b, c, alpha, beta, gamma
    if system == "monoclinic":
        return a, b, c, 90.0, beta, 90.0
    if system == "orthorhombic":
        return a, b, c, 90.0, 90.0, 90.0
    if system == "cubic":
        return ((a + b + c) / 3,) * 3 + (90.0, 90.0, 90.0)
    return (a + b) / 2, (a + b) / 2, c, 90.0, 90.0, 90.0 if system == "tetragonal" else 120.0


def _volume(parameters: Sequence[float]) -> float:
    a, b, c = (math.cos(math.radians(angle)) for angle in parameters[3:])
    return math.prod(parameters[:3]) * math.sqrt(1 - a * a - b * b - c * c + 2 * a * b * c)


def _nearest_frame(number: int, linear: Floats, shift: Floats) -> tuple[Floats, Floats]:
    """Return rotation (3, 3) and shift (3,) from moyo's standard frame to the one spglib would take.

    Of the frames that describe the group alike: the one whose origin is nearest to the given cell's, then
    the one whose axes lie most along the given axes (largest sum of the transformation's entries). Two
    exceptions, found by comparison: monoclinic axes stay as moyo has them, and in C-centred orthorhombic
    groups b, then c, decide.

    Share of crystals for which moyo's and spglib's texts are then the same (before): primitive cells given,
    400 of mp_val, on which the rules were found, 84 % (67), mp_train 76 (65), wbm_train 61 (53), perov_5 88
    (40); conventional cells given, 93 to 99 %.

    Args:
        number: Space group.
        linear, shift: x_standard = linear @ x_given + shift, by moyo.
    """
    rotations, shifts = _frames(number)
    linears = rotations @ linear
    origins = rotations @ shift + shifts
    origins = np.abs(origins - np.rint(origins)).sum(axis=1)
    axes = linears.sum(axis=2)  # row i: how far axis i is a positive combination of the given ones
    changed = np.abs(rotations - np.eye(3)).max(axis=(1, 2))
    order: tuple[Floats, ...]  # the last decides first
    if crystal_system(number) == "monoclinic":
        order = (origins, changed)
    elif spacegroup_symbols()[number].startswith("C"):
        order = (changed, origins, -axes[:, 2], -axes[:, 1])
    else:
        order = (changed, -axes.sum(axis=1), origins)
    best = np.lexsort(tuple(np.round(key, 2) for key in order))[0]
    return rotations[best], shifts[best]


@cache
def _frames(number: int) -> tuple[Floats, Floats]:
    """Return rotations (F, 3, 3) and shifts (F, 3): the proper Euclidean normalizer in CrystaLLM's setting.

    (R, s) is in it if x -> R x + s maps the group's operations onto themselves; axes keep their lengths, and
    shifts along which the origin is free (polar axes) are left out. The identity is the first.
    """
    rotations, translations = spacegroup_operations(number)
    system = crystal_system(number)
    thirds = ((0.0, 0.0), (1 / 3, 2 / 3), (2 / 3, 1 / 3))
    if system in ("trigonal", "hexagonal"):
        grid = np.array([(x, y, z / 12) for x, y in thirds for z in range(12)])
    else:
        n = 8 if system == "cubic" else 4
        grid = np.array(list(itertools.product(np.arange(n) / n, repeat=3)))
    free = np.abs(np.diagonal(rotations.mean(axis=0))) > 1e-6
    grid = grid[(grid[:, free] == 0).all(axis=1)]

    centring = translations[np.abs(rotations - np.eye(3)).max(axis=(1, 2)) < 0.5]
    point_group, first = np.unique(rotations.reshape(-1, 9), axis=0, return_index=True)
    rotations, translations = rotations[first], translations[first]
    found: list[tuple[Floats, Floats]] = []
    for turn in _lattice_rotations(system):
        turned = turn @ rotations @ np.linalg.inv(turn)
        same = (np.abs(turned.reshape(-1, 1, 9) - point_group) < 0.1).all(axis=2)
        if not np.all(np.any(same, axis=1)) or not np.all(_among(centring @ turn.T, centring)):
            continue
        shifts = grid
        for rotation, moved, partner in zip(turned, translations @ turn.T, same.argmax(axis=1), strict=True):
            rest = moved + shifts - shifts @ rotation.T - translations[partner]
            shifts = shifts[_among(rest, centring)]
        found += [(turn, shift) for shift in shifts]
    found.sort(key=lambda frame: float(np.abs(frame[0] - np.eye(3)).sum() + np.abs(frame[1]).sum()))
    return np.array([turn for turn, _ in found]), np.array([shift for _, shift in found])


def _among(vectors: Floats, centring: Floats) -> NDArray[np.bool_]:
    """Return for each vector (K, 3) whether it is a translation of the lattice."""
    rest = vectors[:, None] - centring
    among: NDArray[np.bool_] = (np.abs(rest - np.rint(rest)).max(axis=2) < 1e-4).any(axis=1)
    return among


def _lattice_rotations(system: str) -> list[Floats]:
    """Return the proper rotations of a crystal system's lattice, in the conventional cell's axes."""
    holohedry = {
        "monoclinic": 3,
        "orthorhombic": 16,
        "tetragonal": 89,
        "trigonal": 177,
        "hexagonal": 177,
        "cubic": 207,
    }
    if system == "triclinic":
        return [np.eye(3)]
    return list(spacegroup_operations(holohedry[system])[0])
