"""search.py over a backend that answers in its own order: nothing is lost, nothing is drawn for ever."""

import asyncio
from collections import Counter

import pytest

from crystallm_kit.generation import Judging
from crystallm_kit.records import Completion, Conditions
from crystallm_kit.server.backend import Ask
from crystallm_kit.server.judging import Judges
from crystallm_kit.server.search import Finished, Found, Wanted, search
from crystallm_kit.server.state import ServerSettings, new_state
from crystallm_kit.tokens.requests import compile_request

SOUND = "Na1 Cl1 225\nNa a\nCl b\n5.64 end"
OVERLAPPING = "Na1 Cl1 225\nNa a\nCl b\n1.64 end"


class Answering:
    """A backend that writes sound crystals, and for some samples, however often, overlapping ones.

    Args:
        late: Samples that are answered after all others of their call.
        stubborn: Samples whose atoms overlap in every draw.
    """

    name = "answering"
    model_name = "crystallm-kit"
    adapters = ()
    max_positions = 512
    takes_requests = True

    def __init__(self, *, late: frozenset[int] = frozenset(), stubborn: frozenset[int] = frozenset()) -> None:
        self.late, self.stubborn = late, stubborn
        self.n_draws: Counter[int] = Counter()

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    def is_ready(self) -> bool:
        return True

    def n_running(self) -> int:
        return 0

    def n_waiting(self) -> int:
        return 0

    async def completions(self, asks: list[Ask]):
        todo = [(position, ask.first_index + i) for position, ask in enumerate(asks) for i in range(ask.n)]
        for position, number in sorted(todo, key=lambda pair: (pair[1] in self.late, pair[1])):
            self.n_draws[number] += 1
            text = OVERLAPPING if number in self.stubborn else SOUND
            prompt = asks[position].prompt.text
            yield position, Completion(prompt, text, (), "stop", -1.0, asks[position].sampling.seed, number)
            await asyncio.sleep(0)


def found_by(backend, shipped, *, n: int, max_samples: int, slots: int = 64, seconds: float = 60.0):
    """Return the events of a search for rock salt, copies counted, within so many seconds."""
    conditions = Conditions(formula={"Na": 1, "Cl": 1})
    wanted = Wanted(
        conditions, n, max_samples, Judging.of(shipped), shipped.sampling, unique=False,
        request=compile_request(conditions, max_sites=8),
    )  # fmt: skip

    async def run():
        settings = ServerSettings(slots=slots)
        state = new_state(backend, shipped, shipped.engine.tokenizer, settings, judges=Judges(1))
        await state.judges.start()
        try:
            async with asyncio.timeout(seconds):
                return [event async for event in search(state, wanted)]
        finally:
            await state.judges.close()

    return asyncio.run(run())


def test_all_that_is_ready_is_decided_when_the_last_sample_comes(shipped):
    """Only 512 samples were decided for each arrival: with more of them waiting for one late sample, and no
    arrival after it, the search never ended."""
    *crystals, end = found_by(Answering(late=frozenset([0])), shipped, n=1200, max_samples=1200, slots=2048)
    assert isinstance(end, Finished)
    assert end.finish_reason == "n"
    assert [c.index for c in crystals if isinstance(c, Found)] == list(range(1200))


def test_each_sample_is_redrawn_as_often_as_is_said_whatever_it_shares_a_wave_with(shipped):
    """A wave of redraws counted as its first one: old ones beside new ones were drawn again and again."""
    stubborn = frozenset(range(0, 300, 3))
    backend = Answering(stubborn=stubborn)
    *_, end = found_by(backend, shipped, n=150, max_samples=300, slots=16)
    decided = {number for number in stubborn if number < end.funnel.requested}
    assert {backend.n_draws[number] for number in decided} == {4}  # once, and three times again
    assert max(backend.n_draws.values()) == 4


@pytest.mark.parametrize("slots", [1, 7])
def test_a_budget_that_is_spent_ends_the_search(shipped, slots):
    *_, end = found_by(Answering(stubborn=frozenset(range(50))), shipped, n=5, max_samples=20, slots=slots)
    assert (end.finish_reason, end.funnel.requested) == ("budget", 20)
