"""Tables of a report: scores of several sets side by side, one protocol a table, the best of a row marked.

    block = protocol_tables(report)[0]
    block.name, block.title          "cdvae", "CDVAE (Xie et al. 2022)"
    block.lines[1].cells[0]          Cell("83.25 %", "82.50 to 83.97 %", counts="8,325 of 10,000 requested")

Contract: a number is shown with all that is known of it (counts, interval, what the denominator counts); one
that was not computed shows why. The best of a row is marked where "better" says which way that is and two
sets differ; sets whose intervals overlap with the best one's are marked as not told apart from it.

Not here: the numbers (scores/), published ones (beside.py), the page (report.py), runs (comparison.py), the
command's tables on a terminal (terminal.py).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from crystallm_kit.scoring.axes import number, written_unit

ScoreDict = Mapping[str, Any]

_WORDS = {
    "comp": "composition",
    "struct": "structure",
    "sg": "space group",
    "wdist": "Wasserstein distance,",
    "amsd": "mean nearest structure distance,",
    "amcd": "mean nearest composition distance,",
    "jsd": "Jensen-Shannon distance,",
    "num": "number of",
    "elems": "elements",
    "prop": "energy",
    "sun": "S.U.N.: stable, unique, novel",
    "msun": "M.S.U.N.: metastable, unique, novel",
    "rmse": "RMSE",
    "rmsd": "RMSD",
    "ehull": "energy above hull",
    "cov": "coverage,",
    "metre": "METRe",
    "crmse": "cRMSE",
    "hhi": "supply concentration (HHI),",
    "mmd": "MMD,",
    "frechet": "Fréchet distance,",
    "xrd": "(XRD rule)",
    "n": "number of",
    "cdvae": "CDVAE",
    "diffcsp": "DiffCSP",
    "lemat": "LeMat",
    "llm": "LLM",
    "spacegroup": "space group",
}


# A unit that ends a name is shown with the value.
_UNIT_END = re.compile(r"_(angstrom3?|ev(_per_atom)?|g_cm3|gpa|degrees?|percent)$")


@dataclass(frozen=True)
class Cell:
    """One number of one set, in words.

    Attributes:
        value: "83.25 %"; "" where it was not computed.
        interval: "82.50 to 83.97 %"; "": there is none.
        interval_kind: "wilson" or "bootstrap".
        counts: "8,325 of 10,000 requested", or what a mean is over.
        note: What has to be known to read it; why it is not there.
        share: In [0, 1] for the small bar: (low, value, high); None: no bar.
        rank: "best", "near" (its interval overlaps with the best's) or "".
    """

    value: str = ""
    interval: str = ""
    interval_kind: str = ""
    counts: str = ""
    note: str = ""
    share: tuple[float, float, float] | None = None
    rank: str = ""


@dataclass(frozen=True)
class Line:
    """One score of all sets; its note where it is the same for all."""

    name: str
    label: str
    better: str
    cells: list[Cell]
    note: str = ""


@dataclass(frozen=True)
class Block:
    """All scores of one protocol.

    Attributes:
        name, title, text: The protocol's.
        lines: Scores that at least one set has.
        missing: Reason -> scores that no set has for it.
    """

    name: str
    title: str
    text: str
    lines: list[Line]
    missing: Mapping[str, list[str]] = field(default_factory=dict)


def protocol_tables(report: Mapping[str, Any]) -> list[Block]:
    """Return a table a protocol, in the order of the report's protocols; those it does not describe last."""
    described: Mapping[str, Any] = report["protocols"]
    by_set = [{score["name"]: score for score in one["scores"]} for one in report["sets"]]
    names = list(dict.fromkeys(name for scores in by_set for name in scores))
    blocks = []
    for protocol in dict.fromkeys([*described, *map(protocol_of, names)]):
        mine = [name for name in names if protocol_of(name) == protocol]
        about = described.get(protocol, {})
        if mine:
            every = [line_of(name, [scores.get(name) for scores in by_set]) for name in mine]
            lines, missing = without_missing(every)
            title, text = str(about.get("title", protocol)), str(about.get("text", ""))
            blocks.append(Block(protocol, title, text, lines, missing))
    return blocks


def without_missing(lines: Sequence[Line]) -> tuple[list[Line], dict[str, list[str]]]:
    """Return the lines that have a number, and reason -> the scores that no set has for this one reason."""
    kept: list[Line] = []
    missing: dict[str, list[str]] = {}
    for line in lines:
        reasons = {cell.note for cell in line.cells}
        if any(cell.value for cell in line.cells) or len(reasons) > 1:
            kept.append(line)
        else:
            missing.setdefault(reasons.pop(), []).append(line.name)
    return kept, missing


def protocol_of(name: str) -> str:
    """Return what stands before the first point of a score's name."""
    return name.partition(".")[0]


def line_of(name: str, scores: Sequence[ScoreDict | None]) -> Line:
    """Return a row: the same score of several sets; None: a set that does not have it."""
    better = next((str(s["better"]) for s in scores if s and s.get("better")), "")
    cells = [cell_of(score) for score in scores]
    notes = {cell.note for cell in cells}
    shared = notes.pop() if len(notes) == 1 and all(cell.value for cell in cells) else ""
    marked = [
        replace(cell, rank=rank, note="" if shared else cell.note)
        for cell, rank in zip(cells, _ranks(scores, better), strict=True)
    ]
    return Line(name, label_of(name), better, marked, shared)


def cell_of(score: ScoreDict | None) -> Cell:
    """Return a score in words."""
    if score is None:
        return Cell(note="not part of this set's run")
    if score["value"] is None:
        return Cell(note=score.get("note") or "no reason given")
    value, unit = float(score["value"]), str(score["unit"])
    # One sample of n moves a share by 100 / n percent.
    digits = 2 if (score.get("denominator") or 0) >= 1000 else 1
    span = interval_of(score)
    low, high = span or (value, value)
    return Cell(
        value=shown(value, unit, digits),
        interval=f"{shown(low, unit, digits, bare=True)} to {shown(high, unit, digits)}" if span else "",
        interval_kind=str(score.get("interval") or ""),
        counts=_counts(score),
        note=str(score.get("note") or ""),
        share=(low, value, high) if unit == "share" and 0 <= value <= 1 else None,
    )


def _counts(score: ScoreDict) -> str:
    over = str(score.get("over") or "")
    if score.get("numerator") is not None:
        return f"{score['numerator']:,} of {score['denominator']:,} {over}".strip()
    if score.get("denominator") is not None:
        return f"over {score['denominator']:,} {over}".strip()
    return f"over the {over}" if over and over != "requested" else ""


def shown(value: float, unit: str, digits: int = 1, *, bare: bool = False) -> str:
    """Return a value with its unit; shares in percent with so many decimals. `bare`: without the unit."""
    if unit == "share":
        return f"{100 * value:.{digits}f}" + ("" if bare else " %")
    text = number(value, 4)
    return text if bare or not unit else f"{text} {written_unit(unit)}"


def label_of(name: str) -> str:
    """Return a metric in words: "cdvae.wdist_density" is "Wasserstein distance, density"."""
    metric, _, k = name.partition(".")[2].partition("@")
    metric = _UNIT_END.sub("", metric)
    text = " ".join(_WORDS.get(word, word) for word in re.split(r"[_.]", metric) if word).strip(",") or name
    return text[:1].upper() + text[1:] + (f" at n\u00a0=\u00a0{k}" if k else "")


def interval_of(score: ScoreDict) -> tuple[float, float] | None:
    """Return a score's interval, if it has one."""
    low, high = score.get("low"), score.get("high")
    return None if low is None or high is None else (float(low), float(high))


def overlap(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Tell whether two intervals have a point in common."""
    return one[0] <= other[1] and other[0] <= one[1]


def _ranks(scores: Sequence[ScoreDict | None], better: str) -> list[str]:
    known = [float(s["value"]) for s in scores if s and s["value"] is not None]
    if better not in ("higher", "lower") or len(known) < 2 or min(known) == max(known):
        return [""] * len(scores)
    best = max(known) if better == "higher" else min(known)
    spans = [interval_of(s) for s in scores if s and s["value"] == best]
    ranks = []
    for score in scores:
        if score is None or score["value"] is None:
            ranks.append("")
        elif score["value"] == best:
            ranks.append("best")
        else:
            mine = interval_of(score)
            ranks.append("near" if mine and any(span and overlap(mine, span) for span in spans) else "")
    return ranks
