"""Rows -> scores: every number of a set under its protocol's name, or why it is not there.

    scores(scene, ["cdvae"]) -> [Score("cdvae.structure_valid", 1.0, 10000 of 10000), ...]

Scores come in families, each of one module of scores/, a line of FAMILIES: what it counts from the columns of
a set, and under which protocols. A new metric is a line there. What a family needs and was not worked out (no
reference, no targets, no fingerprints, no hull) gives a score that says so.

Not here: the numbers' definitions (scores/), the columns (stages.py).
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from crystallm_kit.errors import UnknownName
from crystallm_kit.scores.asked import PREFIX, asked_of, hit_scores
from crystallm_kit.scores.checks import check_scores
from crystallm_kit.scores.coverage import (
    CUTOFFS,
    coverage_scores,
    diversity_scores,
    fingerprint_genmetrics_scores,
    fingerprint_novelty,
)
from crystallm_kit.scores.distributions import Distributed, wasserstein_scores
from crystallm_kit.scores.match_scores import GATES, match_scores, metre_scores
from crystallm_kit.scores.novelty.scores import (
    crystallm_pi_scores,
    crystallm_scores,
    genmetrics_scores,
    kit_scores,
    lemat_scores,
    mattergen_scores,
)
from crystallm_kit.scores.protocols import PUBLISHED
from crystallm_kit.scores.score import Score, not_computed, share
from crystallm_kit.scores.set_columns import SetColumns, columns_of
from crystallm_kit.scores.stability.scores import Standing, stability_scores
from crystallm_kit.scores.statistics import genmetrics_validity, lemat_statistics
from crystallm_kit.scoring.copies import Copies
from crystallm_kit.scoring.fingerprinting import fingerprints_of
from crystallm_kit.scoring.judging import stabilities_of
from crystallm_kit.scoring.scene import Scene, known, passes, unique
from crystallm_kit.scoring.view import Truth, View
from crystallm_kit.text.conditions import conditions_from_dict

NO_REFERENCE = "no reference set: give --reference"
NO_TARGETS = "no targets: give --targets"
NO_FINGERPRINTS = "no fingerprints: give --fingerprints"
NO_BONDS = "bonds are counted if this protocol is named with --protocol"
NO_TEXT = "no sample that could be read came as a CIF, whose text this protocol judges"
NO_STABILITY = "not relaxed: give --relax and --hull"
# "csp" is a matcher, whose match rates stand under the protocols that gate them.
_KNOWN = tuple(name for name in PUBLISHED if name != "csp")
_KS = (1, 5, 10, 20, 50, 100)
_MOST_IN_STATISTICS = 100_000  # rows of which bootstraps are drawn


@dataclass(frozen=True)
class Family:
    """Scores that are counted together.

    Attributes:
        count: Yields them.
        protocols: Under which they go; (): all.
    """

    count: Callable[[Scene], Iterable[Score]]
    protocols: tuple[str, ...] = ()


def scores(scene: Scene, protocols: Sequence[str]) -> list[Score]:
    """Return the scores of a set, protocol by protocol."""
    found = [
        score
        for family in FAMILIES
        if not family.protocols or set(family.protocols) & set(protocols)
        for score in family.count(scene)
    ]
    by_name = {score.name: score for score in reversed(found)}  # of two counts of one number the first
    return [score for name in protocols for score in dict.fromkeys(found)
            if _home(score) == name and by_name[score.name] is score]  # fmt: skip


def _home(score: Score) -> str:
    """Return the protocol that a score stands under: "kit_gated" belongs to kit."""
    return "kit" if score.protocol == "kit_gated" else score.protocol


def check_protocols(names: Sequence[str] | None) -> list[str]:
    """Return the protocols that are asked for; None: all. Raises UnknownName with the nearest known one."""
    for name in names or ():
        if name not in _KNOWN:
            raise UnknownName.among("protocol", name, _KNOWN)
    return list(dict.fromkeys(names)) if names else list(_KNOWN)


# ---------------------------------------------------------------- of single samples


def _checks(scene: Scene) -> Iterator[Score]:
    n = scene.n
    yield share("kit.readable", int(scene.readable.sum()), n)
    yield share("kit.valid", int(scene.check("kit.valid").sum()), n,
                note="all of the kit's checks, and what was asked for")  # fmt: skip
    yield from check_scores(scene.checks, n)
    if not scene.samples.has("fingerprints"):
        both = scene.check("cdvae.structure_valid") & scene.check("cdvae.comp_valid")
        note = "the fingerprint test is left out; no sample has been seen to fail it alone"
        yield share("kit.cdvae_valid_without_fingerprint", int(both.sum()), n, note=note)
        yield not_computed("cdvae.valid", NO_FINGERPRINTS)
    if not scene.samples.has("bonds"):
        yield not_computed("crystallm.valid", NO_BONDS)
        yield not_computed("crystallm_pi.valid", NO_BONDS)


def _asked(scene: Scene) -> Iterator[Score]:
    """Count what came out as it was asked for; what has no structure misses all that was asked of it."""
    rows = [
        json.loads(found) if found else _missed(text) if text else {}
        for found, text in zip(
            scene.samples.texts("checks", "asked"), scene.samples.texts("read", "conditions"), strict=True
        )
    ]
    names = dict.fromkeys(name for row in rows for name in row)
    yield from hit_scores({name: [row.get(name) for row in rows] for name in names})


@lru_cache(maxsize=10_000)
def _missed(text: str) -> dict[str, bool]:
    names = asked_of(conditions_from_dict(json.loads(text)))
    return {f"{PREFIX}{name}": False for name in (*names, "all")} if names else {}


# ---------------------------------------------------------------- of sets


def _copies(scene: Scene) -> Iterator[Score]:
    yield from kit_scores(scene.check("kit.valid"), scene.unique("kit"), scene.known("default"))
    lemat = scene.check("lemat.valid")
    yield from lemat_scores(lemat, scene.unique("lemat"), scene.known("lemat"))
    if "crystallm" in scene.copies.of:
        known_cells = scene.known("cell_formula")
        valid = scene.check("crystallm.valid")
        yield from crystallm_scores(valid, scene.unique("crystallm"), known_cells)
    yield from _copies_by_hash(scene)


def _copies_by_hash(scene: Scene) -> Iterator[Score]:
    same = scene.same_hash
    why = NO_BONDS if same is None else "" if "crystallm_pi.valid" in scene.checks else NO_TEXT
    if same is None or why:
        for name in ("unique", "novel", "comp_novel"):
            yield not_computed(f"crystallm_pi.{name}", why, better="higher")
        return
    hashed = np.array([one is not None for one in scene.samples.texts("hashes", "hash.bawl")])
    known_formula = scene.samples.truth("known", "known_formula") if scene.samples.has("known") else None
    yield from crystallm_pi_scores(hashed & (same == -1), scene.known("default"), known_formula)


def _mattergen(scene: Scene) -> Iterator[Score]:
    """Count on the relaxed structures where there are any, else on the submitted ones, and say so."""
    relaxed = scene.relaxation
    view, copies = (scene.samples, scene.copies) if relaxed is None else (relaxed.view, relaxed.copies)
    scored = view.readable()
    if not scored.any():
        return
    systems = ["-".join(one) if one is not None else None for one in view.column("checks", "elements")]
    known_system = view.truth("known", "known_system") if view.has("known") else None
    what = "relaxed structures" if relaxed else "structures as submitted, not relaxed"
    matchers: list[tuple[Literal["disordered", "ordered"], str, str]] = [("ordered", "default", "default")]
    if "mattergen" in copies.of:
        matchers.insert(0, ("disordered", "mattergen", "disordered"))
    for matcher, rule, column in matchers:
        for one in mattergen_scores(
            scored, unique(view, copies, rule), known(view, column), matcher=matcher, systems=systems,
            known_system=known_system, found_in_reference=_found_in_reference(view, column),
            n_reference=0 if scene.reference is None else int(scene.reference.readable().sum()),
        ):  # fmt: skip
            yield _noted(one, what)


def _found_in_reference(view: View, column: str) -> int | None:
    """Return how many reference entries, by id, any sample is the same as; None: there is no reference."""
    stage = "known_alloys" if column == "disordered" else "known"
    if not view.has(stage):
        return None
    return len({entry for same in view.column(stage, f"all_known.{column}") for entry in same or ()})


def _noted(score: Score, what: str) -> Score:
    return replace(score, note=f"{score.note}; {what}" if score.note else what)


def _coverage(scene: Scene) -> Iterator[Score]:
    names = ("cdvae.cov_recall", "cdvae.cov_precision", "crystal_text_llm.novelty")
    if not scene.samples.has("fingerprints") or scene.reference is None:
        why = NO_FINGERPRINTS if scene.reference is not None else NO_REFERENCE
        yield from (not_computed(name, why, better="higher") for name in names)
    if not scene.samples.has("fingerprints"):
        return
    valid = scene.check("cdvae.valid").tolist()
    if scene.reference is not None:
        reference = [one for one in fingerprints_of(scene.reference.folders["fingerprints"]) if one]
        sensible = (scene.readable & scene.check("crystallm.sensible")).tolist()
        yield from coverage_scores(
            scene.fingerprints, reference, cutoffs=CUTOFFS[scene.cutoffs], n_requested=scene.n, valid=valid,
            sensible=sensible,
        )  # fmt: skip
        yield fingerprint_novelty(scene.fingerprints, reference, valid=valid)
    yield from diversity_scores(scene.fingerprints, valid=valid)


def _genmetrics(scene: Scene) -> Iterator[Score]:
    """Count twice, as the peer can: with its matcher, and by fingerprints. The targets are its test set."""
    n = int(scene.readable.sum())
    n_test = None if scene.targets is None else int(scene.targets.readable().sum())
    if n:
        same, covers = scene.known("genmetrics"), scene.samples.has("covers")
        yield from genmetrics_scores(
            n, duplicate_pairs=scene.copies.pairs["genmetrics"],
            known=None if same is None else int(same.sum()),
            covering=int(scene.samples.truth("covers", "covers.genmetrics").sum()) if covers else None,
            n_test=n_test,
        )  # fmt: skip
    if not scene.samples.has("fingerprints"):
        for what in ("uniqueness", "novelty", "coverage"):
            yield not_computed(f"genmetrics.fingerprint_{what}", NO_FINGERPRINTS, better="higher")
        return
    training, test = (
        None if one is None else [f for f in fingerprints_of(one.folders["fingerprints"]) if f]
        for one in (scene.reference, scene.targets)
    )
    yield from fingerprint_genmetrics_scores(scene.fingerprints, training=training, test=test, n_test=n_test)


def _wasserstein(scene: Scene) -> Iterable[Score]:
    if scene.reference is None:
        return [
            not_computed(name, NO_REFERENCE, unit=unit, better="lower")
            for name, unit in (("cdvae.wdist_density", "g/cm3"), ("cdvae.wdist_num_elems", "elements"))
        ]
    valid = _distributed(scene.samples, passes(scene.samples, "cdvae.valid"))
    reference = _distributed(scene.reference, scene.reference.readable())
    return wasserstein_scores(valid, reference) if reference else []


def _distributed(view: View, chosen: Truth) -> list[Distributed]:
    density, n_elements = view.floats("checks", "density_g_cm3"), view.floats("checks", "n_elements")
    at = _some(chosen & np.isfinite(density) & np.isfinite(n_elements))
    return [Distributed(float(density[i]), int(n_elements[i])) for i in at.tolist()]


def _statistics(scene: Scene) -> Iterator[Score]:
    reference = None
    if scene.reference is not None:
        reference = _set_columns(scene.reference, scene.reference.readable(), "lemat.spacegroup_number")
    valid = _set_columns(scene.samples, scene.check("lemat.valid"), "lemat.spacegroup_number")
    if valid is not None:
        yield from lemat_statistics(valid, reference)
    whole = _set_columns(scene.samples, scene.readable, "spacegroup_number")
    known_ones = None
    if scene.reference is not None:
        known_ones = _set_columns(scene.reference, scene.reference.readable(), "spacegroup_number")
    if whole is not None:
        yield from genmetrics_validity(whole, known_ones, over="readable")


def _some(chosen: Truth) -> NDArray[np.intp]:
    """Return which are chosen; of very many some, drawn with a seed, since bootstraps copy them."""
    at = np.flatnonzero(chosen)
    if len(at) > _MOST_IN_STATISTICS:
        at = np.sort(np.random.default_rng(0).choice(at, _MOST_IN_STATISTICS, replace=False))
    return at


def _set_columns(view: View, chosen: Truth, spacegroup: str) -> SetColumns | None:
    """Return what is compared of the chosen samples."""
    measured = np.isfinite(view.floats("checks", "density_g_cm3"))
    at = _some(chosen & measured)
    if not len(at):
        return None
    return columns_of(
        cell_formulas=view.column("checks", "cell_formula")[at].tolist(),
        spacegroup_numbers=view.floats("checks", spacegroup)[at],
        volume_per_atom_angstrom3=view.floats("checks", "volume_per_atom_angstrom3")[at],
        density_g_cm3=view.floats("checks", "density_g_cm3")[at],
        cell_lengths_angstrom=np.array(view.column("checks", "cell_lengths_angstrom")[at].tolist()),
    )


# ---------------------------------------------------------------- of predictions


def _matches(scene: Scene) -> Iterator[Score]:
    if scene.pairs is None or scene.targets is None:
        why = NO_TARGETS if scene.targets is None else "targets that are not paired with samples"
        yield not_computed("kit.match_rate@1", why, better="higher")
        return
    found = scene.samples.floats("matches", "rms_distance.csp")
    rows = _by_target(scene, [None if d != d else float(d) for d in found.tolist()])
    most = max(map(len, rows))
    ks = sorted({k for k in _KS if k <= most} | {max(1, most)})
    truth = passes(scene.targets, "cdvae.valid").tolist()
    gates = {
        "kit": None, "kit_gated": "cdvae.valid", "cdvae": "cdvae.valid", "diffcsp": "cdvae.valid",
        "crystallm": "crystallm.csp_valid", "crystallm_pi": "crystallm_pi.structure_valid_xrd",
    }  # fmt: skip
    for name in GATES:
        gate = gates[name]
        flags = None
        if gate is not None:
            passed = scene.check(gate)
            if name == "crystallm_pi":
                passed = passed & scene.check("cdvae.valid")
            flags = _by_target(scene, passed.tolist())
        yield from match_scores(rows, ks, protocol=name, candidate_gate=flags, truth_gate=truth)
    yield from metre_scores(_all_distances(scene), k=most)


def _by_target(scene: Scene, values: Sequence[Any]) -> list[list[Any]]:
    """Return one row a target: the values of its candidates, in order."""
    if scene.pairs is None or scene.targets is None:
        return []
    rows: list[list[Any]] = [[] for _ in range(scene.targets.n)]
    for target, value in zip(scene.pairs.target.tolist(), values, strict=True):
        rows[target].append(value)
    return rows


def _all_distances(scene: Scene) -> list[list[float | None]]:
    rows: list[list[float | None]] = [[] for _ in range(scene.targets.n if scene.targets else 0)]
    for one in scene.samples.column("matches", "distances"):
        for target, distance in json.loads(one) if one else ():
            rows[target].append(distance)
    return rows


# ---------------------------------------------------------------- stability


def _stability(scene: Scene) -> Iterable[Score]:
    relaxed = scene.relaxation
    if relaxed is None:
        names = ("kit.stable", "kit.metastable", "kit.sun", "mattergen.stable", "mattergen.sun",
                 "lemat.stable", "lemat.sun", "crystal_text_llm.metastable")  # fmt: skip
        return [not_computed(name, NO_STABILITY, better="higher") for name in names]
    return stability_scores(
        stabilities_of(scene.samples),
        judge=relaxed.judge,
        relaxed=_standing(relaxed.view, relaxed.copies, "kit", "kit.valid", "default"),
        submitted=_standing(scene.samples, scene.copies, "lemat", "lemat.valid", "lemat"),
        valid_text_llm=scene.check("cdvae.valid").tolist(),
    )


def _standing(view: View, copies: Copies, rule: str, gate: str, column: str) -> Standing:
    found = known(view, column)
    of = [None if i == -1 else i for i in copies.of[rule].tolist()]
    readable = view.readable().tolist()
    novel = None
    if found is not None:
        novel = [not one if ok else None for one, ok in zip(found.tolist(), readable, strict=True)]
    return Standing(passes(view, gate).tolist(), of, novel)


FAMILIES = (
    Family(_checks),
    Family(_asked, ("kit",)),
    Family(_copies, ("kit", "crystallm", "crystallm_pi", "lemat")),
    Family(_mattergen, ("mattergen",)),
    Family(_coverage, ("cdvae", "crystallm", "crystal_text_llm")),
    Family(_genmetrics, ("genmetrics",)),
    Family(_wasserstein, ("cdvae", "crystallm", "crystal_text_llm")),
    Family(_statistics, ("lemat", "genmetrics")),
    Family(_matches, ("kit", "cdvae", "diffcsp", "crystallm", "crystallm_pi")),
    Family(_stability, ("kit", "mattergen", "lemat", "crystal_text_llm")),
)
