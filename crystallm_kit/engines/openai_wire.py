"""What an engine says to an OpenAI-compatible server, and what the answers mean: bodies and choices, as data.

    wire = Wire("vllm", alphabet=..., max_positions=512, masks=True, log_mode="processed")
    wire.body(prompt, sampling, model="crystallm-kit", n=4, seed=7)        JSON of POST /v1/completions
    wire.completion(choice, prompt, sampling, index=0)                     one of its four choices

Four kinds of server. All get what OpenAI's own takes; beyond that:

    crystallm-kit   top_k, return_token_ids, and the constraint in vllm_xargs (crystal, crystal_given ...)
    vllm            the same; what keeps the end's text and the models' own sampling defaults away; a format's
                    grammar in structured_outputs where the model's tokenizer is not the format's
    anything else   top_k where it is asked for
    chat            /v1/chat/completions: the prompt is the user's message

Texts travel, not token ids, so no tokenizer is needed here. Where a model has a format's own tokenizer, the
format's alphabet cuts texts as that does, and counts and ids are known all the same.

Log-probabilities: our own server gives those of the constrained model. A vLLM server with our processor
(engines/vllm_constraint.py) gives log p / temperature if it runs with --logprobs-mode processed_logits; the
temperature is put back here. Other modes give nothing for constrained samples: NaN.

Not here: connections, finding out what a server is, failures (openai_endpoint.py).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from crystallm_kit.engines.engine import Prompt, Sampling
from crystallm_kit.errors import ImpossibleRequest, UserError
from crystallm_kit.records import Completion, StopReason
from crystallm_kit.text.representation import Alphabet, cut
from crystallm_kit.text.wyckoff import NumberLine
from crystallm_kit.tokens.requests import request_to_json

Kind = Literal["crystallm-kit", "vllm", "other"]
# What the log-probabilities of a server are: of the model alone; of the model under the constraint, divided
# by the temperature; unknown.
LogMode = Literal["raw", "processed", "unknown"]
_REASONS: dict[Any, StopReason] = {"stop": "stop", "length": "length"}


@dataclass(frozen=True)
class Wire:
    """How one server is spoken to.

    Attributes:
        kind: What it is.
        alphabet: The format's tokens where the model has the format's own tokenizer; None: a base model's.
        grammar: The format's grammar (Lark), for servers that take one; "": none.
        max_positions: Tokens that prompt and completion may have together; None: not known.
        masks: Whether it obeys requests (Prompt.request).
        log_mode: What its log-probabilities are.
        is_chat: Whether it only takes messages.
    """

    kind: Kind
    alphabet: Alphabet | None = None
    grammar: str = ""
    max_positions: int | None = None
    masks: bool = False
    log_mode: LogMode = "unknown"
    is_chat: bool = False

    def body(self, prompt: Prompt, sampling: Sampling, *, model: str, n: int, seed: int) -> dict[str, Any]:
        """Return what asks for n completions of a prompt.

        Raises:
            UserError: If the server cannot be asked for it, or the prompt leaves no room.
        """
        self.check(prompt)
        body: dict[str, Any] = {
            "model": model,
            "n": n,
            "seed": seed,
            "temperature": self._temperature(prompt, sampling),
            "top_p": sampling.top_p,
            "max_tokens": self._room(prompt, sampling),
        }
        if sampling.top_k or self.kind != "other":
            body["top_k"] = sampling.top_k
        stop = self._stop
        if stop:
            body["stop"] = [stop]
        if self.is_chat:
            return body | {"messages": [{"role": "user", "content": prompt.text}], "logprobs": True}
        is_forced = self._is_forced(prompt)
        body |= {"prompt": prompt.text + ("" if is_forced else prompt.beginning), "logprobs": 0}
        if self.kind != "other":
            body["return_token_ids"] = True
        if self.kind == "vllm":
            # a model folder may bring defaults of these, and the end is a special token with a text
            body |= {"min_p": 0.0, "repetition_penalty": 1.0, "include_stop_str_in_output": True}
            body |= {"skip_special_tokens": False, "spaces_between_special_tokens": False}
            if self.grammar and prompt.request is None:
                body["structured_outputs"] = {"grammar": self.grammar}
        arguments = self._arguments(prompt, sampling, is_forced)
        return body | ({"vllm_xargs": arguments} if arguments else {})

    def completion(
        self, choice: Mapping[str, Any], prompt: Prompt, sampling: Sampling, *, index: int
    ) -> Completion:
        """Return what one choice of an answer is.

        Args:
            choice: As the server gave it.
            prompt: What was asked.
            sampling: How.
            index: Position of the completion among those of the request.

        Raises:
            ImpossibleRequest: If a beginning is not what its prompt's request lets through.
        """
        message = choice.get("message")
        content = message.get("content") if isinstance(message, Mapping) else choice.get("text")
        text = content if isinstance(content, str) else ""
        reason = _REASONS.get(choice.get("finish_reason"), "error")
        is_appended = bool(prompt.beginning) and not self._is_forced(prompt)
        if not is_appended and reason == "stop" and not text.startswith(prompt.beginning):
            raise ImpossibleRequest(
                f"beginning {prompt.beginning!r}: it leaves what was asked for, or nothing goes on from it."
            )
        if reason == "stop":
            text += self._what_was_left_out(text)
        given = self._ids(prompt.beginning) if is_appended else ()
        drawn = choice.get("token_ids")
        ids = tuple(drawn) if isinstance(drawn, list) else ()
        return Completion(
            prompt.text,
            (prompt.beginning if is_appended else "") + text,
            () if given is None or not ids else (*given, *ids),
            reason,
            math.nan if is_appended else self._log_probability(choice, prompt, sampling, ids),
            sampling.seed,
            index,
        )

    def check(self, prompt: Prompt) -> None:
        """Raise UserError for what the server cannot be asked for."""
        if not prompt.text + prompt.beginning:
            raise UserError("an empty prompt; a model goes on from at least one token")
        if prompt.is_whole:
            raise UserError(
                "a server does not say how probable a given answer is; the engines 'transformers' and "
                "'vllm' do"
            )
        if prompt.request is not None and not self.masks:
            raise UserError(
                "this server does not draw under a constraint; sample it unconstrained, and the samples are "
                "checked afterwards"
            )
        if prompt.beginning and self.is_chat:
            raise UserError("a chat model answers; it does not go on with a given beginning")
        self._ids(prompt.beginning)
        self._room(prompt, Sampling())

    @property
    def _stop(self) -> str:
        """Return the text that ends a sample of a format without an end token."""
        return self.alphabet.stop if self.alphabet is not None and self.alphabet.end is None else ""

    def _what_was_left_out(self, text: str) -> str:
        """Return the end that a server leaves out of a text, and the model did write."""
        if self.alphabet is None:
            return ""
        end = self.alphabet.end or self._stop
        return "" if text.endswith(end) else end

    def _temperature(self, prompt: Prompt, sampling: Sampling) -> float:
        """Return the temperature to ask for: at 0, vLLM would not draw numbers at theirs either."""
        apart = prompt.request is not None and _has_own_numbers(sampling) and self.kind == "vllm"
        return max(sampling.temperature, 0.01) if apart else sampling.temperature

    def _is_forced(self, prompt: Prompt) -> bool:
        """Tell whether the beginning is drawn by force, as part of the output, not appended to the prompt."""
        return self.kind == "vllm" and prompt.request is not None

    def _room(self, prompt: Prompt, sampling: Sampling) -> int:
        """Return how many tokens may be drawn."""
        begun = 0 if self._is_forced(prompt) else self._n_tokens(prompt.beginning)
        wanted = max(1, sampling.max_new_tokens - begun)
        if self.max_positions is None:
            return wanted
        room = self.max_positions - begun - self._n_tokens(prompt.text)
        if self.alphabet is None:  # counted from above; the server says so if it is too long after all
            return max(1, min(wanted, max(room, self.max_positions // 2)))
        if room < 1:
            raise UserError(
                f"a prompt of {self.max_positions - room} tokens; the model has {self.max_positions} "
                "positions in all"
            )
        return min(wanted, room)

    def _arguments(self, prompt: Prompt, sampling: Sampling, is_forced: bool) -> dict[str, Any]:
        """Return the arguments of the constraint."""
        arguments: dict[str, Any] = {}
        if prompt.request is not None:
            arguments["crystal"] = request_to_json(prompt.request)
            if _has_own_numbers(sampling):
                arguments["crystal_number_temperature"] = sampling.number_temperature
            ids = self._ids(prompt.beginning) or ()
            if ids and is_forced:
                arguments["crystal_beginning"] = list(ids)
            elif ids:
                arguments["crystal_given"] = len(ids)
        if self.kind == "vllm" and self.log_mode == "processed":
            arguments["crystal_log_softmax"] = 1
        return arguments

    def _n_tokens(self, text: str) -> int:
        """Return the tokens of a text; for a base model's tokenizer, as many as it can have at most."""
        return len(text.encode()) if self.alphabet is None else len(cut(text, self.alphabet))

    def _ids(self, text: str) -> tuple[int, ...] | None:
        """Return a text's ids; None where they are not known here. Raises UserError."""
        if self.alphabet is None:
            return None if text else ()
        tokens = cut(text, self.alphabet)
        if "".join(tokens) != text or not self._id_of.keys() >= set(tokens):
            raise UserError(f"beginning {text!r}: the model's tokens do not cover it")
        return tuple(self._id_of[token] for token in tokens)

    @cached_property
    def _id_of(self) -> dict[str, int]:
        return {} if self.alphabet is None else {token: i for i, token in enumerate(self.alphabet.tokens)}

    def _log_probability(
        self, choice: Mapping[str, Any], prompt: Prompt, sampling: Sampling, ids: Sequence[int]
    ) -> float:
        values = _token_log_probabilities(choice.get("logprobs"))
        if values is None or (self.kind == "vllm" and self.log_mode == "unknown"):
            return math.nan
        if self.kind != "vllm":
            return math.fsum(values)
        if self.log_mode == "raw":
            return math.fsum(values) if prompt.request is None else math.nan
        if prompt.request is None or not _has_own_numbers(sampling):
            return math.fsum(values) * (sampling.temperature or 1.0)
        if len(values) != len(ids) or not sampling.number_temperature:  # log p / 0 says nothing
            return math.nan
        return math.fsum(
            value * temperature
            for value, temperature in zip(values, self._temperatures(ids, sampling), strict=True)
        )

    def _temperatures(self, ids: Sequence[int], sampling: Sampling) -> list[float]:
        """Return the temperature of each token of a `wyckoff` text."""
        line, numbers = NumberLine(), sampling.number_temperature or 0.0
        texts = (self.alphabet.tokens[i] if self.alphabet is not None else "" for i in ids)
        return [numbers if line.holds(text) else max(sampling.temperature, 0.01) for text in texts]


def _has_own_numbers(sampling: Sampling) -> bool:
    """Tell whether tokens of numbers have a temperature of their own."""
    return sampling.number_temperature not in (None, sampling.temperature)


def _token_log_probabilities(given: Any) -> list[float] | None:
    """Return the tokens' log-probabilities out of either route's shape; None where there are none."""
    if not isinstance(given, Mapping):
        return None
    values = given.get("token_logprobs")
    if values is None and isinstance(given.get("content"), list):
        values = [token.get("logprob") for token in given["content"]]
    if not isinstance(values, list) or not all(isinstance(value, int | float) for value in values):
        return None
    return [float(value) for value in values]
