"""Texts and token ids as engines exchange them: prompts, beginnings, completions.

A format's own tokenizer refuses text that it does not cover. Of a base model's, prompts are encoded as in
training, and a completion is what the text grows by: tokenizers of the SentencePiece kind lose the blank that
a text begins with when it is decoded alone.

Not here: how tokenizers are made (tokens/tokenizer.py).
"""

from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from crystallm_kit.engines.engine import Prompt
from crystallm_kit.errors import UserError
from crystallm_kit.text.wyckoff import TOKENS
from crystallm_kit.tokens.cutting import BaseCutter
from crystallm_kit.tokens.tokenizer import encode_strict, prompt_ids


class Texts:
    """What one tokenizer makes of prompts and completions."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def has_wyckoff_ids(self) -> bool:
        """Whether the tokenizer's ids are those that constraints are made of."""
        return bool(self.tokenizer.convert_tokens_to_ids(list(TOKENS)) == list(range(len(TOKENS))))

    @cached_property
    def is_of_a_format(self) -> bool:
        """Whether the tokenizer is a format's alphabet (tokenizer.build_tokenizer) and no base model's."""
        return type(self.tokenizer.backend_tokenizer.model).__name__ == "WordLevel"

    @cached_property
    def _words(self) -> dict[int, str]:
        """Id -> text. Texts of a format are their tokens, joined: fifty times as fast as to decode them."""
        words = self.tokenizer.batch_decode(
            [[i] for i in range(len(self.tokenizer))], skip_special_tokens=False
        )
        return defaultdict(str, enumerate(words))  # rows of a model beyond its alphabet are no text

    def check_prompt(self, ids: Sequence[int], max_positions: int) -> None:
        """Raise UserError for a prompt that is empty or leaves no room for a completion."""
        if not ids:
            raise UserError("an empty prompt; a model goes on from at least one token")
        if len(ids) >= max_positions:
            raise UserError(f"a prompt of {len(ids)} tokens; the model has {max_positions} positions in all")

    def check_request(self, prompt: Prompt) -> None:
        """Raise UserError for a constraint that the tokenizer's ids cannot be held to."""
        if prompt.request is not None and not self.has_wyckoff_ids:
            raise UserError(
                "a request needs a tokenizer whose ids are those of the wyckoff format; this model's are "
                "others. Sample it unconstrained."
            )

    def token_text(self, id: int) -> str:
        """Return one token's text, as it is alone."""
        if self.is_of_a_format:
            return self._words[id]
        return str(self.tokenizer.decode([id], skip_special_tokens=False))

    def prompt_ids(self, text: str) -> list[int]:
        """Return the ids of a prompt. Raises UserError where a format's alphabet does not cover it."""
        return (encode_strict if self.is_of_a_format else prompt_ids)(self.tokenizer, text)

    def given_ids(self, prompt: Prompt) -> list[int]:
        """Return what a completion must begin with; a whole one ends with the end token, if there is one."""
        ids = self._text_ids(prompt.beginning) if prompt.beginning else []
        end = self.tokenizer.eos_token_id
        return [*ids, end] if prompt.is_whole and end is not None and ids[-1:] != [end] else ids

    def text_of(self, prompt: Sequence[int], completion: Sequence[int]) -> str:
        """Return the text of a completion; of a base model's tokenizer, without the end token."""
        if self.is_of_a_format:
            return "".join(map(self._words.__getitem__, completion))
        ended = bool(completion) and completion[-1] == self.tokenizer.eos_token_id
        written = [*prompt, *(completion[:-1] if ended else completion)]
        # a special token within the text stays: left out, it would join what it stood between
        before, after = (str(self.tokenizer.decode(ids)) for ids in (list(prompt), written))
        return after[len(before) :]

    def _text_ids(self, text: str) -> list[int]:
        if self.is_of_a_format:
            return encode_strict(self.tokenizer, text)
        return BaseCutter(self.tokenizer)(text)
