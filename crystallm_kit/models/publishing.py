"""Model cards, and model folders sent to Hugging Face.

    write_card("runs/a/model")                          README.md, made from manifest.json
    push_to_hub("runs/a/model", "my-lab/crystals")      -> https://huggingface.co/my-lab/crystals

The card says what a reader has to know to use the model and to judge it: how to ask it, what it learned
from, how it was trained, what was measured, and what was not. Its head is the YAML that Hugging Face reads.
What manifest.json does not say, the card does not say. Paths of this machine stay out of it.

The folder is only read; a push that fails leaves it as it is, and the same command sends what is missing.

Not here: model folders (checkpoints.py), whose manifest is written when training ends.
Source of the head's keys: https://huggingface.co/docs/hub/model-cards
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from crystallm_kit.errors import ModelError, UserError
from crystallm_kit.models.checkpoints import Manifest, check_weights, read_manifest

CARD = "README.md"
_ADAPTER = "adapter_config.json"
# A name on Hugging Face: letters, digits, "-", "_", "."; no "--" or "..", at most 96 characters.
_NAME = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_UNITS = {"validation_loss": "nats per token", "peak_memory_gb": "1e9 bytes"}
_PATH_KEYS = ("data.corpus", "data.inputs", "data.validation", "data.corpus_recipe", "data.tokenizer")


# ---------------------------------------------------------------- the card


def write_card(
    folder: str | Path, *, license: str = "other", repo: str | None = None, replace: bool = False
) -> Path:
    """Write the card of a model folder and return its path.

    Args:
        folder: With manifest.json.
        license: Of the weights, as Hugging Face spells it (mit, cc-by-4.0, ...); `other`: yet to be said.
        repo: ORG/NAME where it can be downloaded; None: as the recipe's push_to_hub, if that is set.
        replace: Whether to overwrite a README.md that is there, which somebody may have edited.

    Raises:
        ModelError: If the folder has no manifest.
    """
    folder = Path(folder)
    path = folder / CARD
    if replace or not path.is_file():
        card = model_card(read_manifest(folder), folder=folder, license=license, repo=repo)
        writing = path.with_name(f".{CARD}.writing")
        writing.write_text(card, encoding="utf-8")
        writing.replace(path)
    return path


def model_card(
    manifest: Manifest, *, folder: str | Path, license: str = "other", repo: str | None = None
) -> str:
    """Return the card as Markdown with its YAML head.

    Args:
        manifest: Of the model.
        folder: The model's: whether it is an adapter, and its name.
        license, repo: As in write_card.
    """
    repo = repo or manifest.recipe.get("push_to_hub")
    is_adapter = (Path(folder) / _ADAPTER).is_file()
    parts = [
        f"---\n{yaml.safe_dump(_head(manifest, license, is_adapter), sort_keys=False)}---\n",
        f"# {repo.rpartition('/')[2] if repo else _title(folder)}\n",
        _what_it_is(manifest, is_adapter),
        "## How to use it\n",
        _how_to_use(manifest, is_adapter, repo),
        "## What it learned from\n",
        _table(_data_rows(manifest)),
        "## What was measured\n",
        _results(manifest),
        "## How it was trained\n",
        _table(_training_rows(manifest)),
        "Versions: "
        + (", ".join(f"{n} {v}" for n, v in sorted(manifest.versions.items())) or "not noted")
        + ".\n",
        "## Limits\n",
        _limits(manifest, is_adapter),
    ]
    return "\n".join(parts)


def _head(manifest: Manifest, license: str, is_adapter: bool) -> dict[str, Any]:
    head: dict[str, Any] = {"license": license}
    base = str(manifest.base.get("name", ""))
    if is_hub_name(base):  # a folder of this machine tells nobody anything
        head["base_model"] = base
        head["base_model_relation"] = "adapter" if is_adapter else "finetune"
    head["library_name"] = "peft" if is_adapter else "transformers"
    head["pipeline_tag"] = "text-generation"
    tags = ["crystallm-kit", "crystals", "materials-science", f"format-{manifest.format}"]
    head["tags"] = [*tags, "lora"] if is_adapter else tags
    return head


def _title(folder: str | Path) -> str:
    """Return the folder's name; a run's model folder is called `model`, and says less than the run's."""
    path = Path(folder).resolve()
    return path.parent.name if path.name == "model" and path.parent.name else path.name


def _what_it_is(manifest: Manifest, is_adapter: bool) -> str:
    base = _base_text(manifest)
    kind = (
        f"A LoRA adapter for {base}"
        if is_adapter
        else f"A language model, fine-tuned from {base}"
        if base
        else f"A language model{', trained from scratch' if manifest.recipe.get('model') else ''}"
    )
    return (
        f"{kind}. It writes crystal structures as text in the format `{manifest.format}` of crystallm-kit.\n"
    )


def _base_text(manifest: Manifest) -> str:
    name = str(manifest.base.get("name", ""))
    if not name:
        return ""
    shown = "the model that crystallm-kit ships" if name == "shipped" else f"`{_shown_path(name)}`"
    revision = manifest.base.get("revision")
    return f"{shown} (revision `{revision}`)" if revision else shown


def _how_to_use(manifest: Manifest, is_adapter: bool, repo: str | None) -> str:
    extra = "'crystallm-kit[train]'" if is_adapter else "crystallm-kit"
    name = repo or "ORG/NAME"
    merged = f"""
# one plain model folder, for other programs
hf download {name} --local-dir adapter
crystallm-kit merge adapter --out merged"""
    found = "\nThe base model is found by its name in `adapter_config.json`, and downloaded.\n"
    return f"""```sh
pip install {extra}
crystallm-kit generate "20 crystals of Ti and O" --model {name}
crystallm-kit generate --formula BaTiO3 -n 20 --seed 1 --model {name}{merged if is_adapter else ""}
```
{found if is_adapter else ""}
Prompt template: `{manifest.template}` (sha256 `{manifest.template_sha256[:16]}`). Text format:
`{manifest.format}`{_settings(manifest.format_settings)}. crystallm-kit writes the one and reads the
other. Whoever asks the model without it has to write the prompt exactly so, or the answers are wrong without
a warning.
"""


def _settings(settings: Mapping[str, Any]) -> str:
    return " (" + ", ".join(f"{name}={value}" for name, value in settings.items()) + ")" if settings else ""


def _data_rows(manifest: Manifest) -> Iterator[tuple[str, str]]:
    data = manifest.recipe.get("data", {})
    inputs = [*(data.get("inputs") or ()), *(data.get("validation") or ())]
    if inputs:
        yield "files", ", ".join(f"`{_shown_path(path)}`" for path in inputs)
    yield "sha256 of the data", f"`{manifest.data_sha256}`"
    elements = manifest.results.get("elements")
    if isinstance(elements, list):
        yield "elements", f"{len(elements)}"
    if "max_sites" in manifest.results:
        yield "atoms in the primitive cell, at most", f"{manifest.results['max_sites']}"


def _results(manifest: Manifest) -> str:
    rows = [
        (f"{name.replace('_', ' ')}{f', {_UNITS[name]}' if name in _UNITS else ''}", _number(value))
        for name, value in sorted(manifest.results.items())
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "max_sites"
    ]
    if not rows:
        return "Nothing is noted in manifest.json.\n"
    where = f" on {manifest.device}" if manifest.device else ""
    return f"By the training run itself{where}; losses are those of the validation set.\n\n{_table(rows)}"


def _training_rows(manifest: Manifest) -> Iterator[tuple[str, str]]:
    yield "seed", str(manifest.seed)
    yield "commit of crystallm-kit", f"`{manifest.git_commit}`" if manifest.git_commit else "not known"
    if manifest.device:
        yield "device", manifest.device
    for name, value in manifest.base.items():
        if value is not None:
            yield f"base: {name}", f"`{_shown_path(value) if isinstance(value, str) else value}`"
    for name, value in _flat(manifest.recipe):
        if name not in ("seed", "push_to_hub", *_PATH_KEYS) and value is not None:
            shown = _shown_path(value) if isinstance(value, str) else value
            yield f"`{name}`", str(shown)


def _limits(manifest: Manifest, is_adapter: bool) -> str:
    lines = [
        "The numbers above are the training run's. Stability, novelty against databases and agreement with "
        "experiment were not measured by it.",
        "A crystal that crystallm-kit calls valid has a plausible geometry and composition. That is no "
        "prediction that it is stable or can be made.",
        "Ordered crystals only; sizes, elements and values far from the training data are guesses.",
        "The licences of the training data"
        + (" and of the base model" if manifest.base else "")
        + " bind whoever uses the weights; they are not recorded here.",
    ]
    if is_adapter:
        lines.append(
            "An adapter is only as good as the base under it: another revision may answer otherwise."
        )
    return "".join(f"- {line}\n" for line in lines)


def _table(rows: Iterable[tuple[str, str]]) -> str:
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows]
    return "\n".join(["| | |", "| --- | --- |", *lines]) + "\n"


def _cell(value: str) -> str:
    return " ".join(value.split()).replace("|", "\\|")


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _flat(data: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in data.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def _shown_path(value: Any) -> str:
    """Return a path's last part: where it lay on one machine is nobody's business. An id stays whole."""
    text = str(value)
    return text if is_hub_name(text) or os.sep not in text else Path(text).name


# ---------------------------------------------------------------- Hugging Face


def is_hub_name(name: str) -> bool:
    """Tell whether a text is spelt like a Hugging Face repository, ORG/NAME, and is no folder here."""
    organisation, slash, model = name.partition("/")
    is_spelt = bool(slash and _NAME.fullmatch(organisation) and _NAME.fullmatch(model))
    return is_spelt and not Path(name).exists()


def check_push(repo: str, token: str | None = None) -> None:
    """Check, without asking anybody, that a push could begin: the name and a token. For before training.

    Raises:
        UserError: If the name is no ORG/NAME, or there is no token, or HF_HUB_OFFLINE is set.
    """
    from huggingface_hub import constants, get_token

    organisation, _, model = repo.partition("/")
    if not (_NAME.fullmatch(organisation) and _NAME.fullmatch(model)):
        raise UserError(
            f"repository '{repo}': expected ORG/NAME with letters, digits, '-', '_' and '.', such as "
            "my-lab/crystals-lora."
        )
    if constants.HF_HUB_OFFLINE:
        raise UserError(
            f"push to {repo}: HF_HUB_OFFLINE is set, so nothing can be sent. Unset it for the push."
        )
    if not (token or get_token()):
        raise UserError(
            f"push to {repo}: no Hugging Face token. Run `hf auth login` once, or set HF_TOKEN, with a "
            "token that may write (https://huggingface.co/settings/tokens)."
        )


def push_to_hub(
    folder: str | Path,
    repo: str,
    *,
    private: bool = True,
    token: str | None = None,
    revision: str | None = None,
    license: str = "other",
) -> str:
    """Send a model folder to Hugging Face and return the repository's address.

    The repository is made if it is not there; one that is there keeps its visibility. Without a README.md in
    the folder, its card is written first.

    Args:
        folder: A model folder or an adapter's, with manifest.json.
        repo: ORG/NAME.
        private: Of a new repository.
        token: None: HF_TOKEN, or that of `hf auth login`.
        revision: Branch; made if it is not there. None: main.
        license: Of a card that is yet to be written.

    Raises:
        ModelError: If the folder is no whole model folder.
        UserError: If the name, the token or the connection is wrong, or the repository is somebody else's.
            The folder stays as it is.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such model folder.")
    manifest = read_manifest(folder)
    _check_whole(folder)
    check_push(repo, token)
    write_card(folder, license=license, repo=repo)
    # the variable is read here, not when huggingface_hub was first imported
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token, library_name="crystallm-kit")
    again = f"{folder} is as it was; run: crystallm-kit push {folder} {repo}"
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            revision=revision,
            commit_message=f"Model of crystallm-kit that writes the {manifest.format} format",
            ignore_patterns=[".*", "*/.*"],
        )
    except HfHubHTTPError as error:
        raise UserError(f"push to {repo}: {_refusal(error, repo)} {again}") from error
    except HFValidationError as error:
        raise UserError(f"push to {repo}: {' '.join(str(error).split())}. {again}") from error
    except (_transport_error(), OSError, RuntimeError, ValueError) as error:
        raise UserError(f"push to {repo}: not sent: {_cause(error)}. {again}") from error
    return str(address)


def _check_whole(folder: Path) -> None:
    from safetensors import SafetensorError, safe_open

    if not (folder / _ADAPTER).is_file():
        check_weights(folder)
        return
    path = folder / "adapter_model.safetensors"
    try:
        with safe_open(path, framework="numpy"):
            pass
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: the adapter's weights are missing or not whole: {error}.") from error


def _transport_error() -> type[BaseException]:
    """Return what the HTTP library under huggingface_hub (it changed once) raises without a connection."""
    from huggingface_hub.errors import HfHubHTTPError

    found: type[BaseException] = HfHubHTTPError.__bases__[0]
    return found


def _refusal(error: Any, repo: str) -> str:
    """Return what the answer of the Hub means, and what to do."""
    status = getattr(error.response, "status_code", 0)
    organisation = repo.partition("/")[0]
    told = f" ({error.server_message})" if getattr(error, "server_message", None) else ""
    if status == 401:
        return f"the token is not valid (401){told}. Run `hf auth login` again, or set HF_TOKEN."
    if status == 403:
        return (
            f"the token may not write to '{organisation}' (403){told}. Take a name under your own account or "
            "organisation, or a token that may write."
        )
    if status == 404:
        return f"no such repository, or it is not yours (404){told}. Check the name."
    if status == 429 or status >= 500:
        return f"the server cannot take it now ({status}){told}. Try again later."
    return f"refused ({status}){told or ': ' + ' '.join(str(error).split())[:300]}."


def _cause(error: BaseException) -> str:
    """Return the first error of a chain and the last: what failed, and why."""
    first = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    why = " ".join(str(root).split()).rstrip(".")
    return first if root is error or why in first else f"{first} ({why})"
