"""What a crystal has to be for a text that lists its sites: ordered, of known elements, and periodic.

    >>> site_symbols(rock_salt)
    ['Na', 'Cl']

Not here: oxidation states, isotopes and partial occupancies: the text formats carry none of them.
"""

from pymatgen.core import Molecule, Structure

from crystallm_kit.errors import EncodeError, ParseError
from crystallm_kit.records import Crystal
from crystallm_kit.structures.elements import RANK


def site_symbols(crystal: Crystal) -> list[str]:
    """Return the element symbol of every site, in site order.

    Raises:
        EncodeError: If there is no site, or one that is disordered or holds no element (dummies, isotopes).
    """
    if not len(crystal.structure):
        raise EncodeError(f"crystal '{crystal.id}': no sites; expected at least one")
    symbols = []
    for index, site in enumerate(crystal.structure):
        if not site.is_ordered:
            raise EncodeError(
                f"crystal '{crystal.id}': site {index} holds {site.species_string}; expected one element; "
                "make an ordered approximant first"
            )
        symbol = str(getattr(site.specie, "symbol", site.specie))
        if symbol not in RANK:
            raise EncodeError(f"crystal '{crystal.id}': site {index} holds '{symbol}'; known are H to Lr")
        symbols.append(symbol)
    return symbols


def element_symbol(word: str, line: str, line_number: int) -> str:
    """Return the word if it is an element's symbol in its usual spelling ("Na", not "NA", "Na1" or "D").

    Raises:
        ParseError: unknown_element, with the line.
    """
    if word not in RANK:
        raise ParseError("unknown_element", f"'{line}': '{word}' is no element from H to Lr", line_number)
    return word


def periodic_structure(crystal: Crystal, representation: str) -> Structure:
    """Return the crystal's structure.

    Raises:
        EncodeError: If it is a molecule, or not periodic in three directions.
    """
    structure = crystal.structure
    if isinstance(structure, Molecule):
        raise EncodeError(
            f"crystal '{crystal.id}': a molecule has no cell, which '{representation}' needs; use 'xyz'"
        )
    if not all(structure.lattice.pbc):
        raise EncodeError(
            f"crystal '{crystal.id}': periodic along {structure.lattice.pbc}; "
            f"'{representation}' writes crystals that are periodic in all three directions"
        )
    return structure
