"""All protocols' checks in one pass, and their shares."""

import os
from pathlib import Path

import numpy as np
import pytest
from pymatgen.core import Lattice, Molecule, Structure

from crystallm_kit.errors import EmptyInput, UserError
from crystallm_kit.records import Crystal
from crystallm_kit.scores.charge import is_charge_balanced
from crystallm_kit.scores.checks import CHECKS, check_scores, structure_checks
from crystallm_kit.scores.checks_speed import main
from crystallm_kit.scores.lemat import lemat_checks
from crystallm_kit.scores.validity import validate
from crystallm_kit.structures.files import read
from crystallm_kit.structures.writing import write
from crystallm_kit.text.cif import CifRepresentation

SAMPLES = os.environ.get("CRYSTALLM_KIT_SAMPLES", "")
FCC = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
TEXT = ("formula_consistent", "multiplicity_consistent", "spacegroup_consistent")


@pytest.fixture
def rocksalt():
    """NaCl, AFLOW AB_cF8_225_a_b, conventional cell."""
    return Structure(Lattice.cubic(5.64), ["Na"] * 4 + ["Cl"] * 4, np.vstack([FCC, 0.5 - FCC]))


@pytest.fixture
def rocksalt_text(rocksalt):
    return CifRepresentation().encode(Crystal("nacl", rocksalt))


def cubic(edge, species, coordinates):
    return Structure(Lattice.cubic(edge), species, coordinates)


def test_rock_salt_passes_every_check(rocksalt, rocksalt_text):
    row = structure_checks(rocksalt, cif_text=rocksalt_text, with_bonds=True, is_fingerprintable=True)
    assert {*CHECKS, "crystallm.bond_score", "crystallm_pi.bond_score", "lemat.spacegroup_number"} == set(row)
    assert {name for name, passed in row.items() if not passed} == {"kit.element_or_alloy"}
    assert row["crystallm.bond_score"] == 1.0
    assert row["lemat.spacegroup_number"] == 225


def test_checks_whose_input_is_not_there_are_absent(rocksalt):
    row = structure_checks(rocksalt)
    assert not [name for name in row if name.endswith(("fingerprintable", *TEXT, "bond_score"))]
    assert "crystallm.valid" not in row
    assert row["crystallm.csp_valid"]


@pytest.mark.parametrize(
    ("structure", "peer", "ours"),
    [
        (cubic(0.48, ["Fe"], [[0, 0, 0]]), "cdvae.structure_valid", "kit.cdvae_structure_valid_with_images"),
        (
            Structure(Lattice.orthorhombic(0.3, 10, 10), ["Na", "Cl"], [[0, 0, 0], [0, 0.5, 0.5]]),
            "cdvae.structure_valid",
            "kit.cdvae_structure_valid_with_images",
        ),
        (cubic(1.3, ["Li"], [[0, 0, 0]]), "lemat.valid", "kit.lemat_distance_with_images"),
        (cubic(1.3, ["Li"], [[0, 0, 0]]), "lemat.distance", "kit.structure_valid"),
    ],
)
def test_images_of_the_same_atom_count_under_the_kits_names_only(structure, peer, ours):
    row = structure_checks(structure)
    assert row[peer]
    assert not row[ours]


def test_long_cells_fail_crystallm_pis_xrd_rule_only():
    row = structure_checks(Structure(Lattice.tetragonal(4, 41), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]))
    assert not row["crystallm_pi.structure_valid_xrd"]
    assert row["cdvae.structure_valid"]


def test_nothing_passes_without_an_ordered_structure_in_a_cell():
    shared = Structure(Lattice.cubic(4), [{"Na": 0.5, "K": 0.5}], [[0, 0, 0]])
    lost = cubic(4, ["Na"], [[np.nan, 0, 0]])
    water = Molecule(["O", "H", "H"], [[0, 0, 0.119], [0, 0.763, -0.477], [0, -0.763, -0.477]])
    for structure in (None, shared, water):
        assert not any(structure_checks(structure).values())
    assert {name for name, passed in structure_checks(lost).items() if passed} == {
        # read from the composition alone
        "kit.element_or_alloy",
        *(name for name in CHECKS if name.endswith(".comp_valid")),
    }


def test_checks_agree_with_the_modules_that_own_them():
    draw = np.random.default_rng(5)
    for i in range(40):
        symbols = draw.choice(["Na", "Fe", "O", "Cl", "Si", "H"], size=draw.integers(1, 5))
        structure = Structure(
            Lattice.from_parameters(*draw.uniform(2, 6, 3), *draw.uniform(60, 120, 3)),
            list(symbols), draw.random((len(symbols), 3)),
        )  # fmt: skip
        row = structure_checks(structure)
        counts = {e.symbol: int(n) for e, n in structure.composition.items()}
        assert row["cdvae.comp_valid"] == is_charge_balanced(counts)
        valid = row["kit.structure_valid"] and row["kit.comp_valid"]
        assert valid == validate(structure).valid, i
        lemat = {name.removeprefix("lemat."): passed for name, passed in row.items() if name in (
            "lemat.charge_neutral", "lemat.distance", "lemat.plausible")}  # fmt: skip
        assert lemat == lemat_checks(structure)
        distances = structure.distance_matrix[np.triu_indices(len(structure), 1)]
        assert row["cdvae.structure_valid"] == bool((distances >= 0.5).all() and structure.volume >= 0.1)


def test_texts_that_contradict_themselves_fail(rocksalt, rocksalt_text):
    for old, new, failing in (
        ("data_Na4Cl4", "data_Na4Cl8", "formula_consistent"),
        ("Cl Cl1 4", "Cl Cl1 8", "multiplicity_consistent"),
        ("H-M Fm-3m", "H-M Pm-3m", "spacegroup_consistent"),
    ):
        changed = rocksalt_text.replace(old, new)
        assert changed != rocksalt_text
        row = structure_checks(rocksalt, cif_text=changed)
        assert [name for name in TEXT if not row[f"crystallm.{name}"]] == [failing]


def test_a_cell_of_fewer_sites_than_the_formula_is_not_the_kits_structure(rocksalt, rocksalt_text):
    merged = rocksalt.copy()
    merged.remove_sites([7])
    row = structure_checks(merged, cif_text=rocksalt_text)
    assert row["cdvae.structure_valid"]
    assert not row["kit.structure_valid"]


def test_a_stated_p1_passes_the_peers_check_and_not_the_kits(rocksalt_text):
    askew = Structure(
        Lattice.from_parameters(4, 5, 6, 80, 85, 95),
        ["Na", "Cl", "O"],
        [[0, 0, 0], [0.4, 0.5, 0.45], [0.1, 0.6, 0]],
    )
    row = structure_checks(askew, cif_text=rocksalt_text.replace("H-M Fm-3m", "H-M P1"))
    assert row["crystallm.spacegroup_consistent"]
    assert not row["kit.spacegroup_consistent_not_p1"]


def test_bonds_between_images_of_one_site_have_no_score(rocksalt_text):
    """CrystaLLM divides by no bonds and raises; CrystaLLM-pi says 0."""
    row = structure_checks(cubic(2.87, ["Fe"], [[0, 0, 0]]), cif_text=rocksalt_text, with_bonds=True)
    assert "crystallm.bond_score" not in row
    assert row["crystallm_pi.bond_score"] == 0.0
    assert not row["crystallm.valid"]


def test_shares_are_of_everything_requested():
    scores = {s.name: s for s in check_scores({"lemat.valid": [True, False, None, True]}, 8)}
    assert (scores["lemat.valid"].numerator, scores["lemat.valid"].denominator) == (2, 8)


def test_a_peer_that_drops_what_it_cannot_parse_gets_both_denominators():
    scores = {s.name: s for s in check_scores({"crystal_text_llm.comp_valid": [True, True, False, None]}, 4)}
    peers, ours = (
        scores["crystal_text_llm.comp_valid"],
        scores["kit.crystal_text_llm_comp_valid_of_requested"],
    )
    assert (peers.numerator, peers.denominator, peers.over) == (2, 3, "parsable")
    assert (ours.numerator, ours.denominator, ours.over) == (2, 4, "requested")


def test_loopholes_are_told_with_the_number_without_them():
    rows = [structure_checks(s) for s in (
        cubic(0.48, ["Fe"], [[0, 0, 0]]), cubic(5.64, ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]),
        cubic(5.64, ["Na", "Cl", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0, 0]]),
    )]  # fmt: skip
    scores = {
        s.name: s for s in check_scores({n: [row[n] for row in rows] for n in rows[0] if n in CHECKS}, 3)
    }
    assert scores["cdvae.structure_valid"].numerator == 3
    assert "with them 2" in scores["cdvae.structure_valid"].note
    assert "1 of 3 are single elements" in scores["cdvae.comp_valid"].note
    compounds = scores["kit.comp_valid_compounds"]
    assert (compounds.numerator, compounds.denominator) == (1, 2)
    assert "kit.element_or_alloy" not in scores


def test_bond_scores_are_a_mean_of_those_that_could_be_counted():
    (score,) = check_scores({"crystallm.bond_score": [1.0, 0.5, None, float("nan")]}, 4)
    assert score.value == 0.75
    assert (score.denominator, score.over) == (2, "scored")


def test_bad_counts_are_refused():
    with pytest.raises(EmptyInput, match="no samples requested"):
        check_scores({"lemat.valid": []}, 0)
    with pytest.raises(UserError, match="2 samples, but 1 requested"):
        check_scores({"lemat.valid": [True, True]}, 1)


def test_the_speed_command_prints_counts_and_time(rocksalt, tmp_path, capsys):
    write([Crystal(f"nacl-{i}", rocksalt) for i in range(4)], tmp_path / "four.extxyz")
    assert main([str(tmp_path / "four.extxyz"), "--n", "4", "--processes", "2"]) == 0
    printed = capsys.readouterr().out
    assert "4 structures in" in printed
    assert "lemat.valid" in printed
    assert main([str(tmp_path / "missing.pt"), "--processes", "1"]) == 2


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.skipif(not SAMPLES, reason="CRYSTALLM_KIT_SAMPLES is not set")
@pytest.mark.parametrize(
    ("file", "counts"),
    [
        ("DiffCSP_mp_20.pt", {"diffcsp.structure_valid": 10_000, "diffcsp.comp_valid": 8325,
                              "cdvae.comp_valid": 8325, "crystallm_pi.structure_valid_xrd": 9979,
                              "lemat.valid": 9576}),
        ("metastable_structures_llama-2-7B_1.0_0.7.csv.gz",
         {"cdvae.structure_valid": 3219, "cdvae.comp_valid": 3221}),
    ],
)  # fmt: skip
def test_counts_of_published_samples(file, counts):
    """Published: 100.00 and 83.25 % (DiffCSP); the others are the peers' own functions' counts."""
    rows = [structure_checks(c.structure) for c in read(Path(SAMPLES) / file)]
    assert {name: sum(bool(row[name]) for row in rows) for name in counts} == counts
