"""The polymorphs of a composition: generate, judge, relax, drop the copies, rank by energy.

    >>> for one in predict("TiO2", n=20).polymorphs:
    ...     print(one.rank, one.spacegroup_number, one.above_best_mev_per_atom, one.n_found)
    1 136 0.0 3

    TiO2/
      prediction.json   the ranking, what failed and why, who judged
      polymorphs/       01-TiO2-136.cif ..., as relaxed, best first
      samples.jsonl     every request, failures included; structures/ what was valid, as generated
      relaxed/          the relaxations: the same command goes on with what is missing

Copies are what pymatgen's matcher calls equal at LeMat's tolerances, if besides their space groups are equal
(as generated: one of them is relaxed) or their energies within 10 meV/atom (relaxed: the lowest stays). At
its defaults the matcher merges polymorphs: CsCl's and CuAu's types are one to it. A relaxed crystal is judged
again: one whose atoms ran into each other has a low energy by mistake, and is left out with its reason.
Without relaxation candidates stand in the order of generation.ranked.

Not here: relaxing (structures/relaxed_set.py), hulls (scores/stability/), the command's tables (verbs.py).
"""

import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pymatgen.core import Composition, Structure

from crystallm_kit.engines.engine import Sampling
from crystallm_kit.errors import ImpossibleRequest, UserError
from crystallm_kit.generation import Model, load_model, ranked, stream
from crystallm_kit.records import Conditions, Crystal, Sample
from crystallm_kit.results import check_folder, write_results
from crystallm_kit.scores.matcher.structure_matcher import TOLERANCES, fit, reduced
from crystallm_kit.scores.stability.element_references import ElementReferences, shipped_references
from crystallm_kit.scores.stability.hull import Hull
from crystallm_kit.scores.stability.sample import judge_of
from crystallm_kit.scores.validity import validate_and_measure
from crystallm_kit.structures.relaxation import Relaxed
from crystallm_kit.structures.relaxation_workers import RelaxSettings
from crystallm_kit.structures.relaxed_set import relax_set
from crystallm_kit.structures.writing import write

_SAME_ENERGY_EV = 0.01  # an atom; what relaxations that stop at 0.05 eV/angstrom leave is less
POLYMORPHS, PREDICTION = "polymorphs", "prediction.json"
Say = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Polymorph:
    """One crystal of the ranking.

    Attributes:
        rank: 1 is the best.
        structure: As relaxed; as generated where nothing was.
        spacegroup_number: Of it, at 0.1 angstrom; None where none was found.
        n_sites: Of its cell.
        volume_per_atom_angstrom3, density_g_cm3: Of it.
        energy_ev_per_atom: Total energy under the potential; NaN without one.
        above_best_mev_per_atom: Energy above the first; NaN without one.
        formation_energy_ev_per_atom, hull_distance_ev_per_atom: NaN without a hull.
        n_found: Samples that are this crystal.
        samples: Their ids, the one shown first.
        log_probability: The highest of theirs.
        converged: Whether its relaxation came to its end.
    """

    rank: int
    structure: Structure
    spacegroup_number: int | None
    n_sites: int
    volume_per_atom_angstrom3: float
    density_g_cm3: float
    energy_ev_per_atom: float
    above_best_mev_per_atom: float
    formation_energy_ev_per_atom: float
    hull_distance_ev_per_atom: float
    n_found: int
    samples: tuple[str, ...]
    log_probability: float
    converged: bool

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON: without the structure, NaN as None."""
        plain = {k: v for k, v in vars(self).items() if k != "structure"}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in plain.items()}


@dataclass(frozen=True)
class Prediction:
    """The polymorphs, and what became of everything else.

    Attributes:
        formula: Reduced, elements as asked.
        n_requested: Samples asked for.
        n_valid: Of these, valid, copies included.
        n_relaxed: Different ones as generated, which were relaxed.
        polymorphs: Best first.
        stopped: Reason of a verdict -> samples that it stopped.
        failed: Sample id -> why its relaxation is not ranked.
        ranked_by: "energy" or "likelihood".
        judge: Who gives energies and hull distances; "": nobody.
        seconds: Of generation, and of relaxation or ranking.
    """

    formula: str
    n_requested: int
    n_valid: int
    n_relaxed: int
    polymorphs: tuple[Polymorph, ...]
    stopped: Mapping[str, int]
    failed: Mapping[str, str]
    ranked_by: str
    judge: str
    seconds: Mapping[str, float] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Return what is said under the table: counts, failures, who judged, times."""
        counted = f"{self.n_requested:,} samples, {self.n_valid:,} valid, {len(self.polymorphs):,} different"
        if self.ranked_by == "energy":
            counted += f" of {self.n_relaxed:,} relaxed"
        lines = [f"{counted}; ranked by {self.ranked_by}"]
        if self.ranked_by == "energy" and not all(one.converged for one in self.polymorphs):
            lines.append("* its relaxation did not converge: its energy is too high; give more --max-steps")
        if self.stopped:
            lines.append("not valid: " + ", ".join(f"{n} {reason}" for reason, n in self.stopped.items()))
        reasons = Counter(reason.partition(":")[0] for reason in self.failed.values())
        lines += [f"not ranked: {count} {reason}" for reason, count in reasons.most_common()]
        if self.judge:
            lines.append(self.judge if self.judge.startswith("judge") else f"energies: {self.judge}")
        if self.seconds:
            lines.append(", ".join(f"{what} {seconds:.1f} s" for what, seconds in self.seconds.items()))
        return lines

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        rest = {k: v for k, v in vars(self).items() if k != "polymorphs"}
        return {**rest, "polymorphs": [one.as_dict() for one in self.polymorphs]}


def predict(
    composition: str | Conditions,
    *,
    n: int = 50,
    seed: int = 0,
    model: Model | str | Path | None = None,
    sampling: Sampling | None = None,
    protocol: str = "kit",
    relaxation: RelaxSettings | None = None,
    relaxes: bool = True,
    hull: Hull | None = None,
    references: ElementReferences | None = None,
    out: str | Path | None = None,
    workers: int | None = None,
    say: Say | None = None,
) -> Prediction:
    """Predict the polymorphs of a composition.

    Args:
        composition: A formula, or conditions with one (and a space group, a number of sites ...).
        n: Samples.
        seed: Of the samples.
        model, sampling, protocol: As for generation.stream.
        relaxation: How candidates are relaxed; None: CHGNet, 300 steps.
        relaxes: False: candidates are ranked by likelihood, as generated.
        hull: Where hull distances are from; None: there are none.
        references: Element references of the potential, for the hull; None: those that come with the package.
        out: Folder of the results; None: nothing is written.
        workers: Processes that relax; None: as relax_set.
        say: Told what is done, how many, and of how many.

    Raises:
        ImpossibleRequest: Without a formula, or if there are no references of the potential for the hull.
        UserError: If `out` holds other files, or crystals relaxed in another way.
    """
    conditions = Conditions(formula=_counts(composition)) if isinstance(composition, str) else composition
    if not conditions.formula:
        raise ImpossibleRequest("polymorphs are of one composition; give a formula, such as TiO2")
    if n < 1:
        raise UserError(f"n = {n}: 1 or more samples expected")
    relaxation = relaxation or RelaxSettings()
    if hull is not None and relaxes:
        references = references or shipped_references(relaxation.potential)
    if out is not None:
        _check_out(Path(out))
    started = time.monotonic()
    samples: list[Sample] = []
    with _opened(model) as asked:
        for sample in stream([conditions] * n, seed=seed, model=asked, sampling=sampling, protocol=protocol):
            samples.append(sample)
            if say:
                say("generated", len(samples), n)
    generated = time.monotonic() - started
    if out is not None:
        write_results(samples, out)
    if relaxes:
        found = polymorphs_by_energy(
            samples, relaxation=relaxation, hull=hull, references=references, workers=workers, say=say,
            out=None if out is None else Path(out) / "relaxed",
        )  # fmt: skip
    else:
        found = polymorphs_by_likelihood(samples)
    whole = time.monotonic() - started
    then = "relaxation" if relaxes else "ranking"
    times = {"generation": round(generated, 2), then: round(whole - generated, 2)}
    prediction = replace(found, seconds=times)
    if out is not None:
        _write(prediction, Path(out))
    return prediction


@contextmanager
def _opened(model: Model | str | Path | None) -> Iterator[Model]:
    """Give the model, and stop what its engine has started, if it was loaded here."""
    if isinstance(model, Model):
        yield model
        return
    loaded = load_model(model)
    try:
        yield loaded
    finally:
        getattr(loaded.engine, "close", lambda: None)()


def _counts(formula: str) -> dict[str, int]:
    from crystallm_kit.text.conditions import parse_conditions

    return dict(parse_conditions(formula).formula or {})


# ---------------------------------------------------------------- ranking


def polymorphs_by_energy(
    samples: Sequence[Sample],
    *,
    relaxation: RelaxSettings,
    hull: Hull | None = None,
    references: ElementReferences | None = None,
    out: Path | None = None,
    workers: int | None = None,
    say: Say | None = None,
) -> Prediction:
    """Relax the valid samples of one composition, whoever generated them, and rank what they become.

    Args:
        samples: As they were judged; ids are unique.
        relaxation, hull, references, workers, say: As for predict.
        out: Folder of the relaxations; None: they are kept nowhere.
    """
    valid = _valid(samples)
    first_of = _groups_as_generated(valid)
    distinct = [sample for i, sample in enumerate(valid) if first_of[i] == i]
    relaxed = relax_set(
        [(s.id, s.structure) for s in distinct if isinstance(s.structure, Structure)], out,
        settings=relaxation, workers=workers, say=None if say is None else lambda k, m: say("relaxed", k, m),
    )  # fmt: skip
    members = [[valid[i].id for i in range(len(valid)) if valid[first_of[i]] is s] for s in distinct]
    failed: dict[str, str] = {}
    kept: list[tuple[Sample, Relaxed, list[str]]] = []
    for sample, ids in zip(distinct, members, strict=True):
        one = relaxed[sample.id]
        why = _fault(one)
        if why is None:
            kept.append((sample, one, ids))
        else:
            failed[sample.id] = why
    kept.sort(key=lambda entry: entry[1].energy_ev_per_atom)
    energies = [one.energy_ev_per_atom for _, one, _ in kept]
    first = _groups(
        [one.structure for _, one, _ in kept], lambda i, k: abs(energies[i] - energies[k]) <= _SAME_ENERGY_EV
    )
    best = energies[0] if kept else math.nan
    probability = {s.id: s.log_probability for s in valid}
    found: list[Polymorph] = []
    for i, (_, one, _) in enumerate(kept):
        if first[i] == i:
            ids = [name for j, (_, _, some) in enumerate(kept) if first[j] == i for name in some]
            polymorph = _polymorph(len(found) + 1, one.structure, ids, probability, one.converged)
            found.append(_with_energies(polymorph, one.energy_ev_per_atom, best, hull, references))
    judge = relaxation.potential
    if hull is not None and references is not None:
        judge = judge_of(references, hull).note
        missing = hull.missing_elements(Composition(_formula(samples)))
        if missing:
            judge += f"; no hull distances: the hull has no entry of {', '.join(missing)}"
    return Prediction(
        _formula(samples), len(samples), len(valid), len(distinct), tuple(found), _stopped(samples), failed,
        "energy", judge,
    )  # fmt: skip


def polymorphs_by_likelihood(samples: Sequence[Sample]) -> Prediction:
    """Rank the valid samples of one composition as generated: what the model says most often, most surely."""
    valid = _valid(samples)
    order = ranked(valid)
    first = _groups_as_generated(order)
    probability = {s.id: s.log_probability for s in valid}
    found: list[Polymorph] = []
    for i, sample in enumerate(order):
        if first[i] == i and isinstance(sample.structure, Structure):
            ids = [other.id for j, other in enumerate(order) if first[j] == i]
            found.append(_polymorph(len(found) + 1, sample.structure, ids, probability, False))
    counts = len(samples), len(valid), 0
    return Prediction(_formula(samples), *counts, tuple(found), _stopped(samples), {}, "likelihood", "")


def _valid(samples: Sequence[Sample]) -> list[Sample]:
    """Return the samples that are crystals and passed every check but that of copies."""
    return [
        s for s in samples
        if isinstance(s.structure, Structure) and (s.verdict.valid or s.verdict.reason == "duplicate")
    ]  # fmt: skip


def _groups(structures: Sequence[Any], same: Callable[[int, int], bool]) -> list[int]:
    """Return for each structure the index of the first that it is a copy of: its own, where it is none.

    Args:
        structures: All of one reduced formula.
        same: Tells of two indices whether, besides, they may be copies.
    """
    forms = [reduced(structure) for structure in structures]
    kept: list[int] = []
    first = []
    for i, form in enumerate(forms):
        copy = next((k for k in kept if same(i, k) and fit(form, forms[k], TOLERANCES["lemat"])), None)
        if copy is None:
            kept.append(i)
        first.append(i if copy is None else copy)
    return first


def _groups_as_generated(samples: Sequence[Sample]) -> list[int]:
    numbers = [sample.measures.get("spacegroup_number") for sample in samples]
    return _groups([sample.structure for sample in samples], lambda i, k: numbers[i] == numbers[k])


def _fault(relaxed: Relaxed) -> str | None:
    """Return why a relaxation is not ranked; None: it is."""
    if relaxed.structure is None:
        return relaxed.reason or "failed"
    verdict, _ = validate_and_measure(Crystal("", relaxed.structure), measure_symmetry=False)
    if verdict.reason in ("overlap", "density", "cell"):
        return f"relaxed to {verdict.reason}: {verdict.detail}"
    return None


def _polymorph(
    rank: int, structure: Any, ids: Sequence[str], probability: Mapping[str, float], converged: bool
) -> Polymorph:
    _, measures = validate_and_measure(Crystal("", structure))
    group = measures.get("spacegroup_number")
    return Polymorph(
        rank=rank, structure=structure, spacegroup_number=None if group is None else int(group),
        n_sites=len(structure), volume_per_atom_angstrom3=structure.volume / len(structure),
        density_g_cm3=float(structure.density), energy_ev_per_atom=math.nan, above_best_mev_per_atom=math.nan,
        formation_energy_ev_per_atom=math.nan, hull_distance_ev_per_atom=math.nan, n_found=len(ids),
        samples=tuple(ids), log_probability=max(probability[name] for name in ids), converged=converged,
    )  # fmt: skip


def _with_energies(
    polymorph: Polymorph, energy: float, best: float, hull: Hull | None, references: ElementReferences | None
) -> Polymorph:
    formation = distance = math.nan
    composition = polymorph.structure.composition
    if references is not None and not references.missing_elements(composition):
        formation = references.formation_energy(composition, energy)
        place = None if hull is None else hull.place(composition, formation)
        if place is not None and place.distance_ev_per_atom is not None:
            distance = place.distance_ev_per_atom
    return replace(
        polymorph, energy_ev_per_atom=energy, above_best_mev_per_atom=1000 * (energy - best),
        formation_energy_ev_per_atom=formation, hull_distance_ev_per_atom=distance,
    )  # fmt: skip


def _formula(samples: Sequence[Sample]) -> str:
    """Return the reduced formula that was asked for, its elements in the order given; "" without one."""
    asked = next((s.conditions.formula for s in samples if s.conditions.formula), None) or {}
    units = math.gcd(*asked.values()) or 1
    return "".join(f"{e}{n // units if n > units else ''}" for e, n in asked.items())


def _stopped(samples: Sequence[Sample]) -> dict[str, int]:
    """Return reason -> samples that it stopped, copies left out."""
    reasons = (s.verdict.reason for s in samples if s.verdict.reason not in (None, "duplicate"))
    return dict(Counter(map(str, reasons)).most_common())


# ---------------------------------------------------------------- files


def _check_out(folder: Path) -> None:
    """Refuse a folder with other files in the results' places, before any work is done for them."""
    check_folder(folder)
    if (folder / POLYMORPHS).exists() and not (folder / PREDICTION).is_file():
        raise UserError(
            f"{folder / POLYMORPHS}: already there, and not written by a prediction; name another folder"
        )


def _write(prediction: Prediction, folder: Path) -> None:
    shutil.rmtree(folder / POLYMORPHS, ignore_errors=True)
    text = json.dumps(prediction.as_dict(), indent=2, ensure_ascii=False)
    (folder / PREDICTION).write_text(text + "\n", encoding="utf-8")
    crystals = list(_crystals(prediction))
    if crystals:
        write(crystals, folder / POLYMORPHS, format="cif")


def _crystals(prediction: Prediction) -> Iterator[Crystal]:
    for one in prediction.polymorphs:
        name = f"{one.rank:02d}-{prediction.formula}-{one.spacegroup_number or 'P'}"
        yield Crystal(name, one.structure)
