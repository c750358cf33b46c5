"""First rows of the embedding for element tokens, so that alike elements start alike.

A small model sees few crystals of each element; with rows that start near those of chemical neighbours, what
it learns of Na helps K from the first step. Each row is a fixed random projection of period, group,
electronegativity and radius, with the mean and spread of an ordinary initialisation, so that nothing else has
to be tuned for it.

    Na is nearer to K than to Cl, and F nearer to Cl than to Na.

Not here: the rest of the initialisation (checkpoints.py).

Sources: electronegativity after Pauling as in pymatgen's periodic table (- where there is none); covalent
radii in angstrom of Cordero et al. 2008 (doi:10.1039/b801115j), for Bk-Lr, which it lacks, 2.00.
"""

from collections.abc import Sequence

import numpy as np

# Symbol, electronegativity, covalent radius in angstrom; in the order of atomic number.
_TABLE = """
    H 2.2 0.31, He - 0.28, Li 0.98 1.28, Be 1.57 0.96, B 2.04 0.84, C 2.55 0.76, N 3.04 0.71, O 3.44 0.66,
    F 3.98 0.57, Ne - 0.58, Na 0.93 1.66, Mg 1.31 1.41, Al 1.61 1.21, Si 1.9 1.11, P 2.19 1.07, S 2.58 1.05,
    Cl 3.16 1.02, Ar - 1.06, K 0.82 2.03, Ca 1 1.76, Sc 1.36 1.70, Ti 1.54 1.60, V 1.63 1.53, Cr 1.66 1.39,
    Mn 1.55 1.39, Fe 1.83 1.32, Co 1.88 1.26, Ni 1.91 1.24, Cu 1.9 1.32, Zn 1.65 1.22, Ga 1.81 1.22,
    Ge 2.01 1.20, As 2.18 1.19, Se 2.55 1.20, Br 2.96 1.20, Kr 3 1.16, Rb 0.82 2.20, Sr 0.95 1.95,
    Y 1.22 1.90, Zr 1.33 1.75, Nb 1.6 1.64, Mo 2.16 1.54, Tc 1.9 1.47, Ru 2.2 1.46, Rh 2.28 1.42,
    Pd 2.2 1.39, Ag 1.93 1.45, Cd 1.69 1.44, In 1.78 1.42, Sn 1.96 1.39, Sb 2.05 1.39, Te 2.1 1.38,
    I 2.66 1.39, Xe 2.6 1.40, Cs 0.79 2.44, Ba 0.89 2.15, La 1.1 2.07, Ce 1.12 2.04, Pr 1.13 2.03,
    Nd 1.14 2.01, Pm 1.13 1.99, Sm 1.17 1.98, Eu 1.2 1.98, Gd 1.2 1.96, Tb 1.1 1.94, Dy 1.22 1.92,
    Ho 1.23 1.92, Er 1.24 1.89, Tm 1.25 1.90, Yb 1.1 1.87, Lu 1.27 1.87, Hf 1.3 1.75, Ta 1.5 1.70,
    W 2.36 1.62, Re 1.9 1.51, Os 2.2 1.44, Ir 2.2 1.41, Pt 2.28 1.36, Au 2.54 1.36, Hg 2 1.32, Tl 1.62 1.45,
    Pb 2.33 1.46, Bi 2.02 1.48, Po 2 1.40, At 2.2 1.50, Rn 2.2 1.50, Fr 0.7 2.60, Ra 0.9 2.21, Ac 1.1 2.15,
    Th 1.3 2.06, Pa 1.5 2.00, U 1.38 1.96, Np 1.36 1.90, Pu 1.28 1.87, Am 1.3 1.80, Cm 1.3 1.69,
    Bk 1.3 2.00, Cf 1.3 2.00, Es 1.3 2.00, Fm 1.3 2.00, Md 1.3 2.00, No 1.3 2.00, Lr 1.3 2.00
"""

_NOBLE_GASES = (2, 10, 18, 36, 54, 86, 118)


def _rows() -> dict[str, tuple[int, float | None, float]]:
    rows = (entry.split() for entry in _TABLE.replace("\n", " ").split(","))
    return {
        symbol: (number, None if negativity == "-" else float(negativity), float(radius))
        for number, (symbol, negativity, radius) in enumerate(rows, start=1)
    }


ELEMENTS: dict[str, tuple[int, float | None, float]] = _rows()


def period_and_group(number: int) -> tuple[int, int]:
    """Return the period (1-7) and group (1-18; 3 for the f block) of an atomic number."""
    period = next(i for i, last in enumerate(_NOBLE_GASES, start=1) if number <= last)
    start = (0, *_NOBLE_GASES)[period - 1]
    length = _NOBLE_GASES[period - 1] - start
    position = number - start
    if position <= 2 and number != 2:
        return period, position
    from_end = length - position
    return period, max(3, 18 - from_end)


def element_features(symbols: Sequence[str]) -> np.ndarray:
    """Return what the rows are made of; each column has mean 0 and spread 1 over the table.

    Columns: period, sine and cosine of the group over 18, group over 18, f block or not, electronegativity
    (the
    table's mean where there is none), covalent radius.

    Returns:
        (len(symbols), 7) float64.

    Raises:
        KeyError: If a symbol is not in the table (H to Lr).
    """
    negativities = [row[1] for row in ELEMENTS.values() if row[1] is not None]
    mean = float(np.mean(negativities))

    def features(symbol: str) -> list[float]:
        number, negativity, radius = ELEMENTS[symbol]
        period, group = period_and_group(number)
        angle = 2 * np.pi * group / 18
        is_f_block = 57 <= number <= 70 or 89 <= number <= 102
        negativity = mean if negativity is None else negativity
        return [period, np.sin(angle), np.cos(angle), group, is_f_block, negativity, radius]

    table = np.array([features(symbol) for symbol in ELEMENTS], dtype=np.float64)
    wanted = np.array([features(symbol) for symbol in symbols], dtype=np.float64).reshape(len(symbols), -1)
    return np.asarray((wanted - table.mean(0)) / table.std(0))


def element_rows(symbols: Sequence[str], width: int, *, spread: float, seed: int) -> np.ndarray:
    """Return first embedding rows for elements.

    Three quarters of the variance come from the features, the rest is noise of each row's own, so that no two
    elements start the same.

    Args:
        symbols: Element symbols.
        width: Width of the embedding.
        spread: Standard deviation of the rows, over all of them.
        seed: Of the projection and the noise.

    Returns:
        (len(symbols), width) float32.
    """
    random = np.random.default_rng(seed)
    features = element_features(symbols)
    projected = features @ random.standard_normal((features.shape[1], width))
    projected /= max(float(projected.std()), 1e-12)
    rows = np.sqrt(0.75) * projected + np.sqrt(0.25) * random.standard_normal(projected.shape)
    return np.asarray(rows * spread, dtype=np.float32)
