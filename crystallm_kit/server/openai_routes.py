"""GET /v1/models, GET /v1/models/{id}, POST /v1/completions, as OpenAI has them.

    curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\
        -d '{"model": "crystallm-kit", "conditions": {"formula": "NaCl"}, "n": 2}'

Where the tokens are made by another server that speaks the same language, a checked request is passed on as
it is, and the answer's bytes come back untouched.

Not here: what a body means (asks.py), chat (chat.py), crystals (crystals.py).
"""

import asyncio
import contextlib
import itertools
import json
import re
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request, Response

from crystallm_kit.records import Completion
from crystallm_kit.server.asks import Job, completion_job, merged
from crystallm_kit.server.backend import BackendError, Piece, Token
from crystallm_kit.server.failures import Refusal, unknown_model
from crystallm_kit.server.shapes import (
    CompletionAnswer,
    CompletionRequest,
    ModelCard,
    ModelList,
    StrictRoute,
    errors,
    usage,
)
from crystallm_kit.server.state import ServerState, State
from crystallm_kit.server.streaming import (
    DONE,
    answered,
    event,
    event_stream,
    json_response,
    stream_content,
)
from crystallm_kit.tokens.requests import request_to_json

router = APIRouter(route_class=StrictRoute)
_LONG_BODY = 20_000  # bytes
STARTED = int(time.time())
_STREAM = stream_content('data: {"object": "text_completion", "choices": [...]}\n\ndata: [DONE]\n\n')


@router.get("/v1/models", response_model=ModelList, responses=errors(401, 500), tags=["OpenAI"])
async def models(state: State) -> Response:
    """List the model and its adapters."""
    cards = [_card(name, state) for name in state.model_names()]
    return json_response({"object": "list", "data": cards})


@router.get("/v1/models/{model}", response_model=ModelCard, responses=errors(401, 404, 500), tags=["OpenAI"])
async def model_card(model: str, state: State) -> Response:
    """Tell of one model."""
    if model not in state.model_names():
        raise unknown_model(model, state.model_names())
    return json_response(_card(model, state))


def _card(name: str, state: ServerState) -> dict[str, Any]:
    base = state.backend.model_name
    return {
        "id": name,
        "object": "model",
        "created": STARTED,
        "owned_by": "crystallm-kit",
        "parent": None if name == base else base,
        "max_model_len": state.backend.max_positions,
    }


@router.post(
    "/v1/completions",
    response_model=CompletionAnswer,
    responses={200: {"content": _STREAM}, **errors()},
    tags=["OpenAI"],
)
async def completions(body: CompletionRequest, request: Request, state: State) -> Response:
    """Go on with one prompt or several; constrained where conditions are given."""
    # a long body is cut beside the event loop, which others wait for
    is_long = int(request.headers.get("content-length", _LONG_BODY)) >= _LONG_BODY
    job = await asyncio.to_thread(completion_job, body, state) if is_long else completion_job(body, state)
    if _can_be_passed_on(body, job, state):
        return await _relayed(body, job, request, state)
    if body.stream:
        return await event_stream(request, state, _events(body, job, state))
    return json_response(await answered(request, _answer(body, job, state)))


# ---------------------------------------------------------------- whole answers


async def _answer(body: CompletionRequest, job: Job, state: ServerState) -> dict[str, Any]:
    grown = {
        (position, index): _Choice(position * ask.n + index, job, position)
        for position, ask in enumerate(job.asks)
        for index in range(ask.n)
    }
    with state.admission.admit(job.n_completions) as place:
        if body.logprobs is None:
            async for position, completion in state.backend.completions(job.asks):
                index = completion.index - job.asks[position].first_index
                grown[position, index].add(Piece(index, completion.text, (), completion))
                place.finished()
        else:
            async with contextlib.aclosing(merged(state.backend, job.asks)) as pieces:
                async for position, piece in pieces:
                    grown[position, piece.index].add(piece)
                    place.finished(piece.completion is not None)
    choices = list(grown.values())
    _count(job, [choice.ended() for choice in choices], state)
    return {
        **_head(job, state),
        "choices": [choice.whole(body) for choice in choices],
        "usage": usage(job.n_prompt_tokens, sum(choice.n_tokens for choice in choices)),
    }


def _head(job: Job, state: ServerState) -> dict[str, Any]:
    return {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": job.model,
        "system_fingerprint": state.fingerprint,
    }


def _count(job: Job, completions: Sequence[Completion], state: ServerState) -> None:
    state.metrics.count_tokens(
        prompt=job.n_prompt_tokens, completion=sum(len(c.token_ids) for c in completions)
    )
    for completion in completions:
        state.metrics.completions.labels(completion.stop_reason).inc()


@dataclass
class _Choice:
    """One completion of an answer while it grows: what the prompt already holds of it is left out."""

    index: int
    job: Job
    position: int
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    completion: Completion | None = None
    _seen: int = 0  # characters, tokens that came, those left out included
    _seen_tokens: int = 0

    def add(self, piece: Piece) -> tuple[str, tuple[Token, ...]]:
        """Take a piece; return what of it is new to the client."""
        n_tokens, n_characters = self.job.given[self.position]
        text = piece.text[max(0, n_characters - self._seen) :]
        tokens = piece.tokens[max(0, n_tokens - self._seen_tokens) :]
        self._seen += len(piece.text)
        self._seen_tokens += len(piece.tokens)
        self.text += text
        self.tokens += tokens
        self.completion = piece.completion or self.completion
        return text, tokens

    def ended(self) -> Completion:
        """Return the completion. Raises BackendError if the backend gave none."""
        if self.completion is None:
            raise BackendError(f"completion {self.index} was lost")
        if self.completion.stop_reason == "error":
            raise BackendError(f"completion {self.index} failed")
        return self.completion

    @property
    def token_ids(self) -> list[int]:
        """Ids of what was drawn."""
        return list(self.ended().token_ids[self.job.given[self.position][0] :])

    @property
    def n_tokens(self) -> int:
        """How many tokens were drawn."""
        return len(self.token_ids)

    def prompt(self) -> str:
        """Return the prompt as text, what was given of the crystal included."""
        return self.job.texts[self.position]

    def whole(self, body: CompletionRequest) -> dict[str, Any]:
        """Return the choice of a whole answer."""
        choice: dict[str, Any] = {
            "index": self.index,
            "text": (self.prompt() if body.echo else "") + self.text,
            "logprobs": None if body.logprobs is None else _logprobs(self.tokens, body.logprobs, 0),
            "finish_reason": self.ended().stop_reason,
        }
        if body.return_token_ids:
            choice["token_ids"] = self.token_ids
            choice["prompt_token_ids"] = list(self.job.prompt_ids[self.position])
        return choice


def _logprobs(tokens: Sequence[Token], n_top: int, offset: int) -> dict[str, Any]:
    """Return log-probabilities in the shape of completions; `offset`: characters of text before them."""
    starts = itertools.accumulate((len(token.text) for token in tokens), initial=offset)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.log_probability for token in tokens],
        "top_logprobs": [dict(token.top) for token in tokens] if n_top else None,
        "text_offset": list(itertools.islice(starts, len(tokens))),
    }


# ---------------------------------------------------------------- streams


async def _events(body: CompletionRequest, job: Job, state: ServerState) -> AsyncGenerator[bytes, None]:
    """Yield the chunks of a streamed answer."""
    began, head = time.monotonic(), _head(job, state)
    with_usage = bool(body.stream_options and body.stream_options.include_usage)
    grown: dict[int, _Choice] = {}
    offsets: dict[int, int] = {}
    with state.admission.admit(job.n_completions) as place:
        async with contextlib.aclosing(merged(state.backend, job.asks)) as pieces:
            async for position, piece in pieces:
                index = position * job.asks[position].n + piece.index
                is_first = index not in grown
                choice = grown.setdefault(index, _Choice(index, job, position))
                text, tokens = choice.add(piece)
                if not (text or tokens or piece.completion or (is_first and body.echo)):
                    continue
                if len(grown) == 1 and is_first:
                    state.metrics.first_token_seconds.labels("/v1/completions").observe(
                        time.monotonic() - began
                    )
                choice.tokens.clear()  # they are sent; only the text is still needed
                chunk: dict[str, Any] = {
                    "index": index,
                    "text": (choice.prompt() if is_first and body.echo else "") + text,
                    "logprobs": None,
                    "finish_reason": choice.ended().stop_reason if piece.completion else None,
                }
                if body.logprobs is not None:
                    chunk["logprobs"] = _logprobs(tokens, body.logprobs, offsets.get(index, 0))
                    offsets[index] = offsets.get(index, 0) + sum(len(token.text) for token in tokens)
                if body.return_token_ids:
                    chunk["token_ids"] = [token.id for token in tokens]
                    if is_first:
                        chunk["prompt_token_ids"] = list(job.prompt_ids[position])
                data = {**head, "choices": [chunk]}
                yield event({**data, "usage": None} if with_usage else data)
                place.finished(piece.completion is not None)
    _count(job, [choice.ended() for choice in grown.values()], state)
    if with_usage:
        n_tokens = sum(choice.n_tokens for choice in grown.values())
        yield event({**head, "choices": [], "usage": usage(job.n_prompt_tokens, n_tokens)})
    yield DONE


# ---------------------------------------------------------------- passed on


def _can_be_passed_on(body: CompletionRequest, job: Job, state: ServerState) -> bool:
    """Tell whether a server behind answers as we would.

    Log-probabilities come from it divided by the temperature; of several prompts with a seed, it draws all by
    the same numbers; and it refuses n > 1 at temperature 0.
    """
    ask = job.asks[0]
    is_plain = body.logprobs is None and not state.model_stop
    is_plain = is_plain and (len(job.asks) == 1 or not ask.is_seeded)
    is_plain = is_plain and (ask.n == 1 or ask.sampling.temperature > 0)
    return hasattr(state.backend, "relay") and is_plain


async def _relayed(body: CompletionRequest, job: Job, request: Request, state: ServerState) -> Response:
    """Pass the request on to the server behind, and its answer back as it comes."""
    sent = json.dumps(_body_for_vllm(body, job)).encode()
    if body.stream:
        return await event_stream(request, state, _relayed_bytes(sent, job, state))

    async def whole() -> bytes:
        async with contextlib.aclosing(_relayed_bytes(sent, job, state)) as data:
            return b"".join([chunk async for chunk in data])

    return Response(await answered(request, whole()), media_type="application/json")


async def _relayed_bytes(sent: bytes, job: Job, state: ServerState) -> AsyncGenerator[bytes, None]:
    """Yield the answer's bytes. Raises BackendError, or the refusal of the server behind, in our shape."""
    backend: Any = state.backend
    tail = b""
    with state.admission.admit(job.n_completions) as place:
        status, _, data = await backend.relay("/v1/completions", sent)
        async with contextlib.aclosing(data) as chunks:
            if status != 200:
                raise _refusal(status, b"".join([chunk async for chunk in chunks]))
            async for chunk in chunks:
                tail = (tail + chunk)[-2_000:]
                yield chunk
        place.finished(job.n_completions)
    counts = re.findall(rb'"completion_tokens":\s*(\d+)', tail)
    state.metrics.count_tokens(prompt=job.n_prompt_tokens, completion=int(counts[-1]) if counts else 0)


def _body_for_vllm(body: CompletionRequest, job: Job) -> dict[str, Any]:
    """Return the body as a vLLM server takes it: defaults said aloud, conditions compiled."""
    ask = job.asks[0]
    sampling = ask.sampling
    sent = body.model_dump(
        exclude_none=True, exclude={"conditions", "user", "best_of", "logit_bias", "suffix"}
    )
    sent |= {
        "model": job.model,
        "prompt": body.prompt if body.prompt is not None else job.texts[0],
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        # every prompt of a request has one bound there: that of the longest
        "max_tokens": min(
            a.sampling.max_new_tokens - given for a, (given, _) in zip(job.asks, job.given, strict=True)
        ),
    }
    if ask.is_seeded:
        sent["seed"] = sampling.seed
    if body.stream:
        sent["stream_options"] = {
            "include_usage": bool(body.stream_options and body.stream_options.include_usage)
        }
    if ask.prompt.request is not None:
        extra = {"crystal": request_to_json(ask.prompt.request)}
        sent["vllm_xargs"] = {**sent.get("vllm_xargs", {}), **extra}
        if sampling.number_temperature is not None:
            sent["vllm_xargs"]["crystal_number_temperature"] = sampling.number_temperature
    return sent


def _refusal(status: int, content: bytes) -> Exception:
    """Return the error of a server behind that refused or failed."""
    try:
        error = json.loads(content)
        error = error.get("error", error)
        words = " ".join(str(error.get("message", error)).split())[:500]
        param = error.get("param")
    except (ValueError, AttributeError):
        words, param = content[:200].decode(errors="replace"), None
    if status in (400, 413, 422):
        return Refusal(400, words, param=param if isinstance(param, str) else None)
    return BackendError(f"the engine answered {status}: {words}")
