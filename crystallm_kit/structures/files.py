"""Files <-> crystals: one call reads whatever people bring, one call writes.

    for crystal in read("structures/"):  # or .cif .zip .tar.gz .extxyz .xyz POSCAR .json .csv .parquet .pt
        print(crystal.id, crystal.structure.formula, crystal.properties.get("band_gap_ev"))

Contract of `read`: crystals come in the order of the input, one at a time, so memory stays bounded (JSON and
.pt files are loaded whole); an entry that cannot be read is reported with file, entry and reason, and the
rest goes on; nothing is unpickled, nothing is extracted to disk, no text makes it hang. Structures keep the
order of their sites, lose oxidation states, and have fractional coordinates in [0, 1).

Where the work is done: CIFs in the layout of pymatgen's CifWriter, and all other formats, are read in this
process, at about the speed at which another one could hand the structures over; every other CIF goes to
pymatgen's parser in worker processes.

Not here: which files hold what (sources.py), what one entry means (entries.py), writing (writing.py).
"""

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

from pymatgen.core.structure import Molecule, Structure

from crystallm_kit.errors import ReadError
from crystallm_kit.records import Crystal
from crystallm_kit.structures.cif_pool import CifPool
from crystallm_kit.structures.entries import Entry, ReadFailure, crystal_of, parse
from crystallm_kit.structures.sources import check_path, entries_of
from crystallm_kit.structures.writing import write

__all__ = ["ReadFailure", "read", "write"]

log = logging.getLogger(__name__)

_WINDOW_PER_WORKER = 8  # entries read ahead: enough to keep workers busy, few enough to stay small
_REPORT_EVERY = 50  # entries between two updates of the progress line


def read(
    source: str | Path | Sequence[str | Path],
    *,
    workers: int | None = None,
    allow_disordered: bool = False,
    on_error: Callable[[ReadFailure], None] | None = None,
    progress: bool = False,
    timeout_seconds: float = 20.0,
    start: int = 0,
) -> Iterator[Crystal]:
    """Yield the crystals of a file, a folder, an archive, or several of them, in order.

    Args:
        source: A path, or a sequence of them. A folder is searched through, in the order of the names; files
            of no known kind in it are passed over.
        workers: Processes for CIFs that only pymatgen's parser reads; None: one per usable core.
        allow_disordered: Whether to yield structures with shared or partly empty sites.
        on_error: Gets each entry that could not be read; None: a warning in the log each, and their number at
            the end.
        progress: Whether to show counts and speed on standard error.
        timeout_seconds: For one CIF; then its worker is killed and the CIF counts as not readable.
        start: So many entries are passed over first, without being parsed.

    Returns:
        An iterator; closing it ends the workers.

    Raises:
        ReadError: At once, if a path does not exist, is empty, of no known kind, a pickle, or a git-LFS
            pointer; later, if the only source is damaged or holds no entries (one of several is reported).
    """
    paths = [Path(source)] if isinstance(source, str | Path) else [Path(one) for one in source]
    if not paths:
        raise ReadError("no files: an empty list was given")
    for path in paths:
        check_path(path)
    workers = workers or _usable_cores()
    return _read(paths, workers, allow_disordered, on_error, progress, timeout_seconds, start)


def _read(
    paths: list[Path],
    workers: int,
    allow_disordered: bool,
    on_error: Callable[[ReadFailure], None] | None,
    progress: bool,
    timeout_seconds: float,
    start: int,
) -> Iterator[Crystal]:
    report = on_error or (lambda failure: log.warning("not read: %s", failure))
    n_read = n_failed = 0
    with ExitStack() as stack:
        tell = stack.enter_context(_Progress()) if progress else None
        pool = stack.enter_context(CifPool(workers, timeout_seconds=timeout_seconds))
        entries = islice(entries_of(paths), start, None)
        for entry, outcome in _outcomes(entries, pool, workers * _WINDOW_PER_WORKER):
            try:
                if isinstance(outcome, ReadError):
                    raise outcome
                crystal = crystal_of(entry, outcome, allow_disordered=allow_disordered)
            except ReadError as error:
                n_failed += 1
                report(entry.failure(error))
            else:
                n_read += 1
                yield crystal
            if tell and (n_read + n_failed) % _REPORT_EVERY == 0:
                tell(n_read, n_failed)
        if tell:
            tell(n_read, n_failed)
    if n_failed and on_error is None:
        log.warning("%d of %d entries could not be read", n_failed, n_failed + n_read)


_Outcome = Structure | Molecule | ReadError


def _outcomes(entries: Iterator[Entry], pool: CifPool, window: int) -> Iterator[tuple[Entry, _Outcome]]:
    """Yield each entry with its structure or error, in order; at most `window` entries wait."""
    waiting: deque[tuple[Entry, _Outcome | Future[Structure]]] = deque()
    for entry in entries:
        try:
            found: _Outcome | Future[Structure] = parse(entry) or pool.submit(entry.content)
        except ReadError as error:
            found = error
        waiting.append((entry, found))
        while waiting and (len(waiting) >= window or _is_done(waiting[0][1])):
            yield _settled(*waiting.popleft())
    while waiting:
        yield _settled(*waiting.popleft())


def _is_done(found: _Outcome | Future[Structure]) -> bool:
    return not isinstance(found, Future) or found.done()


def _settled(entry: Entry, found: _Outcome | Future[Structure]) -> tuple[Entry, _Outcome]:
    if not isinstance(found, Future):
        return entry, found
    try:
        return entry, found.result()
    except ReadError as error:
        return entry, error


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Progress:
    """A line on standard error: crystals read, failures, time."""

    def __enter__(self) -> Callable[[int, int], None]:
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        self._shown = Progress(*columns, console=Console(stderr=True))
        self._shown.start()
        task = self._shown.add_task("reading")

        def tell(n_read: int, n_failed: int) -> None:
            seconds = self._shown.tasks[0].elapsed or 0.0
            speed = f", {(n_read + n_failed) / seconds:,.0f}/s" if seconds > 0 else ""
            failed = f", {n_failed:,} not readable" if n_failed else ""
            self._shown.update(task, description=f"read {n_read:,} crystals{failed}{speed}")

        return tell

    def __exit__(self, *_: object) -> None:
        self._shown.stop()
