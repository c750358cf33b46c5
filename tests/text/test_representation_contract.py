"""What every text format of the table owes, on crystals from rock salt to a hundred atoms."""

import re
import warnings
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Lattice, Structure

from crystallm_kit.errors import EncodeError, ParseError, UnknownName, UserError
from crystallm_kit.records import Crystal, Verdict
from crystallm_kit.text.parsing import parse_completion
from crystallm_kit.text.representation import REPRESENTATIONS, cut, representation

FORMATS = sorted(REPRESENTATIONS)


@cache
def rock_salt() -> Structure:
    """NaCl, AFLOW AB_cF8_225_a_b, https://aflow.org/p/AB_cF8_225_a_b-001; a as measured, 5.6402 angstrom."""
    return Structure.from_spacegroup(225, Lattice.cubic(5.6402), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])


@cache
def rutile() -> Structure:
    """TiO2, AFLOW A2B_tP6_136_f_a, https://aflow.org/p/A2B_tP6_136_f_a-001."""
    lattice = Lattice.tetragonal(4.5937, 2.9587)
    return Structure.from_spacegroup(136, lattice, ["Ti", "O"], [[0, 0, 0], [0.3053, 0.3053, 0]])


@cache
def wurtzite() -> Structure:
    """ZnS, hexagonal, AFLOW AB_hP4_186_b_b, https://aflow.org/p/AB_hP4_186_b_b-001."""
    lattice = Lattice.hexagonal(3.8227, 6.2607)
    sites = [[1 / 3, 2 / 3, 0], [1 / 3, 2 / 3, 0.3748]]
    return Structure.from_spacegroup(186, lattice, ["Zn", "S"], sites)


def triclinic() -> Structure:
    """Made up: no symmetry but translations."""
    lattice = Lattice.from_parameters(4.12, 5.37, 6.81, 82.3, 97.6, 104.9)
    sites = [[0.03, 0.11, 0.07], [0.52, 0.36, 0.71], [0.27, 0.81, 0.43], [0.77, 0.62, 0.15]]
    return Structure(lattice, ["K", "Sb", "O", "F"], sites)


def tungsten() -> Structure:
    """One atom in its cell: bcc tungsten, AFLOW A_cI2_229_a, in the primitive cell."""
    lattice = Lattice([[-1.5825, 1.5825, 1.5825], [1.5825, -1.5825, 1.5825], [1.5825, 1.5825, -1.5825]])
    return Structure(lattice, ["W"], [[0, 0, 0]])


def hundred_atoms() -> Structure:
    """Made up: 96 atoms on a displaced grid of 3 angstrom, no symmetry."""
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in (4, 4, 6)), indexing="ij"), -1).reshape(-1, 3)
    shift = np.random.default_rng(7).uniform(-0.3, 0.3, grid.shape)
    symbols = ["Ba", "Zr", "O"] * 32
    return Structure(Lattice.orthorhombic(12, 12.5, 18), symbols, (grid + shift) / [4, 4, 6])


CRYSTALS = {f.__name__: f for f in (rock_salt, rutile, wurtzite, triclinic, tungsten, hundred_atoms)}


@pytest.fixture(params=FORMATS)
def text_format(request):
    return representation(request.param)


@pytest.mark.parametrize("name", CRYSTALS)
def test_decode_returns_the_encoded_crystal(text_format, name):
    structure = CRYSTALS[name]()
    decoded = text_format.decode(text_format.encode(Crystal(name, structure))).structure
    assert decoded.composition.reduced_formula == structure.composition.reduced_formula
    assert decoded.volume / len(decoded) == pytest.approx(structure.volume / len(structure), rel=0.01)
    distances = StructureMatcher().get_rms_dist(structure, decoded)
    assert distances is not None
    assert distances[0] < 0.005


@pytest.mark.parametrize("name", CRYSTALS)
def test_encode_is_deterministic(text_format, name):
    texts = {text_format.encode(Crystal("x", CRYSTALS[name]())) for _ in range(3)}
    assert len(texts) == 1


@pytest.mark.parametrize("name", CRYSTALS)
def test_tokens_join_to_the_text(text_format, name):
    text, alphabet = text_format.encode(Crystal("x", CRYSTALS[name]())), text_format.alphabet()
    tokens = cut(text, alphabet)
    assert set(tokens) <= set(alphabet.tokens) - {alphabet.unknown}
    joined = "".join(tokens)
    for literal, replacement in alphabet.decoder_rewrites:
        joined = joined.replace(literal, replacement)
    assert joined == text


@pytest.mark.parametrize("name", CRYSTALS)
def test_the_grammars_regex_accepts_what_encode_writes(text_format, name):
    regex = text_format.grammar().regex
    if regex is None:
        pytest.skip(f"{text_format.name}: the grammar has no regular expression")
    assert re.fullmatch(regex, text_format.encode(Crystal("x", CRYSTALS[name]())))


@pytest.mark.parametrize("name", CRYSTALS)
def test_a_text_that_lost_its_last_token_is_refused(text_format, name):
    text, alphabet = text_format.encode(Crystal("x", CRYSTALS[name]())), text_format.alphabet()
    if alphabet.stop:
        text = text.rstrip()  # without the stop string nothing but the text itself is left to tell
    shorter = text.removesuffix(cut(text, alphabet)[-1])
    with pytest.raises(ParseError):
        text_format.decode(shorter)


def test_a_disordered_crystal_is_refused(text_format):
    alloy = Structure(Lattice.cubic(3.6), [{"Cu": 0.5, "Au": 0.5}], [[0, 0, 0]])
    with pytest.raises(EncodeError, match="alloy"):
        text_format.encode(Crystal("alloy", alloy))


@given(text=st.text(max_size=200))
@settings(max_examples=50, deadline=None)
@pytest.mark.parametrize("name", FORMATS)
def test_arbitrary_text_is_a_parse_error_and_an_invalid_verdict(name, text):
    text_format = representation(name)
    with pytest.raises(ParseError):
        text_format.decode(text)
    verdict = parse_completion(text, text_format)
    assert isinstance(verdict, Verdict)
    assert not verdict.valid
    assert verdict.reason.startswith("parse:")


@given(data=st.data())
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_text_is_a_crystal_or_a_verdict_never_another_error(name, data):
    text_format = representation(name)
    alphabet = text_format.alphabet()
    tokens = cut(
        text_format.encode(Crystal("x", data.draw(st.sampled_from([rutile, triclinic]))())), alphabet
    )
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(tokens) - 1))
        tokens[position] = data.draw(st.sampled_from(alphabet.tokens))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parsed = parse_completion("".join(tokens), text_format)
    assert isinstance(parsed, Crystal | Verdict)
    if isinstance(parsed, Crystal):
        assert np.isfinite(parsed.structure.cart_coords).all()
        assert parsed.structure.volume > 0


def test_an_unknown_format_is_named_with_its_neighbour():
    with pytest.raises(UnknownName, match="did you mean 'cif'"):
        representation("ciff")


def test_an_unknown_setting_is_a_user_error():
    with pytest.raises(UserError, match="decimales"):
        representation("xyz", decimales=3)
