"""What a request to vLLM says beside its prompt: read, checked, refused. None of it needs vllm."""

import json
from types import SimpleNamespace

import pytest

from crystallm_kit.engines.vllm_arguments import (
    KEYS,
    ServedModel,
    arguments_of,
    compiled,
    served_from_environment,
    served_model,
)
from crystallm_kit.errors import ImpossibleRequest, UnknownName, UserError
from crystallm_kit.models.folders import shipped_model_folder
from crystallm_kit.records import Conditions
from crystallm_kit.structures.elements import RANK
from crystallm_kit.tokens.requests import compile_request, request_to_json

MODEL = ServedModel(("O", "Sr", "Ti"), 10, has_wyckoff_ids=True)
PEROVSKITE = compile_request(Conditions(formula={"Sr": 1, "Ti": 1, "O": 3}), max_sites=10)


def params(extra: dict[str, object] | None = None, **others: object) -> SimpleNamespace:
    """What is read of vllm.SamplingParams, with vLLM's defaults."""
    usual = {
        "temperature": 1.0, "top_p": 1.0, "top_k": 0, "n": 1, "min_tokens": 0, "logit_bias": None,
        "bad_words": None, "allowed_token_ids": None, "structured_outputs": None,
    }  # fmt: skip
    return SimpleNamespace(extra_args=extra, **{**usual, **others})


def test_a_request_without_arguments_of_ours_is_left_alone():
    assert arguments_of(params(), MODEL) is None
    assert arguments_of(params({"someone_elses": 1}), MODEL) is None


def test_a_request_travels_as_its_json():
    asked = arguments_of(params({"crystal": request_to_json(PEROVSKITE), "crystal_given": 3}), MODEL)
    assert asked is not None
    assert (asked.request, asked.n_given, asked.beginning, asked.seed) == (PEROVSKITE, 3, (), None)


def test_conditions_are_compiled_with_what_the_served_model_knows():
    asked = arguments_of(params({"crystal": '{"conditions": {"n_elements": 3}}'}), MODEL)
    assert asked is not None
    assert asked.request is not None
    assert asked.request.elements == tuple(sorted(RANK[e] for e in ("O", "Sr", "Ti")))
    assert asked.request.max_sites == 10


def test_a_compiled_request_leaves_nothing_to_be_known():
    text = compiled('{"conditions": {"formula": "SrTiO3"}}', MODEL)
    other = ServedModel(("H",), 2, has_wyckoff_ids=True)
    asked = arguments_of(params({"crystal": text}), other)
    assert asked is not None
    assert asked.request == PEROVSKITE


def test_own_draws_take_their_settings_from_the_arguments_or_from_vllm():
    text = request_to_json(PEROVSKITE)
    extra = {"crystal": text, "crystal_seed": [4, 7], "crystal_temperature": 0.8, "crystal_top_k": 20.0}
    extra["crystal_number_temperature"] = 0.5
    asked = arguments_of(params(extra, temperature=0, top_p=0.9), MODEL)
    assert asked is not None
    assert (asked.seed, asked.temperature, asked.number_temperature) == ((4, 7), 0.8, 0.5)
    assert (asked.top_p, asked.top_k) == (0.9, 20)
    asked = arguments_of(params({"crystal_seed": [4, 7]}, temperature=0.3), MODEL)
    assert asked is not None
    assert (asked.temperature, asked.number_temperature) == (0.3, 0.3)


@pytest.mark.parametrize(
    ("extra", "others", "message"),
    [
        ({"crystal": 5}, {}, "expected JSON text, got int"),
        ({"crystal": "{"}, {}, "no JSON"),
        ({"crystal": '{"conditions": {"formul": "NaCl"}}'}, {}, "formul"),
        ({"crystal": '{"conditions": {"elements": ["Xx"]}}'}, {}, "Xx"),
        ({"crystal_given": 2}, {}, "need 'crystal'"),
        ({"crystal_number_temperature": 2}, {}, "need 'crystal'"),
        ({"crystal_temperature": 2}, {}, "needs 'crystal_seed'"),
        ({"crystal_seed": 5}, {}, r"\[seed, position\] expected"),
        ({"crystal_seed": [5, -1]}, {}, r"\[seed, position\] expected"),
        ({"crystal_seed": [5, True]}, {}, r"\[seed, position\] expected"),
        ({"crystal_seed": [5, 1]}, {"n": 2}, "n must be 1"),
        ({"crystal_seed": [5, 1], "crystal_temperature": float("nan")}, {}, "crystal_temperature nan"),
        ({"crystal_seed": [5, 1], "crystal_temperature": float("inf")}, {}, "crystal_temperature inf"),
        ({"crystal_seed": [5, 1], "crystal_temperature": "1"}, {}, "crystal_temperature '1'"),
        ({"crystal_seed": [5, 1], "crystal_top_p": 0}, {}, "crystal_top_p 0"),
        ({"crystal_seed": [5, 1], "crystal_top_k": 1.5}, {}, "crystal_top_k 1.5"),
        ({"crystal_beginning": "Na"}, {}, "a list of token ids"),
        ({"crystal_beginning": [1, "a"]}, {}, "crystal_beginning 'a'"),
        ({"crystal_beginning": [-1]}, {}, "crystal_beginning -1"),
    ],
)
def test_what_cannot_be_is_refused_before_the_engine_sees_it(extra, others, message):
    with pytest.raises(UserError, match=message):
        arguments_of(params(extra, **others), MODEL)


def test_an_unknown_argument_is_refused_with_the_nearest():
    with pytest.raises(UnknownName, match="did you mean 'crystal_given'"):
        arguments_of(params({"crystal_givn": 1}), MODEL)


def test_a_request_that_no_crystal_meets_is_refused():
    with pytest.raises(ImpossibleRequest, match="no multiple of"):
        arguments_of(params({"crystal": '{"conditions": {"formula": "NaCl", "n_sites": 3}}'}), MODEL)


def test_a_number_temperature_needs_draws():
    extra = {"crystal": request_to_json(PEROVSKITE), "crystal_number_temperature": 0.5}
    assert arguments_of(params(extra, temperature=1), MODEL) is not None
    with pytest.raises(UserError, match="vLLM draws nothing then"):
        arguments_of(params(extra, temperature=0), MODEL)


@pytest.mark.parametrize(
    "conflict",
    [{"min_tokens": 5}, {"logit_bias": {1: -100.0}}, {"bad_words": ["x"]}, {"allowed_token_ids": [3]}],
)
def test_what_could_empty_a_mask_is_refused_beside_it(conflict):
    extra = {"crystal": request_to_json(PEROVSKITE)}
    with pytest.raises(UserError, match=next(iter(conflict))):
        arguments_of(params(extra, **conflict), MODEL)
    assert arguments_of(params({"crystal_log_softmax": 1}, **conflict), MODEL) is not None


def test_a_constraint_is_refused_where_ids_are_not_those_of_the_wyckoff_format():
    with pytest.raises(UserError, match="this model's are others"):
        arguments_of(params({"crystal": request_to_json(PEROVSKITE)}), ServedModel((), 1, False))


def test_a_constraint_is_refused_where_the_served_model_is_unknown(monkeypatch):
    monkeypatch.delenv("CRYSTALLM_KIT_SERVED_MODEL", raising=False)
    with pytest.raises(UserError, match="CRYSTALLM_KIT_SERVED_MODEL"):
        arguments_of(params({"crystal": request_to_json(PEROVSKITE)}), served_from_environment())


def test_what_is_served_is_read_from_its_folder(monkeypatch):
    monkeypatch.setenv("CRYSTALLM_KIT_SERVED_MODEL", str(shipped_model_folder()))
    model = served_from_environment()
    manifest = json.loads((shipped_model_folder() / "manifest.json").read_text())["results"]
    assert model is not None
    assert model.has_wyckoff_ids
    assert (list(model.known_elements), model.max_sites) == (manifest["elements"], manifest["max_sites"])


def test_a_base_models_ids_are_not_those_of_the_wyckoff_format(base_folder):
    model = served_model(str(base_folder("llama")))
    assert not model.has_wyckoff_ids
    assert len(model.known_elements) > 90


def test_every_key_is_documented():
    from crystallm_kit.engines import vllm_arguments

    documented = (vllm_arguments.__doc__ or "").replace(",", " ").split()
    assert set(KEYS) <= set(documented)
