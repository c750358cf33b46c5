r"""Symmetry-aware short text: what symmetry leaves free, and nothing else.

Rock salt, NaCl (AFLOW AB_cF8_225_a_b), and rutile, TiO2 (AFLOW A2B_tP6_136_f_a), read:

    Na1 Cl1 225                 Ti2 O4 136
    Na a                        Ti a
    Cl b                        O f
    5.64 end                    4.59 2.96 .3053 end

Line 1 holds the content of the PRIMITIVE cell, by increasing electronegativity, and the space group number
(International Tables). Then one line a site: element and Wyckoff letter. The last line holds, in this order,
the free lattice parameters of the CONVENTIONAL cell (a; a c; a b c; a b c beta; or all six: angstrom and
degree, two decimals), the free coordinates of each site's representative (four decimals), and the word `end`.

The design, and why:
- Setting: the standard one of the International Tables (structures/symmetry.py). Special positions are exact,
  since only free coordinates are written. Symmetry is found at 0.1 angstrom; where that merges cells that
  differ by more than `max_merge_angstrom` it is found at 0.01 instead. Space group 1 is the fall-back that
  always exists.
- Composition first, so that a wanted composition is a forced prefix of the text, and so that every later
  choice can be checked against it while it is made: a letter fits if its multiplicity fits what is still
  missing.
- All letters before any number: the prototype is chosen first, then the metric, then the coordinates, each
  knowing everything before it. Once the metric is known, the distances that a coordinate implies are
  decidable.
- Many descriptions of one crystal are equivalent (origin and axis choices by the Euclidean normalizer of the
  group). `encode` writes the canonical one; `encode_descriptions` all of them, for augmentation. Polar axes
  carry their origin on the first site. The canonical choice prefers early letters for early elements and
  looks at numbers last, so that members of a structure type share their first lines.
- Tokens are the printed words with the blank or newline that follows them, so that tokens joined are the
  text. Numbers take two tokens ("5." "64 ", ".30" "53 "): the first carries what a matcher can see, the
  second refines it. Counts 10-99 and hundredths share the tokens "10 " ... "99 "; the position in the text
  tells them apart.
- The end is explicit: a text without `end` was cut. It is also the model's end-of-sequence token.

Loss: lattice to 0.005 angstrom and 0.005 degree, free coordinates to 0.00005, and the symmetrization itself.
The decoded structure is the standard primitive cell: same crystal, another setting, sites orbit by orbit.
Handedness is kept.
Not here: masks that keep samples on this format (tokens/masking.py); conditions before line 1 (prompts.py).
"""

import re
from dataclasses import dataclass
from functools import lru_cache

from pymatgen.core import Molecule, Structure

from crystallm_kit.errors import EncodeError, ParseError, did_you_mean
from crystallm_kit.records import Crystal
from crystallm_kit.structures.elements import ATOMIC_NUMBER, ELEMENTS, RANK, SYMBOL
from crystallm_kit.structures.symmetry import (
    LETTERS,
    SYMPREC_ANGSTROM,
    Site,
    SymmetricCrystal,
    canonical,
    descriptions,
    expand,
    space_group,
    symmetric_crystal,
)
from crystallm_kit.text.prompt_tokens import KIT_TEMPLATE_TOKENS
from crystallm_kit.text.representation import Alphabet, Grammar

PAD, END = "<pad>", "end"
MAX_COUNT = 99
MAX_INTEGER = 499
COUNT_TOKENS = tuple(f"{n} " for n in range(1, 10))
PAIR_TOKENS = tuple(f"{n:02d} " for n in range(100))  # 10-99 are counts too
SPACEGROUP_TOKENS = tuple(f"{n}\n" for n in range(1, 231))
LETTER_TOKENS = tuple(f" {letter}\n" for letter in LETTERS)
INTEGER_TOKENS = tuple(f"{n}." for n in range(MAX_INTEGER + 1))
COORDINATE_TOKENS = tuple(f".{n:02d}" for n in range(100))
TOKENS = (
    PAD,
    END,
    *ELEMENTS,
    *COUNT_TOKENS,
    *PAIR_TOKENS,
    *SPACEGROUP_TOKENS,
    *LETTER_TOKENS,
    *INTEGER_TOKENS,
    *COORDINATE_TOKENS,
    *KIT_TEMPLATE_TOKENS,
)

# [0-9]: \d takes the digits of every script.
_ELEMENT_COUNT = re.compile(r"([A-Z][a-z]?)([0-9]{1,2}) ")
_HEADER = re.compile(r"((?:[A-Z][a-z]?[0-9]{1,2} )+)([0-9]{1,3})")
_SITE = re.compile(r"([A-Z][a-z]?) ([a-zA])")
_LENGTH = re.compile(r"[0-9]{1,3}\.[0-9]{2}")
_COORDINATE = re.compile(r"\.[0-9]{4}")


class NumberLine:
    """Tells the numbers of a growing text, token by token: its last line, which begins with a digit."""

    def __init__(self) -> None:
        self._begins_a_line, self._is_in_it = True, False

    def holds(self, token: str) -> bool:
        """Tell whether the next token belongs to the cell or to a coordinate."""
        self._is_in_it |= self._begins_a_line and token[:1].isdigit()
        self._begins_a_line = token.endswith("\n")
        return self._is_in_it


@dataclass(frozen=True)
class WyckoffRepresentation:
    """The `wyckoff` format.

    Attributes:
        symprec_angstrom: Tolerance of the symmetry search.
        max_merge_angstrom: Largest shift of an atom at which a pseudo-translation may still halve the cell.
    """

    symprec_angstrom: float = SYMPREC_ANGSTROM
    max_merge_angstrom: float = 0.02
    name = "wyckoff"

    def encode(self, crystal: Crystal) -> str:
        """Return the canonical text of a crystal.

        Raises:
            EncodeError: If it is a molecule, holds an element beyond Lr, more than 99 atoms of one element in
                the primitive cell, or a cell beyond 500 angstrom.
        """
        found = self._symmetric(crystal)
        return symmetric_to_text(canonical(found, _element_order(found)))

    def encode_descriptions(self, crystal: Crystal) -> list[str]:
        """Return every equivalent text of a crystal, the canonical one first. Raises EncodeError."""
        found = self._symmetric(crystal)
        return [symmetric_to_text(d) for d in descriptions(found, _element_order(found))]

    def _symmetric(self, crystal: Crystal) -> SymmetricCrystal:
        structure = crystal.structure
        if isinstance(structure, Molecule):
            raise EncodeError(f"{crystal.id}: a molecule has no space group; write it as xyz")
        if not structure.is_ordered:
            raise EncodeError(f"{crystal.id}: partial occupancies cannot be written as wyckoff text")
        unknown = [s.symbol for s in structure.composition.elements if s.symbol not in RANK]
        if unknown:
            raise EncodeError(f"{crystal.id}: no token for {', '.join(unknown)}; known are H to Lr")
        for symprec in (self.symprec_angstrom, self.symprec_angstrom / 10, self.symprec_angstrom / 1000):
            try:
                return symmetric_crystal(structure, symprec, self.max_merge_angstrom)
            except EncodeError:
                continue
        return _without_symmetry(structure)

    def decode(self, text: str) -> Crystal:
        """Return the crystal of a text: its standard primitive cell.

        `properties` carries the stated spacegroup_number. Raises ParseError, as text_to_symmetric does, or
        with the reason cell if the lattice parameters span none.
        """
        symmetric = text_to_symmetric(text)
        structure = expand(symmetric)
        return Crystal("", structure, {"spacegroup_number": symmetric.spacegroup_number})

    def alphabet(self) -> Alphabet:
        """Return the tokens: pad, end, elements, numbers, space groups, letters, and those of the kit's
        prompts.
        """
        return Alphabet(tokens=TOKENS, end=END, pad=PAD)

    def grammar(self) -> Grammar:
        """Return the grammar of well-formed texts.

        What it cannot say: that numbers and letters fit the group.
        """
        return _grammar()


def _element_order(crystal: SymmetricCrystal) -> list[int]:
    """Return the atomic numbers of a crystal by increasing electronegativity."""
    return sorted(crystal.counts, key=lambda z: RANK[SYMBOL[z]])


def symmetric_to_text(crystal: SymmetricCrystal) -> str:
    """Return the text of a symmetric crystal as it is described, without choosing another description.

    Raises:
        EncodeError: If a count or length is beyond what the format's tokens hold.
    """
    counts = {SYMBOL[z]: n for z, n in crystal.counts.items()}
    if max(counts.values()) > MAX_COUNT:
        raise EncodeError(
            f"{max(counts.values())} atoms of one element; at most {MAX_COUNT} in a primitive cell"
        )
    if max(crystal.lattice) > MAX_INTEGER:
        raise EncodeError(f"cell length {max(crystal.lattice):.1f} angstrom; at most {MAX_INTEGER}")
    header = "".join(f"{symbol}{n} " for symbol, n in counts.items()) + str(crystal.spacegroup_number)
    sites = "".join(f"{SYMBOL[s.atomic_number]} {s.letter}\n" for s in crystal.sites)
    numbers = "".join(f"{v:.2f} " for v in crystal.lattice)
    numbers += "".join(f".{round(v * 10_000) % 10_000:04d} " for s in crystal.sites for v in s.free)
    return f"{header}\n{sites}{numbers}{END}"


def text_to_symmetric(text: str) -> SymmetricCrystal:
    """Return the symmetric crystal of a text.

    Raises:
        ParseError: With the line and one of the reasons no_end, header, element, spacegroup, site, letter,
            letter_repeated, composition, number, too_few_numbers, too_many_numbers.
    """
    lines = text.split("\n")
    if len(lines) < 3 or not (lines[-1] == END or lines[-1].endswith(f" {END}")):
        raise ParseError("no_end", f"the text does not end with '{END}'; it was cut", len(lines))
    counts, number = _parse_header(lines[0])
    group = space_group(number)
    sites: list[tuple[str, str]] = []
    reached: dict[str, int] = {}
    for index, line in enumerate(lines[1:-1], start=2):
        match = _SITE.fullmatch(line)
        if match is None:
            raise ParseError("site", f"'{line}': an element and a Wyckoff letter expected", index)
        symbol, letter = match.groups()
        if letter not in group:
            raise ParseError("letter", f"space group {number} has no Wyckoff letter {letter}", index)
        if group[letter].n_free == 0 and any(letter == other for _, other in sites):
            raise ParseError(
                "letter_repeated", f"letter {letter} of space group {number} holds one orbit only", index
            )
        sites.append((symbol, letter))
        reached[symbol] = reached.get(symbol, 0) + group[letter].primitive_multiplicity
    if reached != counts:
        raise ParseError(
            "composition", f"sites add up to {_formula(reached)}, line 1 says {_formula(counts)}", 1
        )
    words = lines[-1].split(" ")[:-1]
    n_lattice = len(group.free_lattice)
    expected = n_lattice + sum(group[letter].n_free for _, letter in sites)
    if len(words) != expected:
        reason = "too_few_numbers" if len(words) < expected else "too_many_numbers"
        raise ParseError(
            reason, f"{len(words)} numbers; space group {number} and its letters need {expected}", len(lines)
        )
    for i, word in enumerate(words):
        if not (_LENGTH if i < n_lattice else _COORDINATE).fullmatch(word):
            raise ParseError(
                "number", f"'{word}': {'5.64' if i < n_lattice else '.3053'} expected", len(lines)
            )
    free = iter(float(word) for word in words[n_lattice:])
    return SymmetricCrystal(
        number,
        tuple(float(word) for word in words[:n_lattice]),
        tuple(
            Site(ATOMIC_NUMBER[symbol], letter, tuple(next(free) for _ in range(group[letter].n_free)))
            for symbol, letter in sites
        ),
    )


def _parse_header(line: str) -> tuple[dict[str, int], int]:
    match = _HEADER.fullmatch(line)
    if match is None:
        raise ParseError(
            "header", f"'{line}': a composition and a space group such as 'Na1 Cl1 225' expected", 1
        )
    counts: dict[str, int] = {}
    for symbol, count in _ELEMENT_COUNT.findall(match[1]):
        if symbol not in RANK:
            raise ParseError("element", f"no element '{symbol}'{did_you_mean(symbol, ELEMENTS)}", 1)
        if symbol in counts or int(count) == 0 or count.startswith("0"):
            raise ParseError("header", f"'{line}': each element once, with a count of 1 or more", 1)
        counts[symbol] = int(count)
    number = int(match[2])
    if not 1 <= number <= 230:
        raise ParseError("spacegroup", f"space group {number}: 1 to 230 expected", 1)
    return counts, number


def _formula(counts: dict[str, int]) -> str:
    return " ".join(f"{symbol}{n}" for symbol, n in counts.items())


def _without_symmetry(structure: Structure) -> SymmetricCrystal:
    """Return a structure as space group 1: its Niggli cell and every atom a site of its own."""
    reduced = structure.get_reduced_structure("niggli")
    lattice = reduced.lattice
    sites = tuple(
        Site(int(z), "a", tuple(round(float(v) % 1.0, 4) % 1.0 for v in point))
        for z, point in zip(reduced.atomic_numbers, reduced.frac_coords, strict=True)
    )
    return SymmetricCrystal(1, (*lattice.abc, *lattice.angles), sites)


@lru_cache(maxsize=1)
def _grammar() -> Grammar:
    elements = sorted(ELEMENTS, key=lambda s: (-len(s), s))
    spacegroup = "(?:[1-9]|[1-9][0-9]|1[0-9][0-9]|2[0-2][0-9]|230)"
    element = f"(?:{'|'.join(elements)})"
    count, length, coordinate = "[1-9][0-9]?", "(?:0|[1-9][0-9]?|[1-4][0-9][0-9])\\.[0-9][0-9]", "\\.[0-9]{4}"
    regex = f"(?:{element}{count} )+{spacegroup}\n(?:{element} [a-zA]\n)+(?:{length} )+(?:{coordinate} )*end"
    either = " | ".join(f'"{s}"' for s in elements)
    groups = '("23" "0") | ("2" "0".."2" "0".."9") | ("1" "0".."9" "0".."9") | ("1".."9" "0".."9") | "1".."9"'
    lark = (
        "start: header site+ length+ coordinate*\n"
        'header: (ELEMENT COUNT " ")+ SPACEGROUP "\\n"\n'
        'site: ELEMENT " " LETTER "\\n"\n'
        'length: LENGTH " "\n'
        'coordinate: COORDINATE " "\n'
        f"ELEMENT: {either}\n"
        "COUNT: /[1-9][0-9]?/\n"
        f"SPACEGROUP: {groups}\n"
        "LETTER: /[a-zA]/\n"
        "LENGTH: /(0|[1-9][0-9]?|[1-4][0-9][0-9])\\.[0-9][0-9]/\n"
        "COORDINATE: /\\.[0-9][0-9][0-9][0-9]/\n"
    )
    gbnf = (
        "root ::= header site+ length+ coordinate*\n"
        'header ::= (element count " ")+ spacegroup "\\n"\n'
        'site ::= element " " [a-zA] "\\n"\n'
        'length ::= ("0" | [1-9] [0-9]? | [1-4] [0-9] [0-9]) "." [0-9] [0-9] " "\n'
        'coordinate ::= "." [0-9] [0-9] [0-9] [0-9] " "\n'
        "count ::= [1-9] [0-9]?\n"
        'spacegroup ::= "230" | "2" [0-2] [0-9] | "1" [0-9] [0-9] | [1-9] [0-9]?\n'
        f"element ::= {either}\n"
    )
    return Grammar(lark=lark, gbnf=gbnf, regex=regex)
