r"""CrystaLLM-pi's text: CrystaLLM's CIF with every value in brackets, between <bos> and <eos>.

Rock salt begins (`dialect="pi"` of the format `cif`; what v1 writes stands beside it):

    <bos>
    data_[Na4Cl4]                            data_Na4Cl4
    loop_                                    loop_
     _atom_type_symbol                       _atom_type_symbol
     ...
    [
     Na 0.9300 1.8000 1.1600                 Na 0.9300 1.8000 1.1600
     Cl 3.1600 1.0000 0.7800                 Cl 3.1600 1.0000 0.7800
    ]
    _symmetry_space_group_name_H-M [Fm-3m]   _symmetry_space_group_name_H-M Fm-3m
    ...
    _chemical_formula_sum '[Na4 Cl4]'        _chemical_formula_sum 'Na4 Cl4'

The rows of every loop but that of the symmetry operators stand between two lines of brackets; columns and
rows of loops are indented by one blank. A line of numbers in brackets may stand before `data_`: conditions of
CrystaLLM-pi's "Raw" models.

Contract: `bracketed` and `without_brackets` are each other's inverse; reading is strict, so that a text
whose brackets do not stand where they must is no crystal.

Not here: v1's text (cif.py), prompts (prompts.py). CrystaLLM-pi repairs numbers ("3.6.69" -> 3.669) before it
judges a text; that changes geometries silently, and is not done.
Source: CrystaLLM-pi (https://github.com/C-Bone-UCL/CrystaLLM-pi, MIT).
"""

import re
from collections.abc import Sequence
from functools import cache

from crystallm_kit.errors import ParseError
from crystallm_kit.records import Crystal
from crystallm_kit.text.cif_decoding import decode_cif
from crystallm_kit.text.cif_tables import SPACEGROUP_KEY, vocabulary
from crystallm_kit.text.representation import Alphabet

BEGIN, END, PAD = "<bos>", "<eos>", "<pad>"
# Ids 371 to 376. CrystaLLM-pi's added_tokens.json names others; its vocabulary.json is right.
MORE_TOKENS = (PAD, BEGIN, END, "[", "]", "<prop>")

_SUM_KEY = "_chemical_formula_sum"
_CONDITIONS = re.compile(r"\[-?[0-9.]+(?: -?[0-9.]+)*\]")


def bracketed(lines: Sequence[str]) -> list[str]:
    """Return lines of CrystaLLM's text, from `data_` on, as CrystaLLM-pi writes them."""
    found: list[str] = []
    part, in_brackets = "", True  # of a loop, that the line is in: "headers", "rows" or none
    for line in lines:
        if part == "headers" and line.startswith("_") and " " not in line:
            in_brackets &= line != "_symmetry_equiv_pos_site_id"
            found.append(f" {line}")
        elif part and not line.startswith(("_", "loop_", "data_")):
            if part == "headers" and in_brackets:
                found.append("[")
            part = "rows"
            found.append(f" {line}")
        else:
            if part == "rows" and in_brackets:
                found.append("]")
            part, in_brackets = "headers" if line == "loop_" else "", True
            found.append(_bracketed_value(line))
    return [*found, "]"] if part == "rows" and in_brackets else found


def _bracketed_value(line: str) -> str:
    key, _, value = line.partition(" ")
    if line.startswith("data_"):
        return f"data_[{line.removeprefix('data_')}]"
    if not key.startswith("_") or not value:
        return line
    quoted = re.sub(r"^'(.*)'$", r"\1", value)
    return f"{key} '[{quoted}]'" if key == _SUM_KEY else f"{key} [{value}]"


def text_to_pi(text: str) -> str:
    """Return CrystaLLM's text as CrystaLLM-pi writes it."""
    return "\n".join((BEGIN, *bracketed(text.rstrip("\n").split("\n")), END))


def without_brackets(text: str) -> tuple[str, list[int]]:
    """Return CrystaLLM's text of a text of CrystaLLM-pi, and for each of its lines the 1-based line there.

    <bos> and a line of conditions may be missing, and <eos>.

    Raises:
        ParseError: If a bracket is missing, or stands where none belongs; reason "brackets", or "truncated"
            where the text ends too early.
    """
    lines = [re.sub(r"[ \t\r]+", " ", line).strip(" ") for line in text.rstrip(" \t\r\n").split("\n")]
    first = int(lines[0] == BEGIN)
    first += bool(_CONDITIONS.fullmatch(lines[first])) if first < len(lines) else 0
    if lines[-1] == END:
        lines.pop()
    numbers = [i for i in range(first, len(lines)) if lines[i] not in ("[", "]")]
    plain = [_plain(lines[i]) for i in numbers]
    expected = [line.strip() for line in bracketed(plain)] if plain else []
    for i, line in enumerate(expected, start=first):
        if i >= len(lines):
            raise ParseError("truncated", f"the text ends here; '{line}' must follow", len(lines))
        if lines[i] != line:
            raise ParseError("brackets", f"'{lines[i][:80]}': expected '{line[:80]}'", i + 1)
    if len(lines) > first + len(expected):
        raise ParseError("brackets", f"'{lines[first + len(expected)]}': no bracket belongs here", len(lines))
    return "\n".join(plain) + "\n\n", [i + 1 for i in numbers]


def _plain(line: str) -> str:
    key, _, value = line.partition(" ")
    if line.startswith("data_"):
        return re.sub(r"^data_\[(.*)\]$", r"data_\1", line)
    if not key.startswith("_") or not value:
        return line
    inside = re.fullmatch(r"'\[(.*)\]'" if key == _SUM_KEY else r"\[(.*)\]", value)
    if inside is None:
        return line
    # v1 quotes the formula of several elements alone
    return f"{key} '{inside[1]}'" if key == _SUM_KEY and " " in inside[1] else f"{key} {inside[1]}"


def decode_pi(text: str) -> Crystal:
    """Return the crystal of a text of CrystaLLM-pi. Raises ParseError, as `decode_cif`, or for brackets."""
    plain, numbers = without_brackets(text)
    try:
        return decode_cif(plain)
    except ParseError as error:
        line = numbers[min(error.line, len(numbers)) - 1] if error.line and numbers else 0
        raise ParseError(error.reason, error.detail, line) from error


@cache
def pi_alphabet() -> Alphabet:
    """Return CrystaLLM-pi's 377 tokens with their ids; a space group is one token only between brackets."""
    # Pm is an element and a space group: only the space group keeps its suffix as a key
    spacegroups = [t.removesuffix("_sg") for t in vocabulary() if t.endswith("_sg") and t != "Pm_sg"]
    others = [t for t in vocabulary() if not t.endswith("_sg")] + ["Pm_sg", *MORE_TOKENS]
    here = rf"(?<={SPACEGROUP_KEY} \[)"
    symbol = "|".join(sorted(map(re.escape, spacegroups), key=len, reverse=True))
    string = "|".join(sorted(map(re.escape, others), key=len, reverse=True))
    keys = tuple(t if t == "Pm_sg" else t.removesuffix("_sg") for t in vocabulary())
    return Alphabet(
        tokens=(*keys, *MORE_TOKENS),
        pattern=rf"{here}(?:{symbol})(?=\])|{string}|\w+|[.,;!?]",
        rewrites=((r"[ \t]+", " "), (rf"{here}Pm(?=\])", "Pm_sg")),
        decoder_rewrites=(("Pm_sg", "Pm"),),
        unknown="<unk>",
        end=END,
        pad=PAD,
    )
