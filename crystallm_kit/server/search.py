"""The loop: samples are drawn and judged until enough crystals are valid, or the budget is spent.

    async for found in search(state, wanted):
        Found(index=3, is_valid=True, line=b'{"index":3,"id":"1-3", ...}')     each valid crystal in turn
        Finished(funnel=Funnel(requested=7, ...), finish_reason="n", ...)      the last

Contract:
    samples are numbered 0, 1, 2 ...; draws depend on (seed, number), and decisions are taken in that order:
    the same seed gives the same crystals and the same funnel, however requests and batches fall together
    the funnel counts the samples up to the one that completed the n; none is left out for being slow
    what was drawn ahead and is not needed is cancelled and counts nowhere
    numbers (cell, coordinates) that do not fit are drawn again for the same sites, as in generation.stream
    copies are found as in scores.funnel.mark_duplicates
    a consumer that takes nothing stops the drawing; closing the iterator ends all work

Memory is bounded: of what was decided, the texts of valid crystals are kept where copies are looked for.
How far ahead is drawn follows from the share that was valid so far and from how many can be drawn at once.

Not here: bodies of requests (crystals.py), what is judged in other processes (judging.py, judge_worker.py).
"""

import asyncio
import contextlib
import dataclasses
import math
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import orjson

from crystallm_kit.engines.engine import Prompt, Sampling
from crystallm_kit.errors import UserError
from crystallm_kit.generation import GEOMETRY_REASONS, Judging, new_seed, prompt_text, without_numbers
from crystallm_kit.records import Completion, Conditions
from crystallm_kit.scores.funnel import Funnel, Tally
from crystallm_kit.server.admission import Place
from crystallm_kit.server.backend import Ask
from crystallm_kit.server.judge_worker import CompareTask, Item, Judged, JudgeTask
from crystallm_kit.server.judging import BATCH
from crystallm_kit.server.state import ServerState
from crystallm_kit.tokens.requests import Request

_PRIOR = (2, 3)  # of samples, before any was judged, two in three count as valid
_DECIDED_AT_ONCE = 512
_PAIRS_WORTH_SHARING = 64  # comparisons; fewer stay in one process


@dataclass(frozen=True)
class Wanted:
    """What a search is to find.

    Attributes:
        conditions: What the crystals must be.
        n: Valid crystals wanted.
        max_samples: Samples that may be drawn for them.
        judging: How samples are judged.
        sampling: How tokens are drawn; its seed is the search's.
        is_seeded: Whether the draws must be those of the seed (server.backend.Ask).
        request: The constraint; None: unconstrained.
        adapter: Name, or "".
        form: Format of the structures, one of judge_worker.FORMATS.
        unique: Whether copies of an earlier valid crystal do not count.
        redraws: How often the numbers of one sample are drawn again.
        include_invalid: Whether samples that are not valid are found too.
        with_log_probability: Whether each comes with it; vLLM draws faster without.
    """

    conditions: Conditions
    n: int
    max_samples: int
    judging: Judging
    sampling: Sampling
    is_seeded: bool = True
    request: Request | None = None
    adapter: str = ""
    form: str = "cif"
    unique: bool = True
    redraws: int = 3
    include_invalid: bool = False
    with_log_probability: bool = True


@dataclass(frozen=True)
class Found:
    """One sample that is told of, as JSON; not valid only where Wanted.include_invalid says so."""

    index: int
    is_valid: bool
    line: bytes


@dataclass(frozen=True)
class Finished:
    """The end of a search.

    Attributes:
        funnel: Of all samples up to the last that was needed.
        finish_reason: "n" where the n were found, "budget" where the samples were spent before.
        n_prompt_tokens: Of all prompts, one that samples share counted once.
        n_completion_tokens: Of those samples, redraws included.
    """

    funnel: Funnel
    finish_reason: str
    n_prompt_tokens: int
    n_completion_tokens: int


async def search(state: ServerState, wanted: Wanted) -> AsyncGenerator[Found | Finished, None]:
    """Yield the crystals, in the order of their numbers, and at the end the funnel.

    Raises:
        UserError: If the prompt is longer than the model's positions.
        Overloaded, NotReady, BackendError: If samples cannot be drawn or judged.
    """
    run = _Search(state, wanted)
    with state.admission.admit(min(run.width, wanted.max_samples, run.worth_drawing())) as run.place:
        async with contextlib.aclosing(run.events()) as events:
            async for event in events:
                yield event


class _Search:
    """The state of one search.

    Samples pass through: drawn (asked of the backend) -> arrived -> judged, perhaps drawn again -> waiting
    for those before them -> decided.
    """

    def __init__(self, state: ServerState, wanted: Wanted) -> None:
        self.state, self.wanted = state, wanted
        self.place: Place | None = None
        # Asked for at once: enough that no slot waits for us, few enough that a redraw waits little.
        self.width = math.ceil(1.25 * state.settings.slots)
        self.n_drawn = 0  # samples asked for: the number of the next one
        self.n_decided = 0  # samples decided: the number of the first that is not
        self.n_valid = 0
        self.n_in_backend = 0
        self.tally = Tally()
        self.copies = _Copies(state, wanted)
        self._prompts = _Prompts(state, wanted)
        # Backends leave the text of an end token out, where the model has one.
        self._end_id, self._end = state.tokenizer.eos_token_id, ""
        if state.tokenizer.eos_token == wanted.judging.representation.alphabet().end:
            self._end = str(state.tokenizer.eos_token or "")
        self._arrivals: asyncio.Queue[Any] = asyncio.Queue()
        self._to_judge: list[Item] = []
        self._to_redraw: list[tuple[int, int, str]] = []  # number, attempt, text that is kept
        self._n_judging = 0
        self._judged: dict[int, Judged] = {}
        self._n_tokens: dict[int, int] = {}
        self._n_completion_tokens = 0
        self._is_deciding = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def events(self) -> AsyncGenerator[Found | Finished, None]:
        """Run the search."""
        try:
            while True:
                self._draw()
                for event in self._take(await self._arrived()):
                    yield event
                    if isinstance(event, Finished):
                        return
        finally:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # -------------------------------------------------------- drawing

    def worth_drawing(self) -> int:
        """Return how many samples should be under way: those that are likely to give what is missing."""
        missing = self.wanted.n - self.n_valid
        share = (self.n_valid + _PRIOR[0]) / (self.n_decided + _PRIOR[1])
        return math.ceil(missing / share) + math.isqrt(missing)

    def _draw(self) -> None:
        """Ask the backend for as many samples as are worth it, and for the redraws that wait."""
        if self._to_redraw:
            asks = [self._prompts.redraw(*again) for again in self._to_redraw]
            self._start_wave(asks, len(asks), [attempt for _, attempt, _ in self._to_redraw])
            self._to_redraw = []
        under_way = self.n_drawn - self.n_decided
        room = self.width - self.n_in_backend
        if 0 < room < self.width // 16:
            return  # not one by one: a call for few costs as much as one for many
        n = min(
            self.worth_drawing() - under_way,
            room,
            self.wanted.max_samples - self.n_drawn,
            8 * self.width - under_way,
        )
        if n < 1:
            return
        numbers = range(self.n_drawn, self.n_drawn + n)
        self.n_drawn += n
        asks = list(self._prompts.asks(numbers))
        self._start_wave(asks, n, [0] * len(asks))

    def _start_wave(self, asks: Sequence[Ask], n: int, attempts: Sequence[int]) -> None:
        """Ask for n samples; `attempts` has one number for each ask: how often its samples were redrawn."""
        self.n_in_backend += n
        self._start(lambda: self._wave(asks, attempts))

    async def _wave(self, asks: Sequence[Ask], attempts: Sequence[int]) -> None:
        completions = self.state.backend.completions(asks)
        async with contextlib.aclosing(_generator(completions)) as arriving:
            async for position, completion in arriving:
                ask = asks[position]
                number = ask.first_index if ask.n == 1 else completion.index
                self._arrivals.put_nowait((number, attempts[position], completion))

    def _start(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run something beside the loop; what it raises arrives there."""

        async def told() -> None:
            try:
                await work()
            except Exception as error:  # noqa: BLE001 - raised in the loop
                self._arrivals.put_nowait(error)

        task = asyncio.create_task(told())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -------------------------------------------------------- what arrives

    async def _arrived(self) -> list[Any]:
        """Return all that has arrived, at least one thing."""
        arrived = [await self._arrivals.get()]
        while not self._arrivals.empty():
            arrived.append(self._arrivals.get_nowait())
        return arrived

    def _take(self, arrived: list[Any]) -> Iterator[Found | Finished]:
        """Pass on what arrived; yield what was decided."""
        for thing in arrived:
            if isinstance(thing, Exception):
                raise thing
            if isinstance(thing, _Decided):
                self._is_deciding = False
                yield from self._told(thing)
            elif isinstance(thing, list):
                self._n_judging -= 1
                for outcome in thing:
                    self._take_judged(outcome)
            else:
                self._take_completion(*thing)
        self._judge()
        decided = -1
        while not self._is_deciding and decided != self.n_decided:
            decided = self.n_decided
            yield from self._decide()

    def _take_completion(self, number: int, attempt: int, completion: Completion) -> None:
        self.n_in_backend -= 1
        if self.place is not None:
            self.place.passed_on()
        n_tokens = len(completion.token_ids)
        self._n_tokens[number] = self._n_tokens.get(number, 0) + n_tokens
        self.state.metrics.count_tokens(completion=n_tokens)
        self.state.metrics.completions.labels(completion.stop_reason).inc()
        text = completion.text
        if completion.token_ids[-1:] == (self._end_id,) and not text.endswith(self._end):
            text += self._end
        self._to_judge.append(
            Item(
                number, attempt, completion.prompt, text, completion.stop_reason,
                completion.log_probability,
            )
        )  # fmt: skip

    def _judge(self) -> None:
        """Hand over what waits: at once where the processes have time, else in full batches."""
        n_workers = self.state.judges.n_workers
        while self._to_judge and (len(self._to_judge) >= BATCH or self._n_judging < n_workers):
            share = math.ceil(len(self._to_judge) / max(1, n_workers - self._n_judging))
            n = min(BATCH, share)
            items, self._to_judge = tuple(self._to_judge[:n]), self._to_judge[n:]
            self._n_judging += 1
            self._start(partial(self._judged_by, items))

    async def _judged_by(self, items: tuple[Item, ...]) -> None:
        wanted = self.wanted
        task = JudgeTask(
            wanted.judging, wanted.conditions, wanted.sampling.seed, wanted.form,
            is_unique=wanted.unique, with_invalid=wanted.include_invalid, items=items,
        )  # fmt: skip
        outcomes = await self.state.judges.judge(task)
        attempts = {item.index: item.redraws for item in items}
        self._arrivals.put_nowait([(outcome, attempts[outcome.index]) for outcome in outcomes])

    def _take_judged(self, pair: tuple[Judged, int]) -> None:
        outcome, attempt = pair
        if outcome.reason in GEOMETRY_REASONS and attempt < self._prompts.redraws:
            kept = without_numbers(outcome.text)
            self._to_redraw.append((outcome.index, attempt + 1, kept))
        else:
            self._judged[outcome.index] = outcome

    # -------------------------------------------------------- deciding

    def _decide(self) -> Iterator[Found | Finished]:
        """Decide the samples whose turn it is; with comparisons to be made, in a task beside the loop."""
        ready: list[Judged] = []
        while (outcome := self._judged.get(self.n_decided + len(ready))) is not None:
            ready.append(outcome)
            if len(ready) == _DECIDED_AT_ONCE:
                break
        if not ready:
            return
        known = self.copies.known(ready)
        if known is not None:
            yield from self._told(_Decided(ready, known))
            return
        self._is_deciding = True
        self._start(lambda: self._compared(ready))

    async def _compared(self, ready: list[Judged]) -> None:
        self._arrivals.put_nowait(_Decided(ready, await self.copies.compared(ready)))

    def _told(self, decided: "_Decided") -> Iterator[Found | Finished]:
        """Count decided samples, and yield what is told of them."""
        counted = self.state.metrics.crystals
        for outcome in decided.ready:
            del self._judged[outcome.index]
            self.n_decided += 1
            self._n_completion_tokens += self._n_tokens.pop(outcome.index, 0)
            copied = decided.copied.get(outcome.index)
            reason, stage, line = outcome.reason, outcome.stage, outcome.line
            if copied is not None:
                reason, stage = "duplicate", "unique"
                line = _copied_line(line, copied) if self.wanted.include_invalid else b""
            elif reason is None:
                self.copies.keep(outcome)
                self.n_valid += 1
            self.tally.add(reason, stage)
            counted.labels(reason or "valid").inc()
            if line:
                yield Found(outcome.index, reason is None, line)
            if self.n_valid == self.wanted.n:
                yield self._finished("n")
                return
        if self.n_decided == self.wanted.max_samples:
            yield self._finished("budget")

    def _finished(self, reason: str) -> Finished:
        return Finished(
            self.tally.funnel(),
            reason,
            self._prompts.n_tokens(self.n_decided),
            self._n_completion_tokens,
        )


@dataclass(frozen=True)
class _Decided:
    """Samples in order, and of the copies among them (number -> name) what they copy."""

    ready: list[Judged]
    copied: dict[int, str]


def _copied_line(line: bytes, first: str) -> bytes:
    """Return the line of a valid crystal as that of a copy of another."""
    crystal = orjson.loads(line)
    crystal["verdict"] |= {
        "valid": False,
        "reason": "duplicate",
        "detail": f"same crystal as sample {first}",
        "checks": {**crystal["verdict"]["checks"], "unique": False},
    }
    return orjson.dumps(crystal)


def _generator(completions: AsyncIterator[Any]) -> AsyncGenerator[Any, None]:
    return completions  # type: ignore[return-value]  # backends' iterators are generators


class _Prompts:
    """The asks of a search: prompts rendered, with their length in tokens.

    A prompt in which nothing is drawn is the same for all samples, and asked for together.
    """

    def __init__(self, state: ServerState, wanted: Wanted) -> None:
        self.state, self.wanted = state, wanted
        self.redraws = wanted.redraws if wanted.request is not None else 0
        self._shared, is_drawn = self._text(0)
        self._is_shared = not is_drawn
        self._length = self._checked_length(self._shared)
        self._lengths: list[int] = []

    def asks(self, numbers: range) -> Iterator[Ask]:
        """Yield what the backend is asked for samples of these numbers."""
        if self._is_shared:
            yield self._ask(self._shared, len(numbers), numbers.start, self._length)
            return
        for number in numbers:
            text = self._text(number)[0]
            length = self._checked_length(text)
            self._lengths.append(length)
            yield self._ask(text, 1, number, length)

    def redraw(self, number: int, attempt: int, kept: str) -> Ask:
        """Return what the backend is asked for another try at the numbers of a sample."""
        text = self._shared if self._is_shared else self._text(number)[0]
        ask = self._ask(text, 1, number, self._checked_length(text))
        seed = new_seed(self.wanted.sampling.seed, 0, attempt)
        return dataclasses.replace(
            ask,
            prompt=dataclasses.replace(ask.prompt, beginning=kept),
            sampling=dataclasses.replace(ask.sampling, seed=seed),
        )

    def n_tokens(self, n_samples: int) -> int:
        """Return the tokens of the prompts of the first samples."""
        return self._length if self._is_shared else sum(self._lengths[:n_samples])

    def _text(self, number: int) -> tuple[str, bool]:
        wanted = self.wanted
        return prompt_text(wanted.conditions, self.state.model, seed=wanted.sampling.seed, index=number)

    def _checked_length(self, text: str) -> int:
        length = len(self.state.prompt_ids(text))
        if not 0 < length < self.state.backend.max_positions:
            raise UserError(
                f"the conditions make a prompt of {length} tokens; the model has "
                f"{self.state.backend.max_positions} positions for prompt and crystal together."
            )
        return length

    def _ask(self, text: str, n: int, first: int, length: int) -> Ask:
        sampling, wanted = self.wanted.sampling, self.wanted
        n_new = min(sampling.max_new_tokens, self.state.backend.max_positions - length)
        return Ask(
            prompt=Prompt(text, request=wanted.request, adapter=wanted.adapter),
            sampling=dataclasses.replace(sampling, max_new_tokens=n_new),
            n=n,
            first_index=first,
            n_top=0 if wanted.with_log_probability else None,
            is_seeded=wanted.is_seeded,
        )


class _Copies:
    """The valid crystals of a search by formula, and which of the new ones are copies of them.

    Only crystals of one reduced formula are compared, in other processes; equal texts are not even that.
    """

    def __init__(self, state: ServerState, wanted: Wanted) -> None:
        self.state, self.wanted = state, wanted
        self._kept: dict[str, list[tuple[str, str]]] = defaultdict(list)  # formula -> (name, text)
        self._known: dict[str, str] = {}  # text -> name of the crystal that it is, or copies

    def keep(self, outcome: Judged) -> None:
        """Remember a valid crystal that is no copy."""
        if self.wanted.unique:
            name = self._name(outcome)
            self._kept[outcome.formula].append((name, outcome.text))
            self._known[outcome.text] = name

    def known(self, ready: Sequence[Judged]) -> dict[int, str] | None:
        """Return the copies among some samples, or None if crystals have to be compared for it."""
        if not self.wanted.unique:
            return {}
        copied: dict[int, str] = {}
        texts: dict[str, str] = {}
        formulas: set[str] = set()
        for outcome in ready:
            if outcome.reason is not None:
                continue
            first = self._known.get(outcome.text) or texts.get(outcome.text)
            if first is not None:
                copied[outcome.index] = first
            elif outcome.formula in self._kept or outcome.formula in formulas:
                return None
            else:
                formulas.add(outcome.formula)
                texts[outcome.text] = self._name(outcome)
        return copied

    async def compared(self, ready: Sequence[Judged]) -> dict[int, str]:
        """Return the copies among some samples. Raises BackendError."""
        new: dict[str, dict[str, str]] = defaultdict(dict)  # formula -> text -> name of the first with it
        for outcome in ready:
            if outcome.reason is None and outcome.text not in self._known:
                new[outcome.formula].setdefault(outcome.text, self._name(outcome))
        found = await asyncio.gather(*(self._of_formula(formula, texts) for formula, texts in new.items()))
        first_of = {text: name for names in found for text, name in names.items()}
        for text, name in first_of.items():
            self._known[text] = name
        copied = {}
        for outcome in ready:
            if outcome.reason is None:
                first = self._known[outcome.text]
                if first != self._name(outcome):
                    copied[outcome.index] = first
        return copied

    async def _of_formula(self, formula: str, texts: dict[str, str]) -> dict[str, str]:
        """Return for each new text of a formula the name of the crystal that it is."""
        kept, later = tuple(self._kept.get(formula, ())), tuple((n, t) for t, n in texts.items())
        judges, judging = self.state.judges, self.wanted.judging
        first: dict[str, str] = dict(texts)
        if not kept and len(later) == 1:
            return first
        if len(kept) * len(later) >= _PAIRS_WORTH_SHARING and judges.n_workers > 1:
            # with the kept ones in several processes; what is left over, among themselves, in one
            size = math.ceil(len(later) / judges.n_workers)
            parts = [later[start : start + size] for start in range(0, len(later), size)]
            tasks = [CompareTask(judging, kept, part, False) for part in parts]
            results = [c for part in await asyncio.gather(*map(judges.compare, tasks)) for c in part]
            for (_, text), copied in zip(later, results, strict=True):
                first[text] = copied or first[text]
            later = tuple(pair for pair, copied in zip(later, results, strict=True) if copied is None)
            kept = ()
            if len(later) < 2:
                return first
        results = await judges.compare(CompareTask(judging, kept, later, True))
        for (_, text), copied in zip(later, results, strict=True):
            first[text] = copied or first[text]
        return first

    def _name(self, outcome: Judged) -> str:
        return f"{self.wanted.sampling.seed}-{outcome.index}"
