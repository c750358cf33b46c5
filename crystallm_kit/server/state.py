"""What every route works with: the backend, the model, the settings, and the books that are kept.

    state = new_state(backend, model, tokenizer, ServerSettings(port=8000))
    app = create_app(state)                     app.py
    async def route(state: State): ...          the same state in a route

One ServerState belongs to one app and lives as long as it does. Nothing in it is global.

Not here: how settings are read from a command line (run.py), the routes (openai_routes.py, crystals.py).
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends
from fastapi import Request as HttpRequest

from crystallm_kit.engines.texts import Texts
from crystallm_kit.errors import UserError
from crystallm_kit.generation import Model, compiler
from crystallm_kit.records import Conditions
from crystallm_kit.server.admission import Admission
from crystallm_kit.server.backend import Backend
from crystallm_kit.server.keys import Keys
from crystallm_kit.server.metrics import Metrics
from crystallm_kit.tokens.requests import Request

# Prompts and conditions that come again are cut and compiled once.
_REMEMBERED = 1024
_REMEMBERED_CHARACTERS = 2_000


@dataclass(frozen=True)
class ServerSettings:
    """What may be asked of the server, and where it listens.

    Attributes:
        host: Address to listen on; 127.0.0.1 is reached from this machine alone.
        port: Port to listen on; 0 takes a free one.
        api_key_file: One key a line, "#" begins a comment; None: no key is asked for.
        metrics_need_key: Whether /metrics asks for a key too, where there are keys.
        max_body_bytes: Longest request body; a longer one is refused with 413.
        max_n: Most completions of one prompt, and most crystals of one request.
        max_prompts: Most prompts of one request.
        max_completions: Most completions of one request, prompts times n.
        max_samples: Largest budget of one request for crystals.
        max_queue: Completions that may wait for their turn; beyond, requests are refused with 429.
        slots: Completions that are drawn at once; a GPU draws more, where nothing else is said.
        judges: Processes that parse and validate samples; None: a quarter of the cores.
        max_unread_tokens: A stream whose client leaves more than this unread is ended with an error.
        stall_seconds: A client that takes nothing for so long is taken for gone.
        drain_seconds: How long running requests may go on once the server is told to stop.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: Path | None = None
    metrics_need_key: bool = True
    max_body_bytes: int = 1_000_000
    max_n: int = 1_000
    max_prompts: int = 1_000
    max_completions: int = 2_000
    max_samples: int = 10_000
    max_queue: int = 4_096
    slots: int = 64
    judges: int | None = None
    max_unread_tokens: int = 65_536
    stall_seconds: float = 60.0
    drain_seconds: float = 30.0

    def __post_init__(self) -> None:
        """Check the ranges. Raises UserError."""
        for name in ("max_body_bytes", "max_n", "max_prompts", "max_completions", "max_samples", "slots"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}: 1 or more expected")
        for name in ("max_queue", "max_unread_tokens", "stall_seconds", "drain_seconds"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} {getattr(self, name)}: 0 or more expected")
        if self.judges is not None and self.judges < 1:
            raise UserError(f"judges {self.judges}: 1 or more expected")
        if not 0 <= self.port <= 65_535:
            raise UserError(f"port {self.port}: 0 to 65535 expected")


@dataclass
class ServerState:
    """What the routes of one app share.

    Attributes:
        backend: What makes tokens.
        model: Template, format and what the model knows; its engine is not used here.
        tokenizer: The model's, to count and cut prompts.
        settings: Limits and addresses.
        admission: Who may come in, who waits.
        metrics: What is counted.
        keys: Whom we know.
        judges: The processes that parse and validate samples (judging.py); None until the app starts.
    """

    backend: Backend
    model: Model
    tokenizer: Any
    settings: ServerSettings
    admission: Admission
    metrics: Metrics
    keys: Keys = field(default_factory=Keys)
    judges: Any = None
    _compiled: dict[str, Request] = field(default_factory=dict, repr=False)

    def model_names(self) -> tuple[str, ...]:
        """Return the names that a request's `model` may have: the model's own, then its adapters'."""
        return (self.backend.model_name, *self.backend.adapters)

    def prompt_ids(self, text: str) -> tuple[int, ...]:
        """Return the token ids that the model gets for a prompt.

        Raises:
            ParseError: If a format's own tokenizer covers a part of the text with no token.
        """
        return (self._cut_remembered if len(text) <= _REMEMBERED_CHARACTERS else self._cut)(text)

    def compiled(self, conditions: Conditions) -> Request:
        """Return the constraint of some conditions, for the model that is served.

        Raises:
            UnknownName, ImpossibleRequest: If no crystal can meet them.
        """
        key = repr(conditions)
        if key not in self._compiled:
            request: Request = compiler(self.model)(conditions)
            if len(self._compiled) >= _REMEMBERED:
                self._compiled.pop(next(iter(self._compiled)))
            self._compiled[key] = request
        return self._compiled[key]

    @property
    def takes_requests(self) -> bool:
        """Whether samples can be constrained: by the backend, in the text that the model writes."""
        return self.backend.takes_requests and self.model.representation.name == "wyckoff"

    @cached_property
    def model_stop(self) -> str:
        """Text that ends a completion of a model without an end token, and is part of it; "": none."""
        return "" if self.tokenizer.eos_token_id is not None else self.model.representation.alphabet().stop

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token; a text has at least its length over this many tokens."""
        return max(map(len, self.tokenizer.get_vocab()))

    @cached_property
    def fingerprint(self) -> str:
        """What an answer depends on beside its request: the same one, the same draws."""
        said = (self.model.name, self.model.template.hash, self.backend.name, self.backend.model_name)
        return "fp_" + hashlib.sha256(repr(said).encode()).hexdigest()[:12]

    @cached_property
    def _cut_remembered(self) -> Callable[[str], tuple[int, ...]]:
        return lru_cache(maxsize=_REMEMBERED)(self._cut)

    def _cut(self, text: str) -> tuple[int, ...]:
        return tuple(self._texts.prompt_ids(text))

    @cached_property
    def _texts(self) -> Texts:
        return Texts(self.tokenizer)


def new_state(
    backend: Backend,
    model: Model,
    tokenizer: Any,
    settings: ServerSettings | None = None,
    *,
    judges: Any = None,
) -> ServerState:
    """Return the state of a new app: nothing admitted, nothing counted, keys read from their file.

    Raises:
        ReadError: If the key file cannot be read or holds no key.
    """
    settings = settings or ServerSettings()
    return ServerState(
        backend=backend,
        model=model,
        tokenizer=tokenizer,
        settings=settings,
        admission=Admission(at_once=settings.slots, max_waiting=settings.max_queue),
        metrics=Metrics(),
        keys=Keys.from_file(settings.api_key_file) if settings.api_key_file else Keys(),
        judges=judges,
    )


async def server_state(request: HttpRequest) -> ServerState:
    """Return the state of the app that a request came to.

    A coroutine, because FastAPI would call a plain function in a thread, which costs more than all our own.
    """
    state: ServerState = request.app.state.server
    return state


State = Annotated[ServerState, Depends(server_state)]
