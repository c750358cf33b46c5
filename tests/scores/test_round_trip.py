import math

import pytest
from pymatgen.core import Lattice, Molecule, Structure

from crystallm_kit.errors import EmptyInput, UnknownName, UserError
from crystallm_kit.records import Crystal
from crystallm_kit.scores.round_trip import main, markdown_table, measure_loss
from crystallm_kit.text.compact import CompactRepresentation
from crystallm_kit.text.representation import representation
from crystallm_kit.text.xyz import XyzRepresentation

PEROVSKITE = Crystal(
    "perovskite",
    Structure(
        Lattice.cubic(3.995),
        ["Ba", "Ti", "O", "O", "O"],
        [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]],
    ),
)
ALLOY = Crystal("alloy", Structure(Lattice.cubic(3.6), [{"Cu": 0.5, "Au": 0.5}], [[0, 0, 0]]))


def test_the_volume_error_is_that_of_the_rounded_cell():
    loss = measure_loss([PEROVSKITE], CompactRepresentation.crystal_text_llm())
    assert loss.quantile("volume_error", 0.5) == pytest.approx((4.0 / 3.995) ** 3 - 1, rel=1e-6)
    assert (loss.n_matched, loss.n_spacegroup_kept) == (1, 1)


def test_the_rmsd_is_the_shift_over_the_length_of_an_atoms_volume():
    """One of two atoms moves by 0.004 angstrom: 0.002 each about their centre, in 8 angstrom^3 per atom."""
    pair = Structure(Lattice.orthorhombic(2, 2, 4), ["Na", "Cl"], [[0, 0, 0], [0, 0, 0.501]])
    loss = measure_loss([Crystal("pair", pair)], CompactRepresentation(coordinate_decimals=2))
    assert loss.quantile("rmsd", 0.5) == pytest.approx(0.002 / 2, rel=1e-6)


def test_what_cannot_be_written_stays_in_the_denominator():
    loss = measure_loss([PEROVSKITE, ALLOY], XyzRepresentation())
    assert (len(loss.trips), loss.n_matched, loss.n_spacegroup_kept) == (2, 1, 1)
    assert [failure.split(":")[0] for failure in loss.failures()] == ["not written"]
    assert math.isfinite(loss.quantile("rmsd", 0.95))
    assert "| 50.00% (1/2) |" in markdown_table([loss])


def test_tokens_are_counted_by_hand():
    # 3 lines of 3 numbers "4.0", "90", "0.00" with blanks: 11, 8 and 14 tokens; 1 for W; 3 newlines.
    tungsten = Crystal("x", Structure(Lattice.cubic(4), ["W"], [[0, 0, 0]]))
    loss = measure_loss([tungsten], CompactRepresentation.crystal_text_llm())
    assert loss.mean_tokens == 11 + 8 + 14 + 1 + 3


@pytest.mark.parametrize("name", ["cif", "compact", "wyckoff", "xyz"])
def test_every_format_can_be_measured(name):
    loss = measure_loss([PEROVSKITE], representation(name))
    assert (loss.n_matched, loss.n_spacegroup_kept) == (1, 1)
    assert loss.mean_tokens > 5


def test_no_crystals_is_no_share():
    with pytest.raises(EmptyInput):
        measure_loss([], XyzRepresentation())


def test_a_molecule_is_refused():
    with pytest.raises(UserError, match="'he' is a molecule"):
        measure_loss([Crystal("he", Molecule(["He"], [[0, 0, 0]]))], XyzRepresentation())


def test_the_command_reads_a_file_and_prints_a_row_a_format(tmp_path, capsys):
    PEROVSKITE.structure.to(str(tmp_path / "a.cif"))
    main([str(tmp_path / "a.cif"), "--formats", "xyz:decimals=2", "wyckoff"])
    rows = capsys.readouterr().out.splitlines()
    assert rows[2].startswith("| xyz:decimals=2 | 100.00% (1/1) |")
    assert rows[3].startswith("| wyckoff | 100.00% (1/1) |")


@pytest.mark.parametrize(("words", "error"), [("xzy", UnknownName), ("xyz:decimals=few", UserError)])
def test_the_command_refuses_unknown_formats_and_settings(words, error, tmp_path):
    with pytest.raises(error):
        main([str(tmp_path), "--formats", words])
