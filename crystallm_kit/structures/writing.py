"""Crystals -> files that `read` reads back, with ids and properties where the format has room.

    format    path                            holds
    cif       x.cif, a folder, x.zip          structure (P1, 8 decimals); the file's name is the id
    poscar    POSCAR, x.vasp, a folder, .zip  structure; the id is the comment
    extxyz    x.extxyz, x.xyz                 structures and molecules, id, properties
    json      x.json, x.json.gz               pymatgen dicts, id and properties under "properties"
    parquet   x.parquet                       id, formula, n_sites, cif or structure (JSON), properties

Contract: a file appears whole or not at all (written under another name, then renamed); of a folder each
file does. Crystals are taken one at a time, so a stream of any length is written in bounded memory.

Not here: which crystals deserve to be written.
"""

import gzip
import json
import re
import uuid
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

from pymatgen.core import Composition, Element
from pymatgen.core.structure import Molecule, Structure

from crystallm_kit.errors import EmptyInput, UnknownName, UserError
from crystallm_kit.records import Crystal, PropertyValue
from crystallm_kit.structures.elements import RANK
from crystallm_kit.structures.extended_xyz import frame_text
from crystallm_kit.structures.properties import plain_value

FORMATS = ("cif", "poscar", "extxyz", "json", "parquet")
ROWS_PER_GROUP = 2000
_SUFFIXES = {
    ".cif": "cif",
    ".vasp": "poscar",
    ".poscar": "poscar",
    ".extxyz": "extxyz",
    ".xyz": "extxyz",
    ".json": "json",
    ".parquet": "parquet",
}
_OWN_COLUMNS = ("id", "formula", "n_sites", "cif", "structure")


def write(crystals: Iterable[Crystal], path: str | Path, *, format: str | None = None) -> int:
    """Write crystals to a file, a zip archive or a folder, and return how many.

    Args:
        crystals: Read once, one at a time.
        path: A suffix of the table above; none, or an existing folder: a folder of one file each.
        format: One of FORMATS; None: as the suffix says, else cif.

    Raises:
        EmptyInput: If there is no crystal; nothing is written then.
        UnknownName: If no format has that name.
        UserError: If the format cannot hold a crystal (a molecule as CIF or POSCAR, a disordered one in
            POSCAR or extxyz), or the file holds one crystal and there are more.
    """
    target = Path(path)
    form = _format_of(target, format)
    stream = iter(crystals)
    first = list(islice(stream, 1))
    if not first:
        raise EmptyInput(f"no crystals to write to {target}")
    stream = chain(first, stream)
    if not target.parent.is_dir():
        raise UserError(f"{target}: no folder {target.parent} to write it to; make it first")
    if target.suffix.lower() == ".zip":
        return _write_zip(stream, target, form)
    if form in ("cif", "poscar"):
        if target.is_dir() or not (target.suffix or _is_poscar_name(target)):
            return _write_folder(stream, target, form)
        return _write_single(stream, target, form)
    if target.is_dir():
        raise UserError(
            f"{target} is a folder; {form} is one file: name it, for example {target / 'crystals'}.{form}"
        )
    return _WRITERS[form](stream, target)


def _format_of(path: Path, format: str | None) -> str:
    if format is not None:
        if format not in FORMATS:
            raise UnknownName.among("file format", format, FORMATS)
        return format
    if _is_poscar_name(path):
        return "poscar"
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if path.is_dir() or suffix in ("", ".zip"):
        return "cif"
    if suffix not in _SUFFIXES:
        known = ", ".join((*_SUFFIXES, ".json.gz", ".zip", "no suffix (a folder)"))
        raise UserError(
            f"{path}: no format is known by the suffix '{suffix}'. Known: {known}; or give format=."
        )
    return _SUFFIXES[suffix]


def _is_poscar_name(path: Path) -> bool:
    return path.name.upper().startswith(("POSCAR", "CONTCAR")) and not path.is_dir()


def text_of(crystal: Crystal, form: str) -> str:
    """Return a crystal as the text of a CIF or POSCAR file.

    Raises:
        UserError: If the format cannot hold it.
    """
    structure = crystal.structure
    if isinstance(structure, Molecule):
        raise UserError(f"'{crystal.id}' is a molecule, which {form} cannot hold; write it as extxyz or json")
    if form == "cif":
        return _cif_of(structure)
    _require_order(crystal, form)
    from pymatgen.io.vasp.inputs import Poscar

    comment = " ".join(crystal.id.split()) or structure.formula
    return Poscar(structure, comment=comment, sort_structure=False).get_str(significant_figures=10)


def _cif_of(structure: Structure) -> str:
    """Return the text of pymatgen's CifWriter; of plain elements, each site full, it is written here.

    CifWriter takes about 400 microseconds for ten atoms, this 40; a server writes thousands in a second.
    """
    rows = []
    counts: dict[str, int] = {}
    for index, site in enumerate(structure):
        species = site.species
        element, amount = next(iter(species.items()))
        x, y, z = site.frac_coords.tolist()
        is_plain = len(species) == 1 and amount == 1 and type(element) is Element and element.symbol in RANK
        if not is_plain or not max(abs(x), abs(y), abs(z)) < 10:
            return _cif_of_writer(structure)
        symbol = element.symbol
        counts[symbol] = counts.get(symbol, 0) + 1
        rows.append(f"  {symbol}  {symbol}{index}  1  {x:.8f}  {y:.8f}  {z:.8f}  {amount}")
    reduced, formula, units = _formulas(tuple(counts.items()))
    if not 0 < len(formula) <= _SHORT_FORMULA:  # CifWriter folds long ones
        return _cif_of_writer(structure)
    lattice = structure.lattice
    quoted = f"'{formula}'" if " " in formula else formula
    cell = zip(("length_a", "length_b", "length_c", "angle_alpha", "angle_beta", "angle_gamma"),
               lattice.parameters, strict=True)  # fmt: skip
    lines = [
        "# generated using pymatgen",
        f"data_{reduced}",
        "_symmetry_space_group_name_H-M   'P 1'",
        *(f"_cell_{name}   {value:.8f}" for name, value in cell),
        "_symmetry_Int_Tables_number   1",
        f"_chemical_formula_structural   {reduced}",
        f"_chemical_formula_sum   {quoted}",
        f"_cell_volume   {lattice.volume:.8f}",
        f"_cell_formula_units_Z   {units}",
        _CIF_LOOPS,
    ]
    return "\n".join((*lines, *rows)) + "\n"


_SHORT_FORMULA = 40
_CIF_LOOPS = """loop_
 _symmetry_equiv_pos_site_id
 _symmetry_equiv_pos_as_xyz
  1  'x, y, z'
loop_
 _atom_site_type_symbol
 _atom_site_label
 _atom_site_symmetry_multiplicity
 _atom_site_fract_x
 _atom_site_fract_y
 _atom_site_fract_z
 _atom_site_occupancy"""


@lru_cache(maxsize=10_000)
def _formulas(counts: tuple[tuple[str, int], ...]) -> tuple[str, str, int]:
    """Return pymatgen's reduced formula, formula and number of formula units."""
    composition = Composition(dict(counts))
    _, factor = composition.get_reduced_composition_and_factor()
    return composition.reduced_formula, composition.formula, int(factor)


def _cif_of_writer(structure: Structure) -> str:
    from pymatgen.io.cif import CifWriter

    return str(CifWriter(_without_labels(structure)))


def _without_labels(structure: Structure) -> Structure:
    """Return the structure under labels of its own order, since given ones may repeat, which no CIF may."""
    return Structure(structure.lattice, [site.species for site in structure], structure.frac_coords)


def _require_order(crystal: Crystal, form: str) -> None:
    if not crystal.structure.is_ordered:
        raise UserError(f"'{crystal.id}' is disordered, which {form} cannot hold; write it as cif or json")


def _write_single(crystals: Iterator[Crystal], path: Path, form: str) -> int:
    one, *more = islice(crystals, 2)
    if more:
        raise UserError(
            f"{path} holds one crystal and there are more; give a folder, .zip, .json or .parquet"
        )
    with _renamed_when_whole(path) as partial:
        partial.write_text(text_of(one, form), encoding="utf-8")
    return 1


def _write_folder(crystals: Iterator[Crystal], folder: Path, form: str) -> int:
    folder.mkdir(exist_ok=True)
    names = _Names(".cif" if form == "cif" else ".vasp")
    for crystal in crystals:
        text = text_of(crystal, form)
        with _renamed_when_whole(folder / names.of(crystal.id)) as partial:
            partial.write_text(text, encoding="utf-8")
    return names.n_given


def _write_zip(crystals: Iterator[Crystal], path: Path, form: str) -> int:
    if form not in ("cif", "poscar"):
        raise UserError(f"{path}: a zip holds cif or poscar files, not {form}")
    names = _Names(".cif" if form == "cif" else ".vasp")
    with (
        _renamed_when_whole(path) as partial,
        zipfile.ZipFile(partial, "w", compression=zipfile.ZIP_DEFLATED) as archive,
    ):
        for crystal in crystals:
            archive.writestr(names.of(crystal.id), text_of(crystal, form))
    return names.n_given


def _write_extxyz(crystals: Iterator[Crystal], path: Path) -> int:
    n_written = 0
    with _renamed_when_whole(path) as partial, partial.open("w", encoding="utf-8") as lines:
        for crystal in crystals:
            _require_order(crystal, "extxyz")
            lines.write(frame_text(crystal.structure, {"id": crystal.id, **_plain(crystal)}))
            n_written += 1
    return n_written


def _write_json(crystals: Iterator[Crystal], path: Path) -> int:
    """Write one dict, as pymatgen's from_file wants it, or a list of them."""
    opened = gzip.open if path.name.lower().endswith(".gz") else open
    n_written = 0
    with _renamed_when_whole(path) as partial, opened(partial, "wt", encoding="utf-8") as lines:
        texts = (_json_of(crystal) for crystal in crystals)
        head = list(islice(texts, 2))
        lines.write(head[0] if len(head) == 1 else "[")
        for n_written, text in enumerate(chain(head, texts), start=1):
            if len(head) > 1:
                lines.write(("\n" if n_written == 1 else ",\n") + text)
        lines.write("\n" if len(head) == 1 else "\n]\n")
    return n_written


def _json_of(crystal: Crystal) -> str:
    held = crystal.structure.as_dict()
    held["properties"] = {"id": crystal.id, **_plain(crystal)}
    return json.dumps(held)


def _write_parquet(crystals: Iterator[Crystal], path: Path) -> int:
    """Write row groups. Two passes: columns are known when all are seen, so rows wait in a file beside."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types: dict[str, type] = {}
    n_written = 0
    with _renamed_when_whole(path) as partial, _renamed_when_whole(path, keep=False) as waiting:
        with gzip.open(waiting, "wt", encoding="utf-8", compresslevel=1) as lines:
            for crystal in crystals:
                row = _row_of(crystal)
                for name, value in row.items():
                    types[name] = _wider(types.get(name, type(value)), type(value))
                lines.write(json.dumps(row) + "\n")
                n_written += 1
        arrow = {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string()}
        ordered = sorted(types, key=lambda name: _OWN_COLUMNS.index(name) if name in _OWN_COLUMNS else 99)
        schema = pa.schema([(name, arrow[types[name]]) for name in ordered])
        with (
            gzip.open(waiting, "rt", encoding="utf-8") as lines,
            pq.ParquetWriter(partial, schema) as writer,
        ):
            while some := [json.loads(line) for line in islice(lines, ROWS_PER_GROUP)]:
                rows = [{k: v if types[k] is bool else types[k](v) for k, v in row.items()} for row in some]
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    return n_written


def _row_of(crystal: Crystal) -> dict[str, Any]:
    structure = crystal.structure
    row: dict[str, Any] = {
        "id": crystal.id,
        "formula": structure.composition.reduced_formula,
        "n_sites": len(structure),
    }
    if isinstance(structure, Molecule):
        row["structure"] = json.dumps(structure.as_dict())
    else:
        row["cif"] = text_of(crystal, "cif")
    own = set(_OWN_COLUMNS)  # a property called "formula" is what the structure says anyway
    return row | {name: value for name, value in _plain(crystal).items() if name not in own}


def _plain(crystal: Crystal) -> dict[str, PropertyValue]:
    """Return the properties as plain Python values, the missing ones left out."""
    values = {name: plain_value(value) for name, value in crystal.properties.items()}
    return {name: value for name, value in values.items() if value is not None}


def _wider(one: type, other: type) -> type:
    """Return the type that holds values of both: bool, int, float or str."""
    if one is other:
        return one
    return float if {one, other} == {int, float} else str


@contextmanager
def _renamed_when_whole(path: Path, *, keep: bool = True) -> Iterator[Path]:
    """Give a path to write to in the same folder, renamed to `path` at the end, or removed after an error."""
    # The suffix stays last: pyarrow and gzip look at it. uuid: several writers may share a folder.
    partial = path.with_name(f".{uuid.uuid4().hex[:12]}.partial{path.suffix}")
    try:
        yield partial
        if keep:
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class _Names:
    """File names from ids: only safe characters, each name once."""

    def __init__(self, suffix: str) -> None:
        self.suffix = suffix
        self.n_given = 0
        self._taken: set[str] = set()

    def of(self, identity: str) -> str:
        """Return a name for a crystal's id: "MP/1 (a)" -> "MP_1_a_.cif", and again -> "MP_1_a_-2.cif"."""
        stem = re.sub(r"[^A-Za-z0-9+.\-]+", "_", identity).lstrip(".")[:120] or "crystal"
        name, number = stem, 1
        while name.lower() in self._taken:  # case: some file systems keep none
            number += 1
            name = f"{stem}-{number}"
        self._taken.add(name.lower())
        self.n_given += 1
        return name + self.suffix


_WRITERS: dict[str, Callable[[Iterator[Crystal], Path], int]] = {
    "extxyz": _write_extxyz,
    "json": _write_json,
    "parquet": _write_parquet,
}
