"""How well samples cover a reference set, by the nearest fingerprints: COV-R, COV-P and what goes with them.

    coverage_scores(generated, reference, cutoffs=CUTOFFS["mp_20"], n_requested=1000)
    [Score("cdvae.cov_recall", 0.89, numerator=890, denominator=1000, over="reference"),
     Score("cdvae.cov_precision", ..., over="requested"), Score("crystal_text_llm.cov_precision", ...), ...]

A crystal is covered where its nearest neighbour in structure and its nearest in composition, two crystals
perhaps, are both within the cut-offs. Recall asks it of the reference, precision of the samples.

The peers' precisions differ in their denominator alone, so they stand beside each other: all samples (CDVAE),
the sensible and parsable ones (CrystaLLM), the valid ones with a fingerprint (Crystal-text-LLM).

Not here: the fingerprints (fingerprints/crystal.py); Wasserstein distances (distributions.py).
Sources: Xie et al., arXiv:2110.06197; Gruver et al., arXiv:2402.04379; Baird et al., J. Open Source Softw. 9,
5618 (2024) (matbench-genmetrics).
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crystallm_kit.errors import EmptyInput, UserError
from crystallm_kit.scores.fingerprints.composition import unscaled
from crystallm_kit.scores.fingerprints.crystal import FingerprintFailure, Fingerprints
from crystallm_kit.scores.score import Score, mean, not_computed, share

FloatArray = NDArray[np.float64]
MaybeFingerprints = Fingerprints | FingerprintFailure | None

_PAIRS_AT_ONCE = 2_000_000  # distances in memory: 16 MB for each thread
_DRAWS = 200


@dataclass(frozen=True)
class Cutoffs:
    """Up to which distance of fingerprints a crystal counts as covered."""

    structure: float
    composition: float


CUTOFFS = {
    "mp_20": Cutoffs(0.4, 10.0),
    "carbon_24": Cutoffs(0.2, 4.0),
    "perov_5": Cutoffs(0.2, 4.0),
}
NOVELTY_CUTOFFS = Cutoffs(0.1, 2.0)


@dataclass(frozen=True, eq=False)
class Nearest:
    """Distances to the nearest of another set.

    Attributes:
        structure, composition: (N,); infinite where the other set is empty.
    """

    structure: FloatArray
    composition: FloatArray

    def within(self, cutoffs: Cutoffs) -> NDArray[np.bool_]:
        """(N,) whether both distances are within the cut-offs."""
        found: NDArray[np.bool_] = (self.structure <= cutoffs.structure) & (
            self.composition <= cutoffs.composition
        )
        return found


def coverage_scores(
    generated: Sequence[MaybeFingerprints],
    reference: Sequence[Fingerprints],
    *,
    cutoffs: Cutoffs,
    n_requested: int,
    valid: Sequence[bool] | None = None,
    sensible: Sequence[bool] | None = None,
) -> list[Score]:
    """Return coverage and mean nearest distances under the protocols cdvae, crystallm, crystal_text_llm.

    Args:
        generated: One a sample; None, or a failure, where it has no fingerprint.
        reference: Of the whole reference set.
        cutoffs: From CUTOFFS, or of one's own.
        n_requested: Samples asked for; those that are missing from `generated` are not covered.
        valid: Of each sample, "cdvae.valid"; None: not known, and Crystal-text-LLM's number is not computed.
        sensible: Of each sample, whether it was parsed and is "crystallm.sensible"; None: likewise.

    Raises:
        EmptyInput: Without a reference, or without requested samples.
        UserError: If lists do not have one entry a sample, or more samples came than were requested.
    """
    _check(generated, reference, n_requested, valid=valid, sensible=sensible)
    present = [sample for sample in generated if isinstance(sample, Fingerprints)]
    places = [i for i, sample in enumerate(generated) if isinstance(sample, Fingerprints)]
    of_reference, of_samples = nearest(reference, present)
    recalled, covered = of_reference.within(cutoffs), of_samples.within(cutoffs)
    note = f"cut-offs {cutoffs.structure:g} (structure), {cutoffs.composition:g} (composition)"
    scores = [
        share("cdvae.cov_recall", int(recalled.sum()), len(reference), over="reference", note=note),
        share("cdvae.cov_precision", int(covered.sum()), n_requested, note=note),
    ]
    for name, chosen, over, what in (
        ("crystallm.cov_precision", sensible, "sensible", "which samples are sensible"),
        ("crystal_text_llm.cov_precision", valid, "valid with a fingerprint", "which samples are valid"),
    ):
        if chosen is None:
            scores.append(not_computed(name, f"not known {what}", better="higher"))
            continue
        n_covered = int(sum(ok and chosen[place] for place, ok in zip(places, covered, strict=True)))
        n_counted = sum(chosen) if over == "sensible" else sum(chosen[place] for place in places)
        scores.append(
            share(name, n_covered, n_counted, over=over, note=note)
            if n_counted
            else not_computed(name, f"no sample is {over}", better="higher")
        )
    return [*scores, *_mean_distances(of_reference, of_samples, len(present))]


def _mean_distances(of_reference: Nearest, of_samples: Nearest, n_samples: int) -> Iterator[Score]:
    for side, found, over in (
        ("recall", of_reference, "reference"),
        ("precision", of_samples, "with a fingerprint"),
    ):
        for name, distances in (("amsd", found.structure), ("amcd", found.composition)):
            full = f"cdvae.{name}_{side}"
            if not n_samples:
                yield not_computed(full, "no sample has a fingerprint", unit="", better="lower")
                continue
            yield mean(full, distances.tolist(), unit="", over=over, better="lower", n_draws=_DRAWS)


def fingerprint_novelty(
    generated: Sequence[MaybeFingerprints],
    training: Sequence[Fingerprints],
    *,
    valid: Sequence[bool],
    cutoffs: Cutoffs = NOVELTY_CUTOFFS,
) -> Score:
    """Return "crystal_text_llm.novelty".

    A sample is novel where its nearest training crystal in structure or its nearest in composition is farther
    than the cut-off. The denominator is the valid samples with a fingerprint.

    Raises:
        EmptyInput: Without training crystals.
        UserError: If `valid` does not have one entry a sample.
    """
    _check(generated, training, len(generated), valid=valid)
    name = "crystal_text_llm.novelty"
    chosen = _chosen(generated, valid)
    if not chosen:
        return not_computed(name, "no valid sample has a fingerprint", better="higher")
    _, found = nearest(training, chosen)
    n_novel = int((~found.within(cutoffs)).sum())
    note = f"farther than {cutoffs.structure:g} (structure) or {cutoffs.composition:g} (composition)"
    return share(name, n_novel, len(chosen), over="valid with a fingerprint", note=note)


def diversity_scores(generated: Sequence[MaybeFingerprints], *, valid: Sequence[bool]) -> list[Score]:
    """Return "crystal_text_llm.comp_div" and ".struct_div", mean distances of all pairs of valid samples."""
    chosen = _chosen(generated, valid)
    scores = []
    for name, rows in (
        ("comp_div", np.array([f.composition for f in chosen])),
        ("struct_div", np.array([f.structure for f in chosen])),
    ):
        full, n = f"crystal_text_llm.{name}", len(chosen)
        if n < 2:
            why = f"{n} valid samples with a fingerprint; a pair expected"
            scores.append(not_computed(full, why, unit="", better="higher"))
            continue
        # each pair twice, and each crystal with itself at 0
        total = sum(float(block.sum()) for _, block in _blocks(rows, rows))
        note = f"{n * (n - 1) // 2} pairs"
        scores.append(Score(full, total / (n * (n - 1)), "", None, n, "valid", better="higher", note=note))
    return scores


def fingerprint_genmetrics_scores(
    generated: Sequence[MaybeFingerprints],
    *,
    training: Sequence[Fingerprints] | None = None,
    test: Sequence[Fingerprints] | None = None,
    n_test: int | None = None,
    cutoffs: Cutoffs = CUTOFFS["mp_20"],
) -> list[Score]:
    """Return matbench-genmetrics' uniqueness, novelty and coverage by fingerprints, which is its default.

    Two crystals match where both distances of this pair are within the cut-offs, the compositions' unscaled.
    Coverage divides the samples that match any test crystal by the number of test crystals: copies raise it,
    also above 1. Names begin with "genmetrics.fingerprint_"; those without are by match.csp
    (novelty/scores.py).

    Args:
        generated: One a sample; None, or a failure, where it has no fingerprint.
        training, test: None: there is no such set.
        n_test: Test crystals, those without a fingerprint included; None: as many as `test` holds.
        cutoffs: From CUTOFFS, or of one's own.
    """
    present = [sample for sample in generated if isinstance(sample, Fingerprints)]
    n, over = len(present), "with a fingerprint"
    note = f"pairs within {cutoffs.structure:g} (structure), {cutoffs.composition:g} (composition, unscaled)"
    scores = []
    names = [f"genmetrics.fingerprint_{what}" for what in ("uniqueness", "novelty", "coverage")]
    if n < 2:
        why = f"{n} samples with a fingerprint; a pair expected"
        scores.append(not_computed(names[0], why, better="higher"))
    else:
        n_copies = int(_matches(present, present, cutoffs).sum()) - n
        pairs = n * n - n
        scores.append(
            Score(names[0], 1 - n_copies / pairs, "share", pairs - n_copies, pairs, "ordered pairs",
                  better="higher", note=note)
        )  # fmt: skip
    if not training or not n:
        why = f"no sample {over}" if training else _none_of("reference set", "--reference", training)
        scores.append(not_computed(names[1], why, better="higher"))
    else:
        n_known = int((_matches(present, training, cutoffs) > 0).sum())
        scores.append(share(names[1], n - n_known, n, over=over, note=note))
    if not test:
        why = _none_of("test set", "--targets", test)
        return [*scores, not_computed(names[2], why, better="higher")]
    n_matched = int((_matches(present, test, cutoffs) > 0).sum())
    return [*scores, share(names[2], n_matched, n_test or len(test), over="test crystals", note=note)]


def _none_of(what: str, option: str, given: Sequence[Fingerprints] | None) -> str:
    """Return why nothing of a set can be compared."""
    return f"no {what}; give {option}" if given is None else f"no crystal of the {what} has a fingerprint"


def nearest(first: Sequence[Fingerprints], second: Sequence[Fingerprints]) -> tuple[Nearest, Nearest]:
    """Return how far each of the first set is from the nearest of the second, and the other way round."""
    parts = [
        _nearest(np.array([getattr(f, name) for f in first]), np.array([getattr(f, name) for f in second]))
        for name in ("structure", "composition")
    ]
    (first_structure, second_structure), (first_composition, second_composition) = parts
    return Nearest(first_structure, first_composition), Nearest(second_structure, second_composition)


def _nearest(first: FloatArray, second: FloatArray) -> tuple[FloatArray, FloatArray]:
    of_first, of_second = np.full(len(first), np.inf), np.full(len(second), np.inf)
    if not (len(first) and len(second)):
        return of_first, of_second
    for rows, block in _blocks(first, second):
        of_first[rows] = block.min(axis=1)
        np.minimum(of_second, block.min(axis=0), out=of_second)
    return of_first, of_second


def _matches(
    first: Sequence[Fingerprints], second: Sequence[Fingerprints], cutoffs: Cutoffs
) -> NDArray[np.int64]:
    """(N,) how many of the second set each of the first matches."""
    from scipy.spatial import cKDTree  # type: ignore[import-untyped]

    found = np.zeros(len(first), dtype=np.int64)
    if not (first and second):
        return found
    # Unscaled compositions lie far apart: a tree leaves few pairs whose structures are compared.
    compositions = [unscaled(np.array([f.composition for f in side])) for side in (first, second)]
    tree = cKDTree(compositions[1])
    structures = np.array([f.structure for f in second])
    for i, composition in enumerate(compositions[0]):  # one by one: all may have one composition
        others = tree.query_ball_point(composition, cutoffs.composition)
        distances = np.linalg.norm(structures[others] - first[i].structure, axis=1)
        found[i] = np.count_nonzero(distances <= cutoffs.structure)
    return found


def _blocks(first: FloatArray, second: FloatArray) -> Iterator[tuple[slice, FloatArray]]:
    """Yield (rows, their Euclidean distances to all of the second), on all cores, in order."""
    from scipy.spatial.distance import cdist  # type: ignore[import-untyped]

    n_rows = max(1, _PAIRS_AT_ONCE // len(second))
    starts = range(0, len(first), n_rows)
    n_threads = os.cpu_count() or 1
    with ThreadPoolExecutor(n_threads) as pool:
        # a few at a time: `map` would make all of them at once
        for group in range(0, len(starts), n_threads):
            parts = [slice(start, start + n_rows) for start in starts[group : group + n_threads]]
            yield from zip(parts, pool.map(lambda part: cdist(first[part], second), parts), strict=True)


def _chosen(generated: Sequence[MaybeFingerprints], valid: Sequence[bool]) -> list[Fingerprints]:
    _check_length(len(generated), valid=valid)
    return [f for f, ok in zip(generated, valid, strict=True) if ok and isinstance(f, Fingerprints)]


def _check(
    generated: Sequence[MaybeFingerprints],
    reference: Sequence[Fingerprints],
    n_requested: int,
    **lists: Sequence[bool] | None,
) -> None:
    if not reference:
        raise EmptyInput("coverage: no reference crystal has a fingerprint; at least one expected")
    if n_requested < 1:
        raise EmptyInput("coverage: no samples requested, so no shares")
    if len(generated) > n_requested:
        raise UserError(f"coverage: {len(generated)} samples of {n_requested} requested; count the requests")
    _check_length(len(generated), **lists)


def _check_length(n: int, **lists: Sequence[bool] | None) -> None:
    for name, values in lists.items():
        if values is not None and len(values) != n:
            raise UserError(f"coverage: {name} has {len(values)} entries, {n} expected, one a sample")
