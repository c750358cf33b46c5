"""Two hundred clients at once of `crystallm-kit serve` on the CPU: a process of its own, real sockets.

Each request asks for a composition that no other request under way has, so that an answer which is somebody
else's shows. Every request ends in its own whole answer, or in 429 or 503 with the time to come back. Some
clients hang up, some hardly read. At the end the process is told to stop in the middle of all this.
"""

import asyncio
import collections
import contextlib
import itertools
import json
import math
import random
import re
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from crystallm_kit.server.app import create_app

CATIONS = "Li Na K Rb Cs Mg Ca Sr Ba Sc Y La Ti Zr Hf V Nb Ta Cr Mn Fe Co Ni Cu Zn Al Ga In".split()
ANIONS = "O S Se Te F Cl Br I N P As".split()


def compositions() -> Iterator[dict[str, int]]:
    """Yield compositions without end; any 900 in a row are different."""
    counts = [(1, 1), (1, 2), (2, 1)]
    every = [{a: n, b: m} for n, m in counts for a, b in itertools.product(CATIONS, ANIONS)]
    random.Random(1).shuffle(every)
    return itertools.cycle(every)


def reduced(composition: dict[str, int]) -> dict[str, int]:
    divisor = math.gcd(*composition.values())
    return {element: n // divisor for element, n in composition.items()}


def written(text: str) -> dict[str, int]:
    """Return the composition that a formula, or the first line of a crystal's text, begins with."""
    pairs = re.findall(r"([A-Z][a-z]?)(\d*)", text.partition("\n")[0])
    return reduced({element: int(n or 1) for element, n in pairs})


@dataclass
class Books:
    """What the clients saw.

    Attributes:
        ended: How often requests ended in which way: a status, "hung up", "server gone".
        wrong: What must not be: in words.
        ids: Of all answers.
        told_to_stop: When the server was told to, if it was.
    """

    ended: collections.Counter = field(default_factory=collections.Counter)
    wrong: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    kinds: collections.Counter = field(default_factory=collections.Counter)
    samples: int = 0
    told_to_stop: float = math.inf

    def check(self, is_right: bool, *words: Any) -> None:
        if not is_right:
            self.wrong.append(" ".join(map(str, words))[:500])


class Storm:
    """Clients that ask without pause until they are told to stop."""

    def __init__(self, url: str, *, seed: int = 0) -> None:
        self.url = url
        self.books = Books()
        self.goes_on = True
        self._compositions = compositions()
        self._rng = random.Random(seed)

    async def client(self) -> None:
        kinds = [
            self.completion,
            self.stream,
            self.chat,
            self.chat_stream,
            self.crystals,
            self.crystal_stream,
        ]
        # no certificates: to read them takes each client longer than many requests
        async with httpx.AsyncClient(base_url=self.url, timeout=120, trust_env=False, verify=False) as http:
            while self.goes_on:
                wanted = next(self._compositions)
                kind = self._rng.choices(kinds, weights=[4, 4, 1, 1, 2, 2])[0]
                hangs_up = self._rng.random() < 0.1
                began = time.monotonic()
                try:
                    if hangs_up:
                        await self.leaver(http, wanted)
                    else:
                        self.books.kinds[kind.__name__] += 1
                        await kind(http, wanted)
                except httpx.HTTPError as error:
                    self.books.ended["server gone"] += 1
                    self.books.check(
                        began > self.books.told_to_stop,
                        f"{kind.__name__} of {wanted} was lost: {type(error).__name__} {error}",
                    )
                    await asyncio.sleep(0.05)
                except (AssertionError, KeyError, ValueError, TypeError, IndexError) as error:
                    self.books.check(False, f"{kind.__name__} of {wanted}: {type(error).__name__} {error}")

    async def refused(self, answer: httpx.Response) -> bool:
        """Count an answer; tell whether it is a refusal, which must be a clear one."""
        self.books.ended[answer.status_code] += 1
        if answer.status_code == 200:
            return False
        await answer.aread()
        error = answer.json()["error"]
        self.books.check(answer.status_code in (429, 503), "status", answer.status_code, error)
        if answer.status_code == 503:
            self.books.check(self.books.told_to_stop < math.inf, "503 without reason", error)
        seconds = int(answer.headers["retry-after"])
        self.books.check(1 <= seconds <= 120, "retry after", seconds)
        await asyncio.sleep(self._rng.uniform(0.2, 1.0))  # less patient than asked for
        return True

    def own(self, wanted: dict[str, int], texts: list[str], n: int) -> None:
        """Check that the texts of an answer are those n that were asked for."""
        self.books.samples += len(texts)
        self.books.check(len(texts) == n, f"{len(texts)} of {n} completions for {wanted}")
        for text in texts:
            self.books.check(written(text) == reduced(wanted), f"asked for {wanted}, got {text[:40]!r}")

    def named(self, id: str) -> None:
        self.books.ids.append(id)

    # What is asked

    async def completion(self, http: httpx.AsyncClient, wanted: dict[str, int]) -> None:
        n = self._rng.choice([1, 1, 2])
        answer = await http.post("/v1/completions", json={"conditions": {"formula": wanted}, "n": n})
        if await self.refused(answer):
            return
        data = answer.json()
        self.named(data["id"])
        assert [choice["index"] for choice in data["choices"]] == list(range(n))
        assert {choice["finish_reason"] for choice in data["choices"]} == {"stop"}
        self.own(wanted, [choice["text"] for choice in data["choices"]], n)

    async def stream(self, http: httpx.AsyncClient, wanted: dict[str, int]) -> None:
        n = self._rng.choice([1, 1, 2])
        body = {"conditions": {"formula": wanted}, "n": n, "stream": True}
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            if await self.refused(answer):
                return
            lines = [line async for line in answer.aiter_lines() if line]
        assert lines[-1] == "data: [DONE]", lines[-1][:300]
        chunks = [json.loads(line[6:]) for line in lines[:-1]]
        assert len({chunk["id"] for chunk in chunks}) == 1
        self.named(chunks[0]["id"])
        texts, ends = collections.defaultdict(str), []
        for choice in itertools.chain.from_iterable(chunk["choices"] for chunk in chunks):
            texts[choice["index"]] += choice["text"]
            assert choice["index"] not in ends, "text after the end"
            ends += [choice["index"]] if choice["finish_reason"] else []
        assert sorted(ends) == list(range(n))
        self.own(wanted, list(texts.values()), n)

    def words(self, wanted: dict[str, int]) -> dict[str, Any]:
        formula = "".join(f"{element}{n if n > 1 else ''}" for element, n in wanted.items())
        return {"messages": [{"role": "user", "content": f"one crystal of {formula}"}], "max_samples": 4}

    def message(self, wanted: dict[str, int], content: str, crystals: list[Any], reason: str) -> None:
        assert (reason == "stop") == (len(crystals) == 1) == ("```cif" in content), content[:300]
        self.books.check(content.startswith("Asked for: "), content[:100])
        self.books.check(
            written(content.removeprefix("Asked for: ")) == reduced(wanted), wanted, content[:60]
        )
        self.own(wanted, [crystal["formula"] for crystal in crystals], len(crystals))

    async def chat(self, http: httpx.AsyncClient, wanted: dict[str, int]) -> None:
        answer = await http.post("/v1/chat/completions", json=self.words(wanted))
        if await self.refused(answer):
            return
        data = answer.json()
        self.named(data["id"])
        (choice,) = data["choices"]
        said = choice["message"]
        self.message(wanted, said["content"], said["crystals"], choice["finish_reason"])

    async def chat_stream(self, http: httpx.AsyncClient, wanted: dict[str, int]) -> None:
        body = {**self.words(wanted), "stream": True}
        async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            if await self.refused(answer):
                return
            lines = [line async for line in answer.aiter_lines() if line]
        assert lines[-1] == "data: [DONE]", lines[-1][:300]
        choices = [json.loads(line[6:])["choices"][0] for line in lines[:-1]]
        self.named(json.loads(lines[0][6:])["id"])
        content = "".join(choice["delta"].get("content") or "" for choice in choices)
        last = choices[-1]
        self.message(wanted, content, last["delta"]["crystals"], last["finish_reason"])

    def found(self, wanted: dict[str, int], answer: dict[str, Any], crystals: list[Any]) -> None:
        self.named(answer["id"])
        self.books.check(reduced(answer["conditions"]["formula"]) == reduced(wanted), wanted, answer)
        assert len({crystal["index"] for crystal in crystals}) == len(crystals) <= 2
        self.own(wanted, [crystal["formula"] for crystal in crystals], len(crystals))
        self.own(wanted, [crystal["text"] for crystal in crystals], len(crystals))

    async def crystals(self, http: httpx.AsyncClient, wanted: dict[str, int]) -> None:
        body = {"conditions": {"formula": wanted}, "n": 2, "max_samples": 5, "redraws": 1}
        answer = await http.post("/v1/crystals", json=body)
        if await self.refused(answer):
            return
        data = answer.json()
        assert (len(data["crystals"]) == 2) == (data["finish_reason"] == "n")
        self.found(wanted, data, data["crystals"])

    async def crystal_stream(self, http: httpx.AsyncClient, wanted: dict[str, int]) -> None:
        body = {"conditions": {"formula": wanted}, "n": 2, "max_samples": 5, "redraws": 1, "stream": True}
        async with http.stream("POST", "/v1/crystals", json=body) as answer:
            if await self.refused(answer):
                return
            events = (await answer.aread()).decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""], events[-2:]
        named = [event.partition("\ndata: ") for event in events[:-2]]
        heads = [json.loads(data) for name, _, data in named if name == "event: request"]
        ends = [json.loads(data) for name, _, data in named if name == "event: funnel"]
        found = [json.loads(data) for name, _, data in named if name == "event: crystal"]
        assert len(heads) == len(ends) == 1
        assert (len(found) == 2) == (ends[0]["finish_reason"] == "n")
        self.found(wanted, heads[0], found)

    async def leaver(self, http: httpx.AsyncClient, wanted: dict[str, int]) -> None:
        """Ask for much, and hang up in the middle."""
        conditions = {"formula": wanted}
        path, body = self._rng.choice(
            [
                ("/v1/completions", {"conditions": conditions, "n": 20}),
                ("/v1/completions", {"conditions": conditions, "n": 20, "stream": True}),
                ("/v1/crystals", {"conditions": conditions, "n": 30, "stream": True}),
                ("/v1/chat/completions", {**self.words(wanted), "max_samples": None, "n": 9}),
            ]
        )
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._rng.uniform(0.05, 1.5)):
                async with http.stream("POST", path, json=body) as answer:
                    if await self.refused(answer):
                        return
                    self.books.ended[200] -= 1
                    async for _ in answer.aiter_bytes():
                        break
        self.books.ended["hung up"] += 1


@contextlib.contextmanager
def slow_reader(url: str) -> Iterator[None]:
    """Ask for a long stream on a connection with next to no room, and read none of it."""
    body = json.dumps({"prompt": "crystal\n", "n": 10, "stream": True, "logprobs": 5}).encode()
    host, port = url.removeprefix("http://").split(":")
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect((host, int(port)))
        head = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json"]
        head += [f"Content-Length: {len(body)}", "", ""]
        connection.sendall("\r\n".join(head).encode() + body)
        yield


def numbers(url: str) -> dict[str, float]:
    """Return the samples of /metrics."""
    lines = httpx.get(f"{url}/metrics", timeout=10, trust_env=False).text.splitlines()
    return {name: float(n) for name, _, n in (line.rpartition(" ") for line in lines if line[0] != "#")}


def idle(url: str, within: float) -> dict[str, float]:
    """Return the metrics once nothing is drawn, waits or is inside; fail if that takes too long."""
    until = time.monotonic() + within
    names = [f"crystallm_kit_completions_{what}" for what in ("running", "queued", "inside", "waiting")]
    while any((found := numbers(url))[name] for name in names):
        assert time.monotonic() < until, {name: found[name] for name in names}
        time.sleep(0.1)
    return found


def assert_all_answered(books: Books) -> None:
    """Assert that nothing was wrong, and no answer came twice."""
    assert not books.wrong, books.wrong[:10]
    assert books.ended[200] == len(books.ids) == len(set(books.ids)) > 0


def storm(url: str, n_clients: int, seconds: float) -> Books:
    """Let clients ask for so long; assert that each got what is its own, and that no work is left behind."""
    clients = Storm(url)

    async def blow() -> None:
        tasks = [asyncio.create_task(clients.client()) for _ in range(n_clients)]
        await asyncio.sleep(seconds)
        clients.goes_on = False
        await asyncio.gather(*tasks)

    began = time.monotonic()
    with slow_reader(url), slow_reader(url):
        asyncio.run(blow())
    took = time.monotonic() - began
    books = clients.books
    print(f"{n_clients} clients, {took:.1f} s: {dict(books.ended)}; {books.samples} samples compared")
    assert_all_answered(books)
    assert set(books.ended) <= {200, 429, "hung up"}
    counted = idle(url, within=20)
    answered = sum(
        n
        for name, n in counted.items()
        if name.startswith("crystallm_kit_requests_total") and "/v1/" in name and 'status="200"' in name
    )
    # those who hung up, or read too slowly, may have been answered after all
    assert books.ended[200] <= answered <= books.ended[200] + books.ended["hung up"] + 2
    assert counted["crystallm_kit_requests_in_flight"] == 1, "this one, which asks"
    return books


def test_every_client_of_many_gets_its_own_answer_or_is_told_to_wait(make_state, serve_app):
    with serve_app(create_app(make_state(max_queue=32))) as server:
        assert storm(server.url, 50, 2).ended[429] > 0


@pytest.mark.slow
def test_every_client_of_two_hundred_is_answered_for_a_minute_and_none_is_lost_at_the_end(serve_command):
    with serve_command("--slots", "64", "--max-queue", "128", "--judges", "1") as server:
        assert storm(server.url, 200, 60).ended[429] > 0
        clients = Storm(server.url, seed=1)
        books = clients.books

        async def stopped() -> None:
            tasks = [asyncio.create_task(clients.client()) for _ in range(200)]
            while books.ended[200] < 20:
                assert not books.wrong, books.wrong
                await asyncio.sleep(0.05)
            books.told_to_stop = time.monotonic()
            server.tell(signal.SIGTERM)
            while server.process.poll() is None and time.monotonic() < books.told_to_stop + 60:
                await asyncio.sleep(0.05)
            clients.goes_on = False
            await asyncio.gather(*tasks)

        asyncio.run(stopped())
        print(f"stopped: {dict(books.ended)}")
        assert_all_answered(books)
        assert books.ended[503] > 0
        code, out, err = server.end()
        assert (code, err) == (0, "")
        assert re.search(r"stopping; \d+ requests may finish", out)
