"""CrystaLLM-pi's dialect of the `cif` format, on CrystaLLM's golden rows."""

import gzip
import json
import os
import re
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Structure

from crystallm_kit.errors import ParseError, UserError
from crystallm_kit.records import Conditions, Crystal, Verdict
from crystallm_kit.text.cif import CifRepresentation
from crystallm_kit.text.cif_pi import (
    MORE_TOKENS,
    bracketed,
    decode_pi,
    pi_alphabet,
    text_to_pi,
    without_brackets,
)
from crystallm_kit.text.cif_tables import spacegroup_symbols, vocabulary
from crystallm_kit.text.parsing import parse_completion
from crystallm_kit.text.prompts import TEMPLATES
from crystallm_kit.text.representation import cut
from crystallm_kit.tokens.tokenizer import build_tokenizer, encode_strict

PI = CifRepresentation(dialect="pi")
V1 = CifRepresentation()
TEMPLATE = TEMPLATES["cif-crystallm-pi"]

ROCK_SALT = """<bos>
data_[Na4Cl4]
loop_
 _atom_type_symbol
 _atom_type_electronegativity
 _atom_type_radius
 _atom_type_ionic_radius
[
 Na 0.9300 1.8000 1.1600
 Cl 3.1600 1.0000 0.7800
]
_symmetry_space_group_name_H-M [Fm-3m]
_cell_length_a [5.6402]
_cell_length_b [5.6402]
_cell_length_c [5.6402]
_cell_angle_alpha [90.0000]
_cell_angle_beta [90.0000]
_cell_angle_gamma [90.0000]
_symmetry_Int_Tables_number [225]
_chemical_formula_structural [NaCl]
_chemical_formula_sum '[Na4 Cl4]'
_cell_volume [179.4252]
_cell_formula_units_Z [4]
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
[
 Na Na0 4 0.0000 0.0000 0.0000 1.0
 Cl Cl1 4 0.0000 0.0000 0.5000 1.0
]
<eos>"""


@cache
def golden() -> list[dict]:
    folder = os.environ.get("CRYSTALLM_KIT_GOLDEN")
    if not folder:
        pytest.skip("CRYSTALLM_KIT_GOLDEN is not set: no golden rows of CrystaLLM")
    with gzip.open(Path(folder) / "crystallm_cif_golden.json.gz", "rt") as file:
        rows = json.load(file)
    return [{**row, "text": re.sub(r"[ \t]+", " ", row["text"])} for row in rows]


@cache
def tokenizer():
    return build_tokenizer(pi_alphabet())


def test_rock_salt_reads_as_shown_and_is_read_back():
    """AFLOW AB_cF8_225_a_b, a = 5.6402 angstrom, in its primitive cell."""
    half = 5.6402 / 2
    primitive = Structure(
        [[0, half, half], [half, 0, half], [half, half, 0]], ["Na", "Cl"], [[0, 0, 0], [0.5] * 3]
    )
    assert PI.encode(Crystal("rock salt", primitive)) == ROCK_SALT
    found = PI.decode(ROCK_SALT).structure
    assert found.composition.formula == "Na4 Cl4"
    assert StructureMatcher(scale=False).fit(found, primitive)


def test_golden_rows_have_as_many_tokens_as_crystallm_pi_counts():
    """421.6 tokens on average by CrystaLLM-pi's own tokenizer and steps, 364.3 by CrystaLLM's."""
    counts = [len(encode_strict(tokenizer(), text_to_pi(row["text"]))) for row in golden()]
    assert round(sum(counts) / len(counts), 1) == 421.6


def test_golden_rows_lose_nothing_in_brackets_and_tokens():
    for row in golden()[:60]:
        text = text_to_pi(row["text"])
        assert without_brackets(text)[0] == row["text"]
        assert tokenizer().decode(encode_strict(tokenizer(), text)) == text
        assert decode_pi(text).structure == V1.decode(row["text"]).structure


def test_the_first_371_ids_are_crystallms_and_six_follow():
    keys = tokenizer().convert_ids_to_tokens(range(377))
    plain = [t if t == "Pm_sg" else t.removesuffix("_sg") for t in vocabulary()]
    assert keys == [*plain, *MORE_TOKENS]
    assert (tokenizer().pad_token_id, tokenizer().eos_token_id) == (371, 373)


@pytest.mark.parametrize("number", range(1, 231))
def test_a_space_group_is_one_token_in_brackets_alone(number):
    symbol = spacegroup_symbols()[number]
    if f"{symbol}_sg" not in vocabulary():
        pytest.skip(f"CrystaLLM has no token for {symbol}")
    ids = tokenizer()(f"_symmetry_space_group_name_H-M [{symbol}]")["input_ids"]
    assert ids == [107, 141, 374, vocabulary().index(f"{symbol}_sg"), 375]
    if symbol[0] not in "AR":  # no element begins so, and what is no element is looked up as one word
        unbracketed = tokenizer()(f"_symmetry_space_group_name_H-M {symbol}\n")["input_ids"]
        assert vocabulary().index(f"{symbol}_sg") not in unbracketed


def test_the_alphabet_cuts_as_its_tokenizer_does():
    assert cut(ROCK_SALT, pi_alphabet()) == tokenizer().convert_ids_to_tokens(
        encode_strict(tokenizer(), ROCK_SALT)
    )


@pytest.mark.parametrize(
    ("old", "new", "reason", "line"),
    [
        ("data_[Na4Cl4]", "data_Na4Cl4", "brackets", 2),
        ("[\n Na 0", " Na 0", "brackets", 8),
        ("]\n_symmetry", "_symmetry", "brackets", 11),
        ("[5.6402]", "5.6402", "brackets", 13),
        ("'[Na4 Cl4]'", "[Na4 Cl4]", "brackets", 21),
        ("\n]\n<eos>", "", "truncated", 38),
        ("[225]", "[224]", "spacegroup_disagrees", 19),
        ("Cl Cl1 4", "Cl Cl1 8", "formula_disagrees", 0),
        ("Cl Cl1 4 0.0000 0.0000 0.5000 1.0", "Cl Cl1 4 0.0000 0.5000 1.0", "too_few_fields", 38),
        ("]\n<eos>", "]\n]\n<eos>", "brackets", 40),
    ],
)
def test_a_text_with_a_bracket_or_value_out_of_place_is_refused_at_its_line(old, new, reason, line):
    assert old in ROCK_SALT
    with pytest.raises(ParseError) as caught:
        PI.decode(ROCK_SALT.replace(old, new, 1))
    assert (caught.value.reason, caught.value.line) == (reason, line)


@given(st.text(alphabet="<>bose\n []data_loop_'Na41.xyz,", max_size=80))
@settings(max_examples=200, deadline=None)
def test_any_text_is_a_crystal_or_a_parse_error(text):
    with pytest.raises(ParseError):
        PI.decode(text)


def test_a_completion_is_read_with_and_without_its_end_and_with_conditions_before_it():
    for text in (
        ROCK_SALT,
        ROCK_SALT.removesuffix("\n<eos>"),
        ROCK_SALT.removeprefix("<bos>\n"),
        ROCK_SALT.replace("<bos>\n", "<bos>\n[0.2500 -100.0]\n"),
    ):
        assert not isinstance(parse_completion(text, PI), Verdict)
    assert parse_completion(ROCK_SALT[:400], PI, stop_reason="length").reason == "truncated"


def test_only_v1_has_a_grammar():
    with pytest.raises(UserError, match="only dialect 'v1'"):
        PI.grammar()


def test_an_unknown_dialect_is_refused():
    with pytest.raises(UserError, match="no dialect of format 'cif' 'v2'"):
        CifRepresentation(dialect="v2")


def test_prompts_are_the_beginning_of_the_dialects_own_texts():
    assert TEMPLATE.render(Conditions()) == "<bos>\ndata_["
    formula = {"Cl": 4, "Na": 4}
    assert TEMPLATE.render(Conditions(formula=formula)) == "<bos>\ndata_[Na4Cl4]\n"
    whole = TEMPLATE.render(Conditions(formula=formula, spacegroup_number=225))
    assert ROCK_SALT.startswith(whole)
    assert whole.endswith("_symmetry_space_group_name_H-M [Fm-3m]\n")
    assert TEMPLATE.parse(whole) == Conditions(formula={"Na": 4, "Cl": 4}, spacegroup_number=225)
    assert 253 in encode_strict(tokenizer(), whole)


def test_a_value_on_a_line_of_its_own_stays_without_brackets():
    """pymatgen moves a long formula to the next line, where CrystaLLM-pi does not look for it."""
    lines = ["data_K4O4", "_chemical_formula_sum", "'K4 O4'", "_cell_volume 9.0"]
    assert bracketed(lines) == ["data_[K4O4]", "_chemical_formula_sum", "'K4 O4'", "_cell_volume [9.0]"]
