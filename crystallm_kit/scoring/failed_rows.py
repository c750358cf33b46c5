"""The failures of a run as its report lists them: the first of each reason and set, from the rows in Parquet.

    failures = failed_rows(folder, report["sets"])
    failures.rows[0]       FailedRow("DiffCSP", 0, "DiffCSP_mp_20.pt:3", "LiTi3O8", reason="charge", ...)

Contract: rows are read in stretches, so that a file of millions fits; of a set with many failures of a reason
the first `MOST` are kept, in the order of the samples. A file that is missing or is none is said in `notes`.

Not here: how many there are of each (report.json counts them).
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST = 40
_COLUMNS = ("id", "formula", "n_sites", "spacegroup_number", "reason", "detail")


@dataclass(frozen=True)
class FailedRow:
    """One sample that failed. `colour` is its set's number."""

    set: str
    colour: int
    id: str
    formula: str
    n_sites: int | None
    spacegroup_number: int | None
    reason: str
    detail: str


@dataclass(frozen=True)
class FailedRows:
    """The failures of all sets.

    Attributes:
        rows: Those that are listed.
        reasons: (reason, how many of all sets), most frequent first.
        total: All failures, listed or not.
        notes: What could not be read.
    """

    rows: list[FailedRow]
    reasons: list[tuple[str, int]]
    total: int
    notes: list[str]
    most: int = MOST


def failed_rows(folder: Path, sets: Sequence[Mapping[str, Any]]) -> FailedRows:
    """Return the failures of a run's sets.

    Args:
        folder: Of the run; the sets' "rows" are relative to it.
        sets: As in `report.json`.
    """
    rows: list[FailedRow] = []
    reasons: Counter[str] = Counter()
    notes = []
    for colour, one in enumerate(sets):
        counts = {str(reason): int(count) for reason, count in one["reasons"].items()}
        reasons.update(counts)
        path = (folder / str(one["rows"])).resolve()
        if not path.is_relative_to(folder.resolve()) or not path.is_file():
            notes.append(f"{one['name']}: the rows {one['rows']} are not in this folder, so none are listed.")
            continue
        try:
            rows += _of_file(path, str(one["name"]), colour)
        # pyarrow raises its own errors and OSError for what is no Parquet, or lacks a column.
        except (OSError, ValueError, KeyError) as error:
            notes.append(f"{one['name']}: {one['rows']} cannot be read ({str(error).splitlines()[0][:120]}).")
    return FailedRows(rows, reasons.most_common(), sum(reasons.values()), notes)


def _of_file(path: Path, name: str, colour: int) -> Iterator[FailedRow]:
    import pyarrow.parquet as pq

    taken: Counter[str] = Counter()
    with pq.ParquetFile(path) as file:
        columns = [column for column in _COLUMNS if column in file.schema_arrow.names]
        for batch in file.iter_batches(batch_size=10_000, columns=columns):
            failed = batch.filter(batch["reason"].is_valid())
            for row in failed.to_pylist():
                reason = str(row["reason"])
                taken[reason] += 1
                if taken[reason] <= MOST:
                    yield FailedRow(
                        name, colour, str(row.get("id", "")), str(row.get("formula") or ""),
                        _whole(row.get("n_sites")), _whole(row.get("spacegroup_number")), reason,
                        str(row.get("detail") or ""),
                    )  # fmt: skip


def _whole(value: Any) -> int | None:
    """Return an integer; Parquet columns with nulls may come as floats."""
    return None if value is None or value != value else int(value)
