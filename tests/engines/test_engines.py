"""The table of engines, and the transformers engine, on a toy Llama with random weights."""

import dataclasses
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from crystallm_kit.engines.drawing import draw
from crystallm_kit.engines.engine import Prompt, Sampling, ScriptedEngine, engine
from crystallm_kit.engines.transformers_local import TransformersEngine
from crystallm_kit.errors import ImpossibleRequest, UnknownName, UserError
from crystallm_kit.records import Conditions
from crystallm_kit.structures.elements import SYMBOL
from crystallm_kit.text.prompts import template_named
from crystallm_kit.text.wyckoff import TOKENS, text_to_symmetric
from crystallm_kit.tokens.masking import WyckoffConstraint
from crystallm_kit.tokens.requests import compile_request
from crystallm_kit.tokens.tokenizer import encode_strict, format_tokenizer

START = template_named("kit-1").render(Conditions())
NACL = compile_request(Conditions(formula={"Na": 1, "Cl": 1}, n_sites=2))
PEROVSKITE = compile_request(Conditions(formula={"Ba": 1, "Ti": 1, "O": 3}, spacegroup_number=221))


@pytest.fixture(scope="module")
def tokenizer():
    return format_tokenizer("wyckoff")


@pytest.fixture(scope="module")
def toy(tokenizer):
    """A Llama of 2 layers, 64 wide, whose weights are large enough to prefer some tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 7, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=160, initializer_range=0.15,
    )  # fmt: skip
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield LlamaForCausalLM(config).eval()
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def local(toy, tokenizer):
    return TransformersEngine(toy, tokenizer, batch_size=50, device="cpu")


def of_batch(local: TransformersEngine, size: int) -> TransformersEngine:
    return TransformersEngine(local.model, local.tokenizer, batch_size=size, device="cpu")


def mixed_prompts(n: int = 24) -> list[Prompt]:
    """Prompts of different lengths, with and without requests and beginnings."""
    kinds = [
        Prompt(START, request=NACL), Prompt(START), Prompt("Na1 Cl1 225\n"), Prompt("Na", request=PEROVSKITE),
        Prompt(START, "Na1 Cl1 225\nNa a\n", NACL), Prompt(START, "Ba1 Ti1 O3 "),
    ]  # fmt: skip
    return [kinds[i % len(kinds)] for i in range(n)]


SAMPLING = Sampling(max_new_tokens=60, seed=7)


# The table


def test_an_unknown_engine_is_refused_with_the_nearest():
    with pytest.raises(UnknownName, match="did you mean 'transformers'"):
        engine("transformer")


def test_the_script_says_which_prompt_it_does_not_know():
    with pytest.raises(UserError, match="no answer to 'x'"):
        list(ScriptedEngine({}).complete([Prompt("x")], SAMPLING))


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}, {"max_new_tokens": 0}, {"seed": -1}],
)
def test_sampling_out_of_range_is_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)


# The transformers engine


@pytest.mark.parametrize("size", [1, 3, 24])
def test_the_batch_size_does_not_change_what_is_drawn(local, size):
    wanted = list(local.complete(mixed_prompts(), SAMPLING))
    found = list(of_batch(local, size).complete(mixed_prompts(), SAMPLING))
    assert [c.token_ids for c in found] == [c.token_ids for c in wanted]
    for a, b in zip(found, wanted, strict=True):
        assert math.isclose(a.log_probability, b.log_probability, rel_tol=1e-4)


def test_another_seed_and_another_position_draw_something_else(local):
    texts = [c.text for c in local.complete([Prompt(START, request=NACL)] * 8, SAMPLING)]
    other = [
        c.text
        for c in local.complete([Prompt(START, request=NACL)] * 8, dataclasses.replace(SAMPLING, seed=8))
    ]
    assert len({*texts, *other}) > 12


def test_constrained_completions_that_stop_parse_and_hold_what_was_asked(local):
    prompts = [Prompt(START, request=r) for r in (NACL, PEROVSKITE)] * 10
    for prompt, completion in zip(prompts, local.complete(prompts, SAMPLING), strict=True):
        assert completion.stop_reason == "stop"
        crystal = text_to_symmetric(completion.text)
        counts = {SYMBOL[z]: n for z, n in crystal.counts.items()}
        if prompt.request is NACL:
            assert counts == {"Na": 1, "Cl": 1}
        else:
            assert crystal.spacegroup_number == 221
            assert counts["O"] == 3 * counts["Ba"] == 3 * counts["Ti"]


def teacher_forced(engine_: TransformersEngine, prompt: Prompt, token_ids: tuple[int, ...]) -> float:
    """Return the log-probability of a completion in one pass, masked step by step."""
    ids = encode_strict(engine_.tokenizer, prompt.text)
    with torch.inference_mode():
        logits = engine_.model(torch.tensor([[*ids, *token_ids]])).logits[0, len(ids) - 1 : -1].double()
    constraint = None
    if prompt.request is not None:
        constraint = WyckoffConstraint([prompt.request], vocabulary_size=logits.shape[1])
    total = 0.0
    for row, token in zip(logits, token_ids, strict=True):
        if constraint is not None:
            row = row.masked_fill(~constraint.mask()[0], -torch.inf)
            constraint.advance(torch.tensor([token]))
        total += float(torch.log_softmax(row, -1)[token])
    return total


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_log_probabilities_are_those_of_one_pass_over_the_completion(local, temperature):
    prompts = mixed_prompts(18)
    sampling = dataclasses.replace(SAMPLING, temperature=temperature)
    for prompt, completion in zip(prompts, local.complete(prompts, sampling), strict=True):
        wanted = teacher_forced(local, prompt, completion.token_ids)
        assert math.isclose(completion.log_probability, wanted, rel_tol=1e-3, abs_tol=1e-3)


@pytest.fixture
def eager_to_end(local):
    """The engine, its end token about as likely as any other, so that it comes again and again."""
    rows = local.model.lm_head.weight
    end = local.tokenizer.eos_token_id
    before = rows[end].detach().clone()
    with torch.no_grad():
        rows[end] = rows.mean(0) + 0.4 * rows[5:20].sum(0)
    yield local
    with torch.no_grad():
        rows[end] = before


def test_nothing_counts_that_follows_the_end(eager_to_end, monkeypatch):
    """Finished samples still in the batch drew on: a second end lengthened them, and all of it was scored."""
    monkeypatch.setattr("crystallm_kit.engines.transformers_local._WORTH_SHRINKING", 2.0)
    sampling = dataclasses.replace(SAMPLING, max_new_tokens=40)
    completions = list(eager_to_end.complete([Prompt("Na")] * 60, sampling))
    stopped = [c for c in completions if c.stop_reason == "stop"]
    assert len(stopped) > 10
    for c in stopped:
        assert c.token_ids.index(eager_to_end.tokenizer.eos_token_id) == len(c.token_ids) - 1
        wanted = teacher_forced(eager_to_end, Prompt("Na"), c.token_ids)
        assert math.isclose(c.log_probability, wanted, rel_tol=1e-3)


def test_a_completion_that_reaches_its_limit_says_so(local):
    [completion] = local.complete(
        [Prompt(START, request=NACL)], dataclasses.replace(SAMPLING, max_new_tokens=4)
    )
    assert completion.stop_reason == "length"
    assert completion.token_ids == tuple(encode_strict(local.tokenizer, "Na1 Cl1 "))


def test_a_completion_ends_where_the_model_has_no_more_positions(local):
    [completion] = local.complete([Prompt("Na" * 150)], dataclasses.replace(SAMPLING, max_new_tokens=400))
    assert len(completion.token_ids) <= 10


def test_an_empty_prompt_is_refused(local):
    with pytest.raises(UserError, match="empty prompt"):
        list(local.complete([Prompt("")], SAMPLING))


def test_a_prompt_that_leaves_no_room_is_refused(local):
    with pytest.raises(UserError, match="160 tokens; the model has 160 positions"):
        list(local.complete([Prompt("Na" * 160)], SAMPLING))


def test_temperature_zero_takes_the_most_likely_token_whatever_the_seed(local):
    prompts = [Prompt("Na", request=PEROVSKITE)] * 3
    texts = {
        c.text
        for seed in (1, 2)
        for c in local.complete(prompts, dataclasses.replace(SAMPLING, temperature=0.0, seed=seed))
    }
    assert len(texts) == 1


def test_a_beginning_is_kept_and_counts(local):
    prompt = Prompt(START, "Na1 Cl1 225\nNa b\n", NACL)
    for completion in local.complete([prompt] * 5, SAMPLING):
        assert completion.text.startswith(prompt.beginning + "Cl a\n")
        assert completion.stop_reason == "stop"


def test_a_beginning_that_goes_on_after_the_end_ends_there(local):
    """The batch lost the rows that ended, while the logits read for all of them at once did not."""
    ended, open_ = (
        Prompt(START, text) for text in ("Na1 Cl1 225\nNa a\nCl b\n5.64 end" + "Na" * 9, "Na" * 40)
    )
    completions = list(local.complete([ended, open_, ended, open_], SAMPLING))
    assert [c.text for c in completions[::2]] == ["Na1 Cl1 225\nNa a\nCl b\n5.64 end"] * 2
    for completion in completions[1::2]:
        assert completion.text.startswith("Na" * 40)
        wanted = teacher_forced(local, open_, completion.token_ids)
        assert math.isclose(completion.log_probability, wanted, rel_tol=1e-3)


@pytest.mark.parametrize("beginning", ["K", "Na2 ", "Na1 Cl1 225\nNa c\n", "Na1 Cl1 62\n"])
def test_a_beginning_that_leaves_the_request_is_refused(local, beginning):
    """The constraint used to lose count, and samples ended in tokens drawn from nothing."""
    with pytest.raises(ImpossibleRequest, match="beginning"):
        list(local.complete([Prompt(START, request=NACL), Prompt(START, beginning, NACL)], SAMPLING))


def test_requests_need_the_ids_of_the_format(toy):
    other = TransformersEngine(toy, format_tokenizer("compact"), device="cpu")
    with pytest.raises(UserError, match="ids are those of the wyckoff format"):
        list(other.complete([Prompt("\n", request=NACL)], SAMPLING))


# Drawing


def distribution(logits: torch.Tensor, sampling: Sampling, n: int = 20_000) -> torch.Tensor:
    """Return the share of each token among n draws at evenly spaced uniform numbers."""
    uniform = (torch.arange(n) + 0.5) / n
    tokens = draw(
        logits.expand(n, -1), uniform, sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k
    )
    return torch.bincount(tokens, minlength=logits.shape[1]) / n


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(), Sampling(temperature=0.6), Sampling(top_k=4), Sampling(top_p=0.8),
        Sampling(temperature=1.4, top_k=6, top_p=0.7), Sampling(top_p=0.01), Sampling(top_k=1),
    ],
)  # fmt: skip
def test_tokens_are_drawn_as_transformers_would(sampling):
    torch.manual_seed(1)
    logits = torch.randn(1, 12) * 2
    logits[0, [3, 8]] = -torch.inf
    warped = TemperatureLogitsWarper(sampling.temperature)(None, logits)
    if sampling.top_k:
        warped = TopKLogitsWarper(sampling.top_k)(None, warped)
    if sampling.top_p < 1:
        warped = TopPLogitsWarper(sampling.top_p)(None, warped)
    torch.testing.assert_close(
        distribution(logits, sampling), torch.softmax(warped, -1)[0], atol=2e-4, rtol=0
    )


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-24])
@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1.0, 100.0])
def test_a_forbidden_token_is_never_drawn_at_the_edges(uniform, temperature):
    logits = torch.full((1, len(TOKENS)), -torch.inf)
    logits[0, [17, 400]] = torch.tensor([30.0, -30.0])
    token = draw(logits, torch.tensor([uniform]), temperature)
    assert int(token) in (17, 400)
