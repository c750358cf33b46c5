r"""Structure prediction by template, as an engine: no model, the best guesses from known crystals.

    engine = TemplateEngine(load_templates(["mp_train.parquet", "wbm_train.parquet"]))

Asked n times for one composition, it answers with its best guess, the second best, and so on: it draws
nothing, so seed and temperature do not matter. A completion is `wyckoff` text; it takes its composition from
the prompt's request (or from a beginning that holds the whole first line), and a space group or crystal
system that is asked for restricts the templates. Its `log_probability` is its own score: the logarithm of the
guess's share of all votes.

The guesses are those of structures/templates.py, but each crystal once: guesses that pymatgen's matcher holds
for the same at its defaults share one place, and the votes of all of them. (At the wider tolerances of
structure prediction rock salt and zinc blende are one; match rates on mp_val are the same with either.) Where
there is none left, or none at all, the completion is empty, its stop reason "error", and its detail says why.

Measured (structure prediction, composition alone, no validity gate, tolerances csp):

    python -m crystallm_kit.benchmark predict mp_test.parquet --targets 3559 --samples 20 --engine template \
        --library mp_train.parquet wbm_train.parquet
    n = 1: 70.7 % (69.2 to 72.2)     n = 5: 86.3 % (85.1 to 87.4)     n = 20: 90.6 % (89.6 to 91.5)
    RMSE 0.031, 0.032, 0.039

with --targets 1600: 70.8, 85.0, 89.9 %; 600: 73.3, 85.7, 89.0 %. All settings were chosen on mp_val; of the
first 600 the state before the last choice was measured too (72.5, 85.0, 88.8 %). A query takes about 20 ms.

Not here: how votes are counted (structures/templates.py), and the matcher (scores/matcher/).
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from crystallm_kit.engines.engine import Prompt, Sampling
from crystallm_kit.errors import EncodeError, ImpossibleRequest, ParseError, UserError
from crystallm_kit.records import Completion
from crystallm_kit.scores.matcher.structure_matcher import TOLERANCES, Reduced, fit, reduced
from crystallm_kit.structures.elements import ATOMIC_NUMBER, ELEMENTS, RANK, SYMBOL
from crystallm_kit.structures.symmetry import canonical, expand
from crystallm_kit.structures.templates import Guess, TemplateLibrary
from crystallm_kit.text.wyckoff import symmetric_to_text
from crystallm_kit.tokens.requests import Request

_POOL = 40
_MOST_KNOWN = 500_000  # pairs whose comparison is remembered, of about 300 bytes
_HEADER = re.compile(r"((?:[A-Z][a-z]?[0-9]{1,2} )+)([0-9]{1,3})\n")


@dataclass
class Answer:
    """A text, with its guess and what votes for it and its likes."""

    text: str
    guess: Guess
    votes: float


class TemplateEngine:
    """Answers from known crystals.

    Args:
        library: Of templates.
        pool: Guesses whose votes are put together where the matcher holds them for the same.
    """

    name = "template"
    steerable = True
    is_drawn = False  # the k-th answer to a prompt is its k-th best, whatever the seed

    def __init__(self, library: TemplateLibrary, *, pool: int = _POOL) -> None:
        self.library = library
        self.pool = pool
        # Whether two templates are the same, element for element; which elements these are is no matter.
        self._same: dict[tuple[int, int, frozenset[tuple[int, int]]], bool] = {}

    def complete(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Completion]:
        """Yield for each prompt the next best answer that no equal prompt before it got.

        Raises:
            UserError: If a prompt asks for an adapter.
            ImpossibleRequest: If a prompt asks for the probability of a text that is given.
        """
        for prompt in prompts:
            if prompt.is_whole:
                raise ImpossibleRequest("engine 'template' gives no probabilities of a text")
            if prompt.adapter:
                raise UserError(f"engine 'template' has no adapters, so none called '{prompt.adapter}'")
        asked = Counter(map(_key, prompts))
        turns: Counter[tuple[Request | None, str]] = Counter()
        known: dict[tuple[Request | None, str], list[Answer] | str] = {}
        for index, prompt in enumerate(prompts):
            key = _key(prompt)
            if key not in known:
                known[key] = self._answers(prompt, asked[key])
            answers, turn = known[key], turns[key]
            turns[key] += 1
            if turns[key] == asked[key]:
                del known[key]
            common = (prompt.text, sampling.seed, index)
            if isinstance(answers, str):
                yield _nothing(answers, *common)
            elif turn >= len(answers):
                yield _nothing(f"no more than {len(answers)} different guesses for this", *common)
            else:
                answer = answers[turn]
                share = min(answer.votes / answer.guess.all_votes, 1.0)
                yield Completion(prompt.text, answer.text, (), "stop", math.log(share), sampling.seed, index)

    def _answers(self, prompt: Prompt, n: int) -> list[Answer] | str:
        """Return the n best answers to a prompt, fewer where there are no more; or why there are none."""
        compositions = _compositions(prompt.request)
        groups = () if prompt.request is None else prompt.request.groups
        given = _HEADER.match(prompt.beginning)
        if given and not compositions:
            counts = {s: int(n) for s, n in re.findall(r"([A-Z][a-z]?)([0-9]+)", given[1])}
            compositions = [{ATOMIC_NUMBER[s]: n for s, n in counts.items() if s in ATOMIC_NUMBER}]
        if not compositions:
            return "a template needs a composition; ask for a formula"
        most = max(self.pool, 3 * n)
        found = [self.library.guesses(counts, groups=groups, most=most) for counts in compositions]
        guesses = sorted((guess for some in found for guess in some), key=lambda guess: -guess.votes)
        all_votes = sum(some[0].all_votes for some in found if some)
        guesses = [_of_all(guess, all_votes) for guess in guesses]
        answers = self._different(guesses, n, prompt.beginning)
        if answers:
            return answers
        formula = "".join(f"{SYMBOL[z]}{c} " for z, c in compositions[0].items()).strip()
        where = f" in space group {groups[0]}" if len(groups) == 1 else " as asked" if groups or given else ""
        return f"no template for {formula}{where}: no crystal of the library has these counts of atoms"

    def _different(self, guesses: Sequence[Guess], n: int, beginning: str) -> list[Answer]:
        """Return n answers at most, different to the matcher, those with the most votes first."""
        answers: list[Answer] = []
        forms: list[Reduced] = []
        for looked_at, guess in enumerate(guesses):
            if looked_at >= self.pool and len(answers) >= n:
                break
            if beginning and not (_text(guess) or "").startswith(beginning):
                continue
            try:
                form = reduced(expand(guess.crystal))
            except (UserError, ParseError):  # a cell that is none
                continue
            both = zip(answers, forms, strict=True)
            same = next((a for a, other in both if self._is_same(guess, form, a.guess, other)), None)
            if same is None:
                text = _text(guess)
                if text is not None:
                    answers.append(Answer(text, guess, guess.votes))
                    forms.append(form)
            elif looked_at < self.pool:
                same.votes += guess.votes
        return sorted(answers, key=lambda answer: -answer.votes)[:n]

    def _is_same(self, first: Guess, form: Reduced, second: Guess, other: Reduced) -> bool:
        if len(form.numbers) != len(other.numbers):
            return False
        back = {new: old for old, new in second.replaced}
        places = frozenset((old, back[new]) for old, new in first.replaced)
        key = (first.entry, second.entry, places)
        if key not in self._same:
            if len(self._same) >= _MOST_KNOWN:
                self._same.clear()
            self._same[key] = fit(form, other, TOLERANCES["default"])
        return self._same[key]


def _key(prompt: Prompt) -> tuple[Request | None, str]:
    return prompt.request, prompt.beginning


def _nothing(why: str, prompt: str, seed: int, index: int) -> Completion:
    return Completion(prompt, "", (), "error", float("nan"), seed, index, detail=why)


def _compositions(request: Request | None) -> list[dict[int, int]]:
    """Return the compositions (atomic number -> atoms) that meet a request for a formula; else none."""
    if request is None or not request.plans or len(request.required) != request.n_elements:
        return []
    numbers = [ATOMIC_NUMBER[ELEMENTS[rank]] for rank in request.required]
    return [dict(zip(numbers, plan, strict=True)) for plan in request.plans]


def _of_all(guess: Guess, all_votes: float) -> Guess:
    return replace(guess, all_votes=all_votes)


def _text(guess: Guess) -> str | None:
    """Return the canonical text, or None where the format cannot hold it."""
    order = sorted(guess.crystal.counts, key=lambda z: RANK[SYMBOL[z]])
    try:
        return symmetric_to_text(canonical(guess.crystal, order))
    except EncodeError:
        return None
