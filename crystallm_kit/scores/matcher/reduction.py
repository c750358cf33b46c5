"""The primitive, Niggli-reduced cell as pymatgen finds it, compiled.

    status, numbers, lattice, fractional = reduced_cell(numbers, ranks, lattice, fractional)

Contract: the cell, the order of the sites and their coordinates are those of
`get_reduced_structure("niggli")` followed by `get_primitive_structure()`, to the last digit where numpy
multiplies with fused operations (x86-64 and Arm servers), else to 1e-13. Which of the many equal cells is
taken, and what still counts as a translation, hangs on the order of the steps, so they are pymatgen's. Equal
digits matter where rounding decides later: pymatgen, asked then, has to see what it would have made itself.
Where a comparison is so close that rounding could turn it (`NEAR`), or the cell is none, the status says so
and the caller asks pymatgen.

Not here: reading structures, and what becomes of a status (structure_matcher.py); comparing two cells
(kernel.py).
Source: pymatgen-core 2026.10.16, core/structure.py (MIT licence).
"""

import math

import numpy as np

from crystallm_kit.scores.matcher.lattice import (
    NEAR,
    Array,
    exact_inverse,
    inverse,
    kernel,
    lengths_of,
    multiply,
    product,
    stable_order,
)
from crystallm_kit.scores.matcher.niggli import DONE, NO_CELL, UNCERTAIN, niggli_reduced

PRIMITIVE_TOLERANCE_ANGSTROM = 0.25  # the default of get_primitive_structure, which StructureMatcher takes


@kernel
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
    cart, out = np.empty(fractional.shape), np.empty(fractional.shape)
    multiply(fractional, lattice, cart)
    multiply(cart, exact_inverse(found), out)
    for i in range(out.shape[0]):
        for j in range(3):
            out[i, j] = _wrapped(out[i, j])
    return DONE, found, out


@kernel
def _wrapped(value: float) -> float:
    """Return numpy's value % 1: the next number below a whole one gives 1."""
    return value - math.floor(value)


@kernel
def reduced_cell(
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
    for i in range(numbers.shape[0]):
        if not np.isfinite(fractional[i, 0] + fractional[i, 1] + fractional[i, 2]):
            return NO_CELL, numbers, lattice, fractional
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


@kernel
def _smaller_cell(
    numbers: Array, ranks: Array, lattice: Array, fractional: Array
) -> tuple[int, bool, Array, Array, Array]:
    """Return a status, whether a smaller cell was found, and it (one level of get_primitive_structure)."""
    n = numbers.shape[0]
    keys = np.empty(n, np.int64)
    for i in range(n):
        keys[i] = ranks[numbers[i]]
    order = stable_order(keys)
    z, f = np.empty(n, np.int16), np.empty((n, 3))
    for i in range(n):
        z[i] = numbers[order[i]]
        for axis in range(3):
            f[i, axis] = fractional[order[i], axis]
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
    tolerance = lengths_of(lattice)
    for axis in range(3):
        tolerance[axis] = PRIMITIVE_TOLERANCE_ANGSTROM / tolerance[axis]
    vectors, close = _translations(f, starts, groups, rarest, tolerance)
    if vectors.shape[0] == 1 and max(tolerance[0], tolerance[1], tolerance[2]) < (1 - 1e-6) / units:
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
                            cell = product(exact_inverse(matrix), lattice)
                            status, sites, moved = _merged(f, starts, groups, matrix, cell, tolerance, det)
                            if status == UNCERTAIN:
                                return UNCERTAIN, False, numbers, lattice, fractional
                            if status == DONE:
                                return DONE, True, _taken(z, sites), cell, moved
    return DONE, False, numbers, lattice, fractional


@kernel
def _taken(numbers: Array, sites: Array) -> Array:
    out = np.empty(sites.shape[0], np.int16)
    for i in range(sites.shape[0]):
        out[i] = numbers[sites[i]]
    return out


@kernel
def _gcd(a: int, b: int) -> int:
    while b:
        a, b = b, a % b
    return a


@kernel
def _translations(f: Array, starts: Array, groups: int, rarest: int, tolerance: Array) -> tuple[Array, bool]:
    """Return the vectors from the rarest element's first site that move every site to about a like one.

    Also whether a comparison that counted was close.
    """
    first, last = starts[rarest], starts[rarest + 1]
    close = False
    out = np.empty((last - first, 3))
    vector = np.empty(3)
    count = 0
    for s in range(first, last):
        for axis in range(3):
            vector[axis] = f[s, axis] - f[first, axis]
        kept = True
        near_any = False
        for g in range(groups):
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
            for axis in range(3):
                out[count, axis] = vector[axis]
            count += 1
    return out[:count], close


@kernel
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


@kernel
def _merged(
    f: Array, starts: Array, groups: int, matrix: Array, cell: Array, tolerance: Array, det: int
) -> tuple[int, Array, Array]:
    """Return the sites of the smaller cell, each the mean of `det` sites; NO_CELL where they do not pair up.

    Returns:
        DONE, NO_CELL or UNCERTAIN; (K,) index of the first site of each group; (K, 3) coordinates.
    """
    n = f.shape[0]
    moved = product(f, matrix)
    allowed = lengths_of(cell)
    for axis in range(3):
        allowed[axis] = PRIMITIVE_TOLERANCE_ANGSTROM / allowed[axis]
    sites = np.empty(n // det, np.int64)
    out = np.empty((n // det, 3))
    count = 0
    close = False
    for g in range(groups):
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
                    here = _wrapped(moved[begin + j, axis])
                    if seen == 0:
                        mean[axis] = here
                    else:
                        offset = here - mean[axis]
                        mean[axis] += (offset - np.rint(offset)) / (seen + 1)
                if seen == 0:
                    first = begin + j
                seen += 1
            sites[count] = first
            for axis in range(3):
                out[count, axis] = mean[axis]
            count += 1
    return DONE, sites, out


@kernel
def _joined(moved: Array, f: Array, i: int, j: int, allowed: Array, tolerance: Array) -> int:
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
