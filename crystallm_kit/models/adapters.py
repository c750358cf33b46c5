"""Adapters: a base model's LoRA, as a folder; loading, merging.

    adapter_config.json  adapter_model.safetensors  tokenizer.json ...  manifest.json

The first two are peft's, which loads the folder too, as vLLM does. manifest.json says how the model must be
spoken to. Adapters of others have none; their template and format are then given by the caller:

    load_model_folder("7b-adapter", template="crystal-text-llm", format="compact", format_settings=...)

An adapter trained on a quantised base is put on the base as it is published: merging needs its full weights.

Not here: how adapters are trained and written (bases.py), whole models (checkpoints.py), several adapters on
one base (adapter_set.py).
"""

import dataclasses
import importlib.util
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from crystallm_kit.errors import MissingExtra, ModelError
from crystallm_kit.models.bases import grow_embeddings, pretrained_model, read_config, set_special_ids
from crystallm_kit.models.checkpoints import (
    TOKENIZER_FILES,
    Manifest,
    check_safetensors,
    is_adapter,
    manifest_of,
    save_model,
)
from crystallm_kit.models.folders import base_source

_WEIGHTS = "adapter_model.safetensors"


def load_adapter(
    folder: str | Path,
    manifest: Manifest,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    base: str | None = None,
) -> tuple[Any, Any, Manifest]:
    """Return (the base with the adapter merged, in evaluation mode; tokenizer; manifest).

    Args:
        folder: The adapter.
        manifest: How it is spoken to (checkpoints.manifest_of).
        dtype: Of the weights in memory.
        device: Where to.
        base: Folder or Hugging Face id of the base; None: as the adapter names it. A relative folder starts
            from here or from the adapter.

    Raises:
        ModelError: If adapter, tokenizer or base are missing, damaged, or do not belong together.
        MissingExtra: If peft is not installed.
    """
    folder = Path(folder)
    if importlib.util.find_spec("peft") is None:
        raise MissingExtra.of(f"adapter {folder}", "peft", "train")
    settings = adapter_settings(folder)
    name = base or settings["base_model_name_or_path"]
    try:
        source = base_source(name, beside=folder)
        revision = None if base else settings.get("revision")
        config = read_config(source, name, revision)
    except ModelError as error:
        raise ModelError(
            f"{folder}: the model that this adapter belongs to is not to be had: {error} "
            "Say where it is now: generate --model BASE --adapter ADAPTER, merge --base BASE, or base=BASE."
        ) from error
    tokenizer = _tokenizer(folder, source, revision)
    model = pretrained_model(
        source,
        name,
        config=config,
        revision=revision,
        dtype=getattr(torch, dtype),
        device_map={"": device} if torch.device(device).type == "cuda" else None,
    )
    n_known = model.get_input_embeddings().weight.shape[0]
    grow_embeddings(model, n_known, max(len(tokenizer), rows_needed(folder, settings)))
    merged = attach(model, folder, name, device).merge_and_unload()
    set_special_ids(
        merged,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return merged.requires_grad_(False).to(device).eval(), tokenizer, manifest


def merge_adapter(
    adapter: str | Path,
    out: str | Path,
    *,
    dtype: str = "bfloat16",
    max_shard_mb: float = 5_000.0,
    base: str | None = None,
    template: str | None = None,
    format: str | None = None,
    format_settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write the base with an adapter merged into it as a model folder of its own, and return its path.

    Args:
        adapter: The adapter's folder.
        out: Replaced where it exists.
        dtype: Of the weights on disk and of the merging: float32 needs 4 bytes of memory a weight, others 2.
        max_shard_mb: Largest weights file, in 1e6 bytes.
        base: As in load_adapter.
        template: Name of the prompt template, for an adapter without manifest.json.
        format: Name of its text format.
        format_settings: Settings of that.

    Raises:
        ModelError: As load_adapter; or if `out` is the adapter itself, or there is no adapter.
    """
    folder, out = Path(adapter), Path(out)
    if not is_adapter(folder):
        raise ModelError(f"{folder}: no adapter folder (adapter_config.json without config.json).")
    if out.resolve() == folder.resolve():
        raise ModelError(f"{out}: the merged model would replace the adapter. Name another folder.")
    spoken = manifest_of(folder, template=template, format=format, format_settings=format_settings)
    model, tokenizer, manifest = load_adapter(folder, spoken, dtype=dtype, base=base)
    manifest = dataclasses.replace(manifest, base={**manifest.base, "merged": True})
    files = folder if (folder / "tokenizer.json").is_file() else tokenizer
    return save_model(out, model, files, manifest, dtype=dtype, max_shard_mb=max_shard_mb)


def adapter_settings(folder: Path) -> dict[str, Any]:
    """Return what adapter_config.json says, the weights file checked to be whole. Raises ModelError."""
    path = folder / "adapter_config.json"
    try:
        settings = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path}: not an adapter's settings: {error}") from error
    if settings.get("peft_type") != "LORA":
        raise ModelError(f"{path}: an adapter of type {settings.get('peft_type')}; only LORA can be merged.")
    if not settings.get("base_model_name_or_path"):
        raise ModelError(f"{path}: names no base model (base_model_name_or_path).")
    if not (folder / "adapter_model.bin").is_file():  # peft's older format, read without running code
        check_safetensors(folder / _WEIGHTS)
    return settings


def _tokenizer(folder: Path, source: str, revision: str | None) -> Any:
    from transformers import AutoTokenizer

    has_own = any((folder / name).is_file() for name in TOKENIZER_FILES)
    place = str(folder) if has_own else source
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, revision=None if has_own else revision)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ModelError(
            f"{folder}: the tokenizer of {place} cannot be read: {' '.join(str(error).split())[:200]}"
        ) from error
    tokenizer.clean_up_tokenization_spaces = False
    return tokenizer


def rows_needed(folder: Path, settings: Mapping[str, Any]) -> int:
    """Return the rows that the embedding needs by what the adapter holds: trained rows, whole embeddings."""
    trained = settings.get("trainable_token_indices") or []
    lists = trained.values() if isinstance(trained, Mapping) else [trained]
    rows = [1 + max(indices) for indices in lists if indices]
    if (folder / _WEIGHTS).is_file():
        from safetensors import safe_open

        with safe_open(folder / _WEIGHTS, "pt") as file:
            whole = [key for key in file.keys() if key.endswith(("embed_tokens.weight", "wte.weight"))]  # noqa: SIM118
            rows += [file.get_slice(key).get_shape()[0] for key in whole]
    return max(rows, default=0)


def attach(model: Any, folder: Path, name: str, device: str) -> Any:
    """Return peft's model of a base with an adapter on it, the base's layers replaced.

    Args:
        model: The base.
        folder: The adapter.
        name: The base's, for messages.
        device: Where to.

    Raises:
        ModelError: If not every weight of the file has its place, or not every place its weight.
    """
    from peft import PeftModel, get_peft_model_state_dict

    wrong = f"{folder}: the adapter does not fit its base model '{name}'"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(model, str(folder), torch_device=device)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, UserWarning) as error:
        raise ModelError(f"{wrong}: {' '.join(str(error).split())[:300]}") from error
    if (folder / _WEIGHTS).is_file():
        places = set(get_peft_model_state_dict(adapted, save_embedding_layers=True))
        if weight_names(folder) - places:
            raise ModelError(f"{wrong}: it has no layer for {min(weight_names(folder) - places)}.")
    return adapted


def weight_names(folder: Path) -> frozenset[str]:
    """Return the names in an adapter's weights file; of peft's older kind of file, none."""
    if not (folder / _WEIGHTS).is_file():
        return frozenset()
    from safetensors import safe_open

    with safe_open(folder / _WEIGHTS, "pt") as file:
        return frozenset(file.keys())
