"""A template library on disk, made once for the same files.

    library = load_templates(["mp_train.parquet", "wbm_train.parquet"])     # a minute; afterwards a second

What was learned lies in the user's cache folder under the hash of the files' bytes, so that it is made anew
when a file changes, and never otherwise. Arrays only (npz): nothing is unpickled. A damaged file there is
made anew.

Not here: what is learned (templates.py).
"""

import hashlib
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np

from crystallm_kit.errors import UserError
from crystallm_kit.structures.entries import ReadFailure
from crystallm_kit.structures.files import read
from crystallm_kit.structures.likeness import Likeness
from crystallm_kit.structures.templates import Rows, TemplateLibrary, learn_templates

_LAYOUT = "templates-2"  # of what is kept, and how it is learned: files of another are not read
_BLOCK_BYTES = 1 << 20


def load_templates(
    files: str | Path | Sequence[str | Path],
    *,
    cache_folder: Path | None = None,
    on_error: Callable[[ReadFailure], None] | None = None,
) -> TemplateLibrary:
    """Return the library of some files of crystals, from the cache if it is there.

    Args:
        files: As `structures.files.read` takes them; folders are read, but not kept in the cache.
        cache_folder: None: crystallm-kit in XDG_CACHE_HOME or ~/.cache.
        on_error: Gets each entry that could not be read.

    Raises:
        UserError: If no files are given.
        ReadError: If a file is missing or none of it can be read.
        EmptyInput: If no crystal is in them.
    """
    paths = [Path(files)] if isinstance(files, str | Path) else [Path(file) for file in files]
    if not paths:
        raise UserError(
            "templates: no library; give files of known crystals, such as --library mp_train.parquet"
        )
    crystals = read(paths, on_error=on_error)  # says which path is wrong, before anything is hashed
    if not all(path.is_file() for path in paths):
        return learn_templates(crystals)
    folder = (
        cache_folder or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "crystallm-kit"
    )
    kept = folder / f"templates-{_hash_of(paths)}.npz"
    if kept.is_file():
        try:
            return read_library(kept)
        except (ValueError, KeyError, OSError, zipfile.BadZipFile):
            kept.unlink(missing_ok=True)
    library = learn_templates(crystals)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_library(library, kept)
    except OSError:  # a folder that cannot be written costs time, not the library
        return library
    return library


def _hash_of(paths: Sequence[Path]) -> str:
    total = hashlib.sha256(_LAYOUT.encode())
    for path in paths:
        one = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                one.update(block)
        total.update(path.suffix.encode() + one.digest())
    return total.hexdigest()[:32]


def write_library(library: TemplateLibrary, path: Path) -> None:
    """Write a library to an .npz file, whole or not at all."""
    writing = path.with_name(f".{path.name}.{os.getpid()}.writing")
    sizes = np.array([len(counts) for counts in library.counts])
    with writing.open("wb") as file:
        np.savez(
            file,
            layout=np.array(_LAYOUT),
            ids=np.array(library.ids),
            counts=np.array([n for counts in library.counts for n in counts]),
            sizes=sizes,
            starts=library.starts,
            points=library.likeness.points,
            volumes=library.volumes_angstrom3,
            **{one.name: getattr(library.rows, one.name) for one in fields(Rows)},
        )
    writing.replace(path)


def read_library(path: Path) -> TemplateLibrary:
    """Return the library of a file. Raises ValueError, KeyError, OSError or BadZipFile if it is none."""
    # opened here: numpy leaves a damaged file open
    with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
        data = {name: stored[name] for name in stored.files}
    if str(data["layout"]) != _LAYOUT:
        raise ValueError(f"{path}: layout {data['layout']}, expected {_LAYOUT}")
    counts = np.split(data["counts"], np.cumsum(data["sizes"])[:-1])
    return TemplateLibrary(
        ids=tuple(data["ids"].tolist()),
        counts=tuple(tuple(one.tolist()) for one in counts),
        starts=data["starts"],
        rows=Rows(**{one.name: data[one.name] for one in fields(Rows)}),
        likeness=Likeness(data["points"]),
        volumes_angstrom3=data["volumes"],
    )
