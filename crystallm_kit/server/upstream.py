"""Several vLLM servers behind one Backend: balanced, watched, over HTTP.

    backend = UpstreamBackend(["http://127.0.0.1:8001"], Wire(tokenizer, max_positions=512), model_name="m")
    await backend.start()
    async for position, completion in backend.completions(asks): ...

A request goes to the server that has the fewest completions of ours to draw. One that fails is left out until
it makes a token again: what it was doing gets a BackendError, what it had not taken yet goes to another
server. A client that goes away closes the connection, and vLLM aborts what it was drawing.

A server that knows none of our names is asked by the name of its only model; adapters are asked for by name,
of those servers that list it.

Not here: what is said to the servers (vllm_wire.py), starting them (supervisor.py).
"""

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import anyio
import httpx

from crystallm_kit.errors import UnknownName, UserError
from crystallm_kit.records import Completion
from crystallm_kit.server.backend import Ask, BackendError, NotReady, Piece
from crystallm_kit.server.vllm_wire import (
    TEXT_ROUTE,
    TOKENS_ROUTE,
    Wire,
    calls,
    choices_of,
    is_greedy,
    message_of,
    seed_base,
)

_JSON = {"content-type": "application/json"}
# vLLM closes a connection that was idle for 5 s; a request sent at that moment would be lost
_KEEP_ALIVE_SECONDS = 3.0
_TRIES = 3  # of a request whose connection our own pool closes under it
_WORTH_A_REQUEST = 8  # completions; fewer are not spread over servers
_HOP_HEADERS = frozenset(
    ("connection", "keep-alive", "transfer-encoding", "content-length", "server", "date")
)


@dataclass
class Server:
    """One vLLM server and what is known of it.

    Attributes:
        url: Where it answers, without a final slash.
        is_healthy: Whether it answered when it was last asked.
        models: Names that it takes.
        root: Name of its model itself, without adapters; "" until it has said.
        adapters: Those of them that are adapters of its model.
        takes_tokens: Whether it has the route that takes and gives token ids.
        takes_requests: Whether it holds our constraint.
        n_running: Completions that we wait for.
        failure: Why it is left out.
    """

    url: str
    is_healthy: bool = False
    models: frozenset[str] = frozenset()
    root: str = ""
    adapters: tuple[str, ...] = ()
    takes_tokens: bool = False
    takes_requests: bool = False
    n_running: int = 0
    failure: str = "not asked yet"
    recheck: asyncio.Event = field(default_factory=asyncio.Event)


class UpstreamBackend:
    """Completions of vLLM servers. A server.backend.Backend.

    Args:
        urls: The servers; a final /v1 is understood.
        wire: How asks are said to them.
        model_name: Name under which the model is asked for here.
        adapters: Names of the adapters; None: those that the servers list.
        takes_requests: Whether the model's text can be constrained. It is, while every server that is well
            has our constraint; each is asked, as one without would pass over it and draw freely.
        name: "vllm" for servers that this process keeps, "upstream" for those of others.
        api_key: Sent to the servers as a bearer token.
        per_call: Completions asked for in one HTTP request.
        check_seconds: How often each server is asked whether it is well.
        answer_seconds: How long a server may take for its next byte.
        start_seconds: How long `start` waits for the first server; None: not at all, and nothing is ready
            until one answers.
        n_connections: To all servers together.
    """

    def __init__(
        self,
        urls: Sequence[str],
        wire: Wire,
        *,
        model_name: str,
        adapters: Sequence[str] | None = (),
        takes_requests: bool = True,
        name: str = "upstream",
        api_key: str | None = None,
        per_call: int = 64,
        check_seconds: float = 2.0,
        answer_seconds: float = 600.0,
        start_seconds: float | None = 30.0,
        n_connections: int = 1024,
    ) -> None:
        if not urls:
            raise UserError("no upstream server is named; expected one address or more")
        self.name = name
        self.model_name = model_name
        self._adapters = None if adapters is None else tuple(adapters)
        self._may_take_requests = takes_requests
        self.wire = wire
        self.per_call = per_call
        self.servers = [Server(_address(url)) for url in urls]
        self._check_seconds = check_seconds
        self._start_seconds = start_seconds
        self._limits = httpx.Limits(
            max_connections=n_connections,
            max_keepalive_connections=n_connections,
            keepalive_expiry=_KEEP_ALIVE_SECONDS,
        )
        self._timeout = httpx.Timeout(answer_seconds, connect=10.0, pool=None)
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._client: httpx.AsyncClient | None = None
        self._watchers: list[asyncio.Task[None]] = []

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that can be asked for."""
        if self._adapters is not None:
            return self._adapters
        return tuple(dict.fromkeys(name for server in self.servers for name in server.adapters))

    @property
    def takes_requests(self) -> bool:
        """Whether constraints are obeyed while tokens are drawn."""
        return self._may_take_requests and all(s.takes_requests for s in self.servers if s.is_healthy)

    @property
    def max_positions(self) -> int:
        """Tokens that prompt and completion may have together."""
        return self.wire.max_positions

    # Life

    async def start(self) -> None:
        """Wait until a server is well, and watch them all from then on. Started twice is started once.

        Raises:
            NotReady: If none is in time.
        """
        if self._watchers:
            return
        self._client = httpx.AsyncClient(
            limits=self._limits, timeout=self._timeout, headers=self._headers, trust_env=False
        )
        self._watchers = [asyncio.create_task(self._watch(server)) for server in self.servers]
        if self._start_seconds is None:
            return
        deadline = asyncio.get_running_loop().time() + self._start_seconds
        while not self.is_ready():
            if asyncio.get_running_loop().time() > deadline:
                said = self._failures()
                await self.close()
                raise NotReady(f"no upstream server answers: {said}")
            await asyncio.sleep(0.05)

    async def close(self) -> None:
        """Stop watching and close every connection, and so all work."""
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        self._watchers = []
        if self._client is not None:
            await self._client.aclose()

    def is_ready(self) -> bool:
        """Tell whether a server is well."""
        return any(server.is_healthy for server in self.servers)

    def n_running(self) -> int:
        """Return how many completions the servers were asked for."""
        return sum(server.n_running for server in self.servers)

    def n_waiting(self) -> int:
        """Return 0: the servers keep the queues, and are not asked how long they are."""
        return 0

    # Work

    async def completions(self, asks: Sequence[Ask]) -> AsyncIterator[tuple[int, Completion]]:
        """Yield (position of the ask, completion) as they finish.

        Raises:
            UserError, NotReady, BackendError: What the first request to fail met; the others are given up.
        """
        for ask in asks:
            self._check(ask)
        answered: asyncio.Queue[list[tuple[int, Completion]] | BaseException] = asyncio.Queue()

        async def work(ask: Ask, positions: list[int]) -> None:
            try:
                answered.put_nowait(list(zip(positions, await self._whole(ask), strict=True)))
            except Exception as error:  # noqa: BLE001  # raised below, in the caller's task
                answered.put_nowait(error)

        n_servers = max(1, sum(server.is_healthy for server in self.servers))
        share = math.ceil(sum(ask.n for ask in asks) / n_servers)
        most = min(self.per_call, max(_WORTH_A_REQUEST, share))
        tasks = [asyncio.create_task(work(*call)) for call in calls(asks, most=most)]
        try:
            for _ in tasks:
                found = await answered.get()
                if isinstance(found, BaseException):
                    raise found
                for pair in found:
                    yield pair
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def pieces(self, ask: Ask) -> AsyncIterator[Piece]:
        """Yield the growing completions. Raises UserError, NotReady, BackendError."""
        self._check(ask)
        asked = _asked_once(ask)
        growths = self.wire.growths(asked)
        async with contextlib.aclosing(self._chunks(asked)) as chunks:
            async for chunk in chunks:
                for index, choice in choices_of(chunk, asked):
                    piece = growths[index].add(choice)
                    if piece is not None:
                        for copy in range(ask.n) if asked.n < ask.n else (index,):
                            yield _copied(piece, ask, copy)
                if all(growth.completion is not None for growth in growths):
                    return
        missing = sum(growth.completion is None for growth in growths)
        raise BackendError(f"the server ended its answer with {missing} of {ask.n} completions missing")

    async def relay(self, path: str, body: bytes) -> "tuple[int, dict[str, str], Relayed]":
        """Pass a request on as it is; return (status, headers, the answer's bytes).

        Only the model's name and the seed are translated: the same seed draws the same here as in `pieces`.

        Raises:
            NotReady, BackendError: As `pieces`; a BackendError also while the answer is read.
        """
        asked = json.loads(body)
        model = asked.get("model") or self.model_name
        if asked.get("seed") is not None:
            asked["seed"] = seed_base(asked["seed"])
        tried: set[str] = set()
        while True:
            server = self._pick(model if model in self.adapters else "", tried)
            name = self._wire_name(server, model)
            content = json.dumps({**asked, "model": name}).encode()
            server.n_running += 1
            try:
                response = await self._send(server, path, content)
            except _Refused as refused:
                server.n_running -= 1
                tried.add(server.url)
                self._leave_out(server, str(refused))
                continue
            except BaseException:
                server.n_running -= 1
                raise
            if response.status_code >= 500 and response.status_code != 503:
                self._leave_out(server, f"answered {response.status_code}")
            headers = {k: v for k, v in response.headers.items() if k.lower() not in _HOP_HEADERS}
            return response.status_code, headers, Relayed(self, server, response)

    async def _whole(self, ask: Ask) -> list[Completion]:
        asked = _asked_once(ask)
        async with self._answer(asked, stream=False) as response:
            try:
                answer = json.loads(response.content)
            except ValueError as error:
                raise BackendError(f"{response.url}: an answer that is no JSON: {error}") from error
        found = self.wire.whole(asked, answer)
        if asked.n < ask.n:
            return [replace(found[0], index=ask.first_index + i) for i in range(ask.n)]
        return found

    async def _chunks(self, ask: Ask) -> AsyncGenerator[Mapping[str, Any], None]:
        """Yield the chunks of a streamed answer."""
        async with self._answer(ask, stream=True) as response:
            async for line in response.aiter_lines():
                data = line.removeprefix("data:").strip()
                if not line.startswith("data:"):
                    continue
                if data == "[DONE]":
                    return
                try:
                    yield json.loads(data)
                except ValueError as error:
                    raise BackendError(f"{response.url}: a chunk that is no JSON: {error}") from error

    @contextlib.asynccontextmanager
    async def _answer(self, ask: Ask, *, stream: bool) -> AsyncIterator[httpx.Response]:
        """Yield a good response, a stream's with its body unread.

        A server that takes no connection is passed over.
        """
        tried: set[str] = set()
        while True:
            server = self._pick(ask.prompt.adapter, tried)
            path, body = self.wire.body(
                ask,
                model=self._wire_name(server, ask.prompt.adapter or self.model_name),
                takes_tokens=server.takes_tokens,
                stream=stream,
            )
            server.n_running += ask.n
            try:
                response = await self._send(server, path, body, stream=stream)
                try:
                    if response.status_code != 200:
                        raise self._refusal(server, response, await response.aread())
                    yield response
                finally:
                    await response.aclose()
            except _Refused as refused:
                tried.add(server.url)
                self._leave_out(server, str(refused))
            except httpx.HTTPError as error:
                raise self._failed(server, error) from error
            else:
                return
            finally:
                server.n_running -= ask.n

    async def _send(self, server: Server, path: str, body: bytes, *, stream: bool = True) -> httpx.Response:
        """Return a server's response, a stream's with its body unread. Raises _Refused, BackendError."""
        if self._client is None:
            raise NotReady("the server has not started yet")
        for tries_left in reversed(range(_TRIES)):
            request = self._client.build_request("POST", server.url + path, content=body, headers=_JSON)
            try:
                return await self._client.send(request, stream=stream)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                raise _Refused(f"{type(error).__name__}: {error}") from error
            except httpx.HTTPError as error:
                if not tries_left or self._client.is_closed or not _is_closed_by_us(error):
                    raise self._failed(server, error) from error
        raise AssertionError  # pragma: no cover - the last try returns or raises

    def _refusal(self, server: Server, response: httpx.Response, body: bytes) -> Exception:
        """Return the error of an answer that is none."""
        try:
            said = message_of(json.loads(body))
        except ValueError:
            said = body[:200].decode(errors="replace")
        status = response.status_code
        if status in (429, 503):
            after = response.headers.get("retry-after", "")
            return NotReady(
                f"the engine takes no more work: {said}", retry_after=float(after) if after.isdigit() else 5.0
            )
        if status in (400, 413, 422):
            return UserError(said)
        if status >= 500:
            self._leave_out(server, f"answered {status}: {said}")
        return BackendError(f"{server.url} answered {status}: {said}")

    # Servers

    def _check(self, ask: Ask) -> None:
        adapter = ask.prompt.adapter
        if adapter and adapter not in self.adapters:
            raise UnknownName.among("adapter", adapter, self.adapters)
        self.wire.check(ask)

    def _pick(self, adapter: str, tried: set[str]) -> Server:
        """Return the healthy server with the least to do. Raises NotReady."""
        able = [
            server for server in self.servers
            if server.is_healthy and server.url not in tried and self._holds(server, adapter)
        ]  # fmt: skip
        if not able:
            what = f"with the adapter '{adapter}' " if adapter else ""
            raise NotReady(f"no engine {what}is ready: {self._failures()}")
        return min(able, key=lambda server: server.n_running)

    def _holds(self, server: Server, adapter: str) -> bool:
        if adapter:
            return adapter in server.models
        # a server that was started for one adapter alone is not the model
        return self.model_name in server.models or server.root not in self.adapters

    def _wire_name(self, server: Server, name: str) -> str:
        return name if name in server.models or name in self.adapters else server.root

    def _failures(self) -> str:
        return "; ".join(f"{s.url}: {s.failure}" for s in self.servers if not s.is_healthy) or "all are busy"

    def _leave_out(self, server: Server, why: str) -> None:
        server.is_healthy = False
        server.failure = why
        server.recheck.set()

    def _failed(self, server: Server, error: httpx.HTTPError) -> BackendError:
        why = f"{type(error).__name__}: {error}".rstrip(": ")
        self._leave_out(server, why)
        return BackendError(f"the engine at {server.url} failed in the middle of the request ({why})")

    async def _watch(self, server: Server) -> None:
        """Ask a server again and again whether it is well; soon after it failed, else now and then."""
        while True:
            server.recheck.clear()
            try:
                await self._ask_after(server)
            except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
                server.is_healthy = False
                server.failure = f"{type(error).__name__}: {error}".rstrip(": ")
            wait = self._check_seconds if server.is_healthy else min(0.5, self._check_seconds)
            if server.is_healthy:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(server.recheck.wait(), wait)
                    # one whose engine has just died still answers for a moment
                    await asyncio.sleep(min(1.0, self._check_seconds))
            else:
                await asyncio.sleep(wait)

    async def _ask_after(self, server: Server) -> None:
        """Ask for a server's health and, when it comes back, for what it has. Raises what went wrong."""
        client = self._client
        if client is None:
            return
        health = await client.get(server.url + "/health", timeout=10.0)
        if health.status_code not in (200, 404):  # 404: servers of others have no such route
            raise ValueError(f"/health answered {health.status_code}")
        if server.is_healthy:
            return
        listed = await client.get(server.url + "/v1/models", timeout=10.0)
        if listed.status_code != 200:
            raise ValueError(f"/v1/models answered {listed.status_code}")
        cards = listed.json()["data"]
        server.models = frozenset(str(card["id"]) for card in cards)
        roots = [card for card in cards if not card.get("parent")]
        server.root = str(roots[0]["id"]) if roots else ""
        server.adapters = tuple(str(card["id"]) for card in cards if card.get("parent"))
        # A server whose engine has just died says that it is well for a moment, but makes no token. The token
        # may have to wait behind others, so it has the time that any answer has.
        one_token = {"model": server.root, "prompt": [1], "max_tokens": 1}
        probe = await client.post(server.url + TEXT_ROUTE, json=one_token)
        if probe.status_code >= 500:
            raise ValueError(f"asked for one token, it answered {probe.status_code}")
        # an empty request is wrong (400 or 422) where the route is there, unknown (404) where it is not
        probe = await client.post(server.url + TOKENS_ROUTE, json={}, timeout=10.0)
        server.takes_tokens = probe.status_code in (400, 422)
        # and so is an argument of our constraint that makes no sense, where there is one to look at it
        nonsense = {"model": server.root, "prompt": [1], "max_tokens": 1, "vllm_xargs": {"crystal": "?"}}
        probe = await client.post(server.url + TEXT_ROUTE, json=nonsense, timeout=30.0)
        server.takes_requests = probe.status_code in (400, 422)
        server.is_healthy, server.failure = True, ""


class Relayed:
    """The bytes of an answer that is passed on, as they come; `aclose` ends it early and frees the work."""

    def __init__(self, backend: UpstreamBackend, server: Server, response: httpx.Response) -> None:
        self._backend = backend
        self._server = server
        self._response = response
        self._is_open = True

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield them. Raises BackendError."""
        try:
            async for data in self._response.aiter_bytes():
                yield data
        except httpx.HTTPError as error:
            raise self._backend._failed(self._server, error) from error
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        """Close the connection to the server, if it is open."""
        if self._is_open:
            self._is_open = False
            self._server.n_running -= 1
            await self._response.aclose()


class _Refused(Exception):
    """A server took no connection, so nothing was begun there."""


def _is_closed_by_us(error: BaseException) -> bool:
    """Tell whether a request failed because our own pool closed its connection.

    httpcore (1.0.9) hands an idle connection to a request, and may then find its time out and close it before
    the request has begun on it. A server that closes or dies is another error.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, anyio.ClosedResourceError):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _address(url: str) -> str:
    address = url.rstrip("/").removesuffix("/v1")
    if not address.startswith(("http://", "https://")):
        raise UserError(f"upstream '{url}': an address expected, such as http://127.0.0.1:8001")
    return address


def _asked_once(ask: Ask) -> Ask:
    """Return the ask with n 1 where all its completions are the same."""
    return replace(ask, n=1) if ask.n > 1 and is_greedy(ask) else ask


def _copied(piece: Piece, ask: Ask, index: int) -> Piece:
    if piece.index == index:
        return piece
    completion = piece.completion
    if completion is not None:
        completion = replace(completion, index=ask.first_index + index)
    return replace(piece, index=index, completion=completion)
