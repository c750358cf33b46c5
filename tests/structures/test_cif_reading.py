"""The quick CIF reader gives what pymatgen's parser gives, or leaves the text to it."""

import gzip
import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure
from pymatgen.io.cif import CifWriter

from crystallm_kit.errors import ReadError
from crystallm_kit.structures.cif_reading import (
    build_structure,
    lattice_from_parameters,
    structure_from_any_cif,
    structure_from_plain_cif,
)

# Rock salt, https://next-gen.materialsproject.org/materials/mp-22862; quartz; an unsorted triclinic cell
ROCK_SALT = Structure.from_spacegroup(
    "Fm-3m", Lattice.cubic(5.6402), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]
)
QUARTZ = Structure.from_spacegroup(
    "P3_221", Lattice.hexagonal(4.9134, 5.4052), ["Si", "O"], [[0.4699, 0, 2 / 3], [0.4141, 0.2681, 0.7854]]
)
TRICLINIC = Structure(
    Lattice.from_parameters(5.1, 6.2, 7.3, 81, 97, 103),
    ["Cu", "Cd", "Cu", "O"],
    [[0.01, 0.2, 0.3], [0.5, 0.51, 0.52], [0.7, 0.1, 0.9], [0.99999, 0.25, 0.6]],
)


def cif(structure: Structure, **settings) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # spglib tells pymatgen of a setting that it is to drop
        return str(CifWriter(structure, **settings))


def same(one: Structure, other: Structure) -> bool:
    return (
        [s.species_string for s in one] == [s.species_string for s in other]
        and np.allclose(one.lattice.matrix, other.lattice.matrix, atol=1e-8)
        and np.allclose(one.frac_coords, other.frac_coords, atol=1e-8)
    )


@pytest.mark.parametrize("structure", [ROCK_SALT, QUARTZ, TRICLINIC], ids=lambda s: s.formula)
@pytest.mark.parametrize("symprec", [None, 0.01])
def test_the_quick_reader_equals_pymatgens_parser(structure, symprec):
    text = cif(structure, symprec=symprec)
    quick = structure_from_plain_cif(text)
    assert quick is not None
    assert same(quick, structure_from_any_cif(text))


def test_sites_keep_the_order_of_the_file():
    text = cif(TRICLINIC)
    expected = ["Cu", "Cd", "Cu", "O"]  # pymatgen alone would give Cd Cu Cu O, by electronegativity
    assert [s.species_string for s in structure_from_any_cif(text)] == expected
    assert [s.species_string for s in structure_from_plain_cif(text)] == expected


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("0.00000000  1\n", "0.00000000  0.5\n"),  # a partial occupancy
        ("Na  Na0", "Na+  Na0"),
        ("0.50000000", "0.5(2)"),
        ("  Na  Na0  1  ", "  Na  Na0  2  "),  # a multiplicity that the operations do not make
        ("'x, y, z'", "'x, y, z+'"),
        ("data_", "data_a\ndata_"),
    ],
)
def test_the_quick_reader_leaves_what_it_does_not_know(old, new):
    text = cif(ROCK_SALT)
    assert old in text
    assert structure_from_plain_cif(text.replace(old, new, 1)) is None


def test_the_quick_reader_leaves_sites_that_coincide():
    twice = Structure(Lattice.cubic(4), ["Na", "Cl"], [[0, 0, 0], [0.9999, 0, 0]])
    assert structure_from_plain_cif(cif(twice)) is None
    with pytest.raises(ReadError, match="Occupancy"):
        structure_from_any_cif(cif(twice))


def test_four_decimals_on_special_positions_give_no_extra_sites():
    """With pymatgen's own site tolerance such images count as different sites."""
    text = cif(QUARTZ, symprec=0.01, significant_figures=4)
    assert len(structure_from_plain_cif(text)) == len(structure_from_any_cif(text)) == 9


def test_oxidation_states_are_dropped():
    charged = ROCK_SALT.copy()
    charged.add_oxidation_state_by_element({"Na": 1, "Cl": -1})
    text = cif(charged)
    assert {s.species_string for s in structure_from_any_cif(text)} == {"Na", "Cl"}


def test_coordinates_lie_in_the_half_open_unit_cell():
    made = build_structure(
        Lattice.cubic(4), ["Na"] * 3, np.array([[-1e-17, 1.0, -0.25], [2.5, 0, 0], [0.1] * 3])
    )
    assert made.frac_coords.tolist() == [[0, 0, 0.75], [0.5, 0, 0], [0.1] * 3]


@pytest.mark.parametrize(
    "parameters",
    [(4, 4, 4, 60, 20, 20), (4, 4, 0, 90, 90, 90), (4, 4, float("nan"), 90, 90, 90), (1, 1, 1, 90, 90, 180)],
)
def test_a_cell_without_volume_is_refused(parameters):
    with pytest.raises(ReadError, match="cell"):
        lattice_from_parameters(parameters)


def test_deuterium_is_hydrogen_and_dummies_are_no_elements():
    assert build_structure(Lattice.cubic(4), ["D"], np.zeros((1, 3)))[0].species_string == "H"
    with pytest.raises(ReadError, match="'X' is no element"):
        build_structure(Lattice.cubic(4), ["X"], np.zeros((1, 3)))


@pytest.mark.real_data
@pytest.mark.parametrize("file", ["mp_val", "perov_5_val", "carbon_24_val", "aflow_bulk_modulus_val"])
def test_real_cifs_read_quickly_and_like_pymatgen(file):
    if "CRYSTALLM_KIT_DATA" not in os.environ:
        pytest.skip("CRYSTALLM_KIT_DATA names no data folder")
    import pyarrow.parquet as pq

    texts = pq.read_table(Path(os.environ["CRYSTALLM_KIT_DATA"]) / f"{file}.parquet")["cif"].to_pylist()[:100]
    for text in texts:
        quick = structure_from_plain_cif(text)
        assert quick is not None
        assert same(quick, structure_from_any_cif(text))


@pytest.mark.real_data
def test_real_symmetrized_cifs_read_like_pymatgen():
    if "CRYSTALLM_KIT_GOLDEN" not in os.environ:
        pytest.skip("CRYSTALLM_KIT_GOLDEN names no golden folder")
    with gzip.open(Path(os.environ["CRYSTALLM_KIT_GOLDEN"]) / "crystallm_cif_golden.json.gz") as lines:
        texts = [row["raw_cif"] for row in json.load(lines)][::5]
    for text in texts:
        quick = structure_from_plain_cif(text)
        assert quick is not None
        assert same(quick, structure_from_any_cif(text))
