"""Frames are read as they are meant, or refused with the reason."""

import io

import numpy as np
import pytest
from pymatgen.core import Lattice, Molecule, Structure

from crystallm_kit.errors import ReadError
from crystallm_kit.structures.extended_xyz import frame_text, frames, labels_of, structure_of

LATTICE = 'Lattice="4 0 0 0 4 0 0 0 4"'


def one(text: str) -> Structure | Molecule:
    (frame,) = frames(io.StringIO(text))
    return structure_of(frame)


def cscl(comment: str, first: str = "Cs 0 0 0", second: str = "Cl 2 2 2") -> Structure | Molecule:
    return one(f"2\n{comment}\n{first}\n{second}\n")


@pytest.mark.parametrize(
    "comment",
    [
        LATTICE,  # no pbc means periodic
        f'{LATTICE} Properties=species:S:1:pos:R:3 pbc="T T T" energy=-6.8',
        LATTICE.lower(),  # other readers take this for a label, and lose the cell without a word
        'pbc="T T T" LATTICE="4 0 0 0 4 0 0 0 4"',
    ],
)
def test_a_frame_with_a_cell_is_a_crystal(comment):
    found = cscl(comment)
    assert isinstance(found, Structure)
    assert [s.species_string for s in found] == ["Cs", "Cl"]
    assert np.allclose(found.frac_coords, [[0, 0, 0], [0.5, 0.5, 0.5]])


@pytest.mark.parametrize("comment", ["", "water", f'{LATTICE} pbc="F F F"'])
def test_a_frame_without_periodicity_is_a_molecule(comment):
    assert isinstance(cscl(comment), Molecule)


def test_ase_reads_the_same_crystal():
    comment = 'Lattice="4 0 0 1 4 0 0 1 4" Properties=forces:R:3:Z:I:1:pos:R:3 pbc="T T T"'
    text = f"2\n{comment}\n1 2 3 55 0 -1 9\n1 2 3 17 2 2 2\n"
    import ase.io

    theirs = ase.io.read(io.StringIO(text), format="extxyz")
    ours = one(text)
    assert [s.species_string for s in ours] == theirs.get_chemical_symbols()
    assert np.allclose(ours.lattice.matrix, theirs.cell.array)
    assert np.allclose(ours.frac_coords, theirs.get_scaled_positions())


def test_atomic_numbers_fortran_exponents_and_deuterium_are_read():
    found = cscl(LATTICE, "55 0.0d0 1D-1 0", "D 2 2 2")
    assert [s.species_string for s in found] == ["Cs", "H"]
    assert found.cart_coords[0].tolist() == pytest.approx([0, 0.1, 0])


def test_a_left_handed_cell_is_kept():
    found = cscl('Lattice="0 4 0 4 0 0 0 0 4"')
    assert np.linalg.det(found.lattice.matrix) < 0


@pytest.mark.parametrize(
    ("comment", "first", "reason"),
    [
        (f'{LATTICE} pbc="T T F"', "Cs 0 0 0", "three directions"),
        (f'{LATTICE} pbc="yes"', "Cs 0 0 0", "three of T and F"),
        ('Lattice="4 4 4"', "Cs 0 0 0", "3 numbers, 9 expected"),
        ('Lattice="4 0 0 4 0 0 0 0 4"', "Cs 0 0 0", "no volume"),
        ("4,0,0,0,4,0,0,0,4", "Cs 0 0 0", "nine numbers"),
        (LATTICE, "Fe1 0 0 0", "'Fe1' is no element"),
        (LATTICE, "X 0 0 0", "'X' is no element"),
        (LATTICE, "119 0 0 0", "atomic number 119"),
        (LATTICE, "Cs 0 0", "3 columns, 4 expected"),
        (LATTICE, "Cs 0 0 here", "atom line 1 'Cs 0 0 here': 'here' is no number"),
        (LATTICE, "Cs 0 0 nan", "not finite"),
        (f"{LATTICE} Properties=pos:R:3", "Cs 0 0 0", "species"),
    ],
)
def test_what_cannot_be_meant_is_refused(comment, first, reason):
    with pytest.raises(ReadError, match=reason):
        cscl(comment, first)


def test_reading_goes_on_after_a_short_frame():
    text = f"3\n{LATTICE}\nNa 0 0 0\n1\n{LATTICE}\nFe 0 0 0\n\nwhat\n1\n{LATTICE}\nCu 0 0 0\r\n\n"
    found = list(frames(io.StringIO(text)))
    assert [bool(frame.fault) for frame in found] == [True, False, True, False]
    assert found[0].fault == "1 atom lines, 3 expected"
    assert [structure_of(f).formula for f in found if not f.fault] == ["Fe1", "Cu1"]


def test_labels_of_one_value_are_kept_and_lists_are_not():
    labels = "energy=-6.8 n=3 ok=T name='a b' stress='1 2 3' REF_energy=1e-3 config_type=bulk"
    (frame,) = frames(io.StringIO(f"1\n{LATTICE} {labels}\nFe 0 0 0\n"))
    expected = {"energy": -6.8, "n": 3, "ok": True, "name": "a b", "REF_energy": 1e-3, "config_type": "bulk"}
    assert labels_of(frame) == expected


def test_a_written_frame_is_read_back_by_ase():
    import ase.io

    quartz = Structure(Lattice.hexagonal(4.9, 5.4), ["Si", "O"], [[0.47, 0, 0.66], [0.41, 0.27, 0.79]])
    atoms = ase.io.read(io.StringIO(frame_text(quartz, {"energy": -1.5, "note": 'a "b"'})), format="extxyz")
    assert atoms.pbc.all()
    assert np.allclose(atoms.get_scaled_positions(), quartz.frac_coords)
    assert atoms.get_potential_energy() == -1.5
    assert atoms.info["note"] == "a 'b'"
