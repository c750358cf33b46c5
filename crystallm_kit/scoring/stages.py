"""What is worked out of each sample by itself, a stage a line: its columns, its time limit, its function.

    STAGES["checks"]: structure -> reason, cdvae.structure_valid, density_g_cm3, ...
    STAGES["forms"]:  structure -> its reduced form, with which the matcher compares

A stage writes one Parquet part for each part of a set (rows.py), into a folder named by its settings: what is
there is not computed again, and other settings have another folder. One bad structure is a row with its
`trouble`: the run goes on. A new stage is one function from an `Item` to its columns, and one line here.

Not here: what happens between samples (copies.py, index.py), where the work is done (pool.py).
"""

import hashlib
import importlib
import json
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
from pymatgen.core import Structure

from crystallm_kit.scores.checks import BOND_SCORES, CHECKS
from crystallm_kit.scoring.pool import Marks, TooLong
from crystallm_kit.scoring.rows import STRUCTURE_COLUMNS, part_path, read_part, structure_of, write_part

Columns = Mapping[str, Any]

# What every part begins with: the samples as they came.
READ = pa.schema(
    [
        ("index", pa.int64()),
        ("id", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("conditions", pa.string()),
        ("stated_spacegroup", pa.int16()),
        ("cif_text", pa.string()),
        ("properties", pa.string()),
        *STRUCTURE_COLUMNS,
    ]
)


@dataclass
class Item:
    """One sample on its way through the stages.

    Attributes:
        row: Of the part as it was read.
        structure: None where there is none.
        earlier: Stage -> its columns of this sample, of the stages that are needed.
    """

    row: Columns
    structure: Structure | None
    earlier: dict[str, Columns] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """One line of the table.

    Attributes:
        name: Of its folder.
        version: Raised when its columns change: those of others are not taken.
        seconds: That one structure may take.
        columns: Name and Arrow type of each; `trouble` is added.
        function: "module:name" in this room: (item, settings, where) -> columns; or, with `whole`, (items,
            settings, where) -> the columns of each. A function `warm_up` of that module is called before.
        needs: Earlier stages whose columns it reads.
        whole: It takes a part at once.
    """

    name: str
    version: int
    seconds: float
    columns: tuple[tuple[str, pa.DataType], ...]
    function: str
    needs: tuple[str, ...] = ()
    whole: bool = False

    @property
    def schema(self) -> pa.Schema:
        """Return the schema of its parts."""
        return pa.schema([*self.columns, ("trouble", pa.string())])


@dataclass(frozen=True)
class Asked:
    """A stage with its settings, for one set.

    Attributes:
        stage: Name in STAGES.
        settings: JSON-ready; what its columns depend on, contents of files by their hash.
        where: JSON-ready; paths, which its columns do not depend on.
    """

    stage: str
    settings: dict[str, Any] = field(default_factory=dict)
    where: dict[str, Any] = field(default_factory=dict)

    def folder(self, work: Path) -> Path:
        """Return where its parts are: elsewhere for other settings, other code, other libraries."""
        stage = STAGES[self.stage]
        versions = [stage.version, *(STAGES[name].version for name in stage.needs), *_library_versions()]
        plain = json.dumps([versions, self.settings], sort_keys=True)
        return work / f"{self.stage}-{hashlib.sha256(plain.encode()).hexdigest()[:8]}"


@cache
def _library_versions() -> tuple[str, ...]:
    return tuple(version(name) for name in ("crystallm-kit", "pymatgen", "moyopy"))


_FLOAT, _TRUTH, _TEXT, _WHOLE = pa.float64(), pa.bool_(), pa.string(), pa.int32()

# Checks that need a fingerprint are put together of two stages (scene.py); bonds have one of their own.
_CHECKS = tuple((name, _TRUTH) for name, what in CHECKS.items() if not what.startswith(("(fing", "(text, b")))
_BONDS = tuple((name, _TRUTH) for name, what in CHECKS.items() if what.startswith("(text, b"))

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("checks", 2, 30.0, (
            ("formula", _TEXT), ("cell_formula", _TEXT), ("n_sites", _WHOLE), ("n_elements", _WHOLE),
            ("elements", pa.list_(_TEXT)), ("spacegroup_number", _WHOLE), ("crystal_system", _TEXT),
            ("density_g_cm3", _FLOAT), ("volume_per_atom_angstrom3", _FLOAT),
            ("nearest_distance_angstrom", _FLOAT), ("cell_lengths_angstrom", pa.list_(_FLOAT)),
            ("reason", _TEXT), ("detail", _TEXT), ("stage", _TEXT), ("asked", _TEXT), ("kit.valid", _TRUTH),
            *_CHECKS, ("lemat.spacegroup_number", _WHOLE), ("cif", _TEXT),
        ), "checking:check"),
        Stage("bonds", 1, 60.0, (
            *_BONDS, *((name, _FLOAT) for name in BOND_SCORES),
        ), "checking:check_bonds"),
        Stage("hashes", 1, 60.0, (("hash.bawl", _TEXT),), "hashing:hash_valid", ("bonds",)),
        Stage("forms", 1, 30.0, (("reduced_formula", _TEXT), *STRUCTURE_COLUMNS), "reducing:reduce"),
        Stage("known", 3, 60.0, (
            ("known_formula", _TRUTH), ("known_system", _TRUTH), ("known_as.default", _TEXT),
            ("known_as.lemat", _TEXT), ("known_as.genmetrics", _TEXT), ("known_as.cell_formula", _TEXT),
            ("all_known.default", pa.list_(_TEXT)),
        ), "knowing:know", ("forms",)),
        Stage("known_alloys", 2, 120.0, (
            ("known_as.disordered", _TEXT), ("all_known.disordered", pa.list_(_TEXT)),
        ), "knowing:know_alloy"),
        Stage("fingerprints", 1, 60.0, (
            ("fingerprintable", _TRUTH), ("fingerprint_reason", _TEXT),
            ("structure_fingerprint", pa.list_(_FLOAT)), ("composition_fingerprint", pa.list_(_FLOAT)),
        ), "fingerprinting:fingerprint"),
        Stage("matches", 2, 60.0, (("rms_distance.csp", _FLOAT), ("distances", _TEXT)), "comparing:compare",
              ("forms",)),
        Stage("covers", 1, 60.0, (("covers.genmetrics", _TRUTH),), "comparing:cover", ("forms",)),
        Stage("stability", 1, 60.0, (
            ("relaxed", _TRUTH), ("n_steps", _WHOLE), ("energy_ev_per_atom", _FLOAT),
            ("formation_energy_ev_per_atom", _FLOAT), ("hull_distance_ev_per_atom", _FLOAT),
            ("submitted_hull_distance_ev_per_atom", _FLOAT), ("n_competing", _WHOLE),
            ("rmsd_angstrom", _FLOAT), ("stability_reason", _TEXT),
        ), "judging:judge"),
    )
}  # fmt: skip


# ---------------------------------------------------------------- inside a worker


def run_part(task: dict[str, Any], marks: Marks) -> dict[str, Any]:
    """Work out what is missing of one part.

    Args:
        task: "part", its number; "read", the folder of the samples; "stages": [[name, folder, settings,
            where], ...], in order; "skip": {"stage:position": why} of what ended other workers.
        marks: Tells where the work is.

    Returns:
        "n" rows, and "stages": name -> {"seconds" of computing, "troubles"} of those that were not there.
    """
    warnings.simplefilter("ignore")  # thousands of samples, each with pymatgen's remarks
    part, skip = int(task["part"]), dict(task.get("skip", {}))
    items = [Item(row, structure_of(row)) for row in read_part(part_path(Path(task["read"]), part))]
    done = {}
    for name, folder, settings, where in task["stages"]:
        stage, path = STAGES[name], part_path(Path(folder), part)
        is_needed = any(name in STAGES[later[0]].needs for later in task["stages"])
        if path.exists():
            rows = read_part(path) if is_needed else []
        else:
            began = time.process_time()
            rows = _rows(stage, items, settings, where, marks, skip)
            write_part(path, rows, stage.schema)
            troubles = sum(bool(row.get("trouble")) for row in rows)
            done[name] = {"seconds": time.process_time() - began, "troubles": troubles}
        for item, row in zip(items, rows, strict=False):
            item.earlier[name] = row
    return {"n": len(items), "stages": done}


@cache
def _prepared(module: str) -> Any:
    """Return a stage's module, with what it compiles compiled: that is no structure's time."""
    found = importlib.import_module(f"crystallm_kit.scoring.{module}")
    getattr(found, "warm_up", lambda: None)()
    return found


def _rows(
    stage: Stage, items: Sequence[Item], settings: Columns, where: Columns, marks: Marks, skip: dict[str, str]
) -> list[dict[str, Any]]:
    module, _, name = stage.function.partition(":")
    function = getattr(_prepared(module), name)
    if stage.whole:
        return _whole(stage, items, settings, where, marks, skip, function)
    rows = []
    for position, item in enumerate(items):
        why = skip.get(f"{stage.name}:{position}")
        if why is None and item.structure is not None:
            rows.append(_guarded(lambda i=item: function(i, settings, where), stage, position, marks))
        else:
            rows.append({} if item.structure is None else {"trouble": why})
    return rows


def _guarded(call: Any, stage: Stage, position: int, marks: Marks) -> dict[str, Any]:
    """Return what a call returns; whatever one structure does to it is that row's trouble."""
    try:
        with marks.item(stage.name, position, stage.seconds):
            return dict(call())
    except TooLong:
        return {"trouble": f"timeout: more than {stage.seconds:g} s"}
    except (ImportError, SyntaxError):  # no structure's fault, and the same for all
        raise
    except Exception as error:  # noqa: BLE001 - one bad structure never stops a run
        return {"trouble": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def _whole(
    stage: Stage, items: Sequence[Item], settings: Columns, where: Columns, marks: Marks,
    skip: dict[str, str], function: Any,
) -> list[dict[str, Any]]:  # fmt: skip
    """Take all items at once; where that fails or killed a worker, one by one."""
    at = [i for i, item in enumerate(items) if item.structure is not None]
    rows: list[dict[str, Any]] = [{} for _ in items]
    if not any(key.startswith(f"{stage.name}:") for key in skip):
        limit = Stage(stage.name, stage.version, stage.seconds * max(1, len(at)), (), "")
        found = _guarded(
            lambda: {"rows": function([items[i] for i in at], settings, where)}, limit, -1, marks
        )
        if "rows" in found:
            for i, row in zip(at, found["rows"], strict=True):
                rows[i] = row
            return rows
    for i in at:
        why = skip.get(f"{stage.name}:{i}")
        rows[i] = (
            {"trouble": why} if why is not None
            else _guarded(lambda i=i: function([items[i]], settings, where)[0], stage, i, marks)
        )  # fmt: skip
    return rows
