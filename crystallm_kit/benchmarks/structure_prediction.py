"""Structure prediction: how often the candidates of each generator hold the target's true structure.

Each order of each generator is a row: match rate and RMSE at each k without a gate (`kit`) and with the gates
of the published scripts (`diffcsp`, `crystallm`), and METRe, for which any candidate of the set counts.
Rates over other targets, or given a space group, are other tasks and other tables.

The gate cdvae.valid is applied without its fingerprint test, which none of DiffCSP's 10,000 published samples
fails; candidates that match nothing are not put to a gate, since it could change nothing.

Not here: drawing (candidates.py), the gates' definitions (scores/match_scores.py, scores/checks.py).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from pymatgen.core import Structure

from crystallm_kit.errors import UserError
from crystallm_kit.generation import ranked
from crystallm_kit.records import Crystal, Sample
from crystallm_kit.scores.checks import structure_checks
from crystallm_kit.scores.match_scores import Distances, match_scores, metre_scores
from crystallm_kit.scores.score import Score
from crystallm_kit.scores.target_distances import distances_all_to_all, distances_to_targets

# Protocol -> whose checks a candidate has to pass.
_GATES = {"diffcsp": "diffcsp", "crystallm": "crystallm"}
_NO_FINGERPRINTS = "without the fingerprint test"


@dataclass(frozen=True)
class Prediction:
    """The ordered candidates of one row of the table.

    Attributes:
        name: Of the row.
        candidates: For each target, in the targets' order; None where a text was no crystal.
        about: Of the generator.
    """

    name: str
    candidates: list[list[Structure | None]]
    about: str = ""


def in_order(order: str, samples: Sequence[Sample], k: int) -> list[Structure | None]:
    """Return a target's first k candidates, as they were drawn or as the model ranks them."""
    first = (samples if order == "drawn" else ranked(samples))[:k]
    return [s.structure if isinstance(s.structure, Structure) else None for s in first]


def candidates_from_file(
    crystals: Iterator[Crystal], targets: Sequence[Crystal], k: int, name: str
) -> list[list[Structure | None]]:
    """Return the candidates that another system made: k a target, in the order of the targets.

    Raises:
        UserError: If there are fewer or more, or the first of a target has another composition.
    """
    found = [c.structure if isinstance(c.structure, Structure) else None for c in crystals]
    if len(found) != k * len(targets):
        raise UserError(
            f"{name}: {len(found):,} crystals for {len(targets):,} targets; {k} a target are expected "
            f"({k * len(targets):,}), in the order of the targets. Set `k` to what the file holds."
        )
    rows = [found[i * k : (i + 1) * k] for i in range(len(targets))]
    for target, row in zip(targets, rows, strict=True):
        wanted = target.structure.composition.reduced_formula
        formulas = {s.composition.reduced_formula for s in row if s is not None}
        if formulas and wanted not in formulas:
            raise UserError(
                f"{name}: candidates of {target.id} ({wanted}) are {', '.join(sorted(formulas))}; they have "
                "to stand in the order of the targets"
            )
    return rows


def prediction_scores(
    prediction: Prediction,
    targets: Sequence[Structure],
    ks: Sequence[int],
    *,
    processes: int | None = None,
) -> dict[str, Score]:
    """Return all scores of one row, by name.

    Args:
        prediction: With a list of candidates for each target.
        targets: The truths.
        ks: Numbers of candidates looked at.
        processes: Worker processes; None: as many as there are usable cores.
    """
    # a row without candidates would leave the denominators of some protocols: it was requested
    candidates = [row[: max(ks)] or [None] for row in prediction.candidates]
    distances = distances_to_targets(targets, candidates, processes=processes)
    scores = match_scores(distances, ks)
    checks = _checks_of_matched(distances, candidates)
    for protocol, kind in _GATES.items():
        gate = [
            [_passes(checks.get((i, j)), kind) for j in range(len(row))] for i, row in enumerate(distances)
        ]
        truth = [_passes(structure_checks(t), kind) for t in targets] if protocol == "diffcsp" else None
        scores += match_scores(distances, ks, protocol=protocol, candidate_gate=gate, truth_gate=truth)
    everywhere = distances_all_to_all(targets, candidates, k=1, processes=processes)
    scores += metre_scores(everywhere, k=1)
    return {s.name: s for s in map(_noted, scores)}


def _noted(score: Score) -> Score:
    gated = score.protocol == "diffcsp"
    return replace(score, note=f"{score.note}; {_NO_FINGERPRINTS}") if gated else score


def _checks_of_matched(
    distances: Distances, candidates: Sequence[Sequence[Structure | None]]
) -> dict[tuple[int, int], Mapping[str, bool | float]]:
    return {
        (i, j): structure_checks(candidates[i][j])
        for i, row in enumerate(distances)
        for j, distance in enumerate(row)
        if distance is not None
    }


def _passes(checks: Mapping[str, bool | float] | None, kind: str) -> bool:
    if checks is None:
        return False
    if kind == "crystallm":
        return bool(checks["crystallm.csp_valid"])
    return bool(checks["diffcsp.structure_valid"] and checks["diffcsp.comp_valid"])
