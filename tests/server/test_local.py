"""The model in this process as a backend: tests of server/local.py."""

import asyncio
import contextlib
import time
from dataclasses import replace

import pytest

from crystallm_kit.engines.continuous import ContinuousEngine
from crystallm_kit.engines.engine import Prompt, Sampling
from crystallm_kit.errors import UserError
from crystallm_kit.records import Conditions
from crystallm_kit.server.backend import Ask, BackendError, NotReady
from crystallm_kit.server.local import LocalBackend, _first_stop, _n_held, _PrefixDecoder
from crystallm_kit.tokens.requests import compile_request

SALT = Prompt("crystal\n", request=compile_request(Conditions(formula={"Na": 1, "Cl": 1}), max_sites=4))
FREE = Prompt("crystal\n")


@pytest.fixture
def run(shipped):
    """Return a function that runs a coroutine function over a started backend of the shipped model."""

    def runner(work, *, slots=16, **settings):
        async def whole():
            engine = ContinuousEngine(shipped.engine.model, shipped.engine.tokenizer, slots=slots)
            backend = LocalBackend(engine, model_name="crystallm-kit", **settings)
            await backend.start()
            try:
                return await asyncio.wait_for(work(backend), 60)
            finally:
                await backend.close()

        return asyncio.run(whole())

    return runner


async def idle(backend) -> None:
    """Wait until nothing is drawn; fails after some seconds."""
    until = time.monotonic() + 10
    while backend.n_running() or backend.n_waiting():
        assert time.monotonic() < until, "work that nobody waits for goes on"
        await asyncio.sleep(0.01)


def test_the_pieces_of_each_completion_join_to_its_text_and_end_once(run):
    async def work(backend):
        texts, ends = [""] * 5, [[] for _ in range(5)]
        async for piece in backend.pieces(Ask(SALT, Sampling(seed=3), n=5, first_index=10)):
            assert not ends[piece.index], "a piece after the end"
            texts[piece.index] += piece.text
            if piece.completion:
                ends[piece.index].append(piece.completion)
        assert [len(found) for found in ends] == [1] * 5
        assert texts == [found[0].text for found in ends]
        assert [found[0].index for found in ends] == [10, 11, 12, 13, 14]

    run(work)


def test_completions_are_those_of_the_transformers_engine_without_the_end(run, shipped):
    """The same seed and position draw the same, and an end token leaves no text, as on a vLLM server."""

    async def work(backend):
        asks = [Ask(SALT, Sampling(seed=5), n=3), Ask(SALT, Sampling(seed=5), n=2, first_index=3)]
        found = [(p, c) async for p, c in backend.completions(asks)]
        assert sorted((p, c.index) for p, c in found) == [(0, 0), (0, 1), (0, 2), (1, 3), (1, 4)]
        return {c.index: c for _, c in found}

    found = run(work)
    for expected in shipped.engine.complete([SALT] * 5, Sampling(seed=5)):
        got = found[expected.index]
        assert got.token_ids == expected.token_ids
        assert got.text == expected.text.removesuffix("end")
        assert got.stop_reason == "stop"
        assert got.log_probability == pytest.approx(expected.log_probability, abs=1e-3)


def test_a_stop_text_across_tokens_ends_a_completion_before_any_of_it_is_shown(run, shipped):
    whole = next(shipped.engine.complete([SALT], Sampling(seed=5)))
    tokens = shipped.engine.tokenizer.convert_ids_to_tokens(list(whole.token_ids))
    stop = tokens[3][-1:] + tokens[4] + tokens[5][:1]  # of three tokens, whole or in part
    assert stop not in whole.text[: whole.text.find(stop)]

    async def work(backend):
        for n_top in (None, 2):
            ask = Ask(SALT, Sampling(seed=5), stop=("never", stop), n_top=n_top)
            pieces = [piece async for piece in backend.pieces(ask)]
            text = "".join(piece.text for piece in pieces)
            assert text == whole.text[: whole.text.find(stop)] == pieces[-1].completion.text
            assert pieces[-1].completion.stop_reason == "stop"
            told = "".join(token.text for piece in pieces for token in piece.tokens)
            assert text.startswith(told)
        found = [c async for _, c in backend.completions([Ask(SALT, Sampling(seed=5), stop=(stop,))])]
        assert [c.text for c in found] == [text]
        await idle(backend)  # the engine does not go on behind it

    run(work)


def test_log_probabilities_come_with_each_token_and_add_up(run):
    async def work(backend):
        ask = Ask(FREE, Sampling(seed=2, max_new_tokens=12), n_top=3)
        pieces = [piece async for piece in backend.pieces(ask)]
        tokens = [token for piece in pieces for token in piece.tokens]
        completion = pieces[-1].completion
        assert [token.id for token in tokens] == list(completion.token_ids)
        assert sum(t.log_probability for t in tokens) == pytest.approx(completion.log_probability, abs=1e-3)
        for token in tokens:
            assert len(token.top) == 3
            values = [value for _, value in token.top]
            assert values == sorted(values, reverse=True)
            assert token.log_probability <= values[0] + 1e-6

    run(work)


def test_who_stops_listening_frees_the_engine(run):
    async def work(backend):
        async with contextlib.aclosing(backend.pieces(Ask(FREE, Sampling(seed=1), n=100))) as pieces:
            async for _ in pieces:
                break
            assert backend.n_running() + backend.n_waiting() > 50
        await idle(backend)
        reading = asyncio.create_task(anext(backend.completions([Ask(FREE, Sampling(seed=1), n=100)])))
        await asyncio.sleep(0.05)
        reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reading
        await idle(backend)

    run(work)


def test_a_reader_who_does_not_read_is_cut_off_and_stalls_nobody(run):
    async def work(backend):
        slow = backend.pieces(Ask(FREE, Sampling(seed=1), n=8))
        await anext(slow)
        quick = [c async for _, c in backend.completions([Ask(SALT, Sampling(seed=1), n=8)])]
        assert len(quick) == 8
        await idle(backend)  # the slow one's work was dropped, not parked
        with pytest.raises(BackendError, match="tokens were left unread"):
            async for _ in slow:
                pass

    run(work, max_unread_tokens=60)


def test_a_slow_reader_within_the_bound_gets_everything_in_few_pieces(run):
    async def work(backend):
        ask = Ask(SALT, Sampling(seed=4), n=4)
        pieces = backend.pieces(ask)
        texts, n_pieces = [""] * 4, 1
        first = await anext(pieces)
        texts[first.index] = first.text
        await idle(backend)
        async for piece in pieces:
            texts[piece.index] += piece.text
            n_pieces += 1
        expected = [c async for _, c in backend.completions([ask])]
        assert texts == [c.text for c in sorted(expected, key=lambda c: c.index)]
        # all that had come of each at once, and its end, which may be on its way when the engine is idle
        assert n_pieces <= 1 + 2 * 4 < sum(len(c.token_ids) for c in expected) / 2

    run(work)


@pytest.mark.parametrize(
    "ask",
    [
        Ask(Prompt(""), Sampling()),
        Ask(Prompt("hello world"), Sampling()),
        Ask(FREE, Sampling(), prompt_ids=(10**6,)),
        Ask(Prompt("crystal\n", adapter="none"), Sampling()),
        Ask(FREE, Sampling(), prompt_ids=(8,) * 512),
    ],
)
def test_what_cannot_be_asked_is_refused_before_the_first_piece(run, ask):
    async def work(backend):
        with pytest.raises(UserError):
            await anext(backend.pieces(ask))
        with pytest.raises(UserError):
            await anext(backend.completions([Ask(SALT, Sampling(), n=2), ask]))
        await idle(backend)  # the good ask beside it does not go on either

    run(work)


def test_a_beginning_that_the_request_forbids_is_the_askers_mistake(run):
    async def work(backend):
        with pytest.raises(UserError, match="leaves what was asked for"):
            async for _ in backend.pieces(Ask(replace(SALT, beginning="K1 "), Sampling())):
                pass

    run(work)


def test_an_engine_that_fails_costs_its_requests_and_not_the_next(run, monkeypatch):
    async def work(backend):
        pieces = backend.pieces(Ask(FREE, Sampling(), n=4))
        await anext(pieces)
        with monkeypatch.context() as patch:
            patch.setattr(backend.engine, "_slots", None)  # whatever is done next fails
            with pytest.raises(BackendError, match="the same one may work again"):
                async for _ in pieces:
                    pass
        assert [c async for _, c in backend.completions([Ask(SALT, Sampling())])]

    run(work)


def test_closing_ends_what_runs_with_not_ready(run):
    async def work(backend):
        pieces = backend.pieces(Ask(FREE, Sampling(), n=30))
        await anext(pieces)
        await backend.close()
        with pytest.raises(NotReady):
            async for _ in pieces:
                pass
        assert not backend.is_ready()
        with pytest.raises(NotReady):
            await anext(backend.pieces(Ask(FREE, Sampling())))

    run(work)


def test_nothing_is_taken_before_the_start(shipped):
    engine = ContinuousEngine(shipped.engine.model, shipped.engine.tokenizer, slots=2)
    backend = LocalBackend(engine, model_name="m")
    assert not backend.is_ready()
    with pytest.raises(NotReady):
        asyncio.run(anext(backend.pieces(Ask(FREE, Sampling()))))
    engine.close()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_text_grows_by_whole_characters_with_a_base_models_tokenizer(base_folder, family):
    """Characters of two, three and four bytes are several tokens each in these tokenizers."""
    from crystallm_kit.tokens.tokenizer import load_tokenizer, prompt_ids

    tokenizer = load_tokenizer(base_folder(family))
    text = "3.99 Å, 60°: 水 and 🧪!\nNa 0.5"
    prompt = prompt_ids(tokenizer, "The formula is NaCl.\n")
    ids = prompt_ids(tokenizer, "The formula is NaCl.\n" + text)[len(prompt) :]
    decoder = _PrefixDecoder(tokenizer, prompt)
    grown = [decoder.add(id) for id in ids]
    assert "".join(grown) == text
    assert not any("\ufffd" in part for part in grown)
    assert grown.count("") > 5


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_base_models_stream_is_its_whole_text(base_folder, family):
    import torch
    from transformers import AutoModelForCausalLM

    from crystallm_kit.tokens.tokenizer import load_tokenizer

    model = AutoModelForCausalLM.from_pretrained(base_folder(family))
    tokenizer = load_tokenizer(base_folder(family))

    async def work():
        with torch.random.fork_rng(devices=[]):
            backend = LocalBackend(ContinuousEngine(model, tokenizer, slots=4), model_name="base")
        await backend.start()
        try:
            ask = Ask(Prompt("The formula is NaCl."), Sampling(seed=1, max_new_tokens=40), n=4)
            texts, wholes = [""] * 4, {}
            async for piece in backend.pieces(ask):
                texts[piece.index] += piece.text
                if piece.completion:
                    wholes[piece.index] = piece.completion.text
            assert texts == [wholes[i] for i in range(4)]
            assert all(wholes.values())
        finally:
            await backend.close()

    asyncio.run(work())


def test_only_what_may_be_the_beginning_of_a_stop_text_is_held_back():
    assert _n_held("abc", ("cde", "xyz")) == 1
    assert _n_held("abcd", ("cde",)) == 2
    assert _n_held("abc", ("d", "ab")) == 0
    assert _n_held("", ("ab",)) == 0
    assert _first_stop("abcabc", 0, ("ca", "bc")) == 1
    assert _first_stop("abcabc", 4, ("bc",)) == 4
    assert _first_stop("abc", 0, ()) is None
