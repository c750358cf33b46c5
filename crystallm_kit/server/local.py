"""The model in this process behind the server: ContinuousEngine's thread on one side, asyncio on the other.

    backend = LocalBackend(ContinuousEngine(model, tokenizer), model_name="crystallm-kit")
    async for piece in backend.pieces(ask): ...

The engine calls from its own thread, for every token. What it says is put in one inbox, and the event loop is
woken once for all that has come together. There tokens become text (never half a character), stop texts are
looked for across the borders of tokens, and a completion that holds one is taken from the engine at once.

What a client does not read is gathered, not queued: a piece holds all that came since the last one, so that a
slow client costs its own text and stalls nobody. Beyond `max_unread_tokens` its completions are dropped.

Not here: drawing tokens (engines/continuous.py), who may come in (admission.py).
"""

import asyncio
import collections
import functools
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from crystallm_kit.engines.continuous import ContinuousEngine
from crystallm_kit.engines.texts import Texts
from crystallm_kit.errors import UserError
from crystallm_kit.records import Completion
from crystallm_kit.server.backend import Ask, BackendError, NotReady, Piece, Token

log = logging.getLogger(__name__)
_REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no whole character yet


class LocalBackend:
    """A Backend over a ContinuousEngine.

    Args:
        engine: What draws the tokens; closed with the backend.
        model_name: Name under which the model itself is asked for.
        max_unread_tokens: Tokens of one ask that may wait for a client that does not read.
    """

    name = "transformers"

    def __init__(self, engine: ContinuousEngine, *, model_name: str, max_unread_tokens: int = 65_536) -> None:
        self.engine = engine
        self.model_name = model_name
        self.adapters = engine.adapters.names
        self.max_positions = engine.max_positions
        self.takes_requests = engine.has_wyckoff_ids
        self._most_unread = max_unread_tokens
        self._texts = _Texts(engine.tokenizer)
        self._inbox: _Inbox | None = None
        self._is_closed = False

    async def start(self) -> None:
        """Bind to the running event loop; the engine is ready as soon as it exists."""
        self._inbox = _Inbox(asyncio.get_running_loop())

    async def close(self) -> None:
        """Stop the engine; what still runs ends with NotReady."""
        self._is_closed = True
        await asyncio.to_thread(self.engine.close)

    def is_ready(self) -> bool:
        """Tell whether a completion can be asked for."""
        return self._inbox is not None and not self._is_closed

    def n_running(self) -> int:
        """Return how many completions are being drawn."""
        return self.engine.n_running

    def n_waiting(self) -> int:
        """Return how many completions wait for a slot."""
        return self.engine.n_waiting

    async def pieces(self, ask: Ask) -> AsyncGenerator[Piece, None]:
        """Yield the growing completions. Raises UserError, NotReady, BackendError."""
        stream = _Stream(self._ready_inbox(), self._told, most_unread=self._most_unread)
        try:
            self._submit(stream, ask, position=0, is_shown=True)
            async for _, piece in stream.arriving():
                yield piece
        finally:
            stream.cancel()

    async def completions(self, asks: Sequence[Ask]) -> AsyncGenerator[tuple[int, Completion], None]:
        """Yield (position of the ask, completion) as they finish. Raises as `pieces` does."""
        # whole completions alone wait here, so there is no bound but the number that was let in
        stream = _Stream(self._ready_inbox(), self._told, most_unread=None)
        try:
            for position, ask in enumerate(asks):
                self._submit(stream, ask, position=position, is_shown=bool(ask.stop))
            async for position, piece in stream.arriving():
                if piece.completion is not None:
                    yield position, piece.completion
        finally:
            stream.cancel()

    def _told(self, error: Exception) -> Exception:
        """Return what a client is told of an engine's error."""
        if self._is_closed:
            return NotReady("the server is stopping")
        if isinstance(error, UserError):
            return error
        log.error("the engine failed", exc_info=error)
        failed = BackendError("the engine failed in the middle of the request; the same one may work again")
        failed.__cause__ = error
        return failed

    def _ready_inbox(self) -> "_Inbox":
        if self._inbox is None or self._is_closed:
            raise NotReady("the model is not there yet" if self._inbox is None else "the server is stopping")
        return self._inbox

    def _submit(self, stream: "_Stream", ask: Ask, *, position: int, is_shown: bool) -> None:
        """Ask the engine for an ask's completions; `is_shown`: token by token."""
        ids = list(self._texts.prompt_ids(ask))
        for index in range(ask.n):
            growth = _Growth(ask, index, position, self._texts)
            stream.open(growth)
            put = functools.partial(stream.inbox.put, stream, growth)
            growth.ticket = self.engine.submit(
                ask.prompt,
                ask.sampling,
                index=ask.first_index + index,
                prompt_ids=ids,
                n_top=ask.n_top,
                on_token=(lambda *token, put=put: put(token)) if is_shown else None,
                on_done=put,
            )


class _Inbox:
    """What the engine's thread says, taken out by the event loop; one wake-up for many tokens."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._said: collections.deque[tuple[_Stream, _Growth, Any]] = collections.deque()
        self._is_woken = False

    def put(self, stream: "_Stream", growth: "_Growth", said: Any) -> None:
        """Take something in; from any thread."""
        self._said.append((stream, growth, said))
        # Two threads that both see False wake the loop twice, which harms nothing; none can see True and
        # leave its word behind, because the flag falls before the deque is emptied.
        if not self._is_woken:
            self._is_woken = True
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._is_woken = False
        touched: dict[int, _Stream] = {}
        for _ in range(len(self._said)):
            stream, growth, said = self._said.popleft()
            stream.take(growth, said)
            touched[id(stream)] = stream
        for stream in touched.values():
            stream.arrived.set()
        if self._said and not self._is_woken:
            self._is_woken = True
            self._loop.call_soon(self._deliver)


class _Stream:
    """The completions of one call, and what came of them that nobody has read yet."""

    def __init__(
        self, inbox: _Inbox, told: Callable[[Exception], Exception], *, most_unread: int | None
    ) -> None:
        self.inbox = inbox
        self._told = told
        self.arrived = asyncio.Event()
        self._most_unread = most_unread
        self._growths: list[_Growth] = []
        self._touched: dict[int, _Growth] = {}
        self._n_open = 0
        self._n_unread = 0
        self._error: Exception | None = None

    def open(self, growth: "_Growth") -> None:
        """Add a completion."""
        self._growths.append(growth)
        self._n_open += 1

    def take(self, growth: "_Growth", said: Any) -> None:
        """Take a token, a completion or an exception of the engine; in the event loop."""
        if growth.is_done or self._error is not None:
            return
        if isinstance(said, Exception):
            self._fail(self._told(said))
            return
        if isinstance(said, Completion):
            growth.end(said)
        else:
            if growth.grow(*said):
                growth.cancel()
        self._touched[id(growth)] = growth
        growth.n_new += 1
        self._n_unread += 1
        if self._most_unread is not None and self._n_unread > self._most_unread:
            self._fail(
                BackendError(f"{self._n_unread} tokens were left unread; read faster, or ask for fewer")
            )

    def _fail(self, error: Exception) -> None:
        self._error = error
        self.cancel()

    async def arriving(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """Yield (position of the ask, piece), until all completions have ended."""
        while self._n_open:
            await self.arrived.wait()
            self.arrived.clear()
            while self._touched:
                self._raise_failure()
                # taken out one by one: what a slow reader has not come to goes on gathering
                growth = self._touched.pop(next(iter(self._touched)))
                self._n_unread -= growth.n_new
                growth.n_new = 0
                piece = growth.piece()
                if piece is not None:
                    self._n_open -= piece.completion is not None
                    yield growth.position, piece
            self._raise_failure()

    def _raise_failure(self) -> None:
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        """Take from the engine what is not done."""
        for growth in self._growths:
            growth.cancel()


@dataclass
class _Growth:
    """One completion while it grows: its text as far as it is certain, and what of it is unread."""

    ask: Ask
    index: int
    position: int
    texts: "_Texts"
    ticket: Any = None
    is_done: bool = False
    n_new: int = 0  # tokens since it was last read
    _ids: list[int] = field(default_factory=list)
    _log_probability: float = 0.0
    _text: str = ""  # of all tokens so far
    _n_shown: int = 0  # characters of it that were yielded
    _pending: list[tuple[int, Token]] = field(default_factory=list)  # (where its text ends, token)
    _completion: Completion | None = None
    _decoder: Callable[[int], str] | None = None

    def grow(self, id: int, log_probability: float, top: Sequence[tuple[int, float]]) -> bool:
        """Take one token; tell whether a stop text came up, with which the completion is done."""
        if self._decoder is None:
            self._decoder = self.texts.decoder(self.ask)
        self._ids.append(id)
        self._log_probability += log_probability
        before = len(self._text)
        self._text += self._decoder(id)
        if self.ask.n_top is not None:
            others = tuple((self.texts.of(i), value) for i, value in top)
            self._pending.append((len(self._text), Token(id, self.texts.of(id), log_probability, others)))
        place = _first_stop(self._text, before, self.ask.stop)
        if place is not None:
            self._text = self._text[: max(place, self._n_shown)]
            # a token that only wrote what is cut off is none of the completion's
            self._pending = [(end, token) for end, token in self._pending if end <= place]
            self.is_done = True
            self._completion = Completion(
                self.ask.prompt.text, self._text, tuple(self._ids), "stop", self._log_probability,
                self.ask.sampling.seed, self.ask.first_index + self.index,
            )  # fmt: skip
        return self.is_done

    def end(self, completion: Completion) -> None:
        """Take the whole completion from the engine; its text is the last word, where it goes on from ours.

        Bytes that are no character read differently one by one and together; what was shown stays.
        """
        text = self.texts.without_end(completion)
        text = text if text.startswith(self._text[: self._n_shown]) else self._text
        self._text = text
        self.is_done = True
        self._completion = Completion(
            completion.prompt, text, completion.token_ids, completion.stop_reason,
            completion.log_probability, completion.seed, self.ask.first_index + self.index,
        )  # fmt: skip

    def piece(self) -> Piece | None:
        """Return what can be shown and was not; None where there is nothing."""
        end = len(self._text)
        if not self.is_done:
            end -= _n_held(self._text, self.ask.stop)
        text = self._text[self._n_shown : end]
        self._n_shown = max(self._n_shown, end)
        if self.is_done:
            tokens, self._pending = tuple(token for _, token in self._pending), []
        else:
            ready = sum(place <= end for place, _ in self._pending)
            tokens, self._pending = tuple(t for _, t in self._pending[:ready]), self._pending[ready:]
        if not text and not tokens and not self.is_done:
            return None
        return Piece(self.index, text, tokens, self._completion)

    def cancel(self) -> None:
        """Take it from the engine, if it is there."""
        if self.ticket is not None:
            self.ticket.cancel()
            self.ticket = None


class _Texts:
    """The texts of tokens one by one, of one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._whole = Texts(tokenizer)
        self._end_id = tokenizer.eos_token_id
        self._is_of_a_format = self._whole.is_of_a_format
        self._alone: dict[int, str] = {}

    def prompt_ids(self, ask: Ask) -> tuple[int, ...]:
        """Return the token ids of an ask's prompt. Raises ParseError for text that the model cannot read."""
        if ask.prompt_ids is not None:
            return ask.prompt_ids
        return tuple(self._whole.prompt_ids(ask.prompt.text))

    def of(self, id: int) -> str:
        """Return one token's text, as it is alone."""
        if id not in self._alone:
            self._alone[id] = self._whole.token_text(id)
        return self._alone[id]

    def without_end(self, completion: Completion) -> str:
        """Return a completion's text without that of an end token, as engines elsewhere give it."""
        ids, text = completion.token_ids, completion.text
        if not self._is_of_a_format or not ids or ids[-1] != self._end_id:
            return text  # a base model's has none (engines/continuous.py)
        return text.removesuffix(self.of(ids[-1]))

    def decoder(self, ask: Ask) -> Callable[[int], str]:
        """Return a function from the next token to the text it adds; "" while a character is not whole."""
        if self._is_of_a_format:
            return lambda id: "" if id == self._end_id else self.of(id)
        return _PrefixDecoder(self._tokenizer, self.prompt_ids(ask)).add


class _PrefixDecoder:
    """Text token by token for tokenizers whose tokens' texts depend on what stands before them.

    The text of a few tokens is compared with and without the new one, as vLLM and text-generation-inference
    do; what came before the last whole character is left behind, so a step costs the same however long the
    text is.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._end_id = tokenizer.eos_token_id
        self._ids = list(before[-8:])
        self._from, self._read = 0, len(self._ids)

    def add(self, id: int) -> str:
        """Return the text that a token adds."""
        if id == self._end_id:
            return ""
        self._ids.append(id)
        known = self._decode(self._ids[self._from : self._read])
        whole = self._decode(self._ids[self._from :])
        if len(whole) <= len(known) or whole.endswith(_REPLACEMENT):
            return ""
        self._ids = self._ids[self._read :]
        self._from, self._read = 0, len(self._ids)
        return whole[len(known) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))


def _first_stop(text: str, n_old: int, stops: Sequence[str]) -> int | None:
    """Return where the first stop text begins that ends beyond the first `n_old` characters."""
    places = [text.find(stop, max(0, n_old - len(stop) + 1)) for stop in stops]
    found = [place for place in places if place >= 0]
    return min(found) if found else None


def _n_held(text: str, stops: Sequence[str]) -> int:
    """Return how many characters at the end may be the beginning of a stop text."""
    return max(
        (
            n
            for stop in stops
            for n in range(min(len(stop) - 1, len(text)), 0, -1)
            if stop.startswith(text[-n:])
        ),
        default=0,
    )
