"""words-1: any wording is read back; masks hide whole elements; answers are read strictly."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pymatgen.core import Lattice, Structure

from crystallm_kit.errors import ImpossibleRequest, ParseError, UnknownName
from crystallm_kit.records import PROPERTIES, Conditions, Crystal, Range
from crystallm_kit.structures.elements import ELEMENTS
from crystallm_kit.structures.symmetry import crystal_system
from crystallm_kit.text.conditions import check_conditions, parse_conditions
from crystallm_kit.text.infilling import MASK, mask_element
from crystallm_kit.text.prompt_tokens import CRYSTAL_SYSTEMS
from crystallm_kit.text.prompt_words import (
    DECIMALS,
    FREE_OPENINGS,
    OPENINGS,
    QUESTIONS,
    REQUESTS,
    SENTENCES,
    WordsTemplate,
)
from crystallm_kit.text.prompts import TEMPLATES, template_named
from crystallm_kit.text.representation import REPRESENTATIONS, representation

FORMATS = sorted(REPRESENTATIONS)
WORDS = WordsTemplate("wyckoff")
# Calcium carbide, CaC2 (AFLOW A2B_tI6_139_e_a): C stands in Ca, and in the labels of a CIF's keys
CARBIDE = Crystal(
    "CaC2",
    Structure.from_spacegroup(139, Lattice.tetragonal(3.89, 6.38), ["Ca", "C"], [[0, 0, 0], [0, 0, 0.4]]),
)  # fmt: skip


@st.composite
def conditions(draw):
    """Conditions of every kind; values are floats, which the template rounds."""
    elements = tuple(draw(st.lists(st.sampled_from(ELEMENTS), max_size=6, unique=True)))
    number = draw(st.none() | st.integers(1, 230))
    system = draw(st.none() | st.sampled_from(CRYSTAL_SYSTEMS)) if number is None else crystal_system(number)
    counts = st.dictionaries(st.sampled_from(ELEMENTS), st.integers(1, 120), min_size=1, max_size=5)
    names = draw(st.sets(st.sampled_from(sorted(PROPERTIES))))
    return Conditions(
        formula=draw(st.none() | counts),
        elements=elements,
        only_elements=bool(elements) and draw(st.booleans()),
        n_elements=draw(st.none() | st.integers(1, 9)),
        anonymous_formula=draw(st.none() | st.sampled_from(["A", "AB", "AB2", "ABC3", "A2B3", "AB2C99"])),
        spacegroup_number=number,
        crystal_system=system,
        n_sites=draw(st.none() | st.integers(1, 400)),
        properties={
            name: Range.exactly(draw(st.floats(PROPERTIES[name].low, PROPERTIES[name].high)))
            for name in names
        },
    )


def is_possible(asked: Conditions) -> bool:
    try:
        check_conditions(asked)
    except ImpossibleRequest:
        return False
    return True


@given(conditions().filter(is_possible), st.none() | st.integers(0, 2**32), st.sampled_from(FORMATS))
def test_any_wording_of_any_conditions_is_read_back(asked, seed, form):
    template = WordsTemplate(form)
    prompt = template.render(asked, None if seed is None else np.random.default_rng(seed))
    read = template.parse(prompt)
    assert replace(read, properties={}) == replace(asked, properties={})
    assert set(read.properties) == set(asked.properties)
    for name, value in read.properties.items():
        assert (
            value.low
            == value.high
            == pytest.approx(asked.properties[name].low, abs=0.51 * 10 ** -DECIMALS[name])
        )
    assert prompt.endswith("\n")
    assert prompt.count("\n") == 1


def test_the_largest_value_is_read_back_though_its_text_is_rounded_up():
    """499.99 GPa is written as 500, which was refused as out of range when it was read."""
    asked = Conditions(properties={"bulk_modulus_gpa": Range.exactly(PROPERTIES["bulk_modulus_gpa"].high)})
    prompt = WORDS.render(asked)
    assert " 500 GPa" in prompt
    assert WORDS.parse(prompt) == asked
    with pytest.raises(ImpossibleRequest, match="501 GPa is out of range"):
        WORDS.parse(prompt.replace("500", "501"))


def everything() -> Conditions:
    return parse_conditions(
        "BaTiO3", "Ba-Ti-O", spacegroup=221, sites=5,
        properties={"anonymous_formula": "ABC3", "crystal_system": "cubic", "n_elements": 3, "e_form": -3.25,
                    "density": 5.85, "band_gap": 1.8, "e_hull": 0, "bulk_modulus": 162},
    )  # fmt: skip


def test_the_first_wording_is_what_the_docstring_shows():
    asked = parse_conditions("NaCl", spacegroup=225, properties={"band_gap": 5})
    assert WORDS.render(asked) == (
        "Here is what is known of a crystal. The chemical formula is NaCl. The space group is Fm-3m (number "
        "225). The band gap is 5.00 eV. Write its structure as a list of Wyckoff positions.\n"
    )
    assert WORDS.render(Conditions()) == (
        "Any crystal will do. Write its structure as a list of Wyckoff positions.\n"
    )


def test_every_wording_is_used_and_units_stand_with_values():
    prompts = [WORDS.render(everything(), np.random.default_rng(seed)) for seed in range(300)]
    free = [WORDS.render(Conditions(), np.random.default_rng(seed)) for seed in range(60)]
    for opening in OPENINGS:
        assert any(prompt.startswith(opening) for prompt in prompts)
    for opening in FREE_OPENINGS:
        assert any(prompt.startswith(opening) for prompt in free)
    for request in REQUESTS:
        assert any(prompt.endswith(request.format("a list of Wyckoff positions") + "\n") for prompt in free)
    for name, sentences in SENTENCES.items():
        if name == "elements":  # all of them are stated
            continue
        for sentence in sentences:
            begins = sentence.split("{")[0]
            assert any(begins in prompt for prompt in prompts), sentence
    for prompt in prompts:
        for stated in ("-3.250 eV/atom", "0.000 eV/atom", "1.80 eV", "5.85 g/cm3", "162 GPa"):
            assert stated in prompt
    assert WORDS.render(everything(), np.random.default_rng(7)) == prompts[7]


def test_it_says_every_condition():
    assert WORDS.says == {"formula", "elements", "n_elements", "anonymous_formula", "spacegroup_number",
                          "crystal_system", "n_sites", *PROPERTIES}  # fmt: skip


@pytest.mark.parametrize(
    "prompt",
    [
        "Any crystal will do. Write its structure as a CIF file.\n",
        "Any crystal will do. The band gap is 1.80 eV. Write its structure as a list of Wyckoff positions.\n",
        "Here is what is known of a crystal. Write its structure as a list of Wyckoff positions.\n",
        "Here is what is known of a crystal. It is red. "
        "Write its structure as a list of Wyckoff positions.\n",
        "Here is what is known of a crystal. It is cubic. It is cubic. "
        "Write its structure as a list of Wyckoff positions.\n",
        "Here is what is known of a crystal. The space group is Fm-3m (number 221). "
        "Write its structure as a list of Wyckoff positions.\n",
    ],
)
def test_what_it_would_not_write_is_refused(prompt):
    with pytest.raises(ParseError):
        WORDS.parse(prompt)


def test_a_model_finds_the_template_of_its_format_by_the_hash():
    hashes = {form: template_named("words-1", format=form).hash for form in FORMATS}
    assert len(set(hashes.values())) == len(FORMATS)
    for form, digest in hashes.items():
        assert template_named("words-1", digest) == WordsTemplate(form)
        assert template_named("words-1", digest, format=form).render(Conditions()) == (
            WordsTemplate(form).render(Conditions())
        )
    with pytest.raises(UnknownName, match="the model was trained with"):
        template_named("words-1", hashes["cif"], format="xyz")
    with pytest.raises(UnknownName, match="the model was trained with 0123"):
        template_named("words-1", "0123")
    with pytest.raises(UnknownName, match="did you mean 'cif'"):
        template_named("words-1", format="ciff")


def test_the_hash_covers_every_sentence(monkeypatch):
    from crystallm_kit.text import prompt_words

    before = WordsTemplate("cif").hash
    for table in ("SENTENCES", "DECIMALS", "CLASS_PROMPTS"):
        kept = getattr(prompt_words, table)
        key = next(iter(kept))
        changed = {**kept, key: 1 if table == "DECIMALS" else (*kept[key], "changed")}
        with monkeypatch.context() as patch:
            patch.setattr(prompt_words, table, changed)
            assert WordsTemplate("cif").hash != before, table
    for table in ("OPENINGS", "FREE_OPENINGS", "REQUESTS", "INFILL_PROMPTS", "PROPERTY_PROMPTS"):
        with monkeypatch.context() as patch:
            patch.setattr(prompt_words, table, (*getattr(prompt_words, table), "changed"))
            assert WordsTemplate("cif").hash != before, table


# ---------------------------------------------------------------- infilling


@pytest.mark.parametrize("form", FORMATS)
def test_a_mask_hides_every_mention_of_one_element_and_nothing_else(form):
    text = representation(form).encode(CARBIDE)
    masked = mask_element(text, "C", form)
    assert masked.count(MASK) >= 2
    assert "Ca" in masked
    assert masked.count("Ca") == text.count("Ca")
    # what is left of C stands in keys and in the file's own words
    left = [line for line in masked.split("\n") if re.search(r"C(?![a-z])", line)]
    assert all(line.startswith(("Lattice=", "_symmetry")) for line in left), left
    if form == "cif":
        assert f"\n{MASK} ? ? ?\n" in masked
        assert f"'Ca2 {MASK}4'" in masked
    else:
        assert masked.replace(MASK, "C") == text


def test_masks_of_the_wyckoff_format_are_as_the_docstring_shows():
    assert mask_element("Ti2 O4 136\nTi a\nO f\n4.59 2.96 .3053 end", "Ti", "wyckoff") == (
        "[MASK]2 O4 136\n[MASK] a\nO f\n4.59 2.96 .3053 end"
    )
    with pytest.raises(UnknownName, match="site of element 'N'"):
        mask_element("Ti2 O4 136\nTi a\nO f\n4.59 2.96 .3053 end", "N", "wyckoff")


@pytest.mark.parametrize("form", FORMATS)
def test_infill_prompts_hold_the_masked_text_in_two_wordings(form):
    template = template_named("words-1", format=form)
    text = representation(form).encode(CARBIDE)
    prompts = {template.infill_prompt(text, "C", np.random.default_rng(seed)) for seed in range(20)}
    assert len(prompts) == 2
    assert template.infill_prompt(text, "C") in prompts
    for prompt in prompts:
        assert f"\n{mask_element(text, 'C', form)}\n" in prompt
        assert prompt.endswith(("?\n", ".\n"))
    assert template.infill_answer(" C.\nand more") == "C"
    with pytest.raises(ParseError, match="an element symbol expected"):
        template.infill_answer("carbon")


# ---------------------------------------------------------------- properties


@pytest.mark.parametrize("name", QUESTIONS)
def test_the_answer_to_every_question_is_read_back(name):
    values = {"is_metal": [True, False], "crystal_system": CRYSTAL_SYSTEMS}.get(name, [0.0, 1.2345, 12.5])
    for value in values:
        read = WORDS.property_answer(WORDS.property_completion(name, value) + "\n", name)
        assert read == (
            pytest.approx(value, abs=0.51 * 10 ** -DECIMALS[name]) if name in PROPERTIES else value
        )
    prompts = {WORDS.property_prompt("TEXT", name, np.random.default_rng(seed)) for seed in range(30)}
    assert len(prompts) >= 2
    for prompt in prompts:
        assert "\nTEXT\n" in prompt
        assert name not in PROPERTIES or PROPERTIES[name].unit in prompt


@pytest.mark.parametrize(
    ("completion", "name", "expected"),
    [
        ("1.80 eV", "bulk_modulus_gpa", "a number and GPa expected"),
        ("about 2 eV", "band_gap_ev", "a number and eV expected"),
        ("2", "band_gap_ev", "a number and eV expected"),
        ("semiconductor", "is_metal", "metal or not a metal expected"),
        ("cubical", "crystal_system", "a crystal system expected"),
    ],
)
def test_an_answer_to_another_question_is_refused(completion, name, expected):
    with pytest.raises(ParseError, match=expected):
        WORDS.property_answer(completion, name)


def test_an_unknown_question_is_refused_with_the_nearest():
    with pytest.raises(UnknownName, match="did you mean 'band_gap_ev'"):
        WORDS.property_prompt("TEXT", "band_gap")


def test_it_stands_in_the_table():
    assert TEMPLATES["words-1"].tasks == {"generate", "infill", "property"}
