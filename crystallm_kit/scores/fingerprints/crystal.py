"""A crystal as two points, one of its structure (61 numbers), one of its composition (132), as in CDVAE.

    >>> found = fingerprints(rock_salt)
    >>> found.structure.shape, found.composition.shape
    ((61,), (132,))
    >>> fingerprints(disordered)
    FingerprintFailure(reason='fingerprint:disordered', detail='...')

The structure's is the mean over its sites of matminer's CrystalNNFingerprint "ops": for each number of
neighbours from 1 to 24 its weight, and that times the likeness to each motif of so many neighbours. It is
matminer's to the last bits, and quicker (python -m crystallm_kit.scores.fingerprints.speed).

A crystal without a fingerprint is a failure with a reason, never an exception; CDVAE counts it as invalid
("cdvae.fingerprintable").

Not here: distances between fingerprints and what is counted with them (coverage.py).
Sources: Xie et al., arXiv:2110.06197 (CDVAE); Zimmermann and Jain, RSC Adv. 10, 6063 (2020).
"""

import math
import time
import warnings
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pymatgen.core import Structure

from crystallm_kit.errors import UserError
from crystallm_kit.scores.fingerprints.composition import composition_fingerprint

if TYPE_CHECKING:
    from crystallm_kit.scores.fingerprints.neighbours import PreparedCrystal

__all__ = [
    "FingerprintFailure", "Fingerprints", "composition_fingerprint", "fingerprints", "structure_fingerprint",
]  # fmt: skip

FloatArray = NDArray[np.float64]

STRUCTURE_LENGTH = 61
MOST_COUNTED_NEIGHBOURS = 24
SECONDS = 30.0


@dataclass(frozen=True, eq=False)
class Fingerprints:
    """The two fingerprints of one crystal.

    Attributes:
        structure: (61,) mean over sites.
        composition: (132,) scaled; 0 where unknown.
    """

    structure: FloatArray
    composition: FloatArray


@dataclass(frozen=True)
class FingerprintFailure:
    """Why a crystal has no fingerprint.

    Attributes:
        reason: "fingerprint:" with one of: disordered, composition, neighbours (no Voronoi cell, an element
            without a radius ...), time.
        detail: Where and what.
    """

    reason: str
    detail: str


def fingerprints(structure: Structure, *, seconds: float = SECONDS) -> Fingerprints | FingerprintFailure:
    """Return both fingerprints of a crystal, or why there are none.

    Args:
        structure: Ordered; oxidation states are not looked at.
        seconds: Limit, looked at before every tessellation: one takes 2 s at most. Infinite: none.
    """
    if not structure.is_ordered:
        return FingerprintFailure("fingerprint:disordered", "a site is partly or mixedly occupied")
    try:
        composition = composition_fingerprint(structure.composition)
    except UserError as error:
        return FingerprintFailure("fingerprint:composition", str(error))
    found = _structure_fingerprint(structure, seconds)
    return found if isinstance(found, FingerprintFailure) else Fingerprints(found, composition)


def structure_fingerprint(structure: Structure, *, seconds: float = math.inf) -> FloatArray | None:
    """Return the structure's fingerprint, (61,), or None where there is none (`fingerprints` says why)."""
    if not structure.is_ordered:
        return None
    found = _structure_fingerprint(structure, seconds)
    return None if isinstance(found, FingerprintFailure) else found


def _structure_fingerprint(structure: Structure, seconds: float) -> FloatArray | FingerprintFailure:
    from crystallm_kit.scores.fingerprints.neighbours import TooSlow, prepared

    if not len(structure):
        return FingerprintFailure("fingerprint:neighbours", "no sites")
    _compile()
    deadline = time.monotonic() + seconds
    index = 0
    with warnings.catch_warnings():
        # an element without electronegativity; a flat face's division by 0, which is looked at afterwards
        warnings.simplefilter("ignore")
        try:
            if any(hasattr(site.specie, "oxi_state") for site in structure):
                structure = structure.copy()
                structure.remove_oxidation_states()
            crystal = prepared(structure)
            sites = np.empty((len(structure), STRUCTURE_LENGTH))
            for index in range(len(structure)):
                sites[index] = _site_fingerprint(structure, crystal, index, deadline)
        except TooSlow as error:
            return FingerprintFailure("fingerprint:time", f"site {index}, limit {seconds:g} s: {error}")
        except (ValueError, RuntimeError, IndexError, TypeError, ArithmeticError, AttributeError) as error:
            # what pymatgen and qhull raise on cells that are none; matminer lets it through
            return FingerprintFailure("fingerprint:neighbours", f"site {index}: {error}")
    return np.asarray(sites.mean(axis=0))


@cache
def _compile() -> None:
    """Compile, or load, before the clock starts: the first time it takes many seconds."""
    from crystallm_kit.scores.fingerprints.cells import certain_cell, solid_angles_and_areas
    from crystallm_kit.scores.fingerprints.motifs import MOST_NEIGHBOURS, motif_values, order_matters

    corner = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [-1, -1, -1.5]], dtype=np.float64)
    found = certain_cell(corner)
    if found is not None:
        solid_angles_and_areas(found[1])
    motif_values(corner[1:], np.ones(MOST_NEIGHBOURS + 1, dtype=np.bool_))
    order_matters(corner[1:], np.zeros(4, dtype=np.int64))


def _site_fingerprint(
    structure: Structure, crystal: "PreparedCrystal", index: int, deadline: float
) -> FloatArray:
    from crystallm_kit.scores.fingerprints.motifs import MOST_NEIGHBOURS, MOTIFS, motif_values
    from crystallm_kit.scores.fingerprints.neighbours import Unusual, neighbours

    try:
        near = neighbours(crystal, index, deadline=deadline)
    except Unusual:
        from crystallm_kit.scores.fingerprints.plain import site_fingerprint

        return site_fingerprint(structure, index)
    wanted = np.zeros(MOST_NEIGHBOURS + 1, dtype=np.bool_)
    wanted[[n for n in near.weights if n <= MOST_NEIGHBOURS]] = True
    likeness = motif_values(near.vectors, wanted) if wanted.any() else np.zeros(0)
    parts: list[FloatArray] = []
    for n in range(1, MOST_COUNTED_NEIGHBOURS + 1):
        weight = near.weights.get(n, 0.0)
        parts.append(np.array([weight]))
        if n in MOTIFS:
            of_motifs = MOTIFS[n]
            parts.append(
                weight * likeness[of_motifs] if weight else np.zeros(of_motifs.stop - of_motifs.start)
            )
    return np.concatenate(parts)
