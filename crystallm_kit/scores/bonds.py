"""CrystaLLM's bond score: the share of bonds whose length is plausible.

Rock salt scores 1: every Na-Cl bond of 2.82 angstrom is 0.99 of the expected 2.83 or so.

A loophole runs the other way: the score fails many real perovskites (33 of 150 entries of Perov-5 are not
valid under "crystallm"), and crystals whose neighbours are all images of one site have none.
Source: Antunes et al., Nat. Commun. 15, 10570 (2024).
"""

import warnings
from typing import Any

from pymatgen.core import Structure

from crystallm_kit.errors import UserError


def bond_score(structure: Structure) -> float:
    """Return the share of bonds whose length is plausible, as CrystaLLM counts it: see `count_bonds`.

    Raises:
        UserError: If nothing can be counted (all neighbours are images of one site, or a radius is unknown).
    """
    n_good, n_bonds = count_bonds(structure)
    if n_bonds == 0:
        raise UserError(f"{structure.formula}: no bond between different sites, so no share of good ones")
    return n_good / n_bonds


def count_bonds(structure: Structure) -> tuple[int, int]:
    """Return how many bonds are of plausible length, and how many there are.

    Bonds are pymatgen's CrystalNN neighbours with another site index, each counted from both ends. The
    expected length is the sum of the mean cationic and anionic radius where electronegativities differ by 1.7
    or more, else of the atomic radii; good is a ratio in (0.68, 1.32), with hydrogen below 2.5.

    Raises:
        UserError: If CrystalNN fails, or a radius is unknown.
    """
    from pymatgen.analysis.local_env import CrystalNN

    n_good = n_bonds = 0
    with warnings.catch_warnings():
        # CrystalNN asks for oxidation states, pymatgen warns of missing radii.
        warnings.simplefilter("ignore")
        neighbours: Any = CrystalNN()  # type: ignore[no-untyped-call]
        for index, site in enumerate(structure):
            try:
                bonded = neighbours.get_nn_info(structure, index)
            except (ValueError, RuntimeError, IndexError) as error:
                raise UserError(f"CrystalNN fails at site {index} ({site.specie}): {error}") from error
            for other in bonded:
                if other["site_index"] == index:
                    continue
                partner = other["site"]
                ratio = site.distance(partner) / _expected_bond_length(site.specie, partner.specie)
                has_hydrogen = "H" in (site.specie.symbol, partner.specie.symbol)
                n_good += ratio < 2.5 if has_hydrogen else 0.68 < ratio < 1.32
                n_bonds += 1
    return n_good, n_bonds


def _expected_bond_length(a: Any, b: Any) -> float:
    low, high = (a, b) if a.X < b.X else (b, a)
    if abs(a.X - b.X) >= 1.7:
        radii = low.average_cationic_radius, high.average_anionic_radius
    else:
        radii = a.atomic_radius, b.atomic_radius
    if any(radius is None for radius in radii):
        raise UserError(f"no radius known for a bond {a}-{b}")
    return float(radii[0]) + float(radii[1])
