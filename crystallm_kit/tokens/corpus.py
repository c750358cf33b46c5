"""Data files -> a tokenised corpus: read, encoded, without duplicates, split without leaks, in shards.

    report = prepare(["mp.parquet", "more/"], CorpusRecipe(seed=1), "corpus/")
    corpus/  manifest.json  train-00000.parquet ...  validation-00000.parquet ...  corpus.npz  dropped.jsonl
             tokenizer/ (the format's or the base model's; for the folders of models trained on the corpus)
             and, where the recipe asks for them, substituted-00000.parquet ... (substitutes.py)

A row of a shard is one crystal: its texts and the parts of its prompts as token ids (encoding.py). Epochs are
drawn from them (drawing.py): `corpus.npz` holds the same as flat arrays for training, and `load_corpus` gives
the rows as a Hugging Face DatasetDict, `examples_dataset` a drawn epoch with input_ids and labels.

Memory is bounded by the entries that are under way, not by the data: parts of `part_entries` entries are
encoded by processes (or Ray tasks) and written; an index on disk then finds duplicates and splits; shards are
copied part by part. A run that was killed goes on: finished parts are kept, and recognised by the hash of
their entries and recipe.

Not here: what is done to one crystal (encoding.py), which rows stay (splits.py), batches
(training/batches.py).
"""

import hashlib
import json
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from crystallm_kit.errors import EmptyInput, MissingExtra, ReadError, UserError
from crystallm_kit.recipes import from_dict, recipe_to_dict
from crystallm_kit.structures.sources import check_path, entries_of
from crystallm_kit.tokens.drawing import Examples, Sequences, StoredInfo, running_sums, write_stored
from crystallm_kit.tokens.encoding import (
    CrystalEncoder,
    EncodingRecipe,
    check_pair,
    check_round_trip,
    write_tokenizer,
)
from crystallm_kit.tokens.parts import (
    PartReport,
    PartTask,
    chunks,
    encode_part,
    finished,
    part_path,
    schema,
    task_of,
    write_text,
)
from crystallm_kit.tokens.splits import SPLITS, Row, SharedCompositions, SplitIndex, shared_compositions
from crystallm_kit.tokens.substitutes import SUBSTITUTED, add_substitutes
from crystallm_kit.tokens.tasks import require_properties

if TYPE_CHECKING:
    import datasets

MANIFEST = "manifest.json"
ARRAYS = "corpus.npz"
IGNORED = -100  # label of positions without loss, as torch's cross_entropy has it
TOKENIZER = "tokenizer"
_LIBRARIES = ("moyopy", "numpy", "pyarrow", "pymatgen", "tokenizers", "transformers")
_HISTOGRAM_WIDTH = 32  # tokens
_ROWS_IN_MEMORY = 2_000


@dataclass(frozen=True)
class CorpusRecipe:
    """What a corpus is made from, and how.

    Attributes:
        seed: Of everything that is drawn, and of the split.
        encoding: Format, template, texts.
        max_tokens: A crystal whose longest prompt and text together have more is left out.
        deduplicate: What makes two crystals the same. formula_and_spacegroup: content of the conventional
            cell and space group (CrystaLLM's rule); canonical_text: the same text. The smaller volume stays.
        validation_fraction, test_fraction: Of the compositions, where the inputs name no splits.
        shared_compositions: What happens to training crystals whose composition is in a given validation or
            test set: drop, keep, or refuse.
        other_description_probability: How often an epoch takes another text than the canonical one.
        substitutes: Crystals tried to make from each training crystal by replacing elements; 0: none.
        substituted_epochs: Epochs, from the first, in which substitutes take part; later ones have real
            crystals only.
        part_entries: Entries that are encoded, and lost by a kill, together.
        shard_rows: Rows of a shard.
        arrays_up_to: `corpus.npz` is written for at most this many crystals; it is made in memory.
    """

    seed: int
    encoding: EncodingRecipe = field(default_factory=EncodingRecipe)
    max_tokens: int = 512
    deduplicate: Literal["none", "formula_and_spacegroup", "canonical_text"] = "canonical_text"
    validation_fraction: float = 0.05
    test_fraction: float = 0.0
    shared_compositions: SharedCompositions = "drop"
    other_description_probability: float = 0.5
    substitutes: int = 0
    substituted_epochs: int = 0
    part_entries: int = 512
    shard_rows: int = 50_000
    arrays_up_to: int = 500_000

    def __post_init__(self) -> None:
        if min(self.max_tokens, self.part_entries, self.shard_rows) < 1 or self.seed < 0:
            raise ValueError("max_tokens, part_entries and shard_rows must be at least 1, seed not negative")
        if min(self.validation_fraction, self.test_fraction) < 0 or (
            self.validation_fraction + self.test_fraction >= 1
        ):
            raise ValueError(
                "validation_fraction and test_fraction must be positive and leave something to train on"
            )
        if not 0 <= self.other_description_probability <= 1:
            raise ValueError("other_description_probability must be in [0, 1]")
        if min(self.substitutes, self.substituted_epochs) < 0:
            raise ValueError("substitutes and substituted_epochs must not be negative")
        if self.substitutes and self.encoding.format != "wyckoff":
            raise ValueError(
                f"substitutes need the format 'wyckoff', got '{self.encoding.format}'; set substitutes: 0"
            )


@dataclass(frozen=True)
class CorpusReport:
    """What became of the data.

    Attributes:
        folder: The corpus.
        n_entries: Found in the inputs.
        n_rows: Split -> crystals.
        n_texts: Texts of all kept parts, equivalent descriptions counted.
        dropped: Reason -> entries: not_read, not_encoded, too_long, duplicate, shared_composition.
        length_histogram: Tokens (lower border) -> crystals, by the longest prompt and text.
        n_unknown_tokens: Over all texts and prompts.
        sha256: Of the entries and the recipe.
        n_new_parts, n_kept_parts: Encoded by this run, and found finished.
        encoding_seconds: Wall time of reading and encoding the new parts.
        n_new_entries: Entries of the new parts.
    """

    folder: str
    n_entries: int
    n_rows: dict[str, int]
    dropped: dict[str, int]
    length_histogram: dict[str, int]
    n_unknown_tokens: int
    sha256: str
    n_new_parts: int
    n_kept_parts: int
    encoding_seconds: float
    n_new_entries: int


def prepare(
    inputs: Sequence[str | Path] | Mapping[str, Sequence[str | Path]],
    recipe: CorpusRecipe,
    out: str | Path,
    *,
    workers: int = 1,
    executor: Literal["processes", "ray"] = "processes",
    on_part: Callable[[PartReport], None] | None = None,
) -> CorpusReport:
    """Prepare a corpus, or finish one that a killed run began.

    Args:
        inputs: Files and folders as structures.files reads them; or a mapping from train, validation and test
            to them, which are then the splits.
        recipe: How.
        out: Folder of the corpus.
        workers: Processes (1: this one), or Ray tasks at a time. More than one need the caller's script to be
            importable (`if __name__ == "__main__"`).
        executor: "ray" spreads the same work over a Ray cluster that shares the folder `out`.
        on_part: Called after each part, for progress.

    Raises:
        ReadError: If an input is missing or of no known kind.
        UserError: If `out` holds another corpus, or a composition would stand on two sides.
        EmptyInput: If nothing is left to train on.
        MissingExtra: If Ray is asked for and not installed.
    """
    started = time.monotonic()
    by_split = _inputs_by_split(inputs)
    out = Path(out)
    recipe_plain = recipe_to_dict(recipe)
    fingerprint = [_fingerprint(split, paths) for split, paths in by_split.items()]
    if recipe.encoding.tokenizer and (base := Path(recipe.encoding.tokenizer)).is_dir():
        fingerprint.append(_fingerprint(TOKENIZER, sorted(base.glob("tokenizer*.json"))))
    done = _finished_report(out, recipe, fingerprint)
    if done is not None:
        return done
    check_pair(recipe.encoding)
    focus = recipe.encoding.dropping.focus
    require_properties(by_split, [*recipe.encoding.properties, *([focus] if focus else [])])
    work = out / ".parts"
    work.mkdir(parents=True, exist_ok=True)
    tokenizer_folder = _write_tokenizer(recipe.encoding, out)
    encoder = CrystalEncoder(recipe.encoding, seed=recipe.seed, tokenizer_folder=tokenizer_folder)
    check_round_trip(encoder)
    info = encoder.info
    own_tokenizer = tokenizer_folder if recipe.encoding.tokenizer else None  # what parts need to be told
    reports: list[PartReport] = []
    counts: Counter[str] = Counter()
    digest = hashlib.sha256()
    with (out / "dropped.jsonl").open("w", encoding="utf-8") as dropped_file:
        for report, is_new in _encode(_tasks(by_split, recipe, work, own_tokenizer), workers, executor):
            digest.update(report.sha256.encode())
            counts.update(
                entries=report.n_entries, unknown=report.n_unknown_tokens, new_parts=is_new, parts=1,
                new_entries=report.n_entries * is_new,
            )  # fmt: skip
            for entry, reason, detail in report.dropped:
                counts[f"dropped {reason}"] += 1
                dropped_file.write(json.dumps({"id": entry, "reason": reason, "detail": detail}) + "\n")
            if on_part:
                on_part(report)
    del reports
    encoding_seconds = time.monotonic() - started
    fractions = {
        "validation_fraction": recipe.validation_fraction,
        "test_fraction": recipe.test_fraction,
    }
    with SplitIndex(out / ".index.sqlite", seed=recipe.seed, **fractions) as index:
        for part in range(counts["parts"]):
            index.add(part, _rows(part_path(work, part), recipe.deduplicate))
        lost = index.decide(recipe.shared_compositions)
        n_rows = _write_shards(index, work, out, n_parts=counts["parts"], shard_rows=recipe.shard_rows)
        histogram = index.histogram(_HISTOGRAM_WIDTH)
    if not n_rows["train"]:
        raise EmptyInput(f"{out}: no crystal is left to train on; see {out / 'dropped.jsonl'}.")
    if recipe.shared_compositions != "keep":
        check_splits(out)
    reasons = {key.removeprefix("dropped "): n for key, n in counts.items() if key.startswith("dropped ")}
    report_ = CorpusReport(
        folder=str(out),
        n_entries=counts["entries"],
        n_rows=n_rows,
        dropped={**reasons, **{reason: n for reason, n in lost.items() if n}},
        length_histogram={str(low): n for low, n in histogram.items()},
        n_unknown_tokens=counts["unknown"],
        sha256=digest.hexdigest(),
        n_new_parts=counts["new_parts"],
        n_kept_parts=counts["parts"] - counts["new_parts"],
        encoding_seconds=round(encoding_seconds, 2),
        n_new_entries=counts["new_entries"],
    )
    manifest = {
        "recipe": recipe_plain,
        "inputs": fingerprint,
        "info": recipe_to_dict(info),
        "report": asdict(report_),
        "data_sha256": report_.sha256,
        "seed": recipe.seed,
        "versions": {name: version(name) for name in _LIBRARIES},
    }
    if recipe.substitutes:
        n_rows[SUBSTITUTED] = add_substitutes(
            out, recipe.encoding, n_per_crystal=recipe.substitutes, seed=recipe.seed,
            max_tokens=recipe.max_tokens, workers=workers, tokenizer_folder=own_tokenizer,
        )  # fmt: skip
        report_ = replace(report_, n_rows=n_rows)
        manifest["report"] = asdict(report_)
    write_text(out / f".{MANIFEST}", json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    if sum(n_rows.values()) <= recipe.arrays_up_to:
        export_arrays(out, out / ARRAYS, manifest=manifest)
    (out / f".{MANIFEST}").replace(out / MANIFEST)
    shutil.rmtree(work)
    (out / ".index.sqlite").unlink()
    return report_


def load_corpus(folder: str | Path, *, cache_dir: str | Path | None = None) -> "datasets.DatasetDict":
    """Return the rows of a corpus, split by split, memory-mapped by Hugging Face datasets.

    Args:
        folder: What `prepare` wrote.
        cache_dir: Where datasets keeps its copy; None: its usual place.

    Raises:
        ReadError: If the folder holds no finished corpus.
    """
    import datasets

    read_manifest(folder)
    files = {
        split: [str(p) for p in shards_of(folder, split)] for split in SPLITS if shards_of(folder, split)
    }
    cache = None if cache_dir is None else str(cache_dir)
    found: datasets.DatasetDict = datasets.load_dataset("parquet", data_files=files, cache_dir=cache)
    return found


def examples_dataset(
    examples: Examples, *, loss_on_prompt: bool = False, packed_length: int | None = None
) -> "datasets.Dataset":
    """Return drawn examples as a dataset with the columns input_ids, labels and position_ids.

    Args:
        examples: Of StoredCorpus.examples or .validation.
        loss_on_prompt: Whether prompt tokens are labels; else their labels are -100.
        packed_length: Fill rows with whole examples up to this many tokens (longest first, into the fullest
            row that has room), position_ids starting at 0 with each; None: one example a row. Longer ones are
            left out.
    """
    import datasets

    offsets = examples.offsets
    lengths = np.diff(offsets)
    rows = [[i] for i in range(len(lengths))] if packed_length is None else pack(lengths, packed_length)
    columns: dict[str, list[Any]] = {"input_ids": [], "labels": [], "position_ids": []}
    for row in rows:
        ids = [examples.tokens[offsets[i] : offsets[i + 1]].astype(np.int64) for i in row]
        labels = [part.copy() for part in ids]
        for i, part in zip(row, labels, strict=True):
            # the first token of an example follows nothing of its own
            part[: 1 if loss_on_prompt else max(1, int(examples.prompt_lengths[i]))] = IGNORED
        columns["input_ids"].append(np.concatenate(ids))
        columns["labels"].append(np.concatenate(labels))
        columns["position_ids"].append(np.concatenate([np.arange(len(part)) for part in ids]))
    return datasets.Dataset.from_dict(columns)


def pack(lengths: np.ndarray, packed_length: int) -> list[list[int]]:
    """Return rows of indices whose lengths add up to at most `packed_length`: best fit, longest first."""
    by_room: list[list[list[int]]] = [[] for _ in range(packed_length + 1)]
    rows: list[list[int]] = []
    for i in np.argsort(-lengths, kind="stable"):
        length = int(lengths[i])
        if length > packed_length:
            continue
        room = next((r for r in range(length, packed_length + 1) if by_room[r]), None)
        if room is None:
            row, room = [int(i)], packed_length
            rows.append(row)
        else:
            row = by_room[room].pop()
            row.append(int(i))
        by_room[room - length].append(row)
    return rows


def export_arrays(folder: str | Path, path: str | Path, *, manifest: Mapping[str, Any] | None = None) -> None:
    """Write a corpus as the one .npz file that drawing.StoredCorpus reads, with numpy alone.

    Args:
        folder: What `prepare` wrote.
        path: The file.
        manifest: Of the corpus; None: the folder's.

    Raises:
        ReadError: If the folder holds no finished corpus.
    """
    manifest = manifest or read_manifest(folder)
    recipe = from_dict(manifest["recipe"], CorpusRecipe, where=f"{folder}: {MANIFEST}")
    info = from_dict(manifest["info"], StoredInfo, where=f"{folder}: {MANIFEST}")
    pairs = [
        tuple(_sequences(folder, split, column) for column in ("texts", "prompts"))
        for split in (("train", SUBSTITUTED), ("validation",))
    ]
    substituted = (pq.read_metadata(shard).num_rows for shard in shards_of(folder, SUBSTITUTED))
    write_stored(
        path,
        (pairs[0][0], pairs[0][1]),
        (pairs[1][0], pairs[1][1]),
        info,
        seed=recipe.seed,
        dropping=recipe.encoding.dropping,
        tasks=recipe.encoding.tasks,
        other_description_probability=recipe.other_description_probability,
        n_substituted=sum(substituted),
        substituted_epochs=recipe.substituted_epochs,
    )


def check_splits(folder: str | Path) -> None:
    """Check in the shards themselves that no reduced composition stands in two splits.

    Substitutes stand on the side of the training crystals.

    Raises:
        UserError: Naming compositions that do.
    """
    folder = Path(folder)
    shards = [shard for split in (*SPLITS, SUBSTITUTED) for shard in shards_of(folder, split)]
    shared = shared_compositions(shards, folder / ".check.sqlite")
    if shared:
        raise UserError(
            f"{folder}: {len(shared)} compositions stand in more than one split, for example "
            f"{', '.join(shared[:5])}. Prepare the corpus again with shared_compositions: drop."
        )


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Return the manifest of a finished corpus. Raises ReadError."""
    path = Path(folder) / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReadError(f"{path}: no finished corpus: {error}. Run prepare to its end.") from error
    return manifest


def shards_of(folder: str | Path, split: str) -> list[Path]:
    """Return the shards of a split, in order."""
    return sorted(Path(folder).glob(f"{split}-*.parquet"))


def print_report(report: CorpusReport) -> None:
    """Print what became of the data: counts, reasons, lengths."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"Corpus {report.folder}", show_header=False)
    table.add_row("entries read", f"{report.n_entries:,}")
    for split, n in report.n_rows.items():
        table.add_row(f"{split} crystals", f"{n:,}")
    for reason, n in report.dropped.items():
        table.add_row(f"left out: {reason.replace('_', ' ')}", f"{n:,}")
    table.add_row("unknown tokens", f"{report.n_unknown_tokens:,}")
    if report.n_new_entries:
        rate = report.n_new_entries / max(report.encoding_seconds, 1e-9)
        table.add_row("entries per second", f"{rate:,.0f} ({report.n_kept_parts} parts were there already)")
    console.print(table)
    lengths = Table("tokens, prompt and text", "crystals", "", title="Lengths")
    most = max(report.length_histogram.values(), default=1)
    for low, n in report.length_histogram.items():
        bar = "█" * round(30 * n / most)
        lengths.add_row(f"{low} to {int(low) + _HISTOGRAM_WIDTH - 1}", f"{n:,}", bar)
    console.print(lengths)


# ---------------------------------------------------------------- inputs


def _inputs_by_split(
    inputs: Sequence[str | Path] | Mapping[str, Sequence[str | Path]],
) -> dict[str, list[Path]]:
    """Return split ("" where it is to be drawn) -> paths; each exists and is of a known kind."""
    if not isinstance(inputs, Mapping):
        inputs = {"": inputs}
    unknown = [split for split in inputs if split not in ("", *SPLITS)]
    if unknown:
        raise UserError(f"inputs: no split '{unknown[0]}'; known: {', '.join(SPLITS)}.")
    found = {split: [Path(path) for path in paths] for split, paths in inputs.items() if paths}
    if not found:
        raise EmptyInput("inputs: no files are given.")
    for paths in found.values():
        for path in paths:
            check_path(path)
    return found


def _fingerprint(split: str, paths: Iterable[Path]) -> list[Any]:
    """Return split and (path, bytes, time of change) of every file: equal as long as nobody touched them."""
    files = [
        f for path in paths for f in (sorted(path.rglob("*")) if path.is_dir() else [path]) if f.is_file()
    ]
    return [split, [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files]]


def _finished_report(out: Path, recipe: CorpusRecipe, fingerprint: list[Any]) -> CorpusReport | None:
    """Return the report of a corpus that is finished already; raise if another one is in its place."""
    if not (out / MANIFEST).is_file():
        return None
    manifest = read_manifest(out)
    # settings that a corpus of before them lacks have their defaults
    made_with = from_dict(manifest.get("recipe", {}), CorpusRecipe, where=f"{out}: {MANIFEST}")
    if made_with != recipe or manifest.get("inputs") != fingerprint:
        raise UserError(
            f"{out}: holds a finished corpus of another recipe or other inputs. "
            "Name another folder, or remove this one."
        )
    return CorpusReport(**manifest["report"])


def _write_tokenizer(encoding: EncodingRecipe, out: Path) -> Path:
    """Write the corpus's tokenizer, whole or not at all, and return its folder."""
    writing, folder = out / f".{TOKENIZER}", out / TOKENIZER
    shutil.rmtree(writing, ignore_errors=True)
    write_tokenizer(encoding, writing)
    shutil.rmtree(folder, ignore_errors=True)
    return writing.rename(folder)


def _tasks(
    by_split: Mapping[str, list[Path]], recipe: CorpusRecipe, work: Path, tokenizer_folder: Path | None
) -> Iterator[PartTask]:
    settings = {
        "recipe": recipe.encoding,
        "seed": recipe.seed,
        "max_tokens": recipe.max_tokens,
        "tokenizer_folder": tokenizer_folder,
    }
    number = 0
    for split, paths in by_split.items():
        for chunk in chunks(entries_of(paths), recipe.part_entries):
            yield task_of(number, chunk, folder=work, split=split, **settings)  # type: ignore[arg-type]
            number += 1


# ---------------------------------------------------------------- encoding, here, in processes, over Ray


def _encode(tasks: Iterable[PartTask], workers: int, executor: str) -> Iterator[tuple[PartReport, bool]]:
    """Yield the report of each part, in order, and whether it was encoded now; few wait at a time."""
    with ExitStack() as stack:
        if executor == "ray":
            submit, result = _ray()
        elif workers > 1:
            pool = stack.enter_context(ProcessPoolExecutor(workers, mp_context=get_context("spawn")))
            submit, result = (lambda task: pool.submit(encode_part, task)), _result
        else:
            submit, result = encode_part, lambda report: report
        waiting: deque[tuple[Any, bool]] = deque()
        for task in tasks:
            there = finished(task)
            waiting.append((submit(task), True) if there is None else (there, False))
            while len(waiting) > (2 * workers if workers > 1 else 0):
                outcome, is_new = waiting.popleft()
                yield (result(outcome) if is_new else outcome), is_new
        for outcome, is_new in waiting:
            yield (result(outcome) if is_new else outcome), is_new


def _result(future: Future[PartReport]) -> PartReport:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a process that encoded a part was ended from outside (too little memory?). Finished parts are "
            "kept: run the same command again, with fewer workers or smaller part_entries."
        ) from error


def _ray() -> tuple[Callable[[PartTask], Any], Callable[[Any], PartReport]]:
    """Return how a part is submitted to Ray, and how its report is waited for."""
    try:
        import ray
    except ImportError as error:
        raise MissingExtra.of("executor 'ray'", "ray", "ray") from error
    if not ray.is_initialized():
        ray.init()
    remote = ray.remote(encode_part)
    return remote.remote, ray.get


# ---------------------------------------------------------------- parts -> shards


def _rows(path: Path, deduplicate: str) -> Iterator[Row]:
    key_columns = {"none": [], "formula_and_spacegroup": ["cell_formula", "spacegroup_number"],
                   "canonical_text": ["text"]}[deduplicate]  # fmt: skip
    columns = ["composition", "volume_per_formula_unit_angstrom3", "n_tokens", "split"]
    table = pq.read_table(path, columns=[*columns, *key_columns])
    for row in table.to_pylist():
        key = "|".join(str(row[name]) for name in key_columns)
        yield Row(key, *(row[name] for name in columns))


class _ShardWriter:
    """Writes the rows of one split into files of `shard_rows` rows."""

    def __init__(self, out: Path, split: str, shard_rows: int) -> None:
        self.out, self.split, self.shard_rows = out, split, shard_rows
        self.n_rows = 0
        self._waiting: list[pa.Table] = []
        self._file: pq.ParquetWriter | None = None
        self._path = out

    def add(self, table: pa.Table) -> None:
        while table.num_rows:
            room = self.shard_rows - self.n_rows % self.shard_rows
            self._waiting.append(table.slice(0, room))
            table = table.slice(room)
            self.n_rows += self._waiting[-1].num_rows
            full = self.n_rows % self.shard_rows == 0
            if full or sum(t.num_rows for t in self._waiting) >= _ROWS_IN_MEMORY:
                self._flush()
            if full:
                self.close()

    def close(self) -> None:
        self._flush()
        if self._file is not None:
            self._file.close()
            self._path.rename(self._path.with_suffix(".parquet"))
            self._file = None

    def _flush(self) -> None:
        if not self._waiting:
            return
        if self._file is None:
            shard = (self.n_rows - 1) // self.shard_rows
            self._path = self.out / f"{self.split}-{shard:05d}.writing"
            self._file = pq.ParquetWriter(self._path, schema(), compression="zstd")
        self._file.write_table(pa.concat_tables(self._waiting))
        self._waiting = []


def _write_shards(
    index: SplitIndex, work: Path, out: Path, *, n_parts: int, shard_rows: int
) -> dict[str, int]:
    for old in [shard for split in (*SPLITS, SUBSTITUTED) for shard in out.glob(f"{split}-*")]:
        old.unlink()
    writers = {split: _ShardWriter(out, split, shard_rows) for split in SPLITS}
    for part in range(n_parts):
        kept = index.kept(part)
        table = pq.read_table(part_path(work, part), schema=schema())
        for split, writer in writers.items():
            rows = table.take(pa.array([row for row, of in kept if of == split], pa.int64()))
            names = pa.array([split] * rows.num_rows, pa.string())
            writer.add(rows.set_column(rows.schema.get_field_index("split"), "split", names))
    for writer in writers.values():
        writer.close()
    return {split: writer.n_rows for split, writer in writers.items()}


def _sequences(folder: str | Path, splits: Sequence[str], column: str) -> Sequences:
    """Return the texts or prompts of splits, one after the other, as flat arrays."""
    shards = [shard for split in splits for shard in shards_of(folder, split)]
    names = [column, *(["prompt_kinds"] if column == "prompts" else [])]
    table = (
        pa.concat_tables([pq.read_table(shard, columns=names) for shard in shards])
        if shards
        else schema().empty_table()
    )
    lists = table[column].combine_chunks()
    sequences = lists.flatten()
    kinds = np.zeros(len(sequences), dtype=np.uint8)
    if column == "prompts":
        kinds = table["prompt_kinds"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return Sequences(
        sequences.flatten().to_numpy(zero_copy_only=False),
        running_sums(sequences.value_lengths().to_numpy(zero_copy_only=False)),
        running_sums(lists.value_lengths().to_numpy(zero_copy_only=False)),
        kinds.astype(np.uint8),
    )
