"""Space groups, Wyckoff sites, and a crystal as its symmetry-distinct content.

`SymmetricCrystal` is a crystal reduced to what symmetry leaves free: the space group, the free lattice
parameters and, for each orbit, the element, the Wyckoff letter and the free coordinates of one
representative. Rock salt is

    SymmetricCrystal(spacegroup_number=225, lattice=(5.64,), sites=((Na, "a", ()), (Cl, "b", ())))

Setting: the standard one of the International Tables for Crystallography, Vol. A (unique axis b and cell
choice 1, hexagonal axes for rhombohedral groups, origin choice 2), as moyo's `Setting.standard()`. Letters
and representative coordinates stand in wyckoff_positions.json ("8f 1/4,y,1/4": 8 atoms in the conventional
cell); every entry's orbit under moyo's operations has the stated size, which a test checks.

One crystal has many such descriptions: every coset of the Euclidean normalizer of its group shifts the origin
or relabels the axes and gives another one. `descriptions` lists them, `canonical` picks one, always the same.
Handedness is kept: only proper rotations are used (a group with improper operations loses nothing by that).

Traps: moyo wants `angle_tolerance` in radians, spglib in degrees; moyo's dataset letters belong to the input
cell's sites; the standardized cell is refined to the detected symmetry, so special positions are exact.

Not here: the text of a crystal (text/wyckoff.py); which letters a composition allows (tokens/masking.py).
Sources: ITA Vol. A (2016) 1.5 (normalizers) and 2.1.3 (Wyckoff positions); Shinohara, moyo
(spglib.github.io/moyo).
"""

import itertools
import json
import logging
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
from pymatgen.core import Composition, Element, Lattice, Structure

from crystallm_kit.errors import EncodeError, ParseError

# moyo warns of every operation that it drops at a tolerance, which is our ordinary case.
logging.getLogger("moyo").setLevel(logging.ERROR)

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

LETTERS = "abcdefghijklmnopqrstuvwxyzA"
COORDINATE_STEPS = 10_000  # free coordinates are compared on a grid of 1e-4
SYMPREC_ANGSTROM = 0.1  # the tolerance at which MP-20 and CrystaLLM state space groups
CLOSEST_TOLERANCES = 7  # apart have to be sites that are told apart; see check_apart

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
    """A crystal as space group, free lattice parameters (angstrom, degree) and symmetry-distinct sites."""

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


@dataclass(frozen=True, eq=False)
class CosetMaps:
    """What the cosets of the proper Euclidean normalizer do to sites, in conventional coordinates.

    A site p of letter l is, after coset q with the origin moved by o, a site of letter letters[q, l], and
    each row k of

        matrix[l][q, k] @ p + offset[l][q, k] - origin[l][q] @ o

    are free coordinates of one of its representatives.

    Attributes:
        linear: (Q, 3, 3).
        shift: (Q, 3).
        letters: (Q, L) index of the letter that each letter becomes.
        matrix: For each letter (Q, K, n_free, n_free).
        offset: For each letter (Q, K, n_free).
        origin: For each letter (Q, n_free, 3).
    """

    linear: IntArray
    shift: FloatArray
    letters: IntArray
    matrix: tuple[FloatArray, ...]
    offset: tuple[FloatArray, ...]
    origin: tuple[FloatArray, ...]


class SpaceGroup:
    """A space group in its standard setting, with its Wyckoff positions and normalizer.

    Get one by `space_group`.
    """

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
        self.positions: tuple[WyckoffPosition, ...] = tuple(self._positions(_wyckoff_table()[str(number)]))
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

        `letters[i]` is what the group's i-th letter becomes. Free (polar) shifts are left out; the first is
        the identity. Axis relabellings that hold for a group's type are in it whatever the crystal's metric.
        """
        names = np.array([p.letter for p in self.positions])
        return [
            (linear, shift, "".join(names[letters]))
            for (linear, shift), letters in zip(self._cosets, self.coset_maps.letters, strict=True)
        ]

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

    def _positions(self, entries: Sequence[str]) -> Iterator[WyckoffPosition]:
        to_primitive = np.linalg.inv(self.primitive_basis)
        rotations, translations = to_primitive @ self.rotations, self.translations @ to_primitive.T
        for entry in entries:
            label, _, form = entry.partition(" ")
            matrix, offset = _parse_form(form)
            used = [axis for axis in range(3) if matrix[:, axis].any()]
            form_matrix = matrix[:, used]
            solve_axis, solve_sign = [], []
            for column in form_matrix.T:
                axis = next(
                    i for i in range(3) if abs(column[i]) == 1 and np.count_nonzero(form_matrix[i]) == 1
                )
                solve_axis.append(axis)
                solve_sign.append(column[axis])
            orbit_matrix = rotations @ form_matrix  # (G, 3, n_free)
            orbit_offset = rotations @ offset + translations  # (G, 3)
            points = orbit_matrix @ _GENERIC[: len(used)] + orbit_offset
            _, first = np.unique(_grid_code(points, 100_000), return_index=True)
            kept = np.sort(first)  # one operation for each atom of the primitive cell
            yield WyckoffPosition(
                letter=label[-1],
                multiplicity=int(label[:-1]),
                primitive_multiplicity=len(kept),
                n_free=len(used),
                form_matrix=form_matrix,
                form_offset=offset,
                solve_axis=np.array(solve_axis, dtype=np.int64),
                solve_sign=np.array(solve_sign, dtype=np.float64),
                orbit_matrix=orbit_matrix[kept],
                orbit_offset=orbit_offset[kept] % 1.0,
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
            points: (N, G, 3) conventional fractional coordinates.
            letter_index: (N,) index of the letter whose representative form is asked for.
            tolerance: Largest deviation (fractional) from the form that counts as on it.

        Returns:
            free (N, G, 3) integers in [0, 10000), zero where there is no such free coordinate; fits (N, G):
            on the form, and no farther from it than the nearest of the G points, so that a point near a
            higher symmetry is not taken for one on it.
        """
        matrix, offset, axis, sign, n_free = (a[letter_index][:, None] for a in self.padded_forms)
        is_free = np.arange(3) < n_free[..., None]  # (N, 1, 3)
        centred = points - offset
        value = np.take_along_axis(centred, np.broadcast_to(axis, points.shape), axis=-1) * sign
        value = np.where(is_free, value, 0.0)
        free = np.where(is_free, np.rint(value * COORDINATE_STEPS).astype(np.int64) % COORDINATE_STEPS, 0)
        residual = centred - (matrix @ value[..., None])[..., 0]
        off = np.abs((residual + 0.5) % 1.0 - 0.5).max(-1)
        return free, (off < tolerance) & (off <= off.min(-1, keepdims=True) + 1e-5)

    @cached_property
    def coset_maps(self) -> "CosetMaps":
        """What the normalizer's cosets do to sites."""
        linear = np.array([c[0] for c in self._cosets])  # (Q, 3, 3)
        shift = np.array([c[1] for c in self._cosets])  # (Q, 3)
        _, form_offset, solve_axis, solve_sign, _ = self.padded_forms
        rows = np.arange(len(linear))[:, None]
        letters = np.zeros((len(linear), len(self.positions)), dtype=np.int64)
        matrices, offsets, origins = [], [], []
        for index, position in enumerate(self.positions):
            image_matrix = self.rotations @ (linear @ position.form_matrix)[:, None]  # (Q, G, 3, f)
            moved = linear @ position.form_offset + shift  # (Q, 3)
            image_offset = np.einsum("gij,qj->qgi", self.rotations, moved) + self.translations
            letters[:, index], fits = self._image_letter(
                position, image_matrix @ _GENERIC[: position.n_free] + image_offset
            )
            new = letters[:, index]
            axis, sign = (
                solve_axis[new][:, : position.n_free],
                solve_sign[new][:, : position.n_free],
            )  # (Q, f)
            # As many operations fit in every coset: those that keep the form as a set.
            chosen = np.nonzero(fits)[1].reshape(len(linear), -1)  # (Q, K)
            solved = (rows[..., None], np.arange(chosen.shape[1])[:, None], axis[:, None, :])  # (Q, K, f)
            matrices.append(image_matrix[rows, chosen][solved] * sign[:, None, :, None])
            offsets.append((image_offset[rows, chosen] - form_offset[new][:, None])[solved] * sign[:, None])
            origins.append(np.eye(3)[axis] * sign[..., None])
        return CosetMaps(linear, shift, letters, tuple(matrices), tuple(offsets), tuple(origins))

    def _image_letter(
        self, position: WyckoffPosition, points: FloatArray
    ) -> tuple[IntArray, npt.NDArray[np.bool_]]:
        """Return (Q,) the letter whose form holds some of points (Q, G, 3), and (Q, G) which of them it
        holds.
        """
        letter = np.full(len(points), -1, dtype=np.int64)
        fits = np.zeros(points.shape[:2], dtype=bool)
        for index, other in enumerate(self.positions):
            if other.multiplicity != position.multiplicity or other.n_free != position.n_free:
                continue
            centred = points - other.form_offset
            value = centred[..., other.solve_axis] * other.solve_sign
            residual = centred - value @ other.form_matrix.T
            on_form = np.abs((residual + 0.5) % 1.0 - 0.5).max(-1) < 1e-6  # (Q, G)
            here = on_form.any(1) & (letter < 0)
            letter[here], fits[here] = index, on_form[here]
        if (letter < 0).any():
            raise AssertionError(f"space group {self.number}: no image of letter {position.letter}")
        return letter, fits

    @cached_property
    def _cosets(self) -> list[tuple[IntArray, FloatArray]]:
        linear_parts = _proper_linear_parts(self.crystal_system)
        step = 12 if self.crystal_system in ("trigonal", "hexagonal") else 8
        # Origins at eighths (twelfths on hexagonal axes) hold every discrete normalizer shift of ITA table
        # 3.5.2.
        axes = [[0.0] if polar else [i / step for i in range(step)] for polar in self.polar_axes]
        grid = np.array(list(itertools.product(*axes)))  # (S, 3)
        generators = _generators(self.rotations, self.translations)
        by_rotation: dict[bytes, list[FloatArray]] = {}
        for rotation, translation in zip(self.rotations, self.translations, strict=True):
            by_rotation.setdefault(rotation.tobytes(), []).append(translation)
        centering = np.array(by_rotation[np.eye(3, dtype=np.int64).tobytes()])
        found: list[tuple[IntArray, FloatArray]] = []
        for linear in linear_parts:
            inverse = np.rint(np.linalg.inv(linear)).astype(np.int64)
            images = linear @ self.rotations[generators] @ inverse
            if any(image.tobytes() not in by_rotation for image in images):
                continue
            candidates = grid
            for index, image in zip(generators, images, strict=True):
                allowed = np.array(by_rotation[image.tobytes()])
                shift = linear @ self.translations[index] + candidates - candidates @ image.T  # (S, 3)
                off = (shift[:, None, :] - allowed[None, :, :] + 0.5) % 1.0 - 0.5
                candidates = candidates[(np.abs(off).max(-1) < 1e-6).any(1)]
            if len(candidates) and _maps_lattice(linear, centering):
                found += [(linear, origin) for origin in candidates]
        return list(self._distinct_cosets(found))

    def _distinct_cosets(
        self, found: list[tuple[IntArray, FloatArray]]
    ) -> Iterator[tuple[IntArray, FloatArray]]:
        """Drop elements that differ by an operation of the group (polar shifts ignored)."""
        free_axes = ~self.polar_axes
        seen: set[tuple[bytes, int]] = set()
        found.sort(key=lambda f: (not (f[0] == np.eye(3)).all(), not (f[0] >= 0).all(), tuple(f[1])))
        for linear, shift in found:
            moved = _grid_code((self.rotations @ shift + self.translations) * free_axes, 24)  # (G,)
            if (linear.tobytes(), int(_grid_code(shift * free_axes, 24))) in seen:
                continue
            products = self.rotations @ linear
            seen.update((m.tobytes(), c) for m, c in zip(products, moved.tolist(), strict=True))
            yield linear, shift


@lru_cache(maxsize=230)
def space_group(number: int) -> SpaceGroup:
    """Return the space group with this number (1-230), built once."""
    return SpaceGroup(number)


# A point without symmetry: no operation of any group leaves it or a form at it where it is by chance.
_GENERIC = np.array([0.1234, 0.2781, 0.4117])


def _grid_code(points: FloatArray, steps: int) -> IntArray:
    """Return (...) one integer for each point (..., 3) modulo 1, the same for points equal to 1 / steps."""
    steps_of = np.rint(points * steps).astype(np.int64) % steps
    return np.asarray((steps_of[..., 0] * steps + steps_of[..., 1]) * steps + steps_of[..., 2])


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
    """Return indices of operations that generate the point group, greedily, and of the centering
    translations.
    """
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


def dataset(
    structure: Structure,
    symprec_angstrom: float = SYMPREC_ANGSTROM,
    *,
    shortest_angstrom: float | None = None,
) -> Any:
    """Return moyo's MoyoDataset of a structure, in the standard setting.

    Args:
        structure: Ordered.
        symprec_angstrom: Tolerance of distances.
        shortest_angstrom: Distance of the closest two sites, where it is known already.

    Raises:
        EncodeError: If moyo finds no symmetry, for example in a collapsed cell, and if two sites coincide or
            nearly do (`check_apart`).
    """
    from moyopy import Cell, MoyoDataset, Setting

    if shortest_angstrom is None:
        try:
            shortest_angstrom = closest_angstrom(structure.lattice, structure.frac_coords)
        except ValueError as error:  # LinAlgError too: vectors in a plane
            raise EncodeError(f"no symmetry found at {symprec_angstrom} angstrom: {error}") from error
    check_apart(shortest_angstrom, symprec_angstrom)
    cell = Cell(
        structure.lattice.matrix.tolist(),
        structure.frac_coords.tolist(),
        [int(z) for z in structure.atomic_numbers],
    )
    try:
        return MoyoDataset(cell, symprec=symprec_angstrom, setting=Setting.standard())
    except (ValueError, RuntimeError) as error:
        raise EncodeError(f"no symmetry found at {symprec_angstrom} angstrom: {error}") from error


def closest_angstrom(lattice: Lattice, fractional: FloatArray) -> float:
    """Return the distance of the closest two sites, images of one site not counted; inf for a single one."""
    distances = lattice.get_all_distances(fractional, fractional)
    np.fill_diagonal(distances, math.inf)
    return float(distances.min(initial=math.inf))


def check_apart(shortest_angstrom: float, symprec_angstrom: float) -> None:
    """Refuse sites that coincide or nearly do, as a tolerance sees it.

    Which site is the image of which is then a guess, and where many can be guessed, as in a chain of atoms
    half an angstrom apart at 0.1 angstrom, moyo (0.21) may try for hours, in tens of gigabytes. At the
    default tolerance no crystal is refused: the atoms of H2 are 0.74 angstrom apart.

    Raises:
        EncodeError: If two sites are closer than seven tolerances.
    """
    if shortest_angstrom < CLOSEST_TOLERANCES * symprec_angstrom:
        raise EncodeError(
            f"no symmetry found at {symprec_angstrom:g} angstrom: two sites are {shortest_angstrom:.3g} "
            "angstrom apart, so they coincide, or nearly so"
        )


def spacegroup_number(structure: Structure, symprec_angstrom: float = SYMPREC_ANGSTROM) -> int:
    """Return the space group number of a structure at a distance tolerance in angstrom.

    Raises EncodeError.
    """
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
        EncodeError: If no symmetry is found, or what is found merges atoms that coincide, or cells that
            differ by more than allowed.
    """
    found = dataset(structure, symprec_angstrom)
    primitive, standard = found.prim_std_cell, np.array(found.std_cell.basis)
    cells = structure.volume / abs(float(np.linalg.det(np.array(primitive.basis))))
    if abs(cells * len(primitive.positions) - len(structure)) > 0.5:
        raise EncodeError(f"at {symprec_angstrom} angstrom the symmetry search merges atoms that coincide")
    if len(primitive.positions) < len(structure) and _largest_shift(structure, found) > max_merge_angstrom:
        raise EncodeError(f"at {symprec_angstrom} angstrom the symmetry search merges cells that differ")
    group = space_group(int(found.number))
    to_standard = np.array(primitive.basis) @ np.linalg.inv(standard)
    points = np.array(primitive.positions) @ to_standard  # conventional fractional coordinates
    full = _lattice_parameters(standard)
    orbits = sorted(set(found.orbits))
    letters = [found.wyckoffs[index] for index in orbits]
    images = [found.mapping_std_prim[index] for index in orbits]
    sites = tuple(
        Site(int(primitive.numbers[image]), letter, free)
        for image, letter, free in zip(
            images, letters, _representatives(group, points[images], letters), strict=True
        )
    )
    crystal = SymmetricCrystal(group.number, tuple(float(full[i]) for i in group.free_lattice), sites)
    if sum(crystal.counts.values()) != len(primitive.positions):
        raise EncodeError(
            f"space group {group.number}: orbits hold {sum(crystal.counts.values())} atoms, "
            f"the primitive cell {len(primitive.positions)}"
        )
    return crystal


def _lattice_parameters(basis: FloatArray) -> tuple[float, float, float, float, float, float]:
    """Return (a, b, c, alpha, beta, gamma) of basis (3, 3), rows in angstrom."""
    metric = basis @ basis.T
    a, b, c = (math.sqrt(metric[i, i]) for i in range(3))
    alpha, beta, gamma = (
        math.degrees(math.acos(max(-1.0, min(1.0, cosine))))
        for cosine in (metric[1, 2] / (b * c), metric[0, 2] / (a * c), metric[0, 1] / (a * b))
    )
    return a, b, c, alpha, beta, gamma


def _largest_shift(structure: Structure, found: Any) -> float:
    """Return how far (angstrom) symmetrization moves an atom of the input structure."""
    linear = np.linalg.inv(np.array(found.prim_std_linear)).T
    moved = (structure.frac_coords - np.array(found.prim_std_origin_shift)) @ linear
    off = moved - np.array(found.prim_std_cell.positions)[found.mapping_std_prim]
    shift = ((off + 0.5) % 1.0 - 0.5) @ np.array(found.prim_std_cell.basis)
    return float(np.linalg.norm(shift, axis=1).max())


def _representatives(
    group: SpaceGroup, points: FloatArray, letters: Sequence[str]
) -> list[tuple[float, ...]]:
    """Return the free coordinates (grid of 1e-4, lexicographically first) of the orbits of points (N, 3)."""
    index = np.array([LETTERS.index(letter) for letter in letters])
    orbit = np.einsum("gij,nj->ngi", group.rotations, points) + group.translations
    free, fits = group.free_coordinates(orbit, index)
    if not fits.any(1).all():
        at = int(np.flatnonzero(~fits.any(1))[0])
        raise EncodeError(
            f"space group {group.number}: {points[at]} is on no representative of letter {letters[at]}"
        )
    code = np.where(fits, _code(free), _NO_CODE).min(1)
    return [_decode_code(int(c), group.positions[i].n_free) for c, i in zip(code, index, strict=True)]


def descriptions(crystal: SymmetricCrystal, element_order: Sequence[int]) -> list[SymmetricCrystal]:
    """Return every description of a crystal that the Euclidean normalizer of its group gives, the canonical
    one first.

    Sites are ordered by `element_order` (atomic numbers), then letter, then free coordinates. In polar groups
    the origin is put on each candidate anchor in turn: the sites of the first element with its first letter.
    Canonical is the smallest by (elements and letters of all sites, then free coordinates of all sites): a
    prototype is written with the same letters whatever its elements and its metric.
    """
    return [_described(crystal, element_order, *key) for key in _sorted_keys(crystal, element_order)]


def canonical(crystal: SymmetricCrystal, element_order: Sequence[int]) -> SymmetricCrystal:
    """Return the first of `descriptions`, without making the others."""
    key = _sorted_keys(crystal, element_order, only_first=True)[0]
    return _described(crystal, element_order, *key)


_Key = tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...]]


def _sorted_keys(
    crystal: SymmetricCrystal, element_order: Sequence[int], *, only_first: bool = False
) -> list[_Key]:
    """Return (skeleton, codes, free lattice) of each description: rank * 32 + letter and coordinates of its
    sites.
    """
    group = space_group(crystal.spacegroup_number)
    maps = group.coset_maps
    rank = {z: i for i, z in enumerate(element_order)}
    ranks = np.array([rank[s.atomic_number] for s in crystal.sites])
    site_letters = np.array([LETTERS.index(s.letter) for s in crystal.sites])
    skeletons = ranks * 32 + maps.letters[:, site_letters]  # (Q, N)
    ordered = np.sort(skeletons, axis=1)
    cosets = np.arange(len(ordered))
    if only_first:
        for column in ordered.T:
            cosets = cosets[column[cosets] == column[cosets].min()]
    coset, origin = _polar_origins(crystal, group, skeletons, cosets)  # (W,), (W, 3)
    codes = _codes(crystal, group, site_letters, coset, origin)
    rows = np.sort(skeletons[coset] * COORDINATE_STEPS**3 + codes, axis=1)  # (W, N)
    if only_first:
        for column in range(rows.shape[1]):
            kept = rows[:, column] == rows[:, column].min()
            rows, coset = rows[kept], coset[kept]
    full = group.lattice_parameters(crystal.lattice)
    lattices = {q: _relabelled(group, full, maps.linear[q]) for q in set(coset.tolist())}
    found: dict[tuple[bytes, tuple[int, ...]], _Key] = {}
    for row, q in zip(rows, coset.tolist(), strict=True):
        rounded = tuple(round(v * 1000) for v in lattices[q])
        if (row.tobytes(), rounded) not in found:
            skeleton, code = np.divmod(row, COORDINATE_STEPS**3)
            found[row.tobytes(), rounded] = tuple(skeleton.tolist()), tuple(code.tolist()), lattices[q]
    return sorted(found.values(), key=lambda key: (key[0], key[1], [round(v * 1000) for v in key[2]]))


def _described(
    crystal: SymmetricCrystal,
    element_order: Sequence[int],
    skeleton: tuple[int, ...],
    codes: tuple[int, ...],
    lattice: tuple[float, ...],
) -> SymmetricCrystal:
    group = space_group(crystal.spacegroup_number)
    sites = tuple(
        Site(element_order[s // 32], LETTERS[s % 32], _decode_code(c, group.positions[s % 32].n_free))
        for s, c in zip(skeleton, codes, strict=True)
    )
    return SymmetricCrystal(crystal.spacegroup_number, lattice, sites)


def _codes(
    crystal: SymmetricCrystal, group: SpaceGroup, site_letters: IntArray, coset: IntArray, origin: FloatArray
) -> IntArray:
    """Return (W, N) the smallest free coordinates, as integers, of each site in coset (W,) about origin (W,
    3).
    """
    maps = group.coset_maps
    codes = np.zeros((len(coset), len(crystal.sites)), dtype=np.int64)
    for letter in set(site_letters.tolist()):
        n_free = group.positions[letter].n_free
        if not n_free:
            continue
        chosen = np.flatnonzero(site_letters == letter)
        p = np.array([crystal.sites[i].free for i in chosen])  # (n, f)
        offset = maps.offset[letter][coset]
        if origin.any():
            offset = offset - (maps.origin[letter][coset] @ origin[..., None])[:, None, :, 0]
        value = np.einsum("wkij,nj->wnki", maps.matrix[letter][coset], p) + offset[:, None]  # (W, n, K, f)
        steps = np.rint(value * COORDINATE_STEPS).astype(np.int64) % COORDINATE_STEPS
        codes[:, chosen] = _code(steps).min(-1)
    return codes


def _relabelled(group: SpaceGroup, full: Sequence[float], linear: IntArray) -> tuple[float, ...]:
    """Return the free lattice parameters after relabelling axes so that x' = linear @ x."""
    # In the other crystal systems every linear part of the normalizer is a symmetry of the lattice.
    if group.crystal_system in ("orthorhombic", "monoclinic") and not (linear == np.eye(3)).all():
        lengths, angles = np.abs(linear) @ full[:3], np.abs(linear) @ full[3:]
        signs = linear.sum(1)
        # A signed permutation: reversing one of the two axes of an angle gives its supplement.
        turned = np.where([signs[1] * signs[2] < 0, signs[0] * signs[2] < 0, signs[0] * signs[1] < 0],
                          180.0 - angles, angles)  # fmt: skip
        full = (*lengths.tolist(), *turned.tolist())
    return tuple(float(full[i]) for i in group.free_lattice)


def _polar_origins(
    crystal: SymmetricCrystal, group: SpaceGroup, skeletons: IntArray, cosets: IntArray
) -> tuple[IntArray, FloatArray]:
    """Return (W,) cosets and (W, 3) origins along the polar axes, each putting one candidate anchor atom at
    zero there.

    Candidates are the sites of the first element with its first letter.
    """
    polar = group.polar_axes
    if not polar.any():
        return cosets, np.zeros((len(cosets), 3))
    maps = group.coset_maps
    points = np.array([group[s.letter].form_matrix @ np.array(s.free) + group[s.letter].form_offset
                       for s in crystal.sites])  # fmt: skip
    shifts = group.translations * polar
    shifts = shifts[np.unique(_grid_code(shifts, 24), return_index=True)[1]]
    chosen, origins = [], []
    for q in cosets.tolist():
        anchors = np.flatnonzero(skeletons[q] == skeletons[q].min())
        moved = points[anchors] @ maps.linear[q].T + maps.shift[q]
        atoms = ((moved[:, None] + shifts) * polar).reshape(-1, 3) % 1.0
        atoms = atoms[np.unique(_grid_code(atoms, COORDINATE_STEPS), return_index=True)[1]]
        chosen += [q] * len(atoms)
        origins.append(atoms)
    return np.array(chosen), np.concatenate(origins)


_NO_CODE = np.iinfo(np.int64).max


def _code(free: IntArray) -> IntArray:
    """Return (...) one integer for each of free (..., 0-3), in the order of the coordinates; see
    _decode_code.
    """
    code = np.zeros(free.shape[:-1], dtype=np.int64)
    for axis in range(3):
        code = code * COORDINATE_STEPS + (free[..., axis] if axis < free.shape[-1] else 0)
    return code


def _decode_code(code: int, n_free: int) -> tuple[float, ...]:
    values = (
        code // COORDINATE_STEPS**2,
        code // COORDINATE_STEPS % COORDINATE_STEPS,
        code % COORDINATE_STEPS,
    )
    return tuple(v / COORDINATE_STEPS for v in values[:n_free])


def expand(crystal: SymmetricCrystal) -> Structure:
    """Return the primitive cell of a symmetric crystal, its sites orbit by orbit.

    Raises:
        ParseError: If the lattice parameters do not span a cell.
    """
    group = space_group(crystal.spacegroup_number)
    full = group.lattice_parameters(crystal.lattice)
    lattice = cell_lattice(full)
    species: list[Any] = []
    points = []
    for site in crystal.sites:
        position = group[site.letter]
        points.append((position.orbit_matrix @ np.array(site.free) + position.orbit_offset) % 1.0)
        species += [_full_site(site.atomic_number)] * position.primitive_multiplicity
    return Structure(group.primitive_basis.T @ lattice.matrix, species, np.concatenate(points))


@lru_cache(maxsize=120)
def _full_site(atomic_number: int) -> Composition:
    """Return what stands on a site: one atom. Made once an element, since pymatgen takes 20 microseconds."""
    return Composition({Element.from_Z(atomic_number): 1})


def cell_lattice(parameters: Sequence[float]) -> Lattice:
    """Return the lattice of (a, b, c, alpha, beta, gamma).

    Raises ParseError("cell") if it spans no volume.
    """
    a, b, c, alpha, beta, gamma = parameters
    cosines = [math.cos(math.radians(v)) for v in (alpha, beta, gamma)]
    squared = 1 - sum(v * v for v in cosines) + 2 * cosines[0] * cosines[1] * cosines[2]
    if min(a, b, c) <= 0 or not all(0 < v < 180 for v in (alpha, beta, gamma)) or squared <= 1e-6:
        raise ParseError("cell", f"lengths {a}, {b}, {c} and angles {alpha}, {beta}, {gamma} span no cell")
    return Lattice.from_parameters(a, b, c, alpha, beta, gamma)
