"""The stage `stability`: the hull distance of one sample, from its relaxation.

Relaxing comes before (structures/relaxed_set.py), with workers and a log of its own; here its records become
columns.

Not here: what a relaxation says (scores/stability/sample.py), the scores (scores/stability/scores.py).
"""

import json
import math
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from crystallm_kit.scores.stability.element_references import (
    ElementReferences,
    read_references,
    shipped_references,
)
from crystallm_kit.scores.stability.hull import Hull
from crystallm_kit.scores.stability.hull_sources import read_hull
from crystallm_kit.scores.stability.sample import Stability, stability_of
from crystallm_kit.scoring.intake import Samples
from crystallm_kit.scoring.rows import structure_of
from crystallm_kit.scoring.sample_sets import Incoming
from crystallm_kit.scoring.stages import Item
from crystallm_kit.scoring.telling import Step
from crystallm_kit.scoring.view import View
from crystallm_kit.structures.relaxation_workers import RelaxSettings, relaxed_of
from crystallm_kit.structures.relaxed_set import ROWS, relax_set

_NUMBERS = (
    "energy_ev_per_atom", "formation_energy_ev_per_atom", "hull_distance_ev_per_atom",
    "submitted_hull_distance_ev_per_atom", "rmsd_angstrom",
)  # fmt: skip


def judge(item: Item, settings: Mapping[str, Any], where: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of the stage; none for a sample that was not relaxed."""
    record = _records(where["relaxed"], Path(where["relaxed"]).stat().st_mtime_ns).get(str(item.row["index"]))
    if record is None or item.structure is None:
        return {}
    references = references_of(settings["potential"], where["references"])
    found = stability_of(relaxed_of(record), item.structure, references, _hull(where["hull"]))
    columns = {name: value for name in _NUMBERS if math.isfinite(value := getattr(found, name))}
    return {
        **columns, "relaxed": found.converged, "n_steps": found.n_steps, "n_competing": found.n_competing,
        "stability_reason": found.reason,
    }  # fmt: skip


def relax_all(view: View, folder: Path, potential: str, workers: int | None, step: Step) -> None:
    """Relax the samples of a set whose cells any potential can take; what is there is not relaxed again.

    Args:
        view: The set.
        folder: Of the records, one a sample, named by its index.
        potential: Its name.
        workers: Processes; None: one a core.
        step: Told how many are done.
    """
    chosen = np.flatnonzero(view.truth("checks", "cdvae.structure_valid"))
    step.expect(len(chosen))
    crystals = [(str(row["index"]), s) for row in view.rows("read", chosen) if (s := structure_of(row))]
    done = 0

    def say(n: int, _: int) -> None:
        nonlocal done
        step.advance(n - done)
        done = n

    relax_set(crystals, folder, settings=RelaxSettings(potential=potential), workers=workers, say=say)
    step.done(f"{len(crystals):,} structures")


def relaxed_samples(view: View, folder: Path) -> Samples:
    """Return where the relaxed structures of a set come from: as many samples as the set has."""

    def samples(start: int) -> Iterator[Incoming]:
        records = _records(str(folder / ROWS), (folder / ROWS).stat().st_mtime_ns)
        for i in range(start, view.n):
            record = records.get(str(i))
            structure = None if record is None else relaxed_of(record).structure
            if structure is None:
                yield Incoming(str(i), None, "not_relaxed", "" if record is None else str(record["reason"]))
            else:
                yield Incoming(str(i), structure)

    return samples


def stabilities_of(view: View) -> list[Stability | None]:
    """Return what was found of each sample; None where it was not relaxed."""
    numbers = {name: view.floats("stability", name) for name in _NUMBERS}
    counts = {name: view.floats("stability", name) for name in ("n_competing", "n_steps")}
    sizes = [view.floats("checks", name) for name in ("n_elements", "n_sites")]
    converged, reasons = view.truth("stability", "relaxed"), view.texts("stability", "stability_reason")
    return [
        Stability(
            int(sizes[0][i]), int(sizes[1][i]), n_competing=int(counts["n_competing"][i]),
            n_steps=int(counts["n_steps"][i]), converged=bool(converged[i]), reason=reasons[i],
            **{name: float(column[i]) for name, column in numbers.items()},
        )
        if math.isfinite(counts["n_steps"][i]) and math.isfinite(sizes[0][i]) else None
        for i in range(view.n)
    ]  # fmt: skip


@lru_cache(maxsize=4)
def references_of(potential: str, path: str) -> ElementReferences:
    """Return the element references of a file; without one, those that come with the package."""
    return read_references(path) if path else shipped_references(potential)


@lru_cache(maxsize=2)
def _hull(path: str) -> Hull:
    return read_hull(path)


@lru_cache(maxsize=1)
def _records(path: str, _written: int) -> dict[str, dict[str, Any]]:
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return {row["id"]: row for row in map(json.loads, lines)}
