"""All checks of all protocols on one structure at once, and their shares over a set.

    structure_checks(structure)            -> {"cdvae.structure_valid": True, "lemat.distance": False, ...}
    check_scores({name: column}, 10_000)   -> [Score("cdvae.structure_valid", 1.0, 10000, 10000), ...]

Distances, cell and symmetry are found once a structure, the charge rules once a composition. Names are
those of `CHECKS`; a check whose input is not there (a text, a fingerprint, bonds) is absent from the row, not
False.

The peers' loopholes are kept under their names, and the number without the loophole stands beside each:
    images of the same atom     kit.cdvae_structure_valid_with_images, kit.lemat_distance_with_images,
                                kit.structure_valid (which also wants a plausible density)
    elements and alloys pass    kit.comp_valid_compounds: the rest alone
    stated P1 always passes     kit.spacegroup_consistent_not_p1
    dropped denominators        kit.<name>_of_requested beside the peer's own

Not here: the limits (thresholds.py), LeMat's rule (lemat.py, lemat_charge.py), the first reason that fails
(validity.py), what the protocols are (protocols.py), other numbers over a set (statistics.py).
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pymatgen.core import Molecule, Structure

from crystallm_kit.errors import EmptyInput, UserError
from crystallm_kit.scores import lemat
from crystallm_kit.scores.bonds import count_bonds
from crystallm_kit.scores.charge import is_charge_balanced, smact_tables
from crystallm_kit.scores.cif_statements import CifStatements
from crystallm_kit.scores.measures import MeasuredCrystal
from crystallm_kit.scores.score import Score, mean, share
from crystallm_kit.scores.thresholds import PROTOCOLS
from crystallm_kit.scores.validity import has_valid_geometry

MAX_COMBINATIONS = 1e7  # of DiffCSP, CrystaLLM and CrystaLLM-pi; the others have no cap
BOND_SCORE = 1.0  # that CrystaLLM calls valid

# Name -> what passing means, in the order of reports. Those marked (text), (bonds) or (fingerprint) need more
# than the structure.
CHECKS: dict[str, str] = {
    "kit.structure_valid": "LeMat's distances, images of the same atom included; plausible density and cell",
    "kit.comp_valid": "SMACT's rule, no cap on combinations",
    "kit.cdvae_structure_valid_with_images": "cdvae.structure_valid, images of the same atom included",
    "kit.lemat_distance_with_images": "lemat.distance, images of the same atom included",
    "kit.element_or_alloy": "one element, or metals only: SMACT's rule lets it pass whatever the counts",
    "cdvae.structure_valid": "volume from 0.1 A^3, different sites from 0.5 A",
    "cdvae.comp_valid": "SMACT's rule, no cap on combinations",
    "cdvae.fingerprintable": "(fingerprint) CrystalNN fingerprints of all sites",
    "cdvae.valid": "(fingerprint) structure, composition, fingerprint",
    "diffcsp.structure_valid": "as cdvae",
    "diffcsp.comp_valid": "SMACT's rule; above 1e7 combinations False",
    "diffcsp.valid": "(fingerprint) structure, composition, fingerprint",
    "crystal_text_llm.structure_valid": "as cdvae",
    "crystal_text_llm.comp_valid": "as cdvae",
    "crystal_text_llm.valid": "(fingerprint) structure, composition, fingerprint",
    "mattergen.structure_valid": "as cdvae, meant for the relaxed structure",
    "mattergen.comp_valid": "as cdvae",
    "crystallm.sensible": "lengths in 0.5 to 1000 A, angles in 10 to 170 degrees, as far as they are found",
    "crystallm.structure_valid": "as cdvae",
    "crystallm.comp_valid": "as diffcsp",
    "crystallm.csp_valid": "sensible, structure, composition",
    "crystallm.formula_consistent": "(text) title, sum and structural formula reduce to the same",
    "crystallm.multiplicity_consistent": "(text) multiplicities add up to the sum formula",
    "crystallm.spacegroup_consistent": "(text) the symbol stated is the one found at 0.1 A",
    "kit.spacegroup_consistent_not_p1": "(text) crystallm.spacegroup_consistent, and not P1",
    "crystallm.valid": "(text, bonds) formula, multiplicity, bond score 1, space group",
    "crystallm_pi.structure_valid_xrd": "as cdvae, no edge over 40 A",
    "crystallm_pi.comp_valid": "as diffcsp",
    "crystallm_pi.formula_consistent": "(text) as crystallm; the geometry has the sum formula",
    "crystallm_pi.valid": "(text, bonds) formula, multiplicity, bond score 1, space group",
    "crystallm_pi.accepted": "(text, bonds) sensible, formula, bond score 1, space group",
    "lemat.charge_neutral": "LeMat's rule: metallicity, bond valences, oxidation states",
    "lemat.distance": "different sites from 0.5 (0.7 + radii) A",
    "lemat.plausible": "density, cell, a space group at 0.01 A",
    "lemat.valid": "all three",
}
BOND_SCORES = ("crystallm.bond_score", "crystallm_pi.bond_score")  # numbers, not truths
# What the peer divides by what it could parse.
_OF_PARSABLE = ("crystal_text_llm.structure_valid", "crystal_text_llm.comp_valid", "crystal_text_llm.valid")
_IMAGES = {
    "cdvae.structure_valid": "kit.cdvae_structure_valid_with_images",
    "diffcsp.structure_valid": "kit.cdvae_structure_valid_with_images",
    "lemat.distance": "kit.lemat_distance_with_images",
}
_MEASURES = ("lemat.spacegroup_number",)
_NOT_SHOWN = ("kit.element_or_alloy",)  # counted in kit.comp_valid_compounds
_WITH_IMAGES = {name: replace(PROTOCOLS[name], self_images=True) for name in ("cdvae", "lemat_geometry")}


def structure_checks(
    structure: Structure | Molecule | None,
    *,
    cif_text: str | None = None,
    with_bonds: bool = False,
    is_fingerprintable: bool | None = None,
) -> dict[str, bool | float]:
    """Return every check that can be made of one structure, by its name.

    Args:
        structure: As generated, operators expanded. None, a molecule, or shared sites: it fails everything.
        cif_text: The CIF that it was read from, for the checks of the text.
        with_bonds: Whether to count bonds, which takes far longer than all the rest.
        is_fingerprintable: Whether all its sites have a fingerprint (fingerprints/); None: not tried.

    Returns:
        Names of CHECKS; with bonds also BOND_SCORES, absent where the peer raises; "lemat.spacegroup_number"
        (spglib's at 0.01 angstrom, for statistics.py), absent where there is none.
    """
    with warnings.catch_warnings():
        # pymatgen's, once for each of He, Ne, Ar and the like
        warnings.filterwarnings("ignore", message="No Pauling electronegativity", category=UserWarning)
        return _checked(structure, cif_text, with_bonds, is_fingerprintable)


def _checked(
    structure: Structure | Molecule | None,
    cif_text: str | None,
    with_bonds: bool,
    is_fingerprintable: bool | None,
) -> dict[str, bool | float]:
    case = _Case(structure, None if cif_text is None else CifStatements(cif_text))
    row: dict[str, bool | float] = {**case.of_structure(), **case.of_composition(), **case.of_lemat()}
    row["crystallm.sensible"] = case.is_sensible
    row["crystallm.csp_valid"] = bool(
        case.is_sensible and row["crystallm.structure_valid"] and row["crystallm.comp_valid"]
    )
    if is_fingerprintable is not None:
        row["cdvae.fingerprintable"] = is_fingerprintable
        for name in ("cdvae", "diffcsp", "crystal_text_llm"):
            row[f"{name}.valid"] = bool(
                is_fingerprintable and row[f"{name}.structure_valid"] and row[f"{name}.comp_valid"]
            )
    if cif_text is not None:
        row |= case.of_text()
    if with_bonds:
        row |= case.of_bonds()
    if cif_text is not None and with_bonds:
        row |= _text_with_bonds(row)
    return {name: row[name] for name in (*CHECKS, *BOND_SCORES, *_MEASURES) if name in row}


class _Case:
    """One structure and its text, with what several checks ask of them."""

    def __init__(self, structure: Structure | Molecule | None, text: CifStatements | None) -> None:
        self.structure = structure if isinstance(structure, Structure) and structure.is_ordered else None
        self.found = None if self.structure is None else MeasuredCrystal(self.structure)
        self.text = text

    def of_structure(self) -> dict[str, bool]:
        cdvae = self._geometry("cdvae")
        return {
            "kit.structure_valid": self._geometry("kit") and self._has_stated_sites,
            "kit.cdvae_structure_valid_with_images": cdvae and self._geometry_with_images("cdvae"),
            **{
                f"{name}.structure_valid": cdvae
                for name in ("cdvae", "diffcsp", "crystal_text_llm", "mattergen", "crystallm")
            },
            "crystallm_pi.structure_valid_xrd": self._geometry("crystallm_pi_xrd"),
        }

    def of_composition(self) -> dict[str, bool]:
        free = capped = trivial = False
        if self.found is not None and self.found.counts:
            counts = self.found.counts
            free = is_charge_balanced(counts)
            capped = free and is_charge_balanced(counts, max_combinations=MAX_COMBINATIONS)
            trivial = len(counts) == 1 or smact_tables().metals.issuperset(counts)
        names = {"kit": free, "cdvae": free, "diffcsp": capped, "crystal_text_llm": free, "mattergen": free,
                 "crystallm": capped, "crystallm_pi": capped}  # fmt: skip
        return {"kit.element_or_alloy": trivial, **{f"{name}.comp_valid": ok for name, ok in names.items()}}

    def of_lemat(self) -> dict[str, bool | float]:
        number = None
        if self.found is None:
            found = dict.fromkeys(lemat.NAMES, False)
        else:
            number = None if self.found.cell_fault else lemat.lemat_spacegroup_number(self.found)
            found = lemat.checks_of(self.found, number)
        images = found["distance"] and self._geometry_with_images("lemat_geometry", only_distances=True)
        return {
            **{f"lemat.{name}": passed for name, passed in found.items()},
            "lemat.valid": all(found.values()),
            "kit.lemat_distance_with_images": images,
            **({} if number is None else {"lemat.spacegroup_number": number}),
        }

    @cached_property
    def is_sensible(self) -> bool:
        if self.text is not None:
            return self.text.is_sensible
        if self.found is None or self.found.cell_fault:
            return False
        lattice, protocol = self.found.structure.lattice, PROTOCOLS["crystallm_csp"]
        return all(
            low <= value <= high
            for values, (low, high) in (
                (lattice.abc, protocol.lengths_angstrom),
                (lattice.angles, protocol.angles_degree),
            )
            for value in values
        )

    def of_text(self) -> dict[str, bool]:
        text = self.text
        if text is None:
            return {}
        formula = text.are_formulas_consistent
        same = self.structure is not None and text.spacegroup_symbol == self._symbol_found
        return {
            "crystallm.formula_consistent": formula,
            "crystallm.multiplicity_consistent": text.are_multiplicities_consistent,
            "crystallm.spacegroup_consistent": same,
            "kit.spacegroup_consistent_not_p1": same and text.spacegroup_symbol != "P1",
            "crystallm_pi.formula_consistent": (
                formula and self.structure is not None and text.agrees_with(self.structure.composition)
            ),
        }

    def of_bonds(self) -> dict[str, float]:
        if self.structure is None or self.found is None or self.found.cell_fault:
            return {}
        try:
            good, counted = count_bonds(self.structure)
        except UserError:
            return {}
        # v1 divides by no bonds, and raises; pi says 0.
        own = {"crystallm.bond_score": good / counted} if counted else {}
        return {**own, "crystallm_pi.bond_score": good / counted if counted else 0.0}

    def _geometry(self, protocol: str) -> bool:
        return self.found is not None and has_valid_geometry(self.found, PROTOCOLS[protocol])

    def _geometry_with_images(self, protocol: str, *, only_distances: bool = False) -> bool:
        limits = _WITH_IMAGES[protocol]
        if only_distances:
            limits = replace(
                limits, volume_angstrom3=0.0, lengths_angstrom=(0.0, np.inf), density_g_cm3=(0.0, np.inf),
                sites_per_angstrom3=(0.0, np.inf),
            )  # fmt: skip
        return self.found is not None and has_valid_geometry(self.found, limits)

    @property
    def _has_stated_sites(self) -> bool:
        if self.text is None or self.structure is None:
            return True
        return self.text.has_sites_of(self.structure.composition)

    @cached_property
    def _symbol_found(self) -> str | None:
        if self.found is None or self.found.cell_fault:
            return None
        dataset = lemat.spglib_dataset(self.found, 0.1)
        return None if dataset is None else str(dataset.international)


def _text_with_bonds(row: Mapping[str, bool | float]) -> dict[str, bool]:
    same = bool(row["crystallm.spacegroup_consistent"])
    multiplicity = bool(row["crystallm.multiplicity_consistent"])
    good = {p: row.get(f"{p}.bond_score", 0.0) >= BOND_SCORE for p in ("crystallm", "crystallm_pi")}
    pi_formula = bool(row["crystallm_pi.formula_consistent"])
    return {
        "crystallm.valid": bool(
            row["crystallm.formula_consistent"] and multiplicity and good["crystallm"] and same
        ),
        "crystallm_pi.valid": pi_formula and multiplicity and good["crystallm_pi"] and same,
        "crystallm_pi.accepted": bool(
            row["crystallm.sensible"] and pi_formula and good["crystallm_pi"] and same
        ),
    }


Columns = Mapping[str, Sequence[bool | float | None] | NDArray[Any]]


def check_scores(columns: Columns, n_requested: int) -> list[Score]:
    """Return the shares of a set, peers' numbers and those without their loopholes beside them.

    Args:
        columns: Name of a check -> one entry a sample; None (or NaN): it could not be parsed, which counts as
            not passed. Columns of other names are passed over; rows may be missing for samples that failed.
        n_requested: What the shares are of.

    Raises:
        EmptyInput: If nothing was requested.
        UserError: If a column has more entries than were requested.
    """
    if n_requested < 1:
        raise EmptyInput("checks: no samples requested, so no shares")
    truths: dict[str, NDArray[np.bool_]] = {}
    for name in (*CHECKS, *BOND_SCORES):
        if name in columns:
            if len(columns[name]) > n_requested:
                got = f"{len(columns[name])} samples, but {n_requested} requested"
                raise UserError(f"{name}: {got}; give the number of requests, failures included")
            if name in CHECKS:
                truths[name] = np.array([x is not None and x == 1 for x in columns[name]], dtype=bool)
    scores = [
        score
        for name in CHECKS
        if name in truths and name not in _NOT_SHOWN
        for score in _shares(name, truths, columns, n_requested)
    ]
    scores += [
        score for name in BOND_SCORES if name in columns for score in _bond_scores(name, columns[name])
    ]
    return scores


def _shares(
    name: str, truths: Mapping[str, NDArray[np.bool_]], columns: Columns, n_requested: int
) -> list[Score]:
    passed = int(truths[name].sum())
    note = _note(name, truths, n_requested)
    if name in _OF_PARSABLE:
        n_parsable = sum(x is not None and x == x for x in columns[name])
        protocol, _, metric = name.partition(".")
        beside = share(f"kit.{protocol}_{metric}_of_requested", passed, n_requested)
        if not n_parsable:
            return [beside]
        return [share(name, passed, n_parsable, over="parsable", note=note), beside]
    scores = [share(name, passed, n_requested, note=note)]
    if name == "kit.comp_valid" and "kit.element_or_alloy" in truths:
        compounds = ~truths["kit.element_or_alloy"] & _known(columns["kit.element_or_alloy"])
        if compounds.any():
            n_valid = int((truths[name] & compounds).sum())
            scores.append(
                share("kit.comp_valid_compounds", n_valid, int(compounds.sum()), over="compounds",
                      note="without single elements and alloys, which always pass")
            )  # fmt: skip
    return scores


def _note(name: str, truths: Mapping[str, NDArray[np.bool_]], n_requested: int) -> str:
    """Return what has to be known beside the number: its loophole, with the number without it."""
    beside = _IMAGES.get(name, "")
    if beside in truths:
        return f"images of the same atom are not looked at; with them {int(truths[beside].sum())}"
    if name.endswith(".comp_valid") and "kit.element_or_alloy" in truths:
        n_trivial = int(truths["kit.element_or_alloy"].sum())
        return f"{n_trivial} of {n_requested} are single elements or alloys, which always pass"
    if name == "crystallm.spacegroup_consistent" and "kit.spacegroup_consistent_not_p1" in truths:
        return (
            f"a stated P1 always passes; without it {int(truths['kit.spacegroup_consistent_not_p1'].sum())}"
        )
    if name == "crystallm.sensible":
        return "a number that is missing or negative is not found, and passes"
    if name.startswith("mattergen."):
        return "the peer checks the relaxed structure; here it is the one given"
    if name in _OF_PARSABLE:
        return "the peer never counts what cannot be parsed; kit.<name>_of_requested does"
    return ""


def _known(column: Sequence[bool | float | None] | NDArray[Any]) -> NDArray[np.bool_]:
    return np.array([x is not None and x == x for x in column], dtype=bool)


def _bond_scores(name: str, column: Sequence[bool | float | None] | NDArray[Any]) -> list[Score]:
    values = [float(x) for x in column if x is not None and x == x]
    if not values:
        return []
    return [mean(name, values, unit="share", over="scored", better="higher",
                 note="structures whose bonds cannot be counted are left out")]  # fmt: skip
