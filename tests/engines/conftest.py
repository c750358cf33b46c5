"""What tests of engines share: an adapter of the toy model, this package's server over it, and a stand-in."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

ADAPTER = "toy.adapter"


@pytest.fixture(scope="session")
def toy_adapter(toy_model, tmp_path_factory) -> Path:
    """Return the folder of an adapter of the toy model, random and strong."""
    import torch

    from crystallm_kit.models.bases import BaseRecipe, LoraRecipe, load_base, save_adapter
    from crystallm_kit.models.checkpoints import read_manifest
    from crystallm_kit.tokens.drawing import VocabularyInfo
    from crystallm_kit.tokens.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(toy_model)
    vocabulary = VocabularyInfo(len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id)
    recipe = BaseRecipe(str(toy_model), lora=LoraRecipe(rank=8))
    model = load_base(recipe, vocabulary, device="cpu", seed=1)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(2)
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight))
    home = tmp_path_factory.mktemp("adapters") / ADAPTER
    return save_adapter(home, model, None, read_manifest(toy_model))


@contextlib.contextmanager
def serving(folder: Path, adapters: dict[str, Path]) -> Iterator[str]:
    """Serve a model folder on a free port, in a thread, and give its URL."""
    import uvicorn

    from crystallm_kit.engines.continuous import ContinuousEngine
    from crystallm_kit.generation import load_model
    from crystallm_kit.server.app import create_app
    from crystallm_kit.server.local import LocalBackend
    from crystallm_kit.server.state import ServerSettings, new_state

    model = load_model(folder, device="cpu")
    network, tokenizer = model.engine.model, model.engine.tokenizer
    settings = ServerSettings(max_n=8)  # fewer than an engine asks for at a time
    engine = ContinuousEngine(network, tokenizer, slots=16, device="cpu", adapters=adapters)
    backend = LocalBackend(engine, model_name="toy")
    app = create_app(new_state(backend, model, tokenizer, settings))
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        until = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive(), "the server died while it started"
            assert time.monotonic() < until, "the server did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        listener.close()


@pytest.fixture(scope="session")
def toy_server(toy_model, toy_adapter) -> Iterator[str]:
    """Return the URL of this package's server over the toy model and its adapter."""
    with serving(toy_model, {ADAPTER: toy_adapter}) as url:
        yield url


# ---------------------------------------------------------------- a server of others


Answer = tuple[int, dict[str, str], Any]


@dataclass
class StandIn:
    """A server of others, hosted or old: it answers by rules, and remembers what it was asked.

    Attributes:
        url: Where it is.
        asked: (path, body, headers in lower case) of every request; the body of a GET is None.
        rules: Path -> function from a body to (status, headers, JSON or text).
    """

    url: str
    rules: dict[str, Callable[[Any], Answer]]
    asked: list[tuple[str, Any, dict[str, str]]] = field(default_factory=list)

    def bodies(self, path: str) -> list[Any]:
        return [body for asked, body, _ in self.asked if asked == path]


@pytest.fixture
def stand_in() -> Iterator[Callable[..., StandIn]]:
    """Return a function from rules to a running stand-in."""
    running = []

    def start(rules: dict[str, Callable[[Any], Answer]]) -> StandIn:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.answer(None)

            def do_POST(self) -> None:
                self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def answer(self, body: Any) -> None:
                peer.asked.append((self.path, body, {k.lower(): v for k, v in self.headers.items()}))
                rule = rules.get(self.path)
                nothing = (404, {}, {"error": {"message": "Not Found"}})
                status, headers, content = rule(body) if rule else nothing
                data = (content if isinstance(content, str) else json.dumps(content)).encode()
                self.send_response(status)
                kind = "text/html" if isinstance(content, str) else "application/json"
                for name, value in {
                    "Content-Type": kind,
                    "Content-Length": str(len(data)),
                    **headers,
                }.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        peer = StandIn(f"http://127.0.0.1:{server.server_port}", rules)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        running.append((server, thread))
        return peer

    yield start
    for server, thread in running:
        server.shutdown()
        thread.join()
        server.server_close()
