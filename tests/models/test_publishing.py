"""publishing.py: the card says what the manifest says; pushes go to a server that speaks as the Hub."""

import base64
import dataclasses
import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from crystallm_kit.errors import ModelError, UserError
from crystallm_kit.models.checkpoints import Manifest, read_manifest
from crystallm_kit.models.publishing import CARD, is_hub_name, model_card, push_to_hub, write_card

TOKEN = "hf_of_my_lab"
# huggingface_hub 2.4 sends files in a way that its HTTP library will not take for ever
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def folder(toy_model, tmp_path) -> Path:
    """Return a model folder that a test may change."""
    copy = tmp_path / "run" / "model"
    shutil.copytree(toy_model, copy)
    return copy


@pytest.fixture
def adapter(folder) -> Path:
    """Return the folder of an adapter, as far as a push looks at it."""
    import numpy as np
    from safetensors.numpy import save_file

    (folder / "model.safetensors").unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen3-8B", "r": 16}')
    save_file({"lora_A.weight": np.zeros((2, 3), np.float32)}, folder / "adapter_model.safetensors")
    return folder


def head(card: str) -> dict:
    """Return the YAML between the two lines of dashes."""
    return yaml.safe_load(card.split("---\n")[1])


# ---------------------------------------------------------------- the card


def manifest_of(folder: Path, **changes: object) -> Manifest:
    return dataclasses.replace(read_manifest(folder), **changes)


def test_the_card_says_what_the_manifest_says(folder):
    manifest = manifest_of(
        folder,
        results={"validation_loss": 1.23456, "steps": 1200, "quantiles": {"density_g_cm3": [1, 2]}},
        recipe={"seed": 7, "optimizer": {"lr": 1e-3}, "model": {"hidden_size": 64}},
        versions={"torch": "2.13.0"},
        git_commit="abc123",
        seed=7,
        device="1 x NVIDIA H200",
    )
    card = model_card(manifest, folder=folder)
    for said in (
        "| validation loss, nats per token | 1.235 |",
        "| steps | 1,200 |",
        "| seed | 7 |",
        "| `optimizer.lr` | 0.001 |",
        "| `model.hidden_size` | 64 |",
        "| commit of crystallm-kit | `abc123` |",
        f"| sha256 of the data | `{manifest.data_sha256}` |",
        f"Prompt template: `kit-1` (sha256 `{manifest.template_sha256[:16]}`)",
        "torch 2.13.0",
        "on 1 x NVIDIA H200",
        "trained from scratch",
        "# run\n",  # the run's name: a folder called `model` has none of its own
        "crystallm-kit generate --formula BaTiO3 -n 20 --seed 1 --model ORG/NAME",
    ):
        assert said in card
    assert "quantiles" not in card
    assert head(card) == {
        "license": "other",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["crystallm-kit", "crystals", "materials-science", "format-wyckoff"],
    }


def test_the_head_of_an_adapters_card_names_its_base_and_peft(adapter):
    manifest = manifest_of(adapter, base={"name": "Qwen/Qwen3-8B", "revision": "f00", "method": "lora"})
    card = model_card(manifest, folder=adapter, license="apache-2.0", repo="my-lab/alloys")
    found = head(card)
    assert (found["license"], found["library_name"]) == ("apache-2.0", "peft")
    assert (found["base_model"], found["base_model_relation"]) == ("Qwen/Qwen3-8B", "adapter")
    assert "lora" in found["tags"]
    assert "# alloys\n" in card
    assert "A LoRA adapter for `Qwen/Qwen3-8B` (revision `f00`)" in card
    assert "hf download my-lab/alloys --local-dir adapter" in card
    assert "crystallm-kit merge adapter --out merged" in card


def test_paths_of_this_machine_stay_out_of_the_card(folder, tmp_path):
    """The folder of a base model and of the data would tell strangers the user's name and disks."""
    base = tmp_path / "secret" / "llama-8b"
    base.mkdir(parents=True)
    recipe = {"data": {"inputs": ["/home/ann/secret/mp.parquet"], "corpus": "/home/ann/secret/corpus"}}
    card = model_card(
        manifest_of(folder, recipe=recipe, base={"name": str(base), "method": "full"}), folder=folder
    )
    assert "`mp.parquet`" in card
    assert "fine-tuned from `llama-8b`" in card
    assert "secret" not in card
    assert "base_model" not in head(card)


def test_a_card_that_somebody_edited_is_kept(folder):
    (folder / CARD).write_text("my own words")
    assert write_card(folder).read_text() == "my own words"
    assert "# run" in write_card(folder, replace=True).read_text()


def test_what_is_a_name_on_the_hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "a").mkdir(parents=True)
    assert is_hub_name("Qwen/Qwen3-8B")
    assert not is_hub_name("runs/a")  # a folder that is here
    for name in ("gpt2", "a/b/c", "/a", "a/", "a b/c", "a/b--c", "a/-b", "a/.b", f"a/{'b' * 97}", "shipped"):
        assert not is_hub_name(name)


# ---------------------------------------------------------------- a server that speaks as the Hub


class Hub(ThreadingHTTPServer):
    """The routes of huggingface.co that a push calls, over files in memory.

    Attributes:
        repos: ORG/NAME -> whether it is private.
        files: (ORG/NAME, branch) -> path -> content.
        large: sha256 -> content of a file sent by the large-file protocol.
        fail_upload: Answer uploads of large files with this status.
        requests: "METHOD path" in order.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _HubHandler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, bool] = {}
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        self.large: dict[str, bytes] = {}
        self.fail_upload = 0
        self.requests: list[str] = []


class _HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_) -> None:
        pass

    def _answer(self, status: int, data: object = None, error: str | None = None) -> None:
        content = b"" if data is None else json.dumps(data).encode()
        self.send_response(status)
        if error:
            self.send_header("X-Error-Message", error)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _body(self) -> bytes:
        self.server.requests.append(f"{self.command} {self.path}")
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _is_known(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self._answer(401, error="Invalid credentials in Authorization header")
        return False

    def do_GET(self) -> None:
        self._body()
        if self._is_known():
            self._answer(404, error="Repository not found")

    def do_PUT(self) -> None:
        content = self._body()
        if self.server.fail_upload:
            return self._answer(self.server.fail_upload)
        digest = self.path.removeprefix("/upload/")
        assert hashlib.sha256(content).hexdigest() == digest
        self.server.large[digest] = content
        return self._answer(200)

    def do_POST(self) -> None:
        body, hub = self._body(), self.server
        if not self._is_known():
            return None
        if self.path == "/api/validate-yaml":
            yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
            return self._answer(200, {"warnings": [], "errors": []})
        if self.path == "/api/repos/create":
            return self._create(json.loads(body))
        if self.path.endswith(".git/info/lfs/objects/batch"):
            objects = [self._large(o) for o in json.loads(body)["objects"]]
            return self._answer(200, {"transfer": "basic", "objects": objects})
        _, _, _, organisation, name, action, branch = self.path.split("/")
        repo = f"{organisation}/{name}"
        if repo not in hub.repos:
            return self._answer(404, error="Repository not found")
        if action == "branch":
            hub.files[repo, branch] = dict(hub.files[repo, "main"])
            return self._answer(200, {})
        if action == "preupload":
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": modes})
        assert action == "commit"
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                hub.files[repo, branch][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                hub.files[repo, branch][value["path"]] = hub.large[value["oid"]]
        url = f"{hub.address}/{repo}/commit/{'0' * 40}"
        return self._answer(200, {"success": True, "commitUrl": url, "commitOid": "0" * 40, "hookOutput": ""})

    def _create(self, asked: dict) -> None:
        repo = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] != "my-lab":
            self._answer(
                403, error=f"You don't have the rights to create a model under {asked['organization']}"
            )
        elif repo in self.server.repos:
            self._answer(
                409, {"url": f"{self.server.address}/{repo}"}, error="You already created this model"
            )
        else:
            self.server.repos[repo] = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.server.files[repo, "main"] = {}
            self._answer(200, {"url": f"{self.server.address}/{repo}"})

    def _large(self, file: dict) -> dict:
        if file["oid"] in self.server.large:  # nothing to do
            return file
        return {**file, "actions": {"upload": {"href": f"{self.server.address}/upload/{file['oid']}"}}}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Return a running server, which HF_ENDPOINT names; nobody is logged in."""
    server = Hub()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    # constants of huggingface_hub, which it takes from the environment when it is imported
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-login"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # uploads through this server
    yield server
    server.shutdown()
    server.server_close()


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_push_sends_the_folder_byte_by_byte_into_a_private_repository(hub, folder):
    (folder / ".left-over").write_text("a file of an editor")
    address = push_to_hub(folder, "my-lab/crystals")
    assert address == f"{hub.address}/my-lab/crystals"
    assert hub.repos == {"my-lab/crystals": True}
    (folder / ".left-over").unlink()
    sent = hub.files["my-lab/crystals", "main"]
    assert sent == contents(folder)
    assert len(hub.large) == 1  # the weights
    assert "--model my-lab/crystals\n" in sent[CARD].decode()


def test_a_second_push_replaces_what_changed(hub, folder):
    push_to_hub(folder, "my-lab/crystals")
    (folder / CARD).write_text("---\nlicense: mit\n---\nbetter words\n")
    push_to_hub(folder, "my-lab/crystals", private=False)
    assert hub.files["my-lab/crystals", "main"] == contents(folder)
    assert hub.repos == {"my-lab/crystals": True}  # one that is there keeps its visibility
    assert sum(line.startswith("PUT") for line in hub.requests) == 1  # the weights went once


def test_a_push_to_a_branch_makes_the_branch(hub, folder):
    push_to_hub(folder, "my-lab/crystals", private=False, revision="v2")
    assert hub.repos == {"my-lab/crystals": False}
    assert hub.files["my-lab/crystals", "main"] == {}
    assert hub.files["my-lab/crystals", "v2"] == contents(folder)


def test_an_adapter_is_pushed_like_a_model(hub, adapter):
    push_to_hub(adapter, "my-lab/lora")
    assert hub.files["my-lab/lora", "main"] == contents(adapter)
    assert head(hub.files["my-lab/lora", "main"][CARD].decode())["library_name"] == "peft"


@pytest.mark.parametrize("name", ["crystals", "my-lab/crys tals", "my-lab/a/b", "../crystals", "my-lab/"])
def test_a_name_that_cannot_be_is_refused_before_anything_is_sent(hub, folder, name):
    with pytest.raises(UserError, match="expected ORG/NAME"):
        push_to_hub(folder, name)
    assert hub.requests == []


def test_without_a_token_the_error_says_how_to_get_one(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match=r"no Hugging Face token\. Run `hf auth login`"):
        push_to_hub(folder, "my-lab/crystals")
    assert hub.requests == []


def test_offline_nothing_is_tried(hub, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        push_to_hub(folder, "my-lab/crystals")
    assert hub.requests == []


@pytest.mark.parametrize(
    ("repo", "token", "said"),
    [
        ("my-lab/crystals", "hf_wrong", r"the token is not valid \(401\)"),
        ("their-lab/crystals", TOKEN, r"the token may not write to 'their-lab' \(403\)"),
    ],
)
def test_a_refusal_says_why_and_loses_nothing(hub, folder, repo, token, said):
    write_card(folder, repo=repo)
    before = contents(folder)
    with pytest.raises(UserError, match=said) as caught:
        push_to_hub(folder, repo, token=token)
    assert f"run: crystallm-kit push {folder} {repo}" in str(caught.value)
    assert token not in str(caught.value)
    assert contents(folder) == before


def test_without_a_connection_it_says_so_and_the_same_command_works_later(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # "discard": nobody listens there
    with pytest.raises(UserError, match=r"not sent: .*refused"):
        push_to_hub(folder, "my-lab/crystals")
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    push_to_hub(folder, "my-lab/crystals")
    assert hub.files["my-lab/crystals", "main"] == contents(folder)


def test_an_upload_that_fails_in_the_middle_commits_nothing_and_can_be_sent_again(hub, folder):
    hub.fail_upload = 403
    with pytest.raises(UserError, match="push to my-lab/crystals"):
        push_to_hub(folder, "my-lab/crystals")
    assert hub.files["my-lab/crystals", "main"] == {}
    hub.fail_upload = 0
    push_to_hub(folder, "my-lab/crystals")
    assert hub.files["my-lab/crystals", "main"] == contents(folder)


@pytest.mark.parametrize("damage", ["manifest.json", "model.safetensors"])
def test_half_a_model_folder_is_not_sent(hub, folder, damage):
    (folder / damage).unlink()
    with pytest.raises(ModelError, match=damage):
        push_to_hub(folder, "my-lab/crystals")
    assert hub.requests == []


def test_half_an_adapter_is_not_sent(hub, adapter):
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(ModelError, match="missing or not whole"):
        push_to_hub(adapter, "my-lab/crystals")
    assert hub.requests == []
