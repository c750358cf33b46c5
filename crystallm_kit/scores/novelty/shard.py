"""One file of a novelty index: reduced forms in the order that a look-up needs, mapped, never loaded.

    000000000000-000000020000.shard    the entries 0 to 19,999 of the index

    bytes   what
    8       CKNVLTY1
    8       length of the header, little-endian
    4       CRC-32 of the header
    ...     header, JSON: {"n": 20000, "size": 9000000, "meta": {...}, "sections": {name: [offset, type,
            shape, CRC-32]}}
    ...     the sections, each beginning at a multiple of 64

Entries stand sorted by the hash of their reduced formula, then by number of sites, then by the order in
which they were added, so those that can match one form lie together. Sections: keys (n,) hashes of the
formulas; sites (n,) of the reduced cells; cells (n,) sites of the cells as given; positions (n,) in the order
of adding; lattices (n, 3, 3) angstrom; starts (n + 1,) of atoms and coordinates; numbers and fractional, one
after the other; id_starts (n + 1,) and ids (UTF-8); systems, sorted hashes of the chemical systems.

Numbers are kept as they came (float64), so that decisions are those on the structures themselves.

Not here: folders, adding, looking up (index.py).
"""

import json
import mmap
import os
import zlib
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crystallm_kit.errors import ReadError
from crystallm_kit.scores.matcher.structure_matcher import Reduced

MAGIC = b"CKNVLTY1"
_ALIGNMENT = 64
REBUILD = "delete the folder and build the index again"
_PREFIX = 20  # magic, length, checksum
_TYPES = {
    "keys": "<u8", "sites": "<u4", "cells": "<u4", "positions": "<u4", "lattices": "<f8", "starts": "<u8",
    "numbers": "|u1", "fractional": "<f8", "id_starts": "<u8", "ids": "|u1", "systems": "<u8",
}  # fmt: skip
Sections = dict[str, NDArray[Any]]


def hash_of(text: str) -> int:
    """Return a 64-bit hash that is the same in every process and version."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def system_of(numbers: Sequence[int] | NDArray[Any]) -> str:
    """Return the chemical system's name in the index: its atomic numbers, "8-26"."""
    return "-".join(str(int(z)) for z in np.unique(np.asarray(numbers)))


def sections_of(ids: Sequence[str], forms: Sequence[Reduced], cells: Sequence[int]) -> Sections:
    """Return the sections of a shard of at least one form.

    Args:
        ids: One for each form.
        forms: In the order of adding.
        cells: Sites of the cells that the forms were reduced from.
    """
    encoded = [identity.encode() for identity in ids]
    made: Sections = {
        "keys": np.array([hash_of(form.formula) for form in forms], dtype="<u8"),
        "sites": np.array([len(form.numbers) for form in forms], dtype="<u4"),
        "cells": np.array(cells, dtype="<u4"),
        "positions": np.arange(len(forms), dtype="<u4"),
        "lattices": np.array([form.lattice for form in forms], dtype="<f8"),
        "starts": _starts([len(form.numbers) for form in forms]),
        "numbers": np.concatenate([form.numbers for form in forms]).astype("|u1"),
        "fractional": np.concatenate([form.fractional for form in forms]).astype("<f8"),
        "id_starts": _starts([len(one) for one in encoded]),
        "ids": np.frombuffer(b"".join(encoded), dtype="|u1"),
        "systems": np.unique(
            np.array([hash_of(s) for s in {system_of(form.numbers) for form in forms}], dtype="<u8")
        ),
    }
    return _sorted(made)


def merged(shards: Sequence[Sections]) -> Sections:
    """Return the sections of shards that follow one another as those of one."""
    ends = np.cumsum([0, *(len(shard["keys"]) for shard in shards)])
    joined: Sections = {
        name: np.concatenate([shard[name] for shard in shards])
        for name in ("keys", "sites", "cells", "lattices", "numbers", "fractional", "ids")
    }
    joined["positions"] = np.concatenate(
        [shard["positions"] + np.uint32(end) for shard, end in zip(shards, ends, strict=False)]
    )
    joined["starts"] = _starts(joined["sites"])
    joined["id_starts"] = _starts(np.concatenate([np.diff(shard["id_starts"]) for shard in shards]))
    joined["systems"] = np.unique(np.concatenate([shard["systems"] for shard in shards]))
    return _sorted(joined)


def write_shard(path: Path, sections: Sections, meta: Mapping[str, Any]) -> None:
    """Write a shard whole, under another name first; after a crash it is there or it is not."""
    offset, table, blocks = 0, {}, []
    for name, kind in _TYPES.items():
        array = np.ascontiguousarray(sections[name], dtype=kind)
        block = array.tobytes()
        table[name] = [offset, kind, list(array.shape), zlib.crc32(block)]
        blocks.append(block + bytes(-len(block) % _ALIGNMENT))
        offset += len(blocks[-1])
    header = json.dumps({"n": len(sections["keys"]), "size": offset, "meta": dict(meta), "sections": table})
    encoded = header.encode()
    encoded += b" " * (-(_PREFIX + len(encoded)) % _ALIGNMENT)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(MAGIC + len(encoded).to_bytes(8, "little") + zlib.crc32(encoded).to_bytes(4, "little"))
        file.write(encoded)
        for block in blocks:
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


class Shard:
    """A shard's sections, mapped."""

    def __init__(self, path: Path) -> None:
        """Map a file.

        Raises:
            ReadError: If it is no whole shard.
        """
        self.path = path
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(_PREFIX)
            length = int.from_bytes(prefix[8:16], "little")
            if prefix[:8] != MAGIC or length > size:
                raise ReadError(f"{path}: no shard of a novelty index (it begins {prefix[:8]!r})")
            header = file.read(length)
            if zlib.crc32(header) != int.from_bytes(prefix[16:20], "little"):
                raise ReadError(f"{path}: damaged: the header's checksum is another one; {REBUILD}")
            self._header: dict[str, Any] = json.loads(header)
            expected = _PREFIX + length + self._header["size"]
            if size != expected:
                raise ReadError(f"{path}: damaged: {size} bytes, {expected} expected; {REBUILD}")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._data = _PREFIX + length
        self.n: int = self._header["n"]
        self.meta: dict[str, Any] = self._header["meta"]
        self.sections: Sections = {name: self._section(name) for name in _TYPES}

    def range_of(self, formula: str) -> tuple[int, int]:
        """Return the rows of a reduced formula, from and up to."""
        keys, key = self.sections["keys"], np.uint64(hash_of(formula))
        low = int(np.searchsorted(keys, key, side="left"))
        return low, low + int(np.searchsorted(keys[low:], key, side="right"))

    def form(self, row: int, formula: str) -> Reduced:
        """Return the form of a row, whose formula the caller knows."""
        atoms = slice(int(self.sections["starts"][row]), int(self.sections["starts"][row + 1]))
        return Reduced(
            formula,
            self.sections["numbers"][atoms].astype(np.int16),
            self.sections["lattices"][row],
            self.sections["fractional"][atoms],
        )

    def numbers(self, row: int) -> NDArray[Any]:
        """Return the atomic numbers of a row."""
        starts = self.sections["starts"]
        return self.sections["numbers"][int(starts[row]) : int(starts[row + 1])]

    def id(self, row: int) -> str:
        """Return the id of a row."""
        starts = self.sections["id_starts"]
        return bytes(self.sections["ids"][int(starts[row]) : int(starts[row + 1])]).decode()

    def has_system(self, key: int) -> bool:
        """Tell whether a chemical system's hash is here."""
        systems = self.sections["systems"]
        place = int(np.searchsorted(systems, np.uint64(key)))
        return place < len(systems) and int(systems[place]) == key

    def verify(self) -> None:
        """Read everything once. Raises ReadError if a section's checksum is another one."""
        for name, (_, _, _, checksum) in self._header["sections"].items():
            if zlib.crc32(np.ascontiguousarray(self.sections[name]).tobytes()) != checksum:
                raise ReadError(f"{self.path}: damaged: section '{name}' has another checksum; {REBUILD}")

    def _section(self, name: str) -> NDArray[Any]:
        offset, kind, shape, _ = self._header["sections"][name]
        count = int(np.prod(shape))
        if not count:
            return np.zeros(shape, dtype=kind)
        array = np.frombuffer(self._map, dtype=kind, count=count, offset=self._data + offset)
        return array.reshape(shape)


def _starts(counts: Sequence[int] | NDArray[Any]) -> NDArray[np.uint64]:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.uint64)]).astype("<u8")


def _sorted(sections: Sections) -> Sections:
    """Return sections with the entries sorted by formula, number of sites, order of adding."""
    order = np.lexsort((sections["positions"], sections["sites"], sections["keys"]))
    atoms = _gathered(sections["starts"], order)
    letters = _gathered(sections["id_starts"], order)
    return {
        "keys": sections["keys"][order],
        "sites": sections["sites"][order],
        "cells": sections["cells"][order],
        "positions": sections["positions"][order],
        "lattices": sections["lattices"][order],
        "starts": _starts(sections["sites"][order]),
        "numbers": sections["numbers"][atoms],
        "fractional": sections["fractional"][atoms],
        "id_starts": _starts(np.diff(sections["id_starts"])[order]),
        "ids": sections["ids"][letters],
        "systems": sections["systems"],
    }


def _gathered(starts: NDArray[Any], order: NDArray[np.intp]) -> NDArray[np.int64]:
    """Return where the items of ragged rows lie, row after row in a new order."""
    begins = starts[:-1].astype(np.int64)[order]
    counts = (starts[1:].astype(np.int64) - starts[:-1].astype(np.int64))[order]
    ends = np.cumsum(counts)
    shifts: NDArray[np.int64] = np.repeat(begins - (ends - counts), counts)
    return shifts + np.arange(int(ends[-1]))
