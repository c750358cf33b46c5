"""Slots: samples that share one batch, each at a place of its own in its text, and the step that moves them.

A sample takes a slot, is drawn token by token beside the others, and leaves the slot to the next one: nothing
waits for the longest. Every tensor has one row for each slot and stays where it is, so on a GPU a whole step,
from the model to the drawn token and the masks of the next one, is recorded once and replayed as one CUDA
graph. Samples stand in the first rows; a step works on these alone.

    slots.put([0, 1], samples)         prompt read, first token not drawn yet
    slots.launch(2)                    one token more; on a GPU this returns at once
    states = slots.collect(2)          (2,) uint8: RUNNING, STOPPED, CUT or FORBIDDEN
    slots.written([0])                 [(token ids, their log-probability)]

What a prompt leaves in the key-value cache is kept for the next sample with the same prompt.

Not here: who waits for a slot (continuous.py), masks (tokens/masking.py), how a token is drawn (drawing.py).
"""

# Shape legend: B slots in use, V vocabulary, T tokens, R samples that are put.

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from crystallm_kit.engines.cache import cache_argument, growing_cache
from crystallm_kit.engines.drawing import draw, uniform_numbers
from crystallm_kit.engines.engine import Sampling
from crystallm_kit.engines.recording import record
from crystallm_kit.tokens.masking import WyckoffConstraint
from crystallm_kit.tokens.requests import Request

RUNNING, STOPPED, CUT, FORBIDDEN = range(4)
MAX_TOP = 20  # alternatives told for a token
_FIRST_ROOM = 64  # tokens of prompt and completion; most crystals of 20 atoms end within it
_PROMPTS_KEPT = 256


@dataclass(frozen=True)
class SlotSample:
    """What a slot is given.

    Attributes:
        prompt: Token ids, one or more.
        given: Token ids that the completion must begin with.
        request: The constraint; None: free.
        sampling: How tokens are drawn.
        index: With sampling.seed it determines the draws.
        n_tokens: The completion is cut there.
    """

    prompt: tuple[int, ...]
    given: tuple[int, ...]
    request: Request | None
    sampling: Sampling
    index: int
    n_tokens: int


class Slots:
    """The batch.

    Args:
        model: Adapter's name -> causal LM of transformers, all of one architecture, with full attention.
        n_slots: Samples at a time.
        device: Where everything lives.
        vocabulary_size: Columns of the logits.
        end: Id of the end token; -1: none.
        stop_table: States of the stop text, as engines/stopping.py makes it; None: no such text.
        is_constrained: Whether requests may come.
        own_attention: Whether the models attend by slot_attention.py.
    """

    def __init__(
        self,
        model: Callable[[str], Any],
        n_slots: int,
        *,
        device: torch.device,
        vocabulary_size: int,
        end: int = -1,
        stop_table: torch.Tensor | None = None,
        is_constrained: bool = True,
        own_attention: bool = False,
    ) -> None:
        self.model = model
        self.n_slots = n_slots
        self.device = device
        self.end = end
        self.stop_table = stop_table
        self.adapter = ""
        self.constraint = (
            WyckoffConstraint.empty(n_slots, vocabulary_size=vocabulary_size, device=device)
            if is_constrained
            else None
        )

        def rows(*shape: int, dtype: torch.dtype = torch.long) -> torch.Tensor:
            return torch.zeros(n_slots, *shape, dtype=dtype, device=device)

        self.inputs = rows()  # the token that is read next
        self.positions = rows()  # its position
        self.n_written = rows()
        self.limit = rows()
        self.state = rows(dtype=torch.uint8)
        self.token = rows()  # the last one drawn
        self.token_log = rows(dtype=torch.float32)  # its log-probability
        self.log_probability = rows(dtype=torch.float64)
        self.stop_state = rows()
        self.temperature = rows(dtype=torch.float32)
        self.number_temperature = rows(dtype=torch.float32)
        self.top_p = rows(dtype=torch.float32)
        self.top_k = rows()
        self.written_ids = rows(_FIRST_ROOM)
        self.given = rows(_FIRST_ROOM)
        self.draws = rows(_FIRST_ROOM, dtype=torch.float32)
        self.top_ids = rows(MAX_TOP)
        self.top_logs = rows(MAX_TOP, dtype=torch.float32)
        self.states: torch.Tensor | None = None  # (2 x layers, slots, heads, T, width)
        self._places = np.zeros(n_slots, dtype=np.int64)  # positions, as the host knows them
        self._cuts = np.zeros(n_slots, dtype=bool)  # slots with top-p or top-k
        self._prompts: OrderedDict[tuple[str, tuple[int, ...]], torch.Tensor] = OrderedDict()
        self._graphs: dict[Any, Any] = {}
        self._pool: Any = None
        self._views: dict[int, WyckoffConstraint] = {}
        self._recording = device.type == "cuda"
        self._own_attention = own_attention

    # Taking and leaving a slot

    @torch.inference_mode()
    def put(self, rows: Sequence[int], samples: Sequence[SlotSample]) -> None:
        """Give samples their slots; all for the adapter in use."""
        longest = max(s.n_tokens for s in samples)
        if longest > self.written_ids.shape[1]:
            self._widen(longest)
        index = torch.tensor(list(rows), device=self.device)
        for prompt in dict.fromkeys(s.prompt for s in samples):
            of_prompt = [row for row, s in zip(rows, samples, strict=True) if s.prompt == prompt]
            self._read(prompt, of_prompt)
        integers = np.array(
            [
                (s.prompt[-1], len(s.prompt) - 1, s.n_tokens, s.sampling.top_k) for s in samples
            ]
        )  # fmt: skip
        reals = np.array(
            [
                (
                    s.sampling.temperature,
                    s.sampling.temperature
                    if s.sampling.number_temperature is None
                    else s.sampling.number_temperature,
                    s.sampling.top_p,
                )
                for s in samples
            ],
            dtype=np.float32,
        )
        integers_R4, reals_R3 = self._sent(integers), self._sent(reals)
        self.inputs[index] = integers_R4[:, 0]
        self.positions[index] = integers_R4[:, 1]
        self.limit[index] = integers_R4[:, 2]
        self.top_k[index] = integers_R4[:, 3]
        self.temperature[index] = reals_R3[:, 0]
        self.number_temperature[index] = reals_R3[:, 1]
        self.top_p[index] = reals_R3[:, 2]
        for tensor in (self.n_written, self.state, self.log_probability, self.stop_state):
            tensor[index] = 0
        draws = np.zeros((len(samples), longest), dtype=np.float32)
        given = np.full((len(samples), longest), -1, dtype=np.int64)
        for i, sample in enumerate(samples):
            draws[i, : sample.n_tokens] = uniform_numbers(sample.sampling.seed, sample.index, sample.n_tokens)
            beginning = sample.given[: sample.n_tokens]
            given[i, : len(beginning)] = beginning
        self.draws[index, :longest] = self._sent(draws)
        self.given[index, :longest] = self._sent(given)
        if self.constraint is not None:
            self.constraint.put(rows, [s.request for s in samples])
        self._places[list(rows)] = integers[:, 1]
        self._cuts[list(rows)] = [s.sampling.top_k > 0 or s.sampling.top_p < 1 for s in samples]

    @torch.inference_mode()
    def move(self, from_rows: Sequence[int], to_rows: Sequence[int]) -> None:
        """Copy samples to other slots, all at once; what stood there is gone."""
        origin, target = (torch.tensor(list(rows), device=self.device) for rows in (from_rows, to_rows))
        for tensor in self._row_tensors():
            tensor[target] = tensor[origin]
        if self.states is not None:
            self.states[:, target] = self.states[:, origin]
        if self.constraint is not None:
            self.constraint.move(from_rows, to_rows)
        for array in (self._places, self._cuts):
            array[list(to_rows)] = array[list(from_rows)]

    def written(self, rows: Sequence[int]) -> list[tuple[list[int], float]]:
        """Return for each of these slots the token ids so far, and their log-probability."""
        index = torch.tensor(list(rows), device=self.device)
        n = self.n_written[index]
        longest = int(n.max())
        ids, logs = self.written_ids[index, :longest].cpu().numpy(), self.log_probability[index].tolist()
        return [(ids[i, :k].tolist(), logs[i]) for i, k in enumerate(n.tolist())]

    def _row_tensors(self) -> tuple[torch.Tensor, ...]:
        return (
            self.inputs, self.positions, self.n_written, self.limit, self.state, self.token, self.token_log,
            self.log_probability, self.stop_state, self.temperature, self.number_temperature, self.top_p,
            self.top_k, self.written_ids, self.given, self.draws,
        )  # fmt: skip

    def _sent(self, array: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    def _widen(self, n_tokens: int) -> None:
        width = self.written_ids.shape[1]
        while width < n_tokens:
            width *= 2
        for name in ("written_ids", "given", "draws"):
            old = getattr(self, name)
            new = old.new_zeros(self.n_slots, width)
            new[:, : old.shape[1]] = old
            setattr(self, name, new)
        self._forget_graphs()

    # Reading a prompt

    def _read(self, prompt: tuple[int, ...], rows: list[int]) -> None:
        """Put what a prompt leaves in the cache, but for its last token, into some slots."""
        key = (self.adapter, prompt)
        states = self._prompts.pop(key, None)
        if states is None:
            states = self._states_of(prompt[:-1] or prompt)[:, :, : len(prompt) - 1]
        self._prompts[key] = states
        while len(self._prompts) > _PROMPTS_KEPT:
            self._prompts.popitem(last=False)
        cache = self._room_for(len(prompt), states)
        cache[:, torch.tensor(rows, device=self.device), :, : len(prompt) - 1] = states[:, None]

    def _states_of(self, ids: tuple[int, ...]) -> torch.Tensor:
        """Return (2 x layers, heads, T, width): keys and values of some tokens."""
        model = self.model(self.adapter)
        cache = growing_cache(model.config)
        model(
            input_ids=torch.tensor([ids], device=self.device), use_cache=True, logits_to_keep=1,
            **cache_argument(model, cache),
        )  # fmt: skip
        return torch.cat([torch.cat([layer.keys, layer.values]) for layer in cache.layers])

    def _room_for(self, n_tokens: int, like: torch.Tensor) -> torch.Tensor:
        """Return the cache, with room for so many tokens a slot; `like` tells layers, heads and width."""
        have = 0 if self.states is None else self.states.shape[3]
        room = max(have, _FIRST_ROOM)
        while room < n_tokens:
            room *= 2
        if self.states is None or room > have:
            layers, heads, width = like.shape[0], like.shape[-3], like.shape[-1]
            grown = like.new_zeros(layers, self.n_slots, heads, room, width)
            if self.states is not None:
                grown[:, :, :, :have] = self.states
            self.states = grown
            self._forget_graphs()
        return self.states

    # A step

    @torch.inference_mode()
    def launch(self, n: int, *, top: bool = False) -> None:
        """Begin to draw one token for each of the first n slots that runs.

        Args:
            n: Slots to work on.
            top: Also find the MAX_TOP likeliest tokens (top_ids, top_logs).
        """
        needed = int(self._places[:n].max()) + 1
        if self.states is None:
            raise RuntimeError("a step before any sample was put")
        self._room_for(needed, self.states)
        cuts = bool(self._cuts[:n].any())
        if self._recording:
            n_rows, n_tokens = self._bucket(n), self._tokens_bucket(needed)
            self._replay(n_rows, n_tokens, cuts, top)
        else:
            self._compute(n, needed, cuts, top)
        self._places[:n] += 1

    def collect(self, n: int) -> npt.NDArray[np.uint8]:
        """Return (n,) states of the first slots, when the step that was launched is done."""
        return self.state[:n].cpu().numpy()

    def _bucket(self, n: int) -> int:
        """Return how many rows a recorded step has: a power of two, or all."""
        return min(self.n_slots, 1 << (n - 1).bit_length())

    def _tokens_bucket(self, n_tokens: int) -> int:
        """Return up to where a recorded step looks at the cache; slot_attention.py needs no limit."""
        if self._own_attention:
            return 0
        step = 32 if n_tokens <= 128 else 128
        return -(-n_tokens // step) * step

    def _replay(self, n: int, n_tokens: int, cuts: bool, top: bool) -> None:
        tracks = self.constraint is not None and self.constraint.tracks
        plans = 0 if self.constraint is None else self.constraint.plans.data_ptr()
        key = (n, n_tokens, cuts, top, self.adapter, tracks, plans)
        if key not in self._graphs:
            self._graphs[key] = self._record(n, n_tokens, cuts, top)
        self._graphs[key].replay()

    def _record(self, n: int, n_tokens: int, cuts: bool, top: bool) -> Any:
        """Return a CUDA graph of the step."""
        graph = record(
            lambda: self._compute(n, n_tokens, cuts, top), changes=self._changing(), pool=self._pool
        )
        self._pool = graph.pool()
        return graph

    def _changing(self) -> list[torch.Tensor]:
        changing = [
            self.inputs, self.positions, self.n_written, self.state, self.token, self.token_log,
            self.log_probability, self.stop_state, self.written_ids,
        ]  # fmt: skip
        if self.constraint is not None:
            changing += self.constraint.changing()
        return changing

    def _forget_graphs(self) -> None:
        if self._graphs:
            torch.cuda.synchronize(self.device)
        self._graphs.clear()
        self._pool = None  # it goes with its last graph

    def _constraint_of(self, n: int) -> WyckoffConstraint | None:
        if self.constraint is None:
            return None
        known = self._views.get(n)
        if known is None or known.plans.data_ptr() != self.constraint.plans.data_ptr():
            if len(self._views) > 64:
                self._views.clear()
            known = self._views[n] = self.constraint.take(slice(n))
        known.tracks = self.constraint.tracks
        return known

    def _compute(self, n: int, n_tokens: int, cuts: bool, top: bool) -> None:
        """Move the first n slots on; the cache is looked at up to n_tokens."""
        running = self.state[:n] == RUNNING
        t = self.n_written[:n].clamp(max=self.draws.shape[1] - 1)[:, None]
        logits_BV = self._logits(n, n_tokens)
        constraint = self._constraint_of(n)
        temperature = self.temperature[:n]
        forced = self.given[:n].gather(1, t).squeeze(1)
        forbidden = torch.zeros_like(running)
        if constraint is not None:
            mask_BV = constraint.mask()
            known = forced.clamp(min=0)[:, None]
            forbidden = running & (forced >= 0) & ~mask_BV.gather(1, known).squeeze(1)
            logits_BV = logits_BV.masked_fill(~mask_BV, -torch.inf)
            temperature = torch.where(constraint.in_numbers, self.number_temperature[:n], temperature)
        uniform = self.draws[:n].gather(1, t).squeeze(1)
        token = (
            draw(logits_BV, uniform, temperature, top_p=self.top_p[:n], top_k=self.top_k[:n])
            if cuts
            else draw(logits_BV, uniform, temperature)
        )
        token = torch.where(forced >= 0, forced, token)
        logs_BV = torch.log_softmax(logits_BV, -1)
        chosen = logs_BV.gather(1, token[:, None]).squeeze(1)
        if top:
            k = min(MAX_TOP, logits_BV.shape[1])
            logs, ids = logs_BV.topk(k, dim=-1)
            self.top_logs[:n, :k] = logs
            self.top_ids[:n, :k] = ids
        self.token[:n] = token
        self.token_log[:n] = chosen
        self.log_probability[:n] += torch.where(running, chosen.double(), 0)
        old = self.written_ids[:n].gather(1, t).squeeze(1)
        self.written_ids[:n].scatter_(1, t, torch.where(running, token, old)[:, None])
        self.inputs[:n] = torch.where(running, token, self.inputs[:n])
        self.positions[:n] += running
        self.n_written[:n] += running
        if constraint is not None:
            constraint.advance(token, running & ~forbidden)
        ended = token == self.end
        if self.stop_table is not None:
            reached = self.stop_table[self.stop_state[:n], token]
            holds = reached == len(self.stop_table)
            ended = ended | holds
            self.stop_state[:n] = torch.where(running, reached.masked_fill(holds, 0), self.stop_state[:n])
        is_cut = self.n_written[:n] >= self.limit[:n]
        state = torch.where(ended, STOPPED, torch.where(is_cut, CUT, RUNNING))
        state = torch.where(forbidden, FORBIDDEN, state).to(torch.uint8)
        self.state[:n] = torch.where(running, state, self.state[:n])

    def _logits(self, n: int, n_tokens: int) -> torch.Tensor:
        positions, states = self.positions[:n], self.states
        if states is None:
            raise RuntimeError("a step before any sample was put")
        if self._own_attention:
            known, seen = states[:, :n], torch.ones((1, 1, 1, 1), dtype=torch.bool, device=self.device)
            settings = {"slot_positions": positions}
        else:
            known, settings = states[:, :n, :, :n_tokens], {}
            places = torch.arange(n_tokens, device=self.device)
            seen = (places <= positions[:, None])[:, None, None, :]  # (B, 1, 1, T)
        model = self.model(self.adapter)
        out = model(
            input_ids=self.inputs[:n, None],
            position_ids=positions[:, None],
            attention_mask=seen,
            use_cache=True,
            logits_to_keep=1,
            **cache_argument(model, _slot_cache(known, positions)),
            **settings,
        )
        logits: torch.Tensor = out.logits[:, -1].float()
        return logits


def _slot_cache(states: torch.Tensor, positions: torch.Tensor) -> Any:
    """Return a transformers Cache over the slots' states; each row writes at its own position.

    Args:
        states: (2 x layers, B, heads, T, width), written in place.
        positions: (B,) of the tokens that are read.
    """
    from transformers.cache_utils import Cache, CacheLayerMixin

    rows = torch.arange(len(positions), device=positions.device)
    places = positions.clamp(max=states.shape[3] - 1)

    class SlotLayer(CacheLayerMixin):  # type: ignore[misc]
        """Keys and values of one layer."""

        is_sliding = False
        is_compileable = False

        def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
            super().__init__()
            self.keys, self.values = keys, values
            self.is_initialized = True

        def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
            """Do nothing: the slots are there."""

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            """Write the states of one new token for each row; return all."""
            del args, kwargs
            self.keys[rows, :, places] = key_states[:, :, 0]
            self.values[rows, :, places] = value_states[:, :, 0]
            return self.keys, self.values

        def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
            """Return (length, offset) of the cache."""
            del args, kwargs
            return self.keys.shape[-2], 0

        def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
            """Return 0: every row has a length of its own, told by its position."""
            del args, kwargs
            return 0

        def get_max_length(self) -> int:
            """Return the room for tokens."""
            return int(self.keys.shape[-2])

        get_max_cache_shape = get_max_length

    n_layers = states.shape[0] // 2
    return Cache(layers=[SlotLayer(states[2 * i], states[2 * i + 1]) for i in range(n_layers)])
