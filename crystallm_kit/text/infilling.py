r"""Crystals partly given in the `wyckoff` format: the part of the text from which a model goes on.

    completion_prefix("Ti2 O4 136\nTi a\nO")  ->  "Ti2 O4 136\nTi a\n"

Not here: ranking elements for masked sites (generation.infill), prompts (prompts.py).
"""

from collections.abc import Mapping

from pymatgen.core import Element

from crystallm_kit.errors import UnknownName
from crystallm_kit.records import Crystal
from crystallm_kit.structures.elements import ELEMENTS, RANK


def completion_prefix(partial_text: str) -> str:
    """Return as much of a partly given `wyckoff` text as ends with a whole token; the model completes it.

        "Ti2 O4 136\nTi a\nO"   ->  "Ti2 O4 136\nTi a\n"      the rest of the sites and all numbers are free
        "Ti2 O4 136\nTi a\nO f\n4.59 2.9"  ->  "Ti2 O4 136\nTi a\nO f\n4.59 "

    A site line is kept whole or not at all. The prefix follows the rendered prompt, where else a forced
    composition would stand.
    """
    head, newline, last = partial_text.rpartition("\n")
    if newline and last[:1].isalpha():
        return head + newline
    return head + newline + last[: last.rfind(" ") + 1]


def substitution_prefix(text: str, replacements: Mapping[str, str]) -> str:
    """Return the beginning of a `wyckoff` text with elements replaced: composition, space group and sites.

    The model writes the lattice and the free coordinates that go with the new elements.

    Args:
        text: A crystal in the `wyckoff` format.
        replacements: Old element -> new one.

    Raises:
        UnknownName: If an element does not exist, or the crystal has no such element.
        ParseError: If the text is no crystal.
    """
    from crystallm_kit.text.representation import representation

    wyckoff = representation("wyckoff")
    structure = wyckoff.decode(text).structure.copy()
    present = {str(element) for element in structure.composition.elements}
    for old, new in replacements.items():
        if old not in present:
            raise UnknownName.among("element in the crystal", old, present)
        if new not in RANK:
            raise UnknownName.among("element", new, ELEMENTS)
    structure.replace_species({Element(old): Element(new) for old, new in replacements.items()})
    return wyckoff.encode(Crystal("", structure)).rpartition("\n")[0] + "\n"
