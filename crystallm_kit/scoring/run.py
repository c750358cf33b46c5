"""One scoring run, from sample sets to scores: what the command `score` does.

    score(["DiffCSP=DiffCSP_mp_20.pt"], reference=["mp_train.parquet"], out="scores")
    -> {"DiffCSP": [Score("kit.readable", 1.0, ...), Score("cdvae.structure_valid", ...), ...]}

Sets are read into parts; the stages work them out on all cores, part by part; then copies are looked for,
formula by formula, and the scores counted. Everything is on disk as soon as it is there, and a run that was
killed goes on from it with the same result.

Not here: each step (intake.py, stages.py, copies.py, summary.py), the page (report.py).
"""

import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from crystallm_kit.errors import EmptyInput, UserError
from crystallm_kit.scores.score import Score
from crystallm_kit.scoring.copies import RULES, fill_buckets
from crystallm_kit.scoring.folder import open_folder
from crystallm_kit.scoring.intake import take_in
from crystallm_kit.scoring.knowing import build_index
from crystallm_kit.scoring.merging import write_rows
from crystallm_kit.scoring.outcome import REPORT, report_of, write_report_json
from crystallm_kit.scoring.pairing import WAYS, Pairs, pair
from crystallm_kit.scoring.pool import Pool, ray_pool
from crystallm_kit.scoring.rows import part_path, parts_of, read_part
from crystallm_kit.scoring.sample_sets import SampleSet, content_hash, named_sets
from crystallm_kit.scoring.stages import STAGES, Asked
from crystallm_kit.scoring.summary import Scene, check_protocols, scores
from crystallm_kit.scoring.telling import Telling
from crystallm_kit.scoring.view import View

_READ = "crystallm_kit.scoring.stages:run_part"
_COPIES = "crystallm_kit.scoring.copies:find_copies"
_DEFAULT_OUT = "scores"


@dataclass(frozen=True)
class Request:
    """What a run is asked for; as the command's options.

    Attributes:
        sets: The sample sets.
        out: Folder of the results.
        reference: Files of the set that tells what is new, and to which distributions are compared.
        targets: Files with the true structures of a prediction; `pairing` says how samples pair with them.
        protocols: Names; None: all.
        workers: Processes; None: one per usable core.
        ray: Address of a Ray cluster in their place; "": none.
        fresh: Remove what a run left in the folder.
    """

    sets: tuple[SampleSet, ...]
    out: Path
    reference: tuple[Path, ...] = ()
    targets: tuple[Path, ...] = ()
    pairing: str = "auto"
    protocols: tuple[str, ...] | None = None
    workers: int | None = None
    ray: str = ""
    fresh: bool = False

    def inputs(self) -> dict[str, Any]:
        """Return what the rows depend on, contents by their hash."""
        return {
            "schema": 1,
            "sets": {
                one.name: {
                    "content": content_hash(one.sources), "requested": one.n_requested, "limit": one.limit,
                }
                for one in self.sets
            },
            "reference": content_hash(self.reference) if self.reference else None,
            "targets": content_hash(self.targets) if self.targets else None,
            "pairing": self.pairing if self.targets else None,
        }  # fmt: skip


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
        options: requested (for sets that hold fewer than were asked for), limit, pairing, workers, ray,
            fresh.

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
    protocols = check_protocols(request.protocols)
    if request.pairing not in WAYS:
        raise UserError(f"--pairing {request.pairing}: one of {', '.join(WAYS)} expected")
    if request.workers is not None and request.workers < 1:
        raise UserError(f"--workers {request.workers}: 1 or more expected")
    inputs = request.inputs()
    work = open_folder(request.out, inputs, fresh=request.fresh)
    with Telling(progress) as telling, _pool(request) as pool:
        runner = _Runner(request, inputs, work, pool, telling, protocols)
        return runner.run(command)


def _pool(request: Request) -> Pool:
    if request.ray:
        return ray_pool(request.ray)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Pool(request.workers or cores)


class _Runner:
    """The steps of one run."""

    def __init__(
        self, request: Request, inputs: Mapping[str, Any], work: Path, pool: Pool, telling: Telling,
        protocols: list[str],
    ) -> None:  # fmt: skip
        self.request, self.inputs, self.work = request, inputs, work
        self.pool, self.telling, self.protocols = pool, telling, protocols
        self.notes: list[str] = []

    def run(self, command: str) -> Outcome:
        """Do all steps."""
        reference = self._reference()
        targets = self._targets()
        scored = [self._scored(one, reference, targets) for one in self.request.sets]
        out = self.request.out
        for one in scored:
            scene, name = one.scene, one.sample_set.name
            path = out / "rows" / f"{name}.parquet"
            write_rows(scene.samples, path, copies=scene.copies, pairs=scene.pairs, targets=targets)
        report = report_of(
            [(o.scene, [str(s) for s in o.sample_set.sources], o.scores, o.seconds) for o in scored],
            command=command, settings=self.inputs, protocols=self.protocols, notes=self.notes,
        )  # fmt: skip
        write_report_json(report, out / REPORT)
        return Outcome(scored, report)

    def _reference(self) -> View | None:
        if not self.request.reference:
            return None
        one = SampleSet("reference", self.request.reference)
        view, _ = self._worked_out(one, "reference", [Asked("checks"), Asked("forms")])
        step = self.telling.step("reference: index")
        step.done(f"{build_index(view.folders['read'], view.folders['forms'], self._index()):,} entries")
        self._tell_of_faults(view, "reference")
        return view

    def _index(self) -> Path:
        return self.work / ".reference" / "index"

    def _targets(self) -> View | None:
        if not self.request.targets:
            return None
        one = SampleSet("targets", self.request.targets)
        view, _ = self._worked_out(one, "targets", [Asked("checks"), Asked("forms")])
        self._tell_of_faults(view, "targets")
        return view

    def _tell_of_faults(self, view: View, what: str) -> None:
        """Say how many entries of a set of known crystals are no use; raise EmptyInput where none is any."""
        bad = [reason for reason in view.texts("read", "reason") if reason is not None]
        bad += [t for t in view.texts("forms", "trouble") if t is not None]
        if len(bad) == view.n:
            raise EmptyInput(f"{what}: none of its {view.n:,} entries could be read ({bad[0]})")
        if bad:
            kinds = ", ".join(f"{reason}: {count:,}" for reason, count in Counter(bad).most_common(5))
            note = f"{what}: {len(bad):,} of {view.n:,} entries are left out ({kinds})"
            self.notes.append(note)
            self.telling.say(note)

    def _scored(self, one: SampleSet, reference: View | None, targets: View | None) -> Scored:
        asked = [Asked("checks"), Asked("forms")]
        if reference is not None:
            content = {"reference": self.inputs["reference"]}
            asked.append(Asked("known", content, {"index": str(self._index())}))
        view, seconds = self._worked_out(one, one.name, asked)
        pairs = None
        if targets is not None:
            pairs = self._paired(view, targets)
            folder = self.work / one.name
            np.save(folder / "pairs.npy", pairs.target)
            where = {"pairs": str(folder / "pairs.npy"), "targets": str(targets.folders["forms"])}
            content = {"targets": self.inputs["targets"], "pairing": pairs.way}
            asked.append(Asked("matches", content, where))
            view, more = self._worked_out(one, f"{one.name}: targets", asked)
            seconds |= more
        began = time.perf_counter()
        copies = self._copies(view)
        seconds["copies"] = time.perf_counter() - began
        scene = Scene(view, reference, targets, copies, pairs, dict(self.inputs))
        return Scored(one, scene, scores(scene, self.protocols), seconds)

    def _worked_out(self, one: SampleSet, what: str, asked: Sequence[Asked]) -> tuple[View, dict[str, float]]:
        """Read a set, work out the stages of its parts; return its columns and the workers' seconds."""
        # a set may be called "reference" too: a point keeps the run's own folders apart
        home = self.work / (one.name if one in self.request.sets else f".{one.name}")
        read = home / "read"
        folders = {"read": read, **{a.stage: a.folder(home) for a in asked}}
        stages = [[a.stage, str(folders[a.stage]), a.settings, a.where] for a in asked]
        step = self.telling.step(what)
        seconds: Counter[str] = Counter()
        waiting: list[Future[Any]] = []
        n = 0
        for part in take_in(one, read):
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
        new = f" ({', '.join(f'{k} {v:.1f} s' for k, v in seconds.items())} of work)" if seconds else ""
        step.done(f"{n:,} entries{new}")
        return View(one.name, folders, n), dict(seconds)

    def _copies(self, view: View) -> dict[str, Any]:
        """Return rule -> the position that each sample is a copy of, -1 where it is none."""
        columns = STAGES["checks"].schema.names
        rules = [name for name, rule in RULES.items() if not rule.gate or rule.gate in columns]
        gates = sorted({RULES[name].gate for name in rules} - {""})
        home = Asked("checks").folder(self.work / view.name).parent / f"copies-{'-'.join(rules)}"
        step = self.telling.step(f"{view.name}: copies")
        step.expect(view.n)
        whole = home / "buckets.json"
        if whole.exists():
            n_buckets = len(parts_of(home / "buckets"))
        else:
            n_buckets = fill_buckets(
                view.folders["forms"], view.folders["checks"], home / "buckets", gates, view.n
            )
            whole.write_text("{}", encoding="utf-8")
        waiting = []
        for bucket in range(n_buckets):
            out = part_path(home / "found", bucket)
            if not out.exists():
                task = {
                    "job": _COPIES, "bucket": str(part_path(home / "buckets", bucket)), "out": str(out),
                    "rules": rules,
                }  # fmt: skip
                waiting.append(self.pool.submit(task))
        for result in _results(waiting):
            step.advance(result["n"])
        copies = {name: np.full(view.n, -1, dtype=np.int64) for name in rules}
        for path in parts_of(home / "found"):
            for row in read_part(path):
                copies[row["rule"]][row["position"]] = -2 if row["of"] is None else row["of"]
        n_copies = int((copies["default"] >= 0).sum())
        step.done(f"{n_copies:,} copies")
        return copies

    def _paired(self, view: View, targets: View) -> Pairs:
        ids = [str(name) for name in view.texts("read", "id")]
        target_ids = [str(name) for name in targets.texts("read", "id")]
        target_formulas = [str(one) for one in targets.texts("checks", "formula")]
        formulas = view.texts("checks", "formula")
        return pair(ids, formulas, target_ids, target_formulas, way=self.request.pairing)


def _results(waiting: Iterable["Future[Any]"]) -> Iterable[Any]:
    return (future.result() for future in as_completed(list(waiting)))
