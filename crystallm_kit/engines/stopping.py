r"""Stop strings: where a growing text ends, told token by token.

A format without an end token ends at a text: CrystaLLM's CIF at two newlines. A token may hold one newline or
two, or one within other text; so every token is read character by character, once, and what is left is a
table of states: how much of the stop string the text ends with.

    "\n\n" over the tokens  "a"  "\n"  "\n\n"  "1\n"
    after "...a"             0     1      2      1
    after "...\n"            0     2      2      1       2: the text has ended

Only what is generated counts: every sample begins in state 0, whatever its prompt ends with.
Not here: end tokens, and sampling (transformers_local.py).
"""

from typing import Any

import torch


def stop_table(tokenizer: Any, stop: str, vocabulary_size: int) -> torch.Tensor:
    """Return the state that each token leads to from each state: (S, V) int64, S characters of `stop`.

    Entry S, the length of `stop`, says that the text holds it: the sample has ended.

    Args:
        tokenizer: Its tokens' texts, joined, are the text: true of byte-level and of the kit's tokenizers.
        stop: One character or more.
        vocabulary_size: Columns; ids that the tokenizer does not know hold no text.
    """
    n_tokens = min(len(tokenizer), vocabulary_size)
    texts = tokenizer.batch_decode([[i] for i in range(n_tokens)], skip_special_tokens=False)
    table = torch.zeros(len(stop), vocabulary_size, dtype=torch.long)
    followers = _followers(stop)
    for token, text in enumerate(texts):
        if text and not set(text) & set(stop):
            continue  # leads to state 0 from everywhere
        for state in range(len(stop)):
            table[state, token] = _after(text, state, stop, followers)
    return table


def _after(text: str, state: int, stop: str, followers: list[int]) -> int:
    """Return the state after `text`; the length of `stop` once it has been seen."""
    for character in text:
        while state and stop[state] != character:
            state = followers[state]
        state += stop[state] == character
        if state == len(stop):
            break
    return state


def _followers(stop: str) -> list[int]:
    """Return for each state the next shorter one that the same text is in (Knuth, Morris, Pratt 1977)."""
    return [max((k for k in range(n) if stop[:n].endswith(stop[:k])), default=0) for n in range(len(stop))]
