"""report.json and its rows -> report.html: one file that a person opens, reads, prints and sends on.

    write_report("scores/") -> scores/report.html

Sections: the funnel of each set and what stopped the others; scores, one table a protocol; distributions
against the reference; structures in 3-D; parity and calibration; failures; published results beside ours; how
it was made. A section whose numbers the run does not have is left out.

Not here: the numbers (the run); tables (tables.py, beside.py); pictures (plots.py, histograms.py,
gallery.py); how things are said (wording.py); the page's frame, scripts and policy (document.py); several
runs (comparison.py).
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crystallm_kit.errors import ReadError
from crystallm_kit.scoring.axes import MARK_SHAPES, percent
from crystallm_kit.scoring.beside import PublishedBlock, plain_block, published_block
from crystallm_kit.scoring.document import document, embedded_json, markup
from crystallm_kit.scoring.failed_rows import failed_rows
from crystallm_kit.scoring.gallery import drawn, gradients
from crystallm_kit.scoring.histograms import (
    Series,
    category_picture,
    elements_picture,
    largest_share,
    numeric_picture,
)
from crystallm_kit.scoring.plots import funnel_picture, parity_picture
from crystallm_kit.scoring.published import MARKS, published_tables
from crystallm_kit.scoring.tables import protocol_of, protocol_tables
from crystallm_kit.scoring.wording import (
    formula_markup,
    measure_label,
    measures_in_words,
    plain_pairs,
    spacegroup_markup,
    spacegroup_text,
    when,
)

REPORT_JSON, REPORT_HTML = "report.json", "report.html"
SCHEMA = 1
_SECTIONS = (
    ("glance", "At a glance"), ("scores", "Scores"), ("distributions", "Distributions"),
    ("structures", "Structures"), ("parity", "Parity"), ("failures", "Failures"), ("published", "Published"),
    ("method", "How it was made"),
)  # fmt: skip
_NEEDED = ("schema", "created", "command", "versions", "settings", "protocols", "sets", "reference", "notes")
_NEEDED_OF_SET = ("name", "n_requested", "funnel", "reasons", "scores", "distributions", "gallery", "rows")
_NEEDED_OF_REFERENCE = ("name", "n", "distributions")
_TONES = {"best": "good", "typical": "", "failure": "bad"}
SIGNS = {"verified": "✓", "local": "§", "recalled": "†", "measured": "◆"}


def write_report(folder: str | Path) -> Path:
    """Write report.html into the folder of a scoring run, and return its path.

    Args:
        folder: Holds report.json and the rows that it names.

    Raises:
        ReadError: If report.json is missing, is no JSON, of another schema or lacks what the page needs.
    """
    folder = Path(folder)
    path = folder / REPORT_HTML
    writing = path.with_name(f".{REPORT_HTML}.writing")
    writing.write_text(report_page(read_report(folder), folder), encoding="utf-8")
    writing.replace(path)
    return path


def read_report(folder: str | Path) -> dict[str, Any]:
    """Return what report.json of a folder holds. Raises ReadError, as `write_report`."""
    path = Path(folder) / REPORT_JSON
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ReadError(
            f"{folder}: no {REPORT_JSON}; expected the folder that `crystallm-kit score ... --out` wrote"
        ) from error
    except (OSError, ValueError) as error:
        raise ReadError(f"{path}: cannot be read as JSON ({error}); score the samples again") from error
    if not isinstance(report, dict) or report.get("schema") != SCHEMA:
        found = report.get("schema") if isinstance(report, dict) else type(report).__name__
        raise ReadError(
            f"{path}: schema {found!r}, expected {SCHEMA}; score the samples again with this version"
        )
    _check(report, _NEEDED, str(path))
    if not report["sets"]:
        raise ReadError(f"{path}: no sets, so nothing to show")
    if report["reference"] is not None:
        _check(report["reference"], _NEEDED_OF_REFERENCE, f"{path}: reference")
    for one in report["sets"]:
        where = f"{path}: set '{one.get('name', '?')}'"
        _check(one, _NEEDED_OF_SET, where)
        for score in one["scores"]:
            _check(score, ("name", "value", "unit"), f"{where}: a score")
        for item in one["gallery"]:
            _check(item, ("id", "kind"), f"{where}: a structure of the gallery")
    return report


def _check(mapping: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    missing = [name for name in names if name not in mapping]
    if missing:
        raise ReadError(f"{where}: lacks {', '.join(missing)}; score the samples again with this version")


def report_page(report: Mapping[str, Any], folder: Path) -> str:
    """Return the page of a report; `folder` is where its rows are."""
    sets = [_set(one, colour) for colour, one in enumerate(report["sets"])]
    shelves, structures, symbols = _gallery(report["sets"])
    failures = failed_rows(folder, report["sets"])
    content: dict[str, Any] = {
        "sets": sets,
        "blocks": protocol_tables(report),
        "distributions": _distributions(report),
        "elements": _elements(report),
        "gallery": shelves,
        "parity": _parity(report["sets"]),
        "failures": {
            "total": failures.total, "most": failures.most, "notes": failures.notes,
            "reasons": failures.reasons,
            "rows": [
                {
                    **vars(row), "formula": formula_markup(row.formula), "plain_formula": row.formula,
                    "spacegroup": spacegroup_markup(row.spacegroup_number),
                }
                for row in failures.rows
            ],
        },
        "published": _published(report),
    }  # fmt: skip
    present = {
        "glance", "scores", "method",
        *(["distributions"] if content["distributions"] or content["elements"] else []),
        *(["structures"] if shelves else []),
        *(["failures"] if failures.total else []),
        *(name for name in ("parity", "published") if content[name]),
    }  # fmt: skip
    return document(
        "report.html.j2",
        title="Scores of " + ", ".join(one["name"] for one in sets),
        with_structures=bool(structures),
        marks=MARK_SHAPES,
        contents=[(anchor, text) for anchor, text in _SECTIONS if anchor in present],
        created=when(report["created"]),
        command=report["command"],
        settings=plain_pairs(report["settings"]),
        versions=plain_pairs(report["versions"]),
        protocols=[
            {
                "name": name, "title": about.get("title", name), "text": about.get("text", ""),
                "settings": plain_pairs(about.get("settings") or {}),
            }
            for name, about in report["protocols"].items()
        ],
        reference=report["reference"],
        notes=report["notes"],
        gradients=markup(gradients(symbols)),
        data=embedded_json(json.dumps(structures)),
        **content,
    )  # fmt: skip


# ---------------------------------------------------------------- sections


def _set(one: Mapping[str, Any], colour: int) -> dict[str, Any]:
    requested = int(one["n_requested"])
    return {
        "name": str(one["name"]),
        "colour": colour,
        "n_requested": requested,
        "sources": [str(source) for source in one.get("sources", [])],
        "rows": str(one["rows"]),
        "sentence": _sentence(one),
        "funnel": markup(funnel_picture(one["funnel"], str(one["name"]), colour)),
        "reasons": [
            {"name": str(reason), "count": int(count), "share": int(count) / max(requested, 1)}
            for reason, count in sorted(one["reasons"].items(), key=lambda item: -item[1])
        ],
    }


def _sentence(one: Mapping[str, Any]) -> str:
    """Return the set's result in words: "492 of 600 requested (82.0 %) are novel, and all before it." """
    if not one["funnel"]:
        return ""
    requested, (stage, left) = int(one["n_requested"]), one["funnel"][-1]
    share = f" ({percent(left / requested)})" if requested else ""
    passed = f"{left:,} of {requested:,} requested{share} pass every gate, down to “{stage}”."
    if not one["reasons"]:
        return passed
    reason, count = max(one["reasons"].items(), key=lambda item: item[1])
    return f"{passed} What stops most of the others is “{reason}” ({count:,})."


def _distributions(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    reference = (report["reference"] or {}).get("distributions", {})
    quantities = list(dict.fromkeys(q for one in report["sets"] for q in one["distributions"]))
    found = []
    for quantity in quantities:
        if quantity == "elements":
            continue
        series = [
            Series(str(one["name"]), colour, _numeric(quantity, one["distributions"][quantity]))
            for colour, one in enumerate(report["sets"])
            if quantity in one["distributions"]
        ]
        against = _numeric(quantity, reference[quantity]) if quantity in reference else None
        kind = series[0].distribution["kind"]
        if against is not None and against["kind"] != kind:
            against = None
        series = [one for one in series if one.distribution["kind"] == kind]
        title, unit = measure_label(quantity)
        if kind == "numeric":
            unit = unit or str(series[0].distribution.get("unit", ""))
            picture = numeric_picture(title, series, against, unit)
        else:
            picture = category_picture(title, series, against, _labels(quantity, series, against))
        if picture:
            found.append({"title": title, "picture": markup(picture)})
    return found


def _numeric(quantity: str, distribution: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return counts of small whole numbers that came as categories as a histogram."""
    if quantity not in ("n_elements", "n_sites") or distribution["kind"] != "category":
        return distribution
    values = {int(label): int(count) for label, count in distribution["values"].items()}
    last = max(values, default=1)
    edges = [k + 0.5 for k in range(last + 1)]
    return {
        "kind": "numeric",
        "unit": "",
        "edges": edges,
        "counts": [values.get(k, 0) for k in range(1, last + 1)],
    }


def _labels(quantity: str, series: Sequence[Series], reference: Mapping[str, Any] | None) -> dict[str, str]:
    if quantity != "spacegroup_number":
        return {}
    every = [s.distribution for s in series] + ([reference] if reference else [])
    return {label: spacegroup_text(label) for d in every for label in d["values"]}


def _elements(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    reference = report["reference"] or {}
    tables: list[tuple[str, int | None, Any]] = [
        (str(reference.get("name", "")), None, reference.get("distributions", {}).get("elements"))
    ]
    tables += [
        (str(one["name"]), colour, one["distributions"].get("elements"))
        for colour, one in enumerate(report["sets"])
    ]
    known = [(name, colour, d) for name, colour, d in tables if d and sum(d["values"].values())]
    most = largest_share([d for _, _, d in known])
    return [
        {"title": name, "colour": colour, "picture": markup(elements_picture(name, colour, d, most))}
        for name, colour, d in known
    ]


def _gallery(
    sets: Sequence[Mapping[str, Any]],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], set[str]]:
    """Return the shelves of cards, what the page's viewer draws of each, and the elements that occur."""
    shelves: list[dict[str, Any]] = []
    structures: list[dict[str, Any]] = []
    symbols: set[str] = set()
    for colour, one in enumerate(sets):
        cards = []
        for item in one["gallery"]:
            crystal = drawn(item["cif"], conventional=item["kind"] != "failure") if item.get("cif") else None
            fault = "no structure to show" if crystal is None else crystal.fault
            if crystal is not None and crystal.still:
                symbols |= set(crystal.counts)
            name = re.sub(r"[^\w.-]+", "_", str(item["id"]))[:80] or "structure"
            data = crystal.data if crystal is not None else {}
            cards.append({
                "number": len(structures), "kind": str(item["kind"]), "tone": _TONES.get(item["kind"], ""),
                "still": markup(crystal.still) if crystal is not None and crystal.still else "",
                "fault": fault, "formula": formula_markup(item.get("formula") or "no formula"),
                "plain_formula": str(item.get("formula") or item["id"]),
                "spacegroup": spacegroup_markup(item.get("spacegroup_number")),
                "reason": str(item.get("reason") or ""), "detail": str(item.get("detail") or ""),
                "measures": measures_in_words(item.get("measures") or {}), "id": str(item["id"]),
            })  # fmt: skip
            structures.append({**data, "cif": str(item.get("cif") or ""), "name": name})
        if cards:
            shelves.append({"name": str(one["name"]), "colour": colour, "cards": cards})
    return shelves, structures, symbols


def _parity(sets: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for colour, one in enumerate(sets):
        for plot in one.get("parity", []):
            picture, sentence = parity_picture(plot, colour)
            found.append({
                "title": str(plot["title"]), "set": str(one["name"]), "colour": colour,
                "picture": markup(picture), "sentence": sentence,
            })  # fmt: skip
    return found


def _published(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the published tables that the run names, and the rows that name none, by protocol."""
    entries = report.get("published") or []
    named = list(dict.fromkeys(e["table"] for e in entries if e.get("table") in published_tables()))
    blocks = [published_block(published_tables()[name], report) for name in named]
    others = [e for e in entries if e.get("table") not in named]
    protocols = dict.fromkeys(protocol_of(name) for e in others for name in e["scores"])
    blocks += [plain_block(protocol, others, report) for protocol in protocols]
    return [_shown_block(block, f"source-{k}") for k, block in enumerate(blocks)]


def _shown_block(block: PublishedBlock, key: str) -> dict[str, Any]:
    rows = []
    noted: dict[str, list[str]] = {}
    for system, year, cells in block.rows:
        known = [cell for cell in cells if cell.text]
        for note in dict.fromkeys(cell.note for cell in known if cell.note):
            noted.setdefault(note, []).append(system)
        rows.append({
            "system": system, "year": year,
            "cells": [
                {**vars(c), "sign": _sign(c.mark, c.second_hand), "said": _said(c.mark, c.second_hand)}
                for c in cells
            ],
            "evidence": list(dict.fromkeys(c.mark + (" ‡" if c.second_hand else "") for c in known)),
            "recheck": any(c.needs_recheck for c in known),
            "sources": sorted({block.sources.index(c.source) + 1 for c in known if c.source}),
        })  # fmt: skip
    notes = [f"{', '.join(systems)}: {note}." for note, systems in noted.items()]
    return {**vars(block), "rows": rows, "notes": notes, "key": key}


def _sign(mark: str, second_hand: bool) -> str:
    return "‡" if second_hand and mark == "verified" else SIGNS.get(mark, "")


def _said(mark: str, second_hand: bool) -> str:
    return MARKS.get(mark, mark) + (", in a document that quotes it" if second_hand else "")
