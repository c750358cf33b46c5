r"""Prompts: Conditions as the text that stands before a crystal, one template per kind of model.

The same template renders for training and for generation, and its hash is stored with the model; a server
refuses a model whose template it does not have. The templates:

    kit-1              the kit's own models; format wyckoff (prompt_kit.py)
    crystal-text-llm   Crystal-text-LLM's models; format compact (prompt_llm.py)
    cif-crystallm      CrystaLLM's; format cif; cif-crystallm-pi: its dialect "pi" (prompt_cif.py)
    words-1            plain English for language models, any format (prompt_words.py)

Not here: free text and options (words.py, conditions.py); forcing the text's beginning (tokens/masking.py).
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from pymatgen.core import Structure

from crystallm_kit.errors import UnknownName
from crystallm_kit.records import PROPERTIES, Conditions, Crystal, Range
from crystallm_kit.structures.elements import RANK, density_g_cm3
from crystallm_kit.structures.symmetry import crystal_system
from crystallm_kit.text.conditions import anonymous_of, reduced_formula
from crystallm_kit.text.infilling import completion_prefix, substitution_prefix
from crystallm_kit.text.prompt_cif import CifCrystallmPiTemplate, CifCrystallmTemplate
from crystallm_kit.text.prompt_kit import MAX_COUNT, KitTemplate
from crystallm_kit.text.prompt_llm import CrystalTextLlmTemplate
from crystallm_kit.text.prompt_words import FORMAT_WORDS, WordsTemplate
from crystallm_kit.text.template import REFERENCE_QUANTILES, Template, value_within

__all__ = [
    "REFERENCE_QUANTILES",
    "TEMPLATES",
    "CifCrystallmPiTemplate",
    "CifCrystallmTemplate",
    "CrystalTextLlmTemplate",
    "KitTemplate",
    "Template",
    "WordsTemplate",
    "completion_prefix",
    "facts_of",
    "substitution_prefix",
    "template_named",
    "training_conditions",
    "value_within",
]

TEMPLATES: dict[str, KitTemplate | CrystalTextLlmTemplate | CifCrystallmTemplate | WordsTemplate] = {
    template.name: template
    for template in (
        KitTemplate(),
        CrystalTextLlmTemplate(),
        CifCrystallmTemplate(),
        CifCrystallmPiTemplate(),
        WordsTemplate(),
    )
}


def template_named(name: str, expected_hash: str | None = None, *, format: str = "") -> Template:
    """Return the template called `name`.

    Args:
        name: Key of TEMPLATES.
        expected_hash: The hash stored with a model, if any.
        format: Of the texts, for templates whose requests name it (words-1); where a hash is given it tells
            the format too.

    Raises:
        UnknownName: If there is none, or it is not the one that the model was trained with.
    """
    if name not in TEMPLATES:
        raise UnknownName.among("template", name, TEMPLATES)
    template = TEMPLATES[name]
    if isinstance(template, WordsTemplate):
        forms = [format] if format or expected_hash is None else list(FORMAT_WORDS)
        variants = [WordsTemplate(form) for form in forms]
        template = next((v for v in variants if v.hash == expected_hash), variants[0])
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
    known = facts_of(crystal, spacegroup_number, n_primitive_sites)
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


def facts_of(crystal: Crystal, spacegroup: int | None, n_sites: int | None) -> dict[str, Any]:
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
