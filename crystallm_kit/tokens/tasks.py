r"""What an example asks for: a crystal, the element behind a mask, or a property of a crystal.

    encoding:
      template: words-1
      tasks: {generate: 0.8, infill: 0.1, property: 0.1}     how often each is drawn, for every crystal anew

    infill     In this crystal every site of one element is written [MASK].\n...  ->  Na
    property   Here is a crystal.\nNa1 Cl1 225 ...\nWhat is its band gap in eV?\n  ->  5.00 eV

A corpus stores of each crystal one pair of prompt and answer for every element (infill) and for every
property that it has (property), beside what generation needs; drawing.py draws a task for each crystal and
epoch. A crystal that cannot be asked a task (no property is known) is asked the others.

Not here: the wordings (text/prompt_words.py, text/prompt_llm.py), drawing (drawing.py).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from crystallm_kit.errors import ImpossibleRequest, UserError, did_you_mean
from crystallm_kit.records import PROPERTIES, Crystal, PropertyValue, Range
from crystallm_kit.structures.sources import entries_of
from crystallm_kit.text.prompt_llm import CrystalTextLlmTemplate
from crystallm_kit.text.prompt_words import QUESTIONS, WordsTemplate
from crystallm_kit.text.prompts import facts_of
from crystallm_kit.text.template import Template
from crystallm_kit.tokens.drawing import INFILL, PROPERTY, TASKS

# A band gap that two decimals write as zero is a metal's.
METAL_GAP_EV = 0.005
# Question -> the property that the data must have for it.
_NEEDED = {**{name: name for name in PROPERTIES}, "is_metal": "band_gap_ev"}
_COMPUTED = "density_g_cm3"  # of every crystal

Pair = tuple[int, str, str]


def check_tasks(tasks: Mapping[str, float], properties: Sequence[str]) -> None:
    """Raise ValueError for a task or property of no known name, or shares that leave nothing to draw."""
    for name, share in tasks.items():
        if name not in TASKS:
            raise ValueError(f"tasks: no task '{name}'{did_you_mean(name, TASKS)} Known: {', '.join(TASKS)}.")
        if not (math.isfinite(share) and share >= 0):
            raise ValueError(f"tasks: the share of '{name}' is {share}; 0 or more expected")
    if not sum(tasks.values()):
        raise ValueError("tasks: all shares are 0, so nothing is left to draw")
    for name in properties:
        if name not in QUESTIONS:
            known = ", ".join(QUESTIONS)
            raise ValueError(
                f"properties: no property '{name}'{did_you_mean(name, QUESTIONS)} Known: {known}."
            )


def check_template(template: Template, tasks: Mapping[str, float], properties: Sequence[str]) -> None:
    """Raise ImpossibleRequest if a template cannot say a task or a property that a recipe names."""
    for name, share in tasks.items():
        if share and name not in template.tasks:
            raise ImpossibleRequest(
                f"encoding.tasks: template '{template.name}' has no prompts for the task '{name}'; "
                f"it has them for {', '.join(sorted(template.tasks))}. Template words-1 has all."
            )
    for name in properties:
        said = name in template.says or ("property" in template.tasks and name in QUESTIONS)
        if not said:
            raise ImpossibleRequest(
                f"encoding.properties: template '{template.name}' cannot say '{name}'; it can say "
                f"{', '.join(sorted(template.says))}. Template words-1 says all properties."
            )


def require_properties(inputs: Mapping[str, Sequence[Path]], properties: Iterable[str]) -> None:
    """Raise UserError if an input set has no entry with one of the properties; before anything is encoded.

    Args:
        inputs: Split -> files and folders.
        properties: As a recipe names them (encoding.properties, encoding.dropping.focus). What is worked out
            from the structure needs no column.
    """
    needed = {_NEEDED.get(name, _COMPUTED) for name in properties} - {_COMPUTED}
    for split, paths in inputs.items():
        missing, columns = set(needed), set[str]()
        for entry in entries_of(list(paths)) if missing else ():
            columns |= entry.properties.keys()
            missing -= entry.properties.keys()
            if not missing:
                break
        if missing:
            name = min(missing)
            known = PROPERTIES[name]
            raise UserError(
                f"{', '.join(map(str, paths))}{f' ({split})' if split else ''}: no entry has the property "
                f"'{name}' that the recipe's encoding names ({known.unit}). Columns found: "
                f"{', '.join(sorted(columns)) or 'none'}. Name a column '{name}' or one of "
                f"{', '.join(known.aliases)}, or drop it from the recipe."
            )


def answers_of(crystal: Crystal, spacegroup: int | None) -> dict[str, PropertyValue]:
    """Return what can be asked of a crystal: name in QUESTIONS -> value."""
    facts = facts_of(crystal, spacegroup, None)
    found: dict[str, PropertyValue] = {
        name: fact.low for name, fact in facts.items() if isinstance(fact, Range) and fact.low is not None
    }
    if "crystal_system" in facts:
        found["crystal_system"] = str(facts["crystal_system"])
    if "band_gap_ev" in found:
        found["is_metal"] = float(found["band_gap_ev"]) < METAL_GAP_EV
    return {name: found[name] for name in QUESTIONS if name in found}


def pairs_of(
    crystal: Crystal,
    texts: Sequence[str],
    template: Template,
    rng: np.random.Generator,
    *,
    tasks: Mapping[str, float],
    properties: Sequence[str] = (),
    spacegroup: int | None = None,
) -> list[Pair]:
    """Return (kind of the prompt, prompt, answer) of the tasks beside generation.

    Args:
        crystal: Its composition and properties are what is asked for.
        texts: Equivalent texts of it; each pair takes one.
        template: Whose wordings.
        rng: Picks texts and wordings.
        tasks: Shares; a task of share 0 has no pairs.
        properties: To ask for; empty: all that are known.
        spacegroup: For the crystal system.
    """
    found: list[Pair] = []

    def text() -> str:
        return texts[int(rng.integers(len(texts)))]

    if tasks.get("infill") and isinstance(template, WordsTemplate | CrystalTextLlmTemplate):
        elements = crystal.structure.composition.get_el_amt_dict()
        found += [(INFILL, template.infill_prompt(text(), element, rng), element) for element in elements]
    if tasks.get("property") and isinstance(template, WordsTemplate):
        for name, value in answers_of(crystal, spacegroup).items():
            if not properties or name in properties:
                prompt = template.property_prompt(text(), name, rng)
                found.append((PROPERTY, prompt, template.property_completion(name, value)))
    return found
