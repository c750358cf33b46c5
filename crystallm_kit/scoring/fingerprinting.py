"""The stage `fingerprints`: one structure's two fingerprints, or why there are none.

Not here: the fingerprints (scores/fingerprints/crystal.py).
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pymatgen.core import Lattice, Structure

from crystallm_kit.scores.fingerprints.crystal import FingerprintFailure, Fingerprints, fingerprints
from crystallm_kit.scoring.rows import parts_of, read_part
from crystallm_kit.scoring.stages import Item


def warm_up() -> None:
    """Compile, or load, what fingerprints are made with: the first time that takes many seconds."""
    sites = [[0.0, 0.0, 0.0], [0.5, 0.5, 0.5]]
    fingerprints(Structure(Lattice([[0, 2.8, 2.8], [2.8, 0, 2.8], [2.8, 2.8, 0]]), ["Na", "Cl"], sites))


def fingerprint(item: Item, settings: Mapping[str, Any], where: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of the stage."""
    del settings, where
    if item.structure is None:
        return {}
    found = fingerprints(item.structure)
    if isinstance(found, FingerprintFailure):
        return {"fingerprintable": False, "fingerprint_reason": f"{found.reason}: {found.detail}"}
    return {
        "fingerprintable": True,
        "structure_fingerprint": found.structure.tolist(),
        "composition_fingerprint": found.composition.tolist(),
    }


def fingerprints_of(folder: Path) -> Iterator[Fingerprints | None]:
    """Yield the fingerprints of a set's samples, in order."""
    for path in parts_of(folder):
        for row in read_part(path, ["structure_fingerprint", "composition_fingerprint"]):
            structure, composition = row["structure_fingerprint"], row["composition_fingerprint"]
            yield None if structure is None else Fingerprints(np.array(structure), np.array(composition))
