"""Nearest distances in a crystal, periodic images of the same atom included.

A crystal's atoms come close in two ways: two sites of the cell, and a site and its own image one lattice
vector away. The second is what most published checks leave out: NaCl in a cell of 0.3 x 10 x 10 angstrom
passes them.

Rock salt, NaCl, a = 5.64 angstrom, primitive cell: nearest pair Na-Cl 2.82, shortest lattice vector 3.99
angstrom.

Exact: the cell is Minkowski-reduced first, after which the nearest image of a difference wrapped to [-1/2,
1/2] lies among the 27 around it.

Not here: what is too close (validity.py). Neighbours and coordination: pymatgen.
Source of the reduction: Nguyen and Stehle, ACM Trans. Algorithms 5, 46 (2009), as in moyo.
"""

import itertools
import json
from dataclasses import dataclass
from functools import cache
from importlib import resources

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

UNKNOWN_RADIUS_ANGSTROM = 1.0  # He, Ne, Kr, Xe, At, Rn, Fr, Cm and beyond; as LeMat-GenBench takes it
_IMAGES = np.array(list(itertools.product((-1, 0, 1), repeat=3)), dtype=np.float64)
_HALF = _IMAGES[14:]  # one of each pair of opposite lattice vectors
_PAIRS_AT_ONCE = 50_000  # 27 images each: about 11 MB


@dataclass(frozen=True)
class NearestDistances:
    """Nearest distances of every pair of sites, and between a site and its own images, in angstrom.

    Attributes:
        first, second: (P,) site indices of the pairs, first < second.
        distance: (P,) distance of the pair, over all images.
        self_image: Length of the shortest lattice vector; the same for every site.
    """

    first: IntArray
    second: IntArray
    distance: FloatArray
    self_image: float

    @property
    def shortest(self) -> float:
        """The shortest of all, self-images included."""
        return min(self.self_image, float(self.distance.min())) if self.distance.size else self.self_image


def nearest_distances(lattice: FloatArray, fractional: FloatArray) -> NearestDistances:
    """Return the nearest distances in a crystal.

    Args:
        lattice: (3, 3) rows are lattice vectors, angstrom; finite, linearly independent.
        fractional: (N, 3) fractional coordinates; any cell.

    Raises:
        ValueError: If the lattice cannot be reduced.
    """
    from moyopy import minkowski_reduce

    reduced_rows, transformation = minkowski_reduce(lattice.tolist())
    reduced = np.array(reduced_rows)
    # reduced = T^t @ lattice, so x = f @ lattice = (f @ T^-t) @ reduced
    points = fractional @ np.linalg.inv(np.array(transformation, dtype=np.float64).T)
    first, second = _pairs(len(points))
    distance = np.empty(len(first))
    images = _IMAGES @ reduced
    squared = (images * images).sum(1)
    for start in range(0, len(first), _PAIRS_AT_ONCE):
        part = slice(start, start + _PAIRS_AT_ONCE)
        wrapped = points[second[part]] - points[first[part]]
        wrapped -= np.rint(wrapped)
        vectors = wrapped @ reduced
        nearest = (2.0 * (vectors @ images.T) + squared).argmin(1)
        # Not |v|^2 + 2 v.t + |t|^2: that loses the digits of a distance near 0.
        vectors += images[nearest]
        distance[part] = np.sqrt((vectors * vectors).sum(1))
    half = _HALF @ reduced
    return NearestDistances(first, second, distance, float(np.sqrt((half * half).sum(1).min())))


@cache
def _small_pairs(n: int) -> tuple[IntArray, IntArray]:
    first, second = np.triu_indices(n, 1)
    return first, second


def _pairs(n: int) -> tuple[IntArray, IntArray]:
    if n <= 100:
        return _small_pairs(n)
    first, second = np.triu_indices(n, 1)
    return first, second


@cache
def _radii(column: int, unknown: float) -> FloatArray:
    from pymatgen.core import Element

    text = resources.files("crystallm_kit.scores").joinpath("radii.json").read_text(encoding="utf-8")
    radii = np.full(119, unknown)
    for symbol, row in json.loads(text)["elements"].items():
        if row[column] is not None:
            radii[Element(symbol).Z] = row[column]
    radii.setflags(write=False)
    return radii


def atomic_radii() -> FloatArray:
    """(119,) Slater atomic radii by atomic number, angstrom; 1.0 where unknown. Frozen in radii.json."""
    return _radii(0, UNKNOWN_RADIUS_ANGSTROM)


def covalent_radii() -> FloatArray:
    """(119,) Cordero covalent radii by atomic number, angstrom; 1.5 where unknown. Frozen in radii.json."""
    return _radii(1, 1.5)
