"""What is compared of a whole set of crystals, column by column, and the element tables that go with it.

    columns_of(cell_formulas=["Na4 Cl4"], spacegroup_numbers=[225], volume_per_atom_angstrom3=[22.4],
               density_g_cm3=[2.16]).atoms.sum() -> 8

Not here: the numbers made of them (statistics.py).
Tables and their sources: element_statistics.json.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources

import numpy as np
from numpy.typing import ArrayLike, NDArray

from crystallm_kit.errors import EmptyInput, UserError
from crystallm_kit.structures.symmetry import crystal_system

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

N_ELEMENTS, N_SPACEGROUPS = 118, 230
HHI_UNKNOWN = 10_000.0  # LeMat's, of an element that is not in the table
_SYSTEMS = tuple(dict.fromkeys(crystal_system(number) for number in range(1, N_SPACEGROUPS + 1)))


@dataclass(frozen=True, eq=False)
class SetColumns:
    """What is compared of a set, one row a crystal.

    Attributes:
        atoms: (N, 119) atoms of each atomic number in the cell.
        spacegroup_numbers: (N,) 1-230; 0: none was found.
        volume_angstrom3: (N,) of the cell.
        density_g_cm3: (N,).
        cell_lengths_angstrom: (N, 3); None: not at hand.
    """

    atoms: IntArray
    spacegroup_numbers: IntArray
    volume_angstrom3: FloatArray
    density_g_cm3: FloatArray
    cell_lengths_angstrom: FloatArray | None = None

    def __len__(self) -> int:
        return len(self.atoms)

    @property
    def n_sites(self) -> IntArray:
        """(N,) atoms in the cell."""
        return np.asarray(self.atoms.sum(axis=1))


def columns_of(
    *,
    cell_formulas: Sequence[str],
    spacegroup_numbers: Sequence[int | None] | NDArray[np.floating],
    volume_per_atom_angstrom3: ArrayLike,
    density_g_cm3: ArrayLike,
    cell_lengths_angstrom: ArrayLike | None = None,
) -> SetColumns:
    """Return the columns of a set from those of its rows.

    Args:
        cell_formulas: "Na4 Cl4", whole cells.
        spacegroup_numbers: 1-230; None, 0 or NaN: none was found.
        volume_per_atom_angstrom3, density_g_cm3, cell_lengths_angstrom: (N,), (N,), (N, 3).

    Raises:
        EmptyInput: Without rows.
        UserError: If the columns are of different lengths, or a formula cannot be read.
    """
    if not len(cell_formulas):
        raise EmptyInput("statistics of a set: no crystals, so no numbers")
    atoms = np.array([_atoms_of(formula) for formula in cell_formulas])
    numbers = np.array([0 if n is None or n != n else int(n) for n in spacegroup_numbers], dtype=np.int64)
    per_atom = np.asarray(volume_per_atom_angstrom3, dtype=np.float64)
    density = np.asarray(density_g_cm3, dtype=np.float64)
    lengths = None if cell_lengths_angstrom is None else np.asarray(cell_lengths_angstrom, dtype=np.float64)
    columns = [atoms, numbers, per_atom, density, *([] if lengths is None else [lengths])]
    sizes = {len(column) for column in columns}
    if len(sizes) > 1:
        raise UserError(f"statistics of a set: columns of {sorted(sizes)} rows; one row a crystal expected")
    return SetColumns(atoms, numbers, per_atom * atoms.sum(axis=1), density, lengths)


@lru_cache(maxsize=100_000)
def _atoms_of(formula: str) -> IntArray:
    found = np.zeros(N_ELEMENTS + 1, dtype=np.int64)
    for symbol, count in re.findall(r"([A-Z][a-z]?)(\d*)", formula):
        number = _atomic_numbers().get(symbol)
        if number is None:
            raise UserError(f"formula '{formula}': no element {symbol}; a cell as 'Na4 Cl4' expected")
        found[number] += int(count or 1)
    if not found.any():
        raise UserError(f"formula '{formula}': no atoms; a cell as 'Na4 Cl4' expected")
    found.setflags(write=False)
    return found


def one_hot(values: IntArray, n: int) -> FloatArray:
    """(N, n) with a 1 in each row, at its value."""
    found = np.zeros((len(values), n))
    found[np.arange(len(values)), values] = 1.0
    return found


def spacegroup_counts(of: SetColumns) -> FloatArray:
    """(N, 230); a row without a space group is 0."""
    return one_hot(of.spacegroup_numbers, N_SPACEGROUPS + 1)[:, 1:]


def system_counts(of: SetColumns) -> FloatArray:
    """(N, 7); a row without a space group is 0."""
    systems = np.array([_SYSTEMS.index(crystal_system(n)) for n in range(1, N_SPACEGROUPS + 1)])
    return spacegroup_counts(of) @ one_hot(systems, len(_SYSTEMS))


def spacegroups_with_p1(of: SetColumns) -> FloatArray:
    """(N, 231) by number; a row without a space group is P1."""
    return one_hot(np.maximum(of.spacegroup_numbers, 1), N_SPACEGROUPS + 1)


def pettifor_shares(of: SetColumns) -> FloatArray:
    """(N, numbers) atomic fractions by modified Pettifor number."""
    numbers = _pettifor()
    return (of.atoms / of.n_sites[:, None]) @ one_hot(numbers, int(numbers.max()) + 1)


@cache
def _elements() -> dict[str, tuple[int | None, int | None, int]]:
    """Symbol -> indices of production and reserves, modified Pettifor number; in the order of the numbers."""
    table = resources.files("crystallm_kit.scores").joinpath("element_statistics.json")
    elements = json.loads(table.read_text(encoding="utf-8"))["elements"]
    return {
        symbol: (production, reserves, number) for symbol, (production, reserves, number) in elements.items()
    }


@cache
def _atomic_numbers() -> dict[str, int]:
    """Atomic numbers by symbol; deuterium and tritium are hydrogen."""
    return {symbol: z for z, symbol in enumerate(_elements(), start=1)} | {"D": 1, "T": 1}


@cache
def supply_concentration() -> FloatArray:
    """(2, 119) indices of production and reserves by atomic number, 0 to 10,000."""
    found = np.full((2, N_ELEMENTS + 1), HHI_UNKNOWN)
    for z, row in enumerate(_elements().values(), start=1):
        for i in (0, 1):
            value = row[i]
            if value is not None:
                found[i, z] = value
    return found


@cache
def _pettifor() -> IntArray:
    """(119,) modified Pettifor numbers by atomic number; entry 0 is no element."""
    return np.array([0, *(row[2] for row in _elements().values())], dtype=np.int64)
