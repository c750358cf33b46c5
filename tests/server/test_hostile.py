"""Requests that mean harm, or come from a broken program, on every route that takes a body: each is refused
in OpenAI's shape, none opens a file, costs work or is written down. What one route alone refuses is tested
beside it (test_app.py, test_openai_routes.py, test_chat.py, test_crystals.py); keys in test_keys.py.
"""

import contextlib
import gzip
import json
import logging
import socket
import sys
import time

import httpx
import pytest
from fastapi.testclient import TestClient

from crystallm_kit.server.app import create_app

JSON = {"Content-Type": "application/json"}
# What each route needs at least, and is answered with 200.
ROUTES = {
    "/v1/completions": {"prompt": "crystal\n", "max_tokens": 3},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "NaCl"}], "max_samples": 3},
    "/v1/crystals": {"conditions": {"formula": "NaCl"}, "n": 1, "max_samples": 3},
}
WATCHED = ("open", "os.listdir", "os.scandir", "subprocess.Popen", "os.system", "os.exec", "exec", "import")
_opened: list[tuple[str, str]] | None = None


def _hear(event: str, arguments: tuple) -> None:
    if _opened is not None and event in WATCHED:
        _opened.append((event, repr(arguments)))


@pytest.fixture(scope="module", autouse=True)
def hook():
    sys.addaudithook(_hear)  # stays until the process ends, and hears nothing outside of `opened`


@pytest.fixture(scope="module")
def warm(http):
    """Return a client of a server that has loaded what it loads at first use."""
    for path, body in ROUTES.items():
        assert http.post(path, json=body).status_code == 200
        assert http.post(path, json={**body, "model": "nothing"}).status_code == 404
    for path in ("/nothing", "/page/nothing", "/v1/models/nothing"):
        assert http.get(path).status_code == 404
    return http


@pytest.fixture
def opened(warm):
    """Return the list of what this process opens, lists, starts and imports while the test runs."""
    del warm
    global _opened
    _opened = []
    yield _opened
    _opened = None


@pytest.fixture(scope="module")
def http(live_server):
    with httpx.Client(base_url=live_server.url, timeout=60, trust_env=False) as client:
        yield client


def assert_refused(answer, status: int = 400, **detail) -> None:
    assert answer.status_code == status, answer.text[:500]
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["type"] == "invalid_request_error"
    assert 0 < len(body["error"]["message"]) < 1000
    for key, value in detail.items():
        assert body["error"][key] == value, body


def with_field(path: str, name: str, raw: bytes) -> bytes:
    """Return a route's body with one more field, written as it stands."""
    fields = {key: value for key, value in ROUTES[path].items() if key != name}
    return json.dumps(fields).encode()[:-1] + b', "' + name.encode() + b'": ' + raw + b"}"


def nested(depth: int, *, of: str) -> bytes:
    left, right = {"lists": (b"[", b"]"), "objects": (b'{"a":', b"}")}[of]
    return left * depth + b"1" + right * depth


# ---------------------------------------------------------------- bodies


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"nul", b"{}}", b"[]", b"null", b"1", b'"text"', b"{'n': 1}", b"\x00", b"\xff\xfe\x00",
        b'{"n": 1,}', b"NaN", b"-Infinity", b'{"\\udfff": 1}', b'{"a\xc3": 1}',
        '{"n": 1}'.encode("utf-16"), b"\xef\xbb\xbf{}", gzip.compress(b'{"n": 1}', mtime=0),
        b"n=1&stream=true", b"<?xml version='1.0'?><!DOCTYPE a SYSTEM 'file:///etc/passwd'><a/>",
        b"[" * 200_000, b'{"a":' * 100_000, b'{"__proto__": {}}', b'{"__class__": "x", "model_fields": 1}',
    ],
    ids=lambda body: repr(body[:12]),
)  # fmt: skip
def test_a_body_that_is_none_is_refused_by_every_route(http, path, body):
    assert_refused(http.post(path, content=body, headers=JSON))


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("n", b"1000000000"), ("n", b"1" + b"0" * 400), ("n", b"1" + b"0" * 4500), ("n", b"-1"),
        ("n", b"1e3"), ("n", b'"1"'), ("n", b"true"), ("n", b"[1]"), ("n", b"{}"), ("n", b"1.5"), ("n", b"0"),
        ("temperature", b"NaN"), ("temperature", b"Infinity"), ("temperature", b"-Infinity"),
        ("temperature", b"1e999"), ("temperature", b"-0.1"), ("temperature", b'"NaN"'),
        ("temperature", b"[]"), ("temperature", b"true"), ("top_p", b"0"), ("top_p", b"1e-999"),
        ("top_p", b"2"), ("top_k", b"1.5"), ("top_k", b"9223372036854775808"), ("seed", b"1" + b"0" * 30),
        ("seed", b'"x"'), ("seed", b"1.0"), ("stream", b"1"), ("stream", b'"true"'), ("model", b"1"),
        ("model", b"[]"), ("model", b'"\\ud800"'), ("model", b'"' + b"a" * 100_000 + b'"'),
        ("conditions", b"1"), ("conditions", b'"NaCl"'), ("conditions", b"[]"),
        ("conditions", nested(150, of="objects")),
        ("conditions", b'{"formula": ' + nested(150, of="lists") + b"}"),
        ("conditions", b'{"elements": ' + nested(150, of="lists") + b"}"),
        ("conditions", b'{"properties": ' + nested(150, of="objects") + b"}"),
        ("conditions", b'{"formula": "Xx2"}'), ("conditions", b'{"formula": {"Xx": 2}}'),
        ("conditions", b'{"elements": ["Unobtainium"]}'), ("conditions", b'{"elements": "Na-Xx"}'),
        ("conditions", b'{"formula": "Na' + b"9" * 5000 + b'"}'),
        ("conditions", b'{"formula": {"Na": 1' + b"0" * 300 + b"}}"),
        ("conditions", b'{"formula": {"Na": NaN}}'), ("conditions", b'{"formula": {"Na": 1e400}}'),
        ("conditions", b'{"formula": "' + b"(" * 5000 + b'"}'),
        ("conditions", b'{"formula": "' + b"NaCl" * 20_000 + b'"}'),
        ("conditions", b'{"formula": "\\u0000"}'), ("conditions", b'{"sites": 1' + b"0" * 300 + b"}"),
        ("conditions", b'{"sites": "1-' + b"9" * 5000 + b'"}'), ("conditions", b'{"sites": -5}'),
        ("conditions", b'{"spacegroup": 1' + b"0" * 300 + b"}"),
        ("conditions", b'{"spacegroup": "../../etc/passwd"}'), ("conditions", b'{"n_elements": 1e300}'),
        ("conditions", b'{"anonymous_formula": "' + b"A" * 50_000 + b'"}'),
        ("conditions", b'{"properties": {"band_gap": "' + b"9" * 5000 + b'"}}'),
        ("conditions", b'{"properties": {"band_gap": [1e308, -1e308]}}'),
        ("conditions", b'{"properties": {"../../etc/passwd": 1}}'),
        ("conditions", b'{"elements": "' + b"Na-" * 30_000 + b'Xx"}'),
        ("conditions", b'{"crystal_system": "' + b"x" * 50_000 + b'"}'),
        ("no_such_field", b"1"), ("adapter", b'"/etc/passwd"'), ("lora_path", b'"/etc/passwd"'),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)}-{value[:24]!r}",
)  # fmt: skip
def test_a_field_that_is_wrong_is_refused_at_once_by_every_route(http, live_server, path, name, raw):
    n_before = live_server.state.admission.n_inside
    began = time.monotonic()
    answer = http.post(path, content=with_field(path, name, raw), headers=JSON)
    assert_refused(answer, 404 if name == "model" and answer.status_code == 404 else 400)
    assert time.monotonic() - began < 5
    assert live_server.state.admission.n_inside == n_before == 0


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    "kind",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "json",
     "application/octet-stream"],
)  # fmt: skip
def test_a_body_of_another_content_type_is_refused_by_every_route(http, path, kind):
    """A page elsewhere can make a browser send such bodies without asking."""
    headers = {"Content-Type": kind}
    assert_refused(http.post(path, content=json.dumps(ROUTES[path]).encode(), headers=headers))


@pytest.mark.parametrize("path", ROUTES)
def test_ten_megabytes_are_refused_by_every_route(http, path):
    long = with_field(path, "prompt", b'"' + b"a" * 10_000_000 + b'"')
    assert_refused(http.post(path, content=long, headers=JSON), 413, code="request_too_large")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": [-1] * 230_000}),
        ("/v1/completions", {"prompt": [[-1]] * 150_000}),
        ("/v1/completions", {"prompt": ["a"] * 190_000}),
        ("/v1/completions", {"stop": [""] * 200_000}),
        ("/v1/chat/completions", {"messages": [{}] * 230_000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{}] * 200_000}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "1" * 1000}]}),
        ("/v1/crystals", {f"k{i}": 1 for i in range(70_000)}),
        ("/v1/crystals", {"conditions": {f"k{i}": 1 for i in range(70_000)}}),
        ("/v1/crystals", {"conditions": {"elements": ["Na"] * 140_000 + ["Xx"]}}),
        ("/v1/crystals", {"conditions": {"properties": {f"k{i}": 1 for i in range(70_000)}}}),
        ("/v1/crystals", {"prompt": "1" * 1000}),
    ],
    ids=lambda value: value if isinstance(value, str) else repr(value)[:40],
)
def test_a_megabyte_of_mistakes_keeps_nobody_waiting(http, path, body):
    """A list of wrong token ids held the event loop for 4 s: each of them was to be told of."""
    content = json.dumps(body, separators=(",", ":")).encode()
    assert len(content) < 1_000_000
    began = time.process_time()  # of client and server, which are one process here
    assert_refused(http.post(path, content=content, headers=JSON))
    assert time.process_time() - began < 1.5


@pytest.mark.parametrize(
    "crystal",
    [
        "", "{}", "[]", "1", "NaN", "null", "[" * 50_000, '{"elements":' + "[" * 450 + "]" * 450 + "}",
        '{"conditions":' * 20 + "1" + "}" * 20, '{"conditions": {"n_elements": NaN}}', '{"elements": [-1]}',
        '{"elements": [0], "plans": [[]]}', '{"elements": [1e400]}', '{"elements": [0], "max_sites": 100000}',
        '{"elements": [0], "groups": [231]}', '{"elements": [0], "lora": "/etc/passwd"}', '{"plans": [[1]]}',
    ],
    ids=lambda crystal: repr(crystal[:24]),
)  # fmt: skip
def test_a_constraint_that_is_none_is_refused(http, crystal):
    body = {**ROUTES["/v1/completions"], "vllm_xargs": {"crystal": crystal}}
    assert_refused(http.post("/v1/completions", json=body), param="vllm_xargs")


# ---------------------------------------------------------------- names and paths

NAMES = [
    "../../etc/passwd", "/etc/passwd", "..", ".", "", "bulk-modulus/", "./bulk-modulus", "BULK-MODULUS", "*",
    "adapters/bulk-modulus", "../adapters/bulk-modulus", "bulk-modulus/adapter_config.json", "~/.ssh/id_rsa",
    "bulk-modulus\u0000", "bulk\u2010modulus", "file:///etc/passwd", "http://127.0.0.1:1/model", "$HOME",
    "meta-llama/Llama-2-7b-hf", "a" * 256, "C:\\Windows\\win.ini", "\u202e", "\U0001f600", "None",
    "%2e%2e%2fetc%2fpasswd", "crystallm-kit ",
]  # fmt: skip


@pytest.mark.parametrize("path", ROUTES)
def test_no_name_of_a_model_becomes_a_path(http, opened, path):
    for name in NAMES:
        answer = http.post(path, json={**ROUTES[path], "model": name})
        assert_refused(answer, 404, code="model_not_found", param="model")
    assert opened == []


def test_no_path_of_a_request_is_opened(http, opened):
    for name in NAMES:
        quoted = httpx.URL("/", params={"q": name}).query.decode()[2:]
        for path in (f"/v1/models/{quoted}", f"/page/{quoted}", f"/{quoted}x"):
            assert http.get(path, follow_redirects=True).status_code in (200, 404), path
    assert opened == []


@pytest.mark.parametrize("path", ROUTES)
def test_no_word_of_a_body_is_opened(http, opened, path):
    """Whatever a text says, a path or an address: nothing is read, listed, started, imported."""
    for word in ("../../pyproject.toml", "NaCl file:///etc/passwd", "__import__('os').system('id')"):
        for name in ("prompt", "format", "protocol", "conditions", "model"):
            value = {"formula": word} if name == "conditions" else word
            assert http.post(path, json={**ROUTES[path], name: value}).status_code in (200, 400, 404)
        chat = {"messages": [{"role": "user", "content": word}], "max_samples": 1}
        assert http.post("/v1/chat/completions", json=chat).status_code in (200, 400)
    assert opened == []


# ---------------------------------------------------------------- below HTTP, and what is written down


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET\r\n\r\n", b"\x00" * 100, b"G" * 200_000,
        b"GET / HTTP/1.1\r\n" + b"A: " + b"a" * 200_000 + b"\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999\r\n\r\n{",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /v1/models/\xff\xfe HTTP/1.1\r\nHost: x\r\nAuthorization: \xff\r\nConnection: close\r\n\r\n",
        b"GET http://169.254.169.254/ HTTP/1.1\r\nHost: 169.254.169.254\r\nConnection: close\r\n\r\n",
    ],
    ids=lambda sent: repr(sent[:24]),
)  # fmt: skip
def test_what_is_no_http_costs_its_connection_alone(http, live_server, sent):
    with socket.create_connection(("127.0.0.1", live_server.port), timeout=5) as connection:
        said = b""
        with contextlib.suppress(OSError):  # it may have closed the door by then
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            said = connection.recv(4096)
    assert not said or said.split()[1] in (b"400", b"404", b"413"), said[:200]
    assert http.get("/healthz").status_code == 200


def test_a_key_is_never_written_down_or_repeated_wherever_it_was_put(
    make_state, tmp_path, caplog, monkeypatch
):
    """People put keys into queries, bodies and other headers by mistake; a right one must not leak so."""
    key, file = "sk-right-0123456789abcdef", tmp_path / "keys"
    file.write_text(f"{key}\n")
    file.chmod(0o600)
    caplog.set_level(logging.DEBUG)
    for client_log in ("httpx", "httpx2"):  # they are not the server's
        monkeypatch.setattr(logging.getLogger(client_log), "disabled", True)
    with TestClient(create_app(make_state(api_key_file=file))) as client:
        right = {"Authorization": f"Bearer {key}"}
        answers = [
            client.get(f"/v1/models?api_key={key}"),
            client.get("/v1/models", headers={"X-Api-Key": key, "Cookie": f"key={key}"}),
            client.get("/v1/models", headers={"Authorization": f"Basic {key}"}),
            client.get("/v1/models", headers={"Authorization": key}),
            client.get(f"/{key}", headers=right),
            client.get("/metrics", headers=right),
            client.get("/openapi.json", headers=right),
        ]
        for path, body in ROUTES.items():
            answers += [
                client.post(path, json={**body, "api_key": key}, headers=right),
                client.post(path, json={**body, "conditions": {"api_key": key}}, headers=right),
                client.post(path, content=f"{{{key}", headers={**right, **JSON}),
            ]
    assert {answer.status_code for answer in answers[:4]} == {401}
    assert {answer.status_code for answer in answers[7:]} == {400}
    assert "crystallm_kit.server.access" in caplog.text
    assert key not in caplog.text
    for answer in answers:
        assert key not in answer.text
        assert key not in str(answer.headers)
