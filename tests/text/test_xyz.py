import io

import numpy as np
import pytest
from pymatgen.core import Lattice, Molecule, Structure

from crystallm_kit.errors import EncodeError, ParseError, UserError
from crystallm_kit.records import Crystal
from crystallm_kit.text.xyz import XyzRepresentation

CELL = (
    'Lattice="3.988 0.000 0.000 1.994 3.454 0.000 1.994 1.151 3.256" '
    'Properties=species:S:1:pos:R:3 pbc="T T T"'
)
ROCK_SALT = f"2\n{CELL}\nNa 0.000 0.000 0.000\nCl 3.988 2.303 1.628"
# Water, H-O 0.96 angstrom.
WATER = "3\n\nO 0.000 0.000 0.117\nH 0.000 0.757 -0.471\nH 0.000 -0.757 -0.471"


@pytest.fixture
def rock_salt():
    half = 5.6402 / 2
    lattice = Lattice([[0, half, half], [half, 0, half], [half, half, 0]])
    return Structure(lattice, ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])


def test_the_docstrings_sample_is_what_encode_writes(rock_salt):
    assert XyzRepresentation().encode(Crystal("x", rock_salt)) == ROCK_SALT


def test_turning_the_crystal_does_not_change_its_text(rock_salt):
    turn = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))[0]
    turn *= np.linalg.det(turn)
    turned = Structure(rock_salt.lattice.matrix @ turn.T, rock_salt.species, rock_salt.frac_coords)
    assert XyzRepresentation().encode(Crystal("x", turned)) == ROCK_SALT


def test_the_stored_orientation_is_kept_on_request(rock_salt):
    text = XyzRepresentation(standard_orientation=False).encode(Crystal("x", rock_salt))
    assert text.split("\n")[1].startswith('Lattice="0.000 2.820 2.820 2.820 0.000 2.820 2.820 2.820 0.000"')


def test_ase_reads_the_crystal_as_it_is_meant(rock_salt):
    from ase.io import read

    atoms = read(io.StringIO(XyzRepresentation().encode(Crystal("x", rock_salt)) + "\n"), format="extxyz")
    assert atoms.get_chemical_symbols() == ["Na", "Cl"]
    assert atoms.pbc.all()
    assert atoms.get_distance(0, 1, mic=True) == pytest.approx(5.6402 / 2, abs=2e-3)


def test_a_molecule_is_plain_xyz_and_comes_back_a_molecule():
    water = Molecule(["O", "H", "H"], [[0, 0, 0.117], [0, 0.757, -0.471], [0, -0.757, -0.471]])
    text = XyzRepresentation().encode(Crystal("water", water))
    assert text == WATER
    decoded = XyzRepresentation().decode(text).structure
    assert isinstance(decoded, Molecule)
    assert np.allclose(decoded.cart_coords, water.cart_coords, atol=5e-4)
    assert XyzRepresentation().encode(Crystal("x", decoded)) == WATER


def test_a_radical_can_be_read():
    """pymatgen refuses an odd number of electrons unless told not to look."""
    assert len(XyzRepresentation().decode("1\n\nH 0.000 0.000 0.000").structure) == 1


def test_sites_are_moved_into_the_cell_and_no_zero_is_negative():
    crystal = Crystal(
        "x", Structure(Lattice.cubic(4), ["Po", "Po"], [[-1e-9, 1.25, 0.99999999], [0.5, -0.5, 0]])
    )
    assert XyzRepresentation().encode(crystal).split("\n")[2:] == [
        "Po 0.000 1.000 0.000",
        "Po 2.000 2.000 0.000",
    ]


@pytest.mark.parametrize(
    ("old", "new", "reason", "line"),
    [
        ("2\nL", "3\nL", "too_few_sites", 4),
        ("2\nL", "1\nL", "too_many_sites", 4),
        ("2\nL", "two\nL", "count", 1),
        ("2\nL", "02\nL", "count", 1),
        ("Lattice", "lattice", "comment", 2),  # else silently a label, and the frame a molecule
        ('pbc="T T T"', 'pbc="T T F"', "comment", 2),
        (CELL, "made by hand", "comment", 2),
        ("3.256", "", "cell", 2),
        ("3.256", "0.000", "cell", 2),
        ("3.256", "-3.256", "cell", 2),
        ("3.256", "3.25", "cell", 2),
        ("1.628", "1.", "coordinates", 4),
        ("1.628", "1.628 1.000", "coordinates", 4),
        ("1.628", "1.628 ", "coordinates", 4),
        (" 1.628", "", "too_few_coordinates", 4),
        ("1.628", "1.628\n", "too_many_sites", 5),
        ("Cl", "Cl1", "unknown_element", 4),
        ("Cl", "X", "unknown_element", 4),
        ("Cl", "17", "unknown_element", 4),
    ],
)
def test_decode_refuses_what_is_not_exactly_a_crystal(old, new, reason, line):
    assert old in ROCK_SALT
    with pytest.raises(ParseError) as caught:
        XyzRepresentation().decode(ROCK_SALT.replace(old, new))
    assert (caught.value.reason, caught.value.line) == (reason, line)


def test_no_text_that_was_cut_is_accepted():
    for text in (ROCK_SALT, WATER):
        for n in range(len(text)):
            with pytest.raises(ParseError):
                XyzRepresentation().decode(text[:n])


def test_a_molecule_too_far_from_the_origin_is_an_encode_error():
    with pytest.raises(EncodeError, match="expected less than 1000"):
        XyzRepresentation().encode(Crystal("far", Molecule(["He"], [[0, 0, 1200.0]])))


def test_impossible_decimals_are_refused():
    with pytest.raises(UserError, match="decimals 0; expected 1 to 9"):
        XyzRepresentation(decimals=0)
