"""Extended XYZ for crystals, plain XYZ for molecules; Cartesian coordinates in angstrom.

Rock salt, NaCl (AFLOW AB_cF8_225_a_b), in its primitive cell, reads (no newline at the end):

    2
    Lattice="3.988 0.000 0.000 1.994 3.454 0.000 1.994 1.151 3.256" Properties=species:S:1:pos:R:3 pbc=...
    Na 0.000 0.000 0.000
    Cl 3.988 2.303 1.628

(the second line ends in pbc="T T T"). Line 1 is the number of sites. The lattice holds the rows a, b, c. By
default the cell is turned into the standard orientation (a along x, b in the xy plane, right-handed), so that
equal cells give equal text; sites are moved into the cell and keep their order. A molecule has an empty
second line and keeps its orientation and place.

Lossy: numbers are rounded to the decimals set; a crystal's orientation, charges, oxidation states and site
properties are left out.

The end is the token "<eos>", which is no part of the text: whoever packs token ids appends it.

`decode` is strict: this layout and these decimals only, so that a text cut anywhere is refused. It does not
judge distances. Files of other programs, with other columns and labels, are read by structures/files.py.

Not here: random rotation (structures/augmentation.py; `standard_orientation=False` keeps it); tolerance to
bad output (text/parsing.py). Layout: https://github.com/libAtoms/extxyz.
"""

import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from pymatgen.core import Lattice, Molecule, Structure

from crystallm_kit.errors import EncodeError, ParseError, UserError
from crystallm_kit.records import Crystal
from crystallm_kit.structures.elements import ELEMENTS
from crystallm_kit.text.grammar import (
    Expression,
    Rule,
    characters,
    choice,
    grammar,
    number,
    one_or_more,
    optional,
    regex,
    sequence,
)
from crystallm_kit.text.representation import Alphabet, Grammar
from crystallm_kit.text.sites import element_symbol, periodic_structure, site_symbols

END = "<eos>"
PAD = "<pad>"
CELL_OPENS = 'Lattice="'
CELL_CLOSES = '" Properties=species:S:1:pos:R:3 pbc="T T T"'

# Cell volume over the product of its lengths, below which a cell counts as flat.
_FLAT = 1e-3
# A coordinate this little below 1 is 0, written as such instead of on the far side of the cell.
_WRAP = 1e-6


@dataclass(frozen=True)
class XyzRepresentation:
    """A count, a line with the cell or nothing, then a line per site.

    Attributes:
        decimals: Decimals of every number, in angstrom.
        standard_orientation: Turn crystals into the standard orientation; False keeps it as stored.
    """

    decimals: int = 3
    standard_orientation: bool = True

    name = "xyz"

    def __post_init__(self) -> None:
        if not 1 <= self.decimals <= 9:
            raise UserError(f"xyz: decimals {self.decimals}; expected 1 to 9")

    def encode(self, crystal: Crystal) -> str:
        """Return the text of a crystal or molecule.

        Raises:
            EncodeError: If it is disordered, or a number has more than three digits before the point.
        """
        symbols = site_symbols(crystal)
        if isinstance(crystal.structure, Molecule):
            comment, positions = "", np.asarray(crystal.structure.cart_coords, dtype=float)
        else:
            rows, positions = self._placed(periodic_structure(crystal, self.name))
            comment = CELL_OPENS + " ".join(self._text(x, crystal.id) for x in rows.flatten()) + CELL_CLOSES
        lines = [
            f"{symbol} {' '.join(self._text(x, crystal.id) for x in position)}"
            for symbol, position in zip(symbols, positions, strict=True)
        ]
        text = "\n".join([str(len(symbols)), comment, *lines])
        if comment:
            try:
                self._cell(comment)
            except ParseError as error:
                raise EncodeError(f"crystal '{crystal.id}': its cell cannot be written: {error}") from error
        return text

    def decode(self, text: str) -> Crystal:
        """Return the crystal, or molecule, that a text describes; without site properties.

        Raises:
            ParseError: With the line and one of: empty, count, comment, cell, too_few_sites, too_many_sites,
                unknown_element, too_few_coordinates, coordinates.
        """
        if not text:
            raise ParseError("empty", "no text; expected the number of sites")
        lines = text.split("\n")
        if not re.fullmatch(r"[1-9][0-9]{0,4}", lines[0]):
            raise ParseError("count", f"'{lines[0]}': expected the number of sites", 1)
        if len(lines) < 2:
            raise ParseError("comment", "no second line; expected Lattice=... or an empty line", 2)
        lattice = self._cell(lines[1]) if lines[1] else None
        expected, got = int(lines[0]), len(lines) - 2
        if got != expected:
            reason = "too_few_sites" if got < expected else "too_many_sites"
            raise ParseError(reason, f"{got} site lines, {expected} expected", len(lines))
        symbols, positions = [], []
        for index in range(2, len(lines)):
            symbol, position = self._site(lines[index], index + 1)
            symbols.append(symbol)
            positions.append(position)
        if lattice is None:
            return Crystal(id="", structure=_molecule(symbols, positions))
        structure = Structure(lattice, symbols, positions, coords_are_cartesian=True, to_unit_cell=True)
        return Crystal(id="", structure=structure)

    def alphabet(self) -> Alphabet:
        """Return pad, end, blank, newline, point, minus, digits, elements and the two parts of line 2."""
        plain = (PAD, END, " ", "\n", ".", "-", *"0123456789", *ELEMENTS)
        return Alphabet(tokens=(*plain, CELL_OPENS, CELL_CLOSES), end=END, pad=PAD)

    def grammar(self) -> Grammar:
        """Return the grammar. It cannot tie the count to the number of site lines; `decode` does."""
        digit = characters("0-9")
        zero: Expression = "0." + "0" * self.decimals
        x: Expression = Rule("number")
        nine = [x, zero, zero, x, x, zero, x, x, x] if self.standard_orientation else [x] * 9
        cell = [part for entry in nine for part in (entry, " ")][:-1]
        rules: dict[str, Expression] = {
            "root": sequence(
                Rule("count"), "\n", optional(Rule("cell")), one_or_more(sequence("\n", Rule("site")))
            ),
            "count": sequence(characters("1-9"), *[optional(digit)] * 4),
            "cell": sequence(CELL_OPENS, *cell, CELL_CLOSES),
            "site": sequence(Rule("element"), " ", x, " ", x, " ", x),
            "number": number(self.decimals, signed=True),
            "element": choice(*sorted(ELEMENTS, key=len, reverse=True)),
        }
        return grammar(rules)

    @cached_property
    def _number(self) -> re.Pattern[str]:
        return re.compile(regex(number(self.decimals, signed=True)))

    def _placed(self, structure: Structure) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the cell's rows, (3, 3), and the sites' positions, (N, 3), in angstrom."""
        lattice = structure.lattice
        fractions = np.asarray(structure.frac_coords, dtype=float)
        fractions = fractions - np.floor(fractions + _WRAP)
        if self.standard_orientation:
            lattice = Lattice.from_parameters(*lattice.parameters, vesta=True)
        rows = np.asarray(lattice.matrix, dtype=float)
        return rows, fractions @ rows

    def _text(self, value: float, name: str) -> str:
        text = f"{value:.{self.decimals}f}"
        if float(text) == 0:
            text = text.lstrip("-")
        if not self._number.fullmatch(text):
            raise EncodeError(f"crystal '{name}': {text} angstrom; expected less than 1000")
        return text

    def _cell(self, line: str) -> Lattice:
        if not (line.startswith(CELL_OPENS) and line.endswith(CELL_CLOSES)):
            raise ParseError("comment", f"'{line}': expected {CELL_OPENS}...{CELL_CLOSES} or nothing", 2)
        words = line[len(CELL_OPENS) : -len(CELL_CLOSES)].split(" ")
        if len(words) != 9 or not all(self._number.fullmatch(word) for word in words):
            raise ParseError("cell", f"'{line}': expected nine numbers of {self.decimals} decimals", 2)
        rows = np.array([float(word) for word in words]).reshape(3, 3)
        product = float(np.prod(np.linalg.norm(rows, axis=1)))
        if product == 0 or np.linalg.det(rows) < _FLAT * product:
            raise ParseError("cell", f"'{line}': the cell is flat or left-handed", 2)
        return Lattice(rows)

    def _site(self, line: str, line_number: int) -> tuple[str, list[float]]:
        word, *words = line.split(" ")
        symbol = element_symbol(word, line, line_number)
        if len(words) < 3:
            raise ParseError(
                "too_few_coordinates", f"'{line}': {len(words)} numbers, 3 expected", line_number
            )
        if len(words) > 3 or not all(self._number.fullmatch(word) for word in words):
            raise ParseError(
                "coordinates", f"'{line}': expected three numbers of {self.decimals} decimals", line_number
            )
        return symbol, [float(word) for word in words]


def _molecule(symbols: list[str], positions: list[list[float]]) -> Molecule:
    # An odd number of electrons is no fault of the text.
    return Molecule(symbols, positions, charge_spin_check=False)
