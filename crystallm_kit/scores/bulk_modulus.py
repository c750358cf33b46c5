"""Bulk moduli from equations of state under a machine-learned potential.

    >>> bulk_moduli([nacl], load_potential("chgnet"))
    [BulkModulus(gpa=22.9, reason=None, volume_per_atom_angstrom3=22.9, ...)]

Protocol: the crystal is relaxed, cell and atoms; then its cell is scaled to 7 volumes within 6 % of the
relaxed one, the shape kept, and at each the atoms relax; then the third-order Birch-Murnaghan equation (Birch
1947, doi:10.1103/PhysRev.71.809) is fitted to the energies, and its curvature at its own minimum is the
modulus. What cannot be fitted has a reason instead of a number.

Scaling keeps the shape, so a crystal that pressure would distort comes out a little stiffer than by its
elastic tensor.

Not here: the potential and the relaxation (structures/relaxation.py).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pymatgen.core import Structure

from crystallm_kit.structures.relaxation import EV_PER_ANGSTROM3_IN_GPA, Potential, Relaxed, relax

VOLUME_RATIOS = (0.94, 0.96, 0.98, 1.0, 1.02, 1.04, 1.06)
# Of the energies' spread. Under CHGNet half of 100 AFLOW crystals leave less than 0.004, 99 of them less than
# 0.02; atoms that jump from one arrangement to another between two volumes leave more.
WORST_RESIDUAL = 0.05
_ION_STEPS = 60


@dataclass(frozen=True)
class BulkModulus:
    """The bulk modulus of one crystal, or why there is none.

    Attributes:
        gpa: None where there is a reason.
        reason: None, or one of: relaxation:<why> (not relaxed; see Relaxed), no_minimum (none among the
            volumes), no_smooth_curve (residual above WORST_RESIDUAL), scaling:<why> (a scaled crystal could
            not be evaluated).
        relaxed: The relaxation.
        volume_per_atom_angstrom3: At the minimum of the fitted curve; NaN where there is none.
        residual: Root mean square of fit minus energies, over the spread of the energies.
    """

    gpa: float | None
    reason: str | None
    relaxed: Relaxed
    volume_per_atom_angstrom3: float = math.nan
    residual: float = math.nan


def bulk_moduli(
    structures: Sequence[Structure],
    potential: Potential,
    *,
    relax_atoms: bool = True,
    max_force_ev_per_angstrom: float = 0.05,
    max_steps: int = 300,
) -> list[BulkModulus]:
    """Return the bulk modulus of each crystal.

    Args:
        structures: In primitive cells, to be quick.
        potential: What gives energies, forces and stresses.
        relax_atoms: Whether atoms relax in the scaled cells; static scaling is quicker, and too stiff where
            atoms have freedom.
        max_force_ev_per_angstrom, max_steps: Of the relaxation before.

    Returns:
        One record for each crystal, in order.
    """
    relaxed = relax(
        structures, potential, max_force_ev_per_angstrom=max_force_ev_per_angstrom, max_steps=max_steps
    )
    usable = [r.structure for r in relaxed if r.converged and r.structure is not None]
    scaled = [_scaled(structure, ratio) for structure in usable for ratio in VOLUME_RATIOS]
    found = relax(
        scaled, potential, cell=False,
        # a half of the limit: what is left in the forces is an error of the energies
        max_force_ev_per_angstrom=max_force_ev_per_angstrom / 2 if relax_atoms else math.inf,
        max_steps=_ION_STEPS if relax_atoms else 0,
    )  # fmt: skip
    curves = iter(zip(*[iter(found)] * len(VOLUME_RATIOS), strict=True))
    moduli = []
    for r in relaxed:
        if not r.converged:
            moduli.append(BulkModulus(None, f"relaxation:{r.reason}", r))
        else:
            moduli.append(_modulus(r, next(curves)))
    return moduli


def _scaled(structure: Structure, ratio: float) -> Structure:
    scaled: Structure = structure.copy()
    scaled.scale_lattice(structure.volume * ratio)
    return scaled


def _modulus(relaxed: Relaxed, curve: Sequence[Relaxed]) -> BulkModulus:
    # atoms that have not quite come to rest in a scaled cell leave their error in the residual
    failed = next((point for point in curve if point.structure is None), None)
    if failed is not None:
        return BulkModulus(None, f"scaling:{failed.reason}", relaxed)
    volumes = [p.structure.volume / len(p.structure) for p in curve if p.structure is not None]
    fit = birch_murnaghan(volumes, [p.energy_ev_per_atom for p in curve])
    if fit is None:
        return BulkModulus(None, "no_minimum", relaxed)
    if fit.residual > WORST_RESIDUAL:
        return BulkModulus(None, "no_smooth_curve", relaxed, fit.volume, fit.residual)
    return BulkModulus(fit.gpa, None, relaxed, fit.volume, fit.residual)


@dataclass(frozen=True)
class Fit:
    """A fitted equation of state: volume and modulus (GPa) at its minimum; residual as in BulkModulus."""

    volume: float
    gpa: float
    residual: float


def birch_murnaghan(volumes: Sequence[float], energies: Sequence[float]) -> Fit | None:
    """Fit the third-order Birch-Murnaghan equation.

    It is a cubic polynomial in x = volume^(-2/3), so the fit is linear.

    Args:
        volumes: In angstrom^3, 5 or more.
        energies: In eV, of the same atoms.

    Returns:
        The fit, or None if the curve has no minimum within the volumes.
    """
    v: NDArray[np.float64] = np.asarray(volumes, dtype=float)
    e: NDArray[np.float64] = np.asarray(energies, dtype=float)
    # centred and scaled, so that the fit is well conditioned
    x0 = v.mean() ** (-2 / 3)
    x = v ** (-2 / 3) / x0 - 1
    polynomial = np.polynomial.Polynomial.fit(x, e - e.min(), 3)
    c = polynomial.deriv().convert().coef  # of the slope, c0 + c1 x + c2 x^2
    discriminant = c[1] ** 2 - 4 * c[0] * c[2]
    if discriminant <= 0:
        return None
    curvature = math.sqrt(discriminant)  # at the minimum; the slope's other root is a maximum
    # of two equal expressions the one without a difference of large numbers; c2 may be 0
    minimum = -2 * c[0] / (c[1] + curvature) if c[1] > 0 else (curvature - c[1]) / (2 * c[2])
    if not x.min() <= minimum <= x.max():
        return None
    volume = float((x0 * (1 + minimum)) ** (-3 / 2))
    # dE/dV = 0 there, so V d2E/dV2 = V (dx/dV)^2 d2E/dx2, with dx/dV = -2/3 V^(-5/3) / x0
    modulus = 4 / 9 * volume ** (-7 / 3) / x0**2 * curvature
    residual = float(np.sqrt(np.mean((polynomial(x) - (e - e.min())) ** 2)) / np.ptp(e))
    return Fit(volume, float(modulus) * EV_PER_ANGSTROM3_IN_GPA, residual)
