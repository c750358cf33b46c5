"""Sample sets -> parts on disk, as they came, ready for the stages; a killed intake goes on where it was.

    work/DiffCSP/read/part-00000.parquet   250 samples; beyond 100 parts 1,000 each, beyond 200 4,000
    work/DiffCSP/read/whole.json           {"n": 10000}, once all are there

Not here: what a set is (sample_sets.py), the columns' schema (stages.py).
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from crystallm_kit.errors import EmptyInput, UserError
from crystallm_kit.scoring.rows import n_rows, part_path, parts_of, structure_columns, write_part
from crystallm_kit.scoring.sample_sets import Incoming, SampleSet, samples_of
from crystallm_kit.scoring.stages import READ

PART = 250  # samples: what a kill may cost of each worker
_GROW_AFTER, _GROWTH = 100, (1, 4, 16)  # parts; a million samples are 419 files a stage, not 4,000
_WHOLE = "whole.json"
Samples = Callable[[int], Iterator[Incoming]]


@dataclass(frozen=True)
class Part:
    """A part that is there.

    Attributes:
        number: From 0.
        n: Samples in it.
    """

    number: int
    n: int


def part_size(number: int) -> int:
    """Return how many samples a part holds, unless it is the last one."""
    return PART * _GROWTH[min(number // _GROW_AFTER, len(_GROWTH) - 1)]


def take_in(sample_set: SampleSet, folder: Path, *, samples: Samples | None = None) -> Iterator[Part]:
    """Yield the parts of a set as they are there: those of an earlier run at once.

    Args:
        sample_set: The set.
        folder: Of its parts.
        samples: Where its samples come from, from the one with a number on; None: from its sources.

    Raises:
        EmptyInput: If it holds nothing.
        UserError: If it holds more than was requested.
    """
    there = [Part(i, n_rows(path)) for i, path in enumerate(parts_of(folder))]
    if n_taken_in(folder) is not None:
        yield from there
        return
    if there and there[-1].n < part_size(
        there[-1].number
    ):  # the end of a run that was killed before it could say so
        part_path(folder, there.pop().number).unlink()
    yield from there
    number, n = len(there), sum(part.n for part in there)
    coming = samples(n) if samples is not None else _all_requested(sample_set, n)
    while rows := [_columns(n + i, one) for i, one in enumerate(islice(coming, part_size(number)))]:
        part = Part(number, len(rows))
        number += 1
        write_part(part_path(folder, part.number), rows, READ)
        n += len(rows)
        yield part
    if not n:
        raise EmptyInput(f"{sample_set.name}: {sample_set.sources[0]} holds no samples; 0/0 is not a score")
    (folder / _WHOLE).write_text(json.dumps({"n": n}), encoding="utf-8")


def n_taken_in(folder: Path) -> int | None:
    """Return the number of samples of a set that is there as a whole; None: it is not."""
    whole = folder / _WHOLE
    return int(json.loads(whole.read_text(encoding="utf-8"))["n"]) if whole.exists() else None


def _all_requested(sample_set: SampleSet, start: int) -> Iterator[Incoming]:
    """Yield the samples from `start` on, then those that were requested and are not there."""
    n = start
    for sample in samples_of(sample_set, start):
        n += 1
        yield sample
    wanted = sample_set.n_requested
    if wanted is None or not n:
        return
    if n > wanted:
        raise UserError(f"{sample_set.name}: {n:,} samples in it, but --requested {wanted:,}")
    yield from chain(
        Incoming(f"missing-{i}", None, "missing", "requested, and not in the file") for i in range(n, wanted)
    )


def _columns(index: int, sample: Incoming) -> dict[str, Any]:
    columns = {} if sample.structure is None else structure_columns(sample.structure)
    return {
        "index": index,
        "id": sample.id,
        "reason": sample.reason,
        "detail": sample.detail or None,
        "conditions": sample.conditions or None,
        "stated_spacegroup": sample.stated_spacegroup,
        "cif_text": sample.cif_text or None,
        "properties": json.dumps(sample.properties, default=str) if sample.properties else None,
        **columns,
    }
