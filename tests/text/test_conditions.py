"""Conditions from options: every form is read, every error begins with the option at fault."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pymatgen.core import Composition

from crystallm_kit.errors import ImpossibleRequest, UnknownName, UserError
from crystallm_kit.records import PROPERTIES, Conditions, Range
from crystallm_kit.structures.elements import ELEMENTS
from crystallm_kit.text.conditions import (
    anonymous_of,
    check_conditions,
    describe,
    formula_text,
    parse_conditions,
    parse_elements,
    parse_formula,
    parse_range,
    property_named,
)

GAP = PROPERTIES["band_gap_ev"]


@pytest.mark.parametrize(
    "text",
    ["BaTiO3", "Ca(OH)2", "Fe2O3", "Na4 Cl4", "K3[Fe(CN)6]", "LiFePO₄", "Ca5(PO4)3(OH)", "CO", "Co", "C60"],
)
def test_a_formula_is_read_as_pymatgen_reads_it(text):
    assert parse_formula(text) == Composition(text.replace("₄", "4")).get_el_amt_dict()


@given(st.dictionaries(st.sampled_from(ELEMENTS), st.integers(1, 99), min_size=1, max_size=6))
def test_a_formula_is_its_text_read_back(formula):
    assert parse_formula(formula_text(formula)) == formula


@given(st.dictionaries(st.sampled_from(ELEMENTS[:60]), st.integers(1, 20), min_size=1, max_size=6))
def test_the_anonymous_formula_is_pymatgens(formula):
    assert anonymous_of(formula.values()) == Composition(formula).anonymized_formula


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [("Xy2O3", UnknownName, "no element 'Xy'"), ("NaCl0", ImpossibleRequest, "count of 0"),
     ("Li0.5CoO2", ImpossibleRequest, "whole numbers"),
     ("nacl", UserError, "cannot read 'nacl'"),
     ("Ca(OH", UserError, "cannot read"), ("Ca)2", UserError, "cannot read"),
     ("Na" * 101, UserError, "at most 200"), ("Na+Cl-", UserError, "cannot read"),
     ("", UserError, "cannot read"), ("()", UserError, "cannot read")],
)  # fmt: skip
def test_what_is_no_formula_is_refused(text, error, says):
    with pytest.raises(error, match=says.replace("(", r"\(")):
        parse_formula(text)


def test_a_dash_between_elements_means_no_others():
    assert parse_elements("Li,O") == (("Li", "O"), False)
    assert parse_elements("Li-O") == (("Li", "O"), True)
    assert parse_elements(["Li", "O", "Li"]) == (("Li", "O"), False)
    with pytest.raises(UnknownName, match="no element 'Lo'"):
        parse_elements("Lo")


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [(">2", 2, None), (">= 2 eV", 2, None), ("<1500 meV", None, 1.5), ("≤ 2", None, 2),
     ("2", 2, 2), (2, 2, 2), ("=2.5", 2.5, 2.5), ("2..3", 2, 3), ("2-3", 2, 3), ("2 to 3 eV", 2, 3),
     ("between 500 and 1500 meV", 0.5, 1.5), ("about 2", 1.8, 2.2), ("~2", 1.8, 2.2),
     ("above 2", 2, None), ("at most 2 eV", None, 2), ("2 or more", 2, None),
     ("no more than 2", None, 2), ("1e-1", 0.1, 0.1), (".5", 0.5, 0.5)],
)  # fmt: skip
def test_a_comparison_is_read(text, low, high):
    found = parse_range(text, GAP)
    assert (found.low, found.high) == (
        pytest.approx(low) if low else low,
        pytest.approx(high) if high else high,
    )


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [("density_g_cm3", "5850 kg/m3", 5.85), ("density_g_cm3", "5.85 g cm^-3", 5.85),
     ("bulk_modulus_gpa", "1620 kbar", 162), ("bulk_modulus_gpa", "162000 MPa", 162),
     ("formation_energy_ev_per_atom", "-350 meV per atom", -0.35)],
)  # fmt: skip
def test_units_are_converted(name, text, value):
    assert parse_range(text, PROPERTIES[name]) == Range.exactly(pytest.approx(value))


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [("wide", UserError, "cannot read 'wide'"), ("2 GPa", UserError, "band_gap_ev is in eV"),
     ("2 nm", UserError, "cannot read"), ("3..2", ImpossibleRequest, "no value lies between"),
     ("600", ImpossibleRequest, "0 to 19.99 eV"), ("> 20", ImpossibleRequest, "0 to 19.99 eV"),
     ("<-1", ImpossibleRequest, "0 to 19.99 eV")],
)  # fmt: skip
def test_what_cannot_be_asked_of_a_property_is_refused(text, error, says):
    with pytest.raises(error, match=says):
        parse_range(text, GAP)


def test_properties_are_found_by_any_alias():
    for known in PROPERTIES.values():
        for name in (known.name, *known.aliases, known.aliases[0].replace("_", " ").title()):
            assert property_named(name) is known
    with pytest.raises(UnknownName, match="no property 'bandgapp'; did you mean 'bandgap'"):
        property_named("bandgapp")


def test_options_make_conditions():
    read = parse_conditions(
        elements="Ba-Ti-O", spacegroup="Pm-3m", sites="5",
        properties=["band_gap>2", "e_hull<=50 meV", "crystal_system=cubic", "n_elements=3",
                    "anonymous_formula=A3BC"],
    )  # fmt: skip
    assert read == Conditions(
        elements=("Ba", "Ti", "O"), only_elements=True, n_elements=3, anonymous_formula="ABC3",
        spacegroup_number=221, crystal_system="cubic", n_sites=5,
        properties={"band_gap_ev": Range(2, None), "hull_distance_ev_per_atom": Range(None, 0.05)},
    )  # fmt: skip
    assert describe(read) == (
        "only Ba, Ti, O; 3 different elements; stoichiometry ABC3; space group Pm-3m (221); cubic; "
        "5 atoms in the primitive cell; band gap at least 2 eV; hull distance at most 0.05 eV/atom"
    )
    assert parse_conditions() == Conditions()
    assert describe(Conditions()) == "any crystal"


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"formula": "Xy2"}, UnknownName, "^formula: "),
        ({"elements": "Li,Xx"}, UnknownName, "^elements: "),
        ({"spacegroup": "Fm-3x"}, UnknownName, "^spacegroup: .*did you mean 'Fm-3'"),
        ({"sites": "many"}, UserError, "^sites: got 'many'"),
        ({"properties": {"bandgapp": "2"}}, UnknownName, "^condition: no property"),
        ({"properties": ["band_gap"]}, UserError, "^condition 'band_gap': expected name=value"),
        (
            {"properties": {"crystal_system": "cubik"}},
            UnknownName,
            "^condition crystal_system: .*did you mean 'cubic'",
        ),
        ({"formula": "TiO2", "sites": 7}, ImpossibleRequest, "no multiple of the 3"),
        ({"sites": 0}, ImpossibleRequest, "n_sites is 0"),
        ({"formula": "TiO2", "elements": "Ba"}, ImpossibleRequest, "Ba missing"),
        ({"formula": "BaTiO3", "elements": "Ti-O"}, ImpossibleRequest, "Ba too many"),
        (
            {"elements": "Li,Fe,P,O", "properties": {"n_elements": 3}},
            ImpossibleRequest,
            "3 different elements",
        ),
        ({"elements": "Li-O", "properties": {"n_elements": 3}}, ImpossibleRequest, "n_elements 3"),
    ],
)
def test_an_error_names_the_option(options, error, says):
    with pytest.raises(error, match=says):
        parse_conditions(**options)


def test_conditions_made_in_code_are_checked_too():
    for wrong in (
        Conditions(elements=("Xx",)),
        Conditions(spacegroup_number=0),
        Conditions(crystal_system="cubik"),
        Conditions(properties={"bandgap": Range(0, 1)}),
        Conditions(formula={}),
        Conditions(formula={"Na": 0}),
        Conditions(properties={"band_gap_ev": Range(float("nan"), None)}),
    ):
        with pytest.raises(UserError):
            check_conditions(wrong)
