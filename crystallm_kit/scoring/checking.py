"""The stage `checks`: every protocol's verdict of one structure, and what is measured on it.

Not here: the checks themselves (scores/).
"""

import json
from collections.abc import Mapping
from typing import Any

from crystallm_kit.records import Conditions, Crystal
from crystallm_kit.scores.charge import is_charge_balanced
from crystallm_kit.scores.funnel import stage_of
from crystallm_kit.scores.validity import validate_and_measure
from crystallm_kit.scoring.stages import Item
from crystallm_kit.structures.symmetry import crystal_system
from crystallm_kit.structures.writing import text_of
from crystallm_kit.text.conditions import conditions_from_dict

_AFTER_GEOMETRY = (None, "charge", "bonds")  # reasons of the checks that come after cell, distances, density


def check(item: Item, settings: Mapping[str, Any], where: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of the stage."""
    del settings, where
    structure = item.structure
    assert structure is not None  # noqa: S101 - the stages see no others
    text = item.row["conditions"]
    conditions = conditions_from_dict(json.loads(text)) if text else Conditions()
    verdict, measures = validate_and_measure(
        structure, conditions=conditions, stated_spacegroup=item.row["stated_spacegroup"]
    )
    counts = {e.symbol: round(n) for e, n in structure.composition.items()}
    columns: dict[str, Any] = {
        "formula": structure.composition.reduced_formula,
        "cell_formula": structure.composition.formula,
        "n_sites": len(structure),
        "n_elements": len(counts),
        "elements": sorted(counts),
        **measures,
        "reason": verdict.reason,
        "detail": verdict.detail or None,
        "stage": None if verdict.reason is None else stage_of(verdict.reason, verdict),
        "kit.valid": verdict.valid,
        "as_asked": verdict.reason not in ("formula_mismatch", "spacegroup_mismatch") if text else None,
        "cif": text_of(Crystal("", structure), "cif"),
    }
    if "spacegroup_number" in measures:
        columns["crystal_system"] = crystal_system(int(measures["spacegroup_number"]))
    for name, protocol in (
        ("cdvae.structure_valid", "cdvae"),
        ("diffcsp.structure_valid", "diffcsp"),
        ("crystallm_pi.structure_valid_xrd", "crystallm_pi_xrd"),
        ("crystallm.sensible", "crystallm_csp"),
    ):
        found, _ = validate_and_measure(structure, protocol=protocol, measure_symmetry=False)
        columns[name] = found.reason in _AFTER_GEOMETRY
    columns["cdvae.comp_valid"] = is_charge_balanced(counts)
    columns["diffcsp.comp_valid"] = is_charge_balanced(counts, max_combinations=1e7)
    return columns
