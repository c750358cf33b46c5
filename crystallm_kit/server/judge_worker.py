"""A process that judges samples for the server: it reads tasks from a pipe and writes results to it.

    main(["5", "10"])       the pipe's file number, seconds for one text

    JudgeTask    texts of one request  -> Judged for each: verdict, and the crystal as JSON, ready to be sent
    CompareTask  valid samples of one formula -> for each the name of an earlier one that it copies, or None

It never imports torch, so that it starts quickly and stays small. It ends when the pipe is closed. Signals
that stop the server are left to the server, which lets what runs finish.

Not here: who starts it, replaces it and gives it work (judging.py).
"""

import signal
import time
import warnings
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from multiprocessing.connection import Connection
from typing import Any

import orjson
from pymatgen.core import Composition, Element, Molecule, Structure

from crystallm_kit.errors import CrystallmKitError, UserError
from crystallm_kit.generation import Judging, judge_by, without_numbers
from crystallm_kit.records import Completion, Conditions, Crystal, Sample, StopReason, Verdict
from crystallm_kit.scores.funnel import Form, form_of, is_copy, stage_of
from crystallm_kit.structures.extended_xyz import frame_text
from crystallm_kit.structures.writing import text_of
from crystallm_kit.text.parsing import parse_completion

FORMATS = ("cif", "extxyz", "json")
READY = "ready"
BUSY = "busy"  # sent between texts, so that a long task is told from one that hangs
_BUSY_SECONDS = 0.5
_FORMS_KEPT = 2000  # reduced structures, about 20 kB each


@dataclass(frozen=True, slots=True)
class Item:
    """One completion of a task: what is drawn, and how often its numbers were drawn again."""

    index: int
    redraws: int
    prompt: str
    text: str
    stop_reason: StopReason
    log_probability: float


@dataclass(frozen=True)
class JudgeTask:
    """Completions of one request.

    Attributes:
        judging: Model's name, text format, protocol.
        conditions: What was asked.
        seed: Of the request; with an item's index the sample's name.
        form: One of FORMATS: how structures are written.
        is_unique: Whether the verdict names the check "unique" as passed; who compares takes it back.
        with_invalid: Whether samples that are not valid are written too.
        items: The completions.
    """

    judging: Judging
    conditions: Conditions
    seed: int
    form: str
    is_unique: bool
    with_invalid: bool
    items: tuple[Item, ...]


@dataclass(frozen=True, slots=True)
class Judged:
    """What the server needs of one sample.

    Attributes:
        index: As in the item.
        reason: Of the verdict, None if valid.
        stage: Gate of the funnel that stopped it; "" if none did.
        formula: Reduced formula; "" where no structure was parsed.
        text: The crystal's text.
        line: The crystal as a JSON object; b"" where it is not asked for.
    """

    index: int
    reason: str | None
    stage: str
    formula: str
    text: str
    line: bytes


@dataclass(frozen=True)
class CompareTask:
    """Valid samples of one formula as (name, text): the kept ones, and new ones to be looked up among them.

    Attributes:
        judging: As in JudgeTask.
        earlier: Samples that are different from each other.
        later: New ones, in order.
        among_themselves: Whether each of the new ones is compared with the new ones before it, too.
    """

    judging: Judging
    earlier: tuple[tuple[str, str], ...]
    later: tuple[tuple[str, str], ...]
    among_themselves: bool


# ---------------------------------------------------------------- judging


def judged(task: JudgeTask, item: Item, seconds: float) -> Judged:
    """Return what becomes of one completion; never raises, never takes much longer than `seconds`."""
    completion = Completion(
        item.prompt, item.text, (), item.stop_reason, item.log_probability, task.seed, item.index
    )
    try:
        with _time_limit(seconds):
            sample = judge_by(task.judging, completion, task.conditions, index=item.index, seed=task.seed)
            if item.redraws:
                sample = replace(sample, measures={**sample.measures, "redraws": item.redraws})
            verdict = sample.verdict
            if verdict.valid and task.is_unique:
                sample = replace(sample, verdict=replace(verdict, checks={**verdict.checks, "unique": True}))
            wanted = sample.verdict.valid or task.with_invalid
            line = crystal_line(sample, item.index, task.form) if wanted else b""
    except _TooLong:
        return failed(task, item, f"judging it took longer than {seconds:g} s")
    except CrystallmKitError as error:  # conditions that this kind of structure cannot be asked
        return failed(task, item, str(error))
    except Exception as error:  # noqa: BLE001 - whatever a text makes of a library, the others are judged
        return failed(task, item, f"judging it failed: {type(error).__name__}")
    reason = sample.verdict.reason
    stage = "" if reason is None else stage_of(reason, sample.verdict)
    formula = "" if sample.structure is None else _formula(sample.structure)
    return Judged(item.index, reason, stage, formula, sample.text, line)


def failed(task: JudgeTask, item: Item, detail: str) -> Judged:
    """Return the outcome of a completion that could not be judged: reason "error"."""
    given = item.prompt if task.judging.begins_the_text else ""
    verdict = Verdict(False, "error", detail)
    sample = Sample(
        f"{task.seed}-{item.index}", given + item.text, None, verdict, task.conditions,
        item.log_probability, task.seed, task.judging.model,
    )  # fmt: skip
    line = crystal_line(sample, item.index, task.form) if task.with_invalid else b""
    return Judged(item.index, "error", stage_of("error", verdict), "", sample.text, line)


def crystal_line(sample: Sample, index: int, form: str) -> bytes:
    """Return one crystal of an answer as JSON. NaN becomes null; so does a structure that `form` cannot hold
    (a molecule as CIF)."""
    structure, verdict = sample.structure, sample.verdict
    return orjson.dumps(
        {
            "index": index,
            "id": sample.id,
            "formula": None if structure is None else _formula(structure),
            "spacegroup_number": sample.measures.get("spacegroup_number"),
            "structure": None if structure is None else _structure_text(sample, form),
            "text": sample.text,
            "verdict": {
                "valid": verdict.valid,
                "reason": verdict.reason,
                "detail": verdict.detail,
                "checks": dict(verdict.checks),
            },
            "measures": dict(sample.measures),
            "log_probability": sample.log_probability,
        },
        option=orjson.OPT_SERIALIZE_NUMPY,
    )


def _formula(structure: Structure | Molecule) -> str:
    """Return pymatgen's reduced formula; remembered, since it takes a fifth of a sample's time."""
    if not structure.is_ordered:
        return str(structure.composition.reduced_formula)
    return _formula_of(tuple(sorted(Counter(structure.atomic_numbers).items())))


@lru_cache(maxsize=20_000)
def _formula_of(counts: tuple[tuple[int, int], ...]) -> str:
    return str(Composition({Element.from_Z(z): n for z, n in counts}).reduced_formula)


def _structure_text(sample: Sample, form: str) -> str | None:
    structure = sample.structure
    if structure is None:
        return None
    if form == "json":
        return orjson.dumps(structure.as_dict(), option=orjson.OPT_SERIALIZE_NUMPY).decode()
    if form == "extxyz":
        return frame_text(structure, {"id": sample.id, **sample.measures}) if structure.is_ordered else None
    try:
        return text_of(Crystal(sample.id, structure), form)
    except UserError:
        return None


# ---------------------------------------------------------------- comparing


class Forms:
    """Reduced structures by text, the latest kept."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Form | None] = OrderedDict()

    def of(self, judging: Judging, name: str, text: str) -> Form | None:
        """Return the form of a text, under a name; None if it is no crystal."""
        if text in self._kept:
            self._kept.move_to_end(text)
        else:
            crystal = parse_completion(text, judging.representation)
            form = form_of(name, crystal.structure) if isinstance(crystal, Crystal) else None
            self._kept[text] = form
            if len(self._kept) > _FORMS_KEPT:
                self._kept.popitem(last=False)
        found = self._kept[text]
        return None if found is None else replace(found, name=name)


def compared(task: CompareTask, forms: Forms) -> Iterator[str | None]:
    """Yield for each new sample the name of an earlier one that it copies.

    Looked at first are those that agree in everything but the numbers, where a copy is likeliest; so the name
    need not be that of the first copy.
    """
    earlier = [(forms.of(task.judging, *pair), pair[1]) for pair in task.earlier]
    for name, text in task.later:
        form = forms.of(task.judging, name, text)
        kind = without_numbers(text)
        tried = sorted(earlier, key=lambda pair: without_numbers(pair[1]) != kind)
        copied = next((other.name for other, _ in tried if form and other and is_copy(form, other)), None)
        if copied is None and task.among_themselves:
            earlier.append((form, text))
        yield copied


# ---------------------------------------------------------------- the process


class _TooLong(BaseException):
    """The time for one text is over. No Exception, so that no library takes it for its own."""


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise _TooLong in the block after some seconds."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _ring(_signal: int, _frame: Any) -> None:
    raise _TooLong


def main(arguments: list[str]) -> None:
    """Answer tasks until the pipe is closed."""
    pipe, seconds = Connection(int(arguments[0])), float(arguments[1])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, _ring)
    warnings.simplefilter("ignore")  # a model's odd crystals make libraries warn; the verdict says it
    forms = Forms()
    _warm_up()
    try:
        pipe.send(READY)
        while True:
            task = pipe.recv()
            done: list[Any] = []
            told = time.monotonic()
            results = (
                (judged(task, item, seconds) for item in task.items)
                if isinstance(task, JudgeTask)
                else compared(task, forms)
            )
            for result in results:
                done.append(result)
                if time.monotonic() - told > _BUSY_SECONDS:
                    pipe.send(BUSY)
                    told = time.monotonic()
            pipe.send(done)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _warm_up() -> None:
    """Load the tables, and compile the matcher where it has not been, before the first task comes.

    Compiling takes longer than a task may keep silent: a process that began it with a task would be replaced
    before it is done, and so would the next.
    """
    from crystallm_kit.scores.validity import validate_and_measure

    rock_salt = Structure.from_spacegroup("Fm-3m", [[5.64, 0, 0], [0, 5.64, 0], [0, 0, 5.64]],
                                          ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])  # fmt: skip
    validate_and_measure(rock_salt, stated_spacegroup=225)
    is_copy(form_of("later", rock_salt), form_of("earlier", rock_salt))
