"""Niggli reduction as pymatgen does it, compiled.

    status, lattice = niggli_reduced(lattice)

Contract: the lattice of `Lattice.get_niggli_reduced_lattice()`: of the many equal cells the one that its
search meets first, right-handed.

Not here: LLL reduction, lattice points (lattice.py); the primitive cell (reduction.py).
Sources: pymatgen-core 2026.10.16, core/lattice.py (MIT licence); Grosse-Kunstleve, Sauter and Adams, Acta
Cryst. A60, 1 (2004), whose names the steps A1 to A8 have.
"""

import math

import numpy as np

from crystallm_kit.scores.matcher.lattice import (
    Array,
    angle_matches,
    determinant,
    inner,
    kernel,
    lll_reduced,
    points_in_sphere,
    product,
    within_length,
)

DONE, UNCERTAIN, NO_CELL = 0, 1, 2


@kernel
def niggli_reduced(matrix: Array) -> tuple[int, Array]:
    """Return a status and the lattice of Lattice.get_niggli_reduced_lattice."""
    volume = abs(determinant(matrix))
    if not (volume > 0) or not np.isfinite(volume):
        return NO_CELL, matrix
    start, _, _ = lll_reduced(matrix, -1)
    e = 1e-5 * volume ** (1 / 3)
    g = np.empty((3, 3))
    for i in range(3):
        for j in range(3):
            g[i, j] = inner(start, i, start, j)
    for _ in range(100):
        if not _niggli_step(g, e):
            break
    for i in range(3):
        if not g[i, i] > 0:
            return NO_CELL, matrix
    lengths, angles = np.empty(3), np.empty(3)
    for i in range(3):
        lengths[i] = math.sqrt(g[i, i])
    for i in range(3):
        j, k = (i + 1) % 3, (i + 2) % 3
        cosine = g[j, k] / lengths[j] / lengths[k]
        if not (-1 <= cosine <= 1):
            return NO_CELL, matrix
        angles[i] = math.degrees(math.acos(cosine))
    return _first_mapping(matrix, lengths, angles, e)


@kernel
def _first_mapping(matrix: Array, lengths: Array, angles: Array, e: float) -> tuple[int, Array]:
    """Return the first three lattice vectors of these lengths and angles, right-handed (find_mapping)."""
    longest = max(lengths[0], lengths[1], lengths[2])
    index, cart, distance = points_in_sphere(matrix, longest * (1 + e))
    rows_a, close_a = within_length(distance, lengths[0], e)
    rows_b, close_b = within_length(distance, lengths[1], e)
    rows_c, close_c = within_length(distance, lengths[2], e)
    alpha, close_d = angle_matches(cart, distance, rows_b, rows_c, angles[0], 1.0)
    beta, close_e = angle_matches(cart, distance, rows_a, rows_c, angles[1], 1.0)
    gamma, close_f = angle_matches(cart, distance, rows_a, rows_b, angles[2], 1.0)
    if close_a or close_b or close_c or close_d or close_e or close_f:
        return UNCERTAIN, matrix
    scale = np.empty((3, 3))
    chosen = np.zeros((3, 3))
    found = False
    for i in range(rows_a.shape[0]):
        for j in range(rows_b.shape[0]):
            if not gamma[i, j]:
                continue
            for k in range(rows_c.shape[0]):
                if not (alpha[j, k] and beta[i, k]):
                    continue
                for axis in range(3):
                    scale[0, axis] = index[rows_a[i], axis]
                    scale[1, axis] = index[rows_b[j], axis]
                    scale[2, axis] = index[rows_c[k], axis]
                turn = determinant(scale)
                if abs(turn) < 0.5 or (found and turn < 0):
                    continue
                for axis in range(3):
                    chosen[0, axis] = cart[rows_a[i], axis]
                    chosen[1, axis] = cart[rows_b[j], axis]
                    chosen[2, axis] = cart[rows_c[k], axis]
                found = True
                if turn > 0:
                    return DONE, _right_handed(chosen)
    if not found:
        return NO_CELL, matrix
    return DONE, _right_handed(chosen)


@kernel
def _right_handed(matrix: Array) -> Array:
    sign = 1.0 if determinant(matrix) > 0 else -1.0
    out = np.empty((3, 3))
    for i in range(3):
        for j in range(3):
            out[i, j] = sign * matrix[i, j]
    return out


@kernel
def _niggli_step(g: Array, e: float) -> bool:
    """Make one round of the steps A1 to A8 on the metric; return whether another has to follow."""
    a, b, c = g[0, 0], g[1, 1], g[2, 2]
    xi, eta, zeta = 2 * g[1, 2], 2 * g[0, 2], 2 * g[0, 1]
    if b + e < a or (abs(a - b) < e and abs(xi) > abs(eta) + e):
        _transform(g, 0.0, -1.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0, -1.0)
        a, b, c = g[0, 0], g[1, 1], g[2, 2]
        xi, eta, zeta = 2 * g[1, 2], 2 * g[0, 2], 2 * g[0, 1]
    if c + e < b or (abs(b - c) < e and abs(eta) > abs(zeta) + e):
        _transform(g, -1.0, 0.0, 0.0, 0.0, 0.0, -1.0, 0.0, -1.0, 0.0)
        return True
    left, middle, right = _sign(xi, e), _sign(eta, e), _sign(zeta, e)
    signs = left * middle * right
    if signs == 1:
        i = -1.0 if left == -1 else 1.0
        j = -1.0 if middle == -1 else 1.0
        k = -1.0 if right == -1 else 1.0
    else:
        i = -1.0 if left == 1 else 1.0
        j = -1.0 if middle == 1 else 1.0
        k = -1.0 if right == 1 else 1.0
        if i * j * k == -1:
            if right == 0:
                k = -1.0
            elif middle == 0:
                j = -1.0
            elif left == 0:
                i = -1.0
    _transform(g, i, 0.0, 0.0, 0.0, j, 0.0, 0.0, 0.0, k)
    a, b, c = g[0, 0], g[1, 1], g[2, 2]
    xi, eta, zeta = 2 * g[1, 2], 2 * g[0, 2], 2 * g[0, 1]
    if abs(xi) > b + e or (abs(xi - b) < e and zeta - e > 2 * eta) or (abs(xi + b) < e and -e > zeta):
        _transform(g, 1.0, 0.0, 0.0, 0.0, 1.0, -xi / abs(xi), 0.0, 0.0, 1.0)
        return True
    if abs(eta) > a + e or (abs(a - eta) < e and zeta - e > 2 * xi) or (abs(a + eta) < e and -e > zeta):
        _transform(g, 1.0, 0.0, -eta / abs(eta), 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
        return True
    if abs(zeta) > a + e or (abs(a - zeta) < e and eta - e > 2 * xi) or (abs(a + zeta) < e and -e > eta):
        _transform(g, 1.0, -zeta / abs(zeta), 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
        return True
    total = xi + eta + zeta + a + b
    if -e > total or (abs(total) < e and e < zeta + (a + eta) * 2):
        _transform(g, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0)
        return True
    return False


@kernel
def _sign(value: float, e: float) -> int:
    if abs(value) < e:
        return 0
    return 1 if value > 0 else -1


@kernel
def _transform(
    g: Array,
    m00: float, m01: float, m02: float,
    m10: float, m11: float, m12: float,
    m20: float, m21: float, m22: float,
) -> None:  # fmt: skip
    """Replace the metric g by m^T g m."""
    m = np.empty((3, 3))
    m[0, 0], m[0, 1], m[0, 2] = m00, m01, m02
    m[1, 0], m[1, 1], m[1, 2] = m10, m11, m12
    m[2, 0], m[2, 1], m[2, 2] = m20, m21, m22
    half = product(g, m)
    for i in range(3):
        for j in range(3):
            g[i, j] = m[0, i] * half[0, j] + m[1, i] * half[1, j] + m[2, i] * half[2, j]
