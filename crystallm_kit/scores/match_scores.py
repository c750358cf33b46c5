"""Match rates of structure prediction under each protocol's gates, and the metrics that see polymorphs.

    rows = [[0.031, None], [None, None], [None, 0.12]]      distances of 2 candidates of 3 targets, in order
    match_scores(rows, [1, 2]) -> kit.match_rate@1 1/3, kit.rmse@1 0.031, kit.match_rate@2 2/3, kit.rmse@2 ...

A distance is get_rms_dist's first number at match.csp (0.3, 0.5, 10 degrees), in units of (V/N)^(1/3); None:
no match. Candidates are ordered: the first k count, not the best k.

    protocol           gate on candidates       gate on the truth      denominator
    kit                none                     none                   all targets
    kit_gated          cdvae.valid              none                   all targets
    diffcsp            cdvae.valid              cdvae.valid at k = 1   all targets
    cdvae              cdvae.valid              none                   all targets
    crystallm          crystallm.csp_valid      none                   targets with a sample in the archive
    crystallm_pi       as diffcsp, 40 A rule    none                   targets with a row in the table

METRe and cRMSE compare every candidate of all targets with every target (`all_to_all` says which pairs share
a formula; others cannot match), since which of two polymorphs was asked for is not in the prompt:

    METRe   share of targets that any candidate of the whole set matches
    cRMSE   mean over all targets of the smallest distance, of stol (0.5) where nothing matches

Not here: distances (target_distances.py, matching.py), what is valid (validity.py).
Sources: the gates are those of the scripts of DiffCSP (arXiv:2309.04475), CrystaLLM and CrystaLLM-pi, as read
there. METRe, cRMSE: Martirossyan et al. 2025, arXiv:2509.12178, of which the abstract was read; the
definitions were read as quoted, with the formula of cRMSE, in a later paper of the same group (OMatG-flash,
appendix F.1, equations 64 to 66). That one candidate is drawn for each target there is recalled.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from crystallm_kit.errors import EmptyInput, UserError
from crystallm_kit.scores.matcher.structure_matcher import TOLERANCES
from crystallm_kit.scores.score import Score, mean, not_computed, share

Distances = Sequence[Sequence[float | None]]
_UNIT = "(V/N)^(1/3)"


@dataclass(frozen=True)
class Gate:
    """What a protocol asks of a pair before it may match.

    Attributes:
        note: The gate, in words.
        truth_at_1: Whether the truth has to pass at k = 1, too.
        answered_only: Whether targets without any sample leave the denominator.
    """

    note: str
    truth_at_1: bool = False
    answered_only: bool = False


GATES = {
    "kit": Gate("no gate"),
    "kit_gated": Gate("candidates pass cdvae.valid"),
    "diffcsp": Gate("candidates pass cdvae.valid", truth_at_1=True),
    "cdvae": Gate("candidates pass cdvae.valid"),
    "crystallm": Gate("candidates pass crystallm.csp_valid", answered_only=True),
    "crystallm_pi": Gate("candidates pass cdvae.valid and have no edge over 40 A", answered_only=True),
}


def match_scores(
    distances: Distances,
    ks: Sequence[int],
    *,
    protocol: str = "kit",
    candidate_gate: Sequence[Sequence[bool]] | None = None,
    truth_gate: Sequence[bool] | None = None,
) -> list[Score]:
    """Return match rate and RMSE of a protocol at each k.

    Args:
        distances: One row a target, one entry a candidate, in order; a target without samples has an empty
            row.
        ks: Numbers of candidates looked at.
        protocol: A name in GATES.
        candidate_gate: Whether each candidate passes the protocol's gate; shaped as `distances`. Needed but
            for "kit".
        truth_gate: Whether each target passes; needed for "diffcsp" at k = 1.

    Raises:
        EmptyInput: Without targets.
        UserError: If a gate is missing or of another shape.
    """
    gate = GATES[protocol]
    if not distances:
        raise EmptyInput(f"{protocol}.match_rate: no targets, so no rate")
    rows = distances if protocol == "kit" else _gated(distances, candidate_gate, protocol)
    if truth_gate is not None and len(truth_gate) != len(rows):
        raise UserError(f"{protocol}.match_rate: {len(truth_gate)} flags for {len(rows)} targets")
    scores = []
    for k in ks:
        passed = [True] * len(rows)
        note = f"{gate.note}; first {k} candidates"
        if gate.truth_at_1 and k == 1:
            if truth_gate is None:
                raise UserError(f"{protocol}.match_rate@1 gates the truth too: pass truth_gate")
            passed, note = list(truth_gate), f"{note}; the truth passes, too"
        best = [
            _smallest(row[:k]) if truth else None
            for row, truth in zip(rows, passed, strict=True)
            if row or not gate.answered_only
        ]
        scores += _rate_and_rmse(f"{protocol}.match_rate@{k}", f"{protocol}.rmse@{k}", best, note)
    return scores


def metre_scores(
    distances: Distances, *, k: int | None = None, stol: float = TOLERANCES["csp"].site
) -> list[Score]:
    """Return METRe and cRMSE.

    Args:
        distances: One row a target: to every candidate that `all_to_all` pairs with it.
        k: Candidates drawn for each target, for the name ("kit.metre@20"); None: not said.
        stol: What a target counts that nothing matches.

    Raises:
        EmptyInput: Without targets.
    """
    if not distances:
        raise EmptyInput("kit.metre: no targets, so no rate")
    at = "" if k is None else f"@{k}"
    best = [_smallest(row) for row in distances]
    matched = sum(one is not None for one in best)
    return [
        share(
            f"kit.metre{at}", matched, len(best), over="targets",
            note="any candidate of the set, of whichever target, counts (arXiv:2509.12178)",
        ),
        mean(
            f"kit.crmse{at}", [stol if one is None else one for one in best], unit=_UNIT, over="targets",
            better="lower", note=f"targets without a match count {stol:g} (arXiv:2509.12178)",
        ),
    ]  # fmt: skip


def all_to_all(
    target_formulas: Sequence[str], candidate_formulas: Sequence[Sequence[str | None]], k: int | None = None
) -> list[list[tuple[int, int]]]:
    """Return for each target which candidates of the whole set share its formula: (target, place) pairs.

    Args:
        target_formulas: Reduced formulas.
        candidate_formulas: Those of each target's ordered candidates; None: no structure.
        k: Candidates of each target to look at; None: all.
    """
    where: dict[str, list[tuple[int, int]]] = {}
    for target, row in enumerate(candidate_formulas):
        for place, formula in enumerate(row[:k]):
            if formula is not None:
                where.setdefault(formula, []).append((target, place))
    return [where.get(formula, []) for formula in target_formulas]


def _rate_and_rmse(rate: str, rmse: str, best: Sequence[float | None], note: str) -> list[Score]:
    if not best:
        return [not_computed(rate, f"{note}; no target has a sample")]
    matched = [one for one in best if one is not None]
    scores = [share(rate, len(matched), len(best), over="targets", note=note)]
    if matched:
        scores.append(mean(rmse, matched, unit=_UNIT, over="matched targets", better="lower", note=note))
    else:
        scores.append(not_computed(rmse, "nothing matches", unit=_UNIT, better="lower"))
    return scores


def _gated(
    distances: Distances, flags: Sequence[Sequence[bool]] | None, protocol: str
) -> list[list[float | None]]:
    shape = [len(row) for row in distances]
    if flags is None or [len(row) for row in flags] != shape:
        got = "none" if flags is None else "another shape"
        raise UserError(f"{protocol}.match_rate: a flag for each candidate is needed, got {got}")
    return [
        [distance if passes else None for distance, passes in zip(row, marks, strict=True)]
        for row, marks in zip(distances, flags, strict=True)
    ]


def _smallest(row: Sequence[float | None]) -> float | None:
    return min((one for one in row if one is not None), default=None)
