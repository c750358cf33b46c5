"""Where a model is: the shipped one, a folder, or a Hugging Face id.

    base_source("shipped")          the folder inside the package
    base_source("runs/a/model")     that folder, if it is there
    base_source("Qwen/Qwen3-8B")    the id as it is; transformers finds it

Nothing is read here but names, and nothing is downloaded but by `model_folder`. HF_HUB_OFFLINE=1 keeps to
what was downloaded before.

Not here: what the folders hold (checkpoints.py, adapters.py, bases.py).
"""

import json
import re
from importlib import resources
from pathlib import Path

from crystallm_kit.errors import ModelError

SHIPPED = "shipped"
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def shipped_model_folder() -> Path:
    """Return the folder of the model that comes with the package. Raises ModelError if it is not there."""
    folder = Path(str(resources.files("crystallm_kit").joinpath("pretrained")))
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: this installation came without the shipped model; give --model FOLDER.")
    return folder


def base_source(name: str, *, beside: Path | None = None) -> str:
    """Return what transformers' from_pretrained takes for a base model: a folder's path, or an id.

    Args:
        name: `shipped`, a folder, or a Hugging Face id.
        beside: A folder that a relative path may start from too.

    Raises:
        ModelError: If it is neither a folder that is there nor spelt like an id.
    """
    if name == SHIPPED:
        return str(shipped_model_folder())
    path = Path(name).expanduser()
    for folder in (path, *([] if beside is None else [beside / path])):
        if folder.is_dir():
            return str(folder)
    if not _HUB_ID.fullmatch(name):
        raise ModelError(
            f"base model '{name}': no such folder. Expected a folder, a Hugging Face id (owner/name), or "
            f"'{SHIPPED}'."
        )
    return name


def adapter_folder(name: str) -> Path:
    """Return the folder of an adapter: one that is there, a shipped one by its name, or a Hugging Face id's.

    Raises:
        ModelError: If it is none of them.
    """
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    shipped = {f.name: f for f in Path(str(resources.files("crystallm_kit"))).glob("pretrained/adapters/*")}
    if name in shipped:
        return shipped[name]
    if "/" in name and _HUB_ID.fullmatch(name):
        return model_folder(name)
    known = ", ".join(sorted(shipped)) or "none"
    raise ModelError(
        f"adapter '{name}': no such folder, and none of that name comes with this package (it has {known})."
    )


def adapter_for(property_name: str) -> str | None:
    """Return the name of the shipped adapter that has learned a property, if there is one."""
    for path in sorted(
        Path(str(resources.files("crystallm_kit"))).glob("pretrained/adapters/*/manifest.json")
    ):
        if json.loads(path.read_text(encoding="utf-8"))["results"].get("property") == property_name:
            return path.parent.name
    return None


def weights_folder(folder: Path, base: str | None = None) -> Path | None:
    """Return the local folder of most of a model's weights: an adapter's are its base's. None: not known."""
    settings = folder / "adapter_config.json"
    if not settings.is_file() or (folder / "config.json").is_file():
        return folder
    try:
        name = base or json.loads(settings.read_text(encoding="utf-8"))["base_model_name_or_path"]
        source = Path(base_source(name, beside=folder))
    except (ValueError, KeyError, TypeError, OSError, ModelError):
        return None  # whoever loads it says what is wrong
    return source if source.is_dir() else None


def has_format_tokens(folder: Path) -> bool:
    """Tell whether a model's tokenizer is a text format's own (one token a word), and no base LLM's."""
    path = folder / "tokenizer.json"
    try:
        return bool(json.loads(path.read_text(encoding="utf-8"))["model"]["type"] == "WordLevel")
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: not a tokenizer: {error}") from error


def model_folder(name: str, *, revision: str | None = None) -> Path:
    """Return the folder of a finished model or adapter, downloaded first where `name` is a Hugging Face id.

    Raises:
        ModelError: If there is no such folder, nor such a model on Hugging Face or among the downloaded ones.
    """
    path = Path(name).expanduser()
    if path.is_dir() or "/" not in name or not _HUB_ID.fullmatch(name):
        return path  # what is missing there is said by who reads it
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        # Connection errors are OSErrors, be they httpx's or requests'.
        files = ["*.json", "*.safetensors", "*.model", "*.jinja"]
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except (OSError, HfHubHTTPError, HFValidationError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"model '{name}': no such folder, and Hugging Face gives none of that name: "
            f"{' '.join(str(error).split())[:200]}. Check the spelling and the connection; without one, only "
            "models that were downloaded before can be named."
        ) from error
