"""A lasting index of known crystals: is this one among a million, and which one is it?

    index = NoveltyIndex.create("known")
    index.add(["mp-22862"], [reduced(rock_salt)])
    NoveltyIndex.open("known").find(reduced(sample), TOLERANCES["default"])   -> "mp-22862", or None

Contract: `find` returns the id of the first entry, in the order of adding, that StructureMatcher calls the
same as the form (the form is its first argument), None without one. Only entries of the form's reduced
formula and number of sites are looked at, and of those only what matcher/lattice_bounds.py cannot rule out;
so the answer is that of comparing with every entry.

A folder holds novelty-index.json (what it is, its version) and shards (shard.py), named by the
entries they hold: 000000000000-000000020000.shard. `add` writes one more and merges the last ones while they
are not larger than it, up to `MERGED_UP_TO` entries, so that many small additions stay few files. A shard
appears whole or not at all, and an old one goes only after the one that holds its entries is there: whenever
a writer is killed, what was added before is there. One writer at a time (the next one waits for its lock);
any number of readers, who see what was there when they opened or last called `refresh`. Entries are mapped,
not loaded: opening reads the headers only.

Not here: reading files into an index (reference_index.py), scores (scores.py).
"""

import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from pymatgen.core import Composition, Element

from crystallm_kit.errors import ReadError, UserError
from crystallm_kit.scores.matcher.structure_matcher import Reduced, Tolerances, fit
from crystallm_kit.scores.novelty.copies import select_possible
from crystallm_kit.scores.novelty.shard import (
    REBUILD,
    Shard,
    hash_of,
    merged,
    sections_of,
    system_of,
    write_shard,
)

HEADER = "novelty-index.json"
FORMAT, VERSION = "crystallm-kit novelty index", 1
MERGED_UP_TO = 2**18  # entries; about 100 MB of small cells, which a merge holds in memory
_NAME = re.compile(r"(\d{12})-(\d{12})\.shard")
_LOCK = "writer.lock"
_RETRIES = 20  # a writer may merge shards between our listing and our opening of them


class NoveltyIndex:
    """A folder of known crystals. Make one with `create` or `open`."""

    def __init__(self, folder: Path, shards: list[Shard]) -> None:
        self.folder = folder
        self._shards = shards

    @classmethod
    def create(cls, folder: str | Path) -> "NoveltyIndex":
        """Return a new, empty index in a folder that does not exist or is empty.

        Raises:
            UserError: If the folder holds anything.
        """
        path = Path(folder)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path}: not empty; open it if it is an index, or name another folder")
        path.mkdir(parents=True, exist_ok=True)
        partial = path / f".{HEADER}.partial"
        partial.write_text(json.dumps({"format": FORMAT, "version": VERSION}) + "\n", encoding="utf-8")
        partial.replace(path / HEADER)
        return cls(path, [])

    @classmethod
    def open(cls, folder: str | Path) -> "NoveltyIndex":
        """Return the index of a folder.

        Raises:
            ReadError: If it is none, of another version, or damaged; the message names the file.
        """
        path = Path(folder)
        _check_header(path)
        return cls(path, _open_shards(path))

    def __len__(self) -> int:
        return sum(shard.n for shard in self._shards)

    @property
    def meta(self) -> dict[str, Any]:
        """Return what the last `add` kept beside its entries; {} without one."""
        return dict(self._shards[-1].meta) if self._shards else {}

    def refresh(self) -> None:
        """See what others have added since."""
        self._shards = _open_shards(self.folder)

    def add(
        self,
        ids: Sequence[str],
        forms: Sequence[Reduced],
        *,
        cell_sites: Sequence[int] | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        """Append entries. When it returns they are on the disk.

        Args:
            ids: Of the entries; need not differ.
            forms: Reduced cells, in the order that `find` respects.
            cell_sites: Sites of the cells as given, for look-ups within equal cell formulas; None: as many as
                the reduced cells have.
            meta: JSON values to keep with them; `meta` returns those of the last addition.

        Raises:
            UserError: If the lengths differ, or an atomic number is none.
        """
        cells = [len(form.numbers) for form in forms] if cell_sites is None else cell_sites
        if not len(ids) == len(forms) == len(cells):
            raise UserError(
                f"novelty index: {len(ids)} ids, {len(forms)} forms, {len(cells)} cell sizes; "
                "pass as many of each"
            )
        if not ids:
            return
        if any(not 0 < int(form.numbers.min()) <= int(form.numbers.max()) < 256 for form in forms):
            raise UserError("novelty index: an atomic number is outside 1 to 255")
        with _writing(self.folder):
            self.refresh()
            parts, absorbed = [sections_of(ids, forms, cells)], []
            total, stop = len(ids), len(self) + len(ids)
            while self._shards and self._shards[-1].n <= total <= MERGED_UP_TO - self._shards[-1].n:
                shard = self._shards.pop()
                parts.insert(0, shard.sections)
                absorbed.append(shard.path)
                total += shard.n
            path = self.folder / f"{stop - total:012d}-{stop:012d}.shard"
            write_shard(path, merged(parts), meta or {})
            _sync_folder(self.folder)
            for old in absorbed:
                old.unlink(missing_ok=True)
            self.refresh()

    def find(
        self,
        form: Reduced,
        tolerances: Tolerances,
        *,
        cell_sites: int | None = None,
        form_is_second: bool = False,
    ) -> str | None:
        """Return the id of the first entry that is the same crystal; None: there is none.

        Args:
            form: The structure in question.
            tolerances: The matcher's.
            cell_sites: Look only at entries whose cells as given had so many sites (with the reduced formula:
                equal cell formulas, CrystaLLM's rule); None: at all.
            form_is_second: Make the form the matcher's second argument (matbench-genmetrics' order).
        """
        return next(self._matches(form, tolerances, cell_sites, form_is_second), None)

    def find_all(self, form: Reduced, tolerances: Tolerances, *, form_is_second: bool = False) -> list[str]:
        """Return the ids of all entries that are the same crystal, in the order of adding."""
        return list(self._matches(form, tolerances, None, form_is_second))

    def entries(self, formula: str) -> Iterator[tuple[str, Reduced]]:
        """Yield id and form of every entry of a reduced formula, in the order of adding."""
        for shard in self._shards:
            low, high = shard.range_of(formula)
            for row in (low + np.argsort(shard.sections["positions"][low:high])).tolist():
                found, n = np.unique(shard.numbers(row), return_counts=True)
                composition = Composition(dict(zip(map(Element.from_Z, found), n.tolist(), strict=True)))
                if composition.reduced_formula == formula:  # else two formulas of one hash
                    yield shard.id(row), shard.form(row, formula)

    def has_formula(self, formula: str) -> bool:
        """Tell whether any entry has this reduced formula."""
        ranges = (shard.range_of(formula) for shard in self._shards)
        return any(low < high for low, high in ranges)

    def has_system(self, numbers: Sequence[int]) -> bool:
        """Tell whether any entry has exactly these elements, given by atomic numbers."""
        key = hash_of(system_of(numbers))
        return any(shard.has_system(key) for shard in self._shards)

    def verify(self) -> None:
        """Read everything once. Raises ReadError, naming the file, if a checksum is another one."""
        for shard in self._shards:
            shard.verify()

    def _matches(
        self, form: Reduced, tolerances: Tolerances, cell_sites: int | None, form_is_second: bool
    ) -> Iterator[str]:
        counts = np.bincount(form.numbers)
        for shard in self._shards:
            low, high = shard.range_of(form.formula)
            chosen = shard.sections["sites"][low:high] == len(form.numbers)
            if cell_sites is not None:
                chosen &= shard.sections["cells"][low:high] == cell_sites
            rows = low + np.flatnonzero(chosen)
            rows = rows[select_possible(form, shard.sections["lattices"][rows], tolerances,
                                        form_is_second=form_is_second)]  # fmt: skip
            for row in rows.tolist():
                # equal hashes of different formulas: one pair in 1e19
                if not np.array_equal(np.bincount(shard.numbers(row)), counts):
                    continue
                other = shard.form(row, form.formula)
                first, second = (other, form) if form_is_second else (form, other)
                if fit(first, second, tolerances):
                    yield shard.id(row)


def _check_header(folder: Path) -> None:
    path = folder / HEADER
    if not folder.is_dir() or not path.is_file():
        raise ReadError(f"{folder}: no novelty index (no {HEADER} in it); make one with NoveltyIndex.create")
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
        stated = (header["format"], header["version"])
    except (ValueError, KeyError, TypeError) as error:
        raise ReadError(f"{path}: damaged: {error}; {REBUILD}") from error
    if stated[0] != FORMAT:
        raise ReadError(f"{path}: format '{stated[0]}', '{FORMAT}' expected; name another folder")
    if stated[1] != VERSION:
        raise ReadError(
            f"{path}: version {stated[1]}, {VERSION} expected; update crystallm-kit or build the index again"
        )


def _open_shards(folder: Path) -> list[Shard]:
    """Return the shards that hold all entries, each once."""
    for attempt in range(_RETRIES):
        names = _shard_names(folder)
        try:
            shards = [Shard(folder / name) for name in _cover(names)]
        except FileNotFoundError:
            shards = None
        if shards is not None and _shard_names(folder) == names:
            covered = sum(shard.n for shard in shards)
            if covered == max((_range(name)[1] for name in names), default=0):
                return shards
            raise ReadError(
                f"{folder}: shards with {covered} entries, {max(_range(name)[1] for name in names)} expected "
                f"({', '.join(_cover(names)) or 'none begins at 0'}); restore the missing file or {REBUILD}"
            )
        time.sleep(0.005 * attempt)
    raise ReadError(f"{folder}: its shards change faster than they can be opened; try again")


def _shard_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if _NAME.fullmatch(path.name))


def _range(name: str) -> tuple[int, int]:
    return int(name[:12]), int(name[13:25])


def _cover(names: Sequence[str]) -> list[str]:
    """Return the shards to read, up to the first gap: of two that hold the same entries the longer one."""
    chosen, end = [], 0
    for name in sorted(names, key=lambda one: (_range(one)[0], -_range(one)[1])):
        start, stop = _range(name)
        # One that ends before is merged already: its writer was stopped before it could remove it.
        if start == end and stop > end:
            chosen.append(name)
            end = stop
    return chosen


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, and clear what a killed writer left."""
    with FileLock(folder / _LOCK):
        for partial in folder.glob(".*.shard.partial"):
            partial.unlink(missing_ok=True)
        yield


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
