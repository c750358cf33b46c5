"""The stage `matches`: how far a candidate is from its target.

Not here: which target that is (pairing.py), the distance (scores/structure_matcher.py).
"""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crystallm_kit.scores.structure_matcher import TOLERANCES, Reduced, rms_distance
from crystallm_kit.scoring.rows import form_of, forms_of
from crystallm_kit.scoring.stages import Item


def compare(item: Item, settings: Mapping[str, Any], where: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of the stage."""
    del settings
    form = form_of(item.earlier["forms"])
    truth = _targets(where["targets"])[int(_pairs(where["pairs"])[item.row["index"]])]
    if form is None or truth is None:
        return {}
    return {"rms_distance.csp": rms_distance(form, truth, TOLERANCES["csp"])}


@lru_cache(maxsize=2)
def _targets(folder: str) -> list[Reduced | None]:
    return [form for part in forms_of(Path(folder)) for form in part]


@lru_cache(maxsize=2)
def _pairs(path: str) -> NDArray[np.int64]:
    return np.asarray(np.load(path, mmap_mode="r"))
