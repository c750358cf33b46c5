"""The distance of two sets of sites whose cells have been laid on each other, compiled.

    low, high = site_distance(moved, own, basis, reach, farthest, ...)

Contract: as pymatgen's `_cart_dists`: each site is paired with one of its element so that the sum of squared
distances (nearest images) is smallest, then the mean vector comes off. Where several assignments or images
are equally good, rounding decides in pymatgen; here all of them are tried, and the smallest and the largest
distance come back. They are equal where it does not matter.

Not here: which cells, which translations (matcher_kernel.py).
Sources: pymatgen-core 2026.10.16, core/structure_matcher.py, util/coord_cython.pyx (MIT licence); the
assignment: Crouse, IEEE Trans. Aerosp. Electron. Syst. 52, 1679 (2016), as in scipy.
"""

import math
from typing import Any

import numpy as np
from numba import njit

from crystallm_kit.scores.matcher_lattice import NEAR

_APART = 1e20  # the cost of what must not be paired
_MOST_STEPS = 20_000  # of the search through equally good assignments
_MOST_OPTIONS = 64  # of one site

Array = Any  # numba arrays
Room = tuple[Array, Array, Array, Array]


@njit(cache=True, nogil=True, error_model="numpy")
def site_distance(
    moved: Array,
    own: Array,
    basis: Array,
    reach: Array,
    farthest: float,
    is_close: bool,
    starts: Array,
    ends: Array,
    room: Room,
    needed: float,
    is_rms: bool,
) -> tuple[float, float]:
    """Return the smallest and the largest distance that rounding leaves open, in angstrom; inf: no pairing.

    Args:
        moved, own: (N, 3) coordinates in the basis `basis`, of the second and the first cell, sorted by
            element.
        basis: (3, 3) LLL-reduced.
        reach: (3,) lengths of the reciprocal vectors of the basis, without 2 pi.
        farthest: Pairs farther than this along a reciprocal vector are not looked at.
        is_close: Whether rounding chose the basis, and so which of the far pairs count.
        starts, ends: (N,) the sites of the same element.
        room: (N, N, 3) float, (N, N) float, (N, N) int8, (N, N) bool, to work in.
        needed: Bounds that are larger need not be good.
        is_rms: RMS distance, or the largest.

    Returns:
        low -1: anything is possible.
    """
    vectors, cost, tied, free = room
    n = moved.shape[0]
    radius = 0.5 / reach.max()  # a nearer image is the only nearest one: half the smallest plane spacing
    certain = radius * radius * (1 - 1e-9)
    partner = np.empty(n, np.int64)
    loose = np.zeros(n, np.bool_)
    i = 0
    while i < n:
        begin, end = starts[i], ends[i]
        for row in range(begin, end):
            if not _row(moved, own, basis, reach, farthest, certain, row, begin, end, room):
                return (-1.0 if is_close else np.inf), np.inf
        if not _partners(cost, begin, end, partner, loose, free):
            return (-1.0 if is_close else np.inf), np.inf
        i = end
    any_loose = False
    for i in range(n):
        square = cost[i, partner[i]]
        if tied[i, partner[i]] == 2 or (is_close and square > farthest * farthest * (1 - NEAR)):
            return -1.0, np.inf  # a far pair that may not be allowed: then all may be another
        if tied[i, partner[i]] == 1:
            loose[i] = True
        any_loose = any_loose or loose[i]
    value = _spread(vectors, partner, is_rms)
    if not any_loose:
        return value, value
    low = _bound(vectors, cost, tied, partner, loose, free, starts, ends, basis)
    if low >= needed:
        return low, max(low, value)
    return _over_assignments(vectors, cost, tied, partner, loose, free, starts, ends, basis, low, is_rms)


@njit(cache=True, nogil=True, error_model="numpy")
def _spread(vectors: Array, partner: Array, is_rms: bool) -> float:
    """Return the RMS or largest length of the paired vectors without their mean."""
    n = partner.shape[0]
    mean = np.zeros(3)
    for i in range(n):
        for axis in range(3):
            mean[axis] += vectors[i, partner[i], axis]
    mean /= n
    total, largest = 0.0, 0.0
    for i in range(n):
        square = 0.0
        for axis in range(3):
            square += (vectors[i, partner[i], axis] - mean[axis]) ** 2
        total += square
        largest = max(largest, square)
    return math.sqrt(total / n) if is_rms else math.sqrt(largest)


@njit(cache=True, nogil=True, error_model="numpy")
def _row(
    moved: Array,
    own: Array,
    basis: Array,
    reach: Array,
    farthest: float,
    certain: float,
    row: int,
    begin: int,
    end: int,
    room: Room,
) -> bool:
    """Fill in the shortest vectors from one site to those of its element; return whether one is allowed."""
    vectors, cost, tied, _ = room
    found = False
    wrapped = np.empty(3)
    for j in range(begin, end):
        tied[row, j] = 0
        cost[row, j] = _APART
        allowed = True
        for axis in range(3):
            off = own[j, axis] - moved[row, axis]
            off -= np.rint(off)
            wrapped[axis] = off
            excess = abs(off) - reach[axis] * farthest
            if excess > NEAR:
                allowed = False
                break
            if excess > -NEAR:
                tied[row, j] = 2
        if not allowed:
            continue
        found = True
        square = 0.0
        for axis in range(3):
            value = wrapped[0] * basis[0, axis] + wrapped[1] * basis[1, axis] + wrapped[2] * basis[2, axis]
            vectors[row, j, axis] = value
            square += value * value
        if square < certain:
            cost[row, j] = square
            continue
        shortest, count = _shortest_images(vectors[row, j], basis)
        for axis in range(3):
            vectors[row, j, axis] = shortest[0, axis]
        cost[row, j] = shortest[0, 0] ** 2 + shortest[0, 1] ** 2 + shortest[0, 2] ** 2
        if count > 1 and tied[row, j] == 0:
            tied[row, j] = 1
    return found


@njit(cache=True, nogil=True, error_model="numpy")
def _shortest_images(vector: Array, basis: Array) -> tuple[Array, int]:
    """Return the shortest vectors that differ from one by the lattice, and their number."""
    out = np.empty((27, 3))
    squares = np.empty(27)
    count = 0
    least = np.inf
    for a in range(-1, 2):
        for b in range(-1, 2):
            for c in range(-1, 2):
                x = vector[0] + a * basis[0, 0] + b * basis[1, 0] + c * basis[2, 0]
                y = vector[1] + a * basis[0, 1] + b * basis[1, 1] + c * basis[2, 1]
                z = vector[2] + a * basis[0, 2] + b * basis[1, 2] + c * basis[2, 2]
                square = x * x + y * y + z * z
                if square > least + NEAR:
                    continue
                least = min(least, square)
                squares[count] = square
                out[count, 0], out[count, 1], out[count, 2] = x, y, z
                count += 1
    kept = 0
    for i in range(count):
        if squares[i] <= least + NEAR:
            out[kept] = out[i]
            kept += 1
    return out, kept


@njit(cache=True, nogil=True, error_model="numpy")
def _partners(cost: Array, begin: int, end: int, partner: Array, loose: Array, free: Array) -> bool:
    """Assign the sites of one element, and mark those of which another assignment is as good.

    Returns whether there is an assignment.
    """
    n = end - begin
    if n == 1:
        partner[begin] = begin
        return True
    row_dual = np.empty(n)
    column_dual = np.zeros(n)
    taken = np.zeros(n, np.bool_)
    distinct = True
    for i in range(n):
        best = _APART
        for j in range(n):
            if cost[begin + i, begin + j] < best:
                best = cost[begin + i, begin + j]
                partner[begin + i] = begin + j
        row_dual[i] = best
        if taken[partner[begin + i] - begin]:
            distinct = False
        taken[partner[begin + i] - begin] = True
    if not distinct and not _assign(cost, begin, n, partner, row_dual, column_dual):
        return False
    # another assignment is as good only if there is a cycle of pairs without reduced cost
    is_open = False
    for i in range(n):
        for j in range(n):
            r, c = begin + i, begin + j
            free[r, c] = cost[r, c] < _APART and cost[r, c] - row_dual[i] - column_dual[j] < NEAR
            is_open = is_open or (free[r, c] and c != partner[r])
    if is_open:
        _mark_cycles(free, begin, n, partner, loose)
    return True


@njit(cache=True, nogil=True, error_model="numpy")
def _mark_cycles(free: Array, begin: int, n: int, partner: Array, loose: Array) -> None:
    """Mark the rows that may lie on a cycle: those left when rows without a way in or out are taken away."""
    owner = np.empty(n, np.int64)
    for i in range(n):
        owner[partner[begin + i] - begin] = i
    alive = np.ones(n, np.bool_)
    for _ in range(n):
        has_in = np.zeros(n, np.bool_)
        has_out = np.zeros(n, np.bool_)
        for i in range(n):
            for j in range(n):
                if free[begin + i, begin + j] and alive[i] and alive[owner[j]] and owner[j] != i:
                    has_out[i] = True
                    has_in[owner[j]] = True
        changed = False
        for i in range(n):
            if alive[i] and not (has_in[i] and has_out[i]):
                alive[i] = False
                changed = True
        if not changed:
            break
    for i in range(n):
        if alive[i]:
            loose[begin + i] = True


@njit(cache=True, nogil=True, error_model="numpy")
def _assign(cost: Array, begin: int, n: int, partner: Array, row_dual: Array, column_dual: Array) -> bool:
    """Solve the assignment of one element by shortest augmenting paths; return whether there is one."""
    row_dual[:] = 0.0
    column_dual[:] = 0.0
    row_of = np.full(n, -1)
    column_of = np.full(n, -1)
    path = np.full(n, -1)
    shortest = np.empty(n)
    for row in range(n):
        shortest[:] = np.inf
        seen_row = np.zeros(n, np.bool_)
        seen_column = np.zeros(n, np.bool_)
        least, i, sink = 0.0, row, -1
        while sink == -1:
            seen_row[i] = True
            index, lowest = -1, np.inf
            for j in range(n - 1, -1, -1):
                if seen_column[j]:
                    continue
                if cost[begin + i, begin + j] < _APART:
                    reduced = least + cost[begin + i, begin + j] - row_dual[i] - column_dual[j]
                    if reduced < shortest[j]:
                        path[j] = i
                        shortest[j] = reduced
                if shortest[j] < lowest or (shortest[j] == lowest and row_of[j] == -1):
                    lowest, index = shortest[j], j
            least = lowest
            if index == -1 or least == np.inf:
                return False
            if row_of[index] == -1:
                sink = index
            else:
                i = row_of[index]
            seen_column[index] = True
        row_dual[row] += least
        for i in range(n):
            if seen_row[i] and i != row:
                row_dual[i] += least - shortest[column_of[i]]
        for j in range(n):
            if seen_column[j]:
                column_dual[j] -= least - shortest[j]
        j = sink
        while True:
            i = path[j]
            row_of[j] = i
            column_of[i], j = j, column_of[i]
            if i == row:
                break
    for i in range(n):
        partner[begin + i] = begin + column_of[i]
    return True


# ---------------------------------------------------------------- equally good assignments


@njit(cache=True, nogil=True, error_model="numpy")
def _options(
    vectors: Array, tied: Array, partner: Array, free: Array, row: int, begin: int, end: int, basis: Array
) -> tuple[Array, Array, int]:
    """Return the columns and vectors that a loose site may be paired with, and their number."""
    columns = np.empty(_MOST_OPTIONS, np.int64)
    out = np.empty((_MOST_OPTIONS, 3))
    count = 0
    for j in range(begin, end):
        if j != partner[row] and (end - begin == 1 or not free[row, j]):
            continue
        images, held = vectors[row, j : j + 1], 1
        if tied[row, j]:
            images, held = _shortest_images(vectors[row, j], basis)
        for k in range(held):
            if count < _MOST_OPTIONS:
                columns[count] = j
                out[count] = images[k]
            count += 1
    return columns, out, count


@njit(cache=True, nogil=True, error_model="numpy")
def _bound(
    vectors: Array,
    cost: Array,
    tied: Array,
    partner: Array,
    loose: Array,
    free: Array,
    starts: Array,
    ends: Array,
    basis: Array,
) -> float:
    """Return a lower bound of the RMS distance of every assignment that is as good.

    They all have the same sum of squares; from it comes off the square of the mean vector, whose components
    are largest where all loose vectors point one way.
    """
    n = partner.shape[0]
    squares = 0.0
    most, least = np.zeros(3), np.zeros(3)
    for i in range(n):
        squares += cost[i, partner[i]]
        if not loose[i]:
            most += vectors[i, partner[i]]
            least += vectors[i, partner[i]]
            continue
        _, options, count = _options(vectors, tied, partner, free, i, starts[i], ends[i], basis)
        if count > _MOST_OPTIONS:
            return -1.0
        for axis in range(3):
            most[axis] += options[:count, axis].max()
            least[axis] += options[:count, axis].min()
    square = 0.0
    for axis in range(3):
        square += max(abs(most[axis]), abs(least[axis])) ** 2
    return math.sqrt(max(0.0, squares / n - square / (n * n))) - NEAR


@njit(cache=True, nogil=True, error_model="numpy")
def _over_assignments(
    vectors: Array,
    cost: Array,
    tied: Array,
    partner: Array,
    loose: Array,
    free: Array,
    starts: Array,
    ends: Array,
    basis: Array,
    bound: float,
    is_rms: bool,
) -> tuple[float, float]:
    """Return the smallest and largest distance over all assignments that are as good (depth-first)."""
    n = partner.shape[0]
    rows = np.nonzero(loose)[0]
    depth = rows.shape[0]
    columns = np.empty((depth, _MOST_OPTIONS), np.int64)
    options = np.empty((depth, _MOST_OPTIONS, 3))
    counts = np.empty(depth, np.int64)
    chosen = np.empty((n, 3))
    for i in range(n):
        chosen[i] = vectors[i, partner[i]]
    for i in range(depth):
        row = rows[i]
        columns[i], options[i], counts[i] = _options(
            vectors, tied, partner, free, row, starts[row], ends[row], basis
        )
        if counts[i] > _MOST_OPTIONS:
            return bound, np.inf
    taken = np.zeros(n, np.bool_)
    for i in range(n):
        if not loose[i]:
            taken[partner[i]] = True
    at = np.full(depth, -1)
    low, high = np.inf, 0.0
    level, steps = 0, 0
    while level >= 0:
        if at[level] >= 0:
            taken[columns[level, at[level]]] = False
        at[level] += 1
        while at[level] < counts[level] and taken[columns[level, at[level]]]:
            at[level] += 1
        if at[level] == counts[level]:
            at[level] = -1
            level -= 1
            continue
        steps += 1
        if steps > _MOST_STEPS:
            return bound, np.inf
        taken[columns[level, at[level]]] = True
        chosen[rows[level]] = options[level, at[level]]
        if level + 1 < depth:
            level += 1
            continue
        value = _spread_of(chosen, is_rms)
        low, high = min(low, value), max(high, value)
    return low, high


@njit(cache=True, nogil=True, error_model="numpy")
def _spread_of(chosen: Array, is_rms: bool) -> float:
    """Return the RMS or largest length of vectors (N, 3) without their mean."""
    n = chosen.shape[0]
    mean = np.zeros(3)
    for i in range(n):
        for axis in range(3):
            mean[axis] += chosen[i, axis]
    mean /= n
    total, largest = 0.0, 0.0
    for i in range(n):
        square = 0.0
        for axis in range(3):
            square += (chosen[i, axis] - mean[axis]) ** 2
        total += square
        largest = max(largest, square)
    return math.sqrt(total / n) if is_rms else math.sqrt(largest)
