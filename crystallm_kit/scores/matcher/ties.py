"""Assignments that are equally good, where rounding decides in pymatgen, compiled.

    low, high = over_assignments(vectors, partner, loose, free, starts, ends, basis, chosen, bound, is_rms)

Contract: a site is loose where it may be paired with another one, or with another image of the same one, at
the same sum of squares (to `NEAR`). `bound_of` is a quick lower bound over all choices; `over_assignments`
tries them, up to `_MOST_STEPS`.

Not here: finding one assignment, and the loose sites (assignment.py).
"""

import math

import numpy as np

from crystallm_kit.scores.matcher.lattice import NEAR, Array, kernel

_MOST_STEPS = 20_000  # then the quick bound has to do
_MOST_OPTIONS = 64  # of one site


@kernel
def nearest_image(x0: float, y0: float, z0: float, basis: Array) -> tuple[float, float, float, int]:
    """Return the shortest vector that differs from one by the lattice, and how many are as short."""
    x1, y1, z1, least, count = x0, y0, z0, np.inf, 0
    for a in range(-1, 2):
        for b in range(-1, 2):
            for c in range(-1, 2):
                x = x0 + a * basis[0, 0] + b * basis[1, 0] + c * basis[2, 0]
                y = y0 + a * basis[0, 1] + b * basis[1, 1] + c * basis[2, 1]
                z = z0 + a * basis[0, 2] + b * basis[1, 2] + c * basis[2, 2]
                square = x * x + y * y + z * z
                if abs(square - least) < NEAR:
                    count += 1
                elif square < least:
                    count = 1
                if square < least:
                    x1, y1, z1, least = x, y, z, square
    return x1, y1, z1, count


@kernel
def shortest_images(x0: float, y0: float, z0: float, basis: Array) -> tuple[Array, int]:
    """Return the shortest vectors that differ from one by the lattice, and their number."""
    out = np.empty((27, 3))
    squares = np.empty(27)
    count = 0
    least = np.inf
    for a in range(-1, 2):
        for b in range(-1, 2):
            for c in range(-1, 2):
                x = x0 + a * basis[0, 0] + b * basis[1, 0] + c * basis[2, 0]
                y = y0 + a * basis[0, 1] + b * basis[1, 1] + c * basis[2, 1]
                z = z0 + a * basis[0, 2] + b * basis[1, 2] + c * basis[2, 2]
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
            for axis in range(3):
                out[kept, axis] = out[i, axis]
            kept += 1
    return out, kept


@kernel
def _options(
    vectors: Array, partner: Array, free: Array, row: int, begin: int, end: int, basis: Array
) -> tuple[Array, Array, int]:
    """Return the columns and vectors that a loose site may be paired with, and their number."""
    columns = np.empty(_MOST_OPTIONS, np.int64)
    out = np.empty((_MOST_OPTIONS, 3))
    count = 0
    for j in range(begin, end):
        if j != partner[row] and (end - begin == 1 or not free[row, j]):
            continue
        images, held = shortest_images(vectors[row, j, 0], vectors[row, j, 1], vectors[row, j, 2], basis)
        for k in range(held):
            if count < _MOST_OPTIONS:
                columns[count] = j
                for axis in range(3):
                    out[count, axis] = images[k, axis]
            count += 1
    return columns, out, count


@kernel
def bound_of(
    vectors: Array,
    cost: Array,
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
            for axis in range(3):
                most[axis] += vectors[i, partner[i], axis]
                least[axis] += vectors[i, partner[i], axis]
            continue
        _, options, count = _options(vectors, partner, free, i, starts[i], ends[i], basis)
        if count > _MOST_OPTIONS:
            return -1.0
        for axis in range(3):
            high, low = options[0, axis], options[0, axis]
            for k in range(1, count):
                high, low = max(high, options[k, axis]), min(low, options[k, axis])
            most[axis] += high
            least[axis] += low
    square = 0.0
    for axis in range(3):
        square += max(abs(most[axis]), abs(least[axis])) ** 2
    return math.sqrt(max(0.0, squares / n - square / (n * n))) - NEAR


@kernel
def over_assignments(
    vectors: Array,
    partner: Array,
    loose: Array,
    free: Array,
    starts: Array,
    ends: Array,
    basis: Array,
    chosen: Array,
    bound: float,
    is_rms: bool,
) -> tuple[float, float]:
    """Return the smallest and largest distance over all assignments that are as good (depth-first)."""
    n = partner.shape[0]
    rows = np.empty(n, np.int64)
    depth = 0
    for i in range(n):
        if loose[i]:
            rows[depth] = i
            depth += 1
    columns = np.empty((depth, _MOST_OPTIONS), np.int64)
    options = np.empty((depth, _MOST_OPTIONS, 3))
    counts = np.empty(depth, np.int64)
    for i in range(depth):
        row = rows[i]
        own_columns, own_options, counts[i] = _options(
            vectors, partner, free, row, starts[row], ends[row], basis
        )
        if counts[i] > _MOST_OPTIONS:
            return bound, np.inf
        for k in range(counts[i]):
            columns[i, k] = own_columns[k]
            for axis in range(3):
                options[i, k, axis] = own_options[k, axis]
    taken = np.zeros(n, np.bool_)
    for i in range(n):
        if not loose[i]:
            taken[partner[i]] = True
    at = np.empty(depth, np.int64)
    for i in range(depth):
        at[i] = -1
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
        for axis in range(3):
            chosen[rows[level], axis] = options[level, at[level], axis]
        if level + 1 < depth:
            level += 1
            continue
        value = spread_of(chosen, is_rms)
        low, high = min(low, value), max(high, value)
    return low, high


@kernel
def spread_of(chosen: Array, is_rms: bool) -> float:
    """Return the RMS or largest length of vectors (N, 3) without their mean."""
    n = chosen.shape[0]
    x, y, z = 0.0, 0.0, 0.0
    for i in range(n):
        x, y, z = x + chosen[i, 0], y + chosen[i, 1], z + chosen[i, 2]
    x, y, z = x / n, y / n, z / n
    total, largest = 0.0, 0.0
    for i in range(n):
        square = (chosen[i, 0] - x) ** 2 + (chosen[i, 1] - y) ** 2 + (chosen[i, 2] - z) ** 2
        total += square
        largest = max(largest, square)
    return math.sqrt(total / n) if is_rms else math.sqrt(largest)
