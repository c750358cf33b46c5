"""The template crystal-text-llm, for the `compact` format: English sentences, and infilling.

    Below is a description of a bulk material. The chemical formula is NaCl. Generate a description of ...

Source: Crystal-text-LLM (Gruver et al. 2024, arXiv:2402.04379).
Not here: other templates, and their table (prompts.py).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from crystallm_kit.errors import ParseError, UnknownName
from crystallm_kit.records import PROPERTIES, Conditions, Range
from crystallm_kit.structures.elements import RANK
from crystallm_kit.text.conditions import check_conditions, formula_text, parse_formula
from crystallm_kit.text.template import refuse_unsayable, sha256_of, value_within


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
    tasks: frozenset[str] = frozenset(("generate", "infill"))

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
        return sha256_of(
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
        refuse_unsayable(self, conditions)
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

    def infill_prompt(self, text: str, element: str, rng: np.random.Generator | None = None) -> str:  # noqa: ARG002
        """Return the prompt that asks which element could stand where `element` stands in a compact text.

        Every site of the element is masked, whole lines only: masking C leaves Ca and Cl alone. There is one
        wording, so nothing is left to `rng`.

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
