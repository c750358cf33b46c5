"""The application: routes, errors in one shape, what guards the door, start and stop.

    app = create_app(new_state(backend, model, tokenizer))      uvicorn.run(app)

Not here: settings from a command line, backends, uvicorn itself (run.py).
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRouter
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse

from crystallm_kit.errors import CrystallmKitError
from crystallm_kit.server import chat, crystals, openai_routes, page
from crystallm_kit.server.backend import NotReady
from crystallm_kit.server.docs_page import docs_page
from crystallm_kit.server.failures import failure_of
from crystallm_kit.server.gate import Gate
from crystallm_kit.server.judging import Judges
from crystallm_kit.server.metrics import CONTENT_TYPE
from crystallm_kit.server.shapes import errors
from crystallm_kit.server.state import ServerState, State
from crystallm_kit.server.streaming import json_response

log = logging.getLogger(__name__)
router = APIRouter(tags=["server"])


def create_app(state: ServerState) -> FastAPI:
    """Return the app of one state. Its lifespan starts the backend, and closes it at the end."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        state.judges = state.judges or Judges(state.settings.judges)
        try:
            await asyncio.gather(state.backend.start(), state.judges.start())
            yield
        finally:
            state.admission.drain()
            await state.backend.close()
            await state.judges.close()

    app = FastAPI(title="crystallm_kit", version=_version(), lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.server = state
    app.add_middleware(Gate, state=state)
    for kind in (RequestValidationError, HTTPException, CrystallmKitError):
        app.add_exception_handler(kind, _on_error)
    app.include_router(router)
    app.include_router(openai_routes.router)
    app.include_router(chat.router)
    app.include_router(crystals.router)
    page.mount(app)
    app.openapi = lambda: _document(app, state)  # type: ignore[method-assign]
    _watch(state)
    return app


@router.get("/healthz", responses=errors(500))
async def healthz() -> dict[str, str]:
    """Tell that the process lives."""
    return {"status": "alive"}


@router.get("/readyz", responses=errors(500, 503))
async def readyz(state: State) -> dict[str, str]:
    """Tell whether work is taken: the engine is ready, and the server is not stopping."""
    if state.admission.is_draining:
        raise NotReady("the server is stopping", retry_after=10)
    if not state.backend.is_ready():
        raise NotReady("the engine is not ready")
    return {"status": "ready"}


@router.get("/metrics", response_class=PlainTextResponse, responses=errors(401, 500))
async def metrics(state: State) -> Response:
    """Return the counters, in Prometheus' text format."""
    return Response(state.metrics.exposition(), headers={"Content-Type": CONTENT_TYPE})


@router.get("/docs", include_in_schema=False)
async def docs(request: Request) -> Response:
    """Return the documentation of all routes as one page."""
    return Response(docs_page(request.app.openapi()), media_type="text/html")


async def _on_error(request: Request, error: Exception) -> Response:
    request_id = str(request.scope.get("state", {}).get("request_id", ""))
    failure = failure_of(error, request_id)
    if failure.status == 500:
        log.error("request %s failed", request_id, exc_info=error)
    return json_response(failure.body(), failure.status, dict(failure.headers))


def _watch(state: ServerState) -> None:
    """Let the metrics read what the state knows anyway."""
    backend, admission = state.backend, state.admission
    state.metrics.watch(
        {
            "completions_running": ("Completions being drawn.", backend.n_running),
            "completions_queued": ("Completions that wait in the engine.", backend.n_waiting),
            "completions_inside": ("Completions let in and not done.", lambda: admission.n_inside),
            "completions_waiting": ("Completions beyond those drawn at once.", lambda: admission.n_waiting),
            "completions_per_second": ("Completions done per second of busy time, lately.", admission.rate),
            "engine_restarts": ("Engines started anew.", lambda: getattr(backend, "n_restarts", 0)),
            "judge_restarts": (
                "Judging processes started anew.",
                lambda: getattr(state.judges, "n_replaced", 0),
            ),
            "ready": ("1 where work is taken.", lambda: backend.is_ready() and not admission.is_draining),
        }
    )


def _document(app: FastAPI, state: ServerState) -> dict[str, Any]:
    """Return the OpenAPI document: this server's limits in it, and 400 where a framework would say 422."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title,
            version=app.version,
            routes=app.routes,
            description="Crystals from language models. Every error has the shape of ErrorBody.",
        )
        for operations in document["paths"].values():
            for operation in operations.values():
                answers = operation["responses"]
                answers.pop("422", None)
                for status, answer in answers.items():
                    if status >= "400" and "content" in answer:  # JSON, whatever the route gives
                        answer["content"] = {"application/json": next(iter(answer["content"].values()))}
        schemas = document["components"]["schemas"]
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        settings = state.settings
        for schema in schemas.values():
            field = schema.get("properties", {}).get("n")
            for form in field.get("anyOf", [field]) if field else ():
                if form.get("type") == "integer" and "minimum" in form:
                    form["maximum"] = settings.max_n
                    form.pop("exclusiveMaximum", None)
        if state.keys:
            document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            for path, operations in document["paths"].items():
                if path.startswith("/v1") or (path == "/metrics" and settings.metrics_need_key):
                    for operation in operations.values():
                        operation["security"] = [{"key": []}]
        app.openapi_schema = document
    return app.openapi_schema


def _version() -> str:
    try:
        return version("crystallm-kit")
    except PackageNotFoundError:  # run from its folder, not installed
        return "0"
