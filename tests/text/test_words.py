"""Plain words: what is meant is understood, what cannot be said is reported, contradictions are errors."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crystallm_kit.errors import ImpossibleRequest, UnknownName, UserError
from crystallm_kit.records import Conditions, Range
from crystallm_kit.text.conditions import check_conditions
from crystallm_kit.text.words import understand

HULL, GAP, DENSITY, BULK, FORMATION = (
    "hull_distance_ev_per_atom",
    "band_gap_ev",
    "density_g_cm3",
    "bulk_modulus_gpa",
    "formation_energy_ev_per_atom",
)
STABLE = Range(None, 0.0)

# Sentence -> number of candidates and conditions; nothing of these may be left over.
UNDERSTOOD = {
    "four candidates for a cubic perovskite of barium, titanium and oxygen": (
        4, Conditions(formula={"Ba": 1, "Ti": 1, "O": 3}, crystal_system="cubic")),
    "LiFePO4 in Pnma": (None, Conditions(formula={"Li": 1, "Fe": 1, "P": 1, "O": 4}, spacegroup_number=62)),
    "a stable binary nitride with a band gap above 2 eV": (
        None, Conditions(elements=("N",), n_elements=2, properties={HULL: STABLE, GAP: Range(2, None)})),
    "20 ternary oxides containing lithium and a density below 4 g/cm3": (
        20, Conditions(elements=("O", "Li"), n_elements=3, properties={DENSITY: Range(None, 4)})),
    "rock salt MgO": (None, Conditions(formula={"Mg": 1, "O": 1}, spacegroup_number=225)),
    "a spinel of Mg, Al and O": (
        None, Conditions(elements=("Mg", "Al", "O"), only_elements=True, anonymous_formula="AB2C4",
                         spacegroup_number=227)),
    "half-Heusler with Ti, Ni and Sn": (
        None, Conditions(formula={"Ti": 1, "Ni": 1, "Sn": 1}, spacegroup_number=216)),
    "titanium dioxide in the rutile structure": (
        None, Conditions(formula={"Ti": 1, "O": 2}, spacegroup_number=136)),
    "GaN, wurtzite, bulk modulus between 150 and 250 GPa": (
        None, Conditions(formula={"Ga": 1, "N": 1}, spacegroup_number=186,
                         properties={BULK: Range(150, 250)})),
    "a wurtzite nitride of gallium": (None, Conditions(formula={"Ga": 1, "N": 1}, spacegroup_number=186)),
    "lithium iron phosphate, olivine, 28 atoms": (
        None, Conditions(elements=("Li", "Fe", "P", "O"), only_elements=True, spacegroup_number=62,
                         n_sites=28)),
    "ternary lithium oxide": (None, Conditions(elements=("Li", "O"), n_elements=3)),
    "aluminium oxide": (None, Conditions(elements=("Al", "O"), only_elements=True)),
    "aluminum oxide": (None, Conditions(elements=("Al", "O"), only_elements=True)),
    "sulphur-containing oxides": (None, Conditions(elements=("O", "S"))),
    "oxides of lithium and cobalt": (None, Conditions(elements=("O", "Li", "Co"), only_elements=True)),
    "crystals of silicon": (None, Conditions(elements=("Si",), only_elements=True)),
    "only Li and O": (None, Conditions(elements=("Li", "O"), only_elements=True)),
    "compounds in the Li-P-S system": (None, Conditions(elements=("Li", "P", "S"), only_elements=True)),
    "In, Ga and As": (None, Conditions(elements=("In", "Ga", "As"))),
    "In Pnma": (None, Conditions(spacegroup_number=62)),
    "Ca(OH)2 with space group No. 164": (
        None, Conditions(formula={"Ca": 1, "O": 2, "H": 2}, spacegroup_number=164)),
    "NaCl in 225": (None, Conditions(formula={"Na": 1, "Cl": 1}, spacegroup_number=225)),
    "MoS2 P6_3/mmc": (None, Conditions(formula={"Mo": 1, "S": 2}, spacegroup_number=194)),
    "MoS2, P63/mmc": (None, Conditions(formula={"Mo": 1, "S": 2}, spacegroup_number=194)),
    "P 63/m m c space group": (None, Conditions(spacegroup_number=194)),
    "spacegroup:Fm-3m": (None, Conditions(spacegroup_number=225)),
    "TiO₂ in C2": (None, Conditions(formula={"Ti": 1, "O": 2}, spacegroup_number=5)),
    "ABO3 with 5 atoms per primitive cell": (
        None, Conditions(elements=("O",), anonymous_formula="ABC3", n_sites=5)),
    "ABX3": (None, Conditions(anonymous_formula="ABC3")),
    "density of 3000 kg/m3 and band gap above 1 eV and below 3 eV": (
        None, Conditions(properties={GAP: Range(1, 3), DENSITY: Range(3, 3)})),
    "5 metastable hexagonal sulfides with formation energy below -500 meV/atom": (
        5, Conditions(elements=("S",), crystal_system="hexagonal",
                      properties={FORMATION: Range(None, -0.5), HULL: Range(None, 0.1)})),
    "a dozen quaternary selenides within 50 meV/atom of the hull": (
        12, Conditions(elements=("Se",), n_elements=4, properties={HULL: Range(None, 0.05)})),
    "stable within 0.1 eV/atom of the convex hull": (None, Conditions(properties={HULL: Range(None, 0.1)})),
    "2-3 eV band gap": (None, Conditions(properties={GAP: Range(2, 3)})),
    "gap greater than or equal to 1.1 eV": (None, Conditions(properties={GAP: Range(1.1, None)})),
    "band gap of 2 eV or more": (None, Conditions(properties={GAP: Range(2, None)})),
    "metallic rhombohedral crystal with 3 elements": (
        None, Conditions(n_elements=3, crystal_system="trigonal", properties={GAP: Range(0, 0)})),
    "I want 1,000 structures": (1000, Conditions()),
    "": (None, Conditions()),
}  # fmt: skip


@pytest.mark.parametrize("sentence", UNDERSTOOD)
def test_a_sentence_is_understood_in_full(sentence):
    n, conditions = UNDERSTOOD[sentence]
    read = understand(sentence)
    assert read.conditions == conditions
    assert list(read.conditions.formula or ()) == list(conditions.formula or ())
    assert read.n == n
    assert read.not_understood == ()


# Sentence -> what is reported, a word of the hint, and what is still understood.
NOT_UNDERSTOOD = {
    "a cheap oxide": ("cheap", "nothing in the data", Conditions(elements=("O",))),
    "superconducting nitride": ("superconducting", "nothing in the data", Conditions(elements=("N",))),
    "cubic, without lead or cadmium": (
        "without lead or cadmium", "excluded", Conditions(crystal_system="cubic")),
    "lead-free cubic": ("lead-free", "excluded", Conditions(crystal_system="cubic")),
    "not cubic": ("not cubic", "excluded", Conditions()),
    "cubic or tetragonal": ("cubic or tetragonal", "alternative", Conditions()),
    "binary or ternary oxide": ("binary or ternary", "alternative", Conditions(elements=("O",))),
    "oxide containing lithium or sodium": (
        "containing lithium or sodium", "alternative", Conditions(elements=("O",))),
    "at most 20 atoms": ("at most 20 atoms", "exact number", Conditions()),
    "oxides with at least 3 elements": ("at least 3 elements", "exact number", Conditions(elements=("O",))),
    "Al-doped ZnO": ("Al-doped", "partial occupancies", Conditions(formula={"Zn": 1, "O": 1})),
    "dynamically stable": ("dynamically stable", "convex hull", Conditions()),
    "semiconducting carbide": ("semiconducting", "band gap", Conditions(elements=("C",))),
    "wide band gap oxide": ("wide band gap", "give a value", Conditions(elements=("O",))),
    "transition metal oxide": ("transition metal", "name its elements", Conditions(elements=("O",))),
    "cubik NaCl": ("cubik", "did you mean 'cubic'", Conditions(formula={"Na": 1, "Cl": 1})),
    "10 oxydes": ("oxydes", "did you mean 'oxide'", Conditions()),
    "batio3": ("batio3", "capitals", Conditions()),
    "band gap of 2 GPa": ("band gap of 2 GPa", "is in eV", Conditions()),
    "NaCl and KCl": ("KCl", "one composition", Conditions(formula={"Na": 1, "Cl": 1})),
    "thermal conductivity above 5 W/mK": ("thermal conductivity above 5 W/mK", "", Conditions()),
    "Tc above 30 K": ("Tc above 30 K", "", Conditions()),
}  # fmt: skip


@pytest.mark.parametrize("sentence", NOT_UNDERSTOOD)
def test_what_cannot_be_said_is_reported_and_the_rest_is_understood(sentence):
    phrase, hint, conditions = NOT_UNDERSTOOD[sentence]
    read = understand(sentence)
    assert read.not_understood == (phrase,)
    assert hint in " ".join(read.notes)
    assert read.conditions == conditions


@pytest.mark.parametrize(
    ("sentence", "error", "says"),
    [
        ("Xy2O3", UnknownName, "no element 'Xy'"),
        ("NaCl in space group Fm-3x", UnknownName, "did you mean 'Fm-3'"),
        ("space group 231", UnknownName, "1 to 230"),
        ("cubic Pnma", ImpossibleRequest, r"Pnma \(62\) is orthorhombic, not cubic"),
        ("rutile TiO2 in Pnma", ImpossibleRequest, "rutile has space group 136"),
        ("perovskite TiO2", ImpossibleRequest, "TiO2 is AB2, not ABC3"),
        ("TiO2 with 7 atoms", ImpossibleRequest, "7 atoms are no multiple of the 3"),
        ("binary perovskite", ImpossibleRequest, "3 different elements and n_elements 2"),
        ("band gap of 600 eV", ImpossibleRequest, "0 to 19.99 eV"),
        ("band gap above 4 eV, gap below 2 eV", ImpossibleRequest, "no value lies between 4"),
        ("Li0.5CoO2", ImpossibleRequest, "whole numbers"),
        ("a " * 501, UserError, "at most 1000"),
        ("NaCl with " + "1" * 900, UserError, "more than 30 digits"),
        ("0 candidates", ImpossibleRequest, "expected 1 or more"),
    ],
)
def test_a_contradiction_or_an_unknown_name_is_an_error(sentence, error, says):
    with pytest.raises(error, match=says):
        understand(sentence)


def test_phrases_and_meanings_are_shown_in_the_order_of_the_text():
    read = understand("four candidates for a cubic perovskite of barium, titanium and oxygen, cheap")
    assert read.understood == (
        ("four candidates", "4 candidates"),
        ("cubic", "cubic"),
        ("perovskite", "perovskite: stoichiometry ABC3"),
        ("of barium, titanium and oxygen", "only Ba, Ti, O"),
    )
    assert read.report().split("\n") == [
        "asked for: 4 x BaTiO3; cubic",
        "  'four candidates' -> 4 candidates",
        "  'cubic' -> cubic",
        "  'perovskite' -> perovskite: stoichiometry ABC3",
        "  'of barium, titanium and oxygen' -> only Ba, Ti, O",
        "not understood: 'cheap'",
        "note: 'cheap': nothing in the data says so",
        "note: perovskite of Ba, Ti, O: BaTiO3, with O, the most electronegative, three times",
    ]


PIECES = st.sampled_from(
    (
        "a", "of", "with", "and", "or", "not", "without", "no.", "in", "space", "group", "P", "C2", "Pnma",
        "F", "m", "-3", "225", "62", "0", "7", "NaCl", "Xy2", "Li,", "O,", "oxide(s)", "nitride", "cubic",
        "perovskite", "spinel", "band", "gap", "above", "below", "between", "2", "-1", "eV", "meV/atom",
        "5", "atoms", "three", "elements", "stable", "within", "hull", "the", "density", ">", "g/cm3", "K",
        "In", "As", "I", "dioxide", "titanium", "ABX3", "Ba-Ti-O", "only", "n=3", "#", ",", ".", ":", "(",
        ")", "µ", "P1", "half-Heusler", "dozen", "-free",
    )
)  # fmt: skip


@given(st.lists(PIECES, max_size=9).map(" ".join) | st.text(max_size=40))
def test_any_text_gives_valid_conditions_or_an_error_of_the_users(text):
    try:
        read = understand(text)
    except UserError:
        return
    check_conditions(read.conditions)
    for phrase in (*read.not_understood, *(phrase for phrase, _ in read.understood)):
        assert phrase.strip()
