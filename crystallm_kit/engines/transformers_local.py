"""Sampling with transformers in this process: batched, with a key-value cache, constrained.

Prompts of one length share a batch. Finished samples leave it, and the cache shrinks with them. Every draw
uses a number of its own, made from (seed, position of the prompt, position of the token), so results do not
depend on how prompts fall into batches (up to rounding of the logits).

Not here: other engines (engine.py has the table); vLLM, which batches better and serves many users.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crystallm_kit.engines.cache import cache_argument, growing_cache
from crystallm_kit.engines.drawing import draw, uniform_numbers
from crystallm_kit.engines.engine import Prompt, Sampling
from crystallm_kit.engines.stopping import stop_table
from crystallm_kit.engines.texts import Texts
from crystallm_kit.errors import ImpossibleRequest
from crystallm_kit.models.adapter_set import AdapterSet
from crystallm_kit.models.bases import max_positions
from crystallm_kit.records import Completion, StopReason
from crystallm_kit.tokens.masking import WyckoffConstraint

# The batch is cut down to its unfinished rows when that saves this share of it. Copying the cache has a
# price.
_WORTH_SHRINKING = 0.15


class TransformersEngine:
    """A causal LM of transformers.

    Args:
        model: A causal LM; moved to `device` as it is.
        tokenizer: Its tokenizer; the end token is `tokenizer.eos_token_id`, if it has one.
        stop: Text that ends a sample too, where the model wrote all of it; "": none. It is part of the
            completion.
        batch_size: Samples in a batch.
        device: Default: cuda where there is one.
        threads: Batches at a time; default: one on a GPU, and on a CPU as many as torch leaves cores free. On
            small models, batches side by side use two cores better than one batch whose matrices are split.
        adapters: Name -> folder of adapters over the model, for prompts that name one.

    Raises:
        ModelError: If an adapter cannot share the model.
    """

    name = "transformers"
    steerable = True

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        stop: str = "",
        batch_size: int = 256,
        device: str | torch.device | None = None,
        threads: int | None = None,
        adapters: Mapping[str, str | Path] | AdapterSet | None = None,
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = model.to(self.device).eval()
        self.adapters = adapters if isinstance(adapters, AdapterSet) else AdapterSet(self.model, adapters)
        self.tokenizer = tokenizer
        self.texts = Texts(tokenizer)
        self.stop = stop
        self.batch_size = batch_size
        free = 1 if self.device.type != "cpu" else (os.cpu_count() or 1) // torch.get_num_threads()
        self.threads = threads or max(1, free)

    def complete(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Completion]:
        """Yield one completion for each prompt, in order, as soon as all before it are there.

        Raises:
            ImpossibleRequest: If a beginning is not what its prompt's request lets through.
            UnknownName: If a prompt names an adapter that is not there.
            UserError: If a prompt is empty or leaves no room for a completion, or a constraint is asked of a
                model whose token ids are not those of the `wyckoff` format.
        """
        for name in {p.adapter for p in prompts}:
            self.adapters.check(name)
        ids = [self.texts.prompt_ids(p.text) for p in prompts]
        for prompt, prompt_ids in zip(prompts, ids, strict=True):
            self.texts.check_prompt(prompt_ids, self.max_positions)
            self.texts.check_request(prompt)
        given = [self.texts.given_ids(p) for p in prompts]
        order = sorted(range(len(prompts)), key=lambda i: (*self._kind(prompts[i], ids[i]), len(given[i])))
        ready: dict[int, Completion] = {}
        following = 0

        def complete_batch(rows: list[int]) -> list[Completion]:
            return list(
                self._complete_batch(
                    rows, [ids[i] for i in rows], [given[i] for i in rows], prompts, sampling
                )
            )

        pool = ThreadPoolExecutor(self.threads)
        try:
            for completions in pool.map(complete_batch, self._batches(order, ids, prompts)):
                ready |= {completion.index: completion for completion in completions}
                while following in ready:
                    yield ready.pop(following)
                    following += 1
        finally:
            pool.shutdown(cancel_futures=True)

    @staticmethod
    def _kind(prompt: Prompt, ids: list[int]) -> tuple[str, int, bool]:
        """Return what prompts of one batch have in common: adapter, length, whether they are constrained."""
        return prompt.adapter, len(ids), prompt.request is None

    def _batches(
        self, order: list[int], ids: list[list[int]], prompts: Sequence[Prompt]
    ) -> Iterator[list[int]]:
        """Yield rows of one kind, so many at a time."""
        batch: list[int] = []
        for i in order:
            same = batch and self._kind(prompts[i], ids[i]) == self._kind(prompts[batch[0]], ids[batch[0]])
            if batch and (not same or len(batch) == self.batch_size):
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    @torch.inference_mode()
    def _complete_batch(
        self,
        rows: list[int],
        prompt_ids_BT: list[list[int]],
        given: list[list[int]],
        prompts: Sequence[Prompt],
        sampling: Sampling,
    ) -> Iterator[Completion]:
        size, end = len(rows), -1 if self.tokenizer.eos_token_id is None else self.tokenizer.eos_token_id
        limit = min(sampling.max_new_tokens, self.max_positions - len(prompt_ids_BT[0]))
        draws = np.stack([uniform_numbers(sampling.seed, row, limit) for row in rows])
        draws_BT = torch.from_numpy(draws).to(self.device)
        given_BT = torch.full((size, limit), -1, dtype=torch.long, device=self.device)
        for b, beginning in enumerate(given):
            given_BT[b, : len(beginning)] = torch.tensor(beginning[:limit])
        longest_beginning = max(map(len, given))
        tokens_BT = torch.zeros((size, limit), dtype=torch.long, device=self.device)
        log_probability_B = torch.zeros(size, dtype=torch.float64, device=self.device)
        length_B = torch.full((size,), limit, dtype=torch.long, device=self.device)
        ended_B = torch.zeros(size, dtype=torch.bool, device=self.device)
        stop_state_B = torch.zeros(size, dtype=torch.long, device=self.device)
        active = torch.arange(size, device=self.device)
        inputs = torch.tensor(prompt_ids_BT, device=self.device)
        constraint = self._constraint([prompts[i] for i in rows])
        # What every sample begins with is read at once, not token by token; all but its last token, which may
        # be the end of a sample.
        n_read = max(0, min(limit, *map(len, given)) - 1)
        inputs = torch.cat([inputs, given_BT[:, :n_read]], dim=1)
        model = self.adapters.model(prompts[rows[0]].adapter)
        cache = growing_cache(model.config)
        for t in range(limit):
            if t == 0 or t > n_read:
                keep_last = n_read + 1 if t == 0 else 1
                logits_BTV = model(
                    input_ids=inputs, use_cache=True, logits_to_keep=keep_last, **cache_argument(model, cache)
                ).logits
            logits_BV = logits_BTV[:, t if t <= n_read else -1].float()
            forced_B = given_BT[active, t]
            if constraint is not None:
                mask_BV = constraint.mask()
                if t < longest_beginning:
                    self._check_forced(forced_B, mask_BV, [prompts[rows[b]] for b in active.tolist()])
                logits_BV = logits_BV.masked_fill(~mask_BV, -torch.inf)
            temperature = self._temperatures(constraint, sampling)
            token_B = draw(
                logits_BV, draws_BT[active, t], temperature, top_p=sampling.top_p, top_k=sampling.top_k
            )
            token_B = torch.where(forced_B >= 0, forced_B, token_B)
            chosen = torch.log_softmax(logits_BV, -1).gather(1, token_B[:, None]).squeeze(1)
            # A finished sample that is still in the batch draws on; nothing of that counts.
            log_probability_B[active] += chosen.double().masked_fill(ended_B[active], 0)
            tokens_BT[active, t] = token_B
            if constraint is not None:
                constraint.advance(token_B)
            finished = token_B == end
            if self.stop:
                finished |= self._advance_to_stop(stop_state_B, active, token_B)
            finished &= ~ended_B[active]
            ended_B[active[finished]] = True
            length_B[active[finished]] = t + 1
            inputs = token_B[:, None]
            running = ~ended_B[active]
            n_running = int(running.sum())
            if n_running == 0:
                break
            if n_running <= len(active) * (1 - _WORTH_SHRINKING):
                keep = running.nonzero().squeeze(1)
                active, inputs, logits_BTV = active[keep], inputs[keep], logits_BTV[keep]
                cache.batch_select_indices(keep)
                if constraint is not None:
                    constraint = constraint.take(keep)
        for b, row in enumerate(rows):
            ids = tuple(tokens_BT[b, : int(length_B[b])].tolist())
            text = self.texts.text_of(prompt_ids_BT[b], ids)
            stop: StopReason = "stop" if bool(ended_B[b]) else "length"
            yield Completion(
                prompts[row].text,
                text,
                ids,
                stop,
                float(log_probability_B[b]),
                sampling.seed,
                row,
            )

    def _check_forced(self, forced_B: torch.Tensor, mask_BV: torch.Tensor, prompts: Sequence[Prompt]) -> None:
        """Raise ImpossibleRequest if a given beginning takes a token that its request rules out."""
        allowed_B = (forced_B < 0) | mask_BV.gather(1, forced_B.clamp(min=0)[:, None]).squeeze(1)
        for b in (~allowed_B).nonzero().flatten().tolist()[:1]:
            raise self._forbidden(int(forced_B[b]), prompts[b])

    def _forbidden(self, token_id: int, prompt: Prompt) -> ImpossibleRequest:
        """Return what to say of a beginning that takes a token which its request rules out."""
        token = self.tokenizer.convert_ids_to_tokens(token_id)
        return ImpossibleRequest(
            f"beginning {prompt.beginning!r}: at {token!r} it leaves what was asked for, or no crystal goes "
            "on from there."
        )

    def _constraint(self, prompts: Sequence[Prompt]) -> WyckoffConstraint | None:
        requests = [p.request for p in prompts if p.request is not None]
        if not requests:
            return None
        return WyckoffConstraint(requests, vocabulary_size=self.model.config.vocab_size, device=self.device)

    def _temperatures(self, constraint: WyckoffConstraint | None, sampling: Sampling) -> torch.Tensor | float:
        """Return one temperature, or (B,) of them where tokens of numbers have their own."""
        if constraint is None or sampling.number_temperature is None:
            return sampling.temperature
        return torch.where(constraint.in_numbers, sampling.number_temperature, sampling.temperature)

    def _advance_to_stop(
        self, state_B: torch.Tensor, active: torch.Tensor, token_B: torch.Tensor
    ) -> torch.Tensor:
        """Advance the states of the active rows in place, and return which of them hold the stop text."""
        after_B = self._stop_table[state_B[active], token_B]
        holds_B = after_B == len(self.stop)
        # A row that has ended may draw on; nothing of it counts.
        state_B[active] = after_B.masked_fill(holds_B, 0)
        return holds_B

    @cached_property
    def _stop_table(self) -> torch.Tensor:
        return stop_table(self.tokenizer, self.stop, self.model.config.vocab_size).to(self.device)

    @property
    def has_wyckoff_ids(self) -> bool:
        """Whether the tokenizer's ids are those that constraints are made of."""
        return self.texts.has_wyckoff_ids

    @property
    def max_positions(self) -> int:
        """Return how many tokens prompt and completion may have together."""
        return max_positions(self.model.config)
