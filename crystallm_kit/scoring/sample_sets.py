"""Sample sets: what was generated, by whom, entry by entry, failures included.

    named_sets(["DiffCSP=DiffCSP_mp_20.pt", "crystals/"])
    -> [SampleSet("DiffCSP", ...), SampleSet("crystals", ...)]

A set is a path: anything that structures.files reads, or samples.jsonl as `generate` writes it (or the folder
that holds one), with its verdicts and what was asked. Each of its entries is one requested sample, in order;
one that cannot be read keeps its place and says why. Where more was requested than the file holds, the rest
counts as missing.

Not here: judging (stages.py).
"""

import gzip
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from pymatgen.core import Molecule, Structure

from crystallm_kit.errors import ReadError, UserError
from crystallm_kit.records import Verdict
from crystallm_kit.structures.entries import ReadFailure, entry_of_row, parse
from crystallm_kit.structures.files import read
from crystallm_kit.structures.sources import check_path, entries_of
from crystallm_kit.text.parsing import parse_completion
from crystallm_kit.text.representation import REPRESENTATIONS, representation

SAMPLES = "samples.jsonl"  # as in results.py, which stands above this room
_LINES = (".jsonl", ".jsonl.gz")
_BLOCK = 2**20


@dataclass(frozen=True)
class SampleSet:
    """Samples of one system.

    Attributes:
        name: Of the set, in tables.
        sources: Files or folders, read in this order.
        n_requested: The denominator; None: as many as there are entries.
        limit: So many entries are looked at; None: all.
    """

    name: str
    sources: tuple[Path, ...]
    n_requested: int | None = None
    limit: int | None = None


@dataclass(frozen=True)
class Incoming:
    """One requested sample as it comes.

    Attributes:
        id: Of the sample, as its file names it.
        structure: Ordered; None where there is none to judge.
        reason, detail: Why there is none.
        conditions: What was asked, as JSON; "" where that is not known.
        stated_spacegroup: Number that the text states.
        cif_text: The CIF that it was read from; "" where it was none.
        properties: What the file says of it.
    """

    id: str
    structure: Structure | None
    reason: str | None = None
    detail: str = ""
    conditions: str = ""
    stated_spacegroup: int | None = None
    cif_text: str = ""
    properties: dict[str, Any] = field(default_factory=dict)


def named_sets(
    samples: Sequence[str | Path], *, requested: Sequence[str] = (), limit: int | None = None
) -> list[SampleSet]:
    """Return the sets that NAME=PATH or PATH arguments name; without a name, a set has its file's.

    Args:
        samples: As on the command line.
        requested: "10000" for all sets or "NAME=10000" for one.
        limit: Entries of each set that are looked at.

    Raises:
        UserError: If nothing is given, two sets have the same name, or a number is none.
        ReadError: If a path is none that can be read.
    """
    if not samples:
        raise UserError("no samples: give a file or folder, or NAME=PATH, for each set")
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}: 1 or more expected")
    found: dict[str, Path] = {}
    for one in samples:
        name, path = _name_and_path(str(one))
        if name in found:
            raise UserError(f"two sets are called '{name}' ({found[name]}, {path}); name them: NAME=PATH")
        found[name] = path
    counts = _requested(requested, found)
    return [
        SampleSet(name, (_checked(path),), counts.get(name, counts.get("")), limit)
        for name, path in found.items()
    ]


def _name_and_path(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not equals or "/" in name or Path(text).exists():
        return Path(text).resolve().name.partition(".")[0] or text, Path(text)
    if not name or name.startswith("."):
        raise UserError(f"'{text}': a name before the = expected, without a leading point")
    return name, Path(path)


def _checked(path: Path) -> Path:
    inner = path / SAMPLES
    if inner.is_file():
        return inner
    if not path.name.lower().endswith(_LINES) or not path.is_file():
        check_path(path)
    return path


def _requested(texts: Sequence[str], names: dict[str, Path]) -> dict[str, int]:
    counts = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        if name and name not in names:
            raise UserError(f"--requested {text}: no set '{name}'; sets: {', '.join(names)}")
        if not number.isdigit() or not int(number):
            raise UserError(f"--requested {text}: a number of samples expected, such as 10000 or NAME=10000")
        counts[name] = int(number)
    return counts


def samples_of(sample_set: SampleSet, start: int = 0) -> Iterator[Incoming]:
    """Yield the entries of a set from the one at `start` on; those before are not parsed."""
    first = sample_set.sources[0]
    entries: Iterator[Incoming]
    if len(sample_set.sources) == 1 and first.name.lower().endswith(_LINES):
        entries = islice(_lines(first), start, None)
    else:
        entries = _entries(sample_set.sources, start)
    yield from entries if sample_set.limit is None else islice(entries, sample_set.limit - start)


def _entries(sources: Sequence[Path], start: int) -> Iterator[Incoming]:
    failures: list[ReadFailure] = []
    # walked a second time, for the texts: each entry comes out of `read` once, as a crystal or a failure
    entries = islice(entries_of(list(sources)), start, None)
    for crystal in read(list(sources), on_error=failures.append, allow_disordered=True, start=start):
        for failure in failures:
            next(entries)
            yield _unreadable(failure)
        failures.clear()
        entry = next(entries)
        text = entry.content if entry.kind == "cif" else ""
        yield incoming(crystal.id, crystal.structure, cif_text=text, properties=dict(crystal.properties))
    yield from (_unreadable(f) for f in failures)


def _unreadable(failure: ReadFailure) -> Incoming:
    return Incoming(failure.entry or Path(failure.file).name, None, "unreadable", failure.reason)


def incoming(
    id: str,
    structure: Structure | Molecule,
    *,
    conditions: str = "",
    stated_spacegroup: int | None = None,
    cif_text: str = "",
    properties: dict[str, Any] | None = None,
) -> Incoming:
    """Return a sample with a structure; what no crystal protocol can judge becomes its reason."""
    common: dict[str, Any] = {
        "conditions": conditions,
        "stated_spacegroup": stated_spacegroup,
        "cif_text": cif_text,
        "properties": properties or {},
    }
    if isinstance(structure, Molecule):
        return Incoming(id, None, "molecule", "no cell; crystals expected", **common)
    if not structure.is_ordered:
        return Incoming(id, None, "disordered", "a site is partly or mixedly occupied", **common)
    return Incoming(id, structure, **common)


# ---------------------------------------------------------------- samples.jsonl


def _lines(path: Path) -> Iterator[Incoming]:
    """Yield the samples of a file with a JSON object a line."""
    formats = list(REPRESENTATIONS)
    opened = gzip.open if path.name.lower().endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(line for line in lines if line.strip()):
            name = f"{path.name}:{number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                yield Incoming(name, None, "unreadable", f"no JSON: {error}")
                continue
            if not isinstance(row, dict):
                yield Incoming(name, None, "unreadable", f"a JSON {type(row).__name__}; an object expected")
                continue
            yield _line(row, name, formats)


def _line(row: dict[str, Any], name: str, formats: list[str]) -> Incoming:
    """Return the sample of a line; the format that reads its text moves to the front of `formats`."""
    identity = str(row.get("id", name))
    conditions = json.dumps(row["conditions"], sort_keys=True) if row.get("conditions") else ""
    if "text" not in row:
        entry = entry_of_row(row, file=name, entry="", default_id=name)
        try:
            structure = parse(entry)
        except ReadError as error:
            return Incoming(identity, None, "unreadable", str(error), conditions)
        if structure is None:
            return Incoming(identity, None, "unreadable", "no CIF as pymatgen writes it", conditions)
        return incoming(identity, structure, conditions=conditions, properties=dict(entry.properties))
    known: dict[str, Any] = {"log_probability": row.get("log_probability")}
    if "formula" in row and row["formula"] is None:
        reason, detail = str(row.get("reason") or "unreadable"), str(row.get("detail") or "")
        return Incoming(identity, None, reason, detail, conditions, properties=known)
    first: Verdict | None = None
    for form in list(formats):
        found = parse_completion(str(row["text"]), representation(form))
        if isinstance(found, Verdict):
            first = first or found
        elif row.get("formula") in (None, found.structure.composition.reduced_formula):
            formats.remove(form)
            formats.insert(0, form)
            stated = found.properties.get("spacegroup_number")
            return incoming(
                identity, found.structure, conditions=conditions, properties=known,
                stated_spacegroup=int(stated) if stated else None,
            )  # fmt: skip
    reason = first.reason if first is not None and first.reason else "unreadable"
    return Incoming(identity, None, reason, first.detail if first else "no known text format", conditions)


# ---------------------------------------------------------------- content


def content_hash(sources: Sequence[Path]) -> str:
    """Return a hash of what the files hold; names in a folder count, where it stands does not."""
    whole = hashlib.sha256()
    for source in sources:
        files = sorted(p for p in source.rglob("*") if p.is_file()) if source.is_dir() else [source]
        for file in files:
            whole.update(file.relative_to(source).as_posix().encode() if source.is_dir() else b"")
            with file.open("rb") as stream:
                while block := stream.read(_BLOCK):
                    whole.update(block)
            whole.update(b"\0")
    return whole.hexdigest()[:16]
