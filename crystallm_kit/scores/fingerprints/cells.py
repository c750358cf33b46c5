"""The Voronoi cell of one point, compiled: quick where it is certain.

    faces, cell = certain_cell(points)    # None where it is uncertain
    solid_angles_and_areas(cell)

qhull tessellates all points within 7 angstrom to give the one cell that is wanted, and that took 0.8 of a
fingerprint's time. Here each neighbour's plane, a large square, is cut by the planes of the others.

Certain means that qhull would find the same faces, whatever its rounding: no vertex comes nearer than 1e-6
angstrom to a plane that does not make it, and no three planes that make one are nearly dependent. Crystals of
high symmetry have vertices of four planes or more, and there qhull may find slivers of faces that pymatgen's
CrystalNN counts or not by a last bit: those cells are qhull's to decide. So it says yes to most sites of
generated crystals and to few of symmetric ones.

Not here: which points, and what faces weigh (neighbours.py).
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from crystallm_kit.scores.fingerprints.motifs import compiled

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_CLEARANCE_ANGSTROM = 1e-6
_LEAST_DETERMINANT = 1e-4  # of three unit normals
_SQUARE_ANGSTROM = 100.0
_MOST_CORNERS = 64
_MOST_VERTICES = 1024


class Cell(NamedTuple):
    """A Voronoi cell.

    Attributes:
        centre: (3,) the point that it belongs to, angstrom.
        points: (F, 3) the point behind each face.
        starts: (F + 1,) where each face's vertices start.
        vertices: (M, 3) faces one after the other, each in order around.
    """

    centre: FloatArray
    points: FloatArray
    starts: IntArray
    vertices: FloatArray


def certain_cell(points: FloatArray) -> tuple[IntArray, Cell] | None:
    """Return the cell of the first point, with the places of the points behind its faces; None: uncertain.

    Args:
        points: (K, 3) by rising distance from the first, angstrom.
    """
    faces, starts, vertices = _cut(points - points[0])
    if not len(faces):
        return None
    return faces, Cell(np.zeros(3), points[faces] - points[0], starts, vertices)


def solid_angles_and_areas(cell: Cell) -> tuple[FloatArray, FloatArray]:
    """Return the solid angle (sr) and the area (angstrom^2) of each face, summed as pymatgen sums them."""
    ratio, right_angle, owner, volume, half_distance = _fans(*cell)
    # numpy's arctangent, as in pymatgen: the C library's differs from it in the last bit
    angle = np.where(np.isnan(right_angle), np.arctan(ratio), right_angle)
    halves: FloatArray = np.where(angle > 0, angle, angle + math.pi)
    return np.asarray(np.bincount(owner, halves * 2), dtype=np.float64), 3 * volume / half_distance


@compiled
def _dot(a: FloatArray, b: FloatArray) -> float:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]  # type: ignore[no-any-return]


@compiled
def _cross(a: FloatArray, b: FloatArray, product: FloatArray) -> None:
    product[0] = a[1] * b[2] - a[2] * b[1]
    product[1] = a[2] * b[0] - a[0] * b[2]
    product[2] = a[0] * b[1] - a[1] * b[0]


@compiled
def _less(a: FloatArray, b: FloatArray, difference: FloatArray) -> None:
    for c in range(3):
        difference[c] = a[c] - b[c]


@compiled
def _triple(a: FloatArray, b: FloatArray, c: FloatArray) -> float:
    return (  # type: ignore[no-any-return]
        a[0] * (b[1] * c[2] - b[2] * c[1])
        + a[1] * (b[2] * c[0] - b[0] * c[2])
        + a[2] * (b[0] * c[1] - b[1] * c[0])
    )


@compiled
def _fans(
    centre: FloatArray, points: FloatArray, starts: IntArray, vertices: FloatArray
) -> tuple[FloatArray, FloatArray, IntArray, FloatArray, FloatArray]:
    """Return, of each triangle of the faces' fans, tan(solid angle / 2), the half angle where that is
    infinite (else NaN), and its face; of each face its pyramid's volume and half the distance to its point.
    """
    n_triangles = len(vertices) - 2 * len(points)
    ratio = np.empty(n_triangles)
    right_angle = np.full(n_triangles, np.nan)
    owner = np.empty(n_triangles, dtype=np.int64)
    volume = np.zeros(len(points))
    half_distance = np.empty(len(points))
    d, r = np.empty_like(vertices), np.empty(len(vertices))
    o, p, q = np.empty(3), np.empty(3), np.empty(3)
    for i in range(len(d)):
        _less(vertices[i], centre, d[i])
        r[i] = math.sqrt(_dot(d[i], d[i]))
    t = 0
    for face in range(len(points)):
        _less(centre, points[face], o)
        half_distance[face] = math.sqrt(_dot(o, o)) / 2
        a = starts[face]
        for b in range(a + 1, starts[face + 1] - 1):
            c = b + 1
            top = abs(_triple(d[a], d[b], d[c]))
            bottom = (
                r[a] * r[b] * r[c]
                + r[c] * _dot(d[a], d[b])
                + r[b] * _dot(d[a], d[c])
                + r[a] * _dot(d[b], d[c])
            )
            ratio[t] = top / bottom
            if bottom == 0:
                right_angle[t] = 0.5 * math.pi if top > 0 else -0.5 * math.pi
            owner[t] = face
            _less(centre, vertices[c], o)
            _less(vertices[a], vertices[c], p)
            _less(vertices[b], vertices[c], q)
            volume[face] += abs(_triple(o, p, q)) / 6
            t += 1
    return ratio, right_angle, owner, volume, half_distance


@compiled
def _square(point: FloatArray, corners: FloatArray) -> None:
    """Write the corners of a large square half way to the point, across the way."""
    least = 0
    for c in range(1, 3):
        if abs(point[c]) < abs(point[least]):
            least = c
    axis, u, v = np.zeros(3), np.empty(3), np.empty(3)
    axis[least] = 1.0
    _cross(point, axis, u)
    _cross(point, u, v)
    u_scale, v_scale = _SQUARE_ANGSTROM / math.sqrt(_dot(u, u)), _SQUARE_ANGSTROM / math.sqrt(_dot(v, v))
    for c in range(3):
        u[c] *= u_scale
        v[c] *= v_scale
        corners[0, c] = point[c] / 2 + u[c] + v[c]
        corners[1, c] = point[c] / 2 - u[c] + v[c]
        corners[2, c] = point[c] / 2 - u[c] - v[c]
        corners[3, c] = point[c] / 2 + u[c] - v[c]


@compiled
def _cut_once(
    corners: FloatArray, edges: IntArray, n: int, plane: int, point: FloatArray, square: float,
    spare_corners: FloatArray, spare_edges: IntArray, beyond: FloatArray,
) -> int:  # fmt: skip
    """Cut a polygon by the plane half way to a point; return its number of corners: 0 where nothing is left.

    Edge i runs from corner i to the next, and names the plane that made it. -1: more corners than fit.
    """
    n_out = 0
    for i in range(n):
        beyond[i] = _dot(corners[i], point) - square / 2
        n_out += beyond[i] > 0
    if n_out == 0:
        return n
    if n_out == n:
        return 0
    if n + 2 > _MOST_CORNERS:
        return -1
    m = 0
    for i in range(n):
        following = i + 1 if i + 1 < n else 0
        inside, next_inside = beyond[i] <= 0, beyond[following] <= 0
        if inside:
            for c in range(3):
                spare_corners[m, c] = corners[i, c]
            spare_edges[m] = edges[i]
            m += 1
        if inside != next_inside:
            share = beyond[i] / (beyond[i] - beyond[following])
            for c in range(3):
                spare_corners[m, c] = corners[i, c] + share * (corners[following, c] - corners[i, c])
            spare_edges[m] = plane if inside else edges[i]
            m += 1
    for i in range(m):
        for c in range(3):
            corners[i, c] = spare_corners[i, c]
        edges[i] = spare_edges[i]
    return m


@compiled
def _exact_corner(a: FloatArray, b: FloatArray, c: FloatArray, corner: FloatArray) -> bool:
    """Write where the planes half way to three points meet; False where they are nearly dependent."""
    det = _triple(a, b, c)
    aa, bb, cc = _dot(a, a), _dot(b, b), _dot(c, c)
    if not abs(det) > _LEAST_DETERMINANT * math.sqrt(aa * bb * cc):
        return False
    bc, ca, ab = np.empty(3), np.empty(3), np.empty(3)
    _cross(b, c, bc)
    _cross(c, a, ca)
    _cross(a, b, ab)
    for i in range(3):
        corner[i] = (aa * bc[i] + bb * ca[i] + cc * ab[i]) / (2 * det)
    return True


@compiled
def _has_clearance(
    corner: FloatArray, points: FloatArray, squares: FloatArray, f: int, a: int, b: int
) -> bool:
    reach = 2 * (math.sqrt(_dot(corner, corner)) + _CLEARANCE_ANGSTROM)
    for h in range(1, len(points)):
        if squares[h] > reach * reach:
            return True  # nor do those behind it come near
        if h in (f, a, b):
            continue
        if squares[h] / 2 - _dot(corner, points[h]) < _CLEARANCE_ANGSTROM * math.sqrt(squares[h]):
            return False
    return True


@compiled
def _cut(points: FloatArray) -> tuple[IntArray, IntArray, FloatArray]:
    """Return the faces' points, starts and vertices; no faces where the cell is open or uncertain."""
    nothing = (np.empty(0, dtype=np.int64), np.zeros(1, dtype=np.int64), np.empty((0, 3)))
    squares = np.empty(len(points))
    for i in range(len(points)):
        squares[i] = _dot(points[i], points[i])
    if len(points) < 5 or not squares[1] > 1e-4:
        return nothing
    corners, spare_corners = np.empty((_MOST_CORNERS, 3)), np.empty((_MOST_CORNERS, 3))
    edges = np.empty(_MOST_CORNERS, dtype=np.int64)
    spare_edges, beyond = np.empty(_MOST_CORNERS, dtype=np.int64), np.empty(_MOST_CORNERS)
    faces, starts = np.empty(_MOST_VERTICES, dtype=np.int64), np.zeros(_MOST_VERTICES + 1, dtype=np.int64)
    vertices = np.empty((_MOST_VERTICES, 3))
    n_faces = n_vertices = 0
    for f in range(1, len(points)):
        _square(points[f], corners)
        for i in range(4):
            edges[i] = -1
        n = 4
        reach = np.inf  # points beyond it do not cut the polygon
        for h in range(1, len(points)):
            if h == f:
                continue
            if squares[h] > reach:
                break
            n = _cut_once(corners, edges, n, h, points[h], squares[h], spare_corners, spare_edges, beyond)
            if n <= 0:
                break
            reach = 0.0
            for i in range(n):
                reach = max(reach, 4.001 * _dot(corners[i], corners[i]))
        if n == 0:
            continue
        if n < 3 or n_vertices + n > _MOST_VERTICES:
            return nothing
        for i in range(n):
            a, b = edges[i - 1 if i else n - 1], edges[i]
            if a < 0 or b < 0 or a == b:
                return nothing
            corner = vertices[n_vertices + i]
            if not _exact_corner(points[f], points[a], points[b], corner):
                return nothing
            if not _has_clearance(corner, points, squares, f, a, b):
                return nothing
        faces[n_faces] = f
        n_faces += 1
        n_vertices += n
        starts[n_faces] = n_vertices
    return faces[:n_faces].copy(), starts[: n_faces + 1].copy(), vertices[:n_vertices].copy()
