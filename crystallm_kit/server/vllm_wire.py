"""What goes over the wire to a vLLM server and comes back: asks as JSON bodies, answers as completions.

    wire = Wire(tokenizer, max_positions=512)
    path, body = wire.body(ask, model="crystallm-kit", takes_tokens=True)
    wire.whole(ask, answer)                 the completions of a whole answer
    growth = wire.growths(ask); growth[0].add(choice)      those of a stream, chunk by chunk

Two of vLLM's routes are spoken. `/inference/v1/generate` takes and gives token ids and detokenises nothing,
which is what costs its server most (0.26 has it always, 0.32 with --enable-scale-out). `/v1/completions` is
the other, for texts that end a completion, and where the first is missing; it gives token ids too, so the
text of every completion is made here, from its ids, in one way.

Seeds: of a request with a seed and n > 1, vLLM gives child i the seed plus i (ParentRequest). So the seed
sent is a hash of the caller's, plus the position of the first completion: a draw depends on (seed, position)
alone, however completions are spread over requests and servers, and neighbouring seeds share no draws.

Log-probabilities are asked of servers that run with --logprobs-mode processed_logits and the constraint
(engines/vllm_constraint.py), which gives log p / temperature; the temperature is put back here.

Not here: which server, connections, failures (upstream.py); constraints (engines/vllm_constraint.py).
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from crystallm_kit.engines.engine import Prompt, Sampling
from crystallm_kit.engines.texts import Texts
from crystallm_kit.errors import UserError
from crystallm_kit.records import Completion, StopReason
from crystallm_kit.server.backend import Ask, BackendError, Piece, Token
from crystallm_kit.text.wyckoff import NumberLine
from crystallm_kit.tokens.requests import Request, request_to_json

TOKENS_ROUTE = "/inference/v1/generate"
TEXT_ROUTE = "/v1/completions"
_FINAL_ONLY, _DELTA = 2, 1  # vllm.sampling_params.RequestOutputKind; 0.26 leaves it to the client
_COLDEST = 0.01  # what vLLM samples at all; at 0 it takes the likeliest token, and numbers have no choice


class Wire:
    """Asks to bodies and answers to completions, for one tokenizer.

    Args:
        tokenizer: The model's; a format's own or a base model's.
        max_positions: Tokens that prompt and completion may have together.
        stop: Text that ends a completion of a model without an end token, and is part of it; "": none.
    """

    def __init__(self, tokenizer: Any, *, max_positions: int, stop: str = "") -> None:
        self.tokenizer = tokenizer
        self.max_positions = max_positions
        self.stop = stop
        self.cut = Texts(tokenizer)
        self.is_of_a_format = self.cut.is_of_a_format
        self.end_id = -1 if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)
        self._prompt_ids = lru_cache(maxsize=1024)(lambda text: tuple(self.cut.prompt_ids(text)))
        self._given_ids = lru_cache(maxsize=1024)(
            lambda beginning: tuple(self.cut.given_ids(Prompt("", beginning)))
        )

    def prompt_ids(self, ask: Ask) -> tuple[int, ...]:
        """Return the ids that the model gets as the prompt.

        Raises:
            UserError: If there are none, or they leave no room for a completion.
        """
        ids = self._prompt_ids(ask.prompt.text) if ask.prompt_ids is None else ask.prompt_ids
        if not ids:
            raise UserError("an empty prompt; a model goes on from at least one token")
        if len(ids) >= self.max_positions:
            raise UserError(f"a prompt of {len(ids)} tokens; the model has {self.max_positions} positions")
        if max(ids) >= len(self.tokenizer) or min(ids) < 0:
            raise UserError(f"a prompt with a token id beyond the model's {len(self.tokenizer)} tokens")
        return ids

    def check(self, ask: Ask) -> None:
        """Raise UserError for what cannot be asked."""
        if ask.n < 1:
            raise UserError(f"n {ask.n}: 1 or more expected")
        if ask.prompt.is_whole:
            raise UserError("a whole answer is scored by an engine of this process, not by a vLLM server")
        self.prompt_ids(ask)
        self._beginning(ask)

    def body(self, ask: Ask, *, model: str, takes_tokens: bool, stream: bool = False) -> tuple[str, bytes]:
        """Return (route, JSON) that asks for `ask.n` completions in one request."""
        prompt, beginning = self.prompt_ids(ask), self._beginning(ask)
        constrained = ask.prompt.request is not None
        given = prompt if constrained else (*prompt, *beginning)
        room = self.max_positions - len(given)
        if room < 1:
            raise UserError(f"a prompt and a beginning of {len(given)} tokens leave no room")
        sampling = ask.sampling
        stops = [text for text in (self.stop, *ask.stop) if text]
        common: dict[str, Any] = {
            "n": ask.n,
            "temperature": _temperature(sampling),
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "max_tokens": min(sampling.max_new_tokens, room),
            "skip_special_tokens": False,
        }
        if ask.is_seeded:
            common["seed"] = seed_base(sampling.seed) + ask.first_index
        if ask.n_top is not None:
            common["logprobs"] = ask.n_top
        extra = self._arguments(ask, beginning)
        if takes_tokens and not stops:
            common |= {"detokenize": False, "output_kind": _DELTA if stream else _FINAL_ONLY}
            if extra:
                common["extra_args"] = extra
            body = {"model": model, "token_ids": given, "sampling_params": common, "stream": stream}
            return TOKENS_ROUTE, json.dumps(body).encode()
        body = {"model": model, "prompt": given, "stream": stream, **common}
        body |= {"add_special_tokens": False, "spaces_between_special_tokens": False}
        body |= {"return_token_ids": True, "return_tokens_as_token_ids": True}
        if stops:
            body |= {"stop": stops, "include_stop_str_in_output": True}
        if extra:
            body["vllm_xargs"] = extra
        return TEXT_ROUTE, json.dumps(body).encode()

    def whole(self, ask: Ask, answer: Mapping[str, Any]) -> list[Completion]:
        """Return the completions of a whole answer, in order. Raises BackendError."""
        growths = self.growths(ask)
        for choice in answer.get("choices") or ():
            growths[_index(choice, ask)].add(choice)
        found = [growth.completion for growth in growths]
        if None in found:
            raise BackendError(f"asked for {ask.n} completions, got {len(found) - found.count(None)}")
        return [completion for completion in found if completion is not None]

    def growths(self, ask: Ask) -> "list[Growth]":
        """Return what the ask's completions grow in."""
        beginning = () if ask.prompt.request is not None else self._beginning(ask)
        return [
            Growth(self, ask, index, ids=list(beginning), n_given=len(beginning)) for index in range(ask.n)
        ]

    def text_of(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """Return the text of a completion's ids, without that of an end token."""
        kept = ids[:-1] if ids and ids[-1] == self.end_id else ids
        return self.cut.text_of(prompt, kept)

    def _beginning(self, ask: Ask) -> tuple[int, ...]:
        return self._given_ids(ask.prompt.beginning) if ask.prompt.beginning else ()

    def _arguments(self, ask: Ask, beginning: Sequence[int]) -> dict[str, Any]:
        """Return what the constraint in the server is told."""
        extra: dict[str, Any] = {}
        if ask.prompt.request is not None:
            extra["crystal"] = _request_json(ask.prompt.request)
            if beginning:
                extra["crystal_beginning"] = list(beginning)
            if ask.sampling.number_temperature is not None:
                extra["crystal_number_temperature"] = max(ask.sampling.number_temperature, _COLDEST)
        if ask.n_top is not None:
            extra["crystal_log_softmax"] = 1
        return extra


@dataclass
class Growth:
    """One completion while its tokens come in.

    Attributes:
        wire, ask, index: Where it belongs.
        ids: Tokens so far.
        n_given: So many of them were given, not drawn.
        text: Text that was shown so far; what may belong to a stop text is held back.
        completion: The whole, once it has ended.
    """

    wire: Wire
    ask: Ask
    index: int
    ids: list[int] = field(default_factory=list)
    n_given: int = 0
    text: str = ""
    completion: Completion | None = None
    _log_probability: float = 0.0
    _numbers: NumberLine = field(default_factory=NumberLine)

    def add(self, choice: Mapping[str, Any]) -> Piece | None:
        """Take one choice of an answer or of a stream's chunk; return what became visible, if anything.

        Raises:
            BackendError: If it is no choice of a vLLM server, or tells that the server failed.
        """
        if self.completion is not None:
            return None
        new = choice.get("token_ids")
        reason = choice.get("finish_reason")
        if not isinstance(new, list) or reason in ("abort", "error"):
            raise BackendError(f"the server ended a completion with {reason!r}")
        self.ids += new
        tokens = self._tokens(new, choice.get("logprobs"))
        if reason is None and not new:
            return None
        before = self.text
        ended = self._grow(is_last=reason is not None)
        if reason is not None or ended:
            self.completion = self._completion("length" if reason == "length" and not ended else "stop")
        return Piece(self.index, self.text[len(before) :], tokens, self.completion)

    def _grow(self, *, is_last: bool) -> bool:
        """Show what can be shown; tell whether a stop text came up, which is left out."""
        prompt = () if self.wire.is_of_a_format else self.wire.prompt_ids(self.ask)
        whole = self.wire.text_of(prompt, self.ids)
        places = [place for stop in self.ask.stop if stop and (place := whole.find(stop)) >= 0]
        if places:
            self.text = whole[: max(min(places), len(self.text))]
            return True
        n_held = 0 if is_last else max(map(len, self.ask.stop), default=1) - 1
        shown = whole[: len(whole) - n_held]
        if not is_last and shown.endswith("\ufffd"):  # bytes of a letter that is not whole yet
            shown = shown.rstrip("\ufffd")
        if len(shown) > len(self.text):
            self.text = shown
        return False

    def _completion(self, reason: StopReason) -> Completion:
        ask = self.ask
        known = ask.n_top is not None and not self.n_given
        return Completion(
            ask.prompt.text, self.text, tuple(self.ids), reason,
            self._log_probability if known else math.nan, ask.sampling.seed, ask.first_index + self.index,
        )  # fmt: skip

    def _tokens(self, ids: Sequence[int], answer: Any) -> tuple[Token, ...]:
        """Return the new tokens with their log-probabilities, where they are asked for."""
        if self.ask.n_top is None:
            return ()
        if not isinstance(answer, Mapping):
            raise BackendError("the server gave no log-probabilities, which were asked for")
        found = []
        for id, (value, top) in zip(ids, _log_probabilities(answer), strict=True):
            scale = self._temperature_of(id)
            self._log_probability += value * scale
            others = tuple((self.wire.cut.token_text(i), v * scale) for i, v in top)[: self.ask.n_top]
            found.append(Token(id, self.wire.cut.token_text(id), value * scale, others))
        return tuple(found)

    def _temperature_of(self, id: int) -> float:
        """Return the temperature that a token was drawn at."""
        sampling = self.ask.sampling
        numbers = sampling.number_temperature if self.ask.prompt.request is not None else None
        if numbers is not None and self._numbers.holds(self.wire.cut.token_text(id)):
            return max(numbers, _COLDEST)
        return _temperature(sampling) or 1.0


def calls(asks: Sequence[Ask], *, most: int) -> Iterator[tuple[Ask, list[int]]]:
    """Yield (an ask for at most `most` completions, position in `asks` of each of them).

    Neighbours that are equal but for their first index are asked for together: n samples of one prompt cost a
    server much less than n requests.
    """
    together: list[tuple[int, int]] = []  # (position, index) of each completion

    def drained() -> Iterator[tuple[Ask, list[int]]]:
        for start in range(0, len(together), most):
            part = together[start : start + most]
            ask = replace(asks[part[0][0]], n=len(part), first_index=part[0][1])
            yield ask, [position for position, _ in part]

    for position, ask in enumerate(asks):
        if together:
            last = asks[together[-1][0]]
            follows = not ask.is_seeded or ask.first_index == together[-1][1] + 1
            if not (follows and replace(ask, n=1, first_index=0) == replace(last, n=1, first_index=0)):
                yield from drained()
                together = []
        together += [(position, ask.first_index + i) for i in range(ask.n)]
    yield from drained()


def _index(choice: Mapping[str, Any], ask: Ask) -> int:
    index = choice.get("index")
    if not isinstance(index, int) or not 0 <= index < ask.n:
        raise BackendError(f"the server answered with a choice {index!r} of {ask.n}")
    return index


def choices_of(chunk: Mapping[str, Any], ask: Ask) -> Iterable[tuple[int, Mapping[str, Any]]]:
    """Yield (index, choice) of one chunk of a stream. Raises BackendError if it tells of a failure."""
    if "error" in chunk:
        raise BackendError(f"the server failed: {message_of(chunk)}")
    for choice in chunk.get("choices") or ():
        yield _index(choice, ask), choice


def message_of(answer: Any) -> str:
    """Return what an error answer says, in one line."""
    error = answer.get("error", answer) if isinstance(answer, Mapping) else answer
    said = error.get("message", error) if isinstance(error, Mapping) else error
    return " ".join(str(said).split())[:300]


def _log_probabilities(answer: Mapping[str, Any]) -> Iterator[tuple[float, list[tuple[int, float]]]]:
    """Yield (log-probability, [(token id, log-probability) of alternatives]) for each token.

    Three shapes: /v1/completions; 0.26's tokens ("token": "token_id:7"); 0.32's ("token_id": 7).
    """
    if "content" in answer:
        for entry in answer["content"] or ():
            top = entry.get("top_logprobs") or ()
            yield float(entry["logprob"]), [(_id(other), float(other["logprob"])) for other in top]
        return
    tops = answer.get("top_logprobs") or [None] * len(answer.get("token_logprobs") or ())
    for value, top in zip(answer.get("token_logprobs") or (), tops, strict=True):
        others = [(_id({"token": name}), float(v)) for name, v in (top or {}).items()]
        yield (-math.inf if value is None else float(value)), others


def _id(entry: Mapping[str, Any]) -> int:
    if "token_id" in entry:
        return int(entry["token_id"])
    return int(str(entry["token"]).removeprefix("token_id:"))


def is_greedy(ask: Ask) -> bool:
    """Tell whether all completions of an ask are the same one; vLLM refuses n > 1 for those."""
    return _temperature(ask.sampling) == 0


def _temperature(sampling: Sampling) -> float:
    return max(sampling.temperature, _COLDEST) if sampling.number_temperature else sampling.temperature


def seed_base(seed: int) -> int:
    """Return a number of 62 bits, so that the sum with a position fits vLLM's 64 with their sign."""
    return int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=8).digest(), "big") >> 2


@lru_cache(maxsize=1024)
def _request_json(request: Request) -> str:
    return request_to_json(request)
