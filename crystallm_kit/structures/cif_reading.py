"""One CIF text -> one ordered or disordered pymatgen Structure, sites in the order of the file.

Two readers that give the same answer. `structure_from_plain_cif` takes the layout that pymatgen's CifWriter
writes, in which most data sets travel, and nothing else; it always ends:
    # generated using pymatgen
    data_NaCl
    ...
    loop_
     _symmetry_equiv_pos_site_id
     _symmetry_equiv_pos_as_xyz
      1  'x, y, z'
    loop_
     _atom_site_type_symbol
     ...
      Na  Na0  1  0.00000000  0.00000000  0.00000000  1
`structure_from_any_cif` is pymatgen's CifParser, which takes nearly anything, and on some malformed texts
never returned (pymatgen issue 4028); cif_pool.py runs it where it can be killed.

Both: coordinates in [0, 1); a coordinate within 1e-4 (relative) of 1/3 or 2/3 becomes that fraction, as in
pymatgen; oxidation states are dropped; D and T are H; CIF labels are dropped, since they go stale when sites
are permuted. The order of sites is the file's, where pymatgen sorts by electronegativity.

Not here: files that hold CIFs (files.py, tables.py, archives.py); CIF as models write it (text/cif.py).
"""

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pymatgen.core.composition import Composition
from pymatgen.core.lattice import Lattice
from pymatgen.core.periodic_table import Element
from pymatgen.core.structure import Structure

from crystallm_kit.errors import ReadError

# Fractional. Four-decimal CIFs leave images of one special position more than pymatgen's default 1e-4 apart;
# between 5e-4 and 1e-2 the site count is right for all of 1,039 entries from 197 space groups.
SITE_TOLERANCE = 1e-3
OCCUPANCY_TOLERANCE = 1.05  # rounded shares such as 0.34 + 0.33 + 0.34 are one full site
MIN_THICKNESS_ANGSTROM = (
    0.01  # as in pymatgen's CifParser: flatter cells send neighbour searches into endless loops
)
# Symmetry images of all sites: what the plain reader compares pairwise in well under a second.
MOST_IMAGES = 5000

_SYMMETRY_LOOP = "loop_\n _symmetry_equiv_pos_site_id\n _symmetry_equiv_pos_as_xyz\n"
_SITE_LOOP = """loop_
 _atom_site_type_symbol
 _atom_site_label
 _atom_site_symmetry_multiplicity
 _atom_site_fract_x
 _atom_site_fract_y
 _atom_site_fract_z
 _atom_site_occupancy
"""
_OPERATION = re.compile(r" *\d+  '([^'\n]+)'")
_TERM = re.compile(r"([+-]?)(?:([xyz])|(\d+)/(\d+)|(\d+))")
_NUMBER = r"[ \t]+(\d+\.?\d*)[ \t]*\n"
_CELL = re.compile(
    "".join(rf"_cell_{name}{_NUMBER}" for name in ("length_a", "length_b", "length_c"))
    + "".join(rf"_cell_angle_{name}{_NUMBER}" for name in ("alpha", "beta", "gamma"))
)
_SYMBOLS = frozenset(e.symbol for e in Element if e.symbol not in ("D", "T"))


def structure_from_plain_cif(text: str) -> Structure | None:
    """Return the structure of a CIF in the layout of pymatgen's CifWriter, or None for any other.

    None is no verdict on the text: `structure_from_any_cif` decides. None too where sites lie closer than the
    tolerance, or where an orbit does not have the stated multiplicity.

    Raises:
        ReadError: If the cell is flat or not finite.
    """
    head, found, loops = text.replace("\r\n", "\n").partition(_SYMMETRY_LOOP)
    operations, also_found, rows = loops.partition(_SITE_LOOP)
    cells = _CELL.findall(head)
    if not (found and also_found) or len(cells) != 1 or head.count("data_") != 1:
        return None
    words = rows.split()
    symbols = words[0::7]
    if "loop_" in head or "\n;" in head or not words or len(words) % 7 or not _SYMBOLS.issuperset(symbols):
        return None
    if not {"1", "1.0"}.issuperset(words[6::7]) or any(mark in rows for mark in "_#'\";"):
        return None
    try:
        multiplicities = [int(word) for word in words[2::7]]
        asymmetric = np.array([words[3::7], words[4::7], words[5::7]], dtype=np.float64).T
        rotations, translations = _symmetry(operations)
    except ValueError:
        return None
    if not np.isfinite(asymmetric).all() or len(rotations) * len(asymmetric) > MOST_IMAGES:
        return None
    fractional = _wrapped(_exact_thirds(asymmetric))
    if len(rotations) > 1:
        orbits = [_orbit(site, rotations, translations) for site in asymmetric]
        fractional = np.concatenate(orbits)
        symbols = [s for s, orbit in zip(symbols, orbits, strict=True) for _ in orbit]
        if multiplicities != [len(orbit) for orbit in orbits]:
            return None
    elif set(multiplicities) != {1}:
        return None
    if _some_coincide(fractional):
        return None
    return build_structure(lattice_from_parameters([float(x) for x in cells[0]]), symbols, fractional)


@lru_cache(maxsize=1024)
def _symmetry(rows: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return rotations (n, 3, 3) and translations (n, 3) of the rows "1  'x, y, z'".

    Raises:
        ValueError: If a row is anything else.
    """
    rotations, translations = [], []
    for row in rows.splitlines():
        operation = _OPERATION.fullmatch(row)
        parts = operation[1].replace(" ", "").split(",") if operation else []
        if len(parts) != 3:
            raise ValueError(row)
        rotation, translation = np.zeros((3, 3)), np.zeros(3)
        for i, part in enumerate(parts):
            if not part or _TERM.sub("", part):
                raise ValueError(row)
            for sign, axis, top, bottom, whole in _TERM.findall(part):
                factor = -1.0 if sign == "-" else 1.0
                if axis:
                    rotation[i, "xyz".index(axis)] += factor
                else:
                    translation[i] += factor * (int(whole) if whole else int(top) / int(bottom))
        rotations.append(rotation)
        translations.append(translation)
    if not 1 <= len(rotations) <= 192 or not (rotations[0] == np.eye(3)).all() or translations[0].any():
        raise ValueError("the first operation is not the identity")
    return np.array(rotations), np.array(translations)


def _orbit(
    site: NDArray[np.float64], rotations: NDArray[np.float64], translations: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the distinct images (n, 3) of a site, in the order of the operations."""
    images = _wrapped(rotations @ site + translations)
    first_like_it = _coincide(images).argmax(axis=1)
    distinct: NDArray[np.float64] = images[first_like_it == np.arange(len(images))]
    return distinct


def structure_from_any_cif(text: str) -> Structure:
    """Return the first structure of a CIF by pymatgen's CifParser, sites in file order. May never return.

    Raises:
        ReadError: If the text holds no structure, or one that its own formula contradicts in its elements.
    """
    from pymatgen.io.cif import CifParser

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            parser = CifParser.from_str(
                text, site_tolerance=SITE_TOLERANCE, occupancy_tolerance=OCCUPANCY_TOLERANCE
            )
            found = parser.parse_structures(primitive=False, on_error="raise")[0]
            blocks = parser.as_dict()
        except Exception as error:  # malformed text raises whatever its words happen to hit
            raise ReadError(f"pymatgen reads no structure: {_first_line(error)}") from error
    labels: list[str] = next((b["_atom_site_label"] for b in blocks.values() if "_atom_site_label" in b), [])
    rank = {label: i for i, label in reversed(list(enumerate(labels)))}
    sites = sorted(
        found, key=lambda site: rank.get(site.label, len(rank))
    )  # stable; CifParser labels whole orbits
    return build_structure(
        found.lattice, [site.species for site in sites], np.array([site.frac_coords for site in sites])
    )


def lattice_from_parameters(parameters: Sequence[float]) -> Lattice:
    """Return the lattice of a, b, c (angstrom), alpha, beta, gamma (degrees), oriented as pymatgen does.

    Raises:
        ReadError: If the parameters are not finite, or span no volume.
    """
    if not np.isfinite(parameters).all() or min(parameters) <= 0 or max(parameters[3:]) >= 180:
        shown = " ".join(f"{x:g}" for x in parameters)
        raise ReadError(
            f"cell {shown}: lengths above 0 angstrom and angles between 0 and 180 degrees expected"
        )
    a, b, c, alpha, beta, gamma = parameters
    # pymatgen clips what angles like 60 20 20 would need; no three edges make them
    ca, cb, cg = np.cos(np.radians([alpha, beta, gamma]))
    if 1 - ca * ca - cb * cb - cg * cg + 2 * ca * cb * cg <= 0:
        raise ReadError(f"cell angles {alpha:g} {beta:g} {gamma:g} degrees span no volume")
    return Lattice.from_parameters(a, b, c, alpha, beta, gamma)


def build_structure(
    lattice: Lattice,
    species: Sequence[str | Mapping[Any, float]],
    fractional: NDArray[np.float64],
    site_properties: dict[str, list[Any]] | None = None,
) -> Structure:
    """Return the kit's form of a structure: bare elements, coordinates in [0, 1), a cell with a volume.

    Args:
        lattice: In angstrom.
        species: One per site: an element symbol, or element -> occupancy.
        fractional: (n_sites, 3), any range.
        site_properties: As in pymatgen.

    Raises:
        ReadError: If there is no site, a symbol is no element, or a number is not finite.
    """
    if not len(species):
        raise ReadError("no sites")
    if not np.isfinite(fractional).all():
        raise ReadError("a coordinate is not finite")
    check_cell(lattice)
    compositions = [_pure(s) if isinstance(s, str) else _bare(s) for s in species]
    return Structure(lattice, compositions, _wrapped(fractional), site_properties=site_properties)


def check_cell(lattice: Lattice) -> None:
    """Refuse a cell that is not finite or so flat that searches for neighbours in it never end.

    Raises:
        ReadError: If the distance between two opposite faces is below 0.01 angstrom.
    """
    a, b, c = lattice.matrix.tolist()  # plain floats: numpy's cross and det take ten times as long on 3 x 3
    faces = [_cross(b, c), _cross(c, a), _cross(a, b)]
    volume = abs(sum(x * y for x, y in zip(a, faces[0], strict=True)))
    widest = max(math.hypot(*face) for face in faces)
    # written so that NaN fails
    if not (volume < math.inf and volume >= MIN_THICKNESS_ANGSTROM * widest > 0):
        shown = f"{volume / widest:.2g}" if widest > 0 else "0"
        raise ReadError(
            f"the cell has no volume: faces {shown} angstrom apart; "
            f"at least {MIN_THICKNESS_ANGSTROM} angstrom expected"
        )


def _cross(u: list[float], v: list[float]) -> tuple[float, float, float]:
    return u[1] * v[2] - u[2] * v[1], u[2] * v[0] - u[0] * v[2], u[0] * v[1] - u[1] * v[0]


@cache
def element_symbol(symbol: str) -> str:
    """Return the symbol of an element; D and T are H.

    Raises:
        ReadError: If it is no element.
    """
    if symbol in ("D", "T"):
        return "H"
    if symbol not in _SYMBOLS:
        raise ReadError(f"'{symbol}' is no element")
    return symbol


@cache
def symbol_of_number(number: int) -> str:
    """Return the symbol of an atomic number.

    Raises:
        ReadError: If no element has it.
    """
    if not 1 <= number <= 118:
        raise ReadError(f"atomic number {number}: 1 to 118 expected")
    return str(Element.from_Z(number).symbol)


@cache
def _pure(symbol: str) -> Composition:
    return Composition({element_symbol(symbol): 1.0})


def _bare(species: Mapping[Any, float]) -> Composition:
    """Return the composition of one site without charges; a lone full element is shared, for speed."""
    amounts: dict[str, float] = {}
    for one, amount in species.items():
        symbol = element_symbol(getattr(one, "symbol", str(one)))
        amounts[symbol] = amounts.get(symbol, 0.0) + amount
    if len(amounts) == 1 and abs(next(iter(amounts.values())) - 1.0) < Composition.amount_tolerance:
        return _pure(next(iter(amounts)))
    return Composition(amounts)


def _exact_thirds(fractional: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return coordinates with 0.3333 and 0.6667 made exact, at pymatgen's relative tolerance."""
    for third in (1 / 3, 2 / 3):
        fractional[np.abs(fractional / third - 1) <= 1e-4] = third
    return fractional


def _wrapped(fractional: NDArray[np.float64]) -> NDArray[np.float64]:
    wrapped = fractional - np.floor(fractional)
    wrapped[wrapped >= 1.0] = 0.0  # -1e-17 - floor(-1e-17) is 1.0
    return wrapped


def _some_coincide(fractional: NDArray[np.float64]) -> bool:
    """Return whether two sites lie within the tolerance of each other, images included."""
    if len(fractional) > 64:
        from scipy.spatial import cKDTree  # type: ignore[import-untyped]

        nearest, _ = cKDTree(fractional, boxsize=1.0).query(fractional, k=2, p=np.inf)
        return bool((nearest[:, 1] <= SITE_TOLERANCE).any())
    return int(_coincide(fractional).sum()) > len(fractional)


def _coincide(fractional: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return for each pair whether it lies within the tolerance, images included: (n, n), symmetric."""
    apart = fractional[:, None] - fractional
    apart -= np.round(apart)
    near: NDArray[np.bool_] = np.all(np.abs(apart) <= SITE_TOLERANCE, axis=2)
    return near


def _first_line(error: Exception) -> str:
    message = " ".join(str(error).split()) or type(error).__name__
    return message.removeprefix("No structure parsed for section 1 in CIF. ")[:300]
