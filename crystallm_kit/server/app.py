"""The application: routes, errors in one shape, what guards the door, start and stop.

    app = create_app(new_state(backend, model, tokenizer))      uvicorn.run(app)

Not here: settings from a command line, backends, uvicorn itself (run.py).
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from crystallm_kit.server.state import ServerState


def create_app(state: ServerState) -> FastAPI:
    """Return the app of one state. Its lifespan starts the backend, and closes it at the end."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await state.backend.start()
        try:
            yield
        finally:
            await state.backend.close()

    app = FastAPI(title="crystallm_kit", lifespan=lifespan)
    app.state.server = state
    return app
