"""The distance of two sets of sites whose cells have been laid on each other, compiled.

    low, high = site_distance(moved, own, basis, reach, farthest, ...)

Contract: as pymatgen's `_cart_dists`: each site is paired with one of its element so that the sum of squared
distances (nearest images) is smallest, then the mean vector comes off. Where several assignments or images
are equally good, rounding decides in pymatgen; here all of them are tried, and the smallest and the largest
distance come back. They are equal where it does not matter.

Not here: which cells, which translations (kernel.py); equally good ones (ties.py).
Sources: pymatgen-core 2026.10.16, core/structure_matcher.py, util/coord_cython.pyx (MIT licence); the
assignment: Crouse, IEEE Trans. Aerosp. Electron. Syst. 52, 1679 (2016), as in scipy.
"""

import math

import numpy as np

from crystallm_kit.scores.matcher.lattice import NEAR, Array, kernel
from crystallm_kit.scores.matcher.ties import bound_of, nearest_image, over_assignments, spread_of

APART = 1e20  # the cost of what must not be paired
PENDING = 4  # added to what `room_for` says of a pair whose nearest image has not been looked for

Room = tuple[Array, Array, Array, Array, Array, Array, Array]


@kernel
def room_for(n: int) -> Room:
    """Return the arrays that `site_distance` works in, for n sites."""
    return (
        np.empty((n, n, 3)),  # shortest vectors
        np.empty((n, n)),  # their squares
        np.empty((n, n), np.int8),  # 1: another image is as short, 2: rounding decides if it is allowed
        np.empty((n, n), np.bool_),  # pairs without reduced cost
        np.empty(n, np.int64),  # partners
        np.empty(n, np.bool_),  # loose sites
        np.empty((n, 3)),  # vectors to the partners
    )


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
        moved, own: (N, 3) coordinates in the basis `basis`, of the second and the first cell, by element.
        basis: (3, 3) LLL-reduced.
        reach: (3,) lengths of the reciprocal vectors of the basis, without 2 pi.
        farthest: Pairs farther than this along a reciprocal vector are not looked at.
        is_close: Whether rounding chose the basis, and so which of the far pairs count.
        starts, ends: (N,) the sites of the same element.
        room: From `room_for`.
        needed: Distances that are larger may come back as infinite.
        is_rms: RMS distance, or the largest.

    Returns:
        low -1: anything is possible.
    """
    vectors, cost, tied, free, partner, loose, chosen = room
    n = moved.shape[0]
    radius = 0.5 / max(reach[0], reach[1], reach[2])  # half the smallest distance of lattice planes:
    certain = radius * radius * (1 - 1e-9)  # a nearer image is the only nearest one
    enough = needed * needed * n * (1 + NEAR)
    far = farthest * farthest * (1 - NEAR)
    any_loose = False
    x, y, z, squares = 0.0, 0.0, 0.0, 0.0
    cut = np.inf
    i = 0
    while i < n:
        begin, end = starts[i], ends[i]
        for row in range(begin, end):
            loose[row] = False
            least = _row(moved, own, basis, reach, farthest, certain, row, begin, end, room)
            if least == APART:
                return (-1.0 if is_close else np.inf), np.inf
            if least > cut and (not is_close or far > cut):
                return np.inf, np.inf
        answer = _partners(basis, begin, end, certain, far if is_close else np.inf, room)
        if answer != 1:
            return (-1.0 if is_close else np.inf), np.inf
        for row in range(begin, end):
            other = partner[row]
            square = cost[row, other]
            if tied[row, other] == 2 or (is_close and square > far):
                return -1.0, np.inf  # a far pair that may not be allowed: then all may be another
            if tied[row, other] == 1:
                loose[row] = True
            any_loose = any_loose or loose[row]
            for axis in range(3):
                chosen[row, axis] = vectors[row, other, axis]
            x, y, z = x + chosen[row, 0], y + chosen[row, 1], z + chosen[row, 2]
            squares += square
        if not any_loose:
            # the sum of squares about the mean only grows with more sites: by one at a distance d from the
            # mean of k sites by d^2 k / (k + 1)
            left = enough - squares + (x * x + y * y + z * z) / end
            if left < 0:
                return np.inf, np.inf
            cut = (math.sqrt(left * (end + 1) / end) + math.sqrt(x * x + y * y + z * z) / end) ** 2
        else:
            cut = np.inf
        i = end
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
) -> float:
    """Fill in the vectors from one site to those of its element; return a lower bound of their squares.

    Vectors that may have a shorter image are pending where another one is shorter for certain.
    """
    vectors, cost, tied = room[0], room[1], room[2]
    least = APART
    found = False
    for j in range(begin, end):
        tied[row, j] = 0
        cost[row, j] = APART
        a, b, c = own[j, 0] - moved[row, 0], own[j, 1] - moved[row, 1], own[j, 2] - moved[row, 2]
        a, b, c = a - np.rint(a), b - np.rint(b), c - np.rint(c)
        excess = max(abs(a) - reach[0] * farthest, abs(b) - reach[1] * farthest, abs(c) - reach[2] * farthest)
        if excess > NEAR:
            continue
        if excess > -NEAR:
            tied[row, j] = 2
        x = a * basis[0, 0] + b * basis[1, 0] + c * basis[2, 0]
        y = a * basis[0, 1] + b * basis[1, 1] + c * basis[2, 1]
        z = a * basis[0, 2] + b * basis[1, 2] + c * basis[2, 2]
        vectors[row, j, 0], vectors[row, j, 1], vectors[row, j, 2] = x, y, z
        cost[row, j] = x * x + y * y + z * z
        if cost[row, j] < certain:
            found = True
        else:
            tied[row, j] += PENDING
            least = min(least, certain)
        least = min(least, cost[row, j])
    if least < APART and not found:
        least = _settle(basis, row, begin, end, room)
    return least


@kernel
def _settle(basis: Array, row: int, begin: int, end: int, room: Room) -> float:
    """Look for the nearest images of the pending pairs of a site; return the least square of all."""
    vectors, cost, tied = room[0], room[1], room[2]
    least = APART
    for j in range(begin, end):
        if tied[row, j] >= PENDING:
            tied[row, j] -= PENDING
            x, y, z, count = nearest_image(vectors[row, j, 0], vectors[row, j, 1], vectors[row, j, 2], basis)
            vectors[row, j, 0], vectors[row, j, 1], vectors[row, j, 2] = x, y, z
            cost[row, j] = x * x + y * y + z * z
            if count > 1 and tied[row, j] == 0:
                tied[row, j] = 1
        least = min(least, cost[row, j])
    return least


@kernel
def _partners(basis: Array, begin: int, end: int, certain: float, far: float, room: Room) -> int:
    """Assign the sites of one element, and mark those of which another assignment is as good.

    Args:
        certain: The square of a length up to which a vector is the shortest of its images.
        far: The square of a distance beyond which rounding decides what is allowed.

    Returns:
        0: there is no assignment; 1: it is found; 2: with a far pair that is left out here it may be another.
    """
    _, cost, tied, free, partner, loose, _ = room
    n = end - begin
    if n == 1:
        partner[begin] = begin
        return 1
    # mostly each site has a nearest of its own, and no other is nearly as near
    distinct, is_open = True, False
    for i in range(begin, end):
        best, second = APART, APART
        for j in range(begin, end):
            if tied[i, j] >= PENDING:
                second = min(second, certain)
            elif cost[i, j] < best:
                best, second = cost[i, j], min(best, second)
                partner[i] = j
            else:
                second = min(second, cost[i, j])
        is_open = is_open or second - best < NEAR
        for k in range(begin, i):
            distinct = distinct and partner[k] != partner[i]
    if distinct and not is_open:
        return 1
    for row in range(begin, end):
        _settle(basis, row, begin, end, room)
    row_dual = np.empty(n)
    column_dual = np.zeros(n)
    for i in range(n):
        row_dual[i] = cost[begin + i, partner[begin + i]]
    if not distinct and not _assign(cost, begin, n, partner, row_dual, column_dual):
        return 0
    if not distinct:
        for i in range(n):
            for j in range(n):
                if cost[begin + i, begin + j] == APART and far - row_dual[i] - column_dual[j] < NEAR:
                    return 2
    # another assignment is as good only if there is a cycle of pairs without reduced cost
    is_open = False
    for i in range(n):
        for j in range(n):
            r, c = begin + i, begin + j
            free[r, c] = cost[r, c] < APART and cost[r, c] - row_dual[i] - column_dual[j] < NEAR
            is_open = is_open or (free[r, c] and c != partner[r])
    if is_open:
        _mark_cycles(free, begin, n, partner, loose)
    return 1


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
                if cost[begin + i, begin + j] < APART:
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
