"""Plain words -> Conditions: what was understood, phrase by phrase, and what was not.

    understand("four candidates for a cubic perovskite of barium, titanium and oxygen")
        n            4
        conditions   BaTiO3; cubic
        understood   ("four candidates", "4 candidates"), ("cubic", "cubic"),
                     ("perovskite", "perovskite: stoichiometry ABC3"),
                     ("of barium, titanium and oxygen", "only Ba, Ti, O")
        notes        "perovskite of Ba, Ti, O: BaTiO3, with O, the most electronegative, three times"

A grammar of rules, no model: each rule takes the phrases that it knows out of the text, from the most to the
least specific. What no rule takes and carries meaning is reported as not understood, with a hint or the
nearest known word. What Conditions cannot say (exclusions, alternatives, ranges of atoms, dopants) is
reported too, never half understood.

Not here: option strings (conditions.py).
"""

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from crystallm_kit.errors import ImpossibleRequest, UserError
from crystallm_kit.records import PROPERTIES, Conditions, Range
from crystallm_kit.structures.elements import ELEMENTS, RANK
from crystallm_kit.structures.prototypes import STRUCTURE_TYPE_WORDS, StructureType, structure_type
from crystallm_kit.structures.spacegroups import find_spacegroup, spacegroup_number, spacegroup_symbol
from crystallm_kit.text.conditions import (
    RANGE,
    UNIT,
    anonymous_counts,
    anonymous_of,
    canonical_anonymous,
    check_conditions,
    describe,
    describe_property,
    formula_text,
    parse_formula,
    plain_text,
    range_of,
    range_text,
)
from crystallm_kit.text.lexicon import (
    CANDIDATE_NOUNS,
    COMPOUND_CLASSES,
    COUNT_WORDS,
    ELEMENT_COUNT_WORDS,
    ELEMENT_NAMES,
    EXACT_PREFIXES,
    FILLERS,
    HINTS,
    OTHER_PREFIXES,
    SYMBOLS_THAT_ARE_WORDS,
)
from crystallm_kit.text.prompt_tokens import CRYSTAL_SYSTEMS

STABLE = Range(None, 0.0)
MAX_CHARACTERS = 1000  # the rules' time grows with the square of the length; 1,000 take 0.2 s at worst
_MOST_DIGITS = 30
METASTABLE = Range(None, 0.1)  # eV/atom above the hull, the limit that the field's benchmarks use


@dataclass(frozen=True)
class Understood:
    """What a sentence asks for.

    Attributes:
        conditions: All that was understood, checked for contradictions.
        n: Number of candidates, None where none is named.
        understood: (phrase, meaning), in the order of the text.
        not_understood: Phrases that had no effect.
        notes: Assumptions made, and hints for what was not understood.
    """

    conditions: Conditions
    n: int | None
    understood: tuple[tuple[str, str], ...]
    not_understood: tuple[str, ...]
    notes: tuple[str, ...]

    def report(self) -> str:
        """Return it all as lines for a person."""
        lines = [f"asked for: {f'{self.n} x ' if self.n else ''}{describe(self.conditions)}"]
        lines += [f"  '{phrase}' -> {meaning}" for phrase, meaning in self.understood]
        lines += [f"not understood: '{phrase}'" for phrase in self.not_understood]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def understand(text: str) -> Understood:
    """Return what a sentence asks for.

    Args:
        text: English, with formulas, symbols and units as the field writes them.

    Raises:
        UnknownName: A formula with an unknown element, a space group that does not exist.
        ImpossibleRequest: Conditions that contradict each other, or a property out of its range.
        UserError: More than 1,000 characters, or a number of more digits than any has.
    """
    if len(text) > MAX_CHARACTERS:
        raise UserError(
            f"the request has {len(text)} characters; at most {MAX_CHARACTERS} are read. Say it shorter."
        )
    plain = plain_text(text)
    # the patterns of numbers would try a run of n digits in n^2 ways: 1.7 s for 1,000 of them
    if re.search(rf"\d{{{_MOST_DIGITS + 1}}}", plain):
        raise UserError(f"a number of more than {_MOST_DIGITS} digits; write it shorter, such as 1e9.")
    reading = _Reading(plain)
    for rule in _RULES:
        rule(reading)
    return reading.result()


# ---------------------------------------------------------------- patterns

_ALTERNATIVE = "an alternative cannot be asked for; ask once for each"
_TAKEN = "\0"  # stands in the rest of the text where a rule has taken something


def _alternatives(words: Iterable[str]) -> str:
    """Return a pattern for any of the words, the longest first; a blank matches blanks and hyphens."""
    ordered = sorted(words, key=lambda word: (-len(word), word))
    return "|".join(re.escape(word).replace(r"\ ", r"[\s-]+") for word in ordered)


_COMPARED = (
    r"(?:\b(?:at\s+(?:most|least)|up\s+to|(?:more|less|fewer|no\s+more|no\s+less|no\s+fewer)\s+than|under|over|about|"
    r"around)|[<>]=?|~)"
)
_COUNT = rf"(?:\d[\d,]*|{_alternatives(COUNT_WORDS)})"
_ELEMENT = rf"(?:(?i:\b(?:{_alternatives(ELEMENT_NAMES)})\b)|\b(?:{_alternatives(ELEMENTS)})\b(?!['.]?[a-z]))"
_SEPARATOR = r"(?:\s*,\s*and\s+|\s+and\s+|\s*,\s*|\s*[/&+]\s*)"
_NO_QUANTITY = (
    r"(?!\s*(?:[<>=~]|(?i:above|below|over|under|greater|less|of\s+\d|around|about)\b))"  # "Tc above 30 K"
)
_LIST = rf"{_ELEMENT}(?:{_SEPARATOR}{_ELEMENT})*{_NO_QUANTITY}"
_PREFIX = rf"(?:{_alternatives((*EXACT_PREFIXES, *OTHER_PREFIXES))})"
_CLASS = rf"(?i:\b(?P<prefix>{_PREFIX})?(?P<class>{_alternatives(COMPOUND_CLASSES)})(?:s\b|\b))"
_SYSTEM = rf"(?:{'|'.join(CRYSTAL_SYSTEMS)}|rhombohedral)"
_HULL = r"(?:the\s+)?(?:convex[\s-]+)?hull"
_PROPERTY_NAMES = {
    "formation_energy_ev_per_atom": r"formation[\s-]+energ(?:y|ies)(?:\s+per[\s-]+atom)?",
    "hull_distance_ev_per_atom": rf"(?:(?:energy|distance)\s+(?:above|from|to|over)\s+{_HULL}|"
    r"hull[\s-]+distance|"
    rf"(?:above|from|off|of)\s+{_HULL})",
    "band_gap_ev": r"(?:(?:electronic\s+)?band[\s-]*gaps?|gaps?|E_?g)",
    "density_g_cm3": r"(?:mass\s+)?densit(?:y|ies)",
    "bulk_modulus_gpa": r"bulk[\s-]+modul(?:us|i)",
}
_LINK = (
    r"\s*(?:\((?:Eg|E_g|K|B)\))?\s*(?:(?:that|which)\s+is|is|of|=|:|in\s+the\s+range(?:\s+of)?|in\s+the\s+range|ranging|"
    r"values?(?:\s+of)?)?\s*"
)


def _property_pattern(name: str) -> str:
    words = "|".join(re.escape(alias) for alias in (name, *PROPERTIES[name].aliases))
    return rf"\b(?:{_PROPERTY_NAMES[name]}|{words})\b"


# ---------------------------------------------------------------- reading


@dataclass
class _Reading:
    """The state of one reading: what is left of the text, and what was found.

    `only_hard`: the elements were said to be all ("of barium and oxygen"); `only_soft`: their naming suggests
    it ("barium oxide"), unless something else asks for more of them.
    """

    text: str
    rest: str = ""
    found: list[tuple[int, str, str]] = field(default_factory=list)
    unclear: list[tuple[int, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    formula: dict[str, int] | None = None
    elements: list[str] = field(default_factory=list)
    only_hard: bool = False
    only_soft: bool = False
    n_elements: int | None = None
    anonymous: str | None = None
    spacegroup: int | None = None
    system: str | None = None
    n_sites: int | None = None
    n: int | None = None
    kinds: list[StructureType] = field(default_factory=list)
    properties: dict[str, Range] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rest = self.text

    def matches(self, pattern: str, *, cased: bool = False) -> Iterable[re.Match[str]]:
        """Yield the matches of a pattern in what is left, left to right; the taker calls take or refuse."""
        position = 0
        compiled = re.compile(pattern, 0 if cased else re.IGNORECASE)
        while match := compiled.search(self.rest, position):
            yield match
            position = max(match.end(), position + 1)

    def take(self, start: int, end: int, meaning: str) -> None:
        """Mark a stretch of the text as understood."""
        self.found.append((start, self._cut(start, end), meaning))

    def refuse(self, start: int, end: int, note: str = "") -> None:
        """Mark a stretch of the text as not understood."""
        phrase = self._cut(start, end)
        self.unclear.append((start, phrase))
        if note:
            self.notes.append(f"'{phrase}': {note}")

    def _cut(self, start: int, end: int) -> str:
        self.rest = self.rest[:start] + _TAKEN * (end - start) + self.rest[end:]
        return " ".join(self.text[start:end].split()).strip(" ,;.")

    def add_elements(self, elements: Iterable[str]) -> None:
        self.elements += [element for element in elements if element not in self.elements]

    def add_range(self, name: str, asked: Range) -> str:
        """Narrow a property to a range and return its description."""
        old = self.properties.get(name, Range(None, None))
        lows = [v for v in (old.low, asked.low) if v is not None]
        highs = [v for v in (old.high, asked.high) if v is not None]
        self.properties[name] = Range(max(lows, default=None), min(highs, default=None))
        return describe_property(name, asked)

    def result(self) -> Understood:
        """Return what was found, put together and checked."""
        conditions = self._conditions()
        check_conditions(conditions)
        return Understood(
            conditions,
            self.n,
            tuple((phrase, meaning) for _, phrase, meaning in sorted(self.found)),
            tuple(phrase for _, phrase in sorted(self.unclear)),
            tuple(dict.fromkeys(self.notes)),
        )

    def _conditions(self) -> Conditions:
        for kind in self.kinds:
            self._apply(kind)
        counts = len(anonymous_counts(self.anonymous)) if self.anonymous else None
        only = self.only_hard or (self.only_soft and (self.n_elements or counts or 0) <= len(self.elements))
        only = bool(self.elements) and (only or len(self.elements) in (counts, self.n_elements))
        if self.formula is None and only:
            self._formula_of_kind()
        if self.formula is not None and set(self.elements) <= set(self.formula):
            # a formula says elements and stoichiometry by itself; contradictions stay for check_conditions
            self.elements = [] if not only or len(self.elements) == len(self.formula) else self.elements
            only = only and bool(self.elements)
            if self.anonymous == anonymous_of(self.formula.values()):
                self.anonymous = None
            if self.n_elements == len(self.formula):
                self.n_elements = None
        return Conditions(
            formula=self.formula,
            elements=tuple(self.elements),
            only_elements=only,
            n_elements=self.n_elements,
            anonymous_formula=self.anonymous,
            spacegroup_number=self.spacegroup,
            crystal_system=self.system,
            n_sites=self.n_sites,
            properties=self.properties,
        )

    def _apply(self, kind: StructureType) -> None:
        """Add what a structure type fixes. Raises ImpossibleRequest where the text says otherwise."""
        for name, ours, theirs in (
            ("space group", self.spacegroup, kind.spacegroup_number),
            ("stoichiometry", self.anonymous, kind.anonymous_formula),
        ):
            if None not in (ours, theirs) and ours != theirs:
                raise ImpossibleRequest(
                    f"{kind.name} has {name} {theirs}, the request says {ours}; drop one of them."
                )
        self.spacegroup = self.spacegroup or kind.spacegroup_number
        self.anonymous = self.anonymous or kind.anonymous_formula

    def _formula_of_kind(self) -> None:
        for kind in self.kinds:
            formula = kind.formula_for(self.elements)
            if formula is not None:
                self.formula = {
                    element: formula[element] for element in sorted(formula, key=RANK.__getitem__)
                }
                self.notes.append(
                    f"{kind.name} of {', '.join(self.elements)}: {formula_text(self.formula)}{_why(formula)}"
                )
                return


def _why(formula: dict[str, int]) -> str:
    """Return the reason for an uneven formula: which element is taken for the anion."""
    if len(set(formula.values())) == 1:
        return ""
    anion = max(formula, key=RANK.__getitem__)
    times = {1: "once", 2: "twice", 3: "three times"}.get(formula[anion], f"{formula[anion]} times")
    return f", with {anion}, the most electronegative, {times}"


# ---------------------------------------------------------------- rules, in the order in which they run


def _properties(reading: _Reading) -> None:
    """Take "band gap above 2 eV", "density between 3 and 4 g/cm3", "within 50 meV of the hull"."""
    for name in PROPERTIES:
        words = _property_pattern(name)
        for pattern in (rf"{words}{_LINK}{RANGE}", rf"{RANGE}[\s-]*{words}"):
            for match in reading.matches(pattern):
                _take_property(reading, name, match)


def _take_property(reading: _Reading, name: str, match: re.Match[str]) -> None:
    end = match.end()
    wrong = re.match(r"\s*([A-Za-zÅ°%][\w/%^]*)", reading.rest[end:])
    if not match["unit5"] and match["value"] and wrong and wrong[1].lower() in _OTHER_UNITS:
        reading.refuse(match.start(), end + wrong.end(), f"{name} is in {PROPERTIES[name].unit}")
        return
    try:
        meaning = reading.add_range(name, range_of(match, PROPERTIES[name]))
    except ImpossibleRequest:
        raise
    except UserError as error:
        reading.refuse(match.start(), end, str(error))
        return
    if not any(match[unit] for unit in ("unit1", "unit2", "unit3", "unit4", "unit5")):
        reading.notes.append(f"'{match[0].strip()}': no unit given, taken as {PROPERTIES[name].unit}")
    more = re.compile(
        rf"\s*(?:,|and|but)\s+{RANGE}(?=\s*(?:$|[,;.{_TAKEN}]|and\b|with\b|in\b))", re.IGNORECASE
    )
    second = more.match(reading.rest, end)
    if second and (second["least"] or second["most"]):
        asked = range_of(second, PROPERTIES[name])
        reading.add_range(name, asked)
        meaning += f" and {range_text(asked)} {PROPERTIES[name].unit}"
        end = second.end()
    reading.take(match.start(), end, meaning)


_OTHER_UNITS = frozenset(
    ("nm", "k", "kelvin", "ry", "ha", "hartree", "å", "angstrom", "%", "j", "kj", "kcal", "v", "lb", "ev",
     "mev", "gpa", "mpa", "kbar", "g", "kg", "t", "kj/mol", "kcal/mol", "pa", "psi", "tpa")
)  # fmt: skip


def _site_counts(reading: _Reading) -> None:
    """Take "10 atoms", "5-atom cell", "8 sites in the primitive cell"; refuse ranges of them."""
    cell = (
        r"(?:\s*(?:per|in|/)\s*(?:the|a|an|its|each)?\s*"
        r"(?:(?P<cell>primitive|conventional|formula)\s*)?(?:unit)?\s*cell)?"
    )
    atoms = rf"[\s-]+(?:atoms?|sites?)\b{cell}"
    several = rf"(?:between\s+{_COUNT}\s+and|(?:from\s+)?{_COUNT}\s*(?:to|or|-))\s*{_COUNT}"
    for match in reading.matches(rf"(?:{_COMPARED}\s*{_COUNT}|\b{several}){atoms}"):
        reading.refuse(match.start(), match.end(), "only an exact number of atoms can be asked for")
    for match in reading.matches(rf"(?<![\w.-])(?P<n>{_COUNT}){atoms}(?:\s+cells?\b)?"):
        if match["cell"] and match["cell"].lower() in ("conventional", "formula"):
            reading.refuse(match.start(), match.end(), "give the number of atoms in the primitive cell")
            continue
        if "unit" in match[0].lower() and not match["cell"]:
            reading.notes.append(f"'{match[0].strip()}': taken as the primitive cell")
        reading.n_sites = _number(match["n"])
        reading.take(match.start(), match.end(), f"{reading.n_sites} atoms in the primitive cell")


def _exclusions(reading: _Reading) -> None:
    """Refuse "without lead", "lead-free", "non-magnetic", "Al-doped", "dynamically stable" as a whole."""
    target = (
        rf"(?:(?:any|a|an|the)\s+)?(?:{_LIST}|[A-Za-z][\w-]*(?:\s+(?:elements?|atoms?|metals?|earths?)\b)?)"
    )
    choice = rf"(?:\s*(?:,|/|\bor\b|\bnor\b|\band\b)\s*(?:or\s+|and\s+)?(?:{_ELEMENT}))*"
    words = (
        r"(?:without|not|neither|nor|excluding|except(?:\s+for)?|avoid(?:ing)?|free\s+of|free\s+from|other\s+than|"
        r"instead\s+of|rather\s+than|no)(?:\s+containing|\s+contain)?"
    )
    for match in reading.matches(rf"\b(?:but\s+)?{words}\s+{target}{choice}"):
        reading.refuse(match.start(), match.end(), "nothing can be excluded; check the results instead")
    for match in reading.matches(r"\b(?:non-?[a-z]+(?:-[a-z]+)?|[\w]+[\s-]free)\b"):
        if match[0].lower().startswith("non") and match[0].lower() in ELEMENT_NAMES:
            continue
        reading.refuse(match.start(), match.end(), "nothing can be excluded; check the results instead")
    for match in reading.matches(r"[\w:.]+[\s-]doped\b|\bdoped\s+with\s+[\w]+"):
        reading.refuse(match.start(), match.end(), "partial occupancies cannot be generated")
    for match in reading.matches(r"\b(?!thermo)[a-z]+ly[\s-]+(?:meta)?stable\b|\b[a-z]+-stable\b"):
        reading.refuse(
            match.start(), match.end(), "only stability against decomposition (the convex hull) is known"
        )


def _spacegroups(reading: _Reading) -> None:
    """Take "space group 225", "No. 62", "in Pnma", "P 63/m m c space group"."""
    intro = (
        r"(?:\b(?:in|with|of)\s+)?(?:the\s+)?\b(?:space[\s-]?groups?|SG)\b(?:\s+(?:symmetry|number|symbol|type))?"
        r"(?:\s*(?:no\.?|nr\.?|number|#))?\s*(?::|=|\bis\b|\bof\b)?\s*"
    )
    for match in reading.matches(rf"{intro}(?=[PIFABCR\d])|\b(?:in\s+)?No\.?\s*(?=\d)|#\s*(?=\d)"):
        end, number = _spacegroup_at(reading.rest, match.end())
        _take_spacegroup(reading, match.start(), end, number)
    for match in reading.matches(rf"\bin\s+(\d{{1,3}})\b(?!\s*(?:{UNIT}|[-.]|%|atoms?|sites?|days?|years?))"):
        if 1 <= int(match[1]) <= 230:
            _take_spacegroup(reading, match.start(), match.end(), int(match[1]))
    symbols = (
        r"(?P<before>\b(?i:in|with|having)\s+(?:the\s+)?)?(?<![\w-])(?P<symbol>[PIFABCR][-\w/:\u0304\u0305]*)"
        r"(?P<after>\s+(?i:space[\s-]?group|symmetry|phase)\b(?:\s+(?i:symmetry))?)?"
    )
    for match in reading.matches(r"(?<![\w-])[PIFABCR](?=\s+[-\dabcdemn])", cased=True):  # P 63/m m c
        spaced = _spaced_symbol(reading.rest, match.start())
        if spaced is not None:
            end = spaced[0]
            after = re.compile(r"\s+space[\s-]?group\b", re.IGNORECASE).match(reading.rest, end)
            _take_spacegroup(reading, match.start(), after.end() if after else end, spaced[1])
    for match in reading.matches(symbols, cased=True):
        bare = _bare_spacegroup(match["symbol"], certain=bool(match["before"] or match["after"]))
        if bare is not None:
            _take_spacegroup(reading, match.start(), match.end(), bare)


def _spacegroup_at(text: str, start: int) -> tuple[int, int]:
    """Return the end and the number of the space group, by number or symbol, that begins at `start`."""
    digits = re.compile(r"\d+").match(text, start)
    if digits:
        return digits.end(), spacegroup_number(digits[0])
    spaced = _spaced_symbol(text, start, least=2)
    if spaced is not None:
        return spaced
    symbol = re.split(r"[\s,;()\0]", text[start:])[0].rstrip(".:")
    return start + len(symbol), spacegroup_number(symbol)


def _spaced_symbol(text: str, start: int, least: int = 3) -> tuple[int, int] | None:
    """Return the end and number of a symbol with blanks inside ("F m -3 m"), of `least` pieces or more."""
    pieces = list(re.compile(r"[^\s,;()\0]+").finditer(text, start, start + 40))[:4]
    for piece in reversed(pieces[least - 1 :]):
        symbol = text[start : piece.end()].rstrip(".")
        number = find_spacegroup(symbol)
        if number is not None:
            return start + len(symbol), number
    return None


def _bare_spacegroup(symbol: str, *, certain: bool) -> int | None:
    """Return the number of a symbol in running text; one that is also a formula (C2, Pm) must be certain."""
    number = find_spacegroup(symbol.rstrip(".-:"))
    if number is None or re.search(
        r"[A-Z]", symbol[1:].removesuffix("H").removesuffix("S").removesuffix("Z")
    ):
        return None
    if symbol in ("P1", "P-1") or certain:
        return number
    try:
        parse_formula(symbol)
    except UserError:
        return number
    return None


def _take_spacegroup(reading: _Reading, start: int, end: int, number: int) -> None:
    if reading.spacegroup not in (None, number):
        raise ImpossibleRequest(
            f"two space groups, {spacegroup_symbol(reading.spacegroup or 1)} and "
            f"{spacegroup_symbol(number)}: ask for one at a time."
        )
    reading.spacegroup = number
    reading.take(start, end, f"space group {spacegroup_symbol(number)} ({number})")


def _structure_types(reading: _Reading) -> None:
    """Take "perovskite", "half-Heusler", "NaCl-type", "rock salt structure"."""
    words = _alternatives(STRUCTURE_TYPE_WORDS)
    for match in reading.matches(
        rf"(?<![\w-])({words})s?(?:[\s-]+(?:type|like)\b)?(?:[\s-]+structure(?:\s+type)?\b)?(?!\w)"
    ):
        kind = structure_type(match[1])
        if kind is None or kind in reading.kinds:
            continue
        reading.kinds.append(kind)
        group = kind.spacegroup_number
        parts = [f"stoichiometry {kind.anonymous_formula}"] if kind.anonymous_formula else []
        parts += [f"space group {spacegroup_symbol(group)} ({group})"] if group else []
        reading.take(match.start(), match.end(), f"{kind.name}: {', '.join(parts)}")


def _formulas(reading: _Reading) -> None:
    """Take "LiFePO4", "Ca(OH)2", "Ba-Ti-O", "ABO3", "A2B". A formula with an unknown element is an error."""
    for match in reading.matches(
        rf"(?<![\w-]){_SYMBOL}(?:-{_SYMBOL})+(?![\w-])(?:\s+(?i:(?:chemical\s+)?system))?", cased=True
    ):
        elements = re.findall(_SYMBOL, re.split(r"\s", match[0])[0])
        reading.add_elements(elements)
        reading.only_hard = True
        reading.take(match.start(), match.end(), f"only {', '.join(elements)}")
    for match in reading.matches(
        r"(?<![\w-])(?=[AM])(?:[ABCDEMX]\d*|[ONFSH](?=\d*(?![\w])))(?:[A-Z]\d*)+(?![\w(])", cased=True
    ):
        _take_anonymous(reading, match)
    chunk = r"(?:[A-Z][a-z]?(?:\d+(?:\.\d+)?)?|[(\[]|[)\]]\d*)"
    for match in reading.matches(
        rf"(?<![\w-])(?:{chunk}){{2,}}(?![\w(])|(?<![\w-])[A-Z][a-z]?\d+(?![\w(.])", cased=True
    ):
        _take_formula(reading, match)


_SYMBOL = rf"(?:{_alternatives(ELEMENTS)})"
_NO_FORMULAS = frozenset(
    {
        "GPa",
        "MPa",
        "TPa",
        "kPa",
        "CIF",
        "UV",
        "PV",
        "OK",
        "BCC",
        "FCC",
        "HCP",
        "UHV",
        "NIR",
        "IR",
        "PBS",
        "CPU",
        "II",
        "III",
        "IV",
        "VI",
    }
)


def _take_anonymous(reading: _Reading, match: re.Match[str]) -> None:
    """Take a stoichiometry such as ABX3; a last O, N, F, S, H (ABO3) is an element besides."""
    text = match[0]
    if not re.search(r"A|M|X", text) or len(re.findall("[A-Z]", text)) < 2:
        return
    try:
        anonymous = canonical_anonymous(text)
    except UserError:
        return
    last = re.findall("[A-Z]", text)[-1]
    meaning = f"stoichiometry {anonymous}"
    if last in "ONFSH":
        reading.add_elements([last])
        meaning += f", contains {last}"
    reading.anonymous = anonymous
    reading.take(match.start(), match.end(), meaning)


def _take_formula(reading: _Reading, match: re.Match[str]) -> None:
    text = match[0]
    is_word = not re.search(r"\d", text) and text.isupper()
    if text in _NO_FORMULAS or not re.search("[A-Z]", text):
        return
    try:
        formula = parse_formula(text)
    except UserError as error:
        if is_word:  # DFT, VASP: an abbreviation, not a formula
            return
        if re.search(r"\d", text) and text[0].isalpha():
            raise
        reading.refuse(match.start(), match.end())
        reading.notes.append(str(error))
        return
    if reading.formula is not None and reading.formula != formula:
        reading.refuse(match.start(), match.end(), "one composition at a time can be asked for")
        return
    reading.formula = formula
    names = {symbol: name for name, symbol in reversed(ELEMENT_NAMES.items())}
    reading.take(
        match.start(),
        match.end(),
        f"composition {formula_text(formula)} ({', '.join(names[e] for e in formula)})",
    )


def _crystal_systems(reading: _Reading) -> None:
    """Take "cubic", "rhombohedral"; refuse "cubic or tetragonal"."""
    for match in reading.matches(rf"\b{_SYSTEM}(?:\s*,\s*{_SYSTEM})*\s*,?\s+or\s+{_SYSTEM}\b"):
        reading.refuse(match.start(), match.end(), _ALTERNATIVE)
    for match in reading.matches(rf"\b({_SYSTEM})\b(?:\s+(?:crystal\s+)?(?:system|symmetry)\b)?"):
        system = match[1].lower().replace("rhombohedral", "trigonal")
        if reading.system not in (None, system):
            raise ImpossibleRequest(f"{reading.system} and {system} at once; ask for one at a time.")
        reading.system = system
        reading.take(match.start(), match.end(), system)


def _element_counts(reading: _Reading) -> None:
    """Take "binary", "quaternary", "three elements", "five-component"."""
    several = (
        rf"{_COMPARED}\s*{_COUNT}|(?:between\s+{_COUNT}\s+and|(?:from\s+)?{_COUNT}\s*(?:to|or|-))\s*{_COUNT}"
    )
    for match in reading.matches(rf"(?:{several})[\s-]+(?:different\s+)?(?:element|component)s?\b"):
        reading.refuse(match.start(), match.end(), "only an exact number of elements can be asked for")
    words = "|".join(ELEMENT_COUNT_WORDS)
    for match in reading.matches(rf"\b(?:{words})(?:\s*,\s*(?:{words}))*\s*,?\s+or\s+(?:{words})\b"):
        reading.refuse(match.start(), match.end(), _ALTERNATIVE)
    pattern = rf"\b(?:(?P<word>{words})|(?P<n>{_COUNT})[\s-]+(?:different\s+)?(?:element|component)s?)\b"
    for match in reading.matches(pattern):
        n = ELEMENT_COUNT_WORDS[match["word"].lower()] if match["word"] else _number(match["n"])
        if reading.n_elements not in (None, n):
            raise ImpossibleRequest(
                f"{reading.n_elements} and {n} different elements at once; ask for one at a time."
            )
        reading.n_elements = n
        reading.take(match.start(), match.end(), f"{n} different element{'s' if n > 1 else ''}")


def _compounds(reading: _Reading) -> None:
    """Take "gallium nitride", "lithium iron phosphate", "titanium dioxide", and "oxide" alone."""
    for match in reading.matches(rf"(?P<names>{_ELEMENT}(?:[\s-]+{_ELEMENT})*)[\s-]+{_CLASS}", cased=True):
        metals = _symbols_in(match["names"])
        anions = COMPOUND_CLASSES[match["class"].lower()]
        exact = EXACT_PREFIXES.get((match["prefix"] or "").lower())
        if exact and len(metals) == len(anions) == 1 and reading.formula is None:
            reading.formula = {metals[0]: 1, anions[0]: exact}
            reading.take(match.start(), match.end(), f"composition {formula_text(reading.formula)}")
            continue
        reading.add_elements((*metals, *anions))
        reading.only_soft = True
        reading.take(match.start(), match.end(), ", ".join((*metals, *anions)))
    for match in reading.matches(_CLASS, cased=True):
        anions = COMPOUND_CLASSES[match["class"].lower()]
        reading.add_elements(anions)
        reading.take(match.start(), match.end(), f"contains {', '.join(anions)}")


# "crystals of Si" are silicon; "alloys of Si" only contain it
_WHOLE = "crystals?|structures?|polymorphs?|allotropes?|phases?|forms?|versions?|candidates?"


def _elements(reading: _Reading) -> None:
    """Take "containing lithium", "of Ba, Ti and O", "Li-based", "only Na and Cl", "lithium"."""
    for match in reading.matches(
        rf"(?:\b(?i:containing|contains?|with|of|including)\s+)?(?:(?i:either)\s+)?{_LIST}\s*,?\s+(?i:or)\s+{_ELEMENT}",
        cased=True,
    ):
        reading.refuse(match.start(), match.end(), _ALTERNATIVE)
    only = (
        rf"\b(?i:only|nothing\s+but|solely)\s+(?i:the\s+elements\s+)?(?P<a>{_LIST})"
        rf"|(?P<b>{_LIST})\s+(?i:only|alone)\b"
    )
    holds = r"\b(?i:containing|contains?|with|includ(?:ing|es?)|having|incorporating)"
    made = (
        r"\b(?i:(?:made|composed|consisting|built)\s+(?:up\s+)?(?:of|from)|comprising|compounds?\s+of|"
        r"of|from|between)"
    )
    the = r"\s+(?:(?i:the|some|elements?|at\s+least|both)\s+)*"
    for match in reading.matches(rf"(?:{holds}\s+|{made}\s+)?(?:{only})", cased=True):
        _take_elements(reading, match, match["a"] or match["b"], only=True)
    for match in reading.matches(rf"{holds}{the}(?P<a>{_LIST})", cased=True):
        _take_elements(reading, match, match["a"], only=False)
    for match in reading.matches(rf"(?P<a>{_LIST})[\s-]+(?i:containing|based|rich|bearing)\b", cased=True):
        _take_elements(reading, match, match["a"], only=False)
    for match in reading.matches(rf"{made}{the}(?P<a>{_LIST})", cased=True):
        several = len(_symbols_in(match["a"])) + len(reading.elements) > 1
        is_all = several or bool(
            re.search(rf"\b(?:{_WHOLE})\s+$", reading.rest[: match.start()], re.IGNORECASE)
        )
        _take_elements(reading, match, match["a"], only=is_all)
    for match in reading.matches(rf"(?P<a>{_LIST})", cased=True):
        is_unit = match["a"] in RANK and re.search(r"\d\s*$", reading.rest[: match.start()])  # 300 K, 5 W
        if match["a"] not in SYMBOLS_THAT_ARE_WORDS and not is_unit:
            _take_elements(reading, match, match["a"], only=False)


def _take_elements(reading: _Reading, match: re.Match[str], names: str, *, only: bool) -> None:
    elements = _symbols_in(names)
    reading.add_elements(elements)
    reading.only_hard = reading.only_hard or only
    reading.take(match.start(), match.end(), f"{'only' if only else 'contains'} {', '.join(elements)}")


def _stability(reading: _Reading) -> None:
    """Take "stable", "metastable", "on the convex hull", "metallic"."""
    hull = "hull_distance_ev_per_atom"
    for pattern, name, asked in (
        (r"\bmeta-?stable\b", hull, METASTABLE),
        (rf"\b(?:thermodynamically\s+)?stable\b|\bon\s+{_HULL}\b", hull, STABLE),
        (r"\bmetallic\b", "band_gap_ev", Range.exactly(0.0)),
    ):
        for match in reading.matches(pattern):
            if re.match(r"\s+(?:to\s+)?within\b", reading.text[match.end() :]):  # "stable within 0.1 eV/atom"
                reading.take(match.start(), match.end(), "as far as the next words say")
                continue
            reading.take(match.start(), match.end(), reading.add_range(name, asked))


def _candidates(reading: _Reading) -> None:
    """Take "four candidates", "20" at the beginning, "a dozen"."""
    lead = (
        r"(?:(?:please|generate|give|me|us|make|create|find|build|design|suggest|propose|show|produce|predict|"
        r"i|we|want|would|like|need|to|see|a)\s+)*"
    )
    number = rf"(?P<n>\d[\d,]*|(?:{_alternatives(COUNT_WORDS)})(?:\s+(?:dozen|hundred|thousand)\b)?)"
    for pattern in (
        rf"(?<![\w.,-]){number}\s+(?:(?:[a-z-]+|{_TAKEN}+)\s+){{0,3}}?(?P<noun>(?:{CANDIDATE_NOUNS})\b)",
        rf"^\s*{lead}{number}(?=\s|$)",
        rf"\bn\s*=\s*{number}\b",
    ):
        for match in reading.matches(pattern):
            if reading.n is not None:
                continue
            reading.n = _number(match["n"])
            if reading.n < 1:
                raise ImpossibleRequest("0 candidates asked for; expected 1 or more.")
            start, end = match.span("n")
            noun = re.match(rf"\s+(?:{CANDIDATE_NOUNS})\b", reading.rest[end:], re.IGNORECASE)
            reading.take(
                start,
                end + (noun.end() if noun else 0),
                f"{reading.n} candidate{'s' if reading.n > 1 else ''}",
            )


def _leftovers(reading: _Reading) -> None:
    """Report what no rule took, less the words that mean nothing by themselves, with hints."""
    for stretch in re.finditer(r"[^\0,;!?()\n]+", reading.rest):
        words = [w for w in re.finditer(r"[^\s\"']+", stretch[0]) if re.search(r"\w", w[0])]
        kept = [w for w in words if w[0].strip(".:").lower() not in FILLERS]
        if not kept:
            continue
        start, end = stretch.start() + kept[0].start(), stretch.start() + kept[-1].end()
        phrase = " ".join(reading.text[start:end].split()).strip(" .:/-")
        reading.unclear.append((start, phrase))
        reading.notes += [
            f"'{part}': {hint}" for part, hint in _hints(phrase, [w[0].strip(".:") for w in kept])
        ]


def _hints(phrase: str, words: Sequence[str]) -> Iterable[tuple[str, str]]:
    """Yield (part of the phrase, what to do about it)."""
    known = [
        k
        for k in HINTS
        if re.search(rf"(?<!\w){re.escape(k)}(?!\w)".replace(r"\ ", r"[\s-]+"), phrase, re.IGNORECASE)
    ]
    for part in known:
        if not any(part != other and part in other for other in known):
            yield part, HINTS[part]
    for name in PROPERTIES:
        if re.search(_property_pattern(name), phrase, re.IGNORECASE):
            yield phrase, f"give a value, for example '{describe_property(name, Range(1.0, None))}'"
            return
    for word in words:
        if re.fullmatch(r"[a-z]+\d[a-z\d]*", word):
            yield word, "formulas are written with capitals, such as BaTiO3"
        elif len(word) >= 4 and not any(word.lower() in part for part in known):
            near = difflib.get_close_matches(word.lower().rstrip("s"), _VOCABULARY, n=1, cutoff=0.75)
            if near:
                yield word, f"did you mean '{near[0]}'?"


_VOCABULARY = tuple(
    dict.fromkeys(
        (*CRYSTAL_SYSTEMS, *ELEMENT_NAMES, *COMPOUND_CLASSES, *ELEMENT_COUNT_WORDS, *STRUCTURE_TYPE_WORDS,
         "stable", "metastable", "density", "bandgap", "modulus", "space group", "formation", "atoms",
         "containing", "candidates")
    )
)  # fmt: skip

_RULES: tuple[Callable[[_Reading], None], ...] = (
    _properties,
    _site_counts,
    _spacegroups,
    _exclusions,
    _structure_types,
    _formulas,
    _crystal_systems,
    _element_counts,
    _compounds,
    _elements,
    _stability,
    _candidates,
    _leftovers,
)


def _number(text: str) -> int:
    """Return the number of "12", "1,000", "four", "two dozen"."""
    value = 1
    for part in text.replace(",", "").lower().split():
        value *= int(part) if part.isdigit() else COUNT_WORDS[part]
    return value


def _symbols_in(names: str) -> list[str]:
    """Return the element symbols of a list of names and symbols, each once."""
    found = [m[0] for m in re.finditer(_ELEMENT, names)]
    return list(
        dict.fromkeys(ELEMENT_NAMES.get(name.lower(), name) if name not in RANK else name for name in found)
    )
