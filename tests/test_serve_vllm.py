"""serve/vllm-server.sh with vLLM itself: its parser takes every option; it serves, and our server before it.

Runs in vLLM's environment (.ci/vllm); elsewhere it is skipped.
"""

import contextlib
import importlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vllm is not installed: an environment of its own, see serve/README.md")
# vLLM's own imports warn
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400), pytest.mark.filterwarnings("ignore")]
ROOT = Path(__file__).parents[1]
SERVE = ROOT / "serve"
# On a CPU, and without minutes of compilation.
SMALL = ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", "8", "--max-model-len", "512"]


def command_of(script: Path, *arguments: str) -> list[str]:
    """Return what a script becomes: it runs as it is, only `exec` prints the command."""
    printed = 'exec() { printf "%s\\0" "$@"; }; source "$0"'
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", "-c", printed, str(script), *arguments],
        capture_output=True, text=True, env=environment, cwd=ROOT, check=True,
    )  # fmt: skip
    return done.stdout.split("\0")[:-1]


def layouts() -> dict[str, list[str]]:
    """Return the options with which slurm-ray-nodes.sbatch and several-gpus.sh spread vLLM, by layout."""
    text = (SERVE / "slurm-ray-nodes.sbatch").read_text(encoding="utf-8")
    numbers = {'"$((nodes * gpus))"': "16", '"$gpus"': "8", '"$nodes"': "2", '"$head_ip"': "10.0.0.1"}
    found = {}
    for name, options in re.findall(r"(\w+)\)\n\s+layout=\((.*?)\)\n\s+;;", text, flags=re.DOTALL):
        for there, here in numbers.items():
            options = options.replace(there, here)
        found[f"ray, {name}"] = shlex.split(options)
    text = (SERVE / "several-gpus.sh").read_text(encoding="utf-8")
    for name, options in re.findall(r'(\w+)\) exec .*--vllm-args "([^"]*)"', text):
        found[name] = shlex.split(options.replace("$gpus", "8"))
    assert set(found) == {"ray, data", "ray, pipeline", "data", "tensor"}
    return found


def vllms_own_parser() -> tuple[Callable, Callable]:
    """Return what makes the parser of `vllm serve`, and what looks at what it read; their module moved."""
    for home in ("openai", "launchers"):
        with contextlib.suppress(ModuleNotFoundError):
            module = importlib.import_module(f"vllm.entrypoints.{home}.cli_args")
            return module.make_arg_parser, module.validate_parsed_serve_args
    raise AssertionError("this vLLM has the parser of `vllm serve` elsewhere")


@pytest.mark.parametrize("layout", sorted(layouts()))
def test_vllm_takes_the_options_of_the_recipes(layout):
    make_arg_parser, validate_parsed_serve_args = vllms_own_parser()
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    command = command_of(SERVE / "vllm-server.sh", "shipped", *layouts()[layout])
    assert command[:4] == [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]
    parser = make_arg_parser(FlexibleArgumentParser())
    options = parser.parse_args(command[4:])
    validate_parsed_serve_args(options)
    assert options.host == "127.0.0.1"
    assert options.logits_processors == ["crystallm_kit.engines.vllm_constraint:CrystalConstraint"]
    assert Path(options.model_tag or options.model, "config.json").is_file()
    wanted = dict(zip(*[iter(layouts()[layout])] * 2, strict=True))
    for option, value in wanted.items():
        assert str(getattr(options, option.lstrip("-").replace("-", "_"))) == value


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def ask(url: str, body: dict | None = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        content = answer.read()
    return json.loads(content) if content else {}


@contextlib.contextmanager
def running(command: list, log: Path, ready: str, seconds: float) -> Iterator[None]:
    """Run a program until the block ends; it starts when an address answers 200."""
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "VLLM_API_KEY": ""}
    with log.open("wb") as out:
        process = subprocess.Popen(
            [str(part) for part in command], stdout=out, stderr=out, env=environment, cwd=ROOT,
            start_new_session=True,
        )  # fmt: skip
    try:
        until = time.monotonic() + seconds
        while True:
            try:
                ask(ready)
                break
            except (OSError, urllib.error.URLError):
                assert process.poll() is None, log.read_text()[-5000:]
                assert time.monotonic() < until, log.read_text()[-5000:]
                time.sleep(0.5)
        yield
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_vllm_by_the_recipe_serves_behind_the_kits_server(tmp_path):
    behind, front = free_port(), free_port()
    vllm = [SERVE / "vllm-server.sh", "shipped", "--port", behind, *SMALL]
    server = [sys.executable, "-m", "crystallm_kit", "serve", "--port", front]
    server += ["--upstream", f"http://127.0.0.1:{behind}"]
    with (
        running(vllm, tmp_path / "vllm.log", f"http://127.0.0.1:{behind}/health", 240),
        running(server, tmp_path / "server.log", f"http://127.0.0.1:{front}/readyz", 60),
    ):
        url = f"http://127.0.0.1:{front}"
        body = {"conditions": {"formula": "NaCl"}, "n": 2, "unique": False}
        answer = ask(f"{url}/v1/crystals", body)
        assert answer["finish_reason"] == "n"
        assert [crystal["formula"] for crystal in answer["crystals"]] == ["NaCl", "NaCl"]
        completed = ask(f"{url}/v1/completions", {"conditions": {"formula": "NaCl"}, "n": 2})
        assert len(completed["choices"]) == 2
        assert all(choice["text"].startswith("Na") for choice in completed["choices"])
