"""CrystaLLM's text read strictly: each line as it must be, each site's atoms counted.

    decode_cif("data_Na4Cl4\\nloop_\\n...")  ->  Crystal("Na4Cl4", 8 atoms in the conventional cell)
    ParseError("multiplicity", "line 33: 'Na Na0 8 0.0000 0.0000 0.0000 1.0': 4 atoms by Fm-3m, 8 stated")

Traps: the text holds the identity operator and one atom per orbit, so that reading it as an ordinary CIF
gives a wrong crystal without a warning. The operators of the stated space group are put back here. Four
decimals leave the images of a special position (1/3, 2/3, z) up to 1.5e-4 apart; pymatgen's default
site_tolerance of 1e-4 then counts atoms twice in some trigonal and hexagonal crystals. Here such a position
is put exactly where it belongs.

Not here: cutting a completion at its end (parsing.py); whether the crystal makes sense (scores/validity.py).
"""

import math
import re
from collections import Counter
from typing import NoReturn

import numpy as np
from pymatgen.core import Lattice, Structure

from crystallm_kit.errors import ParseError
from crystallm_kit.records import Crystal
from crystallm_kit.text.cif_tables import (
    ATOM_SITE_KEYS,
    ATOM_TYPE_KEYS,
    CELL_KEYS,
    IDENTITY_LOOP,
    SPACEGROUP_KEY,
    Floats,
    atom_properties,
    spacegroup_numbers,
    spacegroup_operations,
)

# Fractional. Rounding moves images of a special position up to 1.5e-4 apart; over 1,039 crystals of 197 space
# groups nothing changes between 5e-4 and 1e-2, and two atoms as near as this are no crystal.
SAME_POSITION = 2e-3

_BLANKS = re.compile(r"[ \t\r]+")
_NUMBER = re.compile(r"-?[0-9]{1,6}(\.[0-9]{1,12})?")
_COUNT = re.compile(r"[0-9]{1,5}")
_AMOUNT = re.compile(r"([A-Z][a-z]?)([0-9]{1,5})")


class _Reader:
    """The lines of a text, one after the other, each as it must be."""

    def __init__(self, text: str) -> None:
        # str.split would take control characters and foreign blanks for blanks
        self.lines = [_BLANKS.sub(" ", line).strip(" ") for line in text.rstrip(" \t\r\n").split("\n")]
        self.at = 0  # 1-based number of the line read last

    def refuse(self, reason: str, why: str) -> NoReturn:
        """Raise ParseError for the line read last."""
        raise ParseError(reason, f"'{self.lines[self.at - 1][:80]}': {why}", self.at)

    def peek(self) -> str:
        """Return the next line, "" at the end."""
        return self.lines[self.at] if self.at < len(self.lines) else ""

    def next(self, expected: str) -> str:
        """Return the next line."""
        if self.at >= len(self.lines):
            raise ParseError("truncated", f"the text ends here; '{expected}' must follow", self.at)
        self.at += 1
        return self.lines[self.at - 1]

    def unexpected(self, expected: str) -> NoReturn:
        """Raise ParseError for a line that should begin otherwise: cut short, or another one."""
        is_cut = self.at == len(self.lines) and expected.startswith(self.lines[-1])
        self.refuse("truncated" if is_cut else "unexpected_line", f"expected '{expected}'")

    def literal(self, *expected: str) -> None:
        """Read lines that are always the same."""
        for line in expected:
            if self.next(line) != line:
                self.unexpected(line)

    def value(self, key: str) -> str:
        """Read "key value"; a long value may stand on a line of its own."""
        name, _, value = self.next(key).partition(" ")
        if name != key:
            self.unexpected(key)
        value = value or self.next(f"value of {key}")
        return value or self.refuse("missing_value", f"a value of {key} expected")

    def number(self, word: str) -> float:
        """Return a decimal number; no exponents, no NaN, no infinity."""
        if not _NUMBER.fullmatch(word):
            self.refuse("not_a_number", f"'{word[:20]}' is no decimal number")
        return float(word)

    def count(self, word: str) -> int:
        """Return a whole number above zero."""
        if not _COUNT.fullmatch(word) or int(word) == 0:
            self.refuse("not_a_count", f"'{word[:20]}' is no whole number above 0")
        return int(word)

    def element(self, word: str) -> str:
        """Return an element symbol of the vocabulary."""
        if word not in atom_properties():
            self.refuse("unknown_element", f"'{word[:20]}' is no element of CrystaLLM's vocabulary")
        return word

    def amounts(self, formula: str) -> dict[str, int]:
        """Return element -> count of "Na4Cl4"."""
        found = _AMOUNT.findall(formula)
        if not found or "".join(e + n for e, n in found) != formula:
            self.refuse("bad_formula", f"'{formula[:40]}' is no formula with all counts, as Na4Cl4")
        counts = {self.element(e): self.count(n) for e, n in found}
        return counts if len(counts) == len(found) else self.refuse("bad_formula", "an element occurs twice")

    def row(self, expected: str, n_columns: int) -> list[str]:
        """Return the columns of a loop's row."""
        columns = self.next(expected).split(" ")
        if len(columns) != n_columns:
            reason = "too_few_fields" if len(columns) < n_columns else "too_many_fields"
            self.refuse(reason, f"{len(columns)} columns, {n_columns} expected")
        return columns


def _read_atom_types(reader: _Reader) -> None:
    """Read the property loop, which places no atom; its fifth column, if any, holds oxidation numbers."""
    reader.literal("loop_", *(f"_atom_type_{key}" for key in ATOM_TYPE_KEYS))
    has_oxidation_numbers = reader.peek() == "_atom_type_oxidation_number"
    if has_oxidation_numbers:
        reader.next("_atom_type_oxidation_number")
    while True:
        symbol, *values = reader.row(
            "a row of the atom type loop", len(ATOM_TYPE_KEYS) + has_oxidation_numbers
        )
        reader.element(symbol.rstrip("0123456789+-") if has_oxidation_numbers else symbol)
        for value in values:
            reader.number(value)
        if reader.peek().startswith("_"):
            return


def _read_cell(reader: _Reader) -> list[float]:
    """Return lengths in angstrom and angles in degrees."""
    parameters: list[float] = []
    for key in CELL_KEYS:
        parameters.append(value := reader.number(reader.value(f"_cell_{key}")))
        if value <= 0 or (key.startswith("angle") and value >= 180):
            reader.refuse("impossible_cell", "lengths are above 0, angles between 0 and 180")
    a, b, c = (math.cos(math.radians(angle)) for angle in parameters[3:])
    if 1 - a * a - b * b - c * c + 2 * a * b * c < 1e-6:
        reader.refuse("impossible_cell", f"the angles {parameters[3:]} span no volume")
    return parameters


def _read_sites(reader: _Reader) -> tuple[list[str], list[int], Floats]:
    """Return elements (K), stated multiplicities (K) and positions (K, 3), up to the end of the text."""
    elements: list[str] = []
    multiplicities: list[int] = []
    positions: list[list[float]] = []
    while not elements or reader.at < len(reader.lines):
        symbol, label, multiplicity, *xyz, occupancy = reader.row(
            "a row of the atom site loop", len(ATOM_SITE_KEYS)
        )
        elements.append(element := reader.element(symbol))
        if not re.fullmatch(rf"{element}[0-9]{{1,5}}", label):
            reader.refuse("bad_label", f"label '{label[:20]}', expected {element} and a number")
        multiplicities.append(reader.count(multiplicity))
        positions.append([reader.number(x) for x in xyz])
        if not all(-1 <= x <= 1 for x in positions[-1]):
            reader.refuse("coordinate_out_of_range", "fractional coordinates lie between 0 and 1")
        if reader.number(occupancy) != 1:
            reader.refuse("partial_occupancy", f"occupancy {occupancy}, expected 1.0")
    return elements, multiplicities, np.array(positions)


def _orbit(position: Floats, rotations: Floats, translations: Floats) -> Floats | None:
    """Return all atoms (M, 3) of the orbit of a rounded position (3,), put exactly on its special position.

    None if the operations that leave it in place form no group: it is near two special positions at once.
    """
    shifts = rotations @ position + translations - position
    shifts -= np.rint(shifts)
    stays = np.abs(shifts).max(axis=1) < SAME_POSITION
    exact = position + shifts[stays].mean(axis=0)
    images = (rotations @ exact + translations) % 1.0
    # 0.37: coordinates are multiples of 1e-4 over a small number, which must not sit on the edge of a step
    steps = np.floor(images * 1e6 + 0.37).astype(np.int64) % 1_000_000
    _, first = np.unique((steps[:, 0] * 1_000_000 + steps[:, 1]) * 1_000_000 + steps[:, 2], return_index=True)
    if len(first) * stays.sum() != len(rotations):
        return None
    atoms: Floats = images[np.sort(first)]
    return np.where(atoms > 1 - 1e-9, 0.0, atoms)


def decode_cif(text: str) -> Crystal:
    """Return the crystal in its conventional cell; its id is the title (the cell's formula).

    The stated symmetry is applied and its bookkeeping checked: every site has its stated number of atoms,
    and all add up to the formula of title and sum. Read but not compared: the property loop, the structural
    formula, the volume and Z, none of which places an atom. Blank lines at the end may be missing.

    Raises:
        ParseError: With one of the reasons truncated, unexpected_line, missing_value, too_few_fields,
            too_many_fields, not_a_number, not_a_count, bad_formula, bad_label, unknown_element,
            unknown_spacegroup, spacegroup_disagrees, formula_disagrees, impossible_cell,
            coordinate_out_of_range, partial_occupancy, multiplicity.
    """
    reader = _Reader(text)
    title = reader.next("data_")
    if not title.startswith("data_"):
        reader.unexpected("data_")
    title = title.removeprefix("data_")
    counts = reader.amounts(title)
    _read_atom_types(reader)
    symbol = reader.value(SPACEGROUP_KEY)
    number = spacegroup_numbers().get(symbol)
    if number is None:
        reader.refuse("unknown_spacegroup", f"'{symbol[:20]}' is no symbol as spglib prints it")
    cell = _read_cell(reader)
    if reader.count(reader.value("_symmetry_Int_Tables_number")) != number:
        reader.refuse("spacegroup_disagrees", f"{symbol} is number {number}")
    reader.value("_chemical_formula_structural")
    formula_sum = re.sub(r"^'(.*)'$", r"\1", reader.value("_chemical_formula_sum"))
    if reader.amounts(formula_sum.replace(" ", "")) != counts:
        reader.refuse("formula_disagrees", f"the title says {title[:60]}")
    reader.number(reader.value("_cell_volume"))
    reader.count(reader.value("_cell_formula_units_Z"))
    reader.literal(*IDENTITY_LOOP, "loop_", *(f"_atom_site_{key}" for key in ATOM_SITE_KEYS))
    first_row = reader.at
    elements, multiplicities, positions = _read_sites(reader)

    stated: Counter[str] = Counter()
    for element, multiplicity in zip(elements, multiplicities, strict=True):
        stated[element] += multiplicity
    if dict(stated) != counts:
        got = "".join(f"{e}{n}" for e, n in stated.items())
        raise ParseError("formula_disagrees", f"the sites add up to {got[:60]}, the title says {title[:60]}")
    species: list[str] = []
    atoms: list[Floats] = []
    for i, (element, multiplicity) in enumerate(zip(elements, multiplicities, strict=True)):
        orbit = _orbit(positions[i], *spacegroup_operations(number))
        if orbit is None or len(orbit) != multiplicity:
            reader.at = first_row + 1 + i
            got = "no whole number of" if orbit is None else str(len(orbit))
            reader.refuse("multiplicity", f"{got} atoms by {symbol}, {multiplicity} stated")
        species += [element] * multiplicity
        atoms.append(orbit)
    return Crystal(title, Structure(Lattice.from_parameters(*cell), species, np.vstack(atoms)))
