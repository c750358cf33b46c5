"""Checkpoints of other systems -> model folders that the kit generates with.

    import_crystallm("ckpt.pt", "crystallm-small")          CrystaLLM v1, of its training loop (nanoGPT)
    import_crystallm_pi("CrystaLLM-pi_base", "pi-base")     CrystaLLM-pi, unconditional: as transformers saves

Contract
    The folder holds a GPT2LMHeadModel with the same logits as the original (to rounding, in float32), the
    exact tokenizer, the sampling of its authors (generation_config.json), and a manifest with the text format
    and the prompt template; the format says where a sample ends.
    Nothing that a file pickles is executed: tensors, numbers, strings and plain containers are read, anything
    else is refused by its name.
    Weights are read where they lie in the file and converted one by one: the peak is about twice their size.

CrystaLLM stores linear layers as (out, in), GPT2LMHeadModel as (in, out): four matrices of each layer are
transposed, one of them square. Models without biases get zeros. Masks that old torch stored are dropped.
Input and output embedding are one matrix; where a file holds two that differ, both are kept (untied).

Not here: the kit's own folders (checkpoints.py), what is fine-tuned (bases.py).
Sources: CrystaLLM (https://github.com/lantunes/CrystaLLM) and CrystaLLM-pi
(https://github.com/C-Bone-UCL/CrystaLLM-pi), both MIT.
"""

import hashlib
import json
import math
import pickle
import re
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from crystallm_kit.errors import ModelError, UnknownName
from crystallm_kit.models.checkpoints import (
    Manifest,
    check_weights,
    git_commit,
    library_versions,
    save_model,
)

_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_MASKS = re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)")
_LAYER = re.compile(r"transformer\.h\.(\d+)\.")
_SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
_NEVER_EVALUATED = 1e8  # CrystaLLM's training starts from a best loss of 1e9

# Classes and settings of CrystaLLM-pi's conditional models. All call themselves gpt2, so transformers would
# load them as if they were, and leave the conditions out.
_CONDITIONAL = {
    "SliderGPT": "its slider variant: conditions enter every attention layer",
    "ResidualGPT": "its residual variant: conditions enter every attention layer",
    "PKVGPT": "its prefix (PKV) variant: conditions become keys and values before the text",
    "PrefixGPT": "its prefix variant: conditions become keys and values before the text",
    "PrefixXRDGPT": "its prefix variant for diffraction patterns",
    "PrefixPerceiverGPT": "its prefix variant with a perceiver",
    "PrependGPT": "its prepend variant: conditions become embeddings before the text",
}
_CONDITIONAL_KEYS = {
    "slider_on": "SliderGPT",
    "slider_n_variables": "SliderGPT",
    "share_layers": "PKVGPT",
    "perceiver_depth": "PrefixXRDGPT",
    "n_prefix_tokens": "PrefixGPT",
    "n_input_vector": "PrefixGPT",
}
_PI_SETTINGS = (
    *("n_positions", "n_embd", "n_layer", "n_head", "n_inner", "activation_function", "resid_pdrop"),
    *("embd_pdrop", "attn_pdrop", "layer_norm_epsilon", "scale_attn_weights"),
    *("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"),
)


@dataclass(frozen=True)
class Imported:
    """What an import made.

    Attributes:
        folder: The model folder.
        n_parameters: Weights, tied ones counted once.
        facts: What is known of the original: iterations, validation loss, sha256 ...
        notes: What a person should know of this import.
    """

    folder: Path
    n_parameters: int
    facts: dict[str, Any]
    notes: tuple[str, ...] = ()


def import_model(system: str, path: str | Path, out: str | Path) -> Imported:
    """Import a checkpoint of a system in `SYSTEMS` into the new folder `out`.

    Raises:
        UnknownName: If there is no such system.
        ModelError: If the file is no whole checkpoint of that system, or `out` holds something.
    """
    if system not in SYSTEMS:
        raise UnknownName.among("system to import from", system, SYSTEMS)
    return SYSTEMS[system](path, out)


# ---------------------------------------------------------------- CrystaLLM


def import_crystallm(path: str | Path, out: str | Path) -> Imported:
    """Write the model folder of a checkpoint that CrystaLLM's training loop saved (ckpt.pt).

    Args:
        path: The file: a dict with `model` and `model_args`; the optimizer's state is not read.
        out: The folder; it must not hold anything.

    Raises:
        ModelError: If the file is missing, truncated, no such checkpoint, wants something executed, or holds
            tensors whose names or shapes are not those that `model_args` says.
    """
    path, out = Path(path), _new_folder(out)
    checkpoint = read_checkpoint(path)
    missing = [key for key in ("model", "model_args") if not isinstance(checkpoint.get(key), dict)]
    if missing:
        raise ModelError(
            f"{path}: no {' and no '.join(missing)}; it holds {_listed(checkpoint)}. Expected what "
            "CrystaLLM's training loop saves: model, model_args, iter_num, best_val_loss, config."
        )
    arguments: dict[str, Any] = checkpoint["model_args"]
    config = crystallm_config(arguments, where=str(path))
    weights = _named_weights(path, checkpoint["model"])
    n_layers = len({match[1] for match in map(_LAYER.match, weights) if match})
    if n_layers != config.n_layer:
        raise ModelError(
            f"{path}: weights of {n_layers} layers, {config.n_layer} expected from model_args (n_layer)."
        )
    model, notes = _filled(path, config, weights, as_crystallm=True, has_biases=bool(arguments["bias"]))
    found = checkpoint.get("config")
    settings = _plain(found) if isinstance(found, dict) else {}
    facts: dict[str, Any] = {"iter_num": _plain(checkpoint.get("iter_num"))}
    loss = _plain(checkpoint.get("best_val_loss"))
    if settings.get("validate", True) and isinstance(loss, int | float) and loss < _NEVER_EVALUATED:
        facts["val_loss"] = loss
    return _written(
        out, model, path, facts, notes,
        name="CrystaLLM",
        recipe={"import": "crystallm", "model_args": _plain(arguments), "config": settings},
        format_settings={"writer": "pymatgen"},  # the very texts that it was trained on
        template="cif-crystallm",
        sampling={"top_k": 10},
    )  # fmt: skip


def crystallm_config(arguments: Mapping[str, Any], *, where: str = "model_args") -> Any:
    """Return the GPT2Config of CrystaLLM's `model_args`.

    Args:
        arguments: n_layer, n_head, n_embd, block_size, vocab_size, bias; and dropout, by default 0.
        where: For error messages.

    Raises:
        ModelError: If one is missing or impossible, or the vocabulary is not CrystaLLM's.
    """
    from transformers import GPT2Config

    from crystallm_kit.text.cif_tables import vocabulary

    missing = [name for name in (*_SIZES, "bias") if name not in arguments]
    if missing:
        raise ModelError(f"{where}: model_args has no {', '.join(missing)}; it has {_listed(arguments)}.")
    for name in _SIZES:
        if isinstance(arguments[name], bool) or not isinstance(arguments[name], int) or arguments[name] < 1:
            raise ModelError(f"{where}: model_args: {name} is {arguments[name]!r}, a whole number expected.")
    width, n_heads, n_tokens = (arguments[name] for name in ("n_embd", "n_head", "vocab_size"))
    if width % n_heads:
        raise ModelError(f"{where}: model_args: n_embd {width} is no multiple of n_head {n_heads}.")
    if n_tokens != len(vocabulary()):
        raise ModelError(
            f"{where}: a vocabulary of {n_tokens} tokens, CrystaLLM's has {len(vocabulary())}. What its ids "
            "mean is unknown, so it cannot be imported."
        )
    dropout = arguments.get("dropout") or 0.0
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ModelError(f"{where}: model_args: dropout is {dropout!r}, a share from 0 to 1 expected.")
    return GPT2Config(
        vocab_size=n_tokens,
        n_positions=arguments["block_size"],
        n_embd=width,
        n_layer=arguments["n_layer"],
        n_head=n_heads,
        n_inner=None,
        activation_function="gelu_new",
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        layer_norm_epsilon=1e-5,
        scale_attn_weights=True,
        tie_word_embeddings=True,
        # the defaults of 50256 lie outside the vocabulary, and no token ends a sample
        bos_token_id=None,
        eos_token_id=None,
    )


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return the dict that a file of torch.save holds, its tensors where they lie in the file.

    Raises:
        ModelError: If it is no such file, is damaged, or would have something executed.
    """
    path = Path(path)
    _check_is_checkpoint(path)
    is_zip = zipfile.is_zipfile(path)
    damaged = f"({path.stat().st_size:,} bytes). Expected a checkpoint; copy or download it again."
    if not is_zip and _start(path).startswith(b"PK"):  # a zip's directory is at its end
        raise ModelError(f"{path}: truncated or damaged {damaged}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols
            held = torch.load(path, weights_only=True, map_location="cpu", mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise ModelError(_unpickling_refused(path, error, is_zip)) from error
    except (RuntimeError, ValueError, EOFError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(f"{path}: no file of torch.save, or damaged {damaged}") from error
    if not isinstance(held, dict):
        raise ModelError(f"{path}: holds a {type(held).__name__}; a dict with model and model_args expected.")
    return held


def _check_is_checkpoint(path: Path) -> None:
    """Refuse what is plainly something else, with what to do."""
    if path.is_dir():
        inside = sorted(path.glob("*.pt"))
        hint = f"Name the file in it: {inside[0]}" if inside else "Name the checkpoint file (ckpt.pt)."
        raise ModelError(f"{path}: a folder, a checkpoint file expected. {hint}")
    if not path.is_file():
        raise ModelError(f"{path}: no such file.")
    start = _start(path)
    if not start:
        raise ModelError(f"{path}: empty file (0 bytes). Copy or download it again.")
    if start.startswith(b"version "):
        raise ModelError(f"{path}: a git-LFS pointer, not the weights. Run: git lfs pull")
    if start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ")):
        raise ModelError(f"{path}: a compressed archive. Unpack it (tar xf), and name the ckpt.pt in it.")


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(16)


def _unpickling_refused(path: Path, error: Exception, is_zip: bool) -> str:
    """Return what to say of a pickle that holds more than plain values: the globals that it names."""
    wanted: list[str] = []
    if is_zip:
        try:
            wanted = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except (RuntimeError, ValueError, KeyError, pickle.UnpicklingError):
            wanted = []
    wanted = sorted(wanted) or re.findall(r"GLOBAL ([\w.]+)", str(error))[:1]
    if not wanted:
        return f"{path}: no file of torch.save, or damaged. Expected a checkpoint with model and model_args."
    return (
        f"{path}: wants {', '.join(wanted)} executed while it is read, which is refused. Expected tensors, "
        "numbers, strings and plain containers. If you trust whoever made it, save it again where it was "
        "made, without what else it holds: torch.save({k: c[k] for k in ('model', 'model_args')}, path)"
    )


def _named_weights(path: Path, state: Mapping[Any, Any]) -> dict[str, torch.Tensor]:
    """Return the tensors under the names that they have in an uncompiled model, without masks."""
    weights: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        name = str(key).removeprefix("_orig_mod.")
        if not isinstance(value, torch.Tensor):
            raise ModelError(f"{path}: model['{key}'] is a {type(value).__name__}, a tensor expected.")
        if not _MASKS.fullmatch(name):
            weights[name] = value
    return weights


# ---------------------------------------------------------------- CrystaLLM-pi


def import_crystallm_pi(path: str | Path, out: str | Path) -> Imported:
    """Write the model folder of an unconditional (Base or Raw) model of CrystaLLM-pi.

    Args:
        path: A folder with config.json and weights as transformers saves them, or a file in it.
        out: The folder; it must not hold anything.

    Raises:
        ModelError: If something of it is missing or damaged; if it is one of the conditional variants, which
            need a vector beside the tokens; if vocabulary or shapes are not CrystaLLM-pi's.
    """
    from crystallm_kit.text.cif_pi import pi_alphabet

    path, out = Path(path), _new_folder(out)
    folder = path if path.is_dir() else path.parent
    if not path.exists():
        raise ModelError(f"{path}: no such file or folder. Download the model, and name its folder.")
    settings = _pi_settings(folder)
    _refuse_conditional(folder, settings)
    n_tokens = len(pi_alphabet().tokens)
    if settings.get("model_type") != "gpt2" or settings.get("vocab_size") != n_tokens:
        raise ModelError(
            f"{folder}: model_type {settings.get('model_type')!r} with {settings.get('vocab_size')} tokens; "
            f"CrystaLLM-pi's is gpt2 with {n_tokens}."
        )
    _check_vocabulary(folder)
    config = _pi_config(folder, settings)
    file, weights = _transformers_weights(folder)
    strange = sorted({word for name in weights for word in re.findall("slider|prefix|encoder|prepend", name)})
    if strange:
        raise ModelError(
            f"{file}: holds weights of a conditional variant of CrystaLLM-pi ({strange[0]}); {_ONLY}"
        )
    model, notes = _filled(file, config, weights, as_crystallm=False, has_biases=True)
    return _written(
        out, model, file, {}, notes,
        name="CrystaLLM-pi",
        recipe={"import": "crystallm-pi", "config": _plain(settings)},
        format_settings={"writer": "pymatgen", "dialect": "pi"},
        template="cif-crystallm-pi",
        sampling={"top_k": 15, "top_p": 0.95},
    )  # fmt: skip


_ONLY = "only its unconditional models (Base, Raw) are plain GPT-2, and can be imported."


def _pi_settings(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        found = ", ".join(sorted(f.name for f in folder.iterdir())[:8]) or "nothing"
        raise ModelError(
            f"{folder}: no config.json; found {found}. Expected a folder that transformers saved; CrystaLLM "
            "v1's ckpt.pt is imported as `crystallm`."
        )
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file}: not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ModelError(f"{file}: a {type(settings).__name__}, settings by name expected.")
    return settings


def _refuse_conditional(folder: Path, settings: Mapping[str, Any]) -> None:
    named = settings.get("architectures") or []
    classes = [named] if isinstance(named, str) else [str(name) for name in named]
    classes += [of for key, of in _CONDITIONAL_KEYS.items() if settings.get(key) not in (None, False)]
    for name in classes:
        if name in _CONDITIONAL:
            raise ModelError(f"{folder}: {name} of CrystaLLM-pi, {_CONDITIONAL[name]}; {_ONLY}")
    unknown = [name for name in classes if name != "GPT2LMHeadModel"]
    if unknown:
        raise ModelError(f"{folder}: architecture {unknown[0]}, GPT2LMHeadModel expected; {_ONLY}")


def _check_vocabulary(folder: Path) -> None:
    """Compare vocabulary.json, where there is one, with the known ids. added_tokens.json is stale."""
    from crystallm_kit.text.cif_pi import MORE_TOKENS
    from crystallm_kit.text.cif_tables import vocabulary

    file = folder / "vocabulary.json"
    if not file.is_file():
        return
    try:
        ids = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ModelError(f"{file}: not a vocabulary: {error}") from error
    for expected, token in enumerate((*vocabulary(), *MORE_TOKENS)):
        if ids.get(token) != expected:
            raise ModelError(f"{file}: {token!r} has id {ids.get(token)}, CrystaLLM-pi's is {expected}.")


def _pi_config(folder: Path, settings: Mapping[str, Any]) -> Any:
    from transformers import GPT2Config

    from crystallm_kit.text.cif_pi import BEGIN, END, PAD, pi_alphabet

    known = {name: settings[name] for name in _PI_SETTINGS if name in settings}
    for name in ("n_positions", "n_embd", "n_layer", "n_head"):
        if not isinstance(known.get(name), int) or known[name] < 1:
            raise ModelError(f"{folder}/config.json: {name} is {known.get(name)!r}, a whole number expected.")
    tokens = pi_alphabet().tokens
    return GPT2Config(
        **known,
        vocab_size=len(tokens),
        bos_token_id=tokens.index(BEGIN),
        eos_token_id=tokens.index(END),
        pad_token_id=tokens.index(PAD),
    )


def _transformers_weights(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """Return the weights file of a folder, and its tensors by name, without masks."""
    file = folder / "pytorch_model.bin"
    if file.is_file() and not list(folder.glob("*.safetensors*")):
        return file, _named_weights(file, read_checkpoint(file))
    from safetensors import safe_open

    check_weights(folder)
    file = folder / "model.safetensors"
    if not file.is_file():
        raise ModelError(
            f"{folder}: weights in several files. Join them: from_pretrained, then save_pretrained."
        )
    with safe_open(file, "pt") as tensors:
        return file, _named_weights(file, {name: tensors.get_tensor(name) for name in tensors.keys()})  # noqa: SIM118


SYSTEMS: dict[str, Callable[[str | Path, str | Path], Imported]] = {
    "crystallm": import_crystallm,
    "crystallm-pi": import_crystallm_pi,
}


# ---------------------------------------------------------------- any GPT-2


def _filled(
    path: Path, config: Any, weights: dict[str, torch.Tensor], *, as_crystallm: bool, has_biases: bool
) -> tuple[Any, tuple[str, ...]]:
    """Return the model with these weights in float32, and notes. `weights` is emptied on the way."""
    from transformers import GPT2LMHeadModel

    notes: tuple[str, ...] = ()
    head, embedding = (weights.get(name) for name in ("lm_head.weight", "transformer.wte.weight"))
    if head is not None and embedding is not None and not torch.equal(head.float(), embedding.float()):
        notes = ("lm_head differs from wte: both are kept, untied",)
        config.tie_word_embeddings = False
    with torch.device("meta"):  # shapes alone
        model = GPT2LMHeadModel(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    stored = {
        name: shape[::-1] if as_crystallm and name.endswith(_TRANSPOSED) else shape
        for name, shape in shapes.items()
        if has_biases or not name.endswith(".bias")
    }
    _check_tensors(path, weights, stored)
    whole: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            weights.pop(name, None)
        elif name in stored:
            tensor = weights.pop(name).to(torch.float32)
            if not bool(torch.isfinite(tensor).all()):
                raise ModelError(
                    f"{path}: tensor {name} holds NaN or infinite numbers; the training went wrong."
                )
            is_turned = as_crystallm and name.endswith(_TRANSPOSED)
            whole[name] = tensor.t().contiguous() if is_turned else tensor
        else:
            whole[name] = torch.zeros(shape)
    model.load_state_dict(whole, strict=False, assign=True)
    model.tie_weights()
    return model.eval(), notes


def _check_tensors(
    path: Path, weights: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise ModelError, naming the tensors, if names or shapes are not those expected."""
    missing = [name for name in shapes if name not in weights and name != "lm_head.weight"]
    if missing:
        raise ModelError(f"{path}: {len(missing)} tensors are missing: {_some(missing)}.")
    more = [name for name in weights if name not in shapes]
    if more:
        raise ModelError(f"{path}: {len(more)} tensors that no GPT-2 of its settings has: {_some(more)}.")
    for name, expected in shapes.items():
        got = tuple(weights[name].shape) if name in weights else expected
        if got != expected:
            raise ModelError(f"{path}: tensor {name} has shape {got}, {expected} expected from its settings.")


def _new_folder(out: str | Path) -> Path:
    """Return the folder to write. Raises ModelError if it holds something, before anything is read."""
    folder = Path(out)
    if folder.is_file() or (folder.is_dir() and list(folder.iterdir())):
        raise ModelError(f"{folder}: exists already. Name a new folder, or remove it.")
    return folder


def _written(
    out: Path,
    model: Any,
    source: Path,
    facts: dict[str, Any],
    notes: tuple[str, ...],
    *,
    name: str,
    recipe: dict[str, Any],
    format_settings: dict[str, Any],
    template: str,
    sampling: dict[str, Any],
) -> Imported:
    """Write the model folder of a converted model that writes `cif` text."""
    from transformers import GenerationConfig

    from crystallm_kit.text.cif_tables import atom_properties
    from crystallm_kit.text.prompts import template_named
    from crystallm_kit.tokens.tokenizer import format_tokenizer, save_tokenizer

    facts = {"source_sha256": _sha256(source), **facts}
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        **sampling,
        max_length=model.config.n_positions,
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    manifest = Manifest(
        recipe=recipe,
        format="cif",
        format_settings=format_settings,
        template=template,
        template_sha256=template_named(template).hash,
        data_sha256="",
        seed=0,
        git_commit=git_commit(),
        versions=library_versions(),
        results={"elements": list(atom_properties()), "sampling": sampling},
        base={"name": name, "method": "import", "file": source.name, **facts},
    )
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(format_tokenizer("cif", **format_settings), folder)
        save_model(out, model, folder, manifest, dtype="float32")
    return Imported(out, sum(p.numel() for p in model.parameters()), facts, notes)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _plain(value: Any) -> Any:
    """Return a value as JSON can hold it: numbers for tensors of one number, text for what is neither."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else str(value)


def _listed(mapping: Mapping[Any, Any]) -> str:
    return _some([str(key) for key in mapping]) or "nothing"


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
