"""POST /v1/crystals: conditions in, valid crystals out, as a whole or one by one as they pass.

    curl -N localhost:8000/v1/crystals -H 'Content-Type: application/json' \\
        -d '{"conditions": {"formula": "BaTiO3"}, "n": 4, "stream": true}'

    event: request      what was understood of the words, the conditions, the seed
    event: crystal      one for each valid crystal
    event: funnel       how many samples passed each gate, usage, why it ended
    data: [DONE]

Here a request becomes what is searched for, checked against every limit; `wanted_crystals` and `search` are
what the chat and the page use, too.

Not here: the loop (search.py), the crystals' JSON (judge_worker.py).
"""

import contextlib
import dataclasses
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from crystallm_kit.engines.engine import Sampling
from crystallm_kit.errors import UnknownName, UserError
from crystallm_kit.generation import REDRAWS, Judging
from crystallm_kit.records import Conditions
from crystallm_kit.scores.thresholds import PROTOCOLS
from crystallm_kit.server.asks import model_and_adapter
from crystallm_kit.server.failures import Refusal
from crystallm_kit.server.judge_worker import FORMATS
from crystallm_kit.server.search import Finished, Found, Wanted, search
from crystallm_kit.server.shapes import LONGEST_NAME, Body, StrictRoute, errors, refuse, usage
from crystallm_kit.server.state import ServerState, State
from crystallm_kit.server.streaming import DONE, answered, event, event_stream, stream_content
from crystallm_kit.text.conditions import (
    check_conditions,
    combined,
    conditions_from_dict,
    conditions_to_dict,
)
from crystallm_kit.text.words import Understood, understand

router = APIRouter(route_class=StrictRoute)
DEFAULT_N = 4
SAMPLES_PER_CRYSTAL = 10  # the budget, where none is named
MOST_REDRAWS = 10
_LARGEST_SEED = 2**63
_ROUTE = "/v1/crystals"


class CrystalsRequest(Body):
    """The body of POST /v1/crystals."""

    model: str | None = Field(
        None, max_length=LONGEST_NAME, description="A name of /v1/models; left out: the model itself."
    )
    conditions: dict[str, Any] | None = Field(
        None,
        description="What the crystals must be: formula, elements, only_elements, spacegroup, sites, "
        "crystal_system, n_elements, anonymous_formula, properties.",
        examples=[{"formula": "BaTiO3"}, {"elements": "Li-O", "properties": {"band_gap": ">2"}}],
    )
    prompt: str | None = Field(
        None,
        description="The same in plain words, such as 'four cubic perovskites of Ba, Ti and O'. Where "
        "`conditions` name the same thing, they win.",
    )
    n: int | None = Field(
        None, ge=1, description="Valid crystals wanted; left out: the number in the words, else 4."
    )
    max_samples: int | None = Field(
        None, ge=1, description="Samples that may be drawn for them; left out: 10 n, as far as allowed."
    )
    unique: bool | None = Field(None, description="Leave copies out; left out: true.")
    format: str | None = Field(None, max_length=LONGEST_NAME, description=f"{', '.join(FORMATS)}; cif.")
    protocol: str | None = Field(
        None, max_length=LONGEST_NAME, description="What valid means; left out: kit.", examples=["kit"]
    )
    seed: int | None = Field(
        None, ge=-(2**63), lt=2**63, description="The same seed gives the same crystals; left out: a new one."
    )
    temperature: float | None = Field(None, ge=0, le=100, description="Left out: the model's own.")
    number_temperature: float | None = Field(
        None, ge=0, le=100, description="Of the tokens of numbers; left out: the model's own."
    )
    top_p: float | None = Field(None, gt=0, le=1, description="Left out: the model's own, else 1.")
    top_k: int | None = Field(None, ge=-1, lt=2**31, description="Of the likeliest tokens; 0 or -1: all.")
    constrained: bool | None = Field(
        None,
        description="Draw only tokens that keep the text well formed and as asked, where the model's format "
        "allows it; left out: true.",
    )
    redraws: int | None = Field(
        None,
        ge=0,
        le=MOST_REDRAWS,
        description="How often cell and coordinates that do not fit are drawn again; left out: 3.",
    )
    stream: bool | None = Field(None, description="Send each crystal as it passes, as server-sent events.")
    log_probability: bool | None = Field(
        None, description="Send each crystal's; false is faster on a vLLM server. Left out: true."
    )
    include_invalid: bool | None = Field(
        None, description="Send samples that are not valid, too, with their reason; they do not count."
    )


class VerdictShape(BaseModel):
    """Valid, or the one reason why not."""

    valid: bool
    reason: str | None
    detail: str
    checks: dict[str, bool]


class CrystalShape(BaseModel):
    """One crystal."""

    index: int
    id: str = Field(description="Seed and index.")
    formula: str | None
    spacegroup_number: int | None
    structure: str | None = Field(description="In the format asked for; null where it cannot hold it.")
    text: str = Field(description="What the model wrote.")
    verdict: VerdictShape
    measures: dict[str, float | int | str]
    log_probability: float | None = Field(description="Natural, of the text, before temperature.")


class UnderstoodShape(BaseModel):
    """What was understood of the words."""

    n: int | None
    understood: list[tuple[str, str]] = Field(description="Phrase and meaning.")
    not_understood: list[str]
    notes: list[str]


class CrystalsUsage(BaseModel):
    """Counts of tokens and of samples."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    n_samples: int


class CrystalsAnswer(BaseModel):
    """The answer of POST /v1/crystals."""

    id: str
    object: Literal["crystals"]
    created: int
    model: str
    seed: int
    understood: UnderstoodShape | None
    conditions: dict[str, Any]
    crystals: list[CrystalShape]
    funnel: dict[str, Any] = Field(description="Samples that passed each gate, and what stopped the rest.")
    usage: CrystalsUsage
    finish_reason: Literal["n", "budget"]


_STREAM = stream_content(
    'event: crystal\ndata: {"index": 0, "formula": "BaTiO3", ...}\n\n'
    'event: funnel\ndata: {"funnel": {...}, "usage": {...}, "finish_reason": "n"}\n\ndata: [DONE]\n\n'
)


@router.post(
    _ROUTE,
    response_model=CrystalsAnswer,
    responses={200: {"content": _STREAM}, **errors()},
    tags=["crystals"],
)
async def crystals(body: CrystalsRequest, request: Request, state: State) -> Response:
    """Draw samples until n of them are valid crystals, or the budget is spent."""
    asked = wanted_crystals(body, state)
    if body.stream:
        return await event_stream(request, state, _events(asked, state))
    content = await answered(request, _whole(asked, state))
    return Response(content, media_type="application/json")


# ---------------------------------------------------------------- what is asked


@dataclass(frozen=True)
class Asked:
    """A request for crystals, checked.

    Attributes:
        wanted: What is searched for.
        understood: What was understood of the words, where there were any.
        model: Name of the model, as the answer repeats it.
        id, created: Of the answer.
    """

    wanted: Wanted
    understood: Understood | None
    model: str
    id: str = dataclasses.field(default_factory=lambda: f"crystals-{uuid.uuid4().hex}")
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def head(self) -> dict[str, Any]:
        """Return what is known before the first crystal."""
        return {
            "id": self.id,
            "object": "crystals",
            "created": self.created,
            "model": self.model,
            "seed": self.wanted.sampling.seed,
            "understood": None if self.understood is None else understood_to_dict(self.understood),
            "conditions": conditions_to_dict(self.wanted.conditions),
        }


def wanted_crystals(
    body: CrystalsRequest, state: ServerState, *, understood: Understood | None = None
) -> Asked:
    """Return what a body asks for.

    Args:
        understood: What was understood of words that are not in the body.

    Raises:
        Refusal: 404 for an unknown model, 400 for what is out of the server's limits or not understood.
        UserError: Conditions that cannot be read or met, settings out of range.
    """
    model, adapter = model_and_adapter(body.model, state)
    if body.prompt is not None:
        understood = understood_words(body.prompt)
    conditions = _conditions(body.conditions, understood)
    n, max_samples = _counts(body, understood, state)
    form, protocol = body.format or "cif", body.protocol or "kit"
    for param, kind, name, known in (
        ("format", "format of structures", form, FORMATS),
        ("protocol", "protocol", protocol, PROTOCOLS),
    ):
        if name not in known:
            raise refuse(param, str(UnknownName.among(kind, name[:60], known)), code="unknown_name")
    sampling, is_seeded = _sampling(body, state)
    takes = state.takes_requests
    constrained = body.constrained is not False and takes
    # refused here where no crystal can meet it, whether or not the drawing is held to it
    request = _at("conditions", state.compiled, conditions) if takes else None
    wanted = Wanted(
        conditions=conditions,
        n=n,
        max_samples=max_samples,
        judging=dataclasses.replace(Judging.of(state.model, protocol), model=model),
        sampling=sampling,
        is_seeded=is_seeded,
        request=request if constrained else None,
        adapter=adapter,
        form=form,
        unique=body.unique is not False,
        redraws=REDRAWS if body.redraws is None else body.redraws,
        include_invalid=bool(body.include_invalid),
        with_log_probability=body.log_probability is not False,
    )
    return Asked(wanted, understood, model)


def understood_words(prompt: str) -> Understood:
    """Return what a prompt asks for. Raises Refusal if nothing of it was understood, UserError."""
    understood: Understood = _at("prompt", understand, prompt)
    if not understood.understood:
        hints = " ".join(f"({note})" for note in understood.notes)
        raise refuse(
            "prompt",
            f"nothing of it was understood {hints}".rstrip()
            + "; say it with formulas, elements, space groups, properties, or send `conditions`.",
            code="not_understood",
        )
    return understood


def understood_to_dict(understood: Understood) -> dict[str, Any]:
    """Return what was understood as JSON-ready data."""
    return {
        "n": understood.n,
        "understood": [list(pair) for pair in understood.understood],
        "not_understood": list(understood.not_understood),
        "notes": list(understood.notes),
    }


def _conditions(given: Mapping[str, Any] | None, understood: Understood | None) -> Conditions:
    conditions = Conditions() if given is None else _at("conditions", conditions_from_dict, given)
    if understood is not None:
        conditions = combined(understood.conditions, conditions)
        _at("conditions", check_conditions, conditions)
    return conditions


def _counts(body: CrystalsRequest, understood: Understood | None, state: ServerState) -> tuple[int, int]:
    """Return how many crystals are wanted, and the budget."""
    settings = state.settings
    n = body.n or (understood.n if understood else None) or DEFAULT_N
    if n > settings.max_n:
        raise refuse("n", f"{n} crystals; at most {settings.max_n} in one request.")
    budget = body.max_samples
    if budget is None:
        budget = max(n, min(SAMPLES_PER_CRYSTAL * n, settings.max_samples))
    if budget > settings.max_samples:
        param = "n" if body.max_samples is None else "max_samples"
        raise refuse(param, f"{budget} samples; at most {settings.max_samples} in one request.")
    if budget < n:
        raise refuse("max_samples", f"{budget} samples cannot give {n} crystals; ask for at least {n}.")
    return n, budget


def _sampling(body: CrystalsRequest, state: ServerState) -> tuple[Sampling, bool]:
    """Return how tokens are drawn, the model's own way where the body says nothing, and if it is seeded."""
    names = ("temperature", "number_temperature", "top_p")
    given = {name: getattr(body, name) for name in names if getattr(body, name) is not None}
    if body.top_k is not None:
        given["top_k"] = max(0, body.top_k)
    is_seeded = body.seed is not None
    seed = body.seed % _LARGEST_SEED if body.seed is not None else secrets.randbelow(2**31)
    return dataclasses.replace(state.model.sampling, seed=seed, **given), is_seeded


def _at(param: str, function: Any, value: Any) -> Any:
    """Return function(value); what the user did wrong is refused under the name of the field."""
    try:
        return function(value)
    except Refusal:
        raise
    except UserError as error:
        words = str(error) if str(error).startswith(param) else f"{param}: {error}"
        raise Refusal(400, words, param=param, code=_snake(type(error).__name__)) from error


def _snake(name: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")


# ---------------------------------------------------------------- answers


def ending(finished: Finished) -> dict[str, Any]:
    """Return what is known after the last crystal."""
    tokens = usage(finished.n_prompt_tokens, finished.n_completion_tokens)
    return {
        "funnel": finished.funnel.as_dict(),
        "usage": {**tokens, "n_samples": finished.funnel.requested},
        "finish_reason": finished.finish_reason,
    }


async def _whole(asked: Asked, state: ServerState) -> bytes:
    lines: list[bytes] = []
    end: dict[str, Any] = {}
    async with contextlib.aclosing(search(state, asked.wanted)) as events:
        async for found in events:
            if isinstance(found, Found):
                lines.append(found.line)
            else:
                end = ending(found)
    _count_prompt(end, state)
    # the crystals are JSON already
    return b'%b,"crystals":[%b],%b' % (
        orjson.dumps(asked.head())[:-1],
        b",".join(lines),
        orjson.dumps(end)[1:],
    )


async def _events(asked: Asked, state: ServerState) -> AsyncGenerator[bytes, None]:
    """Yield the server-sent events of an answer; nothing before the first crystal is there, or the end."""
    began, waiting = time.monotonic(), event(asked.head(), "request")
    async with contextlib.aclosing(search(state, asked.wanted)) as events:
        async for found in events:
            if waiting:
                state.metrics.first_token_seconds.labels(_ROUTE).observe(time.monotonic() - began)
            if isinstance(found, Found):
                yield waiting + b"event: crystal\ndata: " + found.line + b"\n\n"
            else:
                end = ending(found)
                _count_prompt(end, state)
                yield waiting + event(end, "funnel")
            waiting = b""
    yield DONE


def _count_prompt(end: Mapping[str, Any], state: ServerState) -> None:
    state.metrics.count_tokens(prompt=end["usage"]["prompt_tokens"])
