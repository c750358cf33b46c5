"""Base models: what is fine-tuned, and how (LoRA, QLoRA, full).

    base:
      name: meta-llama/Llama-3.1-8B
      method: lora
      quantisation: nf4

Any causal LM that transformers knows is a base: a folder, a Hugging Face id, or `shipped` for the kit's own
model. LoRA leaves its weights as they are and trains small matrices beside them (Hu et al. 2021,
arXiv:2106.09685); QLoRA keeps them in 4 bits meanwhile (Dettmers et al. 2023, arXiv:2305.14314).

    config = check_base(recipe, device_type="cuda")      reads config.json alone
    model = load_base(recipe, vocabulary, device="cuda", seed=1)
    save_adapter(folder, model, tokenizer_folder, manifest)

Code that comes with a model is never run (trust_remote_code stays off).

Not here: models from scratch (checkpoints.py), the loop (training/loop.py), tokenizers (tokens/tokenizer.py),
adapters after training: loading and merging (adapters.py).
"""

import contextlib
import copy
import importlib.util
import json
import math
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from crystallm_kit.errors import MissingExtra, ModelError, RecipeError, did_you_mean
from crystallm_kit.models.checkpoints import (
    MANIFEST,
    Manifest,
    check_weights,
    copy_tokenizer,
    read_manifest,
    replace_folder,
    without_adapter,
    write_manifest,
)
from crystallm_kit.models.folders import base_source
from crystallm_kit.models.quantisation import bitsandbytes_setting, random_quantised
from crystallm_kit.tokens.drawing import StoredInfo, VocabularyInfo

# Positions of a model whose config states no limit.
_UNLIMITED = 1_000_000_000


@dataclass(frozen=True)
class LoraRecipe:
    """Low-rank adaptation.

    Attributes:
        rank: Of the update of each matrix.
        alpha: The update is scaled by alpha / rank (rslora: alpha / sqrt(rank)).
        dropout: Probability, on the input of the update.
        target_modules: Names of the linear layers that get an update; all-linear: all but the output head.
        dora: Direction and size of each weight apart (Liu et al. 2024, arXiv:2402.09353).
        rslora: Rank-stabilised scaling (Kalajdzievski 2023, arXiv:2312.03732).
        train_tokens: Regular expression. Embedding rows of the base's tokens that match it as a whole train
            too. None: only rows of new tokens.
        fresh_tokens: The same, and their rows start anew: those of numbers ("150.") as a smooth function of
            the number's logarithm, so that near numbers begin alike, others at random. For tokens that stood
            in none of the base's training texts: where input and output share their rows, training has pushed
            all of those to one and the same vector.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    dora: bool = False
    rslora: bool = False
    train_tokens: str | None = None
    fresh_tokens: str | None = None

    def __post_init__(self) -> None:
        for name in ("train_tokens", "fresh_tokens"):
            try:
                re.compile(getattr(self, name) or "")
            except re.error as error:
                raise ValueError(f"'{name}' is no regular expression: {error}") from error
        if self.rank < 1:
            raise ValueError(f"'rank' must be at least 1, got {self.rank}; method: full trains all weights")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"'dropout' must be in [0, 1), got {self.dropout}")
        if self.alpha <= 0 or not self.target_modules:
            raise ValueError("'alpha' must be positive, and 'target_modules' name at least one layer")


@dataclass(frozen=True)
class BaseRecipe:
    """A base model and how it is fine-tuned.

    Attributes:
        name: A folder, a Hugging Face id, or `shipped`.
        revision: Commit or tag of a Hugging Face id; None: the newest.
        weights: pretrained; random: as the architecture draws them, for speed measurements and tests.
        method: lora (small matrices beside frozen weights) or full (all weights).
        quantisation: Of frozen weights in memory: none (bfloat16 on a GPU), nf4 or int8 (bitsandbytes).
        double_quantisation: nf4: the scales of the blocks are quantised too.
        gradient_checkpointing: Layers' activations are computed again in the backward pass: less memory, a
            third more work.
        lora: Of method lora.
    """

    name: str
    revision: str | None = None
    weights: Literal["pretrained", "random"] = "pretrained"
    method: Literal["lora", "full"] = "lora"
    quantisation: Literal["none", "nf4", "int8"] = "none"
    double_quantisation: bool = True
    gradient_checkpointing: bool = False
    lora: LoraRecipe = field(default_factory=LoraRecipe)

    def __post_init__(self) -> None:
        if self.method == "full" and self.quantisation != "none":
            raise ValueError(f"quantisation {self.quantisation} freezes the weights; 'method' must be lora")


# ---------------------------------------------------------------- before any weights


def check_base(recipe: BaseRecipe, *, device_type: str) -> Any:
    """Return the base's config (a transformers PretrainedConfig), once everything that it tells is checked.

    Args:
        recipe: The base and how it is trained.
        device_type: Where: cuda, cpu.

    Raises:
        ModelError: If there is no such model, it is no causal LM of text, transformers does not know it, or
            its weights are quantised already.
        RecipeError: If quantisation is asked for without a GPU, or a target module is no linear layer.
        MissingExtra: If peft or bitsandbytes is needed and not installed.
    """
    if recipe.quantisation != "none" and device_type != "cuda":
        raise RecipeError(
            f"base.quantisation {recipe.quantisation}: it needs a CUDA GPU; this run is on {device_type}. "
            "Set quantisation: none, or run where there is one."
        )
    if recipe.method == "lora":
        _check_installed(f"base.method {recipe.method}", "peft", "train")
    if recipe.quantisation != "none":
        _check_installed(f"base.quantisation {recipe.quantisation}", "bitsandbytes", "qlora")
    config = read_config(base_source(recipe.name), recipe.name, recipe.revision)
    _check_causal(recipe.name, config)
    if recipe.method == "lora":
        _check_targets(recipe, config)
        named_tokens(recipe)
    return config


def _check_installed(what: str, package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise MissingExtra.of(what, package, extra)


def read_config(source: str, name: str, revision: str | None = None) -> Any:
    """Return the config of a base model.

    Args:
        source: What base_source returned.
        name: As the user wrote it, for messages.
        revision: Of a Hugging Face id.

    Raises:
        ModelError: If it cannot be read.
    """
    from transformers import AutoConfig

    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ModelError(
                f"base model '{name}': an adapter, not a whole model. Merge it first (crystallm-kit merge), "
                "or name its base."
            )
        raise ModelError(f"base model '{name}': no config.json in that folder. Expected a model folder.")
    try:
        return AutoConfig.from_pretrained(source, revision=revision)
    except OSError as error:
        raise ModelError(
            f"base model '{name}': neither a folder nor readable from Hugging Face: {_first_line(error)} "
            "Check the spelling and the connection (HF_HUB_OFFLINE keeps to what was downloaded before); a "
            "gated model needs its licence accepted and `hf auth login`."
        ) from error
    except (ValueError, KeyError) as error:
        raise ModelError(
            f"base model '{name}': transformers cannot read its config: {_first_line(error)} "
            "Take a model whose architecture this version knows; a model's own code is not run."
        ) from error


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".") + "."


def _check_causal(name: str, config: Any) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, ())
    causal = {found} if isinstance(found, str) else set(found)
    stated = list(config.architectures or causal)
    shown = ", ".join(stated) or config.model_type
    if config.get_text_config() is not config:
        raise ModelError(
            f"base model '{name}': {shown} reads more than text. Take a text-only model of that family."
        )
    if not causal & set(stated) or config.is_encoder_decoder:
        raise ModelError(
            f"base model '{name}': {shown} is not a causal LM, and only those write text from left to right. "
            "Take one such as a Llama, Qwen, Mistral, Gemma or GPT-2 model."
        )
    if getattr(config, "quantization_config", None):
        raise ModelError(
            f"base model '{name}': its weights are quantised already. Take the unquantised model; "
            "quantisation: nf4 or int8 shrinks it while it is loaded."
        )


def _check_targets(recipe: BaseRecipe, config: Any) -> None:
    names = linear_layer_names(meta_model(config))
    if not names:
        raise RecipeError(f"base '{recipe.name}': it has no linear layers for LoRA. Set method: full.")
    targets = recipe.lora.target_modules
    for target in () if targets == "all-linear" else targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            known = sorted({name.rpartition(".")[2] for name in names})
            raise RecipeError(
                f"base.lora.target_modules: no linear layer of '{recipe.name}' is called '{target}'"
                f"{did_you_mean(target, known)} Known: {', '.join(known)}, or all-linear."
            )


def meta_model(config: Any) -> Any:
    """Return the model of a config without weights: its layers on torch's meta device. The config stays."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config))


def linear_layer_names(model: Any) -> list[str]:
    """Return the dotted names of the linear layers, GPT-2's Conv1D included, the output head left out."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | Conv1D) and layer is not head
    ]


def check_same_template(base_name: str, info: StoredInfo) -> None:
    """Check that a base which is a model of the kit itself is spoken to as it was trained.

    A base without manifest.json has no template yet, and passes.

    Raises:
        ModelError: If template, format or tokenizer of the corpus are others.
    """
    folder = Path(base_source(base_name))
    if not (folder / MANIFEST).is_file():
        return
    manifest = read_manifest(folder)
    theirs = {
        "template": f"{manifest.template} ({manifest.template_sha256[:12]})",
        "format": _format(manifest.format, manifest.format_settings),
    }
    ours = {
        "template": f"{info.template} ({info.template_sha256[:12]})",
        "format": _format(info.format, info.format_settings),
    }
    rows = read_config(str(folder), base_name).vocab_size
    if info.vocabulary.n_base is None and rows != info.vocabulary.size:
        theirs["tokenizer"], ours["tokenizer"] = f"{rows} tokens", f"{info.vocabulary.size} tokens"
    wrong = [
        f"{what}: {theirs[what]}, of the corpus {ours[what]}" for what in ours if ours[what] != theirs[what]
    ]
    if wrong:
        raise ModelError(
            f"base model '{base_name}' was trained otherwise: {'; '.join(wrong)}. Prepare the corpus with "
            "the template, format and tokenizer of the base."
        )


def check_same_tokens(
    recipe: BaseRecipe, config: Any, vocabulary: VocabularyInfo, tokenizer: Path | None
) -> None:
    """Check that the tokens of a corpus are the base's; it may have more of them.

    Args:
        recipe: The base. If it has no tokenizer, only its rows are counted.
        config: What check_base returned.
        vocabulary: Of the corpus.
        tokenizer: Folder of the corpus's tokenizer; None: only the rows are counted.

    Raises:
        ModelError: If a token means something else to the base, or it has no row for one.
    """
    from transformers import AutoTokenizer

    _check_rows(recipe.name, config.get_text_config().vocab_size, vocabulary)
    if tokenizer is None:
        return
    try:
        base = AutoTokenizer.from_pretrained(base_source(recipe.name), revision=recipe.revision)
    except (OSError, ValueError, KeyError):
        return  # weights alone, which are learned anew
    theirs, ours = base.get_vocab(), AutoTokenizer.from_pretrained(str(tokenizer)).get_vocab()
    others = [token for token, i in theirs.items() if ours.get(token) != i]
    if others:
        token = min(others, key=theirs.__getitem__)
        raise ModelError(
            f"base model '{recipe.name}': {len(others):,} of its {len(theirs):,} tokens are others in "
            f"{tokenizer}, such as {theirs[token]} ({token!r}). Prepare the corpus with the base's tokenizer "
            f"(--tokenizer {recipe.name})."
        )


def _check_rows(name: str, rows: int, vocabulary: VocabularyInfo) -> None:
    """Raise ModelError if a base has fewer rows than its own tokens in the corpus."""
    n_known = vocabulary.size if vocabulary.n_base is None else vocabulary.n_base
    if n_known > rows:
        raise ModelError(
            f"base model '{name}': it has rows for {rows:,} tokens, the corpus's tokenizer has {n_known:,} "
            "before any is added: they do not belong together. Prepare the corpus with the base's tokenizer."
        )


def _format(name: str, settings: Mapping[str, Any]) -> str:
    """Return a text format with its settings as they come out, so that a default is what is not said."""
    if not settings:
        return name  # without asking the format, whose libraries a training machine may not have
    from crystallm_kit.text.representation import representation

    form = representation(name, **settings)
    return name if form == representation(name) else str(form)


# ---------------------------------------------------------------- what a config says


def max_positions(config: Any) -> int:
    """Return the longest text that a model can read, in tokens."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or _UNLIMITED)


def packing_problem(config: Any, longest: int) -> str | None:
    """Return why training/loss.attention must not stand in for a model's own attention, or None.

    Args:
        config: Of the model.
        longest: Longest text in tokens; a window that holds it changes nothing.
    """
    from transformers import AutoModelForCausalLM

    cls = AutoModelForCausalLM._model_mapping[type(config)]
    if getattr(config, "attn_logit_softcapping", None):
        return f"{config.model_type} caps its attention logits, which no fused kernel does"
    if not cls._supports_attention_backend or config.model_type in _OWN_ATTENTION:
        return f"{config.model_type} has an attention of its own, which cannot be exchanged"
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention", "sliding_attention"}:
        return f"{config.model_type} has layers of other kinds: {', '.join(sorted(kinds))}"
    window = getattr(config, "sliding_window", None)
    is_windowed = "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", True)
    if window and is_windowed and longest > window:
        return (
            f"texts of up to {longest} tokens do not fit the attention window of {window} (data.max_length)"
        )
    return None


# Attention with terms that reach no exchangeable attention function as arguments it could know.
_OWN_ATTENTION = ("gpt_oss",)


# ---------------------------------------------------------------- weights


def load_base(
    recipe: BaseRecipe,
    vocabulary: VocabularyInfo,
    *,
    device: str | torch.device,
    seed: int,
    runs_on: str | torch.device | None = None,
) -> Any:
    """Return the base as it is trained: a transformers causal LM, LoRA around it for method lora.

    Frozen weights are bfloat16 on a GPU and float32 on a CPU; weights that train are float32. Attention
    dropout is off: packed rows have none. Rows of tokens that are new to the base start as the mean of its
    rows, in the input and in the output embedding; under LoRA they train beside its matrices.

    Args:
        recipe: What and how; checked before (check_base).
        vocabulary: Of the corpus.
        device: Where to; weights do not go through the CPU on their way to a GPU. "meta": shapes alone, no
            weights are read.
        seed: Of LoRA's first matrices, and of random weights; the global random state is left as it was.
        runs_on: Where it will be trained, if elsewhere: decides the type of frozen weights.

    Raises:
        ModelError: If the weights cannot be read or do not belong to the vocabulary.
    """
    place = torch.device(device)
    dtype = _dtype(recipe, torch.device(runs_on or device))
    made = _random_base if recipe.weights == "random" or place.type == "meta" else _pretrained_base
    with _own_randomness(place, seed), place if place.type == "meta" else contextlib.nullcontext():
        model = made(recipe, place, dtype)
        _fit_vocabulary(model, vocabulary, recipe.name)
        if recipe.method == "lora":
            model = with_lora(model, recipe, vocabulary)
    if recipe.gradient_checkpointing:
        _checkpoint_activations(model)
    return model


def _checkpoint_activations(model: Any) -> None:
    plain = without_adapter(model)
    # transformers 5 has both names, and warns of the older one in its later releases
    enable = getattr(plain, "activation_checkpointing_enable", None) or plain.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    plain.enable_input_require_grads()


@contextlib.contextmanager
def _own_randomness(device: torch.device, seed: int) -> Iterator[None]:
    is_cuda = device.type == "cuda"
    index = torch.cuda.current_device() if is_cuda and device.index is None else device.index
    with torch.random.fork_rng(devices=[index] if is_cuda else []):
        torch.manual_seed(seed)
        yield


def _dtype(recipe: BaseRecipe, device: torch.device) -> torch.dtype:
    is_frozen_on_gpu = recipe.method == "lora" and (device.type == "cuda" or recipe.quantisation != "none")
    return torch.bfloat16 if is_frozen_on_gpu else torch.float32


def _pretrained_base(recipe: BaseRecipe, device: torch.device, dtype: torch.dtype) -> Any:
    source = base_source(recipe.name)
    return pretrained_model(
        source,
        recipe.name,
        config=_without_attention_dropout(read_config(source, recipe.name, recipe.revision)),
        revision=recipe.revision,
        dtype=dtype,
        quantization_config=bitsandbytes_setting(recipe.quantisation, double=recipe.double_quantisation),
        device_map={"": device} if device.type == "cuda" or recipe.quantisation != "none" else None,
    )


def pretrained_model(source: str, name: str, **settings: Any) -> Any:
    """Return a causal LM with the weights of a folder or Hugging Face id.

    Args:
        source: What base_source returned.
        name: As the user wrote it, for messages.
        settings: Passed on to transformers' from_pretrained.

    Raises:
        ModelError: If they are missing, cut short or of another shape than the config says.
    """
    from transformers import AutoModelForCausalLM

    folder = Path(source)
    # older models have their weights in torch's own format
    if folder.is_dir() and not any(folder.glob("pytorch_model*.bin")):
        check_weights(folder)
    try:
        return AutoModelForCausalLM.from_pretrained(source, **settings)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ModelError(
            f"base model '{name}': its weights cannot be loaded: {_first_line(error)}"
        ) from error


def _without_attention_dropout(config: Any) -> Any:
    for name in ("attention_dropout", "attn_pdrop"):
        if getattr(config, name, None):
            setattr(config, name, 0.0)
    return config


def _random_base(recipe: BaseRecipe, device: torch.device, dtype: torch.dtype) -> Any:
    """Return the architecture with weights as it draws them, made where they stay."""
    from transformers import AutoModelForCausalLM

    source = base_source(recipe.name)
    config = _without_attention_dropout(read_config(source, recipe.name, recipe.revision))
    quantisation = bitsandbytes_setting(recipe.quantisation, double=recipe.double_quantisation)
    with torch.device(device if quantisation is None else "meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model if quantisation is None else random_quantised(model, quantisation, device)


def _fit_vocabulary(model: Any, vocabulary: VocabularyInfo, name: str) -> None:
    """Give the model rows for every token of the corpus, and the corpus's special ids."""
    rows = model.get_input_embeddings().weight.shape[0]
    _check_rows(name, rows, vocabulary)
    n_known = vocabulary.size if vocabulary.n_base is None else vocabulary.n_base
    grow_embeddings(model, n_known, vocabulary.size)
    set_special_ids(
        model,
        bos_token_id=vocabulary.bos_token_id,
        eos_token_id=vocabulary.eos_token_id,
        pad_token_id=vocabulary.pad_token_id,
    )


def set_special_ids(model: Any, **ids: int | None) -> None:
    """Note the special ids in the model's config, and in settings of generation that hold nothing else.

    A base's own may hold settings of sampling, some of which (Llama 2's) transformers then refuses to save.
    """
    from transformers import GenerationConfig

    for key, value in ids.items():
        setattr(model.config, key, value)
    model.generation_config = GenerationConfig(**ids)


@torch.no_grad()
def grow_embeddings(model: Any, n_known: int, size: int) -> None:
    """Make rows n_known to size of both embeddings the mean of the rows before them, and add what is missing.

    Rows that are there already are those of a vocabulary that was padded to a round number.
    """
    if size <= n_known:
        return
    if size > model.get_input_embeddings().weight.shape[0]:
        with torch.random.fork_rng(devices=[]):
            model.resize_token_embeddings(size, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        for tensor in (getattr(layer, "weight", None), getattr(layer, "bias", None)):
            if tensor is not None:
                tensor[n_known:size] = tensor[:n_known].mean(0, dtype=torch.float32).to(tensor.dtype)


def with_lora(model: Any, recipe: BaseRecipe, vocabulary: VocabularyInfo) -> Any:
    """Return a base with LoRA around it: its weights frozen, LoRA's and the rows of new tokens to train."""
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    lora, targets = recipe.lora, recipe.lora.target_modules
    train, fresh = named_tokens(recipe)
    _start_anew(model, fresh)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets if targets == "all-linear" else list(targets),
        use_dora=lora.dora,
        use_rslora=lora.rslora,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        trainable_token_indices=_trained_rows(model, {*train, *fresh}, vocabulary),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft uses names that transformers is about to drop
        adapted = get_peft_model(model, config)
    # peft notes where the weights were found, which may be a path of this machine
    config.base_model_name_or_path, config.revision = recipe.name, recipe.revision
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    return adapted


def named_tokens(recipe: BaseRecipe) -> tuple[dict[int, str], dict[int, str]]:
    """Return the base's tokens that `lora.train_tokens` and `lora.fresh_tokens` name, by their ids.

    Raises:
        RecipeError: If one of them names none.
        ModelError: If the base has no tokenizer.
    """
    from transformers import AutoTokenizer

    patterns = {"train_tokens": recipe.lora.train_tokens, "fresh_tokens": recipe.lora.fresh_tokens}
    if not any(patterns.values()):
        return {}, {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(base_source(recipe.name), revision=recipe.revision)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"base model '{recipe.name}': no tokenizer, and base.lora names tokens: {_first_line(error)}"
        ) from error
    found = []
    for name, pattern in patterns.items():
        vocabulary = tokenizer.get_vocab() if pattern else {}
        ids = {int(i): str(t) for t, i in vocabulary.items() if re.fullmatch(str(pattern), t)}
        if pattern and not ids:
            raise RecipeError(f"base.lora.{name} '{pattern}': no token of '{recipe.name}' matches it.")
        found.append(ids)
    return found[0], found[1]


@torch.no_grad()
def _start_anew(model: Any, tokens: Mapping[int, str]) -> None:
    """Give input rows of tokens new values, of the size that rows have; see LoraRecipe.fresh_tokens."""
    if not tokens:
        return
    weight = model.get_input_embeddings().weight
    width = weight.shape[1]
    frequencies, phases = _SHARPNESS * torch.randn(width, device="cpu"), torch.rand(width, device="cpu")
    rows = torch.randn((len(tokens), width), device="cpu")
    for row, token in zip(rows, tokens.values(), strict=True):
        if re.fullmatch(r"\d+\.?", token):
            # + 5: 2 and 3 need not be as far apart as 200 and 300
            logarithm = math.log(float(token) + 5)
            row.copy_(2**0.5 * torch.cos(frequencies * logarithm + 2 * math.pi * phases))
    size = weight.float().norm(dim=1).median() / width**0.5
    weight[list(tokens)] = (rows.to(weight.device) * size).to(weight.dtype)


# Of the waves that numbers' first rows are made of: numbers a factor of 2 apart still look half alike.
_SHARPNESS = 2.0


def _trained_rows(model: Any, named: set[int], vocabulary: VocabularyInfo) -> dict[str, list[int]] | None:
    """Return the rows that train, by the name of their layer; tied layers share those of the input."""
    new = [] if vocabulary.n_base is None else range(vocabulary.n_base, vocabulary.size)
    rows = sorted({*named, *new})
    if not rows:
        return None
    layers = [model.get_input_embeddings()]
    head = model.get_output_embeddings()
    if head is not None and head.weight is not layers[0].weight:
        layers.append(head)
    names = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
    return {names[id(layer)]: rows for layer in layers}


# ---------------------------------------------------------------- what comes out


def save_adapter(
    folder: str | Path,
    model: Any,
    tokenizer: str | Path | None,
    manifest: Manifest,
    *,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write an adapter's folder, whole or not at all, and return its path.

        adapter_config.json  adapter_model.safetensors  tokenizer.json ...  manifest.json

    Its weights stay float32, in one file: peft and vLLM read no other. The base is named as in the recipe.

    Args:
        folder: Replaced where it exists.
        model: What load_base returned for method lora.
        tokenizer: Folder of the tokenizer that the corpus was made with; None: none is written.
        manifest: Written as manifest.json.
        weights: The model's whole weights by name, where they are spread over processes.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder = Path(folder)
    writing = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    # True would look on Hugging Face for the base's size; new rows are among the adapter's weights
    found = get_peft_model_state_dict(
        model, state_dict=None if weights is None else dict(weights), save_embedding_layers=False
    )
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}
    save_file(tensors, writing / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {**model.peft_config["default"].to_dict(), "inference_mode": True}
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
    (writing / "adapter_config.json").write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n")
    if tokenizer is not None:
        copy_tokenizer(tokenizer, writing)
    write_manifest(writing, manifest)
    replace_folder(writing, folder)
    return folder
