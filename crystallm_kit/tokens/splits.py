"""Which rows of a corpus stay, and in which split: an index on disk, so that memory stays bounded.

    with SplitIndex(folder / "index.sqlite", seed=1, ...) as index:
        index.add(part=0, rows=[Row("Na4 Cl4|225", "Cl1 Na1", 44.9, 26, "")])
        index.decide()                        # duplicates, then splits
        index.kept(part=0)                    # [(0, "train")]

Duplicates: of the rows with one key the one with the lowest volume per formula unit stays, as in CrystaLLM
(Antunes et al. 2024), where the key is the cell's formula and the space group; a row given for test or
validation goes before one that is not, whatever its volume.

Splits: rows that come with a split keep it. Where none do, a row goes where the hash of its reduced
composition says: all crystals of a composition are on one side by construction, whatever else is in the data,
and adding data moves nothing from one side to the other.

Not here: files (corpus.py).
"""

import hashlib
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

import pyarrow.parquet as pq

from crystallm_kit.errors import UserError

SPLITS = ("train", "validation", "test")
SharedCompositions = Literal["drop", "keep", "refuse"]
_RANK = {"test": 0, "validation": 1, "train": 2}


@dataclass(frozen=True)
class Row:
    """What decides over a row.

    Attributes:
        key: Rows with the same one are duplicates; "" for none.
        composition: Reduced; splits go by it.
        volume: Per formula unit (cubic angstrom).
        n_tokens: For the histogram.
        split: Given one, or "".
    """

    key: str
    composition: str
    volume: float
    n_tokens: int
    split: str


def split_of_composition(
    composition: str, *, seed: int, validation_fraction: float, test_fraction: float
) -> str:
    """Return the split of a reduced composition: always the same for the same seed."""
    digest = hashlib.sha256(f"{seed} {composition}".encode()).digest()
    share = int.from_bytes(digest[:8]) / 2**64
    if share < test_fraction:
        return "test"
    return "validation" if share < test_fraction + validation_fraction else "train"


class SplitIndex:
    """The index of one corpus; an existing file is replaced."""

    def __init__(self, path: Path, *, seed: int, validation_fraction: float, test_fraction: float) -> None:
        path.unlink(missing_ok=True)
        self._fractions = {"validation_fraction": validation_fraction, "test_fraction": test_fraction}
        self._seed = seed
        self._database = sqlite3.connect(path)
        for setting in (
            "journal_mode = off",
            "synchronous = off",
            "temp_store = file",
            "cache_size = -16384",
        ):
            self._database.execute(f"PRAGMA {setting}")
        self._database.execute(
            "CREATE TABLE rows (part INT, row INT, key BLOB, composition TEXT, volume REAL, n_tokens INT,"
            " rank INT, split TEXT)"
        )

    def __enter__(self) -> "SplitIndex":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._database.close()

    def add(self, part: int, rows: Iterable[Row]) -> None:
        """Add the rows of a part, in their order."""
        self._database.executemany(
            "INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                (part, number, _key(row.key, part, number), row.composition, row.volume, row.n_tokens,
                 _RANK.get(row.split, 3), row.split or self._split(row.composition))
                for number, row in enumerate(rows)
            ),
        )  # fmt: skip

    def _split(self, composition: str) -> str:
        return split_of_composition(composition, seed=self._seed, **self._fractions)

    def decide(self, shared_compositions: SharedCompositions = "drop") -> dict[str, int]:
        """Drop duplicates, then what would stand on two sides; return how many rows each took.

        Args:
            shared_compositions: What happens to rows whose composition is also in test (or, for training
                rows, in validation): dropped, kept, or refused. Only given splits can share any.

        Raises:
            UserError: If they are refused and there are some.
        """
        run = self._database.execute
        run(
            "CREATE TABLE kept AS SELECT part, row, composition, n_tokens, split FROM (SELECT *, row_number()"
            " OVER (PARTITION BY key ORDER BY rank, volume, part, row) AS place FROM rows) WHERE place = 1"
        )
        n_duplicates = self._count("rows") - self._count("kept")
        run("CREATE INDEX by_composition ON kept (composition, split)")
        n_unique = self._count("kept")
        if shared_compositions != "keep":
            for split, before in (("validation", "('test')"), ("train", "('test', 'validation')")):
                run(
                    f"DELETE FROM kept WHERE split = '{split}' AND composition IN"
                    f" (SELECT composition FROM kept WHERE split IN {before})"
                )
        n_shared = n_unique - self._count("kept")
        if n_shared and shared_compositions == "refuse":
            raise UserError(
                f"splits: {n_shared} rows share their composition with a row of another split. Drop them "
                "from the inputs, or set shared_compositions to drop or keep."
            )
        run("CREATE INDEX by_part ON kept (part, row)")
        return {"duplicate": n_duplicates, "shared_composition": n_shared}

    def kept(self, part: int) -> list[tuple[int, str]]:
        """Return (row, split) of the rows of a part that stay, in order."""
        return self._database.execute(
            "SELECT row, split FROM kept WHERE part = ? ORDER BY row", (part,)
        ).fetchall()

    def histogram(self, width: int) -> dict[int, int]:
        """Return how many kept rows have a number of tokens in [key, key + width)."""
        query = "SELECT n_tokens / ? * ?, count(*) FROM kept GROUP BY 1 ORDER BY 1"
        return dict(self._database.execute(query, (width, width)).fetchall())

    def _count(self, table: str) -> int:
        (n,) = self._database.execute(f"SELECT count(*) FROM {table}").fetchone()
        return int(n)


def shared_compositions(shards: Iterable[Path], work_file: Path) -> list[str]:
    """Return the compositions that stand in more than one split of a corpus: none, if it has no leak.

    Reads the shards alone (columns `composition` and `split`), whatever made them.

    Args:
        shards: Parquet files.
        work_file: A file to sort in; replaced, and removed afterwards.
    """
    work_file.unlink(missing_ok=True)
    database = sqlite3.connect(work_file)
    try:
        database.execute("PRAGMA journal_mode = off")
        database.execute("CREATE TABLE seen (composition TEXT, split TEXT, PRIMARY KEY (composition, split))")
        for pairs in _batches(shards):
            database.executemany("INSERT OR IGNORE INTO seen VALUES (?, ?)", pairs)
        found = database.execute("SELECT composition FROM seen GROUP BY 1 HAVING count(*) > 1 ORDER BY 1")
        return [composition for (composition,) in found]
    finally:
        database.close()
        work_file.unlink(missing_ok=True)


def _batches(shards: Iterable[Path]) -> Iterator[set[tuple[str, str]]]:
    for shard in shards:
        with pq.ParquetFile(shard) as file:
            for batch in file.iter_batches(columns=["composition", "split"]):
                yield set(zip(*(column.to_pylist() for column in batch.columns), strict=True))


def _key(key: str, part: int, row: int) -> bytes:
    return hashlib.blake2b((key or f"{part} {row}").encode(), digest_size=16).digest()
