r"""Prompts: Conditions as the text that stands before a crystal, one template per kind of model.

The same template renders for training and for generation, and its hash is stored with the model; a server
refuses a model whose template it does not have. The templates:

kit-1, for the `wyckoff` format (tokens in prompt_tokens.py). The conditions that are set, in this order, then
`crystal` and a newline; "crystal\n" alone asks for any crystal:

    elements=BaTiO n_elements=3 anonymous=1 1 3 sites=5 system=cubic density=5.85 spacegroup=221\ncrystal\n

    elements=BaTiO    these and no others; contains=BaTiO: these among others. By increasing electronegativity
    n_elements=3      how many different elements
    anonymous=1 1 3   counts of the reduced formula, increasing: ABC3
    sites=5           atoms in the primitive cell, 1-99
    system=cubic      crystal system
    formation_energy= hull_distance= band_gap= density= bulk_modulus=   two decimals, units of records.py
    spacegroup=221    with its newline

A formula is not rendered: with the space group it is the beginning of the crystal's own text
("Ba1 Ti1 O3 221\n"), which the sampler forces there.

crystal-text-llm, for the `compact` format: English sentences; and infilling (Gruver et al. 2024,
arXiv:2402.04379).
cif-crystallm, for the `cif` format: the first lines of the CIF (Antunes et al. 2024,
doi:10.1038/s41467-024-54639-7). cif-crystallm-pi: the same in its dialect "pi".

Not here: free text and options (words.py, conditions.py); forcing the text's beginning (tokens/masking.py).
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from pymatgen.core import Element, Structure

from crystallm_kit.errors import ImpossibleRequest, ParseError, UnknownName
from crystallm_kit.records import PROPERTIES, Conditions, Crystal, Range
from crystallm_kit.structures.elements import ELEMENTS, RANK, density_g_cm3
from crystallm_kit.structures.spacegroups import spacegroup_number, spacegroup_symbol
from crystallm_kit.structures.symmetry import crystal_system, space_group
from crystallm_kit.text.conditions import (
    anonymous_counts,
    anonymous_of,
    check_conditions,
    check_range,
    conditions_set,
    formula_text,
    parse_formula,
    reduced_formula,
)
from crystallm_kit.text.prompt_tokens import (
    CRYSTAL_SYSTEMS,
    ELEMENTS_END,
    KIT_TEMPLATE_TOKENS,
    PROMPT_END,
    PROPERTY_WORDS,
)

MAX_COUNT = 99  # the largest count that has a token

# Quantiles at 0, 5, ... 100 %, for models that bring none of their training data: Materials Project entries
# (17,738 with energies and density, 6,433 with a band gap) and 3,433 AFLOW bulk moduli.
REFERENCE_QUANTILES: dict[str, tuple[float, ...]] = {
    "formation_energy_ev_per_atom": (
        -4.47, -3.21, -2.87, -2.61, -2.38, -2.15, -1.93, -1.72, -1.51, -1.32, -1.1,
        -0.94, -0.81, -0.69, -0.59, -0.51, -0.42, -0.34, -0.25, -0.09, 5.15,
    ),
    "hull_distance_ev_per_atom": (*(0.0,) * 12, 0.01, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.21, 5.15),
    "band_gap_ev": (*(0.0,) * 15, 0.4, 1.05, 1.71, 2.44, 3.65, 7.94),
    "density_g_cm3": (
        0.15, 2.18, 2.65, 3.04, 3.39, 3.72, 4.04, 4.36, 4.7, 5.03, 5.38,
        5.75, 6.17, 6.58, 7.02, 7.49, 8.04, 8.64, 9.43, 10.89, 21.97,
    ),
    "bulk_modulus_gpa": (
        1.0, 21.0, 33.0, 43.0, 52.0, 58.0, 65.0, 73.0, 80.0, 88.0, 98.0,
        107.0, 116.0, 126.0, 137.0, 150.0, 165.0, 180.0, 200.0, 234.0, 407.0,
    ),
}  # fmt: skip


class Template(Protocol):
    """One way of writing conditions for a model.

    Attributes:
        name: Key in TEMPLATES.
        hash: sha256 of everything that decides what the prompts look like and mean.
        says: Names of the conditions (fields of Conditions, properties) that it can write.
        begins_the_text: True: the prompt is the beginning of the crystal's own text, and is not written
            before it in training. False: prompt and text follow each other.
    """

    @property
    def name(self) -> str:
        """Return the key in TEMPLATES."""

    @property
    def begins_the_text(self) -> bool:
        """Return whether the prompt is the beginning of the crystal's own text."""

    @property
    def hash(self) -> str:
        """Return the template's identity."""

    @property
    def says(self) -> frozenset[str]:
        """Return the names of what it can write."""

    def render(
        self,
        conditions: Conditions,
        rng: np.random.Generator | None = None,
        *,
        quantiles: Mapping[str, Sequence[float]] | None = None,
    ) -> str:
        """Return the prompt.

        Args:
            conditions: What is wanted.
            rng: Chooses what the conditions leave open (a value within an interval; an order of sentences).
                None: always the same choice.
            quantiles: Property name -> values at evenly spaced probabilities in the model's training data. A
                value for an interval is drawn from the part of that distribution inside it. Without:
                REFERENCE_QUANTILES.

        Raises:
            ImpossibleRequest: If conditions contradict each other, are out of range, or cannot be said.
        """

    def parse(self, prompt: str) -> Conditions:
        """Return the conditions that a prompt says. Raises ParseError."""


def value_within(
    name: str,
    asked: Range,
    rng: np.random.Generator | None = None,
    *,
    quantiles: Mapping[str, Sequence[float]] | None = None,
) -> float:
    """Return one value of a property inside what is asked, distributed as the reference data are there.

    Without `rng`, the median of that part. Where the reference has nothing inside, the value nearest to it.

    Raises:
        ImpossibleRequest: If nothing of the range can be asked for.
    """
    known = PROPERTIES[name]
    check_range(known, asked)
    low = known.low if asked.low is None else max(asked.low, known.low)
    high = known.high if asked.high is None else min(asked.high, known.high)
    if low == high:
        return low
    reference = (quantiles or {}).get(name, REFERENCE_QUANTILES[name])
    values = np.sort(np.asarray(reference, dtype=float))
    shares = np.linspace(0.0, 1.0, len(values))
    first, last = np.interp([low, high], values, shares)
    share = first + (last - first) * (0.5 if rng is None else rng.random())
    return float(np.clip(np.interp(share, shares, values), low, high))


# ---------------------------------------------------------------- the kit's own


@dataclass(frozen=True)
class KitTemplate:
    """kit-1; see the module's docstring."""

    name: str = "kit-1"
    begins_the_text: bool = False

    @cached_property
    def hash(self) -> str:
        """Return the sha256 of tokens, orders, decimals and property ranges."""
        ranges = {
            name: (PROPERTIES[name].unit, PROPERTIES[name].low, PROPERTIES[name].high)
            for name in PROPERTY_WORDS
        }
        return _sha256(
            self.name, KIT_TEMPLATE_TOKENS, PROPERTY_WORDS, ranges, ELEMENTS, MAX_COUNT, "decimals=2"
        )

    @property
    def says(self) -> frozenset[str]:
        """Return all conditions but the formula."""
        fields = (
            "elements",
            "n_elements",
            "anonymous_formula",
            "n_sites",
            "crystal_system",
            "spacegroup_number",
        )
        return frozenset((*fields, *PROPERTY_WORDS))

    def render(
        self,
        conditions: Conditions,
        rng: np.random.Generator | None = None,
        *,
        quantiles: Mapping[str, Sequence[float]] | None = None,
    ) -> str:
        """Return the prompt; see Template. A formula is left to the text itself."""
        c = conditions
        check_conditions(c)
        parts: list[str] = []
        if c.elements:
            keyword = "elements=" if c.only_elements else "contains="
            parts.append(f"{keyword}{''.join(sorted(c.elements, key=RANK.__getitem__))}{ELEMENTS_END}")
        if c.n_elements is not None:
            parts.append(f"n_elements={_count('n_elements', c.n_elements)}")
        if c.anonymous_formula is not None:
            counts = sorted(anonymous_counts(c.anonymous_formula))
            parts.append("anonymous=" + "".join(_count("anonymous_formula", n) for n in counts))
        if c.n_sites is not None:
            parts.append(f"sites={_count('n_sites', c.n_sites)}")
        if c.crystal_system is not None:
            parts.append(f"system={c.crystal_system} ")
        for name, word in PROPERTY_WORDS.items():
            if name in c.properties:
                value = value_within(name, c.properties[name], rng, quantiles=quantiles)
                parts.append(f"{word}={_hundredths(value)} ")
        if c.spacegroup_number is not None:
            parts.append(f"spacegroup={c.spacegroup_number}\n")
        return "".join(parts) + PROMPT_END

    def parse(self, prompt: str) -> Conditions:
        """Return the conditions of a prompt; render's inverse but for formulas, intervals and decimals."""
        match = _KIT_PROMPT.fullmatch(prompt)
        if match is None:
            raise ParseError("prompt", f"'{prompt}': no prompt of template '{self.name}'")
        said = {key: value.strip() for key, value in match.groupdict().items() if value is not None}
        names = said.get("only") or said.get("contains") or ""
        counts = [int(n) for n in said["anonymous"].split()] if "anonymous" in said else None
        conditions = Conditions(
            elements=tuple(re.findall("[A-Z][a-z]?", names)),
            only_elements="only" in said,
            n_elements=int(said["n_elements"]) if "n_elements" in said else None,
            anonymous_formula=anonymous_of(counts) if counts else None,
            spacegroup_number=int(said["spacegroup"]) if "spacegroup" in said else None,
            crystal_system=said.get("system"),
            n_sites=int(said["sites"]) if "sites" in said else None,
            properties={
                name: Range.exactly(float(said[word]))
                for name, word in PROPERTY_WORDS.items()
                if word in said
            },
        )
        check_conditions(conditions)
        return conditions


_KIT_PROMPT = re.compile(
    r"(?:elements=(?P<only>(?:[A-Z][a-z]?)+) |contains=(?P<contains>(?:[A-Z][a-z]?)+) )?"
    r"(?:n_elements=(?P<n_elements>[1-9]\d?) )?(?:anonymous=(?P<anonymous>(?:[1-9]\d? )+))?"
    rf"(?:sites=(?P<sites>[1-9]\d?) )?(?:system=(?P<system>{'|'.join(CRYSTAL_SYSTEMS)}) )?"
    + "".join(rf"(?:{word}=(?P<{word}>-?\d{{1,3}}\.\d\d) )?" for word in PROPERTY_WORDS.values())
    + r"(?:spacegroup=(?P<spacegroup>\d{1,3})\n)?crystal\n"
)


def _count(name: str, n: int) -> str:
    if not 1 <= n <= MAX_COUNT:
        raise ImpossibleRequest(f"{name}: {n} is out of range; 1 to {MAX_COUNT} can be asked for.")
    return f"{n} "


def _hundredths(value: float) -> str:
    n = round(abs(value) * 100)
    return f"{'-' if value < 0 and n else ''}{n // 100}.{n % 100:02d}"


def _sha256(*definition: Any) -> str:
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- Crystal-text-LLM


@dataclass(frozen=True)
class CrystalTextLlmTemplate:
    """The English prompts of Crystal-text-LLM, word for word, with the attributes that its models know.

        Below is a description of a bulk material. The chemical formula is NaCl. The spacegroup number is 225.
        Generate a description of the lengths ... and coordinates for each atom within the lattice:

    (on one line, then a newline).

    The formula comes first. The others follow in the order below, or shuffled where `rng` is given, as in the
    published training. Energies and gap are rounded to four decimals.
    """

    name: str = "crystal-text-llm"
    begins_the_text: bool = False

    opening = "Below is a description of a bulk material. "
    request = (
        "Generate a description of the lengths and angles of the lattice vectors and then the element type "
        "and coordinates for each atom within the lattice:\n"
    )
    sentences = (
        ("formula", "The chemical formula is {}. "),
        ("formation_energy_ev_per_atom", "The formation energy per atom is {}. "),
        ("band_gap_ev", "The band gap is {}. "),
        ("hull_distance_ev_per_atom", "The energy above the convex hull is {}. "),
        ("spacegroup_number", "The spacegroup number is {}. "),
    )
    infill_opening = (
        "Below is a partial description of a bulk material where one element has been replaced with the "
        'string "[MASK]":\n'
    )
    infill_request = "\nGenerate an element that could replace [MASK] in the bulk material:\n"

    @cached_property
    def hash(self) -> str:
        """Return the sha256 of all sentences."""
        return _sha256(
            self.name,
            self.opening,
            self.request,
            self.sentences,
            self.infill_opening,
            self.infill_request,
            "decimals=4",
        )

    @property
    def says(self) -> frozenset[str]:
        """Return the five attributes of the published prompts."""
        return frozenset(name for name, _ in self.sentences)

    def render(
        self,
        conditions: Conditions,
        rng: np.random.Generator | None = None,
        *,
        quantiles: Mapping[str, Sequence[float]] | None = None,
    ) -> str:
        """Return the generation prompt; see Template."""
        check_conditions(conditions)
        _refuse_unsayable(self, conditions)
        said: list[str] = []
        for name, sentence in self.sentences[1:]:
            if name in conditions.properties:
                value = value_within(name, conditions.properties[name], rng, quantiles=quantiles)
                said.append(sentence.format(round(value, 4) + 0.0))
            elif name == "spacegroup_number" and conditions.spacegroup_number is not None:
                said.append(sentence.format(conditions.spacegroup_number))
        if rng is not None:
            said = [said[i] for i in rng.permutation(len(said))]
        if conditions.formula:
            said.insert(0, self.sentences[0][1].format(formula_text(conditions.formula)))
        return self.opening + "".join(said) + self.request

    def parse(self, prompt: str) -> Conditions:
        """Return the conditions of a generation prompt; inverse of render but for intervals."""
        if not (prompt.startswith(self.opening) and prompt.endswith(self.request)):
            raise ParseError("prompt", f"'{prompt}': no generation prompt of template '{self.name}'")
        rest = prompt[len(self.opening) : len(prompt) - len(self.request)]
        said: dict[str, str] = {}
        while rest:
            for name, sentence in self.sentences:
                match = re.match(re.escape(sentence).replace(r"\{\}", r"(\S+)"), rest)
                if match and name not in said:
                    said[name], rest = match[1], rest[match.end() :]
                    break
            else:
                raise ParseError("prompt", f"'{rest}': no sentence of template '{self.name}'")
        return Conditions(
            formula=parse_formula(said["formula"]) if "formula" in said else None,
            spacegroup_number=int(said["spacegroup_number"]) if "spacegroup_number" in said else None,
            properties={
                name: Range.exactly(float(value)) for name, value in said.items() if name in PROPERTIES
            },
        )

    def infill_prompt(self, text: str, element: str) -> str:
        """Return the prompt that asks which element could stand where `element` stands in a compact text.

        Every site of the element is masked, whole lines only: masking C leaves Ca and Cl alone.

        Raises:
            UnknownName: If no line of the text is this element.
        """
        lines = text.split("\n")
        if element not in lines:
            raise UnknownName.among("site of element", element, {line for line in lines if line in RANK})
        masked = "\n".join("[MASK]" if line == element else line for line in lines)
        return f"{self.infill_opening}{masked}{self.infill_request}"

    def infill_answer(self, completion: str) -> str:
        """Return the element that a completion of the infill prompt names: its first line.

        Raises:
            ParseError: If that is no element; reason "element".
        """
        answer = completion.strip().split("\n")[0].strip()
        if answer not in RANK:
            raise ParseError("element", f"'{answer}': an element symbol expected", 1)
        return answer


def _refuse_unsayable(template: Template, conditions: Conditions) -> None:
    unsayable = [name for name in conditions_set(conditions) if name not in template.says]
    if unsayable:
        raise ImpossibleRequest(
            f"template '{template.name}' cannot say {', '.join(unsayable)}; "
            f"it can say {', '.join(sorted(template.says))}. Drop it, or use a model of the kit's own."
        )


# ---------------------------------------------------------------- CrystaLLM


@dataclass(frozen=True)
class CifCrystallmTemplate:
    r"""The prompts of CrystaLLM v1, which are the first lines of its CIF.

        data_                                         any crystal
        data_Na4Cl4\n                                 a composition
        data_Na4Cl4\nloop_\n ... _symmetry_space_group_name_H-M Fm-3m\n       a composition and a space group

    The formula names the content of the conventional cell. With `spacegroup_number` and `n_sites` set it is
    worked out from them (atoms in the primitive cell times the lattice points of the conventional one); else
    the counts are taken as they are given.
    """

    name: str = "cif-crystallm"
    begins_the_text: bool = True

    heads = (
        "_atom_type_symbol",
        "_atom_type_electronegativity",
        "_atom_type_radius",
        "_atom_type_ionic_radius",
    )
    spacegroup_key = "_symmetry_space_group_name_H-M"

    @cached_property
    def hash(self) -> str:
        """Return the sha256 of the lines and of the frozen property table that they hold."""
        from crystallm_kit.text.cif import atom_properties

        return _sha256(self.name, self.heads, self.spacegroup_key, atom_properties())

    @property
    def says(self) -> frozenset[str]:
        """Return formula and space group; the number of sites serves to work out the cell's content."""
        return frozenset(("formula", "spacegroup_number", "n_sites"))

    def render(
        self,
        conditions: Conditions,
        rng: np.random.Generator | None = None,  # noqa: ARG002 - nothing is left open
        *,
        quantiles: Mapping[str, Sequence[float]] | None = None,  # noqa: ARG002
    ) -> str:
        """Return the prompt; see Template. Raises EncodeError for what CrystaLLM has no token for."""
        from crystallm_kit.text import cif

        check_conditions(conditions)
        _refuse_unsayable(self, conditions)
        if not conditions.formula:
            if conditions_set(conditions):
                raise ImpossibleRequest(
                    f"template '{self.name}': a space group or number of sites needs a formula."
                )
            return "data_"
        content = _conventional_content(conditions)
        elements = cif.by_electronegativity(content)
        cif.check_elements(elements)
        lines = ["data_" + "".join(f"{element}{content[element]}" for element in elements)]
        if conditions.spacegroup_number is not None:
            symbol = spacegroup_symbol(conditions.spacegroup_number)
            cif.check_spacegroup(symbol)
            lines += ["loop_", *self.heads]
            lines += [" ".join((element, *cif.atom_properties()[element])) for element in elements]
            lines.append(f"{self.spacegroup_key} {symbol}")
        return "\n".join(lines) + "\n"

    def parse(self, prompt: str) -> Conditions:
        """Return formula (content of the conventional cell) and space group of a prompt."""
        if prompt == "data_":
            return Conditions()
        lines = prompt.split("\n")
        if not re.fullmatch(r"data_(?:[A-Z][a-z]?\d+)+", lines[0]) or lines[-1] != "":
            raise ParseError("prompt", f"'{lines[0]}': no prompt of template '{self.name}'", 1)
        formula = parse_formula(lines[0].removeprefix("data_"))
        if len(lines) == 2:
            return Conditions(formula=formula)
        key, _, symbol = lines[-2].partition(" ")
        if key != self.spacegroup_key:
            raise ParseError("prompt", f"'{lines[-2]}': {self.spacegroup_key} expected", len(lines) - 1)
        return Conditions(formula=formula, spacegroup_number=spacegroup_number(symbol))


@dataclass(frozen=True)
class CifCrystallmPiTemplate(CifCrystallmTemplate):
    r"""The prompts of CrystaLLM-pi: those of CrystaLLM v1 in its dialect, see text/cif_pi.py.

    <bos>\ndata_[                 any crystal; its "level 1"
    <bos>\ndata_[Na4Cl4]\n        a composition; "level 2"
    <bos>\ndata_[Na4Cl4]\nloop_\n ... _symmetry_space_group_name_H-M [Fm-3m]\n       "level 4"
    """

    name: str = "cif-crystallm-pi"

    def render(
        self,
        conditions: Conditions,
        rng: np.random.Generator | None = None,
        *,
        quantiles: Mapping[str, Sequence[float]] | None = None,
    ) -> str:
        """Return the prompt; see CifCrystallmTemplate."""
        from crystallm_kit.text.cif_pi import BEGIN, bracketed

        plain = super().render(conditions, rng, quantiles=quantiles)
        if plain == "data_":
            return f"{BEGIN}\ndata_["
        return "\n".join((BEGIN, *bracketed(plain.rstrip("\n").split("\n")), ""))

    def parse(self, prompt: str) -> Conditions:
        """Return formula (content of the conventional cell) and space group of a prompt."""
        from crystallm_kit.text.cif_pi import BEGIN, without_brackets

        if prompt == f"{BEGIN}\ndata_[":
            return Conditions()
        if not (prompt.startswith(f"{BEGIN}\n") and prompt.endswith("\n")):
            raise ParseError("prompt", f"'{prompt}': no prompt of template '{self.name}'")
        return super().parse(without_brackets(prompt)[0].rstrip("\n") + "\n")


def _conventional_content(conditions: Conditions) -> dict[str, int]:
    formula = dict(conditions.formula or {})
    if conditions.n_sites is None or conditions.spacegroup_number is None:
        return formula
    reduced = reduced_formula(formula)
    times = (
        conditions.n_sites // sum(reduced.values()) * space_group(conditions.spacegroup_number).n_centering
    )
    return {element: n * times for element, n in reduced.items()}


# ---------------------------------------------------------------- the table

TEMPLATES: dict[str, KitTemplate | CrystalTextLlmTemplate | CifCrystallmTemplate] = {
    template.name: template
    for template in (
        KitTemplate(),
        CrystalTextLlmTemplate(),
        CifCrystallmTemplate(),
        CifCrystallmPiTemplate(),
    )
}


def template_named(name: str, expected_hash: str | None = None) -> Template:
    """Return the template called `name`.

    Args:
        name: Key of TEMPLATES.
        expected_hash: The hash stored with a model, if any.

    Raises:
        UnknownName: If there is none, or it is not the one that the model was trained with.
    """
    if name not in TEMPLATES:
        raise UnknownName.among("template", name, TEMPLATES)
    template = TEMPLATES[name]
    if expected_hash not in (None, template.hash):
        raise UnknownName(
            f"template '{name}': the model was trained with {str(expected_hash)[:12]}, this version has "
            f"{template.hash[:12]}. Use the version of crystallm_kit that the model names."
        )
    return template


# ---------------------------------------------------------------- training


def training_conditions(
    crystal: Crystal,
    rng: np.random.Generator,
    *,
    template: str = "kit-1",
    none_probability: float = 0.3,
    keep_probability: float | None = None,
    only_elements_probability: float = 0.5,
    spacegroup_number: int | None = None,
    n_primitive_sites: int | None = None,
) -> Conditions:
    """Return a random part of what is known of a crystal, for a prompt before its text.

    Args:
        crystal: Its composition, density and properties (kit names or aliases) are what is known.
        rng: Decides; the same state gives the same conditions.
        template: Only what it can say is drawn.
        none_probability: Share of crystals without any condition.
        keep_probability: Of each condition, otherwise. None: drawn anew for each crystal, evenly from 0 to 1,
            so that prompts with one condition and with all of them are equally common.
        only_elements_probability: Share of element conditions that name all elements; the others name some.
        spacegroup_number: Adds space group and crystal system, if known.
        n_primitive_sites: Adds the number of sites, if known.
    """
    known = _facts(crystal, spacegroup_number, n_primitive_sites)
    says = template_named(template).says
    known = {name: value for name, value in known.items() if name in says}
    draws = rng.random(len(known) + 3)
    elements = _some(known.get("elements", ()), rng)
    if draws[0] < none_probability:
        return Conditions()
    share = draws[1] if keep_probability is None else keep_probability
    kept = {name: value for (name, value), draw in zip(known.items(), draws[3:], strict=True) if draw < share}
    if "elements" in kept:
        kept["only_elements"] = bool(draws[2] < only_elements_probability)
        if not kept["only_elements"]:
            kept["elements"] = elements
    properties = {name: kept.pop(name) for name in PROPERTIES if name in kept}
    return Conditions(**kept, properties=properties)


def _some(elements: Sequence[str], rng: np.random.Generator) -> tuple[str, ...]:
    """Return one or more of the elements, every number equally likely."""
    if not elements:
        return ()
    chosen = rng.permutation(len(elements))[: rng.integers(1, len(elements) + 1)]
    return tuple(elements[i] for i in sorted(chosen))


def _facts(crystal: Crystal, spacegroup: int | None, n_sites: int | None) -> dict[str, Any]:
    """Return what is known of a crystal and can be written: field or property name -> value."""
    composition = crystal.structure.composition.get_el_amt_dict()
    counts = {e: round(composition[e]) for e in sorted(composition, key=lambda e: (RANK.get(e, math.inf), e))}
    reduced = reduced_formula(counts)
    facts: dict[str, Any] = {"formula": reduced, "elements": tuple(counts), "n_elements": len(counts)}
    if max(reduced.values()) <= MAX_COUNT:
        facts["anonymous_formula"] = anonymous_of(reduced.values())
    if spacegroup is not None:
        facts |= {"spacegroup_number": spacegroup, "crystal_system": crystal_system(spacegroup)}
    if n_sites is not None and n_sites <= MAX_COUNT:
        facts["n_sites"] = n_sites
    values: dict[str, Any] = dict(crystal.properties)
    if isinstance(crystal.structure, Structure):
        values["density_g_cm3"] = density_g_cm3(crystal.structure.atomic_numbers, crystal.structure.volume)
    for name, known in PROPERTIES.items():
        value = next((values[key] for key in (name, *known.aliases) if key in values), None)
        if not isinstance(value, int | float | np.number) or isinstance(value, bool):
            continue
        if known.low <= float(value) <= known.high:
            facts[name] = Range.exactly(float(value))
    return facts


# ---------------------------------------------------------------- infilling in the kit's format


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
