"""The page at "/": files of the package that a browser shows, and the facts that its form is built from.

    mount(app)              adds GET / and GET /page/{name}
    GET /page/style.css     a file of server/web/
    GET /page/facts.js      the space groups, crystal systems and properties that the kit knows

Contract: all files are read when the app is made, and a request only picks one of them by its whole name; no
path of a request is ever opened. The page loads nothing from anywhere else, and its
Content-Security-Policy holds the browser to that.

Not here: what the page does (web/page.js), the routes that it calls (crystals.py, openai_routes.py).
"""

import gzip
import hashlib
import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response

from crystallm_kit.records import PROPERTIES
from crystallm_kit.structures.spacegroups import spacegroup_symbol
from crystallm_kit.text.prompt_tokens import CRYSTAL_SYSTEMS

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
# blob: is what a download made in the page is; styles set by scripts are not inline styles.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_SAFE = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
}
_YEAR = 31_536_000  # seconds


@dataclass(frozen=True)
class _File:
    """One file as it is sent: plain and compressed."""

    content: bytes
    compressed: bytes
    media_type: str
    tag: str
    cache: str


def mount(app: FastAPI) -> None:
    """Add the page to an app. Its routes ask for no key, and are not part of the OpenAPI document."""
    known = _files()

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def index(request: Request) -> Response:
        return _answer(request, known["index.html"])

    @app.api_route("/page/{name}", methods=["GET", "HEAD"], include_in_schema=False)
    async def file(request: Request, name: str) -> Response:
        if name not in known:
            raise HTTPException(404, f"no file '{name[:80]}' belongs to the page")
        return _answer(request, known[name])


def _answer(request: Request, file: _File) -> Response:
    headers = {**_SAFE, "Cache-Control": file.cache, "ETag": file.tag, "Vary": "Accept-Encoding"}
    if file.tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    if "gzip" in request.headers.get("accept-encoding", ""):
        headers["Content-Encoding"] = "gzip"
        return Response(file.compressed, media_type=file.media_type, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)


def _files() -> dict[str, _File]:
    """Return what can be asked for: every file of web/ and web/vendor/ by its name, and facts.js."""
    web = files("crystallm_kit.server") / "web"
    found = {"facts.js": _file("facts.js", f"export default {json.dumps(_facts())};\n".encode())}
    for folder in (web, web / "vendor"):
        for entry in folder.iterdir():
            if entry.is_file():
                # a vendored file carries its version in its name, so it never changes under it
                lasting = folder != web
                found[entry.name] = _file(entry.name, entry.read_bytes(), lasting=lasting)
    return found


def _file(name: str, content: bytes, *, lasting: bool = False) -> _File:
    return _File(
        content=content,
        compressed=gzip.compress(content, mtime=0),
        media_type=_TYPES[name[name.rindex(".") :]],
        tag=f'"{hashlib.sha256(content).hexdigest()[:16]}"',
        cache=f"public, max-age={_YEAR}, immutable" if lasting else "no-cache",
    )


def _facts() -> dict[str, Any]:
    return {
        "spacegroups": [spacegroup_symbol(number) for number in range(1, 231)],
        "crystal_systems": list(CRYSTAL_SYSTEMS),
        "properties": [
            {"name": p.name, "unit": p.unit, "description": p.description, "low": p.low, "high": p.high}
            for p in PROPERTIES.values()
        ],
    }
