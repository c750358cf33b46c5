"""POST /v1/chat/completions, as OpenAI has it: plain words in, sentences and crystals out.

    client.chat.completions.create(model="crystallm-kit", messages=[
        {"role": "user", "content": "two cubic perovskites of Ba, Ti and O"}])

    Asked for: 2 x BaTiO3; cubic.

    BaTiO3, space group Pm-3m (221), 6.02 g/cm3; valid by the protocol kit.
    ```cif
    ...

The last message of the user is read, by the rules of text/words.py; others are not. A number in the words is
a number of crystals in one message; OpenAI's `n` is a number of messages, each with crystals of its own.
`conditions` and other fields of POST /v1/crystals may stand beside the messages.

Two fields are ours, and clients that do not know them lose nothing:

    choices[i].message.crystals     the crystals of this message, as POST /v1/crystals gives them
    crystals                        the rest of that answer: conditions, funnel, seed ...

In a stream the first comes with the last delta of its choice, the second with the chunk of usage, where
`stream_options.include_usage` asks for it. Words of which nothing is understood are answered by a message
that says what can be asked; words that ask for what cannot be (an element that is none, conditions that
exclude each other) are refused with 400, as everywhere.

Not here: how crystals are searched for (crystals.py, search.py).
"""

import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from crystallm_kit.scores.funnel import Funnel
from crystallm_kit.server.asks import checked_n, model_and_adapter, stops_of
from crystallm_kit.server.crystals import CrystalsRequest, ending, understood_to_dict, wanted_crystals
from crystallm_kit.server.search import Found, Wanted, search
from crystallm_kit.server.shapes import (
    Body,
    DrawingFields,
    StrictRoute,
    Usage,
    errors,
    refuse,
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
from crystallm_kit.structures.spacegroups import spacegroup_symbol
from crystallm_kit.text.conditions import conditions_to_dict, describe
from crystallm_kit.text.words import Understood, understand

router = APIRouter(route_class=StrictRoute)
_ROUTE = "/v1/chat/completions"
_OURS = ("conditions", "max_samples", "unique", "protocol", "number_temperature", "constrained", "redraws")


class TextPart(Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a conversation. Fields beside these are taken and left alone."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None

    def words(self) -> str:
        """Return the message's text."""
        if isinstance(self.content, list):
            return " ".join(part.text for part in self.content)
        return self.content or ""


class ChatRequest(DrawingFields):
    """The body of POST /v1/chat/completions."""

    messages: list[Message] = Field(
        min_length=1,
        fail_fast=True,
        description="The last one of the user is read.",
        examples=[[{"role": "user", "content": "two cubic perovskites of Ba, Ti and O"}]],
    )
    max_tokens: int | None = Field(None, ge=1, lt=2**31, description="Of each sample that is drawn.")
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31, description="As max_tokens.")
    logprobs: bool | None = Field(None, description="Only false: each crystal has its log_probability.")
    top_logprobs: int | None = Field(None, description="Only 0 or left out.")
    response_format: dict[str, Any] | None = Field(None, description='Only {"type": "text"}.')
    tools: list[Any] | None = Field(None, description="Only empty.")
    tool_choice: Any = Field(None, description="Taken and left alone.")
    parallel_tool_calls: bool | None = Field(None, description="Taken and left alone.")
    metadata: dict[str, Any] | None = Field(None, description="Taken and left alone.")
    store: bool | None = Field(None, description="Taken and left alone: nothing is stored.")
    service_tier: str | None = Field(None, description="Taken and left alone.")
    reasoning_effort: str | None = Field(None, description="Taken and left alone.")
    conditions: dict[str, Any] | None = Field(
        None, description="Ours, as in POST /v1/crystals; what it names wins over the words."
    )
    max_samples: int | None = Field(None, ge=1, description="Ours, as in POST /v1/crystals.")
    unique: bool | None = Field(None, description="Ours, as in POST /v1/crystals.")
    protocol: str | None = Field(None, max_length=256, description="Ours, as in POST /v1/crystals.")
    number_temperature: float | None = Field(None, ge=0, le=100, description="Ours, as in POST /v1/crystals.")
    constrained: bool | None = Field(None, description="Ours, as in POST /v1/crystals.")
    redraws: int | None = Field(None, ge=0, le=10, description="Ours, as in POST /v1/crystals.")


class AnswerMessage(BaseModel):
    """The assistant's message."""

    role: Literal["assistant"]
    content: str
    refusal: None = None
    crystals: list[dict[str, Any]] = Field(description="Ours: the crystals of this message.")


class ChatChoice(BaseModel):
    """One message of an answer."""

    index: int
    message: AnswerMessage
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class ChatAnswer(BaseModel):
    """The answer of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None = None
    crystals: dict[str, Any] | None = Field(description="Ours: conditions, seed, funnel of all choices.")


_STREAM = stream_content('data: {"object": "chat.completion.chunk", "choices": [...]}\n\ndata: [DONE]\n\n')


@router.post(
    _ROUTE,
    response_model=ChatAnswer,
    responses={200: {"content": _STREAM}, **errors()},
    tags=["OpenAI"],
)
async def chat_completions(body: ChatRequest, request: Request, state: State) -> Response:
    """Answer plain words with crystals."""
    talk = _talk(body, state)
    if body.stream:
        return await event_stream(request, state, _events(talk, state))
    return json_response(await answered(request, _answer(talk, state)))


# ---------------------------------------------------------------- what is asked


@dataclass(frozen=True)
class _Talk:
    """A checked request: what is searched for, or what is said where nothing is.

    Attributes:
        wanted: None where nothing was understood.
        understood: What was understood of the words.
        n_choices: Messages.
        per_choice: Crystals of each.
    """

    model: str
    wanted: Wanted | None
    understood: Understood
    n_choices: int
    per_choice: int
    stops: tuple[str, ...]
    with_usage: bool
    fingerprint: str | None
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


def _talk(body: ChatRequest, state: ServerState) -> _Talk:
    """Return what a body asks for. Raises Refusal, UserError."""
    model, _ = model_and_adapter(body.model, state)
    _refuse_what_is_not_done(body)
    spoken = [message for message in body.messages if message.role == "user"]
    if not spoken:
        raise refuse("messages", "none of them is the user's; say there what crystal is wanted.")
    understood = understand(spoken[-1].words())
    n_choices = checked_n(body, state)
    per_choice = understood.n or 1
    wanted = None
    if understood.understood or body.conditions:
        ours = {name: getattr(body, name) for name in _OURS}
        drawing = {name: getattr(body, name) for name in ("model", "temperature", "top_p", "top_k", "seed")}
        asked = CrystalsRequest(n=n_choices * per_choice, **ours, **drawing)
        wanted = wanted_crystals(asked, state, understood=understood).wanted
        most = min(body.max_tokens or 2**31, body.max_completion_tokens or 2**31)
        sampling = wanted.sampling
        wanted = replace(
            wanted, sampling=replace(sampling, max_new_tokens=min(sampling.max_new_tokens, most))
        )
    return _Talk(
        model,
        wanted,
        understood,
        n_choices,
        per_choice,
        stops_of(body),
        with_usage=bool(body.stream_options and body.stream_options.include_usage),
        fingerprint=state.fingerprint,
    )


def _refuse_what_is_not_done(body: ChatRequest) -> None:
    if body.logprobs or body.top_logprobs:
        raise refuse("logprobs", "a message is no text of the model; each crystal has its log_probability.")
    if body.tools:
        raise refuse("tools", "the model calls none. Leave it out.")
    if body.response_format is not None and body.response_format.get("type") != "text":
        raise refuse("response_format", "only text; POST /v1/crystals answers in JSON.")
    for name in ("presence_penalty", "frequency_penalty"):
        if getattr(body, name):
            raise refuse(name, "only 0 is taken: a crystal's text repeats itself by nature. Leave it out.")
    if body.logit_bias:
        raise refuse("logit_bias", "only an empty one is taken; ask for elements in words.")
    if body.stream_options is not None and not body.stream:
        raise refuse("stream_options", "only together with stream: true.")


# ---------------------------------------------------------------- what is said


_HELP = (
    "I make crystal structures, and of this I understood nothing that says which.{hints} Name a formula "
    "(BaTiO3), elements (of Li, Fe and O), a space group (Pm-3m), a crystal system, a structure type "
    "(perovskite), a number of atoms, or a property (band gap above 2 eV); for example: "
    "'three cubic perovskites of Ba, Ti and O'."
)


def _opening(talk: _Talk) -> str:
    """Return what was understood, in sentences."""
    understood = talk.understood
    if talk.wanted is None:
        hints = "".join(f" ({note})" for note in understood.notes)
        return _HELP.format(hints=hints)
    count = f"{talk.per_choice} x " if talk.per_choice > 1 else ""
    lines = [f"Asked for: {count}{describe(talk.wanted.conditions)}."]
    if understood.not_understood:
        phrases = ", ".join(f"'{phrase}'" for phrase in understood.not_understood)
        lines.append(f"Not understood, so without effect: {phrases}.")
    lines += [f"Note: {note}." for note in understood.notes]
    return "\n".join(lines) + "\n"


def _shown(crystal: Mapping[str, Any], talk: _Talk) -> str:
    """Return a crystal as a sentence and a CIF block."""
    parts = [str(crystal["formula"])]
    number = crystal["spacegroup_number"]
    if number is not None:
        parts.append(f"space group {spacegroup_symbol(number)} ({number})")
    if "density_g_cm3" in crystal["measures"]:
        parts.append(f"{crystal['measures']['density_g_cm3']:.2f} g/cm3")
    protocol = talk.wanted.judging.protocol if talk.wanted else ""
    sentence = f"\n{', '.join(parts)}; valid by the protocol {protocol}.\n"
    return sentence + (f"```cif\n{crystal['structure']}```\n" if crystal["structure"] else "")


def _closing(choice: "_Choice", funnel: Funnel, talk: _Talk) -> str:
    """Return what became of the samples, where not every crystal was found."""
    if len(choice.crystals) == talk.per_choice:
        return ""
    stopped = ", ".join(f"{reason} {count}" for reason, count in funnel.reasons.items())
    found = f"only {len(choice.crystals)} of {talk.per_choice}" if choice.crystals else "no valid crystal"
    return (
        f"\nFound {found}: the {funnel.requested} samples of the budget are spent (stopped by {stopped}).\n"
    )


@dataclass
class _Choice:
    """One message while it grows."""

    index: int
    stops: tuple[str, ...]
    content: str = ""
    crystals: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] = "stop"
    is_stopped: bool = False

    def add(self, text: str) -> str:
        """Add text and return what of it is said: all before a stop text."""
        if self.is_stopped:
            return ""
        whole = self.content + text
        places = [place for stop in self.stops if (place := whole.find(stop)) >= 0]
        if places:
            self.is_stopped = True
            whole = whole[: max(min(places), len(self.content))]
        said = whole[len(self.content) :]
        self.content = whole
        return said


@dataclass(frozen=True)
class _Said:
    """Something new in a choice."""

    choice: _Choice
    text: str = ""
    is_last: bool = False


async def _conversation(talk: _Talk, state: ServerState, end: dict[str, Any]) -> AsyncGenerator[_Said, None]:
    """Yield what is said, choice after choice; `end` is filled with usage and our field."""
    choices = [_Choice(index, talk.stops) for index in range(talk.n_choices)]
    end["choices"] = choices
    end["usage"], end["crystals"] = usage(0, 0), None
    if talk.wanted is None:
        for choice in choices:
            yield _Said(choice, choice.add(_opening(talk)))
            yield _Said(choice, is_last=True)
        return
    n_found = 0
    async with contextlib.aclosing(search(state, talk.wanted)) as events:
        async for found in events:
            if n_found == 0:
                for choice in choices:
                    yield _Said(choice, choice.add(_opening(talk)))
            if isinstance(found, Found):
                choice = choices[n_found // talk.per_choice]
                n_found += 1
                crystal = orjson.loads(found.line)
                choice.crystals.append(crystal)
                yield _Said(choice, choice.add(_shown(crystal, talk)))
                if len(choice.crystals) == talk.per_choice:
                    yield _Said(choice, is_last=True)
                continue
            result = ending(found)
            state.metrics.count_tokens(prompt=found.n_prompt_tokens)
            end["usage"] = usage(found.n_prompt_tokens, found.n_completion_tokens)
            end["crystals"] = _ours(talk, talk.wanted, result)
            for choice in choices[n_found // talk.per_choice :]:
                choice.finish_reason = "length"
                yield _Said(choice, choice.add(_closing(choice, found.funnel, talk)))
                yield _Said(choice, is_last=True)


def _ours(talk: _Talk, wanted: Wanted, result: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "seed": wanted.sampling.seed,
        "understood": understood_to_dict(talk.understood),
        "conditions": conditions_to_dict(wanted.conditions),
        **result,
    }


# ---------------------------------------------------------------- answers


async def _answer(talk: _Talk, state: ServerState) -> dict[str, Any]:
    end: dict[str, Any] = {}
    async with contextlib.aclosing(_conversation(talk, state, end)) as conversation:
        async for _ in conversation:
            pass
    return {
        **talk.head("chat.completion"),
        "choices": [
            {
                "index": choice.index,
                "message": {
                    "role": "assistant",
                    "content": choice.content,
                    "refusal": None,
                    "crystals": choice.crystals,
                },
                "logprobs": None,
                "finish_reason": choice.finish_reason,
            }
            for choice in end["choices"]
        ],
        "usage": end["usage"],
        "crystals": end["crystals"],
    }


async def _events(talk: _Talk, state: ServerState) -> AsyncGenerator[bytes, None]:
    """Yield the chunks of a streamed answer."""
    end: dict[str, Any] = {}
    begun: set[int] = set()
    began = time.monotonic()
    async with contextlib.aclosing(_conversation(talk, state, end)) as conversation:
        async for said in conversation:
            if not begun:
                state.metrics.first_token_seconds.labels(_ROUTE).observe(time.monotonic() - began)
            for chunk in _chunks(said, begun):
                yield event(_chunk(talk, [chunk]))
    if talk.with_usage:
        yield event(_chunk(talk, [], usage=end["usage"], crystals=end["crystals"]))
    yield DONE


def _chunks(said: _Said, begun: set[int]) -> Iterator[dict[str, Any]]:
    """Yield the choices of the chunks that say it: the role first, our field last."""
    choice = said.choice

    def delta(content: Mapping[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        return {
            "index": choice.index,
            "delta": content,
            "logprobs": None,
            "finish_reason": finish_reason,
        }

    if choice.index not in begun:
        begun.add(choice.index)
        yield delta({"role": "assistant", "content": "", "refusal": None})
    if said.text:
        yield delta({"content": said.text})
    if said.is_last:
        yield delta({"crystals": choice.crystals}, choice.finish_reason)


def _chunk(talk: _Talk, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    if talk.with_usage and "usage" not in more:
        more["usage"] = None
    return {**talk.head("chat.completion.chunk"), "choices": choices, **more}
