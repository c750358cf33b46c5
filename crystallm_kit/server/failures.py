"""What goes wrong -> status and body, in OpenAI's shape, for every route and every stream.

    {"error": {"message": "no model 'crystalm'; did you mean 'crystallm-kit'? ...",
               "type": "invalid_request_error", "param": "model", "code": "model_not_found"}}

    400  what is asked is wrong, from malformed JSON to a composition that no crystal has    (UserError)
    401  no key, or none of ours            404  no such model, no such route       405  no such method here
    408  a body that does not arrive        413  a body that is too long
    429  the queue is full; Retry-After     500  a fault of ours: the log has it under the request's id
    502  what makes tokens failed midway    503  nothing can make tokens now, or we are stopping; Retry-After

Not here: who catches what (app.py), errors within a stream (streaming.py).
"""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from crystallm_kit.errors import CrystallmKitError, UnknownName, UserError, did_you_mean
from crystallm_kit.server.admission import Overloaded
from crystallm_kit.server.backend import BackendError, NotReady

log = logging.getLogger(__name__)
_SHOWN = 60  # characters of a wrong value that a message repeats
_LONGEST_MESSAGE = 800
# Fields that may have several forms, each of which has something to complain about.
_FORMS = {
    "prompt": "a text, a list of texts, a list of token ids, or a list of such lists",
    "stop": "a text of 1 to 256 characters, or a list of at most 16 such texts",
}
_CODES = {
    401: "invalid_api_key",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    429: "rate_limit_exceeded",
    500: "internal_error",
    502: "backend_error",
    503: "not_ready",
}


@dataclass(frozen=True)
class Failure:
    """An answer that is an error.

    Attributes:
        status: HTTP status.
        message: What was wrong and what to do, in words.
        param: The field of the request that is at fault.
        code: One word for programs.
        headers: Retry-After, Allow, WWW-Authenticate.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """Return the body: {"error": {...}}."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {
            "error": {
                "message": _shortened(self.message),
                "type": kind,
                "param": self.param,
                "code": self.code or _CODES.get(self.status),
            }
        }


def _shortened(message: str) -> str:
    """Return a message, without its middle where it repeats a very long value; advice stands at its end."""
    half = _LONGEST_MESSAGE // 2
    return message if len(message) <= _LONGEST_MESSAGE else f"{message[:half]} ... {message[-half:]}"


class Refusal(CrystallmKitError):
    """A request that a route refuses, with the answer."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.failure = Failure(status, message, param, code)


def unknown_model(name: str, known: Sequence[str]) -> Refusal:
    """Return the refusal of a model that is not served here."""
    message = str(UnknownName.among("model", name[:_SHOWN], known))
    return Refusal(404, message, param="model", code="model_not_found")


def failure_of(error: BaseException, request_id: str = "") -> Failure:
    """Return the answer to an exception; of an unforeseen one nothing is told but the request's id."""
    if isinstance(error, Refusal):
        return error.failure
    if isinstance(error, RequestValidationError):
        return _invalid(error.errors())
    if isinstance(error, HTTPException):
        return _of_http(error)
    if isinstance(error, Overloaded):
        return Failure(429, str(error), headers={"Retry-After": str(error.retry_after)})
    if isinstance(error, NotReady):
        seconds = str(max(1, math.ceil(error.retry_after)))
        return Failure(503, _without_addresses(str(error)), headers={"Retry-After": seconds})
    if isinstance(error, BackendError):
        log.warning("request %s: %s", request_id, error)
        return Failure(502, _without_addresses(str(error)))
    if isinstance(error, UserError):
        return Failure(400, str(error), code=code_of(error))
    where = f" The server's log has it under {request_id}." if request_id else ""
    return Failure(500, f"a fault in the server.{where}")


def _without_addresses(message: str) -> str:
    """Return a message without the addresses of servers behind this one, which are not the clients' business.

    They may even hold a name and a password.
    """
    return re.sub(r"\b[a-z]+://[^\s'\"),;]*[^\s'\"),;:.]", "(address)", message)


def _of_http(error: HTTPException) -> Failure:
    headers = dict(error.headers or {})
    if error.status_code == 404:
        return Failure(404, "no such route; /docs lists all", headers=headers)
    if error.status_code == 405:
        allowed = headers.get("Allow", headers.get("allow", ""))
        words = f"; it takes {allowed}" if allowed else ""
        return Failure(405, f"this route does not take that method{words}", headers=headers)
    return Failure(error.status_code, str(error.detail), headers=headers)


def _invalid(errors: Sequence[Any]) -> Failure:
    """Return the failure of a body that is not what a route takes: one sentence for each field."""
    told: dict[str, str] = {}
    for error in errors:
        path = [part for part in error["loc"] if part not in ("body", "query", "path")]
        # the parts after the field's name are alternatives of its type, and positions in it
        name = str(path[0]) if path else "body"
        if name in _FORMS and len(errors) > 1:
            told[name] = f"{name}: expected {_FORMS[name]}"
        if name in told:
            continue
        told[name] = f"{'.'.join(map(str, path[:4])) or 'body'}: {_said(error)}"
    first = next((name for name in told if name != "body"), None)
    return Failure(400, "; ".join(list(told.values())[:5]), param=first)


def _said(error: Mapping[str, Any]) -> str:
    kind, context = str(error["type"]), error.get("ctx") or {}
    if kind == "extra_forbidden":
        return f"no such field{did_you_mean(str(error['loc'][-1])[:_SHOWN], context.get('known', ()))}"
    if kind == "missing":
        return "missing; it is required"
    if kind in ("model_attributes_type", "dict_type", "model_type"):
        return "expected a JSON object, sent with Content-Type: application/json"
    if kind == "value_error":
        return str(context.get("error", error["msg"]))
    try:
        got = repr(error.get("input"))
    except ValueError:  # a number of more digits than Python writes
        got = "a number of thousands of digits"
    got = got if len(got) <= _SHOWN else got[:_SHOWN] + "..."
    said = str(error["msg"])
    return f"got {got}; {said[:1].lower()}{said[1:]}"


def code_of(error: UserError) -> str:
    """Return an error's class as a word for programs: ImpossibleRequest is "impossible_request"."""
    name = type(error).__name__
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")
