import asyncio
import contextlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import anyio
import httpx
import pytest

from crystallm_kit.engines.engine import Prompt, Sampling
from crystallm_kit.errors import UnknownName, UserError
from crystallm_kit.records import Conditions
from crystallm_kit.server.backend import Ask, BackendError, NotReady
from crystallm_kit.server.upstream import UpstreamBackend
from crystallm_kit.server.vllm_jobs import free_ports
from crystallm_kit.server.vllm_wire import Wire, calls
from crystallm_kit.tokens.requests import compile_request, request_from_json
from crystallm_kit.tokens.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]
STAND_IN = Path(__file__).with_name("vllm_stand_in.py")
DIES, NEVER, FAILS, SLOW, REFUSES, DIES_MIDWAY = 101, 102, 103, 104, 105, 106


class StandIns:
    """Servers that were started, by url."""

    def __init__(self):
        self.processes = {}

    def start(self, *arguments, port=None):
        port = port or free_ports(1)[0]
        url = f"http://127.0.0.1:{port}"
        command = [sys.executable, str(STAND_IN), "--port", str(port), *arguments]
        self.processes[url] = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self.processes[url].stdout.readline()
        return url

    def kill(self, url):
        self.processes[url].kill()
        self.processes[url].wait()
        self.processes[url].stdout.close()


@pytest.fixture
def stand_ins():
    made = StandIns()
    yield made
    for url in made.processes:
        made.kill(url)


@pytest.fixture(scope="module")
def wire():
    return Wire(load_tokenizer(ROOT / "tokenizers" / "wyckoff"), max_positions=256)


@contextlib.asynccontextmanager
async def open_backend(urls, wire, **settings):
    backend = UpstreamBackend(urls, wire, **({"model_name": "toy", "check_seconds": 0.2} | settings))
    await backend.start()
    try:
        yield backend
    finally:
        await backend.close()


def told(code, **settings):
    """Return an ask whose second token tells the stand-in what to do."""
    return Ask(Prompt(""), Sampling(seed=1), prompt_ids=(370, code), **settings)


async def seen(url):
    async with httpx.AsyncClient(trust_env=False) as client:
        return (await client.get(f"{url}/seen")).json()


async def all_of(backend, asks):
    return [pair async for pair in backend.completions(asks)]


async def until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not (found := condition() if not asyncio.iscoroutinefunction(condition) else await condition()):
        assert time.monotonic() < deadline, "it did not come to that in time"
        await asyncio.sleep(0.02)
    return found


CRYSTAL = "crystal\n"


def test_every_ask_gets_all_its_completions(stand_ins, wire):
    async def story():
        urls = [stand_ins.start(), stand_ins.start()]
        async with open_backend(urls, wire, per_call=8) as backend:
            await until(lambda: all(s.is_healthy for s in backend.servers))
            asks = [
                Ask(Prompt(CRYSTAL), Sampling(seed=s), n=n, first_index=3) for s, n in enumerate((1, 20, 5))
            ]
            found = await all_of(backend, asks)
            assert sorted((position, c.index) for position, c in found) == [
                (position, 3 + i) for position, ask in enumerate(asks) for i in range(ask.n)
            ]
            assert backend.n_running() == 0
            per_server = [len((await seen(url))["requests"]) for url in urls]
            assert min(per_server) >= 2

    asyncio.run(story())


def test_a_draw_depends_on_seed_and_position_alone(stand_ins, wire):
    async def story():
        async with open_backend([stand_ins.start(), stand_ins.start()], wire) as backend:

            async def drawn(per_call, ask):
                backend.per_call = per_call
                return {c.index: c.token_ids for _, c in await all_of(backend, [ask])}

            ask = Ask(Prompt(CRYSTAL), Sampling(seed=5), n=12)
            whole = await drawn(64, ask)
            assert await drawn(8, ask) == whole
            part = Ask(Prompt(CRYSTAL), Sampling(seed=5), n=4, first_index=6)
            assert await drawn(64, part) == {i: whole[i] for i in range(6, 10)}
            assert await drawn(64, Ask(Prompt(CRYSTAL), Sampling(seed=6), n=12)) != whole

    asyncio.run(story())


def test_what_is_passed_on_draws_as_what_is_asked(stand_ins, wire):
    async def story():
        async with open_backend([stand_ins.start()], wire) as backend:
            asked = [c.token_ids async for _, c in backend.completions([told(0, n=3)])]
            body = {"prompt": [370, 0], "n": 3, "seed": 1, "max_tokens": 50}
            _, _, data = await backend.relay("/v1/completions", json.dumps(body).encode())
            passed = json.loads(b"".join([chunk async for chunk in data]))
            assert [tuple(choice["token_ids"]) for choice in passed["choices"]] == asked

    asyncio.run(story())


def test_without_a_seed_the_server_gets_none(stand_ins, wire):
    async def story():
        url = stand_ins.start()
        async with open_backend([url], wire) as backend:
            await all_of(backend, [Ask(Prompt(CRYSTAL), Sampling(seed=5), n=3, is_seeded=False)])
        request = (await seen(url))["requests"][0]
        assert "seed" not in request["sampling_params"]
        assert request["sampling_params"]["detokenize"] is False

    asyncio.run(story())


def test_equal_neighbours_are_asked_together():
    ask = Ask(Prompt("a"), Sampling(seed=1))
    from dataclasses import replace

    asks = [replace(ask, first_index=i) for i in range(5)] + [replace(ask, prompt=Prompt("b"), first_index=5)]
    asks += [replace(ask, first_index=9, n=2)]
    found = list(calls(asks, most=3))
    assert [(a.prompt.text, a.first_index, a.n) for a, _ in found] == [
        ("a", 0, 3), ("a", 3, 2), ("b", 5, 1), ("a", 9, 2),
    ]  # fmt: skip
    assert [positions for _, positions in found] == [[0, 1, 2], [3, 4], [5], [6, 6]]


@pytest.mark.parametrize("arguments", [(), ("--no-tokens-route",)])
def test_pieces_join_to_the_completion(stand_ins, wire, arguments):
    async def story():
        url = stand_ins.start(*arguments)
        async with open_backend([url], wire) as backend:
            ask = Ask(Prompt(CRYSTAL), Sampling(seed=3), n=3, n_top=2)
            pieces = [piece async for piece in backend.pieces(ask)]
            whole = {c.index: c for _, c in await all_of(backend, [ask])}
            for index in range(3):
                mine = [p for p in pieces if p.index == index]
                assert [p.completion is not None for p in mine] == [False] * (len(mine) - 1) + [True]
                assert "".join(p.text for p in mine) == mine[-1].completion.text
                assert mine[-1].completion == whole[index]
                assert mine[-1].completion.log_probability == pytest.approx(-1.1)
                tokens = [t for p in mine for t in p.tokens]
                assert [t.id for t in tokens] == list(whole[index].token_ids)
                assert len(tokens[0].top) == 2
            assert {r["path"] for r in (await seen(url))["requests"]} == {
                "/v1/completions" if arguments else "/inference/v1/generate"
            }

    asyncio.run(story())


def test_a_text_ends_before_the_end_token_and_before_a_stop_text(stand_ins, wire):
    async def story():
        async with open_backend([stand_ins.start()], wire) as backend:
            (free,) = [c async for _, c in backend.completions([Ask(Prompt(CRYSTAL), Sampling(seed=3))])]
            assert free.token_ids[-1] == wire.end_id
            assert free.text == "".join(wire.cut.token_text(i) for i in free.token_ids[:-1])
            stop = wire.cut.token_text(free.token_ids[4])
            ask = Ask(Prompt(CRYSTAL), Sampling(seed=3), stop=("nowhere", stop))
            cut = [p async for p in backend.pieces(ask)]
            assert "".join(p.text for p in cut) == free.text[: free.text.index(stop)]
            assert cut[-1].completion.stop_reason == "stop"
            short = Ask(Prompt(CRYSTAL), Sampling(seed=3, max_new_tokens=4))
            assert [c.stop_reason async for _, c in backend.completions([short])] == ["length"]

    asyncio.run(story())


def test_a_constraint_travels_with_its_request(stand_ins, wire):
    async def story():
        url = stand_ins.start()
        request = compile_request(Conditions(formula={"Na": 1, "Cl": 1}))
        prompt = Prompt(CRYSTAL, "Na1 Cl1 ", request)
        async with open_backend([url], wire) as backend:
            sampling = Sampling(seed=3, number_temperature=0.5)
            (found,) = [c async for _, c in backend.completions([Ask(prompt, sampling)])]
        assert found.text.startswith("Na1 Cl1 ")
        extra = (await seen(url))["requests"][0]["sampling_params"]["extra_args"]
        assert request_from_json(extra["crystal"]) == request
        assert extra["crystal_number_temperature"] == 0.5

    asyncio.run(story())


def test_the_temperature_is_put_back_into_log_probabilities(stand_ins, wire):
    """The stand-in gives -0.1 for each token, as vLLM gives log p / temperature."""

    async def story():
        async with open_backend([stand_ins.start()], wire) as backend:
            ask = Ask(Prompt(CRYSTAL), Sampling(seed=3, temperature=2.0), n_top=0)
            (found,) = [c async for _, c in backend.completions([ask])]
            assert found.log_probability == pytest.approx(-0.1 * 2.0 * 11)
            silent = Ask(Prompt(CRYSTAL), Sampling(seed=3))
            (found,) = [c async for _, c in backend.completions([silent])]
            assert math.isnan(found.log_probability)

    asyncio.run(story())


def test_greedy_completions_are_drawn_once(stand_ins, wire):
    async def story():
        url = stand_ins.start()
        async with open_backend([url], wire) as backend:
            ask = Ask(Prompt(CRYSTAL), Sampling(temperature=0), n=3)
            found = await all_of(backend, [ask])
            assert [c.index for _, c in found] == [0, 1, 2]
            assert len({c.token_ids for _, c in found}) == 1
            pieces = [p async for p in backend.pieces(ask) if p.completion]
            assert [p.completion.index for p in pieces] == [0, 1, 2]

    asyncio.run(story())


@pytest.mark.parametrize("code", [DIES, FAILS])
def test_a_server_that_fails_in_the_middle_is_left_out_until_it_is_back(stand_ins, wire, code):
    async def story():
        bad, good = stand_ins.start(), stand_ins.start()
        async with open_backend([bad, good], wire) as backend:
            await until(lambda: all(s.is_healthy for s in backend.servers))
            with pytest.raises(BackendError):
                await all_of(backend, [told(code)])
            failed = [s for s in backend.servers if not s.is_healthy]
            assert len(failed) == 1
            for _ in range(3):
                await all_of(backend, [told(0)])
            if code == DIES:
                stand_ins.kill(failed[0].url)
                stand_ins.start(port=int(failed[0].url.rpartition(":")[2]))
            await until(lambda: all(s.is_healthy for s in backend.servers))

    asyncio.run(story())


@pytest.mark.parametrize("how", ["completions", "pieces", "relay"])
def test_a_connection_that_our_pool_closed_under_a_request_is_no_failure(stand_ins, wire, monkeypatch, how):
    send, closed = httpx.AsyncHTTPTransport.handle_async_request, []

    async def closes_the_first(transport, request):
        if request.method == "POST" and b"370" in request.content and not closed:
            closed.append(request)
            try:
                raise anyio.ClosedResourceError
            except anyio.ClosedResourceError as error:
                raise httpx.ReadError("") from error
        return await send(transport, request)

    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", closes_the_first)

    async def story():
        async with open_backend([stand_ins.start()], wire) as backend:
            if how == "completions":
                assert len(await all_of(backend, [told(0)])) == 1
            elif how == "pieces":
                assert [p async for p in backend.pieces(told(0))][-1].completion is not None
            else:
                status, _, data = await backend.relay(
                    "/v1/completions", b'{"prompt": [370], "max_tokens": 5}'
                )
                assert (status, await anext(aiter(data)) != b"") == (200, True)
                await data.aclose()
            assert closed
            assert backend.servers[0].is_healthy

    asyncio.run(story())


def test_a_request_under_way_when_all_is_closed_fails_as_requests_do(stand_ins, wire):
    async def story():
        async with open_backend([stand_ins.start()], wire) as backend:
            asked = asyncio.create_task(all_of(backend, [told(NEVER)]))
            await until(lambda: backend.n_running() == 1)
            await asyncio.sleep(0.2)
            await backend.close()
            with pytest.raises(BackendError):
                await asked

    asyncio.run(story())


def test_a_server_that_answers_500_to_what_is_passed_on_is_left_out_until_it_is_back(stand_ins, wire):
    async def story():
        async with open_backend([stand_ins.start()], wire, check_seconds=60.0) as backend:
            body = b'{"prompt": [370, 103], "max_tokens": 5}'
            status, _, data = await backend.relay("/v1/completions", body)
            await data.aclose()
            assert status == 500
            with pytest.raises(NotReady, match="answered 500"):
                await backend.relay("/v1/completions", body)
            await until(backend.is_ready)

    asyncio.run(story())


def test_a_server_that_dies_within_a_stream_gives_a_backend_error(stand_ins, wire):
    async def story():
        async with open_backend([stand_ins.start()], wire) as backend:
            pieces = backend.pieces(told(DIES_MIDWAY))
            assert (await anext(pieces)).index == 0
            with pytest.raises(BackendError, match="in the middle"):
                [piece async for piece in pieces]
            assert backend.n_running() == 0
            with pytest.raises(NotReady):
                await all_of(backend, [told(0)])

    asyncio.run(story())


def test_a_request_that_no_one_took_goes_to_another_server(stand_ins, wire):
    async def story():
        gone, good = stand_ins.start(), stand_ins.start()
        async with open_backend([gone, good], wire, check_seconds=60.0) as backend:
            await until(lambda: all(s.is_healthy for s in backend.servers))
            stand_ins.kill(gone)
            asks = [Ask(Prompt(CRYSTAL), Sampling(seed=i), n=2) for i in range(6)]
            assert len(await all_of(backend, asks)) == 12
            status, _, data = await backend.relay("/v1/completions", b'{"prompt": [370], "max_tokens": 5}')
            assert status == 200
            assert json.loads(b"".join([chunk async for chunk in data]))["model"] == "toy"

    asyncio.run(story())


def test_without_a_healthy_server_nothing_is_ready(stand_ins, wire):
    async def story():
        url = stand_ins.start()
        async with open_backend([url], wire) as backend:
            stand_ins.kill(url)
            await until(lambda: not backend.is_ready())
            with pytest.raises(NotReady, match="no engine is ready"):
                await all_of(backend, [told(0)])
        nowhere = [f"http://127.0.0.1:{free_ports(1)[0]}"]
        with pytest.raises(NotReady, match="no upstream server answers"):
            await UpstreamBackend(nowhere, wire, model_name="toy", start_seconds=0.3).start()

    asyncio.run(story())


def test_a_server_that_only_says_that_it_is_well_is_not(stand_ins, wire, monkeypatch):
    monkeypatch.setenv("STAND_IN_START", "barren")
    url = stand_ins.start()

    async def story():
        with pytest.raises(NotReady, match="asked for one token, it answered 500"):
            await UpstreamBackend([url], wire, model_name="toy", start_seconds=5.0, check_seconds=0.2).start()

    asyncio.run(story())


def test_a_front_that_does_not_wait_is_ready_once_a_server_is(stand_ins, wire):
    async def story():
        port = free_ports(1)[0]
        async with open_backend([f"http://127.0.0.1:{port}"], wire, start_seconds=None) as backend:
            assert not backend.is_ready()
            stand_ins.start(port=port)
            await until(backend.is_ready)

    asyncio.run(story())


@pytest.mark.parametrize("how", ["completions", "pieces", "relay"])
def test_who_goes_away_frees_the_work(stand_ins, wire, how):
    async def story():
        url = stand_ins.start()
        async with open_backend([url], wire) as backend:
            if how == "completions":
                task = asyncio.create_task(all_of(backend, [told(NEVER, n=100)]))
                await until(lambda: backend.n_running() == 100)
                await asyncio.sleep(0.1)
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
                n_requests = 2
            elif how == "pieces":
                pieces = backend.pieces(told(SLOW))
                await anext(pieces)
                await pieces.aclose()
                n_requests = 1
            else:
                body = {"prompt": [370, SLOW], "max_tokens": 50, "stream": True}
                _, _, data = await backend.relay("/v1/completions", json.dumps(body).encode())
                await data.aclose()
                n_requests = 1
            assert backend.n_running() == 0

            async def given_up():
                return (await seen(url))["aborted"] == n_requests

            await until(given_up)

    asyncio.run(story())


def test_what_an_ask_does_wrong_is_the_users_error(stand_ins, wire):
    async def story():
        async with open_backend([stand_ins.start()], wire, adapters=["bulk"]) as backend:
            for wrong, match in (
                (Ask(Prompt(""), Sampling()), "empty prompt"),
                (Ask(Prompt(""), Sampling(), prompt_ids=(5,) * 256), "positions"),
                (Ask(Prompt(""), Sampling(), prompt_ids=(99_999,)), "beyond"),
                (Ask(Prompt("no such text"), Sampling()), "no token for"),
                (told(REFUSES), "no such thing"),
            ):
                with pytest.raises(UserError, match=match):
                    await all_of(backend, [wrong])
            with pytest.raises(UnknownName, match="adapter 'bluk'"):
                await anext(backend.pieces(Ask(Prompt(CRYSTAL, adapter="bluk"), Sampling())))
            assert backend.is_ready()

    asyncio.run(story())


def test_adapters_and_the_model_go_to_who_has_them(stand_ins, wire):
    """An adapter that vLLM cannot put on the model has a server of its own, under its name."""

    async def story():
        base = stand_ins.start("--served-model-name", "toy", "--lora-modules", "plain=x")
        own = stand_ins.start("--served-model-name", "merged")
        async with open_backend([base, own], wire, adapters=["plain", "merged"]) as backend:
            await until(lambda: all(s.is_healthy for s in backend.servers))
            asks = [Ask(Prompt(CRYSTAL, adapter=a), Sampling()) for a in ("", "plain", "merged", "", "")]
            assert len(await all_of(backend, asks)) == 5
            assert sorted(r["model"] for r in (await seen(base))["requests"]) == [
                "plain",
                "toy",
                "toy",
                "toy",
            ]
            assert [r["model"] for r in (await seen(own))["requests"]] == ["merged"]

    asyncio.run(story())


def test_a_server_without_our_constraint_is_not_taken_for_one_with(stand_ins, wire):
    """vLLM passes over arguments that nobody asks for, so the samples would be unconstrained."""

    async def story():
        for arguments, takes in (((), True), (("--without-constraint",), False)):
            async with open_backend([stand_ins.start(*arguments)], wire) as backend:
                assert backend.takes_requests is takes
            async with open_backend([stand_ins.start(*arguments)], wire, takes_requests=False) as backend:
                assert backend.takes_requests is False

    asyncio.run(story())


def test_adapters_that_are_not_named_are_those_that_the_servers_list(stand_ins, wire):
    async def story():
        urls = [
            stand_ins.start("--lora-modules", "one=x", "two=x"),
            stand_ins.start("--lora-modules", "one=x"),
        ]
        async with open_backend(urls, wire, adapters=None) as backend:
            await until(lambda: all(s.is_healthy for s in backend.servers))
            assert backend.adapters == ("one", "two")

    asyncio.run(story())


def test_a_server_that_calls_its_model_otherwise_is_asked_by_its_own_name(stand_ins, wire):
    async def story():
        url = stand_ins.start("--served-model-name", "org/some-model")
        async with open_backend([url + "/v1/"], wire) as backend:
            await all_of(backend, [Ask(Prompt(CRYSTAL), Sampling())])
            await backend.relay("/v1/completions", b'{"model": "toy", "prompt": [370], "max_tokens": 3}')
        assert [r["model"] for r in (await seen(url))["requests"]] == ["org/some-model"] * 2

    asyncio.run(story())


def test_the_key_is_sent(stand_ins, wire, monkeypatch):
    async def story():
        monkeypatch.setitem(os.environ, "VLLM_API_KEY", "right")
        url = stand_ins.start()
        async with open_backend([url], wire, api_key="right") as backend:
            assert len(await all_of(backend, [told(0)])) == 1
        with pytest.raises(NotReady, match="401"):
            await UpstreamBackend([url], wire, model_name="toy", api_key="wrong", start_seconds=1.0).start()

    asyncio.run(story())


def test_the_front_takes_a_hundred_whole_answers_of_64_in_two_seconds(stand_ins, wire):
    """Measured on one core shared with the stand-in: 300 to 500 a second."""

    async def story():
        async with open_backend([stand_ins.start()], wire) as backend:
            asks = [Ask(Prompt(CRYSTAL), Sampling(seed=i), n=64) for i in range(100)]
            began = time.process_time()
            assert len(await all_of(backend, asks)) == 6_400
            assert time.process_time() - began < 2.0

    asyncio.run(story())
