"""Model folders: new models from a recipe, and folders that hold a trained one.

A model folder is what `transformers.AutoModelForCausalLM.from_pretrained` (and vLLM) loads, with one file
more:

    config.json  model.safetensors  tokenizer.json ...  manifest.json

manifest.json says where the model came from and how it must be spoken to: the prompt template's name and hash
and the text format with its settings. A folder without them is refused: a model asked in another template
than it was trained with answers, but wrongly.

Not here: adapters (adapters.py), other systems' checkpoints (importing.py), the state from which a run
resumes (training/run_state.py).
"""

import dataclasses
import importlib.metadata
import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from crystallm_kit.errors import ModelError, RecipeError
from crystallm_kit.models.element_embedding import ELEMENTS, element_rows
from crystallm_kit.recipes import from_dict, recipe_to_dict
from crystallm_kit.tokens.drawing import VocabularyInfo

MANIFEST = "manifest.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
_LIBRARIES = ("crystallm-kit", "torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy")


@dataclass(frozen=True)
class ModelRecipe:
    """The shape of a new Llama-architecture model.

    Attributes:
        hidden_size: Width.
        n_layers: Decoder layers.
        n_heads: Attention heads; must divide hidden_size, with an even quotient (rotary embedding).
        n_key_value_heads: Heads of keys and values; None: n_heads.
        intermediate_size: Width of the feed-forward part; None: 8/3 of hidden_size, up to a multiple of 64.
        max_positions: Longest text in tokens.
        tie_embeddings: One matrix for input and output embedding.
        rope_theta: Base of the rotary embedding. Smaller than Llama's 500,000 suits texts of a few hundred
            tokens.
        initializer_range: Standard deviation of first weights; 1 / sqrt(2 n_layers) of it where a layer
            writes to
            the residual stream (GPT-2's rule).
        attention_dropout: Probability, in training.
        norm_eps: Of the RMS norms.
        element_embedding: "periodic": rows of element tokens start alike for alike elements.
    """

    hidden_size: int = 384
    n_layers: int = 8
    n_heads: int = 6
    n_key_value_heads: int | None = None
    intermediate_size: int | None = None
    max_positions: int = 512
    tie_embeddings: bool = True
    rope_theta: float = 10_000.0
    initializer_range: float = 0.02
    attention_dropout: float = 0.0
    norm_eps: float = 1e-5
    element_embedding: Literal["random", "periodic"] = "random"

    def __post_init__(self) -> None:
        if min(self.hidden_size, self.n_layers, self.n_heads, self.max_positions) < 1:
            raise ValueError("hidden_size, n_layers, n_heads and max_positions must be at least 1")
        if self.hidden_size % self.n_heads or self.hidden_size // self.n_heads % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} over n_heads {self.n_heads} must be an even whole number"
            )
        if self.n_heads % (self.n_key_value_heads or self.n_heads):
            raise ValueError(f"n_key_value_heads {self.n_key_value_heads} must divide n_heads {self.n_heads}")


def new_model(recipe: ModelRecipe, vocabulary: VocabularyInfo, *, seed: int) -> Any:
    """Return a `LlamaForCausalLM` with first weights in float32.

    Args:
        recipe: The shape.
        vocabulary: Size and special ids.
        seed: Of the weights; the global random state is left as it was.

    Raises:
        RecipeError: If periodic element rows are asked for and the vocabulary names no element tokens.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    intermediate = recipe.intermediate_size or -(-recipe.hidden_size * 8 // (3 * 64)) * 64
    config = LlamaConfig(
        vocab_size=vocabulary.size,
        hidden_size=recipe.hidden_size,
        intermediate_size=intermediate,
        num_hidden_layers=recipe.n_layers,
        num_attention_heads=recipe.n_heads,
        num_key_value_heads=recipe.n_key_value_heads or recipe.n_heads,
        max_position_embeddings=recipe.max_positions,
        initializer_range=recipe.initializer_range,
        rms_norm_eps=recipe.norm_eps,
        tie_word_embeddings=recipe.tie_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
        attention_dropout=recipe.attention_dropout,
        pad_token_id=vocabulary.pad_token_id,
        eos_token_id=vocabulary.eos_token_id,
        bos_token_id=vocabulary.bos_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_((2 * recipe.n_layers) ** -0.5)
        if recipe.element_embedding == "periodic":
            _set_element_rows(model, vocabulary, recipe, seed)
    return model


def _set_element_rows(model: Any, vocabulary: VocabularyInfo, recipe: ModelRecipe, seed: int) -> None:
    ids = {symbol: i for symbol, i in vocabulary.element_token_ids.items() if symbol in ELEMENTS}
    if not ids:
        raise RecipeError(
            "model.element_embedding 'periodic': the corpus names no element tokens. "
            "Prepare it with a format that has one token per element, or set it to 'random'."
        )
    rows = element_rows(list(ids), recipe.hidden_size, spread=recipe.initializer_range, seed=seed)
    model.get_input_embeddings().weight[torch.tensor(list(ids.values()))] = torch.from_numpy(rows)


@dataclass(frozen=True)
class Manifest:
    """Where a model came from, and how it must be spoken to: manifest.json.

    Attributes:
        recipe: The recipe as run, overrides included.
        format: Name of the text format.
        format_settings: Its settings.
        template: Name of the prompt template.
        template_sha256: Hash of the template; a server that has another refuses the model.
        data_sha256: Hash of the training data.
        seed: Of the run.
        git_commit: Of the kit's source, where it is known.
        versions: Library -> version.
        device: What it was trained on.
        results: Measured numbers, by name.
        base: Of a fine-tuned model: name, revision and method (bases.BaseRecipe).
    """

    recipe: dict[str, Any]
    format: str
    format_settings: dict[str, Any]
    template: str
    template_sha256: str
    data_sha256: str
    seed: int
    git_commit: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    device: str = ""
    results: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)


def library_versions() -> dict[str, str]:
    """Return name -> version of the libraries that a training run depends on, those that are installed."""
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def git_commit() -> str | None:
    """Return the commit of the kit's source ("-dirty" where tracked files differ from it), or None.

    The environment variable CRYSTALLM_KIT_COMMIT wins, for copies of the source without their .git folder.
    """
    told = os.environ.get("CRYSTALLM_KIT_COMMIT")
    if told:
        return told
    root = Path(__file__).resolve().parents[2]
    if not (root / "pyproject.toml").exists():  # installed: a .git above it would be another project's
        return None
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip() or None


def save_model(
    folder: str | Path,
    model: Any,
    tokenizer: Any,
    manifest: Manifest,
    *,
    dtype: str = "bfloat16",
    max_shard_mb: float = 5_000.0,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write a model folder, whole or not at all, and return its path.

    Args:
        folder: Replaced where it exists.
        model: A transformers causal LM; it is left as it is.
        tokenizer: A transformers tokenizer, the path of a folder that holds one, or None.
        manifest: Written as manifest.json.
        dtype: Of the weights on disk: bfloat16, float16 or float32.
        max_shard_mb: Largest weights file, in 1e6 bytes; more than that is split.
        weights: Whole weights by name, where the model's own are spread over processes.
    """
    folder = Path(folder)
    writing = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    whole = model.state_dict() if weights is None else weights
    on_disk = {name: tensor.detach().to("cpu", getattr(torch, dtype)) for name, tensor in whole.items()}
    model.save_pretrained(writing, state_dict=on_disk, max_shard_size=f"{int(max_shard_mb * 1000)}KB")
    config = json.loads((writing / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = dtype  # save_pretrained notes the dtype in memory
    (writing / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if isinstance(tokenizer, str | Path):
        copy_tokenizer(tokenizer, writing)
    elif tokenizer is not None:
        tokenizer.save_pretrained(writing)
    write_manifest(writing, manifest)
    replace_folder(writing, folder)
    return folder


def copy_tokenizer(tokenizer: str | Path, folder: Path) -> None:
    """Copy a tokenizer's files into a folder, and nothing else that lies beside them."""
    for name in TOKENIZER_FILES:
        if (Path(tokenizer) / name).is_file():
            shutil.copy(Path(tokenizer) / name, folder / name)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json into a folder."""
    text = json.dumps(recipe_to_dict(manifest), indent=2, sort_keys=True, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def replace_folder(writing: Path, folder: Path) -> None:
    """Move a finished folder to its name: a reader finds the old one or the new one, never half of one."""
    for file in writing.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    writing.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    handle_number = os.open(folder.parent, os.O_RDONLY)
    os.fsync(handle_number)
    os.close(handle_number)


def read_manifest(folder: str | Path) -> Manifest:
    """Return the manifest of a model folder.

    Raises:
        ModelError: If it is missing, no JSON, or names no template or format.
    """
    path = Path(folder) / MANIFEST
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(
            f"{folder}: no {MANIFEST}, so its prompt template and text format are unknown. "
            "Take a folder that `crystallm-kit train` wrote, or import the checkpoint first."
        ) from error
    except ValueError as error:
        raise ModelError(f"{path}: not JSON: {error}") from error
    known = {f.name for f in dataclasses.fields(Manifest)}
    try:
        # a later release may add fields; those of this one must be there
        manifest = from_dict({k: v for k, v in dict(data).items() if k in known}, Manifest, where=str(path))
    except (RecipeError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: not a manifest: {error}") from error
    for name in ("template", "template_sha256", "format"):
        if not getattr(manifest, name):
            raise ModelError(
                f"{path}: '{name}' is empty, so how to ask this model is unknown. "
                "Expected the prompt template's name and hash and the text format that it was trained with."
            )
    return manifest


def is_adapter(folder: str | Path) -> bool:
    """Tell whether a folder holds an adapter (adapters.py) and no whole model."""
    folder = Path(folder)
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def manifest_of(
    folder: str | Path,
    *,
    template: str | None = None,
    format: str | None = None,
    format_settings: Mapping[str, Any] | None = None,
) -> Manifest:
    """Return the manifest of a folder, or one that says what is given here where it has none.

    Raises:
        ModelError: If there is no manifest and template or format is not given; or if they differ from it.
        UnknownName: If the template or format is unknown.
    """
    if template is None and format is None:
        return read_manifest(folder)
    if (Path(folder) / MANIFEST).is_file():
        manifest = read_manifest(folder)
        for what, given in (("template", template), ("format", format)):
            if given not in (None, getattr(manifest, what)):
                raise ModelError(
                    f"{folder}: {what} '{given}' is asked for, but its {MANIFEST} says "
                    f"'{getattr(manifest, what)}'. Leave it out."
                )
        return manifest
    if template is None or format is None:
        missing = "template" if template is None else "format"
        raise ModelError(f"{folder}: no {MANIFEST}; give the {missing} that it was trained with too.")
    return manifest_of_words(template, format, format_settings)


def manifest_of_words(
    template: str | None, format: str | None, format_settings: Mapping[str, Any] | None = None
) -> Manifest:
    """Return the manifest of a model of which only template and format are known.

    Raises:
        ModelError: If one of them is not given.
        UnknownName: If one of them is unknown.
    """
    from crystallm_kit.text.prompts import template_named
    from crystallm_kit.text.representation import representation

    if template is None or format is None:
        missing = "format" if format is None else "template"
        raise ModelError(f"without a model folder, give the {missing} that the model was trained with too.")
    settings = dict(format_settings or {})
    representation(format, **settings)
    return Manifest({}, format, settings, template, template_named(template, format=format).hash, "", 0)


def check_weights(folder: str | Path) -> None:
    """Check that every weights file of a model folder is whole, without reading the weights.

    Raises:
        ModelError: Naming the file and what is wrong with it.
    """
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"{index}: not an index of weights files: {error}") from error
    else:
        names = ["model.safetensors"]
    for name in names:
        check_safetensors(folder / name)


def check_safetensors(path: Path) -> None:
    """Check that a safetensors file is whole: u64 length, JSON header, data of the size that it states.

    Raises:
        ModelError: If it is missing, empty, cut short, or something else.
    """
    if not path.is_file():
        raise ModelError(f"{path.parent}: no {path.name}: the model's weights are missing.")
    size = path.stat().st_size
    if size == 0:
        raise ModelError(f"{path}: empty file (0 bytes), expected weights. Copy or download it again.")
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise ModelError(f"{path}: a git-LFS pointer, not the weights. Run: git lfs pull")
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length + 8 > size:
            raise ModelError(_truncated(path, size, length + 8, "its header alone needs"))
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{path}: not a safetensors file: {error}") from error
    expected = 8 + length + max(ends, default=0)
    if not ends:
        raise ModelError(f"{path}: holds no weights.")
    if size != expected:
        raise ModelError(_truncated(path, size, expected, "its header promises"))


def _truncated(path: Path, size: int, expected: int, why: str) -> str:
    what = "truncated" if size < expected else "damaged"
    return f"{path}: {what}: {size:,} bytes, but {why} {expected:,}. Copy or download it again."


def without_adapter(model: Any) -> Any:
    """Return the causal LM itself where peft has wrapped it; its class names what a forward pass takes."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
