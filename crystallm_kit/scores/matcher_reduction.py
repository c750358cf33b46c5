"""The primitive, Niggli-reduced cell as pymatgen finds it, compiled.

    status, numbers, lattice, fractional = reduce_cell(numbers, ranks, lattice, fractional)

Contract: the cell, the order of the sites and their coordinates are those of
`get_reduced_structure("niggli")` followed by `get_primitive_structure()`, to rounding (1e-13). Which of the
many equal cells is taken, and what still counts as a translation, hangs on the order of the steps, so they
are pymatgen's. Where a comparison is so close that rounding could turn it (`NEAR`), or the cell is none, the
status says so and the caller asks pymatgen.

Not here: reading structures, and what becomes of a status (structure_matcher.py); comparing two cells
(matcher_kernel.py).
Sources: pymatgen-core 2026.10.16, core/lattice.py, core/structure.py (MIT licence); Grosse-Kunstleve, Sauter
and Adams, Acta Cryst. A60, 1 (2004).
"""

import math
from typing import Any

import numpy as np
from numba import njit

from crystallm_kit.scores.matcher_lattice import (
    NEAR,
    angle_matches,
    determinant,
    inverse,
    lengths_of,
    lll_reduced,
    points_in_sphere,
    product,
    within_length,
)

DONE, UNCERTAIN, NO_CELL = 0, 1, 2
PRIMITIVE_TOLERANCE_ANGSTROM = 0.25  # the default of get_primitive_structure, which StructureMatcher takes

Array = Any  # numba arrays


@njit(cache=True, nogil=True, error_model="numpy")
def niggli_reduced(matrix: Array) -> tuple[int, Array]:
    """Return a status and the lattice of Lattice.get_niggli_reduced_lattice."""
    volume = abs(determinant(matrix))
    if not (volume > 0) or not np.isfinite(volume):
        return NO_CELL, matrix
    start, _, _ = lll_reduced(matrix, -1)
    e = 1e-5 * volume ** (1 / 3)
    g = product(start, np.ascontiguousarray(start.T))
    for _ in range(100):
        if not _niggli_step(g, e):
            break
    for i in range(3):
        if not g[i, i] > 0:
            return NO_CELL, matrix
    lengths = np.sqrt(np.array([g[0, 0], g[1, 1], g[2, 2]]))
    angles = np.empty(3)
    for i in range(3):
        j, k = (i + 1) % 3, (i + 2) % 3
        cosine = g[j, k] / lengths[j] / lengths[k]
        if not (-1 <= cosine <= 1):
            return NO_CELL, matrix
        angles[i] = math.degrees(math.acos(cosine))
    return _first_mapping(matrix, lengths, angles, e)


@njit(cache=True, nogil=True, error_model="numpy")
def _first_mapping(matrix: Array, lengths: Array, angles: Array, e: float) -> tuple[int, Array]:
    """Return the first three lattice vectors of these lengths and angles, right-handed (find_mapping)."""
    index, cart, distance = points_in_sphere(matrix, lengths.max() * (1 + e))
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
                chosen[0], chosen[1], chosen[2] = cart[rows_a[i]], cart[rows_b[j]], cart[rows_c[k]]
                found = True
                if turn > 0:
                    return DONE, chosen if determinant(chosen) > 0 else -chosen
    if not found:
        return NO_CELL, matrix
    return DONE, chosen if determinant(chosen) > 0 else -chosen


@njit(cache=True, nogil=True, error_model="numpy")
def _niggli_step(g: Array, e: float) -> bool:
    """Make one round of the steps A1 to A8 on the metric; return whether another has to follow."""
    a, b, c = g[0, 0], g[1, 1], g[2, 2]
    xi, eta, zeta = 2 * g[1, 2], 2 * g[0, 2], 2 * g[0, 1]
    if b + e < a or (abs(a - b) < e and abs(xi) > abs(eta) + e):
        _transform(g, np.array([[0.0, -1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, -1.0]]))
        a, b, c = g[0, 0], g[1, 1], g[2, 2]
        xi, eta, zeta = 2 * g[1, 2], 2 * g[0, 2], 2 * g[0, 1]
    if c + e < b or (abs(b - c) < e and abs(eta) > abs(zeta) + e):
        _transform(g, np.array([[-1.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, -1.0, 0.0]]))
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
    _transform(g, np.array([[i, 0.0, 0.0], [0.0, j, 0.0], [0.0, 0.0, k]]))
    a, b, c = g[0, 0], g[1, 1], g[2, 2]
    xi, eta, zeta = 2 * g[1, 2], 2 * g[0, 2], 2 * g[0, 1]
    if abs(xi) > b + e or (abs(xi - b) < e and zeta - e > 2 * eta) or (abs(xi + b) < e and -e > zeta):
        _transform(g, np.array([[1.0, 0.0, 0.0], [0.0, 1.0, -xi / abs(xi)], [0.0, 0.0, 1.0]]))
        return True
    if abs(eta) > a + e or (abs(a - eta) < e and zeta - e > 2 * xi) or (abs(a + eta) < e and -e > zeta):
        _transform(g, np.array([[1.0, 0.0, -eta / abs(eta)], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
        return True
    if abs(zeta) > a + e or (abs(a - zeta) < e and eta - e > 2 * xi) or (abs(a + zeta) < e and -e > eta):
        _transform(g, np.array([[1.0, -zeta / abs(zeta), 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
        return True
    total = xi + eta + zeta + a + b
    if -e > total or (abs(total) < e and e < zeta + (a + eta) * 2):
        _transform(g, np.array([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0], [0.0, 0.0, 1.0]]))
        return True
    return False


@njit(cache=True, nogil=True)
def _sign(value: float, e: float) -> int:
    if abs(value) < e:
        return 0
    return 1 if value > 0 else -1


@njit(cache=True, nogil=True)
def _transform(g: Array, m: Array) -> None:
    g[:] = product(np.ascontiguousarray(m.T), product(g, m))


@njit(cache=True, nogil=True, error_model="numpy")
def _reduced_structure(lattice: Array, fractional: Array) -> tuple[int, Array, Array]:
    """Return a status, and the lattice and coordinates of Structure.get_reduced_structure."""
    status, found = niggli_reduced(lattice)
    if status != DONE:
        return status, lattice, fractional
    same = True
    for i in range(3):
        for j in range(3):
            off, allowed = abs(found[i, j] - lattice[i, j]), 1e-8 + 1e-5 * abs(lattice[i, j])
            if abs(off - allowed) < NEAR * allowed:
                return UNCERTAIN, lattice, fractional
            if not off <= allowed:
                same = False
    if same:
        return DONE, lattice, fractional
    return DONE, found, product(product(fractional, lattice), inverse(found)) % 1.0


@njit(cache=True, nogil=True, error_model="numpy")
def reduce_cell(
    numbers: Array, ranks: Array, lattice: Array, fractional: Array
) -> tuple[int, Array, Array, Array]:
    """Return a status, and the primitive, Niggli-reduced cell.

    Args:
        numbers: (N,) int16 atomic numbers.
        ranks: (M,) int64, place of each atomic number in the order of the symbols, by which pymatgen sorts.
        lattice: (3, 3) rows are lattice vectors, angstrom.
        fractional: (N, 3).

    Returns:
        DONE, UNCERTAIN or NO_CELL; numbers (K,), lattice (3, 3), fractional (K, 3).
    """
    status, lattice, fractional = _reduced_structure(lattice, fractional)
    if status != DONE:
        return status, numbers, lattice, fractional
    made_smaller = 0
    while True:
        status, smaller, numbers, lattice, fractional = _smaller_cell(numbers, ranks, lattice, fractional)
        if status != DONE:
            return status, numbers, lattice, fractional
        if not smaller:
            break
        made_smaller += 1
    for _ in range(made_smaller):  # pymatgen reduces once for each level of its recursion
        status, lattice, fractional = _reduced_structure(lattice, fractional)
        if status != DONE:
            return status, numbers, lattice, fractional
    return DONE, numbers, lattice, fractional


@njit(cache=True, nogil=True, error_model="numpy")
def _smaller_cell(
    numbers: Array, ranks: Array, lattice: Array, fractional: Array
) -> tuple[int, bool, Array, Array, Array]:
    """Return a status, whether a smaller cell was found, and it (one level of get_primitive_structure)."""
    n = numbers.shape[0]
    order = np.argsort(np.array([ranks[z] for z in numbers]), kind="mergesort")
    z, f = numbers[order], fractional[order]
    starts = np.empty(n + 1, np.int64)
    groups, units = 0, 0
    for i in range(n):
        if i == 0 or z[i] != z[i - 1]:
            starts[groups] = i
            groups += 1
    starts[groups] = n
    rarest = 0
    for g in range(groups):
        size = starts[g + 1] - starts[g]
        units = _gcd(units, size)
        if size < starts[rarest + 1] - starts[rarest]:
            rarest = g
    if units == 1:
        return DONE, False, numbers, lattice, fractional
    tolerance = PRIMITIVE_TOLERANCE_ANGSTROM / lengths_of(lattice)
    vectors, close = _translations(f, starts[: groups + 1], rarest, tolerance)
    if vectors.shape[0] == 1 and tolerance.max() < (1 - 1e-6) / units:
        # only the zero vector is left, and no row of an inverse comes so near to whole numbers
        return (UNCERTAIN if close else DONE), False, numbers, lattice, fractional
    if close:
        return UNCERTAIN, False, numbers, lattice, fractional
    matrix = np.zeros((3, 3))
    for det in range(2, units + 1):
        if units % det:
            continue
        for a in range(1, det + 1):
            if det % a:
                continue
            for e in range(1, det // a + 1):
                if (det // a) % e:
                    continue
                matrix[0, 0], matrix[1, 1], matrix[2, 2] = a, e, det // a // e
                for b in range(a):
                    for c in range(a):
                        for d in range(e):
                            matrix[0, 1], matrix[0, 2], matrix[1, 2] = b, c, d
                            inverted = inverse(matrix)
                            near = _are_translations(inverted, vectors, tolerance)
                            if near == 2:
                                return UNCERTAIN, False, numbers, lattice, fractional
                            if near == 0:
                                continue
                            cell = product(inverted, lattice)
                            status, sites, moved = _merged(
                                f, starts[: groups + 1], matrix, cell, tolerance, det
                            )
                            if status == UNCERTAIN:
                                return UNCERTAIN, False, numbers, lattice, fractional
                            if status == DONE:
                                return DONE, True, z[sites], cell, moved
    return DONE, False, numbers, lattice, fractional


@njit(cache=True, nogil=True)
def _gcd(a: int, b: int) -> int:
    while b:
        a, b = b, a % b
    return a


@njit(cache=True, nogil=True, error_model="numpy")
def _translations(f: Array, starts: Array, rarest: int, tolerance: Array) -> tuple[Array, bool]:
    """Return the vectors from the rarest element's first site that move every site to about a like one.

    Also whether a comparison that counted was close.
    """
    first, last = starts[rarest], starts[rarest + 1]
    close = False
    out = np.empty((last - first, 3))
    count = 0
    for s in range(first, last):
        vector = f[s] - f[first]
        kept = True
        near_any = False
        for g in range(starts.shape[0] - 1):
            for i in range(starts[g], starts[g + 1]):
                hit = False
                near = False
                for j in range(starts[g], starts[g + 1]):
                    worst = 0.0
                    for axis in range(3):
                        off = vector[axis] - (f[j, axis] - f[i, axis])
                        off = abs(off - np.rint(off)) / (2 * tolerance[axis])
                        worst = max(worst, off)
                    if abs(worst - 1) < NEAR:
                        near = True
                    elif worst < 1:
                        hit = True
                        break
                if not hit:
                    if near:
                        near_any = True
                    else:
                        kept = False
                        break
            if not kept:
                break
        if kept:
            close = close or near_any
            out[count] = vector
            count += 1
    return out[:count], close


@njit(cache=True, nogil=True, error_model="numpy")
def _are_translations(rows: Array, vectors: Array, tolerance: Array) -> int:
    """Tell whether each row is about one of the vectors: 0 no, 1 yes, 2 too close to say."""
    answer = 1
    for i in range(3):
        hit, near = False, False
        for j in range(vectors.shape[0]):
            worst = -1.0
            for axis in range(3):
                off = rows[i, axis] - vectors[j, axis]
                worst = max(worst, abs(off - np.rint(off)) / tolerance[axis])
            if abs(worst - 1) < NEAR:
                near = True
            elif worst < 1:
                hit = True
                break
        if not hit:
            if not near:
                return 0
            answer = 2
    return answer


@njit(cache=True, nogil=True, error_model="numpy")
def _merged(
    f: Array, starts: Array, matrix: Array, cell: Array, tolerance: Array, det: int
) -> tuple[int, Array, Array]:
    """Return the sites of the smaller cell, each the mean of `det` sites; NO_CELL where they do not pair up.

    Returns:
        DONE, NO_CELL or UNCERTAIN; (K,) index of the first site of each group; (K, 3) coordinates.
    """
    n = f.shape[0]
    moved = product(f, matrix)
    allowed = PRIMITIVE_TOLERANCE_ANGSTROM / lengths_of(cell)
    sites = np.empty(n // det, np.int64)
    out = np.empty((n // det, 3))
    count = 0
    close = False
    for g in range(starts.shape[0] - 1):
        begin, size = starts[g], starts[g + 1] - starts[g]
        together = np.zeros((size, size), np.bool_)
        for i in range(size):
            for j in range(size):
                near = _joined(moved, f, begin + i, begin + j, allowed, tolerance)
                if near == 2:
                    close = True
                together[i, j] = near == 1
        if close:
            return UNCERTAIN, sites, out
        for j in range(size):
            held = 0
            for i in range(size):
                held += together[i, j]
            if held != det:
                return NO_CELL, sites, out
        for i in range(size):
            for j in range(size):
                if together[i, j]:
                    for k in range(size):
                        if together[i, k] and not together[j, k]:
                            return NO_CELL, sites, out
        added = np.zeros(size, np.bool_)
        for i in range(size):
            if added[i]:
                continue
            seen = 0
            mean = np.zeros(3)
            first = 0
            for j in range(size):
                if not together[i, j]:
                    continue
                added[j] = True
                for axis in range(3):
                    here = moved[begin + j, axis] % 1.0
                    if seen == 0:
                        mean[axis] = here
                    else:
                        offset = here - mean[axis]
                        mean[axis] += (offset - np.rint(offset)) / (seen + 1)
                if seen == 0:
                    first = begin + j
                seen += 1
            sites[count] = first
            out[count] = mean
            count += 1
    return DONE, sites, out


@njit(cache=True, nogil=True, error_model="numpy")
def _joined(
    moved: Array, f: Array, i: int, j: int, allowed: Array, tolerance: Array
) -> int:
    """Tell whether two sites are one of the smaller cell: 0 no, 1 yes, 2 too close to say.

    They coincide in the smaller cell, and are no neighbours in the larger one.
    """
    if i == j:
        return 1
    worst, apart = 0.0, 0.0
    for axis in range(3):
        off = moved[i, axis] - moved[j, axis]
        worst = max(worst, abs(off - np.rint(off)) / allowed[axis])
        off = f[i, axis] - f[j, axis]
        apart = max(apart, abs(off - np.rint(off)) / (2 * tolerance[axis]))
    if worst > 1 + NEAR or apart < 1 - NEAR:
        return 0
    if worst < 1 - NEAR and apart > 1 + NEAR:
        return 1
    return 2
