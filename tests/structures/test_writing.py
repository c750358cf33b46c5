"""The text of one crystal: what is written here reads as what pymatgen writes."""

import pytest
from pymatgen.core import Lattice, Structure
from pymatgen.io.cif import CifWriter

from crystallm_kit.records import Crystal
from crystallm_kit.structures.writing import text_of


@pytest.mark.parametrize(
    ("species", "point"),
    [
        (["Na", "Cl"], [0.25, 1 / 3, 0.9999999999]),
        (["Na", "Cl"], [-0.1, 1.5, 0.0]),
        (["Na", "Cl"], [-12.0, 1.5, 0.0]),
        (["O", "O"], [0.5, 0.5, 0.5]),
        (["Na+", "Cl-"], [0.5, 0.5, 0.5]),
        (["Na", {"Cl": 0.5, "Br": 0.5}], [0.5, 0.5, 0.5]),
        (["Na", {"Cl": 0.5}], [0.5, 0.5, 0.5]),
        (["Na", "D"], [0.5, 0.5, 0.5]),
    ],
)
def test_a_cif_reads_as_pymatgen_writes_it_to_the_last_character(species, point):
    structure = Structure(
        Lattice.from_parameters(3.1, 4.123456, 5, 88, 90, 91.5), species, [[0, 0, 0], point]
    )
    assert text_of(Crystal("x", structure), "cif") == str(CifWriter(structure))


def test_a_cif_of_many_elements_reads_as_pymatgen_writes_it():
    symbols = ["H", "Li", "Be", "B", "C", "N", "O", "F", "Na", "Mg", "Al", "Si", "P", "S", "Cl", "K", "Ca"]
    points = [[i / 20, 0.1, 0.2] for i in range(len(symbols))]
    structure = Structure(Lattice.cubic(30), symbols, points)
    assert text_of(Crystal("x", structure), "cif") == str(CifWriter(structure))
