"""How stable one sample is: what a relaxation, element references and a hull say of it.

    >>> stability_of(relaxed, as_submitted, references, hull)
    Stability(hull_distance_ev_per_atom=0.021, n_competing=7, converged=True, rmsd_angstrom=0.08, ...)

Contract: never an exception for what a sample is; what could not be had is NaN, with a reason.

Sources: the RMSD is that of microsoft/mattergen (evaluation/utils/utils.py, structure_matcher.py),
arXiv:2312.03687.
Not here: counting over samples (scores.py), relaxing (structures/relaxed_set.py), hulls (hull.py).
"""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from pymatgen.core import Lattice, Structure

from crystallm_kit.scores.stability.element_references import Check, ElementReferences
from crystallm_kit.scores.stability.hull import Hull
from crystallm_kit.structures.relaxation import Relaxed

# MatterGen's matcher of relaxed structures; not scaled, supercells tried
_RMSD_LENGTH, _RMSD_SITE, _RMSD_ANGLE_DEGREES = 0.5, 0.5, 10.0


@dataclass(frozen=True)
class Stability:
    """What was found of one sample that was relaxed, or why not.

    Attributes:
        n_elements, n_sites: Of the sample.
        energy_ev_per_atom: Under the potential, after the relaxation; NaN where that failed.
        formation_energy_ev_per_atom: Of it; NaN as well where an element has no reference energy.
        hull_distance_ev_per_atom: Of it; NaN as well where the hull lacks an element.
        submitted_hull_distance_ev_per_atom: Of the structure as it was submitted.
        n_competing: Compositions in the hull's chemical system, elements left out; 0: a sparse hull.
        converged: Whether the relaxation came to its end; one that did not still has energies, which are
            too high rather than too low.
        n_steps: Moves of the relaxation.
        reason: None, or not_converged, why the relaxation failed (Relaxed.reason), or
            "hull: no Og" or "references: no Og".
        rmsd_angstrom: From the structure submitted to the relaxed one, as MatterGen has it; NaN without one.
    """

    n_elements: int
    n_sites: int
    energy_ev_per_atom: float
    formation_energy_ev_per_atom: float
    hull_distance_ev_per_atom: float
    submitted_hull_distance_ev_per_atom: float
    n_competing: int
    converged: bool
    n_steps: int
    reason: str | None
    rmsd_angstrom: float = math.nan


@dataclass(frozen=True)
class Judge:
    """Who says what is stable.

    Attributes:
        potential: Its name, with its version.
        hull: The hull's name.
        check: How far the two are off on known crystals; None: not measured.
    """

    potential: str
    hull: str
    check: Check | None = None

    @property
    def note(self) -> str:
        """Return who judges, and how well, in a line."""
        check = self.check
        said = f"judge {self.potential}, hull {self.hull}"
        if check is None:
            return f"{said}; its error was not measured"
        other = "" if check.hull == self.hull else f" by the hull {check.hull}"
        return (
            f"{said}; hull distances off by {check.hull_distance_mae:.3f} eV/atom on {check.n} known{other}"
        )


def judge_of(references: ElementReferences, hull: Hull) -> Judge:
    """Return the judge of a potential's references and a hull, with the check on relaxed structures."""
    check = next((c for c in references.checks if c.structures == "relaxed"), None)
    return Judge(references.potential, hull.name, check)


def stability_of(
    relaxed: Relaxed,
    submitted: Structure,
    references: ElementReferences,
    hull: Hull,
    *,
    with_rmsd: bool = True,
) -> Stability:
    """Return what a relaxation says of a sample; never raises for elements that are missing."""
    composition = submitted.composition
    reason = relaxed.reason
    formation = distance = before = math.nan
    n_competing = 0
    lacking = references.missing_elements(composition)
    if lacking:
        reason = f"references: no {', '.join(lacking)}"
    else:
        formation = references.formation_energy(composition, relaxed.energy_ev_per_atom)
        place = hull.place(composition, formation)
        if place.distance_ev_per_atom is None:
            reason = f"hull: no {', '.join(place.missing)}"
        else:
            n_competing = place.n_competing
            distance = place.distance_ev_per_atom
            initial = references.formation_energy(composition, relaxed.initial_energy_ev_per_atom)
            before = hull.distance(composition, initial)
    found = relaxed.structure
    rmsd = rmsd_angstrom(found, submitted) if with_rmsd and found is not None else math.nan
    return Stability(
        n_elements=len(composition.elements), n_sites=len(submitted),
        energy_ev_per_atom=relaxed.energy_ev_per_atom, formation_energy_ev_per_atom=formation,
        hull_distance_ev_per_atom=distance, submitted_hull_distance_ev_per_atom=before,
        n_competing=n_competing, converged=relaxed.converged, n_steps=relaxed.n_steps, reason=reason,
        rmsd_angstrom=rmsd,
    )  # fmt: skip


def rmsd_angstrom(relaxed: Structure, submitted: Structure) -> float:
    """Return the RMS distance of a relaxed structure from the one submitted, as MatterGen has it.

    The submitted structure is refined (spglib, 0.01 angstrom), made primitive and LLL-reduced, where that
    is possible. No match: 0.5 (V/N)^(1/3), the largest that one could have.
    """
    from pymatgen.analysis.structure_matcher import StructureMatcher

    matcher: Any = StructureMatcher(
        ltol=_RMSD_LENGTH, stol=_RMSD_SITE, angle_tol=_RMSD_ANGLE_DEGREES, scale=False, attempt_supercell=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = _refined(submitted)
        found = matcher.get_rms_dist(relaxed, start)
        between = np.add(relaxed.lattice.parameters, start.lattice.parameters) / 2
        length = (Lattice.from_parameters(*between).volume / len(relaxed)) ** (1 / 3)
    return float(length * (_RMSD_SITE if found is None else found[0]))


def _refined(structure: Structure) -> Structure:
    from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

    try:
        refined = SpacegroupAnalyzer(structure).get_refined_structure().get_primitive_structure()
        reduced: Structure = refined.get_reduced_structure(reduction_algo="LLL")
    except Exception:  # noqa: BLE001 - spglib and pymatgen raise many kinds for cells without symmetry
        return structure
    return reduced
