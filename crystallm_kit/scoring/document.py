"""One HTML document with everything in it: style, scripts, icon; it loads nothing and needs no network.

    html = document("report.html.j2", title="Scores", with_structures=True, ...)

Contract: templates escape all they are given but `Markup`, which only the pictures of this room are. The
page's Content-Security-Policy lets exactly its own scripts run, by their hashes, so that even a text that got
through unescaped could not; it may load nothing but data: and blob: images. The viewer of structures is the
server's own (server/web: elements.js, crystal.js, viewer.js and 3Dmol.js), made one script.

Not here: what the pages say (report.py, comparison.py).
"""

import base64
import hashlib
import re
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

_VIEWER = ("elements.js", "crystal.js", "viewer.js")
_LIBRARY = "3dmol-2.5.5.min.js"
_IMPORT = re.compile(r"^import .*;\n", re.MULTILINE)
_EXPORT = re.compile(r"^export ", re.MULTILINE)


@dataclass(frozen=True)
class Script:
    """One script of a page, to be written as it is."""

    text: Any
    module: bool = False


@dataclass(frozen=True)
class Page:
    """What every page carries: all of it Markup but the policy and the icon's address."""

    policy: str
    icon: str
    logo: Any
    style: Any
    scripts: list[Script]


def document(template: str, *, title: str, with_structures: bool, **content: Any) -> str:
    """Return a page.

    Args:
        template: A file of page/.
        title: Of the page.
        with_structures: Carry 3Dmol.js (half a megabyte) and the viewer.
        content: What the template asks for.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    page = _page(with_structures)
    return str(environment.get_template(template).render(page=page, title=title, **content))


def markup(text: str) -> Any:
    """Return HTML or SVG of ours as what templates do not escape."""
    from markupsafe import Markup

    return Markup(text)


def embedded_json(text: str) -> Any:
    """Return JSON that can stand in a <script>: no "<" of a data's text can end it."""
    return markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))


def _page(with_structures: bool) -> Page:
    own = _read(_folder() / "report.js")
    if with_structures:
        library = _read(_web() / "vendor" / _LIBRARY)
        viewer = "\n".join(_EXPORT.sub("", _IMPORT.sub("", _read(_web() / name))) for name in _VIEWER)
        texts = [(library, False), (f"{viewer}\n{own}", True)]
    else:
        texts = [(own, True)]
    icon = _read(_web() / "icon.svg")
    hashes = " ".join(f"'sha256-{_sha256(text)}'" for text, _ in texts)
    return Page(
        policy=f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'",
        icon=f"data:image/svg+xml;base64,{base64.b64encode(icon.encode()).decode()}",
        logo=markup(icon.replace("<svg", '<svg aria-hidden="true"', 1)),
        style=markup(_read(_folder() / "report.css")),
        scripts=[Script(markup(text), module) for text, module in texts],
    )


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _template(name: str) -> str:
    return _read(_folder() / name)


def _folder() -> Traversable:
    return files("crystallm_kit") / "scoring" / "page"


def _web() -> Traversable:
    return files("crystallm_kit") / "server" / "web"


def _read(path: Traversable) -> str:
    # A browser hashes a script with its line ends as LF, whatever a checkout made of them.
    return path.read_text(encoding="utf-8").replace("\r\n", "\n").replace("\r", "\n")
