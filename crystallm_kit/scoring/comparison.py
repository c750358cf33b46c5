"""Several scoring runs side by side: what changed, by how much, and whether the intervals still overlap.

    compare_runs(["runs/a", "runs/b"], "comparison.html") -> comparison.html

A run's column stands beside the first run's only under the same protocol: where two runs describe a protocol
differently (its text or a setting of it), each has a table of its own, and the page names what differs. The
same goes for settings and library versions of the runs, which are listed where they are not equal.

A set is compared with the set of the same name in the first run that has it; where both runs have a single
set, with that.

Not here: one run (report.py).
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from crystallm_kit.errors import UserError
from crystallm_kit.scoring.axes import MARK_SHAPES, number, written_unit
from crystallm_kit.scoring.document import document, markup
from crystallm_kit.scoring.plots import funnel_picture
from crystallm_kit.scoring.report import read_report
from crystallm_kit.scoring.tables import (
    ScoreDict,
    interval_of,
    line_of,
    overlap,
    protocol_of,
    without_missing,
)
from crystallm_kit.scoring.wording import plain_pairs, when

COMPARISON_HTML = "comparison.html"
_OF_REFERENCE = frozenset(
    "novel novelty known sun msun cov amsd amcd wdist jsd mmd frechet precision recall coverage".split()
)


@dataclass(frozen=True)
class Column:
    """One set of one run.

    Attributes:
        run: The run's name.
        name: The set's.
        colour: Its number over all runs.
        scores: By name.
        base: The number of the column with which it is compared; None: with none.
    """

    run: str
    name: str
    colour: int
    scores: Mapping[str, ScoreDict]
    base: int | None


@dataclass(frozen=True)
class Change:
    """A score against the one it is compared with.

    Attributes:
        text: "+2.1 points".
        tone: "good", "bad" or "": neither way is better, or nothing changed.
        overlap: "intervals overlap", "intervals apart", "same value", or "" where there are none.
    """

    text: str
    tone: str
    overlap: str


@dataclass(frozen=True)
class Difference:
    """One setting that is not the same in all runs: its value in each; "–" where a run does not have it."""

    name: str
    values: list[str]


def compare_runs(folders: Sequence[str | Path], out: str | Path) -> Path:
    """Write a page that compares runs, and return its path.

    Args:
        folders: Of scoring runs, two or more; the first is what the others are compared with.
        out: The page, or a folder for comparison.html.

    Raises:
        UserError: If fewer than two runs, or one twice, are given.
        ReadError: If a folder holds no run that can be read.
    """
    paths = [Path(folder) for folder in folders]
    if len(paths) < 2:
        raise UserError(f"{len(paths)} run to compare, 2 or more expected: give their folders")
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError("the same folder is given twice; give folders of different runs")
    reports = [read_report(path) for path in paths]
    target = Path(out)
    if target.is_dir() or target.suffix.lower() not in (".html", ".htm"):
        target.mkdir(parents=True, exist_ok=True)
        target = target / COMPARISON_HTML
    writing = target.with_name(f".{target.name}.writing")
    writing.write_text(comparison_page(reports, _names(paths)), encoding="utf-8")
    writing.replace(target)
    return target


def comparison_page(reports: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Return the page that compares these reports; `names` are the runs'."""
    columns = columns_of(reports, names)
    differences = {
        "Settings": differences_of([report["settings"] for report in reports]),
        "Reference": differences_of([_reference(report) for report in reports]),
        "Versions": differences_of([report["versions"] for report in reports]),
    }
    funnels = [
        {
            "run": column.run, "name": column.name, "colour": column.colour,
            "picture": markup(funnel_picture(one["funnel"], f"{column.run}, {column.name}", column.colour)),
        }
        for column, one in zip(columns, (one for r in reports for one in r["sets"]), strict=True)
    ]  # fmt: skip
    return document(
        "comparison.html.j2",
        title="Comparison of " + ", ".join(names),
        with_structures=False,
        marks=MARK_SHAPES,
        runs=[
            {"name": name, "created": when(report["created"]), "command": report["command"]}
            for name, report in zip(names, reports, strict=True)
        ],
        differences={kind: found for kind, found in differences.items() if found},
        blocks=blocks_of(reports, names, columns),
        funnels=funnels,
    )  # fmt: skip


def columns_of(reports: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Column]:
    """Return a column a set, run by run, each with the one that it is compared with."""
    columns: list[Column] = []
    of_run: list[list[int]] = []
    for report, run in zip(reports, names, strict=True):
        mine = []
        for one in report["sets"]:
            name = str(one["name"])
            base = next((k for k, c in enumerate(columns) if c.name == name and c.run != run), None)
            if base is None and of_run and len(report["sets"]) == 1 == len(of_run[0]):
                base = of_run[0][0]
            mine.append(len(columns))
            columns.append(
                Column(run, name, len(columns), {score["name"]: score for score in one["scores"]}, base)
            )
        of_run.append(mine)
    return columns


def blocks_of(
    reports: Sequence[Mapping[str, Any]], names: Sequence[str], columns: Sequence[Column]
) -> list[dict[str, Any]]:
    """Return a table for each protocol and each way in which the runs describe it."""
    protocols = dict.fromkeys(
        protocol for r in reports for protocol in (*r["protocols"], *_protocols_scored(r))
    )
    references = {run: _reference(report) for run, report in zip(names, reports, strict=True)}
    blocks = []
    for protocol in protocols:
        described = {
            run: report["protocols"].get(protocol, {}) for run, report in zip(names, reports, strict=True)
        }
        groups: dict[str, list[str]] = {}
        for run, about in described.items():
            if any(protocol_of(name) == protocol for c in columns if c.run == run for name in c.scores):
                groups.setdefault(json.dumps(about, sort_keys=True, default=str), []).append(run)
        differ = differences_of([described[run] for runs in groups.values() for run in runs[:1]])
        for runs in groups.values():
            shown = sorted((c for c in columns if c.run in runs), key=lambda c: (_root(c, columns), c.colour))
            about = described[runs[0]]
            blocks.append({
                "name": protocol, "title": str(about.get("title", protocol)),
                "text": str(about.get("text", "")), "runs": runs if len(groups) > 1 else [],
                "columns": shown, "differ": differ,
                "groups": [group[0] for group in groups.values()],
                **_lines(protocol, shown, columns, references),
            })  # fmt: skip
    return blocks


def _protocols_scored(report: Mapping[str, Any]) -> list[str]:
    return [protocol_of(score["name"]) for one in report["sets"] for score in one["scores"]]


def _root(column: Column, columns: Sequence[Column]) -> int:
    """Return the number of the column with which all of one set begin."""
    return column.colour if column.base is None else _root(columns[column.base], columns)


def _lines(
    protocol: str, shown: Sequence[Column], columns: Sequence[Column], references: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the lines that have a number, with their changes, and what no set has."""
    names = dict.fromkeys(name for c in shown for name in c.scores if protocol_of(name) == protocol)
    every = [line_of(name, [column.scores.get(name) for column in shown]) for name in names]
    kept, missing = without_missing(every)
    lines = []
    for line in kept:
        name = line.name
        changes: list[Change | None] = []
        is_against = depends_on_reference(name)
        for column in shown:
            base = None if column.base is None else columns[column.base]
            # Only what stands in this table has the same protocol.
            is_same = base is not None and any(base is other for other in shown)
            change = change_of(column.scores.get(name), base.scores.get(name)) if base and is_same else None
            if change and base and is_against and references[base.run] != references[column.run]:
                change = Change("other reference", "", "")
            changes.append(change)
        if is_against and any(references[c.run] != references[shown[0].run] for c in shown):
            cells = [
                (replace(cell, rank=""), change) for cell, change in zip(line.cells, changes, strict=True)
            ]
        else:
            cells = list(zip(line.cells, changes, strict=True))
        lines.append({
            "name": name, "label": line.label, "better": line.better, "note": line.note, "cells": cells,
        })  # fmt: skip
    return {"lines": lines, "missing": missing}


def depends_on_reference(name: str) -> bool:
    """Tell whether a score is against the reference, so that another one makes it another quantity."""
    return any(word in _OF_REFERENCE for word in re.split(r"[._@]", name))


def change_of(score: ScoreDict | None, base: ScoreDict | None) -> Change | None:
    """Return a score against another of the same name; None where one of the two is not there."""
    if score is None or base is None or score["value"] is None or base["value"] is None:
        return None
    difference = float(score["value"]) - float(base["value"])
    unit = str(score["unit"])
    if unit == "share":
        # One sample in 10,000 is 0.01 points.
        size = f"{abs(100 * difference):.2f} points"
    else:
        size = f"{number(abs(difference), 3)} {written_unit(unit)}".strip()
    if difference == 0:
        return Change("no change", "", "same value")
    better = score.get("better") or base.get("better")
    is_good = (difference > 0) == (better == "higher")
    mine, theirs = interval_of(score), interval_of(base)
    said = ""
    if mine and theirs:
        said = "intervals overlap" if overlap(mine, theirs) else "intervals apart"
    tone = "" if not better or said == "intervals overlap" else ("good" if is_good else "bad")
    return Change(f"{'+' if difference > 0 else '−'}{size}", tone, said)


def differences_of(mappings: Sequence[Mapping[str, Any]]) -> list[Difference]:
    """Return the settings that are not the same in all, nested ones by their path."""
    flat = [plain_pairs(mapping) for mapping in mappings]
    names = dict.fromkeys(name for one in flat for name in one)
    return [
        Difference(name, [one.get(name, "–") for one in flat])
        for name in names
        if len({one.get(name) for one in flat}) > 1
    ]


def _reference(report: Mapping[str, Any]) -> dict[str, Any]:
    reference = report["reference"]
    return {"name": reference["name"], "n": reference["n"]} if reference else {"name": "none"}


def _names(paths: Sequence[Path]) -> list[str]:
    """Return a name a run: its folder's, with as much of the path as tells them apart."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-depth:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]
