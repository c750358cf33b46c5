r"""The template kit-1, for the `wyckoff` format (its tokens are in prompt_tokens.py).

The conditions that are set, in this order, then
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

Not here: other templates, and their table (prompts.py).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from crystallm_kit.errors import ImpossibleRequest, ParseError
from crystallm_kit.records import PROPERTIES, Conditions, Range
from crystallm_kit.structures.elements import ELEMENTS, RANK
from crystallm_kit.text.conditions import anonymous_counts, anonymous_of, check_conditions
from crystallm_kit.text.prompt_tokens import (
    CRYSTAL_SYSTEMS,
    ELEMENTS_END,
    KIT_TEMPLATE_TOKENS,
    PROMPT_END,
    PROPERTY_WORDS,
)
from crystallm_kit.text.template import sha256_of, value_within

MAX_COUNT = 99  # the largest count that has a token


@dataclass(frozen=True)
class KitTemplate:
    """kit-1; see the module's docstring."""

    name: str = "kit-1"
    begins_the_text: bool = False
    tasks: frozenset[str] = frozenset(("generate",))

    @cached_property
    def hash(self) -> str:
        """Return the sha256 of tokens, orders, decimals and property ranges."""
        ranges = {
            name: (PROPERTIES[name].unit, PROPERTIES[name].low, PROPERTIES[name].high)
            for name in PROPERTY_WORDS
        }
        return sha256_of(
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
