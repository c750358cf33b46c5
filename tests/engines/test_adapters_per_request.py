"""Prompts that name an adapter, beside others: each is answered as by a model with that adapter alone."""

import math

import pytest

from crystallm_kit.engines.engine import Prompt, Sampling
from crystallm_kit.engines.transformers_local import TransformersEngine
from crystallm_kit.errors import UnknownName
from crystallm_kit.models.folders import adapter_folder, shipped_model_folder
from crystallm_kit.models.loading import load_model_folder
from crystallm_kit.records import Conditions, Range
from crystallm_kit.text.prompts import template_named
from crystallm_kit.tokens.requests import compile_request

ADAPTER = "bulk-modulus"
NACL = compile_request(Conditions(formula={"Na": 1, "Cl": 1}, n_sites=2))


@pytest.fixture(scope="module")
def base():
    return load_model_folder(shipped_model_folder())[:2]


@pytest.fixture(scope="module")
def per_request(base):
    adapters = {ADAPTER: adapter_folder(ADAPTER)}
    return TransformersEngine(*base, device="cpu", batch_size=3, threads=2, adapters=adapters)


def prompts() -> list[Prompt]:
    """Pairs that differ in nothing but the adapter, free and constrained."""
    template = template_named("kit-1")
    texts = [
        template.render(Conditions(properties={"bulk_modulus_gpa": Range.exactly(gpa)}))
        for gpa in (20.0, 380.0)
    ]
    return [
        Prompt(text, request=request, adapter=adapter)
        for text in texts
        for request in (None, NACL)
        for adapter in ("", ADAPTER)
    ]


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=0.0, max_new_tokens=30), Sampling(seed=3, max_new_tokens=30)]
)
def test_each_prompt_is_answered_by_its_own_adapter(base, per_request, sampling):
    """Greedy, and drawn, where the place among all prompts decides the draws."""
    merged = TransformersEngine(*load_model_folder(adapter_folder(ADAPTER))[:2], device="cpu")
    alone = {"": TransformersEngine(*base, device="cpu"), ADAPTER: merged}
    asked = prompts()
    wanted = {
        name: list(engine.complete([Prompt(p.text, request=p.request) for p in asked], sampling))
        for name, engine in alone.items()
    }
    for i, completion in enumerate(per_request.complete(asked, sampling)):
        expected = wanted[asked[i].adapter][i]
        assert completion.token_ids == expected.token_ids
        assert math.isclose(completion.log_probability, expected.log_probability, abs_tol=1e-3)
    apart = [a.token_ids != b.token_ids for a, b in zip(wanted[""], wanted[ADAPTER], strict=True)]
    assert sum(apart) >= len(apart) // 2


def test_an_adapter_that_is_not_there_is_refused_before_anything_is_drawn(per_request, base):
    with pytest.raises(UnknownName, match=f"did you mean '{ADAPTER}'"):
        next(per_request.complete([Prompt("crystal\n"), Prompt("crystal\n", adapter="bulk")], Sampling()))
    with pytest.raises(UnknownName, match="no adapter 'x'"):
        next(TransformersEngine(*base).complete([Prompt("crystal\n", adapter="x")], Sampling()))
