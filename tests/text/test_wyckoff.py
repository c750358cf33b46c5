"""wyckoff.py: golden texts by hand, every refusal, and text -> crystal -> text without a change."""

import contextlib
import re
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Lattice, Molecule, Structure

from crystallm_kit.errors import EncodeError, ParseError
from crystallm_kit.records import Crystal
from crystallm_kit.structures.elements import ATOMIC_NUMBER, ELEMENTS, RANK, SYMBOL
from crystallm_kit.structures.symmetry import LETTERS, Site, SymmetricCrystal, canonical, expand, space_group
from crystallm_kit.text.representation import cut
from crystallm_kit.text.wyckoff import (
    END,
    PAD,
    TOKENS,
    WyckoffRepresentation,
    symmetric_to_text,
    text_to_symmetric,
)

WYCKOFF = WyckoffRepresentation()
GRAMMAR = re.compile(str(WYCKOFF.grammar().regex))


def encode(structure: Structure) -> str:
    return WYCKOFF.encode(Crystal("test", structure))


def of_group(number: int, lattice: Lattice, symbols: list[str], sites: list[list[float]]) -> Structure:
    return Structure.from_spacegroup(number, lattice, symbols, sites)


# Golden texts, written by hand from the AFLOW prototypes (aflow.org/prototype-encyclopedia)

GOLDEN = {
    "Na1 Cl1 225\nNa a\nCl b\n5.64 end": lambda: of_group(
        225, Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]
    ),
    "Ti2 O4 136\nTi a\nO f\n4.59 2.96 .3053 end": lambda: of_group(
        136, Lattice.tetragonal(4.5937, 2.9587), ["Ti", "O"], [[0, 0, 0], [0.3053, 0.3053, 0]]
    ),
    # A-site at 1a rather than at 1b: the canonical description gives the first element the first letter.
    "Ba1 Ti1 O3 221\nBa a\nTi b\nO c\n4.00 end": lambda: of_group(
        221, Lattice.cubic(4.0), ["Ti", "Ba", "O"], [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0, 0]]
    ),
    "C2 227\nC a\n3.57 end": lambda: of_group(227, Lattice.cubic(3.567), ["C"], [[0, 0, 0]]),
    # Polar: the origin along c stands on the first atom. 186, 2b 1/3,2/3,z.
    "Zn2 S2 186\nZn b\nS b\n3.82 6.26 .0000 .3748 end": lambda: of_group(
        186, Lattice.hexagonal(3.8227, 6.2607), ["Zn", "S"], [[1 / 3, 2 / 3, 0], [1 / 3, 2 / 3, 0.3748]]
    ),
    "W1 229\nW a\n3.16 end": lambda: Structure(Lattice.cubic(3.16), ["W"] * 2, [[0, 0, 0], [0.5, 0.5, 0.5]]),
    # Monoclinic: a, b, c, beta. The cell turned about c has the supplement of beta; the smaller is written.
    "K1 F1 10\nK a\nF h\n3.50 4.25 5.75 81.00 end": lambda: of_group(
        10, Lattice.monoclinic(3.5, 4.25, 5.75, 99.0), ["K", "F"], [[0, 0, 0], [0.5, 0.5, 0.5]]
    ),
}  # fmt: skip


@pytest.mark.parametrize("text", GOLDEN)
def test_a_prototype_reads_as_written_by_hand(text):
    structure = GOLDEN[text]()
    assert encode(structure) == text
    assert StructureMatcher().fit(WYCKOFF.decode(text).structure, structure)


@pytest.mark.parametrize("text", GOLDEN)
def test_the_grammar_takes_the_text_and_no_text_that_was_cut(text):
    assert GRAMMAR.fullmatch(text)
    pieces = cut(text, WYCKOFF.alphabet())
    assert "".join(pieces) == text
    assert set(pieces) <= set(TOKENS)
    for n in range(1, len(pieces)):
        assert not GRAMMAR.fullmatch("".join(pieces[:n]))


def test_a_text_carries_its_space_group_to_the_crystal():
    assert WYCKOFF.decode("Na1 Cl1 225\nNa a\nCl b\n5.64 end").properties == {"spacegroup_number": 225}


def test_the_decoded_cell_is_primitive_with_sites_orbit_by_orbit():
    structure = WYCKOFF.decode("Ti2 O4 136\nTi a\nO f\n4.59 2.96 .3053 end").structure
    assert [site.specie.symbol for site in structure] == ["Ti"] * 2 + ["O"] * 4
    assert structure.lattice.parameters == pytest.approx((4.59, 4.59, 2.96, 90, 90, 90))


def test_tokens_are_distinct_and_small_in_number():
    assert len(set(TOKENS)) == len(TOKENS) < 2048
    assert (TOKENS[0], TOKENS[1]) == (PAD, END)


# Refusals

NACL = "Na1 Cl1 225\nNa a\nCl b\n5.64 end"
REFUSED = {
    "": ("no_end", 1),
    "Na1 Cl1 225\nNa a\nCl b\n5.64": ("no_end", 4),
    "Na1 Cl1 225\nNa a\nCl b\n5.64end": ("no_end", 4),
    "Na1 Cl1 225\nNa a\nCl b\n5.64 end\n": ("no_end", 5),
    "end": ("no_end", 1),
    NACL.replace("Na1 ", ""): ("composition", 1),
    NACL.replace("Na1 Cl1 225", "225"): ("header", 1),
    NACL.replace("225", ""): ("header", 1),
    NACL.replace("Na1", "Na0"): ("header", 1),
    NACL.replace("Na1", "Na01"): ("header", 1),
    NACL.replace("Na1", "Na1 Na1"): ("header", 1),
    NACL.replace("Na1", "Na100"): ("header", 1),
    NACL.replace("Na1", "Xx1"): ("element", 1),
    NACL.replace("225", "0"): ("spacegroup", 1),
    NACL.replace("225", "231"): ("spacegroup", 1),
    NACL.replace("Na a", "Na  a"): ("site", 2),
    NACL.replace("Cl b", "Cl"): ("site", 3),
    NACL.replace("Cl b", "Cl z"): ("letter", 3),
    NACL.replace("Cl b", "Cl a"): ("letter_repeated", 3),
    NACL.replace("Cl1", "Cl2"): ("composition", 1),
    NACL.replace("Cl b", "K b"): ("composition", 1),
    NACL.replace("\nCl b", ""): ("composition", 1),
    NACL.replace("5.64 ", ""): ("too_few_numbers", 4),
    NACL.replace("5.64", "5.64 5.64"): ("too_many_numbers", 4),
    NACL.replace("5.64", "5.6"): ("number", 4),
    NACL.replace("5.64", "-5.64"): ("number", 4),
    NACL.replace("5.64", "nan"): ("number", 4),
    NACL.replace("5.64", "٥.٦٤"): ("number", 4),
    NACL.replace("225", "٢٢٥"): ("header", 1),
    NACL.replace("5.64", ".3053"): ("number", 4),
    "Ti2 O4 136\nTi a\nO f\n4.59 2.96 .305 end": ("number", 4),
    "Ti2 O4 136\nTi a\nO f\n4.59 2.96 end": ("too_few_numbers", 4),
    NACL.replace("5.64", "0.00"): ("cell", 0),
    "K1 1\nK a\n4.00 4.00 4.00 30.00 30.00 90.00 .0000 .0000 .0000 end": ("cell", 0),
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_no_crystal_is_refused_with_reason_and_line(text):
    with pytest.raises(ParseError) as caught:
        WYCKOFF.decode(text)
    assert (caught.value.reason, caught.value.line) == REFUSED[text]


def test_every_reason_that_the_docstring_names_is_provoked():
    named = re.findall(r"reasons ([a-z_,\s]+)\.", str(text_to_symmetric.__doc__))[0]
    assert {reason.strip() for reason in named.split(",")} == {reason for reason, _ in REFUSED.values()} - {
        "cell"
    }


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(GOLDEN)), st.data())
def test_a_damaged_text_is_a_crystal_or_a_parse_error(text, data):
    at = data.draw(st.integers(0, len(text)))
    until = data.draw(st.integers(at, min(len(text), at + 4)))
    damaged = text[:at] + data.draw(st.text("0123456789. \nabNaClTiOend-", max_size=4)) + text[until:]
    with contextlib.suppress(ParseError):
        assert WYCKOFF.decode(damaged).structure.volume > 0


# What cannot be written


def test_a_molecule_is_refused():
    with pytest.raises(EncodeError, match="a molecule has no space group"):
        WYCKOFF.encode(Crystal("water", Molecule(["O", "H", "H"], [[0, 0, 0], [0, 0, 1], [0, 1, 0]])))


def test_partial_occupancy_is_refused():
    structure = Structure(Lattice.cubic(3), [{"Fe": 0.5, "Ni": 0.5}], [[0, 0, 0]])
    with pytest.raises(EncodeError, match="partial occupancies"):
        encode(structure)


def test_an_element_without_a_token_is_refused():
    with pytest.raises(EncodeError, match="no token for Rf"):
        encode(Structure(Lattice.cubic(3), ["Rf"], [[0, 0, 0]]))


def test_more_than_99_atoms_of_an_element_are_refused():
    points = np.random.default_rng(0).random((100, 3))
    with pytest.raises(EncodeError, match="100 atoms of one element; at most 99"):
        encode(Structure(Lattice.cubic(20), ["Si"] * 100, points))


def test_a_cell_beyond_the_tokens_is_refused():
    with pytest.raises(EncodeError, match=r"cell length 600\.0 angstrom; at most 499"):
        encode(Structure(Lattice.tetragonal(3, 600), ["Si"], [[0, 0, 0]]))


def test_a_structure_without_a_space_group_is_written_as_p1():
    """Two atoms at one place: the symmetry search merged them, and the text lost one."""
    structure = Structure(
        Lattice.orthorhombic(4, 5, 6), ["Cu", "Cu", "O"], [[0.1, 0.2, 0.3]] * 2 + [[0.6, 0.5, 0.5]]
    )
    text = encode(structure)
    assert text.startswith("Cu2 O1 1\nCu a\nCu a\nO a\n")
    assert WYCKOFF.decode(text).structure.composition == structure.composition


def test_oxidation_states_do_not_change_the_text():
    structure = GOLDEN[NACL]()
    structure.add_oxidation_state_by_element({"Na": 1, "Cl": -1})
    assert encode(structure) == NACL


# Text -> crystal -> text


@cache
def letters(number: int) -> list[tuple[str, int, int]]:
    return [(p.letter, p.n_free, p.primitive_multiplicity) for p in space_group(number).positions]


@st.composite
def symmetric_crystals(draw) -> SymmetricCrystal:
    """Any space group, any letters that it allows, any coordinates: atoms may overlap, texts do not care."""
    number = draw(st.integers(1, 230))
    left = list(letters(number))
    symbols = sorted(draw(st.sets(st.sampled_from(ELEMENTS), min_size=1, max_size=4)), key=RANK.__getitem__)
    sites = []
    for symbol in symbols:
        chosen = draw(st.lists(st.sampled_from(left), min_size=1, max_size=3)) if left else []
        for entry in chosen:
            if entry in left and sum(m for _, _, m in [entry]) <= 96:
                free = draw(st.tuples(*[st.integers(0, 9999)] * entry[1]))
                sites.append(Site(ATOMIC_NUMBER[symbol], entry[0], tuple(v / 10_000 for v in free)))
                if not entry[1]:
                    left.remove(entry)
    group = space_group(number)
    lattice = [
        draw(st.integers(200, 40_000)) if i < 3 else draw(st.integers(7500, 10_500))
        for i in group.free_lattice
    ]
    return SymmetricCrystal(number, tuple(v / 100 for v in lattice), tuple(sites))


@settings(max_examples=400, deadline=None)
@given(symmetric_crystals())
def test_text_to_crystal_to_text_changes_nothing(crystal):
    if not crystal.sites or max(crystal.counts.values()) > 99:
        return
    text = symmetric_to_text(crystal)
    assert text_to_symmetric(text) == crystal
    assert symmetric_to_text(text_to_symmetric(text)) == text
    assert GRAMMAR.fullmatch(text)
    assert "".join(cut(text, WYCKOFF.alphabet())) == text
    assert dict(expand(crystal).composition.as_dict()) == {SYMBOL[z]: n for z, n in crystal.counts.items()}


@settings(max_examples=100, deadline=None)
@given(symmetric_crystals())
def test_choosing_the_canonical_description_keeps_the_composition_and_is_stable(crystal):
    if not crystal.sites:
        return
    order = sorted(crystal.counts)
    first = canonical(crystal, order)
    assert first.counts == {z: crystal.counts[z] for z in first.counts}
    assert len(first.sites) == len(crystal.sites)
    assert [s.letter in LETTERS for s in first.sites]
    again = canonical(first, order)
    assert [(s.atomic_number, s.letter) for s in again.sites] == [
        (s.atomic_number, s.letter) for s in first.sites
    ]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([1, 2, 12, 19, 33, 62, 87, 123, 146, 166, 176, 189, 198, 217, 225]),
)
def test_what_is_decoded_is_the_crystal_within_the_stated_loss(seed, number):
    rng = np.random.default_rng(seed)
    group = space_group(number)
    general = group.positions[-1]
    lengths, angles = rng.uniform(0.9, 1.2, 3), rng.uniform(80, 100, 3)
    lengths *= (25 * general.multiplicity) ** (1 / 3)
    free = [(*lengths, *angles)[i] for i in group.free_lattice]
    structure = expand(
        SymmetricCrystal(number, tuple(free), (Site(14, general.letter, tuple(rng.random(3))),))
    )
    if structure.distance_matrix[np.triu_indices(len(structure), 1)].min(initial=9) < 0.8:
        return
    # At a fine tolerance the symmetrization moves nothing, and what is left is the rounding of the numbers.
    text = WyckoffRepresentation(symprec_angstrom=1e-3).encode(Crystal("", structure))
    decoded = WYCKOFF.decode(text).structure
    # Lengths to 0.005, angles to 0.005 degree and coordinates to 0.00005, of cells of at most 20 angstrom.
    matcher = StructureMatcher(scale=False)
    rms, largest = matcher.get_rms_dist(structure, decoded)
    assert largest * (structure.volume / len(structure)) ** (1 / 3) < 0.02
    assert rms <= largest
    assert decoded.volume == pytest.approx(structure.volume, rel=0.006)
