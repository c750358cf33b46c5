"""The stage `known`: is a sample's structure, its formula, its set of elements in the reference?

The reference's reduced forms are in an index on disk (scores/novelty/index.py), which every worker maps; it
is made once for a run.

Not here: the comparing (scores/novelty/index.py).
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from crystallm_kit.scores.matcher.mattergen_disorder import Alloy, matches_among
from crystallm_kit.scores.matcher.structure_matcher import TOLERANCES
from crystallm_kit.scores.novelty.index import NoveltyIndex
from crystallm_kit.scoring import reducing
from crystallm_kit.scoring.rows import STRUCTURE_COLUMNS, form_of, parts_of, read_part
from crystallm_kit.scoring.stages import Item

_PER_ADDITION = 100  # parts


def warm_up() -> None:
    """Compile, or load, the matcher."""
    reducing.warm_up()


def know(item: Item, settings: Mapping[str, Any], where: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of the stage."""
    del settings
    form = form_of(item.earlier["forms"])
    if form is None:
        return {}
    index = _index(where["index"])
    columns: dict[str, Any] = {
        "known_formula": index.has_formula(form.formula),
        "known_system": index.has_system(form.numbers.tolist()),
    }
    if columns["known_formula"]:
        n_sites = len(item.row["numbers"])
        same = index.find_all(form, TOLERANCES["default"])
        columns["known_as.default"], columns["all_known.default"] = (same[0], same) if same else (None, None)
        columns["known_as.lemat"] = index.find(form, TOLERANCES["lemat"])
        columns["known_as.cell_formula"] = index.find(form, TOLERANCES["default"], cell_sites=n_sites)
        columns["known_as.genmetrics"] = index.find(form, TOLERANCES["csp"], form_is_second=True)
    return columns


def know_alloy(item: Item, settings: Mapping[str, Any], where: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of `known_alloys`: the same by MatterGen's matcher, to which order is nothing."""
    del settings
    if item.structure is None:
        return {}
    alloy = Alloy(item.structure)
    entries = _index(where["index"]).entries(alloy.form.formula)
    same = list(matches_among(alloy, entries))
    return {"known_as.disordered": same[0], "all_known.disordered": same} if same else {}


def build_index(read: Path, forms: Path, folder: Path) -> int:
    """Add what is not yet in a set's index, and return how many entries it has.

    Args:
        read, forms: Folders of the set's parts.
        folder: Of the index.
    """
    index = NoveltyIndex.open(folder) if folder.exists() else NoveltyIndex.create(folder)
    done = int(index.meta.get("parts", 0))
    pairs = list(zip(parts_of(read), parts_of(forms), strict=True))
    for start in range(done, len(pairs), _PER_ADDITION):
        _add(index, pairs[start : start + _PER_ADDITION], min(len(pairs), start + _PER_ADDITION))
    return len(index)


def _add(index: NoveltyIndex, pairs: Sequence[tuple[Path, Path]], parts: int) -> None:
    ids, forms, sites = [], [], []
    for read, reduced in pairs:
        rows = read_part(read, ["id", "numbers"])
        for row, columns in zip(rows, read_part(reduced, ["reduced_formula", *_NAMES]), strict=True):
            form = form_of(columns)
            if form is not None:
                ids.append(row["id"])
                forms.append(form)
                sites.append(len(row["numbers"]))
    index.add(ids, forms, cell_sites=sites, meta={"parts": parts})


_NAMES = [name for name, _ in STRUCTURE_COLUMNS]


@lru_cache(maxsize=1)
def _index(folder: str) -> NoveltyIndex:
    return NoveltyIndex.open(folder)
