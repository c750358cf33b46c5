"""Conditions as people write them in options and requests: read, checked against each other, described.

    parse_conditions(formula="BaTiO3", spacegroup="Pm-3m", properties={"band_gap": ">2"})
    describe(...) == "BaTiO3; space group Pm-3m (221); band gap at least 2 eV"

What comes in is either a valid Conditions or an error that names the option, what it got and what it expects.
Units: those of records.PROPERTIES; others are converted (meV, MPa, kbar, kg/m3).

Not here: free text (words.py); how a model is told (prompts.py); whether Wyckoff positions add up to a
composition (tokens/masking.py).
"""

import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

from crystallm_kit.errors import ImpossibleRequest, UnknownName, UserError, did_you_mean
from crystallm_kit.records import PROPERTIES, Conditions, Property, Range
from crystallm_kit.structures.elements import ELEMENTS, RANK
from crystallm_kit.structures.spacegroups import spacegroup_number, spacegroup_symbol
from crystallm_kit.structures.symmetry import crystal_system
from crystallm_kit.text.prompt_tokens import CRYSTAL_SYSTEMS, PROPERTY_WORDS

NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
UNIT = (
    r"(?:m?eV(?:\s*(?:/|per\s)\s*atom)?|[GM]Pa|kbar|k?g\s*(?:/|per\s)\s*c?m\s*\^?3|k?g\s*c?m\s*\^?-3|g/cc)"
    r"(?![A-Za-z0-9])"
)
_AT_LEAST = (
    r"(?:>=|>|(?:greater|more|larger|higher|bigger|wider)\s+than(?:\s+or\s+equal\s+to)?|(?:not|no)\s+(?:less|below|lower|"
    r"smaller)(?:\s+than)?|above|over|at\s+least|exceeding|minimum|min)"
)
_AT_MOST = (
    r"(?:<=|<|(?:less|smaller|lower|fewer|narrower)\s+than(?:\s+or\s+equal\s+to)?|(?:not|no)\s+(?:more|above|higher|"
    r"greater|larger|over)(?:\s+than)?|below|under|at\s+most|up\s+to|within|maximum|max)"
)
_ABOUT = r"(?:~|≈|around|about|approximately|approx\.?|roughly|near|close\s+to|circa|ca\.)"
_EXACT = r"(?:=|==|:|of|is|equal\s+to|equals|exactly)"
# One quantity as people write it: "above 2 eV", ">= 2", "between 2 and 3 eV", "2-3 eV", "2 eV or more", "2".
RANGE = (
    rf"(?:(?:between\s+)(?P<low1>{NUMBER})\s*(?P<unit1>{UNIT})?\s*(?:and|to|-)\s*(?P<high1>{NUMBER})\s*(?P<unit2>{UNIT})?"
    rf"|(?:from\s+)?(?P<low2>{NUMBER})\s*(?P<unit3>{UNIT})?\s*(?:to|\.\.|-)\s*(?P<high2>{NUMBER})\s*(?P<unit4>{UNIT})?"
    rf"|(?:(?P<least>{_AT_LEAST})|(?P<most>{_AT_MOST})|(?P<about>{_ABOUT})|{_EXACT})?\s*"
    rf"(?P<value>{NUMBER})\s*(?P<unit5>{UNIT})?"
    r"(?:\s*(?:(?P<after_least>or\s+(?:more|above|higher|greater|larger)|and\s+above(?!\s*[-\d.]))|"
    r"(?P<after_most>or\s+(?:less|below|lower|smaller)|and\s+below(?!\s*[-\d.]))))?)"
)
_ABOUT_SHARE = 0.1  # "about 2 eV" is 1.8 to 2.2 eV
_FACTORS = {
    "eV/atom": {"ev/atom": 1.0, "ev": 1.0, "mev/atom": 1e-3, "mev": 1e-3},
    "eV": {"ev": 1.0, "mev": 1e-3},
    "g/cm3": {"g/cm3": 1.0, "gcm-3": 1.0, "g/cc": 1.0, "kg/m3": 1e-3, "kgm-3": 1e-3},
    "GPa": {"gpa": 1.0, "mpa": 1e-3, "kbar": 0.1},
}
_ANONYMOUS = re.compile(r"(?:[A-Z]\d{0,6})+")


# ---------------------------------------------------------------- reading


def plain_text(text: str) -> str:
    """Return text with plain subscripts, dashes and comparison signs ("TiO₂, ≥ 2" -> "TiO2, >= 2")."""
    text = unicodedata.normalize("NFKC", text)
    for old, new in (("\u2212", "-"), ("\u2013", "-"), ("\u2014", "-"), ("\u2010", "-"), ("\u2011", "-"),
                     ("≥", ">="), ("⩾", ">="), ("≤", "<="), ("⩽", "<="), ("’", "'")):  # fmt: skip
        text = text.replace(old, new)
    return text


def parse_formula(text: str) -> dict[str, int]:
    """Return element -> count of a formula, in the order written: "Ca(OH)2" is {Ca: 1, O: 2, H: 2}.

    Args:
        text: A formula with whole-number counts; blanks between parts, brackets and subscripts are read.

    Raises:
        UnknownName: If a symbol is no element; names the nearest.
        ImpossibleRequest: If a count is zero or no whole number.
        UserError: If it is no formula.
    """
    plain = plain_text(text).strip()
    if len(plain) > 200:
        raise UserError(f"formula of {len(plain)} characters; at most 200 are read.")
    if re.search(r"\d\.\d", plain):
        raise ImpossibleRequest(
            f"formula '{text}': counts must be whole numbers; multiply them until they are."
        )
    stack: list[dict[str, int]] = [{}]
    position = 0
    for match in re.finditer(r"([A-Z][a-z]?)(\d*)\s*|([(\[])\s*|([)\]])(\d*)\s*", plain):
        symbol, count, opening, closing, times = match.groups()
        if match.start() != position or (closing and len(stack) == 1):
            break
        position = match.end()
        factor = int(count or times or 1)
        if factor == 0:
            raise ImpossibleRequest(
                f"formula '{text}': a count of 0 at '{match[0].strip()}'; leave the part out."
            )
        if opening:
            stack.append({})
            continue
        if symbol and symbol not in RANK:
            raise UnknownName(f"formula '{text}': no element '{symbol}'{_nearest_element(symbol)}")
        for element, n in ({symbol: 1} if symbol else stack.pop()).items():
            stack[-1][element] = stack[-1].get(element, 0) + n * factor
    if position != len(plain) or len(stack) != 1 or not stack[0]:
        raise UserError(
            f"formula '{text}': cannot read '{plain[position:] or plain}'; "
            "expected symbols and counts such as BaTiO3."
        )
    return stack[0]


def _nearest_element(symbol: str) -> str:
    near = [e for e in (symbol[:1], symbol.capitalize()) if e in RANK] or [
        e for e in ELEMENTS if e[0] == symbol[:1]
    ]
    return f"; did you mean '{near[0]}'?" if near else "."


def parse_elements(text: str | Sequence[str]) -> tuple[tuple[str, ...], bool]:
    """Return the elements of "Li,O" (must occur) or "Li-O" (nothing else may), and whether nothing else may.

    Raises:
        UnknownName: If a symbol is no element; names the nearest.
    """
    only = isinstance(text, str) and "-" in plain_text(text)
    parts = re.split(r"[\s,;+-]+", plain_text(text).strip()) if isinstance(text, str) else list(text)
    elements = tuple(dict.fromkeys(part for part in parts if part))
    for element in elements:
        if element not in RANK:
            raise UnknownName(
                f"no element '{element}'{_nearest_element(element)} Give symbols, such as Li,O."
            )
    if not elements:
        raise UserError(f"no elements in '{text}'; give symbols, such as Li,O.")
    return elements, only


def property_named(name: str) -> Property:
    """Return the property with this name or alias ("band_gap", "Band gap", "e_above_hull").

    Raises:
        UnknownName: If there is none; names the nearest.
    """
    key = re.sub(r"[\s-]+", "_", name.strip()).lower()
    for known in PROPERTIES.values():
        if key == known.name or key in known.aliases:
            return known
    names = [alias for known in PROPERTIES.values() for alias in (known.name, *known.aliases)]
    raise UnknownName(f"no property '{name}'{did_you_mean(key, names)} Known: {', '.join(PROPERTIES)}.")


def parse_range(text: str | float, wanted: Property) -> Range:
    """Return what is wanted of a property: ">2", "<= 50 meV", "between 2 and 3 eV", "2..3", "about 2", "2".

    A value without unit is in the property's own. "about" means within 10 %.

    Raises:
        UserError: If it cannot be read, or the unit belongs to another quantity.
        ImpossibleRequest: If low is above high, or nothing of it lies in the property's range.
    """
    plain = plain_text(str(text)).strip()
    match = re.fullmatch(RANGE, plain, flags=re.IGNORECASE)
    if match is None:
        raise UserError(
            f"{wanted.name}: cannot read '{text}'; expected a number or a comparison such as >2, <=0.1, 2..3."
        )
    found = range_of(match, wanted)
    check_range(wanted, found)
    return found


def range_of(match: re.Match[str], wanted: Property) -> Range:
    """Return the range that a match of RANGE stands for, in the property's unit. Raises UserError (unit)."""
    group = match.groupdict()
    if group["value"] is None:
        low, high = group["low1"] or group["low2"], group["high1"] or group["high2"]
        low_unit, high_unit = group["unit1"] or group["unit3"], group["unit2"] or group["unit4"]
        return Range(
            _converted(low, low_unit or high_unit, wanted), _converted(high, high_unit or low_unit, wanted)
        )
    value = _converted(group["value"], group["unit5"], wanted)
    if group["least"] or group["after_least"]:
        return Range(value, None)
    if group["most"] or group["after_most"]:
        return Range(None, value)
    if group["about"]:
        width = _ABOUT_SHARE * abs(value)
        return Range(value - width, value + width)
    return Range.exactly(value)


def _converted(number: str, unit: str | None, wanted: Property) -> float:
    if not unit:
        return float(number)
    factors = _FACTORS[wanted.unit]
    key = re.sub(r"\s|\^", "", re.sub(r"\bper\b", "/", unit)).lower()
    if key not in factors:
        raise UserError(
            f"{wanted.name} is in {wanted.unit}, got '{number} {unit}'; known units: {', '.join(factors)}."
        )
    return round(float(number) * factors[key], 12)


# ---------------------------------------------------------------- from options


def parse_conditions(
    formula: str | None = None,
    elements: str | Sequence[str] | None = None,
    *,
    spacegroup: str | int | None = None,
    sites: str | int | None = None,
    properties: Mapping[str, str | float] | Iterable[str] | None = None,
    only_elements: bool | None = None,
) -> Conditions:
    """Return Conditions from the strings of a command line or a request.

    Args:
        formula: "BaTiO3".
        elements: "Li,O" or ["Li", "O"] (must occur), "Li-O" (nothing else may occur).
        spacegroup: Number or Hermann-Mauguin symbol.
        sites: Atoms in the primitive cell.
        properties: Name -> value or comparison, or entries "name=value", "name>value". Names are those of
            records.PROPERTIES and their aliases, and besides: crystal_system, n_elements, anonymous_formula.
        only_elements: Overrides what the form of `elements` says.

    Raises:
        UserError: Any of its kinds; the message begins with the option at fault.
    """
    given: dict[str, Any] = {}
    if formula is not None:
        given["formula"] = _option("formula", parse_formula, formula)
    if elements is not None:
        given["elements"], only = _option("elements", parse_elements, elements)
        given["only_elements"] = only if only_elements is None else only_elements
    if spacegroup is not None:
        given["spacegroup_number"] = _option("spacegroup", spacegroup_number, spacegroup)
    if sites is not None:
        given["n_sites"] = _option("sites", _whole_number, sites)
    wanted: dict[str, Range] = {}
    for name, value in _named_values(properties or {}):
        if name == "crystal_system":
            given[name] = _option(f"condition {name}", _system, value)
        elif name == "n_elements":
            given[name] = _option(f"condition {name}", _whole_number, value)
        elif name == "anonymous_formula":
            given[name] = _option(f"condition {name}", canonical_anonymous, str(value))
        else:
            known = _option("condition", property_named, name)
            wanted[known.name] = _option("condition", lambda v, p=known: parse_range(v, p), value)
    conditions = Conditions(**given, properties=wanted)
    check_conditions(conditions)
    return conditions


# Key of a JSON object -> argument of parse_conditions, or where it is none, the name of its field.
_KEYS = {
    "formula": "formula",
    "elements": "elements",
    "only_elements": "only_elements",
    "spacegroup": "spacegroup",
    "spacegroup_number": "spacegroup",
    "sites": "sites",
    "n_sites": "sites",
    "crystal_system": "properties",
    "n_elements": "properties",
    "anonymous_formula": "properties",
    "properties": "properties",
}


def conditions_to_dict(conditions: Conditions) -> dict[str, Any]:
    """Return the conditions that are set, as JSON-ready data; `conditions_from_dict` reads it."""
    data = {k: v for k, v in asdict(conditions).items() if v not in (None, (), False, {})}
    if "formula" in data:
        data["formula"] = dict(data["formula"])
    return data


def conditions_from_dict(data: Mapping[str, Any]) -> Conditions:
    """Return Conditions from a JSON object, as programs send it; null is the same as left out.

    Args:
        data: formula ("BaTiO3" or {"Ba": 1, ...}), elements ("Li-O" or ["Li", "O"]), only_elements,
            spacegroup or spacegroup_number, sites or n_sites, crystal_system, n_elements, anonymous_formula,
            properties (name -> number, "2..3", ">2" or {"low": 2, "high": 3}).

    Raises:
        UserError: Any of its kinds; the message names the key at fault.
    """
    given: dict[str, Any] = {}
    properties: dict[str, Any] = {}
    for key, value in data.items():
        if key not in _KEYS:
            raise UnknownName.among("condition", str(key), _KEYS)
        if value is None:
            continue
        if _KEYS[key] != "properties":
            if _KEYS[key] in given:
                raise UserError(f"{key}: given twice, under two names; give it once.")
            given[_KEYS[key]] = _PLAIN[_KEYS[key]](key, value)
        elif key != "properties":
            properties[key] = _plain(key, value, (str, int))
        else:
            for name, wanted in _plain(key, value, Mapping).items():
                properties[str(name)] = _range_words(f"{key}: {name}", wanted)
    return parse_conditions(**given, properties=properties)


def _plain(key: str, value: Any, kinds: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise UserError(f"{key}: got {value!r}; expected {_KINDS[kinds]}.")
    return value


_KINDS: dict[Any, str] = {
    str: "a text",
    Mapping: "an object",
    (str, int): "a whole number or a text",
    (int, float): "a number",
}


def _formula_words(key: str, value: Any) -> str:
    if not isinstance(value, Mapping):
        return str(_plain(key, value, str))
    for element, count in value.items():
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count < 10**6:
            raise UserError(f"{key}: {element}: got {count!r}; expected a count of 1 or more.")
        if element not in RANK:
            raise UnknownName(f"{key}: no element '{element}'{_nearest_element(str(element))}")
    return "".join(f"{element}{count}" for element, count in value.items())


def _elements_words(key: str, value: Any) -> Any:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [str(_plain(key, element, str)) for element in value] or None
    return _plain(key, value, str)


def _truth(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"{key}: got {value!r}; expected true or false.")
    return value


def _range_words(key: str, value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value if isinstance(value, str) else _plain(key, value, (int, float))
    if not value or set(value) - {"low", "high"}:
        raise UserError(f"{key}: got {dict(value)!r}; expected low, high or both.")
    low, high = (
        None if value.get(side) is None else float(_plain(key, value[side], (int, float)))
        for side in ("low", "high")
    )
    if low is None and high is None:
        raise UserError(f"{key}: neither low nor high is given.")
    return f">={low!r}" if high is None else f"<={high!r}" if low is None else f"{low!r}..{high!r}"


_PLAIN: dict[str, Any] = {
    "formula": _formula_words,
    "elements": _elements_words,
    "only_elements": _truth,
    "spacegroup": lambda key, value: _plain(key, value, (str, int)),
    "sites": lambda key, value: _plain(key, value, (str, int)),
}


def _named_values(properties: Mapping[str, str | float] | Iterable[str]) -> Iterable[tuple[str, str | float]]:
    if isinstance(properties, Mapping):
        yield from properties.items()
        return
    for entry in properties:
        match = re.fullmatch(
            r"\s*([A-Za-z_][\w -]*?)\s*((?:[<>]=?|~|=).*)", plain_text(entry), flags=re.DOTALL
        )
        if match is None:
            raise UserError(f"condition '{entry}': expected name=value or name>value, such as band_gap>2.")
        yield match[1], match[2].removeprefix("=").strip()


def _option(name: str, read: Any, value: Any) -> Any:
    """Return read(value); an error gets the option's name in front."""
    try:
        return read(value)
    except UserError as error:
        raise type(error)(f"{name}: {error}") from error


def _whole_number(value: str | int) -> int:
    if not re.fullmatch(r"\d{1,9}", str(value).strip()):
        raise UserError(f"got '{value}'; expected a whole number.")
    return int(value)


def _system(value: str) -> str:
    name = {"rhombohedral": "trigonal"}.get(value.lower(), value.lower())
    if name not in CRYSTAL_SYSTEMS:
        raise UnknownName.among("crystal system", value, CRYSTAL_SYSTEMS)
    return name


# ---------------------------------------------------------------- stoichiometry


def reduced_formula(formula: Mapping[str, int]) -> dict[str, int]:
    """Return the counts divided by their greatest common divisor, in the same order."""
    divisor = math.gcd(*formula.values())
    return {element: n // divisor for element, n in formula.items()}


def formula_text(formula: Mapping[str, int]) -> str:
    """Return "BaTiO3" for {Ba: 1, Ti: 1, O: 3}."""
    return "".join(f"{element}{n if n > 1 else ''}" for element, n in formula.items())


def anonymous_of(counts: Iterable[int]) -> str:
    """Return the anonymous formula of counts, as pymatgen's `anonymized_formula`: (1, 3, 1) is ABC3."""
    ordered = sorted(counts)
    divisor = math.gcd(*ordered)
    return "".join(f"{chr(ord('A') + i)}{n // divisor if n > divisor else ''}" for i, n in enumerate(ordered))


def anonymous_counts(anonymous: str) -> tuple[int, ...]:
    """Return the counts of an anonymous formula: ABC3 is (1, 1, 3). Raises UserError."""
    if not _ANONYMOUS.fullmatch(anonymous):
        raise UserError(f"anonymous formula '{anonymous}': expected letters and counts such as ABC3.")
    parts = re.findall(r"([A-Z])(\d*)", anonymous)
    counts = tuple(int(n or 1) for _, n in parts)
    if len({letter for letter, _ in parts}) != len(parts) or 0 in counts:
        raise UserError(
            f"anonymous formula '{anonymous}': expected each letter once, with a count of 1 or more."
        )
    return counts


def canonical_anonymous(anonymous: str) -> str:
    """Return an anonymous formula in the kit's order: A2B is AB2, ABX3 is ABC3. Raises UserError."""
    return anonymous_of(anonymous_counts(anonymous.strip()))


# ---------------------------------------------------------------- checking


def check_conditions(conditions: Conditions) -> None:
    """Raise if the conditions contradict each other or themselves.

    Raises:
        UnknownName: An element, crystal system, space group or property that does not exist.
        ImpossibleRequest: A count below 1, a property out of its range, two conditions that no crystal meets.
    """
    c = conditions
    for element in (*c.elements, *(c.formula or ())):
        if element not in RANK:
            raise UnknownName(f"no element '{element}'{_nearest_element(element)}")
    for name, value in (("n_elements", c.n_elements), ("n_sites", c.n_sites)):
        if value is not None and value < 1:
            raise ImpossibleRequest(f"{name} is {value}; expected 1 or more.")
    if c.formula is not None and (not c.formula or min(c.formula.values()) < 1):
        raise ImpossibleRequest(
            f"formula {dict(c.formula)}: expected at least one element, each count 1 or more."
        )
    if c.crystal_system is not None and c.crystal_system not in CRYSTAL_SYSTEMS:
        raise UnknownName.among("crystal system", c.crystal_system, CRYSTAL_SYSTEMS)
    if c.spacegroup_number is not None:
        symbol, system = spacegroup_symbol(c.spacegroup_number), crystal_system(c.spacegroup_number)
        if c.crystal_system not in (None, system):
            raise ImpossibleRequest(
                f"space group {symbol} ({c.spacegroup_number}) is {system}, not {c.crystal_system}; drop one."
            )
    _check_stoichiometry(c)
    for name, wanted in c.properties.items():
        if name not in PROPERTIES:
            raise UnknownName.among("property", name, PROPERTIES)
        check_range(PROPERTIES[name], wanted)


def _check_stoichiometry(c: Conditions) -> None:
    """Raise ImpossibleRequest if composition, elements and numbers of them do not fit together."""
    counts = anonymous_counts(c.anonymous_formula) if c.anonymous_formula else None
    if c.formula:
        missing = [element for element in c.elements if element not in c.formula]
        other = [element for element in c.formula if element not in c.elements]
        if missing or (c.only_elements and c.elements and other):
            raise ImpossibleRequest(
                f"formula {formula_text(c.formula)} does not have exactly the elements asked for: "
                f"{', '.join(missing or other)} {'missing' if missing else 'too many'}."
            )
        found = anonymous_of(c.formula.values())
        if counts and found != anonymous_of(counts):
            raise ImpossibleRequest(
                f"formula {formula_text(c.formula)} is {found}, not {c.anonymous_formula}; drop one."
            )
        counts = tuple(reduced_formula(c.formula).values())
    n_known = len(counts) if counts else None
    if c.elements and c.only_elements and n_known is None:
        n_known = len(c.elements)
    if n_known is not None and c.n_elements not in (None, n_known):
        raise ImpossibleRequest(
            f"{n_known} different elements and n_elements {c.n_elements}; drop one of the two."
        )
    n_elements = n_known or c.n_elements
    if n_elements is not None and (
        len(c.elements) > n_elements or (c.only_elements and c.elements and len(c.elements) < n_elements)
    ):
        raise ImpossibleRequest(
            f"elements {', '.join(c.elements)}, but {n_elements} different elements asked for."
        )
    if counts and c.n_sites is not None and c.n_sites % (sum(counts) // math.gcd(*counts)):
        unit = sum(counts) // math.gcd(*counts)
        raise ImpossibleRequest(f"{c.n_sites} atoms are no multiple of the {unit} of {anonymous_of(counts)}.")


def check_range(wanted: Property, asked: Range) -> None:
    """Raise ImpossibleRequest if a range is empty or nothing of it lies within the property's own."""
    low, high = asked.low, asked.high
    bad = any(v is not None and not math.isfinite(v) for v in (low, high))
    if bad or (low is not None and high is not None and low > high):
        raise ImpossibleRequest(f"{wanted.name}: no value lies between {low} and {high}.")
    if (low is not None and low > wanted.high) or (high is not None and high < wanted.low):
        raise ImpossibleRequest(
            f"{wanted.name}: {range_text(asked)} {wanted.unit} is out of range; "
            f"{wanted.low:g} to {wanted.high:g} {wanted.unit} can be asked for."
        )


def combined(words: Conditions, given: Conditions) -> Conditions:
    """Return both; where they name the same condition, `given` wins. The result is not checked."""
    nothing = Conditions()
    changes = {
        f.name: getattr(given, f.name)
        for f in fields(Conditions)
        if getattr(given, f.name) != getattr(nothing, f.name)
    }
    if given.elements:
        changes["only_elements"] = given.only_elements
    return replace(words, **{**changes, "properties": {**words.properties, **given.properties}})


# ---------------------------------------------------------------- describing


def range_text(asked: Range) -> str:
    """Return "2", "at least 2", "at most 2", "2 to 3" or "any"."""
    if asked.low is None and asked.high is None:
        return "any"
    if asked.low is None:
        return f"at most {asked.high:g}"
    if asked.high is None:
        return f"at least {asked.low:g}"
    return f"{asked.low:g}" if asked.low == asked.high else f"{asked.low:g} to {asked.high:g}"


def describe(conditions: Conditions) -> str:
    """Return the conditions as one line of English, "any crystal" if there are none."""
    c = conditions
    parts: list[str] = []
    if c.formula:
        parts.append(formula_text(c.formula))
    if c.elements:
        parts.append(f"{'only' if c.only_elements else 'contains'} {', '.join(c.elements)}")
    if c.n_elements is not None:
        parts.append(f"{c.n_elements} different element{'s' if c.n_elements > 1 else ''}")
    if c.anonymous_formula:
        parts.append(f"stoichiometry {c.anonymous_formula}")
    if c.spacegroup_number is not None:
        parts.append(f"space group {spacegroup_symbol(c.spacegroup_number)} ({c.spacegroup_number})")
    if c.crystal_system:
        parts.append(c.crystal_system)
    if c.n_sites is not None:
        parts.append(f"{c.n_sites} atom{'s' if c.n_sites > 1 else ''} in the primitive cell")
    parts += [describe_property(name, asked) for name, asked in c.properties.items()]
    return "; ".join(parts) or "any crystal"


def describe_property(name: str, asked: Range) -> str:
    """Return "band gap at least 2 eV"."""
    known = PROPERTIES[name]
    return f"{PROPERTY_WORDS[name].replace('_', ' ')} {range_text(asked)} {known.unit}"


def conditions_set(conditions: Conditions) -> tuple[str, ...]:
    """Return the names of what is asked for: fields of Conditions that are set, and property names."""
    named = [
        f.name
        for f in fields(Conditions)
        if f.name not in ("properties", "only_elements") and getattr(conditions, f.name)
    ]
    return (*named, *conditions.properties)
