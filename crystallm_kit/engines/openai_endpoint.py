"""Sampling from any server that speaks OpenAI's protocol: vLLM, `crystallm-kit serve`, a hosted model.

    engine = OpenAIEngine("http://gpu-node:8000", alphabet=WyckoffRepresentation().alphabet())
    engine.kind, engine.models, engine.steerable       ("vllm", ("crystallm-kit", "bulk-modulus"), True)

Equal prompts travel together, several requests are under way at once, and completions come in the order of
the prompts. What a server is shows in its list of models ("owned_by"); whether it draws under our constraint
is tried out once, with a formula that no model writes of its own accord. A field that a server refuses is
left out from then on, and that is said once on standard error. Requests that fail for a while (429, 5xx, no
connection) are sent again, when the server asks for that or later and later.

Reproducible as far as the server is: every request has a seed of its own, made from the caller's and the
position of its prompt.

Not here: what the bodies hold (openai_wire.py), the server of this package (server/).
"""

import os
import re
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from crystallm_kit.engines.engine import Prompt, Sampling
from crystallm_kit.engines.openai_wire import Kind, LogMode, Wire
from crystallm_kit.errors import MissingExtra, UnknownName, UserError
from crystallm_kit.records import Completion, Conditions
from crystallm_kit.structures.elements import RANK
from crystallm_kit.text.representation import Alphabet
from crystallm_kit.text.wyckoff import TOKENS
from crystallm_kit.tokens.requests import compile_request

SAMPLES_PER_REQUEST = 16
_POSITIONS = 4096  # of a model whose server does not say
# Left out where a server refuses them; a sample is then not what it would be, but still a sample.
_OPTIONAL = frozenset(
    (
        "logprobs", "seed", "top_k", "stop", "return_token_ids", "min_p", "repetition_penalty",
        "include_stop_str_in_output", "skip_special_tokens", "spaces_between_special_tokens",
        "structured_outputs",
    )
)  # fmt: skip
# A noble gas with two actinoids: no model writes that of its own accord. Each token of it is then the only
# one that is allowed.
_UNHEARD_OF = sorted(("Xe", "Ac", "Pa"), key=RANK.__getitem__)
# How a message names a field: quoted, or as OpenAI's does.
_NAMED = r"""(['"`]|argument supplied: ){}\b"""
_UNHEARD_OF_TEXT = "".join(f"{element}1 " for element in _UNHEARD_OF)


@dataclass(frozen=True)
class _Call:
    """One request: n completions of one prompt, the `first`-th among its equals onwards."""

    prompt: Prompt
    rows: tuple[int, ...]
    seed: int


class OpenAIEngine:
    """A model behind a URL.

    Args:
        url: Of the server, with or without "/v1".
        served_name: The model's name there; "": the only one, or the only one that is no adapter.
        api_key: Sent as a bearer token; "": the environment's OPENAI_API_KEY, if set. Never shown.
        alphabet: The format's tokens, for a model with the format's own tokenizer; None: a base model's.
        grammar: The format's grammar (Lark), for servers that take one, where the tokenizer is a base
            model's.
        in_flight: Requests under way at once.
        retries: Attempts after the first, for failures that pass.
        timeout: Of one request, in seconds.

    Raises:
        MissingExtra: If the library `openai` is not installed.
        UserError: If the URL is none.
    """

    name = "openai"

    def __init__(
        self,
        url: str,
        *,
        served_name: str = "",
        api_key: str = "",
        alphabet: Alphabet | None = None,
        grammar: str = "",
        in_flight: int = 16,
        retries: int = 6,
        timeout: float = 600.0,
    ) -> None:
        try:
            from openai import OpenAI
        except ImportError as error:
            raise MissingExtra.of("engine 'openai'", "openai", "serve") from error
        self.url = _base_url(url)
        self.alphabet = alphabet
        self.grammar = grammar
        self.in_flight = in_flight
        self._served_name = served_name
        self._key = api_key or os.environ.get("OPENAI_API_KEY", "")
        self._client = OpenAI(
            base_url=self.url, api_key=self._key or "none", max_retries=retries, timeout=timeout
        )
        self._at_once = SAMPLES_PER_REQUEST
        self._refused: set[str] = set()
        self._noticing = threading.Lock()

    # ------------------------------------------------------------ what the server is

    @cached_property
    def models(self) -> tuple[str, ...]:
        """Return the names of the server's models and adapters; empty if it does not tell."""
        return tuple(str(card.get("id")) for card in self._cards)

    @cached_property
    def kind(self) -> Kind:
        """Return what the server is, as it says of its models."""
        owners = {card.get("owned_by") for card in self._cards}
        return "crystallm-kit" if "crystallm-kit" in owners else "vllm" if "vllm" in owners else "other"

    @cached_property
    def served_name(self) -> str:
        """Return the name under which the model is asked for.

        Raises:
            UnknownName: If the server has none of the name that was given.
            UserError: If none was given and the server has several models.
        """
        if self._served_name:
            self._check_served(self._served_name)
            return self._served_name
        whole = [str(card.get("id")) for card in self._cards if not _is_adapter(card, self._cards)]
        if len(whole) == 1:
            return whole[0]
        known = ", ".join(sorted(whole)) or "none"
        raise UserError(f"{self.url}: which model? Name one with --served-model; the server has {known}.")

    @property
    def steerable(self) -> bool:
        """Whether samples are drawn under a constraint; asks the server, the first time."""
        return self._wire.masks

    @property
    def has_wyckoff_ids(self) -> bool:
        """Whether the model's token ids are those that constraints are made of."""
        return self.alphabet is not None and self.alphabet.tokens == TOKENS

    @property
    def max_positions(self) -> int:
        """Return how many tokens prompt and completion may have together."""
        return self._wire.max_positions or _POSITIONS

    # ------------------------------------------------------------ sampling

    def complete(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Completion]:
        """Yield one completion for each prompt, in order, as soon as all before it are there.

        Raises:
            UnknownName: If a prompt names an adapter that the server does not have.
            UserError: If the server cannot be asked for it, refuses it, or is not reached.
        """
        if not prompts:
            return
        for name in {p.adapter for p in prompts if p.adapter}:
            self._check_served(name)
        calls = list(_calls(prompts, sampling.seed))
        for call in calls:
            self._wire.check(call.prompt)
        ready: dict[int, Completion] = {}
        following = 0
        waiting = deque(calls)
        running: deque[Future[list[Completion]]] = deque()
        pool = ThreadPoolExecutor(self.in_flight)
        try:
            while waiting or running:
                # no further ahead than twice what is under way, so that memory stays bounded
                while waiting and len(running) < 2 * self.in_flight:
                    running.append(pool.submit(self._answer, waiting.popleft(), sampling))
                ready |= {completion.index: completion for completion in running.popleft().result()}
                while following in ready:
                    yield ready.pop(following)
                    following += 1
        finally:
            pool.shutdown(cancel_futures=True)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _answer(self, call: _Call, sampling: Sampling) -> list[Completion]:
        """Return the completions of one call, asked for again where a server gives fewer than n at a time."""
        wire, model = self._wire, call.prompt.adapter or self.served_name
        numbers_are_drawn = call.prompt.request is not None and sampling.number_temperature
        is_greedy = sampling.temperature == 0 and not numbers_are_drawn
        done: list[Completion] = []
        while len(done) < len(call.rows):
            at_once = self._at_once
            missing = call.rows[len(done) :][:at_once]
            n = 1 if is_greedy else len(missing)  # all are the same then, and vLLM refuses more
            body = wire.body(call.prompt, sampling, model=model, n=n, seed=call.seed + len(done))
            try:
                choices = self._choices(body, "/chat/completions" if wire.is_chat else "/completions")
            except _TooMany:
                self._at_once = max(1, at_once // 2)
                continue
            if is_greedy:
                missing, choices = call.rows, [choices[0]] * len(call.rows)
            done += [
                wire.completion(choice, call.prompt, sampling, index=row)
                for choice, row in zip(choices, missing, strict=False)
            ]
        return done

    def _choices(self, body: dict[str, Any], route: str) -> Sequence[Mapping[str, Any]]:
        choices = self._post(route, body).get("choices")
        if not isinstance(choices, list) or not choices or not all(isinstance(c, dict) for c in choices):
            raise UserError(f"{self.url}: an answer without choices; is this an OpenAI-compatible server?")
        return choices if len(choices) < 2 else sorted(choices, key=lambda c: int(c.get("index", 0)))

    # ------------------------------------------------------------ finding out

    @cached_property
    def _cards(self) -> list[Mapping[str, Any]]:
        """Return what the server says of its models; nothing where it has no such route."""
        import openai

        try:
            # a server that is not there should not take half a minute to be told
            first = self._client.with_options(max_retries=min(2, self._client.max_retries), timeout=60.0)
            answer = first.get("/models", cast_to=object)
        except openai.NotFoundError:
            return []
        except openai.OpenAIError as error:
            raise self._told(error) from error
        cards = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(cards, list) or not all(isinstance(card, dict) for card in cards):
            raise UserError(f"{self.url}: no list of models; is this an OpenAI-compatible server?")
        return cards

    @cached_property
    def _wire(self) -> Wire:
        """Find out how the server is spoken to."""
        name = self.served_name
        card = next((card for card in self._cards if card.get("id") == name), {})
        positions = card.get("max_model_len")
        plain = Wire(
            self.kind, self.alphabet, self.grammar, positions if isinstance(positions, int) else None
        )
        if self.kind == "other":
            return replace(plain, is_chat=self._takes_messages_only(plain))
        masks, log_mode = self._tried_out(plain)
        return replace(plain, masks=masks, log_mode=log_mode)

    def _tried_out(self, plain: Wire) -> tuple[bool, LogMode]:
        """Return whether the server draws under a constraint, and what its log-probabilities are.

        At temperature 2 with the likeliest token alone, a forced token has probability 1, and the free one
        after them not, unless the server counts among what is left of the likeliest alone.
        """
        if not self.has_wyckoff_ids:
            return False, "raw" if self.kind == "vllm" else "unknown"
        tried = replace(plain, masks=True, log_mode="processed")
        forced = 6  # tokens of the text
        sampling = Sampling(temperature=2.0, top_k=1, max_new_tokens=forced + 1)
        asked = compile_request(Conditions(formula=dict.fromkeys(_UNHEARD_OF, 1), n_sites=3))
        prompt = Prompt("crystal\n", request=asked)
        body = tried.body(prompt, sampling, model=self.served_name, n=1, seed=1)
        try:
            choice = self._choices(body, "/completions")[0]
        except _Refused:
            return False, "raw"
        values: Sequence[Any] = (choice.get("logprobs") or {}).get("token_logprobs") or ()
        known = len(values) == forced + 1 and all(isinstance(value, int | float) for value in values)
        if not str(choice.get("text")).startswith(_UNHEARD_OF_TEXT):
            return False, "raw" if known and min(values) < 0 >= max(values) else "unknown"
        processed = known and all(abs(value) < 1e-3 for value in values[:forced]) and values[-1] < -1e-6
        return True, "processed" if processed else "unknown"

    def _takes_messages_only(self, plain: Wire) -> bool:
        """Tell whether a server that is none of ours refuses plain completions of this model."""
        body = plain.body(Prompt("1"), Sampling(max_new_tokens=1), model=self.served_name, n=1, seed=1)
        try:
            self._post("/completions", body)
        except _Refused as refusal:
            chat = refusal.status in (404, 405, 501) or "chat" in str(refusal)
            if not chat:
                raise
            if self.alphabet is not None:
                raise UserError(
                    f"{self.url}: '{self.served_name}' is a chat model, which is asked in words. Give "
                    "--template words-1 --text-format cif (or compact, xyz, wyckoff)."
                ) from refusal
            return True
        return False

    def _check_served(self, name: str) -> None:
        if self.models and name not in self.models:
            raise UnknownName.among(f"model at {self.url} called", name, self.models)

    # ------------------------------------------------------------ requests

    def _post(self, route: str, body: dict[str, Any]) -> Mapping[str, Any]:
        """Return the answer, without the fields that the server refuses. Raises UserError."""
        import openai

        while True:
            sent = self._accepted(body)
            try:
                answer = self._client.post(route, cast_to=object, body=sent)
            except openai.APIStatusError as error:
                field = _refused_field(error, sent) if error.status_code in (400, 422) else ""
                if field == "n" and sent["n"] > 1:
                    raise _TooMany from error
                if not field:
                    raise self._told(error) from error
                self._leave_out(field)
                continue
            except openai.OpenAIError as error:
                raise self._told(error) from error
            if not isinstance(answer, dict):
                raise UserError(f"{self.url}{route}: no JSON object; is this an OpenAI-compatible server?")
            return answer

    def _accepted(self, body: dict[str, Any]) -> dict[str, Any]:
        sent = {key: value for key, value in body.items() if key not in self._refused}
        if "max_tokens" in body and "max_tokens" not in sent:
            sent["max_completion_tokens"] = body["max_tokens"]  # as OpenAI's newer models call it
        return sent

    def _leave_out(self, field: str) -> None:
        with self._noticing:
            if field in self._refused:
                return
            self._refused.add(field)
            if field != "max_tokens":
                print(f"note: {self.url} refuses '{field}'; it is left out", file=sys.stderr)

    def _told(self, error: Exception) -> UserError:
        """Return what went wrong, in one line, for whoever asked."""
        import openai

        said = " ".join(str(getattr(error, "message", error)).split())[:300]
        said = re.sub(r"^Error code: \d+ - ", "", said)
        if self._key:
            said = said.replace(self._key, "[key]")
        if isinstance(error, openai.APITimeoutError):
            return UserError(f"{self.url}: no answer in time.")
        if isinstance(error, openai.APIConnectionError):
            why = str(error.__cause__ or said)
            return UserError(f"{self.url}: not reached ({why}). Is the server running there?")
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            has = "the API key is refused" if self._key else "an API key is needed"
            return UserError(
                f"{self.url}: {has}. Give --api-key-file FILE, or set OPENAI_API_KEY in the environment."
            )
        if isinstance(error, openai.APIStatusError):
            status = error.status_code
            if status < 500 and status != 429:
                return _Refused(f"{self.url}: refused ({status}): {said}", status)
            return UserError(f"{self.url}: failed ({status}): {said}")
        return UserError(f"{self.url}: {said}")


class _Refused(UserError):
    """The server understood, and refuses."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class _TooMany(Exception):
    """So many completions of one prompt are refused; fewer may be taken."""


def _base_url(url: str) -> str:
    """Return the URL of the routes. Raises UserError."""
    parts = urlsplit(url.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"--url '{url}': no web address; expected one such as http://localhost:8000/v1")
    path = parts.path.rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path or '/v1'}"


def _is_adapter(card: Mapping[str, Any], cards: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether a model of the list is an adapter of another one of it."""
    others = {other.get("id") for other in cards if other is not card}
    return card.get("parent") in others or card.get("root") in others


def _refused_field(error: Any, sent: Mapping[str, Any]) -> str:
    """Return the field that a refusal is about, if it can be left out."""
    said = str(error.message)
    if "max_tokens" in sent and "max_completion_tokens" in said:
        return "max_tokens"
    offered = [key for key in sent if key in _OPTIONAL]
    offered += ["n"] * ("n" in sent)
    # what says nothing but the default
    offered += [key for key in ("temperature", "top_p") if sent.get(key) == 1.0]
    if error.param in offered:
        return str(error.param)
    return next((key for key in offered if re.search(_NAMED.format(key), said)), "")


def _calls(prompts: Sequence[Prompt], seed: int) -> Iterator[_Call]:
    """Yield the requests that ask for all prompts: equal ones together, in the order of their first."""
    rows_of: dict[Prompt, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows_of.setdefault(prompt, []).append(row)
    calls = []
    for prompt, rows in rows_of.items():
        # 31 bits, which every server takes; vLLM gives the i-th of n completions the seed plus i
        first = int(np.random.SeedSequence((seed, rows[0])).generate_state(1)[0]) >> 1
        for start in range(0, len(rows), SAMPLES_PER_REQUEST):
            part = tuple(rows[start : start + SAMPLES_PER_REQUEST])
            calls.append(_Call(prompt, part, (first + start) % 2**31))
    yield from sorted(calls, key=lambda call: call.rows[0])
