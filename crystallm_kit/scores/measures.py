"""What can be measured on one structure, each thing found once and kept.

Rock salt, NaCl, a = 5.64 angstrom:
    volume_per_atom_angstrom3 22.43, nearest_distance_angstrom 2.82, density_g_cm3 2.16, spacegroup_number 225

Not here: what is good enough (thresholds.py, validity.py); where the space group comes from
(structures/symmetry.py).
"""

import math
from collections import Counter
from functools import cached_property
from typing import Any

import numpy as np
from pymatgen.core import Element, Molecule, Structure

from crystallm_kit.errors import EncodeError
from crystallm_kit.records import Crystal
from crystallm_kit.scores.distances import (
    FloatArray,
    IntArray,
    NearestDistances,
    covalent_radii,
    nearest_distances,
)
from crystallm_kit.structures.elements import density_g_cm3
from crystallm_kit.structures.symmetry import CLOSEST_TOLERANCES, SYMPREC_ANGSTROM, dataset

Measures = dict[str, float | int | str]

MOLECULE_BOND = 1.3  # of the sum of the covalent radii, the usual limit of a bond


def measure(crystal: Crystal | Structure | Molecule) -> Measures:
    """Return what can be measured on one structure; what cannot be (a collapsed cell) is left out.

    Returns:
        volume_per_atom_angstrom3, nearest_distance_angstrom (self-images included), density_g_cm3,
        spacegroup_number (0.1 angstrom). Molecules: nearest_distance_angstrom (two atoms and more),
        n_fragments.
    """
    structure = crystal.structure if isinstance(crystal, Crystal) else crystal
    if isinstance(structure, Molecule):
        return MeasuredMolecule(structure).measures()
    return MeasuredCrystal(structure).measures(with_symmetry=True)


class MeasuredCrystal:
    """A structure with what the checks ask of it, each found once.

    Attributes:
        numbers: (N,) atomic numbers.
        lattice: (3, 3) rows are lattice vectors, angstrom.
        fractional: (N, 3) fractional coordinates.
        volume: Of the cell, angstrom^3; NaN where the lattice is.
    """

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self.numbers: IntArray = np.array([next(iter(site.species)).Z for site in structure], dtype=np.int64)
        self.lattice: FloatArray = np.array(structure.lattice.matrix)
        self.fractional: FloatArray = np.array(structure.frac_coords).reshape(-1, 3)
        self.volume = abs(float(np.linalg.det(self.lattice))) if np.isfinite(self.lattice).all() else math.nan

    @cached_property
    def counts(self) -> Counter[str]:
        """Element symbol -> atoms."""
        return _symbol_counts(self.numbers)

    @cached_property
    def cell_fault(self) -> str:
        """What keeps the cell from being one: the empty text where nothing does."""
        if not len(self.numbers):
            return "no sites"
        if not (np.isfinite(self.lattice).all() and np.isfinite(self.fractional).all()):
            return "a length, angle or coordinate is not a finite number"
        if not self.volume > 1e-6:
            return f"volume {self.volume:.3g} angstrom^3: the lattice vectors lie in a plane"
        try:
            _ = self.distances
        except ValueError as error:
            return f"the lattice cannot be reduced: {error}"
        return ""

    @cached_property
    def distances(self) -> NearestDistances:
        """Nearest distances, images included. ValueError where the cell cannot be reduced."""
        return nearest_distances(self.lattice, self.fractional)

    @cached_property
    def symmetry(self) -> Any:
        """moyo's dataset, or None where it finds none."""
        if self.cell_fault:
            return None
        try:
            return dataset(self.structure, shortest_angstrom=self._closest_angstrom)
        except EncodeError:
            return None

    @cached_property
    def is_collapsed(self) -> bool:
        """Whether two sites coincide or nearly do, so that no symmetry can be told."""
        return not self.cell_fault and self._closest_angstrom < CLOSEST_TOLERANCES * SYMPREC_ANGSTROM

    @cached_property
    def _closest_angstrom(self) -> float:
        """Distance of the closest two sites; inf for a single one."""
        return float(self.distances.distance.min(initial=math.inf))

    @cached_property
    def density(self) -> float:
        """Mass density, g/cm3."""
        return density_g_cm3(self.numbers, self.volume)

    def measures(self, *, with_symmetry: bool) -> Measures:
        """Return what `measure` returns; the space group only if wanted, or found already."""
        if self.cell_fault:
            return {}
        found: Measures = {
            "volume_per_atom_angstrom3": self.volume / len(self.numbers),
            "nearest_distance_angstrom": self.distances.shortest,
            "density_g_cm3": self.density,
        }
        if (with_symmetry or "symmetry" in self.__dict__) and self.symmetry is not None:
            found["spacegroup_number"] = int(self.symmetry.number)
        return found


class MeasuredMolecule:
    """A molecule with what the checks ask of it."""

    def __init__(self, molecule: Molecule) -> None:
        self.numbers: IntArray = np.array([site.specie.Z for site in molecule], dtype=np.int64)
        self.coordinates: FloatArray = np.array([site.coords for site in molecule]).reshape(-1, 3)
        self.first, self.second = np.triu_indices(len(self.numbers), 1)
        offsets = self.coordinates[self.first] - self.coordinates[self.second]
        self.distance: FloatArray = np.sqrt((offsets * offsets).sum(1))
        radii = covalent_radii()[self.numbers]
        self.radii_sum: FloatArray = radii[self.first] + radii[self.second]

    @cached_property
    def counts(self) -> Counter[str]:
        """Element symbol -> atoms."""
        return _symbol_counts(self.numbers)

    @cached_property
    def n_fragments(self) -> int:
        """Connected pieces, two atoms being bonded within 1.3 times the sum of their covalent radii."""
        label = np.arange(len(self.numbers))
        bonded = self.distance <= MOLECULE_BOND * self.radii_sum
        for a, b in zip(self.first[bonded], self.second[bonded], strict=True):
            label[label == label[a]] = label[b]
        return len(set(label.tolist()))

    def measures(self) -> Measures:
        """Return what `measure` returns of a molecule."""
        if not np.isfinite(self.coordinates).all() or not len(self.numbers):
            return {}
        found: Measures = {"n_fragments": self.n_fragments}
        if self.distance.size:
            found["nearest_distance_angstrom"] = float(self.distance.min())
        return found


def _symbol_counts(numbers: IntArray) -> Counter[str]:
    return Counter({Element.from_Z(int(z)).symbol: n for z, n in Counter(numbers.tolist()).items()})
