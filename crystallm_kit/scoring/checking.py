"""The stages `checks` and `bonds`: every protocol's verdict of one structure, and what is measured on it.

Not here: the checks themselves (scores/checks.py, validity.py, asked.py).
"""

import json
from collections.abc import Mapping
from typing import Any

from pymatgen.core import Structure

from crystallm_kit.records import Conditions, Crystal
from crystallm_kit.scores.asked import asked_checks
from crystallm_kit.scores.checks import structure_checks
from crystallm_kit.scores.funnel import stage_of
from crystallm_kit.scores.lemat import lemat_spacegroup_number
from crystallm_kit.scores.measures import MeasuredCrystal, measure
from crystallm_kit.scores.validity import validate_and_measure
from crystallm_kit.scoring.stages import STAGES, Item
from crystallm_kit.structures.symmetry import crystal_system
from crystallm_kit.structures.writing import text_of
from crystallm_kit.text.conditions import conditions_from_dict


def check(item: Item, settings: Mapping[str, Any], where: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of `checks`; with the setting `only` "measures", those that are no verdict."""
    del where
    structure, text = item.structure, item.row["conditions"]
    if structure is None:
        return {}
    if settings.get("only") == "measures":
        return _measured(structure, measure(structure)) | _lemat_spacegroup(structure)
    conditions = conditions_from_dict(json.loads(text)) if text else Conditions()
    verdict, measures = validate_and_measure(
        structure, conditions=conditions, stated_spacegroup=item.row["stated_spacegroup"]
    )
    columns: dict[str, Any] = {
        **_measured(structure, measures),
        "reason": verdict.reason,
        "detail": verdict.detail or None,
        "stage": None if verdict.reason is None else stage_of(verdict.reason, verdict),
        "kit.valid": verdict.valid,
        **structure_checks(structure, cif_text=item.row["cif_text"]),
        "cif": text_of(Crystal("", structure), "cif"),
    }
    if text:
        numbers = {name: float(x) for name, x in measures.items() if not isinstance(x, str)}
        columns["asked"] = json.dumps(asked_checks(structure, conditions, properties=numbers))
    return columns


def _measured(structure: Structure, measures: Mapping[str, Any]) -> dict[str, Any]:
    symbols = sorted({element.symbol for element in structure.composition})
    number = measures.get("spacegroup_number")
    return {
        "formula": structure.composition.reduced_formula,
        "cell_formula": structure.composition.formula,
        "n_sites": len(structure),
        "n_elements": len(symbols),
        "elements": symbols,
        "cell_lengths_angstrom": list(structure.lattice.abc),
        "crystal_system": None if number is None else crystal_system(int(number)),
        **measures,
    }


def _lemat_spacegroup(structure: Structure) -> dict[str, Any]:
    found = MeasuredCrystal(structure)
    return {"lemat.spacegroup_number": None if found.cell_fault else lemat_spacegroup_number(found)}


def check_bonds(item: Item, settings: Mapping[str, Any], where: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of `bonds`."""
    del settings, where
    found = structure_checks(item.structure, cif_text=item.row["cif_text"], with_bonds=True)
    return {name: found[name] for name in STAGES["bonds"].schema.names if name in found}
