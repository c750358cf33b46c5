"""Model folders and adapters of all kinds, ready to be asked.

    model, tokenizer, manifest = load_model_folder("runs/8b/model")

A whole model is loaded as it is; an adapter is put on its base and merged into it in memory.

Not here: what a folder holds (checkpoints.py), how an adapter finds its base (adapters.py), sampling.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from crystallm_kit.errors import ModelError
from crystallm_kit.models.adapters import load_adapter
from crystallm_kit.models.checkpoints import Manifest, check_weights, is_adapter, manifest_of
from crystallm_kit.models.folders import weights_folder

_LARGE_BYTES = 1_000_000_000


def load_model_folder(
    path: str | Path,
    *,
    dtype: str = "float32",
    device: str | None = "cpu",
    base: str | None = None,
    template: str | None = None,
    format: str | None = None,
    format_settings: Mapping[str, Any] | None = None,
) -> tuple[Any, Any, Manifest]:
    """Return (model in evaluation mode, tokenizer, manifest) of a model folder or an adapter's.

    Args:
        path: The folder.
        dtype: Of the weights in memory; "auto": bfloat16 for large models (1e9 bytes on disk) on a GPU, else
            float32.
        device: Where to; None: the GPU where there is one.
        base: Of an adapter: where its base is now; None: where the adapter says.
        template: Name of the prompt template, for a folder without manifest.json.
        format: Name of the text format, for such a folder.
        format_settings: Its settings.

    Raises:
        ModelError: If the folder, its config, manifest, tokenizer or weights are missing, or a weights file
            is empty, cut short or a git-LFS pointer. Checked before any weight is read.
        MissingExtra: If it is an adapter and peft is not installed.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such model folder.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") and _is_large(folder, base) else "float32"
    if is_adapter(folder):
        spoken = manifest_of(folder, template=template, format=format, format_settings=format_settings)
        return load_adapter(folder, spoken, dtype=dtype, device=device, base=base)
    if base is not None:
        raise ModelError(f"{folder}: a whole model, no adapter; it has no base '{base}' to be put on.")
    if not (folder / "config.json").is_file():
        found = ", ".join(sorted(f.name for f in folder.iterdir())[:8]) or "nothing"
        raise ModelError(f"{folder}: no config.json; found {found}. Expected a model folder.")
    manifest = manifest_of(folder, template=template, format=format, format_settings=format_settings)
    check_weights(folder)
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(f"{folder}: no tokenizer.json. Copy in the tokenizer that it was trained with.")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), local_files_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"{folder}: cannot be loaded: {error}") from error
    if len(tokenizer) > model.config.vocab_size:
        raise ModelError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model rows for "
            f"{model.config.vocab_size}: they do not belong together."
        )
    return model.to(device).eval(), tokenizer, manifest


def _is_large(folder: Path, base: str | None) -> bool:
    weights = weights_folder(folder, base)
    return weights is None or sum(f.stat().st_size for f in weights.glob("*.safetensors")) > _LARGE_BYTES
