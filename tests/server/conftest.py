"""What the tests of the server share: the shipped model behind a real uvicorn on a free port, and the command
`crystallm-kit serve` as a process of its own."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ADAPTER = "bulk-modulus"
ROOT = Path(__file__).parents[2]


@dataclass
class LiveServer:
    """A server that runs: where it is, what it is made of."""

    url: str
    app: Any
    state: Any
    server: Any

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def client(self, **settings: Any) -> Any:
        """Return OpenAI's own client, which does not try again by itself."""
        import openai

        settings = {"api_key": "none-is-asked-for", "max_retries": 0, "timeout": 60, **settings}
        return openai.OpenAI(base_url=f"{self.url}/v1", **settings)


@contextlib.contextmanager
def run_app(app: Any) -> Iterator[LiveServer]:
    """Serve an app on a free port, in a thread, until the block ends."""
    import uvicorn

    from crystallm_kit.server.run import bound

    listener = bound("127.0.0.1", 0)
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        until = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive(), "the server died while it started"
            assert time.monotonic() < until, "the server did not start"
            time.sleep(0.01)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        yield LiveServer(url, app, app.state.server, server)
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        listener.close()


@pytest.fixture(scope="session")
def shipped() -> Any:
    """Return the shipped model, loaded once."""
    from crystallm_kit.generation import load_model

    return load_model()


@pytest.fixture(scope="module")
def local_state(shipped) -> Any:
    """Return a state over the shipped model in this process; a module may put other settings into it."""
    return new_local_state(shipped)


def new_local_state(shipped: Any, **settings: Any) -> Any:
    """Return the state of a new app over the shipped model; `settings`: those of ServerSettings."""
    from crystallm_kit.engines.continuous import ContinuousEngine
    from crystallm_kit.models.folders import shipped_model_folder
    from crystallm_kit.server.judging import Judges
    from crystallm_kit.server.local import LocalBackend
    from crystallm_kit.server.state import ServerSettings, new_state

    chosen = ServerSettings(**settings)
    folder = shipped_model_folder() / "adapters" / ADAPTER
    engine = ContinuousEngine(
        shipped.engine.model, shipped.engine.tokenizer, slots=chosen.slots, adapters={ADAPTER: folder}
    )
    backend = LocalBackend(engine, model_name="crystallm-kit", max_unread_tokens=chosen.max_unread_tokens)
    # one judging process: apps are started often here
    return new_state(backend, shipped, shipped.engine.tokenizer, chosen, judges=Judges(1))


@pytest.fixture(scope="session")
def make_state(shipped) -> Any:
    """Return a function from settings (those of ServerSettings) to a state over the shipped model."""
    return lambda **settings: new_local_state(shipped, **settings)


@pytest.fixture(scope="session")
def serve_app() -> Any:
    """Return run_app: a context manager that serves an app on a free port."""
    return run_app


@pytest.fixture(scope="module")
def live_server(local_state) -> Iterator[LiveServer]:
    """Return a running server over the shipped model; one for each module of tests."""
    from crystallm_kit.server.app import create_app

    with run_app(create_app(local_state)) as server:
        yield server


class Command:
    """`crystallm-kit serve` that runs."""

    def __init__(self, *arguments, **environment):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "crystallm_kit", "serve", "--port", "0", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        )
        self.lines = []
        while not self.lines or "curl" not in self.lines[-1]:
            line = self.process.stdout.readline()
            assert line, self.process.stderr.read()
            self.lines.append(line)
        self.url = next(w for line in self.lines for w in line.split() if w.startswith("http://"))

    def post(self, path, body, **settings):
        import httpx

        return httpx.post(self.url + path, json=body, timeout=60, trust_env=False, **settings)

    def get(self, path):
        import httpx

        return httpx.get(self.url + path, timeout=10, trust_env=False)

    def end(self, *, within=30.0):
        out, err = self.process.communicate(timeout=within)
        return self.process.returncode, out, err

    def tell(self, number=signal.SIGTERM):
        self.process.send_signal(number)


@contextlib.contextmanager
def command(*arguments, **environment):
    made = Command(*arguments, **environment)
    try:
        yield made
    finally:
        made.process.kill()
        made.process.wait()
        made.process.stdout.close()
        made.process.stderr.close()


@pytest.fixture(scope="session")
def serve_command() -> Any:
    """Return command: a context manager that runs `crystallm-kit serve` with some arguments."""
    return command
