"""Extended and plain xyz: frames of text <-> structures and molecules, sites in the order of the lines.

Contract: a frame with `Lattice` is a crystal, periodic in three directions unless `pbc` says otherwise; a
frame without is a molecule. Labels of the comment line (key=value) become properties.

    2
    Lattice="4 0 0 0 4 0 0 0 4" Properties=species:S:1:pos:R:3 pbc="T T T" energy=-6.8
    Cs 0.0 0.0 0.0
    Cl 2.0 2.0 2.0

Lengths in angstrom, positions Cartesian, cell vectors as rows a, b, c. Where readers differ, and silently
lose the cell, this one reads what is meant or says what is wrong:
    lattice="..." in any case of letters is the cell         two periodic directions of three: refused
    bare atomic numbers, Fortran's 1d-3, D and T: read       labels such as Fe1, X: refused
    nine comma-separated numbers as comment (jarvis): refused, since their order is not stated
    pbc="F F F": a molecule; its cell is dropped

Not here: the xyz text that models write (text/xyz.py). Source of the key names: the extended xyz
specification, https://github.com/libAtoms/extxyz.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TextIO

import numpy as np
from numpy.typing import NDArray
from pymatgen.core.lattice import Lattice
from pymatgen.core.structure import Molecule, Structure

from crystallm_kit.errors import ReadError
from crystallm_kit.records import PropertyValue
from crystallm_kit.structures.cif_reading import build_structure, element_symbol, symbol_of_number
from crystallm_kit.structures.properties import value_of_text

_PAIR = re.compile(r"""([A-Za-z_][\w.\-/]*)\s*=\s*(?:"([^"]*)"|'([^']*)'|\{([^}]*)\}|\[([^\]]*)\]|(\S+))""")
_COUNT = re.compile(r"\s*\d+\s*")
_NOT_LABELS = frozenset({"lattice", "pbc", "properties"})


@dataclass(frozen=True)
class Frame:
    """The lines of one frame, not yet understood; `fault` says why it cannot be."""

    comment: str
    rows: tuple[str, ...]
    fault: str = ""


def frames(lines: TextIO) -> Iterator[Frame]:
    """Yield the frames of an xyz text; after a short frame reading goes on at the next count line."""
    line = lines.readline()
    while line:
        if not line.strip():
            line = lines.readline()
            continue
        if not _COUNT.fullmatch(line):
            yield Frame("", (), f"a line with the number of atoms expected, got '{line.strip()[:60]}'")
            line = _next_count(lines)
            continue
        count, comment, rows = int(line), lines.readline().rstrip("\r\n"), list[str]()
        line = ""
        while len(rows) < count:
            line = lines.readline()
            if not line or _COUNT.fullmatch(line):
                break
            rows.append(line.rstrip("\r\n"))
        if len(rows) < count:
            yield Frame(comment, (), f"{len(rows)} atom lines, {count} expected")
            continue
        yield Frame(comment, tuple(rows))
        line = lines.readline()


def labels_of(frame: Frame) -> dict[str, PropertyValue]:
    """Return the key=value labels of a frame's comment that hold one value each (energy=-6.8 -> -6.8)."""
    found: dict[str, PropertyValue] = {}
    for key, text in _pairs(frame.comment):
        value = value_of_text({"T": "True", "F": "False"}.get(text, text))
        if key.lower() not in _NOT_LABELS and value is not None and not _is_list(text):
            found[key] = value
    return found


def structure_of(frame: Frame) -> Structure | Molecule:
    """Return the crystal or molecule of a frame.

    Raises:
        ReadError: If the frame is short, a line cannot be read, or only some directions are periodic.
    """
    if frame.fault:
        raise ReadError(frame.fault)
    keys = {key.lower(): text for key, text in _pairs(frame.comment)}
    symbols, positions = _sites(frame, keys.get("properties", ""))
    if "lattice" not in keys:
        if re.fullmatch(r"\s*[-+.\deE]+(\s*,\s*[-+.\deE]+){8}\s*", frame.comment):
            raise ReadError(
                'the comment is nine numbers; write the cell as Lattice="ax ay az bx by bz cx cy cz"'
            )
        return Molecule(symbols, positions)
    periodic = _periodic(keys.get("pbc", "T T T"))
    if not any(periodic):
        return Molecule(symbols, positions)
    if not all(periodic):
        raise ReadError(f'pbc="{keys["pbc"]}": crystals repeat in three directions, T T T expected')
    lattice = Lattice(_cell(keys["lattice"]))
    build_structure(lattice, symbols, np.zeros_like(positions))  # names a flat cell before it is inverted
    return build_structure(lattice, symbols, lattice.get_fractional_coords(positions))


def frame_text(structure: Structure | Molecule, labels: Mapping[str, PropertyValue]) -> str:
    """Return one frame: a crystal with its cell and pbc="T T T", a molecule without a cell."""
    parts = []
    if isinstance(structure, Structure):
        cell = " ".join(f"{x:.10g}" for x in structure.lattice.matrix.ravel())
        parts = [f'Lattice="{cell}"']
    parts.append("Properties=species:S:1:pos:R:3")
    parts += ['pbc="T T T"'] if isinstance(structure, Structure) else ['pbc="F F F"']
    parts += [f"{_key(name)}={_label(value)}" for name, value in labels.items()]
    rows = [
        f"{site.specie.symbol} {x:.10f} {y:.10f} {z:.10f}"
        for site, (x, y, z) in zip(structure, structure.cart_coords.tolist(), strict=True)
    ]
    return "\n".join([str(len(structure)), " ".join(parts), *rows]) + "\n"


def _next_count(lines: TextIO) -> str:
    return next((line for line in lines if _COUNT.fullmatch(line)), "")


def _pairs(comment: str) -> list[tuple[str, str]]:
    return [
        (match[1], next((g for g in match.groups()[1:] if g is not None), ""))
        for match in _PAIR.finditer(comment)
    ]


def _is_list(text: str) -> bool:
    """Return whether a label holds several numbers (stress, dipole), which one property cannot."""
    words = text.replace(",", " ").split()
    return len(words) > 1 and all(isinstance(value_of_text(word), float | int) for word in words)


def _sites(frame: Frame, properties: str) -> tuple[list[str], NDArray[np.float64]]:
    """Return element symbols and Cartesian positions (n, 3) in angstrom."""
    if not frame.rows:
        raise ReadError("0 atoms")
    species_at, position_at, width = _columns(properties)
    symbols, positions = [], []
    for number, row in enumerate(frame.rows, start=1):
        words = row.split()
        if len(words) < width:
            raise ReadError(
                f"atom line {number} '{row.strip()[:80]}': {len(words)} columns, {width} expected"
            )
        try:
            symbols.append(_symbol(words[species_at]))
            positions.append([_number(word) for word in words[position_at : position_at + 3]])
        except ReadError as error:
            raise ReadError(f"atom line {number} '{row.strip()[:80]}': {error}") from error
    return symbols, np.array(positions, dtype=np.float64)


def _columns(properties: str) -> tuple[int, int, int]:
    """Return where the species and the positions stand, and how many columns a row has."""
    if not properties:
        return 0, 1, 4
    fields = properties.split(":")
    at, starts = 0, dict[str, int]()
    try:
        for name, _, count in zip(fields[0::3], fields[1::3], fields[2::3], strict=True):
            starts[name.lower()] = at
            at += int(count)
    except ValueError as error:
        raise ReadError(f"Properties={properties}: name:type:columns triples expected") from error
    species = next((starts[name] for name in ("species", "z", "symbol", "element") if name in starts), None)
    position = next((starts[name] for name in ("pos", "positions") if name in starts), None)
    if species is None or position is None:
        raise ReadError(f"Properties={properties}: species (or Z) and pos expected")
    return species, position, at


def _symbol(word: str) -> str:
    if word.isdigit():
        return symbol_of_number(int(word))
    return element_symbol(word)


def _number(word: str) -> float:
    try:
        return float(word.lower().replace("d", "e"))
    except ValueError as error:
        raise ReadError(f"'{word}' is no number") from error


def _periodic(text: str) -> list[bool]:
    words = text.replace(",", " ").split()
    meaning = {"t": True, "true": True, "1": True, "f": False, "false": False, "0": False}
    if len(words) != 3 or not all(word.lower() in meaning for word in words):
        raise ReadError(f'pbc="{text}": three of T and F expected')
    return [meaning[word.lower()] for word in words]


def _cell(text: str) -> list[list[float]]:
    numbers = [_number(word) for word in text.replace(",", " ").split()]
    if len(numbers) != 9:
        raise ReadError(f'Lattice="{text}": {len(numbers)} numbers, 9 expected (rows a, b, c)')
    return [numbers[0:3], numbers[3:6], numbers[6:9]]


def _key(name: str) -> str:
    return re.sub(r"[^\w.\-/]", "_", name)


def _label(value: PropertyValue) -> str:
    if isinstance(value, bool):
        return "T" if value else "F"
    if isinstance(value, str):
        return '"' + value.replace('"', "'").replace("\n", " ") + '"'
    return repr(value)
