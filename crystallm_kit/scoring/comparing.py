"""The stages `matches` and `covers`: a sample against its target, and against all targets of its formula.

Not here: which target that is (pairing.py), the distance (scores/matcher/structure_matcher.py).
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crystallm_kit.scores.matcher.structure_matcher import TOLERANCES, Reduced, fit, rms_distance
from crystallm_kit.scoring import reducing
from crystallm_kit.scoring.rows import form_of, forms_of
from crystallm_kit.scoring.stages import Item


def warm_up() -> None:
    """Compile, or load, the matcher."""
    reducing.warm_up()


def compare(item: Item, settings: Mapping[str, Any], where: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of the stage."""
    del settings
    form = form_of(item.earlier["forms"])
    if form is None:
        return {}
    own = int(_pairs(where["pairs"])[item.row["index"]])
    same = _targets(where["targets"]).get(form.formula, [])
    found = [(i, rms_distance(form, truth, TOLERANCES["csp"])) for i, truth in same]
    return {"rms_distance.csp": dict(found).get(own), "distances": json.dumps(found) if found else None}


def cover(item: Item, settings: Mapping[str, Any], where: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of `covers`: does it match any target, in the order of matbench-genmetrics?"""
    del settings
    form = form_of(item.earlier["forms"])
    if form is None:
        return {}
    same = _targets(where["targets"]).get(form.formula, [])
    return {"covers.genmetrics": any(fit(truth, form, TOLERANCES["csp"]) for _, truth in same)}


@lru_cache(maxsize=2)
def _targets(folder: str) -> dict[str, list[tuple[int, Reduced]]]:
    """Return reduced formula -> targets of it, by position."""
    found: dict[str, list[tuple[int, Reduced]]] = {}
    forms = (form for part in forms_of(Path(folder)) for form in part)
    for i, form in enumerate(forms):
        if form is not None:
            found.setdefault(form.formula, []).append((i, form))
    return found


@lru_cache(maxsize=2)
def _pairs(path: str) -> NDArray[np.int64]:
    return np.asarray(np.load(path, mmap_mode="r"))
