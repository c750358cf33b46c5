"""What travels with a request to vLLM: `extra_args` offline, `vllm_xargs` over HTTP.

    "vllm_xargs": {"crystal": "{\\"conditions\\": {\\"formula\\": \\"SrTiO3\\"}}", "crystal_given": 0}

    crystal                      request_to_json of a Request, or {"conditions": {...}}: every token obeys it
    crystal_given                how many of the prompt's last ids are the beginning of the crystal's text
    crystal_beginning            ids that the completion begins with: written token by token, part of it
    crystal_temperature          in place of `temperature`; only with crystal_seed
    crystal_number_temperature   for tokens of numbers (cell, coordinates), which a `crystal` tells apart
    crystal_top_p, crystal_top_k in place of `top_p`, `top_k`; only with crystal_seed
    crystal_seed                 [seed, position]: draws by the kit's numbers, so that the sample is the one
                                 that the `transformers` engine draws, whatever else is in the batch
    crystal_log_softmax          1: logits are returned normalised, also without `crystal`

All is checked here, before the engine sees it; a `crystal` is compiled here, with what the manifest of the
served model knows. That folder is in the environment variable CRYSTALLM_KIT_SERVED_MODEL.

A beginning that leaves what `crystal` asks for ends there: it is checked mask by mask, beside the model, and
the completion does not begin with it.

Not here: the masks (vllm_constraint.py), the engine (vllm_offline.py). Nothing here needs vllm.
"""

import functools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crystallm_kit.engines.texts import Texts
from crystallm_kit.errors import UnknownName, UserError
from crystallm_kit.structures.elements import ELEMENTS
from crystallm_kit.tokens.requests import MAX_SITES, Request, request_from_json, request_to_json

SERVED_MODEL = "CRYSTALLM_KIT_SERVED_MODEL"
KEYS = (
    "crystal", "crystal_given", "crystal_beginning", "crystal_temperature", "crystal_number_temperature",
    "crystal_top_p", "crystal_top_k", "crystal_seed", "crystal_log_softmax",
)  # fmt: skip
_ONLY_WITH_SEED = ("crystal_temperature", "crystal_top_p", "crystal_top_k")
# What vLLM takes away from a mask, or adds to it, could leave no token at all.
_CONFLICTS = ("min_tokens", "logit_bias", "bad_words", "allowed_token_ids", "structured_outputs")


@dataclass(frozen=True)
class Arguments:
    """One request's arguments, checked.

    Attributes:
        request: What must hold for every token; None: unconstrained.
        n_given: Ids at the end of the prompt that belong to the crystal's text.
        beginning: Ids that the completion begins with.
        seed: (seed, position) of the kit's own draws; None: vLLM draws.
        temperature: Of the own draws.
        number_temperature: The same for tokens of numbers.
        top_p: Of the own draws.
        top_k: Of the own draws; 0 keeps all.
    """

    request: Request | None = None
    n_given: int = 0
    beginning: tuple[int, ...] = ()
    seed: tuple[int, int] | None = None
    temperature: float = 1.0
    number_temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True)
class ServedModel:
    """What arguments are compiled with.

    Attributes:
        known_elements: Elements that may occur where conditions leave it open.
        max_sites: Most atoms in the primitive cell where they leave it open.
        has_wyckoff_ids: Whether the tokenizer's ids are those that constraints are made of.
    """

    known_elements: tuple[str, ...]
    max_sites: int
    has_wyckoff_ids: bool


@functools.lru_cache(maxsize=8)
def served_model(folder: str) -> ServedModel:
    """Return what a model folder's manifest and tokenizer say. Raises ModelError."""
    from crystallm_kit.models.checkpoints import MANIFEST, read_manifest
    from crystallm_kit.tokens.tokenizer import load_tokenizer

    facts = read_manifest(folder).results if (Path(folder) / MANIFEST).is_file() else {}
    return ServedModel(
        tuple(facts.get("elements", ELEMENTS)),
        int(facts.get("max_sites", MAX_SITES)),
        Texts(load_tokenizer(folder)).has_wyckoff_ids,
    )


def arguments_of(params: Any, model: ServedModel | None) -> Arguments | None:
    """Return the arguments in a vllm.SamplingParams; None if it has none of ours.

    Args:
        params: Its extra_args, temperature, top_p, top_k, n, and what would conflict with a mask are read.
        model: What is served; None: unknown, so that no `crystal` can be taken.

    Raises:
        UserError: For an unknown key, a value out of range, or arguments that cannot stand together.
        ImpossibleRequest: If no crystal can meet what is asked.
    """
    extra = {k: v for k, v in (params.extra_args or {}).items() if str(k).startswith("crystal")}
    if not extra:
        return None
    for key in extra:
        if key not in KEYS:
            raise UnknownName.among("argument", str(key), KEYS)
    request = None
    if "crystal" in extra:
        request = _request(extra["crystal"], model)
        for name in _CONFLICTS:
            if getattr(params, name, None):
                raise UserError(f"'{name}' beside 'crystal': leave it out; the constraint says what may come")
    elif extra.get("crystal_given") or "crystal_number_temperature" in extra:
        raise UserError("crystal_given and crystal_number_temperature need 'crystal', which tells them apart")
    seed = _seed(extra.get("crystal_seed"))
    if seed is None:
        for key in _ONLY_WITH_SEED:
            if key in extra:
                raise UserError(f"'{key}' needs 'crystal_seed'; without it give {key[len('crystal_') :]}")
    elif getattr(params, "n", 1) != 1:
        raise UserError("'crystal_seed' says which sample is drawn: n must be 1")
    temperature = _number(extra, "crystal_temperature", params.temperature)
    number_temperature = _number(extra, "crystal_number_temperature", temperature)
    if seed is None and number_temperature != temperature and not temperature:
        raise UserError(
            "crystal_number_temperature with temperature 0: vLLM draws nothing then. Give 'crystal_seed' "
            "too, or a temperature such as 0.01."
        )
    top_p = _number(extra, "crystal_top_p", params.top_p)
    if not 0 < top_p <= 1:
        raise UserError(f"crystal_top_p {top_p}: more than 0 and at most 1 expected")
    return Arguments(
        request=request,
        n_given=_whole(extra, "crystal_given", 0),
        beginning=_ids(extra.get("crystal_beginning", ())),
        seed=seed,
        temperature=temperature,
        number_temperature=number_temperature,
        top_p=top_p,
        top_k=max(0, _whole(extra, "crystal_top_k", max(0, params.top_k))),
    )


@functools.lru_cache(maxsize=4096)
def compiled(text: str, model: ServedModel) -> str:
    """Return a `crystal` argument as the JSON of its compiled Request: nothing is left to be known."""
    return request_to_json(_from_json(text, model))


def _request(text: object, model: ServedModel | None) -> Request:
    if not isinstance(text, str):
        raise UserError(f"crystal: expected JSON text, got {type(text).__name__}")
    if model is None:
        raise UserError(
            f"crystal: which model is served is unknown here; start vLLM with {SERVED_MODEL}=its folder."
        )
    if not model.has_wyckoff_ids:
        raise UserError(
            "crystal: a constraint needs a tokenizer whose ids are those of the wyckoff format; this model's "
            "are others. Sample it unconstrained, or give its format's grammar as structured_outputs."
        )
    return _from_json(text, model)


@functools.lru_cache(maxsize=4096)
def _from_json(text: str, model: ServedModel) -> Request:
    return request_from_json(text, known_elements=model.known_elements, max_sites=model.max_sites)


def _number(extra: Mapping[str, object], key: str, otherwise: float) -> float:
    value = extra.get(key, otherwise)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise UserError(f"{key} {value!r}: a number of 0 or more expected")
    return float(value)


def _whole(extra: Mapping[str, object], key: str, otherwise: int) -> int:
    value = extra.get(key, otherwise)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        raise UserError(f"{key} {value!r}: a whole number of 0 or more expected")
    return value


def _ids(value: object) -> tuple[int, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise UserError(f"crystal_beginning {value!r}: a list of token ids expected")
    return tuple(_whole({"crystal_beginning": entry}, "crystal_beginning", 0) for entry in value)


def _seed(value: object) -> tuple[int, int] | None:
    if value is None:
        return None
    parts = value if isinstance(value, list | tuple) else None
    if (
        parts is None
        or len(parts) != 2
        or any(isinstance(p, bool) or not isinstance(p, int) or not 0 <= p < 2**63 for p in parts)
    ):
        raise UserError(f"crystal_seed {value!r}: [seed, position] expected, whole numbers of 0 or more")
    return parts[0], parts[1]


def served_from_environment() -> ServedModel | None:
    """Return what is served here, as the environment says; None if it does not say. Raises ModelError."""
    folder = os.environ.get(SERVED_MODEL)
    return served_model(folder) if folder else None
