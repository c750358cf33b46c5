"""The stage `forms`: the reduced form of one structure, made once for all comparisons.

Not here: comparing (scores/structure_matcher.py).
"""

from collections.abc import Mapping
from typing import Any

from crystallm_kit.scores.structure_matcher import reduced
from crystallm_kit.scoring.rows import form_columns
from crystallm_kit.scoring.stages import Item


def reduce(item: Item, settings: Mapping[str, Any], where: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of the stage."""
    del settings, where
    return form_columns(None if item.structure is None else reduced(item.structure))
