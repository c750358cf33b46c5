"""The body of a completion request -> what the backend is asked, checked against every limit.

    job = completion_job(body, state)
    job.asks[0]     Ask(prompt=Prompt("crystal Na Cl ...", request=...), n=2, ...)

One Ask for each prompt; the completions of a request are numbered through, prompt by prompt, and with the
seed that number determines every draw.

Not here: HTTP, admission (openai_routes.py); Conditions in words (chat.py).
"""

import asyncio
import contextlib
import dataclasses
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from crystallm_kit.engines.engine import Prompt, Sampling
from crystallm_kit.errors import UserError
from crystallm_kit.records import Conditions
from crystallm_kit.server.backend import Ask, Backend, Piece
from crystallm_kit.server.failures import Refusal, code_of, unknown_model
from crystallm_kit.server.shapes import CompletionRequest, ConstraintArguments, DrawingFields, refuse
from crystallm_kit.server.state import ServerState
from crystallm_kit.text.conditions import conditions_from_dict
from crystallm_kit.tokens.requests import Request, request_from_json

_LARGEST_SEED = 2**63


@dataclass(frozen=True)
class Job:
    """A request for completions, ready to be asked.

    Attributes:
        model: Name of the model, as the answer repeats it.
        asks: One for each prompt.
        texts: The prompts as text; "" where a prompt came as token ids and is not wanted back.
        prompt_ids: The prompts as token ids, what was given of the crystal included.
        given: For each prompt, (token ids, characters) of it that the backend counts to the completion.
    """

    model: str
    asks: tuple[Ask, ...]
    texts: tuple[str, ...]
    prompt_ids: tuple[tuple[int, ...], ...]
    given: tuple[tuple[int, int], ...]

    @property
    def n_completions(self) -> int:
        """Completions of all prompts together."""
        return sum(ask.n for ask in self.asks)

    @property
    def n_prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once."""
        return sum(map(len, self.prompt_ids))


def model_and_adapter(name: str | None, state: ServerState) -> tuple[str, str]:
    """Return (the name that answers repeat, the adapter or ""). Raises Refusal (404) for an unknown one."""
    if name is None or name == state.backend.model_name:
        return state.backend.model_name, ""
    if name not in state.backend.adapters:
        raise unknown_model(name, state.model_names())
    return name, name


def sampling_of(body: DrawingFields, state: ServerState) -> tuple[Sampling, bool]:
    """Return how tokens are drawn, the model's own way where the body says nothing, and whether it is seeded.

    Raises:
        Refusal: A penalty or a bias, which no engine here knows.
    """
    for name in ("presence_penalty", "frequency_penalty"):
        if getattr(body, name):
            raise refuse(name, "only 0 is taken: a crystal's text repeats itself by nature. Leave it out.")
    if body.logit_bias:
        raise refuse("logit_bias", "only an empty one is taken; ask for elements with `conditions`.")
    own = state.model.sampling
    is_seeded = body.seed is not None
    seed = body.seed % _LARGEST_SEED if body.seed is not None else secrets.randbelow(2**31)
    sampling = dataclasses.replace(
        own,
        temperature=own.temperature if body.temperature is None else body.temperature,
        top_p=own.top_p if body.top_p is None else body.top_p,
        top_k=own.top_k if body.top_k is None else max(0, body.top_k),
        seed=seed,
    )
    return sampling, is_seeded


def stops_of(body: DrawingFields) -> tuple[str, ...]:
    """Return the texts that end a completion."""
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())


def checked_n(body: DrawingFields, state: ServerState, *, n_prompts: int = 1) -> int:
    """Return n. Raises Refusal where it, or prompts times n, is more than the server takes."""
    n, settings = body.n or 1, state.settings
    if n > settings.max_n:
        raise refuse("n", f"{n} completions of a prompt; at most {settings.max_n} here.")
    if n_prompts > settings.max_prompts:
        raise refuse("prompt", f"{n_prompts} prompts; at most {settings.max_prompts} in one request.")
    if n * n_prompts > settings.max_completions:
        raise refuse(
            "n",
            f"{n_prompts} prompts times {n} are {n * n_prompts} completions; "
            f"at most {settings.max_completions} in one request.",
        )
    return n


def completion_job(body: CompletionRequest, state: ServerState) -> Job:
    """Return what a body of POST /v1/completions asks for.

    Raises:
        Refusal: 404 for an unknown model, 400 for what is out of the server's limits or not done here.
        UserError: For conditions that cannot be met, prompts that the model cannot read.
    """
    model, adapter = model_and_adapter(body.model, state)
    _refuse_what_is_not_done(body)
    sampling, is_seeded = sampling_of(body, state)
    arguments = body.vllm_xargs or ConstraintArguments.model_validate({})
    if arguments.crystal_number_temperature is not None:
        sampling = dataclasses.replace(sampling, number_temperature=arguments.crystal_number_temperature)
    conditions = None
    if body.conditions is not None:
        conditions = _at("conditions", conditions_from_dict, body.conditions)
    request = _request(conditions, arguments, state)
    prompts = _prompts(body, conditions, state, sampling.seed)
    n = checked_n(body, state, n_prompts=len(prompts))
    n_given = arguments.crystal_given or 0
    if n_given and request is None:
        raise refuse("vllm_xargs", "crystal_given says what the crystal begins with; it needs `crystal`.")
    begins = arguments.crystal_beginning
    if begins and (n_given or request is None):
        raise refuse("vllm_xargs", "crystal_beginning: it needs `crystal`, and crystal_given says the same.")
    if begins and max(begins) >= len(state.tokenizer):
        raise refuse("vllm_xargs", f"crystal_beginning: the model has {len(state.tokenizer)} tokens.")
    asks, texts, all_ids, given = [], [], [], []
    for position, prompt in enumerate(prompts):
        is_text = isinstance(prompt, str)
        ids = _checked_ids(prompt, state)
        n_new = min(sampling.max_new_tokens, state.backend.max_positions - len(ids), body.max_tokens or 2**31)
        beginning = "" if begins is None else _text(begins, state)
        if n_given:
            if n_given >= len(ids):
                raise refuse("vllm_xargs", f"crystal_given {n_given} of a prompt of {len(ids)} tokens.")
            beginning = str(state.tokenizer.decode(ids[-n_given:], skip_special_tokens=False))
        text = prompt if isinstance(prompt, str) else (_text(ids, state) if body.echo else "")
        asks.append(
            Ask(
                prompt=Prompt(text, beginning, request, adapter=adapter),
                sampling=dataclasses.replace(sampling, max_new_tokens=n_new + n_given),
                n=n,
                first_index=position * n,
                stop=stops_of(body),
                n_top=_n_top(body),
                prompt_ids=None if is_text and not n_given else tuple(ids[: len(ids) - n_given]),
                is_seeded=is_seeded,
            )
        )
        texts.append(text)
        all_ids.append(tuple(ids))
        given.append((n_given, len(beginning) if n_given else 0))
    return Job(model, tuple(asks), tuple(texts), tuple(all_ids), tuple(given))


async def merged(backend: Backend, asks: Sequence[Ask]) -> AsyncGenerator[tuple[int, Piece], None]:
    """Yield (position of the ask, piece) of several asks as they come. Raises as Backend.pieces does."""
    if len(asks) == 1:
        async with contextlib.aclosing(_generator(backend.pieces(asks[0]))) as pieces:
            async for piece in pieces:
                yield 0, piece
        return
    # bounded: what the client does not take must wait in the backend, which has a bound of its own
    arrived: asyncio.Queue[tuple[int, Piece | BaseException | None]] = asyncio.Queue(2 * len(asks))

    async def gather(position: int, ask: Ask) -> None:
        try:
            async with contextlib.aclosing(_generator(backend.pieces(ask))) as pieces:
                async for piece in pieces:
                    await arrived.put((position, piece))
        except Exception as error:  # noqa: BLE001  # raised below, in the caller's task
            await arrived.put((position, error))
        else:
            await arrived.put((position, None))

    tasks = [asyncio.create_task(gather(position, ask)) for position, ask in enumerate(asks)]
    try:
        n_open = len(tasks)
        while n_open:
            position, piece = await arrived.get()
            if isinstance(piece, BaseException):
                raise piece
            if piece is None:
                n_open -= 1
            else:
                yield position, piece
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _generator(pieces: AsyncIterator[Any]) -> AsyncGenerator[Any, None]:
    return cast(AsyncGenerator[Any, None], pieces)


def _refuse_what_is_not_done(body: CompletionRequest) -> None:
    if body.suffix:
        raise refuse("suffix", "no model here fills in before a given end. Leave it out.")
    if body.best_of not in (None, body.n or 1):
        raise refuse("best_of", "only equal to n: all completions are returned, and you choose.")
    if body.echo and body.logprobs is not None:
        raise refuse("echo", "the prompt's own log-probabilities are not computed; drop echo or logprobs.")
    if body.stream_options is not None and not body.stream:
        raise refuse("stream_options", "only together with stream: true.")


def _request(
    conditions: Conditions | None, arguments: ConstraintArguments, state: ServerState
) -> Request | None:
    """Return the constraint that a body asks for. Raises Refusal where the model takes none."""
    takes = state.takes_requests
    if arguments.crystal is not None:
        if conditions is not None:
            raise refuse("vllm_xargs", "crystal and `conditions` say the same thing; give one of them.")
        if not takes:
            raise refuse("vllm_xargs", _NOT_TAKEN)
        known, most = state.model.known_elements, state.model.max_sites
        return cast(
            Request,
            _at(
                "vllm_xargs",
                lambda text: request_from_json(text, known_elements=known, max_sites=most),
                arguments.crystal,
            ),
        )
    if conditions is None:
        return None
    if not takes:
        raise refuse("conditions", _NOT_TAKEN)
    return cast(Request, _at("conditions", state.compiled, conditions))


_NOT_TAKEN = (
    "this model's text cannot be constrained, only that of a model of the wyckoff format. "
    "Send a prompt alone, or ask POST /v1/crystals, which checks what comes."
)


def _at(param: str, function: Any, value: Any) -> Any:
    """Return function(value); what the user did wrong is refused under the name of the field."""
    try:
        return function(value)
    except UserError as error:
        raise refuse(param, str(error), code=code_of(error)) from error


def _prompts(
    body: CompletionRequest, conditions: Conditions | None, state: ServerState, seed: int
) -> list[str | list[int]]:
    prompt = body.prompt
    if prompt is None:
        if conditions is None:
            raise refuse("prompt", "missing; it is required where no `conditions` are given.")
        rng = np.random.default_rng((seed, 0, 1))
        render = state.model.template.render
        return [_at("conditions", lambda c: render(c, rng, quantiles=state.model.quantiles), conditions)]
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [prompt]
    return cast(list[str | list[int]], prompt)


def _checked_ids(prompt: str | list[int], state: ServerState) -> Sequence[int]:
    """Return a prompt's token ids. Raises Refusal where there are none, too many, or unknown ones."""
    most = state.backend.max_positions
    if isinstance(prompt, str):
        at_least = len(prompt) // state.longest_token
        if at_least > most:  # so far beyond that it is not even cut
            raise _too_long(f"more than {at_least}", most)
        ids: Sequence[int] = _at("prompt", state.prompt_ids, prompt)
    else:
        ids = prompt
        if max(ids, default=0) >= len(state.tokenizer):
            raise refuse("prompt", f"token id {max(ids)}; the model has {len(state.tokenizer)} tokens.")
    if not ids:
        raise refuse("prompt", "empty; a model goes on from at least one token.")
    if len(ids) >= most:
        raise _too_long(str(len(ids)), most)
    return ids


def _too_long(n_tokens: str, most: int) -> Refusal:
    words = f"{n_tokens} tokens; the model has {most} positions for prompt and completion together."
    return Refusal(400, f"prompt: {words}", param="prompt", code="context_length_exceeded")


def _text(ids: Sequence[int], state: ServerState) -> str:
    return str(state.tokenizer.decode(ids, skip_special_tokens=False))


def _n_top(body: CompletionRequest) -> int | None:
    if body.logprobs is not None:
        return body.logprobs
    # the ids of a growing completion come with its log-probabilities
    return 0 if body.return_token_ids and body.stream else None
