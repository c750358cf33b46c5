"""Equivalent views of one crystal, each drawn from a seed: the same crystal, described otherwise.

    recipe = AugmentationRecipe(translate_probability=1.0, permute_sites_probability=0.5)
    augment(nacl, recipe, seed=1, epoch=0, index=7)      the same at every call, another one in epoch 1

    translated            another origin                      all sites move together
    with_permuted_sites   another order of the sites
    with_permuted_axes    another order of the cell's axes
    with_sheared_cell     another cell of the same lattice    a + b instead of a
    as_supercell          a cell twice as large               the crystal's text gets longer
    redescribed           another origin or labelling of axes that the Euclidean normalizer of the space group
                          allows, in the standard primitive cell (positions symmetrized, within the tolerance)
    rotated               another orientation in space        for formats with Cartesian coordinates
    strained, displaced   a crystal nearby: its symmetry is lost, and the change is bounded as stated

All but the last two leave the crystal what it is: pymatgen's StructureMatcher matches it, and its space group
and handedness stay. Only cells with a positive determinant come out, so that formats which write lengths and
angles do not write the mirror image.

Not here: texts that one crystal can have in a format that writes symmetry (text/wyckoff.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial

import numpy as np
import numpy.typing as npt
from pymatgen.core.lattice import Lattice
from pymatgen.core.structure import Molecule, Structure

from crystallm_kit.records import Crystal
from crystallm_kit.structures.symmetry import descriptions, expand, symmetric_crystal

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class AugmentationRecipe:
    """How often each change is made to a crystal; several can be made, in the order below.

    Attributes:
        redescribe_probability: Another description by the space group's Euclidean normalizer.
        supercell_probability: One axis doubled, where the cell then has at most `max_supercell_sites`.
        shear_cell_probability: Another cell of the same lattice.
        permute_axes_probability: Another order of axes.
        translate_probability: Another origin.
        rotate_probability: Another orientation.
        permute_sites_probability: Another order of sites.
        strain_probability: A small homogeneous strain.
        displace_probability: A small displacement of every atom.
        max_supercell_sites: Larger cells are not doubled.
        max_strain: Largest component of the strain tensor (relative).
        max_displacement_angstrom: Largest displacement of an atom.
    """

    redescribe_probability: float = 0.0
    supercell_probability: float = 0.0
    shear_cell_probability: float = 0.0
    permute_axes_probability: float = 0.0
    translate_probability: float = 0.0
    rotate_probability: float = 0.0
    permute_sites_probability: float = 0.0
    strain_probability: float = 0.0
    displace_probability: float = 0.0
    max_supercell_sites: int = 20
    max_strain: float = 0.01
    max_displacement_angstrom: float = 0.02

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_probability") and not 0 <= value <= 1:
                raise ValueError(f"{field.name} is {value}; expected 0 to 1")
        if not 0 <= self.max_strain < 0.5 or self.max_displacement_angstrom < 0:
            raise ValueError("max_strain must be in [0, 0.5) and max_displacement_angstrom not negative")

    @property
    def does_anything(self) -> bool:
        """Tell whether any change can happen."""
        return any(getattr(self, f.name) > 0 for f in fields(self) if f.name.endswith("_probability"))


def augment(crystal: Crystal, recipe: AugmentationRecipe, *, seed: int, epoch: int, index: int) -> Crystal:
    """Return a view of a crystal, with its id and properties.

    Args:
        crystal: Stays as it is. Of a molecule only orientation, order and positions of atoms are changed.
        recipe: What is changed, how often.
        seed, epoch, index: Non-negative; together they fix the view. `index` tells crystals apart.

    Raises:
        EncodeError: If `redescribe_probability` is set and no symmetry can be found.
    """
    structure = crystal.structure
    changes = _changes(recipe)
    # a generator for each change: one probability does not alter what the others draw
    generators = np.random.default_rng((seed, epoch, index)).spawn(len(changes))
    for (probability, change, fits_molecules), rng in zip(changes, generators, strict=True):
        if rng.random() < probability and (fits_molecules or isinstance(structure, Structure)):
            structure = change(structure, rng)
    return replace(crystal, structure=structure)


def _changes(recipe: AugmentationRecipe) -> list[tuple[float, Callable[..., Structure | Molecule], bool]]:
    """Return (probability, change, whether it fits molecules), in the order in which they are made."""
    r = recipe
    return [
        (r.redescribe_probability, redescribed, False),
        (r.supercell_probability, partial(as_supercell, max_sites=r.max_supercell_sites), False),
        (r.shear_cell_probability, with_sheared_cell, False),
        (r.permute_axes_probability, with_permuted_axes, False),
        (r.translate_probability, translated, False),
        (r.rotate_probability, rotated, True),
        (r.permute_sites_probability, with_permuted_sites, True),
        (r.strain_probability, partial(strained, max_strain=r.max_strain), False),
        (
            r.displace_probability,
            partial(displaced, max_displacement_angstrom=r.max_displacement_angstrom),
            True,
        ),
    ]


def translated(structure: Structure, rng: np.random.Generator) -> Structure:
    """Return a structure with all sites moved by one random vector, even over the cell."""
    return _with(structure, fractional=structure.frac_coords + rng.random(3))


def with_permuted_sites(structure: Structure | Molecule, rng: np.random.Generator) -> Structure | Molecule:
    """Return a structure or molecule with its sites in random order."""
    order = rng.permutation(len(structure))
    species = [structure[int(i)].species for i in order]
    if isinstance(structure, Molecule):
        return Molecule(species, structure.cart_coords[order], charge=structure.charge)
    return Structure(structure.lattice, species, structure.frac_coords[order])


def with_permuted_axes(structure: Structure, rng: np.random.Generator) -> Structure:
    """Return a structure with its cell's axes in random order, all reversed where handedness would change."""
    matrix = np.eye(3)[rng.permutation(3)]
    return with_cell(structure, matrix * round(float(np.linalg.det(matrix))))


def with_sheared_cell(structure: Structure, rng: np.random.Generator) -> Structure:
    """Return a structure in another cell of the same lattice: one axis plus or minus another one."""
    to, by = rng.permutation(3)[:2]
    matrix = np.eye(3)
    matrix[to, by] = rng.choice((-1.0, 1.0))
    return with_cell(structure, matrix)


def with_cell(structure: Structure, matrix: FloatArray) -> Structure:
    """Return a structure in another cell of its lattice.

    Args:
        structure: In the old cell.
        matrix: New axes as sums of the old ones: (3, 3), whole numbers, determinant 1.
    """
    lattice = Lattice(matrix @ structure.lattice.matrix)
    return _with(structure, lattice=lattice, fractional=structure.frac_coords @ np.linalg.inv(matrix))


def as_supercell(structure: Structure, rng: np.random.Generator, *, max_sites: int = 20) -> Structure:
    """Return a structure with one axis doubled; as it is, where that would be more than `max_sites` sites."""
    axis = int(rng.integers(3))
    if 2 * len(structure) > max_sites:
        return structure
    scale = np.where(np.arange(3) == axis, 2.0, 1.0)
    half = np.where(np.arange(3) == axis, 0.5, 0.0)
    fractional = structure.frac_coords / scale
    return Structure(
        Lattice(structure.lattice.matrix * scale[:, None]),
        [site.species for site in structure] * 2,
        np.concatenate([fractional, fractional + half]) % 1.0,
    )


def redescribed(structure: Structure, rng: np.random.Generator) -> Structure:
    """Return a structure in one of the descriptions that its space group's Euclidean normalizer allows.

    In the standard primitive cell, symmetrized; sites orbit by orbit.

    Raises:
        EncodeError: If no symmetry is found.
    """
    found = symmetric_crystal(structure, max_merge_angstrom=0.02)
    choices = descriptions(found, sorted(found.counts))
    return expand(choices[int(rng.integers(len(choices)))])


def rotated(structure: Structure | Molecule, rng: np.random.Generator) -> Structure | Molecule:
    """Return a structure or molecule in a random orientation, even over all rotations."""
    rotation = _rotation(rng)
    if isinstance(structure, Molecule):
        species = [site.species for site in structure]
        return Molecule(species, structure.cart_coords @ rotation.T, charge=structure.charge)
    return _with(structure, lattice=Lattice(structure.lattice.matrix @ rotation.T))


def strained(structure: Structure, rng: np.random.Generator, *, max_strain: float = 0.01) -> Structure:
    """Return a structure under a symmetric strain, each component even in [-max_strain, max_strain].

    Every length in the crystal changes by at most 3 max_strain (relative); fractional coordinates stay.
    """
    strain = rng.uniform(-max_strain, max_strain, (3, 3))
    strain = np.triu(strain) + np.triu(strain, 1).T
    return _with(structure, lattice=Lattice(structure.lattice.matrix @ (np.eye(3) + strain)))


def displaced(
    structure: Structure | Molecule, rng: np.random.Generator, *, max_displacement_angstrom: float = 0.02
) -> Structure | Molecule:
    """Return a structure or molecule with every atom moved at random, even in a ball of this radius."""
    directions = rng.normal(size=(len(structure), 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    shift = directions * max_displacement_angstrom * rng.random((len(structure), 1)) ** (1 / 3)
    moved = structure.cart_coords + shift
    if isinstance(structure, Molecule):
        return Molecule([site.species for site in structure], moved, charge=structure.charge)
    return _with(structure, fractional=structure.lattice.get_fractional_coords(moved))


def _with(
    structure: Structure, *, lattice: Lattice | None = None, fractional: FloatArray | None = None
) -> Structure:
    """Return a structure with another lattice or other coordinates, wrapped into [0, 1)."""
    coordinates = (structure.frac_coords if fractional is None else fractional) % 1.0
    coordinates[coordinates == 1.0] = 0.0  # what % gives for -1e-17
    return Structure(lattice or structure.lattice, [site.species for site in structure], coordinates)


def _rotation(rng: np.random.Generator) -> FloatArray:
    """Return a proper rotation, even over all of them: QR of a normal matrix with the signs fixed."""
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    rotation: FloatArray = q * np.sign(np.linalg.det(q))
    return rotation
