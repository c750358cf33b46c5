"""Neighbours of an atom with their weights, and the weight of each coordination number: pymatgen's CrystalNN.

    crystal = prepared(rock_salt)
    near = neighbours(crystal, 0, deadline=math.inf)
    len(near.vectors), near.weights     ->  6, {6: 1.0}

The Voronoi cell's faces are weighted by their solid angle, by the difference of electronegativities, and by
the distance against the sum of covalent radii; each number of first neighbours then has a share of a quarter
circle's area, as wide as the gap to the next weight.

To the last bit as CrystalNN, since small differences decide: whether a sliver of a face counts, and which of
two equal neighbours comes first. Weights end rounded to three digits, so a cell that is certain needs no
qhull (cells.py) unless a weight is close to the middle of two. Where qhull decides, it gets
the same points in the same order as from pymatgen, and sums are made in the same order; left out is what
fingerprints do not read (site objects, adjacent faces). What neither decides is `Unusual`: pymatgen itself's.

Not here: what the neighbours look like (motifs.py); oxidation states, which CDVAE's structures do
not have. Source: Pan et al., Inorg. Chem. 60, 1590 (2021); pymatgen 2026.10's local_env.py.
"""

import math
import time
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pymatgen.core import Element, Lattice, Structure

from crystallm_kit.errors import UserError
from crystallm_kit.scores.fingerprints.cells import Cell, certain_cell, solid_angles_and_areas
from crystallm_kit.scores.fingerprints.motifs import order_matters

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_FIRST_CUTOFF_ANGSTROM = 7.0
_NEAR_ANGSTROM, _FAR_ANGSTROM = 0.5, 1.0  # beyond the sum of radii: full weight, and none
_MOST_POINTS = 50_000  # of one tessellation, about 2 s
_ROUNDING_MARGIN = 1e-4  # of a weight in thousandths


class Unusual(Exception):
    """A site that only pymatgen's own code may decide."""


class TooSlow(UserError):
    """The time limit is over, or would be."""


@dataclass(frozen=True)
class PreparedCrystal:
    """What neighbours need of a structure.

    Attributes:
        lattice: Its lattice.
        fractional, cartesian: (N, 3); angstrom.
        electronegativity: (N,) Pauling's; NaN where unknown.
        radius: (N,) covalent, else atomic, angstrom; NaN where unknown.
    """

    lattice: Lattice
    fractional: FloatArray
    cartesian: FloatArray
    electronegativity: FloatArray
    radius: FloatArray


@dataclass(frozen=True)
class Neighbours:
    """Neighbours of one site.

    Attributes:
        vectors: (K, 3) from the site, angstrom, of falling weight.
        weights: Coordination number -> share; without 0.
    """

    vectors: FloatArray
    weights: dict[int, float]


def prepared(structure: Structure) -> PreparedCrystal:
    """Return the arrays of an ordered structure; oxidation states are not looked at."""
    constants = [_element(site.specie.Z) for site in structure]
    if not np.isfinite(structure.cart_coords).all():
        raise ValueError("a coordinate is not a finite number")
    return PreparedCrystal(
        structure.lattice,
        np.array(structure.frac_coords, dtype=np.float64),
        np.array([site.coords for site in structure]),
        np.array([electronegativity for electronegativity, _ in constants]),
        np.array([radius for _, radius in constants]),
    )


@cache
def _element(number: int) -> tuple[float, float]:
    from pymatgen.analysis.molecule_structure_comparator import CovalentRadius

    element = Element.from_Z(number)
    radius = CovalentRadius.radius.get(element.symbol, element.atomic_radius)
    return float(element.X), math.nan if radius is None else float(radius)


def neighbours(crystal: PreparedCrystal, index: int, *, deadline: float) -> Neighbours:
    """Return the neighbours of one site.

    Args:
        crystal: From `prepared`.
        index: Of the site.
        deadline: On time.monotonic's clock; looked at before each tessellation.

    Raises:
        Unusual: If pymatgen has to decide.
        RuntimeError: As pymatgen raises it, where no cell is found within the longest diagonal.
        TooSlow: If the deadline is over, or there are too many points for any.
    """
    around = _surroundings(crystal, index, _FIRST_CUTOFF_ANGSTROM, deadline)
    found = certain_cell(around.points)
    if found is not None:
        near = _weighed(
            crystal, index, around.sites[found[0]], around.points[found[0]], found[1], certain=True
        )
        if near is not None:
            return near
    around, faces, cell = _qhull_cell(crystal, index, around, deadline)
    near = _weighed(crystal, index, around.sites[faces], around.points[faces], cell, certain=False)
    if near is None:
        raise Unusual
    return near


class _Surroundings(NamedTuple):
    """Site (K,) and coordinates (K, 3) of the atoms within the cut-off, nearest first; angstrom."""

    cutoff: float
    sites: IntArray
    points: FloatArray


def _surroundings(crystal: PreparedCrystal, index: int, cutoff: float, deadline: float) -> _Surroundings:
    if time.monotonic() > deadline:
        raise TooSlow("the time limit is over")
    n_points = len(crystal.fractional) / crystal.lattice.volume * 4 / 3 * math.pi * cutoff**3
    if not n_points < _MOST_POINTS:
        raise TooSlow(f"{n_points:.3g} atoms within {cutoff:.1f} angstrom; {_MOST_POINTS:,} at most expected")
    found: Any = crystal.lattice.get_points_in_sphere(
        crystal.fractional, crystal.cartesian[index], cutoff, zip_results=False
    )
    fractional, distances, sites = found[:3]
    order = np.argsort(distances, kind="stable")
    # one product a point: a product of matrices may sum in another order
    points = np.array([np.dot(f, crystal.lattice.matrix) for f in fractional[order]])
    return _Surroundings(cutoff, sites[order], points)


def _qhull_cell(
    crystal: PreparedCrystal, index: int, around: _Surroundings, deadline: float
) -> tuple[_Surroundings, IntArray, Cell]:
    """Return qhull's cell of the first point, within twice the cut-off and so on where it is open."""
    from scipy.spatial import Voronoi  # type: ignore[import-untyped]

    corners = ([1, 1, 1], [-1, 1, 1], [1, -1, 1], [1, 1, -1])
    longest = max(float(np.linalg.norm(crystal.lattice.get_cartesian_coords(c))) for c in corners) + 0.01
    while True:
        try:
            tessellation = Voronoi(around.points)
            return around, *_cell_of_first(around.points, tessellation)
        except RuntimeError as error:  # qhull's own included
            if around.cutoff >= longest:
                raise RuntimeError(f"no Voronoi cell within {longest:.1f} angstrom") from error
        around = _surroundings(crystal, index, min(around.cutoff * 2, longest + 0.001), deadline)


def _cell_of_first(points: FloatArray, tessellation: Any) -> tuple[IntArray, Cell]:
    ridges = np.flatnonzero((tessellation.ridge_points == 0).any(axis=1))
    faces = tessellation.ridge_points[ridges].sum(axis=1).astype(np.int64)  # the other one: this one is 0
    vertices = [tessellation.ridge_vertices[ridge] for ridge in ridges]
    if any(-1 in of_face for of_face in vertices):
        raise RuntimeError("the cell is open")
    sizes = [len(of_face) for of_face in vertices]
    if min(sizes, default=0) < 3:
        raise Unusual
    flat = tessellation.vertices[np.concatenate(vertices)]
    return faces, Cell(points[0], points[faces], np.cumsum([0, *sizes]), flat)


def _weighed(
    crystal: PreparedCrystal, index: int, sites: IntArray, points: FloatArray, cell: Cell, *, certain: bool
) -> Neighbours | None:
    """Return the neighbours behind the faces of a cell.

    Args:
        crystal, index: The site.
        sites, points: (F,), (F, 3) of each face.
        cell: The cell.
        certain: Whether to return None where another cell, the same but for rounding, could give others.

    Returns:
        None also where a weight is 0 or no number at all.
    """
    solid_angle, area = solid_angles_and_areas(cell)
    reach = crystal.radius[index] + crystal.radius[sites]
    if not (np.isfinite(solid_angle).all() and np.isfinite(area).all() and area.all()):
        return None
    if np.isnan(reach).any():
        return None  # pymatgen's own complaint is wanted
    weight = solid_angle / solid_angle.max() * (solid_angle / area)
    weight = weight * _chemical_weight(crystal.electronegativity[index], crystal.electronegativity[sites])
    order = np.argsort(-weight, kind="stable")
    vectors = points - crystal.cartesian[index]
    weight = weight / weight[order[0]] * _distance_weight(np.sqrt(_squares(vectors)), reach)
    order = order[np.argsort(-weight[order], kind="stable")]
    weight = weight[order]
    rounded = np.round(weight, 3)
    n = int((rounded > 0).sum())
    weights = _coordination_weights(rounded[:n].tolist())
    if certain and _is_close_call(weight[:n], vectors[order[:n]], weights, weight[n:]):
        return None
    return Neighbours(vectors[order[:n]], weights)


def _is_close_call(
    weight: FloatArray, vectors: FloatArray, weights: dict[int, float], left_out: FloatArray
) -> bool:
    """Tell whether rounding could change a weight's third digit, or the order where it counts."""
    in_thousandths = np.concatenate([weight, left_out]) * 1000
    if (np.abs(in_thousandths - np.floor(in_thousandths) - 0.5) < _ROUNDING_MARGIN).any():
        return True
    is_tied = -np.diff(weight) * 1000 < _ROUNDING_MARGIN
    # of the motifs only that of 8 neighbours looks at the order
    return 8 in weights and bool(is_tied.any()) and order_matters(vectors, np.cumsum([0, *~is_tied]))


def _squares(vectors: FloatArray) -> FloatArray:
    x, y, z = vectors.T
    squares: FloatArray = x * x + y * y + z * z
    return squares


def _chemical_weight(own: float, others: FloatArray) -> FloatArray:
    # 3.3 is the largest difference of two elements
    weight = 1 + 3.0 * np.sqrt(np.abs(own - others) / 3.3)
    return np.where(np.isnan(weight), 1.0, weight)


def _distance_weight(distance: FloatArray, reach: FloatArray) -> FloatArray:
    low, high = reach + _NEAR_ANGSTROM, reach + _FAR_ANGSTROM
    weight = np.zeros(len(distance))
    for i in range(len(distance)):
        if distance[i] <= low[i]:
            weight[i] = 1
        elif distance[i] < high[i]:
            # math, as in pymatgen: numpy's cosine may differ in the last bit
            weight[i] = (math.cos((distance[i] - low[i]) / (high[i] - low[i]) * math.pi) + 1) * 0.5
    return weight


def _coordination_weights(weights: list[float]) -> dict[int, float]:
    """Return the share of each number of neighbours, from their falling weights."""
    bins = sorted(set(weights), reverse=True)
    areas = [_quarter_circle(x) for x in [*bins, 0.0]]
    shares = {}
    n = 0
    for i, weight in enumerate(bins):
        n += weights.count(weight)
        shares[n] = (areas[i] - areas[i + 1]) / (0.25 * math.pi)
    return shares


def _quarter_circle(x: float) -> float:
    """Return the area of a quarter of the unit circle up to x."""
    if x == 1:
        return 0.25 * math.pi
    height = math.sqrt(1 - x * x)
    return 0.5 * (x * height + math.atan(x / height))
