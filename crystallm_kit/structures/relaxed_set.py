"""Relaxing thousands of crystals: over all cores or on a GPU, resumable, and none of them can stop the rest.

    relax_set([("a", nacl), ("b", tio2)], "relaxed")   ->  {"a": Relaxed(...), "b": Relaxed(...)}

    relaxed/
      relaxed.jsonl     a line a crystal, written as they come: energies, reason, lattice, coordinates
      relaxed.extxyz    the relaxed crystals, written when all are there
      settings.json     what the lines are of; a folder of other settings is refused

Contract: every crystal gets its record. The same call goes on with what is missing; a line counts only for
the very crystal it was made of (a hash of it stands in the line), and a line that was cut is made again. A
kill loses the batches under way, nothing else.

Not here: how one batch relaxes (relaxation.py), processes that hang or die (relaxation_workers.py).
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

from pymatgen.core import Structure

from crystallm_kit.errors import UserError
from crystallm_kit.records import Crystal
from crystallm_kit.structures.relaxation import Relaxed, best_device
from crystallm_kit.structures.relaxation_workers import (
    Named,
    RelaxSettings,
    Row,
    atomic_numbers,
    relaxed_of,
    rows_of_batches,
)
from crystallm_kit.structures.writing import write

# One process leaves a GPU waiting while it writes records and starts a batch; each takes up to 6 GB of it
_ON_A_GPU = 2
ROWS, STRUCTURES, SETTINGS = "relaxed.jsonl", "relaxed.extxyz", "settings.json"
Say = Callable[[int, int], None]


def relax_set(
    crystals: Iterable[Named],
    out: str | Path | None = None,
    *,
    settings: RelaxSettings | None = None,
    workers: int | None = None,
    device: str | None = None,
    together: int | None = None,
    say: Say | None = None,
) -> dict[str, Relaxed]:
    """Relax named crystals, and return their records in the order given.

    Args:
        crystals: (id, ordered structure); ids are unique.
        out: Folder of the records; None: they are kept nowhere.
        settings: None: CHGNet, as RelaxSettings has it.
        workers: Processes, of one thread each; None: one a core, on a GPU at most 2, which share it.
        device: cuda, cpu ...; None: a GPU where there is one.
        together: Crystals of one batch; None: 12, on a GPU 1,024: the last ones of a batch leave it idle.
        say: Told how many are done, and of how many.

    Raises:
        UserError: If two crystals have the same id, or `out` holds records of other settings.
        UnknownName, MissingExtra: If there is no such potential, or its library is not installed.
    """
    settings = settings or RelaxSettings()
    named = list(crystals)
    wanted = {name: structure_hash(structure) for name, structure in named}
    if len(wanted) < len(named):
        raise UserError(f"{len(named)} crystals have {len(wanted)} different ids; each needs its own")
    log = None if out is None else _Log(Path(out), settings)
    done = {r["id"]: r for r in (log.rows() if log else ()) if wanted.get(r["id"]) == r["input_sha256"]}
    todo = sorted((c for c in named if c[0] not in done), key=lambda c: -len(c[1]))
    if todo:
        device = device or best_device()
        cores = len(os.sched_getaffinity(0))
        n_workers = workers or (cores if device == "cpu" else min(_ON_A_GPU, cores))
        size = together or (12 if device == "cpu" else 1024)
        batches = [todo[i : i + size] for i in range(0, len(todo), size)]
        with contextlib.closing(rows_of_batches(batches, settings, n_workers, device)) as rows:
            for row in rows:
                row["input_sha256"] = wanted[row["id"]]
                if log:
                    log.add(row)
                done[row["id"]] = row
                if say:
                    say(len(done), len(named))
    if log and named:
        log.write_structures([done[name] for name, _ in named])
    return {name: relaxed_of(done[name]) for name, _ in named}


def structure_hash(structure: Structure) -> str:
    """Return what tells one input from another: a hash of lattice, species and coordinates."""
    plain = [structure.lattice.matrix.tolist(), atomic_numbers(structure), structure.frac_coords.tolist()]
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()[:16]


class _Log:
    """The folder of a run."""

    def __init__(self, folder: Path, settings: RelaxSettings) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        now = {k: v for k, v in asdict(settings).items() if k != "seconds_per_crystal"}
        path = folder / SETTINGS
        if path.exists():
            earlier = json.loads(path.read_text(encoding="utf-8"))
            for key, value in now.items():
                if earlier.get(key) != value:
                    raise UserError(
                        f"{folder}: holds crystals relaxed with {key} {earlier.get(key)}, now {value}; "
                        "name another folder"
                    )
        else:
            path.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")

    def rows(self) -> list[Row]:
        """Return the whole lines; what a kill cut off is removed, so that nothing is joined to it."""
        path = self.folder / ROWS
        if not path.exists():
            return []
        whole, _, cut = path.read_bytes().rpartition(b"\n")
        if cut:
            os.truncate(path, len(whole) + 1 if whole else 0)
        return [json.loads(line) for line in whole.splitlines() if line.strip()]

    def add(self, row: Row) -> None:
        with (self.folder / ROWS).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")

    def write_structures(self, rows: Iterable[Row]) -> None:
        keys = ("energy_ev_per_atom", "converged", "n_steps", "potential")
        found = [(row, relaxed_of(row).structure) for row in rows]
        crystals = [Crystal(row["id"], s, {k: row[k] for k in keys}) for row, s in found if s is not None]
        if crystals:
            write(crystals, self.folder / STRUCTURES, format="extxyz")
