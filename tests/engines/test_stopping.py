"""Stop strings, over tokenizers whose tokens hold the stop string whole, in part and within other text."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from crystallm_kit.engines.engine import Prompt, Sampling
from crystallm_kit.engines.stopping import stop_table
from crystallm_kit.engines.transformers_local import TransformersEngine
from crystallm_kit.text.representation import Alphabet
from crystallm_kit.tokens.tokenizer import build_tokenizer, encode_strict, format_tokenizer

TOKENS = ("a", "b", "\n", "\n\n", "a\n", "\nb", "\n\na", "ab", "aab", "b\n\n", " ")


@pytest.fixture(scope="module")
def merging():
    """A tokenizer that writes newlines in many ways, as those of language models do."""
    return build_tokenizer(Alphabet(TOKENS))


@pytest.mark.parametrize("stop", ["\n\n", "\n", "aab", "abab", "ab\na"])
def test_the_table_finds_a_stop_string_where_searching_the_text_does(merging, stop):
    """Random runs of tokens, so that the string stands across tokens, within them, and overlaps itself."""
    table = stop_table(merging, stop, len(TOKENS) + 3)
    rng = np.random.default_rng(0)
    ended = 0
    for _ in range(400):
        state, text = 0, ""
        for token in rng.integers(0, len(TOKENS), 12):
            text += TOKENS[token]
            state = int(table[state, token])
            assert (state == len(stop)) == (stop in text)
            if state == len(stop):
                ended += 1
                break
    assert ended > 15


def test_ids_without_a_token_hold_no_text(merging):
    table = stop_table(merging, "\n\n", len(TOKENS) + 3)
    assert table.shape == (2, len(TOKENS) + 3)
    assert table[:, len(TOKENS) :].eq(0).all()


# The engine, on CrystaLLM's tokenizer, whose newline is one token and which has no end token

NEWLINE = 142


@pytest.fixture(scope="module")
def local():
    """A GPT-2 of 2 layers, 64 wide, that writes a newline about every fourth token."""
    tokenizer = format_tokenizer("cif")
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer), n_positions=128, n_embd=64, n_layer=2, n_head=2,
            bos_token_id=None, eos_token_id=None, initializer_range=0.15,
        )
    ).eval()  # fmt: skip
    forward = model.lm_head.forward

    def with_more_newlines(hidden):
        logits = forward(hidden).clone()
        logits[..., NEWLINE] = logits.logsumexp(-1) - 1.0
        return logits

    model.lm_head.forward = with_more_newlines
    return TransformersEngine(model, tokenizer, stop="\n\n", batch_size=50, device="cpu")


PROMPTS = [
    Prompt(text, beginning)
    for text in ("data_", "data_Na4Cl4\n", "data_Na4Cl4\nloop_\n", "data_Na4Cl4\n\n")
    for beginning in ("", "loop_\n", "_cell_length_a 5.6402\n")
] * 5  # fmt: skip
SAMPLING = Sampling(max_new_tokens=90, seed=3)


def first_stop(ids: tuple[int, ...]) -> int | None:
    """Return how many ids there are up to and with the first two newlines after one another."""
    return next((i + 2 for i, pair in enumerate(pairwise(ids)) if pair == (NEWLINE, NEWLINE)), None)


def test_a_sample_ends_at_two_newlines_that_the_model_wrote(local):
    completions = list(local.complete(PROMPTS, SAMPLING))
    stopped = [c for c in completions if c.stop_reason == "stop"]
    assert len(stopped) > 20
    for c in completions:
        assert first_stop(c.token_ids) == (len(c.token_ids) if c.stop_reason == "stop" else None)
        assert c.text.endswith("\n\n") == (c.stop_reason == "stop")


def test_a_newline_that_ends_the_prompt_does_not_count(local):
    """CrystaLLM's rule: the first newline after "data_Na4Cl4\\n" leaves the sample open."""
    after_newline = [c for c in local.complete(PROMPTS, SAMPLING) if c.prompt.endswith("\n")]
    opened = [c for c in after_newline if c.token_ids[:1] == (NEWLINE,)]
    assert opened
    assert all(len(c.token_ids) > 1 for c in opened)


@pytest.mark.parametrize("size", [1, 7])
def test_the_batch_size_changes_nothing_although_rows_end_apart(local, size):
    other = TransformersEngine(local.model, local.tokenizer, stop="\n\n", batch_size=size, device="cpu")
    wanted = list(local.complete(PROMPTS, SAMPLING))
    assert len({len(c.token_ids) for c in wanted}) > 10
    for a, b in zip(other.complete(PROMPTS, SAMPLING), wanted, strict=True):
        assert (a.token_ids, a.text, a.stop_reason) == (b.token_ids, b.text, b.stop_reason)
        assert math.isclose(a.log_probability, b.log_probability, rel_tol=1e-4)


def test_nothing_counts_that_follows_the_stop(local, monkeypatch):
    """Rows that have ended stay in the batch here, and write more newlines."""
    wanted = [(c.token_ids, c.log_probability) for c in local.complete(PROMPTS, SAMPLING)]
    monkeypatch.setattr("crystallm_kit.engines.transformers_local._WORTH_SHRINKING", 2.0)
    found = [(c.token_ids, c.log_probability) for c in local.complete(PROMPTS, SAMPLING)]
    assert [ids for ids, _ in found] == [ids for ids, _ in wanted]
    assert np.allclose([p for _, p in found], [p for _, p in wanted], rtol=1e-4)


def test_without_a_stop_string_a_model_that_has_no_end_token_writes_until_its_limit(local):
    endless = TransformersEngine(local.model, local.tokenizer, device="cpu")
    [completion] = endless.complete([Prompt("data_")], Sampling(max_new_tokens=400))
    assert completion.stop_reason == "length"
    assert len(completion.token_ids) == 128 - len(encode_strict(local.tokenizer, "data_"))
