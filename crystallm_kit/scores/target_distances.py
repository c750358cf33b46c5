"""Distances of ordered candidates to their targets, for structure prediction.

    distances_to_targets([truth], [[first, None, third]])     -> [[0.031, None, None]]
    distances_all_to_all([one, other], [[a, b], [c]])         -> one row a target: to a, b and c where they
                                                                 have its formula

A distance is StructureMatcher's get_rms_dist, candidate first, in units of (V/N)^(1/3); None: no match, no
structure, or another formula. Each structure is reduced once; the work is shared out to processes by
formula.

Not here: rates (match_scores.py), the comparison (matcher/structure_matcher.py).
"""

from collections.abc import Iterator, Sequence

from pymatgen.core import Structure

from crystallm_kit.errors import UserError
from crystallm_kit.scores.match_scores import all_to_all
from crystallm_kit.scores.matcher.reduced_forms import Plain, form_of, in_processes, plain_of
from crystallm_kit.scores.matcher.structure_matcher import TOLERANCES, Tolerances, rms_distance

Candidates = Sequence[Sequence[Structure | None]]
_Place = tuple[int, int]  # of a candidate: its target's number, its own
# Targets, candidates, and which of the candidates each target is compared with.
_Task = tuple[list[Plain], list[Plain], list[list[int]], Tolerances]
_PER_TASK = 400  # comparisons, so that tasks last about equally long


def distances_to_targets(
    targets: Sequence[Structure],
    candidates: Candidates,
    tolerances: Tolerances = TOLERANCES["csp"],
    *,
    processes: int | None = None,
) -> list[list[float | None]]:
    """Return the distances of each target's candidates, in order.

    Args:
        targets: The truths.
        candidates: For each target its ordered candidates; None where one could not be read.
        tolerances: The matcher's.
        processes: Worker processes; None: as many as there are usable cores.

    Raises:
        UserError: If there are not as many lists of candidates as targets.
    """
    _check(targets, candidates)
    formulas = [target.composition.reduced_formula for target in targets]
    wanted = [
        [(i, j) for j, one in enumerate(row) if _formula(one) == formulas[i]]
        for i, row in enumerate(candidates)
    ]
    found = _compared(targets, candidates, formulas, wanted, tolerances, processes)
    rows: list[list[float | None]] = [[None] * len(row) for row in candidates]
    for i, (places, distances) in enumerate(zip(wanted, found, strict=True)):
        for (_, j), distance in zip(places, distances, strict=True):
            rows[i][j] = distance
    return rows


def distances_all_to_all(
    targets: Sequence[Structure],
    candidates: Candidates,
    tolerances: Tolerances = TOLERANCES["csp"],
    *,
    k: int | None = None,
    processes: int | None = None,
) -> list[list[float | None]]:
    """Return for each target the distances of every candidate of the set that has its formula.

    Args:
        targets, candidates, tolerances, processes: As for `distances_to_targets`.
        k: Candidates of each target to look at; None: all.

    Returns:
        Rows for `match_scores.metre_scores`; candidates in the order of their targets.
    """
    _check(targets, candidates)
    formulas = [target.composition.reduced_formula for target in targets]
    wanted = all_to_all(formulas, [[_formula(one) for one in row] for row in candidates], k)
    return _compared(targets, candidates, formulas, wanted, tolerances, processes)


def _compared(
    targets: Sequence[Structure],
    candidates: Candidates,
    formulas: Sequence[str],
    wanted: Sequence[Sequence[_Place]],
    tolerances: Tolerances,
    processes: int | None,
) -> list[list[float | None]]:
    """Return the distance of each pair of a target and the place of a candidate."""
    found: list[list[float | None]] = [[] for _ in targets]
    batches = list(_batches(formulas, wanted))
    tasks = (_task(batch, targets, candidates, wanted, tolerances) for batch in batches)
    for batch, rows in zip(batches, in_processes(_distances, tasks, processes), strict=True):
        for i, row in zip(batch, rows, strict=True):
            found[i] = row
    return found


def _batches(formulas: Sequence[str], wanted: Sequence[Sequence[_Place]]) -> Iterator[list[int]]:
    """Yield targets to be worked out together, those of one formula if they are not too many."""
    order = sorted((i for i in range(len(formulas)) if wanted[i]), key=lambda i: formulas[i])
    batch: list[int] = []
    n_pairs = 0
    for i in order:
        batch.append(i)
        n_pairs += len(wanted[i])
        if n_pairs >= _PER_TASK:
            yield batch
            batch, n_pairs = [], 0
    if batch:
        yield batch


def _task(
    batch: Sequence[int],
    targets: Sequence[Structure],
    candidates: Candidates,
    wanted: Sequence[Sequence[_Place]],
    tolerances: Tolerances,
) -> _Task:
    places = {place: n for n, place in enumerate(dict.fromkeys(p for i in batch for p in wanted[i]))}
    return (
        [plain_of(targets[i]) for i in batch],
        [plain_of(candidates[i][j]) for i, j in places],
        [[places[place] for place in wanted[i]] for i in batch],
        tolerances,
    )


def _distances(task: _Task) -> list[list[float | None]]:
    targets, candidates, wanted, tolerances = task
    forms = [form_of(plain) for plain in candidates]
    rows: list[list[float | None]] = []
    for plain, numbers in zip(targets, wanted, strict=True):
        truth = form_of(plain)
        row: list[float | None] = []
        for n in numbers:
            form = forms[n]
            row.append(None if form is None or truth is None else rms_distance(form, truth, tolerances))
        rows.append(row)
    return rows


def _formula(structure: Structure | None) -> str | None:
    return None if structure is None else structure.composition.reduced_formula


def _check(targets: Sequence[Structure], candidates: Candidates) -> None:
    if len(targets) != len(candidates):
        raise UserError(
            f"distances to targets: {len(candidates)} lists of candidates for {len(targets)} targets; "
            "pass one for each, empty where nothing was generated"
        )
