"""One scoring run, from sample sets to scores: what the command `score` does.

    score(["DiffCSP=DiffCSP_mp_20.pt"], reference=["mp_train.parquet"], out="scores")
    -> {"DiffCSP": [Score("kit.readable", 1.0, ...), Score("cdvae.structure_valid", ...), ...]}

Sets are read into parts; the stages work them out on all cores, part by part; then copies are looked for,
formula by formula, and the scores counted. Everything is on disk as soon as it is there, and a run that was
killed goes on from it with the same result.

Not here: what is asked for (request.py), each step (intake.py, stages.py, copies.py, summary.py), the page
(report.py).
"""

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from crystallm_kit.errors import EmptyInput, MissingExtra
from crystallm_kit.scores.matcher.reduced_forms import usable_cores
from crystallm_kit.scores.score import Score
from crystallm_kit.scores.stability.hull_sources import read_hull
from crystallm_kit.scores.stability.sample import judge_of
from crystallm_kit.scoring.copies import RULES, Copies, collect, fill_buckets
from crystallm_kit.scoring.folder import alone_in, open_folder
from crystallm_kit.scoring.intake import Samples, take_in
from crystallm_kit.scoring.judging import references_of, relax_all, relaxed_samples
from crystallm_kit.scoring.knowing import build_index
from crystallm_kit.scoring.merging import write_rows
from crystallm_kit.scoring.outcome import REPORT, report_of, write_report_json
from crystallm_kit.scoring.pairing import Pairs, asked_formula, pair
from crystallm_kit.scoring.pool import Pool, ray_pool
from crystallm_kit.scoring.published import rows_for_report
from crystallm_kit.scoring.report import write_report
from crystallm_kit.scoring.request import Request
from crystallm_kit.scoring.rows import part_path
from crystallm_kit.scoring.sample_sets import SampleSet, content_hash, named_sets
from crystallm_kit.scoring.scene import Relaxation, Scene
from crystallm_kit.scoring.stages import STAGES, Asked
from crystallm_kit.scoring.summary import scores
from crystallm_kit.scoring.telling import Telling
from crystallm_kit.scoring.view import View

_READ = "crystallm_kit.scoring.stages:run_part"
_COPIES = "crystallm_kit.scoring.copies:find_copies"
_DEFAULT_OUT = "scores"


@dataclass
class Scored:
    """What came of one set.

    Attributes:
        sample_set: As it was asked for.
        scene: Its columns.
        scores: Under the protocols that were asked for.
        seconds: Step or stage -> seconds; of stages, summed over the workers.
        notes: What has to be known of it.
    """

    sample_set: SampleSet
    scene: Scene
    scores: list[Score] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def score(
    samples: str | Path | Sequence[str | Path],
    *,
    reference: str | Path | Sequence[str | Path] = (),
    targets: str | Path | None = None,
    protocols: Sequence[str] | None = None,
    out: str | Path = _DEFAULT_OUT,
    progress: bool = False,
    **options: Any,
) -> dict[str, list[Score]]:
    """Score sample sets under the protocols of the field, side by side.

    Args:
        samples: A file or folder, or several; "NAME=PATH" names a set.
        reference: Known crystals: novelty and distributions are against these.
        targets: True structures, where the samples are predictions of them.
        protocols: kit, cdvae, mattergen, ...; None: all.
        out: Folder for rows, report.json and report.html; one that holds a part of this run is gone on with.
        progress: Whether to tell of it on standard error.
        options: requested (for sets that hold fewer than were asked for), limit, and those of `Request`:
            pairing, fingerprints, relax, hull, potential, cutoffs, published, workers, ray, fresh.

    Returns:
        Name of the set -> its scores.

    Raises:
        UserError: Any of its kinds; the message says what to do.
    """
    paths = [samples] if isinstance(samples, str | Path) else list(samples)
    sets = named_sets(paths, requested=options.pop("requested", ()), limit=options.pop("limit", None))
    request = Request(
        tuple(sets), Path(out), _paths(reference), _paths(targets),
        protocols=None if protocols is None else tuple(protocols), **options,
    )  # fmt: skip
    return {one.sample_set.name: one.scores for one in run(request, progress=progress).sets}


def _paths(given: str | Path | Sequence[str | Path] | None) -> tuple[Path, ...]:
    if given is None:
        return ()
    return (Path(given),) if isinstance(given, str | Path) else tuple(Path(one) for one in given)


@dataclass
class Outcome:
    """What a run gave.

    Attributes:
        sets: In the order of the request.
        report: As in report.json.
    """

    sets: list[Scored]
    report: dict[str, Any]


def run(request: Request, *, progress: bool = False, command: str = "") -> Outcome:
    """Do a run, write its files, and return what came of it."""
    protocols = request.check()
    inputs = request.inputs()
    work = open_folder(request.out, inputs, fresh=request.fresh)
    with alone_in(request.out), Telling(progress) as telling, _pool(request) as pool:
        try:
            return _Runner(request, inputs, work, pool, telling, protocols).run(command)
        except KeyboardInterrupt:
            telling.say(f"what is finished is kept in {request.out}; the same command goes on from there")
            raise


def _pool(request: Request) -> Pool:
    return ray_pool(request.ray) if request.ray else Pool(request.workers or usable_cores())


class _Runner:
    """The steps of one run."""

    def __init__(
        self, request: Request, inputs: Mapping[str, Any], work: Path, pool: Pool, telling: Telling,
        protocols: list[str],
    ) -> None:  # fmt: skip
        self.request, self.inputs, self.work = request, inputs, work
        self.pool, self.telling, self.protocols = pool, telling, protocols
        self.notes: list[str] = []
        self._index = Path()

    def run(self, command: str) -> Outcome:
        """Do all steps."""
        reference = self._known_set("reference", self.request.reference)
        if reference is not None:
            step = self.telling.step("reference: index")
            read, forms = reference.folders["read"], reference.folders["forms"]
            self._index = self.work / ".reference" / f"index-{forms.name}"
            step.done(f"{build_index(read, forms, self._index):,} entries")
        targets = self._known_set("targets", self.request.targets)
        scored = [self._scored(one, reference, targets) for one in self.request.sets]
        for one in scored:
            path = self.request.out / "rows" / f"{one.sample_set.name}.parquet"
            scene = one.scene
            copies = dict(scene.copies.of)
            if scene.same_hash is not None:
                copies["crystallm_pi"] = scene.same_hash
            write_rows(scene.samples, path, copies=copies, pairs=scene.pairs, targets=targets)
        report = report_of(
            [(o.scene, [str(s) for s in o.sample_set.sources], o.scores, o.seconds) for o in scored],
            command=command, settings=self.inputs, protocols=self.protocols, notes=self.notes,
            published=[row for name in self.request.tables(self.protocols) for row in rows_for_report(name)],
        )  # fmt: skip
        write_report_json(report, self.request.out / REPORT)
        try:
            write_report(self.request.out)
        except MissingExtra as error:
            self.telling.say(f"no report.html: {error}")
        return Outcome(scored, report)

    def _known_set(self, name: str, files: tuple[Path, ...]) -> View | None:
        """Return the columns of a set of known crystals. Raises EmptyInput where none of it can be used."""
        if not files:
            return None
        is_reference = name == "reference"  # of which no verdict is asked
        asked = [Asked("checks", {"only": "measures"} if is_reference else {}), Asked("forms")]
        if self.request.fingerprints and (is_reference or "genmetrics" in self.protocols):
            asked.append(Asked("fingerprints"))
        view, _ = self._worked_out(SampleSet(name, files), self.work / f".{name}", name, asked)
        # of several files one may be damaged, or a row have no structure: what is left still serves
        bad = [reason for reason in view.texts("read", "reason") if reason is not None]
        bad += [trouble for trouble in view.texts("forms", "trouble") if trouble is not None]
        if len(bad) == view.n:
            raise EmptyInput(f"{name}: none of its {view.n:,} entries could be read ({bad[0]})")
        if bad:
            kinds = ", ".join(f"{reason}: {count:,}" for reason, count in Counter(bad).most_common(5))
            self._note(f"{name}: {len(bad):,} of {view.n:,} entries are left out ({kinds})")
        return view

    def _note(self, note: str) -> None:
        self.notes.append(note)
        self.telling.say(note)

    def _scored(self, one: SampleSet, reference: View | None, targets: View | None) -> Scored:
        home = self.work / one.name
        asked = [Asked("checks"), Asked("forms")]
        if reference is not None:
            asked += self._known
        if self.request.fingerprints:
            asked.append(Asked("fingerprints"))
        if self.request.counts_bonds():
            asked.append(Asked("bonds"))
        if self.request.hashes_graphs():
            asked.append(Asked("hashes"))
        view, seconds = self._worked_out(one, home, one.name, asked)
        pairs = None
        if targets is not None:
            content, where = {"targets": self.inputs["targets"]}, {"targets": str(targets.folders["forms"])}
            if self.request.pairing != "none":
                pairs = self._paired(view, targets)
                np.save(home / "pairs.npy", pairs.target)
                paired = {**where, "pairs": str(home / "pairs.npy")}
                asked.append(Asked("matches", {**content, "pairing": pairs.way}, paired))
            if "genmetrics" in self.protocols:
                asked.append(Asked("covers", content, where))
            view, more = self._worked_out(one, home, f"{one.name}: targets", asked)
            seconds |= more
        copies = self._copies(view, home, one.name, seconds)
        relaxation = None
        if self.request.relax:
            relaxation, view = self._relaxed(one, view, home, asked, seconds)
        scene = Scene(view, copies, reference, targets, pairs, relaxation, self.request.cutoffs)
        began = time.perf_counter()
        found = scores(scene, self.protocols)
        seconds["scores"] = time.perf_counter() - began
        return Scored(one, scene, found, seconds)

    @property
    def _known(self) -> list[Asked]:
        stages = ["known", "known_alloys"] if self.request.mixes_alloys() else ["known"]
        content, where = {"reference": self.inputs["reference"]}, {"index": str(self._index)}
        return [Asked(stage, content, where) for stage in stages]

    def _worked_out(
        self, one: SampleSet, home: Path, what: str, asked: Sequence[Asked], samples: Samples | None = None
    ) -> tuple[View, dict[str, float]]:
        """Read a set, work out the stages of its parts; return its columns and the workers' seconds."""
        read = home / "read"
        folders = {"read": read, **{a.stage: a.folder(home) for a in asked}}
        stages = [[a.stage, str(folders[a.stage]), a.settings, a.where] for a in asked]
        step = self.telling.step(what)
        seconds: Counter[str] = Counter()
        waiting: list[Future[Any]] = []
        n = 0
        for part in take_in(one, read, samples=samples):
            n += part.n
            step.expect(part.n)
            if all(part_path(folders[a.stage], part.number).exists() for a in asked):
                step.advance(part.n)
                continue
            task = {"job": _READ, "part": part.number, "read": str(read), "stages": stages}
            waiting.append(self.pool.submit(task))
        for result in _results(waiting):
            step.advance(result["n"])
            seconds.update({name: found["seconds"] for name, found in result["stages"].items()})
        new = f" ({', '.join(f'{k} {v:.1f} s' for k, v in seconds.items())} of computing)" if seconds else ""
        step.done(f"{n:,} entries{new}")
        view = View(one.name, folders, n)
        for name in folders:
            troubles = [t for t in view.texts(name, "trouble") if t] if name != "read" else []
            if troubles:
                self._note(
                    f"{what}: {name}: {len(troubles):,} structures without an answer, as '{troubles[0]}'"
                )
        return view, dict(seconds)

    def _copies(self, view: View, home: Path, what: str, seconds: dict[str, float]) -> Copies:
        """Find who is whose copy, under every rule whose checks were made."""
        began = time.perf_counter()
        gates = {
            rule.gate: view.folders[stage]
            for rule in RULES.values()
            for stage in ("checks", "bonds")
            if view.has(stage) and rule.gate in STAGES[stage].schema.names
        }
        mixes = self.request.mixes_alloys()
        rules = [
            name
            for name, rule in RULES.items()
            if (not rule.gate or rule.gate in gates) and (mixes or not rule.disordered)
        ]
        sources = sorted({view.folders["forms"].name, *(gate.name for gate in gates.values())})
        folder = home / "-".join(["copies", *rules, *sources])
        step = self.telling.step(f"{what}: copies")
        step.expect(view.n)
        whole = folder / "buckets.json"
        if not whole.exists():
            n = fill_buckets(
                view.folders["forms"],
                view.folders["checks"],
                folder / "buckets",
                gates,
                view.n,
                cells=view.folders["read"] if mixes else None,
            )
            whole.write_text(str(n), encoding="utf-8")
        waiting = []
        for bucket in range(int(whole.read_text(encoding="utf-8"))):
            out = part_path(folder / "found", bucket)
            if not out.exists():
                task = {
                    "job": _COPIES, "bucket": str(part_path(folder / "buckets", bucket)), "out": str(out),
                    "rules": rules,
                }  # fmt: skip
                waiting.append(self.pool.submit(task))
        for result in _results(waiting):
            step.advance(result["n"])
        found = collect(folder / "found", rules, view.n)
        step.done(f"{int((found.of['default'] >= 0).sum()):,} copies")
        seconds["copies"] = seconds.get("copies", 0.0) + time.perf_counter() - began
        return found

    def _relaxed(
        self, one: SampleSet, view: View, home: Path, asked: Sequence[Asked], seconds: dict[str, float]
    ) -> tuple[Relaxation, View]:
        """Relax a set, and work out its relaxed structures like the set itself."""
        request = self.request
        hull = str(request.hull)
        references = str(request.element_references or "")
        began = time.perf_counter()
        folder = request.out / "relaxed" / one.name
        relax_all(
            view, folder, request.potential, request.workers, self.telling.step(f"{one.name}: relaxing")
        )
        seconds["relaxing"] = time.perf_counter() - began
        settings = {
            "potential": request.potential,
            "hull": content_hash((Path(hull),)),
            "references": references,
        }
        where = {"hull": hull, "references": references, "relaxed": str(folder / "relaxed.jsonl")}
        stages = [*asked, Asked("stability", settings, where)]
        view, more = self._worked_out(one, home, f"{one.name}: stability", stages)
        seconds |= more
        again = [Asked("checks"), Asked("forms")] + (self._known if request.reference else [])
        place = home / f"relaxed-{request.potential.replace(':', '-')}"
        samples = relaxed_samples(view, folder)
        inner, _ = self._worked_out(one, place, f"{one.name}: relaxed structures", again, samples)
        copies = self._copies(inner, place, f"{one.name}: relaxed structures", seconds)
        judge = judge_of(references_of(request.potential, references), read_hull(hull))
        reasons = Counter(r for r in view.texts("stability", "stability_reason") if r and ": no " in r)
        for reason, n in reasons.items():
            self._note(f"{one.name}: {n:,} samples have no hull distance ({reason}); add it to {hull}")
        return Relaxation(inner, copies, judge), view

    def _paired(self, view: View, targets: View) -> Pairs:
        ids = [str(name) for name in view.texts("read", "id")]
        target_ids = [str(name) for name in targets.texts("read", "id")]
        formulas = [str(formula) for formula in targets.texts("checks", "formula")]
        asked = [asked_formula(text) for text in view.texts("read", "conditions")]
        found = view.texts("checks", "formula")
        return pair(ids, found, target_ids, formulas, way=self.request.pairing, asked=asked)


def _results(waiting: Iterable["Future[Any]"]) -> Iterable[Any]:
    return (future.result() for future in as_completed(list(waiting)))
