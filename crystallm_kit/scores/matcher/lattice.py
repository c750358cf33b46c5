"""Lattices as pymatgen's StructureMatcher treats them, compiled.

    index, cart, distance = points_in_sphere(matrix, radius)
    basis, mapping, ties = lll_reduced(matrix, -1)

Contract: rows are lattice vectors, angstrom and degrees. The order of points and the bases are those of
pymatgen, because which of equal ones comes first decides further on; comparisons that rounding could turn
(`NEAR`) are reported as close.

Not here: the primitive cell (reduction.py), comparing (kernel.py).
Sources: pymatgen-core 2026.10.16, core/lattice.py, optimization/neighbors.pyx (MIT licence).
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

NEAR = 1e-9  # relative; rounding differs by about 1e-14
_SPHERE_TOLERANCE = 1e-8  # of find_points_in_spheres
_SMALLEST_SPHERE = 1.0
_MOST_POINTS = 4_000_000.0  # of a lattice in a sphere: cells beyond are needles

Array = Any  # numba arrays
Function = TypeVar("Function", bound=Callable[..., Any])


def kernel(function: Function) -> Function:
    """Compile a function of the matcher where another one calls it.

    It is not cached by itself, as numba sees no changes in other files: compiled.py caches the
    entries.
    """
    return cast(Function, njit(nogil=True, error_model="numpy")(function))


@kernel
def lengths_of(matrix: Array) -> Array:
    """Return the lengths of the rows."""
    out = np.empty(matrix.shape[0])
    for i in range(matrix.shape[0]):
        out[i] = math.sqrt(
            matrix[i, 0] * matrix[i, 0] + matrix[i, 1] * matrix[i, 1] + matrix[i, 2] * matrix[i, 2]
        )
    return out


@kernel
def inner(a: Array, i: int, b: Array, j: int) -> float:
    """Return the scalar product of row i of a and row j of b."""
    return a[i, 0] * b[j, 0] + a[i, 1] * b[j, 1] + a[i, 2] * b[j, 2]  # type: ignore[no-any-return]


@kernel
def angles_of(matrix: Array, lengths: Array) -> Array:
    """Return alpha, beta, gamma in degrees."""
    out = np.empty(3)
    for i in range(3):
        j, k = (i + 1) % 3, (i + 2) % 3
        cosine = inner(matrix, j, matrix, k) / (lengths[j] * lengths[k])
        out[i] = math.degrees(math.acos(min(1.0, max(-1.0, cosine))))
    return out


@kernel
def determinant(m: Array) -> float:
    """Return the determinant of a (3, 3) matrix."""
    return (  # type: ignore[no-any-return]
        m[0, 0] * (m[1, 1] * m[2, 2] - m[1, 2] * m[2, 1])
        - m[0, 1] * (m[1, 0] * m[2, 2] - m[1, 2] * m[2, 0])
        + m[0, 2] * (m[1, 0] * m[2, 1] - m[1, 1] * m[2, 0])
    )


@kernel
def inverse(m: Array) -> Array:
    """Return the inverse of a (3, 3) matrix; its columns are the reciprocal vectors, without 2 pi."""
    out = np.empty((3, 3))
    scale = 1.0 / determinant(m)
    for i in range(3):
        a, b = (i + 1) % 3, (i + 2) % 3
        for j in range(3):
            c, d = (j + 1) % 3, (j + 2) % 3
            out[j, i] = (m[a, c] * m[b, d] - m[a, d] * m[b, c]) * scale
    return out


@kernel
def spacings(matrix: Array) -> Array:
    """Return the inverse distances of the lattice planes: lengths of the reciprocal vectors, without 2 pi."""
    columns = inverse(matrix)
    out = np.empty(3)
    for i in range(3):
        out[i] = math.sqrt(columns[0, i] ** 2 + columns[1, i] ** 2 + columns[2, i] ** 2)
    return out


@intrinsic  # type: ignore[untyped-decorator]
def fused(context: Any, a: Any, b: Any, c: Any) -> Any:  # noqa: ARG001 - as numba calls it
    """Return a b + c rounded once, as the matrix products of numpy are made of on processors that can."""
    signature = types.float64(types.float64, types.float64, types.float64)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        return builder.fma(*arguments)

    return signature, generate


@kernel
def product(a: Array, b: Array) -> Array:
    """Return a (N, 3) times b (3, 3), to the last digit as numpy does for N > 1."""
    out = np.empty((a.shape[0], 3))
    for i in range(a.shape[0]):
        for j in range(3):
            out[i, j] = fused(a[i, 2], b[2, j], fused(a[i, 1], b[1, j], a[i, 0] * b[0, j]))
    return out


@kernel
def exact_inverse(m: Array) -> Array:
    """Return the inverse of a (3, 3) matrix, to the last digit as numpy does."""
    unit = np.zeros((3, 3))
    for i in range(3):
        unit[i, i] = 1.0
    return np.linalg.solve(m, unit)


@kernel
def multiply(a: Array, b: Array, out: Array) -> None:
    """Set out to a (N, 3) times b (3, 3), to the last digit as numpy does row by row."""
    for i in range(a.shape[0]):
        for j in range(3):
            out[i, j] = a[i, 0] * b[0, j] + a[i, 1] * b[1, j] + a[i, 2] * b[2, j]


@kernel
def lll_reduced(matrix: Array, choices: int) -> tuple[Array, Array, int]:
    """Return the basis of Lattice.get_lll_reduced_lattice (delta 0.75), its mapping, and the number of ties.

    Args:
        matrix: (3, 3) rows are lattice vectors.
        choices: What to do at ties, where rounding chooses the basis (a coefficient of one half, as in
            hexagonal cells): bit t says how the tie t goes, up or down. -1: as it comes.
    """
    a = matrix.copy()  # rows are vectors; pymatgen works with columns
    b = np.zeros((3, 3))
    u = np.zeros((3, 3))
    m = np.zeros(3)
    mapping = np.eye(3)
    ties = 0
    for i in range(3):
        _orthogonalise(a, b, u, m, i)
    k = 1
    for _ in range(10_000):  # ends far sooner for a cell; a NaN must not turn for ever
        if k > 2:
            break
        for i in range(k - 1, -1, -1):
            coefficient = u[k, i]
            q = np.rint(coefficient)
            if abs(abs(coefficient - math.floor(coefficient)) - 0.5) < NEAR:
                if choices >= 0:
                    q = math.floor(coefficient) + ((choices >> ties) & 1)
                ties += 1
            if q != 0:
                for axis in range(3):
                    a[k, axis] -= q * a[i, axis]
                    mapping[k, axis] -= q * mapping[i, axis]
                for j in range(i):
                    u[k, j] -= q * u[i, j]
                u[k, i] -= q
        left, right = inner(b, k, b, k), (0.75 - u[k, k - 1] ** 2) * inner(b, k - 1, b, k - 1)
        goes_on = left >= right
        if abs(left - right) < NEAR * m[k - 1]:
            if choices >= 0:
                goes_on = (choices >> ties) & 1 == 0
            ties += 1
        if goes_on:
            k += 1
            continue
        for axis in range(3):
            a[k, axis], a[k - 1, axis] = a[k - 1, axis], a[k, axis]
            mapping[k, axis], mapping[k - 1, axis] = mapping[k - 1, axis], mapping[k, axis]
        for i in range(k - 1, k + 1):
            _orthogonalise(a, b, u, m, i)
        if k > 1:
            k -= 1
        else:
            for j in range(2):
                u[2, j] = inner(a, 2, b, j) / m[j]
    return a, mapping, ties


@kernel
def _orthogonalise(a: Array, b: Array, u: Array, m: Array, i: int) -> None:
    for j in range(i):
        u[i, j] = inner(a, i, b, j) / m[j]
    for axis in range(3):
        value = a[i, axis]
        for j in range(i):
            value -= b[j, axis] * u[i, j]
        b[i, axis] = value
    m[i] = inner(b, i, b, i)


@kernel
def points_in_sphere(matrix: Array, radius: float) -> tuple[Array, Array, Array]:
    """Return the lattice points around the origin, in the order of Lattice.get_points_in_sphere.

    That order is by the eighth or plane of space they lie in, each from the last point to the first.

    Returns:
        (P, 3) integer coordinates, (P, 3) cartesian ones, (P,) distances; P = 0 for needles and NaN.
    """
    searched = radius if radius >= _SMALLEST_SPHERE else _SMALLEST_SPHERE + _SPHERE_TOLERANCE
    volume = abs(determinant(matrix))
    if not (searched**3 * 4.2 < _MOST_POINTS * volume):
        return np.empty((0, 3), np.int64), np.empty((0, 3)), np.empty(0)
    reach = spacings(matrix)
    most = np.empty(3, np.int64)
    for i in range(3):
        most[i] = math.floor(searched * reach[i] * (1 + 1e-6) + 1e-6)
    if (2.0 * most[0] + 1) * (2.0 * most[1] + 1) * (2.0 * most[2] + 1) > 8 * _MOST_POINTS:
        return np.empty((0, 3), np.int64), np.empty((0, 3)), np.empty(0)
    room = 64
    index = np.empty((room, 4), np.int64)  # and the cube that it lies in
    cart = np.empty((room, 3))
    limit = searched * searched + _SPHERE_TOLERANCE
    count = 0
    filled = np.zeros(27, np.int64)
    for i in range(-most[0], most[0] + 1):
        for j in range(-most[1], most[1] + 1):
            for k in range(-most[2], most[2] + 1):
                x = i * matrix[0, 0] + j * matrix[1, 0] + k * matrix[2, 0]
                y = i * matrix[0, 1] + j * matrix[1, 1] + k * matrix[2, 1]
                z = i * matrix[0, 2] + j * matrix[1, 2] + k * matrix[2, 2]
                if not (x * x + y * y + z * z < limit):
                    continue
                if count == room:
                    room *= 2
                    larger, larger_index = np.empty((room, 3)), np.empty((room, 4), np.int64)
                    for row in range(count):
                        for axis in range(3):
                            larger[row, axis] = cart[row, axis]
                        for axis in range(4):
                            larger_index[row, axis] = index[row, axis]
                    cart, index = larger, larger_index
                index[count, 0], index[count, 1], index[count, 2] = i, j, k
                cart[count, 0], cart[count, 1], cart[count, 2] = x, y, z
                start = searched + 2 * _SPHERE_TOLERANCE
                index[count, 3] = (
                    9 * math.floor((x + start) / searched)
                    + 3 * math.floor((y + start) / searched)
                    + math.floor((z + start) / searched)
                )
                filled[index[count, 3]] += 1
                count += 1
    for i in range(1, 27):
        filled[i] += filled[i - 1]
    out_index = np.empty((count, 3), np.int64)
    out_cart = np.empty((count, 3))
    for i in range(count):  # each cube is filled from its end
        place = filled[index[i, 3]] - 1
        filled[index[i, 3]] = place
        for axis in range(3):
            out_index[place, axis] = index[i, axis]
            out_cart[place, axis] = fused(
                float(index[i, 2]),
                matrix[2, axis],
                fused(float(index[i, 1]), matrix[1, axis], index[i, 0] * matrix[0, axis]),
            )
    distance = lengths_of(out_cart)
    if searched != radius:
        kept = 0
        for i in range(count):
            if distance[i] <= radius:
                distance[kept] = distance[i]
                for axis in range(3):
                    out_index[kept, axis], out_cart[kept, axis] = out_index[i, axis], out_cart[i, axis]
                kept += 1
        return out_index[:kept], out_cart[:kept], distance[:kept]
    return out_index, out_cart, distance


@kernel
def stable_order(keys: Array) -> Array:
    """Return the indices that sort integers, equal ones as they come."""
    n = keys.shape[0]
    order = np.empty(n, np.int64)
    for i in range(n):
        j = i
        while j > 0 and keys[order[j - 1]] > keys[i]:
            order[j] = order[j - 1]
            j -= 1
        order[j] = i
    return order


@kernel
def within_length(distance: Array, length: float, tolerance: float) -> tuple[Array, bool]:
    """Return the points whose distance is a length's, within a relative tolerance, and if one was close."""
    close = False
    found = np.empty(distance.shape[0], np.int64)
    count = 0
    for i in range(distance.shape[0]):
        ratio = distance[i] / length
        if abs(ratio - (1 + tolerance)) < NEAR or abs(ratio - 1 / (1 + tolerance)) < NEAR:
            close = True
        if ratio < 1 + tolerance and ratio > 1 / (1 + tolerance):
            found[count] = i
            count += 1
    return found[:count], close


@kernel
def angle_matches(
    cart: Array, distance: Array, first: Array, second: Array, angle: float, tolerance: float
) -> tuple[Array, bool]:
    """Return (F, S) whether two points enclose an angle, within degrees, and if one was close."""
    out = np.empty((first.shape[0], second.shape[0]), np.bool_)
    low, high = max(0.0, angle - tolerance), min(180.0, angle + tolerance)
    # cosines fall: with a margin they decide, near the bounds the angle does
    above, below = math.cos(math.radians(low)), math.cos(math.radians(high))
    close = False
    for i in range(first.shape[0]):
        for j in range(second.shape[0]):
            a, b = first[i], second[j]
            cosine = inner(cart, a, cart, b) / (distance[a] * distance[b])
            if below + 1e-7 < cosine < above - 1e-7:
                out[i, j] = True
            elif cosine < below - 1e-7 or cosine > above + 1e-7:
                out[i, j] = False
            else:
                off = abs(math.degrees(math.acos(min(1.0, max(-1.0, cosine)))) - angle)
                # at 0 and 180 degrees the arc cosine loses half of its digits
                if abs(off - tolerance) < 1e-8:
                    close = True
                out[i, j] = off <= tolerance
    return out, close
