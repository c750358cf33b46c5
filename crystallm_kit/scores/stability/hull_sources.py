"""Where hulls come from: a file of energies, or the Materials Project.

    formula,formation_energy_per_atom        material_id,formula,energy_per_atom
    NaCl,-2.10                               a,NaCl,-3.40
    Na2O,-1.43                               b,Na,-1.31   (total energies: every element must stand there too)

A file is CSV, Parquet, JSON (a list of objects, or pymatgen's ComputedEntry dicts) or JSON Lines. What cannot
be read is left out, and the hull's name says how many; a file where nothing can be read is refused. From
total energies the formation energies are made with the lowest entry of each element; compounds of an element
without one are left out and named.

Materials Project: documents of /materials/thermo/ (GGA and GGA+U mixed) for all chemical systems within the
elements asked for; the key is the environment's MP_API_KEY. Addresses and fields as pymatgen 2026.10 asks for
them (pymatgen/ext/matproj.py); not tried against the service, only against a stand-in with its answers.

Not here: the hull itself (hull.py).
"""

import json
import math
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from pymatgen.core import Composition

from crystallm_kit.errors import EmptyInput, ReadError, UserError
from crystallm_kit.scores.stability.hull import Hull

Row = Mapping[str, Any]
FORMULA_COLUMNS = ("formula", "composition", "pretty_formula", "formula_pretty", "reduced_formula")
FORMATION_COLUMNS = (
    "formation_energy_ev_per_atom",
    "formation_energy_per_atom",
    "formation_energy",
    "e_form",
)
TOTAL_COLUMNS = ("energy_ev_per_atom", "energy_per_atom", "corrected_energy_per_atom")
CELL_COLUMNS = ("energy_ev", "energy")  # of as many atoms as the formula has
MATERIALS_PROJECT = "https://api.materialsproject.org"
_THERMO_TYPE = "GGA_GGA+U"
_PER_PAGE = 1000
_SYSTEMS_AT_ONCE = 50  # chemical systems in one request, whose address may not grow without end


def read_hull(path: str | Path) -> Hull:
    """Return the hull of a file's entries.

    Raises:
        ReadError: If there is no such file, it is none of the kinds above, or has no usable column.
        EmptyInput: If no entry of it can be used.
    """
    path = Path(path)
    if not path.is_file():
        raise ReadError(f"{path}: no such file; expected energies as CSV, Parquet, JSON or JSON Lines")
    return hull_of_rows(_rows(path), name=path.name, source=str(path))


def hull_of_rows(rows: Iterable[Row], *, name: str, source: str) -> Hull:
    """Return the hull of entries given as mappings of columns.

    Args:
        rows: With a column of FORMULA_COLUMNS and one of the energies' (see above).
        name: As it stands beside results.
        source: For messages.
    """
    compositions: list[Composition] = []
    energies: list[float] = []
    kinds: set[str] = set()
    n_unread = 0
    first_fault = ""
    for number, row in enumerate(rows):
        try:
            composition, energy, kind = _entry(row)
        except (ValueError, TypeError) as error:
            n_unread += 1
            first_fault = first_fault or f"row {number}: {error}"
            continue
        compositions.append(composition)
        energies.append(energy)
        kinds.add(kind)
    if not compositions:
        raise EmptyInput(f"{source}: no entry can be used{' (' + first_fault + ')' if first_fault else ''}")
    if len(kinds) > 1:
        raise ReadError(f"{source}: formation and total energies mixed; give one column for all entries")
    if kinds == {"total"}:
        compositions, energies, without = _formation_energies(compositions, energies)
        if not compositions:
            raise EmptyInput(
                f"{source}: total energies, but no entry of the elements {', '.join(without)}; add them, or "
                "give formation energies"
            )
        if without:
            name += f" (without {', '.join(without)}: no energy of the element)"
    if n_unread:
        name += f" ({n_unread} of {n_unread + len(compositions)} rows not read; {first_fault})"
    return Hull.from_formation_energies(compositions, energies, name=name)


def _entry(row: Row) -> tuple[Composition, float, str]:
    """Return composition, energy in eV/atom and its kind of a row; ValueError or TypeError if it has none."""
    columns = {str(key).lower(): value for key, value in row.items()}
    given = next((columns[c] for c in FORMULA_COLUMNS if columns.get(c) not in (None, "")), None)
    if given is None:
        raise ValueError(f"no formula; expected a column {', '.join(FORMULA_COLUMNS)}")
    composition = Composition(given)
    if not composition.valid or not composition.num_atoms:
        raise ValueError(f"'{given}' is no formula")
    for names, kind in ((FORMATION_COLUMNS, "formation"), (TOTAL_COLUMNS, "total"), (CELL_COLUMNS, "cell")):
        value = next((columns[n] for n in names if columns.get(n) not in (None, "")), None)
        if value is None:
            continue
        energy = float(value)
        if kind == "cell":
            energy = (energy + float(columns.get("correction") or 0.0)) / composition.num_atoms
        if not math.isfinite(energy):
            raise ValueError(f"energy {value}")
        return composition, energy, "total" if kind == "cell" else kind
    raise ValueError(f"no energy; expected a column {', '.join((*FORMATION_COLUMNS, *TOTAL_COLUMNS))}")


def _formation_energies(
    compositions: Sequence[Composition], energies: Sequence[float]
) -> tuple[list[Composition], list[float], list[str]]:
    """Return compositions and formation energies of what has all its elements, and the elements missing."""
    terminal: dict[str, float] = {}
    for composition, energy in zip(compositions, energies, strict=True):
        if len(composition.elements) == 1:
            symbol = composition.elements[0].symbol
            terminal[symbol] = min(energy, terminal.get(symbol, math.inf))
    without = sorted({e.symbol for c in compositions for e in c.elements} - set(terminal))
    kept, formation = [], []
    for composition, energy in zip(compositions, energies, strict=True):
        if all(e.symbol in terminal for e in composition.elements):
            mixed = sum(composition.get_atomic_fraction(e) * terminal[e.symbol] for e in composition.elements)
            kept.append(composition)
            formation.append(energy - mixed)
    return kept, formation, without


# ---------------------------------------------------------------- files


def _rows(path: Path) -> Iterator[Row]:
    suffix = path.suffix.lower()
    readers: dict[str, Callable[[Path], Iterable[Row]]] = {
        ".csv": _csv_rows, ".parquet": _parquet_rows, ".json": _json_rows, ".jsonl": _json_lines,
    }  # fmt: skip
    if suffix not in readers:
        raise ReadError(f"{path}: '{suffix}' is no kind of hull file; known: {', '.join(readers)}")
    try:
        yield from readers[suffix](path)
    except (ValueError, UnicodeDecodeError) as error:
        raise ReadError(f"{path}: no {suffix[1:]} file: {error}") from error


def _csv_rows(path: Path) -> Iterator[Row]:
    import csv

    with path.open(encoding="utf-8-sig", newline="") as lines:
        try:
            yield from csv.DictReader(lines)
        except csv.Error as error:
            raise ReadError(f"{path}: no CSV: {error}") from error


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    known = {*FORMULA_COLUMNS, *FORMATION_COLUMNS, *TOTAL_COLUMNS, *CELL_COLUMNS, "correction"}
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            columns = [name for name in table.schema_arrow.names if name.lower() in known]
            for batch in table.iter_batches(columns=columns):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise ReadError(f"{path}: no Parquet file: {error}") from error


def _json_rows(path: Path) -> Iterable[Row]:
    data = json.loads(path.read_text(encoding="utf-8"))
    rows = data.get("entries", data.get("data")) if isinstance(data, dict) else data
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ReadError(f'{path}: expected a list of objects, or {{"entries": [...]}}')
    return rows


def _json_lines(path: Path) -> Iterator[Row]:
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip():
            yield json.loads(line)


# ---------------------------------------------------------------- Materials Project


def materials_project_hull(
    elements: Iterable[str], *, api_key: str | None = None, url: str = MATERIALS_PROJECT, tries: int = 3
) -> Hull:
    """Return the Materials Project's hull of some elements.

    Args:
        elements: Symbols; each chemical system within them is asked for (2^n - 1, at most 8 elements).
        api_key: None: the environment's MP_API_KEY.
        url: Of the service.
        tries: For each request, where the service is busy or not reached.

    Raises:
        UserError: Without a key, with a wrong one, with too many elements, or if the service does not answer.
        EmptyInput: If it knows no entry.
    """
    symbols = sorted(set(elements))
    key = api_key or os.environ.get("MP_API_KEY", "")
    if not key:
        raise UserError(
            "the Materials Project's hull needs an API key: set MP_API_KEY (free, from "
            "https://next-gen.materialsproject.org/api), or give a file of energies"
        )
    if not 1 <= len(symbols) <= 8:
        raise UserError(f"{len(symbols)} elements: 1 to 8 expected; ask for the hull of one composition")
    systems = ["-".join(c) for n in range(1, len(symbols) + 1) for c in combinations(symbols, n)]
    rows: list[Row] = []
    for start in range(0, len(systems), _SYSTEMS_AT_ONCE):
        rows += _documents(url, key, systems[start : start + _SYSTEMS_AT_ONCE], tries)
    rows = [row for row in rows if row.get("thermo_type", _THERMO_TYPE) == _THERMO_TYPE]
    name = f"Materials Project, {_THERMO_TYPE}, {'-'.join(symbols)}, {time.strftime('%Y-%m-%d')}"
    return hull_of_rows(rows, name=name, source=url)


def _documents(url: str, key: str, systems: Sequence[str], tries: int) -> list[Row]:
    """Return the documents of some chemical systems, page by page."""
    asked = {
        "_fields": "material_id,formula_pretty,formation_energy_per_atom,thermo_type",
        "chemsys": ",".join(systems),
    }
    found: list[Row] = []
    page = 1
    while True:
        paged = {**asked, "_per_page": str(_PER_PAGE), "_page": str(page)}
        try:
            data = _get(url, key, paged, tries)
        except _PagesRefused:  # some routes give everything at once, and refuse to be asked for pages
            return _get(url, key, asked, tries)
        found += data
        if len(data) < _PER_PAGE:
            return found
        page += 1


class _PagesRefused(Exception):
    """The service gives no pages."""


def _get(url: str, key: str, asked: Mapping[str, str], tries: int) -> list[Row]:
    address = f"{url.rstrip('/')}/materials/thermo/?{urllib.parse.urlencode(asked)}"
    request = urllib.request.Request(address, headers={"x-api-key": key, "accept": "application/json"})
    for attempt in range(1, tries + 1):
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                data = json.load(answer)
            if not isinstance(data, dict) or not isinstance(data.get("data"), list):
                raise UserError(f"{url}: the answer has no list 'data'; is that the Materials Project's API?")
            return list(data["data"])
        except urllib.error.HTTPError as error:
            said = error.read(500).decode("utf-8", "replace")
            error.close()
            if error.code == 400 and "_per_page" in asked and re.search("_per_page", said):
                raise _PagesRefused from error
            if error.code in (401, 403):
                raise UserError(f"{url}: the API key is refused ({error.code})") from error
            if error.code < 500 and error.code != 429:
                raise UserError(f"{url}: refused with {error.code}: {said}") from error
            why = f"{error.code} {said}"
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            why = str(getattr(error, "reason", error))
        except ValueError as error:
            raise UserError(f"{url}: the answer is no JSON: {error}") from error
        if attempt < tries:
            time.sleep(2.0 ** (attempt - 1))
    raise UserError(f"{url}: not reached in {tries} tries ({why}); give a file of energies instead")
