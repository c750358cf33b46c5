"""Answers to clients that may leave: work that ends with them, and server-sent events.

    return await answered(request, work())            cancelled as soon as the client is gone
    return await event_stream(request, state, events)     `data: {...}` lines as they come

The first event is awaited before the status line goes out, so what is wrong from the start has its own
status (400, 429, 503 ...). What fails later becomes an event {"error": ...}, after which the stream ends.

Not here: what the events say (openai_routes.py, crystals.py).
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from crystallm_kit.server.failures import failure_of
from crystallm_kit.server.state import ServerState

log = logging.getLogger(__name__)
DONE = b"data: [DONE]\n\n"
T = TypeVar("T")
_EVENT = {
    "type": "object",
    "properties": {
        "event": {"type": "string"},
        "data": {"type": "string", "description": "JSON; in the last event [DONE]."},
    },
    "required": ["data"],
}


class ClientGone(Exception):
    """The client left before its answer was whole; nobody is there to be told."""


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return data as JSON; a number that JSON does not have (NaN) is null."""
    body = to_json(content, inf_nan_mode="null")
    return Response(body, status, headers, media_type="application/json")


def event(data: Any, name: str = "") -> bytes:
    """Return one server-sent event, of this name where it has one."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + to_json(data, inf_nan_mode="null") + b"\n\n"


def stream_content(example: str) -> dict[str, Any]:
    """Return the documentation of a stream, for `responses=` of a route: what each of its events is.

    itemSchema is OpenAPI 3.2's word, because 3.1 has none for a part of an answer.
    """
    return {"text/event-stream": {"itemSchema": _EVENT, "example": example}}


async def answered(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` returns; cancel it if the client leaves before.

    Raises:
        ClientGone: If the client left.
    """
    doing = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientGone
        return doing.result()
    finally:
        for task in (doing, leaving):
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task


async def event_stream(request: Request, state: ServerState, events: AsyncGenerator[bytes, None]) -> Response:
    """Return the response that sends `events`, which is closed at its end, whatever that is.

    Raises:
        ClientGone: If the client left before the first event.
        Exception: What `events` raises before its first event.
    """

    async def first() -> bytes:
        return await anext(events, b"")

    try:
        begun = await answered(request, first())
    except BaseException:
        await events.aclose()
        raise
    return _EventStream(begun, events, request, state)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _EventStream(Response):
    """A response of events that have begun."""

    media_type = "text/event-stream"

    def __init__(
        self, begun: bytes, events: AsyncGenerator[bytes, None], request: Request, state: ServerState
    ) -> None:
        self.status_code = 200
        self.background = None
        # proxies that gather a response before they pass it on would undo the streaming
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._begun = begun
        self._events = events
        self._stall_seconds = state.settings.stall_seconds or None
        self._request_id = str(request.scope.get("state", {}).get("request_id", ""))

    def init_headers(self, headers: Any = None) -> None:
        """Set the headers; a stream has no length."""
        self.raw_headers = [(k.lower().encode(), v.encode()) for k, v in (headers or {}).items()]
        self.raw_headers.append((b"content-type", b"text/event-stream; charset=utf-8"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope
        sending = asyncio.ensure_future(self._send_all(send))
        leaving = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not sending.done():
                raise ClientGone
            sending.result()
        finally:
            for task in (sending, leaving):
                if not task.done():
                    task.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await task
            await self._events.aclose()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await self._send(send, self._begun)
        try:
            async for chunk in self._events:
                await self._send(send, chunk)
        except ClientGone:
            raise
        except Exception as error:  # the stream has begun: the client is told in it
            failure = failure_of(error, self._request_id)
            if failure.status == 500:
                log.exception("request %s failed in its stream", self._request_id)
            await self._send(send, event(failure.body()))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, chunk: bytes) -> None:
        """Send a chunk. Raises ClientGone where the client takes nothing for too long."""
        try:
            async with asyncio.timeout(self._stall_seconds):
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except (TimeoutError, OSError) as error:
            raise ClientGone from error
