"""The rows that a run leaves: one for each requested sample, all stages' columns side by side.

    rows/DiffCSP.parquet: id, index, set, formula, n_sites, ..., reason, cdvae.comp_valid, copy_of.default,
                          known_as.default, rms_distance.csp, ..., trouble, cif

Not here: the parts that they come from (rows.py), what is counted from them (summary.py).
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from crystallm_kit.scoring.pairing import Pairs
from crystallm_kit.scoring.rows import part_path, parts_of
from crystallm_kit.scoring.stages import STAGES
from crystallm_kit.scoring.view import View

Copied = Mapping[str, NDArray[np.int64]]
_FIRST = (
    "id", "index", "set", "formula", "n_sites", "n_elements", "spacegroup_number", "crystal_system",
    "density_g_cm3", "volume_per_atom_angstrom3", "nearest_distance_angstrom", "reason", "detail",
)  # fmt: skip
_LAST = ("trouble", "properties", "cif")
# What only other stages read, or is said in one column for all.
_LEFT_OUT = {
    "numbers", "lattice", "fractional", "reduced_formula", "reason", "detail", "trouble", "stage", "id",
    "index", "properties", "cell_lengths_angstrom", "distances", "structure_fingerprint",
    "composition_fingerprint",
}  # fmt: skip


def write_rows(
    view: View,
    path: Path,
    *,
    copies: Mapping[str, NDArray[np.int64]],
    pairs: Pairs | None,
    targets: View | None,
) -> int:
    """Write the rows of a set, a part in memory at a time, and return how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writing = path.with_name(f".{path.name}.writing")
    ids = view.texts("read", "id")
    target_ids = targets.texts("read", "id") if targets is not None else []
    n, writer = 0, None
    try:
        for table in _tables(view, copies, pairs, ids, target_ids):
            writer = writer or pq.ParquetWriter(writing, table.schema, compression="zstd")
            writer.write_table(table)
            n += table.num_rows
    finally:
        if writer is not None:
            writer.close()
    writing.replace(path)
    return n


def _tables(
    view: View,
    copies: Mapping[str, NDArray[np.int64]],
    pairs: Pairs | None,
    ids: Sequence[Any],
    target_ids: Sequence[Any],
) -> Iterator[pa.Table]:
    start, reasons = 0, view.reasons()
    for number in range(len(parts_of(view.folders["read"]))):
        found = {s: pq.read_table(part_path(folder, number)) for s, folder in view.folders.items()}
        read = found.pop("read")
        at = slice(start, start + read.num_rows)
        start += read.num_rows
        columns: dict[str, Any] = {
            "id": read["id"], "index": read["index"], "set": pa.array([view.name] * read.num_rows),
            "reason": pa.array(reasons[at], pa.string()),
            "detail": pa.array(_details(read, found["checks"]), pa.string()),
            "trouble": pa.array(_troubles(found, read.num_rows), pa.string()),
            "properties": read["properties"], "conditions": read["conditions"],
        }  # fmt: skip
        for stage, table in found.items():
            columns |= {c: table[c] for c in STAGES[stage].schema.names if c not in _LEFT_OUT}
        for rule, of in copies.items():
            copied = [ids[i] if i >= 0 else None for i in of[at].tolist()]
            columns[f"copy_of.{rule}"] = pa.array(copied, pa.string())
        if pairs is not None:
            columns["target"] = pa.array([target_ids[i] for i in pairs.target[at].tolist()], pa.string())
            columns["candidate"] = pa.array(pairs.candidate[at])
        rest = [name for name in columns if name not in (*_FIRST, *_LAST)]
        yield pa.table({name: columns[name] for name in (*_FIRST, *rest, *_LAST)})


def _details(read: pa.Table, checks: pa.Table) -> list[str | None]:
    three = zip(
        read["detail"].to_pylist(), checks["trouble"].to_pylist(), checks["detail"].to_pylist(), strict=True
    )
    return [first or second or third for first, second, third in three]


def _troubles(found: Mapping[str, pa.Table], n: int) -> list[str | None]:
    """Return what went wrong in the stages, of each sample."""
    said: list[list[str]] = [[] for _ in range(n)]
    for stage, table in found.items():
        for i, text in enumerate(table["trouble"].to_pylist()):
            if text:
                said[i].append(f"{stage}: {text}")
    return ["; ".join(one) or None for one in said]
