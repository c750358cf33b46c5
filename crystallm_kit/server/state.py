"""What every route works with: the backend, the model, the settings, and the books that are kept.

    state = new_state(backend, model, tokenizer, ServerSettings(port=8000))
    app = create_app(state)                     app.py
    state = server_state(request)               in a route; as a dependency: `State`

One ServerState belongs to one app and lives as long as it does. Nothing in it is global.

Not here: how settings are read from a command line (run.py), the routes (openai_routes.py, crystals.py).
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, Request

from crystallm_kit.errors import UserError
from crystallm_kit.generation import Model
from crystallm_kit.server.admission import Admission
from crystallm_kit.server.backend import Backend
from crystallm_kit.server.keys import Keys
from crystallm_kit.server.metrics import Metrics
from crystallm_kit.tokens.tokenizer import encode_strict, prompt_ids


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
        slots: Completions that are drawn at once.
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

    def model_names(self) -> tuple[str, ...]:
        """Return the names that a request's `model` may have: the model's own, then its adapters'."""
        return (self.backend.model_name, *self.backend.adapters)

    def prompt_ids(self, text: str) -> list[int]:
        """Return the token ids that the model gets for a prompt.

        Raises:
            ParseError: If a format's own tokenizer covers a part of the text with no token.
        """
        own = type(self.tokenizer.backend_tokenizer.model).__name__ == "WordLevel"
        return (encode_strict if own else prompt_ids)(self.tokenizer, text)


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


def server_state(request: Request) -> ServerState:
    """Return the state of the app that a request came to."""
    state: ServerState = request.app.state.server
    return state


State = Annotated[ServerState, Depends(server_state)]
