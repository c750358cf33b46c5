"""The bodies of OpenAI's routes, as their specification has them, and our own fields beside them.

    {"model": "crystallm-kit", "prompt": "crystal\\n", "n": 2, "max_tokens": 200}
    {"model": "crystallm-kit", "conditions": {"formula": "NaCl"}, "n": 2}           ours: constrained

A field that is not listed is refused, with the nearest one that is. null is the same as left out.

Not here: what is done with them (asks.py, openai_routes.py), POST /v1/crystals (crystals.py).
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import from_json

from crystallm_kit.server.failures import Refusal

LONGEST_NAME = 256
_MOST_ERRORS = 20  # of one body that are told of


class Body(BaseModel):
    """A JSON object of a request: numbers are numbers, finite, and unknown fields are refused."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class ErrorDetail(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorDetail


_RETRY = {"Retry-After": {"description": "Seconds after which to ask again.", "schema": {"type": "string"}}}
# For `responses=` of a route.
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "What is asked is wrong; the message says what."},
    401: {"model": ErrorBody, "description": "No API key, or a wrong one."},
    404: {"model": ErrorBody, "description": "No such model."},
    408: {"model": ErrorBody, "description": "The body did not arrive in time."},
    413: {"model": ErrorBody, "description": "The body is too long."},
    429: {"model": ErrorBody, "description": "The queue is full.", "headers": _RETRY},
    500: {"model": ErrorBody, "description": "A fault in the server."},
    502: {"model": ErrorBody, "description": "What makes tokens failed; the request may be sent again."},
    503: {"model": ErrorBody, "description": "Not ready, or stopping.", "headers": _RETRY},
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the documentation of these error statuses; all of them without any named."""
    return {status: ERRORS[status] for status in statuses or ERRORS}


class StrictRoute(APIRoute):
    """A route whose body is JSON by the letter: NaN, Infinity and lone surrogates are refused.

    Python's reader takes them, and they would fail later, far from where they came from.
    """

    def get_route_handler(self) -> Any:
        """Return the handler, with a request that reads JSON strictly."""
        handle = super().get_route_handler()
        known = {name for field in self.dependant.body_params for name in _field_names(field)}

        async def strictly(request: Request) -> Response:
            try:
                response: Response = await handle(_StrictRequest(request.scope, request.receive))
            except RequestValidationError as error:
                told = list(error.errors())[:_MOST_ERRORS]
                raise RequestValidationError([_with_known(e, known) for e in told]) from error
            return response

        return strictly


class _StrictRequest(Request):
    """A request whose `json` refuses what JSON does not have."""

    async def json(self) -> Any:
        if not hasattr(self, "_strict_json"):
            body = await self.body()
            try:
                self._strict_json = from_json(body, allow_inf_nan=False)
            except ValueError as error:
                raise HTTPException(400, f"the body is no JSON: {error}") from error
        return self._strict_json


def _field_names(field: Any) -> set[str]:
    model = getattr(getattr(field, "field_info", None), "annotation", None)
    return set(getattr(model, "model_fields", {}))


def _with_known(error: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    """Return a validation error that knows the fields there are, at the top of the body."""
    if error["type"] == "extra_forbidden" and len(error["loc"]) == 2:
        return {**error, "ctx": {"known": sorted(known)}}
    return dict(error)


# ---------------------------------------------------------------- completions

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
# The first wrong entry is enough: to tell of each of 300,000 takes seconds, in which all others wait.
_List = Field(min_length=1, fail_fast=True)
Prompts = (
    str
    | Annotated[list[TokenId], _List]
    | Annotated[list[str], _List]
    | Annotated[list[Annotated[list[TokenId], _List]], _List]
)
StopText = Annotated[str, Field(min_length=1, max_length=256)]


class StreamOptions(Body):
    """What a stream holds beside text."""

    include_usage: bool | None = Field(None, description="A last chunk with the counts of tokens.")
    include_obfuscation: bool | None = Field(None, description="Taken and left alone.")


class ConstraintArguments(Body):
    """The constraint in the words of vLLM's `vllm_xargs`."""

    crystal: str | None = Field(
        None,
        max_length=100_000,
        description="What must hold, as one line of JSON: a compiled request, or "
        '{"conditions": {"formula": "NaCl"}}.',
    )
    crystal_given: int | None = Field(
        None, ge=0, lt=2**31, description="So many of the prompt's last tokens are the crystal's own text."
    )
    crystal_beginning: list[TokenId] | None = Field(
        None,
        max_length=4096,
        description="Token ids that the completion begins with, and that are part of it.",
    )
    crystal_log_softmax: bool | Literal[0, 1] | None = Field(
        None, description="Taken and left alone: log-probabilities are those of the tokens that may come."
    )
    crystal_number_temperature: float | None = Field(
        None, ge=0, le=100, description="Temperature of the tokens of numbers (cell, coordinates)."
    )


class DrawingFields(Body):
    """How tokens are drawn: the fields that completions and chat have in common."""

    model: str | None = Field(
        None, max_length=LONGEST_NAME, description="A name of /v1/models; left out: the model itself."
    )
    n: int | None = Field(None, ge=1, lt=2**31, description="Completions of each prompt; left out: 1.")
    temperature: float | None = Field(
        None, ge=0, le=100, description="Left out: the model's own; 0 takes the likeliest token."
    )
    top_p: float | None = Field(None, gt=0, le=1, description="Left out: the model's own, else 1.")
    top_k: int | None = Field(
        None, ge=-1, lt=2**31, description="Only this many of the likeliest tokens; 0 or -1: all."
    )
    seed: int | None = Field(
        None, ge=-(2**63), lt=2**63, description="The same seed gives the same answer; left out: a new one."
    )
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = Field(
        None, description="Texts that end a completion; they are left out of it."
    )
    stream: bool | None = Field(None, description="Send the answer as server-sent events, as it grows.")
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = Field(
        None, description="Only 0: a crystal's text repeats itself by nature."
    )
    frequency_penalty: float | None = Field(None, description="Only 0, as presence_penalty.")
    logit_bias: dict[str, float] | None = Field(None, description="Only empty.")
    user: str | None = Field(None, max_length=LONGEST_NAME, description="Taken and left alone.")


class CompletionRequest(DrawingFields):
    """The body of POST /v1/completions."""

    prompt: Prompts | None = Field(
        None,
        description="A text, a list of texts, a list of token ids, or a list of such lists. May be left out "
        "where `conditions` are given: the model's template writes it.",
        examples=["crystal\n"],
    )
    best_of: int | None = Field(None, ge=1, lt=2**31, description="Only equal to n.")
    echo: bool | None = Field(None, description="Put the prompt before each completion.")
    logprobs: int | None = Field(
        None, ge=0, le=5, description="Log-probabilities of the tokens, and of so many likeliest ones."
    )
    max_tokens: int | None = Field(
        None, ge=1, lt=2**31, description="Left out: until the crystal ends, or the model's positions do."
    )
    suffix: str | None = Field(None, description="Only empty: no model here fills in before a given end.")
    conditions: dict[str, Any] | None = Field(
        None,
        description="Ours: what the crystal must be, as in POST /v1/crystals; tokens are drawn so that it "
        "holds. Only for a model that writes the `wyckoff` format.",
        examples=[{"formula": "NaCl"}, {"elements": ["Li", "O"], "spacegroup": "Fm-3m"}],
    )
    vllm_xargs: ConstraintArguments | None = Field(
        None, description="The constraint as a vLLM server takes it."
    )
    return_token_ids: bool | None = Field(None, description="Ours and vLLM's: token ids beside the text.")


class Usage(BaseModel):
    """Counts of tokens; those of a completion's end are among them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Logprobs(BaseModel):
    """Natural-log probabilities of the tokens that were drawn, and of the likeliest ones."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float | None]] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One completion, or what it grew by."""

    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length", "content_filter"] | None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class CompletionAnswer(BaseModel):
    """The answer of POST /v1/completions; in a stream, each event's data."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    system_fingerprint: str | None = None


class ModelCard(BaseModel):
    """One model that can be asked for."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    parent: str | None = Field(None, description="The model that an adapter changes.")
    max_model_len: int | None = Field(None, description="Tokens of prompt and completion together.")


class ModelList(BaseModel):
    """The answer of GET /v1/models."""

    object: Literal["list"]
    data: list[ModelCard]


def usage(prompt: int, completion: int) -> dict[str, int]:
    """Return the counts as an answer has them."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def refuse(param: str, message: str, code: str | None = None) -> Refusal:
    """Return the refusal (400) of one field of a request."""
    return Refusal(400, f"{param}: {message}", param=param, code=code)
