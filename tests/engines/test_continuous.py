"""continuous.py, slots.py: the samples of the batch loop, while requests come, go and share slots."""

import queue
import threading

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig

from crystallm_kit.engines.continuous import ContinuousEngine, _window
from crystallm_kit.engines.engine import Prompt, Sampling
from crystallm_kit.engines.transformers_local import TransformersEngine
from crystallm_kit.errors import ImpossibleRequest, UnknownName, UserError
from crystallm_kit.records import Completion, Conditions
from crystallm_kit.text.wyckoff import TOKENS
from crystallm_kit.tokens.requests import compile_request
from crystallm_kit.tokens.tokenizer import format_tokenizer

NACL = compile_request(Conditions(formula={"Na": 1, "Cl": 1}), max_sites=8)
ANY = compile_request(Conditions(), max_sites=8)


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return format_tokenizer("wyckoff")


@pytest.fixture(scope="module")
def local(tokenizer) -> TransformersEngine:
    return TransformersEngine(small_llama(), tokenizer, device="cpu")


@pytest.fixture
def engine(local):
    made = ContinuousEngine.over(local, slots=5)
    yield made
    made.close()


def mixed_prompts() -> list[Prompt]:
    """Prompts of several lengths, free and constrained, some with a beginning."""
    requests = [NACL, None, ANY]
    prompts = [Prompt("Na" * (1 + i % 4), request=requests[i % 3]) for i in range(17)]
    prompts[4] = Prompt("Na", "Na2 Cl2 ", NACL)
    prompts[5] = Prompt("Cl", "Ba1 ", None)
    return prompts


@pytest.mark.parametrize(
    "sampling",
    [Sampling(seed=3), Sampling(seed=4, top_k=5), Sampling(seed=5, top_p=0.7, number_temperature=0.3),
     Sampling(temperature=0.0), Sampling(max_new_tokens=7)],
    ids=["plain", "top_k", "top_p", "greedy", "cut"],
)  # fmt: skip
def test_the_samples_are_those_of_the_batch_loop(local, engine, sampling):
    expected = list(local.complete(mixed_prompts(), sampling))
    found = list(engine.complete(mixed_prompts(), sampling))
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]
    assert [(c.text, c.stop_reason, c.index) for c in found] == [
        (c.text, c.stop_reason, c.index) for c in expected
    ]
    for one, other in zip(found, expected, strict=True):
        assert one.log_probability == pytest.approx(other.log_probability, abs=1e-3)


def test_a_model_with_learned_positions_and_a_stop_text_gives_the_same_samples(tokenizer):
    torch.manual_seed(1)
    network = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(TOKENS), n_positions=96, n_embd=32, n_layer=2, n_head=2)
    )
    plain = TransformersEngine(network.eval(), tokenizer, stop="O", device="cpu")
    engine = ContinuousEngine.over(plain, slots=3)
    prompts, sampling = [Prompt("NaCl" * (1 + i % 3)) for i in range(8)], Sampling(seed=1)
    try:
        found = list(engine.complete(prompts, sampling))
    finally:
        engine.close()
    expected = list(plain.complete(prompts, sampling))
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]
    assert {c.stop_reason for c in found} <= {"stop", "length"}
    assert all("O" in c.text for c in found if c.stop_reason == "stop")


def test_tokens_are_told_as_they_come_with_the_likeliest_others(engine):
    told: list[tuple[int, float, tuple[tuple[int, float], ...]]] = []
    done: queue.Queue[Completion] = queue.Queue()
    engine.submit(
        Prompt("Na", request=NACL), Sampling(seed=2), n_top=3,
        on_token=lambda *token: told.append(token), on_done=done.put,
    )  # fmt: skip
    whole = done.get(timeout=60)
    assert tuple(token for token, _, _ in told) == whole.token_ids
    assert sum(log for _, log, _ in told) == pytest.approx(whole.log_probability, abs=1e-3)
    for token, log, top in told:
        assert 1 <= len(top) <= 3
        assert [p for _, p in top] == sorted((p for _, p in top), reverse=True)
        assert dict(top).get(token, log) == pytest.approx(log)


def test_a_cancelled_sample_frees_its_slot_and_is_told_nothing_more(local):
    engine = ContinuousEngine.over(local, slots=1)
    first_token, done = threading.Event(), queue.Queue()
    try:
        long = engine.submit(
            Prompt("Na"), Sampling(seed=0, max_new_tokens=200),
            on_token=lambda *_: first_token.set(), on_done=lambda outcome: done.put(("long", outcome)),
        )  # fmt: skip
        engine.submit(
            Prompt("Cl", request=NACL), Sampling(seed=1), on_done=lambda outcome: done.put(("short", outcome))
        )
        assert first_token.wait(60)
        long.cancel()
        name, outcome = done.get(timeout=60)
        assert name == "short"
        assert outcome.stop_reason == "stop"
        assert done.empty()
    finally:
        engine.close()


def test_many_threads_get_their_own_answers(engine, local):
    sampling = Sampling(seed=9)
    expected = [c.text for c in local.complete(mixed_prompts(), sampling)]
    found: dict[int, list[str]] = {}

    def ask(thread: int) -> None:
        found[thread] = [c.text for c in engine.complete(mixed_prompts(), sampling)]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert found == dict.fromkeys(range(6), expected)


def test_a_beginning_that_the_request_rules_out_fails_alone(engine):
    with pytest.raises(ImpossibleRequest, match="beginning 'Ba1 '"):
        list(engine.complete([Prompt("Na", "Ba1 ", NACL)], Sampling()))
    assert next(engine.complete([Prompt("Na", request=NACL)], Sampling())).stop_reason == "stop"


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        (Prompt(""), UserError, "an empty prompt"),
        (Prompt("Na" * 256), UserError, "256 positions"),
        (Prompt("Na", adapter="gone"), UnknownName, "adapter 'gone'"),
    ],
)
def test_what_cannot_be_is_refused_at_once(engine, prompt, error, message):
    with pytest.raises(error, match=message):
        engine.submit(prompt, Sampling(), on_done=lambda _: None)


def test_a_closed_engine_says_so(local):
    engine = ContinuousEngine.over(local, slots=2)
    engine.close()
    with pytest.raises(UserError, match="closed"):
        engine.submit(Prompt("Na"), Sampling(), on_done=lambda _: None)


def test_the_cache_grows_with_the_longest_sample(engine, local):
    """From 64 tokens a slot to 256, in the middle of other samples."""
    prompts = [Prompt("Na"), Prompt("Cl" * 90), Prompt("O", request=NACL)]
    sampling = Sampling(seed=11, max_new_tokens=150)
    expected = [c.token_ids for c in local.complete(prompts, sampling)]
    assert [c.token_ids for c in engine.complete(prompts, sampling)] == expected


def test_layers_that_look_back_less_far_limit_the_positions(tokenizer):
    assert _window(MistralConfig(sliding_window=100)) == 100
    assert _window(MistralConfig(sliding_window=None)) == np.inf
    assert _window(small_llama().config) == np.inf


def test_a_failure_while_slots_are_filled_is_told_to_those_who_were_to_have_them(local, monkeypatch):
    """Newcomers had left the queue and stood in no slot yet: nobody told them, and they waited for ever."""
    engine = ContinuousEngine.over(local, slots=2)
    try:
        with monkeypatch.context() as broken:
            broken.setattr(engine._slots, "put", lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
            with pytest.raises(MemoryError, match="no room"):
                list(engine.complete([Prompt("Na"), Prompt("Cl")], Sampling()))
        assert len(list(engine.complete([Prompt("Na", request=NACL)], Sampling()))) == 1
    finally:
        engine.close()


@pytest.mark.parametrize("fails", ["put", "launch", "collect"])
def test_a_failure_is_told_once_to_all_who_had_slots_and_the_others_go_on(local, monkeypatch, fails):
    engine = ContinuousEngine.over(local, slots=2)
    outcomes: dict[int, list[object]] = {i: [] for i in range(6)}
    first_token, is_broken = threading.Event(), threading.Event()
    whole = getattr(engine._slots, fails)

    def once(*arguments, **options):
        if is_broken.is_set():
            is_broken.clear()
            raise MemoryError("no room")
        return whole(*arguments, **options)

    monkeypatch.setattr(engine._slots, fails, once)
    try:
        engine.submit(
            Prompt("Na"), Sampling(seed=0, max_new_tokens=200),
            on_token=lambda *_: first_token.set(), on_done=outcomes[0].append,
        )  # fmt: skip
        assert first_token.wait(60)
        is_broken.set()
        done = queue.SimpleQueue()
        for i in range(1, 6):
            engine.submit(
                Prompt("Cl", request=NACL), Sampling(seed=i),
                on_done=lambda outcome, i=i: (outcomes[i].append(outcome), done.put(i)),
            )  # fmt: skip
        assert sorted(done.get(timeout=60) for _ in range(5)) == [1, 2, 3, 4, 5]
    finally:
        engine.close()
    assert [len(outcome) for outcome in outcomes.values()] == [1] * 6
    failed = [i for i, (outcome,) in outcomes.items() if isinstance(outcome, MemoryError)]
    assert 0 in failed
    assert len(failed) <= 2
    assert all(isinstance(outcome, Completion) for i, (outcome,) in outcomes.items() if i not in failed)


def test_who_is_done_is_told_so_even_where_the_next_step_of_the_others_fails(local, monkeypatch):
    """On a GPU the next step is launched first: where that failed, finished samples were told nothing."""
    engine = ContinuousEngine.over(local, slots=16)
    outcomes = queue.SimpleQueue()
    whole = engine._launch

    def launch():
        if engine.n_running == 1:  # the short one has just been collected
            raise MemoryError("no room")
        whole()

    monkeypatch.setattr(engine, "_launch", launch)
    monkeypatch.setattr(engine, "device", torch.device("meta"))  # any but a CPU
    try:
        with engine._changed:  # both at once
            for n in (3, 200):
                engine._waiting.append(
                    engine._ticket(
                        Prompt("Na"), Sampling(seed=0, max_new_tokens=n), 0, None, None, None,
                        lambda outcome, n=n: outcomes.put((n, outcome)),
                    )
                )  # fmt: skip
            engine._changed.notify()
        ended = dict(outcomes.get(timeout=20) for _ in range(2))
    finally:
        engine.close()
    assert isinstance(ended[3], Completion)
    assert len(ended[3].token_ids) == 3
    assert isinstance(ended[200], MemoryError)
