"""The symmetrised CIF of CrystaLLM v1 (Antunes, Butler, Grau-Crespo 2024, doi:10.1038/s41467-024-54639-7).

Rock salt, NaCl (AFLOW AB_cF8_225_a_b), a = 5.6402 angstrom, reads (258 tokens, two newlines at the end):

    data_Na4Cl4
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

Contract
    cif_to_text   a CIF as pymatgen's CifWriter(symprec=0.1) prints it -> this text, by steps on the text
                  alone: byte for byte CrystaLLM's own.
    encode        a crystal -> this text. writer="moyo" is fast. "spglib" has origin and axes as CifWriter
                  has them, without the cost of pymatgen's objects. "pymatgen" is CifWriter itself, for those
                  who need the very distribution that CrystaLLM was trained on. What they share, and what
                  the symmetry leaves open: cif_standard_cell.py.
    decode        this text -> the crystal in its conventional cell. Strict: anything else is a ParseError.
Loss: lengths to 1e-4 angstrom, coordinates to 1e-4 of the cell, and symmetrisation within symprec.

Texts that are the same to the last character as CifWriter's, of 1,000 crystals of Materials Project given in
their primitive cells, and why the others differ (tests/text/test_cif.py measures a part of it):
                                                        moyo      spglib
    identical                                           77.1 %    92.4 %
    other origin or axes; printed atom (noise)          18.1 %     4.6 %   all of spglib's by noise
    "-0.0000" or "1.0000" there, "0.0000" here           2.2 %     2.5 %
    last digits of coordinates or lengths                1.9 %       -
    order of sites whose coordinates are equal           0.4 %     0.5 %
    another space group                                  0.3 %       -
Given conventional cells, moyo's and spglib's texts are the same for 93 to 99 % (400 each of four data
sets). moyo is about 17 times and spglib 5 times as fast as CifWriter.

Pitfalls
    - The text must not be read as an ordinary CIF: see cif_decoding.py.
    - He, Ne and Ar print an (Allen) electronegativity but sort as elements without one: last.
    - Occupancy reads 1.0 as in files that were parsed from CIF (all of CrystaLLM's known texts), and 1 where
      a structure was built in memory. Both are read, 1.0 is written.
    - A space group symbol becomes one token only if a newline follows it directly, so a prompt that ends in
      the symbol is cut into letters, most of which are unknown.
    - Characters outside the vocabulary vanish or become <unk>: no letters but element symbols and x, y, z.
    - A sample ends at two newlines that the model wrote; no token means the end. Stop at the text "\\n\\n".
    - Grammars that walk characters dead-end on this vocabulary: see cif_grammar.py.

Not here: CrystaLLM-pi's dialect (cif_pi.py), cutting a completion at its end (parsing.py), prompts
(prompts.py), building the tokenizer (tokens/tokenizer.py), space groups of other formats
(structures/symmetry.py).
"""

import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Literal

from pymatgen.core import Composition, Structure

from crystallm_kit.errors import EncodeError, UnknownName, UserError
from crystallm_kit.records import Crystal
from crystallm_kit.text.cif_decoding import decode_cif
from crystallm_kit.text.cif_grammar import cif_grammar
from crystallm_kit.text.cif_pi import decode_pi, pi_alphabet, text_to_pi
from crystallm_kit.text.cif_standard_cell import (
    StandardCell,
    ordered_cell,
    quietly,
    standard_cell_by_moyo,
    standard_cell_by_spglib,
)
from crystallm_kit.text.cif_tables import (
    ATOM_SITE_KEYS,
    ATOM_TYPE_KEYS,
    CELL_KEYS,
    IDENTITY_LOOP,
    SPACEGROUP_KEY,
    atom_properties,
    by_electronegativity,
    check_elements,
    check_spacegroup,
    electronegativity_rank,
    spacegroup_symbols,
    vocabulary,
)
from crystallm_kit.text.representation import Alphabet, Grammar

__all__ = [
    "SPACEGROUP_KEY",
    "CifRepresentation",
    "atom_properties",
    "by_electronegativity",
    "check_elements",
    "check_spacegroup",
    "cif_to_text",
    "preprocessed_cif",
    "spacegroup_symbols",
    "vocabulary",
]

SYMPREC_ANGSTROM = 0.1  # CrystaLLM's; part of the format, since the text depends on it
WRITERS = ("moyo", "spglib", "pymatgen")
DIALECTS = ("v1", "pi")

# pymatgen puts a value that would make its line longer on a line of its own (CifBlock.max_len)
LONGEST_LINE = 70


@dataclass(frozen=True)
class CifRepresentation:
    """CrystaLLM v1's text.

    Attributes:
        writer: "moyo" (fast), "spglib" or "pymatgen" (CrystaLLM's own to the last character); see the module.
        symprec_angstrom: Distance within which atoms count as symmetric.
        dialect: "v1", or "pi": CrystaLLM-pi's, with brackets, see cif_pi.py.
    """

    writer: Literal["moyo", "spglib", "pymatgen"] = "moyo"
    symprec_angstrom: float = SYMPREC_ANGSTROM
    dialect: Literal["v1", "pi"] = "v1"
    name = "cif"

    def __post_init__(self) -> None:
        if self.writer not in WRITERS:
            raise UnknownName.among("writer of format 'cif'", str(self.writer), WRITERS)
        if self.dialect not in DIALECTS:
            raise UnknownName.among("dialect of format 'cif'", str(self.dialect), DIALECTS)

    def encode(self, crystal: Crystal) -> str:
        """Return the text of a crystal, blanks collapsed; v1's ends in two newlines.

        Raises:
            EncodeError: For a molecule, partial occupancies, an element or space group without a token, or
                where no space group is found.
        """
        if self.writer == "pymatgen":
            text = _text_by_pymatgen(crystal, self.symprec_angstrom)
        else:
            find = standard_cell_by_moyo if self.writer == "moyo" else standard_cell_by_spglib
            text = _text_of_cell(find(crystal, self.symprec_angstrom))
        return text_to_pi(text) if self.dialect == "pi" else text

    def decode(self, text: str) -> Crystal:
        """Return the crystal in its conventional cell. Raises ParseError; see `cif_decoding.decode_cif`."""
        return decode_pi(text) if self.dialect == "pi" else decode_cif(text)

    def alphabet(self) -> Alphabet:
        """Return CrystaLLM's 371 tokens with their ids; no token ends a sample, the text `stop` does.

        CrystaLLM-pi has the same and six more, of which one is the end.
        """
        return pi_alphabet() if self.dialect == "pi" else _alphabet()

    def grammar(self) -> Grammar:
        """Return the grammar of v1's well-formed texts. Raises UserError for CrystaLLM-pi's: none is kept."""
        if self.dialect == "pi":
            raise UserError("format 'cif': only dialect 'v1' has a grammar; sample CrystaLLM-pi freely.")
        return cif_grammar()


def _number_to_four_decimals(match: re.Match[str]) -> str:
    return f"{float(match[0]):.4f}" if len(match[1]) > 4 else match[0]


def preprocessed_cif(raw_cif: str) -> str:
    """Return a CifWriter text after CrystaLLM's steps on entries: title, symmetry, properties, rounding.

    Comments, indents and the blanks between columns are still there; `cif_to_text` takes them out.

    Args:
        raw_cif: What `str(CifWriter(structure, symprec=0.1))` gives.

    Raises:
        EncodeError: For zero formula units, no formula sum, an element or space group without a token.
    """
    units = re.search(r"_cell_formula_units_Z\s+(\d+)", raw_cif)
    if units and int(units[1]) == 0:
        raise EncodeError("format 'cif': _cell_formula_units_Z is 0; CrystaLLM drops such entries.")
    formula = re.search(r"^_chemical_formula_sum\s+'?([A-Za-z0-9. ]+?)'?\s*$", raw_cif, re.MULTILINE)
    symmetry = re.search(rf"^{SPACEGROUP_KEY}\s+(\S.*?)\s*$", raw_cif, re.MULTILINE)
    if not formula or not symmetry:
        missing = "_chemical_formula_sum" if not formula else SPACEGROUP_KEY
        raise EncodeError(
            f"format 'cif': no '{missing} ...' that fits in a line; expected what pymatgen's "
            "CifWriter(symprec=0.1) writes. Read the file as a structure and use encode."
        )
    elements = re.findall(r"[A-Z][a-z]?", formula[1])
    check_elements(elements)
    check_spacegroup(symmetry[1])
    text = re.sub(r"(?<=^data_).*$", formula[1].replace(" ", ""), raw_cif, count=1, flags=re.MULTILINE)
    text = re.sub(
        r"(_symmetry_equiv_pos_as_xyz\n)(?:[ \t]*\d+[ \t]+'[^'\n]*'\n)+",
        r"\g<1>  1  'x, y, z'\n",
        text,
        count=1,
    )
    rows = "".join(f"  {e}  {'  '.join(atom_properties()[e])}\n" for e in by_electronegativity(elements))
    loop = "loop_\n" + "".join(f" _atom_type_{key}\n" for key in ATOM_TYPE_KEYS) + rows
    start = text.index(SPACEGROUP_KEY)
    return re.sub(r"[-+]?\d*\.(\d+)", _number_to_four_decimals, text[:start] + loop + text[start:])


def cif_to_text(raw_cif: str, *, collapse_blanks: bool = True) -> str:
    """Return CrystaLLM's text of a CIF as pymatgen writes it: all steps, on the text alone.

    Args:
        raw_cif: What `str(CifWriter(structure, symprec=0.1))` gives.
        collapse_blanks: False leaves columns apart by two or three blanks, as in CrystaLLM's files; its
            tokenizer collapses them, so the tokens are the same.

    Raises:
        EncodeError: As `preprocessed_cif`.
    """
    lines = (line.strip() for line in preprocessed_cif(raw_cif).split("\n"))
    kept = [line for line in lines if line and not line.startswith("#") and "pymatgen" not in line]
    text = "\n".join(kept) + "\n\n"
    return re.sub(r"[ \t]+", " ", text) if collapse_blanks else text


def _decimal(value: float) -> str:
    # twice rounded, as the file with 8 decimals that CrystaLLM rounds
    return f"{float(f'{value:.8f}'):.4f}"


def _text_of_cell(cell: StandardCell) -> str:
    """Return the text of a conventional cell, blanks collapsed."""
    symbol = spacegroup_symbols()[cell.number]
    check_spacegroup(symbol)
    counts: Counter[str] = Counter()
    for site in cell.sites:
        counts[site.element] += site.multiplicity
    elements = by_electronegativity(counts)
    amounts = [f"{e}{counts[e]}" for e in elements]
    with quietly():
        reduced, units = Composition(counts).get_reduced_formula_and_factor()
    rank = electronegativity_rank()
    sites = sorted(
        cell.sites, key=lambda s: (rank[s.element][0], -s.multiplicity, *(round(x, 6) for x in s.position))
    )
    formula_sum = " ".join(amounts) if len(amounts) == 1 else f"'{' '.join(amounts)}'"
    gap = " " if len("_chemical_formula_sum") + len(formula_sum) + 3 < LONGEST_LINE else "\n"
    lines = [
        f"data_{''.join(amounts)}",
        "loop_",
        *(f"_atom_type_{key}" for key in ATOM_TYPE_KEYS),
        *(f"{e} {' '.join(atom_properties()[e])}" for e in elements),
        f"{SPACEGROUP_KEY} {symbol}",
        *(f"_cell_{key} {_decimal(v)}" for key, v in zip(CELL_KEYS, cell.lengths_and_angles, strict=True)),
        f"_symmetry_Int_Tables_number {cell.number}",
        f"_chemical_formula_structural {reduced}",
        f"_chemical_formula_sum{gap}{formula_sum}",
        f"_cell_volume {_decimal(cell.volume)}",
        f"_cell_formula_units_Z {int(units)}",
        *IDENTITY_LOOP,
        "loop_",
        *(f"_atom_site_{key}" for key in ATOM_SITE_KEYS),
        *(
            f"{s.element} {s.element}{i} {s.multiplicity} {' '.join(_decimal(x) for x in s.position)} 1.0"
            for i, s in enumerate(sites)
        ),
    ]
    return "\n".join(lines) + "\n\n"


def _text_by_pymatgen(crystal: Crystal, symprec_angstrom: float) -> str:
    """Return the text by way of CifWriter."""
    from pymatgen.io.cif import CifWriter
    from pymatgen.symmetry.analyzer import SymmetryUndeterminedError

    lattice, positions, elements = ordered_cell(crystal)
    structure = Structure(lattice, elements, positions)
    try:
        with quietly():
            raw_cif = str(CifWriter(structure, symprec=symprec_angstrom))
    except (SymmetryUndeterminedError, ValueError, TypeError) as error:
        raise EncodeError(
            f"{crystal.id}: no space group within {symprec_angstrom} angstrom: {error}"
        ) from error
    # occupancy prints as 1 for a structure built in memory
    return re.sub(r"(?<=\.[0-9]{4} )1\n", "1.0\n", cif_to_text(raw_cif))


@cache
def _alphabet() -> Alphabet:
    # Pm is an element and a space group: only the space group keeps its suffix as a key
    spacegroups = [t.removesuffix("_sg") for t in vocabulary() if t.endswith("_sg") and t != "Pm_sg"]
    others = [t for t in vocabulary() if not t.endswith("_sg")] + ["Pm_sg"]
    here = rf"(?<={SPACEGROUP_KEY} )"
    symbol = "|".join(sorted(map(re.escape, spacegroups), key=len, reverse=True))
    string = "|".join(sorted(map(re.escape, others), key=len, reverse=True))
    return Alphabet(
        tokens=tuple(t if t == "Pm_sg" else t.removesuffix("_sg") for t in vocabulary()),
        pattern=rf"{here}(?:{symbol})(?=\n)|{string}|\w+|[.,;!?]",
        rewrites=((r"[ \t]+", " "), (rf"{here}Pm(?=\n)", "Pm_sg")),
        decoder_rewrites=(("Pm_sg", "Pm"),),
        unknown="<unk>",
        stop="\n\n",
    )
