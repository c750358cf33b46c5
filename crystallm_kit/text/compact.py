"""Compact lines in the manner of Crystal-text-LLM (Gruver et al. 2024, arXiv:2402.04379).

Rock salt, NaCl (AFLOW AB_cF8_225_a_b), in its primitive cell, reads (no newline at the end):

    3.99 3.99 3.99
    60.0 60.0 60.0
    Na
    0.000 0.000 0.000
    Cl
    0.500 0.500 0.500

Line 1 holds the cell's lengths (angstrom), line 2 its angles (degree), then an element line and a line of
fractional coordinates for every site, in the order of the structure's sites.

Lossy: numbers are rounded to the decimals set; orientation, oxidation states and site properties are left
out. Angles are rounded, not cut: cutting moves 59.9999 to 59 (on 800 Materials Project cells at the published
decimals, the 95th percentile of the relative volume error is then 4.5 % instead of 2.9 %). Coordinates that
round to 1 are written 0.

The end of a crystal is the token "<eos>", which is no part of the text: whoever packs token ids appends it,
and a language model that brings a tokenizer of its own uses its own end token instead.

`decode` is strict: every number has exactly the decimals set, so that a text cut anywhere is refused. It does
not judge distances.

Not here: random translation (structures/augmentation.py); tolerance to bad output (text/parsing.py).
"""

import math
import re
from dataclasses import dataclass
from functools import cached_property

from pymatgen.core import Lattice, Structure

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

# Cell volume over the product of its lengths, below which a cell is flat: 0.001 is angles of (90, 90, 0.06).
_FLAT = 1e-3


@dataclass(frozen=True)
class CompactRepresentation:
    """Lengths, angles, then an element line and a coordinate line per site.

    Attributes:
        length_decimals: Decimals of the cell's lengths in angstrom.
        angle_decimals: Decimals of its angles in degrees.
        coordinate_decimals: Decimals of fractional coordinates.
    """

    length_decimals: int = 2
    angle_decimals: int = 1
    coordinate_decimals: int = 3

    name = "compact"

    def __post_init__(self) -> None:
        for setting, least in (("length_decimals", 0), ("angle_decimals", 0), ("coordinate_decimals", 1)):
            if not least <= getattr(self, setting) <= 9:
                raise UserError(f"compact: {setting} {getattr(self, setting)}; expected {least} to 9")

    @classmethod
    def crystal_text_llm(cls) -> "CompactRepresentation":
        """Return the decimals of the published system: 1 for lengths, whole degrees, 2 for coordinates.

        Texts differ from the published ones in two points: angles are rounded where those are cut, and a
        coordinate of 1.00 is written 0.00 (both are read).
        """
        return cls(length_decimals=1, angle_decimals=0, coordinate_decimals=2)

    def encode(self, crystal: Crystal) -> str:
        """Return the text of a crystal.

        Raises:
            EncodeError: If it is a molecule or disordered, or its cell cannot be written with these decimals.
        """
        structure = periodic_structure(crystal, self.name)
        symbols = site_symbols(crystal)
        lengths = " ".join(f"{x:.{self.length_decimals}f}" for x in structure.lattice.abc)
        angles = " ".join(f"{x:.{self.angle_decimals}f}" for x in structure.lattice.angles)
        try:
            self._cell(lengths, angles)
        except ParseError as error:
            raise EncodeError(f"crystal '{crystal.id}': its cell cannot be written: {error}") from error
        lines = [lengths, angles]
        scale = 10**self.coordinate_decimals
        for symbol, position in zip(symbols, structure.frac_coords, strict=True):
            wrapped = (round(x * scale) % scale / scale for x in position)
            lines += [symbol, " ".join(f"{x:.{self.coordinate_decimals}f}" for x in wrapped)]
        return "\n".join(lines)

    def decode(self, text: str) -> Crystal:
        """Return the crystal that a text describes.

        Raises:
            ParseError: With the line and one of: empty, lengths, angles, cell, no_sites, missing_coordinates,
                unknown_element, too_few_coordinates, coordinates.
        """
        if not text:
            raise ParseError("empty", "no text; expected a line of three lengths")
        lines = text.split("\n")
        lattice = self._cell(lines[0], lines[1] if len(lines) > 1 else "")
        if len(lines) < 4:
            raise ParseError("no_sites", "no site; expected an element line and a coordinate line", 3)
        symbols, positions = [], []
        for index in range(2, len(lines), 2):
            symbols.append(element_symbol(lines[index], lines[index], index + 1))
            if index + 1 == len(lines):
                raise ParseError("missing_coordinates", f"'{lines[index]}': no coordinate line", index + 1)
            positions.append(self._position(lines[index + 1], index + 2))
        return Crystal(id="", structure=Structure(lattice, symbols, positions))

    def alphabet(self) -> Alphabet:
        """Return pad, end, blank, newline, point, the ten digits and the element symbols."""
        return Alphabet(tokens=(PAD, END, " ", "\n", ".", *"0123456789", *ELEMENTS), end=END, pad=PAD)

    def grammar(self) -> Grammar:
        """Return the grammar: lengths from 0 to 999, angles from 1 to 179, coordinates below 1."""
        length, angle, coordinate = Rule("length"), Rule("angle"), Rule("coordinate")
        rules: dict[str, Expression] = {
            "root": sequence(
                Rule("lengths"),
                "\n",
                Rule("angles"),
                one_or_more(sequence("\n", Rule("element"), "\n", Rule("position"))),
            ),
            "lengths": sequence(length, " ", length, " ", length),
            "angles": sequence(angle, " ", angle, " ", angle),
            "position": sequence(coordinate, " ", coordinate, " ", coordinate),
            "length": number(self.length_decimals),
            "angle": self._angle,
            "coordinate": number(self.coordinate_decimals, integer="0"),
            "element": choice(*sorted(ELEMENTS, key=len, reverse=True)),
        }
        return grammar(rules)

    @property
    def _angle(self) -> Expression:
        two_digits = sequence(characters("1-9"), optional(characters("0-9")))
        three_digits = sequence("1", characters("0-7"), characters("0-9"))
        return number(self.angle_decimals, integer=choice(three_digits, two_digits))

    @cached_property
    def _patterns(self) -> dict[str, re.Pattern[str]]:
        last = "1." + "0" * self.coordinate_decimals
        coordinate = choice(number(self.coordinate_decimals, integer="0"), last)
        rules = {"lengths": number(self.length_decimals), "angles": self._angle, "coordinates": coordinate}
        return {name: re.compile(regex(rule)) for name, rule in rules.items()}

    def _cell(self, lengths_line: str, angles_line: str) -> Lattice:
        lengths = self._three("lengths", lengths_line, 1)
        angles = self._three("angles", angles_line, 2)
        if min(lengths) <= 0:
            raise ParseError("lengths", f"'{lengths_line}': expected lengths above 0", 1)
        a, b, c = (math.cos(math.radians(angle)) for angle in angles)
        if 1 - a * a - b * b - c * c + 2 * a * b * c < _FLAT**2:
            raise ParseError("cell", f"'{angles_line}': no cell has these angles, or it is flat", 2)
        return Lattice.from_parameters(*lengths, *angles)

    def _position(self, line: str, line_number: int) -> list[float]:
        # 1.00 is what the published layout writes for a coordinate that rounds up.
        return [x % 1 for x in self._three("coordinates", line, line_number)]

    def _three(self, kind: str, line: str, line_number: int) -> list[float]:
        words = line.split(" ")
        if kind == "coordinates" and len(words) < 3:
            raise ParseError(
                "too_few_coordinates", f"'{line}': {len(words)} numbers, 3 expected", line_number
            )
        if len(words) != 3:
            raise ParseError(kind, f"'{line}': {len(words)} items, 3 numbers expected", line_number)
        for word in words:
            if not self._patterns[kind].fullmatch(word):
                raise ParseError(kind, f"'{line}': '{word}' is none of the {kind} expected here", line_number)
        return [float(word) for word in words]
