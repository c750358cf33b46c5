"""The distance of two sets of sites whose cells have been laid on each other, compiled.

    low, high = site_distance(moved, own, basis, reach, farthest, ...)

Contract: as pymatgen's `_cart_dists`: each site is paired with one of its element so that the sum of squared
distances (nearest images) is smallest, then the mean vector comes off. Where several assignments or images
are equally good, rounding decides in pymatgen; here all of them are tried, and the smallest and the largest
distance come back. They are equal where it does not matter.

Not here: which cells, which translations (matcher_kernel.py); equally good ones (matcher_ties.py).
Sources: pymatgen-core 2026.10.16, core/structure_matcher.py, util/coord_cython.pyx (MIT licence); the
assignment: Crouse, IEEE Trans. Aerosp. Electron. Syst. 52, 1679 (2016), as in scipy.
"""

import numpy as np

from crystallm_kit.scores.matcher_lattice import NEAR, Array, kernel
from crystallm_kit.scores.matcher_ties import bound_of, over_assignments, shortest_images, spread_of

_APART = 1e20  # the cost of what must not be paired

Room = tuple[Array, Array, Array, Array]


@kernel
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
    chosen = np.empty((n, 3))
    for i in range(n):
        for axis in range(3):
            chosen[i, axis] = vectors[i, partner[i], axis]
    value = spread_of(chosen, is_rms)
    if not any_loose:
        return value, value
    low = bound_of(vectors, cost, partner, loose, free, starts, ends, basis)
    if low >= needed:
        return low, max(low, value)
    return over_assignments(vectors, partner, loose, free, starts, ends, basis, chosen, low, is_rms)


@kernel
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
        shortest, count = shortest_images(vectors[row, j, 0], vectors[row, j, 1], vectors[row, j, 2], basis)
        for axis in range(3):
            vectors[row, j, axis] = shortest[0, axis]
        cost[row, j] = shortest[0, 0] ** 2 + shortest[0, 1] ** 2 + shortest[0, 2] ** 2
        if count > 1 and tied[row, j] == 0:
            tied[row, j] = 1
    return found


@kernel
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


@kernel
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


@kernel
def _assign(cost: Array, begin: int, n: int, partner: Array, row_dual: Array, column_dual: Array) -> bool:
    """Solve the assignment of one element by shortest augmenting paths; return whether there is one."""
    row_of, column_of, path = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.int64)
    shortest = np.empty(n)
    for i in range(n):
        row_dual[i], column_dual[i] = 0.0, 0.0
        row_of[i], column_of[i], path[i] = -1, -1, -1
    for row in range(n):
        seen_row = np.zeros(n, np.bool_)
        seen_column = np.zeros(n, np.bool_)
        for j in range(n):
            shortest[j] = np.inf
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
