"""The kit's masks inside vLLM: a logits processor of its V1 interface, for whole batches.

    VLLM_USE_V2_MODEL_RUNNER=0 CRYSTALLM_KIT_SERVED_MODEL=MODEL vllm serve MODEL \\
        --logits-processors crystallm_kit.engines.vllm_constraint:CrystalConstraint

Each request says in its arguments (vllm_arguments.py) what must hold for it; rows of requests without any
stay as they are, bit for bit. Of the others
    what the mask rules out gets probability 0, and the rest comes as log-probabilities, before temperature;
    tokens of numbers are sharpened or flattened by their own temperature;
    a beginning is written token by token;
    a row that draws by the kit's own numbers has one token left, which whatever sampler follows must take.
vLLM runs processors before it divides by the temperature. With `--logprobs-mode processed_logits` it returns
log p / temperature for a row of ours: log p where the temperature is 0, as it may be where the kit draws.

A step is one copy to the device and some four hundred small operations there for the whole batch, which are
recorded once on a GPU and then asked for as one; no result is waited for. The tokens come from vLLM's own
lists, which grow only by tokens that count: a prompt that is read in pieces, or a request that was put aside
and comes back (its tokens are then replayed) need no case of their own.

Not here: the masks (tokens/masking.py). Seen with vLLM 0.26.0 and 0.32.0; its second interface (V2) differs.
"""

# Shape legend: B slots (vLLM's max_num_seqs), R rows of this step, V vocabulary.

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from crystallm_kit.engines.drawing import draw, uniform_numbers
from crystallm_kit.engines.recording import record
from crystallm_kit.engines.vllm_arguments import (
    Arguments,
    ServedModel,
    arguments_of,
    compiled,
    served_from_environment,
)
from crystallm_kit.errors import CrystallmKitError
from crystallm_kit.structures.elements import ELEMENTS
from crystallm_kit.text.wyckoff import END, TOKENS
from crystallm_kit.tokens.masking import WyckoffConstraint
from crystallm_kit.tokens.requests import MAX_SITES

_END_ID = TOKENS.index(END)
# Stands for log 0 where a token is forced that the mask rules out: all of a row at -inf would be no choice.
_IMPOSSIBLE = -1e30
_NEARLY_GREEDY = 1e-6  # dividing by it leaves the most likely token alone
_NO_TOKENS: list[int] = []  # of a slot that is free; never written to
# What a compiled request is read with: nothing of it is open any more.
_ANY_MODEL = ServedModel(tuple(ELEMENTS), MAX_SITES, has_wyckoff_ids=True)


@dataclass(eq=False)
class _Row:
    """One request in the batch.

    Attributes:
        asked: Its arguments.
        given: Ids of the prompt that its constraint has to read.
        output: vLLM's own list of its tokens, which grows.
        uniform: Bits of the float32 numbers that it draws with, one for each token; empty: vLLM draws.
        slot: Where its constraint is, -1 if nowhere yet.
        n_read: Tokens, given and output, that its constraint has read.
    """

    asked: Arguments
    given: list[int]
    output: list[int]
    uniform: list[int] = field(default_factory=list)
    slot: int = -1
    n_read: int = 0


class CrystalConstraint(LogitsProcessor):  # type: ignore[misc]
    """Applies each request's mask, temperature of numbers, beginning and own draws to its row."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Check a request's arguments, and compile its `crystal` in place.

        Raises:
            ValueError: With the kit's message; vLLM answers it with HTTP 400.
        """
        try:
            model = served_from_environment()
            asked = arguments_of(sampling_params, model)
            if asked is not None and asked.request is not None and model is not None:
                extra = dict(sampling_params.extra_args)
                extra["crystal"] = compiled(extra["crystal"], model)
                sampling_params.extra_args = extra
        except CrystallmKitError as error:
            raise ValueError(str(error)) from error

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._n_slots = int(vllm_config.scheduler_config.max_num_seqs)
        self._n_tokens = int(vllm_config.model_config.get_vocab_size())
        self._device = torch.device(device)
        self._pin = bool(is_pin_memory)
        self._rows: dict[int, _Row] = {}
        self._constraint: WyckoffConstraint | None = None
        self._occupied: set[int] = set()
        self._broken_B = torch.zeros(self._n_slots, dtype=torch.bool, device=self._device)
        # what a step reads and leaves: tensors that stay where they are, as a recorded step needs it
        self._token_B = torch.full((self._n_slots,), -1, dtype=torch.long, device=self._device)
        self._mask_BV = torch.ones((self._n_slots, self._n_tokens), dtype=torch.bool, device=self._device)
        self._in_numbers_B = torch.zeros_like(self._broken_B)
        self._recorded: tuple[tuple[bool, int], Any] | None = None  # (what it was recorded for, the graph)
        self._columns_V = torch.arange(self._n_tokens, device=self._device)
        self._checks = False  # whether a request's text was ever given, so that it may not fit the request
        # what `_catch_up` asks of each slot; only slots whose request changes are written anew
        self._outputs: list[list[int]] = [_NO_TOKENS] * self._n_slots
        self._is_read_B = np.zeros(self._n_slots, dtype=bool)
        self._n_given_B = np.zeros(self._n_slots, dtype=np.int64)
        self._n_read_B = np.zeros(self._n_slots, dtype=np.int64)
        self._begun: set[int] = set()
        self._uniform: dict[int, list[int]] = {}
        self._asked_B = np.repeat(_asked_columns(None)[:, None], self._n_slots, axis=1)
        self._send_asked()

    def is_argmax_invariant(self) -> bool:
        """Return False: masks change what is most likely."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests that come, go and change place."""
        if batch_update is None:
            return
        places = {*batch_update.removed, *(added[0] for added in batch_update.added)}
        places.update(place for one, other, _ in batch_update.moved for place in (one, other))
        for i in places & self._rows.keys():
            self._rows[i].n_read = int(self._n_read_B[i])
        if process_dict_updates(self._rows, batch_update, _new_row):
            self._arrange(places)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits, (R, V) float32, changed in place in the rows of our requests."""
        if not self._rows:
            return logits
        size = len(logits)
        forced_B, uniform_B = self._catch_up()
        ours_R1 = self._ours_B[:size, None]
        in_numbers_R: torch.Tensor | None = None
        chosen_R: torch.Tensor | None = None
        if self._constraint is not None and self._occupied:
            mask_RV, in_numbers_R = self._mask_BV[:size], self._in_numbers_B[:size]
            logits.masked_fill_(~mask_RV, -torch.inf)
            if forced_B is not None:
                given_R = forced_B[:size].clamp(max=self._n_tokens - 1)
                fits_R = mask_RV.gather(1, given_R.clamp(min=0)[:, None]).squeeze(1) | (given_R < 0)
                self._broken_B[:size] |= ~fits_R
            if self._checks:
                end_B = torch.where(self._broken_B, _END_ID, -1)
                forced_B = end_B if forced_B is None else torch.where(self._broken_B, _END_ID, forced_B)
        log_p_RV = torch.log_softmax(logits, -1)
        if uniform_B is not None:
            temperature_R = self._of(self._temperature_B, self._number_temperature_B, size, in_numbers_R)
            draws_R = self._draws_B[:size]
            token_R = draw(
                log_p_RV,
                uniform_B[:size],
                temperature_R,
                top_p=self._top_p_B[:size] if self._any_top_p else 1.0,
                top_k=self._top_k_B[:size] if self._any_top_k else 0,
            )
            chosen_R = torch.where(draws_R, token_R, -1)
        if forced_B is not None:
            forced_R = forced_B[:size].clamp(max=self._n_tokens - 1)
            chosen_R = forced_R if chosen_R is None else torch.where(forced_R >= 0, forced_R, chosen_R)
        if self._any_sharpened:
            log_p_RV = log_p_RV * self._of(self._one_B, self._sharpening_B, size, in_numbers_R)[:, None]
        if chosen_R is not None:
            is_chosen_RV = self._columns_V == chosen_R[:, None]
            stays_RV = is_chosen_RV | (chosen_R < 0)[:, None]
            log_p_RV = torch.where(is_chosen_RV, log_p_RV.clamp(min=_IMPOSSIBLE), log_p_RV)
            log_p_RV = log_p_RV.masked_fill(~stays_RV, -torch.inf)
        return torch.where(ours_R1, log_p_RV, logits, out=logits)

    @staticmethod
    def _of(
        otherwise_B: torch.Tensor, numbers_B: torch.Tensor, size: int, in_numbers_R: torch.Tensor | None
    ) -> torch.Tensor:
        if in_numbers_R is None:
            return otherwise_B[:size]
        return torch.where(in_numbers_R, numbers_B[:size], otherwise_B[:size])

    def _arrange(self, places: set[int]) -> None:
        """Bring slots and tables in line with the rows at these places, whose requests have changed."""
        rows = {i: row for i in places if (row := self._rows.get(i)) is not None}
        constrained = {i: row for i, row in rows.items() if row.asked.request is not None}
        moved = {row.slot: i for i, row in constrained.items() if row.slot not in (-1, i)}
        fresh = {i: row for i, row in constrained.items() if row.slot == -1}
        free = (self._occupied & places) - constrained.keys()
        if constrained and self._constraint is None:
            self._constraint = WyckoffConstraint.empty(
                self._n_slots, vocabulary_size=self._n_tokens, device=self._device
            )
        if self._constraint is not None:
            if moved:
                self._constraint.move(list(moved), list(moved.values()))
                if self._checks:
                    self._broken_B[list(moved.values())] = self._broken_B[list(moved)]
            if fresh or free:
                requests = [None] * len(free) + [row.asked.request for row in fresh.values()]
                self._constraint.put([*free, *fresh], requests)
                if self._checks:
                    self._broken_B[[*free, *fresh]] = False
        self._occupied = (self._occupied - places) | constrained.keys()
        self._checks |= any(row.given or row.asked.beginning for row in fresh.values())
        for i in places:
            self._describe(i, self._rows.get(i))
        self._send_asked()

    def _describe(self, i: int, row: _Row | None) -> None:
        """Write down what a slot's request asks for and where it stands; None: the slot is free."""
        self._outputs[i] = _NO_TOKENS if row is None else row.output
        self._is_read_B[i] = row is not None and row.asked.request is not None
        self._n_given_B[i] = 0 if row is None else len(row.given)
        self._n_read_B[i] = 0 if row is None else row.n_read
        self._begun.discard(i)
        self._uniform.pop(i, None)
        self._asked_B[:, i] = _asked_columns(None if row is None else row.asked)
        if row is None:
            return
        row.slot = i if self._is_read_B[i] else -1
        if row.asked.beginning:
            self._begun.add(i)
        if row.uniform:
            self._uniform[i] = row.uniform

    def _send_asked(self) -> None:
        """Copy to the device what each slot asks for."""
        self._any_sharpened = bool((self._asked_B[3] != 1).any())
        self._any_top_p = bool((self._asked_B[6] < 1).any())
        self._any_top_k = bool((self._asked_B[7] > 0).any())
        # a copy: the next change may be written while this one is on its way
        on_device = self._sent(self._asked_B.copy())
        self._ours_B, self._draws_B = on_device[0] > 0, on_device[1] > 0
        (
            self._one_B, self._sharpening_B, self._temperature_B, self._number_temperature_B,
            self._top_p_B, self._top_k_B,
        ) = on_device[2:]  # fmt: skip

    def _catch_up(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Let the constraints read the tokens that came since the last step.

        Returns:
            (B,) int64: the token that a row must take next, -1: any; None: of no row.
            (B,) float32: the number that a row draws with; None: no row draws.
        """
        newest_B = np.array([output[-1] if output else -1 for output in self._outputs], dtype=np.int64)
        n_output_B = np.array([len(output) for output in self._outputs], dtype=np.int64)
        n_output_B -= (newest_B < 0) & (n_output_B > 0)  # vLLM writes -1 for a token that is still on its way
        lag_B = np.where(self._is_read_B, self._n_given_B + n_output_B - self._n_read_B, 0)
        if (lag_B < 0).any():  # tokens were taken back
            lag_B = self._start_again(lag_B)
        n_steps = int(lag_B.max(initial=0))
        sent = np.full((n_steps + 2, self._n_slots), -1, dtype=np.int32)
        reads_one_B = (lag_B == 1) & (newest_B >= 0) & (self._n_read_B >= self._n_given_B)
        sent[0, reads_one_B] = newest_B[reads_one_B]
        for i in ((lag_B > 0) & ~reads_one_B).nonzero()[0].tolist():
            row = self._rows[i]
            tokens = [*row.given, *row.output[: n_output_B[i]]][self._n_read_B[i] :]
            sent[: len(tokens), i] = tokens
        begins = False
        for i in self._begun:
            beginning = self._rows[i].asked.beginning
            if n_output_B[i] < len(beginning):
                sent[n_steps, i] = beginning[n_output_B[i]]
                begins = True
        if self._uniform:
            drawing = list(self._uniform)
            positions = zip(self._uniform.values(), n_output_B[drawing].tolist(), strict=True)
            sent[n_steps + 1, drawing] = [bits[min(p, len(bits) - 1)] for bits, p in positions]
        is_new_text = bool((self._n_read_B < self._n_given_B).any())
        self._n_read_B += lag_B
        on_device = self._sent(sent)
        if self._constraint is not None and self._occupied:
            to_read = list(on_device[:n_steps].long().unbind())
            last_B = None if is_new_text or not to_read else to_read.pop()
            for tokens_B in to_read:
                self._read(self._constraint, tokens_B, is_new_text)
            self._go_on(self._constraint, last_B)
        return (
            on_device[n_steps].long() if begins else None,
            on_device[n_steps + 1].view(torch.float32) if self._uniform else None,
        )

    def _read(self, constraint: WyckoffConstraint, tokens_B: torch.Tensor, is_new_text: bool) -> None:
        """Let the constraint read a token a row, -1: none; of a given text only as far as it fits."""
        moves_B = tokens_B >= 0
        tokens_B = tokens_B.clamp(min=0, max=self._n_tokens - 1)
        if is_new_text:
            self._broken_B |= moves_B & ~constraint.mask().gather(1, tokens_B[:, None]).squeeze(1)
        constraint.advance(tokens_B, moves_B & ~self._broken_B)

    def _go_on(self, constraint: WyckoffConstraint, last_B: torch.Tensor | None) -> None:
        """Read the last token of each row, None: of no row, and find the masks of the next.

        This is what almost every step does, so on a GPU it is recorded; anew when a request is the first with
        groups to watch, or has more plans than any before.
        """

        def compute() -> None:
            self._read(constraint, self._token_B, is_new_text=False)
            self._mask_BV.copy_(constraint.mask())
            self._in_numbers_B.copy_(constraint.in_numbers)

        if self._device.type == "cuda":
            now = (constraint.tracks, constraint.plans.shape[1])
            if self._recorded is None or self._recorded[0] != now:
                self._token_B.fill_(-1)  # for the trial runs: a token is not for reading again and again
                self._recorded = (now, record(compute, changes=constraint.changing()))
            compute = self._recorded[1].replay
        if last_B is None:
            self._token_B.fill_(-1)
        else:
            self._token_B.copy_(last_B)
        compute()

    def _start_again(self, lag_B: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Forget what the rows have read of which tokens were taken back; return how much they lag now."""
        places = (lag_B < 0).nonzero()[0].tolist()
        if self._constraint is not None:
            self._constraint.put(places, [self._rows[i].asked.request for i in places])
        lag_B[places] += self._n_read_B[places]
        self._n_read_B[places] = 0
        return lag_B

    def _sent(self, array: npt.NDArray[Any]) -> torch.Tensor:
        """Return an array on the device; the copy is not waited for."""
        tensor = torch.from_numpy(array)
        return (tensor.pin_memory() if self._pin else tensor).to(self._device, non_blocking=True)


def _new_row(params: SamplingParams, prompt_ids: list[int] | None, output_ids: list[int]) -> _Row | None:
    """Return a request's row; None if it has no arguments of ours. `output_ids` grows as it is drawn."""
    asked = arguments_of(params, _ANY_MODEL)
    if asked is None:
        return None
    given = list(prompt_ids or ())[-asked.n_given :] if asked.n_given and asked.request else []
    if asked.seed is None:
        return _Row(asked, given, output_ids)
    # a step more than is asked for may be under way when a request ends
    uniform = uniform_numbers(*asked.seed, (params.max_tokens or 0) + 1)
    return _Row(asked, given, output_ids, uniform.view(np.int32).tolist())


def _asked_columns(asked: Arguments | None) -> npt.NDArray[np.float32]:
    """Return what a slot asks for, (8,): ours, draws, 1, sharpening, temperatures, top_p, top_k."""
    if asked is None:
        return np.array([0, 0, 1, 1, 1, 1, 1, 0], dtype=np.float32)
    temperatures = (max(t, _NEARLY_GREEDY) for t in (asked.temperature, asked.number_temperature))
    return np.array(
        [1, asked.seed is not None, 1, _sharpening(asked), *temperatures, asked.top_p, asked.top_k],
        dtype=np.float32,
    )


def _sharpening(asked: Arguments) -> float:
    """Return what the logits of numbers are multiplied by, so that vLLM's temperature becomes theirs."""
    if asked.seed is not None or asked.number_temperature == asked.temperature:
        return 1.0
    return asked.temperature / max(asked.number_temperature, _NEARLY_GREEDY)
