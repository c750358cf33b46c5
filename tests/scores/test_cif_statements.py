"""What a CIF says of itself."""

import gzip
import json
import os
from pathlib import Path

import pytest
from pymatgen.core import Composition

from crystallm_kit.scores.cif_statements import CifStatements

GOLDEN = (
    Path(os.environ.get("CRYSTALLM_KIT_DATA", "/missing")).parent / "golden" / "crystallm_cif_golden.json.gz"
)
QUARTZ = """data_Si3O6
_symmetry_space_group_name_H-M P3_221
_cell_length_a 4.9100
_cell_length_b 4.9100
_cell_length_c 5.4000
_cell_angle_alpha 90.0000
_cell_angle_beta 90.0000
_cell_angle_gamma 120.0000
_chemical_formula_structural SiO2
_chemical_formula_sum 'Si3 O6'
loop_
_symmetry_equiv_pos_site_id
_symmetry_equiv_pos_as_xyz
1 'x, y, z'
loop_
_atom_site_type_symbol
_atom_site_label
_atom_site_symmetry_multiplicity
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_occupancy
Si Si0 3 0.4700 0.0000 0.6667 1.0
O O1 6 0.4100 0.2700 0.7900 1.0
"""


def test_quartz_agrees_with_itself():
    text = CifStatements(QUARTZ)
    assert text.is_sensible
    assert text.are_formulas_consistent
    assert text.are_multiplicities_consistent
    assert text.spacegroup_symbol == "P3_221"
    assert text.agrees_with(Composition("Si6O12"))
    assert text.has_sites_of(Composition("Si3O6"))


@pytest.mark.parametrize(
    ("old", "new"),
    [("data_Si3O6", "data_Si3O7"), ("structural SiO2", "structural SiO"), ("'Si3 O6'", "'Si3 O9'"),
     ("data_Si3O6", "data_SiO2(a)"), ("_chemical_formula_structural SiO2\n", "")],
)  # fmt: skip
def test_one_formula_of_three_that_differs_or_is_missing(old, new):
    assert not CifStatements(QUARTZ.replace(old, new)).are_formulas_consistent


@pytest.mark.parametrize(
    ("old", "new"),
    [("O O1 6", "O O1 5"), ("O O1 6", "N O1 6"), ("O O1 6", "O O1 six"), ("'Si3 O6'", "'Si O2'")],
)
def test_multiplicities_that_do_not_add_up(old, new):
    assert not CifStatements(QUARTZ.replace(old, new)).are_multiplicities_consistent


@pytest.mark.parametrize(
    ("old", "new", "sensible"),
    [
        ("_length_c 5.4000", "_length_c 0.4", False),
        ("_length_c 5.4000", "_length_c 1000.1", False),
        ("_gamma 120.0000", "_gamma 170.1", False),
        ("_gamma 120.0000", "_gamma 1.2.3", False),  # the peer raises
        ("_gamma 120.0000", "_gamma -120.0", True),  # not found
        (QUARTZ, "", True),  # loophole: empty text passes
    ],
)
def test_lengths_and_angles_count_as_far_as_they_are_found(old, new, sensible):
    assert CifStatements(QUARTZ.replace(old, new)).is_sensible is sensible


def test_a_geometry_of_other_counts_or_elements_does_not_agree():
    text = CifStatements(QUARTZ)
    assert not text.agrees_with(Composition("Si3O7"))
    assert not text.agrees_with(Composition("Ge3O6"))


@pytest.mark.parametrize(
    ("formula", "sites", "agree"),
    [("'Si3 O6'", "Si3O6", True), ("'Si O2'", "Si3O6", True), ("'Si3 O6'", "SiO2", False),
     ("'Si3 O6'", "Si3O5", False), ("'Si3 O6'", "Ge3O6", False), ("?", "Si3O6", True)],
)  # fmt: skip
def test_a_cell_holds_the_formula_a_whole_number_of_times(formula, sites, agree):
    """Merged sites are seen; a formula unit in place of the cell, as ICSD has it, is none."""
    assert CifStatements(QUARTZ.replace("'Si3 O6'", formula)).has_sites_of(Composition(sites)) is agree


@pytest.mark.parametrize("text", ["", "data_\n", "loop_\n_a\n_b\n1\n2 3", "\x00", "data_X\nloop_\n;"])
def test_text_that_is_no_cif_states_nothing(text):
    stated = CifStatements(text)
    assert stated.spacegroup_symbol is None
    assert not stated.are_formulas_consistent
    assert not stated.are_multiplicities_consistent
    assert not stated.agrees_with(Composition("NaCl"))


@pytest.mark.real_data
@pytest.mark.skipif(
    not GOLDEN.exists(), reason="CRYSTALLM_KIT_DATA is not set, or has no golden rows beside it"
)
def test_crystallms_own_texts_agree_with_themselves():
    for row in json.loads(gzip.decompress(GOLDEN.read_bytes()))[:60]:
        stated = CifStatements(row["preprocessed"])
        assert stated.are_formulas_consistent
        assert stated.are_multiplicities_consistent
        assert stated.is_sensible
