"""serve/clients and the proxies of serve/, for real: they ask a running server, straight and through TLS."""

import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SERVE = ROOT / "serve"
CLIENTS = SERVE / "clients"


@pytest.fixture(scope="module")
def local_state(make_state):
    """Return a state that draws four completions at once, so that crystals come one after another."""
    return make_state(slots=4)


def ask(*command: str | Path, url: str, folder: Path, **variables: str) -> str:
    """Run a client in a folder; return what it printed."""
    environment = {**os.environ, "CRYSTALLM_KIT_URL": url, **variables}
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True, text=True, timeout=120, check=False, cwd=folder, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def program(name: str) -> str:
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if not found:
        pytest.skip(f"{name} is not installed")
    return found


def test_the_openai_example_completes_streams_and_chats(live_server, tmp_path):
    said = ask(sys.executable, CLIENTS / "openai_client.py", url=live_server.url, folder=tmp_path)
    assert said.startswith("model: crystallm-kit\n")
    assert len(re.findall(r"^completion: Na\d* Cl\d* .* stop$", said, flags=re.MULTILINE)) == 2
    assert re.search(r"^stream: Na", said, flags=re.MULTILINE)
    assert len(re.findall(r"^crystal: BaTiO3 \d+$", said, flags=re.MULTILINE)) == 2


def test_the_streaming_example_writes_cifs_of_what_was_asked(live_server, tmp_path):
    from pymatgen.core import Structure

    example = CLIENTS / "stream_crystals.py"
    said = ask(sys.executable, example, "NaCl", "2", "out", url=live_server.url, folder=tmp_path)
    assert re.search(r"^n after \d+ samples$", said, flags=re.MULTILINE)
    written = sorted((tmp_path / "out").glob("*.cif"))
    assert len(written) == 2
    for path in written:
        assert Structure.from_file(path).composition.reduced_formula == "NaCl"


def test_the_streaming_example_says_why_it_was_refused(live_server, tmp_path):
    with pytest.raises(AssertionError, match=r"400: .*Xx"):
        ask(sys.executable, CLIENTS / "stream_crystals.py", "Xx3", url=live_server.url, folder=tmp_path)


def test_the_javascript_example_sees_each_crystal(live_server, tmp_path):
    example = CLIENTS / "stream_crystals.mjs"
    said = ask(program("node"), example, "NaCl", "2", url=live_server.url, folder=tmp_path)
    assert len(re.findall(r"^\S+ NaCl \d+$", said, flags=re.MULTILINE)) == 2
    assert re.search(r"^n after \d+ samples$", said, flags=re.MULTILINE)


def test_the_curl_example_asks_every_route(live_server, tmp_path):
    program("curl")
    said = ask(CLIENTS / "curl.sh", url=live_server.url, folder=tmp_path)
    paths = live_server.app.openapi()["paths"]
    text = (CLIENTS / "curl.sh").read_text(encoding="utf-8")
    assert [path for path in paths if "{" not in path and f"$url{path}" not in text] == []
    assert "event: funnel" in said
    assert "crystallm_kit_requests_total" in said


def test_the_examples_bring_their_key(make_state, serve_app, tmp_path):
    from crystallm_kit.server.app import create_app

    keys = tmp_path / "api-keys"
    keys.write_text("a-key-for-this-test-0123\n")
    keys.chmod(0o600)
    with serve_app(create_app(make_state(api_key_file=keys, slots=4))) as server:
        example = [sys.executable, CLIENTS / "stream_crystals.py", "NaCl", "1"]
        with pytest.raises(AssertionError, match="401: "):
            ask(*example, url=server.url, folder=tmp_path)
        key = {"CRYSTALLM_KIT_KEY": "a-key-for-this-test-0123"}
        assert "n after" in ask(*example, url=server.url, folder=tmp_path, **key)
        if shutil.which("curl"):
            assert "event: funnel" in ask(CLIENTS / "curl.sh", url=server.url, folder=tmp_path, **key)


# ---------------------------------------------------------------- through a proxy


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


@pytest.fixture
def certificate(tmp_path):
    """Return a certificate and its key for crystals.example.org, made here."""
    files = tmp_path / "tls.crt", tmp_path / "tls.key"
    subject = ["-subj", "/CN=crystals.example.org", "-addext", "subjectAltName=DNS:crystals.example.org"]
    command = [
        program("openssl"),
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
    ]
    command += ["-nodes", "-days", "2", "-keyout", files[1], "-out", files[0], *subject]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    return files


@pytest.fixture
def nginx(live_server, certificate, tmp_path):
    """Run nginx with our file, its addresses and paths exchanged for those of this test; return its port."""
    found = program("nginx")
    port = free_port()
    text = (SERVE / "nginx.conf").read_text(encoding="utf-8")
    for there, here in (
        ("127.0.0.1:8000", f"127.0.0.1:{live_server.port}"),
        ("listen 443", f"listen 127.0.0.1:{port}"),
        ("listen 80;", f"listen 127.0.0.1:{free_port()};"),
        ("/etc/crystallm-kit/tls.crt", str(certificate[0])),
        ("/etc/crystallm-kit/tls.key", str(certificate[1])),
        ("/run/nginx.pid", str(tmp_path / "pid")),
        ("/var/log/nginx/", f"{tmp_path}/"),
    ):
        assert there in text, there
        text = text.replace(there, here)
    path = tmp_path / "nginx.conf"
    path.write_text(text)
    command = [found, "-c", str(path), "-e", str(tmp_path / "error.log")]
    checked = subprocess.run([*command, "-t"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    running = subprocess.Popen([*command, "-g", "daemon off;"])
    try:
        _wait_for(port, running)
        yield port
    finally:
        running.terminate()
        running.wait(timeout=10)


@pytest.fixture
def caddy(live_server, certificate, tmp_path):
    """Run Caddy with our file, its addresses and the way to a certificate exchanged; return its port."""
    found = program("caddy")
    port = free_port()
    text = (SERVE / "Caddyfile").read_text(encoding="utf-8")
    for there, here in (
        ("reverse_proxy 127.0.0.1:8000", f"reverse_proxy 127.0.0.1:{live_server.port}"),
        (
            "crystals.example.org {",
            f"crystals.example.org:{port} {{\n\ttls {certificate[0]} {certificate[1]}",
        ),
        ("{\n\t#", "{\n\tadmin off\n\tauto_https disable_redirects\n\t#"),
    ):
        assert there in text, there
        text = text.replace(there, here, 1)
    path = tmp_path / "Caddyfile"
    path.write_text(text)
    with (tmp_path / "caddy.log").open("wb") as log:
        running = subprocess.Popen(
            [found, "run", "--config", str(path), "--adapter", "caddyfile"],
            stdout=log, stderr=log, env={**os.environ, "HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path)},
        )  # fmt: skip
    try:
        _wait_for(port, running)
        yield port
    finally:
        running.terminate()
        running.wait(timeout=10)


def _wait_for(port: int, running: subprocess.Popen) -> None:
    until = time.monotonic() + 20
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert running.poll() is None, "the proxy ended"
            assert time.monotonic() < until, "the proxy does not listen"
            time.sleep(0.1)


def events_through(port: int, certificate: Path, body: dict) -> list[tuple[float, str]]:
    """Return (seconds since the request, line) of a stream of crystals, as they arrive through TLS."""
    trusted = ssl.create_default_context(cafile=str(certificate))
    plain = socket.create_connection(("127.0.0.1", port), timeout=60)
    with trusted.wrap_socket(plain, server_hostname="crystals.example.org") as connection:
        content = json.dumps(body).encode()
        head = (
            "POST /v1/crystals HTTP/1.1\r\nHost: crystals.example.org\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
        )
        began = time.monotonic()
        connection.sendall(head.encode() + content)
        lines, rest = [], b""
        while data := connection.recv(65536):
            *whole, rest = (rest + data).split(b"\n")
            lines += [(time.monotonic() - began, line.decode().strip()) for line in whole]
    return lines


@pytest.mark.parametrize("proxy", ["nginx", "caddy"])
def test_a_proxy_passes_each_crystal_on_as_it_comes(proxy, certificate, live_server, request):
    """Buffered, all events would arrive together at the end."""
    port = request.getfixturevalue(proxy)
    # more than are drawn at once: they cannot all be ready together
    body = {"conditions": {"formula": "NaCl"}, "n": 100, "unique": False, "redraws": 0, "stream": True}
    lines = events_through(port, certificate[0], body)
    assert lines[0][1].endswith("200 OK"), lines[0]
    crystals = [seconds for seconds, line in lines if line == "event: crystal"]
    assert len(crystals) == 100
    assert lines[-1][1] == "0" or any(line == "data: [DONE]" for _, line in lines)
    assert crystals[-1] - crystals[0] > 0.1 * crystals[-1], "they came one after another"


def test_a_client_that_leaves_a_proxy_frees_its_work(nginx, certificate, live_server):
    trusted = ssl.create_default_context(cafile=str(certificate[0]))
    content = b'{"conditions": {"formula": "NaCl"}, "n": 400, "unique": false, "stream": true}'
    head = (
        "POST /v1/crystals HTTP/1.1\r\nHost: crystals.example.org\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    plain = socket.create_connection(("127.0.0.1", nginx), timeout=60)
    with trusted.wrap_socket(plain, server_hostname="crystals.example.org") as connection:
        connection.sendall(head.encode() + content)
        assert b"event: request" in connection.recv(65536) + connection.recv(65536)
        assert live_server.state.backend.n_running() > 0
    until = time.monotonic() + 20
    while live_server.state.backend.n_running() or live_server.state.backend.n_waiting():
        assert time.monotonic() < until, "the work goes on for nobody"
        time.sleep(0.05)


def test_a_proxy_hides_counters_and_writes_no_key_down(nginx, certificate, tmp_path, live_server):
    import httpx

    trusted = ssl.create_default_context(cafile=str(certificate[0]))
    url = f"https://crystals.example.org:{nginx}"
    with httpx.Client(verify=trusted, transport=_Here(trusted)) as client:
        answer = client.get(f"{url}/v1/models?prompt=secret", headers={"Authorization": "Bearer hidden-key"})
        assert answer.json()["data"][0]["id"] == "crystallm-kit"
        assert answer.headers["strict-transport-security"]
        too_long = client.post(f"{url}/v1/crystals", content=b"x" * 2_000_000)
        assert too_long.status_code == 413
    logged = (tmp_path / "access.log").read_text()
    assert "/v1/models" in logged
    assert "hidden-key" not in logged
    assert "secret" not in logged


def _Here(trusted):  # noqa: N802
    """Return a transport that finds crystals.example.org on this machine."""
    import httpx

    class Transport(httpx.HTTPTransport):
        def handle_request(self, request):
            request.extensions["sni_hostname"] = request.url.host
            request.url = request.url.copy_with(host="127.0.0.1")
            return super().handle_request(request)

    return Transport(verify=trusted)
