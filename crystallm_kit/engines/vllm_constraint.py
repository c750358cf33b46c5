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

A step costs a few dozen small operations on the device for the whole batch and one copy to it; no result is
waited for. The tokens come from vLLM's own lists, which grow only by tokens that count: a prompt that is read
in pieces, or a request that was put aside and comes back (its tokens are then replayed) need no case of their
own.

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
        self._columns_V = torch.arange(self._n_tokens, device=self._device)
        self._checks = False  # whether a request's text was ever given, so that it may not fit the request
        self._states: list[_Row] = []
        self._n_read = np.zeros(0, dtype=np.int64)
        self._arrange()

    def is_argmax_invariant(self) -> bool:
        """Return False: masks change what is most likely."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests that come, go and change place."""
        if process_dict_updates(self._rows, batch_update, _new_row):
            self._arrange()

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
            mask_RV = self._constraint.mask()[:size]
            in_numbers_R = self._constraint.in_numbers[:size]
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

    def _arrange(self) -> None:
        """Bring slots and tables in line with the rows, after requests came, went or changed place."""
        for row, n_read in zip(self._states, self._n_read.tolist(), strict=True):
            row.n_read = n_read
        rows = self._rows
        constrained = {i: row for i, row in rows.items() if row.asked.request is not None}
        moved = {row.slot: i for i, row in constrained.items() if row.slot not in (-1, i)}
        fresh = {i: row for i, row in constrained.items() if row.slot == -1}
        free = self._occupied - constrained.keys()
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
        for i, row in constrained.items():
            row.slot = i
        self._occupied = set(constrained)
        self._checks |= any(row.given or row.asked.beginning for row in fresh.values())
        self._index = np.fromiter(rows, np.int64, len(rows))
        self._states = list(rows.values())
        self._outputs = [row.output for row in self._states]
        self._is_read = np.array([row.asked.request is not None for row in self._states], dtype=bool)
        self._n_given = np.array([len(row.given) for row in self._states], dtype=np.int64)
        self._n_read = np.array([row.n_read for row in self._states], dtype=np.int64)
        self._begun = [r for r, row in enumerate(self._states) if row.asked.beginning]
        self._drawing = np.array([r for r, row in enumerate(self._states) if row.uniform], dtype=np.int64)
        self._uniform = [row.uniform for row in self._states if row.uniform]
        self._set_tables()

    def _set_tables(self) -> None:
        """Copy to the device what each row asks for."""
        table = np.zeros((8, self._n_slots), dtype=np.float32)
        asked = [row.asked for row in self._states]
        table[:, self._index] = np.array(
            [
                (
                    1.0, a.seed is not None, 1.0, _sharpening(a),
                    max(a.temperature, _NEARLY_GREEDY), max(a.number_temperature, _NEARLY_GREEDY),
                    a.top_p, a.top_k,
                )
                for a in asked
            ],
            dtype=np.float32,
        ).reshape(len(asked), 8).T  # fmt: skip
        self._any_sharpened = bool((table[3, self._index] != 1).any())
        self._any_top_p = bool((table[6, self._index] < 1).any())
        self._any_top_k = bool((table[7, self._index] > 0).any())
        table[2:6, table[0] == 0] = 1
        table[6, table[0] == 0] = 1
        on_device = self._sent(table)
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
        newest_R = np.array([output[-1] if output else -1 for output in self._outputs], dtype=np.int64)
        n_output_R = np.array([len(output) for output in self._outputs], dtype=np.int64)
        n_output_R -= (newest_R < 0) & (n_output_R > 0)  # vLLM writes -1 for a token that is still on its way
        lag_R = np.where(self._is_read, self._n_given + n_output_R - self._n_read, 0)
        if (lag_R < 0).any():  # tokens were taken back
            lag_R = self._start_again(lag_R)
        n_steps = int(lag_R.max(initial=0))
        sent = np.full((n_steps + 2, self._n_slots), -1, dtype=np.int32)
        reads_one_R = (lag_R == 1) & (newest_R >= 0) & (self._n_read >= self._n_given)
        sent[0, self._index[reads_one_R]] = newest_R[reads_one_R]
        for r in ((lag_R > 0) & ~reads_one_R).nonzero()[0].tolist():
            row = self._states[r]
            tokens = [*row.given, *row.output[: n_output_R[r]]][self._n_read[r] :]
            sent[: len(tokens), self._index[r]] = tokens
        begins = False
        for r in self._begun:
            beginning = self._states[r].asked.beginning
            if n_output_R[r] < len(beginning):
                sent[n_steps, self._index[r]] = beginning[n_output_R[r]]
                begins = True
        if self._uniform:
            positions = n_output_R[self._drawing].tolist()
            bits = [bits[min(p, len(bits) - 1)] for bits, p in zip(self._uniform, positions, strict=True)]
            sent[n_steps + 1, self._index[self._drawing]] = bits
        is_new_text = bool((self._n_read < self._n_given).any())
        self._n_read += lag_R
        on_device = self._sent(sent)
        if self._constraint is not None:
            for tokens_B in on_device[:n_steps].long():
                self._read(self._constraint, tokens_B, is_new_text)
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
        if self._checks:
            moves_B &= ~self._broken_B
        constraint.advance(tokens_B, moves_B)

    def _start_again(self, lag_R: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Forget what the rows have read of which tokens were taken back; return how much they lag now."""
        rows = (lag_R < 0).nonzero()[0]
        if self._constraint is not None:
            requests = [self._states[r].asked.request for r in rows]
            self._constraint.put(self._index[rows].tolist(), requests)
        lag_R[rows] += self._n_read[rows]
        self._n_read[rows] = 0
        return lag_R

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


def _sharpening(asked: Arguments) -> float:
    """Return what the logits of numbers are multiplied by, so that vLLM's temperature becomes theirs."""
    if asked.seed is not None or asked.number_temperature == asked.temperature:
        return 1.0
    return asked.temperature / max(asked.number_temperature, _NEARLY_GREEDY)
