"""Structure types: what the table says is what AFLOW's encyclopedia and known compounds say."""

import gzip
import json
from importlib import resources

import pytest
from pymatgen.core import Composition

from crystallm_kit.structures.prototypes import STRUCTURE_TYPES, structure_type

# Our name -> AFLOW label (stoichiometry, Pearson symbol, space group, letters), as pymatgen ships them.
AFLOW = {
    "rock salt": "AB_cF8_225_a_b", "zinc blende": "AB_cF8_216_c_a", "wurtzite": "AB_hP4_186_b_b",
    "cesium chloride type": "AB_cP2_221_b_a", "nickel arsenide type": "AB_hP4_194_c_a",
    "fluorite": "AB2_cF12_225_a_c", "rutile": "A2B_tP6_136_f_a", "anatase": "A2B_tI12_141_e_a",
    "brookite": "A2B_oP24_61_2c_c", "pyrite": "AB2_cP12_205_a_c", "marcasite": "AB2_oP6_58_a_g",
    "molybdenite": "AB2_hP6_194_c_f", "cadmium iodide type": "AB2_hP3_164_a_d",
    "aluminum diboride type": "AB2_hP3_191_a_d", "cuprite": "A2B_cP6_224_b_a",
    "C14 Laves phase": "AB2_hP12_194_f_ah", "C15 Laves phase": "A2B_cF24_227_d_a",
    "skutterudite": "A3B_cI32_204_g_c", "A15": "A3B_cP8_223_c_a", "Cu3Au type": "AB3_cP4_221_a_c",
    "cementite": "AB3_oP16_62_c_cd", "CaB6 type": "A6B_cP7_221_f_a", "corundum": "A2B3_hR10_167_c_e",
    "ilmenite": "AB3C_hR10_148_c_f_c", "calcite": "ABC3_hR10_167_a_b_e",
    "antiperovskite": "AB3C_cP5_221_a_c_b", "chalcopyrite": "ABC2_tI16_122_a_b_d",
    "half-Heusler": "ABC_cF12_216_b_c_a", "Heusler": "AB2C_cF16_225_a_c_b",
    "zircon": "A4BC_tI24_141_h_b_a", "spinel": "A2BC4_cF56_227_d_a_e", "K2NiF4 type": "AB2C4_tI14_139_a_e_ce",
    "diamond": "A_cF8_227_a",
}  # fmt: skip


@pytest.mark.parametrize("name", AFLOW)
def test_stoichiometry_and_space_group_are_those_of_aflow(name):
    kind = structure_type(name)
    stoichiometry, _, number = AFLOW[name].split("_")[:3]
    assert (
        kind.anonymous_formula == Composition(stoichiometry_with_elements(stoichiometry)).anonymized_formula
    )
    assert kind.spacegroup_number == int(number)


def stoichiometry_with_elements(label: str) -> str:
    """Return AFLOW's "A2B" with elements in place of letters."""
    return label.translate(str.maketrans({"A": "K", "B": "P", "C": "S"}))


def test_the_aflow_labels_are_in_the_encyclopedia():
    packed = resources.files("pymatgen.analysis.prototypes").joinpath("aflow_prototypes.json.gz").read_bytes()
    known = {entry["tags"]["aflow"] for entry in json.loads(gzip.decompress(packed))}
    assert set(AFLOW.values()) <= known


@pytest.mark.parametrize(
    ("name", "formula"),
    [("perovskite", "BaTiO3"), ("perovskite", "CsPbI3"), ("rock salt", "MgO"), ("fluorite", "CaF2"),
     ("antifluorite", "Li2O"), ("rutile", "TiO2"), ("corundum", "Al2O3"), ("pyrochlore", "Y2Ti2O7"),
     ("scheelite", "CaWO4"), ("zircon", "ZrSiO4"), ("chalcopyrite", "CuFeS2"), ("delafossite", "CuFeO2"),
     ("half-Heusler", "TiNiSn"), ("cuprite", "Cu2O"), ("skutterudite", "CoAs3"), ("diamond", "C"),
     ("pyrite", "FeS2"), ("ilmenite", "FeTiO3"), ("calcite", "CaCO3"), ("bixbyite", "In2O3")],
)  # fmt: skip
def test_a_known_compound_follows_from_its_type_and_elements(name, formula):
    wanted = Composition(formula).get_el_amt_dict()
    assert structure_type(name).formula_for(list(wanted)) == wanted


@pytest.mark.parametrize(
    ("name", "elements"),
    [("spinel", "Mg Al O"), ("Heusler", "Co Mn Si"), ("garnet", "Ca Al O"), ("rock salt", "Mg"),
     ("perovskite", "Ba O"), ("antiperovskite", "Mn Ga N"), ("Laves phase", "Mg Cu")],
)  # fmt: skip
def test_no_formula_follows_where_more_than_one_fits(name, elements):
    assert structure_type(name).formula_for(elements.split()) is None


def test_spellings_find_the_type():
    for spelling in ("rock salt", "Rock-Salt", "rocksalt", "halite", "NaCl type"):
        assert structure_type(spelling).name == "rock salt"
    assert structure_type("Perovskites").name == "perovskite"
    assert structure_type("unobtainite") is None


def test_names_are_unique():
    names = [kind.name for kind in STRUCTURE_TYPES]
    assert len(set(names)) == len(names)
