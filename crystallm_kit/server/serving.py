"""What is to be served, and by what: the model, its adapters, the backend.

    what = Serving(adapters=("bulk-modulus",))
    found = served(what, settings)          Found(backend, model, tokenizer, described="transformers, ...")

    upstream given                     their servers (upstream.py)
    engine "vllm", or a GPU and vLLM   servers that this process keeps (supervisor.py), one or more on a GPU
    else                               the model in this process (local.py)

Adapters are those that are configured here; what a request names is looked up among them and never becomes a
path.

Not here: options of the command (cli.py), sockets and signals (run.py).
"""

import importlib.util
import json
import re
import secrets
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from crystallm_kit.engines.engine import Engine
from crystallm_kit.engines.texts import Texts
from crystallm_kit.errors import ModelError, UserError
from crystallm_kit.generation import LONGEST, Model, load_model, model_of
from crystallm_kit.models.folders import adapter_folder, model_folder, shipped_model_folder
from crystallm_kit.server.backend import Backend
from crystallm_kit.server.state import ServerSettings

NAME_OF_SHIPPED = "crystallm-kit"
_NAME = re.compile(r"[\w][\w.-]{0,99}")
_ROOM_FOR_PROMPT = 1096  # beside LONGEST; base LLMs have more positions than any crystal needs


@dataclass(frozen=True)
class Serving:
    """What is asked to be served.

    Attributes:
        model: A model folder, an adapter's folder or a Hugging Face id; None: the shipped model.
        name: Under which it is asked for; None: its folder's, or "crystallm-kit" for the shipped model.
        adapters: NAME=PATH, or PATH alone, or the name of one that comes with the package.
        adapter_folder: Its folders are adapters too, under their names.
        template: Prompt template of a model that has no manifest.
        text_format: Text format of such a model.
        engine: "transformers" or "vllm"; None: vllm where it is installed and there is a GPU.
        upstream: Addresses of vLLM servers; they hold the model, and only its folder's manifest and
            tokenizer are read here.
        upstream_key: Sent to them; "": none.
        engines: vLLM servers that are started for the model; those of one GPU share it.
        vllm_arguments: For each `vllm serve`.
        vllm_python: The Python that has vLLM; None: this one.
        kv_cache_gb: Memory of each engine for keys and values, in 1e9 bytes; with it they start side by side.
        device: Of the model in this process; None: the GPU where there is one.
        state_folder: For logs and merged adapters.
    """

    model: str | None = None
    name: str | None = None
    adapters: tuple[str, ...] = ()
    adapter_folder: Path | None = None
    template: str | None = None
    text_format: str | None = None
    engine: str | None = None
    upstream: tuple[str, ...] = ()
    upstream_key: str = ""
    engines: int = 1
    vllm_arguments: tuple[str, ...] = ()
    vllm_python: str | None = None
    kv_cache_gb: float | None = None
    device: str | None = None
    state_folder: Path = field(default_factory=lambda: Path("crystallm-kit-serve"))


@dataclass(frozen=True)
class Found:
    """What serves.

    Attributes:
        backend: What makes tokens.
        model: How it is spoken to.
        tokenizer: The model's.
        settings: Those given, with as many slots as the backend draws at once.
        described: One line for people.
        watched: Raises when what serves cannot go on; None: it goes on as long as this process.
    """

    backend: Backend
    model: Model
    tokenizer: Any
    settings: ServerSettings
    described: str
    watched: Callable[[], Any] | None = None


class ServedEngine:
    """Stands for an engine in a Model whose tokens are made by servers: facts, and no sampling."""

    name = "vllm"
    steerable = True

    def __init__(self, tokenizer: Any, max_positions: int) -> None:
        self.tokenizer = tokenizer
        self.texts = Texts(tokenizer)
        self.max_positions = max_positions

    @property
    def has_wyckoff_ids(self) -> bool:
        """Whether the tokenizer's ids are those that constraints are made of."""
        return self.texts.has_wyckoff_ids

    def complete(self, prompts: Any, sampling: Any) -> Any:
        """Raise: a server's tokens are asked for through its backend."""
        del prompts, sampling
        raise UserError("the tokens of a server are asked for through its backend (server/backend.py)")


def served(what: Serving, settings: ServerSettings) -> Found:
    """Return what serves `what`; nothing is started but the model in this process.

    Raises:
        ModelError, UserError: If model or adapters cannot be read, or settings do not go together.
        MissingExtra: If vLLM is asked for and not installed.
    """
    if what.engine not in (None, "transformers", "vllm"):
        raise UserError(f"engine '{what.engine}': transformers or vllm expected")
    if what.upstream and what.engine:
        raise UserError("--upstream names servers that run already; leave --engine out")
    adapters = adapter_folders(what)
    if what.upstream:
        return _behind_others(what, settings, adapters)
    vllm = _vllm(what)
    if vllm is not None:
        return _behind_own(what, settings, adapters, vllm)
    return _in_process(what, settings, adapters)


def adapter_folders(what: Serving) -> dict[str, Path]:
    """Return name -> folder of the adapters that are configured.

    Raises:
        ModelError: If a folder is not there, or is no adapter.
        UserError: If a name cannot be one, or is given twice.
    """
    given: list[tuple[str, str]] = []
    for entry in what.adapters:
        name, equals, path = entry.partition("=")
        given.append((name, path) if equals else (Path(entry).name, entry))
    if what.adapter_folder is not None:
        if not what.adapter_folder.is_dir():
            raise ModelError(f"{what.adapter_folder}: no such folder of adapters.")
        inside = sorted(path.parent for path in what.adapter_folder.glob("*/adapter_config.json"))
        given += [(folder.name, str(folder)) for folder in inside]
    found: dict[str, Path] = {}
    for name, path in given:
        if not _NAME.fullmatch(name) or name == model_name(what):
            raise UserError(f"adapter '{name}': expected NAME=PATH with a name of letters, digits, ., _, -")
        if name in found:
            raise UserError(f"adapter '{name}': named twice; give each a name of its own: NAME=PATH")
        folder = adapter_folder(path)
        if not (folder / "adapter_config.json").is_file():
            raise ModelError(f"{folder}: no adapter_config.json. Expected an adapter's folder.")
        found[name] = folder.resolve()
    return found


def model_name(what: Serving) -> str:
    """Return the name under which the model itself is asked for."""
    if what.name is not None:
        if not _NAME.fullmatch(what.name):
            raise UserError(f"--name '{what.name}': letters, digits, ., _ and - expected")
        return what.name
    return NAME_OF_SHIPPED if what.model is None else (Path(what.model).resolve().name or NAME_OF_SHIPPED)


def _in_process(what: Serving, settings: ServerSettings, adapters: Mapping[str, Path]) -> Found:
    from crystallm_kit.engines.continuous import ContinuousEngine
    from crystallm_kit.engines.transformers_local import TransformersEngine
    from crystallm_kit.server.local import LocalBackend

    model = load_model(what.model, device=what.device, template=what.template, format=what.text_format)
    engine = model.engine
    if not isinstance(engine, TransformersEngine):
        raise UserError(f"engine '{engine.name}' cannot serve in this process")
    on_gpu = engine.device.type == "cuda"
    continuous = ContinuousEngine(
        engine.model, engine.tokenizer, stop=engine.stop, device=engine.device, adapters=adapters,
        slots=None if on_gpu and settings.slots == ServerSettings.slots else settings.slots,
        dtype="bfloat16" if on_gpu else None,
    )  # fmt: skip
    slots = continuous.n_slots
    for name in adapters:
        continuous.adapters.model(name)  # what is wrong with one is said now
    backend = LocalBackend(
        continuous, model_name=model_name(what), max_unread_tokens=settings.max_unread_tokens
    )
    described = f"transformers in this process, on {engine.device.type}, {slots} at a time"
    return Found(backend, model, engine.tokenizer, replace(settings, slots=slots), described)


def _behind_others(what: Serving, settings: ServerSettings, adapters: Mapping[str, Path]) -> Found:
    from crystallm_kit.server.upstream import UpstreamBackend

    _, model, engine = _described(what)
    backend = UpstreamBackend(
        what.upstream,
        _wire(model, engine),
        model_name=model_name(what),
        adapters=tuple(adapters) or None,
        takes_requests=_takes_requests(model, engine),
        api_key=what.upstream_key,
        start_seconds=None,
    )
    slots = max(settings.slots, 1024 * len(what.upstream))
    described = f"{len(what.upstream)} vLLM server{'s' if len(what.upstream) > 1 else ''} upstream"
    return Found(backend, model, engine.tokenizer, replace(settings, slots=slots), described)


def _behind_own(what: Serving, settings: ServerSettings, adapters: Mapping[str, Path], vllm: Any) -> Found:
    from crystallm_kit.server.supervised import SupervisedBackend
    from crystallm_kit.server.supervisor import Supervisor
    from crystallm_kit.server.vllm_jobs import Served, vllm_jobs

    folder, model, engine = _described(what)
    key = secrets.token_urlsafe(32)
    takes = _takes_requests(model, engine)
    jobs = vllm_jobs(
        vllm,
        Served(folder, model_name(what), adapters, engine.max_positions, takes),
        folder=what.state_folder,
        engines=what.engines,
        arguments=what.vllm_arguments,
        kv_cache_gb=what.kv_cache_gb,
        key=key,
    )
    supervisor = Supervisor(
        jobs, folder=what.state_folder / "logs", side_by_side=what.kv_cache_gb is not None
    )
    backend = SupervisedBackend(
        supervisor,
        _wire(model, engine),
        model_name=model_name(what),
        adapters=tuple(adapters),
        takes_requests=takes,
        api_key=key,
        name="vllm",
    )
    at_once = 1024 if vllm.n_gpus else 64
    slots = max(settings.slots, at_once * len(jobs))
    where = f"{vllm.n_gpus} GPU{'s' if vllm.n_gpus > 1 else ''}" if vllm.n_gpus else "the CPU"
    described = f"{len(jobs)} vLLM engine{'s' if len(jobs) > 1 else ''} on {where}"
    return Found(
        backend, model, engine.tokenizer, replace(settings, slots=slots), described, supervisor.failed
    )


def _vllm(what: Serving) -> Any:
    """Return the vLLM that is to be used, if any."""
    if what.engine == "transformers":
        return None
    is_there = what.vllm_python is not None or importlib.util.find_spec("vllm") is not None
    if what.engine is None and not is_there:
        return None
    from crystallm_kit.server.vllm_jobs import find_vllm, missing

    found = find_vllm(what.vllm_python)
    if found is None and what.engine == "vllm":
        raise missing(what.vllm_python or sys.executable)
    return found if found is not None and (what.engine == "vllm" or found.n_gpus) else None


def _described(what: Serving) -> tuple[Path, Model, ServedEngine]:
    """Return (folder of the whole model, the model as it is spoken to, what stands for its engine).

    No weights are read, but where the model is an adapter, which is merged with its base into a folder.
    """
    from crystallm_kit.models.adapters import merge_adapter
    from crystallm_kit.models.checkpoints import is_adapter, manifest_of
    from crystallm_kit.tokens.tokenizer import base_tokenizer, load_tokenizer

    folder = shipped_model_folder() if what.model is None else model_folder(what.model)
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such model folder.")
    manifest = manifest_of(folder, template=what.template, format=what.text_format)
    if is_adapter(folder):
        folder = merge_adapter(
            folder, what.state_folder / "merged-model", template=what.template, format=what.text_format
        )
    folder = folder.resolve()
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / 'config.json'}: cannot be read: {error}") from error
    config = config.get("text_config") or config
    positions = config.get("max_position_embeddings") or config.get("n_positions") or LONGEST
    tokenizer = load_tokenizer(folder)
    if not Texts(tokenizer).is_of_a_format and tokenizer.eos_token_id is not None:
        tokenizer = base_tokenizer(str(folder))
    engine = ServedEngine(tokenizer, min(int(positions), LONGEST + _ROOM_FOR_PROMPT))
    name = what.model or NAME_OF_SHIPPED
    model = model_of(_as_engine(engine), manifest, folder, None, name=name)
    return folder, model, engine


def _as_engine(engine: ServedEngine) -> Engine:
    return engine


def _wire(model: Model, engine: ServedEngine) -> Any:
    from crystallm_kit.server.vllm_wire import Wire

    stop = model.representation.alphabet().stop if engine.tokenizer.eos_token_id is None else ""
    return Wire(engine.tokenizer, max_positions=engine.max_positions, stop=stop)


def _takes_requests(model: Model, engine: ServedEngine) -> bool:
    return model.representation.name == "wyckoff" and engine.has_wyckoff_ids
