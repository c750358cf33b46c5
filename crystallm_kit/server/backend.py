"""What the server's routes ask for tokens: one contract over the model in this process and servers elsewhere.

    backend.pieces(ask)            one completion's text as it grows, token by token, for each of ask.n
    backend.completions(asks)      whole completions as they finish, for bulk work

Contract, tested for every backend:
    each of the n completions of an ask ends with exactly one piece that carries its Completion
    closing an iterator early frees the work that is left of it
    what an ask does wrong raises UserError before the first piece; a backend that fails raises BackendError

Not here: HTTP (openai_routes.py, crystals.py), limits on what is taken in (admission.py).
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from crystallm_kit.engines.engine import Prompt, Sampling
from crystallm_kit.errors import CrystallmKitError
from crystallm_kit.records import Completion


class BackendError(CrystallmKitError):
    """What makes the tokens failed in the middle of a request; the same request may work again (HTTP 502)."""


class NotReady(CrystallmKitError):
    """Nothing can make tokens at the moment: starting, restarting or stopping (HTTP 503).

    Attributes:
        retry_after: Seconds after which it is worth asking again.
    """

    def __init__(self, message: str, *, retry_after: float = 5.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True)
class Ask:
    """One prompt to go on with, n times.

    Attributes:
        prompt: Text, what the completion begins with, the constraint, the adapter.
        sampling: How tokens are drawn.
        n: Completions wanted.
        first_index: Position of the first of them in its request; (sampling.seed, position) determines draws.
        stop: Texts that end a completion; left out of it.
        n_top: Alternatives whose log-probabilities are wanted for each token; 0: those of drawn tokens alone;
            None: no log-probability of single tokens.
        prompt_ids: The prompt as token ids, in place of prompt.text.
        is_seeded: Whether the draws must be those of the seed. False where the client named none: vLLM keeps
            a random generator of its own for every seeded sample, which costs it time.
    """

    prompt: Prompt
    sampling: Sampling
    n: int = 1
    first_index: int = 0
    stop: tuple[str, ...] = ()
    n_top: int | None = None
    prompt_ids: tuple[int, ...] | None = None
    is_seeded: bool = True


@dataclass(frozen=True)
class Token:
    """One token of a completion, with its log-probability (natural) and those of the likeliest others."""

    id: int
    text: str
    log_probability: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """What one completion grew by.

    Attributes:
        index: 0 to n - 1: which of the ask's completions.
        text: New text; "" with a token that shows none yet.
        tokens: New tokens; only where the ask wants log-probabilities.
        completion: The whole, with its last piece.
    """

    index: int
    text: str
    tokens: tuple[Token, ...] = ()
    completion: Completion | None = None


class Backend(Protocol):
    """What makes tokens for the server.

    Attributes:
        name: "transformers", "vllm" or "upstream".
        model_name: Name under which the model itself is asked for.
        adapters: Names of the adapters that can be asked for.
        max_positions: Tokens that prompt and completion may have together.
        takes_requests: Whether constraints (Prompt.request) are obeyed while tokens are drawn.
    """

    name: str
    model_name: str

    @property
    def adapters(self) -> tuple[str, ...]: ...  # noqa: D102

    @property
    def max_positions(self) -> int: ...  # noqa: D102

    @property
    def takes_requests(self) -> bool: ...  # noqa: D102

    async def start(self) -> None:
        """Get ready; returns when the first completion can be asked for, or raises."""

    async def close(self) -> None:
        """Stop all work."""

    def is_ready(self) -> bool:
        """Tell whether a completion can be asked for."""

    def n_running(self) -> int:
        """Return how many completions are being drawn."""

    def n_waiting(self) -> int:
        """Return how many completions wait for their turn."""

    def pieces(self, ask: Ask) -> AsyncIterator[Piece]:
        """Yield the growing completions. Raises UserError, NotReady, BackendError."""

    def completions(self, asks: Sequence[Ask]) -> AsyncIterator[tuple[int, Completion]]:
        """Yield (position of the ask, completion) as they finish. Raises as `pieces` does."""
