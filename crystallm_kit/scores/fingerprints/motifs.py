"""How much the neighbours of an atom look like each of 37 motifs, compiled.

The six neighbours of Na in rock salt are 1.0 octahedral, 0.06 hexagonal planar, 0.01 pentagonal pyramidal:

    motif_values(unit_vectors)[MOTIFS[6]]

These are pymatgen's LocalStructOrderParams for the motifs of matminer's CrystalNNFingerprint "ops": each puts
one neighbour at the north pole and another on the prime meridian, adds Gaussians of the polar angle and
powers of a cosine of the azimuth of the rest, and takes the best choice of pole and meridian, or the mean.
They are discontinuous: limits decide by `<`, and a neighbour 1e-12 away from the pole has no azimuth. So the
arithmetic keeps to pymatgen's order, operation for operation, up to the limits; after them it may differ in
the last bit. What is shorter than in pymatgen is what is shared: the angles depend neither on the motif nor
on the number of neighbours, as these come by falling weight.

Not here: which neighbours, and their weights (neighbours.py).
Sources: Zimmermann and Jain, RSC Adv. 10, 6063 (2020); Peters, J. Chem. Phys. 131, 244103 (2009); Steinhardt
et al., Phys. Rev. B 28, 784 (1983). Parameters: op_params.yaml and cn_opt_params.yaml of pymatgen 2026.10
(https://github.com/materialsproject/pymatgen; MIT licence).
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]
Function = TypeVar("Function", bound=Callable[..., object])

MOST_NEIGHBOURS = 12  # of a motif; beyond, only the weight of the coordination number counts
_VERY_SMALL = 1e-12
_NO_PHI = -1.0
_ALIKE = 1e-12  # two terms of a sum
_SOUTH = 2.356194490192345  # 135 degrees

# Families of formulas, below
_SINGLE, _BENT, _POLAR, _SOUTHERN, _PENTAGON, _BCC, _CUBOCTAHEDRON, _STEINHARDT = range(8)


def compiled(function: Function) -> Function:
    """Compile a function on its first call, and keep it on disk.

    Only for functions that call none of another file: what is kept is not renewed when that one changes.
    """
    import numba

    return cast("Function", numba.njit(cache=True, error_model="numpy")(function))


class Motif(NamedTuple):
    """One order parameter.

    Attributes:
        neighbours: Coordination number that it stands for.
        name: As matminer prints it.
        family: Which formula.
        target, width: Polar angle in units of 180 degrees, and inverse width of its Gaussian; of a hexagon,
            the distance from 90 degrees; of Steinhardt's, target is l.
        folds: Factor of the azimuth in the cosine.
        south, south_width: Polar angle in radians from which a neighbour counts as the south pole, and the
            inverse width there.
        phi_limit: Azimuth from which a neighbour no longer counts.
        south_weight: Of the south pole.
    """

    neighbours: int
    name: str
    family: int
    target: float = 0.5
    width: float = 0.0
    folds: float = 1.0
    south: float = 0.0
    south_width: float = 0.0
    phi_limit: float = 4.0
    south_weight: float = 1.0


_TETRAHEDRAL = 0.6081734479693927
TABLE = (
    Motif(1, "sgl_bd", _SINGLE),
    Motif(2, "L-shaped", _BENT, 0.5, 15.15),
    Motif(2, "water-like", _BENT, 0.5802777777777778, 13.95),
    Motif(2, "bent 120 degrees", _BENT, 0.666666666667, 13.25),
    Motif(2, "bent 150 degrees", _BENT, 0.833333333333333, 12.45),
    Motif(2, "linear", _BENT, 1.0, 8.667),
    Motif(3, "trigonal planar", _POLAR, 0.66666666667, 17.5, 1.0),
    Motif(3, "trigonal non-coplanar", _POLAR, _TETRAHEDRAL, 18.33, 1.5),
    Motif(3, "T-shaped", _POLAR, 0.5, 15.5, 1.0),
    Motif(4, "square co-planar", _SOUTHERN, 0.5, 17.7, 1.0, _SOUTH, 13.5),
    Motif(4, "tetrahedral", _POLAR, _TETRAHEDRAL, 18.5, 1.5),
    Motif(4, "rectangular see-saw-like", _SOUTHERN, 0.5, 27.0, 2.0, _SOUTH, 11.5, 0.75 * math.pi),
    Motif(4, "see-saw-like", _SOUTHERN, 0.5, 15.75, 1.5, _SOUTH, 12.75),
    Motif(4, "trigonal pyramidal", _POLAR, 0.5, 15.5, 1.5),
    Motif(5, "pentagonal planar", _PENTAGON, 0.6, 19.333),
    Motif(5, "square pyramidal", _POLAR, 0.5, 14.9, 2.0),
    Motif(5, "trigonal bipyramidal", _SOUTHERN, 0.5, 16.6, 1.5, _SOUTH, 12.0),
    Motif(6, "hexagonal planar", _SOUTHERN, 0.16666667, 25.0, 1.0, 2.6179938779914944, 7.5),
    Motif(6, "octahedral", _SOUTHERN, 0.5, 18.0, 2.0, _SOUTH, 15.0),
    Motif(6, "pentagonal pyramidal", _POLAR, 0.5, 13.8, 2.5),
    Motif(7, "hexagonal pyramidal", _POLAR, 0.5, 12.5, 3.0),
    Motif(7, "pentagonal bipyramidal", _SOUTHERN, 0.5, 14.75, 2.5, _SOUTH, 12.5),
    Motif(8, "body-centered cubic", _BCC, south=2.5261129449194057, south_width=15.0, south_weight=6.0),
    Motif(8, "hexagonal bipyramidal", _SOUTHERN, 0.5, 13.6, 3.0, _SOUTH, 14.1),
    *(Motif(n, f"q{order}", _STEINHARDT, order) for n in (9, 10, 11) for order in (2, 4, 6)),
    Motif(12, "cuboctahedral", _CUBOCTAHEDRON, south=2.792526803190927, south_width=28.75, south_weight=1.8),
    *(Motif(12, f"q{order}", _STEINHARDT, order) for order in (2, 4, 6)),
)
# coordination number -> where its motifs stand in TABLE, and in what motif_values returns
MOTIFS = {
    n: slice(
        next(i for i, motif in enumerate(TABLE) if motif.neighbours == n),
        1 + max(i for i, motif in enumerate(TABLE) if motif.neighbours == n),
    )
    for n in range(1, MOST_NEIGHBOURS + 1)
}
_NUMBERS: FloatArray = np.array([[m.neighbours, m.family, *m[3:]] for m in TABLE], dtype=np.float64)

# of the cuboctahedron: equatorial band in radians, and inverse widths there and beyond
_BAND = (1.3089969389957472, 1.8325957145940461)
_BAND_WIDTH, _CAP_WIDTH = 25.5, 31.25


def motif_values(vectors: FloatArray, wanted: BoolArray) -> FloatArray:
    """Return the motifs' values, each of as many of the first neighbours as it stands for.

    Args:
        vectors: (K, 3) from the atom to its neighbours, by falling weight, angstrom; none of them zero.
        wanted: (13,) by coordination number; an entry above K is not looked at.

    Returns:
        (37,) as TABLE; 0 where not wanted, or not defined for these neighbours.
    """
    return np.asarray(_values(np.ascontiguousarray(vectors[:MOST_NEIGHBOURS]), wanted, _NUMBERS))


def order_matters(vectors: FloatArray, tied: IntArray) -> bool:
    """Tell whether the values depend on the order of neighbours that have the same weight.

    They do at most for the body-centered cube, whose sum takes of each two neighbours the earlier one as the
    pole: not where the two give the same either way.

    Args:
        vectors: (K, 3) as for motif_values.
        tied: (K,) the same number for neighbours whose order is arbitrary.
    """
    cube = next(i for i, motif in enumerate(TABLE) if motif.family == _BCC)
    n = TABLE[cube].neighbours
    return not _swaps_alike(np.ascontiguousarray(vectors[:n]), tied[:n], _NUMBERS[cube])


@compiled
def _dot(a: FloatArray, b: FloatArray) -> float:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]  # type: ignore[no-any-return]


@compiled
def _units(vectors: FloatArray) -> FloatArray:
    unit = np.empty_like(vectors)
    for i in range(len(vectors)):
        length = math.sqrt(_dot(vectors[i], vectors[i]))
        for c in range(3):
            unit[i, c] = vectors[i, c] / length
    return unit


@compiled
def _angle(cosine: float) -> float:
    return math.acos(max(-1.0, min(cosine, 1.0)))


@compiled
def _angles(unit: FloatArray) -> tuple[FloatArray, FloatArray, BoolArray]:
    """Return polar angles (pole, neighbour), azimuths (pole, meridian, neighbour), _NO_PHI where there is
    none, and whether (pole, meridian) has azimuths at all.
    """
    n = len(unit)
    theta = np.zeros((n, n))
    phi = np.full((n, n, n), _NO_PHI)
    has_axis = np.zeros((n, n), dtype=np.bool_)
    axis = np.zeros((n, 3))
    for j in range(n):
        square = _dot(unit[j], unit[j])
        for k in range(n):
            if k == j:
                continue
            cosine = _dot(unit[j], unit[k])
            theta[j, k] = _angle(cosine)
            for c in range(3):
                axis[k, c] = unit[k, c] - (cosine / square) * unit[j, c]
            length = math.sqrt(_dot(axis[k], axis[k]))
            has_axis[j, k] = not length < _VERY_SMALL
            if has_axis[j, k]:
                for c in range(3):
                    axis[k, c] /= length
        for k in range(n):
            for m in range(n):
                if m not in (j, k) and has_axis[j, k] and has_axis[j, m]:
                    phi[j, k, m] = _angle(_dot(axis[m], axis[k]))
    return theta, phi, has_axis


@compiled
def _gauss(x: float) -> float:
    return math.exp(-0.5 * x * x)


@compiled
def _polar_gauss(theta: float, neighbours: int, target: float, width: float) -> float:
    if neighbours == 6 and target < 0.2:  # hexagon: 30 degrees to either side of 90
        return _gauss(width * (math.fabs(theta * (1 / math.pi) - 0.5) - target))
    return _gauss(width * (theta * (1 / math.pi) - target))


@compiled
def _pentagon_gauss(theta: float, target: float, width: float) -> float:
    nearest = 0.4 if theta <= target * math.pi else 0.8
    return _gauss(width * (theta * (1 / math.pi) - nearest))


@compiled
def _cuboctahedron_gauss(theta: float, phi: float) -> float:
    if theta < _BAND[0] or theta > _BAND[1]:
        centre = 1 / 3 if theta < _BAND[0] else 2 / 3.0
        return _gauss(0.0556 * (math.cos(phi - 0.5 * math.pi) - 0.81649658)) * _gauss(
            _CAP_WIDTH * (theta * (1 / math.pi) - centre)
        )
    return math.cos(phi) ** 2 * _gauss(_BAND_WIDTH * (theta * (1 / math.pi) - 0.5))


@compiled
def _pole_and_meridian(
    j: int, k: int, theta: FloatArray, phi: FloatArray, has_axis: BoolArray, row: FloatArray
) -> tuple[float, float]:
    """Return the sum of the contributions, and their number, with j at the pole and k on the meridian."""
    n, family = int(row[0]), int(row[1])
    target, width, folds, south = row[2], row[3], row[4], row[5]
    south_width, phi_limit, south_weight = row[6], row[7], row[8]
    theta_k = theta[j, k]
    total = count = 0.0
    if family in (_POLAR, _BENT):
        total, count = _gauss(width * (theta_k * (1 / math.pi) - target)), 1.0
    elif family == _PENTAGON:
        total, count = _pentagon_gauss(theta_k, target, width), 1.0
    elif family == _SOUTHERN and theta_k < south:
        total, count = _polar_gauss(theta_k, n, target, width), 1.0
    elif family in (_CUBOCTAHEDRON, _BCC) and theta_k >= south:
        total = south_weight * _gauss(south_width * (theta_k * (1 / math.pi) - 1.0))
        count = south_weight
    if not has_axis[j, k] or family == _BENT:
        return total, count
    for m in range(n):
        if m in (j, k):
            continue
        theta_m, phi_m = theta[j, m], phi[j, k, m]
        if family == _SOUTHERN and theta_m >= south:
            total += _gauss(south_width * (theta_m * (1 / math.pi) - 1.0))
            count += 1
        if phi_m == _NO_PHI:
            continue
        if family == _POLAR:
            around = math.cos(folds * phi_m) ** 2
            total += around * _gauss(width * (theta_m * (1 / math.pi) - target))
            count += 1
        elif family == _PENTAGON:
            total += _pentagon_gauss(theta_m, target, width) * math.cos(phi_m) ** 2
            count += 1
        elif family == _SOUTHERN:
            if theta_m < south and theta_k < south and phi_m < phi_limit:
                total += math.cos(folds * phi_m) ** 2 * _polar_gauss(theta_m, n, target, width)
                count += 1
        elif family == _BCC:
            if theta_k < south:
                x = (theta_m - math.pi / 2.0) / math.asin(1 / 3)
                side = 1 if theta_k > math.pi / 2.0 else -1
                total += side * math.cos(3 * phi_m) * (1 / math.exp(-0.5)) * x * _gauss(x)
        elif (
            theta_m < south
            and _BAND[0] < theta_k < _BAND[1]
            # on the border of the band itself nothing is added
            and theta_m != _BAND[0]
            and theta_m != _BAND[1]
        ):
            total += _cuboctahedron_gauss(theta_m, phi_m)
            count += 1
    return total, count


@compiled
def _peters(theta: FloatArray, phi: FloatArray, has_axis: BoolArray, row: FloatArray) -> float:
    n, family = int(row[0]), int(row[1])
    total = count = 0.0
    best = -np.inf
    for j in range(n):
        for k in range(n):
            if k == j or (k < j and family == _BCC):  # that counts each pair once
                continue
            value, weight = _pole_and_meridian(j, k, theta, phi, has_axis, row)
            total += value
            count += weight
            best = max(best, value / weight if weight > 1e-12 else 0.0)
    if family == _BENT:
        return total / count
    if family == _BCC:
        return total / (0.5 * (n * (6 + (n - 2) * (n - 3))))
    return best


@compiled
def _swaps_alike(vectors: FloatArray, tied: IntArray, row: FloatArray) -> bool:
    theta, phi, has_axis = _angles(_units(vectors))
    for j in range(len(vectors)):
        for k in range(j):
            if tied[j] == tied[k]:
                one, _ = _pole_and_meridian(j, k, theta, phi, has_axis, row)
                other, _ = _pole_and_meridian(k, j, theta, phi, has_axis, row)
                if not abs(one - other) < _ALIKE:
                    return False
    return True


@compiled
def _legendre(order: int, m: int, c: float, s: float) -> float:
    """Return the part of the spherical harmonic Y_order,m that depends on the polar angle, up to its sign."""
    c2, s2 = c * c, s * s
    pi = math.pi
    if order == 2:
        if m == 0:
            return 0.25 * math.sqrt(5 / pi) * (3 * c2 - 1.0)
        if m == 1:
            return 0.5 * math.sqrt(15 / (2 * pi)) * s * c
        return 0.25 * math.sqrt(15 / (2 * pi)) * s2
    if order == 4:
        if m == 0:
            return 3 / 16 * math.sqrt(1 / pi) * (35 * c2 * c2 - 30 * c2 + 3.0)
        if m == 1:
            return 3 / 8 * math.sqrt(5 / pi) * s * (7 * c2 * c - 3 * c)
        if m == 2:
            return 3 / 8 * math.sqrt(5 / (2 * pi)) * s2 * (7 * c2 - 1.0)
        if m == 3:
            return 3 / 8 * math.sqrt(35 / pi) * s2 * s * c
        return 3 / 16 * math.sqrt(35 / (2 * pi)) * s2 * s2
    if m == 0:
        return 1 / 32 * math.sqrt(13 / pi) * (231 * c2 * c2 * c2 - 315 * c2 * c2 + 105 * c2 - 5.0)
    if m == 1:
        return 1 / 16 * math.sqrt(273 / (2 * pi)) * s * (33 * c2 * c2 * c - 30 * c2 * c + 5 * c)
    if m == 2:
        return 1 / 64 * math.sqrt(1365 / pi) * s2 * (33 * c2 * c2 - 18 * c2 + 1.0)
    if m == 3:
        return 1 / 32 * math.sqrt(1365 / pi) * s2 * s * (11 * c2 * c - 3 * c)
    if m == 4:
        return 3 / 32 * math.sqrt(91 / (2 * pi)) * s2 * s2 * (11 * c2 - 1.0)
    if m == 5:
        return 3 / 32 * math.sqrt(1001 / pi) * s2 * s2 * s * c
    return 1 / 64 * math.sqrt(3003 / pi) * s2 * s2 * s2


@compiled
def _steinhardt(unit: FloatArray, n: int, order: int) -> float:
    power = 0.0
    for m in range(order + 1):
        real = imaginary = 0.0
        for i in range(n):
            x, y, z = unit[i, 0], unit[i, 1], unit[i, 2]
            theta, phi = _angle(z), 0.0
            if -(1 - _VERY_SMALL) < z < 1 - _VERY_SMALL:
                phi = _angle(x / math.sqrt(x * x + y * y))
                if y < 0.0:
                    phi = -phi
            part = _legendre(order, m, math.cos(theta), math.sin(theta))
            real += part * math.cos(m * phi)
            imaginary += part * math.sin(m * phi)
        # -m has the same square as m
        power += (1 if m == 0 else 2) * (real * real + imaginary * imaginary)
    return math.sqrt(4 * math.pi * power / ((2 * order + 1) * n**2))


@compiled
def _values(vectors: FloatArray, wanted: BoolArray, table: FloatArray) -> FloatArray:
    unit = _units(vectors)
    theta, phi, has_axis = _angles(unit)
    values = np.zeros(len(table))
    for i in range(len(table)):
        row = table[i]
        n, family = int(row[0]), int(row[1])
        if n > len(unit) or not wanted[n]:
            continue
        if family == _SINGLE:
            values[i] = 1.0
        elif family == _STEINHARDT:
            values[i] = _steinhardt(unit, n, int(row[2]))
        else:
            values[i] = _peters(theta, phi, has_axis, row)
    return values
