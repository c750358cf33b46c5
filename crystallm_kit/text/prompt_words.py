r"""The template words-1: plain English for language models, before the text of any format.

    Here is what is known of a crystal. The chemical formula is NaCl. The space group is Fm-3m (number 225).
    The band gap is 5.00 eV. Write its structure as a list of Wyckoff positions.

(on one line, then a newline). It states any subset of all conditions. Every part has several wordings; `rng`
picks them and the order of the sentences, without it the first wording and the order of SENTENCES stand. The
request names the format, so a template belongs to one: WordsTemplate(format="wyckoff"); its hash covers all
wordings and the format.

Two more tasks, both with the crystal's text in the prompt: which element every masked site holds, and what a
property is.

    In this crystal every site of one element is written [MASK].          Here is a crystal.
    [MASK]1 Cl1 225 ...                                                   Na1 Cl1 225 ...
    Which element is [MASK]?                                              What is its band gap in eV?
    Na                                                                    5.00 eV

Not here: what is known of a crystal (prompts.py), which tasks a corpus has (tokens/tasks.py).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np

from crystallm_kit.errors import ParseError, UnknownName
from crystallm_kit.records import PROPERTIES, Conditions, PropertyValue, Range
from crystallm_kit.structures.elements import RANK
from crystallm_kit.structures.spacegroups import spacegroup_symbol
from crystallm_kit.text.conditions import check_conditions, formula_text, parse_formula
from crystallm_kit.text.infilling import mask_element
from crystallm_kit.text.prompt_tokens import CRYSTAL_SYSTEMS
from crystallm_kit.text.template import sha256_of, value_within

# Format -> what the request calls it; "": a template that no format was named to.
FORMAT_WORDS = {
    "": "text",
    "cif": "a CIF file",
    "compact": "a list of cell lengths, cell angles, elements and coordinates",
    "wyckoff": "a list of Wyckoff positions",
    "xyz": "an extended XYZ file",
}
OPENINGS = (
    "Here is what is known of a crystal.",
    "A crystalline material is described in the following.",
    "Consider a crystal of this kind.",
)
FREE_OPENINGS = (
    "Any crystal will do.",
    "Think of some crystalline material.",
    "Nothing is asked of the crystal.",
)
REQUESTS = (
    "Write its structure as {}.",
    "Give the crystal structure as {}.",
    "Generate its structure as {}.",
)
# Property -> what it is called, and how many decimals are written.
PROPERTY_NAMES = {
    "formation_energy_ev_per_atom": ("formation energy", "formation energy per atom"),
    "hull_distance_ev_per_atom": ("energy above the convex hull", "hull distance"),
    "band_gap_ev": ("band gap", "electronic band gap"),
    "density_g_cm3": ("density", "mass density"),
    "bulk_modulus_gpa": ("bulk modulus",),
}
DECIMALS = {
    "formation_energy_ev_per_atom": 3,
    "hull_distance_ev_per_atom": 3,
    "band_gap_ev": 2,
    "density_g_cm3": 2,
    "bulk_modulus_gpa": 0,
}
_OF_PROPERTIES = (
    "The {} is {{value}} {}.",
    "Its {} is {{value}} {}.",
    "Known of it: {} {{value}} {}.",
)
# Condition -> its sentences. `only_elements` are the elements where no others may occur.
SENTENCES: dict[str, tuple[str, ...]] = {
    "formula": ("The chemical formula is {formula}.", "Its composition is {formula}.", "It is {formula}."),
    "only_elements": (
        "It consists of {elements} and of nothing else.",
        "Its only elements: {elements}.",
        "It is made of {elements} alone.",
    ),
    "elements": (
        "It contains {elements}.",
        "Among its elements: {elements}.",
        "It is a compound of {elements}, perhaps of others too.",
    ),
    "n_elements": ("The number of different elements is {count}.", "Different elements in it: {count}."),
    "anonymous_formula": ("Its stoichiometry is {anonymous}.", "Its anonymous formula is {anonymous}."),
    "n_sites": (
        "The number of atoms in the primitive cell is {count}.",
        "Atoms in its primitive cell: {count}.",
    ),
    "crystal_system": (
        "The crystal system is {system}.",
        "It is {system}.",
        "Its lattice is of the {system} system.",
    ),
    "spacegroup_number": (
        "The space group is {symbol} (number {number}).",
        "It crystallizes in space group {symbol}, number {number}.",
        "Its space group number is {number}.",
    ),
    **{
        name: tuple(form.format(word, PROPERTIES[name].unit) for word in words for form in _OF_PROPERTIES)
        for name, words in PROPERTY_NAMES.items()
    },
}
INFILL_PROMPTS = (
    ("In this crystal every site of one element is written [MASK].\n", "\nWhich element is [MASK]?\n"),
    (
        "In the following crystal [MASK] hides one element.\n",
        "\nName the element that [MASK] stands for.\n",
    ),
)
# The text stands between the two; {what} is a property, {unit} its unit.
PROPERTY_PROMPTS = (
    ("Here is a crystal.\n", "\nWhat is its {what} in {unit}?\n"),
    ("Consider this crystal structure.\n", "\nState the {what} of the crystal in {unit}.\n"),
)
CLASS_PROMPTS = {
    "is_metal": (
        ("Here is a crystal.\n", "\nIs it a metal?\n"),
        ("Consider this crystal structure.\n", "\nIs the crystal a metal or not a metal?\n"),
    ),
    "crystal_system": (
        ("Here is a crystal.\n", "\nWhat is its crystal system?\n"),
        ("Consider this crystal structure.\n", "\nTo which crystal system does it belong?\n"),
    ),
}
METAL_WORDS = {True: "metal", False: "not a metal"}
QUESTIONS = (*PROPERTY_NAMES, *CLASS_PROMPTS)

_T = TypeVar("_T")
_ELEMENT = "[A-Z][a-z]?"
_VALUES = {
    "formula": rf"(?:{_ELEMENT}\d*)+",
    "elements": rf"{_ELEMENT}(?:, {_ELEMENT})*(?: and {_ELEMENT})?",
    "count": r"\d+",
    "anonymous": r"(?:[A-Z]\d*)+",
    "system": "|".join(CRYSTAL_SYSTEMS),
    "symbol": r"\S+?",
    "number": r"\d{1,3}",
    "value": r"-?\d+(?:\.\d+)?",
}


@dataclass(frozen=True)
class WordsTemplate:
    """words-1; see the module's docstring.

    Attributes:
        format: Name of the text format that the request names.
        name: Key in TEMPLATES.
    """

    format: str = ""
    name: str = "words-1"
    begins_the_text: bool = False
    tasks: frozenset[str] = frozenset(("generate", "infill", "property"))

    def __post_init__(self) -> None:
        if self.format not in FORMAT_WORDS:
            raise UnknownName.among("representation", self.format, [name for name in FORMAT_WORDS if name])

    @cached_property
    def hash(self) -> str:
        """Return the sha256 of all wordings, units, decimals and the format."""
        return sha256_of(
            self.name, self.format, FORMAT_WORDS[self.format], OPENINGS, FREE_OPENINGS, REQUESTS, SENTENCES,
            DECIMALS, INFILL_PROMPTS, PROPERTY_PROMPTS, CLASS_PROMPTS, [*METAL_WORDS.values()],
        )  # fmt: skip

    @property
    def says(self) -> frozenset[str]:
        """Return the names of all conditions."""
        return frozenset(SENTENCES) - {"only_elements"}

    # ------------------------------------------------------------ generation

    def render(
        self,
        conditions: Conditions,
        rng: np.random.Generator | None = None,
        *,
        quantiles: Mapping[str, Sequence[float]] | None = None,
    ) -> str:
        """Return the prompt; see Template."""
        check_conditions(conditions)
        said = [
            _picked(SENTENCES[name], rng).format(**slots)
            for name, slots in _slots(conditions, rng, quantiles).items()
        ]
        if rng is not None:
            said = [said[i] for i in rng.permutation(len(said))]
        opening = _picked(OPENINGS if said else FREE_OPENINGS, rng)
        request = _picked(REQUESTS, rng).format(FORMAT_WORDS[self.format])
        return " ".join((opening, *said, request)) + "\n"

    def parse(self, prompt: str) -> Conditions:
        """Return the conditions of a prompt in any wording; render's inverse but for intervals, decimals."""
        rest = self._between_opening_and_request(prompt)
        said: dict[str, dict[str, str]] = {}
        while rest:
            for name, pattern in _PATTERNS:
                match = pattern.match(rest)
                if match and name not in said:
                    said[name] = match.groupdict()
                    rest = rest[match.end() :]
                    break
            else:
                raise ParseError("prompt", f"'{rest}': no sentence of template '{self.name}'")
        conditions = _conditions(said)
        check_conditions(conditions)
        return conditions

    def _between_opening_and_request(self, prompt: str) -> str:
        """Return the sentences of a prompt, each with a blank after it."""
        for request in REQUESTS:
            last = request.format(FORMAT_WORDS[self.format]) + "\n"
            if prompt.endswith(f" {last}"):
                rest = prompt.removesuffix(last)
                if rest.rstrip() in FREE_OPENINGS:
                    return ""
                opening = next((o for o in OPENINGS if rest.startswith(f"{o} ")), None)
                if opening is not None and len(rest) > len(opening) + 1:
                    return rest[len(opening) + 1 :]
        raise ParseError("prompt", f"'{prompt}': no generation prompt of template '{self.name}'")

    # ------------------------------------------------------------ infilling

    def infill_prompt(self, text: str, element: str, rng: np.random.Generator | None = None) -> str:
        """Return the prompt that asks which element stands where `element` stands in a crystal's text.

        Raises:
            UnknownName: If the text has no site of the element.
        """
        before, after = _picked(INFILL_PROMPTS, rng)
        return before + mask_element(text, element, self.format) + after

    def infill_answer(self, completion: str) -> str:
        """Return the element that a completion names in its first line.

        Raises:
            ParseError: If that is no element; reason "element".
        """
        answer = completion.strip().split("\n")[0].strip(" .")
        if answer not in RANK:
            raise ParseError("element", f"'{answer}': an element symbol expected", 1)
        return answer

    # ------------------------------------------------------------ properties

    def property_prompt(self, text: str, name: str, rng: np.random.Generator | None = None) -> str:
        """Return the prompt that asks for a property of the crystal of a text.

        Args:
            text: The crystal.
            name: A property of records.PROPERTIES, or is_metal, or crystal_system.
            rng: Picks the wording.

        Raises:
            UnknownName: If nothing of that name can be asked.
        """
        if name not in QUESTIONS:
            raise UnknownName.among("property to ask for", name, QUESTIONS)
        before, after = _picked(CLASS_PROMPTS.get(name, PROPERTY_PROMPTS), rng)
        if name in PROPERTIES:
            after = after.format(what=_picked(PROPERTY_NAMES[name], rng), unit=PROPERTIES[name].unit)
        return before + text + after

    def property_completion(self, name: str, value: PropertyValue) -> str:
        """Return the answer to `property_prompt`: "5.00 eV", "not a metal", "cubic"."""
        if name == "is_metal":
            return METAL_WORDS[bool(value)]
        return f"{_decimal(name, float(value))} {PROPERTIES[name].unit}" if name in PROPERTIES else str(value)

    def property_answer(self, completion: str, name: str) -> PropertyValue:
        """Return the value that a completion of `property_prompt` states in its first line.

        Returns:
            A number in the property's unit; True or False for is_metal; a crystal system.

        Raises:
            UnknownName: If nothing of that name can be asked.
            ParseError: If the line is no answer to the question; reason "property".
        """
        if name not in QUESTIONS:
            raise UnknownName.among("property to ask for", name, QUESTIONS)
        answer = completion.strip().split("\n")[0].strip(" ")
        if name in PROPERTIES:
            match = re.fullmatch(rf"({_VALUES['value']}) {re.escape(PROPERTIES[name].unit)}\.?", answer)
            if match:
                return float(match[1])
            expected = f"a number and {PROPERTIES[name].unit}"
        elif name == "is_metal":
            for value, words in METAL_WORDS.items():
                if answer.rstrip(".") == words:
                    return value
            expected = " or ".join(METAL_WORDS.values())
        else:
            if answer.rstrip(".") in CRYSTAL_SYSTEMS:
                return answer.rstrip(".")
            expected = "a crystal system"
        raise ParseError("property", f"'{answer}': {expected} expected", 1)


def _picked(choices: Sequence[_T], rng: np.random.Generator | None) -> _T:
    return choices[0 if rng is None else int(rng.integers(len(choices)))]


def _slots(
    c: Conditions, rng: np.random.Generator | None, quantiles: Mapping[str, Sequence[float]] | None
) -> dict[str, dict[str, str]]:
    """Return key in SENTENCES -> its slots, for the conditions that are set."""
    found: dict[str, dict[str, str]] = {}
    if c.formula:
        found["formula"] = {"formula": formula_text(c.formula)}
    if c.elements:
        listed = " and ".join(filter(None, (", ".join(c.elements[:-1]), c.elements[-1])))
        found["only_elements" if c.only_elements else "elements"] = {"elements": listed}
    if c.n_elements is not None:
        found["n_elements"] = {"count": str(c.n_elements)}
    if c.anonymous_formula is not None:
        found["anonymous_formula"] = {"anonymous": c.anonymous_formula}
    if c.n_sites is not None:
        found["n_sites"] = {"count": str(c.n_sites)}
    if c.crystal_system is not None:
        found["crystal_system"] = {"system": c.crystal_system}
    if (number := c.spacegroup_number) is not None:
        found["spacegroup_number"] = {"number": str(number), "symbol": spacegroup_symbol(number)}
    for name in PROPERTY_NAMES:
        if name in c.properties:
            value = value_within(name, c.properties[name], rng, quantiles=quantiles)
            found[name] = {"value": _decimal(name, value)}
    return found


def _conditions(said: Mapping[str, Mapping[str, str]]) -> Conditions:
    """Return the conditions of slots; the inverse of `_slots`."""

    def slot(name: str, key: str) -> str | None:
        return said[name][key] if name in said else None

    def number(name: str, key: str) -> int | None:
        return int(said[name][key]) if name in said else None

    if {"only_elements", "elements"} <= set(said):
        raise ParseError("prompt", "elements are stated twice")
    group = said.get("spacegroup_number", {})
    if group.get("symbol") and spacegroup_symbol(int(group["number"])) != group["symbol"]:
        raise ParseError("prompt", f"space group {group['symbol']} is not number {group['number']}")
    elements = slot("only_elements", "elements") or slot("elements", "elements") or ""
    formula = slot("formula", "formula")
    return Conditions(
        formula=parse_formula(formula) if formula else None,
        elements=tuple(re.findall(_ELEMENT, elements)),
        only_elements="only_elements" in said,
        n_elements=number("n_elements", "count"),
        anonymous_formula=slot("anonymous_formula", "anonymous"),
        spacegroup_number=number("spacegroup_number", "number"),
        crystal_system=slot("crystal_system", "system"),
        n_sites=number("n_sites", "count"),
        properties={
            name: Range.exactly(_said_value(name, said[name]["value"]))
            for name in PROPERTY_NAMES
            if name in said
        },
    )


def _decimal(name: str, value: float) -> str:
    text = f"{value:.{DECIMALS[name]}f}"
    return text.lstrip("-") if float(text) == 0 else text


def _said_value(name: str, text: str) -> float:
    """Return the value; what only rounding carried over the edge of the property's range is its edge."""
    value, known = float(text), PROPERTIES[name]
    inside = min(max(value, known.low), known.high)
    return inside if abs(value - inside) <= 0.5 * 10.0 ** -DECIMALS[name] else value


def _pattern(sentence: str) -> re.Pattern[str]:
    """Return what matches a sentence and the blank after it, its slots as named groups."""
    parts = re.split(r"\{(\w+)\}", sentence)
    found = [f"(?P<{part}>{_VALUES[part]})" if i % 2 else re.escape(part) for i, part in enumerate(parts)]
    return re.compile("".join(found) + " ")


# crystal systems before formulas: both can follow "It is"
_PATTERNS = [(name, _pattern(sentence)) for name in reversed(SENTENCES) for sentence in SENTENCES[name]]
