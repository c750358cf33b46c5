"""Stability, uniqueness and novelty together: what the papers call stable, metastable, S.U.N. and M.S.U.N.

    >>> stability_scores(rows, judge=judge_of(references, hull), relaxed=Standing(valid, copy_of, novel))
    [Score("kit.stable", ...), Score("kit.sun", ...), Score("mattergen.sun", ...), ...]

    protocol          structure   threshold, eV/atom             of
    kit               relaxed     <= 0; metastable <= 0.1        requested; valid asked for, MSUN holds SUN
    mattergen         relaxed     stable <= 0.1                  relaxed or failed; validity not asked for
    crystal_text_llm  relaxed     metastable < 0.1               relaxed, valid, two sites and more
    lemat             submitted   <= 0; metastable <= 0.1        valid; MSUN without SUN

Contract: the potential and the hull stand in every note, and what hull distances by them are off on known
crystals stands beside (kit.hull_distance_error). The peers' own judges are others: MatterSim and the Alex-MP
hull (mattergen), M3GNet (crystal_text_llm), the mean of ORB, MACE and UMA (lemat); one judge stands in for
all here. An unguarded S.U.N. rewards repacked elements and chemical systems that nobody has looked at, so
the shares of both stand beside it, and a count without them.

Sources: MatterGen, arXiv:2312.03687; Crystal-text-LLM, arXiv:2402.04379; LeMat-GenBench, arXiv:2512.04562.
Not here: one sample (sample.py), copies and novelty (novelty/copies.py).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crystallm_kit.errors import UserError
from crystallm_kit.scores.score import Better, Score, mean, not_computed, share
from crystallm_kit.scores.stability.sample import Judge, Stability

STABLE_EV, METASTABLE_EV = 0.0, 0.1
Flags = NDArray[np.bool_]
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Standing:
    """What a protocol says of each requested sample beside its energy; all of one length.

    Attributes:
        valid: Passes the protocol's checks.
        copy_of: Index of the earlier sample that it is a copy of; None: first seen, or nothing to compare.
        novel: Matches nothing in the reference; None for one that could not be compared. None for all:
            there was no reference.
    """

    valid: Sequence[bool]
    copy_of: Sequence[int | None]
    novel: Sequence[bool | None] | None = None


def stability_scores(
    rows: Sequence[Stability | None],
    *,
    judge: Judge,
    relaxed: Standing,
    submitted: Standing | None = None,
    valid_text_llm: Sequence[bool] | None = None,
) -> list[Score]:
    """Return the scores of all protocols.

    Args:
        rows: One a requested sample; None where there was nothing to relax.
        judge: Who says so.
        relaxed: By the kit's checks, and pymatgen's default matcher on the relaxed structures.
        submitted: By LeMat's checks and matcher, on the structures as submitted; None: no scores of lemat.
        valid_text_llm: cdvae's validity; None: no score of crystal_text_llm.

    Raises:
        UserError: If the lengths differ.
        EmptyInput: If nothing was requested.
    """
    _check_lengths(rows, relaxed, submitted, valid_text_llm)
    samples = _Samples(rows, judge.note)
    scores = [*_kit(samples, relaxed), *_checks(judge), *_mattergen(samples, relaxed)]
    if valid_text_llm is not None:
        scores.append(_text_llm(samples, valid_text_llm))
    if submitted is not None:
        scores += _lemat(samples, submitted)
    return scores


class _Samples:
    """The rows by column; NaN where there is nothing."""

    def __init__(self, rows: Sequence[Stability | None], note: str) -> None:
        self.note = note
        self.n = len(rows)
        self.there = np.array([r is not None for r in rows], dtype=bool)
        self.distance = _column(rows, lambda r: r.hull_distance_ev_per_atom)
        self.before = _column(rows, lambda r: r.submitted_hull_distance_ev_per_atom)
        self.rmsd = _column(rows, lambda r: r.rmsd_angstrom)
        self.n_elements = _column(rows, lambda r: r.n_elements)
        self.n_sites = _column(rows, lambda r: r.n_sites)
        self.n_competing = _column(rows, lambda r: r.n_competing)
        self.converged = np.array([r is not None and r.converged for r in rows], dtype=bool)
        self.scored = np.isfinite(self.distance)

    @property
    def n_failed(self) -> int:
        """Return how many were to be relaxed, and have no distance."""
        return int((self.there & ~self.scored).sum())


def _column(rows: Sequence[Stability | None], value: Callable[[Stability], float]) -> Numbers:
    return np.array([math.nan if r is None else value(r) for r in rows], dtype=np.float64)


def _check_lengths(
    rows: Sequence[object],
    relaxed: Standing,
    submitted: Standing | None,
    valid_text_llm: Sequence[bool] | None,
) -> None:
    given = {
        "relaxed.valid": relaxed.valid,
        "relaxed.copy_of": relaxed.copy_of,
        "relaxed.novel": relaxed.novel,
    }
    if submitted is not None:
        given |= {"submitted.valid": submitted.valid, "submitted.copy_of": submitted.copy_of}
        given["submitted.novel"] = submitted.novel
    given["valid_text_llm"] = valid_text_llm
    for name, values in given.items():
        if values is not None and len(values) != len(rows):
            raise UserError(f"stability: {len(rows)} samples, but {len(values)} values of {name}")


def _true(values: Sequence[bool | None]) -> Flags:
    return np.array([value is not None and bool(value) for value in values], dtype=bool)


def _unique(standing: Standing) -> Flags:
    return np.array([first is None for first in standing.copy_of], dtype=bool)


def _kit(samples: _Samples, standing: Standing) -> list[Score]:
    """Return the kit's own scores: of all requested, and only valid ones count."""
    note = samples.note
    valid = _true(standing.valid)
    stable = valid & (samples.distance <= STABLE_EV)
    metastable = valid & (samples.distance <= METASTABLE_EV)
    scores = [
        share("kit.relaxed", int(samples.converged.sum()), samples.n, note=f"relaxation converged; {note}"),
        share("kit.stable", int(stable.sum()), samples.n, note=f"valid, hull distance <= 0 eV/atom; {note}"),
        share("kit.metastable", int(metastable.sum()), samples.n,
              note=f"valid, hull distance <= 0.1 eV/atom, stable ones included; {note}"),
        _mean("kit.hull_distance", samples.distance, "eV/atom", samples, "lower"),
        _mean("kit.rmsd", samples.rmsd, "angstrom", samples, "lower"),
    ]  # fmt: skip
    if standing.novel is None:
        why = "no reference set, so no novelty"
        return scores + [not_computed(f"kit.{name}", why, better="higher") for name in ("sun", "msun")]
    fresh = _unique(standing) & _true(standing.novel)
    for name, those, limit in (
        ("sun", stable & fresh, "0"),
        ("msun", metastable & fresh, "0.1, SUN included"),
    ):
        scores.append(
            share(f"kit.{name}", int(those.sum()), samples.n,
                  note=f"valid, unique, novel, hull distance <= {limit}; {note}")
        )  # fmt: skip
        scores += _guard(f"kit.{name}", those, samples)
    return scores


def _guard(name: str, those: Flags, samples: _Samples) -> list[Score]:
    """Return the loopholes of a S.U.N. count, and what is left without them."""
    single = those & (samples.n_elements == 1)
    sparse = those & (samples.n_elements > 1) & (samples.n_competing == 0)
    n = int(those.sum())
    kinds = (
        ("single_elements", single, "repacked elements"),
        ("sparse_hull", sparse, "compounds whose hull has nothing but the elements"),
    )
    scores = [
        share(f"{name}_{kind}", int(found.sum()), n, over=name, better="lower", note=what)
        if n else not_computed(f"{name}_{kind}", f"no {name}, so no share of it", better="lower")
        for kind, found, what in kinds
    ]  # fmt: skip
    left = int((those & ~single & ~sparse).sum())
    note = f"without single elements and sparse hulls; {samples.note}"
    return [*scores, share(f"{name}_guarded", left, samples.n, note=note)]


def _checks(judge: Judge) -> list[Score]:
    """Return how far the judge is off on known crystals."""
    names = ("kit.formation_energy_error", "kit.hull_distance_error")
    check = judge.check
    if check is None:
        why = f"{judge.potential} was not measured on known crystals (scoring/potential_check.py)"
        return [not_computed(name, why, unit="eV/atom", better="lower") for name in names]
    about = f"mean absolute error on {check.data}, {check.structures}"
    notes = (
        about,
        f"{about}, by the hull {check.hull}, which alone is off by {check.hull_distance_mae_of_hull:.3f}; "
        f"on which side of 0.1 eV/atom a crystal is they agree for {check.metastable_agreement:.1%}, "
        f"of 0 for {check.stable_agreement:.1%}",
    )
    values = (check.formation_energy_mae, check.hull_distance_mae)
    return [
        Score(name, value, "eV/atom", None, check.n - check.n_failed, "known crystals", better="lower",
              note=f"{note}{'; ' if check.note else ''}{check.note}")
        for name, value, note in zip(names, values, notes, strict=True)
    ]  # fmt: skip


def _mattergen(samples: _Samples, standing: Standing) -> list[Score]:
    """Return MatterGen's scores: independent masks, validity not asked for."""
    n_scored, n_jobs = int(samples.scored.sum()), int(samples.there.sum())
    failed = f"{samples.n_failed} failed jobs in the denominator"
    note = f"{failed}; {samples.note}; MatterGen's is MatterSim and the Alex-MP hull"
    names = ("stable", "unique", "novel", "sun")
    if not n_jobs:
        return [not_computed(f"mattergen.{n}", "nothing was relaxed", better="higher") for n in names]
    stable = samples.scored & (samples.distance <= METASTABLE_EV)
    unique = _unique(standing)
    over = "scored or failed"
    scores = [
        share("mattergen.stable", int(stable.sum()), n_jobs, over=over, note=f"<= 0.1 eV/atom; {note}"),
        _share_of_scored("mattergen.unique", samples.scored & unique, n_scored),
        _mean("mattergen.e_hull", samples.distance, "eV/atom", samples, "lower"),
        _mean("mattergen.rmsd", samples.rmsd, "angstrom", samples, "lower"),
    ]
    if standing.novel is None:
        why = "no reference set, so no novelty"
        return scores + [not_computed(f"mattergen.{n}", why, better="higher") for n in ("novel", "sun")]
    novel = _true(standing.novel)
    sun = int((stable & unique & novel).sum())
    return [
        *scores,
        _share_of_scored("mattergen.novel", samples.scored & novel, n_scored),
        share("mattergen.sun", sun, n_jobs, over=over, note=f"stable is <= 0.1 eV/atom; {note}"),
    ]


def _share_of_scored(name: str, those: Flags, n_scored: int) -> Score:
    if not n_scored:
        return not_computed(name, "no relaxation has a hull distance", better="higher")
    return share(name, int(those.sum()), n_scored, over="scored", note="of relaxed structures")


def _mean(name: str, values: Numbers, unit: str, samples: _Samples, better: Better) -> Score:
    there = values[np.isfinite(values)]
    if not len(there):
        return not_computed(name, "no relaxation has one", unit=unit, better="lower")
    return mean(name, there.tolist(), unit=unit, over="scored", better=better, note=samples.note)


def _text_llm(samples: _Samples, valid: Sequence[bool]) -> Score:
    """Return Crystal-text-LLM's metastable share: valid, two sites and more; failures are dropped."""
    name = "crystal_text_llm.metastable"
    asked = samples.scored & _true(valid) & (samples.n_sites > 1)
    n = int(asked.sum())
    if not n:
        return not_computed(name, "no valid sample of two sites and more was relaxed", better="higher")
    found = int((asked & (samples.distance < METASTABLE_EV)).sum())
    note = f"< 0.1 eV/atom, failed relaxations dropped; {samples.note}; theirs is M3GNet, patched MP hull"
    return share(name, found, n, over="valid, relaxed", note=note)


def _lemat(samples: _Samples, standing: Standing) -> list[Score]:
    """Return LeMat's scores: structures as submitted, of the valid ones, first seen within each part."""
    valid = _true(standing.valid)
    n = int(valid.sum())
    names = ("stable", "metastable", "sun", "msun")
    if not n:
        return [not_computed(f"lemat.{name}", "no sample is valid", better="higher") for name in names]
    note = f"energies as submitted; {samples.note}; LeMat's is the mean of ORB, MACE and UMA, own hulls"
    parts = {
        "sun": valid & (samples.before <= STABLE_EV),
        "msun": valid & (samples.before > STABLE_EV) & (samples.before <= METASTABLE_EV),
    }
    scores = [
        share("lemat.stable", int(parts["sun"].sum()), n, over="valid", note=note),
        share("lemat.metastable", int((parts["sun"] | parts["msun"]).sum()), n, over="valid", note=note),
        _mean("lemat.e_hull", np.where(valid, samples.before, math.nan), "eV/atom", samples, "lower"),
    ]
    if standing.novel is None:
        why = "no reference set, so no novelty"
        return scores + [not_computed(f"lemat.{name}", why, better="higher") for name in ("sun", "msun")]
    novel = _true(standing.novel)
    for name, part in parts.items():
        found = int((_first_seen(part, standing.copy_of) & novel).sum())
        without = "; SUN not included" if name == "msun" else ""
        scores.append(share(f"lemat.{name}", found, n, over="valid", note=note + without))
    return scores


def _first_seen(part: Flags, copy_of: Sequence[int | None]) -> Flags:
    """Return which samples are the first of their kind within a part of the samples."""
    seen: set[int] = set()
    first = np.zeros(len(part), dtype=bool)
    for i in np.nonzero(part)[0].tolist():
        earlier = copy_of[i]
        kind = i if earlier is None else int(earlier)
        first[i] = kind not in seen
        seen.add(kind)
    return first
