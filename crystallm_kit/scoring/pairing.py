"""Which target each sample is a candidate for: by id, by place, or by composition.

    targets mp-1, mp-2; samples mp-1__1, mp-1__2, mp-2__1    by id; candidates 0, 1 of mp-1, 0 of mp-2
    3,559 targets; 71,180 samples                             by place: 20 candidates of each, one by one
    otherwise                                                 by composition, if each target's is its own

With the way "none" nothing pairs: the targets are a test set that the samples may cover, no tasks.
Candidates keep the order of the samples. What does not pair is an error that names the first.

Not here: comparing (scores/matching.py, the stage `matches`).
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from pymatgen.core import Composition

from crystallm_kit.errors import UserError

WAYS = ("auto", "id", "index", "composition", "none")
_CANDIDATE = re.compile(r"(?:__|[-_:#])\d+$")  # what names a candidate after its target's id


@dataclass(frozen=True)
class Pairs:
    """Samples as candidates of targets.

    Attributes:
        way: How they were paired: "id", "index", "composition".
        target: (N,) int64, position of each sample's target.
        candidate: (N,) int64, its place among that target's.
    """

    way: str
    target: NDArray[np.int64]
    candidate: NDArray[np.int64]


@lru_cache(maxsize=10_000)
def asked_formula(conditions: str | None) -> str | None:
    """Return the reduced formula that a sample's conditions (JSON) ask for; None: none."""
    if not conditions:
        return None
    formula = json.loads(conditions).get("formula")
    return Composition(formula).reduced_formula if formula else None


def pair(
    ids: Sequence[str],
    formulas: Sequence[str | None],
    target_ids: Sequence[str],
    target_formulas: Sequence[str],
    *,
    way: str = "auto",
    asked: Sequence[str | None] = (),
) -> Pairs:
    """Return which sample belongs to which target.

    Args:
        ids: Of the samples.
        formulas: Their reduced formulas; None where there is no structure.
        target_ids, target_formulas: Of the targets.
        way: One of WAYS but "none".
        asked: Reduced formulas that were asked for, where that is known; they stand for a sample's own.

    Raises:
        UserError: If a sample or a target does not pair.
    """
    known = [a or f for a, f in zip(asked or [None] * len(ids), formulas, strict=True)]
    if way in ("auto", "id"):
        found = _by_id(ids, target_ids)
        missing = np.flatnonzero(found < 0)
        if not len(missing):
            return _numbered("id", found)
        if way == "id" or len(missing) < len(ids) / 2:
            raise UserError(
                f"targets: sample '{ids[missing[0]]}' has the id of no target (such as '{target_ids[0]}'); "
                f"{len(missing):,} of {len(ids):,} samples have none"
            )
    if way in ("auto", "index") and len(ids) % len(target_ids) == 0:
        target = np.arange(len(ids)) // (len(ids) // len(target_ids))
        wrong = _first_other(formulas, target, target_formulas)
        if wrong is None:
            return _numbered("index", target)
        if way == "index":
            raise UserError(
                f"targets: sample '{ids[wrong]}' is {formulas[wrong]}, but the target at its place, "
                f"'{target_ids[target[wrong]]}', is {target_formulas[target[wrong]]}"
            )
    if way == "index":
        raise UserError(f"targets: {len(ids):,} samples are no multiple of {len(target_ids):,} targets")
    return _numbered("composition", _by_composition(ids, known, target_ids, target_formulas))


def _by_id(ids: Sequence[str], target_ids: Sequence[str]) -> NDArray[np.int64]:
    at = {name: i for i, name in enumerate(target_ids)}
    return np.array([at.get(name, at.get(_CANDIDATE.sub("", name), -1)) for name in ids], dtype=np.int64)


def _first_other(
    formulas: Sequence[str | None], target: NDArray[np.int64], target_formulas: Sequence[str]
) -> int | None:
    other = (i for i, f in enumerate(formulas) if f is not None and f != target_formulas[target[i]])
    return next(other, None)


def _by_composition(
    ids: Sequence[str],
    formulas: Sequence[str | None],
    target_ids: Sequence[str],
    target_formulas: Sequence[str],
) -> NDArray[np.int64]:
    at: dict[str, int] = {}
    for i, formula in enumerate(target_formulas):
        if formula in at:
            raise UserError(
                f"targets: '{target_ids[at[formula]]}' and '{target_ids[i]}' are both {formula}, so "
                "compositions pair no samples with them; give samples their target's id, or as many "
                "candidates for each target, in order"
            )
        at[formula] = i
    found = np.array([at.get(f, -1) if f is not None else -1 for f in formulas], dtype=np.int64)
    for i in np.flatnonzero(found < 0).tolist():
        what = formulas[i] or "no structure, and no record of what was asked"
        raise UserError(f"targets: sample '{ids[i]}' ({what}) has the composition of no target")
    return found


def _numbered(way: str, target: NDArray[np.int64]) -> Pairs:
    """Return the pairs with each sample's place among its target's."""
    order = np.argsort(target, kind="stable")
    ends = np.flatnonzero(np.diff(target[order], prepend=-1))
    place = np.arange(len(target)) - np.repeat(ends, np.diff([*ends, len(target)]))
    candidate = np.empty(len(target), dtype=np.int64)
    candidate[order] = place
    return Pairs(way, target.astype(np.int64), candidate)
