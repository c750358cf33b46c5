"""CrystaLLM's text: its own steps on golden rows, the writers against each other, the strict reader."""

import gzip
import json
import os
import re
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import spglib
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Lattice, Molecule, Structure

from crystallm_kit.errors import EncodeError, ParseError, UserError
from crystallm_kit.records import Crystal
from crystallm_kit.text.cif import (
    CifRepresentation,
    by_electronegativity,
    cif_to_text,
    preprocessed_cif,
    spacegroup_symbols,
    vocabulary,
)
from crystallm_kit.text.cif_decoding import decode_cif
from crystallm_kit.text.cif_standard_cell import _frames
from crystallm_kit.text.cif_tables import spacegroup_operations
from crystallm_kit.text.representation import representation
from crystallm_kit.tokens.tokenizer import build_tokenizer, encode_strict

# Complete example of the format, as made by CrystaLLM's own code from NaCl, a = 5.6402 angstrom.
ROCK_SALT_TEXT = """data_Na4Cl4
loop_
_atom_type_symbol
_atom_type_electronegativity
_atom_type_radius
_atom_type_ionic_radius
Na 0.9300 1.8000 1.1600
Cl 3.1600 1.0000 0.7800
_symmetry_space_group_name_H-M Fm-3m
_cell_length_a 5.6402
_cell_length_b 5.6402
_cell_length_c 5.6402
_cell_angle_alpha 90.0000
_cell_angle_beta 90.0000
_cell_angle_gamma 90.0000
_symmetry_Int_Tables_number 225
_chemical_formula_structural NaCl
_chemical_formula_sum 'Na4 Cl4'
_cell_volume 179.4252
_cell_formula_units_Z 4
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
Na Na0 4 0.0000 0.0000 0.0000 1.0
Cl Cl1 4 0.0000 0.0000 0.5000 1.0

"""
WRITERS = ("moyo", "spglib", "pymatgen")


@cache
def rock_salt() -> Structure:
    """NaCl, AFLOW AB_cF8_225_a_b, https://aflow.org/p/AB_cF8_225_a_b-001."""
    return Structure.from_spacegroup(225, Lattice.cubic(5.6402), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])


@cache
def corundum() -> Structure:
    """Al2O3, R-3c, 30 atoms, AFLOW A2B3_hR10_167_c_e, https://aflow.org/p/A2B3_hR10_167_c_e-001."""
    sites = [[0, 0, 0.35216], [0.30624, 0, 0.25]]
    return Structure.from_spacegroup(167, Lattice.hexagonal(4.7589, 12.9919), ["Al", "O"], sites)


@cache
def monoclinic() -> Structure:
    """ZrO2, baddeleyite, P2_1/c, AFLOW A2B_mP12_14_2e_e, https://aflow.org/p/A2B_mP12_14_2e_e-001."""
    lattice = Lattice.from_parameters(5.1505, 5.2116, 5.3173, 90, 99.23, 90)
    sites = [[0.2754, 0.0395, 0.2083], [0.0700, 0.3317, 0.3447], [0.4496, 0.7569, 0.4792]]
    return Structure.from_spacegroup(14, lattice, ["Zr", "O", "O"], sites)


@cache
def promethium_in_pm() -> Structure:
    """Made up: Pm, an element, in Pm, a space group."""
    lattice = Lattice.from_parameters(5.1, 4.2, 6.3, 90, 101, 90)
    sites = [[0.1, 0, 0.2], [0.63, 0.5, 0.71], [0.3, 0.23, 0.55]]
    return Structure.from_spacegroup(6, lattice, ["Pm", "Te", "O"], sites)


CRYSTALS = {f.__name__: f for f in (rock_salt, corundum, monoclinic, promethium_in_pm)}


@cache
def golden() -> list[dict]:
    if "CRYSTALLM_KIT_GOLDEN" not in os.environ:
        pytest.skip("CRYSTALLM_KIT_GOLDEN names no golden folder")
    path = Path(os.environ["CRYSTALLM_KIT_GOLDEN"]) / "crystallm_cif_golden.json.gz"
    return json.loads(gzip.decompress(path.read_bytes()))


@cache
def tokenizer():
    return build_tokenizer(CifRepresentation().alphabet())


def encoded(structure: Structure, **settings) -> str:
    return CifRepresentation(**settings).encode(Crystal("x", structure))


def decoded(text: str) -> Structure:
    return CifRepresentation().decode(text).structure


# ---------------------------------------------------------------- against CrystaLLM's own code


def test_text_steps_give_crystallms_texts_byte_for_byte():
    for row in golden():
        assert preprocessed_cif(row["raw_cif"]) == row["preprocessed"]
        assert cif_to_text(row["raw_cif"], collapse_blanks=False) == row["text"]


def test_token_ids_are_crystallms_both_ways():
    for row in golden():
        text = cif_to_text(row["raw_cif"])
        assert encode_strict(tokenizer(), text) == row["ids"]
        assert tokenizer()(row["text"])["input_ids"] == row["ids"]  # columns two blanks apart
        assert tokenizer().decode(row["ids"]) == text


def test_golden_texts_decode_to_the_structures_they_came_from():
    matcher = StructureMatcher(primitive_cell=False)  # the same conventional cell, atom by atom
    for row in golden():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pymatgen remarks on rounded coordinates
            structure = Structure.from_str(row["raw_cif"], fmt="cif")
        assert len(decoded(row["text"])) == len(structure)
        assert matcher.fit(decoded(row["text"]), structure), row["material_id"]


def test_rock_salt_reads_as_documented_by_all_writers():
    for writer in WRITERS:
        assert encoded(rock_salt(), writer=writer) == ROCK_SALT_TEXT
    assert len(encode_strict(tokenizer(), ROCK_SALT_TEXT)) == 258


@pytest.mark.filterwarnings("ignore:Set OLD_ERROR_HANDLING")
def test_spacegroup_symbols_are_spglibs():
    smallest_hall: dict[int, str] = {}
    for hall_number in range(1, 531):
        kind = spglib.get_spacegroup_type(hall_number)
        smallest_hall.setdefault(kind.number, kind.international_short)
    assert spacegroup_symbols() == smallest_hall


# ---------------------------------------------------------------- tokens


def test_pm_is_two_tokens_by_its_place():
    text = encoded(promethium_in_pm())
    ids = encode_strict(tokenizer(), text)
    assert ids.count(279) == 1  # the space group
    assert ids.count(24) == text.count("Pm") - 1  # the element
    assert tokenizer().decode(ids) == text


def test_every_spacegroup_with_a_token_is_one_token_before_a_newline():
    symbols = [t.removesuffix("_sg") for t in vocabulary() if t.endswith("_sg")]
    assert len(symbols) == 227
    for position, symbol in enumerate(symbols, start=143):
        ids = tokenizer()(f"_symmetry_space_group_name_H-M   {symbol}\n")["input_ids"]
        assert ids == [107, 141, position, 142]


def test_a_spacegroup_without_newline_is_cut_into_letters():
    ids = tokenizer()("_symmetry_space_group_name_H-M Fm-3m")["input_ids"]
    assert tokenizer().convert_ids_to_tokens(ids)[2:] == ["F", "<unk>", "-", "3", "<unk>"]


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize("name", CRYSTALS)
@pytest.mark.parametrize("writer", WRITERS)
def test_the_text_of_every_writer_decodes_to_the_crystal(name, writer):
    structure = CRYSTALS[name]()
    assert StructureMatcher().fit(decoded(encoded(structure, writer=writer)), structure)


@pytest.mark.parametrize("name", CRYSTALS)
def test_a_conventional_cell_gives_the_same_text_by_all_writers(name):
    conventional = decoded(encoded(CRYSTALS[name](), writer="pymatgen"))
    texts = {encoded(conventional, writer=writer) for writer in WRITERS}
    assert len(texts) == 1


def test_primitive_and_conventional_cell_give_the_same_text():
    assert encoded(rock_salt().get_primitive_structure()) == ROCK_SALT_TEXT
    assert encoded(rock_salt() * (2, 1, 1)) == ROCK_SALT_TEXT


def test_one_element_is_printed_without_quotes():
    calcium = Structure.from_spacegroup(225, Lattice.cubic(5.58), ["Ca"], [[0, 0, 0]])
    assert "\n_chemical_formula_sum Ca4\n" in encoded(calcium)
    assert len(decoded(encoded(calcium))) == 4


def test_equal_electronegativities_are_ordered_by_symbol_and_argon_comes_last():
    assert by_electronegativity(["Tc", "Si", "Ar", "Re", "F", "Cu"]) == ["Cu", "Re", "Si", "Tc", "F", "Ar"]


def test_property_values_without_four_decimals_are_printed_as_they_stand():
    helium = Structure.from_spacegroup(225, Lattice.cubic(4.1), ["He"], [[0, 0, 0]])
    assert "\nHe 4.16 1.4 0.0000\n" in encoded(helium)
    assert encoded(helium, writer="pymatgen") == encoded(helium)
    assert [site.specie.symbol for site in decoded(encoded(helium))] == ["He"] * 4


def test_a_long_formula_sum_stands_on_its_own_line_as_pymatgen_breaks_it():
    elements = ["Ba", "Sr", "Ca", "La", "Y", "Zr", "Ti", "Fe", "Co", "Ni", "Cu", "O"]
    sites = [[0.1 + 0.07 * i, 0.05 * i, 0.9 - 0.06 * i] for i in range(len(elements))]
    structure = Structure(Lattice.from_parameters(9.1, 9.7, 10.3, 81, 97, 103), elements, sites)
    text = encoded(structure)
    assert "\n_chemical_formula_sum\n'Ba1 " in text
    assert "\n_chemical_formula_sum\n'Ba1 " in encoded(structure, writer="pymatgen")
    assert len(decoded(text)) == 12


def test_pseudo_translations_do_not_halve_the_cell():
    """FeSe, https://materialsproject.org/materials/mp-1078538: at 0.1 angstrom moyo halves this cell."""
    sites = [[0.0029, 0.25, 0.2559], [0.2413, 0.75, 0.0840]]
    structure = Structure.from_spacegroup(
        62, Lattice.orthorhombic(5.0562, 3.8535, 6.5921), ["Fe", "Se"], sites
    )
    for writer in WRITERS:
        assert "data_Fe4Se4\n" in encoded(structure, writer=writer)


@pytest.mark.parametrize("element", ["Po", "At", "Rn", "Fr", "Ra", "Cm"])
def test_an_element_without_a_token_is_named(element):
    crystal = Structure.from_spacegroup(225, Lattice.cubic(6), [element, "O"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    for writer in WRITERS:
        with pytest.raises(EncodeError, match=f"element {element};"):
            encoded(crystal, writer=writer)


@pytest.mark.parametrize(("number", "symbol"), [(93, "P4_222"), (168, "P6"), (207, "P432")])
def test_a_spacegroup_without_a_token_is_named(number, symbol):
    lattice = {93: Lattice.tetragonal(6, 8), 168: Lattice.hexagonal(7, 5), 207: Lattice.cubic(8)}[number]
    sites = [[0.11, 0.23, 0.37], [0.41, 0.17, 0.08]]
    crystal = Structure.from_spacegroup(number, lattice, ["Zn", "S"], sites)
    for writer in WRITERS:
        with pytest.raises(EncodeError, match=f"space group {symbol};"):
            encoded(crystal, writer=writer, symprec_angstrom=0.01)


def test_molecules_and_atoms_on_one_spot_are_refused():
    with pytest.raises(EncodeError, match=r"water: .*molecule"):
        CifRepresentation().encode(Crystal("water", Molecule(["O", "H"], [[0, 0, 0], [0, 0, 0.96]])))
    twice = Structure(Lattice.cubic(4), ["Na", "Na"], [[0, 0, 0], [0, 0, 0]])
    for writer in WRITERS:
        with pytest.raises(EncodeError, match="x: no space group"):
            encoded(twice, writer=writer)


def test_an_unknown_writer_is_named():
    with pytest.raises(UserError, match=r"'spglip'; did you mean 'spglib'\?"):
        representation("cif", writer="spglip")


def test_entries_without_formula_units_are_refused_as_crystallm_drops_them():
    with pytest.raises(EncodeError, match="_cell_formula_units_Z is 0"):
        cif_to_text("data_X\n_cell_formula_units_Z   0\n")
    with pytest.raises(EncodeError, match="_chemical_formula_sum"):
        cif_to_text("data_X\n_symmetry_space_group_name_H-M   'P 1'\n")


def test_numbers_are_rounded_only_where_they_have_more_than_four_decimals():
    raw = "data_NaCl\n_symmetry_space_group_name_H-M   Fm-3m\n_chemical_formula_sum   'Na4 Cl4'\n"
    text = cif_to_text(raw + "5.64025000 1.0 1e-05 -0.00000001 4.16 225\n")
    assert text.endswith("\n5.6402 1.0 1e-05 -0.0000 4.16 225\n\n")


@pytest.mark.parametrize("number", [2, 4, 12, 62, 63, 122, 129, 139, 148, 161, 186, 189, 205, 216, 227])
def test_frames_map_the_space_group_onto_itself(number):
    def as_set(rotations, translations):
        rows = np.concatenate([rotations.reshape(len(rotations), 9), translations * 24], axis=1)
        rows[:, 9:] %= 24
        return {tuple(row) for row in np.rint(rows).astype(int) % [*[99] * 9, 24, 24, 24]}

    rotations, translations = spacegroup_operations(number)
    turns, shifts = _frames(number)
    assert (turns[0] == np.eye(3)).all()
    assert (shifts[0] == 0).all()
    for turn, shift in zip(turns, shifts, strict=True):
        turned = turn @ rotations @ np.linalg.inv(turn)
        moved = translations @ turn.T + shift - turned @ shift
        assert as_set(turned, moved) == as_set(rotations, translations)


# ---------------------------------------------------------------- reading


def test_rounded_special_positions_are_counted_once():
    """With four decimals, pymatgen's default site_tolerance finds 48 instead of 30 atoms in such cells."""
    text = encoded(corundum())
    structure = decoded(text)
    assert len(structure) == 30
    hexagonal = Structure.from_spacegroup(
        194, Lattice.hexagonal(5.1, 4.3), ["Mg", "Ni"], [[1 / 3, 2 / 3, 0.25], [0.17127, 0.34254, 0.75]]
    )
    assert "0.1713 0.3425 0.7500" in encoded(hexagonal)
    assert len(decoded(encoded(hexagonal))) == 8


def test_special_positions_become_exact():
    structure = Structure.from_spacegroup(194, Lattice.hexagonal(3.2, 5.2), ["Mg"], [[1 / 3, 2 / 3, 0.25]])
    sites = decoded(encoded(structure)).frac_coords
    assert np.abs(sites * 12 - np.rint(sites * 12)).max() < 1e-9


def test_occupancy_reads_as_1_and_as_1_0_and_final_newlines_may_be_missing():
    for text in (ROCK_SALT_TEXT.replace(" 1.0\n", " 1\n"), ROCK_SALT_TEXT.rstrip(), ROCK_SALT_TEXT + "\n"):
        assert decoded(text) == decoded(ROCK_SALT_TEXT)


def test_oxidation_numbers_are_read():
    text = ROCK_SALT_TEXT.replace(
        "_atom_type_ionic_radius\n", "_atom_type_ionic_radius\n_atom_type_oxidation_number\n"
    )
    text = text.replace("1.1600\n", "1.1600 1.0000\n").replace("0.7800\n", "1.6700 -1.0000\n")
    assert decoded(text) == decoded(ROCK_SALT_TEXT)


REFUSED = [
    ("truncated", "", "", 0),  # the empty text: not even a title
    ("truncated", ROCK_SALT_TEXT, ROCK_SALT_TEXT[:300], 0),
    ("truncated", ROCK_SALT_TEXT, ROCK_SALT_TEXT[: ROCK_SALT_TEXT.index("Na Na0")], 32),
    ("too_few_fields", " 0.0000 0.5000 1.0\n\n", " 0.0000 0.5", 34),
    ("too_many_fields", "0.5000 1.0\n", "0.5000 0.5000 1.0\n", 34),
    ("too_few_fields", "0.5000 1.0\n\n", "0.5000 1.0\n\n_cell_length_a 5\n", 35),
    ("unexpected_line", "data_", "here you are: data_", 1),
    ("unexpected_line", "_cell_length_b 5.6402\n", "", 11),
    ("unexpected_line", "1 'x, y, z'", "1 '-x, -y, -z'", 24),
    ("missing_value", "_cell_volume 179.4252\n", "_cell_volume\n\n", 20),
    ("not_a_number", "_cell_length_a 5.6402", "_cell_length_a nan", 10),
    ("not_a_number", "_cell_length_a 5.6402", "_cell_length_a inf", 10),
    ("not_a_number", "_cell_length_a 5.6402", "_cell_length_a 5.64.02", 10),
    ("not_a_number", "_cell_length_a 5.6402", "_cell_length_a ٥.6402", 10),
    ("not_a_number", "_cell_length_a 5.6402", "_cell_length_a " + "9" * 5000, 10),
    ("not_a_number", "0.5000 1.0", "1e-05 1.0", 34),
    ("not_a_number", "0.5000 1.0", "0. 1.0", 34),
    ("not_a_count", "Na Na0 4 ", "Na Na0 0 ", 33),
    ("not_a_count", "Na Na0 4 ", "Na Na0 " + "4" * 5000 + " ", 33),
    ("not_a_count", "_symmetry_Int_Tables_number 225", "_symmetry_Int_Tables_number 225.0", 16),
    ("impossible_cell", "_cell_length_a 5.6402", "_cell_length_a -5.6402", 10),
    ("impossible_cell", "_cell_length_a 5.6402", "_cell_length_a 0.0000", 10),
    ("impossible_cell", "_cell_angle_gamma 90.0000", "_cell_angle_gamma 0.0000", 15),
    ("impossible_cell", "_cell_angle_gamma 90.0000", "_cell_angle_gamma 180.0000", 15),
    (
        "impossible_cell",
        "beta 90.0000\n_cell_angle_gamma 90.0000",
        "beta 30.0000\n_cell_angle_gamma 30.0000",
        15,
    ),
    ("bad_formula", "data_Na4Cl4", "data_NaCl", 1),
    ("bad_formula", "data_Na4Cl4", "data_Na2Na2Cl4", 1),
    ("unknown_element", "data_Na4Cl4", "data_Na4Xx4", 1),
    ("unknown_element", "Na Na0", "D D0", 33),
    ("unknown_element", "\nNa 0.93", "\nNo 0.93", 7),
    ("bad_label", "Na Na0", "Na Cl0", 33),
    ("unknown_spacegroup", "H-M Fm-3m", "H-M Fm3m", 9),
    ("spacegroup_disagrees", "_symmetry_Int_Tables_number 225", "_symmetry_Int_Tables_number 221", 16),
    ("formula_disagrees", "data_Na4Cl4", "data_Na4Cl8", 18),
    ("formula_disagrees", "Cl Cl1 4 0.0000 0.0000 0.5000 1.0\n", "", 0),
    ("coordinate_out_of_range", "0.5000 1.0", "7.5000 1.0", 34),
    ("partial_occupancy", "0.5000 1.0", "0.5000 0.5", 34),
    ("multiplicity", "0.0000 0.5000 1.0", "0.0000 0.4900 1.0", 34),
    ("multiplicity", "0.0000 0.5000 1.0", "0.2500 0.2500 1.0", 34),
]


@pytest.mark.parametrize(("reason", "old", "new", "line"), REFUSED)
def test_decode_refuses_with_a_reason_and_a_line(reason, old, new, line):
    assert old in ROCK_SALT_TEXT
    with pytest.raises(ParseError) as caught:
        decoded(ROCK_SALT_TEXT.replace(old, new, 1) if old else new)
    assert caught.value.reason == reason
    assert not line or caught.value.line == line


def test_all_reasons_are_documented():
    for reason, *_ in REFUSED:
        assert reason in decode_cif.__doc__


@settings(max_examples=200, deadline=None)
@given(
    start=st.integers(0, len(ROCK_SALT_TEXT)),
    n_removed=st.integers(0, 40),
    inserted=st.one_of(
        st.sampled_from([*vocabulary(), "\t", "\r\n", "#", '"', "é", "\x00"]), st.text(max_size=8)
    ),
)
def test_a_damaged_text_is_a_crystal_or_a_parse_error(start, n_removed, inserted):
    text = ROCK_SALT_TEXT[:start] + inserted + ROCK_SALT_TEXT[start + n_removed :]
    try:
        structure = decoded(text)
    except ParseError as refused:
        error = refused
    else:
        error = None
        assert np.isfinite(structure.volume)
        title = text.split("\n")[0].strip().removeprefix("data_")
        assert structure.composition.formula.replace(" ", "") == title
    assert error is None or 0 <= error.line <= text.count("\n") + 1
    assert error is None or error.reason in decode_cif.__doc__


# ---------------------------------------------------------------- grammar


def test_lark_accepts_texts_and_refuses_damaged_ones():
    lark = pytest.importorskip("lark", reason="lark is not installed")
    parser = lark.Lark(CifRepresentation().grammar().lark, parser="lalr")
    for name in CRYSTALS:
        parser.parse(encoded(CRYSTALS[name]()))
    by_form = {
        "not_a_number",
        "too_few_fields",
        "too_many_fields",
        "unexpected_line",
        "truncated",
        "bad_label",
    }
    for reason, old, new, _ in REFUSED:
        if reason not in by_form - {"bad_label"}:
            continue
        with pytest.raises(lark.exceptions.LarkError):
            parser.parse(ROCK_SALT_TEXT.replace(old, new, 1) if old else new)


def test_the_grammars_regex_accepts_golden_texts():
    regex = re.compile(CifRepresentation().grammar().regex)
    assert all(regex.fullmatch(cif_to_text(row["raw_cif"])) for row in golden())


# ---------------------------------------------------------------- on real crystals


@pytest.mark.real_data
@pytest.mark.slow
def test_writers_agree_on_materials_project():
    """100 primitive cells: identical texts are a matter of frames and noise, the crystals are equal."""
    if "CRYSTALLM_KIT_DATA" not in os.environ:
        pytest.skip("CRYSTALLM_KIT_DATA names no data folder")
    import pyarrow.parquet as pq

    rows = pq.read_table(Path(os.environ["CRYSTALLM_KIT_DATA"]) / "mp_val.parquet")["cif"].to_pylist()[:100]
    same, matches = dict.fromkeys(WRITERS, 0), 0
    for cif in rows:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            structure = Structure.from_str(cif, fmt="cif")
        texts = {writer: encoded(structure, writer=writer) for writer in WRITERS}
        for writer in WRITERS:
            same[writer] += texts[writer] == texts["pymatgen"]
        matches += StructureMatcher().fit(decoded(texts["moyo"]), decoded(texts["pymatgen"]))
    assert same["moyo"] >= 65
    assert same["spglib"] >= 85
    assert matches >= 99
