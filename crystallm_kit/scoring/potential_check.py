"""Fitting a potential's element references, and measuring how far its hull distances are off.

    python -m crystallm_kit.scoring.potential_check --potential chgnet --fit mp_train.parquet \
        --test mp_test.parquet --hull mp20_hull_reference.parquet --out references.json

The crystals to fit on are evaluated as they are given (they are DFT's minima); those to test on are relaxed,
as generated ones are. Files need a column `formation_energy_per_atom`, the test file `e_above_hull` too. Both
are drawn with a seed; the fit's draw is topped up until each element has 10 crystals, where there are as
many.

Not here: the fit itself (scores/stability/element_references.py).
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
from pymatgen.core import Composition, Structure

from crystallm_kit.errors import EmptyInput, MissingExtra, UserError
from crystallm_kit.records import Crystal
from crystallm_kit.scores.stability.element_references import Check, ElementReferences, fit_references
from crystallm_kit.scores.stability.hull import Hull
from crystallm_kit.scores.stability.hull_sources import read_hull
from crystallm_kit.scores.stability.scores import METASTABLE_EV, STABLE_EV
from crystallm_kit.structures.files import read
from crystallm_kit.structures.relaxation import Relaxed, load_potential
from crystallm_kit.structures.relaxation_workers import RelaxSettings
from crystallm_kit.structures.relaxed_set import relax_set

FORMATION, DISTANCE = "formation_energy_ev_per_atom", "hull_distance_ev_per_atom"
_PER_ELEMENT = 10


def drawn(crystals: Sequence[Crystal], n: int, seed: int, *, per_element: int = 0) -> list[Crystal]:
    """Return n crystals at random, and more of those whose elements are in fewer than `per_element`."""
    order = [crystals[i] for i in np.random.default_rng(seed).permutation(len(crystals))]
    taken, left = order[:n], order[n:]
    counts = Counter(symbol for crystal in taken for symbol in _symbols(crystal))
    for crystal in left:
        symbols = _symbols(crystal)
        if any(counts[symbol] < per_element for symbol in symbols):
            taken.append(crystal)
            counts.update(symbols)
    return taken


def _symbols(crystal: Crystal) -> set[str]:
    return {element.symbol for element in crystal.structure.composition.elements}


def fit(
    crystals: Sequence[Crystal], *, potential: str, fitted_on: str, device: str | None = None
) -> ElementReferences:
    """Return the references of a potential from known crystals, evaluated as they are given."""
    loaded = load_potential(potential, device=device)
    compositions: list[Composition] = []
    energies, known = [], []
    for start in range(0, len(crystals), 100):
        some = sorted(crystals[start : start + 100], key=lambda c: len(c.structure))
        structures = [c.structure for c in some if isinstance(c.structure, Structure)]
        for crystal, structure, found in zip(some, structures, loaded(structures), strict=True):
            if not isinstance(found, str):
                compositions.append(structure.composition)
                energies.append(found.energy_ev / len(structure))
                known.append(float(crystal.properties[FORMATION]))
    library = {"chgnet": version("chgnet")} if potential == "chgnet" else {}
    return fit_references(
        compositions, energies, known, potential=loaded.name, fitted_on=fitted_on, versions=library
    )


def check(
    crystals: Sequence[Crystal],
    relaxed: Sequence[Relaxed],
    references: ElementReferences,
    hull: Hull,
    *,
    data: str,
    structures: str = "relaxed",
    note: str = "",
) -> Check:
    """Compare a potential's formation energies and hull distances with known ones.

    Args:
        crystals: With both known.
        relaxed: Their relaxations; those that failed count as failed.
        references: Of the potential.
        hull: The hull that distances are from.
        data: What the crystals are, in words.
        structures: "relaxed", or "as given": then the energies of the structures before.
        note: What else has to be known.

    Raises:
        EmptyInput: If no crystal can be compared.
    """
    rows = []
    for crystal, one in zip(crystals, relaxed, strict=True):
        composition = crystal.structure.composition
        energy = one.energy_ev_per_atom if structures == "relaxed" else one.initial_energy_ev_per_atom
        lacking = hull.missing_elements(composition) or references.missing_elements(composition)
        if lacking or not np.isfinite(energy):
            continue
        known, distance = (float(crystal.properties[key]) for key in (FORMATION, DISTANCE))
        found = references.formation_energy(composition, energy)
        rows.append(
            (found, known, hull.distance(composition, found), distance, hull.distance(composition, known))
        )
    if not rows:
        raise EmptyInput(f"{data}: none of {len(crystals)} crystals could be compared")
    found_, known_, far, known_far, far_of_known = np.array(rows).T
    return Check(
        data=data, n=len(crystals), n_failed=len(crystals) - len(rows), structures=structures,
        formation_energy_mae=_rounded(np.abs(found_ - known_)),
        formation_energy_bias=_rounded(found_ - known_),
        hull=hull.name,
        hull_distance_mae=_rounded(np.abs(far - known_far)),
        hull_distance_mae_of_hull=_rounded(np.abs(far_of_known - known_far)),
        metastable_agreement=_rounded((far <= METASTABLE_EV) == (known_far <= METASTABLE_EV)),
        stable_agreement=_rounded((far <= STABLE_EV) == (known_far <= STABLE_EV)),
        note=note,
    )  # fmt: skip


def _rounded(values: np.ndarray) -> float:
    return round(float(np.mean(values)), 5)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m crystallm_kit.scoring.potential_check", description=__doc__
    )
    parser.add_argument("--potential", default="chgnet", metavar="NAME", help="chgnet or module:factory")
    parser.add_argument("--fit", required=True, metavar="FILE", help="crystals with formation energies")
    parser.add_argument("--test", required=True, metavar="FILE", help="others, with e_above_hull too")
    parser.add_argument("--hull", required=True, metavar="FILE", help="energies that the hull is made of")
    parser.add_argument("--out", type=Path, required=True, metavar="JSON", help="the references")
    parser.add_argument("--n-fit", type=int, default=2500, metavar="N")
    parser.add_argument("--n-test", type=int, default=300, metavar="N")
    parser.add_argument("--max-sites", type=int, default=20, metavar="N", help="larger crystals are left out")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that relax (default: all cores)")
    parser.add_argument("--work", type=Path, metavar="DIR", help="folder of the relaxations, to resume them")
    parser.add_argument("--note", default="", help="kept with the checks, and printed with them")
    options = parser.parse_args(arguments)
    try:
        references = _run(options)
    except (UserError, MissingExtra) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    references.save(options.out)
    for one in references.checks:
        print(one)
    return 0


def _run(options: argparse.Namespace) -> ElementReferences:
    hull = read_hull(options.hull)
    sets = {}
    for name, needed in (("fit", (FORMATION,)), ("test", (FORMATION, DISTANCE))):
        path = getattr(options, name)
        crystals = [c for c in read(path) if len(c.structure) <= options.max_sites]
        lacking = [key for key in needed if any(key not in c.properties for c in crystals)]
        if lacking:
            raise UserError(f"{path}: crystals without {', '.join(lacking)}")
        sets[name] = crystals
    chosen = drawn(sets["fit"], options.n_fit, options.seed, per_element=_PER_ELEMENT)
    where = f"{Path(options.fit).name}, {len(chosen)} crystals as given, at most {options.max_sites} sites"
    references = fit(chosen, potential=options.potential, fitted_on=f"{where}, seed {options.seed}")
    print(f"fitted on {references.n_fitted}: {references.fit_mae_ev_per_atom} eV/atom left", file=sys.stderr)
    tested = drawn(sets["test"], options.n_test, options.seed)
    found = relax_set(
        [(c.id, c.structure) for c in tested if isinstance(c.structure, Structure)], options.work,
        settings=RelaxSettings(potential=options.potential), workers=options.workers,
        say=lambda done, n: print(f"relaxed {done} of {n}", file=sys.stderr) if done % 50 == 0 else None,
    )  # fmt: skip
    said = f"{Path(options.test).name}, {len(tested)} crystals, seed {options.seed}"
    relaxed = [found[c.id] for c in tested]
    checks = tuple(
        check(tested, relaxed, references, hull, data=said, structures=kind, note=options.note)
        for kind in ("relaxed", "as given")
    )
    return replace(references, checks=checks)


if __name__ == "__main__":
    raise SystemExit(main())
