"""`crystallm-kit serve --engine vllm` with the real vLLM: a toy model and an adapter that are made here.

vLLM is that of this Python, or of the one that CRYSTALLM_KIT_VLLM_PYTHON names.
"""

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from crystallm_kit.server.vllm_jobs import find_vllm

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("CRYSTALLM_KIT_VLLM_PYTHON", sys.executable)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500), pytest.mark.filterwarnings("ignore")]
NACL = {"formula": "NaCl"}


@pytest.fixture(scope="module")
def vllm():
    found = find_vllm(PYTHON)
    if found is None:
        pytest.skip("vllm is not installed: an environment of its own, see serve/README.md")
    return found


@pytest.fixture(scope="module")
def adapter(toy_model, tmp_path_factory):
    """Return the folder of a LoRA adapter over the toy model that changes what it says."""
    import torch
    from peft import LoraConfig, get_peft_model

    from crystallm_kit.models.loading import load_model_folder

    model, _, _ = load_model_folder(toy_model)
    settings = LoraConfig(r=8, lora_alpha=64, target_modules=["q_proj", "v_proj", "o_proj", "up_proj"])
    adapted = get_peft_model(model, settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator))
    folder = tmp_path_factory.mktemp("adapters") / "tilted"
    adapted.save_pretrained(folder)
    return folder


class Running:
    """The server and what it said."""

    def __init__(self, toy_model, adapter, folder):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.said = folder / "said"
        with self.said.open("w") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "crystallm_kit", "serve", "--port", "0", "--model", str(toy_model),
                 "--engine", "vllm", "--vllm-python", PYTHON, "--adapter", f"tilted={adapter}",
                 "--state-folder", str(folder / "state")],
                stdout=said, stderr=subprocess.STDOUT, env=environment,
            )  # fmt: skip
        until = time.monotonic() + 900
        while "curl" not in self.said.read_text():
            assert self.process.poll() is None, self.said.read_text()
            assert time.monotonic() < until, self.said.read_text()
            time.sleep(0.2)
        self.url = re.search(r"listening at (\S+)", self.said.read_text())[1]

    def client(self):
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=300)

    def crystals(self, **body):
        import httpx

        answer = httpx.post(f"{self.url}/v1/crystals", json=body, timeout=300, trust_env=False)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def engines(self):
        """Return the processes that this server started, with their names."""
        found, parents = {}, {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    name, _, rest = (entry / "stat").read_text().partition("(")[2].rpartition(")")
                except OSError:
                    continue
                parents[int(entry.name)] = (int(rest.split()[1]), name)
        grown = {self.process.pid}
        while True:
            more = {pid for pid, (parent, _) in parents.items() if parent in grown} - grown
            if not more:
                break
            grown |= more
            found |= {pid: parents[pid][1] for pid in more}
        return found


@pytest.fixture(scope="module")
def server(vllm, toy_model, adapter, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    made = Running(toy_model, adapter, folder)
    yield made
    engines = made.engines()
    made.process.send_signal(signal.SIGTERM)
    code = made.process.wait(120)
    until = time.monotonic() + 15  # an engine's own helpers see that it is gone, and follow it
    while (left := [pid for pid in engines if Path(f"/proc/{pid}").exists()]) and time.monotonic() < until:
        time.sleep(0.2)
    assert (code, left) == (0, []), made.said.read_text()


def test_the_official_client_completes(server):
    client = server.client()
    assert [card.id for card in client.models.list()] == ["toy", "tilted"]
    asked = {"model": "toy", "prompt": "crystal\n", "max_tokens": 12, "n": 3, "seed": 7}
    first, second = client.completions.create(**asked), client.completions.create(**asked)
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in second.choices]
    assert len(set(texts)) == 3
    assert first.usage.completion_tokens <= 36
    other = client.completions.create(**{**asked, "model": "tilted"})
    assert [choice.text for choice in other.choices] != texts
    logs = client.completions.create(**asked, logprobs=2)
    assert [choice.text for choice in logs.choices] == texts
    assert all(v <= 0 for v in logs.choices[0].logprobs.token_logprobs)
    greedy = client.completions.create(**{**asked, "temperature": 0})
    assert len({choice.text for choice in greedy.choices}) == 1


def test_it_streams(server):
    asked = {"model": "toy", "prompt": "crystal\n", "max_tokens": 12, "seed": 7}
    whole = server.client().completions.create(**asked).choices[0].text
    chunks = list(server.client().completions.create(**asked, stream=True))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole
    assert len(chunks) > 3


def test_constrained_completions_have_the_composition(server):
    answer = server.client().completions.create(
        model="toy", n=32, seed=1, max_tokens=200, prompt=None, extra_body={"conditions": NACL}
    )
    headers = [choice.text.partition("\n")[0] for choice in answer.choices]
    assert len(set(headers)) > 1
    for header in headers:
        assert re.fullmatch(r"Na(\d+) Cl\1 \d+", header), header


def test_what_is_wrong_is_the_clients_error(server):
    import openai

    client = server.client()
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="no-such", prompt="crystal\n")
    with pytest.raises(openai.BadRequestError):
        client.completions.create(
            model="toy", prompt="crystal\n", extra_body={"vllm_xargs": {"crystal": "?"}}
        )


def test_crystals_come_with_constraint_and_adapter(server):
    for model in ("toy", "tilted"):
        found = server.crystals(
            model=model, conditions=NACL, n=4, max_samples=24, seed=3, include_invalid=True
        )
        assert found["usage"]["n_samples"] > 0
        assert found["model"] == model
        for crystal in found["crystals"]:
            assert crystal["formula"] in ("NaCl", None), crystal
            assert not str(crystal["verdict"].get("reason")).startswith(("parse", "formula", "truncated"))
        again = server.crystals(
            model=model, conditions=NACL, n=4, max_samples=24, seed=3, include_invalid=True
        )
        assert [c["text"] for c in again["crystals"]] == [c["text"] for c in found["crystals"]]


def test_it_chats(server):
    answer = server.client().chat.completions.create(
        model="toy", messages=[{"role": "user", "content": "NaCl, please"}], seed=2
    )
    assert answer.choices[0].message.content
    assert answer.usage.total_tokens > 0


def test_log_probabilities_are_those_of_the_transformers_engine(server, toy_model):
    from crystallm_kit.engines.engine import Prompt, Sampling
    from crystallm_kit.engines.transformers_local import TransformersEngine
    from crystallm_kit.models.loading import load_model_folder
    from crystallm_kit.records import Conditions
    from crystallm_kit.tokens.requests import compile_request

    answer = server.client().completions.create(
        model="toy", prompt="crystal\n", n=4, seed=5, max_tokens=200, logprobs=0,
        extra_body={"conditions": NACL, "return_token_ids": True},
    )  # fmt: skip
    model, tokenizer, manifest = load_model_folder(toy_model)
    request = compile_request(
        Conditions(formula={"Na": 1, "Cl": 1}), max_sites=int(manifest.results.get("max_sites", 24))
    )
    ended = [choice for choice in answer.choices if choice.finish_reason == "stop"]
    prompts = [Prompt("crystal\n", tokenizer.decode(c.token_ids[:-1]), request, is_whole=True) for c in ended]
    engine = TransformersEngine(model, tokenizer, device="cpu")
    for choice, known in zip(ended, engine.complete(prompts, Sampling()), strict=True):
        assert math.fsum(choice.logprobs.token_logprobs) == pytest.approx(known.log_probability, abs=1e-3)
    assert ended


def test_an_engine_that_is_killed_fails_its_request_and_comes_back(server):
    import httpx

    got = {}

    def ask():
        body = {"model": "toy", "prompt": "crystal\n", "n": 1000, "max_tokens": 250}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=300, trust_env=False)
        got["status"], got["body"] = answer.status_code, answer.text

    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(1.0)
    before = server.engines()
    core = [pid for pid, name in before.items() if "EngineCor" in name]
    assert core, before
    assert asking.is_alive()
    for pid in core:
        os.kill(pid, signal.SIGKILL)
    asking.join(120)
    assert got["status"] == 502, got
    assert json.loads(got["body"])["error"]["type"] == "server_error"
    until = time.monotonic() + 600
    while True:
        body = {"model": "toy", "prompt": "crystal\n", "max_tokens": 5}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60, trust_env=False)
        if answer.status_code == 200:
            break
        assert answer.status_code == 503, answer.text
        assert "Retry-After" in answer.headers
        assert time.monotonic() < until, server.said.read_text()
        time.sleep(0.5)
    assert answer.json()["choices"][0]["text"]
    assert not {pid for pid, name in server.engines().items() if "VLLM" in name} & set(before)
    assert "engine-0 ended with code" in server.said.read_text()
