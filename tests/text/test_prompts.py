"""Prompts: what is rendered is read back, is cut into the format's tokens, and says only what is true."""

import gzip
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pymatgen.core import Lattice, Molecule, Structure

from crystallm_kit.errors import ImpossibleRequest, ParseError, UnknownName
from crystallm_kit.records import PROPERTIES, Conditions, Crystal, Range
from crystallm_kit.structures.elements import ELEMENTS, RANK
from crystallm_kit.structures.symmetry import crystal_system
from crystallm_kit.text.conditions import check_conditions, conditions_set, parse_conditions, parse_formula
from crystallm_kit.text.prompt_tokens import CRYSTAL_SYSTEMS, KIT_TEMPLATE_TOKENS, PROPERTY_WORDS
from crystallm_kit.text.prompts import (
    REFERENCE_QUANTILES,
    TEMPLATES,
    CrystalTextLlmTemplate,
    KitTemplate,
    completion_prefix,
    substitution_prefix,
    template_named,
    training_conditions,
    value_within,
)
from crystallm_kit.text.wyckoff import TOKENS, WyckoffRepresentation

KIT = KitTemplate()
ENGLISH = CrystalTextLlmTemplate()
RUTILE = "Ti2 O4 136\nTi a\nO f\n4.59 2.96 .3053 end"  # mp-2657


@pytest.fixture(scope="module")
def rocksalt_nacl() -> Crystal:
    """NaCl, mp-22862, https://materialsproject.org/materials/mp-22862 (primitive cell)."""
    lattice = Lattice.from_parameters(3.95, 3.95, 3.95, 60, 60, 60)
    structure = Structure(lattice, ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    return Crystal("mp-22862", structure, {"e_above_hull": 0.0, "band_gap_ev": 5.0, "formation_energy": -2.1})


def cut(text: str) -> list[str]:
    """Cut a text into tokens, the longest first, as the alphabet of `wyckoff` says."""
    pattern = "|".join(re.escape(token) for token in sorted(TOKENS, key=len, reverse=True))
    return re.findall(pattern, text)


@st.composite
def sayable_conditions(draw):
    """Conditions that kit-1 says without loss: elements in its order, values with two decimals."""
    elements = sorted(draw(st.sets(st.sampled_from(ELEMENTS), max_size=5)), key=RANK.__getitem__)
    number = draw(st.none() | st.integers(1, 230))
    system = draw(st.none() | st.sampled_from(CRYSTAL_SYSTEMS)) if number is None else crystal_system(number)
    properties = {}
    for name in PROPERTY_WORDS:
        if draw(st.booleans()):
            known = PROPERTIES[name]
            hundredths = draw(st.integers(round(known.low * 100), round(known.high * 100)))
            properties[name] = Range.exactly(hundredths / 100)
    return Conditions(
        elements=tuple(elements),
        only_elements=bool(elements) and draw(st.booleans()),
        anonymous_formula=draw(st.none() | st.sampled_from(["A", "AB", "AB2", "ABC3", "A2B3", "AB2C99"])),
        n_elements=draw(st.none() | st.integers(1, 9)),
        spacegroup_number=number,
        crystal_system=system,
        n_sites=draw(st.none() | st.integers(1, 99)),
        properties=properties,
    )


def is_possible(conditions: Conditions) -> bool:
    try:
        check_conditions(conditions)
    except ImpossibleRequest:
        return False
    return True


@given(sayable_conditions().filter(is_possible))
def test_kit_prompts_are_read_back_and_cut_into_tokens_of_the_format(conditions):
    prompt = KIT.render(conditions)
    assert KIT.parse(prompt) == conditions
    assert "".join(cut(prompt + RUTILE)) == prompt + RUTILE


def test_a_kit_prompt_has_the_tokens_that_its_docstring_shows():
    conditions = parse_conditions(
        elements="Ba-Ti-O", spacegroup=221, sites=5,
        properties={"anonymous_formula": "ABC3", "crystal_system": "cubic", "e_form": -3.25, "density": 5.85},
    )  # fmt: skip
    assert cut(KIT.render(conditions)) == [
        "elements=", "Ba", "Ti", "O", " ", "anonymous=", "1 ", "1 ", "3 ", "sites=", "5 ", "system=cubic ",
        "formation_energy=-", "3.", "25 ", "density=", "5.", "85 ", "spacegroup=", "221\n", "crystal\n",
    ]  # fmt: skip


def test_the_prompt_tokens_are_in_the_alphabet_once():
    assert len(set(TOKENS)) == len(TOKENS)
    assert set(KIT_TEMPLATE_TOKENS) <= set(TOKENS)


def test_every_property_has_a_word():
    assert list(PROPERTY_WORDS) == list(PROPERTIES)


def test_nothing_asked_is_the_shortest_prompt():
    assert KIT.render(Conditions()) == "crystal\n"
    assert (
        KIT.render(Conditions(formula={"Na": 1, "Cl": 1})) == "crystal\n"
    )  # a formula begins the text itself
    assert TEMPLATES["cif-crystallm"].render(Conditions()) == "data_"
    assert ENGLISH.render(Conditions()) == (
        "Below is a description of a bulk material. Generate a description of the lengths and angles of the "
        "lattice vectors and then the element type and coordinates for each atom within the lattice:\n"
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_reads_its_unconditional_prompt_and_refuses_another(name):
    template = template_named(name)
    assert template.parse(template.render(Conditions())) == Conditions()
    with pytest.raises(ParseError, match="prompt"):
        template.parse("Give me a crystal")


def test_templates_are_told_apart_by_their_hash():
    hashes = {template.hash for template in TEMPLATES.values()}
    assert len(hashes) == len(TEMPLATES)
    assert template_named("kit-1", KIT.hash) is TEMPLATES["kit-1"]
    with pytest.raises(UnknownName, match="the model was trained with 0123"):
        template_named("kit-1", "0123")
    with pytest.raises(UnknownName, match="did you mean 'kit-1'"):
        template_named("kit1")


@pytest.mark.parametrize("name", ["crystal-text-llm", "cif-crystallm"])
def test_a_template_refuses_what_it_cannot_say(name):
    with pytest.raises(ImpossibleRequest, match="cannot say n_elements"):
        template_named(name).render(Conditions(n_elements=3))


# ---------------------------------------------------------------- values within intervals


@given(
    st.sampled_from(list(PROPERTIES)),
    st.floats(0, 19),
    st.floats(0, 19),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_a_value_for_an_interval_lies_inside_it(name, one, other, is_open, seed):
    low, high = sorted((one, other))
    asked = Range(low, None if is_open else high)
    value = value_within(name, asked, np.random.default_rng(seed))
    assert low <= value <= (PROPERTIES[name].high if is_open else high)


def test_values_are_distributed_as_the_quantiles_inside_the_interval():
    """Reference uniform on 0..8: asking for more than 4 gives a uniform 4..8, mean 6, spread 4 / sqrt(12)."""
    rng = np.random.default_rng(0)
    quantiles = {"band_gap_ev": [0.0, 2.0, 4.0, 6.0, 8.0]}
    drawn = [value_within("band_gap_ev", Range(4, None), rng, quantiles=quantiles) for _ in range(2000)]
    assert np.mean(drawn) == pytest.approx(6, abs=0.1)
    assert np.std(drawn) == pytest.approx(4 / np.sqrt(12), abs=0.05)
    assert value_within("band_gap_ev", Range(4, None), quantiles=quantiles) == 6


def test_stable_is_rendered_as_hull_distance_zero():
    assert KIT.render(Conditions(properties={"hull_distance_ev_per_atom": Range(None, 0.0)})) == (
        "hull_distance=0.00 crystal\n"
    )


def test_a_value_out_of_range_is_refused_with_the_range():
    with pytest.raises(ImpossibleRequest, match=r"600 eV is out of range; 0 to 19.99 eV"):
        KIT.render(Conditions(properties={"band_gap_ev": Range.exactly(600)}))
    with pytest.raises(ImpossibleRequest, match="n_sites: 120 is out of range; 1 to 99"):
        KIT.render(Conditions(n_sites=120))


@pytest.mark.real_data
@pytest.mark.skipif("CRYSTALLM_KIT_DATA" not in os.environ, reason="CRYSTALLM_KIT_DATA names no data folder")
def test_the_reference_quantiles_of_energies_gaps_and_moduli_are_those_of_the_data():
    import pandas as pd

    folder = Path(os.environ["CRYSTALLM_KIT_DATA"])
    columns = {
        "formation_energy_ev_per_atom": ("mp_train", "formation_energy_per_atom"),
        "hull_distance_ev_per_atom": ("mp_train", "e_above_hull"),
        "band_gap_ev": ("mp_train", "band_gap"),
        "bulk_modulus_gpa": ("aflow_bulk_modulus_train", "bulk_modulus_gpa"),
    }
    for name, (file, column) in columns.items():
        values = pd.read_parquet(folder / f"{file}.parquet", columns=[column])[column].dropna()
        expected = values.quantile(np.linspace(0, 1, 21))
        tolerance = 0.51 if name == "bulk_modulus_gpa" else 0.0051
        np.testing.assert_allclose(REFERENCE_QUANTILES[name], expected, atol=tolerance)


# ---------------------------------------------------------------- other systems' prompts


def test_the_english_prompt_says_the_published_sentences_and_is_read_back():
    conditions = parse_conditions("BaTiO3", spacegroup=221, properties={"band_gap": 1.8, "e_hull": 0.0123456})
    prompt = ENGLISH.render(conditions)
    assert prompt.startswith(
        "Below is a description of a bulk material. The chemical formula is BaTiO3. The band gap is 1.8. "
        "The energy above the convex hull is 0.0123. The spacegroup number is 221. Generate a description of"
    )
    shuffled = {ENGLISH.render(conditions, np.random.default_rng(seed)) for seed in range(20)}
    assert len(shuffled) == 6  # three attributes in any order; the formula always first
    for text in (prompt, *shuffled):
        read = ENGLISH.parse(text)
        assert read.formula == conditions.formula
        assert read.spacegroup_number == 221
        assert read.properties["hull_distance_ev_per_atom"] == Range.exactly(0.0123)


def test_infilling_masks_whole_lines_only():
    """Replacing by substring also hits C in Ca and Cl, in 2.5 % of Materials Project cells."""
    text = "5.0 5.0 5.0\n90 90 90\nCa\n0.00 0.00 0.00\nC\n0.50 0.50 0.50\nC\n0.25 0.25 0.25"
    prompt = ENGLISH.infill_prompt(text, "C")
    assert prompt == (
        "Below is a partial description of a bulk material where one element has been replaced with the "
        'string "[MASK]":\n5.0 5.0 5.0\n90 90 90\nCa\n0.00 0.00 0.00\n'
        "[MASK]\n0.50 0.50 0.50\n[MASK]\n0.25 0.25 0.25\n"
        "Generate an element that could replace [MASK] in the bulk material:\n"
    )
    assert ENGLISH.infill_answer("Si\nand more") == "Si"
    with pytest.raises(ParseError, match="an element symbol expected"):
        ENGLISH.infill_answer("Xx")
    with pytest.raises(UnknownName, match="site of element 'O'"):
        ENGLISH.infill_prompt(text, "O")


@pytest.mark.parametrize(
    ("n_sites", "spacegroup", "head"),
    [(2, 225, "data_Na4Cl4\n"), (None, 225, "data_Na1Cl1\n"), (8, None, "data_Na1Cl1\n")],
)
def test_a_crystallm_prompt_names_the_content_of_the_conventional_cell(n_sites, spacegroup, head):
    conditions = Conditions(formula={"Cl": 1, "Na": 1}, n_sites=n_sites, spacegroup_number=spacegroup)
    assert TEMPLATES["cif-crystallm"].render(conditions).startswith(head)


@pytest.mark.skipif(
    "CRYSTALLM_KIT_GOLDEN" not in os.environ, reason="CRYSTALLM_KIT_GOLDEN names no golden folder"
)
def test_crystallm_prompts_are_the_beginning_of_crystallms_own_texts():
    """200 texts made by CrystaLLM's own code; the prompt ends with the space group's line."""
    path = Path(os.environ["CRYSTALLM_KIT_GOLDEN"]) / "crystallm_cif_golden.json.gz"
    template = TEMPLATES["cif-crystallm"]
    for row in json.loads(gzip.decompress(path.read_bytes())):
        text = re.sub("[ \t]+", " ", row["text"])
        formula = parse_formula(text.split("\n")[0].removeprefix("data_"))
        number = int(re.search(r"_symmetry_Int_Tables_number (\d+)", text)[1])
        prompt = template.render(
            Conditions(formula=dict(reversed(formula.items())), spacegroup_number=number)
        )
        assert text.startswith(prompt)
        assert template.parse(prompt) == Conditions(formula=formula, spacegroup_number=number)


# ---------------------------------------------------------------- training


def test_training_conditions_are_true_of_the_crystal_and_as_frequent_as_asked(rocksalt_nacl):
    rng = np.random.default_rng(0)
    drawn = [
        training_conditions(rocksalt_nacl, rng, spacegroup_number=225, n_primitive_sites=2)
        for _ in range(1500)
    ]
    asked = [conditions_set(conditions) for conditions in drawn]
    n_none = sum(not names for names in asked)
    assert 0.34 < n_none / len(drawn) < 0.40  # 0.3, and 0.7 times 1/11 where each of ten is dropped
    some = [names for names in asked if names]
    for name in KIT.says - {"bulk_modulus_gpa"}:
        assert 0.5 < np.mean([name in names for names in some]) < 0.6  # 0.5 / (10/11)
    for conditions in drawn:
        check_conditions(conditions)
        assert set(conditions.elements) <= {"Na", "Cl"}
        assert not conditions.only_elements or conditions.elements == ("Na", "Cl")
        assert conditions.spacegroup_number in (None, 225)
        assert conditions.properties.get("hull_distance_ev_per_atom", Range.exactly(0.0)) == Range.exactly(
            0.0
        )
        density = conditions.properties.get("density_g_cm3")
        assert density is None or density.low == pytest.approx(
            2.23, abs=0.01
        )  # 58.44 u in 3.95^3 / sqrt(2) A^3
        assert KIT.parse(KIT.render(conditions)).n_sites == conditions.n_sites


def test_the_same_state_draws_the_same_training_conditions(rocksalt_nacl):
    one, other = (
        [training_conditions(rocksalt_nacl, np.random.default_rng(seed)) for seed in range(50)]
        for _ in range(2)
    )
    assert one == other
    assert len({KIT.render(conditions) for conditions in one}) > 10


def test_training_conditions_are_what_the_template_can_say(rocksalt_nacl):
    rng = np.random.default_rng(1)
    for _ in range(100):
        drawn = training_conditions(rocksalt_nacl, rng, template="crystal-text-llm", spacegroup_number=225)
        assert ENGLISH.render(drawn, rng).endswith("\n")
    every = training_conditions(
        rocksalt_nacl,
        rng,
        template="crystal-text-llm",
        none_probability=0,
        keep_probability=1,
        spacegroup_number=225,
    )
    assert set(conditions_set(every)) == ENGLISH.says


def test_unknown_or_unwritable_facts_are_left_out(rocksalt_nacl):
    """A missing band gap (NaN), an energy out of range, a word, a molecule's density are no conditions."""
    properties = {"band_gap": float("nan"), "e_form": 1e6, "bulk_modulus": "hard", "e_hull": True}
    water = Molecule(["O", "H", "H"], [[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])
    for crystal in (Crystal("x", rocksalt_nacl.structure, properties), Crystal("water", water, properties)):
        every = training_conditions(
            crystal, np.random.default_rng(0), none_probability=0, keep_probability=1, n_primitive_sites=120
        )
        assert set(every.properties) == ({"density_g_cm3"} if crystal.id == "x" else set())
        assert every.n_sites is None


# ---------------------------------------------------------------- infilling in the kit's format


@pytest.mark.parametrize(
    ("partial", "prefix"),
    [
        ("Ti2 O4 136\nTi a\nO", "Ti2 O4 136\nTi a\n"),
        ("Ti2 O4 136\nTi a\nO f\n4.59 2.9", "Ti2 O4 136\nTi a\nO f\n4.59 "),
        ("Ti2 O4 13", "Ti2 O4 "),
        ("Ti2 O4 136\nTi a\nO f\nend", "Ti2 O4 136\nTi a\nO f\n"),
        ("Ti", ""),
        (RUTILE, "Ti2 O4 136\nTi a\nO f\n4.59 2.96 .3053 "),
    ],
)
def test_a_partial_text_is_cut_back_to_whole_tokens(partial, prefix):
    assert completion_prefix(partial) == prefix
    assert cut(prefix) == cut(RUTILE)[: len(cut(prefix))]


def test_substitution_keeps_the_structure_type_and_frees_the_numbers():
    prefix = substitution_prefix(RUTILE, {"Ti": "Mg", "O": "F"})  # MgF2 is a rutile, mp-1249
    assert prefix == "Mg2 F4 136\nMg a\nF f\n"
    assert (
        str(WyckoffRepresentation().decode(prefix + "4.62 3.05 .3030 end").structure.composition) == "Mg2 F4"
    )
    with pytest.raises(UnknownName, match="element in the crystal 'Na'"):
        substitution_prefix(RUTILE, {"Na": "K"})
    with pytest.raises(UnknownName, match="no element 'Xx'"):
        substitution_prefix(RUTILE, {"Ti": "Xx"})
