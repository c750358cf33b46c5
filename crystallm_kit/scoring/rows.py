"""Rows of samples in Parquet parts: a stage's columns for a stretch of a set, written whole or not at all.

    work/DiffCSP/read/part-00003.parquet        index 750 ... 999: id, numbers, lattice, fractional, reason
    work/DiffCSP/checks-1f0c/part-00003.parquet the same rows' checks

Contract: row i of a part stands for the same sample in every stage's folder. A part that is there is whole:
it is written under another name and renamed, so that a killed run leaves no half of one.

Not here: what the columns hold (stages.py).
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pymatgen.core import Lattice, Structure

from crystallm_kit.scores.matcher.structure_matcher import Reduced

# A structure, or a reduced form: (N,) atomic numbers, 9 numbers of the lattice's rows, 3 N fractional ones.
STRUCTURE_COLUMNS = (
    ("numbers", pa.list_(pa.int16())),
    ("lattice", pa.list_(pa.float64())),
    ("fractional", pa.list_(pa.float64())),
)


def part_path(folder: Path, part: int) -> Path:
    """Return the file of a part."""
    return folder / f"part-{part:05d}.parquet"


def parts_of(folder: Path) -> list[Path]:
    """Return the parts that are there, in order."""
    return sorted(folder.glob("part-*.parquet"))


def write_part(path: Path, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> None:
    """Write rows; a column that a row lacks is null."""
    columns = {name: [row.get(name) for row in rows] for name in schema.names}
    write_table(pa.table(columns, schema=schema), path)


def write_table(table: pa.Table, path: Path) -> None:
    """Write a table under another name, then give it its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two workers of a cluster may write the same part: each has a name of its own until it is whole.
    writing = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    pq.write_table(table, writing, compression="zstd")
    writing.replace(path)


def read_part(path: Path, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Return the rows of a part."""
    rows: list[dict[str, Any]] = pq.read_table(path, columns=columns).to_pylist()
    return rows


def n_rows(path: Path) -> int:
    """Return how many rows a part has, from its end alone."""
    return int(pq.read_metadata(path).num_rows)


def column_of(folder: Path, name: str) -> NDArray[Any]:
    """Return one column over all parts; null is NaN among floats, False among truths, None among texts."""
    found = [pq.read_table(path, columns=[name])[name] for path in parts_of(folder)]
    if not found:
        return np.array([])
    kind = found[0].type
    whole = pa.chunked_array([chunk for one in found for chunk in one.chunks], kind)
    if pa.types.is_boolean(kind):
        return np.asarray(whole.fill_null(False).to_numpy())
    if pa.types.is_floating(kind) or pa.types.is_integer(kind):
        return np.asarray(whole.cast(pa.float64()).to_numpy(), dtype=np.float64)
    return np.array([*whole.to_pylist(), None], dtype=object)[:-1]


def structure_columns(structure: Structure) -> dict[str, Any]:
    """Return the columns of an ordered structure."""
    return {
        "numbers": [next(iter(site.species)).Z for site in structure],
        "lattice": structure.lattice.matrix.ravel().tolist(),
        "fractional": structure.frac_coords.ravel().tolist(),
    }


def structure_of(row: Mapping[str, Any]) -> Structure | None:
    """Return a row's structure, to the last bit; None where it has none."""
    if row.get("numbers") is None:
        return None
    lattice = Lattice(np.array(row["lattice"]).reshape(3, 3))
    return Structure(lattice, row["numbers"], np.array(row["fractional"]).reshape(-1, 3))


def form_columns(form: Reduced | None) -> dict[str, Any]:
    """Return the columns of a reduced form."""
    if form is None:
        return {}
    return {
        "reduced_formula": form.formula,
        "numbers": form.numbers.tolist(),
        "lattice": form.lattice.ravel().tolist(),
        "fractional": form.fractional.ravel().tolist(),
    }


def form_of(row: Mapping[str, Any]) -> Reduced | None:
    """Return a row's reduced form; None where it has none."""
    if row.get("numbers") is None:
        return None
    return Reduced(
        row["reduced_formula"],
        np.array(row["numbers"], dtype=np.int16),
        np.array(row["lattice"]).reshape(3, 3),
        np.array(row["fractional"]).reshape(-1, 3),
    )


def forms_of(folder: Path) -> Iterator[list[Reduced | None]]:
    """Yield the reduced forms of each part."""
    columns = ["reduced_formula", *(name for name, _ in STRUCTURE_COLUMNS)]
    for path in parts_of(folder):
        yield [form_of(row) for row in read_part(path, columns)]
