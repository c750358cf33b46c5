"""Columns and labels of data files -> the named properties of a Crystal.

    {"material_id": "mp-22862", "e_above_hull": "0.0", "band_gap": "nan", "pretty_formula": "NaCl"}
    -> id "mp-22862", {"hull_distance_ev_per_atom": 0.0, "pretty_formula": "NaCl"}

Contract: names that records.PROPERTIES knows as aliases become the kit's; a value under the kit's own name
wins over an alias; others keep their name. What is missing (None, NaN, an empty cell) is left out, and so are
lists, bytes and nested values, which no condition can ask for.

Not here: which column holds the structure (tables.py).
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from crystallm_kit.records import PROPERTIES, PropertyValue

ID_COLUMNS = ("material_id", "id", "mp_id", "name")

_ALIASES = {alias: p.name for p in PROPERTIES.values() for alias in (*p.aliases, p.name)}
_INTEGER = re.compile(r"[+-]?(?:0|[1-9]\d{0,17})")
_PADDED = re.compile(r"[+-]?0\d.*")  # "007" is a name
_MISSING = frozenset({"", "nan", "none", "null", "n/a"})  # not "na": that is sodium


def named_properties(columns: Mapping[str, Any]) -> dict[str, PropertyValue]:
    """Return the columns that hold one value each, under the kit's names where it knows them."""
    found: dict[str, PropertyValue] = {}
    for column, raw in columns.items():
        value = plain_value(raw)
        if value is None or not column or column.startswith("Unnamed: "):
            continue
        name = _ALIASES.get(column.lower(), column)
        if name in PROPERTIES and (isinstance(value, bool | str)):
            name = column  # a word is no number of eV; it stays under the name it came with
        if name not in found or column == name:
            found[name] = value
    return found


def take_id(columns: dict[str, Any], default: str) -> str:
    """Remove the first id column that has a value and return that value, else `default`."""
    for column in ID_COLUMNS:
        value = plain_value(columns.get(column))
        if value is not None:
            del columns[column]
            return str(value)
    return default


def plain_value(raw: Any) -> PropertyValue | None:
    """Return a bool, int, float or str, or None where the value is missing or is not one value."""
    value = raw.item() if hasattr(raw, "item") and getattr(raw, "ndim", 1) == 0 else raw
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        return value if value.strip().lower() not in _MISSING else None
    return value if isinstance(value, bool | int | float) else None


def value_of_text(text: str) -> PropertyValue | None:
    """Return what a cell of text means: a bool, an int, a float, the text, or None where it is empty."""
    word = text.strip()
    if word.lower() in _MISSING:
        return None
    if word in ("True", "true", "False", "false"):
        return word in ("True", "true")
    if _INTEGER.fullmatch(word):
        return int(word)
    if (word[-1].isdigit() or word[-1] == ".") and not _PADDED.fullmatch(word):
        try:
            return plain_value(float(word)) if "_" not in word else text
        except ValueError:
            return text
    return text if word.lower() not in ("inf", "-inf", "+inf") else None
