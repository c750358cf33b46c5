"""The documentation of all routes as one page of plain HTML, made from the OpenAPI document.

It needs no script and fetches nothing: it can be read behind any firewall. /openapi.json beside it is what
generators of clients want.

Not here: the document itself (app.py makes it), the page for people who want crystals (web/).
"""

import json
from collections.abc import Mapping
from html import escape
from typing import Any

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; color: #1b1f24 }
h2 { border-top: 1px solid #d0d7de; padding-top: 1rem; overflow-wrap: anywhere }
table { border-collapse: collapse; width: 100%; table-layout: fixed }
th, td { text-align: left; vertical-align: top; padding: .3rem .5rem; border-bottom: 1px solid #eaeef2;
  overflow-wrap: anywhere }
th:first-child { width: 30% } code, pre { font: 14px/1.4 ui-monospace, monospace }
pre { background: #f6f8fa; padding: .6rem; overflow-x: auto } .method { color: #0550ae }
.kind { color: #57606a } a { color: #0550ae }
@media (prefers-color-scheme: dark) { body { background: #0d1117; color: #e6edf3 } pre { background: #161b22 }
  .method, a { color: #79c0ff } .kind { color: #9198a1 } th, td, h2 { border-color: #30363d } }
"""


def docs_page(document: Mapping[str, Any]) -> str:
    """Return the page of an OpenAPI document."""
    info = document["info"]
    routes = [
        (method.upper(), path, operation)
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    ]
    listed = "".join(f'<li><a href="#{_anchor(m, p)}">{m} {escape(p)}</a>' for m, p, _ in routes)
    sections = "".join(_section(method, path, operation, document) for method, path, operation in routes)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(info['title'])}: routes</title><style>{_STYLE}</style></head><body><main>"
        f"<h1>{escape(info['title'])} {escape(info['version'])}</h1>"
        f"<p>{escape(info.get('description', ''))} "
        'The same for programs: <a href="openapi.json">openapi.json</a>.</p>'
        f"<ul>{listed}</ul>{sections}</main></body></html>"
    )


def _section(method: str, path: str, operation: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    said = escape(operation.get("description") or operation.get("summary", ""))
    key = (
        "<p>Needs an API key: <code>Authorization: Bearer KEY</code>.</p>" if "security" in operation else ""
    )
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    fields = _fields(_resolved(body, document), document) if body else ""
    answers = "".join(
        f"<tr><th>{escape(status)}<td>{escape(answer.get('description', ''))} {_types(answer)}"
        for status, answer in operation["responses"].items()
    )
    return (
        f'<section><h2 id="{_anchor(method, path)}"><span class="method">{method}</span> {escape(path)}</h2>'
        f"<p>{said}</p>{key}{fields}<h3>Answers</h3><table>{answers}</table></section>"
    )


def _fields(schema: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    required = schema.get("required", ())
    rows = []
    for name, field in schema.get("properties", {}).items():
        examples = "".join(f"<pre>{escape(json.dumps(e))}</pre>" for e in field.get("examples", ()))
        must = " (required)" if name in required else ""
        rows.append(
            f"<tr><th><code>{escape(name)}</code>{must}"
            f'<td><span class="kind">{escape(_kind(field, document))}</span> '
            f"{escape(field.get('description', ''))}{examples}"
        )
    return f"<h3>Body</h3><table>{''.join(rows)}</table>" if rows else ""


def _kind(schema: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    """Return a type in words: "whole number, 1 to 1000"."""
    for union in ("anyOf", "oneOf"):
        if union in schema:
            kinds = [_kind(form, document) for form in schema[union] if form.get("type") != "null"]
            return " or ".join(dict.fromkeys(kinds))
    schema = _resolved(schema, document)
    if "enum" in schema or "const" in schema:
        return " or ".join(json.dumps(value) for value in schema.get("enum", [schema.get("const")]))
    kind = str(schema.get("type", "anything"))
    if kind == "array":
        return f"list of {_kind(schema.get('items', {}), document)}"
    words = {"integer": "whole number", "string": "text", "boolean": "true or false", "object": "object"}
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    bounds = [f"from {low:.15g}" if low is not None else "", f"to {high:.15g}" if high is not None else ""]
    inside = ", ".join(f"{name}: {_kind(f, document)}" for name, f in schema.get("properties", {}).items())
    told = " ".join(filter(None, [words.get(kind, kind), *bounds]))
    return f"{told} {{{inside}}}" if inside else told


def _types(answer: Mapping[str, Any]) -> str:
    return " ".join(f"<code>{escape(kind)}</code>" for kind in answer.get("content", {}))


def _resolved(schema: Mapping[str, Any], document: Mapping[str, Any]) -> Mapping[str, Any]:
    reference = schema.get("$ref")
    if not reference:
        return schema
    found: Mapping[str, Any] = document["components"]["schemas"][str(reference).rpartition("/")[2]]
    return found


def _anchor(method: str, path: str) -> str:
    return escape(f"{method.lower()}{path}", quote=True)
