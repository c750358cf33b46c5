"""StructureMatcher's search for the best mapping of one reduced cell on another, compiled.

    status, value = match_cells(numbers_1, lattice_1, fractional_1, numbers_2, ..., 0.3, 0.5, 10.0, True)

Contract: pymatgen tries every lattice mapping within the tolerances, with every translation that brings two
sites of the rarest element together, and keeps the smallest normalised RMS distance (or stops at the first
whose largest distance is within the site tolerance). So does this, in the same order, but

- sites are compared within their element, distances are taken from the nearest image at once where it is
  certainly the nearest, and the assignment is read off where each site has a nearest partner of its own;
- every comparison that rounding could turn (a tolerance met to 1e-9, two images or two assignments equally
  good) is noted, with a lower bound of what the other outcome would give. Where that could change the answer
  the status is UNCERTAIN and the caller asks pymatgen; symmetric structures have many ties that cannot.

Not here: the reduction (reduction.py); what becomes of a status (structure_matcher.py).
Sources: pymatgen-core 2026.10.16, core/structure_matcher.py, core/lattice.py, util/coord_cython.pyx (MIT
licence); the assignment: Crouse, IEEE Trans. Aerosp. Electron. Syst. 52, 1679 (2016), as in scipy.
"""

import math

import numpy as np

from crystallm_kit.scores.matcher.assignment import Room, room_for, site_distance
from crystallm_kit.scores.matcher.lattice import (
    NEAR,
    Array,
    angle_matches,
    angles_of,
    determinant,
    inverse,
    kernel,
    lengths_of,
    lll_reduced,
    multiply,
    points_in_sphere,
    product,
    spacings,
    stable_order,
    within_length,
)

NO_MATCH, MATCH, UNCERTAIN = 0, 1, 2
_PERFECT = 1e-5  # below it pymatgen looks no further
_SAME = 1e-10  # what a bound may differ without changing an answer
_MOST_ELEMENTS = 256  # atomic numbers are below
_MOST_TIES = 6  # in the reduction of one basis


@kernel
def match_cells(
    numbers_1: Array,
    lattice_1: Array,
    fractional_1: Array,
    numbers_2: Array,
    lattice_2: Array,
    fractional_2: Array,
    length_tolerance: float,
    site_tolerance: float,
    angle_tolerance: float,
    is_rms: bool,
) -> tuple[int, float]:
    """Return a status and the distance of two reduced cells, normalised by (V/N)^(1/3).

    Args:
        numbers_1, numbers_2: (N,) int16 atomic numbers.
        lattice_1, lattice_2: (3, 3) rows are lattice vectors, angstrom.
        fractional_1, fractional_2: (N, 3).
        length_tolerance, site_tolerance, angle_tolerance: pymatgen's ltol, stol, angle_tol.
        is_rms: True: the smallest RMS distance; False: stop at the first mapping within the tolerance, whose
            largest distance is the value.

    Returns:
        NO_MATCH, MATCH or UNCERTAIN; the value, for MATCH.
    """
    n = numbers_1.shape[0]
    if numbers_2.shape[0] != n:
        return NO_MATCH, 0.0
    counts, others = np.zeros(_MOST_ELEMENTS, np.int64), np.zeros(_MOST_ELEMENTS, np.int64)
    for i in range(n):
        counts[numbers_1[i]] += 1
        others[numbers_2[i]] += 1
    rarest = numbers_2[0]  # of several the one that comes first in the second cell
    for i in range(n):
        if counts[numbers_1[i]] != others[numbers_1[i]]:
            return NO_MATCH, 0.0
        if others[numbers_2[i]] < others[rarest]:
            rarest = numbers_2[i]
    order_1, order_2 = _by_element(numbers_1, counts, rarest), _by_element(numbers_2, counts, rarest)
    starts, ends = np.empty(n, np.int64), np.empty(n, np.int64)
    f1, f2 = np.empty((n, 3)), np.empty((n, 3))
    for i in range(n):
        number = numbers_1[order_1[i]]
        starts[i] = i if i == 0 or number != numbers_1[order_1[i - 1]] else starts[i - 1]
        ends[i] = starts[i] + counts[number]
        for axis in range(3):
            f1[i, axis], f2[i, axis] = fractional_1[order_1[i], axis], fractional_2[order_2[i], axis]

    ratio = (abs(determinant(lattice_2)) / abs(determinant(lattice_1))) ** (1 / 6)
    cell_1, cell_2 = np.empty((3, 3)), np.empty((3, 3))
    for i in range(3):
        for axis in range(3):
            cell_1[i, axis], cell_2[i, axis] = lattice_1[i, axis] * ratio, lattice_2[i, axis] / ratio
    lengths = lengths_of(cell_2)
    angles = angles_of(cell_2, lengths)
    longest = max(lengths[0], lengths[1], lengths[2])
    index, cart, distance = points_in_sphere(cell_1, longest * (1 + length_tolerance))
    rows_a, close_a = within_length(distance, lengths[0], length_tolerance)
    rows_b, close_b = within_length(distance, lengths[1], length_tolerance)
    rows_c, close_c = within_length(distance, lengths[2], length_tolerance)
    if close_a or close_b or close_c:
        return UNCERTAIN, -2.0
    if rows_a.shape[0] == 0 or rows_b.shape[0] == 0 or rows_c.shape[0] == 0:
        return NO_MATCH, 0.0
    gamma, close_a = angle_matches(cart, distance, rows_a, rows_b, angles[2], angle_tolerance)
    alpha, close_b = angle_matches(cart, distance, rows_b, rows_c, angles[0], angle_tolerance)
    beta, close_c = angle_matches(cart, distance, rows_a, rows_c, angles[1], angle_tolerance)
    if close_a or close_b or close_c:
        return UNCERTAIN, -2.0

    best, doubtful = np.inf, np.inf
    room = room_for(n)
    scale = np.empty((3, 3))
    mapped = np.empty((3, 3))
    own, moved, shifted = np.empty((n, 3)), np.empty((n, 3)), np.empty((n, 3))
    turned_1, turned_2 = np.empty((n, 3)), np.empty((n, 3))
    for a in range(rows_a.shape[0]):
        for b in range(rows_b.shape[0]):
            if not gamma[a, b]:
                continue
            for c in range(rows_c.shape[0]):
                if not (alpha[b, c] and beta[a, c]):
                    continue
                for axis in range(3):
                    scale[0, axis] = index[rows_a[a], axis]
                    scale[1, axis] = index[rows_b[b], axis]
                    scale[2, axis] = index[rows_c[c], axis]
                    mapped[0, axis] = cart[rows_a[a], axis]
                    mapped[1, axis] = cart[rows_b[b], axis]
                    mapped[2, axis] = cart[rows_c[c], axis]
                if abs(abs(determinant(scale)) - 1) > 0.5:
                    continue
                multiply(f1, inverse(scale), own)  # scale @ cell_1 is the mapped cell
                for i in range(n):
                    for axis in range(3):
                        own[i, axis] -= math.floor(own[i, axis])
                mean = _mean_lattice(mapped, lengths, angles)
                normal = (n / abs(determinant(mean))) ** (1 / 3)
                farthest = 2 * site_tolerance / normal
                allowed = spacings(mean)
                for axis in range(3):
                    allowed[axis] *= farthest
                all_near = min(allowed[0], allowed[1], allowed[2]) > 0.5 + NEAR
                basis, reach, ties = mean, allowed, -1
                for first in range(ends[0]):
                    near = MATCH
                    if not all_near:
                        _shift(f2, own, first, moved)
                        near = _is_near(moved, own, allowed, starts, ends)
                    if near == NO_MATCH:
                        continue
                    if ties < 0:
                        basis, mapping, ties = lll_reduced(mean, -1)
                        turn = inverse(mapping)
                        multiply(own, turn, turned_1)
                        multiply(f2, turn, turned_2)
                        reach = spacings(basis)
                    _shift(turned_2, turned_1, first, shifted)
                    needed = min(best, site_tolerance) / normal
                    low, high = site_distance(
                        shifted, turned_1, basis, reach,
                        farthest, ties > 0, starts, ends, room, needed, is_rms,
                    )  # fmt: skip
                    if low < 0 and ties > 0:
                        _shift(f2, own, first, moved)
                        low, high = _over_bases(
                            mean, moved, own, farthest, starts, ends, room, needed, is_rms
                        )
                    low, high = low * normal, high * normal
                    if near == UNCERTAIN or high - low > _SAME:
                        doubtful = min(doubtful, low)
                    elif is_rms:
                        if abs(low - _PERFECT) < NEAR:
                            doubtful = 0.0
                        best = min(best, low)
                        if low < _PERFECT:
                            return (UNCERTAIN, doubtful) if doubtful < best - _SAME else (MATCH, best)
                    elif abs(low - site_tolerance) < NEAR:
                        doubtful = 0.0
                    elif low < site_tolerance:
                        return MATCH, low
    if abs(best - site_tolerance) < NEAR or doubtful < min(best, site_tolerance + NEAR) - _SAME:
        return UNCERTAIN, doubtful
    return (MATCH if best < site_tolerance else NO_MATCH), best


@kernel
def _by_element(numbers: Array, counts: Array, rarest: int) -> Array:
    """Return the order of the sites by element, as they come within it: the rarest, then from few to many."""
    keys = np.empty(numbers.shape[0], np.int64)
    for i in range(numbers.shape[0]):
        number = numbers[i]
        keys[i] = number + (0 if number == rarest else counts[number] * _MOST_ELEMENTS)
    return stable_order(keys)


@kernel
def _shift(sites: Array, onto: Array, first: int, out: Array) -> None:
    """Move sites so that the first lies on the site `first` of others."""
    for axis in range(3):
        step = onto[first, axis] - sites[0, axis]
        for i in range(sites.shape[0]):
            out[i, axis] = sites[i, axis] + step


@kernel
def _mean_lattice(mapped: Array, lengths: Array, angles: Array) -> Array:
    """Return the lattice of the mean lengths and angles (Lattice.from_parameters)."""
    own = lengths_of(mapped)
    own_angles = angles_of(mapped, own)
    a, b, c = (own[0] + lengths[0]) / 2, (own[1] + lengths[1]) / 2, (own[2] + lengths[2]) / 2
    alpha = math.radians((own_angles[0] + angles[0]) / 2)
    beta = math.radians((own_angles[1] + angles[1]) / 2)
    gamma = math.radians((own_angles[2] + angles[2]) / 2)
    cosine = (math.cos(alpha) * math.cos(beta) - math.cos(gamma)) / (math.sin(alpha) * math.sin(beta))
    star = math.acos(min(1.0, max(-1.0, cosine)))
    out = np.zeros((3, 3))
    out[0, 0], out[0, 2] = a * math.sin(beta), a * math.cos(beta)
    out[1, 0] = -b * math.sin(alpha) * math.cos(star)
    out[1, 1] = b * math.sin(alpha) * math.sin(star)
    out[1, 2] = b * math.cos(alpha)
    out[2, 2] = c
    return out


@kernel
def _is_near(moved: Array, own: Array, allowed: Array, starts: Array, ends: Array) -> int:
    """Tell whether every site has a like one within a fractional tolerance: NO_MATCH, MATCH or UNCERTAIN."""
    answer = MATCH
    for i in range(moved.shape[0]):
        hit, near = False, False
        for j in range(starts[i], ends[i]):
            worst = -1.0
            for axis in range(3):
                off = moved[i, axis] - own[j, axis]
                excess = abs(off - np.rint(off)) - allowed[axis]
                worst = max(worst, excess)
                if worst > NEAR:
                    break
            if worst < -NEAR:
                hit = True
                break
            if worst <= NEAR:
                near = True
        if not hit:
            if not near:
                return NO_MATCH
            answer = UNCERTAIN
    return answer


@kernel
def _over_bases(
    mean: Array,
    moved: Array,
    own: Array,
    farthest: float,
    starts: Array,
    ends: Array,
    room: Room,
    needed: float,
    is_rms: bool,
) -> tuple[float, float]:
    """Return the smallest and largest distance over all bases between which rounding chooses."""
    low, high = np.inf, -np.inf
    for choices in range(1 << _MOST_TIES):
        basis, mapping, ties = lll_reduced(mean, choices)
        if ties > _MOST_TIES:
            return -1.0, np.inf
        if choices >> ties:
            continue  # as one before
        turn, reach = inverse(mapping), spacings(basis)
        here = site_distance(
            product(moved, turn), product(own, turn), basis, reach, farthest, False, starts, ends, room,
            needed, is_rms,
        )  # fmt: skip
        low, high = min(low, here[0]), max(high, here[1])
    return low, high
