"""The elements in the order in which formulas name them: by electronegativity, ties by symbol, unknown last.

Frozen from the Pauling values of pymatgen 2026.10, because token ids depend on it; libraries revise such
tables.
Atomic weights are pymatgen's, as an array.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

GRAM_PER_CM3 = 1.66053906892  # of one atomic mass unit per cubic angstrom (CODATA 2022)

ELEMENTS: tuple[str, ...] = tuple(
    """
    Fr Cs K Rb Ba Ra Na Sr Li Ca Ac La Tb Yb Ce Pm Pr Nd Sm Eu Gd Dy Y Ho Er Tm Lu Pu Am Bk Cf Cm Es Fm Hf
    Lr Md No Th Mg Zr Np Sc U Pa Ta Ti Mn Be Nb Al Tl V Zn Cr Cd In Ga Fe Co Cu Re Si Tc Ni Ag Sn Hg Po Ge
    Bi B Sb Te Mo As P At H Ir Os Pd Rn Ru Pt Rh Pb W Au C Se S Xe I Br Kr N Cl O F Ar He Ne
    """.split()
)
RANK: dict[str, int] = {symbol: i for i, symbol in enumerate(ELEMENTS)}

_BY_NUMBER = """
    H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr Rb
    Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf
    Ta W Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr
    """.split()
ATOMIC_NUMBER: dict[str, int] = {symbol: z for z, symbol in enumerate(_BY_NUMBER, start=1)}
SYMBOL: dict[int, str] = {z: symbol for symbol, z in ATOMIC_NUMBER.items()}


@lru_cache(maxsize=1)
def atomic_weights() -> npt.NDArray[np.float64]:
    """Return (119,) standard atomic weights by atomic number, in atomic mass units; entry 0 is 0."""
    from pymatgen.core import Element

    return np.array([0.0, *(float(Element.from_Z(z).atomic_mass) for z in range(1, 119))])


def density_g_cm3(atomic_numbers: Sequence[int] | npt.NDArray[np.int64], volume_angstrom3: float) -> float:
    """Return the mass density of atoms in a cell: pymatgen's `Structure.density` without its cost."""
    return float(atomic_weights()[np.asarray(atomic_numbers)].sum()) / volume_angstrom3 * GRAM_PER_CM3
