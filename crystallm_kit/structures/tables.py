"""CSV and Parquet files with one structure a row -> entries, a batch of rows at a time.

    material_id,cif,formation_energy_per_atom
    mp-22862,"data_NaCl ...",-2.1

The structure stands in a column `cif`, `cif_str`, `cif_string` or `structure` (CIF text, or a pymatgen dict
as JSON or nested); the id in `material_id`, `id`, `mp_id` or `name`, else it is file:row, counted from 0; the
other columns become properties.

Not here: what a cell's structure is (entries.py); names of properties (properties.py).
"""

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from crystallm_kit.errors import ReadError
from crystallm_kit.structures.entries import STRUCTURE_COLUMNS, Entry, entry_of_row
from crystallm_kit.structures.properties import ID_COLUMNS, value_of_text

ROWS_PER_BATCH = 256  # of a few kilobytes each
LONGEST_CELL = 16 * 2**20  # characters; the csv module's own limit of 131,072 cuts cells of a thousand sites


def entries_of_csv(lines: TextIO, *, file: str) -> Iterator[Entry]:
    """Yield the entries of a CSV text, row by row.

    Raises:
        ReadError: If it has no structure column, or is no CSV.
    """
    if csv.field_size_limit() < LONGEST_CELL:
        csv.field_size_limit(LONGEST_CELL)
    rows = csv.reader(_without_nul(lines))
    try:
        header = [name.strip().removeprefix("\ufeff") for name in next(rows, [])]
        _check_columns(header)
        keep_text = {*STRUCTURE_COLUMNS, *ID_COLUMNS}
        for number, row in enumerate(row for row in rows if row):
            entry, default_id = f"row {number}", f"{Path(file).name}:{number}"
            if len(row) != len(header):
                reason = f"{len(row)} cells, {len(header)} expected (an unclosed quote?)"
                yield Entry(file, entry, default_id, "fault", reason)
                continue
            columns = {
                name: cell if name.lower() in keep_text else value_of_text(cell)
                for name, cell in zip(header, row, strict=True)
            }
            yield entry_of_row(columns, file=file, entry=entry, default_id=default_id)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ReadError(f"no CSV from line {rows.line_num + 1} on: {error}") from error


def entries_of_parquet(path: Path, *, file: str) -> Iterator[Entry]:
    """Yield the entries of a Parquet file, a batch of rows of one row group in memory at a time.

    Raises:
        ReadError: If it has no structure column, or is no Parquet file.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            names = list(table.schema_arrow.names)
            _check_columns(names)
            number = 0
            for batch in table.iter_batches(batch_size=ROWS_PER_BATCH):
                for columns in batch.to_pylist():
                    default_id = f"{Path(file).name}:{number}"
                    yield entry_of_row(columns, file=file, entry=f"row {number}", default_id=default_id)
                    number += 1
    except pyarrow.ArrowException as error:
        raise ReadError(f"no Parquet file: {error}") from error


def _check_columns(names: Iterable[Any]) -> None:
    present = [str(name) for name in names]
    if not any(name.lower() in STRUCTURE_COLUMNS for name in present):
        raise ReadError(
            f"no column with structures; got {', '.join(present) or 'no columns'}; "
            f"expected one of {', '.join(STRUCTURE_COLUMNS)}"
        )


def _without_nul(lines: TextIO) -> Iterator[str]:
    return (line.replace("\0", "") for line in lines)
