"""Entries of files -> encoded parts on disk: the work of preparing a corpus that is spread over processes.

    encode_part(PartTask(number=17, entries=[...], folder="out/.parts", ...))
    -> out/.parts/part-00017.parquet (a row a crystal), out/.parts/part-00017.json (what was dropped, and why)

A part depends on its entries and the recipe alone. The .json file is written last and holds the hash of both:
a part whose .json names the same hash is finished, whatever happened since, and is not made again.

Not here: which parts there are, duplicates, splits (corpus.py).
"""

import hashlib
import json
import os
import pickle
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from crystallm_kit.errors import UserError
from crystallm_kit.recipes import from_dict, recipe_to_dict
from crystallm_kit.structures.cif_pool import CifPool
from crystallm_kit.structures.entries import Entry, crystal_of, parse
from crystallm_kit.tokens.encoding import CrystalEncoder, EncodedCrystal, EncodingRecipe
from crystallm_kit.tokens.tokenizer import tokenizer_sha256

CIF_TIMEOUT_SECONDS = 20.0


@dataclass(frozen=True)
class PartTask:
    """One part to encode; small enough to be sent to another process or machine.

    Attributes:
        number: Of the part.
        entries: Not yet parsed.
        folder: Where parts are written; on several machines a shared one.
        recipe: EncodingRecipe as plain mappings.
        seed: Of the encoding.
        max_tokens: Longer crystals are dropped.
        split: Split that the entries were given for, "" if none.
        sha256: Of entries and recipe.
        tokenizer_folder: Of a base model's tokenizer; "" for the format's own.
    """

    number: int
    entries: tuple[Entry, ...]
    folder: str
    recipe: dict[str, Any]
    seed: int
    max_tokens: int
    split: str
    sha256: str
    tokenizer_folder: str = ""


@dataclass(frozen=True)
class PartReport:
    """What became of the entries of a part.

    Attributes:
        number, sha256, split: As in the task.
        n_entries, n_kept: Entries, and rows written.
        n_unknown_tokens: Over all texts and prompts.
        dropped: (id, reason, detail) of every entry that is not in it.
    """

    number: int
    sha256: str
    split: str
    n_entries: int
    n_kept: int
    n_unknown_tokens: int
    dropped: tuple[tuple[str, str, str], ...]


def task_of(
    number: int,
    entries: Sequence[Entry],
    *,
    folder: Path,
    recipe: EncodingRecipe,
    seed: int,
    max_tokens: int,
    split: str,
    tokenizer_folder: Path | None = None,
) -> PartTask:
    """Return the task of encoding these entries; with a base tokenizer's folder, its hash counts too."""
    decides = [recipe.identity(), seed, max_tokens, split]
    if tokenizer_folder is not None:
        decides.append(tokenizer_sha256(tokenizer_folder))
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode())
    for entry in entries:
        # pickled only to be hashed: entries hold texts, dicts and arrays
        digest.update(pickle.dumps((entry.id, entry.kind, entry.content, dict(entry.properties)), protocol=4))
    return PartTask(
        number, tuple(entries), os.fspath(folder), recipe_to_dict(recipe), seed, max_tokens, split,
        digest.hexdigest(), "" if tokenizer_folder is None else os.fspath(tokenizer_folder),
    )  # fmt: skip


def finished(task: PartTask) -> PartReport | None:
    """Return the report of a part that is already on disk, or None."""
    path = report_path(Path(task.folder), task.number)
    try:
        report = read_report(path)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return report if report.sha256 == task.sha256 and part_path(path.parent, task.number).is_file() else None


def encode_part(task: PartTask) -> PartReport:
    """Encode the entries of a part and write its two files."""
    folder = task.tokenizer_folder
    changed = (Path(folder) / "tokenizer.json").stat().st_mtime_ns if folder else 0
    encoder = _encoder(json.dumps(task.recipe, sort_keys=True), task.seed, folder, changed)
    kept: list[EncodedCrystal] = []
    dropped: list[tuple[str, str, str]] = []
    with CifPool(1, timeout_seconds=CIF_TIMEOUT_SECONDS) as pool:  # starts no process until one is needed
        for entry in task.entries:
            try:
                structure = parse(entry) or pool.submit(entry.content).result()
                crystal = crystal_of(entry, structure, allow_disordered=False)
            except UserError as error:
                dropped.append((entry.id, "not_read", f"{entry.file} {entry.entry}: {error}"))
                continue
            try:
                encoded = encoder(crystal)
            except UserError as error:
                dropped.append((entry.id, "not_encoded", str(error)))
                continue
            short = encoded.without_long_pairs(task.max_tokens)
            if short.longest > task.max_tokens or (
                not encoder.recipe.tasks.get("generate") and not short.has_pairs
            ):
                detail = f"{encoded.longest} tokens, at most {task.max_tokens}"
                dropped.append((entry.id, "too_long", detail))
                continue
            kept.append(short)
    unknown = encoder.cut.unknown_id
    n_unknown = 0
    if unknown is not None:
        n_unknown = sum(ids.count(unknown) for c in kept for ids in (*c.texts, *c.prompts))
    write_rows(part_path(Path(task.folder), task.number), kept, task.split)
    report = PartReport(
        task.number, task.sha256, task.split, len(task.entries), len(kept), n_unknown, tuple(dropped)
    )
    write_text(report_path(Path(task.folder), task.number), json.dumps(asdict(report)))
    return report


@lru_cache(maxsize=2)
def _encoder(recipe: str, seed: int, tokenizer_folder: str, changed: int) -> CrystalEncoder:  # noqa: ARG001
    plain = from_dict(json.loads(recipe), EncodingRecipe)
    return CrystalEncoder(plain, seed=seed, tokenizer_folder=tokenizer_folder or None)


def part_path(folder: Path, number: int) -> Path:
    """Return the path of a part's rows."""
    return folder / f"part-{number:05d}.parquet"


def report_path(folder: Path, number: int) -> Path:
    """Return the path of a part's report."""
    return folder / f"part-{number:05d}.json"


def read_report(path: Path) -> PartReport:
    """Return a part's report. Raises OSError, ValueError, TypeError or KeyError."""
    data = json.loads(path.read_text(encoding="utf-8"))
    return PartReport(**{**data, "dropped": tuple(tuple(entry) for entry in data["dropped"])})


def schema() -> Any:
    """Return the columns of parts and shards."""
    import pyarrow as pa

    ids = pa.list_(pa.list_(pa.int32()))
    return pa.schema(
        [
            ("id", pa.string()),
            ("split", pa.string()),
            ("composition", pa.string()),
            ("spacegroup_number", pa.int16()),
            ("cell_formula", pa.string()),
            ("volume_per_formula_unit_angstrom3", pa.float64()),
            ("n_tokens", pa.int32()),
            ("text", pa.string()),
            ("texts", ids),
            ("prompts", ids),
            ("prompt_kinds", pa.list_(pa.uint8())),
        ]
    )


def write_rows(path: Path, crystals: Iterable[EncodedCrystal], split: str) -> None:
    """Write encoded crystals as a Parquet file that appears whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{**asdict(c), "split": split, "n_tokens": c.longest} for c in crystals]
    writing = path.with_suffix(".writing")
    pq.write_table(pa.Table.from_pylist(rows, schema=schema()), writing, compression="zstd")
    writing.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write a text file that appears whole or not at all, and survives a power cut."""
    writing = path.with_suffix(path.suffix + ".writing")
    with writing.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    writing.replace(path)


def chunks(entries: Iterable[Entry], size: int) -> Iterator[list[Entry]]:
    """Yield entries in lists of `size`, the last one shorter."""
    chunk: list[Entry] = []
    for entry in entries:
        chunk.append(entry)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
