"""API keys: tests of server/keys.py and of the routes that ask for one."""

import logging

import httpx
import pytest
from fastapi.testclient import TestClient

from crystallm_kit.errors import ReadError
from crystallm_kit.server.app import create_app
from crystallm_kit.server.keys import Keys

KEY = "sk-lab-0123456789abcdef"
OTHER = "sk-guest-fedcba9876543210"


@pytest.fixture
def key_file(tmp_path):
    path = tmp_path / "keys.txt"
    path.write_text(f"# the lab\n{KEY}\n\n  {OTHER}   # until March\n")
    path.chmod(0o600)
    return path


def test_each_key_of_the_file_is_let_in_and_nothing_else(key_file):
    keys = Keys.from_file(key_file)
    for key in (KEY, OTHER):
        assert keys.admit(f"Bearer {key}")
        assert keys.admit(f"bearer  {key} ")
    for header in (None, "", "Bearer", "Bearer ", KEY, f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}",
                   f"Bearer {KEY} {OTHER}", "Bearer # the lab", "Bearer \udcff"):  # fmt: skip
        assert not keys.admit(header), header


def test_without_keys_everybody_is_let_in():
    assert Keys().admit(None)


def test_keys_are_not_in_what_is_printed(key_file):
    keys = Keys.from_file(key_file)
    for shown in (repr(keys), str(vars(keys)), f"{keys}"):
        assert KEY not in shown
        assert OTHER not in shown


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "no key in it"),
        ("# only a comment\n", "no key in it"),
        ("short\n", "line 1: expected one key of 16 or more"),
        (f"{KEY}\ntwo words of a phrase\n", "line 2: expected one key"),
    ],
)
def test_a_file_without_good_keys_is_refused_without_repeating_them(tmp_path, content, said):
    path = tmp_path / "keys.txt"
    path.write_text(content)
    with pytest.raises(ReadError, match=said) as caught:
        Keys.from_file(path)
    assert KEY not in str(caught.value)
    assert "two words" not in str(caught.value)


def test_a_file_that_everybody_may_write_to_is_refused(key_file):
    key_file.chmod(0o666)
    with pytest.raises(ReadError, match="chmod 600"):
        Keys.from_file(key_file)


def test_a_file_that_everybody_may_read_is_warned_of(key_file, caplog):
    key_file.chmod(0o600)
    Keys.from_file(key_file)
    assert not caplog.text
    key_file.chmod(0o644)
    assert Keys.from_file(key_file)
    assert "chmod 600" in caplog.text
    assert KEY not in caplog.text


def test_a_missing_file_is_an_error_not_an_open_door(tmp_path):
    with pytest.raises(ReadError, match="cannot be read"):
        Keys.from_file(tmp_path / "none.txt")


def test_work_needs_a_key_and_health_does_not(make_state, key_file, caplog):
    caplog.set_level(logging.DEBUG)
    state = make_state(api_key_file=key_file)
    with TestClient(create_app(state)) as client:
        for path in ("/healthz", "/readyz", "/docs", "/openapi.json"):
            assert client.get(path).status_code == 200, path
        for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions"), ("GET", "/metrics"),
                             ("POST", "/v1/nothing"), ("POST", "/healthz")):  # fmt: skip
            refused = client.request(method, path, headers={"Authorization": f"Bearer {KEY}x"})
            assert refused.status_code == 401, path
            assert refused.headers["www-authenticate"] == "Bearer"
            assert refused.json()["error"]["code"] == "invalid_api_key"
            assert client.request(method, path).status_code == 401
        key = {"Authorization": f"Bearer {KEY}"}
        assert client.get("/v1/models", headers=key).status_code == 200
        assert client.get("/metrics", headers=key).status_code == 200
        document = client.get("/openapi.json").json()
    assert document["paths"]["/v1/models"]["get"]["security"]
    assert "security" not in document["paths"]["/healthz"]["get"]
    assert KEY not in caplog.text


def test_who_has_no_key_reads_the_refusal_even_of_a_long_body(make_state, serve_app, key_file):
    """A server that closes with the body unread resets the connection, and its answer is lost."""
    with serve_app(create_app(make_state(api_key_file=key_file))) as server:
        for _ in range(5):
            answer = httpx.post(f"{server.url}/v1/completions", content=b"a" * 900_000)
            assert answer.status_code == 401


def test_metrics_can_be_read_without_a_key_where_the_setting_says_so(make_state, key_file):
    with TestClient(create_app(make_state(api_key_file=key_file, metrics_need_key=False))) as client:
        assert client.get("/metrics").status_code == 200
        assert client.get("/v1/models").status_code == 401
