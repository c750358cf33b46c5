import re

import pytest
from pymatgen.core import Lattice, Molecule, Structure

from crystallm_kit.records import Crystal
from crystallm_kit.text.compact import CompactRepresentation
from crystallm_kit.text.grammar import Rule, choice, grammar, number, one_or_more, optional, regex, sequence
from crystallm_kit.text.xyz import XyzRepresentation

TRICLINIC = Structure(
    Lattice.from_parameters(4.12, 15.37, 6.81, 82.3, 97.6, 104.9),
    ["K", "Sb", "O", "F"],
    [[0.03, 0.11, 0.07], [0.52, 0.36, 0.71], [0.27, 0.81, 0.43], [0.77, 0.62, 0.15]],
)
HYDROGEN = Molecule(["H", "H"], [[0, 0, -0.37], [0, 0, 0.37]])
SAMPLES = {
    "compact": (CompactRepresentation(), TRICLINIC),
    "published decimals": (CompactRepresentation.crystal_text_llm(), TRICLINIC),
    "xyz": (XyzRepresentation(), TRICLINIC),
    "xyz, any orientation": (XyzRepresentation(standard_orientation=False), TRICLINIC),
    "molecule": (XyzRepresentation(), HYDROGEN),
}


def test_a_number_has_its_decimals_and_no_leading_zeros():
    accepted = re.compile(regex(number(2, signed=True)))
    assert all(accepted.fullmatch(x) for x in ("0.00", "-0.50", "7.25", "10.00", "999.99"))
    assert not any(
        accepted.fullmatch(x) for x in ("", "1", "1.", "1.0", "1.000", "01.00", "1000.00", "+1.00")
    )


def test_the_regular_expression_escapes_what_is_special():
    rules = {"root": sequence("a.b[", optional("\n"), choice("+", "*"))}
    found = re.compile(grammar(rules).regex)
    assert found.fullmatch("a.b[\n+")
    assert not found.fullmatch("aXb[+")


def test_rules_are_written_once_and_referred_to_by_name():
    written = grammar({"root": one_or_more(Rule("word")), "word": choice("Na", "N")})
    assert written.gbnf == 'root ::= (word)+\nword ::= ("Na" | "N")\n'
    assert written.lark == 'start: ROOT\nROOT: (WORD)+\nWORD: ("Na" | "N")\n'
    assert written.regex == "(?:(?:Na|N))+"


@pytest.mark.parametrize("name", SAMPLES)
def test_lark_accepts_what_encode_writes_and_no_text_that_was_cut(name):
    lark = pytest.importorskip(
        "lark", reason="the Lark grammars are run by the package lark, which is absent"
    )
    text_format, structure = SAMPLES[name]
    parser = lark.Lark(text_format.grammar().lark, parser="lalr")
    text = text_format.encode(Crystal("x", structure))
    parser.parse(text)
    with pytest.raises(lark.exceptions.LarkError):
        parser.parse(text[:-1])


@pytest.mark.parametrize("name", SAMPLES)
def test_all_three_notations_name_the_same_rules(name):
    written = SAMPLES[name][0].grammar()
    in_gbnf = [line.split(" ::= ")[0] for line in written.gbnf.splitlines()]
    in_lark = [line.split(": ")[0].lower() for line in written.lark.splitlines()]
    assert in_lark == ["start", *in_gbnf]
