"""What a CIF says of itself, compared with itself: CrystaLLM's checks of a text.

    data_Na4Cl4, _chemical_formula_sum 'Na4 Cl4', _chemical_formula_structural NaCl    -> formulas agree
    sites Na 4 and Cl 4 by _atom_site_symmetry_multiplicity                            -> multiplicities agree

As the peer does it: a statement that is missing or cannot be read fails its check, except a cell length or
angle, which passes where it is not found (so does empty text). Partial occupancies count as whole atoms.

Not here: reading the crystal (text/, structures/); the space group that is found (checks.py).
Sources: lantunes/CrystaLLM, crystallm/_metrics.py and bin/postprocess.py (Antunes et al. 2024);
C-Bone-UCL/CrystaLLM-pi (geometry against the sum formula).
"""

import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pymatgen.core import Composition

LENGTHS_ANGSTROM, ANGLES_DEGREE = (0.5, 1000.0), (10.0, 170.0)
COUNT_TOLERANCE = 0.1  # of CrystaLLM-pi, relative and absolute, between the reduced formulas' counts

_TITLE = re.compile(r"data_([A-Za-z0-9]+)\n")
_LENGTH = re.compile(r"_cell_length_[abc]\s+([\d.]+)")
_ANGLE = re.compile(r"_cell_angle_(?:alpha|beta|gamma)\s+([\d.]+)")


@dataclass(frozen=True)
class CifStatements:
    """The statements of one CIF's first block. Each is found when it is asked for.

    Attributes:
        text: The CIF, its operators expanded or not.
    """

    text: str

    @cached_property
    def _block(self) -> dict[str, Any]:
        from pymatgen.io.cif import CifFile

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                blocks = CifFile.from_str(self.text).data
            except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError):
                return {}  # malformed text hits whatever it hits
        return dict(next(iter(blocks.values())).data) if blocks else {}

    @property
    def is_sensible(self) -> bool:
        """Whether every cell length found lies in [0.5, 1000] angstrom, every angle in [10, 170] degrees."""
        return all(
            low <= value <= high
            for pattern, (low, high) in ((_LENGTH, LENGTHS_ANGSTROM), (_ANGLE, ANGLES_DEGREE))
            for value in _numbers(pattern.findall(self.text))
        )

    @property
    def spacegroup_symbol(self) -> str | None:
        """The Hermann-Mauguin symbol stated; None: there is none."""
        stated = self._block.get("_symmetry_space_group_name_H-M")
        return stated.strip() if isinstance(stated, str) else None

    @property
    def are_formulas_consistent(self) -> bool:
        """Whether title, sum and structural formula reduce to the same."""
        title = _TITLE.search(self.text)
        stated = [self._block.get(f"_chemical_formula_{kind}") for kind in ("sum", "structural")]
        formulas = [_composition(text) for text in (title.group(1) if title else None, *stated)]
        if any(formula is None for formula in formulas):
            return False
        return len({formula.reduced_formula for formula in formulas if formula is not None}) == 1

    @property
    def are_multiplicities_consistent(self) -> bool:
        """Whether the sites' multiplicities add up to the sum formula."""
        formula = _composition(self._block.get("_chemical_formula_sum"))
        symbols = self._block.get("_atom_site_type_symbol")
        multiplicities = self._block.get("_atom_site_symmetry_multiplicity")
        if formula is None or not isinstance(symbols, list) or not isinstance(multiplicities, list):
            return False
        counts: Counter[str] = Counter()
        try:
            for symbol, multiplicity in zip(symbols, multiplicities, strict=False):
                counts[symbol] += int(multiplicity)
        except ValueError:
            return False
        return dict(counts) == dict(formula.get_el_amt_dict())

    def agrees_with(self, found: Composition) -> bool:
        """Tell whether the sum formula is that of a geometry, both reduced, counts within 0.1."""
        stated = _composition(self._block.get("_chemical_formula_sum"))
        return stated is not None and stated.reduced_composition.almost_equals(
            found.reduced_composition, rtol=COUNT_TOLERANCE, atol=COUNT_TOLERANCE
        )

    def has_sites_of(self, found: Composition) -> bool:
        """Tell whether a cell's atoms are the sum formula's, or a whole multiple (a formula unit's) of them.

        A CIF that states no formula has nothing to contradict.
        """
        stated = _composition(self._block.get("_chemical_formula_sum"))
        if stated is None:
            return True
        atoms, counts = stated.get_el_amt_dict(), found.get_el_amt_dict()
        if set(atoms) != set(counts):
            return False
        multiples = {counts[symbol] / n for symbol, n in atoms.items()}
        return len(multiples) == 1 and multiples.pop().is_integer()


def _composition(text: object) -> Composition | None:
    if not isinstance(text, str) or not text.strip():
        return None
    try:
        return Composition(text)
    except (ValueError, KeyError):
        return None


def _numbers(words: Sequence[str]) -> list[float]:
    """Return the numbers; one with two points, where the peer raises, is out of every range."""
    found = []
    for word in words:
        try:
            found.append(float(word))
        except ValueError:
            found.append(float("inf"))
    return found
