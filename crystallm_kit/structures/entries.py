"""One entry of a file, not yet parsed: what it is, where it stands, and what is known of it.

    Entry(file="wbm.csv", entry="row 3", id="wbm.csv:3", kind="cif", content="data_NaCl", properties={...})

Contract: making an Entry never parses a structure; `parse` does, in this process, and always ends. CIFs
that its reader does not know are left to the caller (`None`), who has processes that can be killed.

Not here: walking files (files.py, tables.py, archives.py, tensors.py).
"""

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from pymatgen.core.lattice import Lattice
from pymatgen.core.structure import Molecule, Structure

from crystallm_kit.errors import DisorderedStructure, ReadError
from crystallm_kit.records import Crystal, PropertyValue
from crystallm_kit.structures import extended_xyz
from crystallm_kit.structures.cif_reading import (
    build_structure,
    element_symbol,
    lattice_from_parameters,
    structure_from_plain_cif,
    symbol_of_number,
)
from crystallm_kit.structures.properties import named_properties, plain_value, take_id

Kind = Literal["cif", "poscar", "pymatgen", "frame", "cell", "fault"]
STRUCTURE_COLUMNS = ("cif", "cif_str", "cif_string", "structure")


@dataclass(frozen=True)
class ReadFailure:
    """An entry that could not be read, and why.

    Attributes:
        file: The file's path as given, or below the folder given.
        entry: Row, frame, member or key inside it; "" where the file is one entry.
        reason: For a person.
    """

    file: str
    entry: str
    reason: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.file, self.entry, self.reason) if part)


@dataclass(frozen=True)
class Entry:
    """One structure's source.

    Attributes:
        file, entry: As in ReadFailure.
        id: Of the crystal that it becomes.
        kind: How `content` reads; "fault": it is the reason why it cannot.
        content: A text (cif, poscar, fault), a dict (pymatgen), a Frame (frame), or parameters (angstrom,
            degrees), atomic numbers, fractional coordinates as arrays (cell).
        properties: Under the kit's names where it knows them.
    """

    file: str
    entry: str
    id: str
    kind: Kind
    content: Any
    properties: Mapping[str, PropertyValue] = field(default_factory=dict)

    def failure(self, reason: object) -> ReadFailure:
        """Return the report of this entry's failure."""
        return ReadFailure(self.file, self.entry, str(reason))


def entry_of_row(columns: Mapping[str, Any], *, file: str, entry: str, default_id: str) -> Entry:
    """Return the entry of a table's row or a JSON record: a structure column beside ids and properties."""
    rest = dict(columns)
    present = [name for name in rest if name.lower() in STRUCTURE_COLUMNS]
    values = {name.lower(): rest.pop(name) for name in present}
    content = next((values[name] for name in STRUCTURE_COLUMNS if not _is_missing(values.get(name))), None)
    identity = take_id(rest, default_id)
    properties = named_properties(rest)
    if content is None:
        return Entry(file, entry, identity, "fault", "no structure in this row", properties)
    if isinstance(content, str) and content.lstrip().startswith(("{", '"{')):
        try:
            content = json.loads(content)
        except ValueError as error:
            return Entry(file, entry, identity, "fault", f"the structure is no JSON: {error}", properties)
    kind: Kind = "pymatgen" if isinstance(content, Mapping) else "cif"
    if not isinstance(content, str | Mapping):
        reason = f"the structure is a {type(content).__name__}; CIF text or a pymatgen dict expected"
        return Entry(file, entry, identity, "fault", reason, properties)
    return Entry(file, entry, identity, kind, content, properties)


def parse(entry: Entry) -> Structure | Molecule | None:
    """Return the structure of an entry, or None for a CIF that only pymatgen's parser may know.

    Raises:
        ReadError: If it is none.
    """
    if entry.kind == "fault":
        raise ReadError(entry.content)
    return _PARSERS[entry.kind](entry.content)


def crystal_of(entry: Entry, structure: Structure | Molecule, *, allow_disordered: bool) -> Crystal:
    """Return the crystal of a parsed entry.

    Raises:
        DisorderedStructure: If a site is shared or partly empty, unless allowed.
    """
    if not allow_disordered and not structure.is_ordered:
        site = next(site for site in structure if not site.is_ordered)
        raise DisorderedStructure(
            f"'{entry.id}' is disordered (a site holds {site.species_string}); "
            "pass allow_disordered=True to keep such structures"
        )
    return Crystal(entry.id, structure, entry.properties)


def _is_missing(value: Any) -> bool:
    return plain_value(value) is None if isinstance(value, str | float) else value is None


def _cif(text: str) -> Structure | None:
    if "_cell_length_a" not in text:
        raise ReadError(f"no CIF: it has no _cell_length_a; it begins '{text.strip()[:40]}'")
    return structure_from_plain_cif(text)


def _poscar(text: str) -> Structure | Molecule:
    from pymatgen.io.vasp.inputs import Poscar

    lines = text.splitlines()
    counts = [int(word) for line in lines[5:7] for word in line.split() if word.isdigit()]
    if sum(counts) > len(lines):  # checked first: pymatgen makes a list of that many symbols
        raise ReadError(f"no POSCAR: {len(lines)} lines for {sum(counts)} atoms")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            structure = Poscar.from_str(text, read_velocities=False).structure
        except Exception as error:  # malformed text raises whatever its words happen to hit
            raise ReadError(f"no POSCAR: {' '.join(str(error).split())[:300]}") from error
    if len(lines) > 5 and all(word.isdigit() for word in lines[5].split()):
        # VASP 4 has no line of symbols; pymatgen then takes the comment's words, or counts elements from H
        symbols = {site.specie.symbol for site in structure}
        if not symbols <= set(lines[0].split()):
            raise ReadError("no line of element symbols above the counts (VASP 4); add one as line 6")
    return _kit_form(structure)


def _pymatgen(content: Mapping[str, Any]) -> Structure | Molecule:
    made = Molecule if "lattice" not in content else Structure
    try:
        return _kit_form(made.from_dict(dict(content)))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ReadError(f"no pymatgen Structure or Molecule dict: {type(error).__name__}: {error}") from error


def _cell(content: tuple[Any, Any, Any]) -> Structure:
    parameters, numbers, fractional = content
    symbols = [symbol_of_number(n) for n in np.asarray(numbers, dtype=np.int64).tolist()]
    lattice = lattice_from_parameters([float(x) for x in parameters])
    return build_structure(lattice, symbols, np.asarray(fractional, dtype=np.float64))


def _kit_form(structure: Structure | Molecule) -> Structure | Molecule:
    """Return a structure with bare elements and, if periodic, coordinates in [0, 1)."""
    species = [dict(site.species.items()) for site in structure]
    properties = {k: list(v) for k, v in structure.site_properties.items() if any(x is not None for x in v)}
    if isinstance(structure, Structure):
        if not all(structure.lattice.pbc):
            raise ReadError(f"pbc {structure.lattice.pbc}: crystals repeat in three directions")
        lattice = Lattice(structure.lattice.matrix)
        return build_structure(lattice, species, structure.frac_coords, site_properties=properties)
    symbols = [{element_symbol(getattr(e, "symbol", str(e))): x for e, x in one.items()} for one in species]
    return Molecule(symbols, structure.cart_coords, site_properties=properties)


_PARSERS: dict[str, Callable[[Any], Structure | Molecule | None]] = {
    "cif": _cif,
    "poscar": _poscar,
    "pymatgen": _pymatgen,
    "frame": extended_xyz.structure_of,
    "cell": _cell,
}
