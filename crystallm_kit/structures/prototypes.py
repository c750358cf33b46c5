"""Structure types by name: the stoichiometry and space group that "rutile" or "half-Heusler" stand for.

    structure_type("rock salt") -> StructureType("rock salt", ("AB", 225), most electronegative once)

Only what the name fixes is stated: a perovskite is ABC3 in many space groups, a garnet is Ia-3d in more than
one stoichiometry. `formula_for` tells how many atoms of each element there are, where that follows.

Not here: recognising the type of a structure.
Sources: AFLOW prototype encyclopedia (Mehl et al., Comput. Mater. Sci. 136, S1, 2017), with which the tests
compare; for types that are not in it, the type's own mineral or compound.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from crystallm_kit.structures.elements import RANK


@dataclass(frozen=True)
class StructureType:
    """A structure type and what its name fixes.

    Attributes:
        name: As displayed.
        anonymous_formula: As in Conditions, or None where types of that name differ.
        spacegroup_number: 1-230, or None likewise.
        anion_count: How often the most electronegative element occurs in the stoichiometry; None: not fixed.
        synonyms: Other spellings, lower case; blanks and hyphens are the same.
    """

    name: str
    anonymous_formula: str | None
    spacegroup_number: int | None
    anion_count: int | None = None
    synonyms: tuple[str, ...] = ()

    def formula_for(self, elements: Sequence[str]) -> dict[str, int] | None:
        """Return element -> count if the type fixes it for these elements, else None.

        BaTiO3 follows from "perovskite" and Ba, Ti, O; "spinel" and Mg, Al, O fit both MgAl2O4 and Mg2AlO4.
        """
        if self.anonymous_formula is None:
            return None
        counts = _counts(self.anonymous_formula)
        if len(elements) != len(counts) or len(set(elements)) != len(counts):
            return None
        if len(set(counts)) == 1:
            return dict.fromkeys(elements, counts[0])
        if self.anion_count is None:
            return None
        counts.remove(self.anion_count)
        if len(set(counts)) != 1:
            return None
        anion = max(elements, key=RANK.__getitem__)
        return {element: self.anion_count if element == anion else counts[0] for element in elements}


def _counts(anonymous: str) -> list[int]:
    parts = "".join(f" {c}" if c.isalpha() else c for c in anonymous).split()
    return [int(part[1:] or 1) for part in parts]


STRUCTURE_TYPES: tuple[StructureType, ...] = (
    StructureType("rock salt", "AB", 225, 1, ("rocksalt", "halite", "nacl type", "nacl structure")),
    StructureType("zinc blende", "AB", 216, 1, ("zincblende", "sphalerite")),
    StructureType("wurtzite", "AB", 186, 1),
    StructureType(
        "cesium chloride type", "AB", 221, 1,
        ("caesium chloride type", "cesium chloride structure", "caesium chloride structure", "cscl type",
         "cscl structure"),
    ),
    StructureType(
        "nickel arsenide type", "AB", 194, 1,
        ("nickel arsenide structure", "nias type", "nias structure", "nickeline"),
    ),
    StructureType("fluorite", "AB2", 225, 2, ("caf2 type", "caf2 structure")),
    StructureType("antifluorite", "AB2", 225, 1, ("anti fluorite",)),
    StructureType("rutile", "AB2", 136, 2),
    StructureType("anatase", "AB2", 141, 2),
    StructureType("brookite", "AB2", 61, 2),
    StructureType("pyrite", "AB2", 205, 2),
    StructureType("marcasite", "AB2", 58, 2),
    StructureType("molybdenite", "AB2", 194, 2),
    StructureType(
        "cadmium iodide type", "AB2", 164, 2, ("cadmium iodide structure", "cdi2 type", "cdi2 structure"),
    ),
    StructureType("aluminum diboride type", "AB2", 191, None, ("alb2 type", "alb2 structure")),
    StructureType("cuprite", "AB2", 224, 1),
    StructureType("C14 Laves phase", "AB2", 194, None, ("c14", "hexagonal laves phase", "hexagonal laves")),
    StructureType("C15 Laves phase", "AB2", 227, None, ("c15", "cubic laves phase", "cubic laves")),
    StructureType("Laves phase", "AB2", None, None, ("laves",)),
    StructureType("skutterudite", "AB3", 204, 3),
    StructureType("A15", "AB3", 223, None, ("a15 type", "a15 structure")),
    StructureType("Cu3Au type", "AB3", 221, None, ("cu3au structure", "l12", "l1_2")),
    StructureType("cementite", "AB3", 62),
    StructureType("CaB6 type", "AB6", 221, None, ("cab6 structure",)),
    StructureType("corundum", "A2B3", 167, 3),
    StructureType("bixbyite", "A2B3", 206, 3),
    StructureType("ilmenite", "ABC3", 148, 3),
    StructureType("calcite", "ABC3", 167, 3),
    StructureType("aragonite", "ABC3", 62, 3),
    StructureType("double perovskite", "ABC2D6", None, 6),
    StructureType("elpasolite", "ABC2D6", 225, 6),
    StructureType("antiperovskite", "ABC3", 221, 1, ("anti perovskite",)),
    StructureType("perovskite", "ABC3", None, 3, ("perovskites",)),
    StructureType("delafossite", "ABC2", 166, 2),
    StructureType("chalcopyrite", "ABC2", 122, 2),
    StructureType("half-Heusler", "ABC", 216, 1, ("half heusler",)),
    StructureType("inverse Heusler", "ABC2", 216),
    StructureType("Heusler", "ABC2", 225, None, ("full heusler",)),
    StructureType("scheelite", "ABC4", 88, 4),
    StructureType("zircon", "ABC4", 141, 4),
    StructureType("spinel", "AB2C4", 227, 4, ("inverse spinel", "normal spinel")),
    StructureType("K2NiF4 type", "AB2C4", 139, 4, ("k2nif4 structure",)),
    StructureType("pyrochlore", "A2B2C7", 227, 7),
    StructureType("olivine", None, 62),
    StructureType("garnet", None, 230),
    StructureType("NASICON", None, 167),
    StructureType("MAX phase", None, 194),
    StructureType("diamond", "A", 227, None, ("diamond structure",)),
)  # fmt: skip

# Every spelling, lower case with single blanks -> type.
STRUCTURE_TYPE_WORDS: dict[str, StructureType] = {
    word.lower().replace("-", " "): kind for kind in STRUCTURE_TYPES for word in (kind.name, *kind.synonyms)
}


def structure_type(name: str) -> StructureType | None:
    """Return the structure type with this name, singular or plural, or None."""
    key = " ".join(name.lower().replace("-", " ").split())
    return STRUCTURE_TYPE_WORDS.get(key) or STRUCTURE_TYPE_WORDS.get(key.removesuffix("s"))
