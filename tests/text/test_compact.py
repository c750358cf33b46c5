import pytest
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Lattice, Molecule, Structure

from crystallm_kit.errors import EncodeError, ParseError, UserError
from crystallm_kit.records import Crystal
from crystallm_kit.text.compact import CompactRepresentation

# Rock salt in its primitive cell, a = 5.6402 angstrom.
ROCK_SALT = "3.99 3.99 3.99\n60.0 60.0 60.0\nNa\n0.000 0.000 0.000\nCl\n0.500 0.500 0.500"


@pytest.fixture
def rock_salt():
    half = 5.6402 / 2
    lattice = Lattice([[0, half, half], [half, 0, half], [half, half, 0]])
    return Structure(lattice, ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])


def test_the_docstrings_sample_is_what_encode_writes(rock_salt):
    assert CompactRepresentation().encode(Crystal("x", rock_salt)) == ROCK_SALT


def test_the_published_layout_has_one_none_and_two_decimals(rock_salt):
    text = CompactRepresentation.crystal_text_llm().encode(Crystal("x", rock_salt))
    assert text == "4.0 4.0 4.0\n60 60 60\nNa\n0.00 0.00 0.00\nCl\n0.50 0.50 0.50"


def test_angles_are_rounded_not_cut():
    """Cutting 119.999 to 119 is what the published code does."""
    lattice = Lattice.from_parameters(3, 3, 5, 89.9999, 90.0001, 119.999)
    text = CompactRepresentation.crystal_text_llm().encode(
        Crystal("x", Structure(lattice, ["C"], [[0, 0, 0]]))
    )
    assert text.split("\n")[1] == "90 90 120"


def test_a_coordinate_that_rounds_to_one_is_written_zero():
    crystal = Crystal("x", Structure(Lattice.cubic(3), ["Po"], [[0.9997, -0.0001, 2.25]]))
    assert CompactRepresentation().encode(crystal).split("\n")[3] == "0.000 0.000 0.250"


def test_a_coordinate_of_one_is_read_as_zero():
    """The published layout writes 1.00 in a tenth of Materials Project cells."""
    text = "3.0 3.0 3.0\n90 90 90\nPo\n1.00 0.50 1.00"
    assert CompactRepresentation.crystal_text_llm().decode(text).structure.frac_coords.tolist() == [
        [0, 0.5, 0]
    ]


def test_sites_keep_their_order_and_ions_lose_their_charge(rock_salt):
    rock_salt.add_oxidation_state_by_element({"Na": 1, "Cl": -1})
    decoded = (
        CompactRepresentation().decode(CompactRepresentation().encode(Crystal("x", rock_salt))).structure
    )
    assert [site.specie.symbol for site in decoded] == ["Na", "Cl"]
    assert StructureMatcher().fit(decoded, rock_salt.remove_oxidation_states())


@pytest.mark.parametrize(
    ("old", "new", "reason", "line"),
    [
        ("0.500 0.500 0.500", "0.500 0.500 0.", "coordinates", 6),  # cut in the last number
        ("0.500 0.500 0.500", "0.500 0.500 0.50", "coordinates", 6),
        ("0.500 0.500 0.500", "0.500 0.500", "too_few_coordinates", 6),
        ("0.500 0.500 0.500", "0.500 0.500 0.500 0.500", "coordinates", 6),
        ("0.500 0.500 0.500", "0.500 0.500 7.500", "coordinates", 6),
        ("0.500 0.500 0.500", "0.500 0.500 1.500", "coordinates", 6),
        ("0.500 0.500 0.500", "0.500 0.500 -0.500", "coordinates", 6),
        ("0.500 0.500 0.500", "0.500  0.500 0.500", "coordinates", 6),
        ("0.500 0.500 0.500", "0.500 0.500 0.500 ", "coordinates", 6),
        ("\n0.500 0.500 0.500", "", "missing_coordinates", 5),
        ("\nCl\n0.500 0.500 0.500", "\nCl\n0.500 0.500 0.500\n", "unknown_element", 7),
        ("\nCl\n0.500 0.500 0.500", "\nCl\n0.500 0.500 0.500\nDone.", "unknown_element", 7),
        ("Cl", "Xx", "unknown_element", 5),
        ("Cl", "D", "unknown_element", 5),
        ("Cl", "cl", "unknown_element", 5),
        ("Cl", "Cl-", "unknown_element", 5),
        ("Na", "Na1", "unknown_element", 3),
        ("Na", "Fe2+", "unknown_element", 3),
        ("3.99 3.99 3.99", "-3.99 3.99 3.99", "lengths", 1),
        ("3.99 3.99 3.99", "0.00 3.99 3.99", "lengths", 1),
        ("3.99 3.99 3.99", "3.99 3.99", "lengths", 1),
        ("3.99 3.99 3.99", "3.99 3.99 3.99 3.99", "lengths", 1),
        ("3.99 3.99 3.99", "3.99 3.99 nan", "lengths", 1),
        ("60.0 60.0 60.0", "60.0 60.0 0.0", "angles", 2),
        ("60.0 60.0 60.0", "60.0 60.0 180.0", "angles", 2),
        ("60.0 60.0 60.0", "20.0 30.0 90.0", "cell", 2),  # no parallelepiped has these
        ("60.0 60.0 60.0", "120.0 120.0 120.0", "cell", 2),  # flat
        ("\nNa\n0.000 0.000 0.000\nCl\n0.500 0.500 0.500", "", "no_sites", 3),
    ],
)
def test_decode_refuses_what_is_not_exactly_a_crystal(old, new, reason, line):
    assert old in ROCK_SALT
    with pytest.raises(ParseError) as caught:
        CompactRepresentation().decode(ROCK_SALT.replace(old, new))
    assert (caught.value.reason, caught.value.line) == (reason, line)


def test_every_text_cut_before_its_last_character_is_refused_or_ends_with_a_site():
    whole_sites = ROCK_SALT[: ROCK_SALT.index("\nCl")]
    accepted = []
    for n in range(len(ROCK_SALT)):
        try:
            CompactRepresentation().decode(ROCK_SALT[:n])
        except ParseError:
            continue
        accepted.append(ROCK_SALT[:n])
    assert accepted == [whole_sites]


def test_a_molecule_is_sent_to_xyz():
    with pytest.raises(EncodeError, match="use 'xyz'"):
        CompactRepresentation().encode(Crystal("water", Molecule(["O"], [[0, 0, 0]])))


def test_a_slab_without_full_periodicity_is_refused(rock_salt):
    slab = Structure(Lattice(rock_salt.lattice.matrix, pbc=(True, True, False)), ["Na"], [[0, 0, 0]])
    with pytest.raises(EncodeError, match="periodic"):
        CompactRepresentation().encode(Crystal("slab", slab))


def test_a_cell_beyond_the_layout_is_an_encode_error():
    with pytest.raises(EncodeError, match=r"1000\.00"):
        CompactRepresentation().encode(Crystal("x", Structure(Lattice.cubic(1000), ["Po"], [[0, 0, 0]])))


def test_impossible_decimals_are_refused():
    with pytest.raises(UserError, match="coordinate_decimals 0; expected 1 to 9"):
        CompactRepresentation(coordinate_decimals=0)
