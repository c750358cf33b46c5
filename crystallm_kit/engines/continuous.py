"""Continuous batching of the model in this process: requests come and go one by one, as a server needs it.

One thread owns the slots (slots.py). A sample takes a free slot as soon as there is one, is drawn beside
whatever else is there, each by its own settings, and tells its tokens as they come; one that nobody wants any
more gives its slot back in the middle. The samples are those of TransformersEngine: the same draws.

    engine = ContinuousEngine(model, tokenizer, slots=64)
    ticket = engine.submit(prompt, sampling, on_token=..., on_done=...)
    ticket.cancel()

Not here: limits on what may wait (server/admission.py); vLLM, for large models and many GPUs.
"""

import math
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from crystallm_kit.engines.engine import Prompt, Sampling
from crystallm_kit.engines.slots import FORBIDDEN, MAX_TOP, RUNNING, STOPPED, Slots, SlotSample
from crystallm_kit.engines.transformers_local import TransformersEngine
from crystallm_kit.errors import UserError
from crystallm_kit.models.adapter_set import AdapterSet
from crystallm_kit.records import Completion, StopReason

OnToken = Callable[[int, float, tuple[tuple[int, float], ...]], None]
OnDone = Callable[[Completion | Exception], None]
# Slots are filled again once so many of them are free, or nothing runs: filling has a price of its own.
_WORTH_FILLING = 1 / 16
# Models that hand keyword arguments on to their attention, which neither caps scores nor knows sinks.
_KERNEL_MODELS = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(eq=False)
class Ticket:
    """One sample that was asked for.

    Attributes:
        prompt: What is gone on with.
        sample: What its slot is given.
        n_top: Alternatives told with each token; None: tokens are told without.
        on_token, on_done: Called in the engine's thread.
    """

    prompt: Prompt
    sample: SlotSample
    n_top: int | None
    on_token: OnToken | None
    on_done: OnDone
    cancelled: bool = field(default=False, init=False)

    def cancel(self) -> None:
        """Give up: the slot is free at the next step, and nothing is told any more."""
        self.cancelled = True


_Told = tuple[Ticket, int, float, tuple[tuple[int, float], ...]]  # token, its log-probability, the likeliest
_Finished = tuple[Ticket, int, list[int], float]  # state, ids, log-probability


class ContinuousEngine(TransformersEngine):
    """A causal LM of transformers whose batch changes at every token.

    Args:
        model, tokenizer, stop, device, adapters: As of TransformersEngine. Where layers look back a number of
            tokens only, prompt and completion have no more of them together.
        slots: Samples at a time; default: 64 on a CPU; on a GPU 4,096, or as many whose longest samples fit
            into half of the memory that is free.
        dtype: The model is turned into it, such as bfloat16; None: as it is.

    Raises:
        ModelError: If an adapter cannot share the model.
        UserError: If the model has other layers than attention.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        stop: str = "",
        slots: int | None = None,
        device: str | torch.device | None = None,
        dtype: str | None = None,
        adapters: Mapping[str, str | Path] | AdapterSet | None = None,
    ) -> None:
        self._window = _window(model.config)
        model = model if dtype is None else model.to(getattr(torch, dtype))
        super().__init__(model, tokenizer, stop=stop, device=device, adapters=adapters)
        n_slots = slots or self._usual_slots()
        end = tokenizer.eos_token_id
        self._slots = Slots(
            self.adapters.model,
            n_slots,
            device=self.device,
            vocabulary_size=model.config.vocab_size,
            end=-1 if end is None else end,
            stop_table=self._stop_table if stop else None,
            is_constrained=self.has_wyckoff_ids,
            own_attention=self._is_attending_by_slots(),
        )
        # many samples have one prompt, and to encode it takes longer than to draw a token
        self._ids_of_prompt = lru_cache(maxsize=1024)(lambda text: tuple(self.texts.prompt_ids(text)))
        self._waiting: deque[Ticket] = deque()
        self._running: list[Ticket | None] = [None] * n_slots
        self._n_rows = 0  # slots in use, holes counted
        self._n_launched = 0  # slots of the step that is under way
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="continuous-engine", daemon=True)
        self._thread.start()

    @classmethod
    def over(
        cls, engine: TransformersEngine, *, slots: int | None = None, dtype: str | None = None
    ) -> "ContinuousEngine":
        """Return the same model, tokenizer and adapters behind continuous batching."""
        return cls(
            engine.model,
            engine.tokenizer,
            stop=engine.stop,
            slots=slots,
            device=engine.device,
            dtype=dtype,
            adapters=engine.adapters,
        )

    def _usual_slots(self) -> int:
        if self.device.type != "cuda":
            return 64
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        numbers = 2 * config.num_hidden_layers * heads * width * self.max_positions
        free, _ = torch.cuda.mem_get_info(self.device)
        fitting = max(16, free // 2 // (numbers * self.model.dtype.itemsize))
        return int(min(4096, 1 << (fitting.bit_length() - 1)))

    def _is_attending_by_slots(self) -> bool:
        """Tell whether the models' attention is that of the slots; it is made so, where it can be."""
        if self.device.type != "cuda" or self.model.config.model_type not in _KERNEL_MODELS:
            return False
        from crystallm_kit.engines import slot_attention

        name = slot_attention.register()
        for adapter in ("", *self.adapters.names):
            self.adapters.model(adapter).set_attn_implementation(name)
        return True

    @property
    def max_positions(self) -> int:
        """Return how many tokens prompt and completion may have together."""
        return int(min(super().max_positions, self._window))

    @property
    def n_slots(self) -> int:
        """Return how many samples can be drawn at a time."""
        return len(self._running)

    @property
    def n_running(self) -> int:
        """Return how many samples are being drawn."""
        return sum(ticket is not None for ticket in self._running)

    @property
    def n_waiting(self) -> int:
        """Return how many samples wait for a slot."""
        return len(self._waiting)

    def submit(
        self,
        prompt: Prompt,
        sampling: Sampling,
        *,
        index: int = 0,
        prompt_ids: Sequence[int] | None = None,
        n_top: int | None = None,
        on_token: OnToken | None = None,
        on_done: OnDone,
    ) -> Ticket:
        """Ask for one completion; from any thread.

        Args:
            prompt: What to go on with.
            sampling: How tokens are drawn.
            index: Position in its request; with the seed it determines the draws.
            prompt_ids: The prompt as token ids, in place of its text.
            n_top: As of Ticket.
            on_token: Called with (id, log-probability, the likeliest (id, log-probability)) of each token.
            on_done: Called once, with the completion, or with what went wrong.

        Raises:
            UnknownName: If the prompt names an adapter that is not there.
            UserError: As of TransformersEngine.complete; or if the engine is closed.
        """
        ticket = self._ticket(prompt, sampling, index, prompt_ids, n_top, on_token, on_done)
        with self._changed:
            if self._closed:
                raise UserError("the engine is closed")
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def _ticket(
        self,
        prompt: Prompt,
        sampling: Sampling,
        index: int,
        prompt_ids: Sequence[int] | None,
        n_top: int | None,
        on_token: OnToken | None,
        on_done: OnDone,
    ) -> Ticket:
        self.adapters.check(prompt.adapter)
        ids = self._ids_of_prompt(prompt.text) if prompt_ids is None else tuple(prompt_ids)
        self.texts.check_prompt(ids, self.max_positions)
        self.texts.check_request(prompt)
        n_tokens = self.model.config.vocab_size
        if prompt_ids is not None and not all(0 <= i < n_tokens for i in ids):
            raise UserError(f"prompt: a token id outside of 0 to {n_tokens - 1}")
        if n_top is not None and n_top > MAX_TOP:
            raise UserError(f"log-probabilities of {n_top} alternatives; at most {MAX_TOP}")
        sample = SlotSample(
            ids,
            tuple(self.texts.given_ids(prompt)),
            prompt.request,
            sampling,
            index,
            min(sampling.max_new_tokens, self.max_positions - len(ids)),
        )
        return Ticket(prompt, sample, n_top, on_token, on_done)

    def complete(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Completion]:
        """Yield one completion for each prompt, in order, as soon as all before it are there.

        Raises: As of TransformersEngine.
        """
        done: queue.SimpleQueue[tuple[int, Completion | Exception]] = queue.SimpleQueue()

        def teller(index: int) -> OnDone:
            return lambda outcome: done.put((index, outcome))

        tickets = [
            self._ticket(prompt, sampling, index, None, None, None, teller(index))
            for index, prompt in enumerate(prompts)
        ]
        with self._changed:
            if self._closed:
                raise UserError("the engine is closed")
            self._waiting.extend(tickets)
            self._changed.notify()
        ready: dict[int, Completion] = {}
        try:
            for following in range(len(tickets)):
                while following not in ready:
                    index, outcome = done.get()
                    if isinstance(outcome, Exception):
                        raise outcome
                    ready[index] = outcome
                yield ready.pop(following)
        finally:
            for ticket in tickets:
                ticket.cancel()

    def close(self) -> None:
        """Stop; what waits or runs is told so."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    # The thread

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closed and not self._waiting and not self._n_rows:
                    self._changed.wait()
                if self._closed:
                    break
            try:
                self._go_on()
            except Exception as error:  # noqa: BLE001 - whoever waits is told; the next request may work
                self._fail(error)
        self._fail(UserError("the engine was closed"))

    def _fail(self, error: Exception) -> None:
        with self._changed:
            tickets = [t for t in self._running[: self._n_rows] if t is not None]
            if self._closed:
                tickets += self._waiting
                self._waiting.clear()
            self._running[: self._n_rows] = [None] * self._n_rows
            self._n_rows = self._n_launched = 0
        for ticket in tickets:
            if not ticket.cancelled:
                ticket.on_done(error)

    def _fill(self) -> None:
        """Close the gaps that finished samples left, and give free slots to those that wait."""
        for row, ticket in enumerate(self._running[: self._n_rows]):
            if ticket is not None and ticket.cancelled:
                self._running[row] = None
        holes = [row for row in range(self._n_rows) if self._running[row] is None]
        n_slots = len(self._running)
        n_free = len(holes) + n_slots - self._n_rows
        newcomers: list[Ticket] = []
        is_idle = len(holes) == self._n_rows
        if n_free >= n_slots * _WORTH_FILLING or is_idle or self.device.type == "cpu":
            newcomers = self._newcomers(n_free, is_idle=is_idle)
        rows = (holes + list(range(self._n_rows, n_slots)))[: len(newcomers)]
        if newcomers:
            try:
                self._slots.adapter = newcomers[0].prompt.adapter
                self._slots.put(rows, [ticket.sample for ticket in newcomers])
            except Exception as error:
                for ticket in newcomers:  # they wait no longer and do not run yet
                    ticket.on_done(error)
                raise
            for row, ticket in zip(rows, newcomers, strict=True):
                self._running[row] = ticket
            self._n_rows = max(self._n_rows, rows[-1] + 1)
        self._close_gaps()

    def _newcomers(self, n: int, *, is_idle: bool) -> list[Ticket]:
        """Take those whose turn it is; samples of another adapter wait until the slots are empty."""
        found: list[Ticket] = []
        adapter = None if is_idle else self._slots.adapter
        with self._changed:
            while self._waiting and len(found) < n:
                if self._waiting[0].cancelled:
                    self._waiting.popleft()
                    continue
                if adapter is None:
                    adapter = self._waiting[0].prompt.adapter
                if self._waiting[0].prompt.adapter != adapter:
                    break
                found.append(self._waiting.popleft())
        return found

    def _close_gaps(self) -> None:
        """Move the last samples into the gaps, where fewer rows cost less."""
        n_running = sum(ticket is not None for ticket in self._running[: self._n_rows])
        if self.device.type == "cuda" and 2 * n_running > self._n_rows and n_running:
            return
        gaps = [row for row in range(n_running) if self._running[row] is None]
        last = [row for row in range(n_running, self._n_rows) if self._running[row] is not None]
        if gaps:
            self._slots.move(last, gaps)
            for origin, target in zip(last, gaps, strict=True):
                self._running[target], self._running[origin] = self._running[origin], None
        self._n_rows = n_running

    def _go_on(self) -> None:
        """Collect the step that is under way and launch the next one; what the first one finished, and who
        takes its slots, is seen to meanwhile.
        """
        told: list[_Told] = []
        finished: list[_Finished] = []
        is_collected = self._n_launched > 0
        if is_collected:
            n, self._n_launched = self._n_launched, 0
            states = self._slots.collect(n)
            told = self._newest_tokens(n)
            rows = [
                row for row in (states != RUNNING).nonzero()[0].tolist() if self._running[row] is not None
            ]
            written = self._slots.written(rows) if rows else []
            for row, (ids, log_probability) in zip(rows, written, strict=True):
                ticket, self._running[row] = self._running[row], None
                if ticket is not None:
                    finished.append((ticket, int(states[row]), ids, log_probability))
        try:
            if is_collected and self.device.type != "cpu":  # there the step is computed when it is launched
                self._launch()
        finally:  # who is done is told so, even where the others' next step fails
            self._tell(told, finished)
        self._fill()
        if not self._n_launched:
            self._launch()

    def _tell(self, told: Sequence[_Told], finished: Sequence[_Finished]) -> None:
        for ticket, token, log, top in told:
            if not ticket.cancelled and ticket.on_token is not None:
                ticket.on_token(token, log, top)
        for ticket, state, ids, log_probability in finished:
            if not ticket.cancelled:
                ticket.on_done(self._outcome(ticket, state, ids, log_probability))

    def _launch(self) -> None:
        running = [t for t in self._running[: self._n_rows] if t is not None and not t.cancelled]
        if running:
            self._n_launched = self._n_rows
            self._slots.launch(self._n_rows, top=any(t.n_top for t in running))

    def _outcome(
        self, ticket: Ticket, state: int, ids: list[int], log_probability: float
    ) -> Completion | Exception:
        if state == FORBIDDEN:
            return self._forbidden(ids[-1], ticket.prompt)
        sample = ticket.sample
        stop: StopReason = "stop" if state == STOPPED else "length"
        text = self.texts.text_of(sample.prompt, ids)
        return Completion(
            ticket.prompt.text, text, tuple(ids), stop, log_probability, sample.sampling.seed, sample.index
        )

    def _newest_tokens(self, n: int) -> list[_Told]:
        """Return the token that was drawn last for each sample that wants to know."""
        told = [
            (row, t) for row, t in enumerate(self._running[:n]) if t is not None and t.on_token is not None
        ]
        if not told:
            return []
        slots = self._slots
        tokens, logs = slots.token[:n].tolist(), slots.token_log[:n].tolist()
        top: list[list[tuple[int, float]]] = []
        if any(t.n_top for _, t in told):
            ids, of_ids = slots.top_ids[:n].tolist(), slots.top_logs[:n].tolist()
            top = [list(zip(ids[row], of_ids[row], strict=True)) for row in range(n)]
        return [
            (
                ticket,
                tokens[row],
                logs[row],
                tuple(pair for pair in top[row] if pair[1] > -math.inf)[: ticket.n_top]
                if ticket.n_top
                else (),
            )
            for row, ticket in told
        ]


def _window(config: Any) -> float:
    """Return how many tokens every layer looks back at least. Raises UserError for other kinds of layers."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    if kinds - {"full_attention", "sliding_attention"}:
        raise UserError(
            f"{type(config).__name__}: layers of the kinds {', '.join(sorted(kinds))}; continuous batching "
            "needs attention. Serve it with vLLM (--engine vllm), or sample it with generate."
        )
    slides = "sliding_attention" in kinds if kinds else getattr(text, "use_sliding_window", True)
    window = getattr(text, "sliding_window", None)
    return window if slides and window else math.inf
