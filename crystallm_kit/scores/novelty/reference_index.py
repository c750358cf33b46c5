"""Files of known crystals -> a novelty index that is made once, and found again by the files' content.

    reference = reference_index(["mp_train.parquet", "wbm_train.parquet"], "references")
    reference.index.find(form, TOLERANCES["default"])      reference.failures    reference.was_there

Contract: every file that structures/files.py reads becomes part of the index, in the order given; an entry
that cannot be read, is a molecule, or has no cell to reduce is reported, and the rest goes on. The index of a
list of files is kept in a folder named by their content (SHA-256 of each, in order), so the same data under
another name or at another date is found, and changed data is not. A list that begins with files already
indexed grows that index instead of making another one. A run that was killed goes on where it was.

In `<folder>/<key>`: the index; sources.json, the files that are done, with what could not be read of each.

Not here: the index (index.py), reading (structures/files.py).
"""

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from filelock import FileLock
from pymatgen.core import Structure

from crystallm_kit.errors import ReadError, UserError
from crystallm_kit.records import Crystal
from crystallm_kit.scores.matcher.reduced_forms import batches, reduced_forms
from crystallm_kit.scores.novelty.index import NoveltyIndex
from crystallm_kit.structures.files import ReadFailure, read

log = logging.getLogger(__name__)

SOURCES = "sources.json"
_PER_ADDITION = 4096
_FEW = 512  # crystals for which processes cost more than they save
_KEY_LETTERS = 16


@dataclass(frozen=True, eq=False)
class Reference:
    """An index of known crystals, and how it came about.

    Attributes:
        index: Of all entries that could be read.
        failures: Entries that could not, in order.
        n_entries: Entries of the files, with the failures.
        was_there: Nothing had to be read.
    """

    index: NoveltyIndex
    failures: list[ReadFailure]
    n_entries: int
    was_there: bool


def reference_index(
    paths: Sequence[str | Path] | str | Path,
    folder: str | Path,
    *,
    processes: int | None = None,
    say: Callable[[str], None] | None = None,
) -> Reference:
    """Return the index of files of known crystals, made or grown if it is not there.

    Args:
        paths: Files or folders, as for structures.files.read.
        folder: Where indexes are kept.
        processes: For reducing; None: as many as there are usable cores.
        say: Told of progress.

    Raises:
        ReadError: If a file is not there or of no known kind, or nothing in it can be read.
        UserError: Without files.
    """
    given = [Path(paths)] if isinstance(paths, str | Path) else [Path(one) for one in paths]
    if not given:
        raise UserError("reference: no files; name at least one")
    hashes = [content_hash(path) for path in given]
    home = Path(folder)
    target = home / key_of(hashes)
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home / f"{target.name}.lock"):  # the next one who asks for this index finds it made
        if not target.exists():
            _begin(home, hashes, target)
        index, sources = NoveltyIndex.open(target), _read_sources(target)
        was_there = len(sources) == len(given)
        for path, content in list(zip(given, hashes, strict=True))[len(sources) :]:
            sources.append(_add_source(index, path, content, processes, say or (lambda _: None)))
            _write_sources(target, sources)
    failures = [ReadFailure(**one) for source in sources for one in source["failures"]]
    if not len(index):
        reason = f"; the first: {failures[0]}" if failures else ""
        raise ReadError(f"reference: none of {len(failures)} entries could be read{reason}")
    return Reference(index, failures, sum(source["n_entries"] for source in sources), was_there)


def content_hash(path: Path) -> str:
    """Return the SHA-256 of a file, or of a folder's files with their names below it.

    Raises:
        ReadError: If there is no such path.
    """
    if path.is_dir():
        parts = [
            f"{one.relative_to(path).as_posix()} {content_hash(one)}"
            for one in sorted(path.rglob("*"))
            if one.is_file()
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ReadError(f"{path}: {error.strerror or error}") from error


def key_of(hashes: Sequence[str]) -> str:
    """Return the name of the index of these contents, in this order."""
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()[:_KEY_LETTERS]


def _begin(home: Path, hashes: Sequence[str], target: Path) -> None:
    """Make an index: of what another one holds of the first of these contents, or an empty one.

    Shards never change, so the two may share them: they are linked, not copied, where the disk can do that.
    """
    with tempfile.TemporaryDirectory(dir=home, prefix=".begun-") as temporary:
        begun = Path(temporary) / "index"
        for n in range(len(hashes) - 1, 0, -1):
            shorter = home / key_of(hashes[:n])
            if shorter.exists() and len(_read_sources(shorter)) == n:
                begun.mkdir()
                with FileLock(home / f"{shorter.name}.lock"):
                    for path in shorter.iterdir():
                        if path.suffix in (".shard", ".json"):
                            _link(path, begun / path.name)
                break
        else:
            NoveltyIndex.create(begun)
        begun.rename(target)


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def _add_source(
    index: NoveltyIndex, path: Path, content: str, processes: int | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """Add what of a file is not yet there; return its line of sources.json."""
    unread: list[ReadFailure] = []
    there = index.meta if index.meta.get("source") == content else {}
    n, unreduced = int(there.get("n_crystals", 0)), list(there.get("unreduced", []))
    crystals = islice(
        (one for one in read(path, on_error=unread.append) if _is_crystal(one, path, unread)), n, None
    )
    head = list(islice(crystals, _FEW))
    workers = 1 if len(head) < _FEW else processes
    for batch in batches(_with_forms(chain(head, crystals), workers), _PER_ADDITION):
        n += len(batch)
        unreduced += [crystal.id for crystal, form in batch if form is None]
        good = [(crystal, form) for crystal, form in batch if form is not None]
        index.add(
            [crystal.id for crystal, _ in good],
            [form for _, form in good],
            cell_sites=[len(crystal.structure) for crystal, _ in good],
            meta={"source": content, "n_crystals": n, "unreduced": unreduced},
        )
        say(f"{path.name}: {n} crystals looked at, {len(unread) + len(unreduced)} entries left out")
    left_out = unread + [ReadFailure(str(path), one, "its cell cannot be reduced") for one in unreduced]
    n_entries = n + len(unread)
    if left_out:
        log.warning(
            "%s: %d of %d entries left out; the first: %s", path, len(left_out), n_entries, left_out[0]
        )
    failures = [asdict(one) for one in left_out]
    return {"file": str(path), "sha256": content, "n_entries": n_entries, "failures": failures}


def _with_forms(crystals: Iterator[Crystal], processes: int | None) -> Iterator[tuple[Crystal, Any]]:
    """Yield each crystal with its reduced form."""
    waiting: list[Crystal] = []

    def structures() -> Iterator[Structure | None]:
        for crystal in crystals:
            waiting.append(crystal)
            yield crystal.structure if isinstance(crystal.structure, Structure) else None

    for form in reduced_forms(structures(), processes=processes):
        yield waiting.pop(0), form


def _is_crystal(crystal: Crystal, path: Path, failures: list[ReadFailure]) -> bool:
    if isinstance(crystal.structure, Structure):
        return True
    failures.append(ReadFailure(str(path), crystal.id, "a molecule, no crystal"))
    return False


def _read_sources(folder: Path) -> list[dict[str, Any]]:
    path = folder / SOURCES
    if not path.is_file():
        return []
    try:
        sources = json.loads(path.read_text(encoding="utf-8"))["sources"]
        return [{key: one[key] for key in ("file", "sha256", "n_entries", "failures")} for one in sources]
    except (ValueError, KeyError, TypeError) as error:
        raise ReadError(f"{path}: damaged ({error}); delete {folder} to have it made again") from error


def _write_sources(folder: Path, sources: Sequence[dict[str, Any]]) -> None:
    partial = folder / f".{SOURCES}.partial"
    partial.write_text(json.dumps({"sources": sources}, indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / SOURCES)
