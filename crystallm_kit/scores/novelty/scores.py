"""Uniqueness and novelty under each protocol's name, from flags over the samples.

    kit_scores(valid, unique, known) -> kit.unique 2,196 of 3,221 requested, kit.novel, kit.unique_novel

All flags are (N,) bool, one for each requested sample. Who is whose copy and who is known comes from
copies.py and index.py; here is only what each protocol counts, and over what:

    score                            numerator                                denominator
    kit.unique, .novel               valid, no copy; valid, not known         requested
    kit.unique_novel                 valid, no copy, not known                requested
    crystallm.unique, .novel         counts: valid first, then unique, then   -
                                     novel among the unique ones
    crystallm_pi.unique, .novel,     valid, one of each graph's hash; of      generated
    .comp_novel                      these not known; formula unseen
    mattergen.unique, .novel         scored, no copy; scored, not known       scored
    mattergen.novel_systems          distinct unseen chemical systems         scored
    mattergen.precision, .recall     scored and known; reference found        scored; reference
    lemat.unique, .novel             valid, no later copy; valid, not known   valid; valid and compared
    genmetrics.uniqueness            1 - ordered duplicate pairs              n^2 - n
    genmetrics.novelty, .coverage    1 - known; matches any test crystal      generated; test crystals

Not here: what is valid (validity.py), stability (stability/sample.py). Sources: the peers' own
scripts; protocols.py names them.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from crystallm_kit.errors import EmptyInput
from crystallm_kit.scores.score import Score, not_computed, share

Flags = NDArray[np.bool_]
NO_REFERENCE = "no reference set"


def kit_scores(valid: Flags, unique: Flags, known: Flags | None) -> list[Score]:
    """Return the kit's own: over what was requested.

    Args:
        valid: Under kit.
        unique: No copy of an earlier valid one (match.default within reduced formulas).
        known: In the reference (match.default); None: there is none.
    """
    n = len(valid)
    scores = [share("kit.unique", _n(valid & unique), n, note="valid, and no copy of an earlier valid one")]
    if known is None:
        return [*scores, *_missing("kit.novel", "kit.unique_novel")]
    return [
        *scores,
        share("kit.novel", _n(valid & ~known), n, note="valid, and not in the reference"),
        share(
            "kit.unique_novel", _n(valid & unique & ~known), n, note="valid, no copy, not in the reference"
        ),
    ]


def crystallm_scores(valid: Flags, unique: Flags, known: Flags | None) -> list[Score]:
    """Return CrystaLLM's counts; it prints no rate.

    Args:
        valid: Under crystallm.
        unique: No copy of an earlier valid one within equal cell formulas (match.default).
        known: A reference entry of the same cell formula matches (match.default); None: no reference.
    """
    kept = valid & unique
    scores = [_count("crystallm.unique", _n(kept), "valid; first seen kept, within equal cell formulas")]
    if known is None:
        return [*scores, *_missing("crystallm.novel")]
    return [*scores, _count("crystallm.novel", _n(kept & ~known), "valid and unique, and not known")]


def crystallm_pi_scores(kept: Flags, known: Flags | None, known_formula: Flags | None) -> list[Score]:
    """Return CrystaLLM-pi's: valid, one of each bonding-graph hash, and of these the new; over all generated.

    Args:
        kept: Valid under crystallm_pi, and the one that is kept of its hash (copies_by_hash).
        known: A reference entry of its reduced formula matches (match.default); None: no reference.
        known_formula: Its reduced formula is in the reference; None: no reference.
    """
    n = len(kept)
    note = "valid, and one of each bonding-graph hash"
    scores = [share("crystallm_pi.unique", _n(kept), n, over="generated", note=note)]
    for name, old, what in (
        ("crystallm_pi.novel", known, "not in the reference"),
        ("crystallm_pi.comp_novel", known_formula, "its formula not in the reference"),
    ):
        if old is None:
            scores += _missing(name)
        else:
            scores.append(share(name, _n(kept & ~old), n, over="generated", note=f"unique, and {what}"))
    return scores


def mattergen_scores(
    scored: Flags,
    unique: Flags,
    known: Flags | None,
    *,
    matcher: Literal["disordered", "ordered"],
    systems: Sequence[str | None] = (),
    known_system: Flags | None = None,
    found_in_reference: int | None = None,
    n_reference: int | None = None,
) -> list[Score]:
    """Return MatterGen's structure metrics; its denominators are the scored (relaxed) structures.

    Args:
        scored: Got as far as being compared.
        unique: First of its group of duplicates.
        known: A reference entry matches; None: no reference.
        matcher: "disordered", MatterGen's default, or "ordered", which goes by names of its own
            ("mattergen.ordered_unique").
        systems: Chemical system of each sample, for the distinct ones.
        known_system: It is in the reference.
        found_in_reference: Reference entries that any sample matches.
        n_reference: Size of the reference.

    Raises:
        EmptyInput: If nothing was scored.
    """
    n = _n(scored)
    if not n:
        raise EmptyInput("mattergen.unique: nothing scored, so no share")
    at = "mattergen." if matcher == "disordered" else "mattergen.ordered_"
    note = f"{matcher} matcher"
    scores = [share(f"{at}unique", _n(scored & unique), n, over="scored", note=note)]
    if known is None:
        names = ("novel", "unique_novel", "precision", "recall")
        return [*scores, *_missing(*(at + name for name in names), "mattergen.novel_systems")]
    scores += [
        share(f"{at}novel", _n(scored & ~known), n, over="scored", note=note),
        share(f"{at}unique_novel", _n(scored & unique & ~known), n, over="scored", note=note),
        share(f"{at}precision", _n(scored & known), n, over="scored", better="", note=note),
    ]
    if found_in_reference is None or not n_reference:
        scores.append(not_computed(f"{at}recall", "which reference entries are matched was not looked up"))
    else:
        scores.append(
            share(f"{at}recall", found_in_reference, n_reference, over="reference", better="", note=note)
        )
    if known_system is None or len(systems) != len(scored):
        scores.append(not_computed("mattergen.novel_systems", "chemical systems were not looked up"))
    else:
        new = {s for s, ok, old in zip(systems, scored, known_system, strict=True) if ok and not old and s}
        scores.append(share("mattergen.novel_systems", len(new), n, over="scored", note="distinct systems"))
    return scores


def lemat_scores(
    valid: Flags, unique: Flags, known: Flags | None, *, compared: Flags | None = None
) -> list[Score]:
    """Return LeMat-GenBench's: of the valid ones only.

    Args:
        valid: Under lemat.
        unique: No later valid one is equivalent (match.lemat; novelty.later_copies).
        known: In the reference (match.lemat); None: no reference.
        compared: Could be compared with the reference; None: all.
    """
    if not _n(valid):
        why = "nothing valid, so no share"
        return [not_computed(name, why, better="higher") for name in ("lemat.unique", "lemat.novel")]
    scores = [
        share("lemat.unique", _n(valid & unique), _n(valid), over="valid", note="no later one is equivalent")
    ]
    if known is None:
        return [*scores, *_missing("lemat.novel")]
    able = valid if compared is None else valid & compared
    if not _n(able):
        return [*scores, not_computed("lemat.novel", "nothing could be compared", better="higher")]
    return [*scores, share("lemat.novel", _n(able & ~known), _n(able), over="valid and compared")]


def genmetrics_scores(
    n_generated: int,
    *,
    duplicate_pairs: int | None = None,
    known: int | None = None,
    covering: int | None = None,
    n_test: int | None = None,
) -> list[Score]:
    """Return matbench-genmetrics' uniqueness, novelty and coverage with match.csp, which it has as an option.

    By default it compares fingerprints: coverage.fingerprint_genmetrics_scores.

    Args:
        n_generated: Structures compared.
        duplicate_pairs: Ordered pairs of different ones that match (novelty.duplicate_pairs).
        known: Structures that match any training crystal, which is the matcher's first argument.
        covering: Structures that match any test crystal: repeats count, so coverage can exceed 1.
        n_test: Test crystals.

    Raises:
        EmptyInput: Without structures.
    """
    if not n_generated:
        raise EmptyInput("genmetrics: nothing generated, so no share")
    pairs = n_generated * (n_generated - 1)
    scores = []
    if duplicate_pairs is None or not pairs:
        scores.append(not_computed("genmetrics.uniqueness", "fewer than two structures, or no comparison"))
    else:
        scores.append(
            Score(
                "genmetrics.uniqueness", 1 - duplicate_pairs / pairs, "share", pairs - duplicate_pairs, pairs,
                "ordered pairs", better="higher", note="pairs are not independent: no interval",
            )
        )  # fmt: skip
    if known is None:
        scores += _missing("genmetrics.novelty")
    else:
        scores.append(share("genmetrics.novelty", n_generated - known, n_generated, over="generated"))
    if covering is None or not n_test:
        scores.append(not_computed("genmetrics.coverage", "no test set", better="higher"))
    else:
        note = "generated crystals that match any test crystal; repeats raise it"
        scores.append(share("genmetrics.coverage", covering, n_test, over="test crystals", note=note))
    return scores


def _n(flags: Flags) -> int:
    return int(np.count_nonzero(flags))


def _count(name: str, value: int, note: str) -> Score:
    return Score(name, float(value), "crystals", note=note, better="higher")


def _missing(*names: str) -> list[Score]:
    return [not_computed(name, NO_REFERENCE, better="higher") for name in names]
