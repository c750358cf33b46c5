"""Is one generated structure a crystal, and the one that was asked for? One Verdict each, with its reason.

Checks run in the order of the funnel, and the first that fails is the reason:

    cell -> formula, elements, n_elements, anonymous_formula, n_sites -> crystal_system, spacegroup
         -> sensible_cell, overlap, density -> charge -> bonds

What was asked for is checked under every protocol, as far as conditions are given; the rest is in
`PROTOCOLS`, one row a name. Rock salt with Na and Cl 0.4 angstrom apart gives
    Verdict(valid=False, reason="overlap", detail="Na0-Cl1: 0.400 angstrom, at least 1.750 expected", ...)

The protocol "kit" counts the periodic images of the same atom, which the published checks leave out: Fe in a
cubic cell of 0.48 angstrom passes cdvae, Li at 1.3 angstrom passes LeMat-GenBench's distance check. Its
distance rule, d >= 0.5 (0.7 + r_i + r_j) with Slater's atomic radii, is LeMat's, and real crystals pass it:
see thresholds.py.

Not here: the limits (thresholds.py); parsing (text/parsing.py); duplicates and counts over many samples
(funnel.py); matching, hull distances.
Sources: with the limits, in thresholds.py.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from pymatgen.core import Element, Molecule, Structure

from crystallm_kit.errors import UnknownName, UserError
from crystallm_kit.records import Conditions, Crystal, Verdict
from crystallm_kit.scores.bonds import bond_score
from crystallm_kit.scores.charge import is_charge_balanced
from crystallm_kit.scores.distances import atomic_radii
from crystallm_kit.scores.measures import MeasuredCrystal, MeasuredMolecule, Measures
from crystallm_kit.scores.thresholds import PROTOCOLS, Protocol
from crystallm_kit.structures.symmetry import crystal_system

# The shortest real bonds (N2, C2H2) are at 0.77 of the sum of the covalent radii.
MOLECULE_OVERLAP = 0.6


def validate(
    crystal: Crystal | Structure | Molecule,
    *,
    conditions: Conditions | None = None,
    protocol: str = "kit",
    stated_spacegroup: int | None = None,
) -> Verdict:
    """Judge one structure: valid, or exactly one reason why not.

    Args:
        crystal: What was generated, in any cell.
        conditions: What was asked. Formulas are compared reduced, unless `n_sites` is the sum of the formula:
            then the primitive cell has to hold just these atoms. Wanted properties are not checked here.
        protocol: A name of `PROTOCOLS`. Molecules know "kit" only, and no symmetry.
        stated_spacegroup: Number that the text states, compared with what is found at 0.1 angstrom.

    Raises:
        UnknownName: If no protocol has that name.
        UserError: If a molecule is judged by a crystal's protocol, or asked for a space group.
    """
    verdict, _ = validate_and_measure(
        crystal,
        conditions=conditions,
        protocol=protocol,
        stated_spacegroup=stated_spacegroup,
        measure_symmetry=False,
    )
    return verdict


def validate_and_measure(
    crystal: Crystal | Structure | Molecule,
    *,
    conditions: Conditions | None = None,
    protocol: str = "kit",
    stated_spacegroup: int | None = None,
    measure_symmetry: bool = True,
) -> tuple[Verdict, Measures]:
    """Return `validate` and `measure` of one structure, with the symmetry and the distances found once.

    Args:
        measure_symmetry: False: leave the space group out of the measures where no check needed it (most of
            the time goes there).
    """
    if protocol not in PROTOCOLS:
        raise UnknownName.among("protocol", protocol, PROTOCOLS)
    structure = crystal.structure if isinstance(crystal, Crystal) else crystal
    wanted = conditions or Conditions()
    if not structure.is_ordered:
        detail = "a site is partly or mixedly occupied; ordered sites expected"
        return Verdict(False, "parse:disordered", detail, {"ordered": False}), {}
    if isinstance(structure, Molecule):
        if protocol != "kit":
            raise UserError(
                f"protocol '{protocol}' judges crystals, got the molecule {structure.formula}; use 'kit'"
            )
        if wanted.spacegroup_number or wanted.crystal_system or stated_spacegroup:
            raise UserError(f"a space group was asked of the molecule {structure.formula}; leave it out")
        molecule = MeasuredMolecule(structure)
        return _run(_molecule_checks(molecule, wanted)), molecule.measures()
    found = MeasuredCrystal(structure)
    verdict = _run(_crystal_checks(found, wanted, PROTOCOLS[protocol], stated_spacegroup))
    return verdict, found.measures(with_symmetry=measure_symmetry)


# (name of the check, reason where it fails, the check: "" or what is wrong)
_Check = tuple[str, str, Callable[[], str]]


def _run(checks: Iterator[_Check]) -> Verdict:
    passed: dict[str, bool] = {}
    for name, reason, check in checks:
        detail = check()
        passed[name] = not detail
        if detail:
            return Verdict(False, reason, detail, passed)
    return Verdict(True, checks=passed)


def _crystal_checks(
    found: MeasuredCrystal, wanted: Conditions, protocol: Protocol, stated_spacegroup: int | None
) -> Iterator[_Check]:
    yield "cell", "cell", lambda: found.cell_fault
    yield from _composition_checks(found.counts, wanted)
    overlaps = bool(protocol.pair_distance_angstrom or protocol.radius_scale)
    if overlaps and found.is_collapsed:  # not that the symmetry is wrong: none can be told
        yield "overlap", "overlap", lambda: _overlap_fault(found, protocol)
    yield from _symmetry_checks(found, wanted, stated_spacegroup)
    yield from _geometry_checks(found, protocol)
    if protocol.charge:
        yield "charge", "charge", lambda: _charge_fault(found.counts, protocol)
    if protocol.bond_score:
        yield "bonds", "bonds", lambda: _bond_fault(found.structure, protocol)


def _symmetry_checks(
    found: MeasuredCrystal, wanted: Conditions, stated_spacegroup: int | None
) -> Iterator[_Check]:
    if wanted.n_sites is not None:
        yield "n_sites", "formula_mismatch", lambda: _n_sites_fault(found, wanted)
    if wanted.crystal_system is not None:
        yield "crystal_system", "spacegroup_mismatch", lambda: _crystal_system_fault(found, wanted)
    asked = {"stated": stated_spacegroup, "asked for": wanted.spacegroup_number}
    if any(number is not None for number in asked.values()):
        yield "spacegroup", "spacegroup_mismatch", lambda: _spacegroup_fault(found, asked)


def conditions_met(found: MeasuredCrystal, wanted: Conditions) -> dict[str, bool]:
    """Tell of every condition that is asked, wanted properties aside, whether a crystal with a cell meets it.

    Returns:
        Names of `Conditions` ("spacegroup" for its number); those that are not asked are absent.
    """
    checks = (*_composition_checks(found.counts, wanted), *_symmetry_checks(found, wanted, None))
    return {name: not check() for name, _, check in checks}


def _geometry_checks(found: MeasuredCrystal, protocol: Protocol) -> Iterator[_Check]:
    yield "sensible_cell", "cell", lambda: _sensible_cell_fault(found, protocol)
    if protocol.pair_distance_angstrom or protocol.radius_scale:
        yield "overlap", "overlap", lambda: _overlap_fault(found, protocol)
    yield "density", "density", lambda: _density_fault(found, protocol)


def has_valid_geometry(found: MeasuredCrystal, protocol: Protocol) -> bool:
    """Tell whether cell, distances and density keep a protocol's limits; charge and bonds are left out."""
    return not found.cell_fault and all(not check() for _, _, check in _geometry_checks(found, protocol))


def _molecule_checks(found: MeasuredMolecule, wanted: Conditions) -> Iterator[_Check]:
    yield "coordinates", "cell", lambda: _molecule_fault(found)
    yield from _composition_checks(found.counts, wanted)
    if wanted.n_sites is not None:
        n_sites = wanted.n_sites
        yield "n_sites", "formula_mismatch", lambda: _differs("atoms", len(found.numbers), n_sites)
    yield "overlap", "overlap", lambda: _molecule_overlap_fault(found)


def _composition_checks(counts: Counter[str], wanted: Conditions) -> Iterator[_Check]:
    reason = "formula_mismatch"
    if wanted.formula is not None:
        formula = wanted.formula
        yield "formula", reason, lambda: _differs("formula", _reduced(counts), _reduced(formula))
    if wanted.elements:
        yield "elements", reason, lambda: _missing(counts, wanted)
    if wanted.only_elements:
        yield "only_elements", reason, lambda: _foreign(counts, wanted)
    if wanted.n_elements is not None:
        n_elements = wanted.n_elements
        yield "n_elements", reason, lambda: _differs("number of elements", len(counts), n_elements)
    if wanted.anonymous_formula is not None:
        anonymous = wanted.anonymous_formula
        yield "anonymous_formula", reason, lambda: _differs("stoichiometry", _anonymous(counts), anonymous)


def _differs(what: str, got: object, expected: object) -> str:
    return "" if got == expected else f"{what} {got}, {expected} expected"


def _reduced(counts: Mapping[str, int]) -> str:
    """One text for a formula in any order and any multiple: elements by name, counts divided out."""
    divisor = math.gcd(*counts.values()) if counts else 1
    return "".join(
        f"{symbol}{n // divisor if n > divisor else ''}" for symbol, n in sorted(counts.items()) if n
    )


def _anonymous(counts: Mapping[str, int]) -> str:
    from pymatgen.core import Composition

    return str(Composition(dict(counts)).anonymized_formula)


def _missing(counts: Counter[str], wanted: Conditions) -> str:
    missing = [symbol for symbol in wanted.elements if symbol not in counts]
    return f"{_reduced(counts)} has no {', '.join(missing)}" if missing else ""


def _foreign(counts: Counter[str], wanted: Conditions) -> str:
    allowed = set(wanted.elements) | set(wanted.formula or ())
    foreign = sorted(set(counts) - allowed)
    return (
        f"{_reduced(counts)} has {', '.join(foreign)}; only {'-'.join(sorted(allowed))} expected"
        if foreign
        else ""
    )


def _n_sites_fault(found: MeasuredCrystal, wanted: Conditions) -> str:
    if found.symmetry is None:
        return "no symmetry found, so no primitive cell"
    return _differs("sites in the primitive cell", len(found.symmetry.prim_std_cell.numbers), wanted.n_sites)


def _crystal_system_fault(found: MeasuredCrystal, wanted: Conditions) -> str:
    if found.symmetry is None:
        return f"no symmetry found, {wanted.crystal_system} expected"
    return _differs("crystal system", crystal_system(int(found.symmetry.number)), wanted.crystal_system)


def _spacegroup_fault(found: MeasuredCrystal, asked: Mapping[str, int | None]) -> str:
    if found.symmetry is None:
        return "no space group found at 0.1 angstrom"
    number = int(found.symmetry.number)
    wrong = [f"{n} {how}" for how, n in asked.items() if n is not None and n != number]
    return f"space group {number} found at 0.1 angstrom, {' and '.join(wrong)}" if wrong else ""


def _sensible_cell_fault(found: MeasuredCrystal, protocol: Protocol) -> str:
    lattice = found.structure.lattice
    if not found.volume >= protocol.volume_angstrom3:
        return f"volume {found.volume:.3g} angstrom^3, at least {protocol.volume_angstrom3:g} expected"
    for what, values, (low, high) in (
        ("cell edge", lattice.abc, protocol.lengths_angstrom),
        ("cell angle", lattice.angles, protocol.angles_degree),
    ):
        for value in values:
            if not low <= value <= high:
                return f"{what} {value:.3f}, {low:g} to {high:g} expected"
    return ""


def _overlap_fault(found: MeasuredCrystal, protocol: Protocol) -> str:
    near = found.distances
    radii = atomic_radii()[found.numbers]
    scale, offset = protocol.radius_scale, protocol.radius_offset_angstrom
    if near.distance.size:
        limit = np.maximum(
            scale * (offset + radii[near.first] + radii[near.second]), protocol.pair_distance_angstrom
        )
        worst = int((near.distance / limit).argmin())
        if near.distance[worst] < limit[worst]:
            a, b = int(near.first[worst]), int(near.second[worst])
            return _too_close(f"{_label(found, a)}-{_label(found, b)}", near.distance[worst], limit[worst])
    if protocol.self_images:
        largest = int(radii.argmax())
        limit_self = max(scale * (offset + 2 * radii[largest]), protocol.pair_distance_angstrom)
        if near.self_image < limit_self:
            return _too_close(f"{_label(found, largest)} and its own image", near.self_image, limit_self)
    return ""


def _label(found: MeasuredCrystal | MeasuredMolecule, index: int) -> str:
    return f"{Element.from_Z(int(found.numbers[index])).symbol}{index}"


def _too_close(who: str, distance: float, limit: float) -> str:
    return f"{who}: {distance:.3f} angstrom, at least {limit:.3f} expected"


def _density_fault(found: MeasuredCrystal, protocol: Protocol) -> str:
    for what, value, (low, high) in (
        ("density in g/cm3", found.density, protocol.density_g_cm3),
        ("sites per angstrom^3", len(found.numbers) / found.volume, protocol.sites_per_angstrom3),
    ):
        if not low <= value <= high:
            return f"{what} {value:.3g}, {low:g} to {high:g} expected"
    return ""


def _charge_fault(counts: Counter[str], protocol: Protocol) -> str:
    if is_charge_balanced(counts, max_combinations=protocol.max_combinations):
        return ""
    return f"{_reduced(counts)}: no neutral and plausible oxidation states, one per element (SMACT 2.2.1)"


def _bond_fault(structure: Structure, protocol: Protocol) -> str:
    try:
        score = bond_score(structure)
    except UserError as error:
        return str(error)
    return (
        ""
        if score >= protocol.bond_score
        else f"{score:.3f} of the bonds are of plausible length, all expected"
    )


def _molecule_fault(found: MeasuredMolecule) -> str:
    if not len(found.numbers):
        return "no atoms"
    return "" if np.isfinite(found.coordinates).all() else "a coordinate is not a finite number"


def _molecule_overlap_fault(found: MeasuredMolecule) -> str:
    if not found.distance.size:
        return ""
    limit = MOLECULE_OVERLAP * found.radii_sum
    worst = int((found.distance / limit).argmin())
    if found.distance[worst] >= limit[worst]:
        return ""
    pair = f"{_label(found, int(found.first[worst]))}-{_label(found, int(found.second[worst]))}"
    return _too_close(pair, found.distance[worst], limit[worst])
