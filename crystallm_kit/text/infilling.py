r"""Crystals partly given: texts with one element masked, and beginnings from which a model goes on.

    mask_element("Ti2 O4 136\nTi a\nO f\n...", "Ti", "wyckoff")  ->  "[MASK]2 O4 136\n[MASK] a\nO f\n..."
    completion_prefix("Ti2 O4 136\nTi a\nO")  ->  "Ti2 O4 136\nTi a\n"

Not here: ranking elements for masked sites (generation.infill), prompts (prompts.py).
"""

import re
from collections.abc import Mapping

from pymatgen.core import Element

from crystallm_kit.errors import UnknownName
from crystallm_kit.records import Crystal
from crystallm_kit.structures.elements import ELEMENTS, RANK

MASK = "[MASK]"
_SYMBOL = re.compile(r"[A-Z][a-z]?")


def mask_element(text: str, element: str, format: str) -> str:
    """Return a crystal's text with every mention of one element replaced by "[MASK]".

    Whole elements only: masking C leaves Ca and Cl alone. What tells the element otherwise goes too (the
    electronegativity and the radii of a CIF's table of atom types become "?").

    Args:
        text: As the format writes it.
        element: The symbol.
        format: Name of the format.

    Raises:
        UnknownName: If the text has no such element; or no such format.
    """
    if format not in _MASKS:
        raise UnknownName.among("representation", format, _MASKS)
    lines = text.split("\n")
    masked = [_MASKS[format](line, element, number) for number, line in enumerate(lines)]
    if masked == lines:
        present = {word for line in lines for word in _SYMBOL.findall(line) if word in RANK}
        raise UnknownName.among("site of element", element, present)
    return "\n".join(masked)


def _mask_line(line: str, element: str, number: int) -> str:  # noqa: ARG001 - one signature for all formats
    return MASK if line == element else line


def _mask_first_word(line: str, element: str, number: int) -> str:  # noqa: ARG001
    return MASK + line.removeprefix(element) if line.startswith(f"{element} ") else line


def _mask_formula(line: str, element: str) -> str:
    return _SYMBOL.sub(lambda found: MASK if found[0] == element else found[0], line)


def _mask_wyckoff(line: str, element: str, number: int) -> str:
    return _mask_formula(line, element) if number == 0 else _mask_first_word(line, element, number)


def _mask_cif(line: str, element: str, number: int) -> str:  # noqa: ARG001
    row = line.lstrip(" ")
    if row.startswith(("data_", "_chemical_formula")):
        return _mask_formula(line, element)
    if not row.startswith(f"{element} "):
        return line
    indent, words = line[: len(line) - len(row)], row.split(" ")
    if len(words) == 4:  # symbol, electronegativity, radius, ionic radius
        return indent + " ".join((MASK, "?", "?", "?"))
    return indent + " ".join((MASK, _mask_formula(words[1], element), *words[2:]))  # its label: Na0


_MASKS = {"cif": _mask_cif, "compact": _mask_line, "wyckoff": _mask_wyckoff, "xyz": _mask_first_word}


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
