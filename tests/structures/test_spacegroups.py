"""Space group names: every spelling finds its group; what is none is refused with the nearest."""

import json
import os
from pathlib import Path

import pytest
from moyopy import HallSymbolEntry
from pymatgen.symmetry.groups import sg_symbol_from_int_number

from crystallm_kit.errors import UnknownName
from crystallm_kit.structures.spacegroups import find_spacegroup, spacegroup_number, spacegroup_symbol


def test_every_symbol_of_every_setting_finds_its_number():
    for hall_number in range(1, 531):
        entry = HallSymbolEntry(hall_number)
        for spelling in (entry.hm_short, entry.hm_full, entry.hm_short.replace(" ", "").replace("_", "")):
            assert spacegroup_number(spelling) == entry.number


def test_symbol_and_number_are_inverse():
    assert [spacegroup_number(spacegroup_symbol(n)) for n in range(1, 231)] == list(range(1, 231))


def test_the_spellings_of_pymatgen_find_their_numbers():
    for number in range(1, 231):
        assert spacegroup_number(sg_symbol_from_int_number(number)) == number


@pytest.mark.parametrize(
    ("spelling", "number"),
    [("Fm-3m", 225), ("Fm3m", 225), ("Fm3\u0305m", 225), ("Fm\u22123m", 225), ("P6_3/mmc", 194),
     ("P63/mmc", 194), ("P 21/c", 14), ("P2_1/n", 14), ("R-3m:H", 166), ("R-3mH", 166), ("Fd-3m:2", 227),
     ("Fd-3mZ", 227), ("Cmca", 64), ("Pbnm", 62),
     ("No. 62", 62), ("#62", 62), ("62", 62), (62, 62), ("pnma", 62)],
)  # fmt: skip
def test_a_spelling_finds_its_number(spelling, number):
    assert spacegroup_number(spelling) == number


@pytest.mark.parametrize(
    ("name", "says"),
    [("Pnmma", "did you mean 'Pnma'"), ("Fm-3x", "did you mean 'Fm-3"), ("231", "1 to 230"),
     (0, "1 to 230"), ("", "1 to 230")],
)  # fmt: skip
def test_no_space_group_is_refused_with_the_nearest(name, says):
    with pytest.raises(UnknownName, match=says):
        spacegroup_number(name)


def test_words_and_formulas_are_no_space_groups():
    assert [find_spacegroup(word) for word in ("NaCl", "perovskite", "cubic", "Fe2O3", "")] == [None] * 5


@pytest.mark.skipif(
    "CRYSTALLM_KIT_GOLDEN" not in os.environ, reason="CRYSTALLM_KIT_GOLDEN names no golden folder"
)
def test_the_symbols_are_those_of_crystallm():
    """CrystaLLM v1's vocabulary has 227 space group tokens; all but P4_222, P6 and P432."""
    path = Path(os.environ["CRYSTALLM_KIT_GOLDEN"]) / "crystallm_vocabulary.json"
    tokens = json.loads(path.read_text())["tokens_in_id_order"]
    theirs = {token.removesuffix("_sg") for token in tokens if token.endswith("_sg")}
    assert {spacegroup_symbol(n) for n in range(1, 231)} - theirs == {"P4_222", "P6", "P432"}
