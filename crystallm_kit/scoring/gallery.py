"""Crystals of a report: each as a still picture, and as the numbers from which the page draws it in 3-D.

    crystal = drawn(cif)
    crystal.still       "<svg ...>...</svg>", on paper and where there is no WebGL
    crystal.data        {"lattice": [[5.64, 0, 0], ...], "sites": [{"element": "Na", "at": [0, 0, 0]}, ...]}

The still follows the rules of the server's page (server/web/crystal.js, sketch.js): the cell turned by 24 and
tilted by 14 degrees, atoms on a face shown on the opposite face too, bonds between mutual nearest neighbours,
painted from the back to the front. Colours and radii are read from its table (server/web/elements.js), and
its own code draws the turning one. What cannot be drawn is said, not raised: a failure's CIF may be anything.

Not here: which crystals are shown (the run); the page around them (report.py).
"""

import itertools
import math
import re
import warnings
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pymatgen.core import Element, Lattice, Structure

from crystallm_kit.errors import EncodeError
from crystallm_kit.scoring.axes import coordinate
from crystallm_kit.structures.symmetry import dataset

_TURN, _TILT = math.radians(-24), math.radians(14)
_SHELL, _REACH = 1.15, 1.3  # as in crystal.js
_MOST_SITES = 300  # more are not drawn: a still of them is a blot of some MB
_MOST_BONDED = 80  # sites; with more, bonds hide the atoms
_SYMPREC_ANGSTROM = 0.1
_SIDE = 200
_UNKNOWN = ("#ff1493", 1.5)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Drawn:
    """One crystal as it is shown.

    Attributes:
        still: An <svg> of `_SIDE` x `_SIDE`; "" where it cannot be drawn.
        data: For the page's viewer; {} where it cannot be drawn.
        counts: Element -> number of sites.
        fault: Why it cannot be drawn.
    """

    still: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    fault: str = ""


@dataclass(frozen=True)
class Scene:
    """What is painted, centred, as seen on the screen: x right, y up, z towards the viewer, in angstrom.

    Attributes:
        places: (A, 3) of the atoms shown.
        elements: (A,) their symbols.
        bonds: Pairs of indices of atoms.
        edges: (12, 2, 3) ends of the cell's edges.
        radius: Of a ball around it all.
    """

    places: Floats
    elements: list[str]
    bonds: list[tuple[int, int]]
    edges: Floats
    radius: float


def drawn(cif: str, *, conventional: bool = False) -> Drawn:
    """Return a crystal's pictures from its CIF, or why there are none.

    Args:
        cif: Its text.
        conventional: Draw the conventional cell of the symmetry found within 0.1 angstrom, if any.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            structure = Structure.from_str(cif, fmt="cif")
    # Any text may stand in a failure's CIF, and pymatgen's parser lets all kinds of errors through.
    except Exception as error:  # noqa: BLE001
        return Drawn(fault=f"the CIF cannot be read: {' '.join(str(error).split())[:120]}")
    if not structure.is_ordered:
        return Drawn(fault="a site is partly or mixedly occupied")
    if len(structure) > _MOST_SITES:
        return Drawn(fault=f"{len(structure)} sites; up to {_MOST_SITES} are drawn")
    if conventional:
        structure = _conventional(structure)
    lattice = _standing(structure.lattice)
    fractional = structure.frac_coords - np.floor(structure.frac_coords + 1e-4)
    elements = [site.specie.symbol for site in structure]
    if not (np.isfinite(lattice).all() and np.isfinite(fractional).all()):
        return Drawn(fault="a number of the cell is not finite")
    counts = {symbol: elements.count(symbol) for symbol in dict.fromkeys(elements)}
    data = {
        "lattice": np.round(lattice, 5).tolist(),
        "sites": [
            {"element": e, "at": np.round(at, 5).tolist()} for e, at in zip(elements, fractional, strict=True)
        ],
    }
    return Drawn(still_of(scene_of(elements, fractional, lattice)), data, counts)


@cache
def element_table() -> dict[str, tuple[str, float]]:
    """Return symbol -> (colour, covalent radius in angstrom), as the server's page draws them."""
    text = (files("crystallm_kit") / "server" / "web" / "elements.js").read_text(encoding="utf-8")
    rows = re.findall(r'^\s*(\w+): \["\w+", "(#\w{6})", ([\d.]+)\]', text, re.MULTILINE)
    return {symbol: (colour, float(radius)) for symbol, colour, radius in rows}


def scene_of(elements: list[str], fractional: Floats, lattice: Floats) -> Scene:
    """Return what is painted of one cell.

    Args:
        elements: (N,) symbols.
        fractional: (N, 3) in [0, 1).
        lattice: (3, 3) rows, a along x, b in the plane of x and y; angstrom.
    """
    corners = np.array(list(itertools.product((0.0, 1.0), repeat=3)))

    def place(points: Floats) -> Floats:
        return _on_screen((points - 0.5) @ lattice)

    shown: list[tuple[int, tuple[int, ...]]] = [
        (site, cell)
        for site, at in enumerate(fractional)
        for cell in itertools.product(*[(0, 1) if x < 1e-3 else (0,) for x in at])
    ]
    known = {key: atom for atom, key in enumerate(shown)}
    bonds = []
    for i, j, shift in _neighbours(elements, fractional, lattice) if len(elements) <= _MOST_BONDED else []:
        for atom, (site, cell) in enumerate(shown):
            if site == i:
                other = known.get((j, tuple(int(c + s) for c, s in zip(cell, shift, strict=True))))
                if other is not None and not (i == j and other < atom):
                    bonds.append((atom, other))
    pairs = [
        (a, b) for a, b in itertools.combinations(range(8), 2) if abs(corners[a] - corners[b]).sum() == 1
    ]
    ends = place(corners)
    return Scene(
        places=place(np.array([fractional[site] + np.array(cell) for site, cell in shown]).reshape(-1, 3)),
        elements=[elements[site] for site, _ in shown],
        bonds=bonds,
        edges=ends[np.array(pairs)],
        radius=float(np.linalg.norm(ends, axis=1).max()) + 1.0,
    )


def still_of(scene: Scene) -> str:
    """Return a scene as an <svg>; its colours are in the page's gradients (`gradients`)."""
    zoom = _SIDE / 2 / scene.radius
    table = element_table()

    def at(point: Floats) -> str:
        return f"{coordinate(_SIDE / 2 + point[0] * zoom)} {coordinate(_SIDE / 2 - point[1] * zoom)}"

    painted: list[tuple[float, str]] = []
    for place, element in zip(scene.places, scene.elements, strict=True):
        size = coordinate((0.15 + 0.35 * table.get(element, _UNKNOWN)[1]) * zoom)
        x, y = at(place).split()
        known = element if element in table else "unknown"
        painted.append((place[2], f'<circle cx="{x}" cy="{y}" r="{size}" fill="url(#ball-{known})"/>'))
    thick = coordinate(max(1.4, 0.2 * zoom))
    for one, other in scene.bonds:
        middle = (scene.places[one] + scene.places[other]) / 2
        for end in (one, other):
            colour = _mixed(table.get(scene.elements[end], _UNKNOWN)[0], 0, 0.15)
            place = scene.places[end]
            painted.append(
                (
                    (middle[2] + place[2]) / 2 - 0.05,
                    f'<path d="M{at(place)}L{at(middle)}" stroke="{colour}" stroke-width="{thick}"/>',
                )
            )
    for start, stop in scene.edges:
        steps = [start + (stop - start) * k / 6 for k in range(7)]
        for a, b in itertools.pairwise(steps):
            painted.append(((a[2] + b[2]) / 2, f'<path class="edge" d="M{at(a)}L{at(b)}"/>'))
    painted.sort(key=lambda part: part[0])
    inner = "".join(text for _, text in painted)
    return f'<svg viewBox="0 0 {_SIDE} {_SIDE}" class="still" aria-hidden="true">{inner}</svg>'


def gradients(symbols: set[str]) -> str:
    """Return an <svg> that shows nothing and holds the shading of these elements' atoms, once for a page."""
    table = element_table()
    shades = []
    for symbol in sorted((symbols & table.keys()) | {"unknown"}):
        colour = table.get(symbol, _UNKNOWN)[0]
        stops = ((0, _mixed(colour, 255, 0.65)), (0.45, colour), (1, _mixed(colour, 0, 0.45)))
        shades.append(
            f'<radialGradient id="ball-{symbol}" cx=".5" cy=".5" r=".5" fx=".33" fy=".33">'
            + "".join(f'<stop offset="{offset}" stop-color="{shade}"/>' for offset, shade in stops)
            + "</radialGradient>"
        )
    return f'<svg width="0" height="0" class="unseen" aria-hidden="true"><defs>{"".join(shades)}</defs></svg>'


def _conventional(structure: Structure) -> Structure:
    """Return a structure in its conventional cell; itself where that has too many sites or no symmetry."""
    try:
        found = dataset(structure, _SYMPREC_ANGSTROM)
    except EncodeError:
        return structure
    standard = found.std_cell
    if found.number == 1 or len(standard.numbers) > _MOST_BONDED:
        return structure
    symbols = [Element.from_Z(number).symbol for number in standard.numbers]
    return Structure(Lattice(standard.basis), symbols, standard.positions)


def _standing(lattice: Lattice) -> Floats:
    """Return the lattice with a along x and b in the plane of x and y."""
    matrix: Floats = np.asarray(
        Lattice.from_parameters(*lattice.parameters, vesta=True).matrix, dtype=np.float64
    )
    return matrix


def _on_screen(points: Floats) -> Floats:
    """Turn crystal axes (a to the right, c up) into those of the screen."""
    right, up, out = points[..., 0], points[..., 2], -points[..., 1]
    u = right * math.cos(_TURN) + out * math.sin(_TURN)
    w = out * math.cos(_TURN) - right * math.sin(_TURN)
    return np.stack(
        [u, up * math.cos(_TILT) - w * math.sin(_TILT), up * math.sin(_TILT) + w * math.cos(_TILT)], axis=-1
    )


def _neighbours(
    elements: list[str], fractional: Floats, lattice: Floats
) -> list[tuple[int, int, tuple[int, int, int]]]:
    """Return (i, j, shift of j in cells): pairs in which each is among the other's nearest neighbours."""
    n = len(elements)
    radii = np.array([element_table().get(symbol, _UNKNOWN)[1] for symbol in elements])
    reach = 2 if n <= 40 else 1
    shifts = np.array(list(itertools.product(range(-reach, reach + 1), repeat=3)))
    first, second = np.triu_indices(n)
    apart = (fractional[second] - fractional[first])[:, None, :] + shifts[None, :, :]
    distance = np.linalg.norm(apart @ lattice, axis=-1)
    limit = _REACH * (radii[first] + radii[second])[:, None]
    distance[(distance < 0.1) | (distance > limit)] = np.inf
    shortest = distance.min(axis=1)
    nearest = np.full(n, np.inf)
    np.minimum.at(nearest, first, shortest)
    np.minimum.at(nearest, second, shortest)
    shell = _SHELL * np.minimum(nearest[first], nearest[second])[:, None]
    found = np.argwhere(np.isfinite(distance) & (distance <= shell))
    return [(int(first[p]), int(second[p]), tuple(int(x) for x in shifts[s])) for p, s in found]  # type: ignore[misc]


def _mixed(colour: str, towards: int, share: float) -> str:
    """Return the colour that lies `share` of the way to black (0) or white (255)."""
    channels = (int(colour[k : k + 2], 16) for k in (1, 3, 5))
    return "#" + "".join(f"{round(c + (towards - c) * share):02x}" for c in channels)
