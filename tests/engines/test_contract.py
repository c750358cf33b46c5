"""What every engine of the table owes. Behind `openai` stands this package's own server, over HTTP."""

import gc
import importlib.util

import pytest

from crystallm_kit.engines.engine import ENGINES, Prompt, Sampling, engine
from crystallm_kit.errors import UnknownName, UserError
from crystallm_kit.models.loading import load_model_folder
from crystallm_kit.records import Conditions
from crystallm_kit.structures.elements import SYMBOL
from crystallm_kit.structures.templates import learn_templates
from crystallm_kit.text.prompts import template_named
from crystallm_kit.text.representation import representation
from crystallm_kit.text.wyckoff import text_to_symmetric
from crystallm_kit.tokens.requests import compile_request

START = template_named("kit-1").render(Conditions())
NACL = compile_request(Conditions(formula={"Na": 1, "Cl": 1}, n_sites=2))
PEROVSKITE = compile_request(Conditions(formula={"Ba": 1, "Ti": 1, "O": 3}, spacegroup_number=221))
SAMPLING = Sampling(max_new_tokens=60, seed=7)
ADAPTER = "toy.adapter"
SALTS = [("Na", "Cl", 225, 5.64), ("K", "Br", 225, 6.60), ("Cs", "Cl", 221, 4.12), ("Cs", "I", 221, 4.57)]


def mixed_prompts(n: int = 24, *, steerable: bool = True) -> list[Prompt]:
    """Prompts of different lengths, some of them equal, with and without beginnings and requests."""
    nacl, perovskite = (NACL, PEROVSKITE) if steerable else (None, None)
    kinds = [
        Prompt(START, request=nacl), Prompt(START), Prompt("Na1 Cl1 225\n"),
        Prompt(START, request=perovskite), Prompt(START, "Na1 Cl1 225\nNa a\n", nacl),
        Prompt(START, "Ba1 Ti1 O3 "),
    ]  # fmt: skip
    return [kinds[i % len(kinds)] for i in range(n)]


# what vLLM warns of while it is imported is its own affair
MARKS = {"vllm": [pytest.mark.filterwarnings("ignore")]}
NEEDS_A_MODEL = {
    "scripted": "a script has no adapters",
    "template": "templates have no model, so no adapters",
}


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=MARKS.get(name, [])) for name in sorted(ENGINES)]
)
def any_engine(request, toy_model, toy_adapter):
    """Return one engine of the table after the other, over the toy model."""
    adapters = {ADAPTER: toy_adapter}
    if request.param == "scripted":
        texts = {p.text: ["Na1 Cl1 225\nNa a\nCl b\n5.64 end", "cut"] for p in mixed_prompts()}
        yield engine("scripted", texts)
    elif request.param == "template":
        texts = [f"{c}1 {a}1 {group}\n{c} a\n{a} b\n{x:.2f} end" for c, a, group, x in SALTS]
        decode = representation("wyckoff").decode
        perovskite = decode("Sr1 Ti1 O3 221\nSr a\nTi b\nO c\n3.91 end")
        yield engine("template", learn_templates([*map(decode, texts), perovskite]))
    elif request.param == "transformers":
        model, tokenizer, _ = load_model_folder(toy_model)
        yield engine("transformers", model, tokenizer, batch_size=50, device="cpu", adapters=adapters)
    elif request.param == "openai":
        url = request.getfixturevalue("toy_server")
        remote = engine("openai", url, alphabet=representation("wyckoff").alphabet())
        yield remote
        remote.close()
    elif request.param == "vllm":
        if importlib.util.find_spec("vllm") is None:
            pytest.skip("vllm is not installed here")
        with engine("vllm", toy_model, adapters=adapters, max_num_seqs=32) as offline:
            yield offline
        gc.collect()  # its sockets warn as they go, here and not while pytest ends
    else:
        pytest.fail(f"engine {request.param} is in the table and not under test")


@pytest.fixture
def with_adapters(any_engine):
    if any_engine.name in NEEDS_A_MODEL:
        pytest.skip(NEEDS_A_MODEL[any_engine.name])
    return any_engine


def test_there_is_one_completion_for_each_prompt_in_order(any_engine):
    prompts = mixed_prompts(steerable=any_engine.steerable)
    completions = list(any_engine.complete(prompts, SAMPLING))
    assert [c.prompt for c in completions] == [p.text for p in prompts]
    assert [c.index for c in completions] == list(range(24))
    assert {c.seed for c in completions} == {7}
    # templates have no answer to what holds no composition, nor a third and fourth one to what has two
    reasons = {"stop", "error"} if any_engine.name == "template" else {"stop", "length"}
    assert {c.stop_reason for c in completions} <= reasons


def test_the_same_seed_gives_the_same_completions(any_engine):
    prompts = mixed_prompts(steerable=any_engine.steerable)
    one, other = (list(any_engine.complete(prompts, SAMPLING)) for _ in range(2))
    assert [(c.text, c.token_ids, c.stop_reason) for c in one] == [
        (c.text, c.token_ids, c.stop_reason) for c in other
    ]


def test_equal_prompts_are_answered_differently(any_engine):
    request = NACL if any_engine.name == "template" else None
    texts = [c.text for c in any_engine.complete([Prompt(START, request=request)] * 20, SAMPLING)]
    assert len(set(texts)) > (1 if any_engine.name in NEEDS_A_MODEL else 15)


def test_nothing_asked_is_nothing_answered(any_engine):
    assert list(any_engine.complete([], SAMPLING)) == []


def test_completions_begin_as_they_should(with_adapters):
    prompts = mixed_prompts(steerable=with_adapters.steerable)
    for prompt, completion in zip(prompts, with_adapters.complete(prompts, SAMPLING), strict=True):
        assert completion.text.startswith(prompt.beginning)


def test_a_constrained_completion_that_stops_is_what_was_asked_for(with_adapters):
    assert with_adapters.steerable
    prompts = [Prompt(START, request=r) for r in (NACL, PEROVSKITE)] * 10
    for prompt, completion in zip(prompts, with_adapters.complete(prompts, SAMPLING), strict=True):
        assert completion.stop_reason == "stop"
        crystal = text_to_symmetric(completion.text)
        counts = {SYMBOL[z]: n for z, n in crystal.counts.items()}
        if prompt.request is NACL:
            assert counts == {"Na": 1, "Cl": 1}
        else:
            assert crystal.spacegroup_number == 221
            assert counts["O"] == 3 * counts["Ba"] == 3 * counts["Ti"]


@pytest.mark.parametrize("beginning", ["K", "Na2 ", "Na1 Cl1 225\nNa c\n", "Na1 Cl1 62\n"])
def test_a_beginning_that_leaves_the_request_is_refused(with_adapters, beginning):
    with pytest.raises(UserError, match=r"beginning|crystal_given"):
        list(with_adapters.complete([Prompt(START, request=NACL), Prompt(START, beginning, NACL)], SAMPLING))


def test_greedy_completions_are_all_the_same(with_adapters):
    greedy = Sampling(temperature=0.0, max_new_tokens=60)
    completions = list(with_adapters.complete([Prompt(START, request=PEROVSKITE)] * 5, greedy))
    assert [c.index for c in completions] == list(range(5))
    assert len({c.text for c in completions}) == 1


def test_log_probabilities_are_those_of_the_transformers_engine(with_adapters, toy_model):
    """Of the same completions, under the same constraint, and before temperature."""
    model, tokenizer, _ = load_model_folder(toy_model)
    reference = engine("transformers", model, tokenizer, device="cpu")
    prompts = [Prompt(START, request=NACL), Prompt(START, request=PEROVSKITE)] * 3
    sampling = Sampling(temperature=0.7, number_temperature=0.4, seed=5)
    drawn = list(with_adapters.complete(prompts, sampling))
    again = [
        Prompt(p.text, c.text.removesuffix("end"), p.request, is_whole=True)
        for p, c in zip(prompts, drawn, strict=True)
    ]
    wanted = [c.log_probability for c in reference.complete(again, Sampling())]
    assert [c.log_probability for c in drawn] == pytest.approx(wanted, rel=1e-3, abs=1e-3)


def test_an_adapter_answers_the_prompts_that_name_it_and_no_others(with_adapters):
    asked = [Prompt(START, request=NACL, adapter=name) for name in ("", ADAPTER)] * 8
    together = [c.text for c in with_adapters.complete(asked, SAMPLING)]
    none = [Prompt(p.text, request=p.request) for p in asked]
    alone = [c.text for c in with_adapters.complete(none, SAMPLING)]
    if with_adapters.name != "openai":  # whose draws depend on what is asked together
        assert together[::2] == alone[::2]
    assert sum(a != b for a, b in zip(together[1::2], alone[1::2], strict=True)) > 4
    greedy = Sampling(temperature=0.0, max_new_tokens=60)
    for _ in range(2):
        base, adapted, again, once_more = (
            c.text for c in with_adapters.complete([asked[0], asked[1], asked[0], asked[1]], greedy)
        )
        assert (base, adapted) == (again, once_more)
        assert base != adapted


def test_an_unknown_adapter_is_refused_with_the_nearest(with_adapters):
    with pytest.raises(UnknownName, match=r"did you mean 'toy\.adapter'"):
        list(with_adapters.complete([Prompt(START), Prompt(START, adapter="adapter")], SAMPLING))


def test_an_empty_prompt_is_refused(with_adapters):
    with pytest.raises(UserError, match="empty prompt"):
        list(with_adapters.complete([Prompt("")], SAMPLING))


def test_a_prompt_that_leaves_no_room_is_refused(with_adapters):
    with pytest.raises(UserError, match="256 positions"):
        list(with_adapters.complete([Prompt("Na" * 300)], SAMPLING))
