"""How a report says what report.json holds: measures, space groups, formulas, settings, times.

    measure_label("density_g_cm3")      -> ("Density", "g/cm³")
    spacegroup_text(225)                -> "Fm-3m (225)"
    plain_pairs({"matcher": {"length": 0.3}})  -> {"matcher.length": "0.3"}

Contract: what is no measure, group or formula is passed on as the text that it is, to be escaped.

Not here: scores and their tables (tables.py).
"""

import re
from collections.abc import Mapping
from typing import Any

from crystallm_kit.scoring.axes import number, written_unit
from crystallm_kit.scoring.document import markup
from crystallm_kit.structures.spacegroups import spacegroup_symbol

# The end of a measure's key -> its unit.
_UNITS = {
    "_g_cm3": "g/cm³", "_angstrom3": "Å³", "_angstrom": "Å", "_ev_per_atom": "eV/atom", "_ev": "eV",
    "_gpa": "GPa", "_degree": "°", "_degrees": "°",
}  # fmt: skip


def measure_label(key: str) -> tuple[str, str]:
    """Return a measure in words and its unit: "density_g_cm3" is ("Density", "g/cm³")."""
    special = {
        "n_sites": "Sites in the cell",
        "spacegroup_number": "Space group",
        "n_elements": "Number of elements",
    }
    end = next((end for end in sorted(_UNITS, key=len, reverse=True) if key.endswith(end)), "")
    words = special.get(key) or key.removesuffix(end).replace("_", " ")
    return words[:1].upper() + words[1:], _UNITS.get(end, "")


def measures_in_words(measures: Mapping[str, Any]) -> dict[str, str]:
    """Return a structure's measures: {"density": "2.165 g/cm³"}."""
    found = {}
    for key, value in measures.items():
        label, unit = measure_label(str(key))
        text = number(float(value), 4) if isinstance(value, int | float) else str(value)
        found[label.lower()] = f"{text} {unit}".strip()
    return found


def spacegroup_text(spacegroup_number: Any) -> str:
    """Return "Fm-3m (225)"; the text itself where it is no number from 1 to 230."""
    text = "" if spacegroup_number is None else str(spacegroup_number)
    try:
        whole = int(float(text))
    except (ValueError, OverflowError):
        return text
    return f"{spacegroup_symbol(whole)} ({whole})" if 1 <= whole <= 230 else text


def spacegroup_markup(spacegroup_number: Any) -> Any:
    """Return the same with bars over numbers instead of minus signs; any other text to be escaped."""
    text = spacegroup_text(spacegroup_number)
    if not re.fullmatch(r"[A-Za-z0-9/_-]+ \(\d+\)", text):
        return text
    return markup(re.sub(r"-(\d)", r'<span class="barred">\1</span>', text))


def formula_markup(formula: Any) -> Any:
    """Return a formula with its numbers lowered; any other text as it is, to be escaped."""
    text = str(formula)
    if not re.fullmatch(r"[A-Za-z0-9().\[\]]+", text):
        return text
    return markup(re.sub(r"(?<=[A-Za-z)\]])(\d+(?:\.\d+)?)", r"<sub>\1</sub>", text))


def plain_pairs(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested settings as one level of texts: {"matcher.length": "0.3"}."""
    found: dict[str, str] = {}
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            found.update(plain_pairs(value, f"{name}."))
        elif isinstance(value, list | tuple):
            found[name] = ", ".join(str(item) for item in value) or "none"
        else:
            found[name] = "none" if value is None or value == {} else written_unit(str(value))
    return found


def when(iso: Any) -> str:
    """Return a time as a person reads it: "2026-11-28 23:41 UTC"."""
    match = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d)\S*?(Z|\+00:00)?", str(iso))
    return f"{match[1]} {match[2]}{' UTC' if match[3] else ''}" if match else str(iso)
