"""Runs the server: binds, starts what makes tokens, listens, and leaves without losing anything.

    code = serve(Serving(), ServerSettings(port=8000))

SIGTERM or Ctrl-C: new requests are refused (503), running ones finish within `drain_seconds`, then all is
stopped and the code is 0. A second one ends the process at once.

Not here: what serves (serving.py), the routes (app.py), options (cli.py).
"""

import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import uvicorn

from crystallm_kit.errors import UserError
from crystallm_kit.server.app import create_app
from crystallm_kit.server.serving import Found, Serving, served
from crystallm_kit.server.state import ServerSettings, ServerState, new_state

_CLOSING_SECONDS = 5  # for answers that are written while the last connections close


def serve(
    what: Serving,
    settings: ServerSettings,
    *,
    allow_public_without_key: bool = False,
    tell: Callable[[str], None] = lambda line: print(line, flush=True),
) -> int:
    """Serve until a signal comes; return the exit code: 0, or 1 where what serves has failed.

    Args:
        what: What is served.
        settings: Where and within which limits.
        allow_public_without_key: Let everybody in who reaches the address.
        tell: Takes lines for people.

    Raises:
        UserError: If the address cannot be taken, is public and has no key, or the model cannot be served.
        MissingExtra: If vLLM is asked for and not installed.
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    if settings.api_key_file is None and not allow_public_without_key and not is_local(settings.host):
        raise UserError(
            f"host {settings.host}: others can reach it, and no key is asked for. Give --api-key-file FILE, "
            "or --allow-public-without-key if that is meant."
        )
    listener = bound(settings.host, settings.port)
    try:
        settings = replace(settings, port=int(listener.getsockname()[1]))
        return asyncio.run(_serve(what, settings, listener, tell))
    finally:
        listener.close()


def is_local(host: str) -> bool:
    """Tell whether only this machine reaches an address. Raises UserError if it is none."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UserError(f"host '{host}': no address of this machine ({error.strerror})") from error
    return all(ipaddress.ip_address(str(entry[4][0]).partition("%")[0]).is_loopback for entry in found)


def bound(host: str, port: int) -> socket.socket:
    """Return a socket that is bound and does not listen yet. Raises UserError if it cannot be."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # asyncio sends small answers at once (TCP_NODELAY) only where the protocol is named; else each one on
        # a connection that is kept waits for the client's delayed acknowledgement: 47 ms in place of 0.7
        opened = socket.socket(family, kind, protocol)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    except OSError as error:
        raise UserError(f"host '{host}': no address of this machine ({error.strerror})") from error
    try:
        opened.bind(address)
    except OSError as error:
        opened.close()
        raise UserError(
            f"port {port} of {host}: {(error.strerror or str(error)).lower()}; name another with --port"
        ) from error
    return opened


async def _serve(
    what: Serving, settings: ServerSettings, listener: socket.socket, tell: Callable[[str], None]
) -> int:
    leaving = asyncio.Event()
    with _signals(leaving):
        found = await asyncio.to_thread(served, what, settings)
        try:
            if not await _started(found, leaving):
                return 0
            state = new_state(found.backend, found.model, found.tokenizer, found.settings)
            return await _listen(found, state, listener, leaving, tell)
        finally:
            await found.backend.close()


async def _started(found: Found, leaving: asyncio.Event) -> bool:
    """Start the backend; tell whether it is there, or we are to leave before that."""
    starting = asyncio.create_task(found.backend.start())
    leave = asyncio.create_task(leaving.wait())
    await asyncio.wait({starting, leave}, return_when=asyncio.FIRST_COMPLETED)
    leave.cancel()
    if starting.done():
        starting.result()
        return not leaving.is_set()
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    return False


async def _listen(
    found: Found,
    state: ServerState,
    listener: socket.socket,
    leaving: asyncio.Event,
    tell: Callable[[str], None],
) -> int:
    config = uvicorn.Config(
        create_app(state),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        backlog=2048,
        timeout_graceful_shutdown=_CLOSING_SECONDS,
    )
    server = _Server(config)
    running = asyncio.create_task(server.serve(sockets=[listener]))
    watched = asyncio.create_task(found.watched() if found.watched else _never())
    leave = asyncio.create_task(leaving.wait())
    code = 0
    try:
        while not server.started and not running.done():
            await asyncio.sleep(0.02)
        if server.started:
            for line in _welcome(found, state):
                tell(line)
        await asyncio.wait({running, watched, leave}, return_when=asyncio.FIRST_COMPLETED)
        if watched.done():
            print(f"nothing is left to serve with: {watched.result()}", file=sys.stderr, flush=True)
            code = 1
        elif leave.done() and not running.done():
            await _drain(state, tell)
        elif not server.started:
            code = 1
    finally:
        server.should_exit = True
        await running
        for task in (watched, leave):
            task.cancel()
    return code


async def _drain(state: ServerState, tell: Callable[[str], None]) -> None:
    """Take nothing new; wait for what runs, within the limit."""
    state.admission.drain()
    inside = state.admission.n_requests
    if inside:
        tell(f"stopping; {inside} request{'s' if inside > 1 else ''} may finish")
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(state.admission.drained(), state.settings.drain_seconds)


async def _never() -> str:
    await asyncio.Event().wait()
    return ""


class _Server(uvicorn.Server):
    """uvicorn without its own signal handling, which would stop listening before running requests end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone."""
        yield


@contextlib.contextmanager
def _signals(leaving: asyncio.Event) -> Iterator[None]:
    """Set `leaving` at the first SIGTERM or SIGINT; end the process at the second."""
    loop = asyncio.get_running_loop()

    def told() -> None:
        if leaving.is_set():
            os._exit(1)  # engines that we keep end with us (watchdog.py)
        leaving.set()

    numbers = (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        loop.add_signal_handler(number, told)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def _welcome(found: Found, state: ServerState) -> list[str]:
    """Return what is said once requests are taken."""
    host, port = state.settings.host, state.settings.port
    named = "127.0.0.1" if host in ("0.0.0.0", "::", "") else host
    url = f"http://[{named}]:{port}" if ":" in named else f"http://{named}:{port}"
    key = " -H 'Authorization: Bearer KEY'" if state.keys else ""
    body = '{"conditions": {"formula": "NaCl"}, "n": 2}'
    return [
        f"{', '.join(state.model_names())}: {found.described}",
        f"listening at {url}    page: {url}/    routes: {url}/docs",
        f"try: curl {url}/v1/crystals{key} -H 'Content-Type: application/json' -d '{body}'",
    ]
