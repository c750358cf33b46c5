"""The fast cutter gives the tokenizer's ids."""

import pytest
from pymatgen.core.lattice import Lattice
from pymatgen.core.structure import Structure

from crystallm_kit.errors import ParseError
from crystallm_kit.records import Crystal
from crystallm_kit.text.representation import REPRESENTATIONS, representation
from crystallm_kit.tokens.cutting import Cutter
from crystallm_kit.tokens.tokenizer import encode_strict, format_tokenizer

CRYSTALS = [
    Crystal("rutile", Structure.from_spacegroup(
        "P4_2/mnm", Lattice.tetragonal(4.594, 2.959), ["Ti", "O"], [[0, 0, 0], [0.3053, 0.3053, 0]])),
    Crystal("scandium selenide iodide", Structure(
        Lattice.from_parameters(4.1, 7.3, 11.2, 81, 77, 98), ["Sc", "Se", "S", "C", "Cs", "I"],
        [[0.1, 0.2, 0.3], [0.4, 0.9, 0.6], [0.7, 0.8, 0.9], [0.25, 0.5, 0.1],
         [0.33, 0.05, 0.77], [0.6, 0.4, 0.2]])),
]  # fmt: skip


@pytest.mark.parametrize("name", REPRESENTATIONS)
@pytest.mark.parametrize("crystal", CRYSTALS, ids=lambda crystal: crystal.id)
def test_the_ids_are_those_of_the_tokenizer(name, crystal):
    text = representation(name).encode(crystal)
    assert Cutter(representation(name).alphabet())(text) == encode_strict(format_tokenizer(name), text)


def test_text_that_no_token_covers_is_refused_with_the_place():
    with pytest.raises(ParseError, match="no token for '@ b"):
        Cutter(representation("wyckoff").alphabet())("Na a\nCl @ b\n")


def test_the_longest_token_wins():
    alphabet = representation("wyckoff").alphabet()
    assert [alphabet.tokens[i] for i in Cutter(alphabet)("Sc2 ")] == ["Sc", "2 "]
