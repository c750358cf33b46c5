"""Which samples of a set are copies of others: samples of one formula come together, however large the set.

    RULES["kit"]: of the samples that are valid under kit, first seen kept, tolerances 0.2, 0.3, 5 degrees

Samples of equal reduced formula fall into the same bucket, a file; buckets are worked out apart, on all
cores, each under every rule. A new rule is one line of RULES. A formula whose comparisons do not end in time
leaves its samples without an answer (`trouble`), which counts as neither unique nor a copy.

Not here: when two structures are copies (scores/novelty/copies.py).
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from crystallm_kit.errors import UserError
from crystallm_kit.scores.matcher.mattergen_disorder import Alloy
from crystallm_kit.scores.matcher.mattergen_disorder import first_copies as first_copies_of_alloys
from crystallm_kit.scores.matcher.structure_matcher import TOLERANCES, Reduced
from crystallm_kit.scores.novelty.copies import Bucket, duplicate_pairs, first_copies, later_copies
from crystallm_kit.scoring import reducing
from crystallm_kit.scoring.pool import Marks, TooLong
from crystallm_kit.scoring.rows import (
    STRUCTURE_COLUMNS,
    form_of,
    part_path,
    parts_of,
    read_part,
    structure_of,
    write_part,
)

_PER_BUCKET = 1000  # samples
_MOST_BUCKETS = 256
_HELD = 50_000  # forms in memory while buckets are filled
_SECONDS = (120.0, 0.02)  # that a formula's comparisons may take: for all, and for each pair


@dataclass(frozen=True)
class Rule:
    """When a sample counts as a copy.

    Attributes:
        gate: Check that a sample has to pass to take part; "": every readable one does.
        tolerances: Name in TOLERANCES.
        bucket: Within which formulas samples are compared.
        later: A copy is one that a later sample equals, as LeMat counts; else one that equals a kept earlier.
        pairs: Ordered pairs of samples that match are counted instead, as matbench-genmetrics does.
        disordered: Two orderings of one alloy are copies, as MatterGen has it; slow.
    """

    gate: str
    tolerances: str = "default"
    bucket: Bucket = "reduced_formula"
    later: bool = False
    pairs: bool = False
    disordered: bool = False


RULES = {
    "kit": Rule("kit.valid"),
    "default": Rule(""),
    "crystallm": Rule("crystallm.valid", bucket="cell_formula"),
    "lemat": Rule("lemat.valid", "lemat", later=True),
    "genmetrics": Rule("", "csp", pairs=True),
    "mattergen": Rule("", disordered=True),
}
COPIES = pa.schema(
    [
        ("position", pa.int64()),
        ("rule", pa.string()),
        ("of", pa.int64()),
        ("pairs", pa.int64()),
        ("trouble", pa.string()),
    ]
)


@dataclass(frozen=True)
class Copies:
    """Who is whose copy.

    Attributes:
        of: Rule -> (N,) int64, the position of the sample that each is a copy of; -1: of none; -2: it was
            not found out in time.
        pairs: Rule -> ordered pairs that match.
    """

    of: Mapping[str, NDArray[np.int64]]
    pairs: Mapping[str, int] = field(default_factory=dict)


def collect(folder: Path, rules: Sequence[str], n: int) -> Copies:
    """Return what was found in the buckets of a set of n samples."""
    of = {name: np.full(n, -1, dtype=np.int64) for name in rules if not RULES[name].pairs}
    pairs = {name: 0 for name in rules if RULES[name].pairs}
    for path in parts_of(folder):
        for row in read_part(path):
            if row["rule"] in pairs:
                pairs[row["rule"]] += row["pairs"] or 0
            else:
                of[row["rule"]][row["position"]] = -2 if row["of"] is None else row["of"]
    return Copies(of, pairs)


def fill_buckets(
    forms: Path, checks: Path, folder: Path, gates: Mapping[str, Path], n: int, *, cells: Path | None = None
) -> int:
    """Write the buckets of a set, and return how many there are.

    Args:
        forms, checks: Folders of the stages' parts.
        folder: For the buckets.
        gates: Columns that rules ask for, and the folders of their stages.
        n: Samples.
        cells: Folder of the samples as they came, for rules that compare these.
    """
    n_buckets = min(_MOST_BUCKETS, max(1, n // _PER_BUCKET))
    names = [name for name, _ in STRUCTURE_COLUMNS]
    schema = pa.schema(
        [("position", pa.int64()), ("reduced_formula", pa.string()), ("cell_formula", pa.string()),
         *STRUCTURE_COLUMNS, *((gate, pa.bool_()) for gate in gates),
         *((f"cell_{name}", kind) for name, kind in STRUCTURE_COLUMNS if cells is not None)]
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    writers = [pq.ParquetWriter(part_path(folder, b), schema, compression="zstd") for b in range(n_buckets)]
    held: list[list[dict[str, Any]]] = [[] for _ in writers]
    position = n_held = 0
    for number, form_part in enumerate(parts_of(forms)):
        form_rows = read_part(form_part, ["reduced_formula", *names])
        check_rows = read_part(part_path(checks, number), ["cell_formula"])
        for gate, home in gates.items():
            for check, row in zip(check_rows, read_part(part_path(home, number), [gate]), strict=True):
                check.update(row)
        if cells is not None:
            for check, row in zip(check_rows, read_part(part_path(cells, number), names), strict=True):
                check.update({f"cell_{name}": value for name, value in row.items()})
        for form, check in zip(form_rows, check_rows, strict=True):
            if form["numbers"] is not None:
                bucket = zlib.crc32(form["reduced_formula"].encode()) % n_buckets
                held[bucket].append({"position": position, **form, **check})
                n_held += 1
            position += 1
        if n_held >= _HELD:
            _flush(writers, held, schema)
            n_held = 0
    _flush(writers, held, schema)
    for writer in writers:
        writer.close()
    return n_buckets


def _flush(writers: list[pq.ParquetWriter], held: list[list[dict[str, Any]]], schema: pa.Schema) -> None:
    for writer, rows in zip(writers, held, strict=True):
        writer.write_table(pa.Table.from_pylist(rows, schema=schema))
        rows.clear()


def find_copies(task: dict[str, Any], marks: Marks) -> dict[str, Any]:
    """Work out one bucket: the job of a worker.

    Args:
        task: "bucket", its file; "out", the file of its copies; "rules", names.
        marks: Tells where the work is, and limits its time.
    """
    reducing.warm_up()
    out, skip = Path(task["out"]), dict(task.get("skip", {}))
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in read_part(Path(task["bucket"])):
        groups.setdefault(row["reduced_formula"], []).append(row)
    found: list[dict[str, Any]] = []
    for number, rows in enumerate(groups.values()):
        if len(rows) == 1:
            continue
        why = skip.get(f"copies:{number}")
        if why is None:
            try:
                most = _SECONDS[0] + _SECONDS[1] * len(rows) ** 2
                with marks.item("copies", number, most):
                    for name in task["rules"]:
                        found += _copies(name, RULES[name], rows)
                continue
            except TooLong:
                why = f"timeout: more than {most:g} s"
            except (ArithmeticError, LookupError, RuntimeError, UserError, ValueError) as error:
                why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        found += [
            {"position": row["position"], "rule": name, "trouble": why}
            for name in task["rules"]
            for row in rows
        ]
    write_part(out, found, COPIES)
    return {"n": sum(map(len, groups.values()))}


_CELL = [name for name, _ in STRUCTURE_COLUMNS]


def _copies(name: str, rule: Rule, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if rule.disordered:
        cells = [structure_of({column: row[f"cell_{column}"] for column in _CELL}) for row in rows]
        alloys = [None if cell is None else Alloy(cell) for cell in cells]
        return _named(name, rows, first_copies_of_alloys(alloys))
    forms: list[Reduced | None] = [form_of(r) if not rule.gate or r[rule.gate] else None for r in rows]
    tolerances = TOLERANCES[rule.tolerances]
    if rule.pairs:
        return [{"position": rows[0]["position"], "rule": name, "pairs": duplicate_pairs(forms, tolerances)}]
    if rule.later:
        of = later_copies(forms, tolerances)
    else:
        of = first_copies(
            forms, tolerances, bucket=rule.bucket, cell_formulas=[r["cell_formula"] for r in rows]
        )
    return _named(name, rows, of)


def _named(name: str, rows: list[dict[str, Any]], of: Sequence[int | None]) -> list[dict[str, Any]]:
    return [
        {"position": row["position"], "rule": name, "of": rows[i]["position"]}
        for row, i in zip(rows, of, strict=True)
        if i is not None
    ]
