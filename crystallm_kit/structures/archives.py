"""Members of zip and tar archives, one at a time, in memory: nothing is ever extracted to disk.

    for name, stream in members_of_zip(path): ...      # "run1/NaCl.cif", a binary stream

Contract: a member's name is only a label, so "../../etc/passwd" or an absolute path does no harm; links and
devices are passed over; a member that unpacks to more than its kind allows is refused by whoever reads it
(`read_bounded`). Members come in the archive's order.

Not here: which members are structures (files.py).
"""

import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from crystallm_kit.errors import ReadError

LARGEST_TEXT = 64 * 2**20  # bytes of one CIF, POSCAR or JSON member when unpacked
DAMAGE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    OSError,
    NotImplementedError,
)


def members_of_zip(path: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield name and stream of each file in a zip archive.

    Raises:
        ReadError: If a member is encrypted or packed in a way that Python does not know.
    """
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.is_dir() or is_hidden(member.filename):
                continue
            if member.flag_bits & 1:
                raise ReadError(f"'{member.filename}' is encrypted")
            with archive.open(member) as stream:
                yield member.filename, stream


def members_of_tar(path: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield name and stream of each regular file in a tar archive, compressed or not."""
    with tarfile.open(path) as archive:
        while member := archive.next():
            # It keeps every header that it has read, which for millions of files is gigabytes.
            archive.members.clear()  # type: ignore[attr-defined]
            stream = archive.extractfile(member) if member.isfile() else None
            if stream is not None and not is_hidden(member.name):
                yield member.name, stream


def read_bounded(stream: IO[bytes], limit: int = LARGEST_TEXT) -> str:
    """Return the text of a stream.

    Raises:
        ReadError: If it is longer than `limit` bytes, which one structure's file never is, or no UTF-8 text.
    """
    held = stream.read(limit + 1)
    if len(held) > limit:
        raise ReadError(f"more than {limit // 2**20} MiB when unpacked, too long for such a file")
    try:
        return held.decode("utf-8-sig")
    except UnicodeDecodeError:
        if b"\0" in held:
            raise ReadError("no text: it holds zero bytes") from None
        return held.decode("latin-1")  # author names in old CIFs


def is_hidden(name: str) -> bool:
    """Return whether a member or path is hidden, or one of the shadow files of macOS."""
    return any(
        part.startswith((".", "__MACOSX")) and part not in (".", "..") for part in PurePosixPath(name).parts
    )
