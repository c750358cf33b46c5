"""Space groups, Wyckoff sites, and a crystal as its symmetry-distinct content.

`SymmetricCrystal` is a crystal reduced to what symmetry leaves free: the space group, the free lattice parameters
and, for each orbit, the element, the Wyckoff letter and the free coordinates of one representative. Rock salt is

    SymmetricCrystal(spacegroup_number=225, lattice=(5.64,), sites=((Na, "a", ()), (Cl, "b", ())))

Setting: the standard one of the International Tables for Crystallography, Vol. A (unique axis b and cell choice 1,
hexagonal axes for rhombohedral groups, origin choice 2), as moyo's `Setting.standard()`. Letters and representative
coordinates stand in wyckoff_positions.json ("8f 1/4,y,1/4": 8 atoms in the conventional cell); every entry's orbit
under moyo's operations has the stated size, which a test checks.

One crystal has many such descriptions: every coset of the Euclidean normalizer of its group shifts the origin or
relabels the axes and gives another one. `descriptions` lists them, `canonical` picks one, always the same.
Handedness is kept: only proper rotations are used (a group with improper operations loses nothing by that).

Traps: moyo wants `angle_tolerance` in radians, spglib in degrees; moyo's dataset letters belong to the input cell's
sites; the standardized cell is refined to the detected symmetry, so special positions are exact.

Not here: the text of a crystal (text/wyckoff.py); which letters a composition allows (tokens/masking.py).
Sources: ITA Vol. A (2016) 1.5 (normalizers) and 2.1.3 (Wyckoff positions); Shinohara, moyo (spglib.github.io/moyo).
"""

import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from importlib import resources
from typing import Any

import numpy as np
import numpy.typing as npt
from pymatgen.core import Lattice, Structure

from crystallm_kit.errors import EncodeError, ParseError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

LETTERS = "abcdefghijklmnopqrstuvwxyzA"
COORDINATE_STEPS = 10_000  # free coordinates are compared on a grid of 1e-4
SYMPREC_ANGSTROM = 0.1  # the tolerance at which MP-20 and CrystaLLM state space groups

# Columns: primitive basis vectors in conventional coordinates, so x_conventional = matrix @ x_primitive.
_PRIMITIVE_BASES = {
    "P": np.eye(3),
    "A": np.array([[1, 0, 0], [0, 0.5, 0.5], [0, -0.5, 0.5]]),
    "C": np.array([[0.5, 0.5, 0], [-0.5, 0.5, 0], [0, 0, 1]]),
    "I": np.array([[-0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.5, 0.5, -0.5]]),
    "F": np.array([[0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]]),
    "R": np.array([[2, -1, -1], [1, 1, -2], [1, 1, 1]]) / 3,  # obverse setting
}


def crystal_system(spacegroup_number: int) -> str:
    """Return the crystal system of a space group: triclinic ... cubic (trigonal: 143-167)."""
    for last, name in ((2, "triclinic"), (15, "monoclinic"), (74, "orthorhombic"), (142, "tetragonal"),
                       (167, "trigonal"), (194, "hexagonal"), (230, "cubic")):  # fmt: skip
        if spacegroup_number <= last:
            return name
    raise ValueError(f"space group {spacegroup_number}: 1-230 expected")


# Free lattice parameters, as indices into (a, b, c, alpha, beta, gamma). Trigonal groups have hexagonal axes.
FREE_LATTICE: dict[str, tuple[int, ...]] = {
    "triclinic": (0, 1, 2, 3, 4, 5),
    "monoclinic": (0, 1, 2, 4),
    "orthorhombic": (0, 1, 2),
    "tetragonal": (0, 2),
    "trigonal": (0, 2),
    "hexagonal": (0, 2),
    "cubic": (0,),
}


@dataclass(frozen=True, eq=False)
class WyckoffPosition:
    """One Wyckoff position: x = form_matrix @ p + form_offset for free coordinates p in [0, 1).

    Attributes:
        letter: Wyckoff letter.
        multiplicity: Atoms in the conventional cell.
        primitive_multiplicity: Atoms in the primitive cell.
        n_free: Free coordinates, 0-3.
        form_matrix: (3, n_free), conventional fractional coordinates of the representative.
        form_offset: (3,).
        solve_axis, solve_sign: (n_free,): coordinate that gives each free one, and its sign in the form.
        orbit_matrix: (primitive_multiplicity, 3, n_free), primitive fractional coordinates of all its atoms.
        orbit_offset: (primitive_multiplicity, 3).
    """

    letter: str
    multiplicity: int
    primitive_multiplicity: int
    n_free: int
    form_matrix: FloatArray
    form_offset: FloatArray
    solve_axis: IntArray
    solve_sign: FloatArray
    orbit_matrix: FloatArray
    orbit_offset: FloatArray


@dataclass(frozen=True)
class Site:
    """One orbit: atomic number, Wyckoff letter, free coordinates of its representative on the 1e-4 grid."""

    atomic_number: int
    letter: str
    free: tuple[float, ...]


@dataclass(frozen=True)
class SymmetricCrystal:
    """A crystal as its space group, free lattice parameters (angstrom, degree) and symmetry-distinct sites."""

    spacegroup_number: int
    lattice: tuple[float, ...]
    sites: tuple[Site, ...]

    @property
    def counts(self) -> dict[int, int]:
        """Atoms of each atomic number in the primitive cell, in the order of the sites."""
        group = space_group(self.spacegroup_number)
        counts: dict[int, int] = {}
        for site in self.sites:
            counts[site.atomic_number] = (
                counts.get(site.atomic_number, 0) + group[site.letter].primitive_multiplicity
            )
        return counts


class SpaceGroup:
    """A space group in its standard setting, with its Wyckoff positions and normalizer. Get one by `space_group`."""

    def __init__(self, number: int) -> None:
        from moyopy import Setting, SpaceGroupType, operations_from_number

        self.number = number
        self.crystal_system = crystal_system(number)
        self.symbol: str = SpaceGroupType(number).hm_short
        operations = operations_from_number(number, setting=Setting.standard())
        self.rotations: IntArray = np.array(operations.rotations, dtype=np.int64)  # (G, 3, 3)
        self.translations: FloatArray = np.array(operations.translations) % 1.0  # (G, 3)
        self.primitive_basis: FloatArray = _PRIMITIVE_BASES[self.symbol.strip()[0]]
        self.n_centering: int = round(1 / float(np.linalg.det(self.primitive_basis)))
        self.positions: tuple[WyckoffPosition, ...] = tuple(
            self._position(entry) for entry in _wyckoff_table()[str(number)]
        )
        self._by_letter = {p.letter: p for p in self.positions}

    def __getitem__(self, letter: str) -> WyckoffPosition:
        """Return the Wyckoff position with this letter; KeyError if the group has none."""
        return self._by_letter[letter]

    def __contains__(self, letter: str) -> bool:
        """Tell whether the group has this letter."""
        return letter in self._by_letter

    @property
    def free_lattice(self) -> tuple[int, ...]:
        """Indices into (a, b, c, alpha, beta, gamma) of the lattice parameters that symmetry leaves free."""
        return FREE_LATTICE[self.crystal_system]

    @cached_property
    def polar_axes(self) -> npt.NDArray[np.bool_]:
        """(3,): True along axes on which the origin is free. In the standard settings these are cell axes."""
        axes = np.eye(3)
        return np.array([bool((self.rotations @ axis == axis).all()) for axis in axes])

    @cached_property
    def normalizer(self) -> list[tuple[IntArray, FloatArray, str]]:
        """Cosets of the proper Euclidean normalizer: (linear (3, 3), shift (3,), letters).

        `letters[i]` is what the group's i-th letter becomes. Free (polar) shifts are left out; the first is the
        identity. Axis relabellings that hold for a group's type are in it whatever the crystal's metric.
        """
        return list(self._normalizer_cosets())

    def lattice_parameters(self, free: Sequence[float]) -> tuple[float, float, float, float, float, float]:
        """Return (a, b, c, alpha, beta, gamma) of the conventional cell from its free parameters."""
        system, f = self.crystal_system, list(free)
        if system == "cubic":
            return f[0], f[0], f[0], 90.0, 90.0, 90.0
        if system == "tetragonal":
            return f[0], f[0], f[1], 90.0, 90.0, 90.0
        if system in ("hexagonal", "trigonal"):
            return f[0], f[0], f[1], 90.0, 90.0, 120.0
        if system == "orthorhombic":
            return f[0], f[1], f[2], 90.0, 90.0, 90.0
        if system == "monoclinic":
            return f[0], f[1], f[2], 90.0, f[3], 90.0
        return f[0], f[1], f[2], f[3], f[4], f[5]

    def _position(self, entry: str) -> WyckoffPosition:
        label, _, form = entry.partition(" ")
        matrix, offset = _parse_form(form)
        used = [axis for axis in range(3) if matrix[:, axis].any()]
        form_matrix = matrix[:, used]
        solve_axis, solve_sign = [], []
        for column in form_matrix.T:
            axis = next(i for i in range(3) if abs(column[i]) == 1 and np.count_nonzero(form_matrix[i]) == 1)
            solve_axis.append(axis)
            solve_sign.append(column[axis])
        to_primitive = np.linalg.inv(self.primitive_basis)
        orbit_matrix, orbit_offset = [], []
        seen: list[FloatArray] = []
        generic = np.array([0.1234, 0.2781, 0.4117])[: len(used)]
        for rotation, translation in zip(self.rotations, self.translations, strict=True):
            matrix_g = to_primitive @ rotation @ form_matrix
            offset_g = to_primitive @ (rotation @ offset + translation)
            point = (matrix_g @ generic + offset_g) % 1.0
            if any(np.abs((point - other + 0.5) % 1.0 - 0.5).max() < 1e-6 for other in seen):
                continue
            seen.append(point)
            orbit_matrix.append(matrix_g)
            orbit_offset.append(offset_g % 1.0)
        return WyckoffPosition(
            letter=label[-1],
            multiplicity=int(label[:-1]),
            primitive_multiplicity=len(seen),
            n_free=len(used),
            form_matrix=form_matrix,
            form_offset=offset,
            solve_axis=np.array(solve_axis, dtype=np.int64),
            solve_sign=np.array(solve_sign, dtype=np.float64),
            orbit_matrix=np.array(orbit_matrix).reshape(len(seen), 3, len(used)),
            orbit_offset=np.array(orbit_offset),
        )

    @cached_property
    def padded_forms(self) -> tuple[FloatArray, FloatArray, IntArray, FloatArray, IntArray]:
        """All forms padded to three free coordinates, for array work over letters.

        Returns:
            form_matrix (L, 3, 3), form_offset (L, 3), solve_axis (L, 3), solve_sign (L, 3), n_free (L,)
        """
        n = len(self.positions)
        matrix, offset = np.zeros((n, 3, 3)), np.zeros((n, 3))
        axis, sign = np.zeros((n, 3), dtype=np.int64), np.ones((n, 3))
        for i, p in enumerate(self.positions):
            matrix[i, :, : p.n_free], offset[i] = p.form_matrix, p.form_offset
            axis[i, : p.n_free], sign[i, : p.n_free] = p.solve_axis, p.solve_sign
        return matrix, offset, axis, sign, np.array([p.n_free for p in self.positions])

    def free_coordinates(
        self, points: FloatArray, letter_index: IntArray, tolerance: float = 2e-3
    ) -> tuple[IntArray, npt.NDArray[np.bool_]]:
        """Solve x = form(p) for the free coordinates p, on the 1e-4 grid.

        Args:
            points: (..., 3) conventional fractional coordinates.
            letter_index: (...) index of the letter whose representative form is asked for.
            tolerance: Largest deviation (fractional) from the form that counts as on it.

        Returns:
            free (..., 3) integers in [0, 10000), zero where there is no such free coordinate; fits (...).
        """
        matrix, offset, axis, sign, n_free = (a[letter_index] for a in self.padded_forms)
        value = np.take_along_axis(points - offset, axis, axis=-1) * sign
        free = np.rint(value * COORDINATE_STEPS).astype(np.int64) % COORDINATE_STEPS
        free = np.where(np.arange(3) < n_free[..., None], free, 0)
        value = np.where(np.arange(3) < n_free[..., None], value, 0.0)
        residual = points - offset - np.einsum("...ij,...j->...i", matrix, value)
        return free, np.abs((residual + 0.5) % 1.0 - 0.5).max(-1) < tolerance

    def _normalizer_cosets(self) -> Iterator[tuple[IntArray, FloatArray, str]]:
        linear_parts = _proper_linear_parts(self.crystal_system)
        step = 12 if self.crystal_system in ("trigonal", "hexagonal") else 8
        # Origins at eighths (twelfths on hexagonal axes) hold every discrete normalizer shift of ITA table 3.5.2.
        axes = [[0.0] if polar else [i / step for i in range(step)] for polar in self.polar_axes]
        grid = np.array(list(itertools.product(*axes)))  # (S, 3)
        generators = _generators(self.rotations, self.translations)
        by_rotation: dict[bytes, FloatArray] = {}
        for rotation in np.unique(self.rotations, axis=0):
            same = (self.rotations == rotation).all((1, 2))
            by_rotation[rotation.tobytes()] = self.translations[same]
        centering = by_rotation[np.eye(3, dtype=np.int64).tobytes()]
        found: list[tuple[IntArray, FloatArray]] = []
        for linear in linear_parts:
            inverse = np.rint(np.linalg.inv(linear)).astype(np.int64)
            fits = np.ones(len(grid), dtype=bool)
            for index in generators:
                image = linear @ self.rotations[index] @ inverse
                allowed = by_rotation.get(np.ascontiguousarray(image).tobytes())
                if allowed is None:
                    fits[:] = False
                    break
                shift = linear @ self.translations[index] + grid - grid @ image.T  # (S, 3)
                difference = shift[:, None, :] - allowed[None, :, :]
                # Along polar axes any shift is allowed later, so only the other axes must agree there.
                off = np.abs((difference + 0.5) % 1.0 - 0.5)
                fits &= (off.max(-1) < 1e-6).any(1)
            if fits.any() and _maps_lattice(linear, centering):
                found += [(linear, origin) for origin in grid[fits]]
        yield from self._distinct_cosets(found)

    def _distinct_cosets(
        self, found: list[tuple[IntArray, FloatArray]]
    ) -> Iterator[tuple[IntArray, FloatArray, str]]:
        """Drop elements that differ by an operation of the group (polar shifts ignored)."""
        free_axes = ~self.polar_axes
        seen: set[bytes] = set()
        found.sort(key=lambda f: (not (f[0] == np.eye(3)).all(), not (f[0] >= 0).all(), tuple(f[1])))
        for linear, shift in found:
            key = np.rint(((shift % 1.0) * 24) * free_axes).astype(np.int64) % 24
            if (linear.tobytes() + key.tobytes()) in seen:
                continue
            for rotation, translation in zip(self.rotations, self.translations, strict=True):
                moved = (
                    np.rint(((rotation @ shift + translation) % 1.0) * 24 * free_axes).astype(np.int64) % 24
                )
                seen.add((rotation @ linear).tobytes() + moved.tobytes())
            yield linear, shift, self._letters_after(linear, shift)

    def _letters_after(self, linear: IntArray, shift: FloatArray) -> str:
        generic = np.array([0.1234, 0.2781, 0.4117])
        result = []
        for position in self.positions:
            point = (
                linear @ (position.form_matrix @ generic[: position.n_free] + position.form_offset) + shift
            )
            orbit = self.rotations @ point + self.translations
            for other_index, other in enumerate(self.positions):
                if other.multiplicity != position.multiplicity or other.n_free != position.n_free:
                    continue
                _, fits = self.free_coordinates(orbit, np.full(len(orbit), other_index), tolerance=1e-6)
                if fits.any():
                    result.append(other.letter)
                    break
            else:
                raise AssertionError(f"space group {self.number}: no image of letter {position.letter}")
        return "".join(result)


@lru_cache(maxsize=230)
def space_group(number: int) -> SpaceGroup:
    """Return the space group with this number (1-230), built once."""
    return SpaceGroup(number)


@lru_cache(maxsize=1)
def _wyckoff_table() -> dict[str, list[str]]:
    text = resources.files("crystallm_kit.structures").joinpath("wyckoff_positions.json").read_text()
    table: dict[str, list[str]] = json.loads(text)
    return table


def _parse_form(form: str) -> tuple[FloatArray, FloatArray]:
    """Return (matrix (3, 3) over x y z, offset (3,)) of a form such as "x,2x,1/4"."""
    matrix, offset = np.zeros((3, 3)), np.zeros(3)
    for axis, part in enumerate(form.split(",")):
        for sign, factor, variable, constant in re.findall(r"([+-]?)(\d*)([xyz])|([+-]?\d+(?:/\d+)?)", part):
            if variable:
                matrix[axis, "xyz".index(variable)] += (-1 if sign == "-" else 1) * int(factor or 1)
            else:
                offset[axis] += float(Fraction(constant))
    return matrix, offset


@lru_cache(maxsize=7)
def _proper_linear_parts(system: str) -> list[IntArray]:
    """Rotations that may relabel the axes of a crystal system: those of its lattice's holohedry and, for
    orthorhombic and monoclinic cells, permutations of axes that play the same role."""
    from moyopy import Setting, operations_from_number

    if system == "triclinic":  # moyo's reduced cell fixes the axes
        return [np.eye(3, dtype=np.int64)]
    number = 191 if system in ("trigonal", "hexagonal") else 221
    rotations = np.array(operations_from_number(number, setting=Setting.standard()).rotations, dtype=np.int64)
    return [r for r in rotations if round(np.linalg.det(r)) == 1]


def _generators(rotations: IntArray, translations: FloatArray) -> list[int]:
    """Return indices of operations that generate the point group, greedily, and of the centering translations."""
    size = len({r.tobytes() for r in rotations})
    group = {np.eye(3, dtype=np.int64).tobytes()}
    chosen: list[int] = [
        i for i, r in enumerate(rotations) if (r == np.eye(3)).all() and np.abs(translations[i]).max() > 1e-6
    ]
    matrices: list[IntArray] = []
    for index, rotation in enumerate(rotations):
        if len(group) == size:
            break
        if rotation.tobytes() in group:
            continue
        chosen.append(index)
        matrices.append(rotation)
        frontier = [np.frombuffer(g, dtype=np.int64).reshape(3, 3) for g in group]
        while frontier:
            grown = [m @ g for g in frontier for m in matrices]
            frontier = []
            for matrix in grown:
                if matrix.tobytes() not in group:
                    group.add(matrix.tobytes())
                    frontier.append(matrix)
    return chosen


def _maps_lattice(linear: IntArray, centering: FloatArray) -> bool:
    """Tell whether the linear part maps the centering vectors onto themselves."""
    moved = (centering @ linear.T)[:, None, :] - centering[None, :, :]
    return bool((np.abs((moved + 0.5) % 1.0 - 0.5).max(-1) < 1e-6).any(1).all())


def dataset(structure: Structure, symprec_angstrom: float = SYMPREC_ANGSTROM) -> Any:
    """Return moyo's MoyoDataset of a structure, in the standard setting.

    Raises:
        EncodeError: If moyo finds no symmetry, for example in a collapsed cell.
    """
    from moyopy import Cell, MoyoDataset, Setting

    cell = Cell(
        structure.lattice.matrix.tolist(),
        structure.frac_coords.tolist(),
        [int(z) for z in structure.atomic_numbers],
    )
    try:
        return MoyoDataset(cell, symprec=symprec_angstrom, setting=Setting.standard())
    except (ValueError, RuntimeError) as error:
        raise EncodeError(f"no symmetry found at {symprec_angstrom} angstrom: {error}") from error


def spacegroup_number(structure: Structure, symprec_angstrom: float = SYMPREC_ANGSTROM) -> int:
    """Return the space group number of a structure at a distance tolerance in angstrom. Raises EncodeError."""
    return int(dataset(structure, symprec_angstrom).number)


def symmetric_crystal(
    structure: Structure, symprec_angstrom: float = SYMPREC_ANGSTROM, max_merge_angstrom: float = math.inf
) -> SymmetricCrystal:
    """Return a structure's symmetry-distinct content, in the description that moyo happens to give.

    Args:
        structure: Any cell of the crystal.
        symprec_angstrom: Tolerance of the symmetry search.
        max_merge_angstrom: Largest shift of an atom at which a pseudo-translation may still shrink the cell.

    Raises:
        EncodeError: If no symmetry is found, or the found one merges cells that differ by more than allowed.
    """
    found = dataset(structure, symprec_angstrom)
    if (
        len(found.prim_std_cell.positions) < len(structure)
        and _largest_shift(structure, found) > max_merge_angstrom
    ):
        raise EncodeError(f"at {symprec_angstrom} angstrom the symmetry search merges cells that differ")
    group = space_group(int(found.number))
    primitive, standard = found.prim_std_cell, found.std_cell
    to_standard = np.array(primitive.basis) @ np.linalg.inv(np.array(standard.basis))
    points = np.array(primitive.positions) @ to_standard  # conventional fractional coordinates
    lattice = Lattice(standard.basis)
    full = (*lattice.abc, *lattice.angles)
    sites = []
    for index in sorted(set(found.orbits)):
        letter = found.wyckoffs[index]
        image = found.mapping_std_prim[index]
        free = _representative(group, points[image], letter)
        sites.append(Site(int(primitive.numbers[image]), letter, free))
    crystal = SymmetricCrystal(group.number, tuple(float(full[i]) for i in group.free_lattice), tuple(sites))
    if sum(crystal.counts.values()) != len(primitive.positions):
        raise EncodeError(
            f"space group {group.number}: orbits hold {sum(crystal.counts.values())} atoms, "
            f"the primitive cell {len(primitive.positions)}"
        )
    return crystal


def _largest_shift(structure: Structure, found: Any) -> float:
    """Return how far (angstrom) symmetrization moves an atom of the input structure."""
    linear = np.linalg.inv(np.array(found.prim_std_linear)).T
    moved = (structure.frac_coords - np.array(found.prim_std_origin_shift)) @ linear
    off = moved - np.array(found.prim_std_cell.positions)[found.mapping_std_prim]
    shift = ((off + 0.5) % 1.0 - 0.5) @ np.array(found.prim_std_cell.basis)
    return float(np.linalg.norm(shift, axis=1).max())


def _representative(group: SpaceGroup, point: FloatArray, letter: str) -> tuple[float, ...]:
    """Return the free coordinates (grid of 1e-4, lexicographically smallest) of the orbit of a point."""
    position = group[letter]
    if not position.n_free:
        return ()
    orbit = group.rotations @ point + group.translations
    free, fits = group.free_coordinates(orbit, np.full(len(orbit), LETTERS.index(letter)))
    if not fits.any():
        raise EncodeError(f"space group {group.number}: {point} is on no representative of letter {letter}")
    best = min(tuple(int(v) for v in row) for row in free[fits])
    return tuple(v / COORDINATE_STEPS for v in best[: position.n_free])


def descriptions(crystal: SymmetricCrystal, element_order: Sequence[int]) -> list[SymmetricCrystal]:
    """Return every description of a crystal that the Euclidean normalizer of its group gives, the canonical one first.

    Sites are ordered by `element_order` (atomic numbers), then letter, then free coordinates. In polar groups the
    origin is put on each candidate anchor in turn: the sites of the first element with its first letter. Canonical is
    the smallest by (elements and letters of all sites, then free coordinates of all sites): a prototype is written
    with the same letters whatever its elements and its metric.
    """
    group = space_group(crystal.spacegroup_number)
    rank = {z: i for i, z in enumerate(element_order)}
    ranks = np.array([rank[s.atomic_number] for s in crystal.sites])
    points = np.array([group[s.letter].form_matrix @ np.array(s.free) + group[s.letter].form_offset
                       for s in crystal.sites])  # fmt: skip
    keyed: dict[bytes, tuple[tuple[int, ...], SymmetricCrystal]] = {}
    full = group.lattice_parameters(crystal.lattice)
    basis = np.array(Lattice.from_parameters(*full).matrix)
    for linear, shift, letters_after in group.normalizer:
        letters = np.array([LETTERS.index(letters_after[LETTERS.index(s.letter)]) for s in crystal.sites])
        moved = points @ linear.T + shift  # (N, 3)
        origins = _polar_origins(group, moved, ranks, letters)  # (V, 3)
        orbit = (
            np.einsum("gij,vnj->vngi", group.rotations, moved[None] - origins[:, None]) + group.translations
        )  # (V, N, G, 3)
        index = np.broadcast_to(letters[None, :, None], orbit.shape[:3])
        free, fits = group.free_coordinates(orbit, index)
        code = (free[..., 0] * COORDINATE_STEPS + free[..., 1]) * COORDINATE_STEPS + free[..., 2]
        code = np.where(fits, code, np.iinfo(np.int64).max).min(-1)  # (V, N)
        if (code == np.iinfo(np.int64).max).any():
            raise EncodeError(
                f"space group {group.number}: a site leaves its Wyckoff position under the normalizer"
            )
        order = np.lexsort(
            (code, np.broadcast_to(letters, code.shape), np.broadcast_to(ranks, code.shape)), axis=-1
        )
        for o, c in zip(order, code, strict=True):
            skeleton = [int(ranks[i]) * 32 + int(letters[i]) for i in o]
            key = (*skeleton, *(int(c[i]) for i in o))
            lattice = _relabelled(basis, linear, full)
            free_lattice = tuple(float(lattice[i]) for i in group.free_lattice)
            name = repr((key, [round(v, 3) for v in free_lattice])).encode()
            if name in keyed:
                continue
            sites = tuple(
                Site(
                    crystal.sites[i].atomic_number,
                    LETTERS[letters[i]],
                    _decode_code(int(c[i]), group, int(letters[i])),
                )
                for i in o
            )
            keyed[name] = ((*key, *(round(v * 1000) for v in free_lattice)),
                           SymmetricCrystal(crystal.spacegroup_number, free_lattice, sites))  # fmt: skip
    return [found for _, found in sorted(keyed.values(), key=lambda pair: pair[0])]


def _relabelled(basis: FloatArray, linear: IntArray, full: Sequence[float]) -> Sequence[float]:
    """Return (a ... gamma) after relabelling axes so that x' = linear @ x."""
    if (linear == np.eye(3)).all():
        return full
    lattice = Lattice(np.linalg.inv(linear).T @ basis)
    return (*lattice.abc, *lattice.angles)


def _polar_origins(group: SpaceGroup, points: FloatArray, ranks: IntArray, letters: IntArray) -> FloatArray:
    """Return (V, 3) origins along the polar axes, each putting one candidate anchor atom at zero there."""
    polar = group.polar_axes
    if not polar.any():
        return np.zeros((1, 3))
    first = np.flatnonzero(ranks == ranks.min())
    anchors = first[letters[first] == letters[first].min()]
    atoms = (np.einsum("gij,nj->ngi", group.rotations, points[anchors]) + group.translations).reshape(-1, 3)
    origins = np.where(polar, atoms % 1.0, 0.0)
    _, keep = np.unique(np.rint(origins * COORDINATE_STEPS).astype(np.int64) % COORDINATE_STEPS, axis=0,
                        return_index=True)  # fmt: skip
    return origins[keep]


def _decode_code(code: int, group: SpaceGroup, letter_index: int) -> tuple[float, ...]:
    values = (
        code // COORDINATE_STEPS**2,
        code // COORDINATE_STEPS % COORDINATE_STEPS,
        code % COORDINATE_STEPS,
    )
    return tuple(v / COORDINATE_STEPS for v in values[: group.positions[letter_index].n_free])


def expand(crystal: SymmetricCrystal) -> Structure:
    """Return the primitive cell of a symmetric crystal, its sites orbit by orbit.

    Raises:
        ParseError: If the lattice parameters do not span a cell.
    """
    from pymatgen.core import Element

    group = space_group(crystal.spacegroup_number)
    full = group.lattice_parameters(crystal.lattice)
    lattice = cell_lattice(full)
    species: list[Any] = []
    points = []
    for site in crystal.sites:
        position = group[site.letter]
        points.append((position.orbit_matrix @ np.array(site.free) + position.orbit_offset) % 1.0)
        species += [Element.from_Z(site.atomic_number)] * position.primitive_multiplicity
    return Structure(group.primitive_basis.T @ lattice.matrix, species, np.concatenate(points))


def cell_lattice(parameters: Sequence[float]) -> Lattice:
    """Return the lattice of (a, b, c, alpha, beta, gamma). Raises ParseError("cell") if it spans no volume."""
    a, b, c, alpha, beta, gamma = parameters
    cosines = [math.cos(math.radians(v)) for v in (alpha, beta, gamma)]
    squared = 1 - sum(v * v for v in cosines) + 2 * cosines[0] * cosines[1] * cosines[2]
    if min(a, b, c) <= 0 or not all(0 < v < 180 for v in (alpha, beta, gamma)) or squared <= 1e-6:
        raise ParseError("cell", f"lengths {a}, {b}, {c} and angles {alpha}, {beta}, {gamma} span no cell")
    return Lattice.from_parameters(a, b, c, alpha, beta, gamma)
