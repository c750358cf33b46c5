"""The application as a whole: errors in one shape, what guards the door: tests of server/app.py, gate.py,
failures.py, streaming.py, docs_page.py, state.py."""

import asyncio
import json
import logging
import re
import time

import httpx
import pytest
from fastapi import Request
from fastapi.testclient import TestClient

from crystallm_kit.errors import UserError
from crystallm_kit.server.app import create_app
from crystallm_kit.server.backend import BackendError, NotReady
from crystallm_kit.server.failures import failure_of
from crystallm_kit.server.state import ServerSettings
from crystallm_kit.server.streaming import ClientGone, event_stream

JSON = {"Content-Type": "application/json"}
SECRET = "crystal\nSECRET-OF-THE-LAB"


@pytest.fixture(scope="module")
def http(live_server):
    with httpx.Client(base_url=live_server.url, timeout=60) as client:
        yield client


def assert_failed(answer, status: int, said: str = "", **detail) -> None:
    """Assert that an answer is an error in OpenAI's shape."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert said in body["error"]["message"]
    assert isinstance(body["error"]["type"], str)
    for key, value in detail.items():
        assert body["error"][key] == value, body


# ---------------------------------------------------------------- errors in one shape


@pytest.mark.parametrize(
    ("body", "said", "param"),
    [
        (b"{", "no JSON: EOF while parsing", None),
        (b"", "missing", None),
        (b"\xff\xfe", "no JSON", None),
        (b"[]", "expected a JSON object", None),
        (b'"text"', "expected a JSON object", None),
        (b"null", "", None),
        (b'{"prompt": "crystal\\n", "temperature": NaN}', "no JSON", None),
        (b'{"prompt": "crystal\\n", "temperature": -Infinity}', "no JSON", None),
        (b'{"prompt": "crystal\\n", "temperature": 1e999}', "temperature: got inf", "temperature"),
        (b'{"prompt": "\\ud800"}', "no JSON: unexpected end of hex escape", None),
        (b'{"prompt": "crystal\\n", "n": "2"}', "n: got '2'; input should be a valid integer", "n"),
        (b'{"prompt": "crystal\\n", "n": true}', "n: got True", "n"),
        (b'{"prompt": "crystal\\n", "n": 1.5}', "n: got 1.5", "n"),
        (b'{"prompt": "crystal\\n", "n": 1' + b"0" * 5000 + b"}", "no JSON: number out of range", None),
        (b'{"prompt": "crystal\\n", "stream": "yes"}', "stream: got 'yes'", "stream"),
        (b'{"prompt": "crystal\\n", "temprature": 1}', "did you mean 'temperature'?", "temprature"),
        (b'{"prompt": {"text": "crystal"}}', "prompt: expected a text, a list of texts", "prompt"),
        (b'{"prompt": "crystal\\n", "conditions": []}', "conditions: expected", "conditions"),
        (b'{"prompt": "crystal\\n", "n": 1' + b"0" * 4000 + b"}", "n: got 1000", "n"),
        (b'{"prompt": "' + b"[" * 100_000 + b'"}', "prompt: more than 5000 tokens", "prompt"),
        (b"[" * 100_000, "no JSON: recursion limit", None),
    ],
)  # fmt: skip
def test_a_body_that_is_none_is_a_mistake_of_the_sender(http, body, said, param):
    assert_failed(http.post("/v1/completions", content=body, headers=JSON), 400, said, param=param)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "nonsense", ""])
def test_a_body_that_is_not_said_to_be_json_is_refused(http, kind):
    """A page elsewhere can make a browser send such bodies without asking; JSON it cannot."""
    answer = http.post("/v1/completions", content=b'{"prompt": "crystal\\n"}', headers={"Content-Type": kind})
    assert_failed(answer, 400, "Content-Type: application/json")


def test_an_unknown_route_and_a_wrong_method_are_told(http):
    assert_failed(http.get("/v2/models"), 404, "/docs lists all", code="not_found")
    for path in (
        "/../../etc/passwd",
        "/v1/models/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd",
    ):
        assert_failed(http.get(path), 404)
    wrong = http.put("/v1/completions")
    assert_failed(wrong, 405, "it takes POST", code="method_not_allowed")
    assert wrong.headers["allow"] == "POST"


def test_a_body_that_is_too_long_is_refused_with_and_without_a_length(http):
    long = b'{"prompt": "' + b"a" * 10_000_000 + b'"}'
    assert_failed(http.post("/v1/completions", content=long, headers=JSON), 413, "more than 1000000 bytes")

    def chunks():
        for start in range(0, len(long), 100_000):
            yield long[start : start + 100_000]

    assert_failed(http.post("/v1/completions", content=chunks(), headers=JSON), 413, code="request_too_large")
    just = b'{"prompt": "' + b"a" * 900_000 + b'"}'
    assert_failed(http.post("/v1/completions", content=just, headers=JSON), 400, param="prompt")


def test_a_fault_of_ours_tells_nothing_but_where_to_look(make_state, caplog):
    app = create_app(make_state())

    @app.get("/v1/fault")
    async def fault() -> None:
        raise RuntimeError("the password is swordfish")

    with TestClient(app, raise_server_exceptions=False) as client:
        answer = client.get("/v1/fault")
    assert_failed(answer, 500, answer.headers["x-request-id"], code="internal_error")
    assert "swordfish" not in answer.text
    assert "swordfish" in caplog.text
    assert answer.headers["x-request-id"] in caplog.text


def test_any_mistake_of_the_user_is_a_400_under_its_name():
    class FlatEarth(UserError):
        pass

    failure = failure_of(FlatEarth("no"))
    assert (failure.status, failure.body()["error"]["code"]) == (400, "flat_earth")


def test_a_failure_within_a_stream_is_an_event_of_it(make_state, serve_app):
    state = make_state()
    with serve_app(create_app(state)) as server:
        body = {"prompt": "crystal\n", "n": 20, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            state.backend.engine._slots = None  # whatever is done next fails
            last = [line for line in lines if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "backend_error"
    assert "NoneType" not in last


def test_a_client_that_takes_nothing_for_too_long_is_taken_for_gone(make_state):
    """Its socket is full: sending to it never ends. The stream is closed, and with it the work."""
    state = make_state(stall_seconds=0.1)
    closed = []

    async def events():
        try:
            while True:
                yield b"data: {}\n\n"
        finally:
            closed.append(True)

    async def never(*_: object) -> dict[str, str]:
        await asyncio.Event().wait()
        return {}

    async def check() -> None:
        request = Request({"type": "http", "headers": []}, receive=never)
        response = await event_stream(request, state, events())
        sent = []

        async def send(message: dict[str, object]) -> None:
            sent.append(message)
            if len(sent) == 5:
                await never()

        with pytest.raises(ClientGone):
            await asyncio.wait_for(response({"type": "http"}, never, send), 5)
        assert len(sent) == 5

    asyncio.run(check())
    assert closed == [True]
    state.backend.engine.close()


# ---------------------------------------------------------------- life


def test_a_server_that_stops_refuses_new_work_and_says_when_to_come_back(make_state, serve_app):
    state = make_state()
    with serve_app(create_app(state)) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        assert client.get("/readyz").json() == {"status": "ready"}
        state.admission.drain()
        for answer in (
            client.get("/readyz"),
            client.post("/v1/completions", json={"prompt": "crystal\n"}),
            client.post("/v1/completions", json={"prompt": "crystal\n", "stream": True}),
        ):
            assert_failed(answer, 503, "stopping", code="not_ready")
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.headers["connection"] == "close"
        assert client.get("/healthz").status_code == 200


def test_an_engine_that_is_closed_is_not_ready(make_state):
    state = make_state()
    with TestClient(create_app(state)) as client:
        state.backend._is_closed = True
        assert_failed(client.get("/readyz"), 503, "not ready")
        assert_failed(client.post("/v1/completions", json={"prompt": "crystal\n"}), 503)
        state.backend._is_closed = False


def test_a_body_that_does_not_arrive_is_given_up(live_server, monkeypatch):
    import socket

    monkeypatch.setattr("crystallm_kit.server.gate.BODY_SECONDS", 0.2)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{"
    with socket.create_connection(("127.0.0.1", live_server.port), timeout=10) as connection:
        connection.sendall(head)
        began = time.monotonic()
        assert connection.recv(12) == b"HTTP/1.1 408"
    assert time.monotonic() - began < 5


def test_a_body_that_trickles_is_given_up_too(live_server, monkeypatch):
    """The time was that of each piece, and a byte now and then held a connection for ever."""
    import socket

    monkeypatch.setattr("crystallm_kit.server.gate.BODY_SECONDS", 0.5)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n"
    with socket.create_connection(("127.0.0.1", live_server.port), timeout=0.1) as connection:
        connection.sendall(head)
        said = b""
        for _ in range(40):
            connection.sendall(b" ")
            try:
                said = connection.recv(12)
                break
            except TimeoutError:
                continue
    assert said == b"HTTP/1.1 408"


def test_addresses_behind_the_server_are_not_told():
    for error in (
        BackendError("the engine at http://me:swordfish@10.0.0.7:8001 failed in the middle (ReadError)"),
        NotReady("no engine is ready: http://me:swordfish@10.0.0.7:8001: ConnectError; all are busy"),
    ):
        message = failure_of(error).message
        assert "swordfish" not in message
        assert "10.0.0.7" not in message
        assert "(address)" in message


# ---------------------------------------------------------------- the log


def test_the_log_has_a_line_for_each_request_without_what_was_sent(http, caplog):
    with caplog.at_level(logging.INFO, logger="crystallm_kit.server"):
        headers = {"Authorization": "Bearer sk-do-not-write-me-down", **JSON}
        answer = http.post(
            "/v1/completions?key=in-the-query", content=json.dumps({"prompt": SECRET}), headers=headers
        )
        assert answer.status_code == 400
        until = time.monotonic() + 5
        while not caplog.records and time.monotonic() < until:
            time.sleep(0.01)
    for secret in ("SECRET", "sk-do-not", "in-the-query"):
        assert secret not in caplog.text
    line = json.loads(caplog.records[-1].getMessage())
    assert line["id"] == answer.headers["x-request-id"]
    assert (line["method"], line["route"], line["status"]) == ("POST", "/v1/completions", 400)
    assert line["bytes_in"] == len(json.dumps({"prompt": SECRET}))
    assert line["bytes_out"] == len(answer.content)


# ---------------------------------------------------------------- the document


def test_the_document_tells_every_routes_errors_and_no_422(http):
    document = http.get("/openapi.json").json()
    assert {"/v1/models", "/v1/completions", "/healthz", "/readyz", "/metrics"} <= set(document["paths"])
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"]
            if "requestBody" in operation:
                assert {"400", "413", "429", "500", "502", "503"} <= set(operation["responses"]), path
    n = document["components"]["schemas"]["CompletionRequest"]["properties"]["n"]
    assert {"type": "integer", "minimum": 1, "maximum": 1000}.items() <= n["anyOf"][0].items()
    stream = document["paths"]["/v1/completions"]["post"]["responses"]["200"]["content"]
    assert set(stream) == {"application/json", "text/event-stream"}


def test_the_answers_fit_the_document(http):
    from jsonschema_rs import validator_for

    document = http.get("/openapi.json").json()

    def fits(name: str, data: object) -> None:
        schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
        validator_for(schema).validate(data)

    fits("ModelList", http.get("/v1/models").json())
    fits("ErrorBody", http.get("/v1/models/x").json())
    body = {"conditions": {"formula": "NaCl"}, "logprobs": 2, "return_token_ids": True, "seed": 1}
    fits("CompletionAnswer", http.post("/v1/completions", json=body).json())
    for line in http.post("/v1/completions", json={**body, "stream": True}).text.split("\n\n")[:-2]:
        fits("CompletionAnswer", json.loads(line.removeprefix("data: ")))


def test_the_documentation_is_one_page_that_fetches_nothing(http):
    page = http.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert not re.findall(r"<script|<link|src=|@import|url\(", page.text)
    assert set(re.findall(r'href="([^"#][^"]*)"', page.text)) == {"openapi.json"}
    for said in ("/v1/completions", "max_tokens", "whole number from 1 to 1000", "vllm_xargs", "429"):
        assert said in page.text


@pytest.mark.parametrize(
    "wrong", [{"max_n": 0}, {"port": 70_000}, {"max_queue": -1}, {"stall_seconds": float("nan")}]
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        ServerSettings(**wrong)
