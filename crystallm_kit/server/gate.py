"""What every request passes: an id, a key, a bound on its body, a count and a line in the log.

    {"id": "req_5f0c...", "client": "127.0.0.1", "method": "POST", "route": "/v1/completions",
     "status": 200, "seconds": 0.412, "bytes_in": 121, "bytes_out": 840}

Neither prompts nor keys nor query strings are written down. A key is asked for by everything but the routes
that tell nothing and cost nothing: /healthz, /readyz, /docs, /openapi.json and the page's own files.

Not here: what the keys are (keys.py), how many may come in (admission.py).
"""

import asyncio
import json
import logging
import time
import uuid
from typing import Any

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from crystallm_kit.server.failures import Failure, failure_of
from crystallm_kit.server.state import ServerState
from crystallm_kit.server.streaming import ClientGone, json_response

log = logging.getLogger(__name__)
access_log = logging.getLogger("crystallm_kit.server.access")
BODY_SECONDS = 60.0  # in which a body must have arrived
_DISCARDED = 64_000_000  # bytes of a refused body are read, so that its sender can read the refusal
_DISCARD_SECONDS = 10.0


class Gate:
    """ASGI middleware around the whole app of one state."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self.app = app
        self.state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let one request pass, or answer it here."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        await _Passage(self, scope, receive, send).run()


class _Passage:
    """One request on its way."""

    def __init__(self, gate: Gate, scope: Scope, receive: Receive, send: Send) -> None:
        self.gate, self.scope, self._receive, self._send = gate, scope, receive, send
        self.state = gate.state
        self.id = f"req_{uuid.uuid4().hex}"
        self.status = 0
        self.bytes_in = 0
        self.bytes_out = 0
        self.body_is_whole = False
        self.body_until = 0.0
        self.headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}

    async def run(self) -> None:
        metrics, began = self.state.metrics, time.monotonic()
        self.scope.setdefault("state", {})["request_id"] = self.id
        metrics.in_flight.inc()
        gone = False
        try:
            refusal = self._refusal()
            if refusal is not None:
                await self._answer(refusal)
            else:
                await self.gate.app(self.scope, self.receive, self.send)
        except ClientGone:
            gone = True
        except Exception as error:  # the last place where a fault can be answered
            log.exception("request %s failed", self.id)
            if not self.status:
                await self._answer(failure_of(error, self.id))
        finally:
            metrics.in_flight.dec()
            seconds = time.monotonic() - began
            route = self._route()
            # 499: the client closed the connection, as nginx writes it
            status = 499 if gone else self.status
            metrics.requests.labels(route, self._method(), str(status)).inc()
            metrics.seconds.labels(route).observe(seconds)
            if gone:
                metrics.gone.labels(route).inc()
            self._write_line(route, status, seconds)

    def _refusal(self) -> Failure | None:
        """Return why the request may not go on."""
        if self._needs_key() and not self.state.keys.admit(self.headers.get("authorization")):
            words = "a wrong API key" if "authorization" in self.headers else "no API key"
            return Failure(
                401,
                f"{words}; send one as 'Authorization: Bearer KEY'",
                headers={"WWW-Authenticate": "Bearer"},
            )
        length = self.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.state.settings.max_body_bytes:
            return self._too_long()
        return None

    def _needs_key(self) -> bool:
        path = self.scope["path"]
        if path == "/metrics":
            return self.state.settings.metrics_need_key
        return path.startswith("/v1") or self.scope["method"] not in ("GET", "HEAD")

    def _too_long(self) -> Failure:
        most = self.state.settings.max_body_bytes
        return Failure(413, f"a body of more than {most} bytes; send fewer or shorter prompts")

    async def receive(self) -> Message:
        """Pass on what the client sends, up to the bound. Raises HTTPException (413, 408)."""
        if self.body_is_whole:
            return await self._receive()
        # of the whole body: who sends a byte now and then would stay for ever
        self.body_until = self.body_until or time.monotonic() + BODY_SECONDS
        try:
            async with asyncio.timeout(max(0.0, self.body_until - time.monotonic())):
                message = await self._receive()
        except TimeoutError as error:
            raise HTTPException(408, f"the body did not arrive within {BODY_SECONDS:g} s") from error
        if message["type"] == "http.request":
            self.bytes_in += len(message.get("body", b""))
            self.body_is_whole = not message.get("more_body", False)
            if self.bytes_in > self.state.settings.max_body_bytes:
                raise HTTPException(413, self._too_long().message)
        else:
            self.body_is_whole = True
        return message

    async def send(self, message: Message) -> None:
        """Pass on the answer, with the request's id in its headers."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if self.status >= 400 and self.status != 408:
                await self._discard_body()
            headers = [*message.get("headers", ()), (b"x-request-id", self.id.encode())]
            if self.state.admission.is_draining or self.status in (408, 413):
                headers.append((b"connection", b"close"))
            message = {**message, "headers": headers}
        elif message["type"] == "http.response.body":
            self.bytes_out += len(message.get("body", b""))
        await self._send(message)

    async def _discard_body(self) -> None:
        """Read on, so that a client that sends first and reads then finds its answer, not a broken pipe."""
        if "expect" in self.headers:
            return
        try:
            async with asyncio.timeout(_DISCARD_SECONDS):
                while not self.body_is_whole and self.bytes_in < _DISCARDED:
                    message = await self._receive()
                    self.bytes_in += len(message.get("body", b""))
                    self.body_is_whole = not message.get("more_body", False)
        except TimeoutError:
            return

    async def _answer(self, failure: Failure) -> None:
        response = json_response(failure.body(), failure.status, dict(failure.headers))
        await response(self.scope, self.receive, self.send)

    def _method(self) -> str:
        method = str(self.scope["method"])
        return method if method in ("GET", "HEAD", "POST", "OPTIONS", "PUT", "DELETE", "PATCH") else "other"

    def _route(self) -> str:
        """Return the route's declared path: of a bounded number, and nothing that a client wrote."""
        route: Any = self.scope.get("route")
        return str(getattr(route, "path", "") or "other")

    def _write_line(self, route: str, status: int, seconds: float) -> None:
        client = self.scope.get("client")
        line = {
            "id": self.id,
            "client": client[0] if client else "",
            "method": self._method(),
            "route": route,
            "status": status,
            "seconds": round(seconds, 4),
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
        }
        access_log.info("%s", json.dumps(line))
