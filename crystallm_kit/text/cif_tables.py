"""Frozen facts of CrystaLLM v1's text: vocabulary, property values, keywords, orders, space groups.

    >>> atom_properties()["Na"]
    ('0.9300', '1.8000', '1.1600')
    >>> by_electronegativity(["Cl", "Na"])
    ['Na', 'Cl']

The values are strings and are printed as they stand: pymatgen changed the ionic radius of Mn after
CrystaLLM's release, and He, Ne, Ar, Kr, Xe have values without four decimals.

Not here: the text (cif.py), its cell (cif_standard_cell.py).
Sources: crystallm_vocabulary.json (371 strings, position = id) and crystallm_atom_properties.json (computed
with pymatgen 2023.3.23) hold facts of CrystaLLM's MIT-licensed release. Space group symbols are those that
spglib reports, which moyo's table spells alike.
"""

import json
import math
from collections.abc import Iterable
from functools import cache
from importlib import resources
from typing import Any

import moyopy
import numpy as np
from numpy.typing import NDArray

from crystallm_kit.errors import EncodeError

Floats = NDArray[np.float64]

SPACEGROUP_KEY = "_symmetry_space_group_name_H-M"
CELL_KEYS = ("length_a", "length_b", "length_c", "angle_alpha", "angle_beta", "angle_gamma")
ATOM_TYPE_KEYS = ("symbol", "electronegativity", "radius", "ionic_radius")
ATOM_SITE_KEYS = (
    "type_symbol", "label", "symmetry_multiplicity", "fract_x", "fract_y", "fract_z", "occupancy",
)  # fmt: skip
IDENTITY_LOOP = ("loop_", "_symmetry_equiv_pos_site_id", "_symmetry_equiv_pos_as_xyz", "1 'x, y, z'")


def _table(name: str) -> Any:
    return json.loads(resources.files("crystallm_kit.text").joinpath(name).read_text(encoding="utf-8"))


@cache
def vocabulary() -> tuple[str, ...]:
    """Return CrystaLLM's 371 vocabulary strings in id order; space groups carry the suffix `_sg`."""
    return tuple(_table("crystallm_vocabulary.json")["tokens_in_id_order"])


@cache
def atom_properties() -> dict[str, tuple[str, str, str]]:
    """Return element -> (electronegativity, atomic radius, average ionic radius in angstrom), as printed."""
    return {e: (x, r, ionic) for e, (x, r, ionic) in _table("crystallm_atom_properties.json").items()}


@cache
def electronegativity_rank() -> dict[str, tuple[float, str]]:
    """Return the sort key of each element."""
    # Allen values of He, Ne, Ar are printed, but pymatgen's order knows Pauling values only
    unknown = ("He", "Ne", "Ar")
    return {e: (math.inf if e in unknown else float(x), e) for e, (x, _, _) in atom_properties().items()}


def by_electronegativity(elements: Iterable[str]) -> list[str]:
    """Return element symbols in CrystaLLM's order: by electronegativity, ties by symbol, unknown last.

    Twelve groups of elements tie (Si, Cu, Tc, Re at 1.90), so this is not the order of a typed formula.
    """
    rank = electronegativity_rank()
    return sorted(elements, key=lambda e: rank.get(e, (math.inf, e)))


@cache
def spacegroup_symbols() -> dict[int, str]:
    """Return number -> short symbol as spglib prints it ("P2_1/c", "R-3m", "Cmce"), for all 230."""
    symbols: dict[int, str] = {}
    for hall_number in range(1, 531):
        entry = moyopy.HallSymbolEntry(hall_number)
        symbols.setdefault(entry.number, entry.hm_short.replace(" ", ""))
    return symbols


@cache
def spacegroup_numbers() -> dict[str, int]:
    """Return symbol -> number, for all 230."""
    return {symbol: number for number, symbol in spacegroup_symbols().items()}


@cache
def spacegroup_operations(number: int) -> tuple[Floats, Floats]:
    """Return rotations (O, 3, 3) and translations (O, 3) in CrystaLLM's setting, centring included.

    That is spglib's default, the smallest Hall number: unique axis b, hexagonal axes for R groups, and origin
    choice 1, where structures/symmetry.py takes choice 2.
    """
    found = moyopy.operations_from_number(number, setting=moyopy.Setting.spglib())
    return np.array(found.rotations, dtype=float), np.array(found.translations, dtype=float)


def check_elements(elements: Iterable[str]) -> None:
    """Raise EncodeError, naming the element, if CrystaLLM has no token for one of `elements`."""
    for element in elements:
        if element not in atom_properties():
            raise EncodeError(
                f"format 'cif': no token for element {element}; CrystaLLM's vocabulary ends at Pu and lacks "
                "Po, At, Rn, Fr, Ra. Leave the crystal out, or use another format."
            )


def check_spacegroup(symbol: str) -> None:
    """Raise EncodeError if CrystaLLM has no token for a space group (P4_222, P6, P432)."""
    if f"{symbol}_sg" not in vocabulary():
        raise EncodeError(
            f"format 'cif': no token for space group {symbol}; CrystaLLM has one for all but P4_222 (93), "
            "P6 (168), P432 (207). Leave the crystal out, or use another format."
        )
