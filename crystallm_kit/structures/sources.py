"""Paths -> entries: folders, archives, and files of every kind that is read, walked in order.

    entries_of([Path("runs/")]) -> Entry(file="runs/a.zip", entry="NaCl.cif", id="NaCl", kind="cif", ...), ...

Contract: one member, row or frame is in memory at a time (JSON and .pt files whole). A damaged file among
several ends as one entry that says so; a damaged only file raises.

Not here: tables.py, tensors.py, archives.py and extended_xyz.py read their formats; entries.py parses.
"""

import gzip
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any, TextIO, cast

from crystallm_kit.errors import ReadError
from crystallm_kit.structures import extended_xyz
from crystallm_kit.structures.archives import (
    DAMAGE,
    LARGEST_TEXT,
    is_hidden,
    members_of_tar,
    members_of_zip,
    read_bounded,
)
from crystallm_kit.structures.entries import Entry, entry_of_row
from crystallm_kit.structures.properties import named_properties, take_id
from crystallm_kit.structures.tables import entries_of_csv, entries_of_parquet
from crystallm_kit.structures.tensors import entries_of_tensors

_KINDS = {
    ".cif": "cif",
    ".extxyz": "xyz",
    ".xyz": "xyz",
    ".vasp": "poscar",
    ".poscar": "poscar",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".pt": "tensors",
    ".zip": "zip",
}
_TAR = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_PICKLES = (".pkl", ".pickle", ".pkl.gz", ".pickle.gz", ".joblib", ".npy", ".npz")
_KNOWN = f"a folder, {', '.join((*_KINDS, *_TAR))}, POSCAR*, CONTCAR*; text formats also with .gz"
_LARGEST_JSON = 4 * 2**30  # bytes
_LFS = "version https://git-lfs.github.com/spec/"
_IS_LFS = "a git-LFS pointer, not the file itself. Run `git lfs pull` where it came from"


def entries_of(paths: list[Path]) -> Iterator[Entry]:
    """Yield the entries of all sources; a damaged one raises if it is the only one."""
    for path in paths:
        if path.is_dir():
            yield from _entries_of_folder(path)
        elif len(paths) > 1:
            yield from _or_fault(_entries_of_file(path, path.name), file=str(path))
        else:
            try:
                yield from _entries_of_file(path, path.name)
            except ReadError as error:
                raise ReadError(f"{path}: {error}") from error


def _entries_of_folder(folder: Path) -> Iterator[Entry]:
    n_files = 0
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if is_hidden(name) or not path.is_file() or kind_of(name) is None:
            continue
        n_files += 1
        yield from _or_fault(_checked_entries_of_file(path, name), file=str(path))
    if not n_files:
        raise ReadError(f"{folder}: no file of a known kind in this folder. Known: {_KNOWN}.")


def _checked_entries_of_file(path: Path, name: str) -> Iterator[Entry]:
    fault = _fault_of(path)
    if fault:
        raise ReadError(fault)
    yield from _entries_of_file(path, name)


def _or_fault(entries: Iterator[Entry], *, file: str, entry: str = "") -> Iterator[Entry]:
    """Yield the entries and, where they break off, what broke them as one more."""
    try:
        yield from entries
    except ReadError as error:
        yield Entry(file, entry, entry or Path(file).name, "fault", str(error))


def _entries_of_file(path: Path, name: str) -> Iterator[Entry]:
    """Yield the entries of one file called `name` in its source.

    Raises:
        ReadError: If the file is damaged or holds none; without the file's name.
    """
    kind = kind_of(name)
    if kind == "zip":
        entries = _entries_of_members(members_of_zip(path), str(path))
    elif kind == "tar":
        entries = _entries_of_members(members_of_tar(path), str(path))
    elif kind == "parquet":
        entries = entries_of_parquet(path, file=str(path))
    elif kind == "tensors":
        entries = entries_of_tensors(path, file=str(path))
    else:
        entries = _entries_of_text_file(path, name)
    n_entries = 0
    try:
        for entry in entries:
            n_entries += 1
            yield entry
    except DAMAGE as error:
        raise ReadError(f"damaged after {n_entries} entries: {error}") from error
    if not n_entries:
        raise ReadError("no entries in it")


def _entries_of_text_file(path: Path, name: str) -> Iterator[Entry]:
    with path.open("rb") as stream:
        largest = _LARGEST_JSON if kind_of(name) == "json" else LARGEST_TEXT
        yield from _entries_of_stream(stream, name, file=str(path), prefix="", largest=largest)


def _entries_of_members(members: Iterator[tuple[str, IO[bytes]]], file: str) -> Iterator[Entry]:
    n_files = n_known = 0
    for name, stream in members:
        n_files += 1
        kind = kind_of(name)
        if kind in ("zip", "tar", "parquet", "tensors", "pickle"):
            reason = f"a {kind} file inside an archive is not read; unpack it first"
            yield Entry(file, name, name, "fault", reason)
        elif kind is not None:
            inner = _entries_of_stream(stream, name, file=file, prefix=name, largest=LARGEST_TEXT)
            yield from _or_fault(inner, file=file, entry=name)
        n_known += kind is not None
    if not n_known:
        raise ReadError(f"an archive of {n_files} files, none of a known kind. Known: {_KNOWN}.")


def _entries_of_stream(
    stream: IO[bytes], name: str, *, file: str, prefix: str, largest: int
) -> Iterator[Entry]:
    """Yield the entries of one file of text, from disk or an archive.

    Args:
        stream: Its bytes, gzipped if the name says so.
        name: Decides the kind, and names crystals that have no id.
        file: For reports.
        prefix: The member's name for reports; "" for a file on disk.
        largest: Bytes of a CIF, POSCAR or JSON text.
    """
    if name.lower().endswith(".gz"):
        stream = cast("IO[bytes]", gzip.GzipFile(fileobj=stream))
    kind, base = kind_of(name), _without_suffix(name)
    if kind in ("csv", "xyz"):
        with io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace", newline="") as lines:
            rows = entries_of_csv(lines, file=file) if kind == "csv" else _entries_of_xyz(lines, name, file)
            for one in rows:
                yield one if not prefix else _below(prefix, one)
        return
    text = read_bounded(stream, largest)
    if not text.strip():
        raise ReadError("an empty file")
    if text.startswith(_LFS):
        raise ReadError(_IS_LFS)
    if kind == "json":
        yield from (_below(prefix, one) for one in _entries_of_json(text, name, file))
    elif kind == "cif":
        yield from (_below(prefix, one) for one in _entries_of_cif(text, base, file))
    else:
        yield Entry(file, prefix, base, "poscar", text)


def _below(prefix: str, entry: Entry) -> Entry:
    """Return an entry of an archive's member, named so in reports."""
    if not prefix:
        return entry
    where = f"{prefix}: {entry.entry}" if entry.entry else prefix
    return Entry(entry.file, where, entry.id, entry.kind, entry.content, entry.properties)


def _entries_of_cif(text: str, base: str, file: str) -> Iterator[Entry]:
    """Yield one entry, or one per data block where several blocks hold a crystal each."""
    starts = [match.start() for match in re.finditer(r"^data_", text, flags=re.MULTILINE)]
    blocks = [text[start:end] for start, end in zip(starts, [*starts[1:], None], strict=True)]
    whole = [block for block in blocks if "_cell_length_a" in block and "_atom_site_fract_x" in block]
    if len(whole) < 2:
        yield Entry(file, "", base, "cif", text)
        return
    for number, block in enumerate(whole):
        title = block.split(maxsplit=1)[0].removeprefix("data_")
        yield Entry(file, f"block {number} ({title})", f"{base}:{number}", "cif", block)


def _entries_of_xyz(lines: TextIO, name: str, file: str) -> Iterator[Entry]:
    frames = enumerate(extended_xyz.frames(lines))
    for number, frame in frames:
        labels: dict[str, Any] = dict(extended_xyz.labels_of(frame))
        identity = take_id(labels, f"{name}:{number}")
        properties = named_properties(labels)
        yield Entry(file, f"frame {number}", identity, "frame", frame, properties)


def _entries_of_json(text: str, name: str, file: str) -> Iterator[Entry]:
    try:
        held = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ReadError(f"no JSON: {error}") from error
    named: Iterable[tuple[str, str, Any]]
    if isinstance(held, list):
        named = ((f"{name}:{i}", f"item {i}", one) for i, one in enumerate(held))
    elif not isinstance(held, dict):
        raise ReadError(f"a JSON {type(held).__name__}; a structure, a list or an object of them expected")
    elif "sites" in held:
        named = [(_without_suffix(name), "", held)]
    elif {"columns", "data"} <= held.keys():  # pandas' orient="split", the form of the matbench files
        named = (
            (f"{name}:{i}", f"row {i}", dict(zip(held["columns"], row, strict=False)))
            for i, row in enumerate(held["data"])
        )
    else:
        named = ((key, f"'{key}'", one) for key, one in held.items())
    for default_id, entry, one in named:
        yield _entry_of_json(one, file=file, entry=entry, default_id=default_id)


def _entry_of_json(one: Any, *, file: str, entry: str, default_id: str) -> Entry:
    if isinstance(one, str):
        return Entry(file, entry, default_id, "cif", one)
    if not isinstance(one, Mapping):
        return Entry(file, entry, default_id, "fault", f"a JSON {type(one).__name__}; a structure expected")
    if "sites" not in one:
        return entry_of_row(one, file=file, entry=entry, default_id=default_id)
    known = dict(one.get("properties") or {})
    identity = take_id(known, default_id)
    return Entry(file, entry, identity, "pymatgen", one, named_properties(known))


def kind_of(name: str) -> str | None:
    """Return what a file's name says it is ("cif", "xyz", ..., "pickle"), or None."""
    lower = PurePosixPath(name).name.lower()
    if lower.endswith(_PICKLES):
        return "pickle"
    if lower.endswith(_TAR):
        return "tar"
    plain = lower.removesuffix(".gz")
    kind = _KINDS.get(PurePosixPath(plain).suffix)
    if kind in ("parquet", "tensors", "zip") and plain != lower:
        return None
    return kind or ("poscar" if plain.startswith(("poscar", "contcar")) else None)


def _without_suffix(name: str) -> str:
    """Return a file's name without what only says its kind: "a/NaCl.cif.gz" -> "a/NaCl"."""
    plain = name.removesuffix(".gz")
    suffix = PurePosixPath(plain).suffix
    return plain.removesuffix(suffix) if suffix.lower() in _KINDS else plain


def check_path(path: Path) -> None:
    """Refuse a path that certainly cannot be read.

    Raises:
        ReadError: If it does not exist, is of no known kind, a pickle, empty, or a git-LFS pointer.
    """
    if path.is_dir():
        return
    if not path.exists():
        raise ReadError(f"{path}: no such file or folder")
    kind = kind_of(path.name)
    if kind == "pickle":
        raise ReadError(
            f"{path}: a pickle runs whatever code it holds when it is read, so it never is. "
            "Where you trust it, save its structures as Parquet, CSV or JSON and read those"
        )
    if kind is None:
        raise ReadError(f"{path}: no structures are known by this suffix. Known: {_KNOWN}.")
    fault = _fault_of(path)
    if fault:
        raise ReadError(f"{path}: {fault}")


def _fault_of(path: Path) -> str:
    """Return what is wrong with a file at first sight, or ""."""
    if kind_of(path.name) == "pickle":
        return "a pickle runs whatever code it holds when it is read, so it never is"
    try:
        with path.open("rb") as stream:
            start = stream.read(len(_LFS))
    except OSError as error:
        return f"cannot be opened: {error.strerror}"
    if not start:
        return "an empty file"
    return _IS_LFS if start == _LFS.encode() else ""
