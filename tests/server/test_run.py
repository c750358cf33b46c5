"""The command `crystallm-kit serve` as a process of its own: a toy model, real sockets and signals."""

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from crystallm_kit.cli import main
from crystallm_kit.errors import ModelError, UserError
from crystallm_kit.server.run import bound, is_local, serve
from crystallm_kit.server.serving import Serving, adapter_folders, model_name, served
from crystallm_kit.server.state import ServerSettings
from crystallm_kit.server.vllm_jobs import Served as ServedModel
from crystallm_kit.server.vllm_jobs import VllmFound, find_vllm, free_ports, lora_rank, vllm_jobs

ROOT = Path(__file__).parents[2]
STAND_IN = Path(__file__).with_name("vllm_stand_in.py")
PRETRAINED = ROOT / "crystallm_kit" / "pretrained"
BULK = PRETRAINED / "adapters" / "bulk-modulus"


@pytest.fixture
def toy_server(toy_model, serve_command):
    with serve_command("--model", toy_model, "--slots", "4", "--drain-seconds", "120") as made:
        yield made


LONG = {"prompt": "crystal\n", "max_tokens": 240, "stream": True, "n": 50}


def test_it_answers_where_it_says_and_sigterm_finishes_what_runs(toy_server):
    assert toy_server.lines[0].startswith("toy: transformers in this process, on cpu, 4 at a time")
    assert toy_server.get("/readyz").status_code == 200
    assert [card["id"] for card in toy_server.get("/v1/models").json()["data"]] == ["toy"]
    answer = toy_server.post("/v1/completions", {"prompt": "crystal\n", "max_tokens": 5})
    assert answer.status_code == 200, answer.text
    assert toy_server.get("/").status_code == 200
    # what it says to try can be tried
    curl = toy_server.lines[2].split("-d '")[1].split("'")[0]
    assert "formula" in json.loads(curl)["conditions"]

    got, began = [], threading.Event()

    def read():
        with httpx.stream(
            "POST", f"{toy_server.url}/v1/completions", json=LONG, timeout=60, trust_env=False
        ) as answer:
            for line in answer.iter_lines():
                got.append(line)
                began.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert began.wait(20)
    toy_server.tell()
    until = time.monotonic() + 5
    while (refused := toy_server.post("/v1/completions", {"prompt": "crystal\n"})).status_code != 503:
        assert time.monotonic() < until
    assert "Retry-After" in refused.headers
    assert refused.json()["error"]["code"] == "not_ready"
    assert toy_server.get("/readyz").status_code == 503
    reader.join(60)
    assert [line for line in got if line][-1] == "data: [DONE]"
    chunks = [json.loads(line[6:]) for line in got if line.startswith("data: {")]
    finished = [c["index"] for chunk in chunks for c in chunk["choices"] if c["finish_reason"]]
    assert sorted(finished) == list(range(LONG["n"]))
    code, out, err = toy_server.end()
    assert (code, err) == (0, "")
    assert "1 request may finish" in out


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(toy_server):
    body = {**LONG, "n": 1000}
    with httpx.stream("POST", f"{toy_server.url}/v1/completions", json=body, trust_env=False) as answer:
        lines = answer.iter_lines()
        next(lines)
        toy_server.tell()
        time.sleep(0.3)
        assert toy_server.process.poll() is None
        toy_server.tell(signal.SIGINT)
        assert toy_server.end(within=5.0)[0] == 1


@pytest.mark.slow
def test_what_does_not_finish_in_time_is_given_up(toy_model, serve_command):
    with serve_command("--model", toy_model, "--slots", "1", "--drain-seconds", "0.2") as server:
        body = {**LONG, "n": 1000}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, trust_env=False) as answer:
            lines = answer.iter_lines()  # without a name its end would close the connection
            next(lines)
            server.tell()
            with contextlib.suppress(httpx.HTTPError):
                assert "data: [DONE]" not in list(lines)
        assert server.end(within=15.0)[0] == 0


@pytest.fixture
def run(capsys):
    """Return a function from arguments to (exit code, what was said) of a command that ends by itself."""

    def ended(*arguments):
        code = main(["serve", *map(str, arguments)])
        return code, capsys.readouterr().err

    return ended


def test_a_public_address_without_a_key_is_refused(run):
    code, said = run("--host", "0.0.0.0", "--port", "0")
    assert code == 2
    assert said.count("\n") == 1
    assert "--api-key-file" in said


@pytest.mark.slow
def test_a_public_address_with_a_key_is_taken(toy_model, tmp_path, serve_command):
    keys = tmp_path / "keys"
    keys.write_text("sk-0123456789abcdef\n")
    keys.chmod(0o600)
    with serve_command("--model", toy_model, "--host", "0.0.0.0", "--api-key-file", keys) as server:
        body = {"prompt": "crystal\n", "max_tokens": 3}
        assert server.post("/v1/completions", body).status_code == 401
        right = {"Authorization": "Bearer sk-0123456789abcdef"}
        assert server.post("/v1/completions", body, headers=right).status_code == 200
        assert "Authorization: Bearer KEY" in server.lines[2]
        server.tell()
        _, out, err = server.end()
        assert "sk-0123456789abcdef" not in "".join(server.lines) + out + err


def test_a_taken_port_is_said_in_one_line(run):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        code, said = run("--port", port)
    assert code == 2
    assert said == f"UserError: port {port} of 127.0.0.1: address already in use; name another with --port\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--engine", "vlm"), "engine 'vlm'"),
        (("--engine", "vllm", "--upstream", "http://a"), "leave --engine out"),
        (("--adapter", "no-such-adapter"), "no-such-adapter"),
        (("--adapter", "../x=bulk-modulus"), "with a name of letters"),
        (("--host", "no.such.host.invalid"), "no address of this machine"),
        (("--upstream", "no-address"), "an address expected"),
        (("--port", "70000"), "65535"),
        (("--vllm-args", "'"), "--vllm-args"),
        (("--engine", "vllm", "--vllm-python", "/no/such/python"), "cannot be asked for vllm"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(run, arguments, said):
    code, err = run("--port", "0", *arguments)
    assert code == 2
    assert err.count("\n") == 1
    assert said in err


def test_an_engine_that_is_not_installed_is_said_with_the_command(run):
    if find_vllm() is not None:
        pytest.skip("vllm is installed here")
    code, err = run("--port", "0", "--engine", "vllm")
    assert code == 2
    assert "pip install 'crystallm-kit[vllm]'" in err


def test_only_addresses_of_this_machine_are_local():
    assert is_local("127.0.0.1")
    assert is_local("localhost")
    assert is_local("::1")
    assert not is_local("0.0.0.0")
    assert not is_local("::")
    with pytest.raises(UserError):
        bound("203.0.113.1", 0)  # of the range for documentation, nobody's
    with pytest.raises(UserError, match="others can reach it"):
        serve(Serving(), ServerSettings(host="::", port=0))


def test_small_answers_are_sent_at_once():
    """With sockets whose protocol was left open, asyncio left TCP_NODELAY alone: 47 ms for each answer."""

    async def option() -> int:
        found = asyncio.get_running_loop().create_future()

        async def taken(_, writer):
            taken_socket = writer.get_extra_info("socket")
            found.set_result(taken_socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listener = bound("127.0.0.1", 0)
        async with await asyncio.start_server(taken, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            on = await found
            writer.close()
        return on

    assert asyncio.run(option()) == 1


def test_adapters_are_those_that_are_configured(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
    (tmp_path / "no-adapter").mkdir()
    what = Serving(adapters=("mine=bulk-modulus", "bulk-modulus"), adapter_folder=tmp_path)
    assert adapter_folders(what) == {
        "mine": BULK, "bulk-modulus": BULK, "one": tmp_path / "one", "two": tmp_path / "two",
    }  # fmt: skip
    for wrong, match in (
        (Serving(adapters=("one=bulk-modulus",), adapter_folder=tmp_path), "named twice"),
        (Serving(adapters=("crystallm-kit=bulk-modulus",)), "with a name"),
        (Serving(adapters=(f"a={tmp_path}/no-adapter",)), "no adapter_config.json"),
        (Serving(adapter_folder=tmp_path / "nowhere"), "no such folder"),
    ):
        with pytest.raises(UserError, match=match):
            adapter_folders(wrong)


def test_a_model_has_the_name_of_its_folder(tmp_path):
    assert model_name(Serving()) == "crystallm-kit"
    assert model_name(Serving(model=str(tmp_path / "perovskites") + "/")) == "perovskites"
    assert model_name(Serving(model="org/some-model")) == "some-model"
    assert model_name(Serving(name="mine")) == "mine"
    with pytest.raises(UserError):
        model_name(Serving(name="a b"))


def test_a_model_behind_servers_needs_no_weights(tmp_path, toy_model):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "manifest.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((toy_model / name).read_bytes())
    found = served(Serving(model=str(folder), upstream=("http://127.0.0.1:1",)), ServerSettings())
    assert found.backend.max_positions == 256
    assert found.model.representation.name == "wyckoff"
    assert found.backend.takes_requests
    with pytest.raises(ModelError):
        served(Serving(model=str(tmp_path / "nowhere"), upstream=("http://127.0.0.1:1",)), ServerSettings())


# ---------------------------------------------------------------- in front of servers


@pytest.fixture
def stand_in():
    port = free_ports(1)[0]
    arguments = ["--port", str(port), "--served-model-name", "toy", "--lora-modules", "extra=x"]
    with subprocess.Popen([sys.executable, str(STAND_IN), *arguments], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline()
        yield f"http://127.0.0.1:{port}"
        process.kill()


def test_in_front_of_another_server_all_routes_work(toy_model, stand_in, serve_command):
    with serve_command("--model", toy_model, "--upstream", stand_in) as server:
        until = time.monotonic() + 10
        while server.get("/readyz").status_code != 200:
            assert time.monotonic() < until
            time.sleep(0.05)
        assert "1 vLLM server upstream" in server.lines[0]
        names = [card["id"] for card in server.get("/v1/models").json()["data"]]
        assert names == ["toy", "extra"]
        body = {"prompt": "crystal\n", "max_tokens": 20, "n": 2, "model": "extra"}
        answer = server.post("/v1/completions", body)
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["choices"]) == 2
        crystals = server.post("/v1/crystals", {"n": 1, "max_samples": 4})
        assert crystals.status_code == 200, crystals.text
        assert crystals.json()["usage"]["n_samples"] == 4
        # its prompt tells the stand-in to fail
        failed = server.post("/v1/completions", {"prompt": [370, 103], "max_tokens": 5})
        assert failed.status_code == 502, failed.text
        server.tell()
        assert server.end()[0] == 0


# ---------------------------------------------------------------- commands for vLLM


CPU = VllmFound("python", has_command=False, has_scale_out_option=True, n_gpus=0, has_kit=True)
GPUS = VllmFound("python", has_command=True, has_scale_out_option=False, n_gpus=2, has_kit=True)


def options_of(job):
    words = list(job.command)
    return {w: words[i + 1] for i, w in enumerate(words[:-1]) if w.startswith("--")}


def test_engines_share_the_gpus_and_draw_by_seeds_of_their_own(tmp_path):
    jobs = vllm_jobs(GPUS, ServedModel(PRETRAINED, "kit"), folder=tmp_path, engines=4, key="secret")
    options = [options_of(job) for job in jobs]
    assert len({job.port for job in jobs}) == 4
    assert {o["--gpu-memory-utilization"] for o in options} == {"0.450"}
    assert [job.environment["CUDA_VISIBLE_DEVICES"] for job in jobs] == ["0", "1", "0", "1"]
    assert len({o["--seed"] for o in options}) == 4
    assert {o["--host"] for o in options} == {"127.0.0.1"}
    assert all("secret" not in " ".join(job.command) for job in jobs)
    assert {job.environment["VLLM_API_KEY"] for job in jobs} == {"secret"}
    assert jobs[0].environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == ""


def test_an_engine_spread_over_gpus_sees_them_all(tmp_path):
    arguments = ("--tensor-parallel-size", "2")
    (job,) = vllm_jobs(GPUS, ServedModel(PRETRAINED, "kit"), folder=tmp_path, arguments=arguments)
    assert job.command[-2:] == arguments
    assert "CUDA_VISIBLE_DEVICES" not in job.environment
    assert options_of(job)["--gpu-memory-utilization"] == "0.900"


def test_an_adapter_with_trained_token_rows_gets_an_engine_of_its_own(tmp_path):
    """vLLM refuses such an adapter, or would leave its rows out."""
    plain = tmp_path / "plain"
    plain.mkdir()
    settings = json.loads((BULK / "adapter_config.json").read_text())
    settings |= {"trainable_token_indices": None, "r": 12}
    (plain / "adapter_config.json").write_text(json.dumps(settings))
    assert lora_rank(plain, PRETRAINED) == 12
    assert lora_rank(BULK, PRETRAINED) is None
    served = ServedModel(PRETRAINED, "kit", {"plain": plain, "bulk": BULK}, max_positions=512)
    base, own = vllm_jobs(CPU, served, folder=tmp_path / "state")
    options = options_of(base)
    assert options["--lora-modules"] == f"plain={plain}"
    assert options["--max-lora-rank"] == "16"
    assert options_of(own)["--served-model-name"] == "bulk"
    merged = Path(options_of(own)["--model"])
    assert (merged / "model.safetensors").stat().st_size > 28e6
    assert own.environment["CRYSTALLM_KIT_SERVED_MODEL"] == str(merged)
    before = (merged / "model.safetensors").stat().st_mtime_ns
    vllm_jobs(CPU, served, folder=tmp_path / "state")
    assert (merged / "model.safetensors").stat().st_mtime_ns == before
